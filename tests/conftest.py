"""Options that vary the tests of training, those with the mark ``training``; ``make test-processors`` passes them."""

from __future__ import annotations

import pytest

from variation import Variation


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("tests of training")
    group.addoption("--training-seed", type=int, default=0, metavar="N", help="seed of their weights and batches")
    group.addoption("--nudge", type=float, default=0.0, metavar="SIZE", help="noise to move their inputs by, e.g. 1e-6")


@pytest.fixture(scope="session")
def variation(request: pytest.FixtureRequest) -> Variation:
    return Variation(request.config.getoption("--training-seed"), request.config.getoption("--nudge"))
