"""Whole networks over two processes: DistributedDataParallel, FSDP2, and processes that are not in the same mode."""

from __future__ import annotations

import datetime
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import netdeconv
from netdeconv import WhitenedConv2d, WhitenedLinear, WhiteningConfig
from netdeconv.functional import inverse_sqrt, patch_moments

# float64: sums in another order, then five iterations and some steps of training.
JOINED: dict[str, Any] = {"rtol": 1e-8, "atol": 1e-8}
STEPS = 4
ROWS = 12  # fewer than half of the linear layer's features: alone, it takes the root of the rows instead
CONFIGS: dict[str, tuple[WhiteningConfig | None, WhiteningConfig | None]] = {
    "defaults": (None, None),
    "paper": (WhiteningConfig.paper(sync=True), WhiteningConfig.paper(sync=True, block_size=512)),
}
NETWORKS = {
    "defaults, unequal": ("defaults", (7, 5)),
    "defaults, empty": ("defaults", (12, 0)),
    "paper, unequal": ("paper", (7, 5)),
}
SIZES = ((3, 2, 5, 4), (2, 2, 7, 6))  # batches with maps of different sizes


def network(name: str = "defaults") -> nn.Sequential:
    torch.manual_seed(0)
    conv, linear = CONFIGS[name]
    layers = (
        WhitenedConv2d(2, 4, 3, padding=1, whitening=conv),
        nn.ReLU(),
        WhitenedConv2d(4, 8, 3, stride=2, whitening=conv),
        nn.Flatten(),
        WhitenedLinear(32, 3, whitening=linear),
    )
    return nn.Sequential(*layers).double()


def images(step: int) -> Tensor:
    return torch.randn(ROWS, 2, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(step))


def train(model: nn.Module, take: Callable[[Tensor], Tensor], processes: int) -> list[Tensor]:
    """Some steps of SGD; the outputs. The gradient is averaged over processes where the loss is a sum."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    outputs = []
    for step in range(STEPS):
        optimizer.zero_grad()
        y = model(take(images(step)))
        (processes * y.square().sum() / ROWS).backward()
        optimizer.step()
        outputs.append(y.detach())
    return outputs


def run_ddp(name: str, shares: tuple[int, int], rank: int) -> dict[str, Any]:
    model = network(name)
    outputs = train(DistributedDataParallel(model), lambda x: x.split(shares)[rank], 2)
    return {"outputs": outputs, "state": model.state_dict()}


def run_fsdp(rank: int) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (2,))
    model = network()
    for layer in model:
        if isinstance(layer, WhitenedConv2d):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    outputs = train(model, lambda x: x.split(ROWS // 2)[rank], 2)
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    model.eval()
    with torch.no_grad():
        return {"outputs": outputs, "state": state, "evaluated": model(images(0))}


def sized(rank: int) -> Tensor:
    return torch.randn(SIZES[rank], dtype=torch.float64, generator=torch.Generator().manual_seed(rank))


def sized_layer(scale: bool) -> WhitenedConv2d:
    torch.manual_seed(0)
    config = WhiteningConfig(differentiable=True, max_samples=None, solver="newton_schulz", scale=scale)
    return WhitenedConv2d(2, 3, 3, padding=1, dtype=torch.float64, whitening=config)


def run_sizes(rank: int, scale: bool) -> dict[str, Any]:
    layer, x = sized_layer(scale), sized(rank).requires_grad_()
    y = layer(x)
    y.square().sum().backward()
    return {"output": y.detach(), "grad": x.grad, "state": layer.whitening.state_dict()}


MODES = {
    "frozen": netdeconv.freeze,
    "evaluation": nn.Module.eval,
    "one layer frozen": lambda model: netdeconv.freeze(model.module[2]),
}
MIXED = [("frozen", 0), ("frozen", 1), ("evaluation", 1), ("one layer frozen", 0)]


def run_mixed(mode: str, who: int, rank: int) -> str:
    """Two steps, the second one after one process has changed its mode; what it raised."""
    model = DistributedDataParallel(network())
    model(images(0)).sum().backward()
    if rank == who:
        MODES[mode](model)
    try:
        model(images(1)).sum().backward()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _in_order(first: nn.Module, second: nn.Module, rank: int) -> None:
    for layer in (first, second) if rank == 0 else (second, first):
        layer(torch.randn(4, 4, 6, 6, generator=torch.Generator().manual_seed(rank)))


def _two(steps: int, size: int = 3) -> tuple[nn.Module, nn.Module]:
    """Two layers that nothing but weights and statistics tells apart, or their kernels."""
    torch.manual_seed(0)
    layers = WhitenedConv2d(4, 4, 3), WhitenedConv2d(4, 4, size)
    for _ in range(steps):
        for layer in layers:
            layer(torch.randn(4, 4, 6, 6))
    return layers


class Skipping(nn.Sequential):
    def forward(self, x: Tensor, skip: bool) -> Tensor:
        for layer in (self[0], self[2]) if skip else self:
            x = layer(x)
        return x


def run_skipping(rank: int) -> None:
    layers = _two(0)
    model = DistributedDataParallel(Skipping(*layers, WhitenedConv2d(4, 4, 1)), find_unused_parameters=True)
    for step in range(3):
        model(torch.randn(4, 4, 8, 8), step == 1 and rank == 1).sum().backward()


def run_uneven(rank: int, throw: bool) -> None:
    model = DistributedDataParallel(nn.Sequential(*_two(0)))
    with model.join(throw_on_early_termination=throw):
        for _ in range(2 + rank):
            model(torch.randn(4, 4, 8, 8)).sum().backward()


ELSEWHERE: dict[str, Callable[[int], None]] = {
    "another order": lambda rank: _in_order(*_two(0), rank),
    "another order later": lambda rank: _in_order(*_two(18), rank),
    "another kind": lambda rank: _in_order(_two(0)[0], netdeconv.ChannelWhitening(4), rank),
    "another size": lambda rank: _in_order(*_two(0, size=1), rank),
    "skipped": run_skipping,
    "join": lambda rank: run_uneven(rank, False),
    "join that throws": lambda rank: run_uneven(rank, True),
}


def run_elsewhere(name: str, rank: int) -> str:
    """What it raised."""
    try:
        ELSEWHERE[name](rank)
    except RuntimeError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def run_alone(rank: int) -> bool:
    """One process evaluates, twice as often with gradients, while the other waits in its next training step."""
    model = DistributedDataParallel(network())
    model(images(0)).sum().backward()
    if rank == 0:
        model.eval()
        model.module(images(1)).sum().backward()
        with torch.no_grad():
            model.module(images(2))
        model.train()
    model.zero_grad()
    model(images(3)).sum().backward()
    netdeconv.freeze(model)
    model(images(3)).sum().backward()
    netdeconv.unfreeze(model)
    model(images(3)).sum().backward()
    return int(model.module[0].whitening.num_steps) == 3


def work(rank: int, folder: str) -> None:
    """What each of the two processes does; a new group for every case, as errors leave one behind that is broken."""
    torch.set_num_threads(1)
    cases: dict[str, Callable[[], Any]] = {
        kind: lambda name=name, shares=shares: run_ddp(name, shares, rank)  # type: ignore[misc]
        for kind, (name, shares) in NETWORKS.items()
    }
    cases |= {"fsdp": lambda: run_fsdp(rank), "alone": lambda: run_alone(rank)}
    cases |= {"sizes": lambda: run_sizes(rank, False), "sizes, scaled": lambda: run_sizes(rank, True)}
    cases |= {
        f"{mode} {who}": lambda mode=mode, who=who: run_mixed(mode, who, rank)  # type: ignore[misc]
        for mode, who in MIXED
    }
    cases |= {name: lambda name=name: run_elsewhere(name, rank) for name in ELSEWHERE}  # type: ignore[misc]
    results = {}
    for name, run in cases.items():
        method, limit = f"file://{folder}/{name.replace(' ', '-')}", datetime.timedelta(seconds=60)
        dist.init_process_group("gloo", init_method=method, rank=rank, world_size=2, timeout=limit)
        results[name] = run()
        dist.destroy_process_group()
    torch.save(results, Path(folder) / f"{rank}.pt")


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The results of the two processes, started once."""
    folder = tmp_path_factory.mktemp("two")
    torch.multiprocessing.spawn(work, args=(str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def assert_same_state(ours: dict[str, Tensor], alone: dict[str, Tensor]) -> None:
    assert ours.keys() == alone.keys()
    for key, value in alone.items():
        torch.testing.assert_close(ours[key], value, **JOINED, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_network_in_two_processes_is_one_with_the_joined_batch(both: list[dict[str, Any]], kind: str) -> None:
    model = network(NETWORKS[kind][0])
    outputs = train(model, lambda x: x, 1)
    ours = [results[kind] for results in both]
    for step, expected in enumerate(outputs):
        torch.testing.assert_close(torch.cat([each["outputs"][step] for each in ours]), expected, **JOINED)
    for each in ours:
        assert_same_state(each["state"], model.state_dict())


def test_fsdp2_is_one_process_with_the_joined_batch(both: list[dict[str, Any]]) -> None:
    model = network()
    outputs = train(model, lambda x: x, 1)
    ours = [results["fsdp"] for results in both]
    for step, expected in enumerate(outputs):
        torch.testing.assert_close(torch.cat([each["outputs"][step] for each in ours]), expected, **JOINED)
    assert_same_state(ours[0]["state"], model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(ours[1]["evaluated"], model.eval()(images(0)), **JOINED)


@pytest.mark.parametrize("scale", [False, True])
def test_maps_of_different_sizes_are_weighted_by_their_patches(both: list[dict[str, Any]], scale: bool) -> None:
    layer, xs = sized_layer(scale), [sized(rank).requires_grad_() for rank in range(2)]
    whitening = layer.whitening
    samples = [whitening.estimator.sample(x, max_samples=None, turn=whitening.num_updates) for x in xs]
    everywhere = [F.unfold(x, 3, padding=1).mT.flatten(0, 1) for x in xs]
    mean = torch.cat(everywhere).mean(0)
    entries = torch.cat([x.transpose(0, 1).flatten(1) for x in xs], 1)
    var = entries.var(1, correction=0) if scale else torch.ones(2, dtype=torch.float64)
    by_tap = var.rsqrt().repeat_interleave(9)
    (cov,) = patch_moments(torch.cat([sample.rows for sample in samples]) * by_tap, whitening.blocks).covs
    root = inverse_sqrt(cov + whitening.config.eps * torch.eye(18), num_iters=3, solver="newton_schulz")
    weight = layer.weight.flatten(1) @ root * by_tap
    bias = layer.bias - weight @ mean
    outputs = [F.conv2d(x, weight.reshape(layer.weight.shape), bias, padding=1) for x in xs]
    torch.stack([y.square().sum() for y in outputs]).sum().backward()
    for x, y, results in zip(xs, outputs, both, strict=True):
        ours = results["sizes, scaled" if scale else "sizes"]
        torch.testing.assert_close(ours["output"], y.detach(), **JOINED)
        torch.testing.assert_close(ours["grad"], x.grad, **JOINED)
        torch.testing.assert_close(ours["state"]["running_mean"], mean.detach(), **JOINED)
        torch.testing.assert_close(ours["state"]["running_root"], root.detach(), **JOINED)
        if scale:
            torch.testing.assert_close(ours["state"]["running_var"], var.detach(), **JOINED)


def test_a_process_that_evaluates_alone_keeps_nobody_waiting(both: list[dict[str, Any]]) -> None:
    assert [results["alone"] for results in both] == [True, True]


@pytest.mark.parametrize(("mode", "who"), MIXED)
def test_processes_in_different_modes_are_refused(both: list[dict[str, Any]], mode: str, who: int) -> None:
    first, second = (results[f"{mode} {who}"] for results in both)
    layer = "WhitenedConv2d(4, 8" if mode == "one layer frozen" else "WhitenedConv2d(2, 4"
    assert second.startswith(f"StatisticsError: {layer}")
    here = "kept" if who == 1 else "gathered"
    assert f"statistics are {here}" in second and "in process 1 and" in second
    assert first.startswith("RuntimeError"), "the first process learns that the other one is gone"


@pytest.mark.parametrize("name", [name for name in ELSEWHERE if "join" not in name])
def test_statistics_of_two_layers_are_never_mixed(both: list[dict[str, Any]], name: str) -> None:
    for results in both:
        assert re.match(
            r"StatisticsError: \w+\(4.*expected all processes to call the same layers in the same order.* got "
            r"(WhitenedConv2d|Channel\w+)\(.*\) in process 0, (WhitenedConv2d|Channel\w+)\(.*\) in process 1",
            results[name],
        ), results[name]


def test_uneven_inputs_are_refused_as_for_batch_normalisation_over_processes(both: list[dict[str, Any]]) -> None:
    for results in both:
        assert re.match(r"StatisticsError: .*got DistributedDataParallel\.join\(\).*throw_on_early", results["join"])
        assert "exhausted" in results["join that throws"]
