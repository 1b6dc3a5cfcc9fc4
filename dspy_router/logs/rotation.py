"""A log in several files: `log.jsonl` is written to, `log.jsonl.1` is the one before it, and so on back in time."""

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO


def rotated(path: Path, number: int) -> Path:
    """The name of a log's file `number` rotations ago."""
    return path.with_name(f"{path.name}.{number}")


def rotate(path: Path, backups: int | None) -> None:
    """Move every file of a log one number up, so that `path` is free; the caller holds the log's lock.

    Args:
        path: The file that is written to.
        backups: How many files to keep beside it, oldest dropped; None keeps all.
    """
    numbers = _numbers(path)
    if backups is not None:
        for number in [number for number in numbers if number >= backups]:
            rotated(path, number).unlink()
            numbers.remove(number)
    # A rotation that was cut short leaves a gap; moving up to it and no further completes it.
    gap = next(number for number in range(1, len(numbers) + 2) if number not in numbers)
    for number in range(gap, 1, -1):
        rotated(path, number - 1).replace(rotated(path, number))
    path.replace(rotated(path, 1))


@contextmanager
def open_in_time_order(path: Path) -> Iterator[Sequence[IO[bytes]]]:
    """All files of a log, open for reading, oldest first, as they stood at one moment.

    Raises:
        FileNotFoundError: If there is none.
    """
    with ExitStack() as stack:
        while True:
            names = _names(path) or [path]
            try:
                files = [stack.enter_context(name.open("rb")) for name in names]
                unmoved = all(
                    os.path.samestat(os.fstat(file.fileno()), name.stat())
                    for file, name in zip(files, names, strict=True)
                )
            except FileNotFoundError:
                if not _names(path):
                    raise
                unmoved = False
            if unmoved and names == _names(path):
                break
            stack.close()  # a writer has rotated meanwhile
        yield files


def _names(path: Path) -> list[Path]:
    names = [rotated(path, number) for number in sorted(_numbers(path), reverse=True)]
    return [*names, path] if path.exists() else names


def _numbers(path: Path) -> set[int]:
    if not path.parent.exists():
        return set()
    suffixes = (name.removeprefix(f"{path.name}.") for name in os.listdir(path.parent) if name != path.name)
    numbers = {int(suffix) for suffix in suffixes if suffix.isdecimal() and suffix.isascii()}
    return {number for number in numbers if number > 0 and rotated(path, number).exists()}
