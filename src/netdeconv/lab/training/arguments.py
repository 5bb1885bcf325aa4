"""The command line of fit, validate and test, before it is parsed: recipes, run folders, and names that there are not.

The parser needs Lightning, which takes seconds to load; a mistake in a name is answered without it.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import inspect
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from netdeconv import ConfigError, WhiteningConfig
from netdeconv.lab.names import nearest
from netdeconv.lab.networks import check_name
from netdeconv.lab.norms import NORMS
from netdeconv.lab.saved import find_saved, located, settings_in
from netdeconv.lab.schedules import SCHEDULES
from netdeconv.lab.training.folder import CONFIG
from netdeconv.lab.training.options import DATA_OPTIONS, settings_parser
from netdeconv.lab.training.recipes import recipe_path, recipes

__all__ = ["full_arguments"]

_NEED_VALUES = ("config", "data", "optimizer", "out")
_OF_CLASSES = ("class_path", "init_args", "help")  # what jsonargparse adds to the arguments of a class
_WITHOUT_TRAINING = {"help", "print_config"}


def full_arguments(command: str, arguments: Sequence[str]) -> list[str]:
    """The arguments with recipes as paths first, then the data set, which replaces another one of the recipe.

    Args:
        command: ``"fit"``, ``"validate"`` or ``"test"``; the latter two may begin with a run folder or a checkpoint.
        arguments: what follows it on the command line.

    Raises:
        ConfigError: an option, a recipe, or a name of something that there is not.
    """
    words = list(arguments)
    what = words.pop(0) if command != "fit" and words and not words[0].startswith("-") else None
    configs: list[str] = []
    others: list[str] = []
    given: dict[str, str] = {}
    for name, value in _options(words):
        if name == "config":
            configs.append(str(recipe_path(value)))
        elif name != "data":
            others.append(f"--{name}={value}" if value else f"--{name}")
        given[name] = value
    if command != "fit":
        found, words = _of_run(what, given, configs)
        configs += found
        others += words
    out = given.get("out")
    if not configs and out is not None and Path(out, CONFIG).is_file():
        configs = [str(Path(out, CONFIG))]
    recipe: dict[str, Any] = {}
    for config in configs:
        recipe |= _content(config)
    data = given.get("data")
    of_recipe = (recipe.get("data") or {}).get("name")
    if not _WITHOUT_TRAINING & {name.rpartition(".")[2] for name in given}:
        _check(given, data or given.get("data.name") or of_recipe, recipe, command)
    first = [f"--config={config}" for config in configs]
    if data is not None and of_recipe != data:
        first.append(f"--data={json.dumps({'name': data})}")
    return first + others


def _options(words: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Name and value of every option; the value is empty where there is none."""
    waiting = iter(words)
    following: str | None = next(waiting, None)
    while (word := following) is not None:
        following = next(waiting, None)
        if not word.startswith("-"):
            hint = f". A recipe is given by --config {word}" if word in recipes() else ""
            raise ConfigError(f"expected an option, got {word}{hint}")
        option, equals, value = word.partition("=")
        name = {"-c": "config", "-h": "help"}.get(option, option.removeprefix("--"))
        if not equals and following is not None and not following.startswith("--"):
            value, following = following, next(waiting, None)
        if name in _NEED_VALUES and not value:
            raise ConfigError(f"{option}: expected a value")
        yield name, value


def _of_run(what: str | None, given: dict[str, str], configs: Sequence[str]) -> tuple[list[str], list[str]]:
    """Settings and options that lead to a run folder or a checkpoint, however it was given."""
    out, checkpoint = given.get("out"), given.get("ckpt_path")
    if what is not None and out is not None:
        raise ConfigError(f"expected one run folder or checkpoint, got {what} and --out {out}")
    if what is None and out is not None and Path(out).is_file():
        what = out
    if what is None and out is None and not configs and checkpoint not in (None, "last", "best", "none"):
        what = checkpoint
    if what is None:
        return [], []
    if Path(what).is_dir():
        given["out"] = what
        return [], [f"--out={what}"]
    found = located(what)
    if found is None:
        raise ConfigError(f"{what}: expected a checkpoint or a run folder, there is neither")
    path, folder = found
    if folder is not None:
        given["out"] = str(folder)
        return [], [f"--out={folder}", f"--ckpt_path={path}"]
    if configs:
        return [], [f"--ckpt_path={path}"]
    saved = find_saved(path)
    if saved is None or not saved.settings:
        raise ConfigError(f"{path}: does not say how it was trained. Give the --config of its training")
    return [json.dumps(dict(saved.settings))], [f"--ckpt_path={path}"]


def _content(config: str) -> dict[str, Any]:
    """The settings of a file, or those that a checkpoint had in it."""
    return json.loads(config) if config.startswith("{") else settings_in(Path(config))


def _check(given: Mapping[str, str], data: str | None, recipe: Mapping[str, Any], command: str) -> None:
    """Refuse names that there are not."""
    if data is None and command != "fit" and "out" in given:
        raise ConfigError(
            f"--out {given['out']}: expected the folder of a run, with its {CONFIG}, found none there. "
            "Give the --out of  netdeconv fit,  or --config and --ckpt_path"
        )
    if data is None:
        names = ", ".join(DATA_OPTIONS)
        raise ConfigError(f"expected a data set, got none. Give --config RECIPE, or --data NAME: {names}")
    if data not in DATA_OPTIONS:
        raise ConfigError(f"--data: there is no {data}. {nearest(str(data), DATA_OPTIONS)}")
    if "network" in given:
        check_name(given["network"])
    if (norm := given.get("norm", "bn")) not in NORMS:
        raise ConfigError(f"--norm: there is no {norm}. {nearest(norm, NORMS)}")
    if (name := given.get("schedule.name", "cosine")) not in SCHEDULES:
        raise ConfigError(f"--schedule.name: expected one of {', '.join(SCHEDULES)}, got {name!r}")
    optimizer = _optimizer(given, recipe)
    defaults = settings_parser(command).get_defaults()
    known: dict[str, list[str]] = {
        "data": ["name", *DATA_OPTIONS[data]],
        "whitening": [field.name for field in dataclasses.fields(WhiteningConfig)],
        "schedule": [*vars(defaults.schedule)],
        "checkpoint": [*vars(defaults.checkpoint)],
        "trainer": _trainer_options(),
        "optimizer": [] if optimizer is None else [*inspect.signature(optimizer).parameters][1:],
    }
    groups = [*vars(defaults), "print_config", "help"]
    for option in given:
        group, _, name = option.removesuffix("+").partition(".")
        name = name.partition(".")[0]
        of_group = known.get(group)
        if group not in groups:
            raise ConfigError(f"--{option}: there is no such option. {nearest(group, groups)}")
        if name and of_group and name not in (*of_group, *_OF_CLASSES):
            raise ConfigError(f"--{option}: there is no such option. {nearest(name, of_group)}")


def _trainer_options() -> list[str]:
    """The arguments of the installed Lightning's ``Trainer``, read from its source, as importing it takes seconds.

    Empty where they are not found there; the parser then finds the mistakes.
    """
    spec = importlib.util.find_spec("lightning")
    path = Path(spec.origin).parent / "pytorch" / "trainer" / "trainer.py" if spec and spec.origin else None
    if path is None or not path.is_file():
        return []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef) and node.name == "Trainer":
            made = [one for one in node.body if isinstance(one, ast.FunctionDef) and one.name == "__init__"]
            return [argument.arg for one in made for argument in (*one.args.args[1:], *one.args.kwonlyargs)]
    return []


def _optimizer(given: Mapping[str, str], recipe: Mapping[str, Any]) -> type | None:
    """The optimizer's class, where it is one of torch's.

    Raises:
        ConfigError: a plain name that is not.
    """
    from torch import optim

    known = {
        name: kind for name, kind in vars(optim).items() if isinstance(kind, type) and issubclass(kind, optim.Optimizer)
    }
    of_recipe = (recipe.get("optimizer") or {}).get("class_path", "SGD").removeprefix("torch.optim.")
    name = given.get("optimizer") or given.get("optimizer.class_path") or of_recipe
    if name.isidentifier() and name not in known:
        raise ConfigError(f"--optimizer: torch.optim has no {name}. {nearest(name, known)}")
    return known.get(name.removeprefix("torch.optim."))
