"""From a network with batch normalisation to one with whitened layers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from torch import nn

from netdeconv.errors import ConfigError
from netdeconv.surgery.first_run import FirstRun
from netdeconv.surgery.freshness import sole_readers
from netdeconv.surgery.layers import Setting, setting_for, whitened_twin
from netdeconv.surgery.plan import Action, ConversionPlan
from netdeconv.surgery.preserve import preserved
from netdeconv.surgery.recognise import BatchNorm, batch_norm
from netdeconv.surgery.rewrite import Rule, rule_for
from netdeconv.surgery.select import Selection
from netdeconv.surgery.survey import check_model, survey
from netdeconv.surgery.transplant import become, copied

if TYPE_CHECKING:
    from netdeconv.surgery.select import Pattern

__all__ = ["convert", "converted"]

Model = TypeVar("Model", bound=nn.Module)


def convert(
    model: Model,
    whitening: Setting = None,
    *,
    include: Pattern | Iterable[Pattern] | None = None,
    exclude: Pattern | Iterable[Pattern] | None = None,
    rules: Mapping[type, Rule] | None = None,
    preserve: Any = None,
    call: Callable[[nn.Module, Any], Any] | None = None,
) -> Model:
    """A new model with whitened convolutions and linear layers, and no batch normalisation; the old one is untouched.

    Without ``preserve``, a network to be trained from scratch: batch norms are gone with their scales and shifts,
    layers keep their weights and gain a bias (zero) where they have none.

    With ``preserve``, a network to be fine-tuned: its evaluation output on any input is the old one's. Batch
    norms are folded into the layer that feeds them, where they are its only reader, and become a fixed scale
    and shift elsewhere; whitening statistics are those of the data, and weights are re-expressed so that whitening
    cancels out. Layers that the data never reach, not even in branches that only training takes, and layers whose
    weight is shared or read elsewhere, stay plain.

    Device, dtype, training flags, ``requires_grad``, forward and backward hooks stay, and modules and parameters
    that are shared stay shared. What could not be converted is listed by :func:`netdeconv.plan_conversion`.

    Args:
        model: any module.
        whitening: settings for all layers, of which each chooses by its kind what is ``None`` in them; or a function of
            path and layer that returns settings. ``None`` for the defaults.
        include, exclude, rules: see :func:`netdeconv.plan_conversion`.
        preserve: batches to be run through the model: a tensor, or an iterable of them. Of a list or tuple the
            first entry is taken, as data loaders give ``(images, labels)``; a mapping is passed by keyword.
        call: how a batch is run, ``call(model, batch)``, where the above does not fit.

    Raises:
        ConfigError: see :func:`netdeconv.plan_conversion`; also a model that cannot be copied, or no data.
        NumericalError: with ``preserve``, the result does not compute what the old model does.

    Warns:
        UserWarning: batch norms are left that nobody asked to leave; with ``preserve``, also layers. From the new
            model, when it first runs: something else than a whitened layer reads its weight, which no whitening
            reaches there.

    Example:
        >>> import netdeconv
        >>> from netdeconv.zoo import create
        >>> model = netdeconv.convert(create("vgg11"))
    """
    return converted(model, whitening, include, exclude, rules, preserve, call)[0]


def converted(
    model: Model,
    whitening: Setting,
    include: Pattern | Iterable[Pattern] | None,
    exclude: Pattern | Iterable[Pattern] | None,
    rules: Mapping[type, Rule] | None,
    preserve: Any,
    call: Callable[[nn.Module, Any], Any] | None,
) -> tuple[Model, ConversionPlan]:
    """The converted model, and what was done to it."""
    selection = Selection(include, exclude)
    check_model(model)  # refuse before the work of copying
    new = copied(model, "convert")
    FirstRun.remove(new)
    plan = _rewrite(new, whitening, selection, rules)
    selection.check_used()
    _warn_of_leftovers(plan)
    if preserve is None:
        _from_scratch(new, plan, whitening)
    else:
        plan = preserved(new, plan, whitening, preserve, call)
    FirstRun.install(new)
    return new, plan


def _from_scratch(new: nn.Module, plan: ConversionPlan, whitening: Setting) -> None:
    """Carry out the plan, in place."""
    gone = bool([entry for entry in plan.where(Action.REMOVE) if entry.norm])
    modules = {entry.path: new.get_submodule(entry.path) for entry in plan}
    alone = sole_readers(new)
    for entry in plan:
        module = modules[entry.path]
        if entry.action is Action.WHITEN:
            become(module, whitened_twin(module, setting_for(whitening, entry.path, module), entry.path, gone))
        elif entry.action is Action.REMOVE:
            found = batch_norm(module)
            assert isinstance(found, BatchNorm)
            become(module, found.without(alone=module in alone))


def _rewrite(
    model: nn.Module, whitening: Setting, selection: Selection, rules: Mapping[type, Rule] | None
) -> ConversionPlan:
    """Rewrite, in place, what rules apply to, until no rule applies; the plan of the result."""
    done: dict[nn.Module, bool] = {}
    while True:
        plan = survey(model, whitening, selection, rules, done)
        entries = plan.where(Action.REWRITE)
        if not entries:
            return plan
        for path, module in [(entry.path, model.get_submodule(entry.path)) for entry in entries]:
            rule = rule_for(module, rules)
            new = None if rule is None else rule[0](module)
            done[module] = new is not None
            if new is None:
                continue
            if not isinstance(new, nn.Module) or module in new.modules():
                raise ConfigError(
                    f"rules: expected a new module in place of {path} ({type(module).__name__}), one without the "
                    f"old inside, got {type(new).__name__}. Build a new one around its parameters."
                )
            become(module, new)


def _warn_of_leftovers(plan: ConversionPlan) -> None:
    left = [f"{entry.path} ({entry.why})" for entry in plan.batch_norms_left if not entry.asked]
    if left:
        shown = ", ".join(left[:5]) + (f", and {len(left) - 5} more" if len(left) > 5 else "")
        warnings.warn(
            f"convert: {len(left)} batch norms are left: {shown}. Pass rules= for them, or exclude= to leave them.",
            UserWarning,
            stacklevel=4,
        )
