"""The whitening of one layer's input: what a step is whitened by, and when the statistics are refreshed."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from netdeconv.config import WhiteningConfig
from netdeconv.errors import StatisticsError
from netdeconv.functional import Window, what_varies, whitened_linear
from netdeconv.functional.isqrt import solves_by_chebyshev
from netdeconv.functional.linear_step import pooled, range_of_variance
from netdeconv.functional.on_gpu import kernels_for
from netdeconv.functional.precision import as_dtype, at_least_float32, autocasts
from netdeconv.functional.tracing import batched, traced
from netdeconv.nn.batch import BatchStatistics
from netdeconv.nn.calls import Call, Calls, Checkpoint, current_checkpoint, in_backward
from netdeconv.nn.estimator import Estimator
from netdeconv.nn.refresh import Counters, all_finite, averaged_roots, opaque_refresh, refreshed
from netdeconv.nn.running import Batch, Statistics, kept
from netdeconv.nn.sync import Place, check_not_joining, check_same_mode

__all__ = ["Statistics", "Whitening"]


class Whitening(BatchStatistics):
    """Mean, scale and inverse square root of the covariance of a layer's input patches.

    ``forward(x)`` returns what the layer folds into its weights. In training, mean and scale are those of the batch, at
    every step: they change quickly and are cheap, and the gradient through the scale keeps activations from growing.
    The inverse square root ("root" for short) is expensive, and is computed on refresh steps only (see
    ``config.update_every``), from the covariance of the scaled channels averaged over the refreshes; other steps use
    the last one. In evaluation, and when ``frozen``, all are running statistics. Linear layers have no scale, and
    compute the root of every batch, with its gradient.

    Running statistics are averages over training steps: mean and variance with weight ``momentum`` at every step, an
    averaged covariance at every refresh, averaged roots with weight ``1 - (1 - momentum)**((k + 1) / 2)`` k steps after
    the one before. With ``debias`` the weights are divided by their sum, as Adam does, and the diagonal of averaged
    roots, the gain of every feature, is averaged as ``1 / gain**2``, as batch normalisation averages variances: the
    smallest inputs would dominate a plain average of roots.

    A batch without statistics (NaN, infinite values, a single row, a constant) changes nothing and is whitened with
    the running statistics, and a :class:`netdeconv.NonFiniteWarning` says so: at once on a CPU, otherwise when the
    module next changes between training and evaluation. A 1x1 convolution of maps of one pixel, as behind a global
    pooling, sees one row per image, too few for a covariance: it acts as the plain layer (``forward`` gives ``None``).

    Args:
        channels: channels of the layer's input.
        window: kernel size, stride and padding; an empty ``Window()`` for a linear layer.
        groups: convolution groups.
        config: all settings, ``None`` for the defaults.
        kind: the kind of layer, one of :data:`netdeconv.config.KINDS`; ``None`` for that of window and groups.
        label: name of the layer in error messages.

    Attributes:
        frozen: no refresh while true, see :func:`netdeconv.freeze`.
        process_group: processes to reduce statistics over with ``config.sync``; ``None`` for all.

    Buffers: ``running_mean``; ``running_var``, of every channel, with ``config.scale``; ``running_root`` (and
    ``running_root_rest`` for a smaller last block); with ``config.average == "covariance"`` ``running_cov``
    (``running_cov_rest``), of which it is the root; otherwise ``last_root`` (``last_root_rest``), of the last refresh,
    where not every step is one; ``num_updates`` (refreshes so far), ``num_steps`` (training steps so far),
    ``last_update`` (num_steps at the last refresh), ``num_skipped`` (batches without statistics); not saved:
    ``gathers`` (whether statistics are updated), by which processes notice that their modes differ.
    """

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
        estimator = Estimator(channels, window, groups, WhiteningConfig() if config is None else config, kind)
        super().__init__(estimator, label, device=device, dtype=dtype)
        self.frozen = False
        self._calls = Calls()
        self._agreed = False
        mode = torch.ones((), dtype=torch.int64, device=device)
        self.register_buffer("gathers", mode, persistent=False)  # DistributedDataParallel brings that of rank 0
        self.reset_statistics()

    def reset_statistics(self) -> None:
        """Reset to zero mean, variance one, identity roots and covariances; all counters to zero."""
        super().reset_statistics()
        self.tell_mode()

    def forward(self, x: Tensor, *, by_hand: bool = False, weight: Tensor | None = None) -> Statistics | None:
        """What to fold for x ``(N, C, *spatial)``; ``None`` for nothing.

        An empty batch is no step and changes nothing.

        Args:
            by_hand: the caller takes care of the gradient of the scale; it gets the ``slope`` where there is one.
            weight: the caller's, by which several processes tell whether they are at the same layer.

        Raises:
            StatisticsError: with ``sync``, some processes train while others are frozen, in evaluation mode, or at
                another layer; nested checkpoints recompute another input; or several batches have one set of
                statistics.
        """
        shared, compiling = self._shared(), torch.compiler.is_compiling()
        if shared and not compiling:
            self._check_mode()
        if not self.gathers_statistics():
            return self.remembered()
        if self._sees_single_pixels(x):
            return None
        if x.numel() == 0 and not shared:
            return self._running(self._last_roots())
        if shared and not compiling:
            check_not_joining(self.label)
            known = (self.running_mean, self.running_mean if weight is None else weight)
            self._place = Place.of(self.label, self.estimator.serialized, self.num_steps, known)
        checkpoint = None if compiling else current_checkpoint()
        if checkpoint is not None and (checkpoint.repeats or in_backward()):
            call = self._call_before(x, checkpoint)
            if call is not None:
                return self._repeated(x, by_hand, call)
        if not (compiling or (shared and self._agreed and self.num_steps.device.type != "cpu")):
            self._clock.follow(self.num_steps, self.num_updates)
            if shared != self._agreed:
                self._agreed = shared  # DistributedDataParallel writes to the buffers at every step
        if batched(x) and not batched(self.running_mean):
            raise StatisticsError(
                f"{self.label}: expected one batch, or buffers for each (torch.func.stack_module_state), got several "
                "under vmap in training mode and one set of running statistics. Call netdeconv.freeze(model) or "
                "model.eval() first, or loop over the batches."
            )
        kernels = kernels_for(x) if by_hand and self.config.sampling != "corner" else None
        if not self._clock.due:
            found = self._ordinary(x, by_hand, checkpoint, kernels)
        elif compiling and not shared and self._may_be_opaque():
            found = self._opaque_refresh(x)
        else:
            found = self._refresh(x, by_hand, checkpoint, kernels)
        self._count(in_buffer=kernels is None or self._clock.due)
        return found

    def _count(self, *, in_buffer: bool = True) -> None:
        """One step more, on the clock, and in the buffer unless a kernel has counted there."""
        if torch.compiler.is_compiling():  # before the buffer, which the clock compares with
            self._clock.advance_in_graph()
        if in_buffer:
            self.num_steps.add_(1)
        if not torch.compiler.is_compiling():
            self._clock.advance(self.num_steps)

    def takes_own_root(self, x: Tensor) -> bool:
        """Whether a step on the rows x is :func:`netdeconv.functional.whitened_linear`, if they have statistics."""
        config = self.config
        hooked = bool(self._forward_hooks or self._forward_pre_hooks)  # which see a call of this module
        own = self.estimator.kind == "linear" and config.update_every == 1 and config.differentiable and config.debias
        if hooked or not own or not self.gathers_statistics() or len(self.blocks.parts) > 1 or traced():
            return False
        other = config.scale or config.sampling == "corner" or not solves_by_chebyshev(config.solver, config.num_iters)
        if other or (self.blocks.pool_mean and not self.blocks.single) or not torch.is_grad_enabled():
            return False
        rows, on_cpu, dtype = len(x), x.device.type == "cpu", self.running_mean.dtype
        all_rows = rows > 1 and (config.max_samples is None or rows <= config.max_samples)
        # On a CPU, products of the size of fewer rows than features are shorter.
        short = on_cpu and self.blocks.parts[0][1] >= 4 * rows * self.blocks.parts[0][0]
        plain = dtype == at_least_float32(dtype) and (x.dtype == dtype or autocasts(x.device.type))
        alone = not (self._shared() or (on_cpu and autocasts("cpu")) or current_checkpoint() is not None)
        return all_rows and not short and plain and alone

    def own_root(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        """The layer's output in a step that it :meth:`takes_own_root`, which is remembered; ``None`` where the rows
        have no statistics, and nothing is done: on a CPU, as to look at them elsewhere would mean to wait."""
        config, look, dtype = self.config, x.device.type == "cpu", self.running_mean.dtype
        assert config.num_iters is not None
        (root_of_others,) = self._matrices("running_root")
        y, mean, cov, root, used = whitened_linear(
            as_dtype(x, dtype),
            as_dtype(weight, dtype),
            None if bias is None else as_dtype(bias, dtype),
            eps=config.eps,
            num_iters=config.num_iters,
            block=self.blocks.parts[0][1],
            otherwise=None if look else (self.running_mean, root_of_others),
        )
        counts = self._have_root(mean, cov, root) if used is None else used
        if counts is False:
            return None
        self._clock.follow(self.num_steps, self.num_updates)
        averages = averaged_roots(config, [root], self._averages(), self._counters(look=look))
        self._remember(Batch(mean, None, None, None, counts), due=True)
        self._remember_roots([root], averages, counts)
        self._count()
        return y

    def _have_root(self, mean: Tensor, cov: Tensor, root: Tensor) -> bool:
        """:func:`netdeconv.functional.linear_step.usable`, of numbers that may be looked at."""
        var, eps = cov.diagonal(), self.config.eps
        if not (all_finite((mean, root), look=True) and what_varies(var, pooled(mean, len(var)), eps)[0]):
            return False
        least, most = range_of_variance(len(var), cov.dtype)
        return bool(least < float(var.max()) + eps < most)

    def look_through(self, window: Window) -> None:
        """Look at the input through another window of the same size from now on."""
        self.estimator = dataclasses.replace(self.estimator, window=window)

    def sees_few_rows(self, x: Tensor) -> bool:
        """Whether every image of x ``(N, C, *spatial)`` is one row for a 1x1 convolution; published layers take it."""
        return len(x) > 0 and self._sees_single_pixels(x)

    def _sees_single_pixels(self, x: Tensor) -> bool:
        """:meth:`sees_few_rows`, or would if there were images: no process of several may wait for the others then."""
        return self._pointwise() and math.prod(x.shape[2:]) == 1

    def _pointwise(self) -> bool:
        convolution = self.estimator.kind in ("1x1", "depthwise")
        return convolution and self.window.taps == 1 and self.config.debias

    def scales_alone(self) -> bool:
        """Whether a step now has one gradient through the statistics, that of the scale, and in this process only."""
        alone = not (self.config.differentiable or self._shared())
        return alone and self.gathers_statistics() and bool(self.config.scale)

    def gathers_statistics(self) -> bool:
        """Whether a batch that comes in now is looked at: in training, unless frozen."""
        return self.training and not self.frozen

    def tell_mode(self) -> None:
        """Let the other processes know whether statistics are gathered here; to be called after a change of that."""
        self._told, self._checked = self.gathers_statistics(), False
        if self.gathers.is_inference() and not torch.is_inference_mode_enabled():
            self.gathers = self.gathers.clone()  # of a copy that was made in inference mode
        self.gathers.fill_(self._told)

    def _after_loading(self) -> None:
        super()._after_loading()
        self._agreed = False
        if self.gathers.device != self.num_steps.device:  # it is not saved, and stays where it was with assign=True
            self.gathers = torch.zeros_like(self.num_steps)
            self.tell_mode()

    def _check_mode(self) -> None:
        if self._told != self.gathers_statistics():  # `training` or `frozen` was assigned to
            self.tell_mode()
        elif not self._checked or self.gathers.device.type == "cpu":  # elsewhere, looking means waiting for the device
            check_same_mode(self._told, self.gathers, self.label)
            self._checked = True

    def remembered_in(self) -> list[Tensor | None]:
        """The buffers that :meth:`remembered` is made of."""
        return [self.running_mean, self.running_var, *self._matrices("running_root")]

    def remembered(self) -> Statistics:
        """The running values, as evaluation uses them: the identity where none have been gathered, and a warning.

        A 1x1 convolution does not warn: it may have been trained on single pixels.
        """
        if not self._pointwise():
            self._warn_of_identity()
        return self._running(self._matrices("running_root"))

    def _statistics(self, batch: Batch, roots: Sequence[Tensor]) -> Statistics:
        return Statistics(batch.mean, tuple(roots), batch.scale, batch.slope)

    def _ordinary(self, x: Tensor, by_hand: bool, checkpoint: Checkpoint | None, kernels: Any) -> Statistics:
        """Mean and scale of this batch, root of the last refresh."""
        if kernels is not None:
            batch = self._by_kernels(kernels, x, remember=True)
        else:
            with torch.no_grad() if by_hand else contextlib.nullcontext():
                batch = self._or_running(self._of_batch(x, by_hand))
            self._remember(batch, due=False)
        statistics = self._statistics(batch, [kept(root) for root in self._last_roots()])
        if checkpoint is not None:
            self._record(checkpoint, x, statistics, batch.counts, due=False)
        return statistics

    def _refresh(self, x: Tensor, by_hand: bool, checkpoint: Checkpoint | None, kernels: Any) -> Statistics:
        """Mean, scale and root of this batch, or the running ones where they cannot be used."""
        if kernels is not None:
            batch = self._by_kernels(kernels, x, remember=False)
            moments = self.estimator.sample_moments(x.detach(), self.num_updates, batch.scale, factored=True)
        else:
            batch, moments = self._of_batch_to_refresh(x, self.num_updates, by_hand)
        running, averages = self._matrices("running_root"), self._averages()
        counters = self._counters_for(batch)
        roots, new, counts = refreshed(self.estimator, moments, running, averages, counters, batch.counts)
        batch = self._or_running(batch._replace(counts=counts))
        statistics = self._statistics(batch, roots)
        if checkpoint is not None:
            self._record(checkpoint, x, statistics, counts, due=True)
        self._remember(batch, due=True)
        self._remember_roots(roots, new, counts)
        return statistics

    def _counters_for(self, batch: Batch) -> Counters:
        """Numbers where the batch has been looked at, too."""
        return self._counters(look=isinstance(batch.counts, bool))

    def _record(
        self, checkpoint: Checkpoint, x: Tensor, found: Statistics, counts: Tensor | bool, *, due: bool
    ) -> None:
        """Keep what the checkpoint will ask for again."""
        through_root = due and bool(self.config.differentiable)
        scale = None if found.scale is None else found.scale.detach()
        roots = None if through_root and counts is True else tuple(root.detach().clone() for root in found.roots)
        turn = self.num_updates.clone() if due else None
        key = self.estimator.mean_of(x.detach()).mean
        self._calls.add(checkpoint, Call(key, found.mean.detach(), scale, roots, counts, turn))

    def _call_before(self, x: Tensor, checkpoint: Checkpoint) -> Call | None:
        """The call that is recomputed, ``None`` for a step in a backward pass that is none."""
        call = self._calls.next(checkpoint) if checkpoint.repeats else None
        if call is None:
            with torch.no_grad():
                call = self._calls.nearest(checkpoint, self.estimator.mean_of(x).mean, self.label)
        if call is not None:
            self._calls.add(checkpoint, call)  # of checkpoints within, which are made anew
        return call

    def _repeated(self, x: Tensor, by_hand: bool, call: Call) -> Statistics:
        """What the same x was whitened by before, while activation checkpointing recomputes it.

        Gradients go the way that they went then: a checkpoint asks for the same tensors in the same order.
        """
        roots: Sequence[Tensor] | None = call.roots
        if call.turn is not None and (self.config.differentiable or self.config.sampling == "corner"):
            batch, moments = self._of_batch_to_refresh(x, call.turn, by_hand)
            if self.config.differentiable:
                before, averages = self._matrices("running_root") if roots is None else roots, self._averages()
                counters = self._counters_for(batch)
                roots = refreshed(self.estimator, moments, before, averages, counters, batch.counts).roots
        else:
            batch = self._of_batch(x, by_hand)
        assert roots is not None
        batch = self._or_else(batch._replace(counts=call.counts), call.mean, batch.var, call.scale)
        return self._statistics(batch, roots)

    def _opaque_refresh(self, x: Tensor) -> Statistics:
        """:meth:`_refresh` for a compiler that does not have to look inside."""
        batch = self._or_running(self._of_batch(x))
        scale = None if batch.scale is None else batch.scale.detach()
        before = torch.as_tensor(batch.counts, device=x.device)
        state = (self._matrices("running_root"), self._averages(), self._counters(), before)
        roots, new, counts = opaque_refresh(self.estimator, x.detach(), scale, *state)
        batch = self._or_running(batch._replace(counts=counts))
        self._remember(batch, due=True)
        self._remember_roots(roots, new, counts)
        return self._statistics(batch, roots)

    def _may_be_opaque(self) -> bool:
        """Whether a compiler need not see into a refresh: no gradient goes through it, no mean comes out of it.

        An eigendecomposition waits for a GPU, which a CUDA graph does not bear.
        """
        settings = self.config
        return not (settings.differentiable or settings.sampling == "corner" or settings.solver == "eigh")

    def train(self, mode: bool = True) -> Whitening:
        """Switch mode, say so to other processes, and look at the counters wherever they are."""
        super().train(mode)
        self.tell_mode()
        if not self.num_steps.is_meta:
            self._clock.follow(self.num_steps, self.num_updates, look=True)
            self._looked_at = self._looked_at or self._clock.updated  # or the first evaluation waits for the device
            self._report_skipped()
        return self

    def extra_repr(self) -> str:
        default = dataclasses.replace(self.estimator, config=WhiteningConfig()).config
        changed = [f"{name}={value!r}" for name, value in vars(self.config).items() if value != getattr(default, name)]
        kernel = "x".join(map(str, self.window.kernel_size)) or "linear"
        return ", ".join([f"{self.blocks.channels}", kernel, *changed])
