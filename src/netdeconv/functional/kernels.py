"""What a GPU does of a whitened convolution's step in single launches, where operators would take dozens.

Needs Triton, which torch brings along where it can be had; imported on first use, see
:func:`netdeconv.functional.on_gpu.kernels_for`. Every function computes what the operators of
:mod:`netdeconv.functional.scale`, :mod:`~netdeconv.functional.fold` and :mod:`~netdeconv.functional.step` compute, in
float32, without gradient. Tensors of features are ordered ``channel * taps + tap``.
"""

# mypy: disallow-untyped-defs=False, disallow-untyped-decorators=False, disallow-incomplete-defs=False
from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from netdeconv.functional.scale import LEAST_SHARE, some_images, tolerance

__all__ = ["Buffers", "Look", "add_gradient_of_scale", "folded", "gradient_of_product", "look", "try_out"]

_TILE = 4096  # numbers that a program holds at once
_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
_PARTIAL = 2**14  # partial sums of a layer, which one program adds up


class Buffers(NamedTuple):
    """What a step changes in place: the running mean and variance, and two 0-dim counters.

    ``num_updates`` is only looked at: where it is 0, the new values replace the running ones.
    """

    running_mean: Tensor
    running_var: Tensor
    num_steps: Tensor
    num_skipped: Tensor
    num_updates: Tensor


class Look(NamedTuple):
    """What :func:`look` makes of a batch: scale, what its slope needs (:class:`~netdeconv.functional.Slope`), the
    variance that the scale is of, and whether the batch counts (0-dim)."""

    scale: Tensor
    mean: Tensor
    own: Tensor
    common: Tensor
    var: Tensor
    counts: Tensor


def look(
    x: Tensor,
    mean: Tensor,
    buffers: Buffers,
    *,
    share: float,
    share_of_first: bool,
    max_rows: int | None,
    eps: float,
    several: bool,
    remember: bool,
) -> Look:
    """Variance and scale of every channel; on request, the running values and counters are brought up to date.

    A batch that is not finite, varies nowhere, or is one of several that is not, counts for nothing: scale and mean are
    the running ones then, and the slope is zero.

    Shapes: x ``(N, C, *spatial)``, contiguous or channels last; mean ``(C * taps,)``, replaced in place by the running
    one where the batch does not count.

    Args:
        share: of the new values in the running ones.
        share_of_first: this share holds for the first step as well.
        max_rows: as :func:`netdeconv.functional.channel_variance` takes it.
        eps: the smallest variance that a channel is divided by.
        several: whether there is more than one row.
        remember: whether the buffers are changed.
    """
    some = some_images(x, max_rows)
    channels, taps = x.shape[1], len(mean) // x.shape[1]
    geometry = _geometry(some)
    rows = geometry.images * geometry.positions
    block_c = min(64, _power(channels)) if geometry.channels_last else min(4, _power(channels))
    block_r = max(16, _TILE // block_c) if geometry.channels_last else 512
    chunks = _pieces(channels, block_c)
    parts = _power(max(1, min(64, _pieces(rows, block_r), _PARTIAL // channels, _pieces(512, chunks))) + 1) // 2
    partial = torch.empty(parts, 2, channels, dtype=torch.float32, device=x.device)
    each = _pieces(_pieces(rows, parts), block_r) * block_r
    _sums[(chunks, parts)](
        some, mean, partial, rows, geometry.positions, channels, *geometry.strides, taps, taps // 2, each,
        BLOCK_R=block_r, BLOCK_C=block_c,
    )  # fmt: skip
    found = torch.empty(5, channels, dtype=torch.float32, device=x.device)
    counts = torch.empty((), dtype=torch.bool, device=x.device)
    numbers = torch.finfo(torch.float32)
    most = min(torch.finfo(buffers.running_var.dtype).max, numbers.max)
    _judge[(1,)](
        partial, mean, *buffers, found, counts, channels, taps, rows, share, eps, max(eps, numbers.tiny), most,
        tolerance(partial), LEAST_SHARE, several, share_of_first, remember,
        PARTS=parts, BLOCK=_power(channels), CHUNK=_TILE, num_warps=8,
    )  # fmt: skip
    scale, about, own, common, var = found.unbind()
    return Look(scale, about, own, common, var, counts)


def folded(
    product: Tensor, scale: Tensor, mean: Tensor, bias: Tensor | None, like: Tensor, dtype: torch.dtype, last: bool
) -> tuple[Tensor, Tensor]:
    """``(S D w, b - mean S D w)`` of ``D w``.

    Shapes: product ``(groups, out / groups, features of a group)``, float32 and contiguous; the results have those of
    ``like``, the weight, with the channels ``last`` or not, and ``(out,)``, in this dtype.
    """
    groups, out, features = product.shape
    where = _LAST[like.dim()] if last else torch.contiguous_format
    weight = torch.empty_like(like, dtype=dtype, memory_format=where)
    shifted = torch.empty(len(like), dtype=dtype, device=like.device)
    taps = features // like.shape[1]
    _fold[(groups * out,)](
        product, scale, mean, product if bias is None else bias, weight, shifted, features, taps, out,
        *_of_weight(weight), HAS_BIAS=bias is not None, BLOCK=min(1024, _power(features)),
    )  # fmt: skip
    return weight, shifted


def gradient_of_product(
    grad_weight: Tensor, grad_shifted: Tensor, product: Tensor, scale: Tensor, mean: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradient of ``D w``, and of every feature, ``(groups * features,)``, that by the logarithm of its factor.

    Shapes: grad_weight as the weight, contiguous or channels last, grad_shifted ``(out,)``, product as :func:`folded`
    takes it -> that of product.
    """
    groups, out, features = product.shape
    total = torch.empty_like(product)
    along = torch.empty(groups * features, dtype=torch.float32, device=product.device)
    block_f = min(32, _power(features))
    _unfold[(_pieces(features, block_f), groups)](
        grad_weight, grad_shifted, product, scale, mean, total, along, features, features // grad_weight.shape[1], out,
        *_of_weight(grad_weight), BLOCK_O=min(64, _power(out)), BLOCK_F=block_f,
    )  # fmt: skip
    return total, along


def add_gradient_of_scale(grad_x: Tensor, x: Tensor, along: Tensor, found: Sequence[Tensor], max_rows: int) -> None:
    """Add to the gradient of x, in place, that through the variances; both as :func:`look` takes x.

    Shapes: along as :func:`gradient_of_product` gives it; found are the first four of :class:`Look`.
    """
    channels = x.shape[1]
    lines = torch.empty(2, channels, dtype=torch.float32, device=x.device)  # factor and summand of every channel
    _slope[(1,)](along, *found, lines, channels, len(along) // channels, BLOCK=_power(channels))
    some, part = some_images(x, max_rows), some_images(grad_x, max_rows)
    from_x, to = _geometry(some), _geometry(part)
    block_c = min(128, _power(channels)) if to.channels_last else 1
    block_r = max(1, 2048 // block_c)
    rows = to.images * to.positions
    _along[(_pieces(rows, block_r), _pieces(channels, block_c))](
        part, some, lines, rows, to.positions, channels, *to.strides, *from_x.strides, BLOCK_R=block_r, BLOCK_C=block_c
    )


def try_out(device: torch.device) -> None:
    """Launch something.

    Raises:
        Exception: of whatever kind, as Triton cannot.
    """
    ones = torch.ones(1, dtype=torch.float32, device=device)
    _slope[(1,)](ones, ones, ones, ones, ones, torch.empty_like(ones).expand(2).clone(), 1, 1, BLOCK=1)


class _Geometry(NamedTuple):
    images: int
    positions: int
    strides: tuple[int, int, int]  # of image, position and channel
    channels_last: bool


def _geometry(x: Tensor) -> _Geometry:
    """How to walk through x, whose positions lie at even distances."""
    positions = math.prod(x.shape[2:])
    strides = x.stride()
    last = x.dim() > 2 and strides[1] == 1 and x.shape[1] > 1
    return _Geometry(x.shape[0], positions, (strides[0], _distance(x), strides[1]), last)


def _of_weight(weight: Tensor) -> tuple[int, int]:
    """Distance of channels and of taps; taps lie at even distances."""
    return weight.stride(1), _distance(weight)


def _distance(x: Tensor) -> int:
    """Of neighbours in space; a dimension of one entry has any stride."""
    along = zip(reversed(x.shape[2:]), reversed(x.stride()[2:]), strict=True)
    return next((stride for length, stride in along if length > 1), 1)


def _pieces(number: int, size: int) -> int:
    """How many pieces of this size it takes; Triton's own function of the name ``cdiv`` takes as long as a launch."""
    return -(-number // size)


def _power(number: int) -> int:
    """The next power of two."""
    return 1 << (number - 1).bit_length()


@triton.jit
def _sums(
    x, about, partial, rows, positions, channels, stride_n, stride_s, stride_c, taps, middle, each,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sums and sums of squares about the mean of the middle tap, of a part of the rows."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < channels
    middles = tl.load(about + c * taps + middle, mask=inside, other=0.0)
    first = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    second = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    start = tl.program_id(1) * each
    for row in range(start, start + each, BLOCK_R):
        r = row + tl.arange(0, BLOCK_R)
        at = (r // positions).to(tl.int64) * stride_n + (r % positions).to(tl.int64) * stride_s
        here = (r < rows)[:, None] & inside[None, :]
        value = tl.load(x + at[:, None] + c[None, :].to(tl.int64) * stride_c, mask=here, other=0.0).to(tl.float32)
        away = tl.where(here, value - middles[None, :], 0.0)
        first += away
        second += away * away
    to = partial + tl.program_id(1) * 2 * channels + c
    tl.store(to, tl.sum(first, 0), mask=inside)
    tl.store(to + channels, tl.sum(second, 0), mask=inside)


@triton.jit
def _judge(
    partial, mean, running_mean, running_var, num_steps, num_skipped, num_updates, found, counts, channels, taps, rows,
    share, eps, smallest, most, tolerance, least_share, several, share_of_first, remember,
    PARTS: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Add up, decide whether the batch counts, and remember it; one program for the layer.

    As :func:`netdeconv.functional.what_varies` and ``scale_and_slope`` do, and :mod:`netdeconv.nn.averages`: a change
    there is one here.
    """
    c = tl.arange(0, BLOCK)
    inside = c < channels
    at = tl.arange(0, PARTS)[:, None] * (2 * channels) + c[None, :]
    both = inside[None, :] & (at >= 0)
    first = tl.sum(tl.load(partial + at, mask=both, other=0.0), 0) / rows
    second = tl.sum(tl.load(partial + at + channels, mask=both, other=0.0), 0) / rows
    middles = tl.load(mean + c * taps + taps // 2, mask=inside, other=0.0)
    own_mean = middles + first
    var = tl.maximum(second - first * first, 0.0)
    var = tl.where(second == second, var, second)  # the maximum of NaN and 0 may be 0
    infinite = float("inf")
    bad = tl.sum(tl.where(inside & ((var < infinite) == 0), 1, 0), 0)
    varying = tl.sum(tl.where(inside & (var > tolerance * own_mean * own_mean), 1, 0), 0)
    features = channels * taps
    for start in range(0, features, CHUNK):
        f = start + tl.arange(0, CHUNK)
        value = tl.load(mean + f, mask=f < features, other=0.0)
        bad += tl.sum(tl.where((tl.abs(value) < infinite) == 0, 1, 0), 0)
    good = (bad == 0) & (varying > 0) & (several != 0)
    weight = tl.where((tl.load(num_updates) > 0) | (share_of_first != 0), share, 1.0)
    running = tl.load(running_var + c, mask=inside, other=0.0).to(tl.float32)
    used = tl.where(inside, tl.where(good, var, running), 0.0)
    least = tl.maximum(least_share * (tl.sum(used, 0) / channels), smallest)
    one = tl.where(good, 1.0 / rows, 0.0)
    own = tl.where(used > least, one, 0.0)
    common = tl.where(least > eps, least_share / channels, 0.0) * (one - own)
    tl.store(found + c, 1.0 / tl.sqrt(tl.maximum(used, least)), mask=inside)
    tl.store(found + channels + c, own_mean, mask=inside)
    tl.store(found + 2 * channels + c, own, mask=inside)
    tl.store(found + 3 * channels + c, common, mask=inside)
    tl.store(found + 4 * channels + c, used, mask=inside)
    tl.store(counts, good)
    for start in range(0, features, CHUNK):
        f = start + tl.arange(0, CHUNK)
        old = tl.load(running_mean + f, mask=f < features, other=0.0).to(tl.float32)
        value = tl.where(good, tl.load(mean + f, mask=f < features, other=0.0), old)
        tl.store(mean + f, value, mask=f < features)
        if remember:
            new_mean = old + weight * (value - old)
            tl.store(running_mean + f, new_mean.to(running_mean.dtype.element_ty), mask=f < features)
    if remember:
        new = tl.where(good, running + weight * (tl.minimum(var, most) - running), running)
        tl.store(running_var + c, new.to(running_var.dtype.element_ty), mask=inside)
        tl.store(num_steps, tl.load(num_steps) + 1)
        tl.store(num_skipped, tl.load(num_skipped) + tl.where(good, 0, 1))


@triton.jit
def _fold(
    product, scale, mean, bias, weight, shifted, features, taps, out, stride_c, stride_t,
    HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row of the weight."""
    o = tl.program_id(0)
    group = o // out
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, features, BLOCK):
        f = start + tl.arange(0, BLOCK)
        inside = f < features
        c = f // taps
        factor = tl.load(scale + group * (features // taps) + c, mask=inside, other=0.0)
        value = tl.load(product + o.to(tl.int64) * features + f, mask=inside, other=0.0) * factor
        to = weight + o.to(tl.int64) * features + c * stride_c + (f % taps) * stride_t
        tl.store(to, value.to(weight.dtype.element_ty), mask=inside)
        total += value * tl.load(mean + group * features + f, mask=inside, other=0.0)
    shift = -tl.sum(total, 0)
    if HAS_BIAS:
        shift += tl.load(bias + o).to(tl.float32)
    tl.store(shifted + o, shift.to(shifted.dtype.element_ty))


@triton.jit
def _unfold(
    grad_weight, grad_shifted, product, scale, mean, total, along, features, taps, out, stride_c, stride_t,
    BLOCK_O: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """Some columns of the weight's gradient."""
    group = tl.program_id(1)
    f = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    inside = f < features
    c = f // taps
    factor = tl.load(scale + group * (features // taps) + c, mask=inside, other=0.0)
    about = tl.load(mean + group * features + f, mask=inside, other=0.0)
    column = c * stride_c + (f % taps) * stride_t
    sums = tl.zeros([BLOCK_F], tl.float32)
    for start in range(0, out, BLOCK_O):
        o = start + tl.arange(0, BLOCK_O)
        row = (group * out + o).to(tl.int64)
        here = (o < out)[:, None] & inside[None, :]
        back = tl.load(grad_weight + row[:, None] * features + column[None, :], mask=here, other=0.0).to(tl.float32)
        shift = tl.load(grad_shifted + row, mask=o < out, other=0.0).to(tl.float32)
        back = back - shift[:, None] * about[None, :]
        at = row[:, None] * features + f[None, :]
        sums += tl.sum(back * tl.load(product + at, mask=here, other=0.0), 0)
        tl.store(total + at, back * factor[None, :], mask=here)
    tl.store(along + group * features + f, sums * factor, mask=inside)


@triton.jit
def _slope(along, scale, mean, own, common, lines, channels, taps, BLOCK: tl.constexpr):
    """What a channel of x is multiplied by, and what is added then, in the gradient through the variances."""
    c = tl.arange(0, BLOCK)
    inside = c < channels
    total = tl.zeros([BLOCK], tl.float32)
    for tap in range(0, taps):
        total += tl.load(along + c * taps + tap, mask=inside, other=0.0)
    factor = tl.load(scale + c, mask=inside, other=0.0)
    total = total * factor * factor
    shared = tl.sum(total * tl.load(common + c, mask=inside, other=0.0), 0)
    slope = total * tl.load(own + c, mask=inside, other=0.0) + shared
    tl.store(lines + c, -slope, mask=inside)
    tl.store(lines + channels + c, slope * tl.load(mean + c, mask=inside), mask=inside)


@triton.jit
def _along(
    grad_x, x, lines, rows, positions, channels, to_n, to_s, to_c, from_n, from_s, from_c,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """``grad_x += x * lines[0] + lines[1]``."""
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = c < channels
    here = (r < rows)[:, None] & inside[None, :]
    image, position = (r // positions).to(tl.int64), (r % positions).to(tl.int64)
    to = grad_x + (image * to_n + position * to_s)[:, None] + c[None, :].to(tl.int64) * to_c
    at = x + (image * from_n + position * from_s)[:, None] + c[None, :].to(tl.int64) * from_c
    value = tl.load(at, mask=here, other=0.0)
    slope = tl.load(lines + c, mask=inside, other=0.0)
    offset = tl.load(lines + channels + c, mask=inside, other=0.0)
    added = tl.load(to, mask=here, other=0.0).to(tl.float32) + value.to(tl.float32) * slope[None, :] + offset[None, :]
    tl.store(to, added.to(grad_x.dtype.element_ty), mask=here)


