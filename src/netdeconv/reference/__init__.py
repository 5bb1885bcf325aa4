"""Network deconvolution as in the paper, and as this library does it by default: slow, plain, float64.

The fast code is tested against these files. They use none of it, and are easier to read.

Symbols (Ye et al., ICLR 2020, arXiv 1905.11926; section 3 and algorithm 1); V, S and R are ours:

========  =================================================================================================
``X``     patches, one per row: (rows, C*K), K the number of taps; feature ``i = channel * K + tap``
``mu``    mean of the rows of X
``Cov``   ``(X - mu)^T (X - mu) / rows``; ``eps`` is added on its diagonal
``D``     ``(Cov + eps I)^(-1/2)``, or what a few Newton-Schulz steps make of it
``w, b``  weight and bias: ``y = (X - mu) D w + b``
``V``     variance of every channel over images and positions
``S``     diagonal, ``max(V, mean(V) / 100, eps)^(-1/2)`` for all taps of a channel: ``y = (X - mu) S D w + b``
``R``     average of the Cov of ``X S`` over the refreshes, in place of Cov
========  =================================================================================================

The C*K features are first split into blocks that share D. How, is the ``grouping``:

* ``"interleaved"``, the published one: block size B = gcd(B, C) if B does not divide C; feature i belongs to
  block ``i mod (C/B)``; mean and covariance are pooled over the blocks. With groups: one block per group.
* ``"contiguous"``: neighbouring channels; every feature is centred by its own mean, the covariance pooled
  over the full blocks. If B does not divide the channels (of a group), the last block is smaller and has a D
  of its own. Where even a channel is too much, blocks are pieces of a channel's taps, the last one of every channel
  the smaller.

Every function of tensors computes in float64, whatever it is given, and is differentiable by autograd.
"""

from netdeconv.reference.default import (
    DefaultChannels,
    DefaultConv,
    DefaultLinear,
    average_of_roots,
    refreshes,
    scale_of,
    weighted_average,
)
from netdeconv.reference.paper import (
    ContiguousMoments,
    PublishedConv,
    PublishedLinear,
    add_eps,
    covariance,
    deal,
    deconvolve,
    exact_inverse_sqrt,
    im2col,
    moments_contiguous,
    moments_interleaved,
    newton_schulz,
    ns_gain,
    pad,
    published_block_size,
    sample_rows_corner,
    whiten_patches,
)

__all__ = [
    "ContiguousMoments",
    "DefaultChannels",
    "DefaultConv",
    "DefaultLinear",
    "PublishedConv",
    "PublishedLinear",
    "add_eps",
    "average_of_roots",
    "covariance",
    "deal",
    "deconvolve",
    "exact_inverse_sqrt",
    "im2col",
    "moments_contiguous",
    "moments_interleaved",
    "newton_schulz",
    "ns_gain",
    "pad",
    "published_block_size",
    "refreshes",
    "sample_rows_corner",
    "scale_of",
    "weighted_average",
    "whiten_patches",
]
