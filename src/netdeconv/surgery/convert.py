"""From a network with batch normalisation to one with whitened layers, and a plan of what that would do."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from torch import nn

from netdeconv.errors import ConfigError
from netdeconv.surgery.batches import Caller
from netdeconv.surgery.first_run import FirstRun, InDoubt
from netdeconv.surgery.layers import Setting, become, copied
from netdeconv.surgery.plan import Action, ConversionPlan, Patterns, Selection, shown
from netdeconv.surgery.preserve import preserved, record_of
from netdeconv.surgery.rules import Rule
from netdeconv.surgery.survey import Wishes, check_model, survey

if TYPE_CHECKING:
    from netdeconv.surgery.record import Record

__all__ = ["convert", "plan_conversion"]

Model = TypeVar("Model", bound=nn.Module)


def convert(
    model: Model,
    whitening: Setting = None,
    *,
    include: Patterns = None,
    exclude: Patterns = None,
    rules: Mapping[type, Rule] | None = None,
    example: Any = None,
    preserve: Any = None,
    call: Caller = None,
) -> Model:
    """A copy of a model with whitened convolutions and linear layers, and without batch normalisation.

    Without ``preserve``, the copy is to be trained from scratch. Batch norms are removed with their scales and shifts;
    layers keep their weights, and gain a bias of zero where they have none. A batch norm is removed where whitening
    takes its place: where the layer that feeds it is whitened or, if no layer feeds it alone, one that reads it.

    With ``example``, the conversion runs a copy of the model once, to see which layer feeds which batch norm. Without
    it the module tree decides. What the tree leaves open, the first forward of the new model completes and corrects,
    in whatever mode, with a warning that says how: waiting batch norms are removed or kept, and layers whose weight is
    read elsewhere become plain again, with the same parameters. Pass an example if the model is wrapped, or its
    optimizer made, before it first runs.

    With ``preserve``, the copy is to be fine-tuned: in evaluation it computes what the old model does, on any input.
    Batch norms are folded into the layer that feeds them, where they are its only consumer, and become a fixed scale
    and shift elsewhere. Whitening statistics are those of the data, and weights are re-expressed so that whitening
    cancels out. Layers that the data never reach, not even in branches that only training takes, and layers whose
    weight is shared or read elsewhere, stay plain.

    Where batch norms are removed, activations no longer work in place, and where an operation in place was seen behind
    a batch norm, a clone takes its place, so that no layer's output is overwritten. Device, dtype, training flags,
    ``requires_grad``, forward and backward hooks are kept, and shared modules and parameters stay shared.
    :func:`netdeconv.plan_conversion` lists what could not be converted.

    Args:
        model: any module.
        whitening: settings for all layers, in which ``None`` is chosen by the kind of layer; or a function of path and
            layer that returns settings. ``None`` for the defaults.
        include, exclude, rules: see :func:`netdeconv.plan_conversion`.
        example: one batch, whose values do not matter: a tensor; a list or tuple, of which the first entry is passed,
            as data loaders give ``(images, labels)``; or a mapping, passed by keyword.
        preserve: batches to run through the model: a tensor, or an iterable of batches like ``example``, which is not
            needed then.
        call: how to run a batch, ``call(model, batch)``, where the above does not fit.

    Raises:
        ConfigError: see :func:`netdeconv.plan_conversion`; also a model that cannot be copied, or no data.
        NumericalError: with ``preserve``, the result does not compute what the old model does.

    Warns:
        UserWarning: batch norms are left without being excluded; with ``preserve``, also layers; all layers are
            frozen. From the new model, when it first runs: what it changed.

    Example:
        >>> import netdeconv
        >>> from netdeconv.zoo import create
        >>> model = netdeconv.convert(create("vgg11"))
    """
    return _converted(model, Wishes(whitening, Selection(include, exclude), rules), example, preserve, call)[0]


def plan_conversion(
    model: nn.Module,
    whitening: Setting = None,
    *,
    include: Patterns = None,
    exclude: Patterns = None,
    rules: Mapping[type, Rule] | None = None,
    example: Any = None,
    preserve: Any = None,
    call: Caller = None,
) -> ConversionPlan:
    """What :func:`netdeconv.convert` would do to every module of a model, and why; the model is not changed.

    Left as they are, with the reason in the plan: layers whose weight is read elsewhere (such as the projections of
    ``torch.nn.MultiheadAttention``), subclasses with a forward of their own, parametrised, quantised, lazy, transposed
    and frozen layers, 1x1 convolutions behind a global pooling, layers that feed several batch norms in different
    calls; and the batch norms of all these and of layers that are not torch's, as no whitening takes their place.
    Without ``example``, batch norms wait for the first forward where the module tree does not show what feeds them.

    Args:
        model: any module.
        whitening: as in :func:`netdeconv.convert`. The paper's procedure whitens behind a global pooling, too.
        include, exclude: paths (``"layer4"``, ``"*.conv1"``) or module classes, both with everything inside, or
            functions of path and module. All modules by default. What a path or a function of ``include`` matches
            directly is converted wherever possible, also a frozen layer, or one behind a global pooling (which
            computes what the plain one does while the map is one pixel).
        rules: from a module class to a function that takes such a module and returns plain torch modules that compute
            the same, which are then converted like any other; or ``None``, which leaves the module.
        example, preserve, call: as in :func:`netdeconv.convert`. With ``preserve`` the plan says which batch norms are
            folded and which become a fixed scale and shift. A copy is converted to find out, and dropped.

    Returns:
        A :class:`ConversionPlan`; ``print`` it for the table.

    Raises:
        ConfigError: the model is compiled, scripted or wrapped for parallel training; a pattern matches nothing.
        TypeError: not a module.
        NumericalError: with ``preserve``, as in :func:`netdeconv.convert`.

    Example:
        >>> from torch import nn
        >>> from netdeconv import plan_conversion
        >>> print(plan_conversion(nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())))
        path  module       action  why
        0     Conv2d       whiten  convolution, gains a bias
        1     BatchNorm2d  remove  whitening takes its place
        1 layers whitened, 1 of 1 batch norms gone, 0 left as they are, 2 not concerned
    """
    wishes = Wishes(whitening, Selection(include, exclude), rules)
    if preserve is not None or example is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # what they say stands in the plan
            return _converted(model, wishes, example, preserve, call)[1]
    check_model(model)
    plan = survey(model, wishes)
    wishes.selection.check_used()
    return plan


def _converted(
    model: Model, wishes: Wishes, example: Any, preserve: Any, call: Caller
) -> tuple[Model, ConversionPlan]:
    """The converted model, and what was done to it."""
    if example is not None and preserve is not None:
        raise ConfigError(
            "convert: expected example= or preserve=, got both. The data of preserve= show all that an example does."
        )
    check_model(model)
    new = copied(model, "convert")
    FirstRun.remove(new)
    plan = _rewrite(new, wishes)
    wishes.selection.check_used()
    # What stood before a batch norm is what activations are given when it is gone, and others may read that.
    in_place: list[Any] = [module for module in new.modules() if getattr(module, "inplace", None) is True]
    for module in in_place:
        module.inplace = False

    def decide(record: Record | None) -> ConversionPlan:
        found = survey(new, wishes, record)
        _warn_of_leftovers(found)
        return found

    if preserve is not None:
        plan = preserved(new, plan, decide, preserve, call)
    else:
        plan = decide(None if example is None else record_of(new, example, call))
        modules = [(entry, new.get_submodule(entry.path)) for entry in plan]
        included = [module for entry, module in modules if wishes.selection.names(entry.path, module)]
        in_doubt = [
            InDoubt(module, entry, copy.copy(module) if entry.action is Action.REMOVE else None)
            for entry, module in modules
            if entry.action in (Action.REMOVE, Action.WAIT)
        ]
        for entry, module in modules:
            if entry.action in (Action.WHITEN, Action.REMOVE) and entry.build is not None:
                become(module, entry.build(module))
        if example is None:
            FirstRun(in_doubt, included, in_place if in_doubt else []).install(new)
    if not plan.where(Action.REMOVE, Action.WAIT, Action.FOLD, Action.AFFINE):
        for module in in_place:
            module.inplace = True
    return new, plan


def _rewrite(model: nn.Module, wishes: Wishes) -> ConversionPlan:
    """Rewrite, in place, what rules apply to, until no rule applies; the plan of the result."""
    while True:
        plan = survey(model, wishes)
        entries = plan.where(Action.REWRITE)
        if not entries:
            return plan
        for entry, module in [(entry, model.get_submodule(entry.path)) for entry in entries]:
            new = None if entry.build is None else entry.build(module)
            wishes.rewritten[module] = new is not None
            if new is None:
                continue
            if not isinstance(new, nn.Module) or module in new.modules():
                raise ConfigError(
                    f"rules: expected a new module in place of {entry.path} ({entry.kind}), one without the "
                    f"old inside, got {type(new).__name__}. Build a new one around its parameters."
                )
            become(module, new)


def _warn_of_leftovers(plan: ConversionPlan) -> None:
    norms = [entry for entry in plan.where(Action.LEAVE) if entry.norm and not entry.asked]
    left = [f"{entry.path or 'the model'} ({entry.why})" for entry in norms]
    if left:
        warnings.warn(
            f"convert: {len(left)} batch norms are left: {shown(left)}. Pass rules= for them, or exclude= to leave "
            "them.",
            UserWarning,
            stacklevel=5,
        )
    layers = [entry for entry in plan.where(Action.LEAVE) if not entry.norm]
    if not plan.where(Action.WHITEN) and any("requires_grad" in entry.why for entry in layers):
        warnings.warn(
            "convert: expected layers that learn, got frozen ones only (requires_grad=False), which stay as they are. "
            "Convert before you freeze, or name them by include=, as include='*'.",
            UserWarning,
            stacklevel=5,
        )
