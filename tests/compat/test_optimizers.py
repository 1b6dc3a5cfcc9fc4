"""Every DSPy optimizer works on a program with a trained route as on the same program with a plain function."""

from collections.abc import Mapping

import pytest
import torch

from dspy_router import DifferentiableRoute
from tests.compat.concierge import Concierge, choose_by_hint, guests
from tests.compat.optimizers import ROWS, TRAINSET, VALSET, Row
from tests.compat.outcome import outcome_of
from tests.compat.table import Entry


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_it_does_its_job_and_leaves_the_route_alone(
    row: Row, trained_route: DifferentiableRoute, entries: dict[str, Entry]
) -> None:
    before = {name: tensor.clone() for name, tensor in trained_route.head.state_dict().items()}

    routed = outcome_of(row.run, Concierge(trained_route), VALSET)
    plain = outcome_of(row.run, Concierge(choose_by_hint), VALSET)

    routes = [route for _, route in routed.program.named_sub_modules(type_=DifferentiableRoute)]
    assert routes
    for route in [trained_route, *routes]:
        assert route.encoder is trained_route.encoder
        assert_same_tensors(route.head.state_dict(), before)
    assert routed.predictors == plain.predictors
    assert routed.prompts == plain.prompts
    assert routed.training == plain.training
    assert routed.changes == plain.changes == row.changes
    assert routed.score == plain.score > routed.score_before == plain.score_before

    entries[row.name] = Entry(row.name, routed.changes, "as it was, bit for bit")


def test_the_plain_function_decides_what_the_route_decides(trained_route: DifferentiableRoute) -> None:
    for guest in [*TRAINSET, *VALSET, *guests(30, seed=3)]:
        assert choose_by_hint(guest.request).tool == trained_route(request=guest.request).tool == guest.tool


def assert_same_tensors(tensors: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)
