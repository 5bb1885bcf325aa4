"""Which patches are looked at: all of a small map, a fair sample of a large one, or the published grid."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from netdeconv import reference as ref
from netdeconv.functional import Sample, Window, corner_patches, spread_patches

DRAWS = settings(deadline=None, derandomize=True, max_examples=60)


def numbered(*shape: int) -> Tensor:
    """Every entry different, none zero."""
    return torch.arange(1.0, 1 + math.prod(shape), dtype=torch.float64).reshape(shape)


def window_of(kernel: tuple[int, ...], *, stride: int = 1, dilation: int = 1, padding: int = 0) -> Window:
    dims = len(kernel)
    return Window(kernel, (stride,) * dims, (dilation,) * dims, ((padding, padding),) * dims)


def all_patches(x: Tensor, window: Window) -> Tensor:
    if not window.kernel_size:
        return x
    options: dict[str, Any] = {"stride": window.stride, "dilation": window.dilation, "padding": window.padding}
    return ref.im2col(x, kernel_size=window.kernel_size, padding_mode=window.padding_mode, **options).flatten(0, 1)


def weights_of(sample: Sample) -> Tensor:
    return torch.ones(len(sample.rows)) if sample.weights is None else sample.weights


# ---- small maps: everything is seen -------------------------------------------------------------------


def test_what_fits_the_budget_is_seen_entirely() -> None:
    x, window = numbered(2, 3, 5, 6), window_of((3, 2), stride=2, padding=1)
    for options in ({}, {"max_samples": 24, "sampling_stride": 3}, {"max_samples": 10**6, "turn": torch.tensor(7)}):
        sample = spread_patches(x, window, **options)
        assert torch.equal(sample.rows, all_patches(x, window))
        assert sample.weights is None
    assert len(spread_patches(x, window, max_samples=23, sampling_stride=1).rows) < 24


def test_a_two_by_two_map_is_seen_by_every_tap_of_a_three_by_three_kernel() -> None:
    x, window = numbered(1, 1, 2, 2), window_of((3, 3), padding=1)
    for options in ({"max_samples": 4096}, {"max_samples": None}, {"max_samples": 1}):
        rows = spread_patches(x, window, sampling_stride=3, **options).rows
        assert rows.shape == (4, 9)
        assert bool((rows != 0).any(0).all())
    corner = corner_patches(x, window, sampling_stride=3).rows
    assert corner.tolist() == [[0, 0, 0, 0, 1, 2, 0, 3, 4]]  # five taps see nothing but padding


@pytest.mark.parametrize("size", [(1, 1), (1, 2), (2, 1), (2, 2)])
def test_maps_smaller_than_the_sampling_stride_are_seen_entirely(size: tuple[int, int]) -> None:
    x = numbered(3, 2, *size)
    rows = spread_patches(x, window_of((1, 1)), sampling_stride=3, max_samples=4096).rows
    assert torch.equal(rows, x.movedim(1, -1).reshape(-1, 2))


# ---- large maps -------------------------------------------------------------------------------------


@st.composite
def maps(draw: st.DrawFn) -> tuple[Tensor, Window]:
    """A map whose patches are all different, and a window; padding that reaches beyond the map included."""
    dims = draw(st.integers(0, 3))
    kernel = tuple(draw(st.integers(1, 3)) for _ in range(dims))
    stride, dilation, padding = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(0, 2))
    most = 12 if dims < 3 else 6
    size = [max(draw(st.integers(1, most)), dilation * (k - 1) + 1 - 2 * padding) for k in kernel]
    x = numbered(draw(st.integers(1, 6)), 1, *size)
    return x, window_of(kernel, stride=stride, dilation=dilation, padding=padding)


@DRAWS
@given(
    drawn=maps(),
    sampling_stride=st.integers(1, 4),
    max_samples=st.integers(1, 80) | st.none(),
    turn=st.integers(0, 10**6) | st.none(),
)
def test_a_sample_is_within_its_budget_and_stands_for_the_whole_batch(
    drawn: tuple[Tensor, Window], sampling_stride: int, max_samples: int | None, turn: int | None
) -> None:
    x, window = drawn
    options: dict[str, Any] = {"sampling_stride": sampling_stride, "max_samples": max_samples}
    sample = spread_patches(x, window, turn=None if turn is None else torch.tensor(turn), **options)
    everything, weights = all_patches(x, window), weights_of(sample)
    known = {tuple(row) for row in everything.tolist()}
    assert {tuple(row) for row in sample.rows.tolist()} <= known
    assert float(weights.sum()) == pytest.approx(len(everything), rel=1e-5)
    assert bool((weights >= 1 - 1e-6).all())
    kinds = 3 ** (x.dim() - 2)  # near edge, inside, far edge: of each at least one in every dimension
    if max_samples is not None:
        assert len(sample.rows) <= max(max_samples, kinds)
        assert 2 * len(sample.rows) >= min(max_samples, x.shape[0])
    assert len(sample.rows) == len(spread_patches(x, window, turn=torch.tensor(3), **options).rows)


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("max_samples", [None, 60])
def test_patches_over_the_edge_are_seen_in_their_share(padding: int, max_samples: int | None) -> None:
    x, window = torch.ones(4, 1, 20, 16), window_of((3, 3), padding=padding)
    sample = spread_patches(x, window, sampling_stride=3, max_samples=max_samples)
    weights = weights_of(sample)
    for taps in ([0, 1, 2], [6, 7, 8], [0, 3, 6], [2, 5, 8], [0, 1, 2, 3, 6]):  # top, bottom, left, right, corner
        share = float(weights[(sample.rows[:, taps] == 0).all(1)].sum() / weights.sum())
        over = all_patches(x, window)[:, taps]
        assert share == pytest.approx(float((over == 0).all(1).double().mean()), rel=1e-5)
        assert (share > 0) == (padding == 1)


def test_weights_by_hand() -> None:
    # Seven positions, the first and the last over the edge; of the five inside every third, that is two.
    sample = spread_patches(numbered(2, 1, 7), window_of((3,), padding=1), sampling_stride=3)
    assert sample.weights is not None
    assert sample.weights.tolist() == [1, 2.5, 2.5, 1] * 2
    # Without padding there is no edge: of seven every third, that is three.
    sample = spread_patches(numbered(1, 1, 7), window_of((1,)), sampling_stride=3)
    assert sample.weights is not None
    assert sample.weights.tolist() == pytest.approx([7 / 3] * 3)
    # In a plane they are products.
    sample = spread_patches(numbered(1, 1, 7, 7), window_of((3, 3), padding=1), sampling_stride=3)
    assert sample.weights is not None
    line = torch.tensor([1, 2.5, 2.5, 1])
    assert torch.equal(sample.weights, (line[:, None] * line).flatten())


@pytest.mark.parametrize(("kind", "expected"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_weights_are_float32_at_least(kind: torch.dtype, expected: torch.dtype) -> None:
    sample = spread_patches(torch.ones(1, 1, 9, dtype=kind), window_of((1,)), sampling_stride=3)
    assert sample.weights is not None
    assert (sample.rows.dtype, sample.weights.dtype) == (kind, expected)


# ---- on a grid ----------------------------------------------------------------------------------------


@DRAWS
@given(drawn=maps(), grid=st.integers(1, 4))
def test_all_of_a_grid_is_the_published_one(drawn: tuple[Tensor, Window], grid: int) -> None:
    x, window = drawn
    sample = spread_patches(x, window, grid=grid)
    everything = all_patches(x, window).reshape(len(x), *window.output_size(x.shape[2:]), -1)
    for dim, length in enumerate(window.output_size(x.shape[2:]), start=1):
        everything = everything.index_select(dim, torch.arange(0, length, grid))
    assert torch.equal(sample.rows, everything.flatten(0, -2))
    assert sample.weights is None


def test_tiles_of_a_map_show_every_pixel_once() -> None:
    # With padding 1, positions 0, 3, ..., 15 of a 3x3 kernel cover 16 pixels without overlap.
    rows = spread_patches(numbered(1, 1, 16, 16), window_of((3, 3), padding=1), grid=3).rows
    assert rows.shape == (36, 9)
    assert sorted(rows[rows != 0].tolist()) == list(range(1, 257))


def test_a_thinned_grid_keeps_its_edges_and_stands_for_the_grid() -> None:
    # Positions 0, 3, ..., 33 of 34, the first and the last over the edge; of the ten inside every second.
    sample = spread_patches(numbered(4, 1, 34), window_of((3,), padding=1), grid=3, max_samples=4 * 7)
    assert sample.rows.shape == (4 * 7, 3)
    assert sample.weights is not None
    assert sample.weights.tolist() == [1, 2, 2, 2, 2, 2, 1] * 4
    assert (sample.rows == 0).nonzero().tolist() == [[7 * i + j, t] for i in range(4) for j, t in ((0, 0), (6, 2))]
    centres = (sample.rows[:, 1].reshape(4, 7) - 1) % 34
    assert bool((centres % 3 == 0).all())


# ---- turns ------------------------------------------------------------------------------------------


def places(length: int, turns: int, **options: Any) -> list[list[int]]:
    """Positions looked at on each turn in a line of this many pixels."""
    x = torch.arange(float(length)).reshape(1, 1, length)
    samples = [spread_patches(x, window_of((1,)), turn=torch.tensor(turn), **options) for turn in range(turns)]
    return [[int(value) for value in sample.rows.flatten()] for sample in samples]


def test_over_the_turns_every_position_is_seen_and_the_number_stays() -> None:
    for length, options in itertools.product(
        (7, 10, 64), ({"sampling_stride": 3}, {"max_samples": 2}, {"sampling_stride": 3, "max_samples": 5})
    ):
        seen = places(length, 6 * length, **options)
        assert set(itertools.chain(*seen)) == set(range(length))
        assert len({len(each) for each in seen}) == 1


def test_positions_of_one_turn_are_evenly_spread() -> None:
    for at in places(32, 20, sampling_stride=3):
        gaps = {after - before for before, after in itertools.pairwise(at)}
        assert gaps <= {2, 3}  # 11 of 32: every 2.9th
        assert at[0] <= 2
        assert at[-1] >= 29


def test_neighbouring_turns_look_elsewhere_and_equal_turns_at_the_same() -> None:
    first, second = places(32, 2, sampling_stride=4)
    assert first != second
    assert places(32, 2, sampling_stride=4) == [first, second]


def test_without_a_turn_the_middle_of_every_interval_is_looked_at() -> None:
    x = torch.arange(12.0).reshape(1, 1, 12)
    for _ in range(2):
        assert spread_patches(x, window_of((1,)), sampling_stride=4).rows.flatten().tolist() == [2, 6, 10]


def test_in_a_plane_every_position_is_seen_over_the_turns() -> None:
    x, window = numbered(1, 1, 7, 5), window_of((3, 3), padding=1)
    seen = set()
    for turn in range(150):
        rows = spread_patches(x, window, sampling_stride=3, turn=torch.tensor(turn)).rows
        seen |= set(rows[:, 4].tolist())
    assert seen == set(x.flatten().tolist())


def test_images_are_left_out_only_when_one_position_each_is_too_many() -> None:
    x, window = numbered(10, 1, 4), window_of((1,))
    assert len(spread_patches(x, window, max_samples=20).rows) == 20
    images = [
        ((spread_patches(x, window, max_samples=3, turn=torch.tensor(turn)).rows.flatten() - 1) // 4).tolist()
        for turn in range(40)
    ]
    assert {len(set(each)) for each in images} == {3}
    assert set(itertools.chain(*images)) == set(range(10))


def test_rows_of_a_linear_layer_are_capped_too() -> None:
    x = numbered(10, 3)
    assert torch.equal(spread_patches(x, Window()).rows, x)
    assert torch.equal(corner_patches(x, Window(), sampling_stride=3).rows, x)
    assert spread_patches(x, Window(), max_samples=4).rows.tolist() == x[[1, 3, 6, 8]].tolist()


def test_an_empty_batch_has_no_patches() -> None:
    x, window = torch.zeros(0, 2, 4), window_of((3,))
    for sample in (spread_patches(x, window), spread_patches(x, window, max_samples=1), corner_patches(x, window)):
        assert sample.rows.shape == (0, 6)


# ---- the published grid -------------------------------------------------------------------------------


@DRAWS
@given(drawn=maps(), sampling_stride=st.integers(1, 3))
def test_the_corner_grid_is_the_published_one(drawn: tuple[Tensor, Window], sampling_stride: int) -> None:
    x, window = drawn
    sample = corner_patches(x, window, sampling_stride=sampling_stride)
    expected = x
    if window.kernel_size:
        options: dict[str, Any] = {"stride": window.stride, "dilation": window.dilation, "padding": window.padding}
        expected = ref.sample_rows_corner(x, kernel_size=window.kernel_size, sampling_stride=sampling_stride, **options)
    assert torch.equal(sample.rows, expected)
    assert sample.weights is None


def test_an_empty_batch_gives_no_rows() -> None:
    window = Window((3, 3), (1, 1), (1, 1), ((1, 1), (1, 1)))
    for limit in (None, 10):
        sample = spread_patches(torch.zeros(0, 2, 16, 16), window, sampling_stride=3, max_samples=limit)
        assert sample.rows.shape == (0, 18)
