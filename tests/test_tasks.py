"""What the tasks compute: losses, measures and learning rates, against torch's schedulers and cases by hand."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import lr_scheduler

from netdeconv import ConfigError

pytest.importorskip("lightning")

from netdeconv.lab.schedules import Schedule
from netdeconv.lab.tasks import VOID, Classification, MeanLoss, Segmentation

STEPS = 12
SGD = partial(torch.optim.SGD, lr=0.1)


def optimizer() -> torch.optim.Optimizer:
    return SGD([nn.Parameter(torch.zeros(1))])


@pytest.mark.parametrize(
    ("schedule", "other"),
    [
        (Schedule(name="cosine"), partial(lr_scheduler.CosineAnnealingLR, T_max=STEPS)),
        (Schedule(name="poly", power=0.9), partial(lr_scheduler.PolynomialLR, total_iters=STEPS, power=0.9)),
        (
            Schedule(name="steps", milestones=(0.5, 0.75), gamma=0.2),
            partial(lr_scheduler.MultiStepLR, milestones=[6, 9], gamma=0.2),
        ),
        (Schedule(name="constant"), partial(lr_scheduler.ConstantLR, factor=1.0)),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_learning_rates_are_those_of_torch(schedule: Schedule, other: Any) -> None:
    ours, theirs = optimizer(), optimizer()
    schedulers = [schedule.scheduler(ours, lambda: STEPS), other(theirs)]
    for _ in range(STEPS):
        for each in (ours, theirs, *schedulers):
            each.step()
        assert ours.param_groups[0]["lr"] == pytest.approx(theirs.param_groups[0]["lr"], rel=1e-9, abs=1e-12)


def test_a_schedule_does_not_ask_for_the_steps_before_the_first_one() -> None:
    asked = []
    used = optimizer()
    scheduler = Schedule().scheduler(used, lambda: asked.append(1) or STEPS)  # type: ignore[func-returns-value]
    assert not asked
    used.step()
    scheduler.step()
    assert asked


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "linear"}, "out of cosine, poly, steps, constant, got 'linear'"),
        ({"power": 0}, "power above 0, got 0"),
        ({"gamma": -1}, "gamma above 0, got -1"),
        ({"milestones": (0.5, 1.5)}, "between 0 and 1"),
    ],
)
def test_wrong_schedules_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Schedule(**settings)


def test_the_mean_loss_is_weighted_and_keeps_nan() -> None:
    mean = MeanLoss()
    mean.update(torch.tensor(1.0), 3)
    mean.update(torch.tensor(5.0), 1)
    assert float(mean.compute()) == 2
    mean.update(torch.tensor(float("nan")), 2)
    assert math.isnan(mean.compute())


def test_classification_measures_the_first_and_from_100_classes_the_first_five() -> None:
    task = Classification(nn.Identity(), classes=100, optimizer=SGD)
    outputs = torch.arange(100.0).flip(0).repeat(4, 1)  # class 0 is first, then 1, 2, ...
    labels = torch.tensor([0, 4, 5, 99])
    measures = task.make_measures()
    assert {name: float(measure(outputs, labels)) for name, measure in measures.items()} == {
        "accuracy": 0.25,
        "accuracy5": 0.5,
    }
    assert set(Classification(nn.Identity(), classes=10, optimizer=SGD).make_measures()) == {"accuracy"}


def test_label_smoothing_takes_from_the_right_class() -> None:
    task = Classification(nn.Identity(), classes=2, smoothing=0.2, optimizer=SGD)
    outputs = torch.tensor([[2.0, 0.0]])
    log = outputs.log_softmax(1)[0]
    expected = -(0.9 * log[0] + 0.1 * log[1])
    torch.testing.assert_close(task.loss(outputs, torch.tensor([0])), expected)


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.classifier = nn.Conv2d(3, 3, 1)
        self.aux_classifier = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"out": self.classifier(x), "aux": self.aux_classifier(x)}


def segmentation(**options: Any) -> Segmentation:
    return Segmentation(TwoHeads(), classes=3, optimizer=SGD, **options)


def test_the_segmentation_loss_leaves_void_out_and_adds_the_auxiliary_head() -> None:
    task = segmentation(aux_weight=0.25)
    outputs = {name: torch.randn(2, 3, 2, 2) for name in ("out", "aux")}
    targets = torch.tensor([[[0, 1], [2, VOID]], [[VOID, VOID], [1, 1]]])
    counted = targets != VOID
    each = {k: F.cross_entropy(v.movedim(1, -1)[counted], targets[counted]) for k, v in outputs.items()}
    torch.testing.assert_close(task.train().loss(outputs, targets), each["out"] + 0.25 * each["aux"])
    torch.testing.assert_close(task.eval().loss(outputs, targets), each["out"])


def test_an_image_of_void_has_no_loss() -> None:
    outputs = {"out": torch.randn(1, 3, 2, 2, requires_grad=True)}
    loss = segmentation().eval().loss(outputs, torch.full((1, 2, 2), VOID))
    loss.backward()
    assert loss == 0
    assert outputs["out"].grad is not None and not outputs["out"].grad.any()


def test_the_mean_intersection_over_union_of_a_case_by_hand() -> None:
    # Six pixels: class 0 right once, taken for 1 once; class 1 right twice; void predicted as 0 and as 1.
    targets = torch.tensor([[[0, 0, 1], [1, VOID, VOID]]])
    predicted = torch.tensor([[[0, 1, 1], [1, 0, 1]]])
    outputs = F.one_hot(predicted, 3).movedim(-1, 1).float()
    measures = segmentation().make_measures()
    # class 0: 1 of 2; class 1: 2 of 3; class 2 neither occurs nor is predicted
    assert float(measures["miou"](outputs, targets)) == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert float(measures["pixel_accuracy"](outputs, targets)) == pytest.approx(3 / 4)


def test_the_auxiliary_head_learns_faster() -> None:
    task = segmentation(aux_rate_factor=10.0)
    groups = task.configure_optimizers()["optimizer"].param_groups
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert len(rates) == 4
    for name, parameter in task.named_parameters():
        assert rates[id(parameter)] == pytest.approx(1.0 if "aux" in name else 0.1)


def test_channels_last_changes_the_layout_alone() -> None:
    torch.manual_seed(0)
    net = nn.Conv2d(3, 4, 3)
    x = torch.randn(2, 3, 5, 5)
    expected = net(x)
    task = Classification(net, classes=4, optimizer=SGD, channels_last=True)
    assert net.weight.is_contiguous(memory_format=torch.channels_last)
    assert task(x).is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(task(x), expected)
