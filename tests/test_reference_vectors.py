"""The authors' numbers through the public layers: outputs, gradients, running values, evaluation."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from netdeconv import WhitenedConv2d, WhitenedLinear, WhiteningConfig
from vectors import VECTOR_TOLERANCE, Case, case, vector_cases

__all__ = ["case"]  # a fixture

TOLERANCE: dict[str, Any] = {"rtol": VECTOR_TOLERANCE, "atol": VECTOR_TOLERANCE}


def layer_of(case: Case, **changes: Any) -> WhitenedConv2d | WhitenedLinear:
    """The public layer with the settings of this case, some of them changed, and its parameters."""
    weight, bias = case.weight, case.bias
    options: dict[str, Any] = {
        "bias": bias is not None,
        "dtype": torch.float64,
        "whitening": WhiteningConfig.paper(**{**case.whitening_options(), **changes}),
    }
    layer: WhitenedConv2d | WhitenedLinear
    if case.kind == "linear":
        layer = WhitenedLinear(weight.shape[1], weight.shape[0], **options)
    else:
        conv = case.conv_options()
        channels = weight.shape[1] * conv["groups"]
        layer = WhitenedConv2d(channels, weight.shape[0], tuple(weight.shape[2:]), **conv, **options)
    layer.load_state_dict(case.params, strict=False)
    return layer


@pytest.mark.parametrize("case", vector_cases(), indirect=True)
def test_the_paper_setting_reproduces_the_published_layers(case: Case) -> None:
    layer = layer_of(case)
    assert torch.equal(layer.weight, case.weight)
    assert len(case.steps) == 3
    for number, step in enumerate(case.steps):
        layer.zero_grad()
        x = step.input.clone().requires_grad_()
        y = layer(x)
        torch.testing.assert_close(y, step.output, **TOLERANCE)
        (y * step.output_grad).sum().backward()
        torch.testing.assert_close(x.grad, step.input_grad, **TOLERANCE)
        torch.testing.assert_close(layer.weight.grad, step.grad_weight, **TOLERANCE)
        if step.grad_bias is not None:
            assert layer.bias is not None
            torch.testing.assert_close(layer.bias.grad, step.grad_bias, **TOLERANCE)
        torch.testing.assert_close(layer.whitening.running_mean, step.running_mean, **TOLERANCE)
        torch.testing.assert_close(layer.whitening.running_root, step.running_deconv, **TOLERANCE)
        assert int(layer.whitening.num_updates) == number + 1
    torch.testing.assert_close(layer.eval()(case.eval_input), case.eval_output, **TOLERANCE)


@pytest.mark.parametrize("case", vector_cases(), indirect=True)
@pytest.mark.parametrize("change", [{"num_iters": 2}, {"eps": 1e-2}], ids=str)
def test_the_vectors_would_show_another_setting(case: Case, change: dict[str, Any]) -> None:
    y = layer_of(case, **change)(case.steps[0].input)
    assert (y - case.steps[0].output).abs().max() > 1e3 * VECTOR_TOLERANCE
