"""Planners in production, traced by MLflow: a process of its own, as MLflow leaves its mark on the whole process.

Arguments: the address of the LM's server and the tracking store.
"""

import datetime
import enum
import sys

import dspy
import pydantic


class Mood(enum.Enum):
    GOOD = "good"
    BAD = "bad"


class Visit(pydantic.BaseModel):
    name: str
    day: datetime.datetime


class Typed(dspy.Signature):
    visit: Visit = dspy.InputField()
    weights: list[float] = dspy.InputField()
    mood: Mood = dspy.OutputField()
    urgent: bool = dspy.OutputField()


VISIT = Visit(name="Ann", day=datetime.datetime(2026, 1, 2, 3, 4))
WEIGHTS = [1, 2.5]


class Planned(dspy.Module):
    def __init__(self) -> None:
        super().__init__()
        self.planner = dspy.Predict("request -> fruit")

    def forward(self, request: str) -> dspy.Prediction:
        return self.planner(request=request)


class PlannedTwice(dspy.Module):
    """Reasons before it decides, decides twice, and then writes something from the same inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.planner = dspy.ChainOfThought("request, hints: list[str] -> fruit: Literal['apple', 'banana']")
        self.answer = dspy.Predict("request, fruit -> answer")

    def forward(self, request: str) -> dspy.Prediction:
        first = self.planner(request=request, hints=["ripe"])
        self.planner(request=request, hints=[])
        return self.answer(request=request, fruit=first.fruit)


class Drafted(dspy.Module):
    """Two predictors of different signatures decide one field."""

    def __init__(self) -> None:
        super().__init__()
        self.draft = dspy.Predict("request -> fruit, doubt")
        self.planner = dspy.Predict("request -> fruit")

    def forward(self, request: str) -> dspy.Prediction:
        self.draft(request=request)
        return self.planner(request=request)


def run(program: dspy.Module, *rewards: object, **inputs: object) -> str:
    """Run a planner, give its trace these rewards, and say which trace it is."""
    import mlflow

    program(**inputs)
    trace = mlflow.get_last_active_trace_id()
    mlflow.flush_trace_async_logging()
    for reward in rewards:
        if isinstance(reward, Exception):
            mlflow.log_feedback(trace_id=trace, name="good", error=reward)
        else:
            mlflow.log_feedback(trace_id=trace, name="good", value=reward)
    return trace


def main(api_base: str, store: str, artifacts: str) -> None:
    import mlflow

    dspy.configure(lm=dspy.LM("openai/gpt-4o-mini", api_base=api_base, api_key="none", cache=False, max_tokens=200))
    mlflow.set_tracking_uri(store)
    mlflow.dspy.autolog()

    def begin(experiment: str) -> None:
        mlflow.set_experiment(experiment_id=mlflow.create_experiment(experiment, artifacts))

    begin("planned")
    run(Planned(), True, request="apple one")
    run(Planned(), 1.0, 0.25, request="banana two")
    run(Planned(), request="apple three")
    run(Planned(), "yes", request="durian four")
    run(Planned(), "no", request="banana five")
    run(Planned(), ValueError("no metric"), request="apple six")
    run(dspy.Predict("request -> answer"), True, request="apple seven")
    run(dspy.Predict("question -> fruit"), True, question="apple eight")

    begin("planned twice")
    trace = run(PlannedTwice(), 0.0, request="apple")
    planners = [span for span in mlflow.get_trace(trace).data.spans if span.name == "Predict.forward"]
    mlflow.log_feedback(trace_id=trace, name="good", value=0.5, span_id=planners[1].span_id)
    mlflow.log_feedback(trace_id=trace, name="good", value=1.0, span_id=planners[2].span_id)

    begin("drafted")
    run(Drafted(), True, request="banana")

    begin("typed")
    run(dspy.Predict(Typed), True, visit=VISIT, weights=WEIGHTS)

    begin("empty")


if __name__ == "__main__":
    main(*sys.argv[1:])
