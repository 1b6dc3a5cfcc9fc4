"""What depth costs: one LM call whose prompt grows with the results alone, beside `dspy.ReAct` on the same task."""

import dspy
import pytest

from dspy_router import RoutedAgent
from dspy_router.agent import Progress
from dspy_router.decisions import choosing
from tests.agent.programs import InOrder, answers
from tests.conftest import bag_of_words

DEPTH = 10
QUESTION = "What lies at the end of the trail from stone 0?"


def follow(place: str) -> str:
    """Tell where the trail leads from a place."""
    stone = int(place.rstrip("?.").split()[-1])
    return f"The trail leads on to stone {stone + 1}." if stone < DEPTH else "A treasure."


def next_place(progress: Progress) -> dict[str, str]:
    return {"place": progress.results[-1].text if progress.results else progress.request}


def routed_prompts(server: object, depth: int) -> tuple[list[str], str]:
    """The prompts of a run of that depth, system message included, and the results that the answer was made from."""
    agent = RoutedAgent("question -> answer", tools=[follow], args={"follow": next_place}, encoder=bag_of_words)
    with dspy.context(lm=server.lm, trace=[]), choosing(InOrder(*["follow"] * depth, "finish")):
        agent(question=QUESTION)
        [(_, inputs, _)] = dspy.settings.trace
    return sent(server), inputs["results"]


def sent(server: object) -> list[str]:
    prompts = ["".join(message["content"] for message in entry["messages"]) for entry in server.lm.history]
    server.lm.history.clear()
    return prompts


def test_a_run_takes_one_lm_call_whose_prompt_grows_with_the_results_alone(scripted_lm: object) -> None:
    server = scripted_lm(answers(answer="a treasure"))
    without_results = []
    for depth in range(1, DEPTH + 1):
        [prompt], results = routed_prompts(server, depth)
        assert results.count("\n") == depth - 1
        without_results.append(prompt.replace(results, ""))
    assert len(set(without_results)) == 1


@pytest.mark.parametrize("depth", [1, 3, DEPTH])
def test_all_prompts_of_a_run_are_a_fraction_of_reacts(scripted_lm: object, depth: int) -> None:
    def planner(prompt: str) -> str:
        done = prompt.count("[[ ## observation_")
        name = "follow" if done < depth else "finish"
        place = QUESTION if not done else f"stone {done}"
        arguments = {"place": place} if name == "follow" else {}
        fields = {"next_thought": "On we go.", "next_tool_name": name, "next_tool_args": arguments}
        return answers(**(fields if "next_tool_name" in prompt else {"reasoning": "So it says.", "answer": "A"}))(
            prompt
        )

    server = scripted_lm(planner)
    react = dspy.ReAct("question -> answer", tools=[follow], max_iters=DEPTH + 1)
    with dspy.context(lm=server.lm):
        react(question=QUESTION)
    reacts = sent(server)
    routed, _ = routed_prompts(scripted_lm(answers(answer="A")), depth)
    assert (len(reacts), len(routed)) == (depth + 2, 1)
    assert len("".join(routed)) <= 0.15 * len("".join(reacts))
