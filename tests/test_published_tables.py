"""Published numbers: that what is written down is whole, and says what the paper's tables say."""

from __future__ import annotations

import pytest

from netdeconv import zoo
from netdeconv.lab import published


def test_table_1_is_whole() -> None:
    networks = {network for _, network, _ in published.CIFAR}
    assert networks == set(published.PARAMETERS)
    assert len(networks) == 10
    assert len(published.CIFAR) == 2 * 10 * 3
    assert networks <= set(zoo.NETWORKS)


def test_network_deconvolution_is_ahead_everywhere_in_table_1() -> None:
    # so the paper says; a slip of the pen would most likely break it
    assert all(pair.nd > pair.bn for pair in published.CIFAR.values())


@pytest.mark.parametrize(
    ("dataset", "network", "epochs", "bn", "nd"),
    [
        ("cifar10", "vgg16", 1, 14.12, 74.18),
        ("cifar10", "efficientnet_b0", 100, 86.07, 88.42),
        ("cifar100", "pnasnet_a", 1, 10.49, 36.52),
        ("cifar100", "mobilenet_v2", 20, 66.31, 72.33),
    ],
)
def test_corners_of_table_1(dataset: str, network: str, epochs: int, bn: float, nd: float) -> None:
    assert published.cifar(dataset, network, epochs) == published.Pair(bn, nd)


def test_what_was_not_published_is_none() -> None:
    assert published.cifar("cifar10", "vgg11", 1) is None


def test_parameters_are_those_of_the_zoo() -> None:
    # the published sizes are of the whitened networks, some thousand less than with the scales of batch norms
    for name in ("vgg16", "resnet18", "pnasnet_a"):
        count = sum(p.numel() for p in zoo.create(name).parameters()) / 1e6
        assert count == pytest.approx(published.PARAMETERS[name], abs=0.02)


def test_accuracies_are_per_cent_and_top_5_is_above_top_1() -> None:
    for row in published.IMAGENET:
        for top1, top5 in (row.paper, row.study):
            assert 60 < top1 < top5 < 100


def test_ratios_are_ordered() -> None:
    assert all(1 <= row.ratio[0] <= row.ratio[1] < 6 for row in published.COST)
