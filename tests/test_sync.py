"""Statistics over several processes: equal to one process that has seen the joined batch."""

from __future__ import annotations

import datetime
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from netdeconv import ChannelWhitening, NonFiniteWarning, WhitenedConv2d, WhitenedLinear, WhiteningConfig
from netdeconv.functional import Blocks, Moments, Window, channel_variance, patch_moments
from netdeconv.nn.sync import Place, Share, _all_reduce, distributed, joined_moments, share_of_channels

DRAWS = settings(deadline=None, derandomize=True, max_examples=40)

# float64: sums in another order, then five iterations; the brief of distributed statistics asks for this.
JOINED: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-10}

# ---- the arithmetic, in one process: what every process sends is added up by hand --------------------------


def exchange(shares: list[Moments], blocks: Blocks, about: Tensor, *, autograd: bool = False) -> list[Moments]:
    """What ``joined_moments`` gives every process."""
    processes = [[Share(share, blocks, about)] for share in shares]
    return [joined[0] for joined in everywhere(processes, autograd)]


def everywhere(processes: Sequence[Sequence[Share]], autograd: bool = False) -> list[list[Moments]]:
    """What ``joined_moments`` gives every process, with the sum over the processes taken here."""
    where = "netdeconv.nn.sync._all_reduce" if autograd else "torch.distributed.all_reduce"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "is_initialized", lambda: True)
        patch.setattr(dist, "get_world_size", lambda group=None: len(processes))
        sent: list[Tensor] = []

        def note(value: Tensor, group: Any = None) -> Tensor:
            sent.append(value.clone())
            return value

        def add_up(value: Tensor, group: Any = None) -> Tensor:
            total = torch.stack(sent).sum(0)
            return total if autograd else value.copy_(total)

        for replacement in (note, add_up):
            patch.setattr(where, replacement)
            results = [joined_moments(shares) for shares in processes]
    return results


def rows(count: int, features: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(features, features, dtype=torch.float64, generator=generator)
    return torch.randn(count, features, dtype=torch.float64, generator=generator) @ mixing + torch.arange(features)


@DRAWS
@given(
    groups=st.integers(1, 3),
    per_group=st.integers(1, 5),
    block_size=st.integers(1, 6),
    grouping=st.sampled_from(["contiguous", "interleaved"]),
    counts=st.lists(st.integers(0, 6), min_size=2, max_size=4).filter(any),
    weighted=st.booleans(),
)
def test_joined_moments_are_those_of_all_rows(
    groups: int, per_group: int, block_size: int, grouping: str, counts: list[int], weighted: bool
) -> None:
    blocks = Blocks.plan(groups * per_group, Window((1,), (1,), (1,), ((0, 0),)), groups, block_size, grouping)
    X = rows(sum(counts), groups * per_group)
    weights = torch.arange(1.0, 1 + len(X)) if weighted else torch.ones(len(X))
    expected = patch_moments(X, blocks, weights)
    about = rows(1, blocks.mean_shape[0], seed=1)[0]
    shares = [
        patch_moments(share, blocks, weight if weighted else None)
        for share, weight in zip(X.split(counts), weights.split(counts), strict=True)
    ]
    for ours in exchange(shares, blocks, about):
        assert float(ours.total) == float(weights.sum())
        for mine, known in zip((ours.mean, *ours.covs), (expected.mean, *expected.covs), strict=True):
            assert mine.shape == known.shape
            torch.testing.assert_close(mine, known, **JOINED)


def test_sums_about_the_remembered_mean_keep_the_digits_of_the_covariance() -> None:
    blocks = Blocks.plan(4, Window(), 1, 64, "contiguous")
    X = rows(300, 4) + 1e4
    expected = patch_moments(X, blocks)
    shares = [patch_moments(share.float(), blocks) for share in X.split([100, 200])]
    errors = []
    for about in (torch.zeros(4), X.mean(0).float()):
        cov = exchange(shares, blocks, about)[0].covs[0]
        errors.append((cov.double() - expected.covs[0]).abs().max())
    # float32: about zero squares of 1e4 round at 1e8 * 6e-8 = 6, about the mean only the numbers do, 6e-4.
    assert errors[0] > 0.5
    assert errors[1] < 1e-2


@DRAWS
@given(counts=st.lists(st.integers(0, 5), min_size=2, max_size=4).filter(any), channels=st.integers(1, 4))
def test_the_joined_variance_and_its_gradient_are_those_of_all_entries(counts: list[int], channels: int) -> None:
    x = rows(sum(counts), channels).requires_grad_()
    expected = x.var(0, correction=0)
    about = rows(1, channels, seed=1)[0]
    shares = [share_of_channels(*channel_variance(part.unsqueeze(-1)), about) for part in x.split(counts)]
    joined = [found[0].covs[0].flatten() for found in everywhere([[share] for share in shares], autograd=True)]
    along = torch.randn(channels, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    (known,) = torch.autograd.grad(expected, x, along)
    for ours in joined:
        assert ours.requires_grad  # or this process would be missing when the gradients are added up
        torch.testing.assert_close(ours, expected, **JOINED)
    (mine,) = torch.autograd.grad(joined[0], x, along)
    torch.testing.assert_close(mine, known, **JOINED)


def test_sums_about_the_running_mean_keep_the_digits_of_the_variance() -> None:
    x = rows(300, 2).unsqueeze(-1) + 1e4
    parts = [channel_variance(share.float()) for share in x.split([100, 200])]
    errors = []
    for about in (torch.zeros(2), x.mean((0, 2)).float()):
        found = everywhere([[share_of_channels(*part, about)] for part in parts])[0][0].covs[0]
        errors.append((found.flatten().double() - x.var((0, 2), correction=0)).abs().max())
    # float32: about zero squares of 1e4 round at 1e8 * 6e-8 = 6, about the mean only the numbers do, 6e-4.
    assert errors[0] > 0.5
    assert errors[1] < 1e-2


def test_the_gradient_reaches_every_share_and_an_empty_one_takes_part() -> None:
    blocks = Blocks.plan(3, Window(), 1, 2, "contiguous")
    X = rows(6, 3).requires_grad_()
    shares = [patch_moments(share, blocks) for share in X.split([4, 0, 2])]
    joined = exchange(shares, blocks, torch.zeros(3), autograd=True)[1]
    assert joined.mean.requires_grad  # or this process would be missing when the gradients are added up
    along = [torch.randn_like(value) for value in (joined.mean, *joined.covs)]
    (ours,) = torch.autograd.grad((joined.mean, *joined.covs), X, along)
    expected = patch_moments(X, blocks)
    assert float(joined.total.detach()) == 6
    (known,) = torch.autograd.grad((expected.mean, *expected.covs), X, along)
    torch.testing.assert_close(ours, known, **JOINED)


def test_a_gradient_of_a_gradient_is_summed_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    # Two processes with v and v': both have S = v + v', the gradient of both their S**2 is g = 4 (v + v'), and that
    # of both their g is 8.
    monkeypatch.setattr(dist, "all_reduce", lambda value, group=None: value.mul_(2))
    v = torch.tensor([1.0, 3.0], requires_grad=True)
    (first,) = torch.autograd.grad(_all_reduce(v, None).square().sum(), v, create_graph=True)
    assert first.tolist() == [8, 24]
    (second,) = torch.autograd.grad(first.sum(), v)
    assert second.tolist() == [8, 8]


@pytest.mark.parametrize("scale", [False, True])
def test_one_call_carries_all_that_is_known(monkeypatch: pytest.MonkeyPatch, scale: bool) -> None:
    sent: list[int] = []

    def all_reduce(value: Tensor, group: Any = None) -> None:
        if value.dim() == 1:
            sent.append(len(value))
        else:  # who is where: two processes, both here
            assert value.shape == (2, 9)
            value[1] = value[0]

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: 2)
    monkeypatch.setattr(dist, "get_rank", lambda group=None: 0)
    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    layer = WhitenedConv2d(3, 4, 1, whitening=WhiteningConfig(update_every=2, scale=scale))
    for _ in range(18):
        layer(torch.randn(4, 3, 2, 2))
    with_mean, with_variance, with_cov = 1 + 3, 1 + 3 + 3, 1 + 3 + 3 * 3
    if scale:  # the covariance is that of scaled channels
        assert sent == [with_mean + with_variance, with_cov] * 17 + [with_mean + with_variance]
    else:
        assert sent == [with_mean + with_cov] * 17 + [with_mean]


def test_alone_nothing_is_exchanged() -> None:
    blocks = Blocks.plan(3, Window(), 1, 64, "contiguous")
    moments = patch_moments(rows(5, 3), blocks)
    assert not distributed()
    assert joined_moments([Share(moments, blocks, torch.zeros(3))])[0] is moments


# ---- two real processes ------------------------------------------------------------------------------------

SHARES = {"equal": (4, 4), "unequal": (6, 2), "empty_last": (8, 0), "empty_first": (0, 8)}
STEPS = 18  # the last one without a refresh, where update_every allows
EVERYWHERE = {"max_samples": None, "sampling_stride": 1, "update_every": 2}
LAYERS: dict[str, Any] = {
    "conv": (WhitenedConv2d, (5, 4, 3), {"padding": 1}, WhiteningConfig(block_size=2, **EVERYWHERE)),
    "tiles": (
        WhitenedConv2d,
        (5, 8, 7),
        {"padding": 1},
        WhiteningConfig(block_size=2, max_samples=None, update_every=2),
    ),
    "grouped": (
        WhitenedConv2d,
        (6, 4, 3),
        {"groups": 2},
        WhiteningConfig(block_size=2, differentiable=True, **EVERYWHERE),
    ),
    "paper": (
        WhitenedConv2d,
        (4, 4, 3),
        {"padding": 1},
        WhiteningConfig.paper(block_size=2, sampling_stride=2, sync=True),
    ),
    "kept_root": (
        WhitenedConv2d,
        (5, 4, 3),
        {"padding": 1},
        WhiteningConfig(block_size=2, scale=False, average="root", **EVERYWHERE),
    ),
    "biased": (
        WhitenedConv2d,
        (4, 4, 3),
        {"groups": 4},
        WhiteningConfig(debias=False, momentum=0.3, **EVERYWHERE),
    ),
    "linear": (WhitenedLinear, (5,), {}, WhiteningConfig(differentiable=True, momentum=None)),
    "channel": (ChannelWhitening, (3, 4), {}, WhiteningConfig(solver="eigh", differentiable=True, **EVERYWHERE)),
}


def build(name: str) -> Any:
    torch.manual_seed(0)
    layer, size, options, config = LAYERS[name]
    if layer is ChannelWhitening:
        return layer(size[0], dtype=torch.float64, whitening=config)
    args = (size[0], 4) if layer is WhitenedLinear else (size[0], 4, 3)
    return layer(*args, **options, dtype=torch.float64, whitening=config)


def run_steps(name: str, shares: tuple[int, ...], rank: int | None) -> dict[str, Any]:
    """Train on one share of every batch, or on all of it: outputs, input gradients, parameter gradients, buffers."""
    layer, size = build(name), LAYERS[name][1]
    outputs, grads = [], []
    for step in range(STEPS):
        x = torch.randn(sum(shares), *size, dtype=torch.float64, generator=torch.Generator().manual_seed(step)) + step
        x = (x if rank is None else x.split(shares)[rank]).clone().requires_grad_()
        y = layer(x)
        y.square().sum().backward()
        outputs.append(y.detach())
        grads.append(x.grad)
    parameters = [parameter.grad for parameter in layer.parameters()]
    return {"outputs": outputs, "grads": grads, "parameters": parameters, "state": layer.whitening.state_dict()}


def run_poisoned(rank: int) -> dict[str, Any]:
    """One process meets a NaN: both must leave the batch out, or they would remember different things."""
    layer = build("conv")
    x = torch.randn(4, 5, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))
    layer(x)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        layer(x * torch.nan if rank == 1 else x)
    kinds = [warning.category for warning in caught]
    return {"warned": kinds == [NonFiniteWarning], "state": layer.whitening.state_dict()}


def run_apart(rank: int) -> dict[str, Any]:
    """Without ``sync``, or in a group of one process, everybody has statistics of their own."""
    states = {}
    own = [dist.new_group([0]), dist.new_group([1])][rank]
    for name, change, group in (("switched_off", {"sync": False}, None), ("group_of_one", {}, own)):
        layer = WhitenedConv2d(3, 2, 1, whitening=WhiteningConfig(**change))
        layer.whitening.process_group = group
        layer((1 + rank) * torch.tensor([-1.0, 3.0]).reshape(2, 1, 1, 1).expand(2, 3, 1, 2))
        states[name] = torch.stack([layer.whitening.running_mean, layer.whitening.running_var])
    return states


def run_single_pixels(rank: int) -> dict[str, Any]:
    """Maps of one pixel, and none of them in the second process, which must not wait for the first one."""
    torch.manual_seed(0)
    layer = WhitenedConv2d(3, 2, 1)
    x = torch.randn(4 * (1 - rank), 3, 1, 1)
    y = layer(x)
    y.sum().backward()
    expected = torch.nn.functional.conv2d(x, layer.weight, layer.bias)
    return {"output": y.detach(), "expected": expected.detach(), "steps": int(layer.whitening.num_steps)}


def work(rank: int, folder: str) -> None:
    """What each of the two processes does."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=30),
    )
    results: dict[str, Any] = {
        f"{name}-{kind}": run_steps(name, shares, rank) for name in LAYERS for kind, shares in SHARES.items()
    }
    results["poisoned"], results["apart"] = run_poisoned(rank), run_apart(rank)
    results["pixels"] = run_single_pixels(rank)
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[dict[str, Any]]]:
    """The results of the two processes, started once."""
    folder = tmp_path_factory.mktemp("two")
    torch.multiprocessing.spawn(work, args=(str(folder),), nprocs=2)
    yield [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("kind", SHARES)
@pytest.mark.parametrize("name", LAYERS)
def test_two_processes_are_one_with_the_joined_batch(both: list[dict[str, Any]], name: str, kind: str) -> None:
    ours, alone = [results[f"{name}-{kind}"] for results in both], run_steps(name, SHARES[kind], None)
    for what in ("outputs", "grads"):
        for step in range(STEPS):
            joined = torch.cat([each[what][step] for each in ours])
            torch.testing.assert_close(joined, alone[what][step], **JOINED)
    for parts in zip(*(each["parameters"] for each in ours), alone["parameters"], strict=True):
        torch.testing.assert_close(parts[0] + parts[1], parts[2], **JOINED)
    for each in ours:
        assert each["state"].keys() == alone["state"].keys()
        for key, value in alone["state"].items():
            torch.testing.assert_close(each["state"][key], value, **JOINED, msg=key)
    assert int(alone["state"]["num_updates"]) == (STEPS if name in ("paper", "linear") else STEPS - 1)


def test_a_batch_that_is_not_finite_in_one_process_is_left_out_in_both(both: list[dict[str, Any]]) -> None:
    first, second = (results["poisoned"] for results in both)
    assert (first["warned"], second["warned"]) == (True, True)
    assert [int(first["state"][key]) for key in ("num_steps", "num_updates", "num_skipped")] == [2, 1, 1]
    for key, value in first["state"].items():
        torch.testing.assert_close(second["state"][key], value, **JOINED, msg=key)


@pytest.mark.parametrize("name", ["switched_off", "group_of_one"])
def test_processes_may_stay_apart(both: list[dict[str, Any]], name: str) -> None:
    assert [results["apart"][name].tolist() for results in both] == [[[1] * 3, [4] * 3], [[2] * 3, [16] * 3]]


def test_maps_of_one_pixel_keep_no_process_waiting(both: list[dict[str, Any]]) -> None:
    assert [len(results["pixels"]["output"]) for results in both] == [4, 0]
    for results in both:
        torch.testing.assert_close(results["pixels"]["output"], results["pixels"]["expected"])
        assert results["pixels"]["steps"] == 0


def test_autocast_does_not_reach_the_joining() -> None:
    blocks = Blocks.plan(4, Window(), 1, 64, "contiguous")
    shares = [patch_moments(rows(50, 4, seed).float() + 100, blocks) for seed in (0, 1)]
    plain = exchange(shares, blocks, torch.zeros(4))[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = exchange(shares, blocks, torch.zeros(4))[0]
    torch.testing.assert_close(cast.covs, plain.covs, rtol=0, atol=0)
    torch.testing.assert_close(cast.mean, plain.mean, rtol=0, atol=0)


def test_a_process_follows_the_counters_that_were_broadcast_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = WhitenedLinear(4, 2, whitening=WhiteningConfig(update_every=16))
    layer.whitening.num_steps.fill_(129)  # as DistributedDataParallel writes them: in place, without a word
    layer.whitening.num_updates.fill_(40)
    monkeypatch.setattr("netdeconv.nn.batch.distributed", lambda group: True)
    monkeypatch.setattr("netdeconv.nn.whitening.Place.of", lambda *_: None)
    monkeypatch.setattr("netdeconv.nn.batch.joined_moments", lambda shares, *_: [share.moments for share in shares])
    layer(torch.randn(8, 4))
    assert int(layer.whitening.num_updates) == 40, "step 129 is no refresh step"


def test_on_an_accelerator_the_place_travels_with_the_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is looked at there: an assertion that the device makes."""
    blocks = Blocks.plan(3, Window(), 1, 64, "contiguous")
    moments, about = patch_moments(rows(5, 3), blocks), torch.zeros(3, dtype=torch.float64)
    places = [
        Place.of("here", name, torch.tensor(4), [torch.ones(3, dtype=torch.float64), torch.full((2, 2), 0.5)])
        for name in ("one", "one", "other")
    ]
    sent: list[Tensor] = []

    def all_reduce(value: Tensor, group: Any = None) -> None:
        sent.append(value.clone())
        value.copy_(torch.stack(sent).sum(0))

    asserted: list[bool] = []
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: 2)
    monkeypatch.setattr(dist, "get_rank", lambda group=None: len(sent))
    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    monkeypatch.setattr(torch, "_assert_async", lambda same, message: asserted.append(bool(same)))
    monkeypatch.setattr(Place, "on_cpu", property(lambda self: False))
    for second in places[1:]:
        sent.clear()
        for place in (places[0], second):
            found = joined_moments([Share(moments, blocks, about)], None, place)
        torch.testing.assert_close(found[0].mean, moments.mean, **JOINED)
        torch.testing.assert_close(found[0].covs, moments.covs, **JOINED)
    assert asserted[1::2] == [True, False]
