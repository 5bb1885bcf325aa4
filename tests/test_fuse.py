"""Fusing: plain layers that give the same output, for every kind of layer."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

import netdeconv
from netdeconv import ChannelWhitening, ConfigError, NumericalError, StatisticsWarning, WhitenedConv2d, WhiteningConfig
from netdeconv.surgery.deploy import ChannelLinear
from netdeconv.zoo import create

FUSED_TOLERANCE = 1e-10  # float64: the same products, folded in the same order

PLAIN = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
WHITENED = {1: netdeconv.WhitenedConv1d, 2: netdeconv.WhitenedConv2d, 3: netdeconv.WhitenedConv3d}


def trained(width: float = 0.125) -> nn.Module:
    torch.manual_seed(0)
    model = netdeconv.convert(create("resnet18", width=width))
    model(torch.randn(4, 3, 32, 32))
    return model.eval()


@st.composite
def layers(draw: Any) -> tuple[nn.Module, torch.Tensor]:
    """Any whitened layer, after a training step, with an input for it."""
    torch.manual_seed(draw(st.integers(0, 10**6)))
    config = WhiteningConfig(
        block_size=draw(st.integers(1, 8)),
        grouping=draw(st.sampled_from(["contiguous", "interleaved"])),
        num_iters=draw(st.integers(1, 6)),
        solver=draw(st.sampled_from(["newton_schulz", "eigh"])),
        update_every=draw(st.sampled_from([1, 16])),
        scale=draw(st.sampled_from([None, False])),
        average=draw(st.sampled_from([None, "covariance", "root"])),
    )
    options: dict[str, Any] = {"whitening": config, "dtype": torch.float64, "bias": draw(st.booleans())}
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    channels, out = groups * draw(st.integers(1, 4)), groups * draw(st.integers(1, 3))
    dims = draw(st.integers(0, 3))
    batch = draw(st.integers(2, 3))  # of a single row there are no statistics
    if dims == 0:
        layer: nn.Module = netdeconv.WhitenedLinear(channels, out, **options)
        x = torch.randn(batch, *[2] * draw(st.integers(0, 2)), channels, dtype=torch.float64)
    else:
        kernel = tuple(draw(st.integers(1, 3)) for _ in range(dims))
        padding = draw(st.one_of(st.sampled_from(["same", "valid"]), st.integers(0, 1)))
        stride = 1 if padding == "same" else draw(st.integers(1, 2))
        mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
        layer = WHITENED[dims](
            channels, out, kernel, stride, padding, draw(st.integers(1, 2)), groups, padding_mode=mode, **options
        )
        x = torch.randn(batch, channels, *[6] * dims, dtype=torch.float64)
    layer(x * 2 + 1)
    return layer.eval(), x


@given(layers())
@settings(max_examples=60, deadline=None)
def test_every_layer_equals_its_plain_twin(drawn: tuple[nn.Module, torch.Tensor]) -> None:
    layer, x = drawn
    fused = netdeconv.fuse(layer)
    assert type(fused) in (nn.Linear, *PLAIN.values())
    assert netdeconv.check_fused(layer, fused, x, tolerance=FUSED_TOLERANCE) <= FUSED_TOLERANCE
    assert not torch.equal(fused.weight, layer.weight) or not layer.weight.any()
    assert list(fused.state_dict()) == ["weight", "bias"]


@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 3), (4, 5, 3, 2), (2, 5, 2, 2, 2)])
@pytest.mark.parametrize("block_size", [2, 5])
def test_channel_whitening_becomes_a_linear_layer(shape: tuple[int, ...], block_size: int) -> None:
    torch.manual_seed(0)
    config = WhiteningConfig(block_size=block_size)
    layer = ChannelWhitening(5, whitening=config, dtype=torch.float64)
    x = torch.randn(shape, dtype=torch.float64) * 3 + 1
    layer(x)
    fused = netdeconv.fuse(layer.eval())
    assert type(fused) is ChannelLinear and type(fused.linear) is nn.Linear
    torch.testing.assert_close(fused(x), layer(x), rtol=FUSED_TOLERANCE, atol=FUSED_TOLERANCE)


def test_a_network_has_only_plain_layers_left() -> None:
    model = trained()
    fused = netdeconv.fuse(model)
    x = torch.randn(3, 3, 32, 32)
    assert netdeconv.check_fused(model, fused, x) <= 1e-6
    original = {name: type(module) for name, module in create("resnet18", width=0.125).named_modules()}
    for name, module in fused.named_modules():
        expected = original[name]
        assert type(module) is (nn.Identity if expected is nn.BatchNorm2d else expected)
    assert not fused.training
    assert netdeconv.check_fused(model, copy.deepcopy(fused), x) <= 1e-6


def test_fusing_twice_gives_the_same() -> None:
    fused = netdeconv.fuse(trained())
    again = netdeconv.fuse(fused)
    assert again is not fused
    for a, b in zip(fused.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_old_model_can_be_trained_on() -> None:
    model = trained()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    netdeconv.fuse(model)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    model.train()
    model(torch.randn(2, 3, 32, 32)).sum().backward()


def test_a_fused_state_dict_fits_the_plain_network() -> None:
    model = netdeconv.convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2)))
    x = torch.randn(8, 3, 4, 4)
    model(x)
    buffer = io.BytesIO()
    torch.save(netdeconv.fuse(model.eval()).state_dict(), buffer)
    buffer.seek(0)
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
    plain.load_state_dict(torch.load(buffer))
    torch.testing.assert_close(plain(x), model(x))


def test_memory_format_dtype_gradient_flags_and_hooks_stay() -> None:
    model = trained().to(memory_format=torch.channels_last)
    model.conv1.requires_grad_(False)
    seen: list[str] = []
    model.conv1.register_forward_hook(lambda *_: seen.append("conv1"))
    fused = netdeconv.fuse(model)
    assert fused.stages[0][0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert not fused.conv1.weight.requires_grad and not fused.conv1.bias.requires_grad
    assert fused.linear.weight.requires_grad
    fused(torch.randn(1, 3, 32, 32))
    assert seen == ["conv1"]
    assert {p.dtype for p in netdeconv.fuse(trained().bfloat16()).parameters()} == {torch.bfloat16}


def test_tied_layers_are_fused_once() -> None:
    shared = netdeconv.WhitenedLinear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    x = torch.randn(9, 4)
    model(x)
    fused = netdeconv.fuse(model.eval())
    assert fused[0] is fused[2]
    netdeconv.check_fused(model, fused, x)


def test_training_mode_is_refused() -> None:
    model = trained()
    with pytest.raises(ConfigError, match=r"got the model in training mode.*model.eval\(\) first"):
        netdeconv.fuse(model.train())
    model.eval()
    model.conv1.train()
    with pytest.raises(ConfigError, match=r"got conv1: WhitenedConv2d.* in training mode"):
        netdeconv.fuse(model)


def test_without_statistics_it_is_the_plain_network_and_says_so() -> None:
    model = netdeconv.convert(create("vgg11", width=0.125)).eval()
    with pytest.warns(StatisticsWarning, match="got none so far"):
        fused = netdeconv.fuse(model)
        x = torch.randn(2, 3, 32, 32)
        torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-5)


def test_a_layer_with_a_forward_of_its_own_is_refused() -> None:
    class Own(WhitenedConv2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    model = Own(3, 4, 1)
    model(torch.randn(4, 3, 2, 2))
    with pytest.raises(ConfigError, match="got Own with a forward of its own"):
        netdeconv.fuse(model.eval())
    layer = netdeconv.WhitenedLinear(3, 2)
    layer(torch.randn(4, 3))
    layer.forward = lambda x: x  # type: ignore[method-assign]
    with pytest.raises(ConfigError, match="got WhitenedLinear with a forward of its own"):
        netdeconv.fuse(layer.eval())


def small() -> nn.Module:
    torch.manual_seed(0)
    return netdeconv.convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)))


def test_a_pruned_layer_is_refused_until_the_pruning_is_permanent() -> None:
    model, x = small(), torch.randn(8, 3, 8, 8)
    prune.l1_unstructured(model[0], "weight", 0.5)
    model(x)
    with pytest.raises(ConfigError, match=r"got 0: WhitenedConv2d.*torch\.nn\.utils\.prune\.remove\(layer, 'weight'\)"):
        netdeconv.fuse(model.eval())
    prune.remove(model[0], "weight")
    netdeconv.check_fused(model, netdeconv.fuse(model), x)


def test_a_pruned_layer_beside_the_whitened_ones_stays_pruned() -> None:
    model, x = netdeconv.convert(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), exclude="1"), torch.randn(8, 3)
    prune.l1_unstructured(model[1], "weight", 0.5)
    model(x)
    fused = netdeconv.fuse(model.eval())
    netdeconv.check_fused(model, fused, x)
    assert prune.is_pruned(fused[1]) and fused[1].weight_orig is not model[1].weight_orig


def test_a_parametrised_layer_becomes_a_plain_one() -> None:
    model, x = small(), torch.randn(8, 3, 8, 8)
    nn.utils.parametrizations.weight_norm(model[0])
    with torch.no_grad():
        model[0].parametrizations.weight.original0 *= 2
    model(x)
    fused = netdeconv.fuse(model.eval())
    assert type(fused[0]) is nn.Conv2d and list(fused.state_dict()) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    netdeconv.check_fused(model, fused, x)


def test_check_fused_finds_a_difference() -> None:
    model = trained()
    fused = netdeconv.fuse(model)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        fused.linear.bias += 1
    with pytest.raises(NumericalError, match="relative error of at most 1e-04, got"):
        netdeconv.check_fused(model, fused, x)
    with torch.no_grad():
        fused.linear.bias.fill_(torch.nan)
    with pytest.raises(NumericalError, match="got inf"):
        netdeconv.check_fused(model, fused, x)
    with pytest.raises(ConfigError, match="expected fused in evaluation mode"):
        netdeconv.check_fused(model, fused.train(), x)


def test_check_fused_sees_into_outputs() -> None:
    class Many(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> Any:
            return {"a": self.a(x), "rest": [self.b(x), (x > 0)]}

    model = Many().eval()
    other = copy.deepcopy(model)
    x = torch.randn(4, 3)
    assert netdeconv.check_fused(model, other, {"x": x}) == 0
    with torch.no_grad():
        other.b.bias += 1
    with pytest.raises(NumericalError, match="not the same network"):
        netdeconv.check_fused(model, other, (x, "labels"))
