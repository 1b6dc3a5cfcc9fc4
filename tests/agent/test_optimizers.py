"""DSPy's own optimizers tune what an LM writes in an agent, and leave its route alone."""

import dspy

from tests.agent.programs import answers, last_number, right_answer, town_agent, town_requests


def test_bootstrapping_gives_demos_to_every_predictor_that_was_called(scripted_lm: object) -> None:
    server = scripted_lm(
        lambda prompt: (
            answers(next_tool_args={"expression": "2 * 3"})(prompt)
            if "next_tool_args" in prompt
            else last_number(prompt)
        )
    )
    agent = town_agent(args={"calculator": "lm"})
    weights = agent.step.learned.dump_state()
    with dspy.context(lm=server.lm):
        optimizer = dspy.BootstrapFewShot(metric=lambda *_: True, max_bootstrapped_demos=2, max_labeled_demos=0)
        compiled = optimizer.compile(agent, trainset=town_requests(4))
    assert [name for name, _ in compiled.named_predictors()] == ["arguments['calculator']", "answer"]
    assert all("results" in demo for demo in compiled.answer.demos)
    assert len(compiled.answer.demos) == 2
    assert all(demo.next_tool_args == {"expression": "2 * 3"} for demo in compiled.arguments["calculator"].demos)
    assert compiled.step.learned.dump_state() == weights


def test_an_instruction_is_tuned_by_mipro(scripted_lm: object) -> None:
    server = scripted_lm(
        lambda prompt: (
            answers(proposed_instruction="Answer in rhyme.")(prompt)
            if "proposed_instruction" in prompt or "observations" in prompt or "summary" in prompt
            else last_number(prompt)
        )
    )
    with dspy.context(lm=server.lm):
        optimizer = dspy.MIPROv2(
            metric=right_answer, auto=None, num_candidates=2, max_bootstrapped_demos=1, max_labeled_demos=0,
            num_threads=1, verbose=False,
        )  # fmt: skip
        compiled = optimizer.compile(
            town_agent(), trainset=town_requests(4), valset=town_requests(3), num_trials=3, minibatch=False
        )
    assert [name for name, _ in compiled.named_predictors()] == ["answer"]
    assert any("Answer in rhyme." in call["messages"][0]["content"] for call in server.lm.history)
