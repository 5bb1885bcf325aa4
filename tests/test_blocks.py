"""How channels are cut into blocks: against the reference's deal, and by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from netdeconv import WhiteningConfig
from netdeconv import reference as ref
from netdeconv.functional import Blocks, Window
from netdeconv.nn.estimator import Estimator

DRAWS = settings(deadline=None, derandomize=True, max_examples=60)

LINEAR = Window()
PIXEL = Window((1,), (1,), (1,), ((0, 0),))
THREE = Window((3,), (1,), (1,), ((1, 1),))
SQUARE = Window((3, 3), (1, 1), (1, 1), ((1, 1), (1, 1)))


@st.composite
def layouts(draw: st.DrawFn) -> tuple[int, Window, int, int, str]:
    """Channels, window, groups (a divisor of the channels), block size, grouping."""
    groups, per_group = draw(st.integers(1, 4)), draw(st.integers(1, 13))
    window = draw(st.sampled_from([PIXEL, THREE, SQUARE]))
    grouping = draw(st.sampled_from(["contiguous", "interleaved"]))
    return groups * per_group, window, groups, draw(st.integers(1, 16)), grouping


@DRAWS
@given(layout=layouts())
def test_every_block_holds_the_features_that_the_reference_deals_to_it(
    layout: tuple[int, Window, int, int, str],
) -> None:
    channels, window, groups, block_size, grouping = layout
    blocks = Blocks.plan(*layout)
    used = block_size if grouping == "contiguous" else ref.published_block_size(block_size, channels, groups=groups)
    dealt = ref.deal(channels, window.taps, block_size=used, groups=groups, grouping=grouping)
    index = torch.arange(channels * window.taps).reshape(groups, -1)
    parts = blocks.split(index)
    ours = [[block.tolist() for part in parts for block in part[group]] for group in range(groups)]
    assert ours == dealt


@DRAWS
@given(layout=layouts())
def test_join_undoes_split_and_shapes_agree_with_what_split_gives(
    layout: tuple[int, Window, int, int, str],
) -> None:
    channels, window, groups, _, grouping = layout
    blocks = Blocks.plan(*layout)
    index = torch.arange(channels * window.taps).reshape(groups, -1)
    parts = blocks.split(index)
    assert torch.equal(blocks.join(parts), index)
    assert blocks.group_features == index.shape[1]
    assert [tuple(part.shape) for part in parts] == [(groups, *part) for part in blocks.parts]
    lead = (groups,) if groups > 1 else ()
    assert blocks.root_shapes == tuple((*lead, size, size) for _, size in blocks.parts)
    if grouping == "contiguous":
        assert blocks.mean_shape == (channels * window.taps,)
    else:
        assert len(parts) == 1
        assert blocks.mean_shape == (groups * parts[0].shape[-1],)


@DRAWS
@given(layout=layouts())
def test_a_mean_is_pooled_over_blocks_and_spread_to_them_again(
    layout: tuple[int, Window, int, int, str],
) -> None:
    groups = layout[2]
    blocks = Blocks.plan(*layout)
    mean = torch.arange(math.prod(blocks.mean_shape), dtype=torch.float64)
    spread = blocks.split(blocks.spread_mean(mean))
    if blocks.pool_mean:
        expected = mean.reshape(groups, 1, -1).expand_as(spread[0])
        assert torch.equal(spread[0], expected)
    else:
        assert torch.equal(blocks.join(spread).flatten(), mean)
    assert torch.equal(blocks.pooled_mean(blocks.spread_mean(mean).flatten()), mean)


@pytest.mark.parametrize(
    ("channels", "groups", "block_size", "parts"),
    [
        (80, 1, 64, ((1, 64 * 9), (1, 16 * 9))),
        (5, 1, 2, ((2, 18), (1, 9))),
        (128, 1, 64, ((2, 64 * 9),)),
        (3, 1, 64, ((1, 27),)),
        (12, 4, 2, ((1, 18), (1, 9))),
        (6, 6, 64, ((1, 9),)),
    ],
)
def test_a_last_block_that_does_not_come_out_even_is_smaller(
    channels: int, groups: int, block_size: int, parts: tuple[tuple[int, int], ...]
) -> None:
    assert Blocks.plan(channels, SQUARE, groups, block_size, "contiguous").parts == parts


@pytest.mark.parametrize(
    ("channels", "groups", "block_size", "used"),
    [(88, 1, 64, 8), (96, 1, 64, 32), (24, 1, 64, 24), (1280, 1, 512, 256), (12, 3, 64, 4), (12, 3, 2, 4)],
)
def test_interleaved_takes_the_common_divisor_and_with_groups_the_group(
    channels: int, groups: int, block_size: int, used: int
) -> None:
    blocks = Blocks.plan(channels, SQUARE, groups, block_size, "interleaved")
    assert (blocks.block_size, blocks.interleaved, blocks.pool_mean) == (used, True, True)
    assert blocks.parts == ((channels // groups // used, used * 9),)


def test_interleaved_by_hand() -> None:
    blocks = Blocks.plan(4, Window((2,), (1,), (1,), ((0, 0),)), 1, 2, "interleaved")
    index = torch.arange(8)
    assert blocks.split(index)[0].tolist() == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert blocks.spread_mean(torch.tensor([10.0, 20, 30, 40])).tolist() == [[10, 10, 20, 20, 30, 30, 40, 40]]
    mean = torch.tensor([1.0, 3, 20, 40, 0, 2, 5, 5])
    assert blocks.pooled_mean(mean).tolist() == [2, 30, 1, 5]


def test_the_published_linear_layer_has_neighbouring_features_in_a_block() -> None:
    blocks = Blocks.plan(6, LINEAR, 1, 4, "interleaved")
    assert blocks.split(torch.arange(6))[0].tolist() == [[0, 1], [2, 3], [4, 5]]
    assert blocks.spread_mean(torch.tensor([10.0, 20])).tolist() == [[10, 20, 10, 20, 10, 20]]


@pytest.mark.parametrize(
    ("channels", "window", "groups", "size", "published"),
    [
        (20, SQUARE, 1, 20, 20), (64, SQUARE, 1, 64, 64), (511, SQUARE, 1, 64, 1), (512, SQUARE, 1, 16, 64),
        (768, THREE, 1, 16, 64), (512, PIXEL, 1, 32, 64), (512, LINEAR, 1, 512, 512), (1280, LINEAR, 1, 512, 256),
        (1024, SQUARE, 2, 16, 512), (512, SQUARE, 2, 64, 256), (512, SQUARE, 512, 1, 1), (1024, PIXEL, 2, 32, 512),
    ],
)  # fmt: skip
def test_without_a_size_wide_layers_of_several_taps_have_smaller_blocks(
    channels: int, window: Window, groups: int, size: int, published: int
) -> None:
    for config, used in ((WhiteningConfig(), size), (WhiteningConfig.paper(), published)):
        blocks = Estimator(channels, window, groups, config).blocks
        assert blocks == Blocks.plan(channels, window, groups, used, config.grouping)
        assert blocks.block_size == used


@DRAWS
@given(layout=layouts())
def test_a_number_of_every_channel_is_that_of_all_its_taps(layout: tuple[int, Window, int, int, str]) -> None:
    channels, window, groups, _, _ = layout
    blocks = Blocks.plan(*layout)
    spread = blocks.of_channels(torch.arange(channels))
    assert tuple(spread.shape) == (groups, blocks.group_features)
    assert spread.flatten().tolist() == [index // window.taps for index in range(channels * window.taps)]
