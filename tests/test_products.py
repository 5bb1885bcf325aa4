"""A root that leaves taps to themselves multiplies like any other, with less work."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from netdeconv import WhitenedConv2d, WhiteningConfig
from netdeconv.functional import products
from netdeconv.functional.products import features_mixed, times_root

TAPS = 9
SEEN = [4, 5, 7, 8]  # of a 3x3 kernel in the top left corner of a 2x2 map

# float64, sums of some hundred products of order one, in another order
ROUNDING = 1e-12


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(len(shape)))


def root_of(channels: int, seen: list[int]) -> Tensor:
    """Symmetric, dense on the seen taps, diagonal elsewhere."""
    features = [channel * TAPS + tap for channel in range(channels) for tap in seen]
    root = torch.diag(drawn(channels * TAPS).abs() + 1)
    block = drawn(len(features), len(features))
    root[torch.tensor(features).unsqueeze(1), torch.tensor(features)] = block + block.T
    return root


@pytest.mark.parametrize("seen", [SEEN, [4], [0, 2, 8]])
def test_the_product_is_that_of_the_whole_root(seen: list[int]) -> None:
    root, rows = root_of(5, seen), drawn(1, 300, 5 * TAPS)
    mixed = features_mixed(root, TAPS)
    assert mixed is not None
    assert mixed.tolist() == [channel * TAPS + tap for channel in range(5) for tap in seen]
    torch.testing.assert_close(times_root(rows, root, TAPS), rows @ root, rtol=ROUNDING, atol=ROUNDING)


def test_what_only_looks_like_it_is_multiplied_whole() -> None:
    root, rows = root_of(5, SEEN), drawn(1, 300, 5 * TAPS)
    root[9, 40] = root[40, 9] = 3.0  # tap 0 of the second channel mixes, that of the first does not
    mixed = features_mixed(root, TAPS)
    assert mixed is not None
    assert set((mixed % TAPS).tolist()) == {0, *SEEN}
    torch.testing.assert_close(times_root(rows, root, TAPS), rows @ root, rtol=ROUNDING, atol=ROUNDING)


def test_a_channel_that_never_varies_is_not_taken_for_all() -> None:
    root = root_of(5, list(range(TAPS)))
    root[:TAPS, TAPS:] = root[TAPS:, :TAPS] = 0
    root[:TAPS, :TAPS] = torch.eye(TAPS)
    assert features_mixed(root, TAPS) is None


def test_a_zero_on_the_diagonal_does_not_hide_a_pair() -> None:
    root = torch.eye(18, dtype=torch.float64)
    root[9, 9] = 0
    root[13, 4] = root[4, 13] = 1
    rows = drawn(1, 300, 18)
    torch.testing.assert_close(times_root(rows, root, TAPS), rows @ root, rtol=ROUNDING, atol=ROUNDING)


def test_nothing_is_looked_for_where_nothing_can_be_gained() -> None:
    root = root_of(5, SEEN)
    assert features_mixed(root_of(5, list(range(TAPS))), TAPS) is None
    assert features_mixed(root_of(5, list(range(8))), TAPS) is None  # 8 of 9 taps: the copies would cost more
    assert features_mixed(root, 1) is None
    assert features_mixed(root.expand(2, -1, -1), TAPS) is None
    assert features_mixed(root.clone().requires_grad_(), TAPS) is None


@pytest.mark.parametrize(("grouping", "expected"), [("contiguous", len(SEEN)), ("interleaved", None)])
def test_a_layer_on_a_tiny_map_has_the_same_gradient(
    grouping: str, expected: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = WhiteningConfig(grouping=grouping, block_size=4)
    layer = WhitenedConv2d(8, 300, 3, padding=1, whitening=config).double()
    x, target = drawn(16, 8, 2, 2), drawn(16, 300, 2, 2)
    results, looked = [], []

    def look(root: Tensor, taps: int) -> Tensor | None:
        looked.append(features_mixed(root, taps))
        return looked[-1]

    for how in (look, lambda root, taps: None):
        monkeypatch.setattr(products, "features_mixed", how)
        layer.whitening.reset_statistics()
        layer.zero_grad()
        y = layer(x)
        (y * target).sum().backward()
        results.append([y, layer.weight.grad, layer.bias.grad])
    assert {None if mixed is None else len(mixed) // config.block_size for mixed in looked} == {expected}
    torch.testing.assert_close(results[0], results[1], rtol=1e-11, atol=1e-11)


def test_backward_inside_autocast_is_that_outside() -> None:
    layer, x = WhitenedConv2d(8, 300, 3, padding=1), drawn(16, 8, 2, 2).float()
    grads = []
    for inside in (False, True):
        layer.whitening.reset_statistics()
        layer.zero_grad()
        loss = layer(x).square().sum()
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            loss.backward()
        assert layer.weight.grad is not None
        grads.append(layer.weight.grad)
    error = float((grads[1] - grads[0]).norm() / grads[0].norm())
    assert error < 1e-2  # autocast reaches the convolution's own backward, in bfloat16, but not the folding


def test_a_tracer_gets_the_plain_product() -> None:
    root, rows = root_of(5, SEEN), drawn(1, 300, 5 * TAPS)
    graph = make_fx(lambda rows, root: times_root(rows, root, TAPS))(rows, root)
    torch.testing.assert_close(graph(rows, root), rows @ root)
    assert any(node.target == torch.ops.aten.mm.default or "bmm" in str(node.target) for node in graph.graph.nodes)
