"""On a GPU: the numbers of the CPU, no step that waits for the device, and what runs there only. Skipped elsewhere."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import netdeconv
from layer_kinds import BFLOAT16, BY_NAME, PARTS, Kind, assert_same_state, every_kind
from netdeconv import ChannelWhitening, NonFiniteWarning, WhitenedConv2d, WhitenedLinear, WhiteningConfig, cli
from netdeconv.functional import inverse_sqrt
from small_networks import random_network, randomise_statistics

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    # Lightning and cuDNN, of a machine's size and of algorithms that are slower than others
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:Plan failed with a cudnnException:UserWarning"),
    # torch itself, of its own mode, of a thread's first product, and of its own decorator
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype"),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores for float32 matrix multiplication available"),
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS, but there was no current CUDA context"),
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.autograd.function.Function.* should not be instantiated"),
    # its compiler, of what it looks at itself, and of a graph between two operators that no graph holds
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor is being accessed"),
    pytest.mark.filterwarnings("ignore:The CUDA Graph is empty"),
]

KEPT_ROOT = WhiteningConfig(scale=False, average="root", differentiable=False, update_every=16, num_iters=5)
CONFIGS = {
    "default": None,
    "parts": PARTS,
    "kept_root": KEPT_ROOT,
    "paper": WhiteningConfig.paper(),
    "quintic": WhiteningConfig(num_iters=15, eps=1e-3),
    "eigh": WhiteningConfig(solver="eigh", eps=1e-3),
}
WITHOUT_WAITING = ("default", "parts", "kept_root", "paper")  # eigh waits by itself
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
# Sums in another order, in float64; an iteration amplifies rounding by 1.5**15 = 438 per factor at most.
TIGHT: dict[str, Any] = {"rtol": 1e-7, "atol": 1e-9}
# float32 beside float64: rounding of 6e-8 in sums of hundreds, times the gain of 7.6 twice.
SINGLE: dict[str, Any] = {"rtol": 2e-3, "atol": 2e-3}


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    """Every synchronisation that torch knows of is an error."""
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def exact_float32() -> Iterator[None]:
    """Convolutions without TF32, which torch allows them by default."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def train(layer: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    """Output, and gradients of input and parameters, of one step whose output pulls in fixed directions."""
    x = x.detach().requires_grad_()
    y = layer(x)
    along = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    y.backward(along.to(y))
    grads = [parameter.grad for parameter in layer.parameters()]
    layer.zero_grad(set_to_none=True)
    return y.detach(), x.grad, *grads  # type: ignore[return-value]


@every_kind
@every_config
def test_steps_are_those_of_the_cpu(kind: Kind, config: WhiteningConfig | None) -> None:
    here = kind.layer(config, dtype=torch.float64)
    there = copy.deepcopy(here).cuda()
    for step in range(21):  # 16 refreshes, then every second step one
        x = kind.input(seed=step, dtype=torch.float64)
        for mine, its in zip(train(here, x), train(there, x.cuda()), strict=True):
            torch.testing.assert_close(its.cpu(), mine, **TIGHT)
    assert_same_state(there.cpu(), here, **TIGHT)
    x = kind.input(seed=99, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(there.eval().cuda()(x.cuda()).cpu(), here.eval()(x), **TIGHT)


def test_the_scale_is_that_of_the_same_images_of_a_large_batch() -> None:
    kind = BY_NAME["conv2d"]
    here = kind.layer(dtype=torch.float64)
    there = copy.deepcopy(here).cuda()
    for step in range(18):  # 600 maps of 30 positions: every second image
        x = kind.input(batch=600, seed=step, dtype=torch.float64)
        for mine, its in zip(train(here, x), train(there, x.cuda()), strict=True):
            torch.testing.assert_close(its.cpu(), mine, **TIGHT)
    assert_same_state(there.cpu(), here, **TIGHT)


@every_kind
def test_single_precision_is_near_double(kind: Kind, exact_float32: None) -> None:
    exact = kind.layer(dtype=torch.float64)
    ours = copy.deepcopy(exact).float().cuda()
    for step in range(21):
        x = kind.input(batch=32, seed=step, dtype=torch.float64)
        for its, mine in zip(train(ours, x.float().cuda()), train(exact, x), strict=True):
            torch.testing.assert_close(its.cpu().double(), mine, **SINGLE)
    assert_same_state(ours.cpu().double(), exact, **SINGLE)


@every_kind
@pytest.mark.parametrize("config", [CONFIGS[name] for name in WITHOUT_WAITING], ids=WITHOUT_WAITING)
def test_no_step_waits_for_the_device(kind: Kind, config: WhiteningConfig | None) -> None:
    layer = kind.layer(config).cuda()
    inputs = [kind.input(seed=step).cuda().requires_grad_() for step in range(21)]
    train(layer, inputs[0])  # constants, handles and workspaces are made
    along = torch.ones_like(layer(inputs[0]))
    with no_waiting():
        for x in inputs:
            layer(x).backward(along)
    layer.eval()  # looks at the counters once
    with torch.no_grad(), no_waiting():
        layer(inputs[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_with_channels_last(dtype: torch.dtype) -> None:
    kind = BY_NAME["conv2d"]
    plain, ours = kind.layer(PARTS).cuda(), kind.layer(PARTS).cuda().to(memory_format=torch.channels_last)
    for step in range(21):
        x = kind.input(batch=16, seed=step).cuda().to(dtype)
        with torch.autocast("cuda", dtype=dtype):
            y = ours(x.contiguous(memory_format=torch.channels_last))
        assert y.dtype == dtype
        assert y.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(y.float(), plain(x.float()), **BFLOAT16)
    for name, value in ours.state_dict().items():
        assert value.dtype in (torch.float32, torch.int64), name
    # the statistics saw the same numbers, and are computed in float32 either way
    assert_same_state(ours, plain, rtol=1e-3, atol=1e-4)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        WhitenedConv2d(3, 16, 3, padding=1), nn.ReLU(), WhitenedConv2d(16, 40, 3, stride=2, padding=1), nn.ReLU(),
        WhitenedConv2d(40, 40, 3, padding=1, groups=40), nn.ReLU(), ChannelWhitening(40),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), WhitenedLinear(40, 5),
    )  # fmt: skip


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_steps_are_eager_steps(mode: str, exact_float32: None) -> None:
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    eager, model = network().cuda(), network().cuda()
    compiled = torch.compile(model, mode=mode)
    for step in range(40):
        x = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(step)).cuda()
        torch.compiler.cudagraph_mark_step_begin()
        eager(x).square().mean().backward()
        y = compiled(x)
        y.square().mean().backward()
        for (name, mine), its in zip(eager.named_parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(its.grad, mine.grad, **SINGLE, msg=lambda text: f"{name}, step {step}: {text}")  # noqa: B023
        eager.zero_grad(), model.zero_grad()
    assert_same_state(model, eager, **SINGLE)
    for mine, its in zip(eager.modules(), model.modules(), strict=True):
        if isinstance(mine, netdeconv.nn.Whitening):
            assert int(its.num_steps) == its.clock.steps == 40
            assert int(its.num_updates) == int(mine.num_updates)
    skips = counters["inductor"]["cudagraph_skips"]
    assert mode == "default" or skips == 0, counters["inductor"]
    with torch.no_grad():
        eager.eval(), model.eval()
        torch.testing.assert_close(compiled(x), eager(x), **SINGLE)


def test_batches_without_statistics_are_left_out_and_reported_when_the_mode_changes() -> None:
    kind = BY_NAME["conv2d"]
    layer = kind.trained(3).cuda()
    before = {name: value.clone() for name, value in layer.state_dict().items() if "running" in name}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for bad in (float("nan"), float("inf")):
            x = kind.input().cuda()
            x[0, 0, 0, 0] = bad
            layer(x)
        layer(torch.full_like(x, 3.0))
    for name, value in before.items():
        torch.testing.assert_close(layer.state_dict()[name], value, rtol=1e-6, atol=1e-7)
    with pytest.warns(NonFiniteWarning, match=r"3 step\(s\)"):
        layer.eval()


def test_evaluation_folds_once_and_is_not_stale(exact_float32: None) -> None:
    kind = BY_NAME["conv2d"]
    layer = kind.trained(3).cuda().eval()
    x = kind.input().cuda()
    with torch.no_grad():
        before, bias = layer(x), layer.bias[:, None, None]
        with no_waiting():
            layer(x)
        layer.weight.mul_(2)
        torch.testing.assert_close(layer(x) - bias, 2 * (before - bias), **SINGLE)
        layer.weight.data.mul_(2)  # no version says so
        torch.testing.assert_close(layer.eval()(x) - bias, 4 * (before - bias), **SINGLE)
        layer.train()(x)
        layer.whitening.training = False  # the step has changed the running mean, in a kernel
        torch.testing.assert_close(layer(x), copy.deepcopy(layer)(x), **SINGLE)


@pytest.mark.parametrize(("num_iters", "most"), [(5, 5e-3), (15, 2e-2)])
def test_the_root_bears_tf32(num_iters: int, most: float) -> None:
    noise = torch.randn(64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    vectors, _ = torch.linalg.qr(noise)
    cov = (vectors * torch.logspace(0, -4, 64, dtype=torch.float64)) @ vectors.T
    expected = inverse_sqrt(cov, num_iters=num_iters)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        ours = inverse_sqrt(cov.float().cuda(), num_iters=num_iters).cpu().double()
    finally:
        torch.set_float32_matmul_precision(before)
    relative = torch.linalg.matrix_norm(ours - expected, 2) / torch.linalg.matrix_norm(expected, 2)
    assert float(relative) < most


def test_converted_and_fused_there() -> None:
    for seed in range(5):
        net = randomise_statistics(random_network(seed), seed).double().eval().cuda()
        x, *data = (torch.randn(3, 3, 6, 6, dtype=torch.float64).cuda() for _ in range(3))
        converted = netdeconv.convert(net, preserve=data)
        assert all(value.is_cuda for value in converted.state_dict().values())
        with torch.no_grad():
            torch.testing.assert_close(converted(x), net(x), **TIGHT)
            torch.testing.assert_close(netdeconv.fuse(converted)(x), net(x), **TIGHT)


def test_state_moves_between_devices() -> None:
    kind = BY_NAME["conv2d"]
    layer = kind.trained(20).cuda()
    other = kind.layer()
    other.load_state_dict(layer.state_dict())
    assert_same_state(other, layer.cpu())
    assert other.whitening.clock.steps == 20


def test_fit_trains_there(tmp_path: Path) -> None:
    pytest.importorskip("jsonargparse")  # machines that are borrowed for their GPU may lack it
    options = ["--config=digits", "--width=0.25", "--trainer.accelerator=gpu", "--trainer.precision=bf16-mixed"]
    assert cli.main(["fit", *options, "--trainer.max_epochs=1", "--out", str(tmp_path)]) == 0
    assert cli.main(["test", "--out", str(tmp_path), "--trainer.accelerator=gpu"]) == 0


def test_the_benchmark_runs_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--width=0.125", "--batch=8", "--rounds=1", "--eval-rounds=2", "--warmup=1"]
    command = ["bench", "step", "--network=vgg11", "--device=cuda", *small, "--dtype=bfloat16", "--channels-last"]
    assert cli.main([*command, "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "allocated" in shown and "published / default" in shown


def test_reproduce_trains_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.max_memory_allocated()
    assert cli.main(["reproduce", "cifar", "--size=smoke", "--device=cuda", "--quiet", "--out", str(tmp_path)]) == 0
    assert torch.cuda.max_memory_allocated() > before + 2**20
    assert "--device cuda" in capsys.readouterr().out
