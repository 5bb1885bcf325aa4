"""The paper's ten networks, narrow: they learn with batch norms and whitened both ways, and can be fused."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import netdeconv
from netdeconv import WhiteningConfig, zoo
from small_networks import batch_norms

# float32, up to a hundred layers: evaluation folds in every call what the fused network has folded before
FUSED_TOLERANCE = 1e-4
FALLEN = 0.95  # the last two losses are at most this share of the first two


class Run(NamedTuple):
    """How a network is trained here: narrow, few steps, and a rate that suits all three norms."""

    width: float
    rate: float
    steps: int


RUNS = {
    "vgg16": Run(1 / 16, 0.05, 5),
    "resnet18": Run(1 / 16, 0.05, 5),
    "preact_resnet18": Run(1 / 16, 0.05, 4),
    "densenet121": Run(1 / 16, 0.05, 12),
    "resnext29_32x4d": Run(1 / 16, 0.1, 6),
    "mobilenet_v2": Run(1 / 8, 0.1, 14),
    "dpn92": Run(1 / 16, 0.05, 10),
    "pnasnet_a": Run(1 / 16, 0.02, 4),
    "senet18": Run(1 / 16, 0.05, 6),
    "efficientnet_b0": Run(1 / 8, 0.05, 8),
}


def batch(size: int) -> tuple[Tensor, Tensor]:
    """Noisy images of two smooth patterns, and which of them it is."""
    random = torch.Generator().manual_seed(1)
    labels = torch.arange(size) % 2
    patterns = F.interpolate(torch.randn(2, 3, 2, 2, generator=random), size=32, mode="bilinear")
    return patterns[labels] + 0.2 * torch.randn(size, 3, 32, 32, generator=random), labels


def network(name: str, norm: str) -> nn.Module:
    torch.manual_seed(0)
    model = zoo.create(name, num_classes=2, width=RUNS[name].width)
    if norm == "bn":
        return model
    return netdeconv.convert(model, WhiteningConfig.paper() if norm == "nd-paper" else None)


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["bn", "nd", "nd-paper"])
@pytest.mark.parametrize("name", RUNS)
def test_learns(name: str, norm: str) -> None:
    images, labels = batch(32)
    model = network(name, norm)
    assert bool(batch_norms(model)) == (norm == "bn")
    optimizer = torch.optim.SGD(model.parameters(), lr=RUNS[name].rate, momentum=0.9)
    losses = []
    for _ in range(RUNS[name].steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        lacking = [path for path, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
        assert not lacking
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-2:]) < FALLEN * sum(losses[:2]), losses


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_calibrated_network_is_its_fused_one(name: str) -> None:
    images, _ = batch(8)
    plan = netdeconv.plan_conversion(zoo.create(name, num_classes=2, width=RUNS[name].width))
    assert not plan.batch_norms_left
    model = netdeconv.calibrate(network(name, "nd"), [images]).eval()
    fused = netdeconv.fuse(model)
    assert {type(module) for module in fused.modules()}.isdisjoint({netdeconv.WhitenedConv2d, netdeconv.WhitenedLinear})
    with torch.no_grad():
        other = images.flip(0) + 0.1
        assert model(other).std() > 0
        torch.testing.assert_close(fused(other), model(other), rtol=FUSED_TOLERANCE, atol=FUSED_TOLERANCE)
