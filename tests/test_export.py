"""Evaluation networks in other runtimes: torch.export, ONNX, and eight bits."""

from __future__ import annotations

import collections
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import netdeconv
from netdeconv import ConfigError, NumericalError
from netdeconv.surgery import deploy
from netdeconv.surgery.batches import max_relative_error
from netdeconv.surgery.deploy import OPSET, export_onnx
from netdeconv.zoo import create
from variation import Variation

RUNTIME_TOLERANCE = 1e-4  # float32, in a runtime that sums in another order
INT8_LOSS = 0.05  # of the accuracy; at most 0.005 over five seeds, 0.018 and 0.032 were seen before

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

# Inside the exporters.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def small() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.ReLU()]
    model = netdeconv.convert(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)))
    model(torch.randn(16, 3, 12, 12))
    return model.eval()


def run(path: Path, x: torch.Tensor) -> torch.Tensor:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"input": x.numpy()})[0])


@pytest.mark.slow
def test_a_fused_resnet_is_an_ordinary_onnx_network(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = netdeconv.convert(create("resnet18", width=0.25))
    model(torch.randn(4, 3, 32, 32))
    model.eval()
    path = export_onnx(model, torch.randn(1, 3, 32, 32), tmp_path / "resnet18.onnx")

    loaded = onnx.load(path)
    onnx.checker.check_model(loaded)
    assert [(entry.domain, entry.version) for entry in loaded.opset_import] == [("", OPSET)]
    nodes = collections.Counter(node.op_type for node in loaded.graph.node)
    assert nodes["Conv"] == 20 and nodes["Gemm"] == 1
    assert set(nodes) <= {"Conv", "Gemm", "Relu", "Add", "ReduceMean", "GlobalAveragePool", "Flatten", "Reshape"}
    for batch in (1, 7):
        x = torch.randn(batch, 3, 32, 32)
        with torch.no_grad():
            assert max_relative_error(run(path, x), model(x)) < RUNTIME_TOLERANCE


@pytest.mark.slow
def test_an_unfused_network_can_be_exported_too(tmp_path: Path) -> None:
    model = small()
    path = export_onnx(model, torch.randn(2, 3, 12, 12), tmp_path / "unfused.onnx", fused=False)
    x = torch.randn(5, 3, 12, 12)
    with torch.no_grad():
        assert max_relative_error(run(path, x), model(x)) < RUNTIME_TOLERANCE


def test_a_fixed_batch(tmp_path: Path) -> None:
    model = small()
    path = export_onnx(model, torch.randn(3, 3, 12, 12), tmp_path / "fixed.onnx", dynamic_batch=False)
    shape = onnx.load(path).graph.input[0].type.tensor_type.shape
    assert [entry.dim_value for entry in shape.dim] == [3, 3, 12, 12]


@pytest.mark.parametrize("fused", [False, True])
def test_torch_export(fused: bool) -> None:
    model = small()
    source = netdeconv.fuse(model) if fused else model
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(source, (torch.randn(2, 3, 12, 12),), dynamic_shapes=({0: batch},))
    x = torch.randn(7, 3, 12, 12)
    assert max_relative_error(program.module()(x), model(x)) < RUNTIME_TOLERANCE


def test_what_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 3, 12, 12)
    model = small()
    for fused in (True, False):
        with pytest.raises(ConfigError, match=r"got (the model in )?training mode"):
            export_onnx(model.train(), x, tmp_path / "a.onnx", fused=fused)
    assert not list(tmp_path.iterdir())

    def absent(name: str) -> Any:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(deploy.importlib, "import_module", absent)
    with pytest.raises(ConfigError, match=r"pip install 'netdeconv\[export\]'"):
        export_onnx(model.eval(), x, tmp_path / "a.onnx")


def test_a_wrong_file_is_noticed(tmp_path: Path) -> None:
    model = small()
    x = torch.randn(2, 3, 12, 12)
    path = export_onnx(model, x, tmp_path / "a.onnx")
    with torch.no_grad():
        model[0].bias += 1
    with pytest.raises(NumericalError, match=r"expected a\.onnx to give the model's output within 1e-04"):
        deploy._compare(model, path, ["input"], [x])


@pytest.mark.training
def test_eight_bits(tmp_path: Path, variation: Variation) -> None:
    quantization = pytest.importorskip("onnxruntime.quantization")
    datasets = pytest.importorskip("sklearn.datasets")
    digits = datasets.load_digits()
    images = variation.moved(torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1)
    labels = torch.tensor(digits.target)
    torch.manual_seed(variation.seed)
    layers = [nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2, padding=1)]
    head = [nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 10)]
    model = netdeconv.convert(nn.Sequential(*layers, *head))
    optimiser = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for _ in range(3):
        for index in torch.randperm(1200).split(64):
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(images[index]), labels[index]).backward()
            optimiser.step()
    path, small_path = tmp_path / "float.onnx", tmp_path / "int8.onnx"
    export_onnx(model.eval(), images[:4], path)

    class Reader(quantization.CalibrationDataReader):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            self.rest = iter(images[:512].split(64))

        def get_next(self) -> Any:
            x = next(self.rest, None)
            return None if x is None else {"input": x.numpy()}

    quantization.quantize_static(str(path), str(small_path), Reader(), per_channel=True)
    nodes = collections.Counter(node.op_type for node in onnx.load(small_path).graph.node)
    assert nodes["QuantizeLinear"] > 0

    def accuracy(file: Path) -> float:
        return float((run(file, images[1200:]).argmax(1) == labels[1200:]).float().mean())

    assert accuracy(path) > 0.85
    assert accuracy(path) - accuracy(small_path) < INT8_LOSS


def test_an_opset_that_the_exporter_replaces_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "old.onnx"
    with pytest.raises(ConfigError, match=r"got opset=12, for which it wrote \d+\. Pass opset="):
        export_onnx(create("vgg11", width=0.03).eval(), torch.zeros(2, 3, 32, 32), path, opset=12)
    assert not path.exists()
