"""The experiments' framework: runs kept and found again, results, reports, the command line; no training."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from netdeconv import ConfigError
from netdeconv.cli import main
from netdeconv.lab.experiments.experiment import SIZES, Experiment, Picture, Presentation
from netdeconv.lab.experiments.results import carry_out, markdown, origin, outcomes
from netdeconv.lab.options import check_fields, option
from netdeconv.lab.progress import Progress
from netdeconv.lab.report import Table
from netdeconv.lab.store import read_json, write_json
from netdeconv.lab.workspace import Workspace


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Of the experiment below."""

    numbers: tuple[float, ...] = option((1.0, 2.0), "numbers to square")
    shout: bool = option(False, "be loud")

    def __post_init__(self) -> None:
        check_fields(self)


computed: list[float] = []


def _run(settings: Settings, workspace: Workspace) -> Mapping[str, Any]:
    def square(number: float) -> dict[str, Any]:
        computed.append(number)
        if number == 13:
            raise KeyboardInterrupt
        if number == 17:
            raise ConfigError("expected data in a folder, found none")
        return {"square": number**2, "none": float("nan")}

    found = {}
    for number in settings.numbers:
        found[f"{number:g}"] = workspace.part(f"square-{number:g}", {"number": number}, lambda n=number: square(n))
        workspace.publish({"squares": found})
    return {"squares": found}


def _present(result: Mapping[str, Any]) -> Presentation:
    squares = result["squares"]
    assert all(one["none"] is None for one in squares.values()), "NaN comes back as None, also in the first run"
    rows = [[name, f"{one['square']:g}"] for name, one in squares.items()]
    table = Table(["number", "square"], rows, title="Squares", note="By hand.")
    return Presentation([table], [Picture("squares", "A line.", lambda f: _line(f))])


def _line(figure: Any) -> None:
    figure.subplots().plot([0, 1])


EXPERIMENT = Experiment(
    name="squares",
    claim="Numbers have squares.",
    source="Euclid",
    sizes={size: Settings() for size in SIZES},
    run=_run,
    present=_present,
)


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """The experiment above is the only one there is."""
    computed.clear()
    for module in ("netdeconv.lab.reproduce_command", "netdeconv.lab.experiments.results"):
        monkeypatch.setattr(f"{module}.EXPERIMENTS", {"squares": ("squares", "squares of numbers")})
        monkeypatch.setattr(f"{module}.load", {"squares": EXPERIMENT}.__getitem__)
    monkeypatch.setattr("netdeconv.lab.experiments.report_page.load", {"squares": EXPERIMENT}.__getitem__)


def test_finished_parts_are_kept_through_ctrl_c(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["reproduce", "squares", "--out", str(tmp_path), "--quiet", "--numbers"]
    assert main([*command, "2", "13", "3"]) == 130
    assert "go" in capsys.readouterr().err
    partial = json.loads((tmp_path / "squares" / "result.json").read_text())
    assert not partial["complete"]
    assert list(partial["result"]["squares"]) == ["2"]
    assert "Not finished" in markdown(outcomes(tmp_path))
    computed.clear()
    assert main([*command, "2", "3"]) == 0
    assert computed == [3]


def test_the_record_says_how_the_numbers_came_about(tmp_path: Path) -> None:
    assert main(["reproduce", "--quiet", "squares", "--out", str(tmp_path), "--numbers", "3", "0.5", "--shout"]) == 0
    record = json.loads((tmp_path / "squares" / "result.json").read_text())
    assert record["command"] == "netdeconv reproduce squares --size small --numbers 3 0.5 --shout"
    assert record["settings"] == {"numbers": [3.0, 0.5], "shout": True}
    assert record["complete"]
    assert record["result"]["squares"]["3"]["square"] == 9
    assert {"torch", "netdeconv"} <= record["versions"].keys()
    assert record["machine"]["threads"] >= 1
    assert (tmp_path / "squares" / "squares.png").read_bytes().startswith(b"\x89PNG")


def test_a_device_is_part_of_what_numbers_depend_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "squares", "--quiet", "--out", str(tmp_path), "--numbers", "3"]) == 0
    record = json.loads((tmp_path / "squares" / "result.json").read_text())
    assert record["device"] == "cpu" and "--device" not in record["command"]
    gpu = {**record, "device": "cuda", "machine": {**record["machine"], "gpu": "a large one"}}
    assert origin(gpu)[1].startswith("a large one, ")
    if not torch.cuda.is_available():
        assert main(["reproduce", "squares", "--out", str(tmp_path), "--device", "cuda"]) == 2
        assert "torch finds no GPU here" in capsys.readouterr().err
    only_here = dataclasses.replace(EXPERIMENT, devices=("cpu",))
    with pytest.raises(ConfigError, match="squares trains no network: expected --device cpu, got cuda"):
        carry_out(only_here, Settings(), tmp_path, command="", device="cuda", show=False)
    progress = Progress(show=False)
    here, there = (Workspace(tmp_path, code=(), progress=progress, device=device) for device in ("cpu", "cuda"))
    assert here.part("one", {}, lambda: {"at": "cpu"}) == {"at": "cpu"}
    assert there.part("one", {}, lambda: {"at": "cuda"}) == {"at": "cuda"}


def test_minutes_are_those_of_all_parts_whenever_they_ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 6000, 60))
    monkeypatch.setattr("netdeconv.lab.workspace.time.perf_counter", lambda: next(clock))
    first = carry_out(EXPERIMENT, Settings(), tmp_path, command="", show=False)
    again = carry_out(EXPERIMENT, Settings(), tmp_path, command="", show=False)
    assert first.record["minutes"] == again.record["minutes"] == 2


def test_a_part_belongs_to_one_process_until_it_ends(tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path\n"
        "from netdeconv.lab.progress import Progress; from netdeconv.lab.workspace import Workspace\n"
        "workspace = Workspace(Path(sys.argv[1]), code=(), progress=Progress(show=False))\n"
        "workspace.part('part', {}, lambda: print('mine', flush=True) or time.sleep(600))"
    )
    workspace = Workspace(tmp_path, code=(), progress=Progress(show=False))
    with subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout is not None and other.stdout.readline() == "mine\n"
            assert workspace.part_if_free("part", {}, lambda: {"by": "us"}) is None
        finally:
            other.kill()
    assert workspace.part("part", {}, lambda: {"by": "us"}) == {"by": "us"}
    assert not list(tmp_path.rglob("*.lock"))


def test_a_part_is_not_finished_without_its_file(tmp_path: Path) -> None:
    workspace, weights = Workspace(tmp_path, code=(), progress=Progress(show=False)), tmp_path / "weights.pt"

    def compute() -> dict[str, Any]:
        weights.write_text(f"{len(times)}")
        times.append(len(times))
        return {"time": times[-1]}

    times: list[int] = []
    assert [workspace.part("net", {}, compute, beside=weights) for _ in range(2)] == [{"time": 0}] * 2
    weights.unlink()
    assert workspace.part("net", {}, compute, beside=weights) == {"time": 1}
    assert weights.read_text() == "1"


def test_parts_are_found_by_their_exact_settings(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path, code=(), progress=Progress(show=False))
    settings = {"rate": 0.1, "grid": (1, 2)}
    assert workspace.part("a", settings, lambda: {"loss": math.nan}) == {"loss": None}
    assert workspace.finished("a", settings) == {"loss": None}
    assert workspace.finished("a", {**settings, "rate": 0.2}) is None
    assert workspace.finished("b", settings) is None
    file = workspace.path("a", settings)
    kept = read_json(file)
    write_json(file, {**kept, "settings": {**kept["settings"], "rate": 0.2}})  # as if two settings had one hash
    assert workspace.finished("a", settings) is None
    file.write_text('{"settings"')  # a part of a file
    assert workspace.part("a", settings, lambda: {"loss": 1.0}) == {"loss": 1.0}


def test_fresh_repeats_what_is_finished_once(tmp_path: Path) -> None:
    progress = Progress(show=False)
    assert Workspace(tmp_path, code=(), progress=progress).part("a", {}, lambda: {"run": 1}) == {"run": 1}
    fresh = Workspace(tmp_path, code=(), progress=progress, fresh=True)
    assert fresh.finished("a", {}) is None
    assert fresh.part("a", {}, lambda: {"run": 2}) == {"run": 2}
    assert fresh.part("a", {}, lambda: {"run": 3}) == {"run": 2}


def test_parts_of_other_code_are_counted_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def parts(code: str, **settings: Any) -> str:
        with Progress() as progress:
            workspace = Workspace(tmp_path, code=(code,), progress=progress)
            for name in ("a", "b"):
                workspace.part(name, settings, lambda: {"found": 1})
        return capsys.readouterr().err

    for settings in ({}, {}, {"seed": 1}):
        assert "not used" not in parts("config.py", **settings)
    assert parts("errors.py").count(f"{tmp_path / 'parts'}: the 4 results there are by other code") == 1
    assert "not used" not in parts("errors.py", seed=2)


def test_report_writes_tables_pictures_and_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "all", "--size", "smoke", "--out", str(tmp_path), "--quiet"]) == 0
    assert json.loads((tmp_path / "squares" / "result.json").read_text())["machine"]["threads"] == 1
    picture = tmp_path / "squares" / "squares.png"
    picture.unlink()
    assert main(["report", str(tmp_path)]) == 0
    written = (tmp_path / "results.md").read_text()
    assert "| number | square |\n| --- | --: |\n| 1 | 1 |\n| 2 | 4 |" in written
    assert written.endswith("A trial run, too short to judge the claim by.\n")
    assert "![A line.](squares/squares.png)" in written
    assert "`netdeconv reproduce squares --size smoke`;" in written
    assert picture.exists()
    assert "Numbers have squares." in (tmp_path / "report.html").read_text()
    assert "results.md" in capsys.readouterr().out


def test_the_recorded_command_has_all_digits(tmp_path: Path) -> None:
    assert main(["reproduce", "squares", "--out", str(tmp_path), "--quiet", "--numbers", "0.123456789"]) == 0
    record = json.loads((tmp_path / "squares" / "result.json").read_text())
    assert record["command"].endswith("--numbers 0.123456789")


def test_a_result_of_other_code_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "squares", "--out", str(tmp_path), "--quiet"]) == 0
    file = tmp_path / "squares" / "result.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "result": {"roots": {}}}))
    capsys.readouterr()
    assert main(["report", str(tmp_path)]) == 2
    complaint = capsys.readouterr().err
    assert "Traceback" not in complaint
    assert str(file) in complaint


def test_the_folder_is_not_taken_for_the_experiment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["reproduce", "--out", "squares", "all", "--size", "smoke", "--quiet", "--numbers", "3"]) == 2
    assert "unrecognized arguments: --numbers 3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["reproduce"], "the following arguments are required: NAME"),
        (["reproduce", "cubes"], "invalid choice: 'cubes'"),
        (["reproduce", "squares", "--size", "huge"], "invalid choice: 'huge'"),
        (["reproduce", "squares", "--numbers", "-1"], "expected numbers above 0, got -1"),
        (["reproduce", "squares", "--numbers", "2", "2"], "expected values of numbers that differ"),
        (["reproduce", "squares", "--threads", "0"], "expected threads of at least 1, got 0"),
        (["reproduce", "squares", "--numbers", "17"], "expected data in a folder, found none"),
        (["reproduce", "all", "--shout"], "unrecognized arguments: --shout"),
        (["report", "nowhere"], "expected results of netdeconv reproduce in nowhere"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error and error.count("\n") == 1


def test_all_goes_on_where_one_has_no_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    without = dataclasses.replace(EXPERIMENT, name="other", sizes={size: Settings(numbers=(17.0,)) for size in SIZES})
    both = {"other": without, "squares": EXPERIMENT}
    monkeypatch.setattr("netdeconv.lab.reproduce_command.EXPERIMENTS", dict.fromkeys(both, ("", "")))
    monkeypatch.setattr("netdeconv.lab.reproduce_command.load", both.__getitem__)
    assert main(["reproduce", "all", "--out", str(tmp_path), "--quiet"]) == 2
    printed = capsys.readouterr()
    assert "1 of 2 experiments could not run. other: expected data in a folder" in printed.err
    assert "Numbers have squares." in printed.out


def test_an_experiment_has_all_sizes() -> None:
    with pytest.raises(ValueError, match="expected settings for the sizes"):
        dataclasses.replace(EXPERIMENT, sizes={"small": Settings()})


def test_bars_in_cells_do_not_end_them() -> None:
    assert Table(["a", "b"], [["|x|", "1"]]).to_markdown().endswith("| \\|x\\| | 1 |")
