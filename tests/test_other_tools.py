"""Tools that pass whitened layers by, or misread them: what they do, and the right call, as the FAQ says."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, update_bn

import netdeconv
from netdeconv import WhitenedLinear

SAME = {"rtol": 1e-4, "atol": 1e-5}  # float32, two layers: the same sums in another order
EIGHT_BITS = 0.05  # of the largest output: weights and activations are rounded to 1/127 of their largest, in two layers


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(32, 8, generator=generator) @ torch.randn(8, 8, generator=generator) + 1 for _ in range(3)]


def network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4))
    return netdeconv.calibrate(netdeconv.convert(model), batches())


def statistics(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items() if "running" in key}


def test_averaged_models_are_calibrated() -> None:
    model = network()
    averaged = AveragedModel(model)
    for parameter in model.parameters():
        parameter.data.mul_(3)
    averaged.update_parameters(model)
    before = statistics(averaged.module)
    update_bn(batches(), averaged)
    assert all(torch.equal(value, before[key]) for key, value in statistics(averaged.module).items())
    netdeconv.calibrate(averaged.module, batches())
    fresh = netdeconv.calibrate(copy.deepcopy(averaged.module), batches())
    after = statistics(averaged.module)
    assert not torch.allclose(after["3.whitening.running_mean"], before["3.whitening.running_mean"])
    assert all(torch.equal(value, after[key]) for key, value in statistics(fresh).items())


def test_samples_are_by_themselves_once_the_whitening_is_frozen() -> None:
    def depends_on_the_others(model: nn.Module) -> bool:
        x = batches()[0]
        first = copy.deepcopy(model)(x)[0]
        return not torch.allclose(first, copy.deepcopy(model)(torch.cat([x[:1], 2 * x[1:]]))[0], **SAME)

    model = network().train()
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
    assert depends_on_the_others(model)
    assert not depends_on_the_others(netdeconv.freeze(model))


@pytest.mark.filterwarnings("ignore")  # torch deprecates this place of its quantisation
def test_what_is_quantised_is_fused_first() -> None:
    model, x = network().eval(), batches()[0]
    passed_by = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    assert isinstance(passed_by[0], WhitenedLinear)
    quantised = torch.ao.quantization.quantize_dynamic(netdeconv.fuse(model), {nn.Linear})
    assert isinstance(quantised[0], torch.ao.nn.quantized.dynamic.Linear)
    expected = model(x)
    assert float((quantised(x) - expected).abs().max()) <= EIGHT_BITS * float(expected.abs().max())


def test_adapters_are_merged_into_the_fused_network() -> None:
    model, x = network().eval(), batches()[0]
    down, up = torch.randn(2, 8), torch.randn(16, 2)  # beside the first layer

    def with_adapter(net: nn.Module, x: Tensor) -> Tensor:
        return net[1:](net[0](x) + x @ down.T @ up.T)  # type: ignore[index]

    expected = with_adapter(model, x)
    fused = netdeconv.fuse(model)
    torch.testing.assert_close(with_adapter(fused, x), expected, **SAME)
    for net in (model, fused):
        net[0].weight.data += up @ down  # what merging does
    torch.testing.assert_close(fused(x), expected, **SAME)
    assert not torch.allclose(model(x), expected, **SAME)
