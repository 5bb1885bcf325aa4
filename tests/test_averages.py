"""Running values: averages over steps and refreshes, worked out by hand."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch

from netdeconv import WhiteningConfig
from netdeconv.functional import Window, inverse_sqrt
from netdeconv.nn import Whitening
from netdeconv.nn.estimator import Estimator
from one_feature import (
    AVERAGED,
    PLAIN,
    POINT,
    SCALED,
    average,
    average_root,
    batches,
    close,
    number,
    one_feature,
    remembered,
    used,
)


def test_the_first_refreshes_by_hand() -> None:
    whitening = one_feature(PLAIN)
    whitening(number(10, 2))
    close(remembered(whitening), (10, 1 / 2))
    whitening(number(20, 4))  # weights 0.9 * 0.1 and 0.1, that is 9 : 10
    close(remembered(whitening), ((9 * 10 + 10 * 20) / 19, ((9 * 2**2 + 10 * 4**2) / 19) ** -0.5))
    assert (int(whitening.num_steps), int(whitening.num_updates), int(whitening.last_update)) == (2, 2, 2)


@pytest.mark.parametrize("update_every", [1, 4, 16])
@pytest.mark.parametrize("momentum", [0.1, 0.5, 1, None])
@pytest.mark.parametrize("debias", [True, False])
def test_averages_live_in_steps(update_every: int, momentum: float | None, debias: bool) -> None:
    whitening = one_feature(PLAIN.replace(update_every=update_every, momentum=momentum, debias=debias))
    means: list[float] = []
    deviations: list[float] = []
    counts: list[float] = []  # with a momentum a root stands for itself and half of the steps without one before it
    waiting = 0
    for mean, deviation in batches(75):
        due = whitening.clock.due
        whitening(number(mean, deviation))
        means.append(mean)
        if due:
            deviations.append(deviation)
            counts.append(1 + (waiting if momentum is None else waiting / 2))
        waiting = 0 if due else waiting + 1
        mean = average(means, [1] * len(means), momentum, debias, 0)
        close(remembered(whitening), (mean, average_root(deviations, counts, momentum, debias)))
    assert (int(whitening.num_updates) < 75) == (update_every > 1)


def test_the_gains_of_a_root_are_averaged_as_variances_and_the_rest_apart() -> None:
    torch.manual_seed(0)
    averaged = {"momentum": None, "average": "root", "scale": False}
    config = WhiteningConfig(update_every=1, eps=0.0, solver="eigh", sampling="spread", **averaged)
    whitening = Whitening(6, POINT, 2, config, dtype=torch.float64)
    roots = []
    for scale in (1.0, 10.0, 0.1, 30.0):
        x = torch.einsum("ngcl,gcd->ngdl", torch.randn(50, 2, 3, 9), torch.randn(2, 3, 3)).double()
        x[:, 1] *= scale  # the groups are nothing to one another
        roots.append(whitening(x.flatten(1, 2)).roots[0])
    gains = torch.stack([root.diagonal(dim1=-2, dim2=-1) for root in roots])
    correlations = torch.stack(roots) / (gains.unsqueeze(-1) * gains.unsqueeze(-2)).sqrt()
    gain = (gains**-2).mean(0) ** -0.5
    close(whitening.running_root, correlations.mean(0) * (gain.unsqueeze(-1) * gain.unsqueeze(-2)).sqrt())


@pytest.mark.parametrize(("debias", "times"), [(True, 1.70), (False, 10.73)])
@pytest.mark.parametrize("solver", ["auto", "eigh"])
def test_evaluation_follows_activations_that_grow(solver: str, debias: bool, times: float) -> None:
    config = WhiteningConfig(debias=debias, update_every=1, solver=solver)
    whitening = Whitening(2, Window(), config=config, dtype=torch.float64)
    for step in range(60):  # by an eighth, as activations do in the first steps at a high rate; one feature is dead
        (root,) = whitening(torch.tensor([[-1.0, 0], [1.0, 0]], dtype=torch.float64) * 1.125**step).roots
    assert float(whitening.running_root[0, 0] / root[0, 0]) == pytest.approx(times, abs=0.01)


def test_a_root_that_rounding_has_spoiled_does_not_spoil_the_average_for_good() -> None:
    whitening = Whitening(2, Window(), config=WhiteningConfig(update_every=1), dtype=torch.float32)
    roots = iter([torch.eye(2), torch.diag(torch.tensor([1e-38, -1e25])), *[torch.eye(2)] * 600])
    with mock.patch.object(Estimator, "root_of", lambda self, cov: next(roots)):
        for _ in range(602):
            whitening(torch.randn(4, 2))
            assert bool(whitening.running_root.isfinite().all())
    assert float(whitening.running_root[1, 1]) == pytest.approx(1, rel=0.1)


def test_the_first_refreshes_of_an_averaged_covariance_by_hand() -> None:
    whitening = one_feature(AVERAGED)
    close(used(whitening, number(10, 2)), (10, 1 / 2))
    average_of_two = (9 * 2**2 + 10 * 4**2) / 19  # weights 0.9 * 0.1 and 0.1
    close(used(whitening, number(20, 4)), (20, average_of_two**-0.5))  # the average serves training, too
    close(whitening.running_cov, [[average_of_two]])
    close(remembered(whitening), ((9 * 10 + 10 * 20) / 19, average_of_two**-0.5))
    whitening = one_feature(AVERAGED.replace(momentum=None))
    for deviation in (1, 3, 8):
        whitening(number(5, deviation))
    close(whitening.running_cov, [[(1 + 9 + 64) / 3]])


@pytest.mark.parametrize("update_every", [1, 4, 16])
@pytest.mark.parametrize("momentum", [0.1, 0.5, 1, None])
@pytest.mark.parametrize("debias", [True, False])
def test_an_averaged_covariance_lives_in_refreshes_and_the_variance_in_steps(
    update_every: int, momentum: float | None, debias: bool
) -> None:
    changes: dict[str, Any] = {"update_every": update_every, "momentum": momentum, "debias": debias}
    whitening, scaled = one_feature(AVERAGED.replace(**changes)), one_feature(SCALED.replace(**changes))
    means, variances, refreshes = [], [], []
    for mean, deviation in batches(75):
        due = whitening.clock.due
        found = [each(number(mean, deviation)) for each in (whitening, scaled)]
        means.append(mean)
        variances.append(deviation**2)
        refreshes += [deviation**2] if due else []
        cov = average(refreshes, [1] * len(refreshes), momentum, debias, 1)
        close(whitening.running_cov, [[cov]])
        close(remembered(whitening), (average(means, [1] * len(means), momentum, debias, 0), cov**-0.5))
        close(float(found[0].roots[0]), cov**-0.5)
        close(scaled.running_var, [average(variances, [1] * len(variances), momentum, debias, 1)])
        close((float(found[1].scale), float(found[1].roots[0])), (1 / deviation, 1))  # its correlation is always one
    assert (len(refreshes) < 75) == (update_every > 1)


def test_the_running_variance_by_hand() -> None:
    whitening = one_feature(SCALED)
    close(float(whitening(number(10, 2)).scale), 1 / 2)
    close(float(whitening(number(20, 4)).scale), 1 / 4)
    variance = (9 * 2**2 + 10 * 4**2) / 19  # 10.31578...
    close(whitening.running_var, [variance])
    found = whitening.eval()(number(-1e6, 1e6))
    close((float(found.mean), float(found.scale), float(found.roots[0])), ((9 * 10 + 10 * 20) / 19, variance**-0.5, 1))


def test_training_and_evaluation_share_the_root_of_an_averaged_covariance() -> None:
    whitening = Whitening(5, POINT, config=WhiteningConfig(block_size=2), dtype=torch.float64)
    assert "last_root" not in whitening.state_dict()
    for step in range(20):  # the last one without a refresh
        x = torch.randn(4, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(step)) * (1 + step)
        trained = whitening(x).roots
        for root, cov in zip(trained, whitening._matrices("running_cov"), strict=True):
            close(root, inverse_sqrt(cov + 1e-5 * torch.eye(len(cov), dtype=torch.float64), num_iters=1))
        evaluated = whitening.eval()(x).roots
        whitening.train()
        for root, buffer, other in zip(trained, whitening._matrices("running_root"), evaluated, strict=True):
            assert torch.equal(root, buffer)
            assert torch.equal(root, other)


@pytest.mark.parametrize(("debias", "first"), [(True, (10, 0.5)), (False, (0, 1))])
def test_momentum_zero_keeps_the_start(debias: bool, first: tuple[float, float]) -> None:
    whitening = one_feature(PLAIN.replace(momentum=0, debias=debias))
    for mean, deviation in [(10.0, 2.0), *batches(20)]:
        whitening(number(mean, deviation))
        close(remembered(whitening), first)


def test_ordinary_steps_use_their_own_mean_and_the_last_root_and_evaluation_the_averages() -> None:
    whitening = one_feature(PLAIN.replace(update_every=2))
    for mean, deviation in batches(17):
        close(used(whitening, number(mean, deviation)), (mean, 1 / deviation))
    before = remembered(whitening)
    close(used(whitening, number(-7, 1e6)), (-7, 1 / deviation))  # step 17: no refresh of the root
    assert remembered(whitening)[0] != before[0]
    assert remembered(whitening)[1] == before[1]
    assert used(whitening.eval(), number(-1e6, 1e6)) == remembered(whitening)


@pytest.mark.parametrize("momentum", [0, 1e-8, 1e-4])
def test_a_tiny_momentum_keeps_everything_finite(momentum: float) -> None:
    whitening = Whitening(1, Window(), config=WhiteningConfig(momentum=momentum))
    for step in range(40):
        whitening(torch.tensor([[1.0], [3.0]]) + step)
    assert bool(whitening.running_mean.isfinite().all()) and bool(whitening.running_root.isfinite().all())
