"""Folding: the plain layer with folded parameters equals whitening the patches and then applying the layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from netdeconv import WhitenedConv2d
from netdeconv import reference as ref
from netdeconv.functional import Blocks, Window, fold
from netdeconv.functional.fold import _plain_fold

DRAWS = settings(deadline=None, derandomize=True, max_examples=60)

# float64, sums of at most a few hundred products of numbers of order one.
TIGHT: dict[str, Any] = {"rtol": 1e-11, "atol": 1e-11}

LINEAR = Window()
SQUARE = Window((2, 3), (1, 1), (1, 1), ((0, 0), (0, 0)))
PIXEL = Window((1,), (1,), (1,), ((0, 0),))


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def symmetric(a: Tensor) -> Tensor:
    return (a + a.mT) / 2


def drawn_state(blocks: Blocks, seed: int = 1) -> tuple[Tensor, tuple[Tensor, ...]]:
    mean = randn(*blocks.mean_shape, seed=seed)
    return mean, tuple(symmetric(randn(*shape, seed=seed + 1 + i)) for i, shape in enumerate(blocks.root_shapes))


def identity_state(blocks: Blocks) -> tuple[Tensor, tuple[Tensor, ...]]:
    roots = (torch.eye(shape[-1], dtype=torch.float64).expand(shape) for shape in blocks.root_shapes)
    return torch.zeros(blocks.mean_shape, dtype=torch.float64), tuple(roots)


def test_by_hand() -> None:
    # y = (x - mean) D w + b with mean (1, 2), D = [[2, 1], [1, 3]], w = (10, 1), b = 0.5:
    # D w = (21, 13), b - mean D w = 0.5 - 47 = -46.5.
    blocks = Blocks.plan(2, LINEAR, 1, 64, "contiguous")
    root = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
    weight, bias = fold(torch.tensor([[10.0, 1.0]]), torch.tensor([0.5]), torch.tensor([1.0, 2.0]), [root], blocks)
    assert weight.tolist() == [[21, 13]]
    assert bias.tolist() == [-46.5]


def test_scale_by_hand() -> None:
    # The same with the channels times 2 and 5: S D w = (42, 65), b - mean S D w = 0.5 - 172 = -171.5.
    blocks, scale = Blocks.plan(2, LINEAR, 1, 64, "contiguous"), torch.tensor([2.0, 5.0])
    root, mean = torch.tensor([[2.0, 1.0], [1.0, 3.0]]), torch.tensor([1.0, 2.0])
    weight, bias = fold(torch.tensor([[10.0, 1.0]]), torch.tensor([0.5]), mean, [root], blocks, scale)
    assert weight.tolist() == [[42, 65]]
    assert bias.tolist() == [-171.5]
    # Two taps of one channel share its scale: (10, 1) D = (21, 13), times 3.
    blocks = Blocks.plan(1, Window((2,), (1,), (1,), ((0, 0),)), 1, 64, "contiguous")
    weight, bias = fold(torch.tensor([[[10.0, 1.0]]]), None, mean, [root], blocks, torch.tensor([3.0]))
    assert weight.tolist() == [[[63, 39]]]
    assert bias.tolist() == [-141]


def test_a_smaller_last_block_by_hand() -> None:
    blocks = Blocks.plan(3, LINEAR, 1, 2, "contiguous")
    roots = [torch.tensor([[2.0, 1.0], [1.0, 3.0]]), torch.tensor([[5.0]])]
    weight, bias = fold(torch.tensor([[10.0, 1.0, 2.0]]), None, torch.tensor([1.0, 2.0, 3.0]), roots, blocks)
    assert weight.tolist() == [[21, 13, 10]]
    assert bias.tolist() == [-77]


@pytest.mark.parametrize("grouping", ["contiguous", "interleaved"])
@pytest.mark.parametrize("groups", [1, 2])
def test_identity_and_zero_change_nothing_at_all(groups: int, grouping: str) -> None:
    blocks = Blocks.plan(6, SQUARE, groups, 2, grouping)
    weight, bias = randn(4, 6 // groups, 2, 3), randn(4, seed=1)
    folded, shifted = fold(weight, bias, *identity_state(blocks), blocks)
    assert torch.equal(folded, weight)
    assert torch.equal(shifted, bias)
    assert torch.equal(fold(weight, None, *identity_state(blocks), blocks)[1], torch.zeros_like(bias))
    folded, shifted = fold(weight, bias, *identity_state(blocks), blocks, torch.ones(6))
    assert torch.equal(folded, weight)
    assert torch.equal(shifted, bias)


@DRAWS
@given(
    groups=st.integers(1, 3),
    per_group=st.integers(1, 5),
    out_per_group=st.integers(1, 3),
    block_size=st.integers(1, 6),
    window=st.sampled_from([PIXEL, SQUARE]),
    grouping=st.sampled_from(["contiguous", "interleaved"]),
    with_bias=st.booleans(),
    scaled=st.booleans(),
)
def test_it_equals_whitening_the_patches(
    groups: int,
    per_group: int,
    out_per_group: int,
    block_size: int,
    window: Window,
    grouping: str,
    with_bias: bool,
    scaled: bool,
) -> None:
    blocks = Blocks.plan(groups * per_group, window, groups, block_size, grouping)
    mean, roots = drawn_state(blocks)
    weight = randn(groups * out_per_group, per_group, *window.kernel_size, seed=8)
    bias = randn(groups * out_per_group, seed=9) if with_bias else None
    scale = randn(groups * per_group, seed=10).abs() + 0.1 if scaled else None
    x = randn(2, groups * per_group, *(3, 4)[: len(window.kernel_size)])
    folded, shifted = fold(weight, bias, mean, roots, blocks, scale)
    conv: Any = F.conv1d if window is PIXEL else F.conv2d
    expected = ref.deconvolve(
        x,
        weight,
        bias,
        mean,
        roots[0],
        D_rest=roots[1] if len(roots) > 1 else None,
        S=scale,
        grouping=grouping,
        groups=groups,
        padding=1,
    )
    assert folded.shape == weight.shape
    assert shifted.shape == (weight.shape[0],)
    torch.testing.assert_close(conv(x, folded, shifted, padding=1, groups=groups), expected, **TIGHT)


def test_the_published_linear_layer() -> None:
    blocks = Blocks.plan(6, LINEAR, 1, 2, "interleaved")
    mean, roots = drawn_state(blocks)
    weight, bias, x = randn(3, 6), randn(3, seed=5), randn(4, 6, seed=6)
    expected = ((x.reshape(-1, 2) - mean) @ roots[0]).reshape(4, 6) @ weight.T + bias
    torch.testing.assert_close(F.linear(x, *fold(weight, bias, mean, roots, blocks)), expected, **TIGHT)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scaled", [False, True])
def test_half_precision_is_folded_in_float32(kind: torch.dtype, scaled: bool) -> None:
    blocks = Blocks.plan(6, SQUARE, 1, 4, "contiguous")
    mean, roots = drawn_state(blocks)
    weight, bias = randn(4, 6, 2, 3).to(kind), randn(4, seed=1).to(kind)
    scale = (randn(6, seed=2).abs() + 0.1).to(kind) if scaled else None
    low = fold(weight, bias, mean.to(kind), [root.to(kind) for root in roots], blocks, scale)
    exact = (weight.float(), bias.float(), mean.to(kind).float(), [root.to(kind).float() for root in roots])
    high = fold(*exact, blocks, None if scale is None else scale.float())
    for mine, known in zip(low, high, strict=True):
        assert mine.dtype == kind
        assert torch.equal(mine, known.to(kind))


def test_autocast_does_not_reach_it() -> None:
    blocks = Blocks.plan(4, SQUARE, 2, 2, "contiguous")
    mean, roots = drawn_state(blocks)
    weight, bias = randn(4, 2, 2, 3).float(), randn(4, seed=1).float()
    scale = torch.tensor([1.0, 2, 3, 4])
    for more in ((), (scale,)):
        with torch.autocast("cpu", torch.bfloat16):
            cast = fold(weight, bias, mean, roots, blocks, *more)
        plain = fold(weight, bias, mean, roots, blocks, *more)
        assert all(torch.equal(a, b) for a, b in zip(cast, plain, strict=True))


@pytest.mark.parametrize("scaled", [False, True])
def test_autocast_does_not_reach_its_gradient(scaled: bool) -> None:
    blocks = Blocks.plan(4, SQUARE, 2, 2, "contiguous")
    mean, roots = drawn_state(blocks)
    gradients = []
    for inside in (False, True):
        weight, bias = randn(4, 2, 2, 3).float().requires_grad_(), randn(4, seed=1).float().requires_grad_()
        scale = torch.tensor([1.0, 2, 3, 4], requires_grad=True) if scaled else None
        outputs = fold(weight, bias, mean.float(), [root.float() for root in roots], blocks, scale)
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            (outputs[0].square().sum() + outputs[1].square().sum()).backward()
        gradients.append((weight.grad, bias.grad, bias.grad if scale is None else scale.grad))
    assert all(torch.equal(inside, outside) for inside, outside in zip(*gradients, strict=True))


WANTED = ["weight bias mean roots", "weight mean", "weight bias", "weight", "bias", "mean", "roots"]
SCALED = [*WANTED, "weight bias mean scale roots", "weight scale", "mean scale", "scale roots", "scale"]
CUTS = [(4, 1, 2, "contiguous"), (3, 1, 2, "contiguous"), (4, 2, 64, "contiguous"), (4, 1, 2, "interleaved")]


@pytest.mark.parametrize(
    ("wanted", "with_bias", "scaled"),
    [
        *((w, b, False) for w in WANTED for b in (True, False) if b or w != "bias"),
        *((w, b, True) for w in SCALED for b in (True, False) if b or w != "bias"),
    ],
)
@pytest.mark.parametrize(("channels", "groups", "block_size", "grouping"), CUTS)
def test_the_gradients_are_right(
    channels: int, groups: int, block_size: int, grouping: str, wanted: str, with_bias: bool, scaled: bool
) -> None:
    blocks = Blocks.plan(channels, SQUARE, groups, block_size, grouping)
    mean, roots = drawn_state(blocks)
    known = {"weight": [randn(2, channels // groups, 2, 3)], "mean": [mean], "roots": list(roots)}
    known["bias"] = [randn(2, seed=3)] if with_bias else []
    known["scale"] = [randn(channels, seed=4).abs() + 0.5] if scaled else []
    leaves = [value.requires_grad_() for name in wanted.split() for value in known[name]]

    def run(*_: Tensor) -> tuple[Tensor, ...]:
        weight, bias = known["weight"][0], known["bias"][0] if with_bias else None
        symmetric_roots = [symmetric(root) for root in known["roots"]]
        outputs = fold(weight, bias, known["mean"][0], symmetric_roots, blocks, *known["scale"])
        return tuple(output for output in outputs if output.requires_grad)

    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, leaves, fast_mode=True)


@pytest.mark.parametrize("wanted", ["weight bias mean roots", "weight bias mean scale roots", "scale"])
@pytest.mark.parametrize(("channels", "groups", "block_size", "grouping"), CUTS)
def test_the_gradients_are_those_of_the_operators(
    channels: int, groups: int, block_size: int, grouping: str, wanted: str
) -> None:
    """To the last digits, where finite differences are rough."""
    blocks = Blocks.plan(channels, SQUARE, groups, block_size, grouping)
    mean, roots = drawn_state(blocks)
    known = {"weight": [randn(2, channels // groups, 2, 3)], "bias": [randn(2, seed=3)], "mean": [mean]}
    known |= {"scale": [randn(channels, seed=4).abs() + 0.5], "roots": list(roots)}
    leaves = [value.requires_grad_() for name in wanted.split() for value in known[name]]
    scale = known["scale"] if "scale" in wanted else []
    results = []
    for by_operators in (False, True):
        weight, bias = known["weight"][0], known["bias"][0]
        if by_operators:
            outputs = _plain_fold(blocks, weight, bias, blocks.spread_mean(mean), *(scale or [None]), *roots)
        else:
            outputs = fold(weight, bias, mean, roots, blocks, *scale)
        along = [randn(*output.shape, seed=5) for output in outputs]
        results.append(torch.autograd.grad(outputs, leaves, along))
    torch.testing.assert_close(*results, **TIGHT)


@pytest.mark.parametrize("wanted", ["bias", "mean"])
def test_bias_or_mean_alone_asks_for_no_gradient_of_the_folded_weight(wanted: str) -> None:
    blocks = Blocks.plan(4, SQUARE, 1, 2, "contiguous")
    mean, roots = drawn_state(blocks)
    bias = randn(2, seed=3)
    {"bias": bias, "mean": mean}[wanted].requires_grad_()
    folded, shifted = fold(randn(2, 4, 2, 3), bias, mean, roots, blocks)
    assert not folded.requires_grad  # or the layer would keep its input, and compute what nobody wants
    assert shifted.requires_grad


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")  # torch.jit
def test_forward_mode_and_nested_gradients_agree_with_backward_mode() -> None:
    blocks = Blocks.plan(4, PIXEL, 1, 2, "contiguous")
    mean, roots = drawn_state(blocks)
    bias, scale = randn(3, seed=4), torch.tensor([0.5, 1, 2, 3], dtype=torch.float64)

    def energy(weight: Tensor) -> Tensor:
        folded, shifted = fold(weight, bias, mean, roots, blocks, scale)
        return folded.square().sum() + shifted.square().sum()

    weight = randn(3, 4, 1, seed=5)
    known = torch.autograd.functional.hessian(energy, weight)
    torch.testing.assert_close(torch.func.hessian(energy)(weight), known, **TIGHT)
    torch.testing.assert_close(torch.func.jacfwd(energy)(weight), torch.func.jacrev(energy)(weight), **TIGHT)
    many = torch.stack([weight, 2 * weight])
    torch.testing.assert_close(torch.func.vmap(energy)(many), torch.stack([energy(w) for w in many]), **TIGHT)


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")  # torch.jit
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_traced_layer_can_be_saved(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer, x = WhitenedConv2d(3, 4, 3), torch.randn(2, 3, 5, 5)
    layer(x)
    traced = torch.jit.trace(layer.eval(), x, check_trace=False)
    traced.save(str(tmp_path / "layer.pt"))
    torch.testing.assert_close(torch.jit.load(str(tmp_path / "layer.pt"))(x), layer(x))
