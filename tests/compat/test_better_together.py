"""`RouteFinetune` is a step of DSPy's `BetterTogether`: the route is trained, the prompts are optimized."""

from dataclasses import dataclass
from typing import Any

import dspy
import pytest
import torch
from dspy.teleprompt.teleprompt import Teleprompter

from dspy_router import DifferentiableRoute, RouteError, RouteFinetune
from tests.compat.concierge import Concierge, choose_by_hint, guests, share_right
from tests.compat.optimizers import VALSET
from tests.compat.outcome import Optimize, outcome_of, predictors_of
from tests.compat.table import Entry

TRAINSET = guests(24, seed=4)


@dataclass(frozen=True)
class Together:
    """A strategy of `BetterTogether`, with `r` for the route and `p` for the prompts."""

    strategy: str
    prompts: str
    labelled: bool

    @property
    def name(self) -> str:
        return f'BetterTogether("{self.strategy}", r=RouteFinetune, p={self.prompts})'

    def prompt_optimizer(self) -> tuple[Teleprompter, dict[str, object]]:
        """The optimizer of the prompts, and what its `compile` is given."""
        few = {"max_bootstrapped_demos": 1, "max_labeled_demos": 1, "num_threads": 1}
        if self.prompts == "MIPROv2":
            optimizer = dspy.MIPROv2(share_right, auto=None, num_candidates=2, **few)
            return optimizer, {"num_trials": 2, "minibatch": False}
        return dspy.BootstrapFewShotWithRandomSearch(share_right, num_candidate_programs=1, **few), {}

    def compile(self, program: Concierge, lm: dspy.LM, *, strategy: str) -> dspy.Module:
        program.set_lm(lm)
        finetune = RouteFinetune() if self.labelled else RouteFinetune(share_right, num_threads=1)
        prompts, arguments = self.prompt_optimizer()
        trainset = TRAINSET if self.labelled else [guest.without("tool").with_inputs("request") for guest in TRAINSET]
        return dspy.BetterTogether(share_right, r=finetune, p=prompts).compile(
            program, trainset=trainset, valset=VALSET, strategy=strategy, num_threads=1,
            shuffle_trainset_between_steps=False, optimizer_compile_args={"p": arguments},
        )  # fmt: skip

    def routed(self) -> Optimize:
        return lambda program, lm: self.compile(program, lm, strategy=self.strategy)

    def plain(self) -> Optimize:
        """The same without the steps that a plain function has no use for."""
        strategy = " -> ".join(step for step in self.strategy.split(" -> ") if step != "r")
        return lambda program, lm: self.compile(program, lm, strategy=strategy)


ROWS = [
    Together("r -> p", "MIPROv2", labelled=True),
    Together("p -> r -> p", "BootstrapFewShotWithRandomSearch", labelled=False),
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_it_trains_the_route_and_optimizes_the_prompts(
    row: Together, untrained_route: DifferentiableRoute, entries: dict[str, Entry]
) -> None:
    before = {name: tensor.clone() for name, tensor in untrained_route.head.state_dict().items()}

    routed = outcome_of(row.routed(), Concierge(untrained_route), VALSET)
    plain = outcome_of(row.plain(), Concierge(choose_by_hint), VALSET)

    assert not routed.program.flag_compilation_error_occurred
    assert not plain.program.flag_compilation_error_occurred
    steps = row.strategy.split(" -> ")
    strategies = {candidate["strategy"] for candidate in routed.program.candidate_programs}
    assert strategies == {" -> ".join(steps[:length]) for length in range(len(steps) + 1)}

    route = routed.program.choose
    assert route.encoder is untrained_route.encoder
    assert any(not torch.equal(tensor, before[name]) for name, tensor in route.head.state_dict().items())
    assert [route(request=guest.request).tool for guest in VALSET] == [guest.tool for guest in VALSET]

    assert routed.changes == plain.changes
    assert routed.changes
    assert routed.score == plain.score == 1.0 > routed.score_before
    # Of equal scores `BetterTogether` returns the earliest, so the programs after the last step are compared.
    assert predictors_after_all_steps(routed.program) == predictors_after_all_steps(plain.program)

    entries[row.name] = Entry(row.name, routed.changes, "trained by step r")


def predictors_after_all_steps(program: dspy.Module) -> list[tuple[str, str, list[dict[str, Any]]]]:
    last = max(program.candidate_programs, key=lambda candidate: len(candidate["strategy"]))
    return predictors_of(last["program"])


@pytest.mark.parametrize("way", ["teacher", "compile arguments"])
def test_the_route_learns_from_a_teacher(way: str, untrained_route: DifferentiableRoute) -> None:
    """A planner has one predictor more than the student, which `BetterTogether` allows no teacher of its own."""
    teacher = Concierge(choose_by_hint if way == "teacher" else dspy.Predict("request -> tool"))
    finetune = RouteFinetune()
    given = {"teacher": teacher} if way == "teacher" else {"optimizer_compile_args": {"r": {"teacher": teacher}}}

    def learn(program: Concierge, lm: dspy.LM) -> dspy.Module:
        program.set_lm(lm)
        unlabelled = [guest.without("tool").with_inputs("request") for guest in TRAINSET]
        return dspy.BetterTogether(share_right, r=finetune).compile(
            program, trainset=unlabelled, valset=VALSET, strategy="r", num_threads=1, **given
        )

    compiled = outcome_of(learn, Concierge(untrained_route), VALSET).program
    assert not compiled.flag_compilation_error_occurred
    assert finetune.report.rows == {"teacher": len(TRAINSET)}
    assert [compiled.choose(request=guest.request).tool for guest in VALSET] == [guest.tool for guest in VALSET]


def test_several_teachers_are_an_error(untrained_route: DifferentiableRoute) -> None:
    teachers = [Concierge(choose_by_hint), Concierge(choose_by_hint)]
    with pytest.raises(RouteError, match="2 teachers"):
        RouteFinetune().compile(Concierge(untrained_route), trainset=TRAINSET, teacher=teachers)
