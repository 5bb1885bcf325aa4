"""Layers behind a global pooling: they stay plain, the plan says so, and what was asked for still happens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.segmentation import deeplabv3

import netdeconv
from netdeconv import WhitenedConv2d, WhiteningConfig, calibrate, convert, plan_conversion
from netdeconv.nn.layer import WhitenedLayer
from netdeconv.surgery import Action
from netdeconv.surgery.batches import max_relative_error
from netdeconv.surgery.structure import Structure
from netdeconv.zoo import create
from small_networks import batch_norms, randomise_statistics

PRESERVED_TOLERANCE = 1e-3  # float32, some ten layers deep, each amplifying rounding by at most the root's condition
FUSED_TOLERANCE = 1e-4  # float32
WHY = "behind a global pooling it sees one row per image"

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "mobilenet_v3_small": lambda: torchvision.models.mobilenet_v3_small(num_classes=5),
    "efficientnet_b0": lambda: torchvision.models.efficientnet_b0(num_classes=5),
    "lraspp": lambda: torchvision.models.segmentation.lraspp_mobilenet_v3_large(weights_backbone=None, num_classes=5),
    "timm_seresnet": lambda: timm.create_model("seresnet18", num_classes=5),
    "timm_efficientnet": lambda: timm.create_model("efficientnet_b0", num_classes=5),
    "timm_mobilenetv3": lambda: timm.create_model("mobilenetv3_small_100", num_classes=5),
    "senet18": lambda: create("senet18", width=0.125),
    "zoo_efficientnet_b0": lambda: create("efficientnet_b0", width=0.25),
}
# Small blocks and few samples: what is tested is the surgery, not the roots.
SMALL = WhiteningConfig(block_size=16, max_samples=256)


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return randomise_statistics(NETWORKS[name]())


def of_one_pixel(model: nn.Module, x: Tensor) -> set[str]:
    """The oracle: paths of the 1x1 convolutions whose input is one pixel at the size of x, by running the model."""
    found: set[str] = set()

    def note(path: str) -> Callable[..., None]:
        return lambda layer, args: (
            found.add(path) if args[0][0, 0].numel() == 1 and layer.kernel_size == (1, 1) else None
        )

    handles = [m.register_forward_pre_hook(note(p)) for p, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    model.eval()(x)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_the_plan_leaves_the_layers_that_see_one_pixel_of_an_image(name: str) -> None:
    model = build(name)
    pooled = of_one_pixel(model, torch.randn(1, 3, 128, 128))  # large enough that no map of the trunk is one pixel
    plan = plan_conversion(model)
    left = {entry.path for entry in plan.where(Action.LEAVE)}
    assert left and left <= pooled
    assert pooled - left <= {"conv_head"}  # timm's MobileNetV3 pools in a forward; the layer notices when it runs
    assert all(plan[path].why == WHY and not plan[path].asked for path in left)
    assert f"{len(left)} left as they are" in plan.summary and WHY in str(plan)
    converted = convert(model)  # warnings are errors here
    assert {path for path, m in converted.named_modules() if type(m) is nn.Conv2d} == left
    assert not batch_norms(converted)


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_they_compute_what_they_did_where_the_output_is_preserved(name: str) -> None:
    model, x = build(name).eval(), torch.randn(3, 3, 64, 64)
    converted = convert(model, SMALL, preserve=[torch.randn_like(x) for _ in range(2)])
    plain = [path for path, module in converted.named_modules() if type(module) is nn.Conv2d]
    assert plain and all(
        torch.equal(converted.get_parameter(f"{p}.weight"), model.get_parameter(f"{p}.weight")) for p in plain
    )
    with torch.no_grad():
        assert max_relative_error(converted(x), model(x)) <= PRESERVED_TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_such_networks_are_calibrated_and_fused(name: str) -> None:
    model = calibrate(convert(build(name), SMALL), [torch.randn(3, 3, 64, 64) for _ in range(2)]).eval()
    x = torch.randn(3, 3, 64, 64)
    assert netdeconv.check_fused(model, netdeconv.fuse(model), x, tolerance=FUSED_TOLERANCE) <= FUSED_TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_the_published_procedure_whitens_them(name: str) -> None:
    model = NETWORKS[name]()
    paper = WhiteningConfig.paper()
    plan = plan_conversion(model, paper)
    assert not plan.where(Action.LEAVE)
    for whitening in (paper, lambda path, layer: paper):
        converted = convert(model, whitening)
        assert nn.Conv2d not in {type(module) for module in converted.modules()}
        assert all(m.whitening.config.debias is False for m in converted.modules() if isinstance(m, WhitenedLayer))


def pooling(*after: nn.Module, pool: nn.Module | None = None) -> nn.Module:
    """A convolution, the pooling, and layers behind it."""
    first = nn.Conv2d(3, 4, 1)
    return nn.Sequential(first, nn.AdaptiveAvgPool2d(1) if pool is None else pool, *after)


def left(model: nn.Module, **options: Any) -> list[str]:
    return [entry.path for entry in plan_conversion(model, **options).where(Action.LEAVE)]


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (pooling(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, (1, 1))), ["2", "4"]),
        (pooling(nn.Hardswish(), nn.Dropout(), nn.GroupNorm(1, 4), nn.Identity(), nn.Conv2d(4, 4, 1)), ["6"]),
        (pooling(nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU()), nn.Conv2d(4, 4, 1)), ["2.0", "3"]),
        (nn.Sequential(nn.Sequential(nn.AdaptiveAvgPool2d((1, 1))), nn.Conv2d(3, 3, 1, groups=3)), ["1"]),
        (nn.Sequential(nn.AdaptiveAvgPool1d(1), nn.Conv1d(4, 4, 1)), ["1"]),
        (nn.Sequential(nn.AdaptiveMaxPool3d(1), nn.Conv3d(4, 4, 1)), ["1"]),
        (pooling(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)), ["2", "3"]),  # as in the pooling branch of DeepLab
        # The classifier, a larger map, more taps, a map that was made larger again, and unknown modules between.
        (pooling(nn.Flatten(), nn.Linear(4, 2)), []),
        (pooling(nn.Conv2d(4, 4, 1), pool=nn.AdaptiveAvgPool2d((1, 2))), []),
        (pooling(nn.Conv2d(4, 4, 1), pool=nn.AdaptiveAvgPool2d((1, None))), []),
        (pooling(nn.Conv2d(4, 4, 1), pool=nn.AvgPool2d(2)), []),
        (pooling(nn.Conv2d(4, 4, 3, padding=1)), []),
        (pooling(nn.Upsample(8), nn.Conv2d(4, 4, 1)), []),
        (pooling(nn.Flatten(), nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 1, 1)), []),
        (nn.Sequential(nn.Conv2d(4, 4, 1), nn.AdaptiveAvgPool2d(1)), []),
    ],
)  # fmt: skip
def test_sequences_are_followed_from_the_pooling_on(model: nn.Module, expected: list[str]) -> None:
    assert left(model) == expected


def test_a_layer_that_also_stands_elsewhere_is_whitened() -> None:
    conv = nn.Conv2d(3, 3, 1)
    assert left(nn.Sequential(conv, nn.AdaptiveAvgPool2d(1), conv)) == []
    larger = nn.Upsample(8)
    assert left(nn.Sequential(larger, nn.AdaptiveAvgPool2d(1), larger, nn.Conv2d(3, 3, 1))) == []


def test_a_part_of_a_sequence_is_no_part_of_the_next() -> None:
    assert left(nn.ModuleList([nn.Sequential(nn.AdaptiveAvgPool2d(1)), nn.Conv2d(3, 3, 1)])) == []  # type: ignore[arg-type]


def test_attributes_are_those_of_a_known_class() -> None:
    class SEModule(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(4, 2), nn.Linear(2, 4)

    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Conv2d(4, 2, 1), nn.Conv2d(2, 4, 1)

    assert not Structure(SEModule()).pooled and not Structure(Other()).pooled


@pytest.mark.parametrize(
    ("include", "expected"),
    [
        ("2", []),
        (["0", "2"], []),
        ("[02]*", []),
        (lambda path, module: path == "2", []),
        (None, ["2"]),
        (nn.Conv2d, ["2"]),  # all of a kind: not this one in particular
    ],
)
def test_who_includes_such_a_layer_by_name_gets_it_whitened(include: Any, expected: list[str]) -> None:
    model = pooling(nn.Conv2d(4, 2, 1))
    entries = [entry for entry in plan_conversion(model, include=include).where(Action.LEAVE) if not entry.asked]
    assert [entry.path for entry in entries] == expected
    assert type(convert(model, include=include)[2]) is (nn.Conv2d if expected else WhitenedConv2d)


def test_an_included_layer_computes_what_the_plain_one_does() -> None:
    model, x = pooling(nn.Conv2d(4, 2, 1)), torch.randn(6, 3, 5, 5)
    converted = convert(model, include="2")
    torch.testing.assert_close(converted(x), model(x))
    torch.testing.assert_close(converted.eval()(x), model(x))
    preserved = convert(model.eval(), include=["0", "2"], preserve=x)
    assert type(preserved[2]) is WhitenedConv2d
    assert max_relative_error(preserved(x), model(x)) <= PRESERVED_TOLERANCE
    calibrated = calibrate(convert(model, include="2"), x).eval()
    torch.testing.assert_close(calibrated(x), model(x))
    torch.testing.assert_close(netdeconv.fuse(calibrated)(x), model(x))


def test_the_pooling_branch_of_deeplab_stays_as_it_is() -> None:
    branch = deeplabv3.ASPP(8, [1, 2], 4)
    with pytest.warns(UserWarning, match=r"1 batch norms are left: convs.3.2 \(it normalises the output of convs.3.1"):
        converted = convert(branch)
    kinds = [type(module) for module in converted.convs[3]]
    assert kinds == [nn.AdaptiveAvgPool2d, nn.Conv2d, nn.BatchNorm2d, nn.ReLU]
    assert batch_norms(converted) == ["convs.3.2"] and type(converted.project[0]) is WhitenedConv2d
    x = torch.randn(4, 8, 6, 6)
    preserved = randomise_statistics(branch).eval()
    with pytest.warns(UserWarning, match="1 batch norms are left"):
        converted = convert(preserved, preserve=x)
    assert max_relative_error(converted(x), preserved(x)) <= PRESERVED_TOLERANCE
    assert plan_conversion(branch, WhiteningConfig.paper()).where(Action.LEAVE) == ()


def test_statistics_are_of_the_maps_where_there_are_some() -> None:
    layer = WhitenedConv2d(3, 2, 1, whitening=WhiteningConfig(solver="eigh"), dtype=torch.float64)
    maps, pixels = torch.randn(8, 3, 4, 4, dtype=torch.float64), torch.randn(8, 3, 1, 1, dtype=torch.float64) + 9
    calibrate(layer, [maps, pixels])
    alone = calibrate(WhitenedConv2d(3, 2, 1, whitening=WhiteningConfig(solver="eigh"), dtype=torch.float64), maps)
    torch.testing.assert_close(layer.whitening.running_mean, alone.whitening.running_mean)
    torch.testing.assert_close(layer.whitening.running_root, alone.whitening.running_root)
    calibrate(layer, pixels)  # and of pixels alone there are none
    assert torch.equal(layer.whitening.running_root, torch.eye(3, dtype=torch.float64))
    assert layer.whitening.running_mean.eq(0).all() and layer.whitening.num_updates == 0
