"""Rivals: two steps worked by hand, the papers' formulas in float64, and what users of PyTorch expect of a layer."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

pytest.importorskip("torchvision")

from netdeconv.lab.norms import with_norm
from netdeconv.lab.rivals import SWBN, DecorrelatedConv2d, DecorrelatedLinear, IterNorm, StandardisedConv2d

ROUNDING = 1e-12  # of float64, a few products of small matrices


def close(found: Tensor, expected: Tensor | list[list[float]] | list[float], atol: float = ROUNDING) -> None:
    wanted = torch.as_tensor(expected, dtype=found.dtype)
    torch.testing.assert_close(found, wanted, rtol=0, atol=atol)


# ---------------------------------------------------------------------------------------------- cases worked by hand


def test_iternorm_by_hand() -> None:
    """Covariance diag(2, 1) of trace 3: with one step P = diag(3 - 2/3, 3 - 1/3) / 2 and D = P / sqrt(3)."""
    x = torch.tensor([[2, 1], [-2, 1], [0, -1], [0, -1]], dtype=torch.float64)
    layer = IterNorm(2, num_iters=1, eps=0, dtype=torch.float64)
    root = torch.diag(torch.tensor([7 / 6, 4 / 3], dtype=torch.float64)) / 3**0.5
    close(layer(x), x @ root)
    close(layer.running_root[0], 0.9 * torch.eye(2, dtype=torch.float64) + 0.1 * root)
    close(layer(x + 1), x @ root)  # the second step sees another mean
    close(layer.running_mean, [0.1, 0.1])
    close(layer.running_root[0], 0.81 * torch.eye(2, dtype=torch.float64) + 0.19 * root)
    close(layer.eval()(x), (x - 0.1) @ layer.running_root[0])


def test_swbn_by_hand() -> None:
    """Two channels of correlation c: M - I = c J, J the exchange, then W = I - step c J and its next step."""
    x = torch.tensor([[1, 1], [-1, -1], [1, -1], [-1, 1], [1, 1], [-1, -1], [1, 1], [-1, -1]], dtype=torch.float64)
    c, step, swap = 0.5, 0.1, torch.tensor([[0, 1], [1, 0]], dtype=torch.float64)
    one = torch.eye(2, dtype=torch.float64)
    layer = SWBN(2, criterion="kl", step=step, eps=0, dtype=torch.float64)
    first = one - step * c * swap
    close(layer(x), x @ first)
    # W = I - 0.05 J and S = I + 0.5 J commute: W S W = (1.0025 - 0.1 J)(I + 0.5 J) = 0.9525 + 0.40125 J
    gap = (0.9525 - 1) * one + 0.40125 * swap
    close(layer(x), x @ (first - step * gap @ first))
    close(layer.eval()(x), ((x - layer.running_mean) / layer.running_var.sqrt()) @ layer.whitener)


def test_swbn_follows_the_frobenius_norm_by_hand() -> None:
    """M - I = c J has norm c sqrt(2): W = I - step J (I + c J) / sqrt(2), whatever c is."""
    x = torch.tensor([[1, 1], [-1, -1], [1, -1], [-1, 1], [1, 1], [-1, -1], [1, 1], [-1, -1]], dtype=torch.float64)
    layer = SWBN(2, step=0.1, eps=0, dtype=torch.float64)
    layer(x)
    diagonal, off = 1 - 0.1 * 0.5 / 2**0.5, -0.1 / 2**0.5
    close(layer.whitener, [[diagonal, off], [off, diagonal]])


def test_dbp_by_hand() -> None:
    """Power 2 and 1, product 1: C = J, V = diag(1, 0), R = I - step ((1 - kappa) J + kappa diag(1, 0))."""
    x = torch.tensor([[2, 1], [0, 1], [-2, -1], [0, -1]], dtype=torch.float64)
    layer = DecorrelatedLinear(2, 2, bias=False, step=0.1, kappa=0.5, share=1, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(2))
    first = torch.tensor([[0.95, -0.05], [-0.05, 1]], dtype=torch.float64)
    close(layer(x), x @ first.mT)
    close(layer.decorrelation[0], first)
    # z has R [[2, 1], [1, 1]] R^T = [[1.85, 0.9], [0.9, 0.95]] R^T = [[1.7125, 0.8075], [0.8075, 0.905]]
    learned = 0.5 * torch.tensor([[0.7125, 0.8075], [0.8075, -0.095]], dtype=torch.float64)
    close(layer(x), x @ (first - 0.1 * learned @ first).mT)


def test_standardised_weights_by_hand() -> None:
    """Weights 0, 2 have mean 1 and deviation 1."""
    layer = StandardisedConv2d(2, 1, 1, bias=False, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([0, 2], dtype=torch.float64).view(1, 2, 1, 1))
    x = torch.tensor([3, 5], dtype=torch.float64).view(1, 2, 1, 1)
    close(layer(x).flatten(), [2 / (1 + 1e-5)], atol=1e-9)  # the deviation's least square
    with torch.no_grad():
        layer.weight += 7
    close(layer(x).flatten(), [2 / (1 + 1e-5)], atol=1e-9)


# ----------------------------------------------------------------------------------------- the formulas in float64


def correlated(*shape: int) -> Tensor:
    """Maps whose channels and neighbours are correlated."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=draw, dtype=torch.float64)
    return x.cumsum(1) + x.roll(1, -1) + 0.3


def test_iternorm_follows_algorithm_1() -> None:
    x, layer = correlated(8, 6, 5, 5), IterNorm(6, group_size=4, dtype=torch.float64)
    assert layer.group_size == 3
    found = layer(x)
    for group in (slice(0, 3), slice(3, 6)):
        rows = x[:, group].transpose(0, 1).flatten(1)
        centred = rows - rows.mean(1, keepdim=True)
        cov = torch.cov(rows, correction=0) + 1e-5 * torch.eye(3, dtype=torch.float64)
        p = torch.eye(3, dtype=torch.float64)
        for _ in range(5):
            p = (3 * p - torch.linalg.matrix_power(p, 3) @ cov / cov.trace()) / 2
        close(found[:, group].transpose(0, 1).flatten(1), p @ centred / cov.trace().sqrt())


def test_iternorm_whitens_in_the_end() -> None:
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = x @ (torch.eye(6, dtype=torch.float64) + 0.2)
    found = IterNorm(6, num_iters=10, dtype=torch.float64)(x)
    close(torch.cov(found.mT, correction=0), torch.eye(6, dtype=torch.float64), atol=1e-4)  # but for eps


@pytest.mark.parametrize("groups", [1, 2])
def test_dbp_learns_from_the_patches_of_a_tenth(groups: int) -> None:
    x = correlated(20, 4, 6, 7)
    layer = DecorrelatedConv2d(
        4, 6, (3, 2), stride=2, padding=(1, 0), dilation=(1, 2), groups=groups, step=1e-3, dtype=torch.float64
    )
    found = layer(x)
    shape = {"kernel_size": (3, 2), "stride": 2, "padding": (1, 0), "dilation": (1, 2)}
    for g in range(groups):
        size = 4 // groups
        z = F.unfold(x[:2, g * size : (g + 1) * size], **shape).transpose(0, 1).flatten(1)  # type: ignore[arg-type]
        cov = z @ z.mT / z.shape[1]
        off, power = cov - torch.diag(cov.diagonal()), torch.diag(cov.diagonal() - 1)
        close(layer.decorrelation[g], torch.eye(len(z), dtype=torch.float64) - 1e-3 * 0.5 * (off + power))
    z = F.unfold(x, **shape).unflatten(1, (groups, -1))  # type: ignore[arg-type]
    z = torch.einsum("gij,ngjl->ngil", layer.decorrelation, z)
    y = torch.einsum("goj,ngjl->ngol", layer.weight.flatten(1).unflatten(0, (groups, -1)), z).flatten(1, 2)
    assert layer.bias is not None
    close(found, (y + layer.bias[:, None]).unflatten(2, found.shape[2:]))


@pytest.mark.parametrize("make", [lambda: SWBN(6, step=0.05, criterion="kl"), lambda: decorrelating(0.02)])
def test_what_is_learned_decorrelates(make: Callable[[], nn.Module]) -> None:
    layer, draw = make().double(), torch.Generator().manual_seed(0)
    mix = torch.eye(6, dtype=torch.float64) + 0.4
    for _ in range(400):
        seen = layer(torch.randn(256, 6, generator=draw, dtype=torch.float64) @ mix)
    correlation = torch.corrcoef(seen.mT)
    off = (correlation - torch.eye(6, dtype=torch.float64)).abs().mean()
    assert off < 0.08  # 256 rows leave 0.04; without learning it is 0.58
    before = torch.corrcoef((torch.randn(256, 6, generator=draw, dtype=torch.float64) @ mix).mT)
    assert (before - torch.eye(6, dtype=torch.float64)).abs().mean() > 0.5


def decorrelating(step: float) -> nn.Module:
    layer = DecorrelatedLinear(6, 6, bias=False, step=step, share=1)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(6))
    return layer


# ------------------------------------------------------------------------------------- what is expected of a layer

LAYERS: dict[str, Callable[..., nn.Module]] = {
    "iternorm": lambda **made: IterNorm(4, **made),
    "swbn": lambda **made: SWBN(4, step=1e-2, **made),
    "dbp conv": lambda **made: DecorrelatedConv2d(4, 4, 3, padding=1, step=1e-3, **made),
    "gn+ws": lambda **made: StandardisedConv2d(4, 4, 3, padding=1, **made),
}


@pytest.mark.parametrize("name", LAYERS)
def test_state_copies_and_modes(name: str) -> None:
    layer, x = LAYERS[name](dtype=torch.float64), correlated(8, 4, 5, 5)
    for _ in range(2):
        layer(x).square().sum().backward()
    other, twin = LAYERS[name](dtype=torch.float64), copy.deepcopy(layer)
    other.load_state_dict(layer.state_dict())
    state = {key: value.clone() for key, value in layer.state_dict().items()}
    expected = layer.eval()(x)
    close(layer(x[:3]), expected[:3])  # an image's output depends on no other
    for one in (other, twin):
        close(one.eval()(x), expected)
    assert all(torch.equal(value, state[key]) for key, value in layer.state_dict().items())  # evaluation learns nothing
    close(layer.float()(x.float()).double(), expected, atol=1e-4)  # of float32
    assert "eps" in layer.extra_repr() or isinstance(layer, nn.Conv2d)


@pytest.mark.parametrize("name", LAYERS)
def test_two_forwards_before_one_backward(name: str) -> None:
    """What the first one keeps for backward must not be what the second one changes."""
    layer, x = LAYERS[name](dtype=torch.float64), correlated(8, 4, 5, 5)
    before = copy.deepcopy(layer)
    before(x).square().sum().backward()
    (first, _) = layer(x), layer(x + 1)
    first.square().sum().backward()
    for (key, parameter), expected in zip(layer.named_parameters(), before.parameters(), strict=True):
        assert parameter.grad is not None and expected.grad is not None, key
        close(parameter.grad, expected.grad)


@pytest.mark.parametrize("name", ["iternorm", "gn+ws"])
def test_gradients(name: str) -> None:
    layer, x = LAYERS[name](dtype=torch.float64), correlated(3, 4, 3, 3).requires_grad_()
    assert torch.autograd.gradcheck(layer, (x,))


@pytest.mark.parametrize("name", LAYERS)
def test_half_precision_keeps_statistics_in_single(name: str) -> None:
    layer, x = LAYERS[name](), correlated(8, 4, 5, 5).float()
    plain = copy.deepcopy(layer)(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = layer(x)
    assert (found.float() - plain).norm() < 0.01 * plain.norm()  # bfloat16 has 8 bits
    assert all(value.dtype == torch.float32 for value in layer.state_dict().values())


@pytest.mark.parametrize("name", LAYERS)
def test_channels_last_stays_so(name: str) -> None:
    layer, x = LAYERS[name](dtype=torch.float64), correlated(8, 4, 5, 6)
    twin = copy.deepcopy(layer).to(memory_format=torch.channels_last)
    for _ in range(2):
        expected, found = layer(x), twin(x.contiguous(memory_format=torch.channels_last))
        close(found, expected)
        assert expected.is_contiguous() and found.is_contiguous(memory_format=torch.channels_last)
        found.square().sum().backward()
    for key, value in layer.state_dict().items():
        close(twin.state_dict()[key], value)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", LAYERS)
def test_a_gpu_computes_the_same(name: str) -> None:
    layer, x = LAYERS[name](dtype=torch.float64), correlated(8, 4, 5, 6)
    twin = copy.deepcopy(layer).cuda()
    for _ in range(2):
        expected, found = layer(x), twin(x.cuda())
        close(found.cpu(), expected, atol=1e-9)  # sums in another order
        found.square().sum().backward()
    for key, value in layer.state_dict().items():
        close(twin.state_dict()[key].cpu(), value, atol=1e-9)


@pytest.mark.parametrize("name", LAYERS)
def test_compiled_in_one_graph(name: str) -> None:
    """Two training steps, state included; aot_eager traces everything, and compiles nothing."""
    layer, x = LAYERS[name](dtype=torch.float64), correlated(8, 4, 5, 5)
    twin = copy.deepcopy(layer)
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        expected, found = layer(x), compiled(x)
        close(found, expected)
        for output in (expected, found):
            output.square().sum().backward()
    for value, other in zip(layer.state_dict().values(), twin.state_dict().values(), strict=True):
        close(other, value)
    for parameter, other in zip(layer.parameters(), twin.parameters(), strict=True):
        assert parameter.grad is not None and other.grad is not None
        close(other.grad, parameter.grad, atol=1e-9)  # sums in another order


@pytest.mark.parametrize("kind", [IterNorm, SWBN])
def test_other_channels_are_refused(kind: type[nn.Module]) -> None:
    with pytest.raises(ValueError, match=r"expected x of shape \(N, 4\) or \(N, 4, \.\.\.\), got \(2, 3\)"):
        kind(4)(torch.zeros(2, 3))


@pytest.mark.parametrize("kind", [IterNorm, SWBN])
@pytest.mark.parametrize("shape", [(1, 4), (0, 4, 5, 5), (1, 4, 1, 1)])
def test_one_value_has_no_variance(kind: type[nn.Module], shape: tuple[int, ...]) -> None:
    layer, before = kind(4), kind(4).state_dict()
    with pytest.raises(ValueError, match="expected more than 1 value per channel when training, got x of shape"):
        layer(torch.zeros(shape))
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())
    assert layer.eval()(torch.zeros(shape)).shape == shape


def test_dbp_takes_a_single_row() -> None:
    row = DecorrelatedLinear(6, 6, step=0.1)
    batch = copy.deepcopy(row)
    x = correlated(1, 6).float()
    close(row(x[0]), batch(x)[0])
    close(row.decorrelation, batch.decorrelation)
    assert not torch.equal(row.decorrelation[0], torch.eye(6))


def test_other_mistakes_are_refused() -> None:
    with pytest.raises(ValueError, match="criterion 'fro' or 'kl', got 'nuc'"):
        SWBN(4, criterion="nuc")
    with pytest.raises(ValueError, match=r"expected x of shape \(N, C, H, W\), got \(4, 5, 5\)"):
        DecorrelatedConv2d(4, 4, 3)(torch.zeros(4, 5, 5))


@pytest.mark.parametrize("norm", ["dbp", "gn+ws"])
def test_swapped_layers_keep_weights_geometry_and_flags(norm: str) -> None:
    net = nn.Sequential(
        nn.Conv2d(4, 8, (3, 1), 2, (1, 0), groups=2, padding_mode="reflect"), nn.BatchNorm2d(8), nn.Flatten(),
        nn.Linear(8 * 2 * 3, 5),
    ).double().eval()  # fmt: skip
    new = with_norm(net, norm)
    conv, old = new[0], net[0]  # type: ignore[index]
    assert torch.equal(conv.weight, old.weight) and torch.equal(conv.bias, old.bias)
    assert (conv.kernel_size, conv.stride, conv.padding, conv.groups) == ((3, 1), (2, 2), (1, 0), 2)
    assert not conv.training and conv.padding_mode == "reflect" and conv.weight.dtype == torch.float64
    x = correlated(3, 4, 4, 5)
    if norm == "dbp":  # nothing is learned yet
        close(new(x), net(x))
        assert not torch.equal(new.train()(x), net(x))
    else:
        assert new(x).shape == (3, 5)
