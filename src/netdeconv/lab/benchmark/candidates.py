"""The networks that are compared, and the steps they are timed at."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from netdeconv.lab.benchmark.settings import MemorySettings, StepSettings
from netdeconv.lab.devices import device_of
from netdeconv.lab.methods import Method
from netdeconv.lab.networks import network
from netdeconv.lab.norms import with_norm
from netdeconv.lab.optimizers import make_optimizer

__all__ = ["Training", "kinds", "move_to_step", "network", "period_of", "steady_step"]

# One batch of noise over and over would soon be learned, or diverge; a step of rate zero costs the same.
_RATE, _WEIGHT_DECAY = 0.0, 5e-4


def kinds(settings: MemorySettings) -> list[str]:
    """The methods that take part: batch normalisation first, then network deconvolution.

    Raises:
        ConfigError: there is no such method.
    """
    named = dict.fromkeys(["bn", "nd", *settings.against.split(",")])
    return [kind for kind in map(str, map(Method.named, named)) if not (kind == "nd-paper" and settings.no_paper)]


def candidate(kind: str, settings: MemorySettings) -> nn.Module:
    """The network by this name; always the same for one seed."""
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        # "small" is made for its images; other networks take any.
        size = (settings.network, settings.width, settings.classes)
        base = network(*size, in_channels=3, image_size=settings.size)
    return with_norm(base, Method.named(kind).norm, name=settings.network)


class Training:
    """One candidate with optimizer and data, ready to be stepped.

    Args:
        kind: name of a method.
        settings: what to run.

    Attributes:
        period: see :func:`period_of`.
    """

    def __init__(self, kind: str, settings: MemorySettings) -> None:
        self.settings, self.kind = settings, kind
        self.device = device_of(settings.device)
        layout = torch.channels_last if settings.channels_last else torch.contiguous_format
        self.model = candidate(kind, settings).to(self.device).to(memory_format=layout)
        self.period = period_of(self.model)
        draw = torch.Generator().manual_seed(settings.seed)
        images = torch.randn(settings.batch, 3, settings.size, settings.size, generator=draw)
        self.images = images.to(self.device).contiguous(memory_format=layout)
        self.labels = torch.randint(settings.classes, (settings.batch,), generator=draw).to(self.device)
        made = make_optimizer(Method.named(kind).optimizer, rate=_RATE, weight_decay=_WEIGHT_DECAY)
        self.optimizer = made(self.model.parameters())
        self.forward: Callable[[Tensor], Any] = self.model
        if isinstance(settings, StepSettings) and settings.compile:
            self.forward = torch.compile(self.model, mode=settings.compile_mode)
        self.loss: Tensor | None = None

    def step(self) -> None:
        """Forward, backward, and one step of the optimiser."""
        loss = self.loss_of_batch()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.loss = loss.detach()

    def loss_of_batch(self) -> Tensor:
        """The forward part of the step."""
        with self._autocast():
            output = self.forward(self.images)
        # torchvision's networks with several heads give the one of interest first, or as "logits"
        output = output if isinstance(output, Tensor) else getattr(output, "logits", output[0])
        return F.cross_entropy(output.float(), self.labels)

    def evaluate(self) -> Tensor:
        """One forward in evaluation mode; the caller has switched the mode."""
        with torch.no_grad(), self._autocast():
            return self.forward(self.images)

    def make_next_step(self, *, refresh: bool) -> None:
        """Put the clocks of all whitenings to steady state, where the next step refreshes or does not."""
        self.start_at(0 if refresh else 1)

    def start_at(self, steps: int) -> None:
        """Put the clocks so many steps after (before, if negative) a refresh long after the dense ones."""
        move_to_step(self.model, steady_step(self.period) + steps)

    def refreshes(self) -> int:
        """Refreshes so far, of the layers with the longest period: linear ones have one at every step."""
        slow = (whitening for whitening in _whitenings(self.model) if whitening.config.update_every == self.period)
        return max((int(whitening.num_updates) for whitening in slow), default=0)

    def _autocast(self) -> contextlib.AbstractContextManager[object]:
        half = self.settings.dtype == "bfloat16"
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=half)


def period_of(model: nn.Module) -> int:
    """Steps from one refresh to the next, of the layer that has the most; 1 where all steps are alike."""
    return max((whitening.config.update_every for whitening in _whitenings(model)), default=1)


def _whitenings(model: nn.Module) -> list[Any]:
    return [module.whitening for module in model.modules() if hasattr(module, "whitening")]


def steady_step(period: int) -> int:
    """A training step long after the dense refreshes of the start, and one that refreshes."""
    return 1024 * period


def move_to_step(model: nn.Module, step: int) -> None:
    """Let every whitening inside the model take its next training step for this one, as if resumed there.

    Goes the way of a resumed run, by the state dict, so that buffers and clocks agree.
    """
    state: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        if name.endswith("num_steps"):
            last = name.removesuffix("num_steps") + "last_update"
            state |= {name: torch.full_like(value, step), last: torch.full_like(value, max(0, step - 1))}
    model.load_state_dict(state, strict=False)
