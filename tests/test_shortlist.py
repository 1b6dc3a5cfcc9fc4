"""An agent that sees only the likeliest tools, and all of them where the route declines."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import dspy
import pytest

from dspy_router import DifferentiableRoute, RouteError, RouteFinetune
from dspy_router.shortlist import Shortlist
from tests.conftest import bag_of_words

NAMES = [f"tool_{word}" for word in ("weather", "music", "mail", "alarm", "news", "taxi", "hotel", "bank")]


def make_tool(name: str) -> dspy.Tool:
    return dspy.Tool(
        lambda text: f"{name} says {text}", name=name, desc=name.split("_")[1], args={"text": {"type": "string"}}
    )


def agent(kind: Any = dspy.ReAct) -> Any:
    return kind("request -> answer", tools=[make_tool(name) for name in NAMES], max_iters=3)


def route(**settings: Any) -> DifferentiableRoute:
    return DifferentiableRoute(
        "request -> tool", tools=[make_tool(name) for name in NAMES], encoder=bag_of_words, **settings
    )


def script(prompt: str) -> str:
    """Call the first tool listed that the request names, then finish."""
    if "next_tool_name" not in prompt:
        return "[[ ## reasoning ## ]]\nr\n\n[[ ## answer ## ]]\ndone\n\n[[ ## completed ## ]]"
    name = "finish" if "observation_0" in prompt else "tool_music"
    args = {} if name == "finish" else {"text": "x"}
    return (
        f"[[ ## next_thought ## ]]\nt\n\n[[ ## next_tool_name ## ]]\n{name}\n\n[[ ## next_tool_args ## ]]\n"
        f"{json.dumps(args)}\n\n[[ ## completed ## ]]"
    )


def test_the_agent_is_shown_the_likeliest_tools_alone(scripted_lm: Callable[..., Any]) -> None:
    program = Shortlist(agent(), route(), k=2)
    server = scripted_lm(script)
    with dspy.context(lm=server.lm, trace=[]):
        prediction = program(request="music please")
        steps = [step for step, *_ in dspy.settings.trace]
    assert prediction.answer == "done"
    assert prediction.shortlist == program.tools_for(request="music please")
    assert prediction.shortlist[0] == "tool_music"
    assert prediction.trajectory["observation_0"] == "tool_music says x"
    literal = (
        server.requests[0].split("next_tool_name ## ]]")[-1] if "Literal" in server.requests[0] else server.requests[0]
    )
    assert not any(name in literal for name in NAMES if name not in prediction.shortlist)
    # The agent's own predictors made the steps, so optimizers know them.
    known = {id(predictor) for predictor in program.predictors()}
    assert {id(step) for step in steps} <= known


def test_async_runs_give_the_same(scripted_lm: Callable[..., Any]) -> None:
    program = Shortlist(agent(), route(), k=2)
    with dspy.context(lm=scripted_lm(script).lm):
        prediction = asyncio.run(program.acall(request="music please"))
    assert (prediction.answer, prediction.shortlist[0]) == ("done", "tool_music")


def test_where_the_route_declines_all_tools_are_shown() -> None:
    guarded = route()
    examples = [dspy.Example(request=f"{name.split('_')[1]} {i}", tool=name).with_inputs("request") for name in NAMES
                for i in range(40)]  # fmt: skip
    trained: Any = RouteFinetune().compile(guarded, trainset=examples)
    fresh = [dspy.Example(request=f"{name.split('_')[1]} n{i}", tool=name).with_inputs("request") for name in NAMES
             for i in range(40)]  # fmt: skip
    trained.guard(fresh, metric=lambda example, prediction: example.tool == prediction.tool, risk=0.05)
    program = Shortlist(agent(), trained, k=1)
    assert program.tools_for(request="mail n1") == ("tool_mail",)
    assert set(program.tools_for(request="zebra quantum violin")) == set(NAMES)


def test_recall_is_reported_for_every_k() -> None:
    program = Shortlist(agent(), route(), k=3)
    examples = [
        dspy.Example(request="music please", tool="tool_music").with_inputs("request"),
        dspy.Example(request="mail and taxi", tool=["tool_mail", "tool_taxi"]).with_inputs("request"),
    ]
    report = program.recall(examples)
    assert (report.rows, report.k, report.recall[1], report.recall[2], report.recall[8]) == (2, 3, 0.5, 1.0, 1.0)
    assert "recall@k" in str(report)
    assert "<table>" in report._repr_html_()


def test_react_v2_is_shown_the_likeliest_tools_too() -> None:
    program = Shortlist(agent(dspy.ReActV2), route(), k=2)
    shown = program._agent(program.tools_for(request="music please"))
    assert list(shown.tools) == [*program.tools_for(request="music please"), "submit"]
    assert "tool_bank" not in shown.react._signature.instructions


def test_tools_the_route_does_not_know_are_always_shown() -> None:
    some = DifferentiableRoute("request -> tool", tools=NAMES[:4], encoder=bag_of_words)
    shown = Shortlist(agent(), some, k=1)._agent(("tool_music",))
    assert list(shown.tools) == ["tool_music", *NAMES[4:], "finish"]
    assert "tool_weather" not in shown.react._signature.instructions


def test_rewritten_instructions_stay() -> None:
    program = Shortlist(agent(), route(), k=2)
    program.agent.react.signature = program.agent.react.signature.with_instructions("Be quick.")
    shown = program._agent(("tool_music", "tool_mail"))
    assert shown.react._signature.instructions == "Be quick."
    assert "tool_bank" not in str(shown.react._signature.output_fields["next_tool_name"].annotation)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Shortlist(agent(), route(), k=0), "k=0"),
        (lambda: Shortlist(agent(), DifferentiableRoute("request -> tool", tools=["a", "b"], encoder=bag_of_words), 1),
         r"without \['a', 'b'\]"),
        (lambda: Shortlist(agent(), route(), 2).recall([dspy.Example(request="x", tool="y").with_inputs("request")]),
         r"needs \['y'\]"),
    ],
    ids=["k", "tools", "recall"],
)  # fmt: skip
def test_what_does_not_fit_is_named(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(RouteError, match=message):
        make()


def test_a_route_that_reads_what_the_agent_does_not_get_is_refused() -> None:
    other = DifferentiableRoute("query -> tool", tools=NAMES, encoder=bag_of_words)
    with pytest.raises(RouteError, match=r"The route reads \['query'\].*its inputs are \['request'\]"):
        Shortlist(agent(), other, k=2)


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ([], "nothing in the examples"),
        ([dspy.Example(request="music", tool="tool_music")], "with_inputs"),
        ([dspy.Example(request="music").with_inputs("request")], "An example has no 'tool', the tool it needs"),
        ([dspy.Example(request="music", tool=[]).with_inputs("request")], "An example has no 'tool'"),
    ],
)
def test_what_recall_cannot_be_measured_on_is_said(examples: list[dspy.Example], message: str) -> None:
    with pytest.raises(RouteError, match=message):
        Shortlist(agent(), route(), k=2).recall(examples)


def test_the_runs_of_a_shortlist_teach_nothing_and_that_is_said(
    scripted_lm: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    examples = [
        dspy.Example(request=f"{name.split('_')[1]} please", tool=name).with_inputs("request") for name in NAMES
    ]
    program = Shortlist(agent(), route(), k=2)
    with dspy.context(lm=scripted_lm(lambda prompt: script(f"{prompt} observation_0")).lm):
        with pytest.raises(
            RouteError, match=r"none of 8 runs of the program reached a decision.*Shortlist is compiled"
        ):
            RouteFinetune(lambda example, prediction: 1.0, max_metric_calls=8).compile(
                program, trainset=[example.without("tool") for example in examples]
            )
        trained = RouteFinetune().compile(program, trainset=examples)
    assert "No run of the program reached a decision of its routes (none raised)" in caplog.text
    assert trained.tools_for(request="bank please")[0] == "tool_bank"
