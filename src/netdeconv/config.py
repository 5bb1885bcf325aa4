"""Every setting of the whitening, its default, and what values it may take."""

from __future__ import annotations

import dataclasses
import difflib
import math
import numbers
from typing import Any

from netdeconv.errors import ConfigError
from netdeconv.functional.isqrt import SOLVERS, chosen_solver

__all__ = ["GROUPINGS", "SAMPLINGS", "WhiteningConfig"]

GROUPINGS = ("contiguous", "interleaved")
SAMPLINGS = ("tiles", "spread", "corner")

_LINEAR_BLOCK = 512
_DEPTHWISE_SAMPLES = 1024


@dataclasses.dataclass(frozen=True, kw_only=True)
class WhiteningConfig:
    """Settings of one whitening; the same object may serve every layer of a network.

    Args:
        block_size: channels whitened together; published are 64. A layer with more channels is cut into blocks that
            share one root; when the block size does not divide the channels the last block is smaller and has its own.
            ``None`` is 32, and 16 for kernels of several taps over 512 channels or more, where most of what whitening
            costs is to fold the root into the weights.
        grouping: ``"contiguous"`` blocks of neighbouring channels, each centred by its own mean; or
            ``"interleaved"``, the published procedure, which deals the flattened (channel, tap) index out to
            the blocks in turn, pools mean and covariance over them, and takes the greatest common divisor
            when the block size does not divide the channels.
        eps: added to the diagonal of the covariance, in squared units of the layer's input.
        num_iters: Newton-Schulz steps. 5, the published number, caps the gain at 1.5**5 = 7.6 and so does not
            whiten fully; 15 comes close. The solver ``"eigh"`` is exact and does not look at it.
        solver: how the inverse square root is computed, see :func:`netdeconv.functional.inverse_sqrt`.
        momentum: share of the running values that one training step replaces, as in batch normalisation. A root
            after k steps counts as ``(k + 1) / 2`` of them. ``None`` averages all steps equally, a root for all k.
        sampling: ``"tiles"`` looks at patches of a grid that starts in the top left corner, with the default
            distance 3x3 kernels tile the map with them; ``"spread"`` at patches spread evenly over the map. Both
            look at all of them when they fit ``max_samples``, otherwise at others on every refresh, and are the
            same for 1x1 kernels and linear layers. ``"corner"``, the published procedure, looks at the whole grid
            and takes the mean from it, too (for 1x1 kernels: from every k-th row of the batch).
        sampling_stride: distance of sampled patches along every dimension, in output positions.
        max_samples: most patches looked at in one refresh; ``None`` for no limit. Not with ``"corner"``.
        update_every: training steps between two computations of the root; the mean is taken at every step. The
            first 16 steps compute it every time, then the distance doubles until it has reached this number.
        differentiable: let the gradient flow through mean and root where they are computed, as published.
        debias: running values are weighted averages of what was seen, right from the first refresh, the gains of a
            root averaged as variances. Without it they are plain averages that start at zero mean and identity root,
            as published.
        sync: in distributed training, gather the statistics over all processes of ``process_group``.

    Raises:
        ConfigError: a value out of range or unknown.

    Source: Ye et al., Network Deconvolution, ICLR 2020, arXiv 1905.11926.
    """

    block_size: int | None = None
    grouping: str = "contiguous"
    eps: float = 1e-5
    num_iters: int = 5
    solver: str = "auto"
    momentum: float | None = 0.1
    sampling: str = "tiles"
    sampling_stride: int = 3
    max_samples: int | None = 4096
    update_every: int = 16
    differentiable: bool = False
    debias: bool = True
    sync: bool = True

    def __post_init__(self) -> None:
        for name in ("num_iters", "sampling_stride", "update_every"):
            self._require_whole(name, getattr(self, name))
        for name in ("block_size", "max_samples"):
            if getattr(self, name) is not None:
                self._require_whole(name, getattr(self, name))
        if not (_is_number(self.eps) and 0 <= self.eps < math.inf):
            raise ConfigError(
                f"WhiteningConfig: expected eps >= 0 and finite, got {self.eps!r}. "
                "It is added to the covariance's diagonal; the usual value is 1e-5."
            )
        if self.momentum is not None and not (_is_number(self.momentum) and 0 <= self.momentum <= 1):
            raise ConfigError(
                f"WhiteningConfig: expected momentum between 0 and 1 or None, got {self.momentum!r}. "
                "As in batch normalisation it is the share of the new value; the usual value is 0.1."
            )
        for name, known in (("grouping", GROUPINGS), ("sampling", SAMPLINGS), ("solver", SOLVERS)):
            _require_known(name, getattr(self, name), known)
        for name in ("differentiable", "debias", "sync"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(
                    f"WhiteningConfig: expected {name} True or False, got {getattr(self, name)!r}. Pass a bool."
                )
        try:
            chosen_solver(self.solver, self.num_iters)
        except ValueError as error:
            raise ConfigError(str(error).replace("inverse_sqrt", "WhiteningConfig", 1)) from None
        if self.sampling == "corner" and self.max_samples is not None:
            raise ConfigError(
                f"WhiteningConfig: max_samples={self.max_samples} cannot apply to sampling='corner', which has a "
                "fixed grid. Pass max_samples=None, or sampling='tiles'."
            )

    @classmethod
    def paper(cls, **overrides: Any) -> WhiteningConfig:
        """The published procedure to the letter: statistics of every batch, gradient through them.

        Any setting may be overridden by keyword, e.g. ``WhiteningConfig.paper(num_iters=15)``.
        """
        published: dict[str, Any] = {
            "block_size": 64,
            "grouping": "interleaved",
            "solver": "newton_schulz",
            "sampling": "corner",
            "max_samples": None,
            "update_every": 1,
            "differentiable": True,
            "debias": False,
            "sync": False,
        }
        return cls(**{**published, **overrides})

    def replace(self, **changes: Any) -> WhiteningConfig:
        """A copy with some settings changed, checked like a new one."""
        return dataclasses.replace(self, **changes)

    def for_linear(self) -> WhiteningConfig:
        """These settings as linear layers get them: blocks of 512, and every step's own root, with its gradient.

        That is the published procedure. A batch gives a linear layer few rows, often fewer than features, so that
        one batch's root says little about the next one's; kept roots cost accuracy there and save little time.
        """
        return self.replace(block_size=_LINEAR_BLOCK, update_every=1, differentiable=True)

    def for_depthwise(self) -> WhiteningConfig:
        """These settings as depthwise convolutions get them: every step's own root, from at most 1,024 patches.

        A depthwise convolution whitens every channel for itself, so that the gain of a channel is bounded by nothing
        but its own deviation, and a kept root multiplies a channel that has grown since. Its roots are as small as the
        kernel, so that few patches are enough; ``max_samples=None`` stays.
        """
        most = self.max_samples if self.max_samples is None else min(self.max_samples, _DEPTHWISE_SAMPLES)
        return self.replace(update_every=1, max_samples=most)

    @staticmethod
    def _require_whole(name: str, value: Any) -> None:
        if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
            raise ConfigError(
                f"WhiteningConfig: expected {name} a whole number >= 1, got {value!r}. "
                f"The default is {WhiteningConfig.__dataclass_fields__[name].default}."
            )


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _require_known(name: str, value: Any, known: tuple[str, ...]) -> None:
    if value in known:
        return
    near = difflib.get_close_matches(str(value), known, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else " Choose one of them."
    raise ConfigError(f"WhiteningConfig: expected {name} one of {', '.join(map(repr, known))}, got {value!r}.{hint}")
