"""Pictures of a compile's report; they need the extra `plots`."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dspy_router.learning.reliability import Reliability
    from dspy_router.optimizers.frontier import FrontierPoint


def save_frontier(points: "Sequence[FrontierPoint]", path: str | Path, *, cost_unit: str = "dollars") -> Path:
    """Draw what reward can be had at what cost.

    Args:
        points: A report's `frontier`; at least one.
        path: A file name matplotlib knows the ending of, such as `frontier.png`.
        cost_unit: Of the horizontal axis.

    Returns:
        The path.

    Raises:
        ValueError: If there are no points: the program's runs cost nothing, or only one thing was tried.
        ImportError: If matplotlib is not installed.
    """
    _frontier_figure(points, cost_unit).savefig(path, dpi=120)
    return Path(path)


def frontier_svg(points: "Sequence[FrontierPoint]", *, cost_unit: str = "dollars") -> str:
    """The same picture as SVG, to stand in a page of HTML."""
    return _svg(_frontier_figure(points, cost_unit))


def reliability_svg(tables: "Mapping[str, Reliability]") -> str:
    """`dspy_router.evaluation.reliability.reliability_figure` as SVG, to stand in a page of HTML."""
    from dspy_router.evaluation.reliability import reliability_figure

    return _svg(reliability_figure(tables))


def _svg(figure: Any) -> str:
    picture = io.StringIO()
    figure.savefig(picture, format="svg", metadata={"Date": None})
    return picture.getvalue()[picture.getvalue().index("<svg") :]


def _frontier_figure(points: "Sequence[FrontierPoint]", cost_unit: str) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not points:
        raise ValueError("There is no frontier to draw: the runs cost nothing, or one option alone was tried.")
    figure = Figure(figsize=(5, 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot([point.cost for point in points], [point.reward for point in points], marker="o")
    for point in points:
        axes.annotate(
            f"{point.cost_weight:.3g}", (point.cost, point.reward), xytext=(4, -10), textcoords="offset points", size=8
        )
    axes.set(xlabel=f"{cost_unit} a run", ylabel="reward a run", title="By weight of the cost")
    axes.grid(alpha=0.3)
    return figure
