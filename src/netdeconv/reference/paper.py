"""The paper's procedure, and its authors' layers on given parameters."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

Ints: TypeAlias = int | tuple[int, ...]
Padding: TypeAlias = int | tuple[int | tuple[int, int], ...]


def _per_dim(value: Ints, dims: int) -> tuple[int, ...]:
    return (value,) * dims if isinstance(value, int) else value


def _padding_pairs(padding: Padding, dims: int) -> list[tuple[int, int]]:
    sides = (padding,) * dims if isinstance(padding, int) else padding
    return [(side, side) if isinstance(side, int) else side for side in sides]


def pad(x: Tensor, *, padding: Padding, padding_mode: str = "zeros") -> Tensor:
    """Extend every spatial dimension of x (batch, C, *size).

    ``padding`` is an int, or for each dimension an int or a pair (left, right); modes as in ``nn.Conv2d``.
    """
    last_dim_first = [side for pair in reversed(_padding_pairs(padding, x.dim() - 2)) for side in pair]
    return F.pad(x, last_dim_first, mode="constant" if padding_mode == "zeros" else padding_mode)


def _output_size(size: Ints, *, kernel_size: Ints, stride: Ints, dilation: Ints) -> tuple[int, ...]:
    """How often the window fits along each dimension of an already padded input."""
    dims = len(_per_dim(size, 1))
    every = zip(*(_per_dim(v, dims) for v in (size, kernel_size, stride, dilation)), strict=True)
    out = tuple((s - d * (k - 1) - 1) // t + 1 for s, k, t, d in every)
    if min(out) < 1:
        raise ValueError(f"window {kernel_size}, dilation {dilation}, is larger than the padded input {size}")
    return out


def im2col(
    x: Tensor,
    *,
    kernel_size: tuple[int, ...],
    stride: Ints = 1,
    padding: Padding = 0,
    dilation: Ints = 1,
    padding_mode: str = "zeros",
) -> Tensor:
    """Write every patch of x (batch, C, *size), one to three spatial dimensions, as a row.

    Returns (batch, positions, C*K), positions and taps in row-major order. In two dimensions and with zero
    padding that is ``torch.nn.functional.unfold``, transposed.
    """
    x = pad(x.double(), padding=padding, padding_mode=padding_mode)
    out = _output_size(tuple(x.shape[2:]), kernel_size=kernel_size, stride=stride, dilation=dilation)
    stride, dilation = _per_dim(stride, len(out)), _per_dim(dilation, len(out))
    columns = []
    for tap in torch.ones(kernel_size).nonzero().tolist():  # (0, 0), (0, 1), ...
        seen = x
        for dim, offset in enumerate(tap):
            places = offset * dilation[dim] + stride[dim] * torch.arange(out[dim], device=x.device)
            seen = seen.index_select(dim + 2, places)
        columns.append(seen.flatten(2))  # (batch, C, positions): what this tap sees
    return torch.stack(columns, dim=2).flatten(1, 2).transpose(1, 2)


def sample_rows_corner(
    x: Tensor,
    *,
    kernel_size: tuple[int, ...],
    sampling_stride: int,
    stride: Ints = 1,
    padding: Padding = 0,
    dilation: Ints = 1,
    padding_mode: str = "zeros",
) -> Tensor:
    """Patches the published layer computes its statistics from: (rows, C*K).

    More than one tap: the grid that starts in the corner, its step ``sampling_stride * stride`` along every
    dimension. One tap: all pixels of all images in one long list, padding left out, of which every
    ``prod(sampling_stride * stride)``-th is taken; of 1x1 maps, with stride 3, that is every ninth image.
    """
    step = tuple(sampling_stride * s for s in _per_dim(stride, x.dim() - 2))
    if math.prod(kernel_size) == 1:
        pixels = x.double().flatten(2).transpose(1, 2).flatten(0, 1)
        return pixels[:: math.prod(step)]
    X = im2col(x, kernel_size=kernel_size, stride=step, padding=padding, dilation=dilation, padding_mode=padding_mode)
    return X.flatten(0, 1)


def published_block_size(block_size: int, channels: int, *, groups: int = 1) -> int:
    """Block size the published layers really use."""
    if groups > 1:
        return channels // groups
    return channels if block_size > channels else math.gcd(block_size, channels)


def deal(
    channels: int, taps: int, *, block_size: int, groups: int, grouping: str, piece: int | None = None
) -> list[list[list[int]]]:
    """Which features a block has: ``deal(...)[group][block]`` lists flat indices ``channel * taps + tap``.

    With ``piece`` a contiguous block is no more than so many taps of one channel, in place of ``block_size`` channels.
    """
    if grouping == "interleaved":
        if groups > 1:
            block_size, grouping = channels // groups, "contiguous"  # one block per group
        else:
            count = channels // published_block_size(block_size, channels)
            return [[list(range(block, channels * taps, count)) for block in range(count)]]
    if grouping != "contiguous":
        raise ValueError(f"unknown grouping {grouping!r}")
    width = channels // groups
    run, length = (width * taps, block_size * taps) if piece is None else (taps, piece)
    dealt: list[list[list[int]]] = [[] for _ in range(groups)]
    for first in range(0, channels * taps, run):
        for start in range(first, first + run, length):
            dealt[first // (width * taps)].append(list(range(start, min(start + length, first + run))))
    return dealt


def covariance(X: Tensor, mu: Tensor) -> Tensor:
    """``(X - mu)^T (X - mu) / rows`` of X (rows, n): the biased covariance, (n, n). No eps yet."""
    centred = X - mu
    return centred.T @ centred / X.shape[0]


def add_eps(Cov: Tensor, eps: float) -> Tensor:
    """``Cov + eps I`` for (..., n, n)."""
    return Cov + eps * torch.eye(Cov.shape[-1], dtype=Cov.dtype, device=Cov.device)


def moments_interleaved(X: Tensor, *, channels: int, block_size: int, groups: int = 1) -> tuple[Tensor, Tensor]:
    """Mean and covariance (without eps) of X (rows, C*K), grouped as published.

    One group: the blocks are stacked as if they were more rows; returns mu (n,), Cov (n, n), n = B*K.
    Several: mu (C*K,), Cov (groups, n, n), n = C/groups*K; ``block_size`` is not used.
    """
    X = X.double()
    taps = X.shape[1] // channels
    dealt = deal(channels, taps, block_size=block_size, groups=groups, grouping="interleaved")
    mus, Covs = [], []
    for blocks in dealt:
        rows = torch.cat([X[:, block] for block in blocks])
        mus.append(rows.mean(0))
        Covs.append(covariance(rows, mus[-1]))
    return torch.cat(mus), torch.stack(Covs) if groups > 1 else Covs[0]


class ContiguousMoments(NamedTuple):
    """mu (C*K,); Cov (n, n) or (groups, n, n), n = B*K or a piece; Cov_rest alike, of smaller last blocks, or None."""

    mu: Tensor
    Cov: Tensor
    Cov_rest: Tensor | None


def moments_contiguous(
    X: Tensor, *, channels: int, block_size: int, groups: int = 1, piece: int | None = None
) -> ContiguousMoments:
    """Means and covariances (without eps) of X (rows, C*K), neighbouring channels forming a block, or taps a piece."""
    X = X.double()
    mu = X.mean(0)
    taps = X.shape[1] // channels
    full_size = min(block_size, channels // groups) * taps if piece is None else piece
    Covs, Cov_rests = [], []
    for blocks in deal(channels, taps, block_size=block_size, groups=groups, grouping="contiguous", piece=piece):
        each = [covariance(X[:, block], mu[block]) for block in blocks]
        full = [Cov for Cov in each if Cov.shape[0] == full_size]
        rest = [Cov for Cov in each if Cov.shape[0] < full_size]
        Covs.append(torch.stack(full).mean(0))
        Cov_rests += [torch.stack(rest).mean(0)] if rest else []
    if groups == 1:
        return ContiguousMoments(mu, Covs[0], Cov_rests[0] if Cov_rests else None)
    return ContiguousMoments(mu, torch.stack(Covs), torch.stack(Cov_rests) if Cov_rests else None)


def newton_schulz(Cov: Tensor, num_iters: int) -> Tensor:
    """So many coupled Newton-Schulz steps from Cov (..., n, n), eps already in it, towards ``Cov^(-1/2)``.

    ``Y = Cov / |Cov|_F, Z = I``; repeat ``T = (3 I - Z Y) / 2, Y = Y T, Z = T Z``; ``D = Z / sqrt(|Cov|_F)``.
    Five steps are far from the root where eigenvalues are small (``ns_gain``). A zero matrix gives NaN.
    """
    Cov = Cov.double()
    norm = Cov.square().sum((-2, -1), keepdim=True).sqrt()
    identity = torch.eye(Cov.shape[-1], dtype=Cov.dtype, device=Cov.device)
    Y, Z = Cov / norm, identity
    for _ in range(num_iters):
        T = (3 * identity - Z @ Y) / 2
        Y, Z = Y @ T, T @ Z
    return Z / norm.sqrt()


def exact_inverse_sqrt(Cov: Tensor) -> Tensor:
    """``Cov^(-1/2)`` of a positive definite Cov (..., n, n) by eigendecomposition.

    Autograd's gradient of it is wrong or infinite where eigenvalues repeat; the value is right everywhere.
    """
    eigenvalues, V = torch.linalg.eigh(Cov.double())
    return (V * eigenvalues.rsqrt().unsqueeze(-2)) @ V.mT


def ns_gain(a: float, num_iters: int) -> float:
    """What ``newton_schulz`` does to one eigenvalue ``a`` of ``Cov / |Cov|_F``: ``a^(-1/2)`` if converged.

    At a = 0 it is ``1.5 ** num_iters`` (7.6 for five steps): no direction is ever amplified more than that.
    """
    y, z = a, 1.0
    for _ in range(num_iters):
        t = (3.0 - z * y) / 2.0
        y, z = y * t, t * z
    return z


def whiten_patches(
    X: Tensor,
    mu: Tensor,
    D: Tensor,
    *,
    channels: int,
    grouping: str,
    groups: int = 1,
    D_rest: Tensor | None = None,
    S: Tensor | None = None,
) -> Tensor:
    """``(X - mu) S D``, block by block, of X (..., C*K); mu, D, D_rest are shaped like the moments, S (C,) or none."""
    X, mu = X.double(), mu.double()
    taps = X.shape[-1] // channels
    scales = X.new_ones(X.shape[-1]) if S is None else S.double().repeat_interleave(taps)
    pooled_mean = grouping == "interleaved" and groups == 1
    roots = D.double().reshape(groups, D.shape[-1], D.shape[-1])
    piece = D.shape[-1] if D.shape[-1] < taps else None
    dealt = deal(channels, taps, block_size=D.shape[-1] // taps, groups=groups, grouping=grouping, piece=piece)
    whitened = torch.zeros_like(X)
    for group, blocks in enumerate(dealt):
        for block in blocks:
            root = roots[group]
            if len(block) < root.shape[-1]:
                if D_rest is None:
                    raise ValueError(f"the last block has {len(block)} features, not {len(root)}: pass D_rest")
                root = D_rest.double().reshape(groups, len(block), len(block))[group]
            features = torch.tensor(block, device=X.device)
            centred = X[..., block] - (mu if pooled_mean else mu[block])
            whitened = whitened.index_copy(-1, features, (centred * scales[block]) @ root)
    return whitened


def deconvolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mu: Tensor,
    D: Tensor,
    *,
    grouping: str,
    D_rest: Tensor | None = None,
    S: Tensor | None = None,
    stride: Ints = 1,
    padding: Padding = 0,
    dilation: Ints = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
) -> Tensor:
    """``y = (X - mu) S D w + b`` for each patch of x (batch, C, *size), whitening the patches themselves.

    ``weight`` (out, C/groups, *kernel_size), ``bias`` (out,) or None; returns (batch, out, *out_size). D tells
    the block size, or the piece; without S it is the identity. Nothing is folded. Padding belongs to the patch: it is
    centred, scaled and whitened like pixels.
    """
    kernel_size = tuple(weight.shape[2:])
    window: dict[str, Any] = {"kernel_size": kernel_size, "stride": stride, "dilation": dilation}
    X = im2col(x, padding=padding, padding_mode=padding_mode, **window)
    X = whiten_patches(X, mu, D, channels=x.shape[1], grouping=grouping, groups=groups, D_rest=D_rest, S=S)
    w = weight.double().reshape(groups, weight.shape[0] // groups, -1)
    y = torch.cat([part @ w[g].T for g, part in enumerate(X.chunk(groups, dim=-1))], dim=-1)
    if bias is not None:
        y = y + bias.double()
    pairs = _padding_pairs(padding, x.dim() - 2)
    out = _output_size(tuple(s + sum(p) for s, p in zip(x.shape[2:], pairs, strict=True)), **window)
    return y.transpose(1, 2).reshape(x.shape[0], weight.shape[0], *out)


class _Published:
    """Running values of the published layers: plain averages of mu and of D itself, started at 0 and I."""

    def __init__(self, mu: Tensor, D: Tensor, *, eps: float, num_iters: int, momentum: float) -> None:
        self.running_mean, self.running_deconv = mu, D
        self.eps, self.num_iters, self.momentum = eps, num_iters, momentum

    def _remember(self, mu: Tensor, D: Tensor) -> None:
        keep = 1.0 - self.momentum
        self.running_mean = keep * self.running_mean + self.momentum * mu.detach()
        self.running_deconv = keep * self.running_deconv + self.momentum * D.detach()


class PublishedConv(_Published):
    """The authors' convolution on given parameters, in one to three dimensions (theirs: two, square kernels).

    A training call computes mu and D from its batch, uses them, lets the gradient through them, and averages
    them into ``running_mean`` (n,) and ``running_deconv`` (n, n), or (C*K,) and (groups, n, n) if groups > 1.
    An evaluation call uses the averages. Before any training they are 0 and I: a plain convolution.

    Source: ``FastDeconv`` in github.com/yechengxi/deconvolution at d221c22, without its option to freeze.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        *,
        block_size: int,
        eps: float,
        num_iters: int,
        momentum: float,
        sampling_stride: int,
        stride: Ints = 1,
        padding: Padding = 0,
        dilation: Ints = 1,
        groups: int = 1,
    ) -> None:
        self.weight, self.bias, self.groups = weight, bias, groups
        self.channels, self.kernel_size = weight.shape[1] * groups, tuple(weight.shape[2:])
        self.window: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation}
        self.sampling_stride = sampling_stride
        self.block_size = published_block_size(block_size, self.channels, groups=groups)
        n = self.block_size * math.prod(self.kernel_size)
        D = torch.eye(n, dtype=torch.float64)
        if groups > 1:
            D = D.repeat(groups, 1, 1)
        mu = torch.zeros(n * groups, dtype=torch.float64)
        super().__init__(mu, D, eps=eps, num_iters=num_iters, momentum=momentum)

    def __call__(self, x: Tensor, *, training: bool) -> Tensor:
        mu, D, groups = self.running_mean, self.running_deconv, self.groups
        if training:
            X = sample_rows_corner(x, kernel_size=self.kernel_size, sampling_stride=self.sampling_stride, **self.window)
            mu, Cov = moments_interleaved(X, channels=self.channels, block_size=self.block_size, groups=groups)
            D = newton_schulz(add_eps(Cov, self.eps), self.num_iters)
            self._remember(mu, D)
        return deconvolve(x, self.weight, self.bias, mu, D, grouping="interleaved", groups=groups, **self.window)


class PublishedLinear(_Published):
    """The authors' linear layer on given parameters; x (..., in_features), running values (B,) and (B, B).

    Neighbouring features form a block of B = gcd(block_size, in_features), or all of them do if block_size is
    larger; all blocks of all rows are pooled into one mean and one covariance. No row is left out.

    Source: ``Delinear`` in github.com/yechengxi/deconvolution at d221c22.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        *,
        block_size: int,
        eps: float,
        num_iters: int,
        momentum: float,
    ) -> None:
        self.weight, self.bias = weight, bias
        self.block_size = published_block_size(block_size, weight.shape[1])
        mu = torch.zeros(self.block_size, dtype=torch.float64)
        D = torch.eye(self.block_size, dtype=torch.float64)
        super().__init__(mu, D, eps=eps, num_iters=num_iters, momentum=momentum)

    def __call__(self, x: Tensor, *, training: bool) -> Tensor:
        X = x.double().reshape(-1, self.block_size)
        mu, D = self.running_mean, self.running_deconv
        if training:
            mu = X.mean(0)
            D = newton_schulz(add_eps(covariance(X, mu), self.eps), self.num_iters)
            self._remember(mu, D)
        y = ((X - mu) @ D).reshape(x.shape) @ self.weight.double().T
        return y if self.bias is None else y + self.bias.double()
