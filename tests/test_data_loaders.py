"""The loaders: order and augmentation by seed and epoch alone, shares of processes, going on in mid-epoch."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lightning")

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from netdeconv import ConfigError
from netdeconv.lab.data import TensorBatches
from netdeconv.lab.data.batches import Shifts, standardised
from netdeconv.lab.data.resumable import ResumableBatches

COUNT = 22


def loader(batch_size: int = 4, *, seed: int | None = 7, count: int = COUNT) -> TensorBatches:
    images = torch.rand(count, 1, 9, 9, generator=torch.Generator().manual_seed(1))
    return TensorBatches(images, torch.arange(count), batch_size=batch_size, seed=seed, augment=Shifts(4))


def taken(batches: Any) -> list[tuple[list[int], bytes]]:
    """Labels and pixels of every batch, to compare with ``==``."""
    return [(labels.tolist(), images.numpy().tobytes()) for images, labels in batches]


def epoch(number: int, **options: Any) -> list[tuple[list[int], bytes]]:
    batches = loader(**options)
    batches.set_epoch(number)
    return taken(batches)


# ------------------------------------------------------------------------------------------------------- one process


def test_an_epoch_depends_on_seed_and_number_alone() -> None:
    batches = loader()
    first, second = taken(batches), taken(batches)
    assert sorted(itertools.chain(*(labels for labels, _ in first))) == list(range(COUNT))
    assert [labels for labels, _ in first] != [labels for labels, _ in second]
    assert [epoch(0), epoch(1)] == [first, second]
    assert epoch(0, seed=8) != first
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        assert epoch(1) == second


def test_augmentation_differs_between_epochs_batches_and_images() -> None:
    batches = TensorBatches(torch.rand(1, 1, 9, 9).expand(40, 1, 9, 9), batch_size=20, seed=0, augment=Shifts(4))
    seen = [image.numpy().tobytes() for _ in range(2) for (images,) in batches for image in images]
    assert len(seen) == 80
    assert len(set(seen)) > 55  # of 162 windows, 80 drawn at random leave 63 different ones on average


def test_without_a_seed_order_and_images_are_kept() -> None:
    batches = loader(5, seed=None)
    for _ in range(2):
        images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
        assert torch.equal(labels, torch.arange(COUNT))
        assert torch.equal(images, batches.tensors[0])


def test_a_pass_that_was_not_finished_is_repeated() -> None:
    batches = loader()
    next(iter(batches))
    assert taken(batches) == epoch(0)


@pytest.mark.parametrize("asked", range(7))
def test_a_loaded_state_goes_on(asked: int) -> None:
    batches = loader()
    taken(batches)
    list(itertools.islice(batches, asked))
    state = batches.state_dict()
    resumed = loader()
    resumed.load_state_dict(state)
    if asked == 6:  # the epoch was complete
        assert taken(resumed) == epoch(2)
    elif asked == 0:  # nothing asked for yet, so the state is the end of the epoch before
        assert taken(resumed) == epoch(1)
    else:
        assert taken(resumed) == epoch(1)[asked:]
        resumed.set_epoch(1)
        assert taken(resumed) == epoch(1)  # the second time from its start
        assert taken(resumed) == epoch(2)


def test_a_state_is_for_one_epoch() -> None:
    batches = loader()
    list(itertools.islice(batches, 2))
    resumed = loader()
    resumed.load_state_dict(batches.state_dict())
    resumed.set_epoch(3)
    assert taken(resumed) == epoch(3)


def test_in_mid_epoch_the_batches_must_be_the_same() -> None:
    batches = loader()
    list(itertools.islice(batches, 2))
    with pytest.raises(ConfigError, match=r"only with batch_size 4 \(got 5\), seed 7 \(got 6\); use the same"):
        loader(5, seed=6).load_state_dict(batches.state_dict())
    taken(batches)
    other = loader(5, seed=6)
    other.load_state_dict(batches.state_dict())
    assert taken(other) == epoch(1, batch_size=5, seed=6)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"batch_size": 0}, "batch_size of at least 1, got 0"), ({"seed": -1}, "seed of at least 0, got -1")],
)
def test_wrong_settings(options: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        loader(**options)


# ----------------------------------------------------------------------------------------------------- what is in them


def test_standardised_by_hand() -> None:
    image = torch.full((1, 3, 2, 2), 255, dtype=torch.uint8)
    image[0, 1] = 51
    found = standardised(image, (0.5, 0.25, 0.0), (0.25, 0.5, 2.0))[0, :, 0, 1]
    torch.testing.assert_close(found, torch.tensor([2.0, -0.1, 0.5]))


def test_every_image_is_a_shift_of_itself_or_of_its_mirror_image() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(40, 2, 8, 8, generator=generator)
    shifts = Shifts(4)
    result = shifts(images, shifts.draw(40, generator))
    padded = torch.nn.functional.pad(images, (4,) * 4)
    seen = set()
    for index in range(40):
        matches = []
        for row, column in itertools.product(range(9), repeat=2):
            window = padded[index, :, row : row + 8, column : column + 8]
            matches += [
                (row, column, turned)
                for turned in (False, True)
                if torch.equal(result[index], window.flip(2) if turned else window)
            ]
        assert len(matches) == 1
        seen.add(matches[0])
    assert len(seen) > 30
    assert {turned for *_, turned in seen} == {False, True}


# ------------------------------------------------------------------------------------------------- several processes


def in_process(monkeypatch: pytest.MonkeyPatch, rank: int, processes: int) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: processes)


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_together_take_the_large_batches_of_one(processes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    count = 22 if processes == 2 else 24
    whole = {}
    for number, (images, labels) in enumerate(loader(4 * processes, count=count)):
        whole.update({(number, int(label)): image for image, label in zip(images, labels, strict=True)})
    shared: dict[tuple[int, int], Tensor] = {}
    for rank in range(processes):
        in_process(monkeypatch, rank, processes)
        mine = loader(4, count=count)
        assert len(mine) == -(-count // (4 * processes)) == len(list(mine))
        mine.set_epoch(0)
        for number, (images, labels) in enumerate(mine):
            shared.update({(number, int(label)): image for image, label in zip(images, labels, strict=True)})
    assert shared.keys() == whole.keys()
    assert all(torch.equal(shared[key], whole[key]) for key in whole)


def test_training_shares_are_equal_and_evaluation_shares_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    train, evaluation = [], []
    for rank in range(5):
        in_process(monkeypatch, rank, 5)
        train.append([len(labels) for _, labels in loader(2)])
        batches = loader(2, seed=None)
        evaluation.append([labels.tolist() for _, labels in batches])
        assert len(batches) == len(evaluation[-1])
    assert train == [[2, 2, 1]] * 5
    assert sorted(itertools.chain(*itertools.chain(*evaluation))) == list(range(COUNT))
    in_process(monkeypatch, 3, 4)
    few = TensorBatches(torch.arange(3), batch_size=2)
    assert (len(few), list(few)) == (0, [])  # fewer images than processes
    assert [batch.tolist() for (batch,) in TensorBatches(torch.arange(1), batch_size=2, seed=0)] == [[0]]


# --------------------------------------------------------------------------------------------------------- Lightning


class Stopped(Exception):
    pass


class Watching(LightningModule):
    """Writes down what it is given, and stops before a step."""

    def __init__(self, stop: int | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.stop = stop
        self.seen: list[tuple[int, int, list[int], bytes]] = []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        if self.global_step == self.stop:
            raise Stopped
        images, labels = batch
        self.seen.append((self.current_epoch, batch_idx, labels.tolist(), images.numpy().tobytes()))
        return self.weight * 0

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("loss", 0.0)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Data(LightningDataModule):
    def train_dataloader(self) -> ResumableBatches:
        return loader()

    def val_dataloader(self) -> ResumableBatches:
        return loader(seed=None)


def watch(folder: Path, stop: int | None = None, start: Path | None = None, **saving: Any) -> Watching:
    callbacks = [ModelCheckpoint(folder, filename="{step:02d}", save_top_k=-1, **saving)] if saving else []
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=3,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=bool(saving),
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    module = Watching(stop)
    try:
        trainer.fit(module, datamodule=Data(), ckpt_path=start, weights_only=True)
    except Stopped:
        assert stop is not None
    return module


STEPS: dict[str, Any] = {"every_n_train_steps": 1}
VALIDATION: dict[str, Any] = {"monitor": "loss"}
EPOCH_END: dict[str, Any] = {"save_on_train_epoch_end": True}


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning")
@pytest.mark.parametrize(
    ("saving", "stop", "saved"),
    [
        (STEPS, 1, 1),
        (STEPS, 5, 5),
        (STEPS, 6, 6),  # the end of the first epoch, before its validation
        (STEPS, 7, 7),
        (STEPS, 16, 16),
        ({"every_n_train_steps": 4}, 11, 8),
        (VALIDATION, 8, 6),
        (EPOCH_END, 14, 12),
    ],
)
def test_lightning_goes_on_with_the_batches_of_the_uninterrupted_run(
    saving: dict[str, Any], stop: int, saved: int, tmp_path: Path
) -> None:
    whole = watch(tmp_path).seen
    assert [number for number, *_ in whole] == [0] * 6 + [1] * 6 + [2] * 6
    assert [seen[2:] for seen in whole] == [*epoch(0), *epoch(1), *epoch(2)]
    assert watch(tmp_path, stop, **saving).seen == whole[:stop]
    last = max(tmp_path.glob("*.ckpt"))
    assert last.name == f"step={saved:02d}.ckpt"
    assert watch(tmp_path, start=last, **saving).seen == whole[saved:]
