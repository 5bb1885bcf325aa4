"""Networks by name, and their normalisation switched by name."""

from __future__ import annotations

import collections
import re

import pytest
import torch
from torch import nn

from netdeconv import ConfigError, WhitenedConv2d, WhitenedLinear, WhiteningConfig, zoo

pytest.importorskip("torchvision")

from netdeconv.lab.networks import network, network_names
from netdeconv.lab.norms import NORMS, with_norm
from netdeconv.lab.rivals import SWBN, DecorrelatedConv2d, DecorrelatedLinear, IterNorm, StandardisedConv2d

NORM_LAYERS = (
    nn.BatchNorm2d, nn.GroupNorm, nn.Identity, WhitenedConv2d, WhitenedLinear,
    IterNorm, SWBN, DecorrelatedConv2d, DecorrelatedLinear, StandardisedConv2d,
)  # fmt: skip


def kinds(model: nn.Module) -> collections.Counter[type]:
    return collections.Counter(type(module) for module in model.modules() if isinstance(module, NORM_LAYERS))


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    return network("resnet18", 0.125)


@pytest.mark.parametrize(
    ("norm", "expected"),
    [
        ("bn", {nn.BatchNorm2d: 20}),
        ("nd", {WhitenedConv2d: 20, WhitenedLinear: 1}),
        ("nd-paper", {WhitenedConv2d: 20, WhitenedLinear: 1}),
        ("nd-authors", {WhitenedConv2d: 20, WhitenedLinear: 1}),
        ("gn", {nn.GroupNorm: 20}),
        ("ln", {nn.GroupNorm: 20}),
        ("in", {nn.GroupNorm: 20}),
        ("iternorm", {IterNorm: 20}),
        ("dbp", {nn.BatchNorm2d: 20, DecorrelatedConv2d: 20, DecorrelatedLinear: 1}),
        ("swbn", {SWBN: 20}),
        ("gn+ws", {nn.GroupNorm: 20, StandardisedConv2d: 20}),
        ("none", {nn.Identity: 20}),
    ],
)
def test_a_norm_takes_the_place_of_every_batch_norm(resnet: nn.Module, norm: str, expected: dict[type, int]) -> None:
    new = with_norm(resnet, norm)
    assert new(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    found = kinds(new)
    if norm == "none":
        found -= kinds(resnet)  # the identities that the network has itself
    else:
        del found[nn.Identity]  # and those that conversion leaves
    assert found == expected
    assert kinds(resnet)[nn.BatchNorm2d] == 20
    assert new is not resnet


def test_every_norm_is_tried_above() -> None:
    of = {"bn", "nd", "nd-paper", "nd-authors", "gn", "ln", "in", "iternorm", "dbp", "swbn", "gn+ws", "none"}
    assert set(NORMS) == of


def test_no_two_norms_look_alike() -> None:
    for what in ("color", "marker"):
        assert len({norm.style[what] for norm in NORMS.values()}) == len(NORMS)
    assert len({norm.label for norm in NORMS.values()}) == len({str(norm) for norm in NORMS.values()}) == len(NORMS)


def test_groups_of_the_group_norms() -> None:
    sizes = (128, 64, 48, 32, 6, 3)
    net = nn.Sequential(*map(nn.BatchNorm2d, sizes))
    groups = {norm: [m.num_groups for m in with_norm(net, norm)] for norm in ("gn", "ln", "in")}  # type: ignore[union-attr, misc]
    assert groups == {"gn": [32, 16, 12, 8, 1, 1], "ln": [1] * 6, "in": list(sizes)}
    assert [m.num_groups for m in with_norm(net, "gn+ws")] == groups["gn"]  # type: ignore[union-attr, misc]


@pytest.mark.parametrize("norm", sorted(set(NORMS) - {"bn", "nd", "nd-paper", "nd-authors", "dbp"}))
def test_without_batch_norms_there_is_nothing_to_replace(norm: str) -> None:
    with pytest.raises(ConfigError, match=rf"--norm {re.escape(norm)}: expected .* batch norms, .* vit without"):
        with_norm(nn.Sequential(nn.Conv2d(3, 8, 3), nn.LayerNorm(8)), norm, name="vit")


def test_whitening_settings_reach_every_layer(resnet: nn.Module) -> None:
    new = with_norm(resnet, "nd", {"update_every": 4, "eps": 1e-3})
    config = WhiteningConfig(update_every=4, eps=1e-3)
    for layer in filter(is_whitened, new.modules()):
        kind = "linear" if isinstance(layer, WhitenedLinear) else "1x1" if layer.kernel_size == (1, 1) else "dense"
        channels = layer.in_features if isinstance(layer, WhitenedLinear) else layer.in_channels
        assert layer.whitening.config == config.resolved(kind, channels)
        assert (layer.whitening.config.update_every, layer.whitening.config.eps) == (4, 1e-3)


def is_whitened(module: nn.Module) -> bool:
    return isinstance(module, (WhitenedConv2d, WhitenedLinear))


def test_the_published_procedure_has_larger_blocks_for_linear_layers() -> None:
    new = with_norm(network("vgg11", 0.125), "nd-paper", name="vgg11")
    configs = {type(m): m.whitening.config for m in new.modules() if is_whitened(m)}
    assert configs == {
        WhitenedConv2d: WhiteningConfig.paper(block_size=64),
        WhitenedLinear: WhiteningConfig.paper(block_size=512),
    }
    imagenet = with_norm(nn.Sequential(nn.Linear(8, 2)), "nd-paper", name="torchvision:vgg11")
    assert imagenet[0].whitening.config == WhiteningConfig.paper(block_size=64)  # type: ignore[index]


def test_the_authors_exceptions() -> None:
    new = with_norm(network("torchvision:resnet18"), "nd-authors", name="torchvision:resnet18")
    left = [path for path, module in new.named_modules() if isinstance(module, nn.BatchNorm2d)]
    assert left == [f"layer{i}.0.downsample.1" for i in (2, 3, 4)]
    steps = {path: m.whitening.config.num_iters for path, m in new.named_modules() if is_whitened(m)}
    assert steps.pop("conv1") == 15
    assert set(steps.values()) == {5}


@pytest.mark.parametrize(
    ("name", "counts", "where"),
    [
        ("mobilenet_v2", {10: 1, 1: 34, 5: 22}, {("conv2", True), ("conv3", False)}),
        ("resnext29_32x4d", {10: 1, 3: 9, 5: 21}, {("conv2", True)}),
    ],
)
def test_the_authors_steps_inside_blocks(name: str, counts: dict[int, int], where: set[tuple[str, bool]]) -> None:
    """In MobileNetV2 depthwise and narrowing convolutions have one step, 34 of 57; in ResNeXt-29 grouped ones three."""
    new = with_norm(network(name, 0.25), "nd-authors", name=name)
    convs = {path: m for path, m in new.named_modules() if isinstance(m, WhitenedConv2d)}
    assert collections.Counter(m.whitening.config.num_iters for m in convs.values()) == counts
    few = {path: m for path, m in convs.items() if m.whitening.config.num_iters < 5}
    assert {(path.rpartition(".")[2], m.groups > 1) for path, m in few.items()} == where


@pytest.mark.parametrize(
    ("norm", "whitening", "message"),
    [
        ("nb", {}, "there is no nb"),
        ("nd-papr", {}, "nearest name is nd-paper"),
        ("bn", {"eps": 1e-3}, r"whitening\.eps cannot apply to --norm bn"),
        ("nd", {"update_evry": 4}, r"whitening\.update_evry: .* nearest name is update_every"),
        ("nd", {"update_every": 0}, "expected update_every a whole number"),
    ],
)
def test_wrong_norms_and_settings_are_refused(norm: str, whitening: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        with_norm(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), norm, whitening)


@pytest.mark.parametrize("name", ["small", "vgg11", "mobilenet_v2"])
def test_grey_images(name: str) -> None:
    net = network(name, 0.125, in_channels=1, image_size=32)
    assert net(torch.randn(2, 1, 32, 32)).shape == (2, 10)


def test_colour_networks_are_left_as_they_are() -> None:
    torch.manual_seed(0)
    plain = zoo.create("vgg11", width=0.125).state_dict()
    torch.manual_seed(0)
    ours = network("vgg11", 0.125, in_channels=3).state_dict()
    assert all(torch.equal(ours[key], value) for key, value in plain.items())


def test_networks_for_segmentation_download_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a download")

    monkeypatch.setattr("torch.hub.load_state_dict_from_url", refuse)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", refuse)
    names = network_names("segmentation")
    assert {"torchvision:deeplabv3_resnet50", "torchvision:fcn_resnet50"} < set(names)
    with torch.device("meta"):  # no weights to draw
        models = {name: network(name, classes=19, task="segmentation") for name in names}
    heads = {name: getattr(model, "aux_classifier", None) for name, model in models.items()}
    assert all(isinstance(head, nn.Module) for name, head in heads.items() if "lraspp" not in name)


@pytest.mark.parametrize(
    ("name", "task", "message"),
    [
        ("vgg12", "classification", "got 'vgg12'. The nearest name is vgg1"),
        ("xyz", "classification", "There is densenet121, "),
        ("vgg11", "segmentation", "expected a network for segmentation, torchvision:NAME, got 'vgg11'"),
    ],
)
def test_unknown_networks_are_refused(name: str, task: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        network(name, task=task)


def test_the_transformer_is_whitened_in_every_layer() -> None:
    net = network("vit", 0.25, 5, in_channels=1, image_size=8)
    assert net(torch.randn(3, 1, 8, 8)).shape == (3, 5)
    new = with_norm(net, "nd")
    layers = [module for module in new.modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    assert len(layers) == 1 + 6 * 4 + 1 and all(map(is_whitened, layers))
    for norm, kinds in (("nd", (WhitenedConv2d, WhitenedLinear)), ("dbp", (DecorrelatedConv2d, DecorrelatedLinear))):
        named = with_norm(net, norm, name="ViT")
        paths = [path for path, module in named.named_modules() if isinstance(module, kinds)]
        assert len(paths) == 6 * 4 and all(path.startswith("blocks.") for path in paths)
        assert type(named.get_submodule("head")) is nn.Linear
    assert [type(m) for m in new.modules() if "Norm" in type(m).__name__] == [nn.LayerNorm] * 13
    new(torch.randn(8, 1, 8, 8)).sum().backward()
    assert all(parameter.grad is not None for parameter in new.parameters())
    one = new.eval()(torch.ones(1, 1, 8, 8))
    assert not torch.allclose(one, net.eval()(torch.ones(1, 1, 8, 8)))


def test_a_network_without_any_norm_has_none() -> None:
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    assert [type(module) for module in with_norm(plain, "none")] == [nn.Conv2d, nn.ReLU]
    with pytest.raises(ConfigError, match="expected a network with batch norms"):
        with_norm(nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)), "none")
