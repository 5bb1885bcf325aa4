"""State dicts of the authors' layers, loaded into ours."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import netdeconv
from netdeconv import ConfigError, WhiteningConfig
from netdeconv.surgery import load_published
from netdeconv.zoo import create
from vectors import VECTOR_TOLERANCE, Case, case, vector_cases  # noqa: F401


def layer_of(saved: Case) -> nn.Module:
    weight = saved.weight
    config = WhiteningConfig.paper(**saved.whitening_options())
    bias = saved.bias is not None
    if saved.kind == "linear":
        return netdeconv.WhitenedLinear(weight.shape[1], weight.shape[0], bias, dtype=weight.dtype, whitening=config)
    options = saved.conv_options()
    return netdeconv.WhitenedConv2d(
        weight.shape[1] * options["groups"],
        weight.shape[0],
        tuple(weight.shape[2:]),
        bias=bias,
        dtype=weight.dtype,
        whitening=config,
        **options,
    )


def state_of(saved: Case, prefix: str = "") -> dict[str, Tensor]:
    last = saved.steps[-1]
    state = {**saved.params, "running_mean": last.running_mean, "running_deconv": last.running_deconv}
    return {prefix + name: value for name, value in state.items()}


@pytest.mark.parametrize("case", vector_cases(), indirect=True)
@pytest.mark.parametrize("prefix", ["", "module.", "net.0."])
def test_a_saved_layer_evaluates_as_theirs(case: Case, prefix: str) -> None:  # noqa: F811
    layer = layer_of(case)
    model = layer if prefix != "net.0." else nn.ModuleDict({"net": nn.Sequential(layer)})
    assert load_published(model, state_of(case, prefix)) is model
    model.eval()
    output = layer(case.eval_input)
    torch.testing.assert_close(output, case.eval_output, rtol=VECTOR_TOLERANCE, atol=VECTOR_TOLERANCE)


def published_state(model: nn.Module) -> dict[str, Tensor]:
    """What the authors' network of this shape would save, made up."""
    random = torch.Generator().manual_seed(0)
    names = {".whitening.running_mean": ".running_mean", ".whitening.running_root": ".running_deconv"}
    state = {}
    for key, value in model.state_dict().items():
        theirs = key
        for ours, other in names.items():
            theirs = theirs.replace(ours, other)
        if ".whitening." not in theirs:
            state[theirs] = torch.rand(value.shape, generator=random)
    return state


def test_a_whole_network() -> None:
    model = netdeconv.convert(create("resnet18", width=0.125), WhiteningConfig.paper())
    state = published_state(model)
    load_published(model, {f"module.{name}": value for name, value in state.items()})
    torch.testing.assert_close(
        model.stages[1][0].conv1.whitening.running_root, state["stages.1.0.conv1.running_deconv"]
    )
    torch.testing.assert_close(model.linear.weight, state["linear.weight"])
    assert int(model.conv1.whitening.num_updates) == 1
    model.eval()(torch.randn(1, 3, 32, 32))


def test_other_names() -> None:
    model = netdeconv.convert(nn.Sequential(nn.Linear(3, 2)), WhiteningConfig.paper())
    state = {f"fc.{name.removeprefix('0.')}": value for name, value in published_state(model).items()}
    load_published(model, state, rename=lambda name: name.replace("fc.", "0."))
    assert torch.equal(model[0].whitening.running_mean, state["fc.running_mean"])


def test_what_does_not_fit_changes_nothing() -> None:
    paper = WhiteningConfig.paper(block_size=2)
    model = netdeconv.convert(nn.Sequential(nn.Conv2d(4, 2, 3)), paper)
    state = published_state(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def without(name: str) -> dict[str, Tensor]:
        return {key: value for key, value in state.items() if key != name}

    for wrong, message in [
        (without("0.running_deconv"), r"0: WhitenedConv2d.*: running_mean or running_deconv is missing"),
        (without("0.bias"), r"0\.bias is missing"),
        ({**state, "0.running_mean1": torch.ones(2)}, r"0\.running_mean1 has no place.*FastDeconv and Delinear"),
        ({**state, "0.weight": torch.ones(2)}, r"0\.weight: expected shape \(2, 4, 3, 3\), got \(2,\)"),
        ({**state, "0.running_mean": torch.ones(36)}, r"running_mean of shape \(18,\), got \(36,\); is block_size"),
    ]:
        with pytest.raises(ConfigError, match=message):
            load_published(model, wrong)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    ours = netdeconv.convert(nn.Sequential(nn.Conv2d(4, 2, 3)))
    with pytest.raises(ConfigError, match=r"expected the published grouping; convert with.*paper\(\)"):
        load_published(ours, state)
