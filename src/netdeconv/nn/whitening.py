"""The whitening of one layer's input: its statistics, when they are refreshed, and what is remembered."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from netdeconv.config import WhiteningConfig
from netdeconv.errors import NonFiniteWarning, StatisticsError
from netdeconv.functional import (
    Blocks,
    Moments,
    Sample,
    Window,
    corner_patches,
    inverse_sqrt,
    inverse_sqrt_of_rows,
    mean_patch,
    patch_moments,
    spread_patches,
)
from netdeconv.nn.averages import blend, blend_root
from netdeconv.nn.schedule import Clock
from netdeconv.nn.sync import check_same_mode, distributed, joined_moments

__all__ = ["Whitening"]


class Whitening(nn.Module):
    """Mean and inverse root of the covariance of the patches that a layer looks at.

    ``forward(x)`` returns the pair that the layer folds into its weights. In training the mean is that of the
    batch, at every step: it moves fast and is cheap. The root is dear, and is computed on refresh steps only (see
    ``config.update_every``); other steps use the last one computed. In evaluation, and when ``frozen``, both are
    remembered values.

    Remembered values are averages over training steps: of the mean with the weight ``momentum`` at every step, of the
    root with ``1 - (1 - momentum)**((k + 1) / 2)`` after k steps. That is between the weight of one step, with which it
    would lag behind the network, and that of k steps, with which it would be as noisy as one batch. With ``debias`` the
    weights are divided by their sum, as Adam does, and the gain of every feature, the root's diagonal, is averaged as
    ``1 / gain**2``, apart from the rest, as batch normalisation averages variances: an average of roots is ruled by
    the smallest inputs that were seen, and where activations grow in training, evaluation multiplies them in every
    layer. A batch with NaN or infinite values changes nothing, and a :class:`NonFiniteWarning` says so: at once on a
    CPU, otherwise when the module next changes between training and evaluation.

    Args:
        channels: channels of the layer's input.
        window: what the layer looks at; an empty ``Window()`` for a linear layer.
        groups: convolution groups.
        config: all settings, ``None`` for the defaults.
        label: what error messages call this place.

    Attributes:
        frozen: no refresh while true, see :func:`netdeconv.freeze`.
        process_group: processes to gather statistics from when ``config.sync``; ``None`` for all.

    Buffers: ``running_mean``, ``running_root`` (and ``running_root_rest`` for a smaller last block), the remembered
    values; ``last_root`` (``last_root_rest``), of the last refresh, where not every step is one; ``num_updates``
    (refreshes so far), ``num_steps`` (training steps so far), ``last_update`` (num_steps at the last refresh),
    ``num_skipped`` (steps left out because of values that are not finite); not saved: ``gathers`` (whether steps are
    counted now), by which processes notice that they are not in the same mode.
    """

    running_mean: Tensor
    running_root: Tensor
    num_updates: Tensor
    num_steps: Tensor
    last_update: Tensor
    num_skipped: Tensor
    gathers: Tensor

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
        self.register_buffer("running_mean", torch.empty(self.blocks.mean_shape, device=device, dtype=dtype))
        self._kinds = ("running", "last") if self.config.update_every > 1 else ("running",)
        for kind in self._kinds:
            for name, shape in zip(self._names(kind), self.blocks.root_shapes, strict=True):
                self.register_buffer(name, torch.empty(shape, device=device, dtype=dtype))
        for name in ("num_updates", "num_steps", "last_update", "num_skipped"):
            self.register_buffer(name, torch.zeros((), dtype=torch.int64, device=device))
        mode = torch.ones((), dtype=torch.int64, device=device)
        self.register_buffer("gathers", mode, persistent=False)  # DistributedDataParallel brings that of rank 0
        self.clock = Clock(self.config.update_every)
        self._ready = False
        self._agreed = False
        self._skipped = 0
        self.reset_statistics()

    def _names(self, kind: str) -> tuple[str, ...]:
        return (f"{kind}_root", f"{kind}_root_rest")[: len(self.blocks.parts)]

    def _roots(self, kind: str) -> tuple[Tensor, ...]:
        """The roots kept in the buffers of this kind, one for every part of ``blocks``."""
        return tuple(getattr(self, name) for name in self._names(kind))

    def reset_statistics(self) -> None:
        """Forget everything: zero mean, identity root, all counters zero."""
        self.running_mean.zero_()
        for kind in self._kinds:
            for root in () if self.running_mean.is_meta else self._roots(kind):
                root.copy_(torch.eye(root.shape[-1], dtype=root.dtype, device=root.device).expand_as(root))
        for counter in (self.num_updates, self.num_steps, self.last_update, self.num_skipped):
            counter.zero_()
        self.clock.set(0)
        self._ready, self._skipped = False, 0
        self.tell_mode()

    def reset_parameters(self) -> None:
        """:meth:`reset_statistics`, by the name that is called after ``to_empty``."""
        self.reset_statistics()

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The pair to fold. Shapes: x ``(N, C, *spatial)`` -> ``blocks.mean_shape``, ``blocks.root_shapes``.

        An empty batch is no step and changes nothing.

        Raises:
            StatisticsError: remembered values are needed and there are none; or, with ``sync``, some processes train
                while others are frozen or in evaluation mode.
        """
        shared = self.config.sync and distributed(self.process_group)
        if shared and not torch.compiler.is_compiling():
            self._check_mode()
        if not self._gathering():
            return self.remembered()
        if shared and not self._agreed and not torch.compiler.is_compiling():
            self._read_counters()  # DistributedDataParallel may have brought those of rank 0
            self._agreed = True
        if x.numel() == 0 and not shared:
            return _kept(self.running_mean), tuple(_kept(root) for root in self._roots(self._kinds[-1]))
        again = _in_backward()  # activation checkpointing runs the forward a second time
        due = self.clock.was_due if again else self.clock.due
        mean, roots = self._step(x, due, again)
        if not again:
            self.num_steps.add_(1)
            self.clock.advance()
        return mean, roots

    def _gathering(self) -> bool:
        return self.training and not self.frozen

    def tell_mode(self) -> None:
        """Let the other processes know whether statistics are gathered here; to be called after a change of that."""
        self._told, self._checked = self._gathering(), False
        self.gathers.fill_(self._told)

    def _check_mode(self) -> None:
        if self._told != self._gathering():  # by an assignment to `training` or `frozen`, of which nobody was told
            self.tell_mode()
        elif not self._checked or self.gathers.device.type == "cpu":  # elsewhere, looking means waiting for the device
            check_same_mode(self._told, self.gathers, self.label)
            self._checked = True

    def remembered(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The running values, as evaluation uses them.

        Raises:
            StatisticsError: no statistics have been gathered yet.
        """
        if not (self._ready or self._check_ready()):
            first = "Unfreeze it (netdeconv.unfreeze(model)), then run" if self.frozen else "Run"
            raise StatisticsError(
                f"{self.label}: expected whitening statistics from at least one training step, got none so far. "
                f"{first} some batches in training mode first (model.train()), or load a trained state dict."
            )
        return _kept(self.running_mean), tuple(_kept(root) for root in self._roots("running"))

    def _check_ready(self) -> bool:
        if torch.compiler.is_compiling():
            return False
        self._ready = bool(self.num_updates > 0)
        return self._ready

    def _step(self, x: Tensor, due: bool, again: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Mean of this batch; root of this batch when due; remembered values in place of any that are not finite."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.config.differentiable):
            moments = self._moments(x if self.config.differentiable else x.detach(), due, again)
            fresh = (moments.mean, *map(self._root_of, moments.covs))
            finite = torch.stack([value.isfinite().all() for value in fresh]).all()
            mean, *roots = (
                torch.where(finite, value, running.to(value.dtype))
                for value, running in zip(fresh, (self.running_mean, *self._roots("running")), strict=False)
            )
        if not again:
            self._remember(mean.detach(), [root.detach() for root in roots], finite)
        return mean, tuple(roots) if due else tuple(_kept(root) for root in self._roots("last"))

    def _moments(self, x: Tensor, due: bool, again: bool) -> Moments:
        """Mean, and the covariances of a sample of patches when due."""
        if due and self.config.sampling == "corner":
            return self._joined(self._moments_of(self.sample(x)))[0]
        moments = self.mean_of(x)
        if not due:
            return self._joined(moments)[0]
        sample = self.sample(x, max_samples=self.config.max_samples, turn=self.num_updates - int(again))
        moments, sampled = self._joined(moments, self._moments_of(sample))
        return sampled._replace(mean=moments.mean)

    def _joined(self, *several: Moments) -> Sequence[Moments]:
        shared = self.config.sync
        return joined_moments(several, self.blocks, self.running_mean, self.process_group) if shared else several

    def mean_of(self, x: Tensor) -> Moments:
        """Moments of all patches of x ``(N, C, *spatial)``, without covariances."""
        mean = self.blocks.pooled_mean(mean_patch(x, self.window))
        seen = x.shape[0] * math.prod(self.window.output_size(x.shape[2:]))
        return Moments(mean, (), x.shape[0], mean.new_full((), seen))

    def sample(self, x: Tensor, *, max_samples: int | None = None, turn: Tensor | None = None) -> Sample:
        """The patches of x ``(N, C, *spatial)`` that the covariance is of, by ``config.sampling``.

        Args:
            max_samples, turn: see :func:`netdeconv.functional.spread_patches`.
        """
        stride = self.config.sampling_stride
        if self.config.sampling == "corner":
            return corner_patches(x, self.window, sampling_stride=stride)
        if self.config.sampling == "tiles" and self.window.taps > 1:
            return spread_patches(x, self.window, grid=stride, max_samples=max_samples, turn=turn)
        # Without a limit every patch, where the stride would only save time.
        wanted = stride if turn is not None else 1
        return spread_patches(x, self.window, sampling_stride=wanted, max_samples=max_samples, turn=turn)

    def _moments_of(self, sample: Sample) -> Moments:
        """With factors instead of covariances where an iteration is shorter on the rows."""
        alone = not (self.config.sync and distributed(self.process_group))
        factored = alone and self.config.solver != "eigh"
        return patch_moments(sample.rows, self.blocks, sample.weights, factored=factored)

    def _root_of(self, cov: Tensor) -> Tensor:
        """The root of a covariance, or of the one that a factor stands for."""
        options: dict[str, Any] = {"num_iters": self.config.num_iters, "solver": self.config.solver}
        if cov.shape[-2] < cov.shape[-1]:
            return inverse_sqrt_of_rows(cov, eps=self.config.eps, **options)
        eye = torch.eye(cov.shape[-1], dtype=cov.dtype, device=cov.device)
        return inverse_sqrt(cov + self.config.eps * eye, **options)

    @torch.no_grad()
    def _remember(self, mean: Tensor, roots: list[Tensor], finite: Tensor) -> None:
        """Blend into the running values; where not finite, mean and roots are those already."""
        steps = self.num_steps + 1
        blend(self.running_mean, mean, self._weight(torch.ones_like(steps), steps, steps))
        if roots:
            weight = self._weight(steps - self.last_update, self.num_updates + 1, steps)
            blend_one = blend_root if self.config.debias else blend
            for running, root in zip(self._roots("running"), roots, strict=True):
                blend_one(running, root, weight)
            for last, root in zip(self._roots("last") if "last" in self._kinds else (), roots, strict=False):
                last.copy_(torch.where(finite, root.to(last.dtype), last))
            self.last_update.copy_(torch.where(finite, steps, self.last_update))
            self.num_updates.add_(finite)
        self.num_skipped.add_(~finite)
        if torch.compiler.is_compiling() or finite.is_cuda:
            self._ready = True  # looked at again when the mode changes
        elif finite:
            self._ready = True
        else:
            self._report_skipped()

    def _weight(self, waited: Tensor, updates: Tensor, steps: Tensor) -> Tensor:
        """Share in the running values of what waited so long, the last of ``updates`` in ``steps`` training steps."""
        dtype = torch.promote_types(self.running_mean.dtype, torch.float32)
        if self.config.momentum is None:
            new, seen = waited.to(dtype), steps.to(dtype)
        else:
            keep = torch.full((), 1 - self.config.momentum, dtype=dtype, device=steps.device)
            new = 1 - keep ** ((waited + 1).to(dtype) / 2)
            if not self.config.debias:
                return new
            seen = 1 - keep ** ((steps + updates).to(dtype) / 2)
            seen = seen.clamp(min=torch.finfo(dtype).tiny)  # zero only for momentum 0
        return torch.where(self.num_updates > 0, new / seen, torch.ones_like(new))

    def train(self, mode: bool = True) -> Whitening:
        """Switch mode, and bring what Python knows of the counters up to date."""
        super().train(mode)
        self.tell_mode()
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
        self._skipped = min(self._skipped, skipped)  # somebody may have reset the counter
        if skipped and skipped >= 2 * self._skipped:  # at the 1st, 2nd, 4th, ..., as a diverged run skips every step
            warnings.warn(
                f"{self.label}: expected finite input, got NaN or infinite values in "
                f"{skipped - self._skipped} step(s), {skipped} so far. The remembered statistics were left as they "
                "were; look for the batch, a too large learning rate, or an overflow in half precision.",
                NonFiniteWarning,
                stacklevel=2,
            )
            self._skipped = skipped

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # A layer that refreshed at every step has saved no last root: the remembered one is the nearest to it.
        for last, running in zip(self._names(self._kinds[-1]), self._names("running"), strict=True):
            if prefix + last not in state_dict and prefix + running in state_dict:
                state_dict[prefix + last] = state_dict[prefix + running]
        if "last" not in self._kinds:
            for last in self._names("last"):
                state_dict.pop(prefix + last, None)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._agreed = False
        self._skipped = 0 if self.num_skipped.is_meta else int(self.num_skipped)
        self._read_counters()

    def extra_repr(self) -> str:
        default = WhiteningConfig()
        changed = [f"{name}={value!r}" for name, value in vars(self.config).items() if value != getattr(default, name)]
        kernel = "x".join(map(str, self.window.kernel_size)) or "linear"
        return ", ".join([f"{self.blocks.channels}", kernel, *changed])


def _kept(value: Tensor) -> Tensor:
    """A buffer to compute with: a copy where a gradient is recorded, as the next step changes the buffer in place."""
    return value.clone() if torch.is_grad_enabled() else value


def _in_backward() -> bool:
    """Whether the autograd engine is running on this thread."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
