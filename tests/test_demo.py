"""The demo at its smallest: one page, numbers that agree with each other, and nothing done twice."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lightning")
pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

import torch
from torch import nn

from netdeconv import WhitenedConv2d, WhitenedLinear, cli
from netdeconv.errors import ConfigError
from netdeconv.lab import train
from netdeconv.lab.data import DigitsData, TensorBatches
from netdeconv.lab.experiments import demo
from netdeconv.lab.networks import SmallConvNet
from netdeconv.lab.recorder import with_fresh_statistics
from netdeconv.lab.store import read_json, write_json
from netdeconv.lab.tasks import Classification
from netdeconv.lab.train import Record, Training

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


def runs_in(out: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((out / "demo" / "result.json").read_text())["result"]["runs"]
    return found


def test_the_table_agrees_with_the_runs(first: tuple[Path, str]) -> None:
    out, printed = first
    runs = runs_in(out)
    assert [(run["norm"], run["rate"]) for run in runs] == [("bn", 0.03), ("nd", 0.03), ("bn", 0.1), ("nd", 0.1)]
    assert len(list((out / "demo" / "parts").glob("*.json"))) == 4
    cells = {cells[0]: cells for line in printed.splitlines() if (cells := re.split(r" %?  +| %$", line))}
    for column, norm in enumerate(("bn", "nd"), 1):
        mine = [run for run in runs if run["norm"] == norm]
        chosen = max(mine, key=lambda run: run["curves"]["validation/accuracy"][-1])
        assert chosen["steps"] == 4 and chosen["seconds_per_late_step"] > 0
        assert cells["learning rate, best of 0.03, 0.1"][column] == f"{chosen['rate']:g}"
        assert cells["after epoch 1"][column] == f"{100 * chosen['curves']['test/accuracy'][0]:.1f}"
        assert cells["after epoch 1, statistics recomputed"][column] == f"{100 * chosen['fresh_accuracy']:.1f}"


def test_the_page_is_one_file_with_filters_and_correlation(first: tuple[Path, str]) -> None:
    out, printed = first
    assert str(out / "report.html") in printed
    page = (out / "report.html").read_text()
    sources = re.findall(r'src="([^"]{0,30})', page)
    assert len(sources) == page.count("<figcaption>") == len(list(out.glob("*/*.png"))) == 5
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert not re.search(r"https?://|<script[^>]|<link rel=.stylesheet|url\(|@import", page)
    assert not list(out.rglob("*.part"))


def test_a_second_call_repeats_nothing(first: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    out, _ = first
    before = runs_in(out)
    trained: list[str] = []
    real = train.train

    def counted(training: Training, *args: Any) -> Record:
        trained.append(training.name)
        return real(training, *args)

    monkeypatch.setattr(train, "train", counted)
    assert cli.main(["demo", "--quiet", "--out", str(out), *TINY]) == 0
    assert trained == []
    assert runs_in(out) == before
    name = "demo-nd-batch256-rate0.1-seed0"
    next((out / "demo" / "parts").glob(f"{name}-*.json")).write_text('{"settings"')
    assert cli.main(["demo", "--quiet", "--out", str(out), *TINY]) == 0
    assert trained == [name]
    assert [run["curves"] for run in runs_in(out)] == [run["curves"] for run in before]
    assert cli.main(["demo", "--quiet", "--fresh", "--out", str(out), *TINY]) == 0
    assert len(trained) == 1 + 4


def test_a_stopped_demo_keeps_finished_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    real = Classification.training_step
    calls = iter(range(100))

    def stopping(self: Classification, *args: object) -> object:
        if next(calls) == 5:  # in the second run
            raise KeyboardInterrupt
        return real(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(Classification, "training_step", stopping)
    handler = signal.getsignal(signal.SIGINT)
    assert cli.main(["demo", "--out", str(tmp_path), *TINY]) == 130
    assert signal.getsignal(signal.SIGINT) is handler  # Lightning ignores it for a while
    assert len(list((tmp_path / "demo" / "parts").glob("*.json"))) == 1
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


def run_of(norm: str, rate: float, seed: int, chosen_by: float, loss: float | None, test: list[float]) -> dict:
    curves = {
        "train/loss": [loss, *test[1:]], "test/loss": test, "test/accuracy": test,
        "validation/accuracy": [chosen_by], "validation/loss": [loss],
    }  # fmt: skip
    about = {"norm": norm, "rate": rate, "seed": seed, "epochs": len(test), "batch_size": 64, "momentum": 0.9}
    numbers = {"parameters": 10, "seconds_per_step": 0.001, "seconds_per_late_step": 0.002, "fresh_accuracy": 0.5}
    return {**about, **numbers, "weight_decay": 0.0, "curves": curves}


def test_the_rate_is_chosen_on_validation_and_ties_go_to_the_lower_loss() -> None:
    runs = [
        run_of("bn", 0.1, 0, 0.9, 1.0, [0.2, 0.4]), run_of("bn", 0.1, 1, 0.8, 1.0, [0.2, 0.4]),
        run_of("bn", 0.2, 0, 0.8, 0.5, [0.1, 0.5]), run_of("bn", 0.2, 1, 0.9, 0.5, [0.3, 0.7]),
        run_of("bn", 0.3, 0, 0.85, None, [0.1, 0.9]), run_of("bn", 0.3, 1, 0.85, 0.1, [0.1, 0.9]),
        run_of("nd", 0.1, 0, 0.8, 1.0, [0.6, 0.8]), run_of("nd", 0.1, 1, 0.8, 1.0, [0.4, 0.6]),
        run_of("nd", 0.2, 0, 0.4, 1.0, [0.9, 0.9]), run_of("nd", 0.2, 1, 0.4, 1.0, [0.9, 0.9]),
    ]  # fmt: skip
    found = demo.present({"runs": runs, "target": 0.55})
    assert [list(row) for row in found.tables[0].rows] == [
        ["learning rate, best of 0.1, 0.2, 0.3", "0.2", "0.1"],
        ["after epoch 1", "20.0 ± 14.1 %", "50.0 ± 14.1 %"],
        ["after epoch 1, statistics recomputed", "50.0 ± 0.0 %", "50.0 ± 0.0 %"],
        ["after epoch 2", "60.0 ± 14.1 %", "70.0 ± 14.1 %"],
        ["epochs to 55 %", "2.0 (1 of 2 seeds)", "1.5"],
        ["ms per training step, median", "1.0", "1.0"],
        ["ms per training step, mean of the second half", "2.0", "2.0"],
        ["rates within 1 point of the best", "3 of 3", "1 of 2"],
    ]
    assert found.tables[1].rows[2][3:] == ["1", ""] and found.tables[1].rows[1][3:] == ["0", "chosen"]


def test_few_epochs_are_all_shown_and_many_are_not() -> None:
    assert demo._shown(1) == [1]
    assert demo._shown(3) == [1, 2, 3]
    assert demo._shown(30) == [1, 2, 3, 5, 10, 20, 30]


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
