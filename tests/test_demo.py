"""The demo at its smallest: all files, numbers that agree with each other, and nothing done twice."""

from __future__ import annotations

import json
import math
import re
import signal
import statistics
from pathlib import Path

import pytest

pytest.importorskip("lightning")
pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

import torch
from torch import nn

from netdeconv import WhitenedConv2d, WhitenedLinear, cli
from netdeconv.errors import ConfigError
from netdeconv.lab.data import DigitsData, TensorBatches
from netdeconv.lab.experiments import demo, demo_numbers, demo_report
from netdeconv.lab.networks import SmallConvNet
from netdeconv.lab.run_record import with_fresh_statistics
from netdeconv.lab.store import RunStore, read_json, write_json

TINY = ["--epochs", "1", "--seeds", "1", "--rates", "0.03", "0.1", "--batch-size", "256"]


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A finished tiny demo: its run folder and what it printed."""
    out = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        lines: list[str] = []
        patch.setattr("builtins.print", lambda *args, **kwargs: lines.append(" ".join(map(str, args))))
        assert cli.main(["demo", "--quiet", "--out", str(out), *TINY]) == 0
    return out, "\n".join(lines)


def test_all_files_are_there(first: tuple[Path, str]) -> None:
    out, printed = first
    for name in demo_report.FILES:
        assert (out / name).stat().st_size > 1000
        assert str(out / name) in printed
    for picture in out.glob("*.png"):
        assert picture.read_bytes().startswith(b"\x89PNG")
    assert not list(out.rglob("*.part"))


def test_metrics_agree_with_the_runs(first: tuple[Path, str]) -> None:
    out, printed = first
    metrics = json.loads((out / "metrics.json").read_text())
    assert len(metrics["runs"]) == 4 == len(list((out / "runs").glob("*.json")))
    for norm, method in metrics["methods"].items():
        grid = {entry["rate"]: entry for entry in method["grid"]}
        assert sorted(grid) == metrics["settings"]["rates"]
        best = max(entry["validation_accuracy"][0] for entry in grid.values())
        assert grid[method["rate"]]["validation_accuracy"][0] == best
        (run,) = (r for r in metrics["runs"] if (r["norm"], r["rate"]) == (norm, method["rate"]))
        assert run["curves"]["test/accuracy"] == [method["test_accuracy"][0]["mean"]]
        assert method["test_accuracy"][0]["sd"] is None
        assert run["steps"] == 4
        times = [r["seconds_per_step"] for r in metrics["runs"] if r["norm"] == norm]
        assert method["seconds_per_step"] == statistics.median(times) > 0
        assert f"{100 * method['test_accuracy'][0]['mean']:.1f} %" in printed
    assert sum(metrics["data"][part] for part in ("train", "validation", "test")) == 1797
    for numbers in metrics["whiteness"].values():
        assert numbers["before"] > numbers["5 iterations"] > numbers["converged root"]


def test_the_page_is_one_file(first: tuple[Path, str]) -> None:
    page = (first[0] / "report.html").read_text()
    sources = re.findall(r'src="([^"]{0,30})', page)
    assert len(sources) == 3
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert not re.search(r"https?://|<script[^>]|<link rel=.stylesheet|url\(|@import", page)
    assert page.count("<figcaption>") == 3


def test_a_second_call_repeats_nothing(first: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    out, _ = first
    before = json.loads((out / "metrics.json").read_text())
    pictures = {name: (out / name).read_bytes() for name in ("filters.png", "correlation.png")}  # these take long
    trained: list[demo.Run] = []
    real = demo._train

    def counted(run: demo.Run, *args: object) -> dict:
        trained.append(run)
        return real(run, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(demo, "_train", counted)
    monkeypatch.setattr(demo_report, "_whitening_pictures", lambda digits: (pictures, before["whiteness"]))
    assert cli.main(["demo", "--quiet", "--out", str(out), *TINY]) == 0
    assert trained == []
    after = json.loads((out / "metrics.json").read_text())
    assert after["runs"] == before["runs"]
    (out / "runs").joinpath(next((out / "runs").glob("nd-rate0.1-*")).name).write_text('{"settings"')
    assert cli.main(["demo", "--quiet", "--out", str(out), *TINY]) == 0
    assert trained == [demo.Run("nd", 0.1, 0)]
    again = json.loads((out / "metrics.json").read_text())
    assert [r["curves"] for r in again["runs"]] == [r["curves"] for r in before["runs"]]


def test_a_stopped_demo_keeps_finished_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    real = demo.Classification.training_step
    calls = iter(range(100))

    def stopping(self: demo.Classification, *args: object) -> object:
        if next(calls) == 5:  # in the second run
            raise KeyboardInterrupt
        return real(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(demo.Classification, "training_step", stopping)
    handler = signal.getsignal(signal.SIGINT)
    assert cli.main(["demo", "--out", str(tmp_path), *TINY]) == 130
    assert signal.getsignal(signal.SIGINT) is handler  # Lightning ignores it for a while
    assert len(list((tmp_path / "runs").glob("*.json"))) == 1
    assert "the same command goes on" in capsys.readouterr().err


def test_both_networks_have_the_same_layers() -> None:
    bn, nd = SmallConvNet("bn"), SmallConvNet("nd")
    shapes = [
        {n: p.shape for n, p in net.named_parameters() if n.endswith("weight") and "norm" not in n} for net in (bn, nd)
    ]
    assert shapes[0] == shapes[1]
    assert not any(isinstance(m, nn.BatchNorm2d) for m in nd.modules())
    assert sum(isinstance(m, (WhitenedConv2d, WhitenedLinear)) for m in nd.modules()) == 4
    assert bn(torch.randn(2, 1, 8, 8)).shape == nd(torch.randn(2, 1, 8, 8)).shape == (2, 10)


def test_wrong_networks_are_refused() -> None:
    with pytest.raises(ConfigError, match="'bn' or 'nd', got 'ln'"):
        SmallConvNet("ln")
    with pytest.raises(ConfigError, match="multiple of 4, got 10"):
        SmallConvNet("bn", image_size=10)


def test_splits_are_stratified_disjoint_and_fixed() -> None:
    data, again = DigitsData(), DigitsData(seed=5)
    data.setup()
    again.setup()
    images = torch.cat([x.flatten(1) for x, _ in data.parts.values()])
    assert len(images) == 1797
    assert len(images.unique(dim=0)) == 1797  # no image is in two parts
    for part, (x, y) in data.parts.items():
        assert torch.equal(x, again.parts[part][0])
        assert (y.bincount() / len(y)).sub(0.1).abs().max() < 0.01
    assert data.parts["train"][0].mean().abs() < 1e-5


def test_batches_cover_everything_in_a_new_order() -> None:
    batches = TensorBatches(torch.arange(10), batch_size=4, seed=0)
    first, second = (torch.cat([b[0] for b in batches]) for _ in range(2))
    assert len(batches) == 3
    assert not torch.equal(first, second)
    assert torch.equal(first.sort().values, second.sort().values)
    fixed = TensorBatches(torch.arange(10), batch_size=4)
    assert torch.equal(torch.cat([b[0] for b in fixed]), torch.arange(10))


def test_the_rate_is_chosen_on_validation_and_ties_go_to_the_lower_loss() -> None:
    def entry(rate: float, accuracy: list[float], loss: list[float | None]) -> dict:
        return {"rate": rate, "validation_accuracy": accuracy, "validation_loss": loss}

    grid = [
        entry(0.1, [0.9, 0.8], [1.0, 1.0]),
        entry(0.2, [0.8, 0.9], [0.5, 0.5]),
        entry(0.3, [0.85, 0.85], [None, 0.1]),
    ]
    assert demo_numbers.choose_rate(grid) == 0.2


def test_few_epochs_are_all_shown_and_many_are_not() -> None:
    assert demo_numbers.shown_epochs(3) == [1, 2, 3]
    assert demo_numbers.shown_epochs(30) == [1, 2, 3, 5, 10, 20, 30]


def test_runs_are_found_by_their_exact_settings(tmp_path: Path) -> None:
    store = RunStore(tmp_path / "runs")
    store.save("a", {"rate": 0.1, "grid": (1, 2)}, {"loss": math.nan})
    assert store.load("a", {"rate": 0.1, "grid": (1, 2)}) == {"loss": None}
    assert store.load("a", {"rate": 0.2, "grid": (1, 2)}) is None
    assert store.load("b", {"rate": 0.1, "grid": (1, 2)}) is None
    (file,) = store.folder.glob("*.json")
    write_json(file, {**read_json(file), "settings": {"rate": 0.2}})  # as if two settings had one hash
    assert store.load("a", {"rate": 0.1, "grid": (1, 2)}) is None


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "numbers.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_json(path, {"a": object()})
    assert read_json(path) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["numbers.json"]


def test_a_network_with_fresh_statistics_equals_one_batch_of_training() -> None:
    torch.manual_seed(0)
    images = 3 * torch.randn(64, 1, 8, 8) + 1
    for norm in ("bn", "nd"):
        net = SmallConvNet(norm).train()
        for _ in range(3):
            net(images - 2)  # what the network remembers is off
        state = {name: value.clone() for name, value in net.state_dict().items()}
        fresh = with_fresh_statistics(net, images)
        assert not fresh.training
        outputs = fresh(images)
        assert not torch.allclose(outputs, net.eval()(images), atol=1e-2)
        # BatchNorm remembers the unbiased variance (64/63 of it, in the last layer 256/255), whitening a sample's.
        torch.testing.assert_close(outputs, fresh.train()(images), atol=0.05, rtol=0.05)
        assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
