"""The whitening of one layer's input: its statistics, when they are refreshed, and what is remembered."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from netdeconv.config import WhiteningConfig
from netdeconv.errors import NonFiniteWarning, StatisticsError
from netdeconv.functional import Blocks, Slope, Window
from netdeconv.nn.averages import blend, update_share, update_weight
from netdeconv.nn.estimator import Estimator
from netdeconv.nn.refresh import Counters, all_finite, opaque_refresh, refreshed
from netdeconv.nn.schedule import Clock
from netdeconv.nn.sync import check_same_mode, distributed, joined_moments, joined_variance

__all__ = ["Statistics", "Whitening"]


class Statistics(NamedTuple):
    """What a layer folds into its weights: ``mean`` as ``blocks.mean_shape``, ``roots`` as ``blocks.root_shapes``, and
    ``scale``, what every channel is multiplied by, ``None`` for one; and, where that was asked for, its ``slope``."""

    mean: Tensor
    roots: tuple[Tensor, ...]
    scale: Tensor | None
    slope: Slope | None = None


class _Batch(NamedTuple):
    """What a batch says of mean and variance, how its scale depends on it, and whether it says anything."""

    mean: Tensor
    var: Tensor | None
    slope: Slope | None
    counts: Tensor


class Whitening(nn.Module):
    """Mean, scale and inverse root of the covariance of the patches that a layer looks at.

    ``forward(x)`` returns what the layer folds into its weights. In training, mean and scale are those of the batch, at
    every step: they move fast and are cheap. The gradient through the scale is what keeps activations from growing. The
    root is expensive, and is computed on refresh steps only (see ``config.update_every``), from the covariance of the
    scaled channels, averaged over the refreshes; other steps use the last one. In evaluation, and when ``frozen``, all
    are the running values. Linear layers differ, see :data:`netdeconv.config.KINDS`.

    Running values are averages over training steps: of mean and variance with the weight ``momentum`` at every step, of
    an averaged covariance at every refresh, of averaged roots with ``1 - (1 - momentum)**((k + 1) / 2)`` after k steps.
    With ``debias`` the weights are divided by their sum, as Adam does, and of averaged roots the gain of every
    feature, the diagonal, is averaged as ``1 / gain**2``, apart from the rest, as batch normalisation averages
    variances: an average of roots is ruled by the smallest inputs that were seen. A batch that has no statistics
    (NaN, infinite values, a single row, one constant) changes nothing and is whitened by the running values, and a
    :class:`NonFiniteWarning` says so: at once on a CPU, otherwise when the module next changes between training and
    evaluation. A 1x1 convolution of maps of one pixel, as behind a global pooling, sees one row per image, too few for
    a covariance: it stays the plain layer (``forward`` returns ``None``, and the running values stay the identity).

    Args:
        channels: channels of the layer's input.
        window: what the layer looks at; an empty ``Window()`` for a linear layer.
        groups: convolution groups.
        config: all settings, ``None`` for the defaults.
        kind: the kind of layer, one of :data:`netdeconv.config.KINDS`; ``None`` for that of window and groups.
        label: what error messages call this place.

    Attributes:
        frozen: no refresh while true, see :func:`netdeconv.freeze`.
        process_group: processes to gather statistics from when ``config.sync``; ``None`` for all.

    Buffers: ``running_mean``; ``running_var``, of every channel, with ``config.scale``; ``running_root`` (and
    ``running_root_rest`` for a smaller last block); with ``config.average == "covariance"`` ``running_cov``
    (``running_cov_rest``), of which it is the root; otherwise ``last_root`` (``last_root_rest``), of the last refresh,
    where not every step is one; ``num_updates`` (refreshes so far), ``num_steps`` (training steps so far),
    ``last_update`` (num_steps at the last refresh), ``num_skipped`` (steps left out); not saved: ``gathers`` (whether
    steps are counted now), by which processes notice that they are not in the same mode.
    """

    running_mean: Tensor
    running_var: Tensor | None
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
        *,
        kind: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        label: str = "Whitening",
    ) -> None:
        super().__init__()
        self.label = label
        self.estimator = Estimator(channels, window, groups, WhiteningConfig() if config is None else config, kind)
        self.frozen = False
        self.process_group: Any = None
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.register_buffer("running_mean", torch.empty(self.blocks.mean_shape, **place))
        self.register_buffer("running_var", torch.empty(channels, **place) if self.config.scale else None)
        self._kinds: tuple[str, ...] = ("running_root",)
        if self.config.average == "covariance":
            self._kinds += ("running_cov",)
        elif self._every > 1:
            self._kinds += ("last_root",)
        for kind_of_matrix in self._kinds:
            for name, shape in zip(self._names(kind_of_matrix), self.blocks.root_shapes, strict=True):
                self.register_buffer(name, torch.empty(shape, **place))
        for name in ("num_updates", "num_steps", "last_update", "num_skipped"):
            self.register_buffer(name, torch.zeros((), dtype=torch.int64, device=device))
        mode = torch.ones((), dtype=torch.int64, device=device)
        self.register_buffer("gathers", mode, persistent=False)  # DistributedDataParallel brings that of rank 0
        self.clock = Clock(self._every)
        self._ready = False
        self._agreed = False
        self._skipped = 0
        self.reset_statistics()

    @property
    def _every(self) -> int:
        assert self.config.update_every is not None
        return self.config.update_every

    def _names(self, kind: str) -> tuple[str, ...]:
        return (kind, f"{kind}_rest")[: len(self.blocks.parts)]

    def _matrices(self, kind: str) -> tuple[Tensor, ...]:
        """The buffers of this kind, one for every part of ``blocks``; none where there is no such kind."""
        return tuple(getattr(self, name) for name in self._names(kind)) if kind in self._kinds else ()

    def _last_roots(self) -> tuple[Tensor, ...]:
        """The roots of the last refresh: those of an averaged covariance are the running ones."""
        return self._matrices("last_root") or self._matrices("running_root")

    @property
    def config(self) -> WhiteningConfig:
        """All settings, with nothing left to choose; they cannot be changed: buffers and schedule are made for them."""
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
        """Forget everything: zero mean, variance one, identity roots and covariances, all counters zero."""
        self.running_mean.zero_()
        if self.running_var is not None:
            self.running_var.fill_(1)
        for kind in self._kinds:
            for matrix in () if self.running_mean.is_meta else self._matrices(kind):
                matrix.copy_(torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device).expand_as(matrix))
        for counter in (self.num_updates, self.num_steps, self.last_update, self.num_skipped):
            counter.zero_()
        self.clock.set(0)
        self._ready, self._skipped = False, 0
        self.tell_mode()

    def reset_parameters(self) -> None:
        """:meth:`reset_statistics`, by the name that is called after ``to_empty``."""
        self.reset_statistics()

    def forward(self, x: Tensor, *, by_hand: bool = False) -> Statistics | None:
        """What to fold for x ``(N, C, *spatial)``; ``None`` for nothing.

        An empty batch is no step and changes nothing.

        Args:
            by_hand: the caller takes care of the gradient of the scale; it gets the ``slope`` where there is one.

        Raises:
            StatisticsError: running values are needed and there are none; or, with ``sync``, some processes train
                while others are frozen or in evaluation mode.
        """
        shared = self._shared()
        if shared and not torch.compiler.is_compiling():
            self._check_mode()
        if not self._gathering():
            return self.remembered()
        if self.sees_few_rows(x):
            self.num_updates.clamp_(min=1)
            return None
        if shared and not self._agreed and not torch.compiler.is_compiling():
            self._read_counters()  # DistributedDataParallel may have brought those of rank 0
            self._agreed = True
        if x.numel() == 0 and not shared:
            return self._running(self._last_roots())
        again = _in_backward()  # activation checkpointing runs the forward a second time
        due = self.clock.was_due if again else self.clock.due
        if not due or (again and self.config.average == "covariance"):
            found = self._ordinary(x, again, by_hand)
        elif torch.compiler.is_compiling() and not shared and self._may_be_opaque():
            found = self._opaque_refresh(x)
        else:
            found = self._refresh(x, again, by_hand)
        if not again:
            self.num_steps.add_(1)
            self.clock.advance()
        return found

    def sees_few_rows(self, x: Tensor) -> bool:
        """Whether every image of x ``(N, C, *spatial)`` is one row for a 1x1 convolution; published layers take it."""
        pointwise = self.estimator.kind in ("1x1", "grouped", "depthwise") and self.window.taps == 1
        return pointwise and self.config.debias and x.shape[0] * x.shape[1] == x.numel() > 0

    def scales_alone(self) -> bool:
        """Whether a step now has one gradient through the statistics, that of the scale, and in this process only."""
        return self._gathering() and bool(self.config.scale) and not (self.config.differentiable or self._shared())

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

    def remembered(self) -> Statistics:
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
        return self._running(self._matrices("running_root"))

    def _check_ready(self) -> bool:
        if torch.compiler.is_compiling():
            return False
        self._ready = bool(self.num_updates > 0)
        return self._ready

    def _running(self, roots: Sequence[Tensor]) -> Statistics:
        """The running mean and scale with kept roots."""
        scale = None if self.running_var is None else self.estimator.scale_of(self.running_var)
        return Statistics(_kept(self.running_mean), tuple(map(_kept, roots)), scale)

    def _of_batch(self, x: Tensor, by_hand: bool = False) -> _Batch:
        """What one batch says; the running values where it has none to say."""
        moments = self.estimator.mean_of(x if self.config.differentiable else x.detach())
        mean = self._joined(moments)
        if self.running_var is None:
            return self._or_running(_Batch(mean, None, None, all_finite((mean,))))
        channel_mean, var, count = self.estimator.variance_of(x.detach() if by_hand else x)
        if self._shared():
            about = self.blocks.spread_mean(self.running_mean).reshape(-1, self.blocks.taps).mean(1)
            var = joined_variance(channel_mean, var, count, about, self.process_group)
        largest = var.detach().amax()
        counts = all_finite((mean, largest)) & (largest > 0)
        slope = self.estimator.slope_of(var, channel_mean, count) if by_hand else None
        return self._or_running(_Batch(mean, var, slope, counts))

    def _or_running(self, batch: _Batch) -> _Batch:
        """The batch, or the running values, which are constants, where it does not count."""
        mean, var, slope, counts = batch
        mean = torch.where(counts, mean, self.running_mean.to(mean.dtype))
        if var is not None and self.running_var is not None:
            var = torch.where(counts, var, self.running_var.to(var.dtype))
        return _Batch(mean, var, None if slope is None else slope._replace(share=slope.share * counts), counts)

    def _statistics(self, batch: _Batch, roots: Sequence[Tensor]) -> Statistics:
        scale = None if batch.var is None else self.estimator.scale_of(batch.var)
        return Statistics(batch.mean, tuple(roots), scale, batch.slope)

    def _ordinary(self, x: Tensor, again: bool, by_hand: bool) -> Statistics:
        """Mean and scale of this batch, root of the last refresh."""
        batch = self._of_batch(x, by_hand)
        if not again:
            self._remember(batch, due=False)
        return self._statistics(batch, [_kept(root) for root in self._last_roots()])

    def _refresh(self, x: Tensor, again: bool, by_hand: bool) -> Statistics:
        """Mean, scale and root of this batch, or the running ones where they cannot be used."""
        batch = self._of_batch(x, by_hand)
        var = batch.var if batch.var is None or self.config.differentiable else batch.var.detach()
        scale = None if var is None else self.estimator.scale_of(var)
        turn = self.num_updates - 1 if again else self.num_updates
        seen = x if self.config.differentiable else x.detach()
        moments = self.estimator.sample_moments(seen, turn, scale, factored=not self._shared())
        if self._shared():
            about = self.running_mean
            if scale is not None:
                about = about.to(scale.dtype) * self.blocks.of_channels(scale).flatten()
            (moments,) = joined_moments([moments], self.blocks, about, self.process_group)
        if self.config.sampling == "corner":  # as published, the mean is the sample's
            batch = self._with_mean_of_sample(batch, moments.mean, scale)
        running, averages = self._matrices("running_root"), self._averages()
        roots, new, counts = refreshed(self.estimator, moments, running, averages, self._counters(), batch.counts)
        batch = self._or_running(batch._replace(counts=counts))
        if not again:
            self._remember(batch, due=True)
            self._remember_roots(roots, new, counts)
        return self._statistics(batch, roots)

    def _with_mean_of_sample(self, batch: _Batch, mean: Tensor, scale: Tensor | None) -> _Batch:
        mean = mean if scale is None else mean / self.blocks.of_channels(scale).flatten()
        return batch._replace(mean=mean, counts=batch.counts & all_finite((mean,)))

    def _opaque_refresh(self, x: Tensor) -> Statistics:
        """:meth:`_refresh` for a compiler that does not have to look inside."""
        batch = self._of_batch(x)
        scale = None if batch.var is None else self.estimator.scale_of(batch.var.detach())
        state = (self._matrices("running_root"), self._averages(), self._counters(), batch.counts)
        roots, new, counts = opaque_refresh(self.estimator, x.detach(), scale, *state)
        batch = self._or_running(batch._replace(counts=counts))
        self._remember(batch, due=True)
        self._remember_roots(roots, new, counts)
        return self._statistics(batch, roots)

    def _averages(self) -> tuple[Tensor, ...]:
        """What is averaged over the refreshes."""
        return self._matrices("running_cov") or self._matrices("running_root")

    def _may_be_opaque(self) -> bool:
        """Whether a compiler need not see into a refresh: no gradient goes through it, no mean comes out of it.

        An eigendecomposition waits for a GPU, which a CUDA graph does not bear.
        """
        settings = self.config
        return not (settings.differentiable or settings.sampling == "corner" or settings.solver == "eigh")

    def _joined(self, moments: Any) -> Tensor:
        """The mean of all processes' patches."""
        if not self._shared():
            mean: Tensor = moments.mean
            return mean
        return joined_moments([moments], self.blocks, self.running_mean, self.process_group)[0].mean

    def _remember(self, batch: _Batch, due: bool) -> None:
        """Blend mean and variance into the running ones; where they do not count, they are those already."""
        mean, var, _, counts = batch
        counters = self._counters()
        if due or not self._ready or torch.compiler.is_compiling():
            steps = counters.num_steps + 1
            part = update_weight(self.config, mean.dtype, torch.ones_like(steps), steps, steps, counters.num_updates)
        else:  # nobody has to ask the device
            part = update_share(self.config, 1, self.clock.steps + 1, self.clock.steps + 1)
        blend(self.running_mean, mean.detach(), part)
        if self.running_var is not None and var is not None:
            blend(self.running_var, var.detach(), part)
        if torch.compiler.is_compiling() or counts.device.type != "cpu":  # where to look would mean to wait
            self.num_skipped.add_(~counts)
            self._ready = True  # looked at again when the mode changes
        elif counts:
            self._ready = True
        else:
            self.num_skipped.add_(1)
            self._report_skipped()

    def _remember_roots(self, roots: Sequence[Tensor], averages: Sequence[Tensor], counts: Tensor) -> None:
        """Keep the averages, and the roots of this step as the last ones, where they count."""
        for running, average in zip(self._averages(), averages, strict=True):
            running.copy_(average)
        if "running_cov" in self._kinds or "last_root" in self._kinds:
            for last, root in zip(self._last_roots(), roots, strict=True):
                last.copy_(torch.where(counts, root.detach().to(last.dtype), last))
        self.last_update.copy_(torch.where(counts, self.num_steps + 1, self.last_update))
        self.num_updates.add_(counts)

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
                f"{self.label}: expected finite input that varies, got NaN, infinite or constant values, or a single row, "
                f"in {skipped - self._skipped} step(s), {skipped} so far. The running statistics were left as they "
                "were; look for the batch, a too large learning rate, or an overflow in half precision.",
                NonFiniteWarning,
                stacklevel=2,
            )
            self._skipped = skipped

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # A layer that refreshed at every step has saved no last root: the running one is the nearest to it.
        for last, running in zip(self._names("last_root"), self._names("running_root"), strict=True):
            if "last_root" not in self._kinds:
                state_dict.pop(prefix + last, None)
            elif prefix + last not in state_dict and prefix + running in state_dict:
                state_dict[prefix + last] = state_dict[prefix + running]
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._agreed = False
        self._skipped = 0 if self.num_skipped.is_meta else int(self.num_skipped)
        self._read_counters()

    def extra_repr(self) -> str:
        default = WhiteningConfig().resolved(str(self.estimator.kind), self.blocks.channels // self.blocks.groups)
        changed = [f"{name}={value!r}" for name, value in vars(self.config).items() if value != getattr(default, name)]
        kernel = "x".join(map(str, self.window.kernel_size)) or "linear"
        return ", ".join([f"{self.blocks.channels}", kernel, *changed])


def _kept(value: Tensor) -> Tensor:
    """A buffer to compute with: a copy where a gradient is recorded, as the next step changes the buffer in place."""
    return value.clone() if torch.is_grad_enabled() else value


def _in_backward() -> bool:
    """Whether the autograd engine is running on this thread."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
