"""An audit warns when a guard's promise is broken, seldom when it is not, and changes nothing that the route does."""

import asyncio
import json
import logging
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cloudpickle
import dspy
import pytest

from dspy_router import DifferentiableRoute, RouteError, RouteFinetune, record_decisions
from dspy_router.guarding.auditing import Audit
from dspy_router.learning.audit import RunningAudit
from dspy_router.overrides import explore_decisions
from tests.guarding.test_guard import CALLS, Planner, mixed
from tests.programs import HINTS, Shop, fruit_requests, fruit_route, right_fruit

KEPT = "pie please now a"  # an apple
DECLINED = "weather taxi poem"


@pytest.fixture(scope="module")
def guarded() -> DifferentiableRoute:
    route = RouteFinetune().compile(fruit_route(), trainset=fruit_requests(600, seed=8, label=True))
    assert isinstance(route, DifferentiableRoute)
    route.guard(mixed(600, seed=1), metric=right_fruit, risk=0.05, delta=0.05)
    return route


@pytest.fixture
def route(guarded: DifferentiableRoute) -> DifferentiableRoute:
    copied = guarded.deepcopy()
    assert isinstance(copied, DifferentiableRoute)
    return copied


def losing(share: float, *, seed: int) -> Callable[..., bool]:
    """A judge that finds so many decisions wrong."""
    draws = random.Random(seed)
    return lambda example, prediction: draws.random() >= share


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.levelno == logging.WARNING]


# The alarm


def test_at_exactly_the_promised_risk_an_alarm_is_rare(route: DifferentiableRoute) -> None:
    alarms = 0
    for seed in range(40):
        audit = route.audit(judge=losing(0.05, seed=seed), share=1.0, alpha=0.05)
        route.batch([{"request": KEPT}] * 200)
        assert audit.report.rows == 200
        alarms += audit.alarmed
    # Of 40 at most 5 %: more than 6 alarms come once in 300 times.
    assert alarms <= 6


def test_a_broken_promise_is_warned_of_once(route: DifferentiableRoute, caplog: pytest.LogCaptureFixture) -> None:
    audit = route.audit(judge=losing(0.3, seed=0), share=1.0)
    route.batch([{"request": KEPT}] * 200)
    assert audit.alarmed
    [warning] = warnings(caplog)
    assert "no longer holds. Decisions of 'fruit' lose more than 0.05 on average" in warning
    report = audit.report
    assert (report.calls, report.kept, report.drawn, report.rows, report.alarmed) == (200, 200, 200, 200, True)
    assert report.loss == pytest.approx(0.3, abs=0.1)
    assert report.wealth >= 20
    assert "judged (<lambda>)" in str(report)
    assert "judged (&lt;lambda&gt;)" in report._repr_html_()
    assert json.loads(json.dumps(report.to_dict()))["rows"] == 200


def test_a_promise_that_the_requests_break_is_seen_in_the_rewards(route: DifferentiableRoute) -> None:
    # What was a hint at an apple is one at a cherry now; the route is as sure as before.
    audit = route.audit(judge="rewards", share=0.5, seed=0)
    for example in mixed(400, seed=3):
        prediction = route(**example.inputs())
        wanted = "cherry" if any(hint in example.request.split() for hint in HINTS["apple"]) else example.wanted
        audit.observe(prediction.decision.id, prediction.fruit == wanted)
    assert audit.alarmed
    assert audit.report.drift.p_value > 0.001  # nothing shows in the inputs


# What judges


def test_rewards_of_drawn_calls_are_used_once_and_others_ignored(route: DifferentiableRoute) -> None:
    audit = route.audit(judge="rewards", share=0.3, seed=0)
    ids = [route(request=KEPT).decision.id for _ in range(400)]
    drawn = [decision_id for decision_id in ids if audit.waits_for(decision_id)]
    assert 80 < len(drawn) < 160
    assert audit.report.waiting == audit.report.drawn == len(drawn)
    assert [decision_id for decision_id in ids if audit.observe(decision_id, 0.75)] == drawn
    assert not any(audit.observe(decision_id, 0.75) for decision_id in [*drawn, "unheard of"])
    assert (audit.report.rows, audit.report.waiting, audit.report.loss) == (len(drawn), 0, pytest.approx(0.25))


def test_the_oldest_of_too_many_without_a_reward_are_given_up(
    route: DifferentiableRoute, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dspy_router.guarding.auditing.MOST_WAITING", 3)
    audit = route.audit(judge="rewards", share=1.0)
    ids = [route(request=KEPT).decision.id for _ in range(5)]
    assert [audit.waits_for(decision_id) for decision_id in ids] == [False, False, True, True, True]
    assert (audit.report.drawn, audit.report.waiting) == (5, 3)
    assert "2 (0 failed)" in str(audit.report)


def test_a_call_of_several_fields_is_judged_once(route: DifferentiableRoute) -> None:
    pair = DifferentiableRoute(
        "request -> fruit: Literal['apple', 'banana'], urgent: bool", encoder=route.encoder, on_abstain="none"
    )
    right = [dspy.Example(request=f"apple {number}").with_inputs("request") for number in range(200)]
    pair.guard(right, metric=lambda example, prediction: 1.0, risk=0.05)
    audit = pair.audit(judge="rewards", share=1.0)
    decisions = pair(request="apple 7").decisions
    assert audit.report.waiting == 1
    assert [audit.observe(decision.id, True) for decision in decisions.values()] == [True, False]


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize(("request_", "decided", "loss"), [(KEPT, "apple", 1.0), ("stone now a the", "cherry", 0.0)])
def test_the_fallback_judges_and_the_answer_stays(
    route: DifferentiableRoute, call: Callable[..., Any], request_: str, decided: str, loss: float
) -> None:
    route.fallback = Planner()  # it always says cherry
    audit = route.audit(share=1.0)
    prediction = call(route, request=request_)
    assert prediction.fruit == decided
    assert "why" not in prediction
    assert route.fallback.asked == [request_]
    assert (audit.report.rows, audit.report.loss) == (1, loss)


def test_only_a_share_is_sent_to_the_fallback(route: DifferentiableRoute) -> None:
    route.fallback = Planner()
    audit = route.audit(share=0.05, seed=0)
    route.batch([{"request": KEPT}] * 1000)
    assert 25 <= len(route.fallback.asked) == audit.report.rows <= 80


def test_the_event_loop_is_free_while_the_fallback_thinks(route: DifferentiableRoute) -> None:
    class Slow(dspy.Module):
        def forward(self, request: str) -> dspy.Prediction:
            time.sleep(0.3)
            return dspy.Prediction(fruit="apple")

    async def serve() -> float:
        call = asyncio.create_task(route.acall(request=KEPT))
        longest, before = 0.0, time.perf_counter()
        while not call.done():
            await asyncio.sleep(0.005)
            longest, before = max(longest, time.perf_counter() - before), time.perf_counter()
        return longest

    route(request=KEPT)
    route.fallback = Slow()
    audit = route.audit(share=1.0)
    assert asyncio.run(serve()) < 0.2
    assert audit.report.rows == 1


def test_what_the_judge_does_is_no_part_of_the_run(route: DifferentiableRoute, scripted_lm: Callable[..., Any]) -> None:
    server = scripted_lm(lambda text: "[[ ## fruit ## ]]\napple\n\n[[ ## completed ## ]]")

    class Old(dspy.Module):
        def __init__(self) -> None:
            super().__init__()
            self.plan = dspy.Predict("request -> fruit")
            self.route = fruit_route()

        def forward(self, request: str) -> dspy.Prediction:
            self.route(request=request)
            return self.plan(request=request)

    route.fallback = Old()
    audit = route.audit(share=1.0)
    with dspy.context(lm=server.lm, trace=[]), record_decisions() as decisions:
        route(request=KEPT)
        assert dspy.settings.trace == []
    assert len(server.requests) == 1
    assert [decision.name for decision in decisions] == ["apple"]
    assert (audit.report.rows, audit.report.loss) == (1, 0.0)


@pytest.mark.parametrize(
    ("judge", "said"),
    [
        (lambda example, prediction: 1 / 0, "ZeroDivisionError"),
        (lambda example, prediction: 7, r"The reward is 7.0: an audit needs rewards in [0, 1]"),
    ],
)
def test_a_judge_that_fails_is_counted_and_harms_no_call(
    route: DifferentiableRoute, caplog: pytest.LogCaptureFixture, judge: Callable[..., Any], said: str
) -> None:
    audit = route.audit(judge=judge, share=1.0)
    assert [prediction.fruit for prediction in route.batch([{"request": KEPT}] * 3)] == ["apple"] * 3
    [warning] = warnings(caplog)
    assert said in warning
    assert (audit.report.rows, audit.report.failed) == (0, 3)
    assert "3 (3 failed)" in str(audit.report)


# What is counted


def test_declined_and_explored_calls_are_not_judged(route: DifferentiableRoute) -> None:
    audit = route.audit(judge=lambda example, prediction: True, share=1.0)
    route(request=DECLINED)
    with explore_decisions(1.0, seed=0):
        route(request=KEPT)
    route(request=KEPT)
    report = audit.report
    assert (report.calls, report.kept, report.rows) == (3, 1, 1)
    assert report.drift.recent_rows == 3


def test_another_guard_is_set_without_the_audit_watching(
    route: DifferentiableRoute, caplog: pytest.LogCaptureFixture
) -> None:
    audit = route.audit(judge=lambda example, prediction: True, share=1.0)
    route.guard(mixed(600, seed=4), metric=right_fruit, risk=0.04)
    assert audit.report.calls == 0
    route(request=KEPT)
    assert audit.stopped
    assert "no longer makes the promise" in warnings(caplog)[0]
    assert "The audit has ended." in str(audit.report)
    assert route.audit(judge="rewards").report.risk == 0.04


def test_a_change_of_options_ends_the_audit(route: DifferentiableRoute) -> None:
    audit = route.audit(judge=lambda example, prediction: True, share=1.0)
    route.add_tools(["date"])
    route(request=KEPT)
    assert audit.stopped
    with pytest.raises(RouteError, match=r"promises nothing that could be audited: .*has changed since"):
        route.audit(judge="rewards")


def test_drift_of_the_inputs_is_reported(route: DifferentiableRoute) -> None:
    audit = route.audit(judge="rewards")
    assert audit.report.drift is None
    for example in mixed(200, seed=5):
        route(**example.inputs())
    assert audit.report.drift.p_value > 0.01
    for number in range(60):
        route(request=f"{DECLINED} {number}")
    found = audit.report.drift
    assert (found.lower, found.reference_rows, found.recent_rows) == (True, 500, 260)
    assert found.p_value < 0.01
    assert "less familiar than the reference" in str(audit.report)


def test_drift_is_warned_of_once(route: DifferentiableRoute, caplog: pytest.LogCaptureFixture) -> None:
    audit = route.audit(judge="rewards")
    route.batch([{"request": example.request} for example in mixed(500, seed=5)])
    assert not audit.report.drifted
    assert not warnings(caplog)
    strange = [{"request": f"{DECLINED} {number}"} for number in range(250)]
    route.batch([*({"request": example.request} for example in mixed(250, seed=6)), *strange, *strange])
    route.batch([*strange, *strange])
    [warning] = warnings(caplog)
    assert "are no longer those its guard was set with. Inputs: Kolmogorov-Smirnov" in warning
    assert audit.report.drifted
    assert "such an alarm is false with probability 0.05 at most" in str(audit.report)
    route.batch([{"request": example.request} for example in mixed(500, seed=7)])
    assert audit.report.drift.p_value > 0.001  # of the latest calls; the alarm stays
    again = route.audit(judge="rewards", resume=json.loads(json.dumps(audit.to_dict())))
    assert again.report.drifted
    route.batch([*strange, *strange])
    assert len(warnings(caplog)) == 1


def test_calls_from_many_threads_are_all_counted(route: DifferentiableRoute) -> None:
    audit = route.audit(judge=lambda example, prediction: True, share=1.0)
    threads = [threading.Thread(target=lambda: [route(request=KEPT) for _ in range(50)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (audit.report.calls, audit.report.rows) == (400, 400)


def test_a_copy_of_the_route_is_not_audited(route: DifferentiableRoute) -> None:
    audit = route.audit(judge="rewards", share=1.0)
    shop = Shop(route).deepcopy()
    shop(request=KEPT)
    cloudpickle.loads(cloudpickle.dumps(route))(request=KEPT)
    assert audit.report.calls == 0
    route(request=KEPT)
    assert audit.report.calls == 1


def test_an_audit_that_was_stopped_takes_the_rewards_of_what_it_drew(route: DifferentiableRoute) -> None:
    audit = route.audit(judge="rewards", share=1.0)
    drawn = route(request=KEPT).decision.id
    audit.stop()
    later = route(request=KEPT).decision.id
    assert (audit.observe(drawn, 1.0), audit.observe(later, 1.0)) == (True, False)
    assert audit.report.stopped


# After a restart


def test_a_restarted_server_goes_on_where_it_was(route: DifferentiableRoute, tmp_path: Path) -> None:
    route.save(tmp_path / "route.json")
    before = route.audit(judge="rewards", share=1.0)
    ids = [route(request=KEPT).decision.id for _ in range(30)]
    for decision_id in ids[:20]:
        before.observe(decision_id, decision_id != ids[3])
    saved = json.loads(json.dumps(before.to_dict()))

    fresh = fruit_route()
    fresh.load(tmp_path / "route.json")
    after = fresh.audit(judge="rewards", share=1.0, resume=saved)
    assert after.report == before.report
    for audit in (before, after):
        assert all(audit.observe(decision_id, 0.0) for decision_id in ids[20:])
    assert after.report == before.report
    assert after.alarmed


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        ({}, {"alpha": 0.01}, r"alpha=0.01: the saved audit has 0.05 and 0.05, which must stay"),
        ({}, {"risk": 0.1}, r"risk=0.1, .* which must stay"),
        ({"promise": ["other", 0.0]}, {}, "that of another promise"),
        ({"test": {}}, {}, "cannot be read .*'risk'"),
        ({"counts": None}, {}, "cannot be read"),
        ({"test": {**RunningAudit(0.05).to_dict(), "rows": 4, "lost": 9}}, {}, "mean loss 2.25"),
    ],
)
def test_a_saved_audit_that_does_not_fit_is_refused(
    route: DifferentiableRoute, change: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    audit = route.audit(judge="rewards")
    with pytest.raises(RouteError, match=message):
        route.audit(judge="rewards", resume={**audit.to_dict(), **change}, **settings)
    assert route._audit is audit


# What cannot be audited


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "judge='fallback', but .* has no fallback.*judge='rewards'"),
        ({"judge": "me"}, "judge='me'"),
        ({"judge": "rewards", "share": 0.0}, "share=0.0"),
        ({"judge": "rewards", "share": 1.5}, "share=1.5"),
        ({"judge": "rewards", "alpha": 0.0}, "alpha=0.0"),
        ({"judge": "rewards", "risk": 1.0}, "risk=1.0"),
    ],
)
def test_settings_out_of_range_are_quoted(route: DifferentiableRoute, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RouteError, match=message):
        route.audit(**settings)


def test_without_a_promise_there_is_nothing_to_audit(route: DifferentiableRoute) -> None:
    with pytest.raises(RouteError, match=r"has no guard.*Call route.guard\(\.\.\.\) first"):
        fruit_route().audit(judge="rewards")
    route.guard(mixed(600, seed=1), metric=lambda example, prediction: 0.0, risk=0.02)
    with pytest.raises(RouteError, match="declines everything"):
        route.audit(judge="rewards")


def test_a_reward_that_is_none_is_refused_and_the_call_still_waits(route: DifferentiableRoute) -> None:
    audit = route.audit(judge="rewards", share=1.0)
    drawn = route(request=KEPT).decision.id
    for reward, message in ((1.5, "reward is 1.5"), (float("nan"), "nan"), ("good", "'good'")):
        with pytest.raises(RouteError, match=message):
            audit.observe(drawn, reward)
    assert audit.waits_for(drawn)
    with pytest.raises(RouteError, match="judged by 'fallback'"):
        Audit(_with_fallback(route)).observe(drawn, 1.0)


def _with_fallback(route: DifferentiableRoute) -> DifferentiableRoute:
    route.fallback = Planner()
    return route
