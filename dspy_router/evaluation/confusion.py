"""Which options are taken for which, as a picture."""

from collections.abc import Sequence
from pathlib import Path


def save_confusion(
    right: Sequence[str], chosen: Sequence[str], options: Sequence[str], path: str | Path, *, title: str = ""
) -> Path:
    """Write the confusion matrix of decisions as a picture; needs the extra `plots`.

    Args:
        right: The right option of each decision.
        chosen: The option chosen.
        options: Names in the order of rows and columns.
        path: A file name matplotlib knows the ending of, such as `confusion.png`.
        title: Above the picture.

    Returns:
        The path.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from sklearn.metrics import ConfusionMatrixDisplay, confusion_matrix

    side = 3.5 + 0.5 * len(options)
    figure = Figure(figsize=(side, side), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    matrix = confusion_matrix(right, chosen, labels=list(options))
    ConfusionMatrixDisplay(matrix, display_labels=list(options)).plot(
        ax=axes, cmap="Blues", colorbar=False, xticks_rotation=45
    )
    axes.set(xlabel="chosen", ylabel="right", title=title)
    for label in axes.get_xticklabels():
        label.set_horizontalalignment("right")
    figure.savefig(path, dpi=120)
    return Path(path)
