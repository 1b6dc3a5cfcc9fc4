import uuid
from pathlib import Path
from typing import Any

import dspy
import pytest

from dspy_router import RouteError
from dspy_router.optimizers.override import Site
from dspy_router.optimizers.rollout_log import RolloutLog
from dspy_router.optimizers.rollouts import Job, Rollout, RolloutRunner, keyed, reward_of
from dspy_router.optimizers.runs import find_routes
from tests.programs import FRUIT, Shop, fruit_requests, right_fruit

SITE = Site("self.clerk", "fruit", 0)


def runner(program: dspy.Module, **settings: object) -> RolloutRunner:
    defaults = {"num_threads": 2, "failure_score": 0.0, "max_errors": 5, **settings}
    return RolloutRunner(program, find_routes(program), right_fruit, **defaults)


def test_a_forced_option_is_taken_whatever_the_policy_says() -> None:
    examples = keyed(fruit_requests(3))
    rollouts = runner(Shop()).run([Job(index, ((SITE, "cherry"),)) for index in range(3)], examples, phase="train")
    assert [rollout.decisions[0].chosen for rollout in rollouts] == ["cherry"] * 3
    assert [rollout.reward for rollout in rollouts] == [0.0, 0.0, 1.0]
    assert [rollout.example for rollout in rollouts] == [entry.key for entry in examples]


def test_each_call_of_a_loop_is_a_site_of_its_own() -> None:
    class Twice(Shop):
        def forward(self, request: str) -> dspy.Prediction:
            self.clerk(request=request)
            return super().forward(request=request)

    second = Site("self.clerk", "fruit", 1)
    [rollout] = runner(Twice()).run([Job(0, ((second, "cherry"),))], keyed(fruit_requests(1)), phase="train")
    assert [(decision.site, decision.chosen == "cherry") for decision in rollout.decisions][1] == (second, True)
    assert rollout.decisions[0].site == SITE


def test_a_rollout_survives_its_json() -> None:
    [rollout] = runner(Shop()).run([Job(0, ((SITE, "apple"),))], keyed(fruit_requests(1)), phase="train")
    assert Rollout.from_json(rollout.to_json()) == rollout


def test_equal_examples_have_keys_of_their_own() -> None:
    example = dspy.Example(request="x").with_inputs("request")
    keys = [entry.key for entry in keyed([example, example, dspy.Example(request="y").with_inputs("request")])]
    assert len(set(keys)) == 3
    assert keys == [entry.key for entry in keyed([example, example, dspy.Example(request="y").with_inputs("request")])]


def test_a_run_that_raises_is_kept_with_what_it_decided() -> None:
    class Failing(Shop):
        def forward(self, request: str) -> dspy.Prediction:
            super().forward(request=request)
            raise LookupError("no such shelf")

    own = runner(Failing(), max_errors=100, failure_score=-1.0)
    [rollout] = own.run([Job(0)], keyed(fruit_requests(1)), phase="train")
    assert (rollout.reward, rollout.error) == (-1.0, "LookupError: no such shelf")
    assert len(rollout.decisions) == 1
    assert own.finished == [rollout]


def test_a_rollout_that_cannot_be_kept_is_an_error() -> None:
    def full(rollout: Rollout) -> None:
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space left"):
        runner(Shop()).run([Job(0), Job(1)], keyed(fruit_requests(2)), phase="train", on_done=full)


@pytest.mark.parametrize(
    ("value", "reward"), [(True, 1.0), (0.25, 0.25), (dspy.Prediction(score=0.5), 0.5), ("2", 2.0)]
)
def test_metrics_may_return_what_dspy_lets_them(value: object, reward: float) -> None:
    assert reward_of(value) == reward


def test_a_line_cut_short_is_run_again(tmp_path: Path) -> None:
    examples = keyed(fruit_requests(2))
    first = runner(Shop(), log=RolloutLog(tmp_path), num_threads=1)
    first.run([Job(0), Job(1)], examples, phase="train")
    path = tmp_path / "rollouts.jsonl"
    path.write_text(path.read_text()[:-40])
    log = RolloutLog(tmp_path)
    assert len(log) == 1
    runner(Shop(), log=log, num_threads=1).run([Job(0), Job(1)], examples, phase="train")
    assert len(RolloutLog(tmp_path)) == 2
    assert len(path.read_text().splitlines()) == 3


def test_rollouts_kept_from_before_are_told_of_as_their_rewards_are_not_asked_for_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    runner(Shop(), log=RolloutLog(tmp_path)).run([Job(0), Job(1)], keyed(fruit_requests(2)), phase="train")
    assert not caplog.text
    RolloutLog(tmp_path)
    assert "holds 2 rollouts" in caplog.text
    assert "Give another metric or another program a log_dir of its own" in caplog.text


def test_a_program_without_routes_is_refused() -> None:
    with pytest.raises(RouteError, match="The program Predict holds no DifferentiableRoute"):
        find_routes(dspy.Predict("a -> b"))


def test_identical_lm_calls_of_different_rollouts_hit_dspys_cache(scripted_lm: Any) -> None:
    class Talking(Shop):
        def __init__(self) -> None:
            super().__init__()
            self.greet = dspy.Predict("request -> reply")

        def forward(self, request: str) -> dspy.Prediction:
            self.greet(request=request)
            return super().forward(request=request)

    server = scripted_lm(lambda text: "[[ ## reply ## ]]\nhello\n\n[[ ## completed ## ]]")
    lm = server.lm.copy(cache=True)
    request = f"pie {uuid.uuid4().hex}"  # DSPy's cache outlives the test
    examples = keyed([dspy.Example(request=request, wanted="cherry").with_inputs("request")])
    jobs = [Job(0, ((SITE, option),), look=look) for look, option in enumerate(FRUIT)]
    with dspy.context(lm=lm):
        rollouts = runner(Talking(), num_threads=1).run(jobs, examples, phase="train")
    assert [rollout.reward for rollout in rollouts] == [0.0, 0.0, 1.0]
    assert len(server.requests) == 1
