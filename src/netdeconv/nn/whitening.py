"""The whitening of one layer's input: its statistics, when they are refreshed, and what is remembered."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from netdeconv.config import WhiteningConfig
from netdeconv.errors import NonFiniteWarning, StatisticsError
from netdeconv.functional import Blocks, Moments, Window
from netdeconv.nn.averages import blend, update_share, update_weight
from netdeconv.nn.estimator import Estimator
from netdeconv.nn.refresh import Counters, all_finite, averaged_roots, opaque_refresh
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
        self.estimator = Estimator(channels, window, groups, WhiteningConfig() if config is None else config)
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

    def _last_roots(self) -> tuple[Tensor, ...]:
        """Those of the last refresh, if they are kept."""
        return self._roots("last") if "last" in self._kinds else ()

    @property
    def config(self) -> WhiteningConfig:
        """All settings; they cannot be changed, as buffers and schedule are made for them."""
        return self.estimator.config

    @property
    def blocks(self) -> Blocks:
        """How the patches are cut."""
        return self.estimator.blocks

    @property
    def window(self) -> Window:
        """What the layer looks at."""
        return self.estimator.window

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
        shared = self._shared()
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
        x = x if self.config.differentiable else x.detach()
        if not due:
            mean, roots = self._ordinary(x, again)
        elif torch.compiler.is_compiling() and not shared and self._may_be_opaque():
            mean, roots = self._opaque_refresh(x)
        else:
            mean, roots = self._refresh(x, again)
        if not again:
            self.num_steps.add_(1)
            self.clock.advance()
        return mean, roots

    def _shared(self) -> bool:
        """Whether statistics are gathered over several processes."""
        return self.config.sync and distributed(self.process_group)

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

    def _ordinary(self, x: Tensor, again: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Mean of this batch, or the remembered one where it is not finite; root of the last refresh."""
        mean = self._joined(self.estimator.mean_of(x))[0].mean
        finite = all_finite((mean,))
        mean = torch.where(finite, mean, self.running_mean.to(mean.dtype))
        if not again:
            self._remember_mean(mean.detach(), finite, due=False)
        return mean, tuple(_kept(root) for root in self._roots("last"))

    def _refresh(self, x: Tensor, again: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Mean and root of this batch, or the remembered ones where they are not finite."""
        moments = self._moments(x, self.num_updates - 1 if again else self.num_updates)
        fresh = (moments.mean, *map(self.estimator.root_of, moments.covs))
        finite = all_finite(fresh)
        mean, *roots = (
            torch.where(finite, value, running.to(value.dtype))
            for value, running in zip(fresh, (self.running_mean, *self._roots("running")), strict=True)
        )
        if not again:
            self._remember_mean(mean.detach(), finite, due=True)
            detached = [root.detach() for root in roots]
            averages = averaged_roots(self.config, detached, self._roots("running"), self._counters())
            self._remember_roots(detached, averages, finite)
        return mean, tuple(roots)

    def _opaque_refresh(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """:meth:`_refresh` for a compiler that does not have to look inside."""
        mean = self.estimator.mean_of(x).mean
        running, counters = self._roots("running"), self._counters()
        roots, averages, finite = opaque_refresh(self.estimator, x, running, counters, all_finite((mean,)))
        mean = torch.where(finite, mean, self.running_mean.to(mean.dtype))
        self._remember_mean(mean, finite, due=True)
        self._remember_roots(roots, averages, finite)
        return mean, tuple(roots)

    def _may_be_opaque(self) -> bool:
        """Whether a compiler need not see into a refresh: no gradient goes through it, no mean comes out of it.

        An eigendecomposition waits for a GPU, which a CUDA graph does not bear.
        """
        settings = self.config
        return not (settings.differentiable or settings.sampling == "corner" or settings.solver == "eigh")

    def _moments(self, x: Tensor, turn: Tensor) -> Moments:
        """Mean of all patches, and covariances of a sample of them; as published, the sample's mean."""
        sampled = self.estimator.sample_moments(x, turn, factored=not self._shared())
        if self.config.sampling == "corner":
            return self._joined(sampled)[0]
        moments, sampled = self._joined(self.estimator.mean_of(x), sampled)
        return sampled._replace(mean=moments.mean)

    def _joined(self, *several: Moments) -> Sequence[Moments]:
        shared = self.config.sync
        return joined_moments(several, self.blocks, self.running_mean, self.process_group) if shared else several

    def _remember_mean(self, mean: Tensor, finite: Tensor, due: bool) -> None:
        """Blend a mean, without gradient, into the running one; where not finite, it is that already."""
        counters = self._counters()
        if due or not self._ready or torch.compiler.is_compiling():
            steps = counters.num_steps + 1
            part = update_weight(self.config, mean.dtype, torch.ones_like(steps), steps, steps, counters.num_updates)
        else:  # nobody has to ask the device
            part = update_share(self.config, 1, self.clock.steps + 1, self.clock.steps + 1)
        blend(self.running_mean, mean, part)
        if torch.compiler.is_compiling() or finite.device.type != "cpu":  # where to look would mean to wait
            self.num_skipped.add_(~finite)
            self._ready = True  # looked at again when the mode changes
        elif finite:
            self._ready = True
        else:
            self.num_skipped.add_(1)
            self._report_skipped()

    def _remember_roots(self, roots: Sequence[Tensor], averages: Sequence[Tensor], finite: Tensor) -> None:
        """Keep the averages, and, if they are finite, the roots of this step as the last ones."""
        for running, average in zip(self._roots("running"), averages, strict=True):
            running.copy_(average)
        for last, root in zip(self._last_roots(), roots, strict=False):
            last.copy_(torch.where(finite, root.to(last.dtype), last))
        self.last_update.copy_(torch.where(finite, self.num_steps + 1, self.last_update))
        self.num_updates.add_(finite)

    def _counters(self) -> Counters:
        return Counters(self.num_steps, self.last_update, self.num_updates)

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
