"""``netdeconv export``: a file that computes what the checkpoint's network does, or one line that says why not."""

from __future__ import annotations

import collections
import importlib.util
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import netdeconv
from netdeconv import ConfigError, NumericalError, WhiteningConfig, cli
from netdeconv.lab.checkpoint import load_checkpoint
from netdeconv.lab.onnx_file import largest_difference
from netdeconv.zoo import create

for package in ("onnx", "onnxruntime", "onnxscript"):
    pytest.importorskip(package)

RUNTIME_TOLERANCE = 1e-4  # float32, in a runtime that sums in another order

WIDTH = 1 / 32
NARROW = ("--network", "vgg11", "--width", str(WIDTH), "--classes", "7")

# Inside the exporters.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def narrow(norm: str, classes: int = 7, width: float = WIDTH) -> nn.Module:
    torch.manual_seed(0)
    model = create("vgg11", num_classes=classes, width=width)
    if norm != "bn":
        model = netdeconv.convert(model, WhiteningConfig.paper() if norm == "nd-paper" else None)
    for _ in range(2):
        model(torch.randn(8, 3, 32, 32))
    return model.eval()


@pytest.fixture(scope="module")
def models() -> dict[str, nn.Module]:
    return {norm: narrow(norm) for norm in ("nd", "nd-paper", "bn")}


@pytest.fixture
def saved(models: dict[str, nn.Module], tmp_path: Path) -> dict[str, Path]:
    """A checkpoint for each norm."""
    paths = {norm: tmp_path / f"{norm}.pt" for norm in models}
    for norm, path in paths.items():
        torch.save(models[norm].state_dict(), path)
    return paths


@pytest.fixture
def no_exporter(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mistake has to be found before the work."""

    def called(*args: object, **kwargs: object) -> Path:
        raise AssertionError("exported")

    monkeypatch.setattr("netdeconv.surgery.export_onnx", called)


def complaint(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """The one line on standard error; nothing else happened, in OUT's folder either."""
    out = next((Path(str(value)) for value in argv if str(value).endswith(".onnx")), Path("none"))
    before = sorted(out.parent.iterdir()) if out.parent.is_dir() else []
    assert cli.main(["export", *map(str, argv)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("netdeconv export: ")
    assert (sorted(out.parent.iterdir()) if out.parent.is_dir() else []) == before
    return captured.err


def run_file(path: Path, x: Tensor) -> Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


def kinds(path: Path) -> collections.Counter[str]:
    import onnx

    return collections.Counter(node.op_type for node in onnx.load(path).graph.node)


# ------------------------------------------------------------------------------------------------ files


def test_a_lightning_checkpoint_becomes_a_plain_file(
    models: dict[str, nn.Module], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = {f"net.{key}": value for key, value in models["nd"].state_dict().items()}
    checkpoint, out = tmp_path / "last.ckpt", tmp_path / "vgg.onnx"
    torch.save({"epoch": 3, "state_dict": {**state, "loss.weight": torch.ones(7)}}, checkpoint)
    out.write_text("old")
    assert cli.main(["export", str(checkpoint), str(out), *NARROW]) == 0
    line = capsys.readouterr().out
    assert line.count("\n") == 1
    for part in (f"{out}: opset 20; 8 Conv, ", "1 Gemm", "largest difference is", "not under net. (1)"):
        assert part in line
    assert kinds(out)["Conv"] == 8 and not {"MatMul", "Einsum"} & set(kinds(out))
    x = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(run_file(out, x), models["nd"](x), rtol=0, atol=RUNTIME_TOLERANCE)
        assert not torch.allclose(models["bn"](x), models["nd"](x), atol=100 * RUNTIME_TOLERANCE)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.ckpt", "vgg.onnx"]
    assert out.stat().st_mode & 0o777 == checkpoint.stat().st_mode & 0o777  # not the mode of a temporary file


def test_unfused_with_another_opset(
    saved: dict[str, Path], models: dict[str, nn.Module], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "paper.onnx"
    options = ("--norm", "nd-paper", "--unfused", "--opset", "21", "--input-size", "3", "64", "32")
    assert cli.main(["export", str(saved["nd-paper"]), str(out), *NARROW, *options]) == 0
    assert f"{out}: opset 21; " in capsys.readouterr().out
    assert {"MatMul", "Einsum"} & set(kinds(out))
    x = torch.randn(2, 3, 64, 32)
    with torch.no_grad():
        torch.testing.assert_close(run_file(out, x), models["nd-paper"](x), rtol=0, atol=RUNTIME_TOLERANCE)


def test_a_network_of_torchvision_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torchvision = pytest.importorskip("torchvision")
    model = torchvision.models.squeezenet1_1(num_classes=5).eval()
    checkpoint, out = tmp_path / "s.pt", tmp_path / "s.onnx"
    torch.save(model.state_dict(), checkpoint)
    options = ("--network", "torchvision:squeezenet1_1", "--classes", "5", "--norm", "bn")
    assert cli.main(["export", str(checkpoint), str(out), *options]) == 0
    assert "26 Conv" in capsys.readouterr().out
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(run_file(out, x), model(x), rtol=0, atol=RUNTIME_TOLERANCE)


# ------------------------------------------------------------------------------------------------ checkpoints


def test_prefixes(models: dict[str, nn.Module], tmp_path: Path) -> None:
    state, path = models["nd"].state_dict(), tmp_path / "c.pt"
    for prefix in ("", "model.", "net._orig_mod."):
        torch.save({prefix + key: value for key, value in state.items()}, path)
        model = netdeconv.convert(create("vgg11", num_classes=7, width=WIDTH))
        assert load_checkpoint(model, path, norm="nd", classes=7) == (prefix, 0)
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    torch.save({prefix + key: value for key, value in state.items() for prefix in ("student.", "teacher.")}, path)
    with pytest.raises(ConfigError, match=r"got several, with the prefixes student\., teacher\."):
        load_checkpoint(model, path, norm="nd", classes=7)


@pytest.mark.usefixtures("no_exporter")
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "expected a checkpoint, there is no such file"),
        (b"", "one that is damaged or of another kind"),
        (b"hello", "one that is damaged or of another kind"),
        (3, "damaged or of another kind"),  # the first third of a good file
        (nn.Linear(2, 2), "an object that needs code to load (torch.nn.modules.linear.Linear)"),
        ([1, 2], "expected a state dict, got list"),
        ({}, "got an empty one"),
        ({"model": {}, "epoch": 3}, "got model (dict), epoch (int). Take the state dict out"),
    ],
)
def test_a_file_that_is_no_checkpoint(
    content: Any, message: str, saved: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "c.pt"
    if content == 3:
        content = saved["nd"].read_bytes()[: saved["nd"].stat().st_size // 3]
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    line = complaint(capsys, path, tmp_path / "a.onnx", *NARROW)
    assert line.startswith(f"netdeconv export: {path}: ")
    assert message in line


@pytest.mark.usefixtures("no_exporter")
@pytest.mark.parametrize(
    ("norm", "options", "found", "remedy"),
    [
        (
            "nd",
            ("--classes", "9"),
            "classifier.weight has shape (7, 16) instead of (9, 16) (and 1 more)",
            "--classes 7",
        ),
        ("nd", ("--width", "0.125"), "features.0.weight has shape (2, 3, 3, 3) instead of (8, 3, 3, 3)", "--width"),
        ("nd", ("--norm", "bn"), "features.1.weight is missing", "whitened network: try --norm nd."),
        ("nd", ("--norm", "nd-paper"), "features.0.whitening.running_var is unexpected", "Try --norm nd."),
        ("nd-paper", (), "features.0.whitening.running_var is missing", "Try --norm nd-paper."),
        ("bn", (), "features.0.whitening.running_mean is missing", "no whitening statistics: try --norm bn"),
        ("nd", ("--network", "resnet18"), "conv1.weight is missing", "Check --network"),
    ],
)
def test_a_checkpoint_of_another_network(
    norm: str,
    options: tuple[str, ...],
    found: str,
    remedy: str,
    saved: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    line = complaint(capsys, saved[norm], tmp_path / "a.onnx", *NARROW, *options)
    assert f"{saved[norm]}: is of another network: " in line
    assert found in line
    assert remedy in line


def test_states_that_fit_in_part(models: dict[str, nn.Module], tmp_path: Path) -> None:
    state, path = models["nd"].state_dict(), tmp_path / "c.pt"
    model = netdeconv.convert(create("vgg11", num_classes=7, width=WIDTH))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    block = netdeconv.convert(create("vgg11", num_classes=7, width=WIDTH), WhiteningConfig(block_size=2))
    authors = {**state, "features.0.running_deconv": torch.eye(27)}
    diverged = {**state, "classifier.bias": torch.full((7,), float("nan"))}
    resized = r"whitening\.running_root has shape .*other settings than those of --norm nd, block_size or grouping"
    for changed, message in (
        (block.state_dict(), resized),
        (authors, r"running_deconv is unexpected\. .*load_published"),
        (diverged, r"NaN or infinite ones in classifier\.bias\. The run diverged"),
        ({**state, "extra": torch.ones(1)}, r"network: extra is unexpected"),
    ):
        torch.save(changed, path)
        with pytest.raises(ConfigError, match=message):
            load_checkpoint(model, path, norm="nd", classes=7)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


# ------------------------------------------------------------------------------------------------ other mistakes


@pytest.mark.usefixtures("no_exporter")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--network", "resnet81"), "there is no resnet81. The nearest name is resnet18."),
        (("--network", "xyz"), "there is no xyz. There is "),
        (("--network", "torchvision:mobilnet_v2"), "The nearest name is torchvision:mobilenet_v2."),
        (("--network", "caffe:resnet18"), "there is no caffe:resnet18"),
        (("--network", "torchvision:resnet18"), "width=0.03125 cannot apply"),
        (("--input-size", "1", "32", "32"), "cannot be run with --input-size 1 32 32: features.0"),
        (("--input-size", "3", "8", "8"), "cannot be run with --input-size 3 8 8"),
        (("--width", "0"), "expected a number above 0, got 0"),
        (("--classes", "two"), "invalid int value: 'two'"),
        (("--norm", "lnn"), "invalid choice: 'lnn'"),
    ],
)
def test_wrong_options(
    options: tuple[str, ...],
    message: str,
    saved: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("torchvision")
    assert message in complaint(capsys, saved["nd"], tmp_path / "a.onnx", *NARROW, *options)


@pytest.mark.usefixtures("no_exporter")
def test_an_untrained_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "c.pt"
    torch.save(netdeconv.convert(create("vgg11", num_classes=7, width=WIDTH)).state_dict(), path)
    assert "was saved before the first training step" in complaint(capsys, path, tmp_path / "a.onnx", *NARROW)


@pytest.mark.usefixtures("no_exporter")
def test_places_that_cannot_be_written(
    saved: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved["nd"]
    (tmp_path / "folder.onnx").mkdir()
    assert "got a folder" in complaint(capsys, path, tmp_path / "folder.onnx", *NARROW)
    assert "another file than the checkpoint" in complaint(capsys, path, path, *NARROW)
    for parent in ("absent", "nd.pt"):
        assert f"cannot write to the folder {tmp_path / parent}: " in complaint(
            capsys, path, tmp_path / parent / "a.onnx", *NARROW
        )

    def denied(*args: object, **kwargs: object) -> object:
        raise PermissionError(13, "Permission denied", "somewhere")

    monkeypatch.setattr(tempfile, "mkdtemp", denied)
    line = complaint(capsys, path, tmp_path / "a.onnx", *NARROW)
    assert f"cannot write to the folder {tmp_path}: Permission denied" in line


@pytest.mark.parametrize("package", ["onnx", "onnxruntime", "onnxscript"])
def test_a_missing_extra(
    package: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else real(name))
    line = complaint(capsys, tmp_path / "c.pt", tmp_path / "a.onnx", *NARROW)
    assert f'needs {package}, which is not installed. Run: pip install "netdeconv[export]"' in line


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(28, "No space left on device"), "a.onnx: No space left on device. Nothing was changed there"),
        (NumericalError("export_onnx: expected a.onnx to give"), "expected a.onnx to give"),
        (RuntimeError("no operator\nlong report"), "cannot be exported with opset 20: no operator"),
        (None, "--opset: expected 20, the exporter of torch could only write opset 18"),
    ],
)
def test_a_failing_exporter_leaves_the_old_file(
    error: Exception | None,
    message: str,
    saved: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import onnx

    def failing(model: nn.Module, example: Tensor, path: Path, **options: object) -> Path:
        graph = onnx.helper.make_graph([], "empty", [], [])
        onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)]), path)
        if error is not None:
            raise error
        return path

    monkeypatch.setattr("netdeconv.surgery.export_onnx", failing)
    out = tmp_path / "a.onnx"
    out.write_text("old")
    line = complaint(capsys, saved["nd"], out, *NARROW)
    assert message in line and "long report" not in line
    assert out.read_text() == "old"


def test_a_file_that_computes_something_else(tmp_path: Path) -> None:
    import onnx

    shape = ["N", 2]
    values = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name in ("input", "out")]
    node = onnx.helper.make_node("Relu", ["input"], ["out"])
    graph = onnx.helper.make_graph([node], "relu", values[:1], values[1:])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    path = tmp_path / "relu.onnx"
    onnx.save(model, path)
    x = torch.tensor([[1.0, -2.0], [4.0, 0.0]])
    assert largest_difference(path, x, [x.relu()]) == 0
    for other in (x.relu() + 1e-2, x.relu() * float("nan")):
        with pytest.raises(ConfigError, match=r"relu\.onnx: expected the network's output within 1e-04"):
            largest_difference(path, x, [other])
    for others in ([x.relu(), x], [], [x.relu()[:1]]):
        with pytest.raises(ConfigError, match=r"expected the network's outputs, of shapes .*, got \[\(2, 2\)\] in"):
            largest_difference(path, x, others)


def test_help_loads_no_exporter(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("onnx", "onnxruntime", "onnxscript", "torchvision"):
        monkeypatch.setitem(sys.modules, name, None)  # an import fails
    assert cli.main(["export", "--help"]) == 0
    assert "--opset" in capsys.readouterr().out
