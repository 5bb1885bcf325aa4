"""What the layers compute: against the reference in float64, at known limits, and on awkward shapes."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import layer_kinds
from netdeconv import (
    ChannelWhitening,
    NonFiniteWarning,
    WhitenedConv1d,
    WhitenedConv2d,
    WhitenedConv3d,
    WhitenedLinear,
    WhiteningConfig,
)
from netdeconv import reference as ref
from netdeconv.functional import fold

DRAWS = settings(deadline=None, derandomize=True, max_examples=30)

# float64, a few hundred operations, five iterations that amplify rounding by up to 1.5**5 squared.
TIGHT: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-10}
# An exact root: rounding times the condition number, below 1e5 here.
ROOT: dict[str, Any] = {"rtol": 1e-8, "atol": 1e-8}

# Default but for the solver: the reference takes the steps themselves.
STEPS = WhiteningConfig(solver="newton_schulz")
CONVS = {1: WhitenedConv1d, 2: WhitenedConv2d, 3: WhitenedConv3d}
PLAIN: dict[int, Any] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def close(actual: Tensor, expected: Tensor, **tolerance: Any) -> None:
    torch.testing.assert_close(actual, expected, **(tolerance or TIGHT))


def activation(*shape: int, seed: int = 0) -> Tensor:
    """Correlated in space and across channels, with another mean in every channel."""
    noise = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    for dim in range(2, len(shape)):
        noise = noise + 0.7 * noise.roll(1, dim)
    if shape[0] > 0:
        noise = noise + 0.5 * noise.roll(1, 1)
    return noise + torch.arange(shape[1]).reshape(-1, *[1] * (len(shape) - 2))


@dataclasses.dataclass(frozen=True)
class Shape:
    """One convolution, the size of its input, and its padding in numbers where it is given in words."""

    name: str
    size: tuple[int, ...]
    channels: int = 4
    out: int = 6
    kernel_size: Any = 3
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    block_size: int = 64
    pads: Any = None

    def layer(self, whitening: WhiteningConfig, seed: int = 0) -> Any:
        torch.manual_seed(seed)
        return CONVS[len(self.size)](
            self.channels,
            self.out,
            self.kernel_size,
            **self.options,
            dtype=torch.float64,
            whitening=whitening.replace(block_size=self.block_size),
        )

    def input(self, batch: int = 3, seed: int = 0) -> Tensor:
        return activation(batch, self.channels, *self.size, seed=seed)

    def window(self) -> dict[str, Any]:
        padding = self.options.get("padding", 0) if self.pads is None else self.pads
        defaults = {"stride": 1, "dilation": 1, "padding_mode": "zeros"}
        return {**{name: self.options.get(name, value) for name, value in defaults.items()}, "padding": padding}


def shape(name: str, size: tuple[int, ...], **fields: Any) -> Shape:
    known = {field.name for field in dataclasses.fields(Shape)}
    options = {key: fields.pop(key) for key in list(fields) if key not in known}
    return Shape(name, size, options=options, **fields)


MODES = ("zeros", "reflect", "replicate", "circular")
SHAPES = [
    shape("line", (9,), padding=1),
    shape("line_strided", (11,), stride=2, dilation=2, padding=3),
    shape("plane", (6, 7)),
    shape("plane_padded", (5, 6), padding=1),
    shape("tuples", (7, 8), kernel_size=(3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)),
    shape("row_kernel", (5, 6), kernel_size=(1, 3), padding=(0, 1)),
    shape("one_by_one", (4, 3), kernel_size=1, bias=False),
    shape("one_by_one_padded", (4, 3), kernel_size=1, padding=1),
    shape("valid", (5, 5), padding="valid", pads=0),
    shape("same", (5, 4), padding="same", pads=1),
    shape("same_even", (5, 6), kernel_size=(4, 2), padding="same", pads=((1, 2), (0, 1))),
    shape("same_dilated", (6, 5), kernel_size=(2, 3), dilation=3, padding="same", pads=((1, 2), (3, 3))),
    *(shape(f"mode_{mode}", (5, 6), kernel_size=(3, 5), padding=(1, 2), padding_mode=mode) for mode in MODES),
    shape("mode_same", (5, 6), padding="same", pads=1, padding_mode="circular"),
    shape("grouped", (5, 4), groups=2, padding=1),
    shape("depthwise", (5, 4), groups=4, out=8, padding=1),
    shape("volume", (4, 3, 5), padding=1),
    shape("volume_tuples", (4, 5, 6), kernel_size=(1, 2, 3), stride=(1, 2, 1), padding=(0, 1, 2), groups=2),
    shape("two_blocks", (6, 6), block_size=2, padding=1),
    shape("rest_5_of_2", (6, 6), channels=5, block_size=2, padding=1),
    shape("rest_80_of_64", (4, 4), channels=80, block_size=64, kernel_size=1),
    shape("rest_grouped", (6, 5), channels=10, groups=2, block_size=3, padding=1),
    shape("single_pixel", (1, 1), kernel_size=1),
    shape("single_pixel_padded", (1, 1), padding=1),
    shape("two_by_two", (2, 2), padding=1),
    shape("below_stride", (2, 5), kernel_size=1, stride=2),
]
by_shape = pytest.mark.parametrize("case", SHAPES, ids=lambda case: case.name)


def in_reference(case: Shape, layer: Any) -> Any:
    """The reference's twin, with the padding in numbers."""
    known = layer_kinds.in_reference(layer)
    known.window["padding"] = case.window()["padding"]
    return known


@by_shape
def test_a_refresh_step_is_the_reference_on_all_patches(case: Shape) -> None:
    layer, x = case.layer(STEPS.replace(sampling="spread")), case.input()
    known = in_reference(case, layer)
    y = layer(x)
    close(y, known(x, training=True))
    close(layer.eval()(x), known(x, training=False))  # one refresh: the running values are those of the batch
    plain = getattr(nn, f"Conv{len(case.size)}d")(
        case.channels, case.out, case.kernel_size, **case.options, dtype=torch.float64
    )
    assert plain(x).shape == y.shape


@DRAWS
@given(
    groups=st.integers(1, 3),
    per_group=st.integers(1, 5),
    out_per_group=st.integers(1, 2),
    block_size=st.integers(1, 6),
    kernel=st.lists(st.integers(1, 3), min_size=1, max_size=3).map(tuple),
    stride=st.integers(1, 2),
    dilation=st.integers(1, 2),
    padding=st.integers(0, 2),
    bias=st.booleans(),
)
def test_any_shape_is_the_reference(
    groups: int,
    per_group: int,
    out_per_group: int,
    block_size: int,
    kernel: tuple[int, ...],
    stride: int,
    dilation: int,
    padding: int,
    bias: bool,
) -> None:
    case = shape(
        "drawn",
        tuple(dilation * (k - 1) + 2 for k in kernel),
        channels=groups * per_group,
        out=groups * out_per_group,
        kernel_size=kernel,
        block_size=block_size,
        **{"stride": stride, "dilation": dilation, "padding": padding, "groups": groups, "bias": bias},
    )
    layer, x = case.layer(STEPS.replace(max_samples=10**6, sampling="spread")), case.input()
    known = in_reference(case, layer)
    close(layer(x), known(x, training=True))


@by_shape
def test_evaluation_is_the_plain_convolution_with_folded_parameters(case: Shape) -> None:
    layer = case.layer(WhiteningConfig(update_every=2, sampling="spread"))
    for step in range(3):
        layer(case.input(seed=step))
    layer.eval()
    weight, bias = layer.folded()
    plain = getattr(nn, f"Conv{len(case.size)}d")(
        case.channels, case.out, case.kernel_size, **{**case.options, "bias": True}, dtype=torch.float64
    )
    plain.load_state_dict({"weight": weight.detach(), "bias": bias.detach()})
    x = case.input(seed=9)
    assert torch.equal(layer(x), plain(x))
    state = layer.whitening.state_dict()
    expected = ref.deconvolve(
        x,
        layer.weight,
        layer.bias,
        state["running_mean"],
        state["running_root"],
        D_rest=state.get("running_root_rest"),
        S=state["running_var"].rsqrt(),
        grouping="contiguous",
        groups=layer.groups,
        **case.window(),
    )
    close(layer(x), expected)


@pytest.mark.parametrize(
    "case", [case for case in SHAPES if case.window()["padding_mode"] == "zeros"], ids=lambda case: case.name
)
def test_the_paper_setting_is_the_published_layer_in_every_shape(case: Shape) -> None:
    layer = case.layer(WhiteningConfig.paper())
    options = {**case.window(), "groups": layer.groups}
    del options["padding_mode"]
    published = ref.PublishedConv(
        layer.weight,
        layer.bias,
        block_size=case.block_size,
        eps=1e-5,
        num_iters=5,
        momentum=0.1,
        sampling_stride=3,
        **options,
    )
    for step in range(2):
        mine, theirs = (case.input(10, seed=step).requires_grad_() for _ in range(2))
        y, expected = layer(mine), published(theirs, training=True)
        close(y, expected)
        leaves = [layer.weight] if layer.bias is None else [layer.weight, layer.bias]
        along = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(step))
        ours = torch.autograd.grad(y, [mine, *leaves], along)
        known = torch.autograd.grad(expected, [theirs, *leaves], along)
        for grad, right in zip(ours, known, strict=True):
            close(grad, right, **ROOT)  # five more products on the way back
        close(layer.whitening.running_mean, published.running_mean)
        close(layer.whitening.running_root, published.running_deconv)
    x = case.input(seed=5)
    close(layer.eval()(x), published(x, training=False))


# ---- known limits -----------------------------------------------------------------------------------


@by_shape
def test_with_identity_and_zero_it_is_the_plain_convolution_exactly(case: Shape) -> None:
    layer = case.layer(WhiteningConfig()).eval()
    plain = getattr(nn, f"Conv{len(case.size)}d")(
        case.channels, case.out, case.kernel_size, **case.options, dtype=torch.float64
    )
    plain.load_state_dict({name: value for name, value in layer.state_dict().items() if "whitening" not in name})
    layer.whitening.num_updates.fill_(1)
    x = case.input()
    assert torch.equal(layer(x), plain(x))


@pytest.mark.parametrize("ours", [*CONVS.values(), WhitenedLinear])
def test_it_is_made_like_the_plain_layer(ours: Any) -> None:
    theirs = getattr(nn, ours.__name__.removeprefix("Whitened"))
    mine = list(inspect.signature(ours).parameters.values())
    known = list(inspect.signature(theirs).parameters.values())
    assert [(p.name, p.default, p.kind) for p in mine[: len(known)]] == [(p.name, p.default, p.kind) for p in known]
    assert [p.name for p in mine[len(known) :]] == ["whitening"]
    assert mine[-1].kind is inspect.Parameter.KEYWORD_ONLY
    args = (4, 6) if theirs is nn.Linear else (4, 6, 3)
    torch.manual_seed(0)
    layer = ours(*args)
    torch.manual_seed(0)
    plain = theirs(*args)
    assert isinstance(layer, theirs)
    assert all(torch.equal(a, b) for a, b in zip(layer.parameters(), plain.parameters(), strict=True))


@pytest.mark.parametrize("name", ["rest_5_of_2", "rest_80_of_64", "rest_grouped"])
def test_with_an_exact_root_every_block_is_white(name: str) -> None:
    case = next(case for case in SHAPES if case.name == name)
    layer, x = (
        case.layer(WhiteningConfig(solver="eigh", eps=1e-12, max_samples=None, sampling_stride=1)),
        case.input(40),
    )
    layer(x)
    state, groups = layer.whitening.state_dict(), layer.groups
    X = ref.im2col(x, kernel_size=layer.kernel_size, **case.window()).flatten(0, 1)
    white = ref.whiten_patches(
        X,
        state["running_mean"],
        state["running_root"],
        D_rest=state["running_root_rest"],
        S=state["running_var"].rsqrt(),
        channels=case.channels,
        grouping="contiguous",
        groups=groups,
    )
    for patches, is_white in ((X, False), (white, True)):
        moments = ref.moments_contiguous(patches, channels=case.channels, block_size=case.block_size, groups=groups)
        for cov in (moments.Cov, moments.Cov_rest):
            assert cov is not None
            eye = torch.eye(cov.shape[-1], dtype=cov.dtype).expand_as(cov)
            assert torch.allclose(cov, eye, rtol=1e-5, atol=1e-5) == is_white


# ---- gradient ---------------------------------------------------------------------------------------


def gradients(run: Callable[[Tensor], Tensor], x: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(run(leaf).square().sum(), [leaf, *leaves])


def test_by_default_the_gradient_goes_through_the_scale_and_no_other_statistic() -> None:
    x, layers = activation(2, 3, 5, 5), {}
    for name, config in {
        "default": WhiteningConfig(),
        "no scale": WhiteningConfig(scale=False),
        "through the root": WhiteningConfig(differentiable=True),
    }.items():
        torch.manual_seed(0)
        layers[name] = WhitenedConv2d(3, 4, 3, padding=1, dtype=torch.float64, whitening=config)
    found = {name: gradients(layer, x, layer.weight, layer.bias) for name, layer in layers.items()}
    for name in ("default", "no scale"):
        layer, whitening = layers[name], layers[name].whitening
        # After one refresh the running values are those that were used.
        mean, roots = whitening.running_mean, [whitening.running_root]

        def by_hand(x: Tensor, layer: Any = layer, mean: Tensor = mean, roots: list[Tensor] = roots) -> Tensor:
            scale = None if layer.whitening.running_var is None else x.var((0, 2, 3), correction=0).rsqrt()
            return F.conv2d(x, *fold(layer.weight, layer.bias, mean, roots, layer.whitening.blocks, scale), padding=1)

        for ours, known in zip(found[name], gradients(by_hand, x, layer.weight, layer.bias), strict=True):
            close(ours, known)
    for name in ("no scale", "through the root"):
        assert (found[name][0] - found["default"][0]).abs().max() > 1e-2


# ---- linear and channel ------------------------------------------------------------------------------


@pytest.mark.parametrize("lead", [(7,), (2, 5), (2, 3, 4), (1, 2)])
@pytest.mark.parametrize("block_size", [2, 64])
def test_linear_is_the_reference_over_all_leading_dimensions(lead: tuple[int, ...], block_size: int) -> None:
    layer = WhitenedLinear(5, 3, dtype=torch.float64, whitening=STEPS.replace(block_size=block_size))
    known = layer_kinds.in_reference(layer)
    x = activation(math.prod(lead), 5).reshape(*lead, 5)
    y = layer(x)
    assert y.shape == (*lead, 3)
    close(y, known(x, training=True))
    close(layer.eval()(x), known(x, training=False))
    assert torch.equal(layer(x), F.linear(x, *layer.folded()))


def test_linear_takes_a_single_vector() -> None:
    layer = WhitenedLinear(5, 3, dtype=torch.float64)
    layer(activation(7, 5))
    x = activation(1, 5)
    close(layer.eval()(x[0]), layer(x)[0])


def test_the_published_linear_layer() -> None:
    layer = WhitenedLinear(6, 3, bias=False, dtype=torch.float64, whitening=WhiteningConfig.paper(block_size=4))
    published = ref.PublishedLinear(layer.weight, None, block_size=4, eps=1e-5, num_iters=5, momentum=0.1)
    for step in range(3):
        x = activation(9, 6, seed=step)
        close(layer(x), published(x, training=True))
        close(layer.whitening.running_root, published.running_deconv)
    close(layer.eval()(x), published(x, training=False))


@pytest.mark.parametrize("size", [(), (6,), (3, 4), (2, 3, 2)])
@pytest.mark.parametrize("grouping", ["contiguous", "interleaved"])
@pytest.mark.parametrize("block_size", [2, 64])
def test_channel_whitening_is_the_reference_at_every_position(
    size: tuple[int, ...], grouping: str, block_size: int
) -> None:
    config = STEPS.replace(block_size=block_size, grouping=grouping, eps=0.01)
    layer = ChannelWhitening(5, dtype=torch.float64, whitening=config)
    x = activation(8, 5, *size)
    X = x.movedim(1, -1).reshape(-1, 5)
    options: dict[str, Any] = {"channels": 5}
    if grouping == "contiguous":
        mu, S = X.mean(0), ref.scale_of(X, 0.01)
        _, cov, rest = ref.moments_contiguous(X * S, block_size=block_size, **options)
        roots = [ref.newton_schulz(ref.add_eps(each, 0.01), 5) for each in (cov, rest) if each is not None]
    else:
        mu, cov = ref.moments_interleaved(X, block_size=block_size, **options)
        S, roots = None, [ref.newton_schulz(ref.add_eps(cov, 0.01), 5)]
    white = ref.whiten_patches(X, mu, roots[0], D_rest=roots[-1], S=S, grouping=grouping, **options)
    expected = white.reshape(8, *size, 5).movedim(-1, 1)
    close(layer(x), expected)
    close(layer.eval()(x), expected)  # one refresh: the running values are those of the batch


def test_channel_whitening_whitens_channels() -> None:
    layer = ChannelWhitening(4, dtype=torch.float64, whitening=WhiteningConfig(solver="eigh", eps=1e-12))
    x = activation(10, 4, 6, 6)
    white = layer(x).movedim(1, -1).reshape(-1, 4)
    assert not torch.allclose(torch.cov(x.movedim(1, -1).reshape(-1, 4).T), torch.eye(4).double(), atol=0.1)
    close(torch.cov(white.T, correction=0), torch.eye(4, dtype=torch.float64), **ROOT)
    close(white.mean(0), torch.zeros(4, dtype=torch.float64), **ROOT)


# ---- scale -------------------------------------------------------------------------------------------


KEPT_ROOTS = WhiteningConfig(scale=False, average="root", num_iters=5)


@pytest.mark.parametrize(("whitening", "times"), [(None, 1.0), (WhiteningConfig(), 1.0), (KEPT_ROOTS, 5.0)])
def test_a_depthwise_channel_that_has_grown_is_not_multiplied(whitening: WhiteningConfig | None, times: float) -> None:
    torch.manual_seed(0)
    layer = WhitenedConv2d(3, 3, 3, padding=1, groups=3, bias=False, whitening=whitening)
    x = torch.randn(8, 3, 6, 6)
    for _ in range(17):
        before = layer(x).std((0, 2, 3))
    after = layer(x * torch.tensor([1.0, 5, 1]).reshape(3, 1, 1)).std((0, 2, 3))  # a step that may keep its root
    torch.testing.assert_close(after / before, torch.tensor([1, times, 1]), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("solver", ["newton_schulz", "chebyshev", "eigh"])
def test_large_input_is_whitened_like_any_other(solver: str) -> None:
    x = activation(8, 3, 5, 5).float()
    outputs = []
    for scale in (1.0, 1e10):
        torch.manual_seed(0)
        layer = WhitenedConv2d(3, 4, 1, whitening=WhiteningConfig(solver=solver, eps=0.0))
        outputs.append(layer(x * scale))
        close(layer.eval()(x * scale), outputs[-1])  # one refresh: the running values are those of the batch
    close(outputs[1], outputs[0], rtol=1e-4, atol=1e-4)  # float32, condition below 100


@pytest.mark.parametrize("solver", ["newton_schulz", "chebyshev", "eigh"])
@pytest.mark.parametrize("factor", [0.0, 1e-4, 1e-10, 1e-30])
@pytest.mark.parametrize("eps", [0.0, 1e-5])
@pytest.mark.parametrize("scale", [True, False])
def test_tiny_and_zero_input_give_finite_output_and_gradient(
    solver: str, factor: float, eps: float, scale: bool
) -> None:
    config = WhiteningConfig(solver=solver, eps=eps, scale=scale, differentiable=True, update_every=1)
    layer = WhitenedConv2d(3, 4, 3, padding=1, whitening=config)
    x = (activation(4, 3, 4, 4).float() * factor).requires_grad_()
    nothing = factor < 1e-19  # squares are below float32's range
    with pytest.warns(NonFiniteWarning, match="in 1 step") if nothing else contextlib.nullcontext():
        y = layer(x)
    assert int(layer.whitening.num_updates) == (not nothing)
    assert bool(y.isfinite().all())
    y.sum().backward()
    assert x.grad is not None
    assert bool(x.grad.isfinite().all())


# ---- what callers rely on ----------------------------------------------------------------------------


def test_contiguous_input_gives_contiguous_output() -> None:
    layer = ChannelWhitening(6)
    assert layer(torch.randn(4, 6, 5, 5)).is_contiguous()
    layer(torch.randn(4, 6, 5, 5)).view(4, -1)


def test_input_may_be_passed_by_torchs_name() -> None:
    x = torch.randn(8, 3, 6, 6)
    assert WhitenedConv2d(3, 4, 3)(input=x).shape == (8, 4, 4, 4)
    assert WhitenedLinear(6, 2)(input=x).shape == (8, 3, 6, 2)
