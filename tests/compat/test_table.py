"""The table on `docs/compatibility.md` is what the tests of this run recorded; this file runs last."""

import pytest

from tests.compat import test_better_together, test_optimizers
from tests.compat.table import COLUMNS, Entry, write, written


def test_the_page_holds_what_was_recorded(entries: dict[str, Entry], request: pytest.FixtureRequest) -> None:
    names = [row.name for row in (*test_optimizers.ROWS, *test_better_together.ROWS)]
    if request.config.getoption("--write-table", default=False):
        write(entries[name] for name in names)
    header, *rows = written()
    advice = "Write the page anew: pytest tests/compat --write-table"
    assert header == COLUMNS, advice
    assert [row[0] for row in rows] == [f"`{name}`" for name in names], advice
    for entry in entries.values():
        assert entry.cells in rows, advice
