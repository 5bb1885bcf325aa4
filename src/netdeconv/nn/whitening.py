"""The whitening of one layer's input: its statistics, when they are refreshed, and what is remembered."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from netdeconv.config import WhiteningConfig
from netdeconv.errors import NonFiniteWarning, StatisticsError
from netdeconv.functional import (
    Blocks,
    Moments,
    Window,
    corner_patches,
    inverse_sqrt,
    patch_moments,
    spread_patches,
)
from netdeconv.nn.schedule import Clock
from netdeconv.nn.sync import distributed, joined_moments

__all__ = ["Whitening"]


class Whitening(nn.Module):
    """Mean and inverse root of the covariance of the patches that a layer looks at.

    ``forward(x)`` returns the pair that the layer folds into its weights:

    - training, refresh step: computed from x, and blended into the remembered values;
    - training, other steps, and when ``frozen``: the remembered values;
    - evaluation: the remembered values.

    The remembered values change only on refresh steps. They are averages over training steps: a refresh after
    k steps has the weight ``1 - (1 - momentum)**k``, and with ``debias`` the weights are divided by their sum,
    as Adam does. A batch with NaN or infinite values changes nothing, and a :class:`NonFiniteWarning` says so:
    at once on a CPU, otherwise when the module next changes between training and evaluation.

    Args:
        channels: channels of the layer's input.
        window: what the layer looks at; an empty ``Window()`` for a linear layer.
        groups: convolution groups.
        config: all settings, ``None`` for the defaults.
        label: what error messages call this place.

    Attributes:
        frozen: no refresh while true, see :func:`netdeconv.freeze`.
        process_group: processes to gather statistics from when ``config.sync``; ``None`` for all.

    Buffers: ``running_mean``, ``running_root`` (and ``running_root_rest`` for a smaller last block),
    ``num_updates`` (refreshes so far), ``num_steps`` (training forwards so far), ``last_update`` (num_steps at
    the last refresh), ``num_skipped`` (refreshes left out because of values that are not finite).
    """

    running_mean: Tensor
    running_root: Tensor
    num_updates: Tensor
    num_steps: Tensor
    last_update: Tensor
    num_skipped: Tensor
    _pulse: Tensor

    def __init__(
        self,
        channels: int,
        window: Window,
        groups: int = 1,
        config: WhiteningConfig | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        label: str = "Whitening",
    ) -> None:
        super().__init__()
        self.label = label
        self.config = WhiteningConfig() if config is None else config
        self.window = window
        self.blocks = Blocks.plan(channels, window, groups, self.config.block_size, self.config.grouping)
        self.frozen = False
        self.process_group: Any = None
        self.register_buffer("running_mean", torch.zeros(self.blocks.mean_shape, device=device, dtype=dtype))
        for name, shape in zip(self._root_names, self.blocks.root_shapes, strict=True):
            self.register_buffer(name, torch.empty(shape, device=device, dtype=dtype))
        for name in ("num_updates", "num_steps", "last_update", "num_skipped"):
            self.register_buffer(name, torch.zeros((), dtype=torch.int64, device=device))
        self.register_buffer("_pulse", torch.zeros((), dtype=torch.int64, device=device), persistent=False)
        self.clock = Clock(self.config.update_every)
        self._ready = False
        self._skipped = 0
        self.reset_statistics()

    @property
    def _root_names(self) -> tuple[str, ...]:
        return ("running_root", "running_root_rest")[: len(self.blocks.parts)]

    @property
    def running_roots(self) -> tuple[Tensor, ...]:
        """The remembered root of every part of ``blocks``."""
        return tuple(getattr(self, name) for name in self._root_names)

    def reset_statistics(self) -> None:
        """Forget everything: zero mean, identity root, all counters zero."""
        self.running_mean.zero_()
        for root in self.running_roots:
            root.copy_(torch.eye(root.shape[-1], dtype=root.dtype, device=root.device).expand_as(root))
        for counter in (self.num_updates, self.num_steps, self.last_update, self.num_skipped):
            counter.zero_()
        self.clock.set(0)
        self._ready, self._skipped = False, 0

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The pair to fold. Shapes: x ``(N, C, *spatial)`` -> ``blocks.mean_shape``, ``blocks.root_shapes``.

        Raises:
            StatisticsError: remembered values are needed and there are none.
        """
        if not self.training or self.frozen:
            return self.remembered()
        again = _in_backward()  # activation checkpointing runs the forward a second time
        due = self.clock.was_due if again else self.clock.due
        shared = self.config.sync and distributed(self.process_group)
        pair = self._refresh(x, again) if due and (x.numel() > 0 or shared) else None
        if not again:
            self.num_steps.add_(1)
            self.clock.advance(self._pulse)
        return self.remembered(allow_none=x.numel() == 0) if pair is None else pair

    def remembered(self, allow_none: bool = False) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The running values.

        Where a gradient is recorded they are copies, as the next refresh changes the buffers in place.

        Raises:
            StatisticsError: no statistics have been gathered yet.
        """
        if not (self._ready or allow_none or self._check_ready()):
            raise StatisticsError(
                f"{self.label}: expected whitening statistics from at least one training "
                "step, got none so far. Run some batches in training mode first (model.train()), or load a trained "
                "state dict."
            )
        if torch.is_grad_enabled():
            return self.running_mean.clone(), tuple(root.clone() for root in self.running_roots)
        return self.running_mean, self.running_roots

    def _check_ready(self) -> bool:
        if torch.compiler.is_compiling():
            return False
        self._ready = bool(self.num_updates > 0)
        return self._ready

    def _refresh(self, x: Tensor, again: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Mean and root of this batch; the remembered ones in place of any that are not finite."""
        config = self.config
        with torch.set_grad_enabled(torch.is_grad_enabled() and config.differentiable):
            x = x if config.differentiable else x.detach()
            moments = self._moments(x, self.num_updates - int(again))
            roots = tuple(self._root(cov) for cov in moments.covs)
            finite = torch.stack([value.isfinite().all() for value in (moments.mean, *roots)]).all()
            mean, *roots_ = (
                torch.where(finite, value, running.to(value.dtype))
                for value, running in zip((moments.mean, *roots), (self.running_mean, *self.running_roots), strict=True)
            )
        if not again:
            self._remember(mean.detach(), [root.detach() for root in roots_], finite)
        return mean, tuple(roots_)

    def _moments(self, x: Tensor, turn: Tensor) -> Moments:
        config = self.config
        if config.sampling == "corner":
            patches = corner_patches(x, self.window, sampling_stride=config.sampling_stride)
        else:
            patches = spread_patches(
                x,
                self.window,
                sampling_stride=config.sampling_stride,
                max_samples=config.max_samples,
                turn=turn,
            )
        moments = patch_moments(patches, self.blocks)
        return joined_moments(moments, self.blocks, self.running_mean, self.process_group) if config.sync else moments

    def _root(self, cov: Tensor) -> Tensor:
        eye = torch.eye(cov.shape[-1], dtype=cov.dtype, device=cov.device)
        return inverse_sqrt(cov + self.config.eps * eye, num_iters=self.config.num_iters, solver=self.config.solver)

    @torch.no_grad()
    def _remember(self, mean: Tensor, roots: list[Tensor], finite: Tensor) -> None:
        """Blend a refresh into the running values; where not finite, mean and roots are those already."""
        weight = self._weight()
        for running, new in zip((self.running_mean, *self.running_roots), (mean, *roots), strict=True):
            running.copy_(torch.lerp(running.to(new.dtype), new, weight.to(new.dtype)))
        self.last_update.copy_(torch.where(finite, self.num_steps + 1, self.last_update))
        self.num_updates.add_(finite)
        self.num_skipped.add_(~finite)
        if torch.compiler.is_compiling() or finite.is_cuda:
            self._ready = True  # looked at again when the mode changes
        elif finite:
            self._ready = True
        else:
            self._report_skipped()

    def _weight(self) -> Tensor:
        """Share of the new value in the running ones."""
        momentum, device = self.config.momentum, self.running_mean.device
        if momentum is None:
            return 1 / (self.num_updates + 1).to(torch.float64)
        keep = torch.full((), 1 - momentum, dtype=torch.float64, device=device)
        steps = self.num_steps + 1
        new = 1 - keep ** (steps - self.last_update)
        if not self.config.debias:
            return new
        seen = (1 - keep**steps).clamp(min=torch.finfo(new.dtype).tiny)  # zero only for momentum 0
        return torch.where(self.num_updates > 0, new / seen, torch.ones_like(new))

    def train(self, mode: bool = True) -> Whitening:
        """Switch mode, and bring what Python knows of the counters up to date."""
        super().train(mode)
        self._read_counters()
        return self

    def _read_counters(self) -> None:
        if self.num_steps.is_meta:
            return
        if self.clock.steps != int(self.num_steps):
            self.clock.set(int(self.num_steps))
        self._ready = bool(self.num_updates > 0)
        self._report_skipped()

    def _report_skipped(self) -> None:
        skipped = int(self.num_skipped)
        if skipped > self._skipped:
            warnings.warn(
                f"{self.label}: expected finite input, got NaN or infinite values in "
                f"{skipped - self._skipped} refresh(es). The remembered statistics were left as they were; look for "
                "the batch, a too large learning rate, or an overflow in half precision.",
                NonFiniteWarning,
                stacklevel=2,
            )
        self._skipped = skipped

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._skipped = 0 if self.num_skipped.is_meta else int(self.num_skipped)
        self._read_counters()

    def extra_repr(self) -> str:
        default = WhiteningConfig()
        changed = [f"{name}={value!r}" for name, value in vars(self.config).items() if value != getattr(default, name)]
        kernel = "x".join(map(str, self.window.kernel_size)) or "linear"
        return ", ".join([f"{self.blocks.channels}", kernel, *changed])


def _in_backward() -> bool:
    """Whether the autograd engine is running on this thread."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
