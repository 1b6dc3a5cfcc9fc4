"""Every notebook runs from top to bottom in a fresh kernel, and what its text claims holds there."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))

# By notebook: expressions over its variables, asserted in a last cell.
CLAIMS = {
    "01_quickstart": [
        "evaluate(trained).score > evaluate(routed).score + 5",
        "float(loss) < 0.5",
    ],
    "02_learn_from_the_metric": [
        "before + 0.05 < learned[-1] <= 1",
        "abs(skyline - learned[-1]) < 0.03",
        "rollouts[-1] < 800",
        "reports['1 in 10 wrong, measured'].noise > 0",
        "accuracies['1 in 10 wrong, believed'] < accuracies['1 in 10 wrong, measured'] < 1",
        "frontier[0].cost > frontier[3].cost > frontier[-1].cost",
        "all(reward > before + (1 - before) * cost / (1000 * PRICE) for cost, reward in checked.values())",
        "comparison.verdict == 'switch'",
        "truth['untrained'] + 0.05 < truth['candidate']",
        "all(abs(found.evaluation.estimates['doubly robust'].reward.value - truth[name]) < 0.06"
        " for name, (_, found) in judged.items())",
        "unjudged.verdict == 'no verdict'",
    ],
}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_and_shows_what_it_claims(path: Path, tmp_path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    claims = "\n".join(f"assert {claim}, {claim!r}" for claim in CLAIMS[path.stem])
    notebook.cells.append(nbformat.v4.new_code_cell(claims))
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    shown = [output.get("data", {}) for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any(data.get("text/html", "").startswith("<table>") for data in shown)
    assert any("image/png" in data for data in shown)
    assert not list(tmp_path.iterdir()), "A notebook leaves no files where it is run."


def test_there_are_notebooks() -> None:
    assert [path.stem for path in NOTEBOOKS] == sorted(CLAIMS)
