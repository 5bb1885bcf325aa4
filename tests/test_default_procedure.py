"""The default training step and evaluation of every kind of layer: the reference's over many steps, state included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from layer_kinds import KINDS, Kind, every_kind, in_reference
from netdeconv import WhiteningConfig

# float64, a few hundred operations, three iterations that amplify rounding by up to 1.5**3 squared; 40 averages.
TIGHT: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-9}
# The default solver is within 2e-4 of the steps for every eigenvalue, and so is a whitened patch in length; the output
# may be shorter than that by what the weights leave of it.
FITTED = 1e-3

STEPS = 36  # 16 that all compute a root, 8 of every second, 1 of every fourth
# Everything but for the solver is the default; samples hold all patches of the inputs, as the reference's do.
CONFIGS = {
    "default": WhiteningConfig(solver="newton_schulz"),
    "small blocks": WhiteningConfig(solver="newton_schulz", block_size=2),
    "equal weights": WhiteningConfig(solver="newton_schulz", momentum=None),
    "scale with averaged roots": WhiteningConfig(solver="newton_schulz", average="root", update_every=4),
    "through the root": WhiteningConfig(solver="newton_schulz", differentiable=True, scale=True),
    "kept roots": WhiteningConfig(
        solver="newton_schulz", scale=False, average="root", num_iters=5, update_every=16, differentiable=False
    ),
    "covariance alone": WhiteningConfig(solver="newton_schulz", scale=False, average="covariance", eps=0.1),
}


def state_of(known: Any) -> dict[str, Tensor]:
    """The reference's state by the names of the layer's buffers."""
    statistics = known.statistics
    state = {"running_mean": statistics.running_mu()}
    if statistics.scale:
        state["running_var"] = statistics.running_V()
    matrices = {"running_root": statistics.running_D()}
    if statistics.average == "covariance":
        matrices["running_cov"] = statistics.running_R()
    elif statistics.update_every > 1:
        matrices["last_root"] = statistics.last_D
    for name, parts in matrices.items():
        state.update(zip((name, f"{name}_rest"), parts, strict=False))
    counters = {
        "num_steps": statistics.steps,
        "num_updates": len(statistics.parts),
        "last_update": sum(statistics.waited),
        "num_skipped": 0,
    }
    return {**state, **{name: torch.tensor(count) for name, count in counters.items()}}


def batch(kind: Kind, step: int) -> Tensor:
    """Another one at every step, that grows and drifts, so that running values are not those of any batch."""
    x = kind.input(seed=step, dtype=torch.float64)
    channel = torch.arange(kind.channels).reshape(-1, *[1] * (len(kind.size) - 1 - kind.channel_dim))
    return x * (1 + 0.05 * step) * (1 + channel) + 0.1 * step


Compare = Callable[[Tensor, Tensor, str], None]


def close(actual: Tensor, expected: Tensor, where: str) -> None:
    torch.testing.assert_close(actual, expected, **TIGHT, msg=lambda text: f"{where}: {text}")


def near(actual: Tensor, expected: Tensor, where: str) -> None:
    """In length, for the default solver."""
    assert torch.linalg.vector_norm((actual - expected).double()) <= FITTED * expected.double().norm(), where


def follow(kind: Kind, config: WhiteningConfig | None, steps: int, compare: Compare) -> None:
    """A layer and the reference go through the same steps, here and there an evaluation between them."""
    layer = kind.layer(config, dtype=torch.float64)
    known = in_reference(layer)
    leaves = list(layer.parameters())
    for step in range(steps):
        mine, theirs = (batch(kind, step).requires_grad_() for _ in range(2))
        y, expected = layer(mine), known(theirs, training=True)
        compare(y, expected, f"step {step}")
        along = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(step))
        ours = torch.autograd.grad(y, [mine, *leaves], along)
        right = torch.autograd.grad(expected, [theirs, *leaves], along)
        for place, (grad, other) in enumerate(zip(ours, right, strict=True)):
            compare(grad, other, f"step {step}, gradient {place}")
        state, expected_state = layer.whitening.state_dict(), state_of(known)
        assert state.keys() == expected_state.keys()
        for name, value in state.items():
            compare(value, expected_state[name].reshape(value.shape), f"step {step}, {name}")
        if step in (0, 17, steps - 1):
            x = batch(kind, 3)
            compare(layer.eval()(x), known(x, training=False), f"evaluation after step {step}")
            layer.train()


@every_kind
@pytest.mark.parametrize("name", CONFIGS)
def test_training_and_evaluation_are_the_reference_s(kind: Kind, name: str) -> None:
    follow(kind, CONFIGS[name], STEPS if name in ("default", "kept roots") else 20, close)


@every_kind
def test_with_no_setting_at_all_it_is_the_reference_but_for_the_fit_of_the_solver(kind: Kind) -> None:
    follow(kind, None, 3, near)


@pytest.mark.parametrize("kind", [param for param in KINDS if param.id in ("conv2d", "channel")])
def test_the_settings_matter_to_the_comparison(kind: Kind) -> None:
    """Told to do something else, the reference gives something else."""
    layer, x = kind.layer(CONFIGS["default"], dtype=torch.float64), batch(kind, 1)
    layer(batch(kind, 0))
    y = layer(x)
    for change in ({"scale": False}, {"average": "root"}, {"num_iters": 1}, {"momentum": 0.5}):
        other = kind.layer(CONFIGS["default"].replace(**change), dtype=torch.float64)
        known = in_reference(other)
        known(batch(kind, 0), training=True)
        assert (known(x, training=True) - y).abs().max() > 1e-3, change
