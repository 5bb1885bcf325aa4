"""Folded weights are kept in evaluation, and never longer than what they were made of."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from netdeconv import WhitenedConv2d, WhitenedLinear, WhiteningConfig, freeze
from netdeconv.nn.cache import FoldCache


class Counted:
    """A stand-in for folding that counts how often it was asked."""

    def __init__(self, *made_of: Tensor) -> None:
        self.made_of, self.times, self.cache = made_of, 0, FoldCache()

    def compute(self) -> tuple[Tensor, Tensor]:
        self.times += 1
        return self.made_of[0] * 2, self.made_of[-1] * 3

    def ask(self) -> tuple[Tensor, Tensor]:
        folded = self.cache.folded(self.made_of, self.compute)
        assert torch.equal(folded[0], self.made_of[0] * 2)
        assert torch.equal(folded[1], self.made_of[-1] * 3)
        return folded


def counted(dtype: torch.dtype = torch.float32) -> Counted:
    generator = torch.Generator().manual_seed(0)
    return Counted(
        *(torch.randn(size, generator=generator).to(dtype) for size in ((4, 3, 5, 5), (4,), (3, 6, 6), (8,)))
    )


def test_what_does_not_change_is_folded_once() -> None:
    each = counted()
    first = each.ask()
    assert all(each.ask()[place] is first[place] for place in (0, 1))
    assert each.times == 1


def change_data(tensor: Tensor) -> None:
    tensor.data.view(-1)[-1] *= 1.01  # what no version counter counts


CHANGES: dict[str, Callable[[Tensor], Any]] = {
    "in_place": lambda tensor: tensor.add_(1),
    "an_entry": lambda tensor: tensor.view(-1)[3].mul_(1.01),
    "data": change_data,
    "data_replaced": lambda tensor: setattr(tensor, "data", tensor.data + 1),
    "swapped_rows": lambda tensor: tensor.data.copy_(tensor.data.flip(0).clone()),
    "swapped_columns": lambda tensor: tensor.data.copy_(tensor.data.flip(-1).clone()),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_change_is_noticed(change: str, place: int, dtype: torch.dtype) -> None:
    each = counted(dtype)
    each.ask()
    CHANGES[change](each.made_of[place])
    each.ask()
    assert each.times == 2
    each.ask()
    assert each.times == 2


def test_a_change_too_small_for_the_product_is_noticed_where_torch_counts_it() -> None:
    each = Counted(torch.tensor([[1e8, 1e-3]]), torch.ones(1))
    each.ask()
    each.made_of[0][0, 1] = 2e-3
    each.ask()
    assert each.times == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_small_changes_in_half_precision_are_noticed(dtype: torch.dtype) -> None:
    each = Counted(torch.ones(4, 3, 15, 15, dtype=dtype), torch.ones(4, dtype=dtype))
    each.ask()
    each.made_of[0].data[0, 0, 0, 0] = 1.01  # of 675 in a row; the sum itself is rounded to one in 256 or 2048
    each.ask()
    assert each.times == 2


def test_autocast_does_not_blur_the_comparison() -> None:
    each = Counted(torch.ones(4, 3, 15, 15), torch.ones(4))
    with torch.autocast("cpu", torch.bfloat16):
        each.ask()
        each.made_of[0].data[0, 0, 0, 0] = 1.01
        each.ask()
        assert each.times == 2


def test_other_tensors_with_the_same_numbers_are_folded_again() -> None:
    each = counted()
    each.ask()
    each.made_of = tuple(tensor.clone() for tensor in each.made_of)
    each.ask()
    assert each.times == 2
    each.made_of = each.made_of[:3]
    each.ask()
    assert each.times == 3


def test_numbers_that_are_not_finite_are_never_kept() -> None:
    each = counted()
    each.made_of[0].view(-1)[0] = torch.nan
    for _ in range(2):
        each.cache.folded(each.made_of, each.compute)
    assert each.times == 2


@pytest.mark.parametrize("place", [0, 1])
def test_what_cannot_be_watched_is_not_kept(place: int) -> None:
    class Special(torch.Tensor):
        pass

    each = counted()
    with torch.inference_mode():
        inference = torch.ones(3)
    for odd in (inference, torch.ones(3, device="meta"), torch.ones(3).as_subclass(Special)):
        made_of = (odd, each.made_of[0])[:: 1 if place else -1]
        before = each.times
        for _ in range(2):
            each.cache.folded(made_of, each.compute)
        assert each.times == before + 2


def test_a_fold_that_fails_leaves_nothing_wrong_behind() -> None:
    each = counted()
    each.ask()
    each.made_of[0].add_(1)

    def fail() -> tuple[Tensor, Tensor]:
        raise MemoryError

    with pytest.raises(MemoryError):
        each.cache.folded(each.made_of, fail)
    each.ask()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_copies_start_empty(copied: Callable[[FoldCache], FoldCache]) -> None:
    each = counted()
    each.ask()
    each.cache = copied(each.cache)
    each.ask()
    assert each.times == 2


# ---- in a layer -------------------------------------------------------------------------------------


def trained(layer: Any) -> Any:
    for step in range(3):
        layer(inputs(layer, step))
    return layer.eval()


def inputs(layer: nn.Module, seed: int) -> Tensor:
    size = (6, 5) if isinstance(layer, nn.Linear) else (2, 5, 6, 6)
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def change_variance(layer: Any) -> None:
    variance = layer.whitening.running_var
    assert (variance is None) == isinstance(layer, nn.Linear)
    if variance is not None:
        variance.data.mul_(1.1)


def layers() -> list[Any]:
    config = WhiteningConfig(block_size=2)
    return [WhitenedConv2d(5, 4, 3, bias=False, whitening=config), WhitenedLinear(5, 4, whitening=config)]


def train_once(layer: Any) -> None:
    layer.train()(inputs(layer, 7)), layer.eval()


def optimise(layer: Any) -> None:
    layer(inputs(layer, 8)).square().sum().backward()
    torch.optim.SGD(layer.parameters(), lr=0.1).step()


@pytest.mark.parametrize("layer", layers(), ids=lambda layer: type(layer).__name__)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(
    "change",
    [
        train_once,
        optimise,
        lambda layer: layer.weight.data.mul_(1.01),
        change_variance,
        lambda layer: layer.load_state_dict({k: v + 1 for k, v in layer.state_dict().items()}),
        lambda layer: layer.load_state_dict({k: v + 1 for k, v in layer.state_dict().items()}, assign=True),
        lambda layer: layer.whitening.reset_statistics() or layer.whitening.num_updates.fill_(1),
        lambda layer: layer.double().float(),
        lambda layer: setattr(layer, "weight", nn.Parameter(layer.weight * 2)),
    ],
    ids=["step", "optimiser", "data", "variance", "load", "assign", "reset", "convert", "replace"],
)
def test_a_layer_in_evaluation_always_uses_its_present_state(
    layer: Any, mode: Any, change: Callable[[Any], Any]
) -> None:
    layer = trained(copy.deepcopy(layer))
    x = inputs(layer, 9)
    for again in (lambda layer: None, change, change):
        again(layer)
        expected = layer(x)  # with gradients nothing is kept
        with mode():
            for _ in range(2):
                assert torch.equal(layer(x), expected)


def test_a_layer_folds_once_in_evaluation_and_every_time_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, times = trained(WhitenedLinear(5, 4)), []
    x = inputs(layer, 9)
    from netdeconv.nn import layer as module

    real = module.fold
    monkeypatch.setattr(module, "fold", lambda *args: times.append(1) or real(*args))
    with torch.no_grad():
        layer(x), layer(x), layer(x)
        assert len(times) == 1
        freeze(layer).train()
        layer(x)  # frozen is evaluation for the statistics
        assert len(times) == 1
        layer.whitening.frozen = False
        layer(x), layer(x)
        assert len(times) == 3
    layer.eval()
    layer(x), layer(x)
    assert len(times) == 5


def test_an_ensemble_under_vmap() -> None:
    layer = trained(WhitenedLinear(5, 4))
    x = inputs(layer, 9)
    weights = torch.stack([layer.weight.detach() * scale for scale in (1, 2, 3)])
    with torch.no_grad():
        layer(x)
        outputs = torch.func.vmap(lambda weight: torch.func.functional_call(layer, {"weight": weight}, (x,)))(weights)
        for place, weight in enumerate(weights):
            expected = torch.func.functional_call(layer, {"weight": weight}, (x,))
            torch.testing.assert_close(outputs[place], expected, rtol=1e-5, atol=1e-5)  # batched products
