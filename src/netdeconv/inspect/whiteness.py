"""How correlated the patches of an image are, before and after whitening."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from netdeconv.errors import ShapeError
from netdeconv.functional.precision import exact

__all__ = ["correlation", "mean_abs_offdiagonal", "pair_correlations", "patch_correlation", "patch_covariance"]

# Values unfolded at one time: 2**24 float64 numbers are 128 MiB.
_CHUNK = 2**24

# A feature whose variance is below this share of the largest one is constant up to float64 rounding.
_CONSTANT = 1e-14

Pair = int | tuple[int, int]


def patch_covariance(
    x: Tensor | Sequence[Tensor], kernel_size: Pair, *, stride: Pair = 1, padding: Pair = 0, dilation: Pair = 1
) -> Tensor:
    """Covariance of the patches of a 2-D convolution, over every patch of every image.

    Args:
        x: images ``(N, C, H, W)``, or a sequence of images ``(C, H, W)`` that may differ in size.
        kernel_size, stride, padding, dilation: as in :class:`torch.nn.Conv2d`; padding is with zeros.

    Returns:
        ``(C*K, C*K)`` in float64, K the number of taps of the kernel; feature ``i = c*K + tap``. Biased, as in
        the paper: divided by the number of patches.

    Raises:
        ShapeError: x is not a batch of images, or smaller than the kernel.
    """
    kernel, step, pad, spread = (_pair(v) for v in (kernel_size, stride, padding, dilation))
    total, count, moment = None, 0, None
    shift = None
    for batch in _batches(x):
        if shift is None:  # any constant will do; the channel means of the first batch keep the sums small
            shift = exact(batch).mean(dim=(0, 2, 3))
        elif shift.numel() != batch.shape[1]:
            raise ShapeError(
                f"patch_covariance: expected images with {shift.numel()} channels like the first, got "
                f"{batch.shape[1]}. Convert them to the same number of channels."
            )
        for rows in _patches(batch, kernel, step, pad, spread):
            rows = rows - shift.repeat_interleave(kernel[0] * kernel[1])
            total = rows.sum(0) if total is None else total + rows.sum(0)
            moment = rows.mT @ rows if moment is None else moment + rows.mT @ rows
            count += rows.shape[0]
    if total is None or moment is None:
        raise ShapeError("patch_covariance: expected at least one image, got none.")
    mean = total / count
    return moment / count - torch.outer(mean, mean)


def patch_correlation(
    x: Tensor | Sequence[Tensor],
    kernel_size: Pair,
    *,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    root: Tensor | None = None,
) -> Tensor:
    """Correlation matrix of the patches of a 2-D convolution, or of the whitened patches.

    Args:
        x, kernel_size, stride, padding, dilation: as in :func:`patch_covariance`.
        root: ``(n, n)`` with n a divisor of ``C*K``: the patches are multiplied by it before they are
            correlated, block after block of n contiguous features.

    Returns:
        ``(C*K, C*K)`` in float64: ``cov / (sd sd^T)``. A constant feature is uncorrelated with all: its row is 0, its
        diagonal 1.

    Raises:
        ShapeError: x is not a batch of images, or the root does not divide the features evenly.
    """
    cov = patch_covariance(x, kernel_size, stride=stride, padding=padding, dilation=dilation)
    if root is not None:
        whole = _spread_root(root, len(cov)).to(cov)
        cov = whole.mT @ cov @ whole
    return correlation(cov)


def correlation(cov: Tensor) -> Tensor:
    """Correlation matrix of a covariance: ``cov / (sd sd^T)``.

    Shapes: ``(n, n)`` -> the same. A constant feature is uncorrelated with all: its row is 0, its diagonal 1.
    """
    var = cov.diagonal().clamp_min(0)
    varies = var > _CONSTANT * var.max()
    scale = torch.where(varies, var, torch.ones_like(var)).rsqrt() * varies
    corr = cov * torch.outer(scale, scale)
    return corr.fill_diagonal_(1.0).clamp_(-1, 1)


def mean_abs_offdiagonal(corr: Tensor) -> float:
    """Mean absolute value of a correlation matrix off its diagonal: 0 for uncorrelated features, 1 for equal ones.

    Args:
        corr: ``(n, n)``. With n = 1 there is nothing off the diagonal and the result is 0.
    """
    if corr.dim() != 2 or corr.shape[0] != corr.shape[1]:
        raise ShapeError(f"mean_abs_offdiagonal: expected a square matrix (n, n), got {tuple(corr.shape)}.")
    n = corr.shape[0]
    off = corr.abs().sum() - corr.diagonal().abs().sum()
    return float(off / (n * (n - 1))) if n > 1 else 0.0


def pair_correlations(corr: Tensor, taps: int) -> tuple[float, float]:
    """Mean absolute correlation of neighbouring pixels, and of channels.

    Shapes: ``(channels * taps, channels * taps)``, feature ``i = channel * taps + tap``.

    Returns:
        Of all pairs of two taps of the same channel, and of two channels at the same tap; 0 where there are no pairs.

    Raises:
        ShapeError: not square, or not of whole channels.
    """
    if corr.dim() != 2 or corr.shape[0] != corr.shape[1] or taps < 1 or len(corr) % taps:
        raise ShapeError(
            f"pair_correlations: expected (n, n), n a multiple of {taps} taps, got {tuple(corr.shape)}. Pass the "
            "correlation matrix of whole patches."
        )
    channels = len(corr) // taps
    sizes = corr.abs().reshape(channels, taps, channels, taps)
    within = sizes.diagonal(dim1=0, dim2=2)  # (taps, taps, channels)
    across = sizes.diagonal(dim1=1, dim2=3)  # (channels, channels, taps)
    means = []
    for pairs, size in ((within, taps), (across, channels)):
        off = pairs.sum() - pairs.diagonal(dim1=0, dim2=1).sum()
        means.append(float(off / (pairs.numel() - pairs.numel() / size)) if size > 1 else 0.0)
    return means[0], means[1]


def _batches(x: Tensor | Sequence[Tensor]) -> Iterator[Tensor]:
    if isinstance(x, Tensor):
        if x.dim() != 4:
            raise ShapeError(
                f"expected images of shape (N, C, H, W), got {tuple(x.shape)}. For one image pass x.unsqueeze(0)."
            )
        yield x
        return
    for image in x:
        if image.dim() != 3:
            raise ShapeError(f"expected every image of a list as (C, H, W), got {tuple(image.shape)}.")
        yield image.unsqueeze(0)


def _patches(
    x: Tensor, kernel: tuple[int, int], step: tuple[int, int], pad: tuple[int, int], spread: tuple[int, int]
) -> Iterator[Tensor]:
    """Patches as rows ``(rows, C*K)`` in float64, a bounded number at a time."""
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, spread, strict=True)]
    height, width = (size + 2 * p for size, p in zip(x.shape[2:], pad, strict=True))
    if height < reach[0] or width < reach[1]:
        raise ShapeError(
            f"expected images of at least {reach[0]}x{reach[1]} pixels with padding, the kernel's reach, got "
            f"{height}x{width}. Pass a smaller kernel_size."
        )
    lines, across = (height - reach[0]) // step[0] + 1, (width - reach[1]) // step[1] + 1
    per_line = across * x.shape[1] * kernel[0] * kernel[1]
    images = max(1, _CHUNK // (per_line * lines))
    span = max(1, min(lines, _CHUNK // per_line))
    for part in x.split(images):
        padded = F.pad(exact(part), (pad[1], pad[1], pad[0], pad[0]))
        for top in range(0, lines, span):
            last = min(top + span, lines) - 1
            strip = padded[:, :, top * step[0] : last * step[0] + reach[0]]
            columns = F.unfold(strip, kernel, dilation=spread, stride=step)
            yield columns.transpose(1, 2).reshape(-1, columns.shape[1])


def _spread_root(root: Tensor, features: int) -> Tensor:
    if root.dim() != 2 or root.shape[0] != root.shape[1] or features % root.shape[0]:
        raise ShapeError(
            f"patch_correlation: expected a square root whose size divides the {features} features of a patch, "
            f"got {tuple(root.shape)}. Pass the root of patches of the same kernel size and channels."
        )
    return torch.kron(torch.eye(features // root.shape[0], dtype=root.dtype, device=root.device), root)


def _pair(value: Pair) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else value
