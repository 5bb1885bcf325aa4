"""Going through a model and deciding what a conversion does to every module."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from netdeconv.config import WhiteningConfig
from netdeconv.errors import ConfigError
from netdeconv.nn import ChannelWhitening, Whitening
from netdeconv.nn.layer import WhitenedLayer
from netdeconv.surgery.flow import Flow
from netdeconv.surgery.layers import Setting, setting_for
from netdeconv.surgery.plan import Action, ConversionPlan, Entry
from netdeconv.surgery.pooled import behind_global_pooling
from netdeconv.surgery.recognise import batch_norm, is_layer, is_like_batch_norm, is_quantised, why_not_whiten
from netdeconv.surgery.rewrite import Rule, rule_for
from netdeconv.surgery.select import Selection
from netdeconv.surgery.usage import normalises_by_function, read_by_others

__all__ = ["check_model", "survey"]

_WRAPPERS = {"OptimizedModule", "DataParallel", "DistributedDataParallel", "FullyShardedDataParallel"}


def survey(
    model: nn.Module,
    whitening: Setting,
    selection: Selection,
    rules: Mapping[type, Rule] | None,
    rewritten: Mapping[nn.Module, bool],
) -> ConversionPlan:
    """The plan of a model; ``rewritten`` says for modules that a rule has seen whether it rewrote them."""
    check_model(model)
    read = read_by_others(model)
    pooled = behind_global_pooling(model)
    entries: dict[nn.Module, Entry] = {}
    hidden: set[nn.Module] = set()  # inside a module that goes as a whole
    left: dict[nn.Module, Entry] = {}  # inside a layer or batch norm that is left: that one
    for path, aliases, module in _places(model):
        entry = Entry(path, type(module).__name__, Action.KEEP, "", aliases)
        if module in hidden:
            entries[module] = dataclasses.replace(entry, why="part of the module above")
            continue
        rule = None if module in rewritten else rule_for(module, rules)
        concerned = rule is not None or is_like_batch_norm(module) or is_layer(module)  # by itself, not for its parts
        entry = _decide(entry, module, rule is not None, concerned, selection, read)
        if rewritten.get(module) is False:
            entry = dataclasses.replace(entry, action=Action.LEAVE, why="left by its rule", asked=True)
        if rule is not None and entry.action is Action.REWRITE:
            entry = dataclasses.replace(entry, why=rule[1])
        if module in left and (entry.norm or is_quantised(module)) and entry.action in (Action.REMOVE, Action.WHITEN):
            entry = _left_with(entry, f"inside {left[module].path}, which is left", left[module])
        if entry.action is Action.WHITEN and module in pooled and not (aliases or selection.names(path, module)):
            entry = _plain_if_pooled(entry, setting_for(whitening, path, module))
        if entry.action is Action.LEAVE and (concerned or module in rewritten):
            left |= dict.fromkeys(set(module.modules()) - {module} - set(left), entry)
        elif entry.action in (Action.WHITEN, Action.REMOVE, Action.REWRITE):
            hidden |= set(module.modules())
        entries[module] = entry
    _keep_what_nothing_replaces(model, entries, pooled)
    gone = any(entry.norm and entry.action is Action.REMOVE for entry in entries.values())
    return ConversionPlan(tuple(_with_bias(entry, module, gone) for module, entry in entries.items()))


def _plain_if_pooled(entry: Entry, config: WhiteningConfig | None) -> Entry:
    """The entry of a layer behind a global pooling, which only the published procedure whitens."""
    if config is not None and not config.debias:
        return entry
    return dataclasses.replace(entry, action=Action.LEAVE, why="behind a global pooling it sees one row per image")


def _keep_what_nothing_replaces(model: nn.Module, entries: dict[nn.Module, Entry], pooled: set[nn.Module]) -> None:
    """Leave the batch norms of layers that stay plain: whitening takes the place of those next to whitened layers.

    Before a pooled layer stands the pooling: of the map that a batch norm gives, others are the readers.
    """
    plain = {module for module, entry in entries.items() if entry.action is Action.LEAVE and is_layer(module)}
    removed = [module for module, entry in entries.items() if entry.action is Action.REMOVE]
    if not (plain and removed):
        return
    flow = Flow(model)
    for norm in removed:
        before, after = flow.before[norm], flow.after[norm]
        cause = next((layer for layer in entries if layer in before & plain), None)
        if cause is not None:
            why = f"it normalises the output of {entries[cause].path or 'the model'}, which is left"
            entries[norm] = _left_with(entries[norm], why, entries[cause])
        elif not before and after and after <= plain - pooled:
            cause = next(layer for layer in entries if layer in after)
            why = f"it normalises the input of {entries[cause].path}, which is left"
            entries[norm] = _left_with(entries[norm], why, entries[cause])


def _left_with(entry: Entry, why: str, cause: Entry) -> Entry:
    return dataclasses.replace(entry, action=Action.LEAVE, why=why, asked=cause.asked)


def _places(model: nn.Module) -> Iterator[tuple[str, tuple[str, ...], nn.Module]]:
    """Every module once: its first path, its other paths, itself."""
    paths: dict[nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(module, []).append(path)
    for module, (first, *others) in paths.items():
        yield first, tuple(others), module


def _decide(
    entry: Entry, module: nn.Module, ruled: bool, concerned: bool, selection: Selection, read: Mapping[Any, str]
) -> Entry:
    """The entry of one module, filled in; ``concerned`` where there is something to decide about it as a whole."""
    if isinstance(module, (WhitenedLayer, ChannelWhitening, Whitening)):
        return dataclasses.replace(entry, why="whitened already")
    norm = is_like_batch_norm(module)
    unwanted = selection.why_not(entry.path, module)  # also asked of containers: every pattern has to match once
    function = None if concerned else normalises_by_function(module)
    if function is None and not concerned:
        return dataclasses.replace(entry, why=_why_kept(module))
    entry = dataclasses.replace(entry, norm=norm or function is not None)
    if unwanted is not None:
        return dataclasses.replace(entry, action=Action.LEAVE, why=unwanted, asked=True)
    if function is not None:
        return dataclasses.replace(entry, action=Action.LEAVE, why=f"{function} calls batch_norm by function")
    if module in read:
        return dataclasses.replace(entry, action=Action.LEAVE, why=read[module])
    if ruled:
        return dataclasses.replace(entry, action=Action.REWRITE)
    if norm:
        found = batch_norm(module)
        if isinstance(found, str):
            return dataclasses.replace(entry, action=Action.LEAVE, why=found)
        why = "whitening takes its place"
        if found.after:
            why += f"; {', '.join(type(child).__name__ for child in found.after.values())} stays"
        return dataclasses.replace(entry, action=Action.REMOVE, why=why)
    reason = why_not_whiten(module)
    if reason is not None:
        return dataclasses.replace(entry, action=Action.LEAVE, why=reason)
    why = "linear layer" if isinstance(module, nn.Linear) else "convolution"
    return dataclasses.replace(entry, action=Action.WHITEN, why=why)


def _why_kept(module: nn.Module) -> str:
    if any(True for _ in module.children()):
        return "container"
    if "norm" in type(module).__name__.lower():
        return "a normalisation, but not a batch norm"
    return "no convolution, linear layer or batch norm"


def _with_bias(entry: Entry, module: Any, gone: bool) -> Entry:
    """Layers without a bias gain one where batch norms go, whose shifts stood for it."""
    if entry.action is Action.WHITEN and gone and module.bias is None:
        return dataclasses.replace(entry, why=f"{entry.why}, gains a bias")
    return entry


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
