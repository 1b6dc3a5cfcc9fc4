import gzip
import json
from pathlib import Path

import pytest

from dspy_router import RouteError
from dspy_router.feedback import text_key
from dspy_router.importers import read_table
from tests.programs import fruit_route

COLUMNS = {"text": "question", "chosen": "tool", "reward": "ok", "propensity": "p", "field": "tool"}
ENTRIES = [
    {"question": "how far?", "tool": "map", "ok": 1, "p": 0.5, "dollars": 0.01, "session": "s1"},
    {"question": "write to Ann", "tool": "mail", "ok": False, "p": 1.5, "dollars": None, "session": "s2"},
    {"question": "how far to Ann?", "tool": "map", "ok": 0.25, "p": None, "dollars": 0.02, "session": "s2"},
]


def as_csv(delimiter: str) -> str:
    lines = [list(ENTRIES[0]), *([("" if cell is None else str(cell)) for cell in row.values()] for row in ENTRIES)]
    return "".join(delimiter.join(line) + "\r\n" for line in lines)


CONTENTS = {
    "log.jsonl": "".join(json.dumps(entry) + "\n" for entry in ENTRIES),
    "log.ndjson": "\n\n".join(json.dumps(entry) for entry in ENTRIES),
    "log.csv": as_csv(","),
    "log.tsv": as_csv("\t"),
    "spreadsheet.csv": "\ufeff" + as_csv(","),
}


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("name", CONTENTS)
def test_every_form_of_a_table_gives_the_same_rows(name: str, packed: bool, tmp_path: Path) -> None:
    path = tmp_path / (name + ".gz" if packed else name)
    data = CONTENTS[name].encode()
    path.write_bytes(gzip.compress(data) if packed else data)
    table = read_table(path, **COLUMNS, cost="dollars", run="session", route="self.planner")
    assert [(row.text, row.chosen, row.reward, row.propensity, row.cost, row.run, row.sole) for row in table.rows] == [
        ("how far?", "map", 1.0, 0.5, 0.01, "s1", True),
        ("write to Ann", "mail", 0.0, 1.5, None, "s2", False),
        ("how far to Ann?", "map", 0.25, None, 0.02, "s2", False),
    ]
    assert not table.skipped
    for row in table.rows:
        assert (row.source, row.route, row.field, row.candidates) == ("log", "self.planner", "tool", ("map", "mail"))
        assert row.example == text_key(row.text)


def test_rows_that_cannot_be_used_are_counted_by_reason(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text(
        "question,tool,ok,p\n"
        "how far?,map,TRUE,0.5\n"
        "  ,map,1,0.5\n"
        "how far?,,1,0.5\n"
        "how far?,mop,1,0.5\n"
        "how far?,map,,0.5\n"
        "how far?,map,nan,0.5\n"
        "how far?,map,good,0.5\n"
        "how far?,map,inf,0.5\n"
        "how far?,map,1,half\n"
        "how far?,map,1,0.5,7\n"
        "how far?,map\n"
    )
    table = read_table(tmp_path / "log.csv", **COLUMNS, candidates=["mail", "map"])
    assert [row.reward for row in table.rows] == [1.0]
    assert table.skipped == {
        "more cells than columns": 1,
        "no text": 1,
        "no chosen option": 1,
        "the chosen option is not among the candidates": 1,
        "no reward": 3,
        "the reward is no finite number": 2,
        "the propensity is no finite number": 1,
    }


def test_candidates_may_differ_from_row_to_row(tmp_path: Path) -> None:
    entries = [
        {"q": "a", "t": "map", "c": ["map", "mail"]},
        {"q": "b", "t": "map", "c": '["map", "phone"]'},
        {"q": "c", "t": "map", "c": "map|mail"},
        {"q": "d", "t": "map", "c": None},
        {"q": "e", "t": "mail", "c": ["map"]},
    ]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    table = read_table(tmp_path / "log.jsonl", text="q", chosen="t", candidates="c", field="tool")
    assert [(row.candidates, row.reward) for row in table.rows] == [(("map", "mail"), None), (("map", "phone"), None)]
    assert table.skipped == {
        "the candidates are no list of names": 2,
        "the chosen option is not among the candidates": 1,
    }


def test_a_column_may_be_a_function_of_the_row(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"said": "apple", "picked": {"name": "apple"}, "stars": 4}\n{broken\n[1]\n')
    route = fruit_route()
    table = read_table(
        path,
        text=lambda row: route.text({"request": row["said"]}),
        chosen=lambda row: row["picked"]["name"],
        reward=lambda row: row["stars"] / 5,
        example=lambda row: 7,
        candidates=route.fields[0].option_names,
        field="fruit",
    )
    (row,) = table.rows
    assert (row.text, row.chosen, row.reward, row.example) == ("apple", "apple", 0.8, "7")
    assert table.skipped == {"damaged line": 2}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("log.csv", b"question,tool\nhow far?,map\n", r"no column \['ok', 'p'\]; its columns are \['question',"),
        ("log.jsonl", b'{"question": "how far?"}\n', r"has no column \['tool', 'ok', 'p'\]"),
        ("log.csv", b"question,tool,ok,p\n,map,1,1\n", r"no usable feedback row: no text \(1\)"),
        ("log.csv", b"question,tool,ok,p\nh\xe4,map,1,1\n", "cannot be read: .*Save it as UTF-8 text"),
        ("log.csv.gz", b"question", "cannot be read: Not a gzipped file"),
        ("log.jsonl.gz", gzip.compress(b"{}\n" * 99)[:-9], "cannot be read: Compressed file ended"),
        ("log.parquet", b"", "ends in '.parquet'; expected one of"),
    ],
)  # fmt: skip
def test_a_table_of_another_form_is_an_error_that_says_so(
    name: str, content: bytes, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RouteError, match=message):
        read_table(tmp_path / name, **COLUMNS)
