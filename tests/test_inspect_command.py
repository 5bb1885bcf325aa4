"""The command inspect: what it loads, the table it prints, the files it writes, and what it says to mistakes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from netdeconv import WhitenedConv2d, WhiteningConfig, calibrate, convert
from netdeconv.cli import main
from netdeconv.lab.inspect_command import _cuts
from netdeconv.lab.inspect_cost import step_cost
from netdeconv.lab.inspect_report import whitening_filters_of
from netdeconv.lab.networks import network


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a short training."""
    out = tmp_path_factory.mktemp("run") / "digits"
    arguments = ["--config", "digits", "--norm", "nd", "--width", "0.5", "--trainer.max_epochs", "1", "--out", str(out)]
    assert main(["fit", *arguments]) == 0
    return out


def rows(printed: str) -> dict[str, list[str]]:
    """Cells by layer, of the table in what was printed."""
    lines = printed.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("---")) + 1
    cells = [re.split(r"\s{2,}", line) for line in lines[first : lines.index("", first)]]
    return {name: rest for name, *rest in cells}


def test_a_run_folder_says_what_it_is_of(
    fitted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(fitted), "--images", "64", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "small, width 0.5" in printed and "64 images of digits, 1x8x8" in printed
    found = rows(printed)
    assert list(found) == ["conv1", "conv2", "conv3", "head"]
    # One epoch of 997 images in batches of 64 or so: the last refresh was not long ago; layers of 9 to 64 features.
    assert [found[name][1] for name in found] == ["9", "72", "144", "64"]
    assert all(0 <= int(cells[8]) < 16 for cells in found.values())
    before, after = map(float, found["conv1"][3].split(" → "))
    assert after < before
    page = (tmp_path / "inspect.html").read_text()
    assert page.count("<img ") == 3 and "conv3" in page
    assert all((tmp_path / name).read_bytes()[:4] == b"\x89PNG" for name in ("filters.png", "layers.png"))


def test_the_filters_that_are_drawn_whiten_the_patches() -> None:
    torch.manual_seed(0)
    images = torch.randn(16, 3, 12, 12, dtype=torch.float64).cumsum(3) * torch.tensor([1.0, 5, 25]).reshape(3, 1, 1)
    config = WhiteningConfig(solver="eigh", eps=0.0, sampling="spread")
    layer = WhitenedConv2d(3, 4, 3, whitening=config, dtype=torch.float64)
    calibrate(layer, images)
    white = F.conv2d(images, whitening_filters_of(layer)).movedim(1, -1).reshape(-1, 3)
    torch.testing.assert_close(torch.cov(white.T, correction=0), torch.eye(3, dtype=torch.float64))


def test_a_checkpoint_alone_is_enough(fitted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alone = tmp_path / "alone.ckpt"
    alone.write_bytes((fitted / "checkpoints" / "last.ckpt").read_bytes())
    command = ["inspect", str(alone), "--data", "digits", "--images", "64", "--out", str(tmp_path)]
    assert main(command) == 0
    assert list(rows(capsys.readouterr().out)) == ["conv1", "conv2", "conv3", "head"]


def test_a_state_dict_with_the_name_of_its_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net = calibrate(convert(network("small", in_channels=3)), torch.randn(16, 3, 8, 8))
    torch.save(net.state_dict(), tmp_path / "net.pt")
    options = ["--image-size", "8", "--images", "32", "--out", str(tmp_path)]
    assert main(["inspect", str(tmp_path / "net.pt"), "--network", "small", *options]) == 0
    assert "32 images of photographs, 3x8x8" in capsys.readouterr().out


def test_networks_by_name_have_the_statistics_of_the_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", "small", "--norm", "bn", "--images", "32", "--out", str(tmp_path)]) == 0
    plain = capsys.readouterr().out
    assert main(["inspect", "small", "--images", "32", "--out", str(tmp_path)]) == 0
    whitened = capsys.readouterr().out
    assert "random weights, statistics of these images" in whitened and "→" in rows(whitened)["conv1"][3]
    assert "statistics" not in plain and rows(plain)["conv1"][7:9] == ["–", "–"]
    assert rows(plain)["conv1"][3] == rows(whitened)["conv1"][3].split(" → ")[0]


def test_cuts_of_photographs_are_standardised_squares() -> None:
    drawn = torch.Generator().manual_seed(0)
    photos = [torch.rand(3, 40, width, generator=drawn) for width in (50, 16)]
    cuts = _cuts(photos, 16, 400)
    assert cuts.shape == (400, 3, 16, 16)
    assert torch.equal(cuts, _cuts(photos, 16, 400))
    assert float(cuts.mean()) == pytest.approx(0, abs=1e-6)
    assert float(cuts.std()) == pytest.approx(1, abs=1e-3)


def test_a_folder_of_images_is_read_and_noise_is_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (12, 10), (200, 10, 30)).save(tmp_path / "a.png")
    Image.effect_noise((20, 30), 80).convert("RGB").save(tmp_path / "b.png")
    (tmp_path / "c.png").write_text("no image")
    options = ["--image-size", "8", "--images", "16", "--out", str(tmp_path / "out")]
    for data, about in ((str(tmp_path), tmp_path.name), ("noise", "noise")):
        assert main(["inspect", "small", "--data", data, *options]) == 0
        assert re.search(rf"16 images of \S*{re.escape(about)}, 3x8x8", capsys.readouterr().out)
    assert main(["inspect", "small", "--data", str(tmp_path / "out"), *options[2:]]) == 0  # its own pictures
    assert main(["inspect", "small", "--data", str(tmp_path), "--image-size", "11"]) == 2
    assert "expected at most 10, the smallest side" in capsys.readouterr().err


@pytest.mark.slow
def test_networks_of_timm_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("timm")
    options = ["--data", "noise", "--images", "8", "--image-size", "32", "--out", str(tmp_path)]
    assert main(["inspect", "timm:resnet18", *options]) == 0
    found = rows(capsys.readouterr().out)
    assert len(found) == 21 and re.fullmatch(r"\+\d+ %", found["conv1"][-1])
    assert main(["inspect", "timm:resnet81", *options]) == 2
    assert "timm has no network 'resnet81'. The nearest name is resnet" in capsys.readouterr().err
    assert main(["inspect", "timm:resnet18", "--width", "2", *options]) == 2
    assert "width=2 cannot apply to timm:resnet18" in capsys.readouterr().err


def test_the_cost_of_a_step_is_whitening_beside_the_convolution() -> None:
    layer = WhitenedConv2d(4, 8, 3, whitening=WhiteningConfig.paper(block_size=4))
    images = torch.randn(5, 4, 6, 6)
    layer(images)
    # One block of 36 features. Patches: the grid with step 3 has 2 x 2 positions, of which 4 x 4 give outputs.
    moments, products, fold = 2 * 5 * 4 * 36**2 * 3, 2 * 12 * 36**3 * 3, 2 * 8 * 36**2 * 3
    plain = 3 * 2 * 5 * 4 * 4 * 8 * 36
    found = step_cost(torch.nn.Sequential(layer).eval(), images)
    assert found == {"0": pytest.approx((moments + products + fold) / plain)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["vgg99"], "nearest name is vgg"),
        (["nowhere/last.ckpt"], "expected a checkpoint, there is no such file"),
        (["."], "expected a run folder of netdeconv fit"),
        (["small", "--data", "cifar11"], "nearest name is cifar10"),
        (["small", "--images", "0"], "--images: expected a number above 0"),
        (["small", "--image-size", "999"], "expected at most 427"),
        (["small", "--network", "vgg11"], "expected a checkpoint with --network vgg11"),
        (["vgg16", "--image-size", "8"], "vgg16 cannot be run on images of 3x8x8"),
        (["small", "--norm", "none"], None),
    ],
)
def test_mistakes_are_answered_in_one_line(
    arguments: list[str], message: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    code = main(["inspect", *arguments])
    error = capsys.readouterr().err
    assert code == (0 if message is None else 2)
    if message is not None:
        assert message in error and len(error.splitlines()) == 1


def test_files_that_say_nothing_of_their_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"a": torch.zeros(2)}, tmp_path / "net.pt")
    assert main(["inspect", str(tmp_path / "net.pt")]) == 2
    assert "does not say of which network it is" in capsys.readouterr().err
    (tmp_path / "net.pt").write_bytes(b"no checkpoint")
    assert main(["inspect", str(tmp_path / "net.pt"), "--network", "small"]) == 2
    assert "expected a file of torch.save" in capsys.readouterr().err
