"""Tables of reports, as text and as HTML: tabulate is imported when one is drawn, and not with the package."""

from collections.abc import Iterable, Sequence
from typing import Any


def table(rows: Iterable[Sequence[Any]], *, headers: Sequence[str] = (), form: str = "simple", **settings: Any) -> str:
    """Rows as a table; cells are shown as they are, unless `disable_numparse=False`.

    Args:
        rows: Cells by row.
        headers: Of the columns.
        form: One of tabulate's formats.
        **settings: Of `tabulate.tabulate`.

    Example:
        >>> print(table([("fig", "0.50"), ("date", "0.25")], headers=("option", "share")))
        option    share
        --------  -------
        fig       0.50
        date      0.25
    """
    from tabulate import tabulate

    return str(tabulate(rows, headers=headers, tablefmt=form, **{"disable_numparse": True} | settings))
