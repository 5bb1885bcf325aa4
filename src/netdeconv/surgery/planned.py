"""Telling what a conversion would do, without doing it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from netdeconv.surgery.convert import converted
from netdeconv.surgery.select import Selection
from netdeconv.surgery.survey import survey

if TYPE_CHECKING:
    from torch import nn

    from netdeconv.surgery.layers import Setting
    from netdeconv.surgery.plan import ConversionPlan
    from netdeconv.surgery.rewrite import Rule
    from netdeconv.surgery.select import Pattern

__all__ = ["plan_conversion"]


def plan_conversion(
    model: nn.Module,
    whitening: Setting = None,
    *,
    include: Pattern | Iterable[Pattern] | None = None,
    exclude: Pattern | Iterable[Pattern] | None = None,
    rules: Mapping[type, Rule] | None = None,
    preserve: Any = None,
    call: Callable[[nn.Module, Any], Any] | None = None,
) -> ConversionPlan:
    """What :func:`netdeconv.convert` would do to every module of a model, and why; nothing is touched.

    Layers and batch norms are taken as they stand in the module tree, wherever that is. Left as they are, with
    the reason in the plan: layers whose weights are read by another module's forward (attention projections of
    ``torch.nn.MultiheadAttention``, say), subclasses with a forward of their own, parametrised, quantised, lazy
    and transposed layers, 1x1 convolutions that are seen to stand behind a global pooling (in an ``nn.Sequential``, or
    in squeeze and excitation), and the batch norms next to them, whose place no whitening takes.

    Args:
        model: any module.
        whitening: as in :func:`netdeconv.convert`. The published procedure whitens behind a global pooling, too.
        include, exclude: paths (``"layer4"``, ``"*.conv1"``) or module classes, both with everything inside, or
            functions of path and module. All modules by default. A layer behind a global pooling that a path or a
            function of ``include`` chooses itself is whitened; where its map does turn out to be of one pixel
            only, it computes what the plain layer does all the same.
        rules: for a module class a function that takes a module of it and returns plain torch modules that compute
            the same; these are then looked at in turn. ``None`` returned leaves the module.
        preserve, call: as in :func:`netdeconv.convert`, for the plan of a conversion that preserves the output: it
            says which batch norms are folded and which become a fixed scale and shift. That is known only after
            the data have run, so the conversion is done, on a copy, and its result dropped.

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
    if preserve is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # what they say stands in the plan
            return converted(model, whitening, include, exclude, rules, preserve, call)[1]
    selection = Selection(include, exclude)
    plan = survey(model, whitening, selection, rules, {})
    selection.check_used()
    return plan
