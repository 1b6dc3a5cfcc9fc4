"""The demo's program and figures, on the real encoder."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import dspy
import pytest

from dspy_router import RouteFinetune, SentenceEncoder, replace_predictor
from dspy_router.demo.__main__ import accuracy
from dspy_router.demo.assistant import TOOLS, VoiceAssistant, labelled_requests, outcome_reached, requests


@pytest.fixture(scope="module")
def untrained(sentence_encoder: SentenceEncoder) -> dspy.Module:
    routed = replace_predictor(VoiceAssistant(), "planner", tools=TOOLS)
    sentence_encoder.encode([example.request for part in ("train", "test") for example in requests(part)])
    return routed


def test_the_data_is_what_the_demo_says() -> None:
    train, test = requests("train"), requests("test")
    assert (len(train), len(test)) == (2100, 700)
    assert not {example.request for example in train} & {example.request for example in test}
    assert set(train[0].keys()) == {"request", "outcome"}
    assert {example.tool for example in labelled_requests("train")} == {tool.__name__ for tool in TOOLS}


def test_descriptions_alone_decide_well(untrained: dspy.Module) -> None:
    assert accuracy(untrained, requests("test")) > 0.78


def test_the_metric_alone_reaches_what_labels_reach(untrained: dspy.Module) -> None:
    optimizer = RouteFinetune(outcome_reached, max_metric_calls=4200)
    from_metric = optimizer.compile(untrained, trainset=requests("train"))
    assert accuracy(from_metric, requests("test")) >= 0.955
    assert optimizer.report.rollouts <= 4200
    assert optimizer.report.rows.keys() == {"rollout"}
    from_labels = RouteFinetune().compile(untrained, trainset=labelled_requests("train"))
    assert accuracy(from_labels, requests("test")) >= 0.955


def test_the_command_does_the_main_job_beside_a_real_lm_planner(tmp_path: Path, scripted_lm: Any) -> None:
    server = scripted_lm(lambda text: '{"tool": "get_weather"}')
    output = subprocess.run(
        [sys.executable, "-m", "dspy_router.demo", "--budget", "300", "--output", str(tmp_path),
         "--lm", "openai/scripted", "--api-base", server.lm.kwargs["api_base"]],
        capture_output=True, text=True, check=True, cwd=tmp_path,
    )  # fmt: skip
    for heading in ("Right tool on the 700 test requests", "Five requests", "Cost of a run (gpt-4.1", "The LM planner"):
        assert heading in output.stdout
    assert len(server.requests) == 100
    assert (tmp_path / "voice_assistant.json").stat().st_size > 1000
    assert (tmp_path / "confusion.png").read_bytes().startswith(b"\x89PNG")
