"""The planner benchmark, with a scripted LM on loopback in the model's place."""

import json
import re
from pathlib import Path
from typing import Any

import planner
import pytest
from answer_log import AnswerLog, key_of
from paired import compare_right

from dspy_router.demo.assistant import TOOLS
from dspy_router.options import words as in_words

RIGHT, WRONG, UNREADABLE = "right", "wrong", "unreadable"


def scripted(task: planner.Task, behaviour: list[str]) -> Any:
    """Answers the task's questions rightly, wrongly or not at all."""
    names = sorted({question.answer for question in task.questions})

    def answer(text: str) -> str:
        number, question = next(
            (number, question) for number, question in enumerate(task.questions) if f"\n{question.request}\n" in text
        )
        what = behaviour[number % len(behaviour)]
        wrong = next(name for name in names if name != question.answer)
        return "Hm." if what == UNREADABLE else json.dumps({"tool": question.answer if what == RIGHT else wrong})

    return answer


def options(server: Any, *arguments: str, lm: str = "openai/small") -> Any:
    base = server.lm.kwargs["api_base"] if server else "http://127.0.0.1:1"
    return planner.command_line().parse_args(["--lm", lm, "--api-base", base, "--requests", "8", *arguments])


def test_both_read_the_same_options_and_descriptions() -> None:
    task = planner.bfcl(options(None))
    for question in task.questions[:3]:
        instructions = planner.signature(question.tools).instructions
        for tool in question.tools:
            assert f"- {tool['name']}" in instructions
            assert " ".join(tool["description"].split()) in instructions
            assert all(in_words(argument) in instructions for argument in tool["parameters"]["properties"])
    for tool in TOOLS:
        assert f"- {tool.__name__}: {tool.__doc__} Arguments: request" in planner.signature(tuple(TOOLS)).instructions


@pytest.mark.parametrize("name", ["snips", "clinc150", "bfcl"])
def test_more_requests_begin_with_those_of_fewer(name: str) -> None:
    few, many = (planner.TASKS[name](options(None, "--requests", count)).questions for count in ("5", "40"))
    assert len(many) == 40
    assert [question.request for question in many[:5]] == [question.request for question in few]
    assert planner.TASKS[name](options(None, "--requests", "5", "--seed", "1")).questions != few


def test_clinc150_is_asked_among_the_ten_intents_that_were_drawn() -> None:
    task = planner.clinc150(options(None, "--requests", "300", "--labels", "3"))
    assert len(task.questions) == 300
    assert {question.answer for question in task.questions} == set(task.questions[0].tools)
    assert len(task.labelled) == 30
    assert not {row.text for row in task.labelled} & {question.request for question in task.questions}


def test_the_report_counts_right_wrong_and_unreadable(scripted_lm: Any, words: Any, capsys: Any) -> None:
    task = planner.snips(options(None, "--labels", "5"))
    server = scripted_lm(scripted(task, [RIGHT, RIGHT, WRONG, UNREADABLE]))
    chosen = options(server, "--labels", "5")
    planned, by_routes = planner.run(task, chosen, words, AnswerLog(None))
    assert len(server.requests) == 8
    assert [plan.tool is None for plan in planned] == [False, False, False, True] * 2
    assert list(by_routes) == ["route, by the descriptions", "route, 5 labels an option"]
    planner.report(task, chosen, planned, by_routes)
    printed = capsys.readouterr().out
    assert re.search(r"openai/small +50\.0 \(21\.5 to 78\.5\) +2 +\S+ \(\S+\) +1\.00 +20 \+ 5 +unknown", printed)
    pair = compare_right(planner.marks(task, by_routes["route, 5 labels an option"]), [True, True, False, False] * 2)
    assert f"{pair.only_first} / {pair.only_second}" in printed
    assert f"{planner.percent(pair.difference, '+')}" in printed
    assert re.search(r"LM \d+ \(\d+ to \d+\) times the route's", printed)
    assert "A small local model on a CPU is not a hosted one" in printed


def test_dollars_are_those_of_the_price_table(scripted_lm: Any, words: Any, capsys: Any) -> None:
    task = planner.snips(options(None, "--labels", "2"))
    server = scripted_lm(scripted(task, [RIGHT]))
    chosen = options(server, "--labels", "2", lm="openai/gpt-4.1-mini")
    planner.report(task, chosen, *planner.run(task, chosen, words, AnswerLog(None)))
    printed = capsys.readouterr().out
    assert re.search(r"openai/gpt-4\.1-mini +100\.0 .* 20 \+ 5 +0\.016\n", printed)  # 20 at 0.4, 5 at 1.6 a million
    assert "not a hosted one" not in printed


def test_a_run_that_was_killed_asks_only_for_the_rest(scripted_lm: Any, words: Any, tmp_path: Path) -> None:
    task = planner.snips(options(None, "--labels", "2"))
    server = scripted_lm(scripted(task, [RIGHT, UNREADABLE]))
    chosen, path = options(server, "--labels", "2"), tmp_path / "new folder" / "answers.jsonl"
    whole = planner.run(task, chosen, words, AnswerLog(path))
    assert len(server.requests) == 8
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(lines[:5]) + lines[5][:40], encoding="utf-8")  # killed while it wrote the sixth
    resumed = planner.run(task, chosen, words, AnswerLog(path))
    assert len(server.requests) == 8 + 3
    assert resumed[0][:5] == whole[0][:5]
    assert [plan.tool for plan in resumed[0]] == [plan.tool for plan in whole[0]]
    assert resumed[1] == whole[1]
    assert planner.run(task, chosen, words, AnswerLog(path)) == resumed
    assert len(server.requests) == 8 + 3


def test_another_model_adapter_or_prompt_is_another_question() -> None:
    keys = {key_of(lm, adapter, prompt) for lm in ("a", "b") for adapter in ("json", "chat") for prompt in ("x", "y")}
    assert len(keys) == 8


def test_the_command_runs_from_end_to_end(scripted_lm: Any, tmp_path: Path, capsys: Any) -> None:
    task = planner.bfcl(options(None))
    server = scripted_lm(scripted(task, [RIGHT]))
    planner.main(
        ["--lm", "openai/small", "--api-base", server.lm.kwargs["api_base"], "--adapter", "json", "--only", "bfcl",
         "--requests", "8", "--log", str(tmp_path / "answers.jsonl")]
    )  # fmt: skip
    printed = capsys.readouterr().out
    assert "BFCL live_multiple, each request's own functions: 8 requests, planned by openai/small (json" in printed
    assert printed.count("route, by the descriptions") == 2
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == len(server.requests) == 8


def test_an_lm_that_cannot_be_asked_stops_the_run_and_says_how_to_go_on(words: Any, monkeypatch: Any) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    chosen = options(None, "--labels", "2")
    chosen.api_base = None
    with pytest.raises(SystemExit, match=r"(?s)openai/small did not answer request 1 of SNIPS.*--log"):
        planner.run(planner.snips(chosen), chosen, words, AnswerLog(None))
