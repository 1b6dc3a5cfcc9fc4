import json
import sys
from pathlib import Path
from typing import Any, Literal

import dspy
import pytest

from dspy_router import DifferentiableRoute, RouteError, RouteFinetune, TokenEncoder
from dspy_router.feedback import Feedback
from tests.conftest import bag_of_words
from tests.programs import FRUIT, PlannedShop, Shop, fruit_of, fruit_requests, fruit_route, right_fruit

TEST = fruit_requests(150, seed=9)


def accuracy(program: dspy.Module) -> float:
    return sum(right_fruit(example, program(request=example.request)) for example in TEST) / len(TEST)


def weights(program: dspy.Module) -> list[list[float]]:
    route = program if isinstance(program, DifferentiableRoute) else program.clerk
    return route.head["fruit"].weight.tolist()


def test_labels_train_a_route_and_leave_the_student_alone() -> None:
    route = fruit_route()
    before = weights(route)
    optimizer = RouteFinetune()
    trained = optimizer.compile(route, trainset=fruit_requests(90, seed=1, label=True))
    assert accuracy(trained) > 0.95 > 0.6 > accuracy(route)
    assert weights(route) == before
    assert optimizer.report.rows == {"label": 90}
    assert optimizer.report.rollouts == 0
    assert optimizer.report.kept == "trained"


def test_the_metric_alone_trains_a_program() -> None:
    optimizer = RouteFinetune(right_fruit)
    trained = optimizer.compile(Shop(), trainset=fruit_requests(90, seed=1))
    assert accuracy(trained) > 0.95
    assert 90 <= optimizer.report.rollouts <= 180
    assert all(row.source == "rollout" for row in optimizer.feedback)


def test_rollouts_stay_within_the_budget_and_teach_in_proportion() -> None:
    spent = []

    def metric(example: dspy.Example, prediction: dspy.Prediction) -> bool:
        spent.append(example)
        return right_fruit(example, prediction)

    for budget in (7, 50):
        spent.clear()
        optimizer = RouteFinetune(metric, max_metric_calls=budget)
        optimizer.compile(Shop(), trainset=fruit_requests(40))
        assert len(spent) == optimizer.report.rollouts == budget


def test_the_validation_set_counts_into_the_budget() -> None:
    optimizer = RouteFinetune(right_fruit, max_metric_calls=60)
    optimizer.compile(Shop(), trainset=fruit_requests(90), valset=fruit_requests(10, seed=3))
    assert optimizer.report.rollouts == 60
    assert optimizer.report.rows == {"rollout": 40}
    with pytest.raises(RouteError, match=r"max_metric_calls=19 does not cover scoring the 10 validation examples"):
        RouteFinetune(right_fruit, max_metric_calls=19).compile(
            Shop(), trainset=fruit_requests(9), valset=fruit_requests(10, seed=3)
        )


def test_rollouts_are_paid_only_for_what_no_label_settles() -> None:
    optimizer = RouteFinetune(right_fruit)
    trainset = fruit_requests(60, seed=1, label=True) + fruit_requests(30, seed=2)
    trained = optimizer.compile(fruit_route(), trainset=trainset)
    assert optimizer.report.rows["label"] == 60
    assert {row.text for row in optimizer.feedback if row.source == "rollout"} <= {e.request for e in trainset[60:]}
    assert accuracy(trained) > 0.95


def test_a_program_that_would_get_worse_keeps_the_students_weights() -> None:
    student = RouteFinetune().compile(fruit_route(), trainset=fruit_requests(90, seed=1, label=True))
    wrong = [
        dspy.Example(request=example.request, fruit=FRUIT[FRUIT.index(example.wanted) - 1]).with_inputs("request")
        for example in fruit_requests(60, seed=2)
    ]
    optimizer = RouteFinetune(right_fruit)
    kept = optimizer.compile(student, trainset=wrong, valset=fruit_requests(30, seed=4))
    assert weights(kept) == weights(student)
    report = optimizer.report
    assert report.kept == "student"
    assert report.validation_candidate < report.validation_before == report.validation_after
    assert "is worse than" in str(report)


def test_without_a_metric_the_labels_of_the_validation_set_guard() -> None:
    optimizer = RouteFinetune()
    optimizer.compile(
        fruit_route(), trainset=fruit_requests(90, label=True), valset=fruit_requests(30, seed=2, label=True)
    )
    assert optimizer.report.validation_after > 0.9 > optimizer.report.validation_before


def test_an_lm_planner_teaches_through_real_requests(scripted_lm: Any) -> None:
    server = scripted_lm(lambda text: f"[[ ## fruit ## ]]\n{fruit_of(text)}\n\n[[ ## completed ## ]]")
    optimizer = RouteFinetune()
    with dspy.context(lm=server.lm):
        trained = optimizer.compile(Shop(), trainset=fruit_requests(60, seed=1), teacher=PlannedShop())
    assert accuracy(trained) > 0.9
    assert len(server.requests) == 60
    assert optimizer.report.rows == {"teacher": 60}


def test_the_metric_refuses_a_teachers_wrong_runs(scripted_lm: Any) -> None:
    server = scripted_lm(lambda text: "[[ ## fruit ## ]]\nbanana\n\n[[ ## completed ## ]]")
    optimizer = RouteFinetune(right_fruit, max_metric_calls=120)
    with dspy.context(lm=server.lm):
        trained = optimizer.compile(Shop(), trainset=fruit_requests(60, seed=1), teacher=PlannedShop())
    assert optimizer.report.rows["teacher"] == 20
    assert optimizer.report.rows["rollout"] <= 60
    assert optimizer.report.set_aside["teacher runs the metric refused"] == 40
    assert accuracy(trained) > 0.9


def test_a_route_as_teacher_gives_its_probabilities() -> None:
    teacher = RouteFinetune().compile(fruit_route(), trainset=fruit_requests(90, seed=1, label=True))
    optimizer = RouteFinetune()
    student = DifferentiableRoute("request -> fruit", tools=FRUIT, encoder=bag_of_words)
    trained = optimizer.compile(student, trainset=fruit_requests(90, seed=2), teacher=teacher)
    assert accuracy(trained) > 0.95
    row = optimizer.feedback[0]
    assert row.probabilities == pytest.approx(dict(teacher(request=row.text).probabilities))


def test_a_decision_client_as_teacher_gives_its_probabilities() -> None:
    class Client:
        supports_decision_requests = True

        def __call__(self, state: dict, questions: dict) -> dict:
            fruit = fruit_of(state["inputs"]["request"])
            rest = {name: 0.1 for name in FRUIT if name != fruit}
            return {"fruit": {"probabilities": {fruit: 0.8, **rest}, "confidence": 0.8}}

    class Plan(dspy.Signature):
        request: str = dspy.InputField()
        fruit: Literal["apple", "banana", "cherry"] = dspy.OutputField(desc="what to sell")

    teacher = PlannedShop()
    teacher.clerk = dspy.Predict(Plan)
    teacher.clerk.lm = Client()
    optimizer = RouteFinetune()
    trained = optimizer.compile(Shop(), trainset=fruit_requests(60, seed=1), teacher=teacher)
    assert sorted(optimizer.feedback[0].probabilities.values()) == [0.1, 0.1, 0.8]
    assert accuracy(trained) > 0.9


def test_a_token_encoder_learns_with_its_head() -> None:
    route = DifferentiableRoute("request -> fruit", tools=FRUIT, encoder=TokenEncoder(32))
    trained = RouteFinetune().compile(route, trainset=fruit_requests(150, seed=1, label=True))
    assert accuracy(trained) > 0.95
    assert trained.encoder is not route.encoder


def test_a_seed_repeats_the_compile() -> None:
    def compiled(seed: int) -> list[list[float]]:
        return weights(RouteFinetune(right_fruit, max_metric_calls=50, seed=seed).compile(
            Shop(), trainset=fruit_requests(60)
        ))  # fmt: skip

    assert compiled(1) == compiled(1)
    assert compiled(1) != compiled(2)


def test_a_route_that_reads_what_the_program_makes_learns_from_it() -> None:
    class Translating(Shop):
        def forward(self, request: str) -> dspy.Prediction:
            # The route's input has the program's name for it, but another content.
            return super().forward(request=f"translated {request}")

    optimizer = RouteFinetune()
    optimizer.compile(Translating(), trainset=fruit_requests(30, label=True))
    assert len(optimizer.feedback) == 30
    assert all(row.text.startswith("translated ") for row in optimizer.feedback)


class Counter(dspy.Module):
    """Two routes in a row, one reward for the run."""

    def __init__(self) -> None:
        super().__init__()
        self.clerks = [fruit_route()]
        self.till = {"size": DifferentiableRoute("request -> size: Literal['small', 'large']", encoder=bag_of_words)}

    def forward(self, request: str) -> dspy.Prediction:
        return dspy.Prediction(
            fruit=self.clerks[0](request=request).fruit, size=self.till["size"](request=request).size
        )


def test_two_routes_learn_from_one_reward() -> None:
    def sized(count: int, seed: int) -> list[dspy.Example]:
        return [
            dspy.Example(
                request=f"{example.request} {'tiny' if index % 2 else 'huge'}",
                wanted=example.wanted,
                size_wanted="small" if index % 2 else "large",
            ).with_inputs("request")
            for index, example in enumerate(fruit_requests(count, seed=seed))
        ]

    def metric(example: dspy.Example, prediction: dspy.Prediction) -> bool:
        return prediction.fruit == example.wanted and prediction.size == example.size_wanted

    trained = RouteFinetune(metric, max_metric_calls=800).compile(Counter(), trainset=sized(180, seed=1))
    test = sized(90, seed=2)
    assert sum(metric(example, trained(request=example.request)) for example in test) / len(test) > 0.9


def test_several_fields_learn_from_their_labels() -> None:
    class Order(dspy.Signature):
        request: str = dspy.InputField()
        fruit: Literal["apple", "banana", "cherry"] = dspy.OutputField()
        many: bool = dspy.OutputField()

    examples = [
        dspy.Example(
            request=f"{example.request} {'dozens' if index % 2 else 'single'}",
            fruit=example.wanted,
            many=bool(index % 2),
        ).with_inputs("request")
        for index, example in enumerate(fruit_requests(120, seed=1))
    ]
    trained = RouteFinetune().compile(DifferentiableRoute(Order, encoder=bag_of_words), trainset=examples)
    prediction = trained(request="dozens with a stone please")
    assert (prediction.fruit, prediction.many) == ("cherry", True)


def test_a_graded_metric_prefers_the_better_option() -> None:
    def metric(example: dspy.Example, prediction: dspy.Prediction) -> dspy.Prediction:
        return dspy.Prediction(score=0.7 if prediction.fruit == example.wanted else 0.2, feedback="...")

    trained = RouteFinetune(metric, max_metric_calls=270).compile(Shop(), trainset=fruit_requests(90, seed=1))
    assert accuracy(trained) > 0.9


def test_a_metric_that_raises_stops_the_compile_and_keeps_what_was_paid() -> None:
    calls = []

    def metric(example: dspy.Example, prediction: dspy.Prediction) -> bool:
        calls.append(example)
        if len(calls) % 3 == 0:
            raise RuntimeError("the judge is ill")
        return True

    optimizer = RouteFinetune(metric, max_errors=4, num_threads=1)
    with pytest.raises(RouteError, match=r"4 rollouts that raised \(max_errors=4\); the last: RuntimeError: the judge"):
        optimizer.compile(Shop(), trainset=fruit_requests(40))
    assert len(calls) == 12


def test_a_few_errors_score_as_failures_and_are_kept() -> None:
    def metric(example: dspy.Example, prediction: dspy.Prediction) -> bool:
        if not right_fruit(example, prediction):
            raise RuntimeError("slipped")
        return right_fruit(example, prediction)

    optimizer = RouteFinetune(metric, max_errors=1000, failure_score=0.0)
    optimizer.compile(Shop(), trainset=fruit_requests(90))
    failed = [row for row in optimizer.feedback if row.error]
    assert failed
    assert all(row.reward == 0.0 and row.error == "RuntimeError: slipped" for row in failed)
    assert optimizer.report.errors == len(failed)


@pytest.mark.parametrize("value", [None, "good", float("nan"), float("inf")])
def test_a_metric_that_gives_no_number_is_an_error(value: object) -> None:
    with pytest.raises(RouteError, match="The metric returned"):
        RouteFinetune(lambda example, prediction: value, max_errors=2).compile(Shop(), trainset=fruit_requests(9))


def test_a_reward_that_is_no_number_is_kept_as_an_error_row_and_not_learned_from() -> None:
    def metric(example: dspy.Example, prediction: dspy.Prediction) -> float:
        return float("nan") if "now" in example.request.split() else float(right_fruit(example, prediction))

    optimizer = RouteFinetune(metric, max_errors=1000)
    trained = optimizer.compile(Shop(), trainset=fruit_requests(90, seed=1))
    broken = [row for row in optimizer.feedback if row.reward is None]
    assert broken
    assert all("nan" in str(row.error) and "now" in row.text for row in broken)
    assert optimizer.report.set_aside["rollouts whose metric gave no number"] == len(broken)
    assert accuracy(trained) > 0.9


def test_bad_training_data_is_named() -> None:
    route = fruit_route()
    with pytest.raises(RouteError, match="nothing in the trainset"):
        RouteFinetune().compile(route, trainset=[])
    with pytest.raises(RouteError, match=r"no dspy.Example with inputs.*with_inputs"):
        RouteFinetune().compile(route, trainset=[dspy.Example(request="x", fruit="apple")])
    strays = [
        dspy.Example(request="x", fruit=fruit).with_inputs("request") for fruit in ("kiwi", "kiwi", "plum", "apple")
    ]
    with pytest.raises(RouteError, match=r"3 labels are no option: 'kiwi' \(2\), 'plum' \(1\)"):
        RouteFinetune().compile(route, trainset=strays)
    with pytest.raises(RouteError, match="There is nothing to learn from"):
        RouteFinetune().compile(route, trainset=fruit_requests(3))
    with pytest.raises(RouteError, match="holds no DifferentiableRoute"):
        RouteFinetune().compile(dspy.Predict("a -> b"), trainset=fruit_requests(3))
    with pytest.raises(RouteError, match="max_metric_calls=-1 is negative"):
        RouteFinetune(right_fruit, max_metric_calls=-1)


@pytest.mark.parametrize(("earned", "budget"), [(0, 50), (0, 200), (0.5, 60)])
@pytest.mark.parametrize("valset", [None, fruit_requests(10, seed=3)])
def test_a_metric_that_is_never_satisfied_leaves_the_student_as_it_is_and_says_so(
    earned: float, budget: int, valset: list[dspy.Example] | None, caplog: pytest.LogCaptureFixture
) -> None:
    student = Shop(RouteFinetune().compile(fruit_route(), trainset=fruit_requests(30, seed=1, label=True)))
    optimizer = RouteFinetune(lambda example, prediction: earned, max_metric_calls=budget)
    kept = optimizer.compile(student, trainset=fruit_requests(30), valset=valset)
    assert weights(kept) == weights(student)
    report = optimizer.report
    assert (report.kept, report.reason, report.train_after) == ("student", "nothing was learned", None)
    assert report.successes.failed_examples == report.successes.examples
    assert "None of" in str(report).splitlines()[0]
    assert f"reached best_reward=1 (the most was {earned:g})" in str(report).splitlines()[0]
    assert "Call the metric on one example" in report._repr_html_()
    assert len([record for record in caplog.records if "Call the metric on one example" in record.message]) == 1


def test_an_option_that_the_metric_never_rewards_is_named(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def never_cherry(example: dspy.Example, prediction: dspy.Prediction) -> bool:
        return right_fruit(example, prediction) and prediction.fruit != "cherry"

    optimizer = RouteFinetune(never_cherry, max_metric_calls=400)
    optimizer.compile(Shop(), trainset=fruit_requests(90, seed=1))
    successes = optimizer.report.successes
    assert (successes.failed_examples, successes.examples) == (30, 90)
    assert list(successes.never_rewarded) == ["clerk.fruit=cherry"]
    assert successes.never_rewarded["clerk.fruit=cherry"] >= 30
    assert "examples on which nothing succeeded" in str(optimizer.report)
    assert "clerk.fruit=cherry" in str(optimizer.report)
    assert "clerk.fruit=cherry" in caplog.text


def test_a_draw_on_the_validation_set_is_broken_by_the_training_rows() -> None:
    optimizer = RouteFinetune(right_fruit, max_metric_calls=200)
    easy = [example for example in TEST if Shop()(request=example.request).fruit == example.wanted][:10]
    trained = optimizer.compile(Shop(), trainset=fruit_requests(90, seed=1), valset=easy)
    assert optimizer.report.validation_before == optimizer.report.validation_candidate == 1.0
    assert optimizer.report.kept == "trained"
    assert accuracy(trained) > 0.9


@pytest.mark.parametrize("auto", ["light", "medium", "heavy"])
def test_auto_spends_what_gepa_would_for_the_same_program(auto: Literal["light", "medium", "heavy"]) -> None:
    calls = []

    def never(example: dspy.Example, prediction: dspy.Prediction) -> bool:
        calls.append(example)
        return False

    trainset, valset = fruit_requests(900), fruit_requests(20, seed=3)
    gepa = dspy.GEPA(metric=lambda *_: 0, auto=auto, reflection_lm=dspy.LM("openai/none"))
    settings = {"light": 6, "medium": 12, "heavy": 18}
    RouteFinetune(never, auto=auto).compile(Shop(), trainset=trainset, valset=valset)
    assert len(calls) == gepa.auto_budget(1, settings[auto], valset_size=20)


def test_two_budgets_or_an_unknown_one_are_refused() -> None:
    with pytest.raises(RouteError, match="max_metric_calls=9 and auto='light' are two budgets"):
        RouteFinetune(right_fruit, max_metric_calls=9, auto="light")
    with pytest.raises(RouteError, match="auto='huge' is no budget; give 'light'"):
        RouteFinetune(right_fruit, auto="huge")  # type: ignore[arg-type]


def test_finished_rollouts_are_logged_and_not_paid_twice(tmp_path: Path) -> None:
    calls = []

    def metric(example: dspy.Example, prediction: dspy.Prediction) -> bool:
        calls.append(example)
        return right_fruit(example, prediction)

    def compiled(fail_after: int | None = None) -> dspy.Module:
        def dying(example: dspy.Example, prediction: dspy.Prediction) -> bool:
            if fail_after is not None and len(calls) >= fail_after:
                raise KeyboardInterrupt
            return metric(example, prediction)

        optimizer = RouteFinetune(dying, max_metric_calls=60, num_threads=1, log_dir=tmp_path / "log")
        return optimizer.compile(Shop(), trainset=fruit_requests(40))

    untouched = RouteFinetune(metric, max_metric_calls=60, num_threads=1).compile(Shop(), trainset=fruit_requests(40))
    needed = len(calls)
    calls.clear()
    with pytest.raises(KeyboardInterrupt):
        compiled(fail_after=25)
    assert len((tmp_path / "log" / "rollouts.jsonl").read_text().splitlines()) == len(calls) == 25
    resumed = compiled()
    assert len(calls) == needed
    again = compiled()
    assert len(calls) == needed
    assert weights(again) == weights(resumed) == weights(untouched)
    report = json.loads((tmp_path / "log" / "report.json").read_text())
    assert report["rollouts"] == needed


def test_the_report_renders_as_text_and_html() -> None:
    optimizer = RouteFinetune()
    optimizer.compile(fruit_route(), trainset=fruit_requests(30, label=True))
    assert "30 label rows" in str(optimizer.report)
    assert optimizer.report._repr_html_().startswith("<table>")


def test_the_report_shows_reliability_and_recall_on_held_out_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = RouteFinetune()
    route = DifferentiableRoute("request -> fruit", tools=[*FRUIT, "fig"], encoder=bag_of_words)
    optimizer.compile(route, trainset=fruit_requests(400, label=True))
    [found] = optimizer.report.calibration
    assert list(found.recall) == [1, 3]
    assert 0.9 < found.recall[1] <= found.recall[3] <= 1
    assert f"{found.recall[1]:.3f} among 1, {found.recall[3]:.3f} among 3" in str(optimizer.report)
    assert f"{found.after.error:.3f} after" in str(optimizer.report)
    [saved] = json.loads(json.dumps(optimizer.report.to_dict()))["calibration"]
    assert saved["recall"] == {"1": found.recall[1], "3": found.recall[3]}
    assert sum(saved["reliability"]["rows"]) == saved["rows"] == 80
    assert saved["reliability"]["error"] == found.after.error
    assert f"log loss {found.before.log_loss:.3f} before, {found.after.log_loss:.3f} after" in str(optimizer.report)
    page = optimizer.report._repr_html_()
    assert page.startswith("<table>")
    assert "<svg" in page
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    page = optimizer.report._repr_html_()
    assert "<svg" not in page
    assert "Reliability of &#x27;fruit&#x27;:" in page
    assert found.after._repr_html_() in page


def test_the_feedback_of_a_compile_can_be_kept() -> None:
    optimizer = RouteFinetune(right_fruit, max_metric_calls=10)
    optimizer.compile(Shop(), trainset=fruit_requests(9))
    row = optimizer.feedback[0]
    assert isinstance(row, Feedback)
    assert (row.route, row.field, row.candidates, row.propensity) == ("self.clerk", "fruit", tuple(FRUIT), 1.0)


def test_the_program_spends_tokens_and_the_report_says_so(scripted_lm: Any) -> None:
    class Talking(Shop):
        def __init__(self) -> None:
            super().__init__()
            self.answer = dspy.Predict("request -> reply")

        def forward(self, request: str) -> dspy.Prediction:
            self.answer(request=request)
            return super().forward(request=request)

    server = scripted_lm(lambda text: "[[ ## reply ## ]]\nhere you are\n\n[[ ## completed ## ]]")
    optimizer = RouteFinetune(right_fruit, max_metric_calls=6)
    with dspy.context(lm=server.lm):
        optimizer.compile(Talking(), trainset=fruit_requests(6))
    assert optimizer.report.tokens == 6 * 25
    assert optimizer.report.cost is None
    assert "price unknown" in str(optimizer.report)


def test_a_few_new_rows_do_not_make_a_route_forget_unless_it_is_to_restart() -> None:
    trained = RouteFinetune().compile(fruit_route(), trainset=fruit_requests(120, seed=1, label=True))
    bananas = [example for example in fruit_requests(60, seed=2, label=True) if example.fruit == "banana"][:6]
    kept = RouteFinetune().compile(trained, trainset=bananas)
    forgotten = RouteFinetune(restart=True).compile(trained, trainset=bananas)
    assert accuracy(kept) >= accuracy(trained) - 0.01
    assert accuracy(forgotten) < accuracy(trained) - 0.1
    learned, remembered = kept.learned.record.references["fruit"], trained.learned.record.references["fruit"]
    assert learned.rows == remembered.rows + len(bananas)
    assert set(remembered.texts) < set(learned.texts)


def test_rewards_for_what_a_trained_route_decides_already_do_not_change_it() -> None:
    trained = RouteFinetune().compile(fruit_route(), trainset=fruit_requests(120, seed=1, label=True))
    labelled = fruit_requests(60, seed=2, label=True)
    right = [example for example in labelled if trained(request=example.request).fruit == example.fruit][:5]
    optimizer = RouteFinetune(right_fruit)
    again = optimizer.compile(trained, trainset=[example.without("fruit") for example in right])
    assert weights(again) == weights(trained)
    assert optimizer.report.rollouts == 5
    assert optimizer.report.kept == "student"
    assert "is no better than 1.000 on the training rows" in str(optimizer.report)


def test_exploring_starts_from_what_a_trained_route_knows() -> None:
    trained = RouteFinetune().compile(fruit_route(), trainset=fruit_requests(120, seed=1, label=True))
    optimizer = RouteFinetune(right_fruit)
    again = optimizer.compile(trained, trainset=fruit_requests(20, seed=3))
    assert optimizer.report.rollouts <= 22  # all but the odd one right at once
    assert accuracy(again) >= accuracy(trained) - 0.01
