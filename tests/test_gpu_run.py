"""The tool for machines with a GPU, on the CPU: order, time, failures, what a next call does, and its data."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from gpu_run import Run
from gpu_stages import ROOT, Stage, planned
from netdeconv.cli import main
from netdeconv.lab.data import CIFAR10Data
from pack_cifar import pack

# Seconds in which an interpreter surely starts; a stage of so many is stopped in the middle of its sleep.
STARTED = 4.0
SLEEP = "import time; time.sleep(600)"


def stage(name: str, *scripts: str, **changes: Any) -> Stage:
    return Stage(name, "fake", tuple(("-c", script) for script in scripts), **changes)


def states(out: Path) -> dict[str, str]:
    return {facts["name"]: facts["state"] for facts in json.loads((out / "summary.json").read_text())}


def adds(path: Path, word: str) -> str:
    return f"open({str(path)!r}, 'a').write('{word} ')"


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "Z" not in Path(f"/proc/{pid}/stat").read_text().split()[2] if Path("/proc/self/stat").exists() else True


def test_stages_run_in_order_and_say_what_came_out(tmp_path: Path) -> None:
    done = tmp_path / "done"
    stages = [stage("second", adds(done, "one")), stage("first", adds(done, "two") + "; print('forty-two')")]
    assert Run(tmp_path, 600).carry_out(stages)
    assert done.read_text() == "one two "
    assert states(tmp_path) == {"second": "done", "first": "done"}
    assert "forty-two" in (tmp_path / "logs" / "first.log").read_text()
    assert "forty-two" in (tmp_path / "summary.md").read_text()
    assert json.loads((tmp_path / "stages" / "first.json").read_text())["codes"] == [0]


def test_the_next_call_leaves_out_what_is_done(tmp_path: Path) -> None:
    done = tmp_path / "done"
    stages = [
        stage("good", adds(done, "good")),
        stage("bad", adds(done, "bad") + "; raise SystemExit(3)"),
        stage("data", adds(done, "data"), always=True),
    ]
    for _ in range(2):
        assert not Run(tmp_path, 600).carry_out(stages)
    assert done.read_text() == "good bad data bad data "
    assert states(tmp_path) == {"good": "done", "bad": "failed", "data": "done"}
    other = stage("good", adds(done, "other"))
    assert Run(tmp_path, 600).carry_out([other])
    assert done.read_text().endswith(" other ")


def test_results_are_known_again_in_another_place(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert Run(first, 600).carry_out([stage("one", adds(first / "done", "one"))])
    first.rename(second)
    assert Run(second, 600).carry_out([stage("one", adds(second / "done", "one"))])
    assert (second / "done").read_text() == "one "


def test_a_summary_is_there_while_a_stage_runs(tmp_path: Path) -> None:
    copies = f"import shutil; shutil.copy({str(tmp_path / 'summary.json')!r}, {str(tmp_path / 'seen')!r})"
    assert Run(tmp_path, 600).carry_out([stage("one", copies), stage("two", "pass")])
    assert [facts["state"] for facts in json.loads((tmp_path / "seen").read_text())] == ["running", "not yet"]


@pytest.fixture
def heard_interrupts() -> Iterator[None]:
    """SIGINT as in the tool's main, so that commands hear it; a shell that starts us behind an & has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heard_interrupts")
def test_out_of_time_is_asked_then_killed_with_its_children(tmp_path: Path) -> None:
    pids = {tmp_path / "child": "p.pid", tmp_path / "deaf": "os.getpid()"}
    polite = f"import time\ntry: time.sleep(600)\nexcept KeyboardInterrupt: {adds(tmp_path / 'kept', 'kept')}"
    child = f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {SLEEP!r}])"
    deaf = "import os, signal; signal.signal(signal.SIGINT, signal.SIG_IGN)"
    writes = [f"open({str(path)!r}, 'w').write(str({pid}))" for path, pid in pids.items()]
    scripts = [polite, f"{child}; {writes[0]}; {SLEEP}", f"{deaf}; {writes[1]}; {SLEEP}"]
    run = Run(tmp_path, 600, grace=3.0, least=0)
    assert run.carry_out([stage("long", *scripts, seconds=STARTED), stage("next", "pass")])
    assert states(tmp_path) == {"long": "out of time", "next": "done"}
    assert (tmp_path / "kept").read_text() == "kept "
    assert not any(is_alive(int(path.read_text())) for path in pids)


def test_nothing_starts_without_time_for_it(tmp_path: Path) -> None:
    assert Run(tmp_path, 10, grace=1, least=20).carry_out([stage("one", adds(tmp_path / "done", "one"))])
    assert states(tmp_path) == {"one": "no time left"}
    assert not (tmp_path / "done").exists()


def test_commands_of_a_stage_run_at_once(tmp_path: Path) -> None:
    meets = (
        "import sys, time; from pathlib import Path; mine, other = map(Path, ({0!r}, {1!r})); mine.touch()\n"
        "while not other.exists(): time.sleep(0.02)"
    )
    names = [str(tmp_path / name) for name in "ab"]
    assert Run(tmp_path, 600).carry_out([stage("both", meets.format(*names), meets.format(*names[::-1]), seconds=120)])
    assert states(tmp_path) == {"both": "done"}


def test_nothing_is_left_running_when_the_tool_is_ended(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    writes = f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    script = (
        "import gpu_run; from gpu_stages import Stage\n"
        f"gpu_run.planned = lambda *_, **__: [Stage('long', 'tests', (('-c', {writes!r}),))]\n"
        f"raise SystemExit(gpu_run.main(['--stages', 'tests', '--out', {str(tmp_path)!r}]))"
    )
    tool = subprocess.Popen([sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": str(ROOT / "tools")})
    while not (pid.exists() and pid.read_text()):
        assert tool.poll() is None
        time.sleep(0.05)
    tool.send_signal(signal.SIGTERM)
    assert tool.wait(60) == 143
    assert not is_alive(int(pid.read_text()))


@pytest.mark.skipif(torch.cuda.is_available(), reason="would train")
@pytest.mark.parametrize("name", ["bench-resnet50", "bench-resnet18-compiled", "cifar", "fit"])
def test_commands_lack_a_gpu_and_nothing_else(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (found,) = [one for one in planned(tmp_path) if one.name == name]
    module, package, *arguments = found.commands[-1]
    assert (module, package) == ("-m", "netdeconv.cli")
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "torch finds no GPU here" in error or "No supported gpu backend found" in error


def test_a_stage_that_is_not_there_is_named(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tools" / "gpu_run.py"), "--stages", "tests,bensch", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "no stage bensch; there are tests, bench, cifar, fit" in done.stderr


def archive_of_images(folder: Path) -> Path:
    """Two images for each of ten classes and parts, packed as the data set is."""
    for part in ("train", "test"):
        for label in range(10):
            place = folder / "cifar10-jpeg" / part / f"class{label}"
            place.mkdir(parents=True)
            for index in range(2):
                Image.new("RGB", (32, 32), (20 * label, 100, 10 * index)).save(place / f"{index}.jpg")
    archive = folder / "cifar10-jpeg.tar.xz"
    with tarfile.open(archive, "w:xz") as file:
        file.add(folder / "cifar10-jpeg", "cifar10-jpeg")
    return archive


def test_packed_images_are_those_of_the_folder(tmp_path: Path) -> None:
    archive = archive_of_images(tmp_path)
    place = pack(archive, tmp_path / "packed")
    assert pack(archive, tmp_path / "packed") == place
    parts = []
    for root in (tmp_path, tmp_path / "packed"):
        data = CIFAR10Data(root=root)
        data.setup()
        parts.append(data.parts)
    for part in ("train", "test"):
        for folder, packed in zip(parts[0][part], parts[1][part], strict=True):
            assert len(folder) == 20
            assert torch.equal(folder, packed)


@pytest.mark.slow
def test_everything_at_toy_size(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tools" / "gpu_run.py"), "--toy", "--budget", "800", "--processes", "2"]
    command += ["--out", str(tmp_path)]
    first = subprocess.run(command, capture_output=True, text=True, check=False)
    assert first.returncode == 0, first.stdout + (tmp_path / "summary.md").read_text()
    assert set(states(tmp_path).values()) == {"done"}
    assert json.loads((tmp_path / "bench" / "resnet18" / "step.json").read_text())["complete"]
    assert json.loads((tmp_path / "reproduce" / "cifar" / "result.json").read_text())["complete"]
    assert len(list((tmp_path / "fit").glob("*/metrics.csv"))) == 2
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "running" in first.stdout and "running" not in again.stdout
