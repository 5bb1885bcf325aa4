"""The command line: help, versions, and mistakes that take one line and exit code 2."""

from __future__ import annotations

import builtins
import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

import netdeconv
from netdeconv import cli


def complaint(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line that a wrong command line leaves on standard error."""
    assert cli.main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"netdeconv {netdeconv.__version__}\n"


@pytest.mark.parametrize("argv", [["--help"], ["demo", "--help"]])
def test_help_lists_what_there_is(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(argv) == 0
    assert ("demo" if len(argv) == 1 else "--epochs") in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "required: COMMAND"),
        (["dmeo"], "invalid choice: 'dmeo'"),
        (["demo", "--epochs", "ten"], "argument --epochs: invalid int value: 'ten'"),
        (["demo", "--epoch", "3"], "unrecognized arguments: --epoch 3. The nearest name is --epochs"),
        (["bench", "step", "--wdith=2"], "unrecognized arguments: --wdith=2. The nearest name is --width"),
        (["reproduce", "mlp", "--seed=2"], "unrecognized arguments: --seed=2. The nearest name is --seeds"),
    ],
)
def test_a_wrong_command_line_is_one_line(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in complaint(capsys, *argv)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--epochs", "0"], "expected epochs above 0, got 0"),
        (["--seeds", "-1"], "expected seeds above 0, got -1"),
        (["--rates", "0.1", "0"], "expected rates above 0, got 0"),
        (["--rates", "0.1", "0.1"], "expected values of rates that differ"),
        (["--target", "97"], "between 0 and 1, got 97"),
    ],
)
def test_a_setting_out_of_range_is_one_line(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in complaint(capsys, "demo", *argv)


def test_a_run_folder_that_is_a_file_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lightning")
    taken = tmp_path / "taken"
    taken.write_text("")
    assert str(taken) in complaint(capsys, "demo", "--quiet", "--out", str(taken))


def test_a_missing_lab_extra_names_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = builtins.__import__

    def without_lightning(name: str, *args: object, **kwargs: object) -> object:
        if name.partition(".")[0] == "lightning":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *args, **kwargs)  # type: ignore[arg-type]

    if "netdeconv.lab" in sys.modules:  # loading it again would change the attribute for tests to come
        monkeypatch.setattr(sys.modules["netdeconv"], "lab", sys.modules["netdeconv.lab"])
    for loaded in [m for m in sys.modules if m.startswith("netdeconv.lab")]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setattr(builtins, "__import__", without_lightning)
    line = complaint(capsys, "demo")
    assert "needs lightning" in line
    assert 'pip install "netdeconv[lab]"' in line


def test_a_missing_module_of_our_own_is_not_explained_away(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(args: object) -> int:
        raise ModuleNotFoundError("No module named 'netdeconv.gone'", name="netdeconv.gone")

    command = cli.Command("demo", "", lambda parser: None, broken)
    monkeypatch.setattr(cli, "COMMANDS", (command,))
    with pytest.raises(ModuleNotFoundError, match=r"netdeconv\.gone"):
        cli.main(["demo"])


def test_ctrl_c_leaves_a_line_and_code_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def stopped(args: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "COMMANDS", (cli.Command("demo", "", lambda parser: None, stopped),))
    assert cli.main(["demo"]) == 130
    assert "stopped" in capsys.readouterr().err


def test_help_loads_no_lab_library() -> None:
    code = (  # numpy and tqdm are loaded by torch itself
        "import sys\nfrom netdeconv import cli\ncli.main(['demo', '--help'])\n"
        "print('LOADED', sorted({m.partition('.')[0] for m in sys.modules} & cli._LAB - {'numpy', 'tqdm'}))"
    )
    source = str(Path(netdeconv.__file__).parents[1])
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([source, os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
    assert done.stdout.endswith("LOADED []\n")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EFBIG])
def test_a_full_disk_is_one_line(
    number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(args: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(cli, "COMMANDS", (cli.Command("demo", "", lambda parser: None, full),))
    assert f"cannot write: {os.strerror(number)}. Make room" in complaint(capsys, "demo")


def test_another_error_of_the_system_is_not_explained_away(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(args: object) -> int:
        raise OSError(errno.EBADF, "Bad file descriptor")

    monkeypatch.setattr(cli, "COMMANDS", (cli.Command("demo", "", lambda parser: None, broken),))
    with pytest.raises(OSError, match="Bad file descriptor"):
        cli.main(["demo"])
