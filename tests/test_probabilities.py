import copy
import pickle
from pathlib import Path

import numpy as np
import pytest

from dspy_router import DifferentiableRoute, RouteError, record_decisions
from dspy_router.feedback import read_feedback
from dspy_router.optimizers.logs import logged_feedback
from dspy_router.overrides import explore_decisions, force_decisions
from dspy_router.probabilities import MANY, Probabilities, by_name, likeliest, likeliest_option
from dspy_router.tracing import decision_attributes
from tests.conftest import bag_of_words

NAMES = tuple(f"number {place}" for place in range(MANY + 500))
POSITIONS = {name: place for place, name in enumerate(NAMES)}


@pytest.fixture(scope="module")
def route() -> DifferentiableRoute:
    route = DifferentiableRoute("request -> option", tools=NAMES, encoder=bag_of_words)
    route.head  # noqa: B018
    return route


def many(candidates: np.ndarray | None = None) -> tuple[Probabilities, np.ndarray]:
    values = np.random.default_rng(0).dirichlet(np.ones(len(NAMES)))
    found = by_name(NAMES, POSITIONS, values, candidates)
    assert isinstance(found, Probabilities)
    return found, values


def test_few_options_have_a_dict_and_many_a_mapping_that_reads_as_one() -> None:
    few = by_name(NAMES[:3], POSITIONS, np.array([0.2, 0.5, 0.3]), np.array([True, False, True]))
    assert few == {"number 0": 0.2, "number 2": 0.3}
    assert type(few) is dict
    found, values = many()
    assert list(found) == list(NAMES)
    assert found["number 7"] == pytest.approx(values[7])
    assert found.get("nothing", 0.0) == 0.0
    assert sum(found.values()) == pytest.approx(1)
    assert found == dict(found)
    assert len(repr(found)) < 200
    assert pickle.loads(pickle.dumps(found)) == found
    assert copy.deepcopy(found) == found


def test_only_candidates_are_in_it() -> None:
    candidates = np.arange(len(NAMES)) % 10 != 3
    found, _ = many(candidates)
    assert len(found) == candidates.sum()
    assert list(found) == [name for name, kept in zip(NAMES, candidates, strict=True) if kept]
    assert "number 3" not in found
    assert "number 4" in found


@pytest.mark.parametrize("k", [1, 2, 5, MANY + 500, MANY + 900])
def test_the_likeliest_are_those_of_a_dict_ties_in_the_declared_order(k: int) -> None:
    values = np.round(np.random.default_rng(1).dirichlet(np.ones(len(NAMES))), 4)
    found = Probabilities(NAMES, POSITIONS, values)
    assert list(likeliest(found, k)) == list(likeliest(dict(found), k))
    assert likeliest_option(found) == likeliest_option(dict(found)) == next(iter(likeliest(found, 1)))


def test_a_route_among_many_options_decides_as_among_few(route: DifferentiableRoute) -> None:
    prediction = route(request="number 2100")
    assert prediction.option == prediction.decision.name == "number 2100"
    assert isinstance(prediction.probabilities, Probabilities)
    assert prediction.confidence == max(prediction.probabilities.values())
    policy = route.head["option"].policy(
        bag_of_words(["number 2100"])[0] / np.linalg.norm(bag_of_words(["number 2100"]))
    )
    np.testing.assert_allclose(list(prediction.probabilities.values()), policy, rtol=1e-4)
    assert next(iter(route.top_k(2, request="number 2100"))) == "number 2100"
    assert route(request="number 2100", candidates=["number 5", "number 9"]).option in ("number 5", "number 9")
    assert len(route(request="number 5", candidates=NAMES[5:]).probabilities) == len(NAMES) - 5
    with pytest.raises(RouteError, match=r"'number x'.*no options"):
        route(request="number 5", candidates=["number x"])
    with force_decisions({"option": "number 3"}):
        assert route(request="number 2100").option == "number 3"
    with explore_decisions(1.0, seed=0):
        drawn = route(request="number 2100").decision
    assert 0 < drawn.propensity < 1
    shown = decision_attributes(prediction.decision)
    assert shown["dspy_router.option.options"] == len(NAMES)
    assert len(str(shown["dspy_router.option.probabilities"])) < 1000


def test_a_log_row_among_many_options_is_short_and_is_learned_from(route: DifferentiableRoute, tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    with record_decisions(path, program=route) as run:
        route(request="number 2100")
        route(request="number 2100", candidates=NAMES[5:])
        route(request="number 7", candidates=["number 7", "number 8"])
    run.reward(1.0)
    every, some, few = read_feedback(path)
    assert path.stat().st_size < 100_000
    assert (every.candidates, len(some.candidates), len(few.candidates)) == ((), len(NAMES) - 5, 2)
    assert every.chosen == next(iter(every.probabilities or {})) == "number 2100"
    assert len(every.probabilities or {}) == 20
    found = logged_feedback([every, some, few], {"self": route})
    assert len(found.rows) == 3
    assert found.noted["rows with fewer candidates than there are options"] == 2
    assert not logged_feedback([every], {"self": DifferentiableRoute("request -> option", tools=["a", "b"])}).rows
