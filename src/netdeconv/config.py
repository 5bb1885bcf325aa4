"""Every setting of the whitening, its default, and what values it may take."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import numbers
from typing import Any, TypeVar

from netdeconv.errors import ConfigError
from netdeconv.functional.blocks import neighbours_together
from netdeconv.functional.isqrt import SOLVERS, chosen_solver

__all__ = ["AVERAGES", "GROUPINGS", "KINDS", "SAMPLINGS", "WhiteningConfig"]

_Settings = TypeVar("_Settings")

AVERAGES = ("covariance", "root")
GROUPINGS = ("contiguous", "interleaved")
SAMPLINGS = ("tiles", "spread", "corner")

# What a setting is where it is None, by the kind of layer. The number of Newton-Schulz steps is how hard is whitened:
# the fewer inputs a layer mixes, the less it takes. See `_STEPS_OF_MANY` for layers of many channels.
_LAYER = {"num_iters": 3, "scale": True, "update_every": 16, "differentiable": False, "average": "covariance"}
KINDS: dict[str, dict[str, Any]] = {
    "dense": _LAYER,
    "1x1": {**_LAYER, "num_iters": 1},
    "grouped": _LAYER,
    "depthwise": {**_LAYER, "num_iters": 1},
    "linear": {"num_iters": 3, "scale": False, "update_every": 1, "differentiable": True, "average": "root"},
    "channels": {**_LAYER, "num_iters": 5},
}

# Kernels that mix channels and positions, of so many channels in a group or more, take a step more.
_STEPS_OF_MANY, _MANY = 4, 64

# Channels of a block. Folding takes 4 operations for every weight and feature of a block; in wide layers, which have
# most of a network's weights, that is most of what whitening costs.
_BLOCK, _BLOCK_OF_POINTS, _BLOCK_OF_WIDE, _WIDE, _LINEAR_BLOCK, _PUBLISHED_BLOCK = 64, 32, 16, 512, 512, 64
_MIXING = ("dense", "grouped")


def _known_settings_only(kind: type[_Settings]) -> type[_Settings]:
    """Let a dataclass name the nearest setting where it gets one that it does not have."""
    made: Any = kind.__init__
    known = list(kind.__dataclass_fields__)  # type: ignore[attr-defined]

    @functools.wraps(made)
    def __init__(self: Any, *args: Any, **settings: Any) -> None:
        for name in settings:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
                hint = f"Did you mean {near[0]!r}?" if near else f"It has {', '.join(known)}."
                raise TypeError(f"{kind.__name__}: there is no setting {name!r}. {hint}")
        made(self, *args, **settings)

    kind.__init__ = __init__  # type: ignore[method-assign]
    return kind


@_known_settings_only
@dataclasses.dataclass(frozen=True, kw_only=True)
class WhiteningConfig:
    """Settings of the whitening; one object may serve every layer of a network.

    A setting that is ``None`` is chosen by the kind of layer, wherever the object is passed: to a layer or to
    :func:`netdeconv.convert`. ``momentum`` and ``max_samples`` have a ``None`` of their own.

    Args:
        block_size: channels whitened together. A layer with more channels is cut into blocks that share one inverse
            square root; when the block size does not divide the channels, the last block is smaller and has its own.
            ``None`` is 512 in linear layers, 32 in 1x1 and depthwise convolutions, 64 in others, and 16 in those whose
            groups have 512 channels or more. It is less where kernels are so large that a block would have more than
            1024 features (channels times taps), or the inverse square roots of all groups more than 2**24 entries, 64
            MiB. With ``grouping="interleaved"`` it is 64 in convolutions, as in the paper. Where the taps
            of one channel exceed these limits, contiguous blocks are pieces of a channel, whole rows of the kernel.
        grouping: ``"contiguous"`` blocks of neighbouring channels, each centred by its own mean; or
            ``"interleaved"``, as in the paper, which assigns the flattened (channel, tap) index to the blocks
            round-robin, pools mean and covariance over them, and takes the greatest common divisor when the block
            size does not divide the channels.
        eps: added to the diagonal of the covariance, in squared units of the layer's input, or of its standard
            deviation with ``scale``, where it is also the smallest variance that a channel is divided by.
        num_iters: Newton-Schulz steps: the strength of the whitening. ``None`` is 3, but 1 in 1x1 and in depthwise
            convolutions, 4 in others whose groups have 64 channels or more, and 5 in
            :class:`netdeconv.ChannelWhitening`. 5, the paper's number, caps the gain at 1.5**5 = 7.6 and does not
            whiten fully; 15 comes close. The solver ``"eigh"`` is exact and ignores it.
        solver: how the inverse square root is computed, see :func:`netdeconv.functional.inverse_sqrt`.
        momentum: weight of a training step in the running statistics, as in batch normalisation, and of a refresh in
            an averaged covariance. An averaged inverse square root counts as ``(k + 1) / 2`` steps if it is k steps
            after the one before, and as k with ``None``, which weights all steps equally.
        sampling: which patches a refresh takes its covariance from. ``"tiles"``: a grid that starts in the top left
            corner, with which 3x3 kernels tile the map at the default distance; ``"spread"``: spread evenly over the
            map. Both take all of them when they fit ``max_samples``, otherwise different ones at every refresh, and
            are the same for 1x1 kernels and linear layers. ``"corner"``, as in the paper, takes the whole grid, and
            the mean from it, too (for 1x1 kernels: from every k-th row of the batch).
        sampling_stride: distance of sampled patches along every dimension, in output positions.
        max_samples: most patches in one refresh; ``None`` for no limit. Not with ``"corner"``.
        scale: divide every channel by its standard deviation in this batch, at every step and with the gradient through
            it, as batch normalisation does; correlations are whitened then. A channel's variance is taken as at least
            a hundredth of the mean over the layer's channels. ``None`` is true except in linear layers.
        update_every: training steps between two refreshes of the inverse square root; mean and scale are computed at
            every step. Each of the first 16 steps is a refresh, then the distance doubles until it reaches this
            number. ``None`` is 16, and 1 in linear layers.
        differentiable: at a refresh, use the inverse square root of this batch alone, with the gradient through it and
            the mean, as in the paper. ``None`` is true in linear layers only.
        average: what is averaged over the refreshes: the ``"covariance"``, whose inverse square root training and
            evaluation share; or the ``"root"``, as in the paper: evaluation uses the average of the inverse square
            roots, training the last one. ``None`` is ``"root"`` in linear layers only.
        debias: divide the running averages by the sum of their weights, as Adam does, and average the gains of inverse
            square roots as variances. Without it, as in the paper, plain averages start at zero mean and identity.
        sync: in distributed training, reduce the statistics over all processes of ``process_group``.

    Raises:
        ConfigError: a value out of range or unknown, or two that exclude one another.
        TypeError: an unknown setting; the nearest one is named.

    Source: Ye et al., Network Deconvolution, ICLR 2020, arXiv 1905.11926; kinds, scale and averages are ours.
    """

    block_size: int | None = None
    grouping: str = "contiguous"
    eps: float = 1e-5
    num_iters: int | None = None
    solver: str = "auto"
    momentum: float | None = 0.1
    sampling: str = "tiles"
    sampling_stride: int = 3
    max_samples: int | None = 4096
    scale: bool | None = None
    update_every: int | None = None
    differentiable: bool | None = None
    average: str | None = None
    debias: bool = True
    sync: bool = True

    def __post_init__(self) -> None:
        for name in ("block_size", "num_iters", "sampling_stride", "max_samples", "update_every"):
            if getattr(self, name) is not None or name == "sampling_stride":
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
        if self.average is not None:
            _require_known("average", self.average, AVERAGES)
        for name in ("debias", "sync"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(
                    f"WhiteningConfig: expected {name} True or False, got {getattr(self, name)!r}. Pass a bool."
                )
        for name in ("scale", "differentiable"):
            if not isinstance(getattr(self, name), bool | None):
                raise ConfigError(
                    f"WhiteningConfig: expected {name} True, False or None, got {getattr(self, name)!r}. Pass a bool."
                )
        self._require_compatible()

    def _require_compatible(self) -> None:
        """Settings that exclude one another."""
        by_kind = {kind["num_iters"] for kind in KINDS.values()}
        for num_iters in by_kind if self.num_iters is None else {self.num_iters}:
            try:
                chosen_solver(self.solver, num_iters)
            except ValueError as error:
                raise ConfigError(str(error).replace("inverse_sqrt", "WhiteningConfig", 1)) from None
        if self.sampling == "corner" and self.max_samples is not None:
            raise ConfigError(
                f"WhiteningConfig: max_samples={self.max_samples} cannot apply to sampling='corner', which has a "
                "fixed grid. Pass max_samples=None, or sampling='tiles'."
            )
        if self.differentiable and self.average == "covariance":
            raise ConfigError(
                "WhiteningConfig: average='covariance' cannot apply with differentiable=True, which takes the root of "
                "one batch. Pass average='root', or differentiable=False."
            )
        if self.scale and self.grouping == "interleaved":
            raise ConfigError(
                "WhiteningConfig: scale=True cannot apply to grouping='interleaved', which pools channels. "
                "Pass scale=False, or grouping='contiguous'."
            )

    @classmethod
    def paper(cls, **overrides: Any) -> WhiteningConfig:
        """The published procedure to the letter: statistics of every batch, gradient through them.

        Any setting may be overridden by keyword, e.g. ``WhiteningConfig.paper(num_iters=15)``. Blocks are of 64
        channels, and of 512 features in linear layers, as for the paper's 32x32 images.
        """
        published: dict[str, Any] = {
            "grouping": "interleaved",
            "num_iters": 5,
            "solver": "newton_schulz",
            "sampling": "corner",
            "max_samples": None,
            "scale": False,
            "update_every": 1,
            "differentiable": True,
            "average": "root",
            "debias": False,
            "sync": False,
        }
        return cls(**{**published, **overrides})

    def replace(self, **changes: Any) -> WhiteningConfig:
        """A copy with some settings changed, checked like a new one."""
        return dataclasses.replace(self, **changes)

    def resolved(self, kind: str, channels: int, taps: int = 1, groups: int = 1) -> WhiteningConfig:
        """The settings of a layer of this kind, none of them left to choose.

        Args:
            kind: ``"dense"``, ``"1x1"``, ``"grouped"``, ``"depthwise"``, ``"linear"`` or ``"channels"``.
            channels: input channels of a convolution group.
            taps: positions of the kernel.
            groups: convolution groups.
        """
        by_kind = {**KINDS[kind], "block_size": self._block_size(kind, channels, taps, groups)}
        if kind in _MIXING and channels >= _MANY:
            by_kind["num_iters"] = _STEPS_OF_MANY
        if self.differentiable:
            by_kind["average"] = "root"
        if self.average == "covariance":
            by_kind["differentiable"] = False
        if self.grouping == "interleaved":
            by_kind["scale"] = False
        return self.replace(**{name: value for name, value in by_kind.items() if getattr(self, name) is None})

    def _block_size(self, kind: str, channels: int, taps: int, groups: int) -> int:
        if kind == "linear":
            return _LINEAR_BLOCK
        if self.grouping == "interleaved":
            return _PUBLISHED_BLOCK
        wanted = _BLOCK_OF_POINTS if kind not in _MIXING else _BLOCK_OF_WIDE if channels >= _WIDE else _BLOCK
        fitting = neighbours_together(channels, wanted, taps, groups)
        return wanted if fitting == min(wanted, channels) else fitting

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
