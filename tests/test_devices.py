"""Every tensor names its device: nothing changes where torch makes tensors elsewhere by default, and nothing stays."""

from __future__ import annotations

import ast
import contextlib
import functools
import gc
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import netdeconv
from layer_kinds import PARTS, Kind, every_kind
from netdeconv import WhitenedConv2d, WhiteningConfig
from netdeconv.functional import precision
from netdeconv.inspect import inspect_layers, patch_correlation, whitening_filters

# ----------------------------------------------------------------------------------------------------- in the sources

PACKAGE = Path(__file__).resolve().parents[1] / "src" / "netdeconv"
# What makes a tensor on the default device unless it is told another one.
FACTORIES = {
    "arange", "as_tensor", "asarray", "empty", "empty_strided", "eye", "full", "hann_window", "linspace", "logspace",
    "ones", "rand", "randint", "randn", "randperm", "scalar_tensor", "tensor", "tril_indices", "triu_indices", "zeros",
}  # fmt: skip
LIBRARY = ("functional", "inspect", "nn", "surgery")
# Where float64 is asked for by one who knows that the device has it.
KNOWING = {"functional/precision.py", "functional/gram.py", "functional/isqrt.py", "nn/cache.py"}


def sources() -> Iterator[tuple[str, ast.Module]]:
    for folder in LIBRARY:
        for path in sorted((PACKAGE / folder).rglob("*.py")):
            yield path.relative_to(PACKAGE).as_posix(), ast.parse(path.read_text(encoding="utf-8"))


def without_device(tree: ast.AST) -> list[int]:
    """Lines that make a tensor on the default device."""
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and ast.unparse(node.func.value) == "torch"
        and node.func.attr in FACTORIES
        and not any(keyword.arg in ("device", None) for keyword in node.keywords)  # None: **place
    ]


def kept_without_device(tree: ast.AST) -> list[int]:
    """Lines of functions whose tensors are kept for others, and not apart for every device."""
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
        and any(ast.unparse(decorator) == "cached_constant" for decorator in node.decorator_list)
        and "device" not in {argument.arg for argument in node.args.args}
    ]


def doubles(tree: ast.AST) -> list[int]:
    """Lines that convert a tensor to float64 where it is."""
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and (
            node.func.attr == "double"
            or (node.func.attr == "to" and any("torch.float64" in ast.unparse(value) for value in node.args))
        )
    ]


def test_every_tensor_names_its_device() -> None:
    found = {name: without_device(tree) for name, tree in sources()}
    assert {name: lines for name, lines in found.items() if lines} == {}
    assert {name: lines for name, tree in sources() if (lines := kept_without_device(tree))} == {}


def test_float64_is_asked_for_in_one_place() -> None:
    assert {name: lines for name, tree in sources() if name not in KNOWING and (lines := doubles(tree))} == {}


def test_the_sources_are_read_right() -> None:
    tree = ast.parse(
        "torch.eye(3)\ntorch.eye(3, device=d)\ntorch.eye(3, **place)\ntorch.eye_like(x)\nx.double()\n"
        "x.to(torch.float64)\n@cached_constant\ndef f(n): ...\n@cached_constant\ndef g(n, device): ...\n"
    )
    assert (without_device(tree), doubles(tree), kept_without_device(tree)) == ([1], [5, 6], [8])


class OnMPS:
    """A tensor of a device that has no float64, as far as it is looked at."""

    device = types.SimpleNamespace(type="mps")

    def is_complex(self) -> bool:
        return False

    def cpu(self) -> Tensor:
        return torch.ones(2)

    def to(self, *_: Any) -> Tensor:
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64.")


def test_what_has_no_float64_is_brought_to_the_cpu() -> None:
    there: Any = OnMPS()
    assert precision.exact(there).dtype is torch.float64
    on_cpu = torch.ones(2, dtype=torch.float64)
    assert precision.exact(on_cpu) is on_cpu
    assert precision.exact(torch.ones(2, dtype=torch.complex64)).dtype is torch.complex128
    assert precision.exact(torch.ones(2, device="meta")).device.type == "meta"


# ------------------------------------------------------------------------------------------- another device by default

Place = Callable[[], contextlib.AbstractContextManager[Any]]


@contextlib.contextmanager
def default_device() -> Iterator[None]:
    before = torch.get_default_device()
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None if before.type == "cpu" else before)


# "meta" stands for a device on which nothing is: whatever is made there cannot be combined with what is on the CPU.
elsewhere = pytest.mark.parametrize(
    "place", [lambda: torch.device("meta"), default_device], ids=["torch.device", "set_default_device"]
)


@pytest.fixture(scope="module")
def kept() -> list[Any]:
    """All that our modules keep in caches."""
    wrappers = [value for value in gc.get_objects() if type(value) is functools._lru_cache_wrapper]
    ours = [value for value in wrappers if str(value.__module__).startswith("netdeconv.")]
    assert sum(value.__module__ == "netdeconv.functional.tracing" for value in ours) >= 3
    return ours


@pytest.fixture(autouse=True)
def nothing_kept(kept: list[Any]) -> None:
    """Caches are filled in here, not by the tests before."""
    for cache in kept:
        cache.cache_clear()


def step(net: nn.Module, x: Tensor) -> Tensor:
    """Forward, backward and one step of gradient descent."""
    y = net(x)
    if y.requires_grad:
        y.square().mean().backward()
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.grad is not None:
                parameter.sub_(0.1 * parameter.grad)
                parameter.grad = None
    return y.detach()


def life(make: Callable[[], nn.Module], batches: list[Tensor], place: Place) -> dict[str, Tensor]:
    """What comes out of a network that is made, trained, calibrated, fused and frozen in a place, by the stage."""
    found: dict[str, Tensor] = {}
    with place():
        net = make()
        for number, x in enumerate(batches):
            found[f"training {number}"] = step(net, x)
        found |= {f"trained {name}": value.clone() for name, value in net.state_dict().items()}
        netdeconv.calibrate(net, batches)
        found |= {f"calibrated {name}": value.clone() for name, value in net.state_dict().items()}
        net.eval()
        with torch.no_grad():
            found["evaluation"] = net(batches[0])
            found["fused"] = netdeconv.fuse(net)(batches[0])
        net.load_state_dict(net.state_dict())
        views = inspect_layers(net, batches[0], max_samples=10)
        found |= {f"{view.name} {number}": view.raw.matrix for number, view in enumerate(views)}
        netdeconv.freeze(net.train())
        found["frozen"] = step(net, batches[0])
    net.eval()
    with torch.no_grad():
        found["outside"] = net(batches[1])
        found["outside, made before"] = net(batches[1])
        found["fused outside"] = netdeconv.fuse(net)(batches[1])
    return found


def assert_same_life(make: Callable[[], nn.Module], batches: list[Tensor], place: Place) -> None:
    there, here = (life(make, batches, where) for where in (place, contextlib.nullcontext))
    assert there.keys() == here.keys()
    for name, value in there.items():
        assert value.device.type == "cpu", name
        assert torch.equal(value, here[name]), name


@elsewhere
@pytest.mark.parametrize("config", [None, PARTS, WhiteningConfig.paper()], ids=["default", "parts", "paper"])
@every_kind
def test_a_layer_lives_as_it_does_on_its_own_device(kind: Kind, config: WhiteningConfig | None, place: Place) -> None:
    batches = [kind.input(seed=seed) for seed in range(3)]
    assert_same_life(lambda: kind.layer(config, device="cpu"), batches, place)


class Norm(nn.BatchNorm2d):
    """One of another library, which is recognised by trying it; it makes a tensor on the way."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * torch.ones(())


def network(norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8, bias=False), norm(8),
        nn.ReLU(), nn.Conv2d(8, 12, 1), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 8, 3, groups=2, padding=1),
        nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    )  # fmt: skip


def images(count: int = 3) -> list[Tensor]:
    return [torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) + 1 for seed in range(count)]


@elsewhere
def test_a_converted_network_lives_as_it_does_on_its_own_device(place: Place) -> None:
    net, batches = network(Norm), images()
    assert_same_life(lambda: netdeconv.convert(net), batches, place)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in netdeconv.convert(net).modules())


@elsewhere
def test_conversion_preserves_wherever_tensors_are_made(place: Place) -> None:
    net, batches = network(), images()
    net(batches[0])
    net.eval()
    with place():
        there = netdeconv.convert(net, preserve=batches)
    here = netdeconv.convert(net, preserve=batches)
    for name, value in there.state_dict().items():
        assert torch.equal(value, here.state_dict()[name]), name


@elsewhere
def test_inspection_sees_the_same(place: Place) -> None:
    wide = nn.Sequential(  # more features, and more groups, than are looked at: some are drawn
        WhitenedConv2d(3, 150, 1), WhitenedConv2d(150, 600, 3), WhitenedConv2d(600, 600, 3, groups=600)
    )  # fmt: skip
    wide = wide.append(nn.Conv2d(600, 4, 1))
    x = images(1)[0]
    wide(x)

    def found() -> list[Tensor]:
        views = inspect_layers(wide, x, max_samples=8)
        responses = [view.whitened or view.raw for view in views]
        return [*(each.matrix for each in responses), *(each.histogram for each in responses),
                patch_correlation(x, 3), whitening_filters(x, 3)]  # fmt: skip

    with place():
        there = found()
    for ours, expected in zip(there, found(), strict=True):
        assert torch.equal(ours, expected)
