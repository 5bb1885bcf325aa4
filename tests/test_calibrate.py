"""Calibration: the statistics of a data set, to the last row, and nothing else changed."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import netdeconv
from netdeconv import (
    ConfigError,
    NonFiniteWarning,
    NumericalError,
    StatisticsError,
    WhitenedConv2d,
    WhitenedLinear,
    WhiteningConfig,
)
from netdeconv.functional import corner_patches
from netdeconv.zoo import create

EXACT_TOLERANCE = 1e-9  # float64: sums over batches against one sum over everything
CONFIGS = {
    "default": WhiteningConfig(block_size=3),
    "whole": WhiteningConfig(solver="eigh", sampling="spread"),
    "unscaled": WhiteningConfig(block_size=3, scale=False, average="root"),
    "paper": WhiteningConfig.paper(block_size=2),
}


def patches_of(x: Tensor, conv: nn.Conv2d) -> Tensor:
    return F.unfold(x, conv.kernel_size, conv.dilation, conv.padding, conv.stride).movedim(1, 2).flatten(0, 1)


def network(config: WhiteningConfig) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 6, 3, stride=2, groups=2), nn.Flatten()]
    return netdeconv.convert(nn.Sequential(*layers, nn.Linear(24, 3)), config).double()


def batches(count: int = 3) -> list[Tensor]:
    random = torch.Generator().manual_seed(1)
    mix = torch.randn(4, 4, generator=random, dtype=torch.float64)
    return [
        torch.einsum("nchw,dc->ndhw", torch.randn(n, 4, 6, 6, generator=random, dtype=torch.float64), mix) + n
        for n in (1, 5, 2)[:count]
    ]


@pytest.mark.parametrize("name", CONFIGS)
def test_the_first_layer_has_the_statistics_of_all_rows(name: str) -> None:
    config = CONFIGS[name]
    model = network(config)
    netdeconv.calibrate(model, batches())
    layer = model[0]
    blocks = layer.whitening.blocks
    # One tensor of all rows, the mean and covariance written out.
    x, window = torch.cat(batches()), layer.whitening.window
    rows, mean = patches_of(x, layer), patches_of(x, layer).mean(0)
    scale = torch.ones(4, dtype=torch.float64)
    if config.scale is None and name != "paper":
        var = x.movedim(1, -1).reshape(-1, 4).var(0, correction=0)
        torch.testing.assert_close(layer.whitening.running_var, var, rtol=EXACT_TOLERANCE, atol=EXACT_TOLERANCE)
        scale = var.rsqrt()
    assert (layer.whitening.running_var is None) == (name in ("unscaled", "paper"))
    taps = scale.repeat_interleave(9)
    if name == "whole":
        cov = (rows * taps - mean * taps).T @ (rows * taps - mean * taps) / len(rows)
        root = torch.linalg.inv(_sqrt(cov + config.eps * torch.eye(len(cov), dtype=cov.dtype)))
        torch.testing.assert_close(layer.whitening.running_root, root, rtol=1e-6, atol=1e-8)
    else:
        # Positions 0, 3 and so on; published, the mean is taken there, too.
        sampled = corner_patches(x, window, sampling_stride=3).rows
        moments = netdeconv.functional.patch_moments(sampled * taps, blocks)
        mean = moments.mean if name == "paper" else mean
        (cov, *_), steps = moments.covs, 5 if name == "paper" else 3
        eye = torch.eye(cov.shape[-1], dtype=torch.float64)
        root = netdeconv.functional.inverse_sqrt(cov + config.eps * eye, num_iters=steps, solver=config.solver)
        torch.testing.assert_close(layer.whitening.running_root, root, rtol=EXACT_TOLERANCE, atol=EXACT_TOLERANCE)
    torch.testing.assert_close(layer.whitening.running_mean, mean, rtol=EXACT_TOLERANCE, atol=EXACT_TOLERANCE)
    if layer.whitening.config.average == "covariance":
        torch.testing.assert_close(layer.whitening.running_cov, cov, rtol=EXACT_TOLERANCE, atol=EXACT_TOLERANCE)


def _sqrt(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.sqrt()) @ vectors.T


def test_further_passes_are_exact_for_further_layers() -> None:
    model = network(CONFIGS["default"]).eval()
    netdeconv.calibrate(model, batches(), passes=3)
    x = torch.cat(batches())
    with torch.no_grad():
        for index in (0, 2, 4):
            seen = model[:index](x)
            layer = model[index]
            rows = seen if index == 4 else patches_of(seen, layer)
            moments = netdeconv.functional.patch_moments(rows, layer.whitening.blocks)
            torch.testing.assert_close(layer.whitening.running_mean, moments.mean, rtol=1e-8, atol=1e-8)
    # ... and so no longer depend on how the rows came in batches.
    other = netdeconv.calibrate(network(CONFIGS["default"]).eval(), [x], passes=3)
    for name, value in other.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value, model.state_dict()[name], rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("sampling", ["tiles", "spread"])
def test_one_pass_comes_close_to_training_statistics_on_one_batch(sampling: str) -> None:
    x = torch.cat(batches())
    model = network(WhiteningConfig(block_size=3, max_samples=10**6, sampling=sampling, solver="newton_schulz"))
    trained = network(WhiteningConfig(block_size=3, max_samples=10**6, sampling=sampling, solver="newton_schulz"))
    trained.train()(x)
    netdeconv.calibrate(model, x)
    for name, value in trained.state_dict().items():
        if "running" in name:
            torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-8, atol=1e-8)


def test_a_case_by_hand() -> None:
    layer = netdeconv.WhitenedLinear(3, 2, dtype=torch.float64, whitening=WhiteningConfig(solver="eigh", eps=0.0))
    x = torch.tensor([[0.0, 0, 0], [2, 0, 0], [0, 4, 0], [2, 4, 2], [0, 0, 2], [2, 0, 2], [0, 4, 2], [2, 4, 0]])
    netdeconv.calibrate(layer, x.double())
    # By hand: independent columns of deviation 1, 2 and 1 around 1, 2 and 1.
    torch.testing.assert_close(layer.whitening.running_mean, torch.tensor([1.0, 2, 1], dtype=torch.float64))
    torch.testing.assert_close(
        layer.whitening.running_root, torch.diag(torch.tensor([1, 0.5, 1], dtype=torch.float64)), atol=1e-9, rtol=0
    )


def test_modes_parameters_and_random_numbers_stay() -> None:
    model = netdeconv.convert(create("vgg11", width=0.125))
    model.features[0].eval()
    model.add_module("dropout", nn.Dropout())
    flags = [module.training for module in model.modules()]
    weights = [p.clone() for p in model.parameters()]
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    assert netdeconv.calibrate(model, torch.ones(4, 3, 32, 32)) is model
    assert torch.equal(torch.rand(2), expected)
    assert flags == [module.training for module in model.modules()]
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_evaluation_works_afterwards_and_training_goes_on_smoothly() -> None:
    torch.manual_seed(0)
    model = netdeconv.convert(create("vgg11", width=0.125))
    data = [torch.randn(8, 3, 32, 32) for _ in range(2)]
    netdeconv.calibrate(model, data).eval()
    x = data[0]
    before = model(x)
    whitening = model.features[0].whitening
    root = whitening.running_root.clone()
    model.train()
    model(x)
    # One refresh replaces about the momentum's share, not everything as the very first one does.
    moved = (whitening.running_root - root).norm() / root.norm()
    assert 0 < moved < 0.1
    assert whitening.num_updates == 3
    model(x)
    assert whitening.num_updates == 3, "the dense warm-up is over"
    assert before.isfinite().all()


def test_batches_of_every_form() -> None:
    x = torch.cat(batches())

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = netdeconv.WhitenedLinear(6, 2, dtype=torch.float64)

        def forward(self, image: Tensor, scale: float = 1.0) -> Tensor:
            return self.layer(image * scale)

    def root(data: Any, **options: Any) -> Tensor:
        model = Named()
        netdeconv.calibrate(model, data, **options)
        return model.layer.whitening.running_root

    expected = root(x)
    assert torch.equal(root([(x, torch.zeros(8))]), expected)
    assert torch.equal(root([[x]]), expected)
    assert torch.equal(root([{"image": x}]), expected)
    assert torch.equal(root(iter([x])), expected)
    assert torch.equal(root([(x / 2, 2.0)], call=lambda model, batch: model(*batch)), expected)


def test_what_is_refused() -> None:
    with pytest.raises(ConfigError, match="expected a model with whitened layers"):
        netdeconv.calibrate(nn.Linear(2, 2), torch.ones(2, 2))
    model = netdeconv.WhitenedLinear(2, 2)
    with pytest.raises(ConfigError, match="at least one batch, got none"):
        netdeconv.calibrate(model, [])
    with pytest.raises(ConfigError, match="a tensor or an iterable of batches, got int"):
        netdeconv.calibrate(model, 3)
    with pytest.raises(ConfigError, match="gone through 2 times"):
        netdeconv.calibrate(model, iter([torch.ones(2, 2)]), passes=2)
    with pytest.raises(ConfigError, match="passes >= 1, got 0"):
        netdeconv.calibrate(model, torch.ones(2, 2), passes=0)


def test_nothing_changes_when_it_fails() -> None:
    model = network(CONFIGS["default"])
    netdeconv.calibrate(model, batches())
    state = {name: value.clone() for name, value in model.state_dict().items()}
    bad = [*batches(), batches()[0] * torch.nan]
    with pytest.raises(NumericalError, match=r"^0: WhitenedConv2d.*finite statistics"):
        netdeconv.calibrate(model, bad)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    spare = nn.ModuleDict({"used": model, "spare": netdeconv.WhitenedLinear(2, 2)})
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(StatisticsError, match="got none at WhitenedLinear"):
        netdeconv.calibrate(spare, batches(), call=lambda model, batch: model["used"](batch))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_channel_whitening_is_calibrated_too() -> None:
    for shape in [(8, 3), (2, 3, 4), (2, 3, 2, 2)]:
        layer = netdeconv.ChannelWhitening(3, whitening=WhiteningConfig(solver="eigh"), dtype=torch.float64)
        x = torch.randn(shape, dtype=torch.float64) @ torch.eye(shape[-1], dtype=torch.float64) + 2
        netdeconv.calibrate(layer, x).eval()
        white = layer(x).movedim(1, -1).reshape(-1, 3)
        torch.testing.assert_close(white.mean(0), torch.zeros(3, dtype=torch.float64), atol=1e-9, rtol=0)


def test_a_calibrated_layer_warns_of_new_batches_that_are_not_finite() -> None:
    layer = netdeconv.WhitenedLinear(4, 2)
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    with pytest.warns(NonFiniteWarning):
        for factor in (1.0, *[torch.nan] * 8):
            layer(x * factor)
    netdeconv.calibrate(layer, x)
    with pytest.warns(NonFiniteWarning, match=r"in 1 step\(s\), 1 so far"):
        layer(x * torch.nan)


class Headed(nn.Module):
    """A trunk, and a head that runs in training only; ``strict`` training wants labels."""

    def __init__(self, strict: bool = False) -> None:
        super().__init__()
        self.trunk, self.strict = network(CONFIGS["default"]), strict
        self.head = netdeconv.WhitenedLinear(3, 3, dtype=torch.float64, whitening=WhiteningConfig(solver="eigh"))

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        y = self.trunk(x)
        if not self.training:
            return y
        if self.strict and labels is None:
            raise ValueError("no labels")
        return y + self.head(y)


@pytest.mark.parametrize("passes", [1, 2])
def test_a_head_that_only_training_runs_is_reached(passes: int) -> None:
    model, alone = Headed(), Headed()
    netdeconv.calibrate(model, batches(), passes=passes)
    netdeconv.calibrate(alone.trunk, batches(), passes=passes)
    for name, value in alone.trunk.state_dict().items():
        assert torch.equal(model.trunk.state_dict()[name], value), name
    with torch.no_grad():
        rows = torch.cat([alone.trunk.eval()(x) for x in batches()])
    torch.testing.assert_close(model.head.whitening.running_mean, rows.mean(0))
    assert model.training and model.head.whitening.num_updates == len(batches())


class Once(list[Tensor]):
    """Batches that count how often somebody begins to go through them."""

    begun = 0

    def __iter__(self) -> Iterator[Tensor]:
        self.begun += 1
        return super().__iter__()


@pytest.mark.parametrize("passes", [1, 2])
def test_data_are_begun_only_to_be_gone_through(passes: int) -> None:
    data = Once(batches())
    netdeconv.calibrate(Headed().trunk, data, passes=passes)
    assert data.begun == passes
    data = Once(batches())
    netdeconv.calibrate(Headed(), data, passes=passes)
    assert data.begun == 2 * passes  # the head's search goes through them again


def test_a_head_that_wants_labels_in_training_is_reported() -> None:
    model = Headed(strict=True)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(StatisticsError, match=r"got none at WhitenedLinear.*exclude= them when converting"):
        netdeconv.calibrate(model, batches())
    with pytest.raises(StatisticsError, match="got none at WhitenedLinear"):
        netdeconv.calibrate(Headed(), iter(batches()))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_single_rows_are_left_out_while_the_first_pass_whitens() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)
    )
    images = torch.randn(32, 3, 8, 8)
    whole, single = (netdeconv.calibrate(netdeconv.convert(net), data) for data in ([images], list(images.split(1))))
    with torch.no_grad():
        outputs = [model.eval()(images).std() for model in (whole, single)]
    assert 0.2 < float(outputs[1] / outputs[0]) < 5  # 200 where a row of its own is a covariance


class Direct(nn.Module):
    """A network that calls the forward of its layer as a function, past its hooks."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer.forward(x)


@pytest.mark.parametrize("how", ["compiled in place", "compiled", "direct"])
def test_it_reaches_what_hooks_on_layers_do_not(how: str) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(WhitenedConv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), WhitenedLinear(16, 2))
    x = torch.randn(8, 3, 4, 4)
    plain(x)
    model: Any = copy.deepcopy(plain)
    if how == "compiled in place":
        model.compile(backend="eager")
    elif how == "compiled":
        model = torch.compile(model, backend="eager")
    else:
        model = nn.Sequential(*(Direct(layer) if hasattr(layer, "whitening") else layer for layer in model))
    model.eval()
    with torch.no_grad():
        model(x)  # compiled, where it is, before the data are looked at
    netdeconv.calibrate(model, x)
    netdeconv.calibrate(plain.eval(), x)
    for ours, theirs in zip(model.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)
    with torch.no_grad():
        torch.testing.assert_close(model(x), plain(x))
    assert not any(module._forward_pre_hooks for module in model.modules())
    torch._dynamo.reset()
