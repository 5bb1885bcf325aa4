"""The benchmarks: how they measure is tested, never how long something took."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("matplotlib")

from torch import nn

from netdeconv import ConfigError, WhitenedConv2d, WhiteningConfig, cli, zoo
from netdeconv.functional import inverse_sqrt
from netdeconv.lab.benchmark import candidates, command, memory, moments, root, scaling, step
from netdeconv.lab.benchmark.settings import (
    MemorySettings,
    MomentsSettings,
    RootSettings,
    ScalingSettings,
    Settings,
    StepSettings,
)
from netdeconv.lab.benchmark.timing import Candidate, Timings, interleaved_times, steady_plan
from netdeconv.lab.devices import threads
from netdeconv.lab.progress import Progress

CPU = torch.device("cpu")
TINY: dict[str, Any] = {"network": "resnet18", "width": 0.0625, "batch": 4, "size": 8, "threads": 1}

# ---------------------------------------------------------------------------------------------------- taking turns


def test_every_candidate_steps_once_in_every_round_in_changing_order() -> None:
    calls: list[str] = []
    names = ("a", "b", "c")
    runners = [Candidate(name, lambda name=name: calls.append(name)) for name in names]  # type: ignore[misc]
    found = interleaved_times(runners, (False,) * 12, device=CPU)
    rounds = [tuple(calls[i : i + 3]) for i in range(0, len(calls), 3)]
    assert len(rounds) == 12
    assert all(sorted(order) == list(names) for order in rounds)
    for place in range(3):
        assert sorted(order[place] for order in rounds) == sorted(names * 4)
    assert len(set(rounds)) > 3  # not only the rotations of one order
    assert {name: len(seconds) for name, seconds in found.times.items()} == {"a": 12, "b": 12, "c": 12}


def test_a_turn_of_several_steps_is_taken_in_one_go() -> None:
    calls: list[str] = []
    runners = [Candidate(name, lambda name=name: calls.append(name)) for name in "ab"]  # type: ignore[misc]
    found = interleaved_times(runners, (False,) * 6, device=CPU, turn=3)
    assert all(len(set(calls[i : i + 3])) == 1 for i in range(0, 12, 3))
    assert all(len(seconds) == 6 for seconds in found.times.values())


def test_prepare_gets_the_plan_before_each_step() -> None:
    seen: list[Any] = []
    plan = (False, True, False)
    interleaved_times([Candidate("a", lambda: seen.append("step"), 4, seen.append)], plan, device=CPU)
    assert seen == [False, "step", True, "step", False, "step"]


def test_names_must_differ() -> None:
    with pytest.raises(ValueError, match="names that differ"):
        interleaved_times([Candidate("a", int), Candidate("a", int)], (False,), device=CPU)


def test_the_plan_is_whole_periods_with_one_refresh_each() -> None:
    plan = steady_plan(20, 16)
    assert len(plan) == 32
    assert [i for i, refresh in enumerate(plan) if refresh] == [8, 24]
    assert steady_plan(5, 1) == (False,) * 5


# ------------------------------------------------------------------------------------------------ numbers by hand

BY_HAND = Timings(
    plan=(False, True, False, False),
    periods={"base": 1, "often": 1, "seldom": 4},
    times={"base": [1.0, 1.0, 2.0, 1.0], "often": [3.0, 3.0, 6.0, 3.0], "seldom": [2.0, 10.0, 4.0, 2.0]},
)


def test_medians_by_hand() -> None:
    assert BY_HAND.summary("base") == {
        "step": 1.0, "median": 1.0, "quartiles": [1.0, 1.25], "mean": 1.25, "period": 1
    }  # fmt: skip
    seldom = BY_HAND.summary("seldom")
    assert seldom["ordinary"]["median"] == 2.0
    assert seldom["refresh"]["median"] == 10.0
    assert seldom["step"] == (3 * 2.0 + 10.0) / 4


def test_ratios_by_hand() -> None:
    # within rounds: often 3, 3, 3, 3; seldom 2, 10, 2, 2: the slow third round falls out
    assert BY_HAND.ratio("often", "base") == {"value": 3.0, "interval": [3.0, 3.0]}
    assert BY_HAND.ratio("seldom", "base")["value"] == (3 * 2.0 + 10.0) / 4
    # a periodic one below the line: seldom / often is 2/3, 10/3, 2/3, 2/3
    assert BY_HAND.ratio("often", "seldom")["value"] == pytest.approx(4 / (3 * 2 / 3 + 10 / 3))
    assert BY_HAND.ratio("seldom", "seldom")["value"] == 1.0


def test_an_interval_holds_its_value_and_is_the_same_every_time() -> None:
    draw = torch.Generator().manual_seed(0)
    times = {name: (1 + torch.rand(40, generator=draw)).tolist() for name in "ab"}
    found = Timings((False,) * 40, {"a": 1, "b": 1}, times)
    ratio = found.ratio("a", "b")
    low, high = ratio["interval"]
    assert low < ratio["value"] < high
    assert found.ratio("a", "b") == ratio


def test_intervals_by_hand() -> None:
    two = Timings((False, False), {"a": 1, "b": 1}, {"a": [1.0, 3.0], "b": [1.0, 1.0]})
    assert two.ratio("a", "b") == {"value": 2.0, "interval": [1.0, 3.0]}
    once = Timings((False, True), {"a": 1, "b": 4}, {"a": [1.0, 1.0], "b": [2.0, 6.0]})
    assert once.ratio("b", "a") == {"value": 3.0, "interval": [3.0, 3.0]}  # nothing to draw from
    # the one refresh is in every draw: (6 + 3 * 2) / 4 and (6 + 3 * 4) / 4
    seldom = Timings((False, True, False), {"a": 1, "b": 4}, {"a": [1.0, 1.0, 1.0], "b": [2.0, 6.0, 4.0]})
    assert seldom.ratio("b", "a")["interval"] == [3.0, 4.5]
    assert seldom.ratio("a", "b")["interval"] == pytest.approx([1 / 4.5, 1 / 3])


# ------------------------------------------------------------------------------------------------- the candidates


def test_the_floor_has_no_batch_norm_and_the_rest_of_the_weights() -> None:
    settings = MemorySettings(**TINY)
    floor, batchnorm = (candidates.candidate(kind, settings) for kind in ("none", "bn"))
    assert any(isinstance(module, nn.BatchNorm2d) for module in batchnorm.modules())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in floor.modules())
    assert torch.equal(floor.get_parameter("conv1.weight"), batchnorm.get_parameter("conv1.weight"))


def test_default_and_published_procedure_are_whitened_as_they_say() -> None:
    for kind, config in (("nd", WhiteningConfig()), ("nd-paper", WhiteningConfig.paper())):
        model = candidates.candidate(kind, MemorySettings(network="vgg11", width=0.0625))
        layers = [module for module in model.modules() if isinstance(module, WhitenedConv2d)]
        assert len(layers) == 8
        assert all(layer.whitening.config == config.resolved("dense", layer.in_channels) for layer in layers)


def test_a_moved_clock_refreshes_once_a_period_and_where_it_should() -> None:
    training = candidates.Training("nd", MemorySettings(**TINY))
    training.step()
    assert training.period == 16
    training.start_at(-8)
    counts = []
    for _ in range(32):
        before = training.refreshes()
        training.step()
        counts.append(training.refreshes() - before)
    assert [bool(count) for count in counts] == list(steady_plan(32, 16))
    for refresh in (True, False):
        before = training.refreshes()
        training.make_next_step(refresh=refresh)
        training.step()
        assert training.refreshes() - before == refresh


def test_torchvision_networks_by_name() -> None:
    pytest.importorskip("torchvision")
    assert isinstance(candidates.network("torchvision:resnet18"), nn.Module)
    for name, width, message in (
        ("torchvision:nothing", 1.0, "nothing"),
        ("torchvision:resnet18", 0.5, "width=0.5 cannot apply"),
        ("caffe:resnet18", 1.0, "torchvision:NAME or timm:NAME"),
        ("timm:resnet19", 1.0, "timm has no network .resnet19."),
        ("resnet19", 1.0, "resnet19"),
    ):
        with pytest.raises(ConfigError, match=message):
            candidates.network(name, width)


def test_threads_are_restored() -> None:
    before = torch.get_num_threads()
    with pytest.raises(KeyboardInterrupt), threads(1):
        assert torch.get_num_threads() == 1
        raise KeyboardInterrupt
    assert torch.get_num_threads() == before


# ----------------------------------------------------------------------------------------------------------- memory


def test_what_is_kept_for_backward_is_counted_once_per_storage() -> None:
    class Doubling(candidates.Training):
        def loss_of_batch(self) -> torch.Tensor:
            x = (self.images.flatten()[:1000] * 1).requires_grad_()  # 1000 float32 = 4000 bytes
            return (x * x).sum()  # keeps x twice; the sum keeps nothing

    assert memory.saved_bytes(Doubling("none", MemorySettings(**{**TINY, "size": 32}))) == 4000


def test_whitening_keeps_no_more_than_the_floor_and_its_folded_weights() -> None:
    saved = {
        kind: memory.saved_bytes(candidates.Training(kind, MemorySettings(**{**TINY, "batch": 32})))
        for kind in ("bn", "none", "nd", "nd-paper")
    }
    assert saved["none"] < saved["bn"]
    assert saved["nd"] < saved["nd-paper"]


def test_a_fresh_process_measures_memory() -> None:
    found = memory.measure_in_fresh_process("nd", MemorySettings(**TINY))
    assert found["peak"] > 0
    assert found["saved"] > 0
    assert found["how"]
    model = candidates.candidate("nd", MemorySettings(**TINY))
    held = {t.data_ptr(): t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers())}
    assert found["model"] == sum(held.values())


def test_a_process_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess([], 1, "", "no network resnet99")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: failed)
    with pytest.raises(RuntimeError, match="no network resnet99"):
        memory.measure_in_fresh_process("none", MemorySettings(**TINY))


# ------------------------------------------------------------------------------------------------ root and moments


def test_the_plain_recurrence_is_the_map_it_is_compared_with() -> None:
    cov, values, basis = root.spectrum_matrix(12, 1e3)
    assert torch.allclose(torch.linalg.eigvalsh(cov).flip(0), values)
    found = root.errors(root.plain_newton_schulz(cov, 5), cov, values, basis, 5)
    assert found["gain"] < 1e-10  # float64 throughout
    assert found["residual"] > 0.5  # five steps do not whiten
    exact = root.errors((basis / values.sqrt()) @ basis.T, cov, values, basis, 5)
    assert exact["exact_gain"] < 1e-10
    assert exact["residual"] < 1e-10
    assert torch.allclose(root.plain_newton_schulz(cov, 5), inverse_sqrt(cov, solver="newton_schulz"))


def test_solvers_without_coefficients_are_left_out() -> None:
    assert "chebyshev" in root.solvers(5)
    assert {"chebyshev", "quintic"} & set(root.solvers(7)) == set()
    assert next(iter(root.solvers(7))) == root.PLAIN


def test_all_positions_are_without_error_and_fewer_are_not() -> None:
    settings = MomentsSettings(batch=8, shapes=("4x8",), samples=(64, 4096), strides=(3,), rounds=1, threads=1)
    result: dict[str, Any] = {}
    moments.run(settings, Progress(show=False), result)
    errors = {row["sampling"]: row["errors"] for row in result["rows"]}
    assert errors["all positions"]["cov"] == 0
    assert errors["spread, 4096 rows (default)"]["cov"] == 0  # the budget holds all 512
    assert errors["spread, 64 rows"]["cov"] > errors["all positions"]["cov"]
    assert errors["corner, stride 3"]["rows"] == 8 * 9


def test_the_axes_of_scaling_meet_at_the_base() -> None:
    settings = ScalingSettings(channels=(4, 8), batches=(2, 4), sizes=(4,), base_channels=8, base_batch=4, base_size=4)
    assert scaling.points(settings) == [
        *(("channels", (4, 4, 4)), ("channels", (8, 4, 4))),
        *(("batch", (8, 2, 4)), ("batch", (8, 4, 4))),
        ("size", (8, 4, 4)),
    ]


# ------------------------------------------------------------------------------------------- from settings to files

SMALL: dict[str, Settings] = {
    "step": StepSettings(**TINY, rounds=1, eval_rounds=3, warmup=1, no_memory=True),
    "memory": MemorySettings(**TINY),
    "root": RootSettings(sizes=(3, 6), conditions=(10.0, 1e5), rounds=2, threads=1),
    "moments": MomentsSettings(batch=4, shapes=("3x4",), samples=(8,), strides=(3,), rounds=2, threads=1),
    "scaling": ScalingSettings(
        channels=(3, 6), batches=(2,), sizes=(4,), base_channels=3, base_batch=2, base_size=4, rounds=2, threads=1
    ),
}


def fake_memory(kind: str, settings: MemorySettings) -> dict[str, Any]:
    return {"peak": 10**6 * (1 + len(kind)), "saved": 10**6, "model": 10**5, "how": "resident set"}


@pytest.mark.parametrize("name", list(command.BENCHMARKS))
def test_a_benchmark_leaves_numbers_a_table_and_a_picture(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step, "measure_in_fresh_process", fake_memory)
    before = torch.get_num_threads()
    found, shown, files = command.measure(name, SMALL[name], tmp_path, Progress(show=False))
    assert torch.get_num_threads() == before
    assert [file.name for file in files] == [f"{name}.json", f"{name}.png"]
    assert files[1].read_bytes().startswith(b"\x89PNG")
    written = json.loads(files[0].read_text())
    assert written["complete"] is True
    assert written["benchmark"] == name
    assert set(written["settings"]) == set(command.BENCHMARKS[name][0].__dataclass_fields__)
    assert written["machine"]["processor"]
    assert written["machine"]["threads"] == 1
    assert torch.__version__.startswith(written["versions"]["torch"])
    assert written["whitening"]["default"]["update_every"] == 16
    assert "torch" in shown.splitlines()[0]
    assert max(map(len, shown.splitlines()[1:])) <= 120
    if name == "step":
        check_step(found["result"])


def check_step(written: dict[str, Any]) -> None:
    """Every time and ratio is there."""
    kinds = {"bn", "nd", "none", "nd-paper"}
    assert {kind: len(seconds) for kind, seconds in written["training"]["seconds"].items()} == dict.fromkeys(kinds, 16)
    assert {kind: len(seconds) for kind, seconds in written["evaluation"]["seconds"].items()} == dict.fromkeys(kinds, 3)
    assert written["training"]["refreshes"] == {"bn": 0, "none": 0, "nd": 1, "nd-paper": 16}
    assert set(written["training"]["ratios"]) == {
        "none/bn", "nd/bn", "nd-paper/bn", "nd-paper/nd"
    }  # fmt: skip
    assert written["losses_finite"] == dict.fromkeys(kinds, True)
    assert all(math.isfinite(r["value"]) for r in written["training"]["ratios"].values())


def test_without_the_published_procedure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "measure_in_fresh_process", fake_memory)
    precisions, evaluate = set(), step.Training.evaluate

    def watched(training: Any) -> Any:
        precisions.add(torch.get_float32_matmul_precision())
        return evaluate(training)

    monkeypatch.setattr(step.Training, "evaluate", watched)
    settings = StepSettings(**TINY, rounds=1, eval_rounds=1, warmup=1, no_paper=True, matmul_precision="high")
    found, shown, files = command.measure("step", settings, tmp_path, Progress(show=False))
    kinds = ["bn", "nd", "none"]
    assert [list(found["result"][part]["candidates"]) for part in ("training", "evaluation")] == [kinds, kinds]
    assert list(found["result"]["memory"]) == kinds
    assert precisions == {"high"}
    assert torch.get_float32_matmul_precision() == "highest"
    assert "published" not in shown and "matmul precision high" in shown
    assert files[1].read_bytes().startswith(b"\x89PNG")


_OTHER_LAYOUT = """
import json, os, sys
import torch
from netdeconv.lab.benchmark import candidates
from netdeconv.lab.benchmark.settings import MemorySettings

options = json.loads(sys.argv[1])
training = candidates.Training("nd", MemorySettings(**options))
training.step()
training.model.eval()
assert training.evaluate().dtype == (torch.bfloat16 if "dtype" in options else torch.float32)
assert training.images.is_contiguous(memory_format=torch.channels_last) == ("channels_last" in options)
os._exit(0)
"""


# With channels last, channels that are multiples of 8: torch 2.14.1 on a CPU with AVX2 writes behind the gradient of a
# 1x1 convolution with stride 2 and 4 input channels, whatever normalises (jit_avx2_1x1_convolution_bwd_weights).
@pytest.mark.parametrize("options", [{"dtype": "bfloat16"}, {"channels_last": True, "width": 0.125}])
def test_other_precisions_and_layouts_run(options: dict[str, Any]) -> None:
    # In a process of its own, as a damaged heap would abort a later test.
    program = [sys.executable, "-c", _OTHER_LAYOUT, json.dumps({**TINY, **options})]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# ------------------------------------------------------------------------------------------------- the command line


def test_the_command_passes_its_options_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--sizes", "3", "4", "--conditions", "10", "--iters", "5", "--rounds", "2", "--threads", "1", "--quiet"]
    assert cli.main(["bench", "root", "--out", str(tmp_path), *options]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert "5 steps, time in ms" in captured.out
    settings = json.loads((tmp_path / "root.json").read_text())["settings"]
    assert settings["sizes"] == [3, 4]
    assert settings["threads"] == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "required: BENCHMARK"),
        (["speed"], "invalid choice: 'speed'"),
        (["step", "--dtype", "float16"], "invalid choice: 'float16'"),
        (["step", "--batch", "0"], "expected batch above 0, got 0"),
        (["step", "--threads", "-1"], "expected threads above 0, got -1"),
        (["step", "--compile-mode", "max-autotune"], "needs --compile"),
        (["root", "--sizes", "3", "0"], "expected sizes above 0, got 0"),
        (["moments", "--shapes", "64"], "expected shapes like 64x32"),
        (["step", "--network", "resnet19", "--quiet"], "got 'resnet19'"),
    ],
)
def test_a_mistake_is_one_line(
    argv: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", *argv, *(["--out", str(tmp_path)] if argv[1:] else [])]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "root", "--device", "cuda", "--out", str(tmp_path)]) == 2
    assert "torch finds no GPU" in capsys.readouterr().err


def test_ctrl_c_keeps_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    def interrupted(num_iters: int) -> dict[str, Any]:
        asked.append(num_iters)
        if len(asked) > 1:
            raise KeyboardInterrupt
        return {root.PLAIN: lambda cov: root.plain_newton_schulz(cov, num_iters)}

    monkeypatch.setattr(root, "solvers", interrupted)
    assert cli.main(["bench", "root", "--sizes", "3", "4", "--rounds", "2", "--quiet", "--out", str(tmp_path)]) == 130
    assert "stopped" in capsys.readouterr().err
    written = json.loads((tmp_path / "root.json").read_text())
    assert written["complete"] is False
    assert [row["size"] for row in written["result"]["rows"]] == [3]
    assert [file.name for file in tmp_path.iterdir()] == ["root.json"]


def test_help_names_every_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--help"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in command.BENCHMARKS)
    assert set(zoo.NETWORKS) >= {"resnet18", "vgg11", "vgg16"}
