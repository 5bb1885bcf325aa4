"""The zoo: sizes as published, shapes, widths, and blocks that compute what other libraries' blocks compute."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torchvision
from timm.layers import BatchNormAct2d, create_conv2d
from timm.models.resnetv2 import PreActBasic
from torch import Tensor, nn
from torchvision.models.densenet import _DenseLayer
from torchvision.models.mobilenetv2 import InvertedResidual as TorchvisionInvertedResidual
from torchvision.models.resnet import Bottleneck as TorchvisionBottleneck

import netdeconv
from netdeconv import zoo
from netdeconv.zoo.densenet import densenet121
from netdeconv.zoo.dpn import dpn92
from netdeconv.zoo.efficientnet import efficientnet_b0
from netdeconv.zoo.mobilenet import InvertedResidual
from netdeconv.zoo.pnasnet import pnasnet_a
from netdeconv.zoo.preact_resnet import PreActBlock
from netdeconv.zoo.resnet import ResidualBottleneck
from netdeconv.zoo.senet import senet18
from small_networks import batch_norms, randomise_statistics

ROUNDING = 1e-5  # float32, a few layers, relative to values around one

# Parameters counted in the authors' code (github.com/yechengxi/deconvolution), whose whitened counts are the "Net
# Size" of Ye et al. 2020, table 1: batch norm and whitened, each for 10 classes, then for 100.
PUBLISHED = {
    "vgg11": (9_231_114, 9_225_610),
    "vgg13": (9_416_010, 9_410_122),
    "vgg16": (14_728_266, 14_719_818, 14_774_436, 14_765_988),
    "vgg19": (20_040_522, 20_029_514),
    "resnet18": (11_173_962, 11_169_162, 11_220_132, 11_215_332),
    "resnet34": (21_282_122, 21_273_610),
    "resnet50": (23_520_842, 23_494_282),
    "preact_resnet18": (11_171_274, 11_169_162, 11_217_444, 11_215_332),
    "densenet121": (6_956_298, 6_883_018, 7_048_548, 6_975_268),
    "resnext29_32x4d": (4_774_218, 4_761_610, 4_866_468, 4_853_860),
    "mobilenet_v2": (2_296_922, 2_279_378, 2_412_212, 2_394_668),
    "dpn92": (34_236_634, 34_179_970, 34_467_124, 34_410_460),
    "pnasnet_a": (130_646, 128_226, 146_576, 144_156),
    "senet18": (11_260_354, 11_258_242, 11_306_524, 11_304_412),
    "efficientnet_b0": (2_912_089, 2_912_057, 2_940_979, 2_940_947),
}

# The same code's whitened networks for ImageNet: parameters, and batch norms that are left in them.
IMAGENET = {"resnet18": (11_686_504, 3), "resnet50": (25_538_152, 4), "densenet121": (7_905_448, 0)}

# Channels and side of the last map for 32x32 images; the sides are the kernels that the authors' code pools with.
LAST_MAPS = {
    "resnet18": (512, 4),
    "resnet50": (2048, 4),
    "preact_resnet18": (512, 4),
    "densenet121": (1024, 4),
    "resnext29_32x4d": (1024, 8),
    "mobilenet_v2": (1280, 4),
    "dpn92": (2560, 4),
    "pnasnet_a": (176, 8),
    "senet18": (512, 4),
    "efficientnet_b0": (320, 1),
}


def size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", zoo.NETWORKS)
def test_parameter_counts_are_those_published(name: str) -> None:
    found = []
    with torch.device("meta"):
        for classes in (10, 100)[: len(PUBLISHED[name]) // 2]:
            model = zoo.create(name, num_classes=classes)
            found += [size(model), size(netdeconv.convert(model, exclude=zoo.PUBLISHED_EXCLUDE.get(name)))]
    assert tuple(found) == PUBLISHED[name]


@pytest.mark.parametrize("name", IMAGENET)
def test_published_exclusions_give_the_counts_for_imagenet(name: str) -> None:
    with torch.device("meta"):
        model = torchvision.models.get_model(name)
        converted = netdeconv.convert(model, exclude=zoo.PUBLISHED_EXCLUDE.get(f"torchvision:{name}"))
    assert (size(converted), len(batch_norms(converted))) == IMAGENET[name]


def test_published_efficientnet_keeps_50_batch_norms() -> None:
    model = zoo.create("efficientnet_b0", width=0.125)
    plan = netdeconv.plan_conversion(model, exclude=zoo.PUBLISHED_EXCLUDE["efficientnet_b0"])
    assert [entry.path for entry in plan if entry.action.value == "whiten"] == ["conv1", "linear"]
    assert len(plan.batch_norms_left) == 50


@pytest.mark.parametrize("name", LAST_MAPS)
def test_last_map_has_published_shape(name: str) -> None:
    with torch.device("meta"):
        model = zoo.create(name).eval()
        shapes: list[torch.Size] = []
        model.get_submodule("stages").register_forward_hook(lambda *call: shapes.append(call[-1].shape))
        for side in (32, 64):
            model(torch.empty(2, 3, side, side))
    channels, side = LAST_MAPS[name]
    assert shapes == [(2, channels, side, side), (2, channels, 2 * side, 2 * side)]


@pytest.mark.parametrize("name", zoo.NETWORKS)
def test_width_is_a_factor_on_all_channels(name: str) -> None:
    def channels(width: float) -> list[int]:
        with torch.device("meta"):
            model = zoo.create(name, num_classes=7, width=width)
        return [module.num_features for module in model.modules() if isinstance(module, nn.BatchNorm2d)]

    assert [4 * count for count in channels(0.25)] == channels(1)  # all published numbers are multiples of 4


@pytest.mark.parametrize("name", zoo.NETWORKS)
def test_narrowest_network_runs(name: str) -> None:
    with torch.device("meta"):
        assert zoo.create(name, num_classes=7, width=0.001).eval()(torch.empty(1, 3, 32, 32)).shape == (1, 7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "resnet19"}, "expected a network out of .*resnet18.*, got 'resnet19'"),
        ({"name": "vgg11", "num_classes": 0}, "expected num_classes of at least 1, got 0"),
        ({"name": "vgg11", "width": 0.0}, "expected width > 0, got 0.0"),
        ({"name": "vgg11", "width": float("nan")}, "expected width > 0, got nan"),
    ],
)
def test_wrong_arguments(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        zoo.create(**options)  # type: ignore[arg-type]


def agree(ours: nn.Module, theirs: nn.Module, x: Tensor, to_ours: Callable[[Tensor], Tensor] | None = None) -> None:
    """Assert that both modules, given the same numbers in the order of their state, compute the same."""
    torch.manual_seed(1)
    randomise_statistics(theirs.eval())
    state = theirs.state_dict()
    values = [state[name] for name in sorted(state, key=lambda name: name.startswith("downsample"))]  # it comes last
    ours.eval().load_state_dict(dict(zip(ours.state_dict(), values, strict=True)))
    with torch.no_grad():
        expected = theirs(x) if to_ours is None else to_ours(theirs(x))
        torch.testing.assert_close(ours(x), expected, rtol=ROUNDING, atol=ROUNDING)


def image(channels: int) -> Tensor:
    return torch.randn(2, channels, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("out", "stride"), [(16, 1), (16, 2), (32, 1)])
@pytest.mark.parametrize(("expansion", "groups"), [(4, 1), (2, 4)])
def test_bottleneck_is_torchvisions(out: int, stride: int, expansion: int, groups: int) -> None:
    kind = type("Bottleneck", (TorchvisionBottleneck,), {"expansion": expansion})
    down = None
    if (out, stride) != (16, 1):
        down = nn.Sequential(nn.Conv2d(16, out, 1, stride, bias=False), nn.BatchNorm2d(out))
    # torchvision's middle has planes * base_width / 64 * groups channels.
    theirs = kind(16, out // expansion, stride, down, groups=groups, base_width=64 // groups)
    agree(ResidualBottleneck(16, out, stride, expansion=expansion, groups=groups), theirs, image(16))


@pytest.mark.parametrize(("out", "stride"), [(8, 1), (8, 2), (16, 2)])
def test_inverted_residual_is_torchvisions(out: int, stride: int) -> None:
    theirs = TorchvisionInvertedResidual(8, out, stride, 6)
    # Six is out of reach of these inputs, so that ReLU6 is ReLU.
    agree(InvertedResidual(8, out, stride, expansion=6), theirs, 0.1 * image(8))


@pytest.mark.parametrize(("out", "stride"), [(8, 1), (8, 2), (16, 1)])
def test_preactivation_block_is_timms(out: int, stride: int) -> None:
    theirs = PreActBasic(
        8, out, bottle_ratio=1.0, stride=stride, conv_layer=create_conv2d, norm_layer=BatchNormAct2d,
        proj_layer=lambda i, o, stride, **_: nn.Conv2d(i, o, 1, stride, bias=False),
    )  # fmt: skip
    agree(PreActBlock(8, out, stride), theirs, image(8))


@pytest.mark.parametrize("name", sorted(set(LAST_MAPS) - {"densenet121"}))
def test_stem_activates_unless_the_blocks_do(name: str) -> None:
    model = zoo.create(name, width=0.125)
    read: list[Tensor] = []
    model.get_submodule("stages").register_forward_pre_hook(lambda _, args: read.append(args[0]))
    model(image(3).repeat(1, 1, 4, 4))
    assert bool((read[0] < 0).any()) == (name == "preact_resnet18")


def test_dense_layer_is_torchvisions_and_puts_the_new_in_front() -> None:
    ours = densenet121(width=0.125).stages[0][1]
    x = image(12)
    agree(ours, _DenseLayer(12, 4, bn_size=4, drop_rate=0.0), x, lambda new: torch.cat([new, x], 1))


def test_squeeze_excitation_is_torchvisions() -> None:
    ours = senet18(width=0.5).stages[0][0].excitation
    agree(ours, torchvision.ops.SqueezeExcitation(32, 2), image(32))


def with_constant_branch(block: nn.Module, last: str, value: float) -> nn.Module:
    """Let a block's convolutions give the same value everywhere."""
    norm = block.get_submodule(last)
    nn.init.zeros_(norm.weight)
    nn.init.constant_(norm.bias, value)
    return block.eval()


def test_dual_path_block_adds_some_channels_and_appends_the_others() -> None:
    block = with_constant_branch(dpn92(width=0.125).stages[0][1], "bn3", 1.0)  # 32 residual, 2 dense channels
    x = image(36)
    expected = torch.cat([x[:, :32] + 1, x[:, 32:], torch.ones(2, 2, 8, 8)], 1).relu()
    torch.testing.assert_close(block(x), expected, rtol=0, atol=0)


def test_efficientnet_block_adds_its_output_where_it_has_no_shortcut() -> None:
    network = efficientnet_b0(width=0.5)
    for stage, position, shortcut in ((1, 1, 1), (2, 0, 0)):
        block = with_constant_branch(network.stages[stage][position], "bn3", 1.0)
        nn.init.zeros_(block.excitation.fc2.weight)
        nn.init.zeros_(block.excitation.fc2.bias)  # every channel weighed by 1/2
        x = image(12)
        out = block(x)
        expected = 0.5 + x if shortcut else torch.full_like(out, 1.5)
        torch.testing.assert_close(out, expected, rtol=0, atol=0)


def test_pnasnet_cell_adds_the_pooled_map() -> None:
    cells = pnasnet_a(width=0.1).stages[1]
    x = image(8)
    pooled = nn.functional.max_pool2d(x, 3, 1, 1)
    kept = with_constant_branch(cells[1], "bn1", 1.0)
    torch.testing.assert_close(kept(x), (1 + pooled).relu(), rtol=0, atol=0)
    halving = with_constant_branch(cells[0], "bn1", 1.0)
    project = halving.get_submodule("shortcut")
    x = image(4)
    assert halving(x).shape == (2, 8, 4, 4)
    torch.testing.assert_close(halving(x), (1 + project(nn.functional.max_pool2d(x, 3, 2, 1))).relu())
