"""When statistics are refreshed: the table, the clock behind it, and a resume in the middle."""

from __future__ import annotations

import copy
import gc
import pickle
import types
from typing import Any

import pytest
import torch

from netdeconv import WhitenedLinear, WhiteningConfig
from netdeconv.nn.schedule import Clock, interval


class InCompiler:
    """torch as a traced function sees it. Patched into our module only: the compiler keeps what it finds in torch."""

    compiler = types.SimpleNamespace(is_compiling=lambda: True)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def due_steps(update_every: int, steps: int) -> list[int]:
    """Which of the first training steps refresh, written out from the words of the issue."""
    return [
        step
        for step in range(steps)
        if step
        % min(update_every, next(d for d, end in ((1, 16), (2, 32), (4, 64), (8, 128), (16, 10**9)) if step < end))
        == 0
    ]


def test_the_distance_is_one_for_sixteen_steps_and_then_doubles() -> None:
    table = {0: 1, 15: 1, 16: 2, 31: 2, 32: 4, 63: 4, 64: 8, 127: 8, 128: 16, 255: 16, 256: 32, 10**9: 64}
    assert {step: interval(step, 64) for step in table} == table


@pytest.mark.parametrize("update_every", [1, 2, 3, 10, 16])
def test_it_never_exceeds_the_wanted_distance(update_every: int) -> None:
    distances = [interval(step, update_every) for step in range(300)]
    assert distances[:16] == [1] * 16
    assert distances == sorted(distances)
    assert distances[-1] == update_every


def test_refresh_steps_by_hand() -> None:
    clock, due = Clock(16), []
    for step in range(200):
        if clock.due:
            due.append(step)
        clock.set(step + 1)
    by_hand = [*range(16), *range(16, 32, 2), *range(32, 64, 4), *range(64, 128, 8), 128, 144, 160, 176, 192]
    assert due == by_hand == due_steps(16, 200)


def test_the_operator_of_compiled_steps_advances_the_same_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, other = Clock(16), Clock(16)
    with monkeypatch.context() as patch:
        patch.setattr("netdeconv.nn.schedule.torch", InCompiler())
        for _ in range(17):
            ours.advance(torch.zeros(()))
    assert (ours.steps, ours.due) == (17, False)
    assert other.steps == 0
    torch.library.opcheck(torch.ops.netdeconv.tick.default, (ours.pulse,), test_utils="test_schema")


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda clock: pickle.loads(pickle.dumps(clock))])
def test_a_copy_shows_the_same_time_and_then_goes_its_own_way(copied: Any) -> None:
    clock = Clock(4, 33)
    twin = copied(clock)
    assert (twin.update_every, twin.steps, twin.due) == (4, 33, False)
    torch.ops.netdeconv.tick(twin.pulse)
    assert (clock.steps, twin.steps) == (33, 34)


def test_a_clock_whose_layer_is_gone_is_not_kept_and_not_missed() -> None:
    clock = Clock(4)
    pulse = clock.pulse
    del clock
    gc.collect()
    torch.ops.netdeconv.tick(pulse)


# ---- in a layer -------------------------------------------------------------------------------------


def refreshes(layer: WhitenedLinear, first: int, last: int) -> list[int]:
    """Training steps from first to last (exclusive) at which the layer refreshed; step s has its own batch."""
    seen = []
    for step in range(first, last):
        before = int(layer.whitening.num_updates)
        layer(torch.randn(6, 3, generator=torch.Generator().manual_seed(step)))
        if int(layer.whitening.num_updates) > before:
            seen.append(step)
    return seen


@pytest.mark.parametrize("update_every", [1, 5, 16])
def test_a_layer_refreshes_on_the_due_steps(update_every: int) -> None:
    layer = WhitenedLinear(3, 2, whitening=WhiteningConfig(update_every=update_every))
    assert refreshes(layer, 0, 150) == due_steps(update_every, 150)
    assert int(layer.whitening.num_steps) == 150


@pytest.mark.parametrize("average", ["covariance", "root"])
@pytest.mark.parametrize("stop", [1, 17, 45, 131])
def test_a_resumed_layer_refreshes_on_the_same_steps_with_the_same_values(stop: int, average: str) -> None:
    # so few samples that the turn matters as well
    config = WhiteningConfig(max_samples=4, update_every=16, average=average, scale=average == "covariance")
    whole = WhitenedLinear(3, 2, whitening=config)
    refreshes(whole, 0, stop)
    resumed = WhitenedLinear(3, 2, whitening=config)
    resumed.load_state_dict(whole.state_dict())
    assert refreshes(resumed, stop, 180) == [step for step in due_steps(16, 180) if step >= stop]
    refreshes(whole, stop, 180)
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


def test_evaluation_in_between_does_not_move_the_clock() -> None:
    layer = WhitenedLinear(3, 2, whitening=WhiteningConfig(update_every=4))
    seen = refreshes(layer, 0, 37)
    layer.eval()
    assert refreshes(layer, 0, 5) == []
    layer.train()
    assert seen + refreshes(layer, 37, 60) == due_steps(4, 60)
