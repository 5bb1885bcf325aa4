"""Whitening matrices as filters: one small image per pixel and channel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from netdeconv.config import KINDS, WhiteningConfig
from netdeconv.errors import ShapeError
from netdeconv.functional import inverse_sqrt
from netdeconv.inspect.whiteness import Pair, patch_covariance

__all__ = ["centre_filters", "root_filters", "whitening_filters"]


def whitening_filters(
    images: Tensor | Sequence[Tensor],
    kernel_size: Pair,
    *,
    stride: Pair = 1,
    solver: str = WhiteningConfig.solver,
    num_iters: int | None = None,
    eps: float = WhiteningConfig.eps,
) -> Tensor:
    """Filters that whiten the patches of images: the rows of ``root = (cov + eps I)^(-1/2)``.

    Filter i applied to a centred patch gives the whitened value of feature ``i = c*K + tap``, that is of
    channel c at that tap of the kernel. On natural images the filters are centre-surround: a peak at their
    own pixel, the opposite sign around it. On white noise each is a single peak.

    Args:
        images: ``(N, C, H, W)``, or a sequence of images ``(C, H, W)`` that may differ in size.
        kernel_size: height and width of a patch.
        stride: distance of the patches; 1 takes all of them.
        solver: ``"eigh"`` for the converged root, ``"newton_schulz"`` for the root as the layers compute it.
        num_iters: Newton-Schulz steps, ``None`` for those of a convolution by default; the solver ``"eigh"`` is exact
            and ignores it.
        eps: added to the covariance's diagonal, in squared units of the images' values.

    Returns:
        ``(C*K, C, kh, kw)`` in float64.

    Raises:
        ShapeError: not a batch of images, or images smaller than the kernel.

    Source: Ye et al., Network Deconvolution, ICLR 2020, section 3.
    """
    cov = patch_covariance(images, kernel_size, stride=stride)
    return root_filters(cov, kernel_size, solver=solver, num_iters=num_iters, eps=eps)


def root_filters(
    cov: Tensor,
    kernel_size: Pair,
    *,
    solver: str = WhiteningConfig.solver,
    num_iters: int | None = None,
    eps: float = WhiteningConfig.eps,
) -> Tensor:
    """:func:`whitening_filters` of a covariance, for several roots of the same one.

    Shapes: ``(C*K, C*K)`` from :func:`patch_covariance` -> ``(C*K, C, kh, kw)``.
    """
    cov = cov + eps * torch.eye(len(cov), dtype=cov.dtype, device=cov.device)
    num_iters = KINDS["dense"]["num_iters"] if num_iters is None else num_iters
    root = inverse_sqrt(cov, num_iters=num_iters, solver=solver)
    height, width = (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
    return root.reshape(len(cov), -1, height, width)


def centre_filters(filters: Tensor) -> Tensor:
    """The filters of the kernel's centre pixel, one per channel.

    Args:
        filters: ``(C*K, C, kh, kw)`` from :func:`whitening_filters`, kernel sides odd.

    Returns:
        ``(C, C, kh, kw)``: filter c whitens channel c of the centre pixel.
    """
    features, channels, height, width = filters.shape
    if features != channels * height * width or height % 2 == 0 or width % 2 == 0:
        raise ShapeError(
            "centre_filters: expected (C*K, C, kh, kw) with K = kh*kw and odd sides, got "
            f"{tuple(filters.shape)}. An even kernel has no centre pixel; use an odd kernel_size."
        )
    taps = height * width
    return filters[taps // 2 :: taps]
