"""Large kernels: how large a block and its root may become, and blocks that are pieces of one channel's taps."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import netdeconv
from layer_kinds import Kind, buffers
from netdeconv import WhitenedConv1d, WhitenedConv2d, WhitenedConv3d, WhiteningConfig
from netdeconv import reference as ref
from netdeconv.functional import Blocks, Window, fold, patch_moments, unfold
from netdeconv.inspect import inspect_layers
from netdeconv.nn.estimator import Estimator
from test_default_procedure import close, follow
from variation import Variation

DRAWS = settings(deadline=None, derandomize=True, max_examples=60)

MOST_FEATURES, MOST_ENTRIES = 1024, 2**24
# float64, sums of some hundred products of numbers of order one.
TIGHT: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-10}
# A fused layer in float32 against the whitened one, relative to the largest output: sums of 961 products.
FUSED = 1e-4


def window(*kernel: int) -> Window:
    dims = len(kernel)
    return Window(kernel, (1,) * dims, (1,) * dims, ((0, 0),) * dims)


def cut(channels: int, kernel: tuple[int, ...], groups: int, **settings: Any) -> Blocks:
    return Estimator(channels, window(*kernel), groups, WhiteningConfig(**settings)).blocks


def with_pieces(channels: int, taps: int, groups: int, piece: int) -> Blocks:
    return Blocks(channels, taps, groups, 1, piece=piece)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------------------------- the bound

# Channels, kernel, groups, block size, and the parts, which are those of the kind of layer.
ORDINARY = [
    (3, (7, 7), 1, 64, ((1, 147),)),
    (3, (11, 11), 1, 64, ((1, 363),)),
    (3, (16, 16), 1, 64, ((1, 768),)),
    (3, (4, 4), 1, 64, ((1, 48),)),
    (64, (3, 3), 1, 64, ((1, 576),)),
    (80, (3, 3), 1, 64, ((1, 576), (1, 144))),
    (512, (3, 3), 1, 16, ((32, 144),)),
    (2048, (3, 3), 1, 16, ((128, 144),)),
    (512, (5, 5), 1, 16, ((32, 400),)),
    (512, (2, 2), 1, 16, ((32, 64),)),
    (1536, (7, 7), 1536, 32, ((1, 49),)),
    (2304, (5, 5), 2304, 32, ((1, 25),)),
    (4096, (3, 3), 4096, 32, ((1, 9),)),
    (1024, (3, 3), 32, 64, ((1, 288),)),
    (2048, (1, 1), 1, 32, ((64, 32),)),
    (768, (16,), 1, 16, ((48, 256),)),
]


@pytest.mark.parametrize(("channels", "kernel", "groups", "size", "parts"), ORDINARY)
def test_ordinary_kernels_are_cut_as_if_there_were_no_bound(
    channels: int, kernel: tuple[int, ...], groups: int, size: int, parts: tuple[tuple[int, int], ...]
) -> None:
    found = Estimator(channels, window(*kernel), groups, WhiteningConfig())
    assert (found.config.block_size, found.blocks.piece, found.blocks.parts) == (size, None, parts)


LARGE = [
    # As few blocks of whole channels as fit, as equal as they come.
    (128, (5, 5), 1, None, ((4, 800),)),
    (96, (3, 3, 3), 1, None, ((3, 864),)),
    (64, (5, 5, 5), 1, None, ((8, 1000),)),
    (65, (7, 7), 1, None, ((3, 833), (1, 686))),
    (3, (32, 32), 1, None, ((3, 1024),)),
    (16, (31, 31), 16, None, ((1, 961),)),
    # Rows of one channel, the smaller last piece's root included in what 64 MiB hold.
    (256, (31, 31), 256, 7 * 31, ((4, 7 * 31), (1, 3 * 31))),
    (64, (31, 31), 64, 11 * 31, ((2, 11 * 31), (1, 9 * 31))),
    (1, (33, 33), 1, 17 * 33, ((1, 17 * 33), (1, 16 * 33))),
    (8, (11, 11, 11), 8, 61 * 11, ((1, 61 * 11), (1, 60 * 11))),
    # Of several channels in a group: even pieces where they are not much smaller.
    (3, (33, 33), 1, 11 * 33, ((9, 11 * 33),)),
    (2, (37, 37), 1, 19 * 37, ((2, 19 * 37), (2, 18 * 37))),
    # Rows that are too long themselves.
    (1, (5000,), 1, 1000, ((5, 1000),)),
    (4, (5000,), 1, 1000, ((20, 1000),)),
    (1, (5003,), 1, 1001, ((4, 1001), (1, 999))),
    (4, (5003,), 1, 1001, ((16, 1001), (4, 999))),
    (6, (3, 2000), 1, 1000, ((36, 1000),)),
]


@pytest.mark.parametrize(("channels", "kernel", "groups", "piece", "parts"), LARGE)
def test_large_kernels_are_cut_smaller(
    channels: int, kernel: tuple[int, ...], groups: int, piece: int | None, parts: tuple[tuple[int, int], ...]
) -> None:
    blocks = cut(channels, kernel, groups)
    assert (blocks.piece, blocks.parts) == (piece, parts)


@DRAWS
@given(data=st.data())
def test_no_block_and_no_root_is_larger_than_the_bound(data: st.DataObject) -> None:
    groups, per_group = data.draw(st.sampled_from([1, 2, 7, 64, 300, 1024])), data.draw(st.integers(1, 40))
    kernel = data.draw(
        st.one_of(
            st.tuples(st.integers(1, 6000)),
            st.tuples(st.integers(1, 64), st.integers(1, 64)),
            st.tuples(*[st.integers(1, 12)] * 3),
        )
    )
    blocks = cut(groups * per_group, kernel, groups)
    assert max(size for _, size in blocks.parts) <= MOST_FEATURES
    assert sum(math.prod(shape) for shape in blocks.root_shapes) <= MOST_ENTRIES
    assert sum(count * size for count, size in blocks.parts) == blocks.group_features == per_group * math.prod(kernel)
    if blocks.piece is not None and groups * kernel[-1] ** 2 <= MOST_ENTRIES and kernel[-1] <= MOST_FEATURES:
        assert all(size % kernel[-1] == 0 for _, size in blocks.parts)


def test_a_size_that_is_asked_for_is_kept_but_for_pieces() -> None:
    assert cut(64, (5, 5, 5), 1, block_size=32).parts == ((2, 4000),)
    assert cut(256, (31, 31), 256, block_size=32) == cut(256, (31, 31), 256)
    assert Estimator(256, window(31, 31), 256, WhiteningConfig(block_size=32)).config.block_size == 32


@pytest.mark.parametrize(
    ("channels", "kernel", "groups"), [(64, (5, 5, 5), 1), (256, (31, 31), 256), (6, (33, 33), 1), (4, (5000,), 1)]
)
def test_the_published_procedure_has_no_bound(channels: int, kernel: tuple[int, ...], groups: int) -> None:
    blocks = Estimator(channels, window(*kernel), groups, WhiteningConfig.paper()).blocks
    size = channels // groups if groups > 1 else math.gcd(64, channels) if channels > 64 else channels
    assert (blocks.piece, blocks.block_size) == (None, size)
    assert blocks.parts == ((channels // groups // size, size * math.prod(kernel)),)


def test_settings_survive_being_serialised() -> None:
    for channels, kernel, groups in ((65, (7, 7), 1), (256, (31, 31), 256), (4, (5003,), 1)):
        found = Estimator(channels, window(*kernel), groups, WhiteningConfig())
        again = Estimator.deserialize(found.serialized)
        assert (again.blocks, again.config) == (found.blocks, found.config)


# ------------------------------------------------------------------------------------------------ pieces, in numbers


@st.composite
def drawn_pieces(draw: st.DrawFn) -> Blocks:
    groups, per_group, taps = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(2, 15))
    return with_pieces(groups * per_group, taps, groups, draw(st.integers(1, taps - 1)))


@DRAWS
@given(blocks=drawn_pieces())
def test_a_piece_holds_neighbouring_taps_of_one_channel(blocks: Blocks) -> None:
    index = torch.arange(blocks.channels * blocks.taps).reshape(blocks.groups, -1)
    parts = blocks.split(index)
    dealt = ref.deal(
        blocks.channels, blocks.taps, block_size=1, groups=blocks.groups, grouping="contiguous", piece=blocks.piece
    )
    for group in range(blocks.groups):
        ours = [piece.tolist() for part in parts for piece in part[group]]
        assert sorted(ours) == dealt[group]
        assert all(len({tap // blocks.taps for tap in piece}) == 1 for piece in ours)
    assert torch.equal(blocks.join(parts), index)
    assert [tuple(part.shape) for part in parts] == [(blocks.groups, *part) for part in blocks.parts]
    none = blocks.split(index[:0])
    assert torch.equal(blocks.join(none), index[:0])


def test_split_by_hand() -> None:
    blocks = with_pieces(2, 5, 1, 2)  # two channels of five taps in one group: 01 23 4, 56 78 9
    equal, rest = blocks.split(torch.arange(10))
    assert equal.tolist() == [[0, 1], [2, 3], [5, 6], [7, 8]]
    assert rest.tolist() == [[4], [9]]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    ("channels", "taps", "groups", "piece"), [(2, 5, 1, 2), (3, 7, 3, 3), (4, 6, 2, 3), (4, 7, 2, 4)]
)
def test_the_covariance_is_that_of_all_pieces_of_a_part(
    channels: int, taps: int, groups: int, piece: int, weighted: bool
) -> None:
    blocks, x = with_pieces(channels, taps, groups, piece), randn(40, channels * taps).cumsum(1) + 3
    weights = torch.arange(1, 41) if weighted else None
    share = torch.full((40,), 1 / 40, dtype=x.dtype) if weights is None else weights / weights.sum(dtype=x.dtype)
    moments = patch_moments(x, blocks, weights)
    mean = share @ x
    torch.testing.assert_close(moments.mean, mean, **TIGHT)
    per_group = channels // groups
    for part, (cov, size) in enumerate(zip(moments.covs, (piece, taps % piece), strict=False)):
        for group, ours in enumerate(cov.reshape(groups, size, size)):
            by_hand = []
            for channel in range(group * per_group, (group + 1) * per_group):
                starts = range(0, taps - piece + 1, piece) if part == 0 else [taps - taps % piece]
                for first in (channel * taps + start for start in starts):
                    away = (x - mean)[:, first : first + size]
                    by_hand.append(away.T @ (share.unsqueeze(1) * away))
            torch.testing.assert_close(ours, torch.stack(by_hand).mean(0), **TIGHT)
    away = randn(channels * taps, seed=2)
    outer = patch_moments(torch.stack([away, -away]), blocks).covs  # mean zero: of the products alone
    for ours, expected in zip(blocks.outer(away), outer, strict=True):
        torch.testing.assert_close(ours, expected, **TIGHT)


@DRAWS
@given(blocks=drawn_pieces(), per_output=st.integers(1, 3))
def test_fold_and_its_gradients_are_those_of_the_product(blocks: Blocks, per_output: int) -> None:
    mean = randn(*blocks.mean_shape, seed=1)
    halves = [randn(*shape, seed=2 + place) for place, shape in enumerate(blocks.root_shapes)]
    weight = randn(blocks.groups * per_output, blocks.channels // blocks.groups, blocks.taps, seed=5)
    scale, bias = randn(blocks.channels, seed=6).abs() + 0.5, randn(len(weight), seed=7)
    leaves = [value.requires_grad_() for value in (weight, bias, mean, scale, *halves)]
    roots = [half + half.mT for half in halves]
    folded, shifted = fold(weight, bias, mean, roots, blocks, scale)
    # Patches that are whitened by the reference and multiplied with the weights.
    X = randn(9, blocks.channels * blocks.taps, seed=8)
    white = ref.whiten_patches(
        X, mean, roots[0], D_rest=roots[1] if len(roots) > 1 else None, S=scale, channels=blocks.channels,
        grouping="contiguous", groups=blocks.groups,
    )  # fmt: skip
    known = torch.einsum(
        "rgi,goi->rgo", white.reshape(9, blocks.groups, -1), weight.reshape(blocks.groups, per_output, -1)
    )
    ours = torch.einsum("rgi,goi->rgo", X.reshape(9, blocks.groups, -1), folded.reshape(blocks.groups, per_output, -1))
    torch.testing.assert_close(ours.flatten(1) + shifted, known.flatten(1) + bias, **TIGHT)
    along = randn(*known.flatten(1).shape, seed=9)
    loss, expected = (along * (ours.flatten(1) + shifted)).sum(), (along * (known.flatten(1) + bias)).sum()
    for grad, right in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(grad, right, **TIGHT)


# -------------------------------------------------------------------------------------------------- layers of pieces


def depthwise(channels: int = 256, seed: int = 0) -> WhitenedConv2d:
    torch.manual_seed(seed)
    return WhitenedConv2d(channels, channels, 31, padding=15, groups=channels)


def test_a_depthwise_31x31_layer_has_little_state() -> None:
    layer = depthwise()
    elements = {name: value.numel() for name, value in layer.whitening.named_buffers()}
    assert elements["running_root"] == elements["running_cov"] == 256 * 217**2
    assert elements["running_root_rest"] == elements["running_cov_rest"] == 256 * 93**2
    assert elements["running_mean"] == 256 * 961
    assert elements["running_root"] + elements["running_root_rest"] <= MOST_ENTRIES < 256 * 961**2 / 10


def correlated(*shape: int, seed: int = 0) -> Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return x + x.roll(1, -1) + 1


@pytest.mark.training
def test_a_depthwise_31x31_layer_trains_evaluates_and_fuses(variation: Variation) -> None:
    layer = depthwise(19, seed=variation.seed)  # as many channels as cut the kernel into pieces of 16 and 15 rows
    assert layer.whitening.blocks.parts == ((1, 16 * 31), (1, 15 * 31))
    rate = torch.optim.SGD(layer.parameters(), lr=0.3)
    losses = []
    for _ in range(4):
        x = variation.moved(correlated(2, 19, 6, 6, seed=variation.seed))
        loss = (layer(x) - x).square().mean()
        rate.zero_grad()
        loss.backward()
        rate.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    layer.eval()
    with torch.no_grad():
        y = layer(correlated(2, 19, 6, 6, seed=3))
    assert bool(y.isfinite().all())
    fused = netdeconv.fuse(layer)
    assert type(fused) is nn.Conv2d
    netdeconv.check_fused(layer, fused, correlated(2, 19, 6, 6, seed=3), tolerance=FUSED)


LAYERS = [
    pytest.param(lambda **more: WhitenedConv2d(19, 19, 31, padding=15, groups=19, **more), (19, 4, 4), id="31x31"),
    pytest.param(lambda **more: WhitenedConv2d(2, 3, 37, padding=18, **more), (2, 4, 4), id="uneven pieces of two"),
    pytest.param(lambda **more: WhitenedConv3d(12, 4, 5, padding=2, **more), (12, 3, 4, 3), id="5x5x5"),
    pytest.param(lambda **more: WhitenedConv1d(2, 3, 1030, padding=515, **more), (2, 8), id="1030"),
]


@pytest.mark.parametrize(("make", "size"), LAYERS)
def test_state_dicts_surgery_and_inspection(make: Any, size: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    layer = make()
    before = layer(correlated(3, *size))
    assert bool(before.isfinite().all())
    layer.eval()
    x = correlated(2, *size, seed=1)
    again = make().eval()
    again.load_state_dict(layer.state_dict())
    with torch.no_grad():
        y = layer(x)
        assert torch.equal(again(x), y)
    netdeconv.check_fused(layer, netdeconv.fuse(layer), x, tolerance=FUSED)
    (view,) = inspect_layers(layer, x, max_samples=20)
    assert view.whitened is not None
    assert view.root_residual is not None
    assert math.isfinite(view.root_residual)
    held = buffers(layer)
    netdeconv.calibrate(layer, [x, correlated(2, *size, seed=2)])
    assert not torch.equal(held["whitening.running_root"], layer.whitening.running_root)
    assert bool(layer(x).isfinite().all())
    weight, bias = randn(*layer.weight.shape).float(), randn(len(layer.weight)).float()
    theirs = layer.whitening.remembered()
    found = unfold(weight, bias, theirs.mean, theirs.roots, layer.whitening.blocks, theirs.scale)
    exact = [root.double() for root in theirs.roots]
    back = fold(*found, theirs.mean.double(), exact, layer.whitening.blocks, theirs.scale.double())
    torch.testing.assert_close(back[0], weight.double(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(back[1], bias.double(), rtol=1e-6, atol=1e-6)


def test_conversion_preserves_a_network_with_a_large_kernel() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 19, 3, padding=1), nn.BatchNorm2d(19), nn.ReLU(),
        nn.Conv2d(19, 19, 31, padding=15, groups=19, bias=False), nn.BatchNorm2d(19), nn.ReLU(),
    ).eval()  # fmt: skip
    data = [correlated(4, 3, 6, 6, seed=seed) for seed in range(2)]
    converted = netdeconv.convert(net, preserve=data)
    assert isinstance(converted[3], WhitenedConv2d)
    assert converted[3].whitening.blocks.piece == 16 * 31
    with torch.no_grad():
        torch.testing.assert_close(converted(data[0]), net(data[0]), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "config", [WhiteningConfig(), WhiteningConfig(differentiable=True), WhiteningConfig(scale=False, average="root")]
)
def test_over_several_steps_it_is_the_reference(config: WhiteningConfig) -> None:
    config = config.replace(solver="newton_schulz", block_size=1)
    kind = Kind("pieces", lambda **more: WhitenedConv1d(2, 3, 1030, padding=515, **more), (2, 6))
    assert kind.layer(config).whitening.blocks.parts == ((4, 515),)
    follow(kind, config, 3, close)
    kind = Kind("uneven", lambda **more: WhitenedConv1d(1, 2, 1031, padding=515, **more), (1, 6))
    assert kind.layer(config).whitening.blocks.parts == ((1, 516), (1, 515))
    follow(kind, config, 3, close)


def test_a_layer_of_pieces_is_the_convolution_of_whitened_patches() -> None:
    layer = WhitenedConv2d(2, 3, 37, padding=18)
    x = correlated(4, 2, 4, 4)
    layer(x)
    layer.eval()
    found, blocks = layer.whitening.remembered(), layer.whitening.blocks
    patches = F.unfold(x.double(), 37, padding=18).transpose(1, 2)
    white = ref.whiten_patches(
        patches, found.mean, found.roots[0], D_rest=found.roots[1], S=found.scale, channels=2, grouping="contiguous"
    )
    assert blocks.parts == ((2, 19 * 37), (2, 18 * 37))
    expected = (white @ layer.weight.double().flatten(1).T + layer.bias.double()).transpose(1, 2).reshape(4, 3, 4, 4)
    torch.testing.assert_close(layer(x), expected.float(), rtol=1e-3, atol=1e-3)


def test_patches_of_large_kernels_are_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    take = Estimator.sample

    def watched(self: Estimator, x: Tensor, *, max_samples: int, turn: Tensor) -> Any:
        seen.append(max_samples)
        return take(self, x, max_samples=max_samples, turn=turn)

    monkeypatch.setattr(Estimator, "sample", watched)
    for channels, taps in ((64, 3), (96, 31)):
        layer = WhitenedConv2d(channels, channels, taps, groups=channels, padding=taps // 2)
        layer(torch.randn(1, channels, 16, 16))
    assert seen == [4096, 2**26 // (96 * 31 * 31)]
