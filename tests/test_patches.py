"""Taking patches at chosen positions: against the reference's im2col, and where a window meets the edge."""

from __future__ import annotations

import math
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from netdeconv import reference as ref
from netdeconv.functional import Window, gather_patches, mean_patch, patches

DRAWS = settings(deadline=None, derandomize=True, max_examples=60)

# Patches are copies; the only arithmetic is a product with the 0/1 mask of the padding. So: exactly equal.
# Except for means, in float64.
TIGHT: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-12}
MODES = ["zeros", "reflect", "replicate", "circular"]


def numbered(*shape: int) -> Tensor:
    """Every entry different, none zero."""
    return torch.arange(1.0, 1 + math.prod(shape), dtype=torch.float64).reshape(shape)


def line(kernel_size: int = 1, padding: tuple[int, int] = (0, 0), mode: str = "zeros") -> Window:
    return Window((kernel_size,), (1,), (1,), (padding,), mode)


def everywhere(x: Tensor, window: Window) -> Tensor:
    """Patches at all positions."""
    return gather_patches(x, window, [torch.arange(length) for length in window.output_size(x.shape[2:])])


@st.composite
def inputs(draw: st.DrawFn) -> tuple[Tensor, Window]:
    """An activation and a window that fits it, in one to three dimensions; odd and uneven padding included."""
    mode = draw(st.sampled_from(MODES))
    sides = []
    for _ in range(draw(st.integers(1, 3))):
        kernel, stride, dilation = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 2))
        span = dilation * (kernel - 1) + 1
        size = draw(st.integers(max(1, span - 2), span + 3))
        most = {"zeros": 3, "reflect": size - 1, "replicate": 3, "circular": size}[mode]
        pads = draw(st.integers(0, most)), draw(st.integers(0, most))
        if sum(pads) + size < span:
            size = span
        sides.append((size, kernel, stride, dilation, pads))
    size, kernel, stride, dilation, pads = zip(*sides, strict=True)
    x = numbered(draw(st.integers(0, 3)), draw(st.integers(1, 3)), *size)
    return x, Window(kernel, stride, dilation, pads, mode)


@DRAWS
@given(drawn=inputs())
def test_all_positions_are_im2col(drawn: tuple[Tensor, Window]) -> None:
    x, window = drawn
    options: dict[str, Any] = {"stride": window.stride, "dilation": window.dilation, "padding": window.padding}
    expected = ref.im2col(x, kernel_size=window.kernel_size, padding_mode=window.padding_mode, **options)
    assert torch.equal(everywhere(x, window), expected.flatten(0, 1))
    assert expected.shape[1] == math.prod(window.output_size(x.shape[2:]))


@DRAWS
@given(drawn=inputs())
def test_the_mean_patch_is_the_mean_over_all_positions(drawn: tuple[Tensor, Window]) -> None:
    x, window = drawn
    x = x.sqrt()  # neighbours that are not evenly spaced
    expected = everywhere(x, window).mean(0)
    channels_last = x.movedim(1, -1).contiguous().movedim(-1, 1)
    for small in (9 * 4096, 0):
        with mock.patch.object(patches, "_SMALL", small):
            for stored in (x, channels_last, x.repeat_interleave(2, -1)[..., ::2]):
                torch.testing.assert_close(mean_patch(stored, window), expected, equal_nan=True, **TIGHT)


def test_the_mean_patch_of_a_line_by_hand() -> None:
    x = torch.tensor([[[1.0, 2, 6]], [[3.0, 2, 0]]])  # two images, one channel; together 2, 2, 3
    assert mean_patch(x, line(1)).tolist() == pytest.approx([7 / 3])
    assert mean_patch(x, line(2)).tolist() == [2, 2.5]
    assert mean_patch(x, line(3, (1, 1))).tolist() == pytest.approx([4 / 3, 7 / 3, 5 / 3])
    assert mean_patch(torch.tensor([[1.0, 2], [3, 6]]), Window()).tolist() == [2, 4]


def test_the_mean_patch_is_computed_in_float32_at_least() -> None:
    x = torch.rand(50, 3, 9, generator=torch.Generator().manual_seed(0)) + 100
    window = line(3, (1, 1))
    expected = mean_patch(x.double(), window)
    assert expected.dtype == torch.float64
    for kind in (torch.float32, torch.bfloat16):
        for cast in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=cast):
                mean = mean_patch(x.to(kind), window)
            assert mean.dtype == torch.float32
            exact = mean_patch(x.to(kind).double(), window)
            torch.testing.assert_close(mean.double(), exact, rtol=1e-5, atol=0)  # float32 rounding of sums


def test_the_gradient_of_the_mean_patch() -> None:
    x = numbered(2, 2, 3, 4).requires_grad_()
    window = Window((2, 3), (1, 2), (1, 1), ((1, 0), (1, 2)), "replicate")
    assert torch.autograd.gradcheck(lambda x: mean_patch(x, window), x)


@DRAWS
@given(drawn=inputs())
def test_the_edges_count_the_positions_that_reach_into_the_padding(drawn: tuple[Tensor, Window]) -> None:
    x, window = drawn
    size = x.shape[2:]
    for dim, (first, last) in enumerate(window.edges(size)):
        starts = torch.arange(window.output_size(size)[dim]) * window.stride[dim] - window.padding[dim][0]
        ends = starts + window.dilation[dim] * (window.kernel_size[dim] - 1)
        assert first == int((starts < 0).sum())
        assert last == int((ends >= size[dim]).sum())


def test_edges_by_hand() -> None:
    assert Window((3,), (1,), (1,), ((1, 1),)).edges((6,)) == ((1, 1),)
    assert Window((3, 5), (2, 1), (1, 1), ((1, 1), (2, 2))).edges((6, 9)) == ((1, 0), (2, 2))
    assert Window((3,), (1,), (1,), ((1, 1),)).edges((1,)) == ((1, 1),)
    assert Window((1,), (1,), (1,), ((0, 0),)).edges((4,)) == ((0, 0),)
    assert Window().edges(()) == ()


def test_in_two_dimensions_it_is_unfold() -> None:
    x = numbered(2, 3, 5, 6)
    window = Window((3, 2), (2, 1), (1, 2), ((1, 1), (2, 2)))
    expected = F.unfold(x, (3, 2), (1, 2), (1, 2), (2, 1)).transpose(1, 2).flatten(0, 1)
    assert torch.equal(everywhere(x, window), expected)


def test_patches_of_a_line_by_hand() -> None:
    x = torch.tensor([[[1.0, 2, 3], [4, 5, 6]]])  # one image, two channels, three pixels
    assert everywhere(x, line(2)).tolist() == [[1, 2, 4, 5], [2, 3, 5, 6]]
    assert gather_patches(x, line(2), [torch.tensor([1])]).tolist() == [[2, 3, 5, 6]]
    pads = {mode: everywhere(x[:, :1], line(1, (2, 1), mode)).flatten().tolist() for mode in MODES}
    assert pads == {
        "zeros": [0, 0, 1, 2, 3, 0],
        "reflect": [3, 2, 1, 2, 3, 2],
        "replicate": [1, 1, 1, 2, 3, 3],
        "circular": [2, 3, 1, 2, 3, 1],
    }


def test_chosen_positions_form_a_grid() -> None:
    x = numbered(2, 3, 6, 7)
    window = Window((2, 3), (1, 2), (2, 1), ((1, 0), (2, 1)))
    rows, columns = torch.tensor([0, 3]), torch.tensor([2, 1])
    height, width = window.output_size((6, 7))
    every = everywhere(x, window).reshape(2, height, width, -1)
    assert torch.equal(gather_patches(x, window, [rows, columns]), every[:, rows][:, :, columns].flatten(0, 2))


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_type_of_the_input_is_kept(kind: torch.dtype) -> None:
    assert everywhere(torch.ones(1, 1, 3, dtype=kind), line(3, (1, 1))).dtype == kind


def test_the_gradient_reaches_every_pixel_as_often_as_it_is_seen() -> None:
    for mode, seen in (("zeros", [2, 3, 2]), ("replicate", [3, 3, 3]), ("reflect", [2, 5, 2])):
        x = torch.zeros(1, 1, 3, requires_grad=True)
        everywhere(x, line(3, (1, 1), mode)).sum().backward()
        assert x.grad is not None
        assert x.grad.flatten().tolist() == seen
