"""Networks of other libraries for the tests of the surgery: every block of a family once, not its full depth."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import timm
import torchvision
from timm.layers import BatchNormAct2d, create_conv2d
from torch import Tensor, nn
from torchvision.models import segmentation
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.resnet import Bottleneck, ResNet

tv = torchvision.models


def _resnet(**options: Any) -> ResNet:
    return ResNet(Bottleneck, [1, 1, 1, 1], num_classes=10, **options)


def _vgg() -> nn.Module:
    """VGG-11 with a classifier for small images: the original one has 120 million weights."""
    features = tv.vgg.make_layers(tv.vgg.cfgs["A"], batch_norm=True)
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 64), nn.ReLU(True), nn.Dropout(), nn.Linear(64, 10)]
    return nn.Sequential(features, *head)


def _segmentation(kind: Any, head: Any) -> nn.Module:
    backbone = _resnet(replace_stride_with_dilation=[False, True, True])
    stages = IntermediateLayerGetter(backbone, {"layer4": "out", "layer3": "aux"})
    return kind(stages, head(2048, 5), segmentation.fcn.FCNHead(1024, 5))


class _Pnasnet(nn.Module):
    """The cells of PNASNet in their order, narrow."""

    def __init__(self) -> None:
        super().__init__()
        pnasnet = timm.models.pnasnet
        self.conv_0 = timm.layers.ConvNormAct(3, 8, kernel_size=3, stride=2, padding=0, apply_act=False)
        self.stem_0 = pnasnet.CellStem0(8, 4, 8, 4, pad_type="same")
        self.stem_1 = pnasnet.Cell(8, 8, 20, 8, pad_type="same", match_prev_layer_dims=True, is_reduction=True)
        self.cell_0 = pnasnet.Cell(20, 8, 40, 8, pad_type="same", match_prev_layer_dims=True)
        self.head = nn.Linear(40, 10)

    def forward(self, x: Tensor) -> Tensor:
        first = self.conv_0(x)
        second = self.stem_0(first)
        third = self.stem_1(first, second)
        return self.head(self.cell_0(second, third).mean((2, 3)))


def _timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    return partial(timm.create_model, name, pretrained=False, num_classes=10, **options)


# Constructor, side of the input.
FAMILIES: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet18": (partial(tv.resnet18, num_classes=10), 32),
    "resnet50": (_resnet, 32),
    "vgg11_bn": (_vgg, 32),
    "densenet121": (partial(tv.DenseNet, 16, (2, 2, 2, 2), 32, num_classes=10), 32),
    "mobilenet_v2": (partial(tv.mobilenet_v2, num_classes=10), 32),
    "mobilenet_v3": (partial(tv.mobilenet_v3_small, num_classes=10), 32),
    "efficientnet_b0": (partial(tv.efficientnet_b0, num_classes=10), 32),
    "resnext50": (partial(_resnet, groups=32, width_per_group=4), 32),
    "regnet": (partial(tv.regnet_y_400mf, num_classes=10), 32),
    "googlenet": (partial(tv.googlenet, num_classes=10, init_weights=False), 64),
    "inception_v3": (partial(tv.inception_v3, num_classes=10, init_weights=False), 299),
    "deeplabv3_resnet50": (partial(_segmentation, segmentation.DeepLabV3, segmentation.deeplabv3.DeepLabHead), 32),
    "fcn_resnet50": (partial(_segmentation, segmentation.FCN, segmentation.fcn.FCNHead), 32),
    "timm_resnetv2": (
        partial(
            timm.models.ResNetV2,
            [1, 1, 1, 1],
            num_classes=10,
            conv_layer=create_conv2d,
            norm_layer=BatchNormAct2d,
        ),
        32,
    ),
    "timm_dpn92": (partial(timm.models.DPN, (1, 2, 1, 1), num_classes=10), 32),
    "timm_seresnet": (_timm("seresnet18"), 32),
    "timm_efficientnet": (_timm("efficientnet_b0"), 32),
    "timm_tf_efficientnet": (_timm("tf_efficientnet_b0"), 32),
    "timm_nasnet": (partial(timm.models.NASNetALarge, 10, stem_size=8, num_features=24 * 4), 64),
    "timm_pnasnet": (_Pnasnet, 64),
    "timm_repvgg": (_timm("repvgg_a0"), 32),
    "timm_mobilenetv3": (_timm("mobilenetv3_small_100"), 32),
    "timm_vit": (_timm("vit_tiny_patch16_224", img_size=32, depth=2), 32),
    "timm_convnext": (_timm("convnext_atto", depths=(1, 1, 1, 1)), 32),
}
