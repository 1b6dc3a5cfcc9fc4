import json
from dataclasses import FrozenInstanceError

import numpy as np
import pytest

from dspy_router.guarding.guard_report import GuardReport
from dspy_router.learning.risk import risk_threshold


def report(chance_of_loss: float = 0.01, metric: str = "answer_right") -> GuardReport:
    random = np.random.default_rng(0)
    losses = (random.random(1000) < chance_of_loss).astype(float)
    found = risk_threshold(random.random(1000), losses, risk=0.05, delta=0.1)
    return GuardReport.from_threshold(found, field="tool", metric=metric)


def test_text_states_the_promise_its_figures_and_what_it_assumes() -> None:
    text = str(report())
    assert text.startswith("Decisions of 'tool' that score at least")
    assert "lose at most 0.05 on average (1 - answer_right), with probability at least 90 %" in text
    assert "Of those rows it declines none." in text
    assert "1,000, 0/1 losses" in text
    assert "(coverage 100.0%)" in text
    assert "no drift" in text


def test_without_a_threshold_the_text_says_why_and_what_to_do() -> None:
    none = report(chance_of_loss=0.3)
    assert none.threshold is None
    text = str(none)
    assert text.startswith("No threshold promises a risk of 0.05: every decision of 'tool' is declined.")
    assert f"The {none.start:,} calibration rows" in text
    assert "upper bound" not in text


def test_the_share_declined_is_said_in_words() -> None:
    scores = np.linspace(0, 1, 1000)
    found = risk_threshold(scores, (scores < 0.3).astype(float), risk=0.05, delta=0.1)
    sentence = GuardReport.from_threshold(found, field="tool", metric="right").sentence
    assert found.kept < 1000
    assert sentence.endswith(f"declines the {100 - found.kept / 10:.1f} % that are least sure.")


def test_html_is_escaped() -> None:
    html = report(metric="<lambda>")._repr_html_()
    assert "&lt;lambda&gt;" in html
    assert "<lambda>" not in html
    assert "<table>" in html


@pytest.mark.parametrize("chance_of_loss", [0.01, 0.3])
def test_a_report_survives_json(chance_of_loss: float) -> None:
    before = report(chance_of_loss)
    assert GuardReport.from_dict(json.loads(json.dumps(before.to_dict()))) == before


def test_a_report_is_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        report().threshold = 0.0  # type: ignore[misc]
