import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import dspy
import numpy as np
import pytest

from dspy_router import RouteError, RouteFinetune, record_decisions
from dspy_router.feedback import Feedback, text_key, write_feedback
from dspy_router.optimizers.learner import field_rows, fit_routes
from dspy_router.optimizers.logs import logged_feedback
from dspy_router.optimizers.runs import find_routes
from dspy_router.overrides import explore_decisions
from tests.programs import FRUIT, Shop, Wrapping, fruit_requests, fruit_route, orders, right_fruit, right_order

ROUTES = {"self.clerk": fruit_route()}


def logged(count: int, *, seed: int = 0, route: str = "self.clerk", **more: Any) -> list[Feedback]:
    """A log of options drawn evenly, each rewarded by whether it was right."""
    random_ = random.Random(seed)
    rows = []
    for example in fruit_requests(count, seed=seed):
        chosen = random_.choice(FRUIT)
        rows.append(
            Feedback(
                source="log",
                example=text_key(example.request),
                route=route,
                field="fruit",
                text=example.request,
                candidates=tuple(FRUIT),
                chosen=chosen,
                propensity=1 / 3,
                reward=float(chosen == example.wanted),
                **more,
            )
        )
    return rows


def accuracy(program: dspy.Module) -> float:
    test = fruit_requests(120, seed=9)
    return float(np.mean([right_fruit(example, program(request=example.request)) for example in test]))


def test_rows_with_fewer_candidates_than_there_are_options_are_learned_from() -> None:
    # A call had candidates, or the log is older than a tool.
    rows = [
        replace(row, candidates=tuple(sorted({row.chosen, "apple"})), propensity=1 / len({row.chosen, "apple"}))
        for row in logged(240)
    ]
    found = logged_feedback(rows, ROUTES)
    assert (len(found.rows), dict(found.set_aside)) == (240, {})
    assert found.noted == {"rows with fewer candidates than there are options": 240}
    assert accuracy(RouteFinetune().compile(Shop(), feedback=rows)) > 0.9


def test_rows_of_a_log_train_a_program_alone() -> None:
    optimizer = RouteFinetune()
    program = optimizer.compile(Shop(), feedback=logged(240))
    assert accuracy(program) > 0.95 > accuracy(Shop())
    assert optimizer.report.rows == {"log": 240}
    assert (optimizer.report.rollouts, optimizer.report.set_aside, optimizer.report.noted) == (0, {}, {})


@pytest.mark.parametrize("kind", [str, Path])
def test_a_log_file_trains_a_program_alone(kind: type, tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    write_feedback(logged(240), path)
    optimizer = RouteFinetune()
    assert accuracy(optimizer.compile(Shop(), feedback=kind(path))) > 0.95
    assert optimizer.report.rows == {"log": 240}


def test_a_log_and_a_trainset_are_learned_from_together() -> None:
    # The log knows nothing of cherries, the labels of nothing else.
    rows = [row for row in logged(240) if row.chosen != "cherry" and row.reward]
    cherries = [example for example in fruit_requests(60, seed=2, label=True) if example.fruit == "cherry"]
    optimizer = RouteFinetune()
    together = optimizer.compile(Shop(), trainset=cherries, feedback=rows)
    assert optimizer.report.rows == {"label": 20, "log": len(rows)}
    assert accuracy(together) > 0.95
    assert accuracy(RouteFinetune().compile(Shop(), feedback=rows)) < 0.9


def test_a_log_goes_before_rollouts_of_the_metric() -> None:
    optimizer = RouteFinetune(right_fruit, max_metric_calls=30)
    program = optimizer.compile(Shop(), trainset=fruit_requests(60, seed=3), feedback=logged(240))
    assert optimizer.report.rows == {"log": 240, "rollout": 30}
    # What the log taught is known when the first rollout is made.
    assert sum(row.reward for row in optimizer.feedback if row.source == "rollout") > 24
    assert accuracy(program) > 0.95


def test_a_log_of_graded_rewards_is_weighed_by_size() -> None:
    rows = [replace(row, reward=0.3 + 0.4 * row.reward) for row in logged(240)]
    assert accuracy(RouteFinetune().compile(Shop(), feedback=rows)) > 0.9


def test_runs_whose_decisions_read_different_texts_are_learned_from_a_log(tmp_path: Path) -> None:
    program, path = Wrapping(), tmp_path / "log.jsonl"
    for number, example in enumerate(orders(500, seed=1)):
        with explore_decisions(1.0, seed=number), record_decisions(path, program=program) as run:
            prediction = program(request=example.request)
        run.reward(right_order(example, prediction))
    optimizer = RouteFinetune()
    optimizer.compile(program, feedback=path)
    assert optimizer.report.rows == {"log": 1000}
    # What one decision is to blame for depends on the other: a few rounds settle both.
    routes = find_routes(program)
    for _ in range(4):
        fit_routes(field_rows(routes, optimizer.feedback))
    test = orders(90, seed=9)
    assert np.mean([right_order(example, program(request=example.request)) for example in test]) > 0.9


def encoder_digest() -> str:
    return ROUTES["self.clerk"].encoder.fingerprint.weights


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"reward": math.nan}, "rows without a reward"),
        ({"reward": math.inf}, "rows without a reward"),
        ({"reward": None}, "rows without a reward"),
        ({"reward": None, "error": "LookupError: no shelf"}, "rows with an error in place of a reward"),
        ({"candidates": ("apple", "banana", "fig")}, "rows from other options"),
        ({"candidates": (*FRUIT, "kiwi")}, "rows from other options"),
        ({"field": "colour"}, "rows of a field that no route decides"),
        ({"route": "self.till"}, "rows of a route that the program does not have"),
        ({"chosen": "kiwi"}, "rows that chose none of their candidates"),
    ],
)
def test_a_row_that_cannot_be_used_is_counted_by_reason(change: dict[str, Any], reason: str) -> None:
    [good, bad] = logged(2)
    found = logged_feedback([good, replace(bad, **change)], ROUTES)
    assert found.rows == [good]
    assert (found.set_aside, found.noted) == ({reason: 1}, {})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"propensity": None}, "rows with propensity missing, used where none is needed"),
        ({"propensity": 0.0}, "rows with propensity 0 or less, used where none is needed"),
        ({"propensity": -0.5}, "rows with propensity 0 or less, used where none is needed"),
        ({"propensity": 1.5}, "rows with propensity above 1, used where none is needed"),
        ({"propensity": math.nan}, "rows with propensity not a number, used where none is needed"),
        ({"encoder": "0123456789abcdef"}, "rows made with another encoder, encoded anew"),
    ],
)
def test_a_row_that_can_be_used_in_part_is_kept_and_noted(change: dict[str, Any], reason: str) -> None:
    [row] = logged(1)
    found = logged_feedback([replace(row, **change)], ROUTES)
    assert (found.set_aside, found.noted) == ({}, {reason: 1})
    assert found.rows == [replace(row, **(change | ({"propensity": None} if "propensity" in change else {})))]


@pytest.mark.parametrize("propensity", [None, 0.0, 1.5])
@pytest.mark.parametrize("graded", [False, True])
def test_rows_without_a_usable_propensity_still_teach(propensity: float | None, graded: bool) -> None:
    rows = [replace(row, propensity=propensity) for row in logged(240)]
    if graded:
        rows = [replace(row, reward=0.3 + 0.4 * row.reward) for row in rows]
    optimizer = RouteFinetune()
    assert accuracy(optimizer.compile(Shop(), feedback=rows)) > 0.9
    [(reason, count)] = optimizer.report.noted.items()
    assert "propensity" in reason
    assert count == 240
    assert reason in str(optimizer.report)


def test_the_same_encoder_is_not_another_whatever_the_length_of_its_digest() -> None:
    rows = logged(3)
    digests = ["", encoder_digest(), encoder_digest()[:16]]
    found = logged_feedback([replace(row, encoder=digest) for row, digest in zip(rows, digests, strict=True)], ROUTES)
    assert (len(found.rows), found.noted) == (3, {})


def test_options_are_known_by_name_in_whatever_order_the_log_has_them() -> None:
    rows = [replace(row, candidates=("cherry", "apple", "banana")) for row in logged(240)]
    optimizer = RouteFinetune()
    assert accuracy(optimizer.compile(Shop(), feedback=rows)) > 0.95
    assert optimizer.report.set_aside == {}


def test_a_row_without_a_route_is_for_the_only_one_that_decides_its_field() -> None:
    rows = logged(1, route="")
    assert [row.route for row in logged_feedback(rows, ROUTES).rows] == ["self.clerk"]
    two = {"self.clerk": fruit_route(), "self.other": fruit_route()}
    assert logged_feedback(rows, two).set_aside == {"rows that may be of several routes": 1}
    assert [row.route for row in logged_feedback(logged(1), two).rows] == ["self.clerk"]


def test_rows_that_need_no_reward_are_kept_without_one() -> None:
    rows = [replace(row, source=source, reward=None, propensity=None) for row, source in
            zip(logged(3), ("label", "synthetic", "teacher"), strict=True)]  # fmt: skip
    found = logged_feedback(rows, ROUTES)
    assert (found.rows, found.set_aside, found.noted) == (rows, {}, {})


def test_a_log_cut_in_the_middle_of_a_line_is_used_up_to_there(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    write_feedback(logged(240), path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-40])
    optimizer = RouteFinetune()
    assert accuracy(optimizer.compile(Shop(), feedback=path)) > 0.95
    assert optimizer.report.rows == {"log": 239}
    assert optimizer.report.set_aside == {"in the log: damaged line": 1}
    assert "1 in the log: damaged line" in str(optimizer.report)


def test_a_reward_in_a_file_that_is_no_number_is_an_error_row(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    rows = logged(3)
    write_feedback(rows, path)
    text = path.read_text().replace('"reward": 1.0', '"reward": NaN').replace('"reward": 0.0', '"reward": NaN', 1)
    path.write_text(text)
    found = logged_feedback(path, ROUTES)
    count = text.count("NaN")
    assert count >= 1
    assert found.set_aside == {"rows with an error in place of a reward": count}
    assert len(found.rows) == 3 - count


def test_every_kind_of_bad_row_at_once_leaves_the_good_ones(tmp_path: Path) -> None:
    bad = [
        {"reward": None}, {"reward": math.nan}, {"candidates": ("apple", "pear")}, {"field": "colour"},
        {"propensity": 0.0}, {"propensity": 1.5}, {"encoder": "00"},
    ]  # fmt: skip
    rows = logged(240) + [replace(row, **change) for row, change in zip(logged(7, seed=5), bad, strict=True)]
    path = tmp_path / "log.jsonl"
    write_feedback(rows, path)
    path.write_bytes(path.read_bytes() + b'{"source": "log", "exam')
    optimizer = RouteFinetune()
    assert accuracy(optimizer.compile(Shop(), feedback=path)) > 0.95
    assert optimizer.report.rows == {"log": 243}
    assert optimizer.report.set_aside == {
        "in the log: damaged line": 1,
        "rows without a reward": 1,
        "rows with an error in place of a reward": 1,
        "rows from other options": 1,
        "rows of a field that no route decides": 1,
    }
    assert sum(optimizer.report.noted.values()) == 3


def test_a_log_of_nothing_usable_says_why(tmp_path: Path) -> None:
    rows = [replace(row, reward=None) for row in logged(4)]
    with pytest.raises(RouteError, match=r"Nothing was learned.*rows without a reward': 4"):
        RouteFinetune().compile(Shop(), feedback=rows)
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(RouteError, match="holds no usable feedback row: it is empty"):
        RouteFinetune().compile(Shop(), feedback=tmp_path / "empty.jsonl")
    with pytest.raises(FileNotFoundError):
        RouteFinetune().compile(Shop(), feedback=tmp_path / "none.jsonl")


def tried(text: str, chosen: str, reward: float) -> Feedback:
    """A row of a log that does not know the examples."""
    return Feedback("log", text_key(text), "self.clerk", "fruit", text, tuple(FRUIT), chosen, 1.0, reward)


def test_a_log_settles_the_examples_it_speaks_of() -> None:
    trainset = fruit_requests(30, seed=1)
    rows = [tried(example.request, example.wanted, 1.0) for example in trainset]
    optimizer = RouteFinetune(right_fruit)
    optimizer.compile(Shop(), trainset=trainset, feedback=rows)
    assert optimizer.report.rollouts == 0


def test_what_a_log_saw_fail_is_tried_with_another_option() -> None:
    trainset = fruit_requests(30, seed=1)
    wrong = {"apple": "banana", "banana": "cherry", "cherry": "apple"}
    rows = [tried(example.request, wrong[example.wanted], 0.0) for example in trainset]
    optimizer = RouteFinetune(right_fruit)
    optimizer.compile(Shop(), trainset=trainset, feedback=rows)
    chosen = {(row.text, row.chosen) for row in optimizer.feedback if row.source == "rollout"}
    assert chosen
    assert not chosen & {(row.text, row.chosen) for row in rows}
