"""Going through a model and deciding what a conversion does to every module."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from netdeconv.errors import ConfigError
from netdeconv.surgery.layers import (
    Setting,
    holds_modules,
    is_layer,
    is_quantised,
    is_whitened,
    setting_for,
    whitened_twin,
    why_not_whiten,
)
from netdeconv.surgery.norms import batch_norm, is_like_batch_norm
from netdeconv.surgery.plan import Action, ConversionPlan, Entry, Selection
from netdeconv.surgery.record import Record
from netdeconv.surgery.rules import Rule, rule_for
from netdeconv.surgery.structure import Structure, is_pointwise

__all__ = ["Wishes", "check_model", "survey"]

_WRAPPERS = {"OptimizedModule", "DataParallel", "DistributedDataParallel", "FullyShardedDataParallel"}
_POOLED = "behind a global pooling it sees one row per image"
_FROZEN = "frozen (requires_grad=False): a fixed function, not a layer that learns"
_TAKEN = "whitening takes its place"


@dataclasses.dataclass(frozen=True)
class Wishes:
    """What the user asks of a conversion.

    Attributes:
        whitening, selection, rules: see :func:`netdeconv.convert`.
        rewritten: for modules that a rule has seen, whether it rewrote them.
    """

    whitening: Setting
    selection: Selection
    rules: Mapping[type, Rule] | None
    rewritten: dict[nn.Module, bool] = dataclasses.field(default_factory=dict)


def survey(model: nn.Module, wishes: Wishes, record: Record | None = None) -> ConversionPlan:
    """The plan of a model, from what was seen while it ran.

    Without a record it is made from the module tree alone, and batch norms that the tree does not tell about wait for
    the first forward.
    """
    return _Survey(model, wishes, record).plan()


class _Survey:
    def __init__(self, model: nn.Module, wishes: Wishes, record: Record | None) -> None:
        self.model, self.wishes, self.has_run = model, wishes, record is not None
        self.record = Record() if record is None else record
        self.tree = Structure(model)
        self.entries: dict[nn.Module, Entry] = {}
        self.included: set[nn.Module] = set()
        # Layers whose calls go to one batch norm here and to another there, by the tree and by the run.
        self.several = {**self.tree.several, **self.record.shared()}

    def plan(self) -> ConversionPlan:
        hidden: set[nn.Module] = set()  # inside a module that goes as a whole
        left: dict[nn.Module, Entry] = {}  # inside a layer or batch norm that is left: that one
        for path, aliases, module in _places(self.model):
            entry = Entry(path, type(module).__name__, Action.KEEP, "part of the module above", aliases)
            if module not in hidden:
                entry = self._decide(entry, module)
                goes = entry.action in (Action.REMOVE, Action.WHITEN)
                if goes and module in left and (entry.norm or is_quantised(module)):
                    entry = _left(entry, f"inside {left[module].path}, which is left", left[module])
                if entry.action in (Action.WHITEN, Action.REMOVE, Action.REWRITE):
                    hidden |= set(module.modules())
                elif entry.action is Action.LEAVE and not self._calls_batch_norm(module):
                    left |= dict.fromkeys(set(module.modules()) - {module} - set(left), entry)
            self.entries[module] = entry
        for norm, entry in list(self.entries.items()):
            if entry.action is Action.REMOVE:
                self.entries[norm] = self._settled(norm, entry)
        gone = any(entry.norm and entry.action in (Action.REMOVE, Action.WAIT) for entry in self.entries.values())
        return ConversionPlan(tuple(self._finished(module, entry, gone) for module, entry in self.entries.items()))

    def _calls_batch_norm(self, module: nn.Module) -> bool:
        """Whether it does so by function, and is nothing else that the conversion is about."""
        return module in self.record.by_function and not (is_like_batch_norm(module) or is_layer(module))

    def _decide(self, entry: Entry, module: nn.Module) -> Entry:
        """The entry of one module by itself, filled in."""
        if is_whitened(module):
            return _line(entry, Action.KEEP, "whitened already")
        norm, by_function = is_like_batch_norm(module), self._calls_batch_norm(module)
        wishes, selection = self.wishes, self.wishes.selection
        rule = None if module in wishes.rewritten else rule_for(module, wishes.rules)
        unwanted = selection.why_not(entry.path, module)  # asked of containers, too: each pattern has to match
        if not (norm or by_function or rule is not None or is_layer(module)):
            return _line(entry, Action.KEEP, _why_kept(module))
        entry = dataclasses.replace(entry, norm=norm or by_function)
        if unwanted is not None:
            return _left(entry, unwanted, asked=True)
        if by_function:
            return _left(entry, f"{entry.kind} calls batch_norm by function")
        if wishes.rewritten.get(module) is False:
            return _left(entry, "left by its rule", asked=True)
        if selection.names(entry.path, module):
            self.included.add(module)
        if module in self.tree.read:
            return _left(entry, self.tree.read[module])
        if module in self.record.weights and module not in self.included:
            return _left(entry, f"its weight is read elsewhere ({self.record.weights[module]})")
        if rule is not None:
            return _line(entry, Action.REWRITE, rule[1], rule[0])
        return self._decide_norm(entry, module) if norm else self._decide_layer(entry, module)

    def _decide_norm(self, entry: Entry, module: nn.Module) -> Entry:
        found = batch_norm(module)
        if isinstance(found, str):
            return _left(entry, found)
        stays = f"; {', '.join(type(child).__name__ for child in found.after.values())} stays" if found.after else ""
        ran = module in self.record.sources
        copies = module in self.record.written if ran else module not in self.tree.fresh
        return _line(entry, Action.REMOVE, _TAKEN + stays, dataclasses.replace(found, copies=copies))

    def _decide_layer(self, entry: Entry, module: Any) -> Entry:
        reason = why_not_whiten(module)
        if reason is not None:
            return _left(entry, reason)
        setting = setting_for(self.wishes.whitening, entry.path, module)
        if module not in self.included:
            if not module.weight.requires_grad:
                return _left(entry, _FROZEN, asked=True)
            if module in self.several:
                return _left(entry, _several_norms(self.model, self.several[module]))
            pooled = module in self.tree.pooled or (is_pointwise(module) and self.record.rows.get(module, False))
            published = setting is not None and not setting.debias  # which whitens behind a pooling, too
            if pooled and not (entry.aliases or published):
                return _left(entry, _POOLED)
        why = "linear layer" if isinstance(module, nn.Linear) else "convolution"
        return _line(entry, Action.WHITEN, why, functools.partial(whitened_twin, whitening=setting, path=entry.path))

    def _settled(self, norm: nn.Module, entry: Entry) -> Entry:
        """Keep a batch norm that no whitened layer takes the place of, or of which nothing tells yet."""
        if self.wishes.selection.insists(entry.path):
            return entry
        place = functools.partial(_name, self.entries)
        if norm in self.record.sources:
            kept = self.record.why_kept(norm, self._is_whitened, place)
            return entry if kept is None else _left(entry, kept[0], self.entries.get(kept[1] or norm))
        beside = self.tree.neighbours[norm]
        plain = next((layer for layer in beside.before if not self._is_whitened(layer)), None)
        if plain is not None and (beside.sure or plain in self.tree.pooled):
            return _left(entry, f"it normalises the output of {place(plain)}", self.entries.get(plain))
        if norm in self.included and plain is None:  # what the tree does not tell is the user's to say
            return entry
        taken = bool(beside.before) or any(map(self._is_whitened, beside.after))
        told = beside.rivals is not None and all(map(self._is_whitened, beside.before | beside.rivals))
        if taken and (beside.sure or told):
            return entry
        if not any(map(self._is_whitened, self.entries)):
            return _left(entry, "no whitened layer takes its place")
        if self.has_run:
            return _left(entry, "the example does not reach it, and the module tree does not show what feeds it")
        why = "stays until the first forward shows what feeds it, and what reads it"
        return _line(entry, Action.WAIT, why, entry.build)

    def _is_whitened(self, layer: nn.Module) -> bool:
        entry = self.entries.get(layer)
        goes = entry is not None and entry.action in (Action.WHITEN, Action.REWRITE) and not entry.norm
        return goes or is_whitened(layer)

    def _finished(self, module: Any, entry: Entry, gone: bool) -> Entry:
        """With what depends on whether any batch norm goes."""
        if entry.action is Action.WHITEN:
            build: Any = entry.build
            why = f"{entry.why}, gains a bias" if gone and module.bias is None else entry.why
            return _line(entry, Action.WHITEN, why, functools.partial(build, with_bias=gone))
        stopped = gone and getattr(module, "inplace", None) is True and not entry.why.startswith("part")
        if stopped and entry.action not in (Action.REMOVE, Action.WAIT):
            return dataclasses.replace(entry, why=f"{entry.why}; no longer in place")
        return entry


def _name(entries: Mapping[nn.Module, Entry], layer: nn.Module) -> str:
    """A layer that stays, by its path, and what it is."""
    entry = entries.get(layer)
    path = "the model" if entry is None or not entry.path else entry.path
    if entry is not None and entry.action is Action.LEAVE:
        return f"{path}, which is left"
    return f"{path} ({type(layer).__name__}), which is not whitened"


def _several_norms(model: nn.Module, norms: list[nn.Module]) -> str:
    paths = {module: path for path, module in model.named_modules()}
    names = [paths.get(norm, "?") for norm in norms]
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f"it feeds several batch norms ({shown}), each with statistics of its own"


def _line(entry: Entry, action: Action, why: str, build: Callable[[Any], Any] | None = None) -> Entry:
    return dataclasses.replace(entry, action=action, why=why, build=build)


def _left(entry: Entry, why: str, cause: Entry | None = None, asked: bool = False) -> Entry:
    asked = asked or (cause is not None and cause.asked)
    return dataclasses.replace(entry, action=Action.LEAVE, why=why, asked=asked, build=None)


def _places(model: nn.Module) -> Iterator[tuple[str, tuple[str, ...], nn.Module]]:
    """Every module once: its first path, its other paths, itself."""
    paths: dict[nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(module, []).append(path)
    for module, (first, *others) in paths.items():
        yield first, tuple(others), module


def _why_kept(module: nn.Module) -> str:
    if holds_modules(module):
        return "container"
    if "norm" in type(module).__name__.lower():
        return "a normalisation, but not a batch norm"
    return "no convolution, linear layer or batch norm"


def check_model(model: Any) -> None:
    """Refuse what cannot be converted at all.

    Raises:
        TypeError: not a module.
        ConfigError: scripted, compiled or wrapped for parallel training.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"convert: expected a torch.nn.Module, got {type(model).__name__}.")
    for path, module in model.named_modules():
        place = f"{path}: " if path else ""
        if isinstance(module, torch.jit.ScriptModule):
            raise ConfigError(
                f"{place}expected Python code, got a scripted or traced module. Convert before scripting."
            )
        if type(module).__name__ in _WRAPPERS:
            raise ConfigError(
                f"{place}expected the model itself, got it wrapped as {type(module).__name__}. Convert the module "
                "inside first, then compile or distribute the result."
            )
