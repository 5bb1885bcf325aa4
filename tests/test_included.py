"""What a wish, a weight that is only looked at, an operation that would write in training, mean for a conversion."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

import netdeconv
from netdeconv import WhitenedConv2d, plan_conversion
from netdeconv.surgery import Action


def mixed() -> nn.Sequential:
    """Batch norms behind layers that cannot be whitened, and one behind a layer that can."""
    return nn.Sequential(
        weight_norm(nn.Conv2d(3, 8, 3)), nn.BatchNorm2d(8), nn.ReLU(),
        nn.ConvTranspose2d(8, 8, 3), nn.BatchNorm2d(8),
        nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4),
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "include", ["*", lambda path, module: True, ["[145]", "6"]], ids=["all", "function", "pattern"]
)
@pytest.mark.parametrize("example", [None, torch.randn(2, 3, 9, 9)], ids=["tree", "run"])
def test_no_wish_takes_a_batch_norm_away_without_a_whitened_layer(include: Any, example: Tensor | None) -> None:
    plan = plan_conversion(mixed(), include=include, example=example)
    fate = {entry.path: entry.action for entry in plan if entry.path in ("1", "4", "5", "6")}
    transposed_is_kept = {"1": Action.LEAVE, "4": Action.LEAVE}
    assert fate == {**transposed_is_kept, "5": Action.WHITEN, "6": Action.REMOVE}
    insisted = plan_conversion(mixed(), include=["4", "5", "6"], example=example)  # a path written out is meant
    assert insisted["4"].action is Action.REMOVE


LOOKS: dict[str, Callable[[Tensor], Any]] = {
    "type": lambda w: w.type(),
    "is_meta": lambda w: w.is_meta,
    "get_device": lambda w: w.get_device(),
    "stride": lambda w: w.stride(),
    "is_complex": lambda w: w.is_complex(),
    "is_contiguous": lambda w: w.is_contiguous(),
    "element_size": lambda w: w.element_size(),
    "nbytes": lambda w: w.nbytes,
}


class Looking(nn.Module):
    def __init__(self, look: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.conv, self.bn, self.look = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), look

    def forward(self, x: Tensor) -> Tensor:
        self.look(self.conv.weight)
        y: Tensor = self.bn(self.conv(x))
        return y


@pytest.mark.parametrize("name", LOOKS)
def test_a_weight_that_is_asked_for_its_type_or_place_is_not_read(name: str) -> None:
    net = netdeconv.convert(Looking(LOOKS[name]), example=torch.randn(2, 3, 6, 6))
    assert isinstance(net.conv, WhitenedConv2d)
    assert isinstance(net.bn, nn.Identity)


class DroppingOut(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn, self.conv = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1)
        self.kept: list[tuple[Tensor, Tensor]] = []

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        before = h.detach().clone()
        y = F.dropout(self.bn(h), 0.5, self.training, inplace=True)
        z: Tensor = self.conv(y)
        self.kept.append((before, h.detach().clone()))
        return h + z


def test_a_dropout_in_place_that_only_training_runs_does_not_reach_what_others_read() -> None:
    net = netdeconv.convert(DroppingOut(), example=torch.randn(2, 3, 6, 6))
    net.train()(torch.randn(4, 3, 6, 6))
    before, after = net.kept[-1]
    assert torch.equal(before, after)


def test_hooks_on_states_stay() -> None:
    model, seen = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), []
    model[0].register_state_dict_post_hook(lambda *_: seen.append("saved"))
    model[0].register_load_state_dict_pre_hook(lambda *_: seen.append("loaded"))
    net = netdeconv.convert(model)
    net.load_state_dict(net.state_dict())
    assert seen == ["saved", "loaded"]
