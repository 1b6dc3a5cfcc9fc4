import asyncio
import hashlib
import logging
import math
import multiprocessing
import multiprocessing.synchronize
import time
from pathlib import Path

import dspy
import pytest
from filelock import FileLock

from dspy_router import Feedback, record_decisions
from dspy_router.decisions import choosing
from dspy_router.feedback import read_feedback
from dspy_router.logs.feedback_log import KEPT_DECISIONS, REQUEST_LOCK_SECONDS, FeedbackLog
from tests.programs import Shop, fruit_route


def test_blocks_nest_and_end() -> None:
    route = fruit_route()
    with record_decisions() as outer:
        route(request="apple")
        with record_decisions() as inner:
            route(request="banana")
    route(request="cherry")
    assert [decision.name for decision in outer] == ["apple", "banana"]
    assert [decision.name for decision in inner] == ["banana"]
    assert len({decision.id for decision in outer}) == 2


def test_dspy_threads_and_async_tasks_are_recorded() -> None:
    shop = Shop()
    examples = [dspy.Example(request=f"apple {number}").with_inputs("request") for number in range(12)]
    with record_decisions() as decisions:
        shop.batch(examples, num_threads=4, disable_progress_bar=True)

        async def calls() -> None:
            await asyncio.gather(*(shop.clerk.acall(request=f"cherry {number}") for number in range(5)))

        asyncio.run(calls())
    assert sorted(decision.name for decision in decisions) == ["apple"] * 12 + ["cherry"] * 5


def test_a_chooser_decides_and_names_its_propensity() -> None:
    class Second:
        def choose(
            self, route: object, field: str, probabilities: dict[str, float], selected: str
        ) -> tuple[int, float]:
            assert (field, selected) == ("fruit", "apple")
            return 1, 0.25

    route = fruit_route()
    with choosing(Second()):
        chosen = route(request="apple")
    assert (chosen.fruit, chosen.decision.propensity) == ("banana", 0.25)
    assert chosen.confidence == chosen.probabilities["banana"] < 0.5
    assert route(request="apple").decision.propensity == 1.0


class Fair(dspy.Module):
    """Two shops, the first of which is asked twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Shop(), Shop()

    def forward(self, request: str) -> dspy.Prediction:
        self.first(request=request)
        self.second(request=request)
        return self.first(request=request + " again")


@pytest.fixture
def log(tmp_path: Path) -> FeedbackLog:
    return FeedbackLog(tmp_path / "logs" / "decisions.jsonl")


def test_a_decision_is_logged_as_a_row_with_all_that_is_known(log: FeedbackLog) -> None:
    shop = Shop()
    with record_decisions(path=log.path, program=shop) as run:
        shop(request="apple please")
    (decision,) = run
    assert read_feedback(log.path) == [
        Feedback(
            source="log",
            example=hashlib.sha256(b"apple please").hexdigest()[:16],
            route="self.clerk",
            field="fruit",
            text="apple please",
            candidates=("apple", "banana", "cherry"),
            chosen="apple",
            propensity=1.0,
            reward=None,
            probabilities=dict(decision.probabilities),
            run=run.run,
            id=decision.id,
            encoder=shop.clerk.encoder.fingerprint.weights[:16],
        )
    ]


def test_a_run_is_rewarded_after_its_block(log: FeedbackLog) -> None:
    shop, fair = Shop(), Fair()
    with record_decisions(log, program=shop) as lone:
        shop(request="apple")
    with record_decisions(log, program=fair) as several:
        fair(request="banana")
    lone.reward(True, cost=0.01)
    several.reward(0.25)
    rows = log.read().rows
    assert [(row.route, row.occurrence, row.reward, row.sole, row.cost) for row in rows] == [
        ("self.clerk", 0, 1.0, True, 0.01),
        ("self.first.clerk", 0, 0.25, False, None),
        ("self.second.clerk", 0, 0.25, False, None),
        ("self.first.clerk", 1, 0.25, False, None),
    ]
    assert [row.run for row in rows] == [lone.run] + [several.run] * 3


def test_one_decision_of_an_open_block_is_rewarded_by_its_id(log: FeedbackLog) -> None:
    route = fruit_route()
    with record_decisions(log) as run:
        first, _ = route(request="apple"), route(request="cherry")
        run.reward(math.nan, decision=first.decision.id)
        run.reward(0.5, decision=first.decision.id)
        assert [(row.route, row.reward, row.sole) for row in log.read().rows] == [("", 0.5, True), ("", None, False)]


def test_a_run_without_a_decision_leaves_no_reward(log: FeedbackLog) -> None:
    with record_decisions(log) as run:
        pass
    run.reward(1.0)
    assert not log.path.exists()


def test_a_logged_run_is_a_sequence_of_its_latest_decisions(log: FeedbackLog) -> None:
    route = fruit_route()
    with record_decisions(log) as run:
        examples = [dspy.Example(request=f"apple {number}").with_inputs("request") for number in range(KEPT_DECISIONS)]
        route.batch(examples)
        route(request="cherry")
    assert len(run) == len(run.decisions) == KEPT_DECISIONS
    assert (run[0].text, run[-1].text, [decision.name for decision in run[-2:]]) == (
        "apple 1",
        "cherry",
        ["apple", "cherry"],
    )
    assert list(run) == run.decisions
    assert len(log.read().rows) == KEPT_DECISIONS + 1


def test_threads_and_async_tasks_are_logged_each_in_the_run_of_its_request(log: FeedbackLog) -> None:
    shop = Shop()

    def serve(request: str) -> None:
        with record_decisions(log, program=shop) as run:
            shop(request=request)
        run.reward(1.0)

    dspy.Parallel(num_threads=4, disable_progress_bar=True)([(serve, (f"apple {number}",)) for number in range(12)])

    async def aserve(request: str) -> None:
        with record_decisions(log, program=shop) as run:
            await asyncio.gather(shop.clerk.acall(request=request), shop.clerk.acall(request=request + " too"))
        run.reward(0.5)

    async def serve_all() -> None:
        await asyncio.gather(*(aserve(f"cherry {number}") for number in range(5)))

    asyncio.run(serve_all())
    table = log.read()
    assert not table.skipped
    assert (
        sorted((row.chosen, row.reward, row.sole) for row in table.rows)
        == [("apple", 1.0, True)] * 12 + [("cherry", 0.5, False)] * 10
    )
    assert len({row.run for row in table.rows}) == 17
    assert sorted(row.occurrence for row in table.rows) == [0] * 17 + [1] * 5


def test_where_logged_blocks_nest_a_decision_belongs_to_the_inner_run(log: FeedbackLog, tmp_path: Path) -> None:
    route = fruit_route()
    with record_decisions(tmp_path / "other.jsonl") as other, record_decisions(log) as outer:
        route(request="apple")
        with record_decisions(log) as inner, record_decisions() as decisions:
            route(request="cherry")
    assert [decision.name for decision in other] == [decision.name for decision in outer] == ["apple", "cherry"]
    assert [decision.name for decision in inner] == [decision.name for decision in decisions] == ["cherry"]
    assert [(row.chosen, row.run) for row in log.read().rows] == [("apple", outer.run), ("cherry", inner.run)]
    assert {row.run for row in read_feedback(tmp_path / "other.jsonl")} == {other.run}


def test_a_log_that_cannot_be_written_is_warned_of_once_and_never_raises(
    log: FeedbackLog, caplog: pytest.LogCaptureFixture
) -> None:
    route = fruit_route()
    log.path.mkdir(parents=True)  # a folder stands where the file should
    with caplog.at_level(logging.WARNING), record_decisions(log) as run:
        assert [route(request="apple").fruit for _ in range(3)] == ["apple"] * 3
        run.reward(1.0)
    assert [record.getMessage() for record in caplog.records if "cannot be written" in record.getMessage()] == [
        f"{log.path} cannot be written (IsADirectoryError: [Errno 21] Is a directory: '{log.path}'). "
        "Decisions and rewards are dropped until it can be."
    ]
    log.path.rmdir()
    with record_decisions(log) as run:
        route(request="cherry")
    assert [row.chosen for row in log.read().rows] == ["cherry"]


def hold(path: str, held: "multiprocessing.synchronize.Event", done: "multiprocessing.synchronize.Event") -> None:
    with FileLock(path):
        held.set()
        done.wait(30)


def test_a_lock_that_another_process_keeps_delays_one_request_at_most(log: FeedbackLog) -> None:
    route = fruit_route()
    route(request="apple")
    log.path.parent.mkdir()
    context = multiprocessing.get_context("spawn")
    held, done = context.Event(), context.Event()
    process = context.Process(target=hold, args=(f"{log.path}.lock", held, done))
    process.start()
    assert held.wait(30)
    waits = []
    with record_decisions(log) as run:
        for _ in range(5):
            start = time.perf_counter()
            route(request="apple")
            waits.append(time.perf_counter() - start)
        done.set()
        process.join()
        route(request="cherry")
    run.reward(1.0)
    assert waits[0] > REQUEST_LOCK_SECONDS
    assert sum(waits[1:]) < REQUEST_LOCK_SECONDS
    (row,) = log.read().rows
    assert (row.chosen, row.reward, row.sole) == ("cherry", 1.0, False)  # the run had six decisions


def test_without_a_path_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with record_decisions() as decisions:
        fruit_route()(request="apple")
    assert isinstance(decisions, list)
    assert not list(tmp_path.iterdir())
