"""Rivals compared: what is planned, what the seconds allow, the table and picture, optimisers and methods by name."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

pytest.importorskip("torchvision")

from netdeconv import ConfigError
from netdeconv.cli import main
from netdeconv.lab import train
from netdeconv.lab.benchmark.candidates import Training, kinds
from netdeconv.lab.benchmark.settings import MemorySettings
from netdeconv.lab.benchmark.timing import Timings
from netdeconv.lab.experiments import rivals
from netdeconv.lab.experiments.cifar import CifarSettings
from netdeconv.lab.experiments.rivals import RivalsSettings, planned
from netdeconv.lab.experiments.rivals_report import present
from netdeconv.lab.methods import Method
from netdeconv.lab.networks import network
from netdeconv.lab.optimizers import MuonAndAdamW, make_optimizer
from netdeconv.lab.progress import Progress
from netdeconv.lab.train import Record
from netdeconv.lab.workspace import Workspace

SMALL = RivalsSettings(
    networks=("vgg11@0.0625",), dataset="digits", methods=("bn", "nd", "bn/muon"), rates=(0.1, 0.03),
    adaptive_rates=(0.01,), epochs=2, steps=10,
)  # fmt: skip
TIMES = {
    "seconds": {"bn": 0.1, "nd": 0.2, "bn/muon": 0.05},
    "ratios": {
        name: {"value": value, "interval": [value, value]} for name, value in (("bn", 1), ("nd", 2), ("bn/muon", 0.5))
    },
}


def test_every_rate_is_planned_once() -> None:
    plan = [(one.norm, one.optimizer, one.rate) for one in planned(SMALL)]
    assert plan == [
        ("bn", "sgd", 0.1), ("nd", "sgd", 0.1), ("bn", "muon", 0.01), ("bn", "sgd", 0.03), ("nd", "sgd", 0.03)
    ]  # fmt: skip
    small = list(planned(RivalsSettings()))
    assert len(small) == len(set(small)) == 3 * 9 * 3
    assert {one.channels_last for one in small if one.network == "mobilenet_v2"} == {True}


def test_best_rates_get_seeds_and_the_same_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = []

    def at_once(one: train.Training, *_: Any) -> Record:
        trained.append((one.norm, one.optimizer, one.rate, one.seed, one.epochs, one.steps))
        last = {("bn", 0.1): 0.5, ("bn", 0.03): 0.6, ("nd", 0.1): 0.7, ("nd", 0.03): 0.6, ("bn", 0.01): 0.4}
        accuracy = last[one.norm, one.rate] - 3 * one.seed / 10 - (one.epochs != 2 or one.steps != 10) / 100
        curves = {"test/accuracy": [0.1] * (one.epochs - 1) + [accuracy], "train/loss": [1.0] * one.epochs}
        return Record(steps=one.epochs * (one.steps or 0), curves=curves, parameters=1)

    monkeypatch.setattr(train, "train", at_once)
    monkeypatch.setattr(rivals, "_times", lambda *_: TIMES)
    monkeypatch.setitem(rivals.EXPERIMENT.sizes, "smoke", SMALL)  # type: ignore[index]
    assert main(["reproduce", "rivals", "--size", "smoke", "--out", str(tmp_path), "--quiet"]) == 0
    assert trained[5:] == [
        ("bn", "sgd", 0.03, 1, 2, 10), ("nd", "sgd", 0.1, 1, 2, 10), ("bn", "muon", 0.01, 1, 2, 10),
        # half the steps, in one epoch, as they cost twice; twice the steps, in four
        ("nd", "sgd", 0.1, 0, 1, 10), ("bn", "muon", 0.01, 0, 4, 10),
        ("nd", "sgd", 0.1, 1, 1, 10), ("bn", "muon", 0.01, 1, 4, 10),
    ]  # fmt: skip
    result = json.loads((tmp_path / "rivals" / "result.json").read_text())["result"]
    table = present(result).tables[0]
    assert [list(row[1:]) for row in table.rows] == [
        ["BatchNorm", "0.03", "45.0 ± 21.2 %", "1", "45.0 ± 21.2 %", "50.0 (0.1), 60.0 (0.03)"],
        ["ND", "0.1", "55.0 ± 21.2 %", "2.00 (2.00 to 2.00)", "54.0 ± 21.2 %", "70.0 (0.1), 60.0 (0.03)"],
        ["BatchNorm, Muon", "0.01", "25.0 ± 21.2 %", "0.50 (0.50 to 0.50)", "24.0 ± 21.2 %", "40.0 (0.01)"],
    ]
    marks = [run.get("same_seconds", False) for run in result["runs"]]
    assert marks == [False] * 8 + [True] * 4 and result["times"] == {"vgg11@0.0625": TIMES}
    assert "54.0 ± 21.2 %" in capsys.readouterr().out


def test_a_run_that_has_not_ended_is_shown() -> None:
    run = {**dataclasses.asdict(next(iter(planned(SMALL)))), "steps": 20, "curves": {"test/accuracy": [0.2, 0.4]}}
    found = present({"times": {"vgg11@0.0625": TIMES}, "runs": [run]})
    assert [list(row) for row in found.tables[0].rows] == [
        ["VGG-11, width 0.0625", "BatchNorm", "0.1", "40.0 %", "1", "40.0 %", "40.0 (0.1)"]
    ]
    figure = Figure()
    found.figures[0].draw(figure)
    (line,) = figure.axes[0].lines
    assert line.get_xydata().tolist() == [[1.0, 20.0], [2.0, 40.0]]  # 10 steps of 0.1 s an epoch


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ("bn", "itrnorm")}, "there is no norm itrnorm. The nearest name is iternorm"),
        ({"methods": ("bn", "bn/muno")}, "there is no optimiser muno. The nearest name is muon"),
        ({"networks": ("vgg12",)}, "got 'vgg12'"),
        ({"methods": ("bn", "bn/sgd")}, "expected values of methods that differ"),
        ({"networks": ("vgg11", "vgg11@1.0")}, "expected values of networks that differ"),
    ],
)
def test_wrong_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RivalsSettings(**changes)


@pytest.mark.parametrize("kind", [RivalsSettings, CifarSettings])
def test_a_network_has_one_name(kind: Any) -> None:
    settings = kind(networks=("vgg11@0.06250", "resnet18@1.0", "vgg16@2"), weight_decay=0.0)
    assert settings.networks == ("vgg11@0.0625", "resnet18", "vgg16@2")
    with pytest.raises(ConfigError, match="expected values of networks that differ"):
        kind(networks=("vgg11@1", "vgg11"))


@pytest.mark.parametrize("base", ["nd", "bn/muon"])
def test_times_are_over_those_of_the_first_method(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every round its own speed, which cancels between nd and bn/muon, and hits bn another time."""
    rounds = range(1, 9)
    seconds = {"nd": [2.0 * k for k in rounds], "bn/muon": [1.0 * k for k in rounds], "bn": [4.0 / k for k in rounds]}
    done: list[str] = []

    def measured(timed: Any, progress: Any, result: dict[str, Any]) -> None:
        done.append(f"step of {timed.threads} threads")
        found = Timings((False,) * 8, dict.fromkeys(seconds, 1), seconds)
        result["training"] = {"candidates": {kind: found.summary(kind) for kind in seconds}, "plan": found.plan,
                              "seconds": seconds}  # fmt: skip

    monkeypatch.setattr(rivals.step, "run", measured)
    monkeypatch.setattr(rivals, "keep_freed_memory", lambda: done.append("memory kept"))
    settings = dataclasses.replace(SMALL, methods=(base, *({"nd", "bn/muon"} - {base})))
    found = rivals._times(settings, "vgg11@0.0625", Workspace(tmp_path, code=(), progress=Progress(show=False)))
    ratio = {"nd": 2.0, "bn/muon": 1.0}
    for kind in ratio:
        value = ratio[kind] / ratio[base]
        assert found["ratios"][kind] == {"value": value, "interval": [value, value]}
    assert done == ["memory kept", f"step of {torch.get_num_threads()} threads"]


def test_the_benchmark_takes_methods_by_name() -> None:
    tiny = {"network": "vgg11", "width": 0.0625, "batch": 4}
    settings = MemorySettings(**tiny, against="gn+ws,bn/muon")
    assert kinds(settings) == ["bn", "nd", "gn+ws", "bn/muon"]
    training = Training("bn/muon", settings)
    assert isinstance(training.optimizer, MuonAndAdamW)
    training.step()
    assert training.loss is not None and training.loss.isfinite()
    with pytest.raises(ConfigError, match="there is no norm dpb"):
        kinds(MemorySettings(against="dpb"))


# --------------------------------------------------------------------------------------------------- optimisers


def small_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, groups=4),
        nn.Flatten(), nn.Linear(16, 16), nn.Linear(16, 5),
    ).double()  # fmt: skip


def steps(net: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> None:
    for number in range(count):
        draw = torch.Generator().manual_seed(number)
        x, y = torch.randn(6, 3, 6, 6, generator=draw, dtype=torch.float64), torch.arange(6) % 5
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()


def same(net: nn.Module, other: nn.Module) -> bool:
    return all(torch.allclose(p, q, rtol=0, atol=1e-12) for p, q in zip(net.parameters(), other.parameters()))  # noqa: B905


def test_muon_takes_matrices_and_adamw_the_rest() -> None:
    """Against the two optimisers of torch by hand, the weight of the convolution inside as a matrix."""
    net, other = small_network(), small_network()
    steps(net, make_optimizer("muon", rate=0.02, weight_decay=9)(net.parameters()), 3)
    conv, linear = other[2], other[5]  # type: ignore[index]
    matrix = nn.Parameter(conv.weight.detach().flatten(1))
    options: Any = {"lr": 0.02, "weight_decay": 0.05}
    muon = torch.optim.Muon([matrix, linear.weight], **options, adjust_lr_fn="match_rms_adamw")
    rest = [p for p in other.parameters() if p is not conv.weight and p is not linear.weight]
    adamw = torch.optim.AdamW(rest, **options)

    class Both:
        def zero_grad(self) -> None:
            other.zero_grad()

        def step(self) -> None:
            matrix.grad = conv.weight.grad.flatten(1)
            muon.step()
            adamw.step()

    steps(other, Both(), 3)  # type: ignore[arg-type]
    assert same(net, other)
    assert not same(net, small_network())


def test_muon_goes_on_and_bears_channels_last() -> None:
    net, other = small_network(), small_network().to(memory_format=torch.channels_last)
    steps(net, make_optimizer("muon", rate=0.02, weight_decay=0)(net.parameters()), 4)
    first = make_optimizer("muon", rate=0.02, weight_decay=0)(other.parameters())
    steps(other, first, 4)
    torch.testing.assert_close(other[2].weight, net[2].weight, rtol=0.02, atol=1e-3)  # type: ignore[index]  # bfloat16
    first.param_groups[0]["lr"] = 0.01
    state = copy.deepcopy(first.state_dict())
    again = small_network().to(memory_format=torch.channels_last)
    again.load_state_dict(other.state_dict())
    second = make_optimizer("muon", rate=0.5, weight_decay=0)(again.parameters())
    second.load_state_dict(state)
    for one, optimizer in ((other, first), (again, second)):
        optimizer.param_groups[0]["lr"] /= 2
        steps(one, optimizer, 1)
    assert same(other, again)
    second.param_groups[0]["lr"] = 0.0  # as a schedule ends
    steps(again, second, 1)
    assert same(other, again)


@pytest.mark.parametrize("name", ["vgg11", "resnet18", "densenet121", "mobilenet_v2", "senet18", "vit"])
def test_muon_leaves_the_first_and_the_last_layer(name: str) -> None:
    """The first convolution, the positions before it and the classifier of 7 classes."""
    net = network(name, 0.25, 7, image_size=32)
    memory = {matrix.data_ptr() for matrix in _matrices_of(net)}
    muon = [p for p in net.parameters() if p.data_ptr() in memory]
    first = next(m for m in net.modules() if isinstance(m, nn.Conv2d)).weight
    head = [p for p in net.parameters() if p.dim() > 1 and len(p) == 7]
    assert len(head) == 1 and muon
    left = [first, *head, *(p for n, p in net.named_parameters() if n == "position")]
    assert not any(p is q for p in muon for q in left)
    weights = [p for p in net.parameters() if p.dim() > 1 and p[0].numel() > 9]
    assert len(weights) == len(muon) + len(left)


def _matrices_of(net: nn.Module) -> list[torch.Tensor]:
    optimizer: Any = make_optimizer("muon", rate=0.1, weight_decay=0)(net.parameters())
    (muon,) = (part for part, _ in optimizer._parts if isinstance(part, torch.optim.Muon))
    return muon.param_groups[0]["params"]


def test_muon_heeds_a_group_and_refuses_another() -> None:
    net, other = small_network(), small_network()
    changed: Any = make_optimizer("muon", rate=0.02, weight_decay=0)(net.parameters())
    changed.param_groups[0].update(lr=0.01, weight_decay=0.3)
    steps(net, changed, 2)
    steps(other, MuonAndAdamW(other.parameters(), lr=0.01, weight_decay=0.3), 2)
    assert same(net, other)
    with pytest.raises(ValueError, match="expected all parameters when the optimiser is made, got another group"):
        changed.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})


def test_methods_by_name() -> None:
    assert Method.named("bn/muon") == ("bn", "muon") and Method.named("gn+ws") == ("gn+ws", "sgd")
    assert [str(Method.named(name)) for name in ("bn", "bn/sgd", "nd/adamw")] == ["bn", "bn", "nd/adamw"]
    assert Method.named("nd/adamw").label == "ND, AdamW"
