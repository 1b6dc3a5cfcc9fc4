from pathlib import Path

from dspy_router.evaluation.confusion import save_confusion


def test_the_picture_is_written(tmp_path: Path) -> None:
    right, chosen = ["a", "b", "b"], ["a", "b", "a"]
    path = save_confusion(right, chosen, ["a", "b"], tmp_path / "confusion.png", title="A title")
    assert path.read_bytes().startswith(b"\x89PNG")
    larger = save_confusion(right, chosen, [*"abcdefgh"], tmp_path / "larger.png")
    assert larger.stat().st_size > path.stat().st_size
