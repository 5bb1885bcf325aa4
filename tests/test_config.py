"""WhiteningConfig: what it holds, what it refuses, and what each refusal says."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import math
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from layer_kinds import BY_NAME
from netdeconv import ConfigError, WhitenedConv1d, WhitenedConv2d, WhitenedLinear, WhiteningConfig, convert
from netdeconv.config import AVERAGES, GROUPINGS, KINDS, SAMPLINGS
from netdeconv.functional import SOLVERS

# Other tools rely on these names; docs/speed.md measures these values.
PROMISED = {
    "block_size": None,
    "grouping": "contiguous",
    "eps": 1e-5,
    "num_iters": None,
    "solver": "auto",
    "momentum": 0.1,
    "sampling": "tiles",
    "sampling_stride": 3,
    "max_samples": 4096,
    "scale": None,
    "update_every": None,
    "differentiable": None,
    "average": None,
    "debias": True,
    "sync": True,
}
# And these are what None is, by the kind of layer: num_iters, scale, update_every, differentiable, average.
NAMES = ("num_iters", "scale", "update_every", "differentiable", "average")
BY_KIND = {
    "dense": (3, True, 16, False, "covariance"),
    "1x1": (1, True, 16, False, "covariance"),
    "grouped": (3, True, 16, False, "covariance"),
    "depthwise": (1, True, 16, False, "covariance"),
    "linear": (3, False, 1, True, "root"),
    "channels": (5, True, 16, False, "covariance"),
}
# Which kind the layers of the contract are.
KIND_OF = {
    "conv1d": "dense", "conv2d": "dense", "pointwise": "1x1", "grouped": "grouped", "depthwise": "depthwise",
    "conv3d": "dense", "linear": "linear", "channel": "channels",
}  # fmt: skip
# The authors' code: field-notes.md, 4.1.
PUBLISHED = {
    "block_size": None,  # 64, and 512 in linear layers
    "grouping": "interleaved",
    "eps": 1e-5,
    "num_iters": 5,
    "solver": "newton_schulz",
    "momentum": 0.1,
    "sampling": "corner",
    "sampling_stride": 3,
    "max_samples": None,
    "scale": False,
    "update_every": 1,
    "differentiable": True,
    "average": "root",
    "debias": False,
    "sync": False,
}


def test_defaults_are_those_promised() -> None:
    config = WhiteningConfig()
    assert dataclasses.asdict(config) == PROMISED


def test_paper_is_the_published_procedure_in_every_setting() -> None:
    assert dataclasses.asdict(WhiteningConfig.paper()) == PUBLISHED


def test_paper_takes_overrides() -> None:
    config = WhiteningConfig.paper(num_iters=15, eps=0.0, differentiable=False)
    assert dataclasses.asdict(config) == {**PUBLISHED, "num_iters": 15, "eps": 0.0, "differentiable": False}


def test_a_setting_that_there_is_not_names_the_nearest() -> None:
    unknown: Any = {"blocksize": 3}
    message = r"WhiteningConfig: there is no setting 'blocksize'\. Did you mean 'block_size'\?"
    for make in (WhiteningConfig, WhiteningConfig.paper, WhiteningConfig().replace):
        with pytest.raises(TypeError, match=message):
            make(**unknown)
    with pytest.raises(TypeError, match=r"no setting 'xyz'\. It has block_size, grouping, eps, "):
        WhiteningConfig(xyz=1)  # type: ignore[call-arg]
    assert list(inspect.signature(WhiteningConfig).parameters) == list(PROMISED)


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
        {"scale": True},
        {"scale": None, "differentiable": None, "average": None},
        {"differentiable": True, "scale": True},
        *({"average": name} for name in AVERAGES),
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
        ("average", "covariances", AVERAGES, "covariance"),
        ("average", "roots", AVERAGES, "root"),
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


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, value) for name in ("debias", "sync") for value in (1, None, "yes")),
        *((name, value) for name in ("scale", "differentiable") for value in (1, "yes")),
    ],
)
def test_switches_are_true_or_false(name: str, value: Any) -> None:
    choices = "True or False" if name in ("debias", "sync") else "True, False or None"
    with pytest.raises(ConfigError, match=rf"expected {name} {choices}, got {value!r}\. Pass a bool"):
        WhiteningConfig(**{name: value})


def test_a_cap_on_the_fixed_grid_is_refused() -> None:
    match = r"max_samples=100 cannot apply to sampling='corner'.*Pass max_samples=None, or sampling='tiles'"
    with pytest.raises(ConfigError, match=match):
        WhiteningConfig.paper(max_samples=100)


def test_a_gradient_through_an_averaged_covariance_is_refused() -> None:
    match = r"average='covariance' cannot apply with differentiable=True.*Pass average='root', or differentiable=False"
    with pytest.raises(ConfigError, match=match):
        WhiteningConfig(average="covariance", differentiable=True)


def test_a_scale_of_pooled_channels_is_refused() -> None:
    match = r"scale=True cannot apply to grouping='interleaved'.*Pass scale=False, or grouping='contiguous'"
    with pytest.raises(ConfigError, match=match):
        WhiteningConfig.paper(scale=True)


# ---- by the kind of layer -------------------------------------------------------------------------------


def settled(config: WhiteningConfig) -> tuple[Any, ...]:
    return tuple(getattr(config, name) for name in NAMES)


def test_every_kind_has_its_defaults() -> None:
    assert KINDS.keys() == BY_KIND.keys()
    for kind, expected in BY_KIND.items():
        config = WhiteningConfig(eps=1e-3).resolved(kind, 8)
        assert settled(config) == expected, kind
        assert None not in (config.block_size, *settled(config))
        assert dataclasses.replace(config, **dict.fromkeys(("block_size", *NAMES))) == WhiteningConfig(eps=1e-3)
        assert config.resolved(kind, 8) == config


@pytest.mark.parametrize("name", BY_NAME)
def test_a_layer_gets_those_of_its_kind(name: str) -> None:
    for config in (None, WhiteningConfig()):
        whitening = BY_NAME[name].layer(config).whitening
        assert whitening.estimator.kind == KIND_OF[name]
        assert settled(whitening.config) == BY_KIND[KIND_OF[name]]
        assert whitening.config == WhiteningConfig().resolved(KIND_OF[name], 1)


def test_the_kind_of_a_convolution_is_that_of_kernel_and_groups() -> None:
    layers = {
        "1x1": (WhitenedConv2d(4, 4, 1), WhitenedConv1d(4, 4, 1, stride=2), WhitenedConv2d(4, 4, 1, groups=2)),
        "dense": (WhitenedConv2d(1, 4, 3), WhitenedConv2d(4, 4, (1, 3))),
        "grouped": (WhitenedConv2d(4, 4, (1, 3), groups=2), WhitenedConv2d(4, 4, 3, groups=2)),
        "depthwise": (WhitenedConv2d(4, 4, 3, groups=4), WhitenedConv2d(4, 8, 1, groups=4)),
    }
    for kind, made in layers.items():
        assert {layer.whitening.estimator.kind for layer in made} == {kind}


@pytest.mark.parametrize(
    ("kind", "channels", "grouping", "size"),
    [
        *((kind, channels, "contiguous", 64) for kind in ("dense", "grouped") for channels in (3, 64, 511)),
        *((kind, channels, "contiguous", 16) for kind in ("dense", "grouped") for channels in (512, 2048)),
        *((kind, 2048, "contiguous", 32) for kind in ("1x1", "depthwise", "channels")),
        *((kind, 2048, "interleaved", 64) for kind in KINDS if kind != "linear"),
        ("linear", 4096, "contiguous", 512),
        ("linear", 4096, "interleaved", 512),
    ],
)
def test_the_size_of_a_block_by_kind(kind: str, channels: int, grouping: str, size: int) -> None:
    assert WhiteningConfig(grouping=grouping).resolved(kind, channels).block_size == size
    assert WhiteningConfig(grouping=grouping, block_size=7).resolved(kind, channels).block_size == 7


@pytest.mark.parametrize(("channels", "steps"), [(3, 3), (63, 3), (64, 4), (512, 4)])
@pytest.mark.parametrize("kind", ["dense", "grouped"])
def test_kernels_that_mix_many_channels_take_a_step_more(kind: str, channels: int, steps: int) -> None:
    assert WhiteningConfig().resolved(kind, channels, 9).num_iters == steps
    assert WhiteningConfig(num_iters=2).resolved(kind, channels, 9).num_iters == 2
    assert WhiteningConfig().resolved("1x1", channels).num_iters == 1



def test_what_is_set_holds_for_every_kind() -> None:
    config = WhiteningConfig(
        block_size=8, num_iters=2, scale=True, update_every=3, differentiable=False, average="root", max_samples=10
    )
    for kind in KINDS:
        assert config.resolved(kind, 64) == config
    for kind, size in (("dense", 64), ("1x1", 64), ("depthwise", 64), ("linear", 512)):
        assert WhiteningConfig.paper().resolved(kind, 1024) == WhiteningConfig.paper(block_size=size)


def test_one_setting_settles_those_that_follow_from_it() -> None:
    through = WhiteningConfig(differentiable=True).resolved("dense", 8)
    assert (through.average, through.scale) == ("root", True)
    averaged = WhiteningConfig(average="covariance").resolved("linear", 8)
    assert (averaged.differentiable, averaged.scale) == (False, False)
    assert WhiteningConfig(grouping="interleaved").resolved("dense", 8).scale is False
    # And leaves the others to the kind.
    assert settled(WhiteningConfig(scale=False).resolved("dense", 8)) == (3, False, 16, False, "covariance")
    assert settled(WhiteningConfig(average="root").resolved("1x1", 8)) == (1, True, 16, False, "root")


SAME_FOR_ALL = [None, WhiteningConfig(), WhiteningConfig(eps=1e-3, scale=False), WhiteningConfig.paper()]


@pytest.mark.parametrize("config", SAME_FOR_ALL, ids=["None", "default", "changed", "paper"])
def test_a_config_means_the_same_in_a_layer_and_in_convert(config: WhiteningConfig | None) -> None:
    plain = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.BatchNorm2d(8),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    )  # fmt: skip
    converted = convert(plain, config)
    made = {
        "0": WhitenedConv2d(3, 8, 3, whitening=config),
        "3": WhitenedConv2d(8, 8, 1, whitening=config),
        "6": WhitenedConv2d(8, 8, 3, groups=8, whitening=config),
        "9": WhitenedConv2d(8, 8, 3, groups=2, whitening=config),
        "14": WhitenedLinear(8, 5, whitening=config),
    }
    for path, layer in made.items():
        whitening = converted.get_submodule(path).whitening
        assert whitening.config == layer.whitening.config, path
        assert {name: value.shape for name, value in whitening.state_dict().items()} == {
            name: value.shape for name, value in layer.whitening.state_dict().items()
        }


def test_nothing_passed_is_the_default_object_to_the_last_bit() -> None:
    for kind in BY_NAME.values():
        left_out, passed = kind.make, kind.layer(WhiteningConfig())
        torch.manual_seed(0)
        layer = left_out()
        for step in range(3):
            assert torch.equal(layer(kind.input(seed=step)), passed(kind.input(seed=step)))
        assert torch.equal(layer.eval()(kind.input()), passed.eval()(kind.input()))
