"""WhiteningConfig: what it holds, what it refuses, and what each refusal says."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
from typing import Any

import pytest

from netdeconv import ConfigError, WhiteningConfig
from netdeconv.config import GROUPINGS, SAMPLINGS
from netdeconv.functional import SOLVERS

# Other tools rely on these names; docs/speed.md measures these values.
PROMISED = {
    "block_size": None,
    "grouping": "contiguous",
    "eps": 1e-5,
    "num_iters": 5,
    "momentum": 0.1,
    "sampling_stride": 3,
    "differentiable": False,
    "debias": True,
    "sync": True,
}
# The authors' code: field-notes.md, 4.1.
PUBLISHED = {
    "block_size": 64,
    "grouping": "interleaved",
    "eps": 1e-5,
    "num_iters": 5,
    "solver": "newton_schulz",
    "momentum": 0.1,
    "sampling": "corner",
    "sampling_stride": 3,
    "max_samples": None,
    "update_every": 1,
    "differentiable": True,
    "debias": False,
    "sync": False,
}


def test_defaults_are_those_promised() -> None:
    config = WhiteningConfig()
    assert {name: getattr(config, name) for name in PROMISED} == PROMISED


def test_paper_is_the_published_procedure_in_every_setting() -> None:
    assert dataclasses.asdict(WhiteningConfig.paper()) == PUBLISHED


def test_paper_takes_overrides() -> None:
    config = WhiteningConfig.paper(num_iters=15, eps=0.0, differentiable=False)
    assert dataclasses.asdict(config) == {**PUBLISHED, "num_iters": 15, "eps": 0.0, "differentiable": False}


def test_replace_changes_a_checked_copy() -> None:
    config = WhiteningConfig(eps=0.5)
    changed = config.replace(block_size=8, momentum=None)
    assert (changed.block_size, changed.momentum, changed.eps) == (8, None, 0.5)
    assert config == WhiteningConfig(eps=0.5)
    with pytest.raises(ConfigError, match=r"expected block_size a whole number >= 1, got 0"):
        config.replace(block_size=0)
    with pytest.raises(TypeError, match="blocksize"):
        config.replace(blocksize=8)


def test_it_is_frozen_keyword_only_and_usable_as_a_key() -> None:
    config = WhiteningConfig()
    with pytest.raises(dataclasses.FrozenInstanceError, match="eps"):
        config.eps = 1.0  # type: ignore[misc]
    with pytest.raises(TypeError, match="positional"):
        WhiteningConfig(64)  # type: ignore[misc]
    assert {config: 1}[WhiteningConfig()] == 1
    assert config != WhiteningConfig(eps=1.0)


def test_it_survives_copying_and_pickling() -> None:
    config = WhiteningConfig(solver="eigh", momentum=None, update_every=3)
    assert copy.deepcopy(config) == config
    assert pickle.loads(pickle.dumps(config)) == config


@pytest.mark.parametrize(
    "settings",
    [
        {"eps": 0},
        {"eps": 1e30},
        {"momentum": 0},
        {"momentum": 1},
        {"momentum": 0.5},
        {"momentum": None},
        {"block_size": 1},
        {"num_iters": 1},
        {"sampling_stride": 1},
        {"update_every": 1},
        {"max_samples": 1},
        {"max_samples": None},
        *({"grouping": name} for name in GROUPINGS),
        *({"sampling": name, "max_samples": None} for name in SAMPLINGS),
        *({"solver": name, "num_iters": 15 if name == "quintic" else 5} for name in SOLVERS),
    ],
    ids=str,
)
def test_the_ends_of_every_range_are_allowed(settings: dict[str, Any]) -> None:
    config = WhiteningConfig(**settings)
    assert {name: getattr(config, name) for name in settings} == settings


@pytest.mark.parametrize("name", ["block_size", "num_iters", "sampling_stride", "update_every", "max_samples"])
@pytest.mark.parametrize("value", [0, -3, 2.0, True, "8"])
def test_counts_are_whole_and_positive(name: str, value: Any) -> None:
    advice = f"The default is {getattr(WhiteningConfig(), name)}"
    match = rf"^WhiteningConfig: expected {name} a whole number >= 1, got {value!r}\. {advice}"
    with pytest.raises(ConfigError, match=match):
        WhiteningConfig(**{name: value})


@pytest.mark.parametrize("value", [-1e-5, math.nan, math.inf, "small", True, None])
def test_eps_is_a_finite_number_from_zero_up(value: Any) -> None:
    match = r"^WhiteningConfig: expected eps >= 0 and finite, got .*the usual value is 1e-5"
    with pytest.raises(ConfigError, match=match):
        WhiteningConfig(eps=value)


@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan, math.inf, "0.1", True])
def test_momentum_lies_between_zero_and_one(value: Any) -> None:
    match = r"^WhiteningConfig: expected momentum between 0 and 1 or None, got .*the usual value is 0\.1"
    with pytest.raises(ConfigError, match=match):
        WhiteningConfig(momentum=value)


@pytest.mark.parametrize(
    ("name", "value", "known", "hint"),
    [
        ("grouping", "interleave", GROUPINGS, "interleaved"),
        ("grouping", "continuous", GROUPINGS, "contiguous"),
        ("solver", "newton-schulz", SOLVERS, "newton_schulz"),
        ("solver", "eig", SOLVERS, "eigh"),
        ("sampling", "spreaded", SAMPLINGS, "spread"),
        ("solver", "xyz", SOLVERS, None),
        ("grouping", 3, GROUPINGS, None),
    ],
)
def test_an_unknown_name_lists_the_known_and_guesses(
    name: str, value: Any, known: tuple[str, ...], hint: str | None
) -> None:
    names = ", ".join(repr(each) for each in known)
    ending = r" Choose one of them\." if hint is None else rf" Did you mean '{hint}'\?"
    match = rf"^WhiteningConfig: expected {name} one of {names}, got {value!r}\.{ending}$"
    with pytest.raises(ConfigError, match=match):
        WhiteningConfig(**{name: value})


@pytest.mark.parametrize("name", ["differentiable", "debias", "sync"])
@pytest.mark.parametrize("value", [1, None, "yes"])
def test_switches_are_true_or_false(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"expected {name} True or False, got {value!r}"):
        WhiteningConfig(**{name: value})


def test_a_cap_on_the_fixed_grid_is_refused() -> None:
    match = r"max_samples=100 cannot apply to sampling='corner'.*Pass max_samples=None, or sampling='tiles'"
    with pytest.raises(ConfigError, match=match):
        WhiteningConfig.paper(max_samples=100)


@pytest.mark.parametrize(("samples", "most"), [(4096, 1024), (200, 200), (None, None)])
def test_depthwise_convolutions_compute_every_step_s_own_root(samples: int | None, most: int | None) -> None:
    config = WhiteningConfig(eps=1e-3, max_samples=samples).for_depthwise()
    assert config == WhiteningConfig(eps=1e-3, max_samples=most, update_every=1)
    assert WhiteningConfig.paper().for_depthwise() == WhiteningConfig.paper()


def test_linear_layers_get_the_published_procedure_of_their_own() -> None:
    config = WhiteningConfig(eps=1e-3, num_iters=7).for_linear()
    assert (config.block_size, config.update_every, config.differentiable) == (512, 1, True)
    assert (config.eps, config.num_iters, config.sampling) == (1e-3, 7, WhiteningConfig().sampling)
    assert config.for_linear() == config
