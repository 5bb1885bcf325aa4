"""Conversion from scratch: what stays, what goes, and that nothing changes silently."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

import netdeconv
from netdeconv import ConfigError, WhitenedConv1d, WhitenedConv2d, WhitenedConv3d, WhitenedLinear, WhiteningConfig
from netdeconv.nn import Whitening
from netdeconv.surgery import Action
from netdeconv.surgery.norms import Clone
from netdeconv.zoo import create
from small_networks import BLOCKS, batch_norms, random_network

EXACT_TOLERANCE = 1e-6  # float32: the same layers with identity statistics, folded


def whitenings(model: nn.Module) -> Iterator[Whitening]:
    return (module for module in model.modules() if isinstance(module, Whitening))


def with_identity_statistics(model: nn.Module) -> nn.Module:
    """Mean zero and root one everywhere: the converted network without its whitening."""
    for whitening in whitenings(model):
        whitening.num_updates.fill_(1)
    return model.eval()


def without_batch_norms(model: nn.Module) -> nn.Module:
    """The oracle: every batch norm hands its input on, as a new tensor."""
    model = copy.deepcopy(model).eval()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.register_forward_hook(lambda module, args, output: args[0].clone())
    return model


def assert_only_batch_norms_went(model: nn.Module, x: Tensor) -> None:
    converted = with_identity_statistics(netdeconv.convert(model, example=x))
    with torch.no_grad():
        torch.testing.assert_close(
            converted(x.clone()), without_batch_norms(model)(x.clone()), rtol=EXACT_TOLERANCE, atol=EXACT_TOLERANCE
        )


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.__name__)
def test_each_kind_of_block_loses_its_batch_norms_and_nothing_else(block: Any) -> None:
    torch.manual_seed(0)
    model = block(4)
    assert_only_batch_norms_went(model, torch.randn(2, 4, 6, 6))


@pytest.mark.parametrize("seed", range(25))
def test_random_networks_lose_their_batch_norms_and_nothing_else(seed: int) -> None:
    model = random_network(seed)
    x = torch.randn(3, 3, 6, 6)
    assert_only_batch_norms_went(model, x)
    converted = netdeconv.convert(model, example=x)
    assert not batch_norms(converted)
    converted.train()
    converted(x).square().mean().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in converted.parameters())
    netdeconv.check_fused(converted.eval(), netdeconv.fuse(converted), x)


@pytest.mark.parametrize("seed", range(0, 25, 3))
def test_the_first_forward_completes_what_the_module_tree_did_not_show(seed: int) -> None:
    model = random_network(seed)
    x = torch.randn(3, 3, 6, 6)
    converted = netdeconv.convert(model)
    waiting = netdeconv.plan_conversion(model).where(Action.WAIT)
    assert batch_norms(converted) == [entry.path for entry in waiting]
    with pytest.warns(UserWarning, match="first forward has shown") if waiting else contextlib.nullcontext():
        converted(x)
    expected = netdeconv.convert(model, example=x)
    assert [type(module) for module in converted.modules()] == [type(module) for module in expected.modules()]
    assert list(converted.state_dict()) == list(expected.state_dict())


def clones(model: nn.Module) -> list[str]:
    return [path for path, module in model.named_modules() if type(module) is Clone]


def test_a_clone_is_made_only_where_an_operation_in_place_was_seen() -> None:
    x = torch.randn(2, 4, 6, 6)
    expected = {
        "ConvNormAct": ["norm"], "PreActivation": [], "TwoNormsOfOne": ["first", "second"], "Shortcut": ["norm"],
        "Squeeze": ["norm"], "Optional": ["norm"], "ReadTwice": ["norm"], "Concatenate": ["left.norm"],
    }  # fmt: skip
    assert {block.__name__: clones(netdeconv.convert(block(4), example=x)) for block in BLOCKS} == expected
    model = torchvision.models.resnet18()
    converted = netdeconv.convert(model, example=torch.randn(2, 3, 32, 32))
    assert clones(converted) == [f"layer{i}.{j}.bn2" for i in (1, 2, 3, 4) for j in (0, 1)]  # out += identity
    assert not any(getattr(module, "inplace", False) for module in converted.modules())
    plan = netdeconv.plan_conversion(model)
    assert plan["relu"].why.endswith("no longer in place") and "in place" not in plan["maxpool"].why
    later = netdeconv.convert(model)
    later(torch.randn(2, 3, 32, 32))
    assert clones(later) == clones(converted)


def test_activations_stay_in_place_where_no_batch_norm_goes() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(inplace=True))
    assert netdeconv.convert(model)[1].inplace and model[1].inplace
    normed = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
    assert not netdeconv.convert(normed)[2].inplace and normed[2].inplace


@pytest.mark.parametrize("example", [None, torch.randn(2, 3, 32, 32)])
@pytest.mark.parametrize("path", ["layer1.0.conv1", "layer1.0.conv2", "layer2.0.downsample.0", "layer4.1.conv2", "fc"])
def test_hooks_put_on_later_see_what_they_would_in_the_old_network(path: str, example: Tensor | None) -> None:
    converted = netdeconv.convert(torchvision.models.resnet18(), example=example)
    x = torch.randn(2, 3, 32, 32)
    converted(x)
    seen: list[Tensor] = []
    gradients: list[Any] = []
    layer = converted.get_submodule(path)
    layer.register_forward_hook(lambda module, args, output: seen.extend((output, output.detach().clone())))
    layer.register_full_backward_hook(lambda module, given, taken: gradients.append(taken))
    fused = netdeconv.fuse(converted.eval())
    converted.train()(x).sum().backward()
    assert torch.equal(seen[0], seen[1]) and gradients
    fused(x)
    assert torch.equal(seen[2], seen[3])


def test_the_old_model_is_untouched() -> None:
    model = create("resnet18", width=0.125)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    converted = netdeconv.convert(model)
    converted(torch.randn(2, 3, 32, 32)).sum().backward()
    assert {p.data_ptr() for p in model.parameters()}.isdisjoint({p.data_ptr() for p in converted.parameters()})
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    torch.testing.assert_close(converted.conv1.weight, model.conv1.weight, rtol=0, atol=0)


def test_the_random_numbers_of_the_caller_are_not_used_up() -> None:
    model = create("vgg11", width=0.125)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    netdeconv.convert(model)
    assert torch.equal(torch.rand(3), expected)


def test_parameter_counts_are_the_papers() -> None:
    counts = {"resnet18": 11_169_162, "vgg16": 14_719_818}
    for name, count in counts.items():
        with torch.device("meta"):
            model = create(name)
        converted = netdeconv.convert(model)
        assert sum(p.numel() for p in converted.parameters()) == count
        assert converted.linear.weight.is_meta if name == "resnet18" else True


def test_a_bias_is_gained_only_where_batch_norms_go() -> None:
    plain = nn.Sequential(nn.Linear(3, 4, bias=False), nn.ReLU(), nn.Linear(4, 2))
    converted = netdeconv.convert(plain)
    assert converted[0].bias is None
    assert converted[2].bias is not None
    normed = netdeconv.convert(nn.Sequential(nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4)))
    assert torch.equal(normed[0].bias, torch.zeros(4))


def test_shape_arguments_and_settings_arrive() -> None:
    convs = [
        nn.Conv1d(4, 6, 3, stride=2, padding="valid", padding_mode="reflect"),
        nn.Conv2d(4, 6, (3, 1), dilation=(2, 1), groups=2, padding=(2, 0), padding_mode="circular"),
        nn.Conv3d(4, 6, 2, bias=False),
        nn.Linear(4, 6),
    ]
    twins = (
        (WhitenedConv1d, "dense"),
        (WhitenedConv2d, "grouped"),
        (WhitenedConv3d, "dense"),
        (WhitenedLinear, "linear"),
    )
    for layer, (twin, kind) in zip(convs, twins, strict=True):
        config = WhiteningConfig(block_size=2)
        converted = netdeconv.convert(layer, config)
        assert type(converted) is twin
        assert converted.whitening.config == config.resolved(kind, 4)
        assert layer.extra_repr() in converted.extra_repr()


@pytest.mark.parametrize(
    ("channels", "groups", "kernel", "kind", "steps"),
    [
        (4, 4, 3, "depthwise", 1),
        (4, 2, 3, "grouped", 3),
        (4, 1, 3, "dense", 3),
        (1, 1, 3, "dense", 3),
        (4, 1, 1, "1x1", 1),
    ],
)
def test_each_kind_of_layer_takes_its_own_settings(
    channels: int, groups: int, kernel: int, kind: str, steps: int
) -> None:
    conv, config = nn.Conv2d(channels, 8, kernel, groups=groups), WhiteningConfig(eps=1e-3)
    expected = config.resolved(kind, channels // groups)
    assert (expected.num_iters, expected.eps, expected.average) == (steps, 1e-3, "covariance")
    data = torch.randn(4, channels, 9, 9)
    for preserve in (None, data):
        for whitening in (config, lambda path, layer: config):
            assert netdeconv.convert(conv, whitening, preserve=preserve).whitening.config == expected
        default = netdeconv.convert(conv, preserve=preserve).whitening.config
        assert default == expected.replace(eps=WhiteningConfig.eps)
    assert WhitenedConv2d(channels, 8, kernel, groups=groups, whitening=config).whitening.config == expected
    named = WhiteningConfig(num_iters=7, average="root", scale=False, update_every=2)
    assert netdeconv.convert(conv, named, preserve=data).whitening.config == named.resolved(kind, channels // groups)


def test_one_number_in_a_tuple_holds_for_all_dimensions() -> None:
    conv, x = nn.Conv2d(4, 6, 3, stride=(2,), padding=(1,), dilation=(2,)), torch.randn(9, 4, 9, 9)
    converted = netdeconv.convert(conv)
    converted(x)
    fused = netdeconv.fuse(converted.eval())
    assert converted(x).shape == conv(x).shape
    assert (fused.stride, fused.padding, fused.dilation) == ((2, 2), (1, 1), (2, 2))
    netdeconv.check_fused(converted, fused, x)
    torch.testing.assert_close(with_identity_statistics(netdeconv.convert(conv))(x), conv(x))


def test_settings_by_place() -> None:
    model = create("vgg11", width=0.125)

    def setting(path: str, layer: nn.Module) -> WhiteningConfig | None:
        return WhiteningConfig.paper(num_iters=15) if path == "features.0" else None

    converted = netdeconv.convert(model, setting)
    assert converted.features[0].whitening.config.num_iters == 15
    assert converted.features[4].whitening.config == WhiteningConfig().resolved("dense", 8)
    assert converted.features[0].whitening.label == "features.0: WhitenedConv2d(3, 8, kernel_size=(3, 3))"
    with pytest.raises(ConfigError, match="expected whitening a WhiteningConfig"):
        netdeconv.convert(model, 64)  # type: ignore[arg-type]


def test_device_dtype_mode_gradient_flags_and_memory_format_stay() -> None:
    model = create("vgg11", width=0.125).double().to(memory_format=torch.channels_last).eval()
    model.features[0].requires_grad_(False)
    model.features[4].train()
    converted = netdeconv.convert(model, include="*")
    assert {p.dtype for p in converted.parameters()} == {torch.float64}
    assert {w.running_root.dtype for w in whitenings(converted)} == {torch.float64}
    assert not converted.features[0].weight.requires_grad
    assert not converted.features[0].bias.requires_grad
    assert converted.features[4].weight.is_contiguous(memory_format=torch.channels_last)
    assert not converted.training
    assert not converted.features[0].whitening.training
    assert converted.features[4].training and converted.features[4].whitening.training


def test_hooks_stay() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    seen: list[str] = []
    model[0].register_forward_hook(lambda *_: seen.append("conv"))
    model[0].register_forward_pre_hook(lambda *_, **__: seen.append("before"), with_kwargs=True)
    model[1].register_forward_hook(lambda *_: seen.append("norm"))
    model[0].register_full_backward_hook(lambda *_: seen.append("backward"))
    converted = netdeconv.convert(model)
    converted(torch.randn(2, 3, 2, 2, requires_grad=True)).sum().backward()
    assert seen == ["before", "conv", "norm", "backward"]


def test_what_a_hook_has_seen_is_not_changed_in_place() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
    seen: list[Tensor] = []
    model[0].register_forward_hook(lambda module, args, output: seen.append(output))
    netdeconv.convert(model)(torch.randn(2, 3, 2, 2))
    assert bool((seen[0] < 0).any())


def test_tied_modules_and_parameters_stay_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(7, 3)
            self.hidden = nn.Linear(3, 3)
            self.twice = nn.ModuleList([self.hidden, self.hidden])
            self.also = [self.hidden]  # a list that no module knows of
            self.out = nn.Linear(3, 7, bias=False)
            self.out.weight = self.embedding.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.also[0](self.twice[1](self.hidden(self.embedding(x)))))

    converted = netdeconv.convert(Tied())
    assert converted.hidden is converted.twice[0] is converted.twice[1] is converted.also[0]
    assert isinstance(converted.hidden, WhitenedLinear)
    assert converted.out.weight is converted.embedding.weight
    converted(torch.arange(7)).sum().backward()


def test_attributes_of_a_batch_norm_can_still_be_read() -> None:
    converted = netdeconv.convert(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
    assert type(converted[1]) is nn.Identity
    assert converted[1].num_features == 4
    assert not list(converted[1].parameters())
    with pytest.raises(AttributeError, match="running_mean"):
        converted[1].running_mean  # noqa: B018


def test_a_model_that_is_one_layer() -> None:
    assert isinstance(netdeconv.convert(nn.Linear(3, 2)), WhitenedLinear)
    with pytest.warns(UserWarning, match=r"1 batch norms are left: the model \(no whitened layer takes its place\)"):
        assert isinstance(netdeconv.convert(nn.BatchNorm2d(3)), nn.BatchNorm2d)
    assert netdeconv.convert(nn.Linear(3, 2)).whitening.label == "WhitenedLinear(3, 2)"


def test_converting_twice_changes_nothing_more() -> None:
    once = netdeconv.convert(create("vgg11", width=0.125))
    twice = netdeconv.convert(once)
    assert [type(module) for module in once.modules()] == [type(module) for module in twice.modules()]
    assert list(once.state_dict()) == list(twice.state_dict())


class Doubled(nn.Conv2d):
    """A foreign layer: twice a convolution."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def plain_of(layer: Doubled) -> nn.Module:
    new = nn.Conv2d(layer.in_channels, layer.out_channels, layer.kernel_size)
    new.weight, new.bias = (nn.Parameter(2 * parameter.detach()) for parameter in (layer.weight, layer.bias))
    return new


def test_rules() -> None:
    model = nn.Sequential(Doubled(3, 4, 1), nn.BatchNorm2d(4))
    converted = with_identity_statistics(netdeconv.convert(model, rules={Doubled: plain_of}))
    x = torch.randn(2, 3, 2, 2)
    assert type(converted[0]) is WhitenedConv2d
    torch.testing.assert_close(converted(x), model[0](x))
    left = netdeconv.convert(model, rules={Doubled: lambda layer: None})
    assert type(left[0]) is Doubled
    with pytest.raises(ConfigError, match="one without the old inside"):
        netdeconv.convert(model, rules={Doubled: lambda layer: nn.Sequential(layer)})


def test_a_class_in_include_covers_what_its_rule_makes() -> None:
    model = nn.Sequential(Doubled(3, 4, 1), nn.Linear(4, 4))
    converted = netdeconv.convert(model, rules={Doubled: plain_of}, include=Doubled)
    assert type(converted[0]) is WhitenedConv2d and type(converted[1]) is nn.Linear


def test_batch_norms_left_are_reported_unless_asked_for() -> None:
    class Odd(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return -super().forward(x)

    model = nn.Sequential(nn.Conv2d(3, 4, 1), Odd(4))
    with pytest.warns(UserWarning, match=r"1 batch norms are left: 1 \("):
        converted = netdeconv.convert(model)
    assert type(converted[1]) is Odd
    assert type(netdeconv.convert(model, exclude=Odd)[1]) is Odd
    kept = netdeconv.convert(create("vgg11", width=0.125), exclude=nn.BatchNorm2d)
    assert sum(isinstance(module, nn.BatchNorm2d) for module in kept.modules()) == 8


class Keeper(nn.Module):
    """Keeps what the last forward computed, as RAFT keeps its correlations."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.utils.weight_norm(nn.Linear(3, 3)), nn.Linear(3, 3)
        self.kept: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.kept = [self.first(x)]
        return self.second(self.kept[0])


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_a_model_that_keeps_computed_tensors_can_be_converted() -> None:
    model, x = Keeper(), torch.randn(9, 3)
    expected = model(x)
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(model)
    converted = netdeconv.convert(model)
    assert type(converted.first) is nn.Linear and type(converted.second) is WhitenedLinear
    assert converted.kept[0] is not model.kept[0] and torch.equal(converted.kept[0], model.kept[0])
    assert torch.equal(model(x), expected)
    with torch.no_grad():
        converted.first.weight_g *= 2  # the weight is computed anew from it
    converted(x).sum().backward()
    torch.testing.assert_close(converted.kept[0], 2 * (model.kept[0] - model.first.bias) + model.first.bias)
    assert converted.first.weight_v.grad is not None
    fused = netdeconv.fuse(converted.eval())
    netdeconv.check_fused(converted, fused, x)


def test_a_model_that_cannot_be_copied() -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    model.generator = (number for number in range(3))
    with pytest.raises(ConfigError, match=r"copy\.deepcopy can copy.*generator"):
        netdeconv.convert(model)
    lazy = nn.Sequential(nn.Linear(3, 3), nn.LazyBatchNorm1d())
    with pytest.raises(ConfigError, match=r"lazy modules, run a batch through the model first"):
        netdeconv.convert(lazy)


def test_graph_modules_of_fx() -> None:
    model = torch.fx.symbolic_trace(create("resnet18", width=0.125))
    assert_only_batch_norms_went(model, torch.randn(2, 3, 32, 32))
