"""What an optimizer made of a program, read off what reaches the LM when the result answers a set of requests."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import dspy

from tests.compat.concierge import Concierge, share_right
from tests.compat.scripted_model import MODEL, Request, ScriptedModel
from tests.compat.training_provider import RecordingProvider

Optimize = Callable[[Concierge, dspy.LM], dspy.Module]


@dataclass(frozen=True)
class Outcome:
    """A compiled program and what it did.

    Attributes:
        program: What the optimizer returned.
        predictors: Name, instructions and demos of every LM predictor in it.
        prompts: Every request a predictor made, while compiling and afterwards, sorted: some optimizers use threads.
        training: What the provider was given to train the LM on.
        changes: What is new in the requests made afterwards.
        score_before: Mean score of the program that the optimizer was given.
        score: Mean score of the program that it returned.
    """

    program: dspy.Module
    predictors: list[tuple[str, str, list[dict[str, Any]]]]
    prompts: list[str]
    training: list[list[Any]]
    changes: tuple[str, ...]
    score_before: float
    score: float


def outcome_of(optimize: Optimize, program: Concierge, devset: Sequence[dspy.Example]) -> Outcome:
    """Optimize a program with a language model of its own, and look at the result."""
    model, provider = ScriptedModel(), RecordingProvider()
    lm = dspy.LM(f"openai/{MODEL}", api_base=model.url, api_key="none", cache=False, max_tokens=200, provider=provider)
    try:
        with dspy.context(lm=lm):
            score_before = mean_score(program, devset)
            before = len(model.requests)
            compiled = optimize(program, lm)
            after = len(model.requests)
            score = mean_score(compiled, devset)
    finally:
        model.close()
    return Outcome(
        program=compiled,
        predictors=predictors_of(compiled),
        prompts=sorted(f"{request.model} {request.messages}" for request in model.requests[before:] if request.is_task),
        training=provider.training(),
        changes=changes(model.requests[:before], [request for request in model.requests[after:] if request.is_task]),
        score_before=score_before,
        score=score,
    )


def mean_score(program: dspy.Module, devset: Sequence[dspy.Example]) -> float:
    return sum(share_right(example, program(**example.inputs())) for example in devset) / len(devset)


def predictors_of(program: dspy.Module) -> list[tuple[str, str, list[dict[str, Any]]]]:
    return [
        (name, predictor.signature.instructions, [dict(demo) for demo in predictor.demos])
        for name, predictor in program.named_predictors()
    ]


def changes(before: Sequence[Request], after: Sequence[Request]) -> tuple[str, ...]:
    """What the requests of the optimized program have that those of the original did not."""
    found = {
        "instructions": {request.instructions for request in after} != {request.instructions for request in before},
        "demos": any(len(request.messages) > 2 for request in after),
        "LM": {request.model for request in after} != {request.model for request in before},
        "decision thresholds": any("NoulEvidence" in request.outputs.values() for request in after),
        "hints": any("hint_" in request.inputs for request in after),
        "more runs": len(after) > len(before),
    }
    return tuple(name for name, changed in found.items() if changed)
