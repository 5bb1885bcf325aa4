"""Going through a model and deciding what a conversion does to every module."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from netdeconv.errors import ConfigError
from netdeconv.nn import ChannelWhitening, Whitening
from netdeconv.nn.layer import WhitenedLayer
from netdeconv.surgery.plan import Action, ConversionPlan, Entry
from netdeconv.surgery.recognise import batch_norm, is_layer, is_like_batch_norm, why_not_whiten
from netdeconv.surgery.rewrite import Rule, rule_for
from netdeconv.surgery.select import Selection
from netdeconv.surgery.usage import read_by_others

__all__ = ["survey"]

_WRAPPERS = {"OptimizedModule", "DataParallel", "DistributedDataParallel", "FullyShardedDataParallel"}


def survey(
    model: nn.Module, selection: Selection, rules: Mapping[type, Rule] | None, rewritten: Mapping[nn.Module, bool]
) -> ConversionPlan:
    """The plan of a model; ``rewritten`` says for modules that a rule has seen whether it rewrote them."""
    _check_model(model)
    read = read_by_others(model)
    entries: list[Entry] = []
    hidden: set[nn.Module] = set()  # inside a module that is dealt with as a whole
    for path, aliases, module in _places(model):
        entry = Entry(path, type(module).__name__, Action.KEEP, "", aliases)
        if module not in hidden:
            rule = None if module in rewritten else rule_for(module, rules)
            entry = _decide(entry, module, rule is not None, selection, read)
            if rewritten.get(module) is False:
                entry = dataclasses.replace(entry, action=Action.LEAVE, why="left by its rule", asked=True)
            if rule is not None and entry.action is Action.REWRITE:
                entry = dataclasses.replace(entry, why=rule[1])
            if entry.action is not Action.KEEP:
                hidden |= set(module.modules())
        elif entry.action is Action.KEEP:
            entry = dataclasses.replace(entry, why="part of the module above")
        entries.append(entry)
    gone = any(entry.norm and entry.action is Action.REMOVE for entry in entries)
    return ConversionPlan(tuple(_with_bias(entry, model, gone) for entry in entries))


def _places(model: nn.Module) -> Iterator[tuple[str, tuple[str, ...], nn.Module]]:
    """Every module once: its first path, its other paths, itself."""
    paths: dict[nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(module, []).append(path)
    for module, (first, *others) in paths.items():
        yield first, tuple(others), module


def _decide(entry: Entry, module: nn.Module, ruled: bool, selection: Selection, read: Mapping[Any, str]) -> Entry:
    """The entry of one module, filled in."""
    if isinstance(module, (WhitenedLayer, ChannelWhitening, Whitening)):
        return dataclasses.replace(entry, why="whitened already")
    norm = is_like_batch_norm(module)
    unwanted = selection.why_not(entry.path, module)  # also asked of containers: every pattern has to match once
    if not (ruled or norm or is_layer(module)):
        return dataclasses.replace(entry, why=_why_kept(module))
    entry = dataclasses.replace(entry, norm=norm)
    if unwanted is not None:
        return dataclasses.replace(entry, action=Action.LEAVE, why=unwanted, asked=True)
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


def _with_bias(entry: Entry, model: nn.Module, gone: bool) -> Entry:
    """Layers without a bias gain one where batch norms go, whose shifts stood for it."""
    if entry.action is Action.WHITEN and gone and model.get_submodule(entry.path).bias is None:
        return dataclasses.replace(entry, why=f"{entry.why}, gains a bias")
    return entry


def _check_model(model: Any) -> None:
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
