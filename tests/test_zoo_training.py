"""The paper's ten networks, narrow: they learn with batch norms and whitened both ways, and can be fused."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import netdeconv
from netdeconv import WhiteningConfig, zoo
from small_networks import batch_norms
from variation import Variation

# float32, up to a hundred layers: evaluation folds in every call what the fused network has folded before
FUSED_TOLERANCE = 1e-4
CHANCE = math.log(2)  # no output that is the same for all images has a smaller loss, as half of them are of each class
RATES = {"bn": 0.02, "nd": 0.2, "nd-paper": 0.2}


class Run(NamedTuple):
    """How narrow a network is made, and after how many steps it must have learned.

    That is about twice the most that any norm took with five seeds, moved inputs and other instruction sets.
    """

    width: float
    steps: int


RUNS = {
    "vgg16": Run(1 / 16, 20),
    "resnet18": Run(1 / 16, 20),
    "preact_resnet18": Run(1 / 16, 20),
    "densenet121": Run(1 / 16, 20),
    "resnext29_32x4d": Run(1 / 8, 20),
    "mobilenet_v2": Run(1 / 8, 60),
    "dpn92": Run(1 / 8, 20),
    "pnasnet_a": Run(1 / 16, 20),
    "senet18": Run(1 / 16, 20),
    "efficientnet_b0": Run(1 / 8, 60),
}


def batch(size: int, variation: Variation) -> tuple[Tensor, Tensor]:
    """Noisy images of two smooth patterns, and which of them it is."""
    random = torch.Generator().manual_seed(1 + variation.seed)
    labels = torch.arange(size) % 2
    patterns = F.interpolate(torch.randn(2, 3, 2, 2, generator=random), size=32, mode="bilinear")
    images = patterns[labels] + 0.2 * torch.randn(size, 3, 32, 32, generator=random)
    return variation.moved(images), labels


def network(name: str, norm: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = zoo.create(name, num_classes=2, width=RUNS[name].width)
    if norm == "bn":
        return model
    return netdeconv.convert(model, WhiteningConfig.paper() if norm == "nd-paper" else None)


def learned(losses: list[float]) -> bool:
    """The last three losses are below half of chance on average."""
    return len(losses) >= 3 and sum(losses[-3:]) / 3 < CHANCE / 2


def train(model: nn.Module, images: Tensor, labels: Tensor, *, rate: float, steps: int) -> list[float]:
    """Losses of training on one batch, until the network has learned it or has used up the steps."""
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    losses: list[float] = []
    while len(losses) < steps and not learned(losses):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        lacking = [path for path, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
        assert not lacking
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.slow
@pytest.mark.training
# All channels of a group may die in networks that narrow. What comes of it is asserted: finite gradients, and learning.
@pytest.mark.filterwarnings("ignore::netdeconv.NonFiniteWarning")
@pytest.mark.parametrize("norm", RATES)
@pytest.mark.parametrize("name", RUNS)
def test_learns(name: str, norm: str, variation: Variation) -> None:
    images, labels = batch(32, variation)
    model = network(name, norm, variation.seed)
    assert bool(batch_norms(model)) == (norm == "bn")
    losses = train(model, images, labels, rate=RATES[norm], steps=RUNS[name].steps)
    assert learned(losses), losses
    first = next(model.parameters())
    assert first.grad is not None and first.grad.any()  # that it learns may be due to the last layers alone


class Constant(nn.Module):
    """Sees nothing of the images."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.bias.expand(len(x), 2)


def test_a_constant_has_not_learned(variation: Variation) -> None:
    losses = train(Constant(), *batch(32, variation), rate=RATES["nd"], steps=20)
    assert not learned(losses) and min(losses) == pytest.approx(CHANCE)


@pytest.mark.training
def test_a_network_whose_convolutions_do_not_whiten_has_not_learned(
    variation: Variation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(netdeconv.WhitenedConv2d, "forward", nn.Conv2d.forward)
    losses = train(network("vgg16", "nd", variation.seed), *batch(32, variation), rate=RATES["nd"], steps=20)
    assert not learned(losses), losses


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_calibrated_network_is_its_fused_one(name: str) -> None:
    images, _ = batch(8, Variation())
    plan = netdeconv.plan_conversion(zoo.create(name, num_classes=2, width=RUNS[name].width))
    assert not plan.batch_norms_left
    model = netdeconv.calibrate(network(name, "nd"), [images]).eval()
    fused = netdeconv.fuse(model)
    assert {type(module) for module in fused.modules()}.isdisjoint({netdeconv.WhitenedConv2d, netdeconv.WhitenedLinear})
    with torch.no_grad():
        other = images.flip(0) + 0.1
        assert model(other).std() > 0
        torch.testing.assert_close(fused(other), model(other), rtol=FUSED_TOLERANCE, atol=FUSED_TOLERANCE)
