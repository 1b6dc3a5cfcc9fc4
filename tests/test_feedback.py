import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from dspy_router import Feedback, RouteError
from dspy_router.feedback import FeedbackTable, read_feedback, read_feedback_table, split_feedback, write_feedback

ROWS = [
    Feedback("rollout", "a", "clerk", "fruit", "häßlich\nlines", ("apple", "fig"), "fig", 0.25, 0.5, 1, False),
    Feedback(
        "teacher", "b", "clerk", "fruit", "", ("apple", "fig"), "fig", None, 1.0, probabilities={"fig": 0.9}, weight=0.5
    ),
]
LOGGED = Feedback("log", "a", "clerk", "fruit", "a fig", ("apple", "fig"), "fig", 0.5, None, run="r", id="d")


def test_rows_survive_the_file(tmp_path: Path) -> None:
    write_feedback(ROWS, tmp_path / "rows.jsonl")
    assert read_feedback(tmp_path / "rows.jsonl") == ROWS
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("text", ["a\u2028b\u2029c\x85d\x0be", "half a pair \ud83d", '"\\"', "\0", "\r\n"])
def test_any_text_survives_the_file(text: str, tmp_path: Path) -> None:
    rows = [replace(LOGGED, text=text, id="1"), replace(LOGGED, id="2")]
    write_feedback(rows, tmp_path / "rows.jsonl")
    assert [row.text for row in read_feedback(tmp_path / "rows.jsonl")] == [text, LOGGED.text]


def test_unknown_keys_of_a_later_release_are_passed_over() -> None:
    assert Feedback.from_json(ROWS[0].to_json()[:-1] + ', "mood": 3}') == ROWS[0]


@pytest.mark.parametrize(
    "line",
    [
        *("", "{", "[]", "{}", "7", '{"candidates": 3}', '{"candidates": ["a"]}'),
        ROWS[0].to_json().replace("0.5", '"much"'),
        ROWS[0].to_json().replace('"clerk"', "7"),
        ROWS[0].to_json().replace('"weight": 1.0', '"weight": 0'),
        ROWS[0].to_json().replace('"weight": 1.0', '"weight": "much"'),
    ],
)
def test_a_line_that_is_no_row_is_quoted(line: str) -> None:
    with pytest.raises(RouteError, match="This is no feedback row"):
        Feedback.from_json(line)


def test_numbers_that_are_not_finite_are_written_as_valid_json_and_read_as_an_error() -> None:
    row = replace(ROWS[1], reward=math.nan, propensity=math.inf, cost=math.nan, probabilities={"fig": math.nan})
    line = row.to_json()
    json.loads(line, parse_constant=pytest.fail)
    expected = replace(ROWS[1], reward=None, propensity=None, cost=None, probabilities=None, error="reward is nan")
    assert Feedback.from_json(line) == expected
    assert Feedback.from_json(json.dumps(vars(row))) == expected  # as other writers put it


def test_what_is_passed_over_is_counted_by_reason(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    lines = [
        LOGGED.to_json(),
        '{"candidates": ["a"], "chos',
        "\udcff",
        "7",
        '{"mood": 3}',
        '{"reward": 1, "run": 7}',
        "",
    ]
    lines += [LOGGED.to_json(), '{"reward": 1, "decision": "e"}', '{"reward": 1, "run": "s"}', "[" * 100_000]
    path.write_text("\n".join(lines), encoding="utf-8", errors="surrogateescape")
    table = read_feedback_table(path)
    assert table.rows == (LOGGED,)
    assert table.skipped == {
        "damaged line": 3,
        "neither a feedback row nor a reward": 3,
        "decision written again": 1,
        "reward of an unknown decision": 1,
        "reward of an unknown run": 1,
    }


def test_a_table_tells_what_it_holds() -> None:
    table = FeedbackTable((*ROWS, LOGGED), {"<damaged> line": 4})
    assert [line.rsplit(maxsplit=1) for line in str(table).splitlines()[2:]] == [
        ["rows", "3"],
        ["rows with a reward", "2"],
        ["rows with a propensity", "2"],
        ["passed over: <damaged> line", "4"],
    ]
    assert "passed over: &lt;damaged&gt; line" in table._repr_html_()


@pytest.mark.parametrize("content", ["", "\n\n", "<html>", '{"reward": 1.0, "decision": "d"}\n'])
def test_a_file_without_a_row_is_an_error_that_says_why(content: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(content)
    with pytest.raises(RouteError, match=r"rows.jsonl' holds no usable feedback row: (it is empty|damaged|reward of)"):
        read_feedback(tmp_path / "rows.jsonl")


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl"):
        read_feedback(tmp_path / "none.jsonl")


def runs(texts: list[str]) -> list[Feedback]:
    """Two decisions a run; the second reads one of two texts."""
    return [
        replace(LOGGED, field=field, text=text, run=str(number), id=f"{number} {field}")
        for number, request in enumerate(texts)
        for field, text in (("topic", request), ("tool", f"topic {number % 2}"))
    ]


def test_a_split_keeps_a_run_and_all_runs_of_a_request_together() -> None:
    rows = runs([f"request {number % 100}" for number in range(300)])
    parts = split_feedback(rows)
    assert sorted(row.id for part in parts for row in part) == sorted(row.id for row in rows)
    requests = [{row.text for row in part if row.field == "topic"} for part in parts]
    assert not requests[0] & requests[1]
    assert not {row.run for row in parts[0]} & {row.run for row in parts[1]}
    for part in parts:
        assert len(part) == 2 * len({row.run for row in part})
        assert part == [row for row in rows if row in part]
        assert 200 < len(part) < 400


def test_rows_that_stand_alone_are_split_by_their_text() -> None:
    rows = [replace(LOGGED, text=f"request {number % 40}", run="", example=str(number)) for number in range(120)]
    first, second = split_feedback(rows, 0.8, seed=1)
    assert not {row.text for row in first} & {row.text for row in second}
    assert len(first) > len(second)


def test_a_log_that_grows_keeps_its_requests_where_they_were() -> None:
    rows = runs([f"request {number}" for number in range(60)])
    early, late = split_feedback(rows[:60]), split_feedback(rows)
    assert all(set(map(str, before)) <= set(map(str, after)) for before, after in zip(early, late, strict=True))
    assert split_feedback(rows, seed=1) != late


def test_a_split_with_an_empty_part_is_refused() -> None:
    for rows in ([], runs(["one request"] * 9)):
        with pytest.raises(RouteError, match=rf"{len(rows)} rows of {bool(rows):d} requests cannot be split"):
            split_feedback(rows)
    with pytest.raises(RouteError, match=r"share=1\.0 is no share"):
        split_feedback(ROWS, 1.0)
