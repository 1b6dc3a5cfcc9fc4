"""Fixtures of the matrix: a trained route, and the rows that the table on `docs/compatibility.md` is made of."""

import pytest

from dspy_router import DifferentiableRoute, RouteFinetune
from tests.compat.concierge import TOOLS, guests
from tests.compat.table import Entry
from tests.conftest import bag_of_words


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-table", action="store_true", help="write the table of docs/compatibility.md")


@pytest.fixture
def untrained_route() -> DifferentiableRoute:
    return DifferentiableRoute("request -> tool", tools=list(TOOLS.values()), encoder=bag_of_words)


@pytest.fixture
def trained_route(untrained_route: DifferentiableRoute) -> DifferentiableRoute:
    return RouteFinetune().compile(untrained_route, trainset=guests(60))


@pytest.fixture(scope="session")
def entries() -> dict[str, Entry]:
    """What the tests of this run recorded, by optimizer."""
    return {}
