"""The table on `docs/compatibility.md`: one line an optimizer, as its test recorded it."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tabulate import tabulate

PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"
START, END = "<!-- table: written by `pytest tests/compat --write-table` -->", "<!-- end of table -->"
COLUMNS = ("optimizer", "changes for the LM predictors", "the route's head", "with a plain function")


@dataclass(frozen=True)
class Entry:
    """What one test saw; made when all its assertions held."""

    optimizer: str
    changes: tuple[str, ...]
    head: str

    @property
    def cells(self) -> tuple[str, ...]:
        return f"`{self.optimizer}`", ", ".join(self.changes), self.head, "the same"


def written() -> list[tuple[str, ...]]:
    """The cells of the table on the page, line by line, the header first."""
    header, _, *rows = PAGE.read_text(encoding="utf-8").split(START)[1].split(END)[0].strip().splitlines()
    return [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in (header, *rows)]


def write(entries: Iterable[Entry]) -> None:
    table = tabulate([entry.cells for entry in entries], COLUMNS, tablefmt="github")
    page = PAGE.read_text(encoding="utf-8")
    before, after = page.split(START)[0], page.split(END)[1]
    PAGE.write_text(f"{before}{START}\n\n{table}\n\n{END}{after}", encoding="utf-8")
