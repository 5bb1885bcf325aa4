"""Tensors that are made once: found again, and never shared with what looks on."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from netdeconv import WhitenedConv2d, WhiteningConfig
from netdeconv.functional.tracing import cached_constant


def counted() -> tuple[list[int], object]:
    made: list[int] = []

    @cached_constant
    def ones(length: int) -> Tensor:
        """So many."""
        made.append(length)
        return torch.ones(length)

    return made, ones


def test_once_for_every_argument() -> None:
    made, ones = counted()
    assert ones(2) is ones(2)
    assert len(ones(3)) == 3
    assert made == [2, 3]
    assert ones.__doc__ == "So many."


def test_what_is_made_in_inference_mode_can_be_trained_with() -> None:
    _, ones = counted()
    with torch.inference_mode():
        ones(2)
    weight = torch.ones(2, requires_grad=True)
    (weight * ones(2)).sum().backward()  # saves the constant
    assert torch.equal(weight.grad, torch.ones(2))


def test_fake_tensors_are_kept_from_others() -> None:
    made, ones = counted()
    with FakeTensorMode():
        fake = ones(2)
    assert type(ones(2)) is Tensor and type(fake) is not Tensor
    with FakeTensorMode():
        assert type(ones(2)) is not Tensor
    assert made == [2, 2, 2]


@pytest.mark.parametrize("first", ["inference", "training"])
def test_a_layer_that_differentiates_its_mean(first: str) -> None:
    config = WhiteningConfig(differentiable=True, block_size=2)
    layer = WhitenedConv2d(2, 2, (1, 3), padding=1, dilation=(1, 3 if first == "training" else 2), whitening=config)
    x = torch.randn(4, 2, 9, 9, requires_grad=True)
    if first == "inference":
        with torch.inference_mode():
            layer(x)
    layer(x).square().sum().backward()
    assert x.grad is not None and bool(x.grad.isfinite().all())
