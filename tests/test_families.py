"""Whole networks of torchvision and timm: converted, trained a step, fused, compiled, and preserved."""

from __future__ import annotations

import contextlib
import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import netdeconv
from families import FAMILIES
from netdeconv import WhiteningConfig
from netdeconv.nn.layer import WhitenedLayer
from netdeconv.surgery.batches import max_relative_error, tensors_of
from netdeconv.surgery.structure import Structure
from small_networks import batch_norms, randomise_statistics

FUSED_TOLERANCE = 1e-4  # float32: evaluation and the fused network sum in the same order, up to the runtime's choice
PRESERVED_TOLERANCE = 1e-3  # float32, some ten layers deep, each amplifying rounding by at most the root's condition

# Small blocks and few samples: what is tested is the surgery, not the roots.
SMALL = WhiteningConfig(block_size=16, max_samples=256)
# With layers behind a global pooling, which stay plain; of DeepLab's one with its batch norm.
POOLED = {
    "mobilenet_v3", "efficientnet_b0", "regnet", "deeplabv3_resnet50", "timm_seresnet", "timm_efficientnet",
    "timm_tf_efficientnet", "timm_mobilenetv3",
}  # fmt: skip
# Behind a pooling that only a run shows.
POOLED_IN_FORWARD = {"timm_resnetv2": ("head.fc",), "timm_dpn92": ("classifier",), "timm_mobilenetv3": ("conv_head",)}
LEFT = {"deeplabv3_resnet50": ["classifier.0.convs.4.2"]}
NO_BATCH_NORM = {"timm_vit", "timm_convnext"}
# Compiling takes seconds each; these have every kind of replaced module between them.
COMPILED = {"resnet18", "timm_resnetv2"}


def build(name: str) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    make, size = FAMILIES[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision and timm deprecate their own arguments
        model = randomise_statistics(make())
    return model, torch.randn(2, 3, size, size)


def warned_of_leftovers(name: str) -> Any:
    """Warnings are errors in the tests, but for the one that is expected."""
    return pytest.warns(UserWarning, match="1 batch norms are left") if name in LEFT else contextlib.nullcontext()


def assert_only_pooled_layers_are_plain(converted: nn.Module, name: str, seen: tuple[str, ...] = ()) -> None:
    plain = {path for path, module in converted.named_modules() if type(module) in (nn.Conv2d, nn.Linear)}
    pooled = Structure(converted).pooled
    assert plain == {path for path, module in converted.named_modules() if module in pooled} | set(seen)
    assert bool(plain) == (name in POOLED or bool(seen))
    assert batch_norms(converted) == LEFT.get(name, [])


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_from_scratch(name: str) -> None:
    model, x = build(name)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    plan = netdeconv.plan_conversion(model)
    with warned_of_leftovers(name):
        converted = netdeconv.convert(model, SMALL)

    assert bool(batch_norms(model)) == (name not in NO_BATCH_NORM)
    assert ("no batch norm to remove" in str(plan)) == (name in NO_BATCH_NORM)
    assert [entry.path for entry in plan.batch_norms_left] == LEFT.get(name, [])
    assert_only_pooled_layers_are_plain(converted, name)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())

    converted.train()
    sum(tensor.square().mean() for tensor in tensors_of(converted(x))).backward()
    lacking = [key for key, p in converted.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not lacking

    converted.eval()
    fused = netdeconv.fuse(converted)
    assert not any(isinstance(module, WhitenedLayer) for module in fused.modules())
    assert netdeconv.check_fused(converted, fused, x, tolerance=FUSED_TOLERANCE) <= FUSED_TOLERANCE
    with torch.no_grad():
        expected = converted(x)
        assert max(float(tensor.std()) for tensor in tensors_of(expected)) > 0
        assert max_relative_error(copy.deepcopy(converted)(x), expected) == 0
        if name in COMPILED:
            compiled = torch.compile(converted, backend="eager")
            assert max_relative_error(compiled(x), expected) <= FUSED_TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(FAMILIES) - NO_BATCH_NORM))
def test_preserved(name: str) -> None:
    model, x = build(name)
    model.eval()
    data = [torch.randn_like(x) for _ in range(2)]
    with warned_of_leftovers(name):
        converted = netdeconv.convert(model, SMALL, preserve=data)

    # So auxiliary heads are whitened, too.
    assert_only_pooled_layers_are_plain(converted, name, POOLED_IN_FORWARD.get(name, ()))
    with torch.no_grad():
        assert max_relative_error(converted(x), model(x)) <= PRESERVED_TOLERANCE
        fused = netdeconv.fuse(converted)
        assert max_relative_error(fused(x), model(x)) <= PRESERVED_TOLERANCE
