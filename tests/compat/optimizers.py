"""The rows of the matrix: each optimizer as a user would call it, and what it must have done."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from unittest.mock import patch

import dspy
import optuna
from dspy.teleprompt import BootstrapFewShotWithOptuna, Ensemble, InferRules, KNNFewShot
from dspy.teleprompt.grpo import GRPO
from dspy.teleprompt.reanchor.reanchor import ReAnchor

from tests.compat.concierge import (
    Concierge,
    all_right,
    guests,
    share_right,
    share_right_with_feedback,
    sounds_right,
)
from tests.compat.training_provider import provider_of
from tests.conftest import bag_of_words

TRAINSET, VALSET = guests(12, seed=1), guests(8, seed=2)


@dataclass(frozen=True)
class Row:
    """One optimizer.

    Attributes:
        name: As DSPy names it.
        run: From the program and its LM to the program that the optimizer makes of it.
        changes: What must be new in what reaches the LM; see `tests.compat.outcome`.
    """

    name: str
    run: Callable[[Concierge, dspy.LM], dspy.Module]
    changes: tuple[str, ...]


def labeled_few_shot(program: Concierge, lm: dspy.LM) -> dspy.Module:
    return dspy.LabeledFewShot(k=2).compile(program, trainset=TRAINSET)


def bootstrap_few_shot(program: Concierge, lm: dspy.LM) -> dspy.Module:
    # Without labelled demos: those that are there were earned by runs that the metric approved.
    optimizer = dspy.BootstrapFewShot(all_right, max_bootstrapped_demos=2, max_labeled_demos=0)
    compiled = optimizer.compile(program, trainset=TRAINSET)
    assert all(demo.augmented for predictor in compiled.predictors() for demo in predictor.demos)
    return compiled


def random_search(program: Concierge, lm: dspy.LM) -> dspy.Module:
    optimizer = dspy.BootstrapFewShotWithRandomSearch(
        share_right, max_bootstrapped_demos=1, max_labeled_demos=1, num_candidate_programs=1, num_threads=1
    )
    compiled = optimizer.compile(program, trainset=TRAINSET, valset=VALSET)
    assert len(compiled.candidate_programs) == 4
    return compiled


def random_search_by_optuna(program: Concierge, lm: dspy.LM) -> dspy.Module:
    optimizer = BootstrapFewShotWithOptuna(
        share_right, max_bootstrapped_demos=2, max_labeled_demos=2, num_candidate_programs=3, num_threads=1
    )
    # DSPy leaves Optuna's sampler without a seed.
    seeded = partial(optuna.create_study, sampler=optuna.samplers.TPESampler(seed=0))
    with patch.object(optuna, "create_study", seeded):
        return optimizer.compile(program, max_demos=2, trainset=TRAINSET, valset=VALSET)


def knn_few_shot(program: Concierge, lm: dspy.LM) -> dspy.Module:
    return KNNFewShot(
        2, TRAINSET, dspy.Embedder(bag_of_words), metric=all_right, max_bootstrapped_demos=1, max_labeled_demos=1
    ).compile(program)


def copro(program: Concierge, lm: dspy.LM) -> dspy.Module:
    optimizer = dspy.COPRO(metric=share_right, breadth=2, depth=1)
    settings = {"num_threads": 1, "display_progress": False}
    return optimizer.compile(program, trainset=VALSET, eval_kwargs=settings)


def mipro(program: Concierge, lm: dspy.LM) -> dspy.Module:
    optimizer = dspy.MIPROv2(
        share_right, auto=None, num_candidates=3, max_bootstrapped_demos=1, max_labeled_demos=1, num_threads=1
    )
    return optimizer.compile(program, trainset=TRAINSET, valset=VALSET, num_trials=4, minibatch=False)


def simba(program: Concierge, lm: dspy.LM, *, max_demos: int) -> dspy.Module:
    optimizer = dspy.SIMBA(
        metric=share_right, bsize=4, num_candidates=2, max_steps=1, max_demos=max_demos, num_threads=1
    )
    return optimizer.compile(program, trainset=TRAINSET, seed=1)


def gepa(program: Concierge, lm: dspy.LM) -> dspy.Module:
    optimizer = dspy.GEPA(
        share_right_with_feedback, max_metric_calls=60, reflection_lm=lm, reflection_minibatch_size=2, num_threads=1
    )
    return optimizer.compile(program, trainset=TRAINSET, valset=VALSET)


def infer_rules(program: Concierge, lm: dspy.LM) -> dspy.Module:
    optimizer = InferRules(
        num_candidates=1, num_rules=2, num_threads=1, metric=share_right, max_bootstrapped_demos=1, max_labeled_demos=0
    )
    return optimizer.compile(program, trainset=TRAINSET, valset=VALSET)


def ensemble(program: Concierge, lm: dspy.LM) -> dspy.Module:
    # Two members with demos outvote the one without.
    members = [dspy.LabeledFewShot(k=k).compile(program, trainset=TRAINSET) for k in (1, 2)]
    return Ensemble(reduce_fn=dspy.majority).compile([program.deepcopy(), *members])


def bootstrap_finetune(program: Concierge, lm: dspy.LM, *, multitask: bool) -> dspy.Module:
    program.set_lm(lm)
    optimizer = dspy.BootstrapFinetune(metric=all_right, multitask=multitask, num_threads=3)
    with dspy.context(num_threads=1):
        compiled = optimizer.compile(program, trainset=TRAINSET)
    fields = [{"place"}, {"urgent"}, {"reasoning"}]
    expected = [set().union(*fields)] if multitask else fields
    assert sorted(provider_of(lm).trained_fields(), key=sorted) == sorted(expected, key=sorted)
    return compiled


def grpo(program: Concierge, lm: dspy.LM) -> dspy.Module:
    program.set_lm(lm)
    optimizer = GRPO(
        share_right, exclude_demos=True, num_threads=1, num_train_steps=1, num_dspy_examples_per_grpo_step=2,
        num_rollouts_per_grpo_step=2, adapter=dspy.ChatAdapter(),
    )  # fmt: skip
    compiled = optimizer.compile(program, trainset=TRAINSET)  # validates every trace on its way
    (job,) = provider_of(lm).reinforced
    assert job.ended
    assert len(job.groups) == 6  # two examples for each of three predictors
    assert all(len(group["group"]) == 2 for group in job.groups)
    return compiled


def reanchor(program: Concierge, lm: dspy.LM) -> dspy.Module:
    optimizer = ReAnchor(share_right, num_threads=1, require_cache=False)
    compiled = optimizer.compile(program, trainset=TRAINSET)
    (fitted,) = optimizer.report["fitted"]
    assert (fitted["predictor"], fitted["field"], fitted["parameter"]) == ("hurry", "urgent", "threshold")
    assert 0.1 < compiled.hurry.fields["urgent"]["threshold"] <= 0.3
    return compiled


def refine(program: Concierge, lm: dspy.LM) -> dspy.Module:
    return dspy.Refine(module=program, N=2, reward_fn=sounds_right, threshold=1.0)


def best_of_n(program: Concierge, lm: dspy.LM) -> dspy.Module:
    return dspy.BestOfN(module=program, N=2, reward_fn=sounds_right, threshold=1.0)


ROWS: list[Row] = [
    Row("LabeledFewShot", labeled_few_shot, ("demos",)),
    Row("BootstrapFewShot", bootstrap_few_shot, ("demos",)),
    Row("BootstrapFewShotWithRandomSearch", random_search, ("demos",)),
    Row("BootstrapFewShotWithOptuna", random_search_by_optuna, ("demos",)),
    Row("KNNFewShot", knn_few_shot, ("demos", "more runs")),
    Row("COPRO", copro, ("instructions",)),
    Row("MIPROv2", mipro, ("instructions", "demos")),
    Row("SIMBA", partial(simba, max_demos=2), ("demos",)),
    Row("SIMBA(max_demos=0)", partial(simba, max_demos=0), ("instructions",)),
    Row("GEPA", gepa, ("instructions",)),
    Row("InferRules", infer_rules, ("instructions", "demos")),
    Row("Ensemble", ensemble, ("demos", "more runs")),
    Row("BootstrapFinetune(multitask=True)", partial(bootstrap_finetune, multitask=True), ("LM",)),
    Row("BootstrapFinetune(multitask=False)", partial(bootstrap_finetune, multitask=False), ("LM",)),
    Row("GRPO", grpo, ("LM",)),
    Row("ReAnchor", reanchor, ("decision thresholds",)),
    Row("dspy.Refine", refine, ("hints", "more runs")),
    Row("dspy.BestOfN", best_of_n, ("more runs",)),
]
