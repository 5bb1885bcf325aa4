"""Statistics saved, loaded, reset and made without memory."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from netdeconv import StatisticsWarning, WhitenedConv2d, WhitenedLinear, WhiteningConfig
from netdeconv.functional import Window
from netdeconv.nn import Whitening
from one_feature import SCALED

STATES = {
    "dense": WhiteningConfig(block_size=2),
    "averaged_roots": WhiteningConfig(block_size=2, average="root", scale=False),
    "scaled_roots": WhiteningConfig(block_size=2, average="root"),
    "plain_covariance": WhiteningConfig(block_size=2, scale=False),
}


@pytest.mark.parametrize("name", STATES)
def test_a_state_is_saved_and_loaded_and_goes_on_as_before(name: str) -> None:
    def layer() -> WhitenedConv2d:
        torch.manual_seed(0)
        return WhitenedConv2d(5, 3, 3, padding=1, whitening=STATES[name])

    whole, resumed = layer(), layer()
    xs = [torch.randn(3, 5, 6, 6, generator=torch.Generator().manual_seed(step)) * 3 for step in range(40)]
    for x in xs[:21]:
        whole(x)
    resumed.load_state_dict(whole.state_dict())
    assert torch.equal(resumed.eval()(xs[0]), whole.eval()(xs[0]))
    for each in (whole.train(), resumed.train()):
        for x in xs[21:]:
            each(x)
    for key, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[key], value), key


@pytest.mark.parametrize("theirs", STATES)
@pytest.mark.parametrize("ours", STATES)
@pytest.mark.parametrize("strict", [True, False])
def test_a_state_of_other_settings_is_refused_in_words(ours: str, theirs: str, strict: bool) -> None:
    layer, other = (nn.Sequential(WhitenedConv2d(5, 3, 3, whitening=STATES[name])) for name in (ours, theirs))
    other(torch.randn(3, 5, 6, 6))
    before = {key: value.clone() for key, value in layer[0].whitening.state_dict().items()}
    if ours == theirs:
        layer.load_state_dict(other.state_dict(), strict=strict)
        return
    words = [f"scale={(c := x[0].whitening.config).scale}, average='{c.average}'" for x in (layer, other)]
    match = re.escape(
        f"WhitenedConv2d(5, 3, kernel_size=3): expected statistics of {words[0]} in 0.whitening.*, got those of "
        f"{words[1]}. Build the layer with WhiteningConfig({words[1]}), or drop these entries and run "
        "netdeconv.calibrate(model, data)."
    )
    with pytest.raises(RuntimeError, match=match) as caught:
        layer.load_state_dict(other.state_dict(), strict=strict)
    assert "Missing key" not in str(caught.value) and "Unexpected key" not in str(caught.value)
    for key, value in before.items():
        assert torch.equal(layer[0].whitening.state_dict()[key], value)


@pytest.mark.parametrize("config", [WhiteningConfig(update_every=16), SCALED], ids=["root", "covariance"])
def test_reset_forgets_everything(config: WhiteningConfig) -> None:
    whitening = Whitening(5, Window(), config=config.replace(block_size=2, update_every=16))
    start = {name: value.clone() for name, value in whitening.state_dict().items()}
    for step in range(20):
        whitening(torch.randn(7, 5, generator=torch.Generator().manual_seed(step)))
    assert not torch.equal(whitening.running_root, start["running_root"])
    whitening.reset_statistics()
    for name, value in whitening.state_dict().items():
        assert torch.equal(value, start[name]), name
    assert whitening.clock.due
    with pytest.warns(StatisticsWarning, match="expected whitening statistics"):
        whitening.eval()(torch.zeros(2, 5))


def test_it_can_be_made_without_memory_and_filled_later() -> None:
    trained = Whitening(5, Window(), config=WhiteningConfig(block_size=2))
    for step in range(18):
        trained(torch.randn(7, 5, generator=torch.Generator().manual_seed(step)))
    empty = Whitening(5, Window(), config=WhiteningConfig(block_size=2), device="meta")
    empty.eval()
    empty.load_state_dict(trained.state_dict(), assign=True)
    assert torch.equal(empty(torch.zeros(1, 5))[0], trained.running_mean)
    assert empty.clock.steps == 18


def test_a_state_saved_without_a_last_root_loads_and_starts_from_the_remembered_one() -> None:
    every = WhitenedLinear(4, 2, whitening=WhiteningConfig(update_every=1))
    every(torch.randn(16, 4))
    sparse = WhitenedLinear(4, 2, whitening=WhiteningConfig(update_every=16))
    sparse.load_state_dict(every.state_dict())
    torch.testing.assert_close(sparse.whitening.last_root, every.whitening.running_root)
    torch.testing.assert_close(sparse.eval()(torch.ones(3, 4)), every.eval()(torch.ones(3, 4)))


def test_a_state_saved_with_a_last_root_loads_where_there_is_none() -> None:
    sparse = WhitenedLinear(4, 2)
    sparse(torch.randn(16, 4))
    every = WhitenedLinear(4, 2, whitening=WhiteningConfig(update_every=1))
    every.load_state_dict(sparse.state_dict())
    torch.testing.assert_close(every.eval()(torch.ones(3, 4)), sparse.eval()(torch.ones(3, 4)))


def test_reset_parameters_after_to_empty_starts_anew() -> None:
    with torch.device("meta"):
        whitening = Whitening(4, Window())
    whitening.to_empty(device="cpu").reset_parameters()
    assert whitening.num_steps == whitening.num_updates == whitening.num_skipped == 0
    torch.testing.assert_close(whitening.running_root, torch.eye(4))
