"""Sparsity, and what is seen of every layer, against known limits and cases worked by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from netdeconv import ChannelWhitening, ConfigError, WhitenedConv2d, WhitenedLinear, WhiteningConfig, calibrate
from netdeconv.errors import ShapeError, StatisticsWarning
from netdeconv.inspect import hoyer_sparsity, inspect_layers, kurtosis, unit_histogram

EXACT = 1e-12
# Standard error of the kurtosis of n Laplacian numbers is about sqrt(E x**8) / sqrt(n): 0.2 for the 10**6 below.
DRAWN = 0.4
# Of a correlation of N independent pairs the mean size is sqrt(2 / pi N): 0.013 for the 4,096 rows below.
NOISE = 0.03


def draws(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def laplacian(count: int) -> torch.Tensor:
    uniform = torch.rand(2, count, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return -uniform[0].log() + uniform[1].log()  # the difference of two exponential numbers


# ------------------------------------------------------------------------------------------------------ sparsity


def test_kurtosis_of_known_distributions() -> None:
    columns = torch.stack([draws(10**6), laplacian(10**6), draws(10**6).sign()], dim=1)
    gauss, laplace, coin = kurtosis(columns).tolist()
    assert gauss == pytest.approx(3, abs=0.02)
    assert laplace == pytest.approx(6, abs=DRAWN)
    assert coin == pytest.approx(1, abs=1e-3)


def test_kurtosis_by_hand_whatever_shift_and_scale() -> None:
    x = torch.tensor([0.0, 0.0, 0.0, 1.0])  # mean 1/4: fourth moment (3 + 81) / 1024, variance 3/16
    assert kurtosis(torch.stack([x, 5 - 3 * x], dim=1)).tolist() == pytest.approx([7 / 3, 7 / 3], abs=EXACT)


def test_hoyer_from_constant_to_one_hot() -> None:
    one_hot = torch.zeros(9)
    one_hot[4] = -2.0
    by_hand = torch.tensor([3.0, 4, 0, 0, 0, 0, 0, 0, 0])  # (3 - 7/5) / (3 - 1)
    columns = torch.stack([torch.full((9,), 7.0), one_hot, by_hand], dim=1)
    assert hoyer_sparsity(columns).tolist() == pytest.approx([0, 1, 0.8], abs=EXACT)


def test_hoyer_of_known_distributions() -> None:
    gauss, laplace = hoyer_sparsity(torch.stack([draws(10**6), laplacian(10**6)], dim=1)).tolist()
    assert gauss == pytest.approx(1 - math.sqrt(2 / math.pi), abs=2e-3)
    assert laplace == pytest.approx(1 - math.sqrt(1 / 2), abs=2e-3)


@pytest.mark.parametrize("measure", [kurtosis, hoyer_sparsity, unit_histogram])
def test_a_row_with_a_weight_is_so_many_rows(measure) -> None:
    x, weights = draws(20, 3), torch.arange(20) % 3 + 1
    repeated = x.repeat_interleave(weights, dim=0)
    torch.testing.assert_close(measure(x, weights), measure(repeated), atol=EXACT, rtol=0)
    assert not torch.allclose(measure(x, weights), measure(x))


def test_what_never_varies_has_no_sparsity() -> None:
    columns = torch.stack([torch.full((50,), 0.1), torch.zeros(50), torch.arange(50.0)], dim=1)
    assert kurtosis(columns).isnan().tolist() == [True, True, False]
    assert hoyer_sparsity(columns).isnan().tolist() == [False, True, False]


def test_histogram_is_a_density_of_standard_deviations() -> None:
    density = unit_histogram(7 + 3 * draws(200_000, 2), bins=121, limit=6)
    assert float(density.sum()) * 12 / 121 == pytest.approx(1, abs=EXACT)
    assert float(density[60]) == pytest.approx(1 / math.sqrt(2 * math.pi), rel=0.03)
    assert density[:20].sum() < density[40:60].sum() / 100


@pytest.mark.parametrize("measure", [kurtosis, hoyer_sparsity, unit_histogram])
def test_wrong_shapes_are_refused(measure) -> None:
    with pytest.raises(ShapeError, match=r"expected responses \(rows, columns\)"):
        measure(torch.zeros(3))
    with pytest.raises(ShapeError, match=r"expected weights \(3,\)"):
        measure(torch.zeros(3, 2), torch.ones(2))


# -------------------------------------------------------------------------------------------------------- layers


def correlated(count: int = 4096, channels: int = 4) -> torch.Tensor:
    """Rows of known covariance: AR(1) over the channels with correlation 0.9."""
    x = draws(count, channels, seed=2)
    for i in range(1, channels):
        x[:, i] = 0.9 * x[:, i - 1] + math.sqrt(1 - 0.81) * x[:, i]
    return x.float() + 3


def calibrated(layer: nn.Module, x: torch.Tensor) -> nn.Module:
    return calibrate(nn.Sequential(layer), x)


def test_an_exact_root_leaves_nothing() -> None:
    x = correlated()
    exact = WhiteningConfig(solver="eigh", eps=0.0, block_size=512)
    (view,) = inspect_layers(calibrated(WhitenedLinear(4, 2, whitening=exact), x), x)
    assert view.raw.correlation == pytest.approx((3 * 0.9 + 2 * 0.81 + 0.729) / 6, abs=NOISE)
    assert view.whitened is not None and view.whitened.correlation < 1e-5
    assert view.root_residual is not None and view.root_residual < 1e-4
    # An AR(1) process of length 4 and correlation 0.9 by numpy: eigenvalues 3.5268 to 0.0556.
    cov = torch.tensor([[0.9 ** abs(i - j) for j in range(4)] for i in range(4)])
    values = torch.linalg.eigvalsh(cov)
    assert view.condition == pytest.approx(float(values[-1] / values[0]), rel=0.1)
    assert (view.name, view.kind, view.features, view.rows) == ("0", "WhitenedLinear", 4, 4096)


def test_five_steps_leave_what_their_residual_says() -> None:
    x = correlated()
    (view,) = inspect_layers(calibrated(WhitenedLinear(4, 2, whitening=WhiteningConfig(num_iters=5)), x), x)
    (weak,) = inspect_layers(calibrated(WhitenedLinear(4, 2, whitening=WhiteningConfig(num_iters=1)), x), x)
    assert view.whitened is not None and weak.whitened is not None
    assert view.whitened.correlation < weak.whitened.correlation < view.raw.correlation
    assert view.root_residual is not None and weak.root_residual is not None
    assert 1e-4 < view.root_residual < weak.root_residual < 1


def test_whitened_patches_are_those_that_the_layer_multiplies() -> None:
    """Blocks, groups and taps are put together as the layer does it: its output follows from the whitened patches."""
    from netdeconv.inspect.layers import _whitened

    x = draws(2, 6, 5, 5).float()
    for grouping in ("contiguous", "interleaved"):
        for groups in (1, 3):
            config = WhiteningConfig(block_size=2, grouping=grouping)
            layer = WhitenedConv2d(6, 3, 3, groups=groups, whitening=config).double()
            net = calibrated(layer, x.double())
            patches = nn.functional.unfold(x.double(), 3).transpose(1, 2).reshape(18, groups, -1)
            with torch.no_grad():
                white = _whitened(patches, layer.whitening)
                weight = layer.weight.reshape(groups, 3 // groups, -1)
                out = torch.einsum("rgf,gof->rgo", white, weight).flatten(1) + layer.bias
                expected = net.eval()(x.double()).flatten(2).transpose(1, 2).reshape(18, 3)
            torch.testing.assert_close(out, expected, atol=1e-10, rtol=0)


def test_scaled_channels_are_looked_at_as_scaled() -> None:
    x = correlated().reshape(64, 8, 8, 4).movedim(-1, 1)
    uneven = x * torch.tensor([1.0, 2, 4, 8]).reshape(4, 1, 1)
    exact = WhiteningConfig(solver="eigh", eps=0.0)
    for layer in (lambda: WhitenedConv2d(4, 2, 1, whitening=exact), lambda: nn.Conv2d(4, 2, 1)):
        nets = [layer(), layer()]
        if isinstance(nets[0], WhitenedConv2d):
            nets = [calibrated(net, data) for net, data in zip(nets, (x, uneven), strict=True)]
        (even,), (odd,) = (inspect_layers(net, data) for net, data in zip(nets, (x, uneven), strict=True))
        assert odd.condition == pytest.approx(even.condition, rel=1e-3) and even.condition < 100
        if odd.root_residual is not None:
            assert odd.root_residual < 1e-4 and odd.whitened is not None and odd.whitened.correlation < 1e-4


def test_plain_layers_are_seen_and_do_not_whiten() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
    views = inspect_layers(net, draws(64, 3, 4, 4).float())
    assert [view.name for view in views] == ["0", "4"]
    assert all(view.whitened is None and view.root_residual is None and view.refresh_age is None for view in views)
    assert views[0].raw.correlation < 0.06
    # From ReLU to the linear layer: never below 0, so less sparse before the mean is gone than a Gaussian number.
    assert views[1].standardised.hoyer != views[1].raw.hoyer
    assert views[1].standardised.kurtosis == views[1].raw.kurtosis


def test_the_model_and_its_statistics_stay() -> None:
    net = nn.Sequential(WhitenedConv2d(3, 4, 3), nn.ReLU(), ChannelWhitening(4))
    net(draws(8, 3, 6, 6).float())
    before = {name: value.clone() for name, value in net.state_dict().items()}
    views = inspect_layers(net, draws(4, 3, 6, 6, seed=1).float())
    assert [view.kind for view in views] == ["WhitenedConv2d", "ChannelWhitening"]
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert net.training and net[0].training and not net[0]._forward_pre_hooks


def test_age_counts_steps_since_the_last_root() -> None:
    net = nn.Sequential(WhitenedConv2d(1, 2, 3, whitening=WhiteningConfig(update_every=16)))
    x = draws(4, 1, 6, 6).float()
    for _ in range(20):  # a refresh at each of the first 16 steps, then at the 17th and 19th
        net(x)
    (view,) = inspect_layers(net, x)
    assert (view.updates, view.refresh_age) == (18, 1)


def test_many_features_are_looked_at_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    from netdeconv.inspect import layers

    x = draws(256, 12, 3, 3).float()
    depthwise, wide = nn.Conv2d(12, 12, 3, groups=12), nn.Conv2d(12, 2, 3)
    monkeypatch.setattr(layers, "_FEATURES", 20)  # two channels of 9 taps
    monkeypatch.setattr(layers, "_FEATURES_OF_GROUPS", 40)
    ((many,), (one,)) = (inspect_layers(net, x) for net in (depthwise, wide))
    assert many.raw.matrix.shape == (9, 9)
    assert one.raw.matrix.shape == (18, 18)
    assert many.raw.correlation < 0.1 and one.raw.correlation < 0.1


def test_nothing_to_look_at_is_said() -> None:
    with pytest.raises(ConfigError, match="expected a model with convolutions"):
        inspect_layers(nn.ReLU(), torch.zeros(1, 3))
    with pytest.warns(StatisticsWarning, match="expected whitening statistics"):
        inspect_layers(nn.Sequential(WhitenedLinear(3, 2)), torch.zeros(4, 3))
