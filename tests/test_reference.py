"""The reference, tested three ways: by hand, against torch's own operations, against the authors' numbers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from netdeconv import reference as ref
from vectors import VECTOR_TOLERANCE, Case, case, vector_cases

__all__ = ["case"]  # a fixture

# float64, a few hundred operations on numbers of order one.
TIGHT: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-12}
# Roots and what they whiten: rounding is amplified by the condition number, below 1e5 here.
ROOT: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-9}


def tensor(*values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def spd(n: int, *, seed: int = 0) -> Tensor:
    rows = randn(4 * n, n, seed=seed)
    return rows.T @ rows / (4 * n)


def close(actual: Tensor, expected: Tensor, **tolerance: Any) -> None:
    torch.testing.assert_close(actual, expected, **(tolerance or TIGHT))


# ---- inverse root --------------------------------------------------------------------------------


def test_exact_root_of_a_matrix_known_by_hand() -> None:
    # Eigenvalues 9 and 1 along (1, 1) and (1, -1): the root has 1/3 and 1.
    close(ref.exact_inverse_sqrt(tensor([5, 4], [4, 5])), tensor([2, -1], [-1, 2]) / 3)


def test_one_newton_schulz_step_by_hand() -> None:
    # |Cov|_F = 5, A = diag(0.6, 0.8), Z = (3 - A) / 2 = diag(1.2, 1.1).
    close(ref.newton_schulz(tensor([3, 0], [0, 4]), 1), tensor([1.2, 0], [0, 1.1]) / math.sqrt(5))
    # |Cov|_F = 4, and something off the diagonal: Z = (3 I - Cov / 4) / 2, D = Z / 2.
    Cov = tensor([2, 2], [2, 2])
    close(ref.newton_schulz(Cov, 1), tensor([1.25, -0.25], [-0.25, 1.25]) / 2)


def test_two_newton_schulz_steps_by_hand() -> None:
    # a = 0.6: t = 1.2, y = 0.72, z = 1.2; then t = (3 - 0.864) / 2 = 1.068, z = 1.2816.
    assert ref.ns_gain(0.6, 2) == pytest.approx(1.2816, rel=1e-14)
    close(ref.newton_schulz(tensor([3, 0], [0, 4]), 2)[0, 0], tensor(1.2816 / 5**0.5)[0])


def test_gain_at_the_ends() -> None:
    assert ref.ns_gain(0.0, 5) == 1.5**5
    assert ref.ns_gain(1.0, 5) == 1.0
    assert ref.ns_gain(0.01, 30) == pytest.approx(10.0, rel=1e-12)


def test_a_number_is_its_own_norm() -> None:
    for num_iters in (1, 5):
        close(ref.newton_schulz(tensor([16.0]), num_iters), tensor([0.25]))


@pytest.mark.parametrize("num_iters", [1, 5, 11])
def test_newton_schulz_is_the_scalar_map_on_every_eigenvalue(num_iters: int) -> None:
    Cov = spd(7)
    eigenvalues, V = torch.linalg.eigh(Cov)
    norm = float(torch.linalg.matrix_norm(Cov))
    gains = tensor(*[ref.ns_gain(float(e) / norm, num_iters) for e in eigenvalues]) / norm**0.5
    close(ref.newton_schulz(Cov, num_iters), (V * gains) @ V.T)


def test_newton_schulz_reaches_the_root_but_not_in_five_steps() -> None:
    Cov = spd(7)
    root = ref.exact_inverse_sqrt(Cov)
    assert (ref.newton_schulz(Cov, 5) - root).abs().max() > 1e-3
    close(ref.newton_schulz(Cov, 25), root, **ROOT)
    close(root @ Cov @ root, torch.eye(7, dtype=torch.float64), **ROOT)


def test_roots_of_a_batch_are_the_roots_of_each() -> None:
    Covs = torch.stack([spd(4, seed=s) * 10.0**s for s in range(3)])
    for root in (ref.exact_inverse_sqrt, lambda Cov: ref.newton_schulz(Cov, 5)):
        close(root(Covs), torch.stack([root(Cov) for Cov in Covs]))


def test_newton_schulz_gradient() -> None:
    rows = randn(12, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda r: ref.newton_schulz(r.T @ r, 5), rows)


# ---- patches -------------------------------------------------------------------------------------


def test_patches_of_a_line_by_hand() -> None:
    x = tensor([[1, 2, 3], [4, 5, 6]])  # one image, two channels, three pixels
    close(ref.im2col(x, kernel_size=(2,)), tensor([[1, 2, 4, 5], [2, 3, 5, 6]]))
    close(ref.im2col(x, kernel_size=(1,)), tensor([[1, 4], [2, 5], [3, 6]]))
    close(ref.im2col(x, kernel_size=(2,), padding=((1, 0),), dilation=2), tensor([[0, 2, 0, 5], [1, 3, 4, 6]]))


@pytest.mark.parametrize(
    ("kernel_size", "stride", "padding", "dilation"),
    [
        ((3, 3), (1, 1), (0, 0), (1, 1)),
        ((3, 2), (2, 1), (1, 2), (1, 1)),
        ((1, 3), (1, 3), (2, 0), (1, 2)),
        ((2, 3), (1, 2), (0, 1), (3, 1)),
        ((1, 1), (2, 2), (1, 1), (1, 1)),
    ],
)
def test_im2col_is_the_transpose_of_unfold(
    kernel_size: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int], dilation: tuple[int, int]
) -> None:
    x = randn(2, 3, 7, 8)
    rows = ref.im2col(x, kernel_size=kernel_size, stride=stride, padding=padding, dilation=dilation)
    close(rows, F.unfold(x, kernel_size, dilation, padding, stride).mT)


@pytest.mark.parametrize("padding_mode", ["zeros", "circular", "replicate", "reflect"])
def test_padding_modes_are_those_of_torch(padding_mode: str) -> None:
    x = randn(2, 3, 5, 4)
    expected = F.pad(x, (3, 1, 2, 4), mode="constant" if padding_mode == "zeros" else padding_mode)
    close(ref.pad(x, padding=((2, 4), (3, 1)), padding_mode=padding_mode), expected)


def test_a_window_too_large_and_an_unknown_grouping_are_refused() -> None:
    with pytest.raises(ValueError, match="larger than the padded input"):
        ref.im2col(randn(1, 1, 3), kernel_size=(2,), dilation=3)
    with pytest.raises(ValueError, match="unknown grouping 'other'"):
        ref.deal(4, 1, block_size=2, groups=1, grouping="other")


def test_corner_sampling_takes_every_third_window() -> None:
    x = torch.arange(25.0).reshape(1, 1, 5, 5)
    rows = ref.sample_rows_corner(x, kernel_size=(3, 3), padding=1, sampling_stride=3)
    close(rows[:, 4], tensor(0, 3, 15, 18))  # the centres of the four windows
    rows = ref.sample_rows_corner(x, kernel_size=(3, 3), padding=1, sampling_stride=2, stride=(1, 2))
    close(rows[:, 4], tensor(0, 4, 10, 14, 20, 24))


def test_corner_sampling_of_a_tiny_map_sees_one_window_that_is_mostly_padding() -> None:
    x = torch.ones(1, 1, 2, 2)
    rows = ref.sample_rows_corner(x, kernel_size=(3, 3), padding=1, sampling_stride=3)
    close(rows, tensor([0, 0, 0, 0, 1, 1, 0, 1, 1]))


def test_corner_sampling_of_single_pixels_walks_through_the_flat_batch() -> None:
    x = torch.arange(24.0).reshape(3, 1, 2, 4)
    rows = ref.sample_rows_corner(x, kernel_size=(1, 1), sampling_stride=3, padding=1)
    close(rows, tensor([0], [9], [18]))
    rows = ref.sample_rows_corner(x, kernel_size=(1, 1), sampling_stride=2, stride=2)
    close(rows, tensor([0], [16]))
    x = torch.arange(20.0).reshape(20, 1, 1, 1)
    close(ref.sample_rows_corner(x, kernel_size=(1, 1), sampling_stride=3), tensor([0], [9], [18]))


# ---- blocks and moments --------------------------------------------------------------------------


def test_published_block_size_falls_to_the_common_divisor() -> None:
    assert [ref.published_block_size(64, c) for c in (3, 64, 88, 96, 128)] == [3, 64, 8, 32, 64]
    assert ref.published_block_size(64, 12, groups=3) == 4


def test_features_are_dealt_as_documented() -> None:
    interleaved = ref.deal(4, 2, block_size=2, groups=1, grouping="interleaved")
    assert interleaved == [[[0, 2, 4, 6], [1, 3, 5, 7]]]
    contiguous = ref.deal(3, 2, block_size=2, groups=1, grouping="contiguous")
    assert contiguous == [[[0, 1, 2, 3], [4, 5]]]
    grouped = ref.deal(6, 1, block_size=2, groups=2, grouping="contiguous")
    assert grouped == [[[0, 1], [2]], [[3, 4], [5]]]
    assert ref.deal(4, 1, block_size=1, groups=2, grouping="interleaved") == [[[0, 1]], [[2, 3]]]


def test_moments_by_hand() -> None:
    X = tensor([1, 2, 30, 5], [3, 6, 10, 5])  # four channels, two rows
    mu, Cov = ref.moments_interleaved(X, channels=4, block_size=2)
    # Blocks (0, 2) and (1, 3): pooled rows (1, 30), (3, 10), (2, 5), (6, 5).
    close(mu, tensor(3, 12.5))
    close(Cov, tensor([14, -50], [-50, 425]) / 4)
    contiguous = ref.moments_contiguous(X, channels=4, block_size=2)
    # Blocks (0, 1) and (2, 3), each about its own mean: [[1, 2], [2, 4]] and [[100, 0], [0, 0]].
    close(contiguous.mu, tensor(2, 4, 20, 5))
    close(contiguous.Cov, tensor([50.5, 1], [1, 2]))
    assert contiguous.Cov_rest is None


def test_a_smaller_last_block_has_its_own_covariance() -> None:
    X = randn(20, 6 * 2)  # two groups of three channels, two taps
    moments = ref.moments_contiguous(X, channels=6, block_size=2, groups=2)
    Cov = torch.cov(X.T, correction=0)
    assert moments.Cov_rest is not None
    close(moments.Cov, torch.stack([Cov[0:4, 0:4], Cov[6:10, 6:10]]))
    close(moments.Cov_rest, torch.stack([Cov[4:6, 4:6], Cov[10:12, 10:12]]))
    ungrouped = ref.moments_contiguous(X, channels=6, block_size=4)
    assert ungrouped.Cov_rest is not None
    close(ungrouped.Cov, Cov[:8, :8])
    close(ungrouped.Cov_rest, Cov[8:, 8:])


def test_groupings_differ_unless_there_is_one_block() -> None:
    X = randn(20, 8)
    for block_size, same in ((2, False), (4, True), (64, True)):
        _, Cov = ref.moments_interleaved(X, channels=4, block_size=block_size)
        other = ref.moments_contiguous(X, channels=4, block_size=block_size)
        assert torch.allclose(Cov, other.Cov) == same
    mu, Cov = ref.moments_interleaved(X, channels=4, block_size=1, groups=2)
    one_per_group = ref.moments_contiguous(X, channels=4, block_size=2, groups=2)
    close(mu, one_per_group.mu)
    close(Cov, one_per_group.Cov)


def test_eps_is_added_to_the_diagonal_only() -> None:
    close(ref.add_eps(tensor([1, 2], [2, 5]), 0.5), tensor([1.5, 2], [2, 5.5]))


# ---- deconvolution -------------------------------------------------------------------------------


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("grouping", ["interleaved", "contiguous"])
def test_with_the_identity_it_is_a_convolution(dims: int, groups: int, grouping: str) -> None:
    kernel_size, stride = (3, 2, 1)[:dims], (2, 1, 1)[:dims]
    padding, dilation = (1, 0, 2)[:dims], (1, 2, 1)[:dims]
    x = randn(2, 4, *(6, 5, 4)[:dims])
    weight, bias = randn(8, 4 // groups, *kernel_size, seed=1), randn(8, seed=2)
    n = 4 // groups * math.prod(kernel_size)
    y = ref.deconvolve(
        x,
        weight,
        bias,
        torch.zeros(4 * math.prod(kernel_size)) if grouping == "contiguous" else torch.zeros(groups * n),
        torch.eye(n).repeat(groups, 1, 1) if groups > 1 else torch.eye(n),
        grouping=grouping,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
    )
    conv = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
    close(y, conv(x, weight, bias, stride, padding, dilation, groups))


def test_same_padding_is_given_as_pairs() -> None:
    x, weight = randn(2, 3, 6, 7), randn(5, 3, 4, 3, seed=1)
    y = ref.deconvolve(x, weight, None, torch.zeros(36), torch.eye(36), grouping="contiguous", padding=((1, 2), (1, 1)))
    close(y, F.conv2d(x, weight, padding="same"))


def test_one_pixel_patches_by_hand() -> None:
    x = tensor([[[3.0]], [[5.0]]])  # two channels, one pixel: (1, 2, 1, 1)
    x = x.reshape(1, 2, 1, 1)
    D = tensor([2, 1], [1, 3])
    y = ref.deconvolve(x, tensor([10, 1]).reshape(1, 2, 1, 1), tensor(0.5), tensor(1, 1), D, grouping="interleaved")
    # x - mu = (2, 4), times D = (8, 14), times w = 94, plus b.
    close(y, tensor([[[94.5]]]))


def test_blocks_share_the_root_by_hand() -> None:
    x = tensor(1, 2, 3, 4).reshape(1, 4, 1)
    D = tensor([1, 10], [100, 1000])  # not symmetric: shows which index belongs where
    X = ref.im2col(x, kernel_size=(1,))
    interleaved = ref.whiten_patches(X, tensor(0, 1), D, channels=4, grouping="interleaved")
    # Blocks (1, 3) and (2, 4); minus (0, 1): (1, 2) -> (201, 2010), (2, 3) -> (302, 3020).
    close(interleaved, tensor([[201, 302, 2010, 3020]]))
    contiguous = ref.whiten_patches(X, tensor(0, 1, 2, 3), D, channels=4, grouping="contiguous")
    # Every channel minus its own mean is 1: (1, 1) -> (101, 1010), twice.
    close(contiguous, tensor([[101, 1010, 101, 1010]]))


def test_a_smaller_last_block_needs_its_own_root() -> None:
    X, mu, D = tensor(1, 2, 3).reshape(1, 3), torch.zeros(3), 2 * torch.eye(2)
    with pytest.raises(ValueError, match=r"the last block has 1 features, not 2: pass D_rest"):
        ref.whiten_patches(X, mu, D, channels=3, grouping="contiguous")
    whitened = ref.whiten_patches(X, mu, D, channels=3, grouping="contiguous", D_rest=tensor([5.0]))
    close(whitened, tensor([2, 4, 15]))


@pytest.mark.parametrize("groups", [1, 2])
def test_an_exact_root_whitens_every_block(groups: int) -> None:
    X = randn(300, 6 * 3) @ randn(18, 18, seed=1)
    options: dict[str, Any] = {"channels": 6, "groups": groups}
    moments = ref.moments_contiguous(X, block_size=2, **options)
    D = ref.exact_inverse_sqrt(moments.Cov)
    D_rest = None if moments.Cov_rest is None else ref.exact_inverse_sqrt(moments.Cov_rest)
    assert (D_rest is None) == (groups == 1)
    whitened = ref.whiten_patches(X, moments.mu, D, grouping="contiguous", D_rest=D_rest, **options)
    again = ref.moments_contiguous(whitened, block_size=2, **options)
    for Cov in (again.Cov, again.Cov_rest):
        if Cov is not None:
            close(Cov, torch.eye(Cov.shape[-1], dtype=torch.float64).expand_as(Cov), **ROOT)
    close(again.mu, torch.zeros(18, dtype=torch.float64), **ROOT)


# ---- the published layers ------------------------------------------------------------------------

PAPER: dict[str, Any] = {"eps": 1e-5, "num_iters": 5, "momentum": 0.1}


def test_published_conv_by_hand() -> None:
    weight, bias = tensor([[2.0]]).unsqueeze(0), tensor(7.0)
    layer = ref.PublishedConv(
        weight.reshape(1, 1, 1), bias, block_size=64, eps=3.0, num_iters=5, momentum=0.1, sampling_stride=1
    )
    x = tensor(1, 3).reshape(1, 1, 2)
    close(layer(x, training=False), tensor(9, 13).reshape(1, 1, 2))  # nothing seen yet: 2 x + 7
    # Mean 2, variance 1, plus eps is 4, root 1/2: -1 -> -0.5, 1 -> 0.5.
    close(layer(x, training=True), tensor(6, 8).reshape(1, 1, 2))
    close(layer.running_mean, tensor(0.2))
    close(layer.running_deconv, tensor([0.9 + 0.05]))
    close(layer(x, training=False), (x - 0.2) * 0.95 * 2 + 7)
    close(layer.running_mean, tensor(0.2))
    layer(x, training=True)
    close(layer.running_mean, tensor(0.38))
    close(layer.running_deconv, tensor([0.9 * 0.95 + 0.05]))


def test_published_linear_by_hand() -> None:
    layer = ref.PublishedLinear(tensor([1, 10]), None, block_size=1, eps=4.0, num_iters=5, momentum=0.5)
    # Both features of both rows pooled: mean 4, variance 5, plus eps is 9, root 1/3.
    x = tensor([1, 3], [5, 7])
    close(layer(x, training=True), tensor([(-3 - 10) / 3], [(1 + 30) / 3]))
    close(layer.running_mean, tensor(2.0))
    close(layer.running_deconv, tensor([0.5 + 0.5 / 3]))
    close(layer(x.unsqueeze(1), training=False).squeeze(1), layer(x, training=False))


@pytest.mark.parametrize("options", [{}, {"groups": 2}, {"stride": 2, "dilation": 2, "padding": 2}])
def test_published_conv_gradient_goes_through_the_statistics(options: dict[str, int]) -> None:
    weight = randn(2, 4 // options.get("groups", 1), 2, 2, seed=1).requires_grad_()
    bias = randn(2, seed=2).requires_grad_()
    x = randn(2, 4, 5, 5).requires_grad_()

    def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        layer = ref.PublishedConv(weight, bias, block_size=2, sampling_stride=2, **options, **PAPER)
        return layer(x, training=True)

    assert torch.autograd.gradcheck(run, (x, weight, bias))


def test_published_linear_gradient_goes_through_the_statistics() -> None:
    inputs = (randn(6, 4), randn(3, 4, seed=1), randn(3, seed=2))

    def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return ref.PublishedLinear(weight, bias, block_size=2, **PAPER)(x, training=True)

    assert torch.autograd.gradcheck(run, tuple(t.requires_grad_() for t in inputs))


def test_published_conv_works_in_every_number_of_dimensions() -> None:
    # The same line as one, two and three dimensions.
    x, weight, bias = randn(3, 4, 9), randn(2, 4, 3, seed=1), randn(2, seed=2)
    outputs = []
    for extra in range(3):
        ones = (1,) * extra
        layer = ref.PublishedConv(
            weight.reshape(2, 4, *ones, 3),
            bias,
            block_size=2,
            sampling_stride=2,
            padding=(0,) * extra + (1,),
            **PAPER,
        )
        outputs.append(layer(x.reshape(3, 4, *ones, 9), training=True).reshape(3, 2, 9))
    close(outputs[1], outputs[0])
    close(outputs[2], outputs[0])


# ---- the default layers --------------------------------------------------------------------------

SETTINGS: dict[str, Any] = {
    "block_size": 2, "eps": 1e-5, "num_iters": 3, "momentum": 0.1, "scale": True, "update_every": 16,
    "differentiable": False, "average": "covariance",
}  # fmt: skip


def test_refreshes_by_hand() -> None:
    steps = [step for step in range(200) if ref.refreshes(step, 16)]
    assert steps == [*range(16), *range(16, 32, 2), *range(32, 64, 4), *range(64, 128, 8), *range(128, 200, 16)]
    assert all(ref.refreshes(step, 1) for step in range(100))
    assert [step for step in range(16, 45) if ref.refreshes(step, 3)] == [
        16,
        18,
        20,
        22,
        24,
        26,
        28,
        30,
        33,
        36,
        39,
        42,
    ]


def test_scale_by_hand() -> None:
    # Channels (0, 4), (1, 3) and (5, 5): deviations 2, 1 and 0, where eps is the variance.
    x = tensor([[0, 4], [1, 3], [5, 5]])
    close(ref.scale_of(x, 0.25), tensor(0.5, 1, 2))
    close(ref.scale_of(tensor([0, 1, 5], [4, 3, 5]), 0.25), tensor(0.5, 1, 2))  # as two images without a map


def test_weighted_averages_by_hand() -> None:
    values = [tensor(8.0), tensor(4.0)]
    close(ref.weighted_average(values, [1, 1], 0.5), tensor((0.25 * 8 + 0.5 * 4) / 0.75))
    close(ref.weighted_average(values, [1, 2], 0.5), tensor((0.125 * 8 + 0.75 * 4) / 0.875))
    close(ref.weighted_average(values, [1, 3], None), tensor((8 + 3 * 4) / 4))
    close(ref.weighted_average(values, [1, 1], 1.0), values[1])


def test_roots_are_averaged_with_their_gains_as_variances_by_hand() -> None:
    # Gains 1 and 1/2 of the first feature are variances 1 and 4, on average 2.5; the second has 1 throughout.
    # Off the diagonal, over the root of both gains, 0.5 and 0 are 0.25 on average.
    roots = [tensor([1, 0.5], [0.5, 1]), tensor([0.5, 0], [0, 1])]
    gain = 2.5**-0.5
    expected = tensor([gain, 0.25 * gain**0.5], [0.25 * gain**0.5, 1])
    close(ref.average_of_roots(roots, [1, 1], None), expected)


def test_a_patch_is_scaled_before_it_is_whitened_by_hand() -> None:
    X, mu, D = tensor(2, 3, 5, 9).reshape(1, 4), tensor(0, 1, 1, 1), tensor([1, 10], [100, 1000])
    # Two channels of two taps: (2, 2, 4, 8), scaled by 1/2 and 1/4: (1, 1, 1, 2).
    white = ref.whiten_patches(X, mu, D, channels=4, grouping="contiguous", S=tensor(0.5, 0.5, 0.25, 0.25))
    close(white, tensor([101, 1010, 201, 2010]))
    wide = torch.block_diag(D, D)
    close(ref.whiten_patches(X, mu, wide, channels=2, grouping="contiguous", S=tensor(0.5, 0.25)), white)


def test_default_conv_by_hand() -> None:
    # One channel, one tap, eps 3. First 0 and 4: mean 2, variance 4, S 1/2, Cov 1, plus eps is 4, D 1/2.
    settings = {**SETTINGS, "eps": 3.0, "momentum": 0.5, "sampling_stride": 3}
    layer = ref.DefaultConv(tensor(2).reshape(1, 1, 1), tensor(7.0), **settings)
    x = tensor(0, 4).reshape(1, 1, 2)
    close(layer(x, training=False), 2 * x + 7)  # nothing seen yet
    close(layer(x, training=True), tensor(6, 8).reshape(1, 1, 2))
    close(layer(x, training=False), tensor(6, 8).reshape(1, 1, 2))
    # Then 1 and 3: variance 1, below eps, so S is 3**-0.5 and Cov 1/3. Weights of the two are 1/3 and 2/3:
    # R = 5/9, plus eps 32/9.
    x = tensor(1, 3).reshape(1, 1, 2)
    D = (32 / 9) ** -0.5
    close(layer(x, training=True), (x - 2) * 3**-0.5 * D * 2 + 7)
    # Running variance (4 + 2 * 1) / 3 = 2, which is below eps as well.
    close(layer(x, training=False), (x - 2) * 3**-0.5 * D * 2 + 7)


def test_default_conv_of_single_pixels_is_plain() -> None:
    weight, bias, x = randn(3, 4, 1, 1, seed=1), randn(3, seed=2), randn(6, 4, 1, 1)
    layer = ref.DefaultConv(weight, bias, sampling_stride=3, **SETTINGS)
    for training in (True, False):
        close(layer(x, training=training), F.conv2d(x, weight, bias))
    assert not torch.allclose(layer(randn(6, 4, 2, 1), training=True), F.conv2d(randn(6, 4, 2, 1), weight, bias))


def test_default_linear_and_channels_are_the_convolution_of_single_pixels() -> None:
    x, weight, bias = randn(9, 4) + 1, randn(3, 4, seed=1), randn(3, seed=2)
    conv = ref.DefaultConv(weight.unsqueeze(-1), bias, sampling_stride=3, **SETTINGS)
    linear, channels = ref.DefaultLinear(weight, bias, **SETTINGS), ref.DefaultChannels(4, **SETTINGS)
    for step in range(3):
        rows = x * (step + 1)
        expected = conv(rows.T.unsqueeze(0), training=True).squeeze(0).T  # as one image of nine pixels
        close(linear(rows, training=True), expected)
        close(channels(rows.unsqueeze(-1), training=True).squeeze(-1) @ weight.T + bias, expected)
    close(linear(x.reshape(3, 3, 4), training=False).reshape(9, 3), conv(x.T.unsqueeze(0), training=False)[0].T)


@pytest.mark.parametrize("differentiable", [False, True])
def test_default_gradients_by_the_definition(differentiable: bool) -> None:
    """What is a constant of the gradient is held by hand, and finite differences are taken of the rest."""
    settings = {**SETTINGS, "differentiable": differentiable, "average": "root"}
    weight, bias, x = randn(2, 4, 2, seed=1), randn(2, seed=2), randn(3, 4, 5).requires_grad_()
    first = ref.DefaultConv(weight, bias, sampling_stride=2, **settings)
    first(x, training=True)
    mu, D = first.statistics.mus[0], first.statistics.last_D

    def run(x: Tensor) -> Tensor:
        if differentiable:
            return ref.DefaultConv(weight, bias, sampling_stride=2, **settings)(x, training=True)
        return ref.deconvolve(x, weight, bias, mu, D[0], S=ref.scale_of(x, 1e-5), grouping="contiguous")

    assert torch.autograd.gradcheck(run, x)
    layer = ref.DefaultConv(weight, bias, sampling_stride=2, **settings)
    (grad,) = torch.autograd.grad(layer(x, training=True).square().sum(), x)
    close(grad, torch.autograd.grad(run(x).square().sum(), x)[0])


# ---- the authors' numbers ------------------------------------------------------------------------


@pytest.mark.parametrize("case", vector_cases(), indirect=True)
def test_the_published_layers_are_reproduced(case: Case) -> None:
    tolerance = {"rtol": VECTOR_TOLERANCE, "atol": VECTOR_TOLERANCE}
    weight = case.weight.clone().requires_grad_()
    bias = None if case.bias is None else case.bias.clone().requires_grad_()
    layer_type = ref.PublishedLinear if case.kind == "linear" else ref.PublishedConv
    layer = layer_type(weight, bias, **case.conv_options(), **case.whitening_options())
    assert len(case.steps) == 3
    for step in case.steps:
        x = step.input.clone().requires_grad_()
        y = layer(x, training=True)
        close(y, step.output, **tolerance)
        wanted = [x, weight] if bias is None else [x, weight, bias]
        expected = [step.input_grad, step.grad_weight, step.grad_bias]
        for grad, known in zip(torch.autograd.grad(y, wanted, step.output_grad), expected, strict=False):
            assert known is not None
            close(grad, known, **tolerance)
        close(layer.running_mean, step.running_mean, **tolerance)
        close(layer.running_deconv, step.running_deconv, **tolerance)
    close(layer(case.eval_input, training=False), case.eval_output, **tolerance)
