from pathlib import Path

import pytest

from dspy_router import Feedback, RouteError
from dspy_router.feedback import read_feedback, write_feedback

ROWS = [
    Feedback("rollout", "a", "clerk", "fruit", "häßlich\nlines", ("apple", "fig"), "fig", 0.25, 0.5, 1, False),
    Feedback("teacher", "b", "clerk", "fruit", "", ("apple", "fig"), "fig", None, 1.0, probabilities={"fig": 0.9}),
]


def test_rows_survive_the_file(tmp_path: Path) -> None:
    write_feedback(ROWS, tmp_path / "rows.jsonl")
    assert read_feedback(tmp_path / "rows.jsonl") == ROWS
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 2


def test_unknown_keys_of_a_later_release_are_passed_over() -> None:
    assert Feedback.from_json(ROWS[0].to_json()[:-1] + ', "mood": 3}') == ROWS[0]


@pytest.mark.parametrize("line", ["", "{", "[]", "{}", '{"candidates": 3}', '{"candidates": ["a"]}'])
def test_a_line_that_is_no_row_is_quoted(line: str) -> None:
    with pytest.raises(RouteError, match="This is no feedback row"):
        Feedback.from_json(line)
