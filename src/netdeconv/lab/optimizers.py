"""Optimisers by name: SGD, AdamW, and Muon with AdamW for what is no matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["OPTIMIZERS", "MuonAndAdamW", "make_optimizer"]

OPTIMIZERS = {"sgd": "SGD", "adamw": "AdamW", "muon": "Muon"}

_MOMENTUM = 0.9  # of SGD
_DECAY = 0.05  # of AdamW and Muon, decoupled, times the learning rate


def make_optimizer(
    name: str, *, rate: float, weight_decay: float
) -> Callable[[Iterable[Any]], torch.optim.Optimizer]:
    """What makes the optimiser from parameters, or groups of them.

    Args:
        name: one of :data:`OPTIMIZERS`. SGD has momentum 0.9; AdamW and Muon have a weight decay of 0.05.
        rate: learning rate.
        weight_decay: of SGD.
    """
    if name == "sgd":
        return lambda groups: torch.optim.SGD(groups, lr=rate, momentum=_MOMENTUM, weight_decay=weight_decay)
    kind: Any = {"adamw": torch.optim.AdamW, "muon": MuonAndAdamW}[name]
    return lambda groups: kind(groups, lr=rate, weight_decay=_DECAY)


class MuonAndAdamW(torch.optim.Optimizer):
    """:class:`torch.optim.Muon` for weights of hidden layers, :class:`torch.optim.AdamW` for the rest, at one rate.

    Weights of convolutions are matrices of one row for each output channel. Muon's steps are as long as AdamW's
    (``adjust_lr_fn="match_rms_adamw"``), so that one rate and one weight decay serve both. AdamW has, as Muon's authors
    advise, the weights of the first and the last layer, and all that is no matrix: vectors, and matrices with at most
    as many columns as a colour or a kernel's taps (9: of a depthwise convolution).

    The first layer is the first convolution, with whatever comes before it (an embedding of positions), or the first
    matrix if there is no convolution; the last one has the last matrix. So parameters must come in the order of the
    layers, as :meth:`torch.nn.Module.parameters` gives them.

    Args:
        params: parameters, or groups of them; all of them, none can be added later.
        lr, weight_decay: of both; those of a group may be changed between steps.

    Source: Jordan et al., Muon: An optimizer for hidden layers in neural networks, 2024.
    """

    def __init__(self, params: Iterable[Any], *, lr: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self._parts: list[tuple[torch.optim.Optimizer, int]] = []  # and the number of its group
        self._matrices: list[tuple[nn.Parameter, nn.Parameter]] = []  # a weight, and the matrix in the same memory
        hidden = _hidden_weights([p for group in self.param_groups for p in group["params"]])
        for number, group in enumerate(self.param_groups):
            weights = [p for p in group["params"] if any(p is weight for weight in hidden)]
            others = [p for p in group["params"] if all(p is not weight for weight in weights)]
            matrices = [nn.Parameter(_as_matrix(p.detach(), like=p)) for p in weights]
            self._matrices += zip(weights, matrices, strict=True)
            if matrices:
                muon = torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
                self._parts.append((muon, number))
            if others:
                self._parts.append((torch.optim.AdamW(others, lr=lr, weight_decay=weight_decay), number))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuse another group, which no optimiser would take a step for.

        Raises:
            ValueError: always, once the optimiser is made.
        """
        if hasattr(self, "_parts"):
            raise ValueError(
                "MuonAndAdamW: expected all parameters when the optimiser is made, got another group. Make a new one "
                "with all of them."
            )
        super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """The groups, and what both optimisers keep."""
        return {**super().state_dict(), "parts": [part.state_dict() for part, _ in self._parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """What :meth:`state_dict` gave."""
        super().load_state_dict({name: value for name, value in state_dict.items() if name != "parts"})
        for (part, _), state in zip(self._parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of both, at the learning rates and weight decays that the groups have now."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for weight, matrix in self._matrices:
            matrix.data = _as_matrix(weight.detach(), like=weight)  # the weight may have been moved
            matrix.grad = None if weight.grad is None else _as_matrix(weight.grad, like=weight)
        for part, number in self._parts:
            for own in part.param_groups:
                own |= {name: self.param_groups[number][name] for name in ("lr", "weight_decay")}
            part.step()
        return loss


def _hidden_weights(params: list[Tensor]) -> list[Tensor]:
    """The weights of layers between the first and the last one."""
    weights = [p for p in params if p.dim() > 1]
    first = next((number for number, p in enumerate(weights) if p.dim() > 2), 0)
    return [p for p in weights[first + 1 : -1] if p[0].numel() > 9]


def _as_matrix(tensor: Tensor, *, like: Tensor) -> Tensor:
    """``(out, ...)`` to ``(out, columns)`` in the order of the memory of ``like``, which is then not copied."""
    if like.dim() == 4 and not like.is_contiguous():
        tensor = tensor.permute(0, 2, 3, 1)  # channels last
    return tensor.reshape(len(tensor), -1)
