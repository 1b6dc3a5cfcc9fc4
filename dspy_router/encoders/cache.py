"""Vectors computed once: a file of vectors that encoders, runs and processes share.

The store is SQLite in WAL mode, from the standard library: a transaction is whole or absent after a kill at any moment,
processes read while one of them writes, and it needs no pickle and no package. lmdb reads faster, but wants its size
fixed beforehand; diskcache is SQLite again, with pickle for values it does not know. WAL needs a local file system.

A vector is found by a digest of the encoder's fingerprint and of the text; the text itself is not stored. A cache is
only ever a help: whatever goes wrong with it is logged once, and encoding goes on without it.
"""

import hashlib
import json
import logging
import sqlite3
import threading
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from dspy_router.errors import RouteError

if TYPE_CHECKING:
    import numpy as np
    from filelock import FileLock

    from dspy_router.encoders.base import Fingerprint

logger = logging.getLogger(__name__)

VERSION = 1  # SQLite's user_version
APPLICATION = 0x64727663  # SQLite's application_id: "drvc"
MAGIC = b"SQLite format 3\0"
APPLICATION_AT = slice(68, 72)  # of the file
KEYS_A_QUERY = 500  # the oldest SQLite that Python comes with takes 999
WAIT_SECONDS = 10.0  # for another process

Found = TypeVar("Found")

# The files that SQLite has had open in this process. Nobody else may open them here: closing any handle of a file drops
# all locks that the process holds on it, SQLite's too.
_opened: set[Path] = set()
_opening = threading.Lock()


class VectorCache:
    """A bounded file of vectors, safe for threads, processes and kills.

    The file is made at first use. When it outgrows `max_bytes`, the vectors that were written first go. A file that is
    cut short, damaged or of another version is made anew. Where nothing can be written, as on a full disk, the cache is
    off from then on, in this process.

    Args:
        path: The file. SQLite keeps two more beside it while it is open, and there is a lock file.
        max_bytes: What the vectors may take on disk. At 384 dimensions a gigabyte holds some 500,000.

    Raises:
        RouteError: If `max_bytes` is not positive, or there is a file that is no cache of vectors.

    Example:
        >>> import numpy as np, tempfile
        >>> from dspy_router.encoders.base import Fingerprint
        >>> cache = VectorCache(tempfile.mkdtemp() + "/vectors.sqlite")
        >>> encoder = Fingerprint("letters", "", "5f", dimension=2)
        >>> cache.put(encoder, {"a fig": np.array([0.6, 0.8], dtype=np.float32)})
        >>> cache.get(encoder, ["a fig", "a date"])
        {'a fig': array([0.6, 0.8], dtype=float32)}
    """

    def __init__(self, path: str | Path, *, max_bytes: int = 1 << 30) -> None:
        if max_bytes <= 0:
            raise RouteError(f"max_bytes={max_bytes} must be positive: it bounds the file of vectors.")
        self.path = Path(path)
        self.max_bytes = max_bytes
        self._connection: sqlite3.Connection | None = None
        self._of_parents: list[sqlite3.Connection] = []
        self._lock = threading.Lock()
        self._off = False
        self._require_own_file()

    def get(self, fingerprint: "Fingerprint", texts: Iterable[str]) -> "dict[str, np.ndarray]":
        """The vectors, float32 [d], of those texts that have one.

        Args:
            fingerprint: The encoder's.
            texts: Any number.
        """
        import numpy as np

        texts = list(texts)
        keys = _keys(fingerprint, texts)
        by_key = dict(zip(keys, texts, strict=True))

        def read(connection: sqlite3.Connection) -> list[tuple[bytes, bytes]]:
            rows: list[tuple[bytes, bytes]] = []
            for start in range(0, len(keys), KEYS_A_QUERY):
                part = keys[start : start + KEYS_A_QUERY]
                places = ",".join("?" * len(part))
                rows += connection.execute(f"SELECT key, vector FROM vectors WHERE key IN ({places})", part)
            return rows

        rows = self._attempt(read) or []
        size = 4 * fingerprint.dimension
        return {by_key[key]: np.frombuffer(stored, "<f4").copy() for key, stored in rows if len(stored) == size}

    def put(self, fingerprint: "Fingerprint", vectors: "Mapping[str, np.ndarray]") -> None:
        """Keep vectors, float32 [d], by text; after a kill all of them are there, or none.

        Args:
            fingerprint: The encoder's.
            vectors: By text.
        """
        stored = [vector.astype("<f4").tobytes() for vector in vectors.values()]
        rows = list(zip(_keys(fingerprint, vectors), stored, strict=True))

        def write(connection: sqlite3.Connection) -> None:
            with connection:
                connection.execute("BEGIN IMMEDIATE")
                connection.executemany("INSERT OR IGNORE INTO vectors (key, vector) VALUES (?, ?)", rows)
                removed = 1
                while removed and _bytes_used(connection) > self.max_bytes:
                    # A tenth at once, so that this is rare. Ids grow in the order of writing.
                    removed = connection.execute(
                        "DELETE FROM vectors WHERE id <= (SELECT min(id) + (max(id) - min(id)) / 10 FROM vectors)"
                    ).rowcount

        self._attempt(write)

    def close(self) -> None:
        """Close the file; the next use opens it again."""
        with self._lock:
            self._close()

    def after_fork(self) -> None:
        """In a forked child, open the file anew at the next use."""
        global _opening
        _opening, self._lock = threading.Lock(), threading.Lock()
        if self._connection is not None:
            # SQLite forbids even closing it here.
            self._of_parents.append(self._connection)
            self._connection = None

    def _attempt(self, work: Callable[[sqlite3.Connection], Found]) -> Found | None:
        """What `work` returns; None once the cache is off."""
        with self._lock:
            if self._off:
                return None
            try:
                try:
                    return work(self._open())
                except sqlite3.DatabaseError as error:
                    if type(error) is not sqlite3.DatabaseError:  # a subclass: the disk, a lock, permissions
                        raise
                    self._rebuild(str(error))
                    return work(self._open())
            except (sqlite3.Error, OSError) as error:
                self._off = True
                logger.warning(
                    "The cache of vectors %s cannot be used (%s). Texts are encoded without it from now on, in this "
                    "process. Free space or give another path.", self.path, error,
                )  # fmt: skip
                self._close()
                return None

    def _open(self) -> sqlite3.Connection:
        if self._connection is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self._file_lock():
                self._require_own_file()
                self._connection = self._connect()
                (version,) = self._connection.execute("PRAGMA user_version").fetchone()
                if version not in (0, VERSION):
                    self._remove(f"it has version {version}, and this release writes {VERSION}")
                    self._connection = self._connect()
                if version != VERSION:
                    _make_table(self._connection)
        return self._connection

    def _rebuild(self, reason: str) -> None:
        """Replace a damaged file, unless another process already has."""
        self._close()
        with self._file_lock():
            try:
                self._connection = self._connect()
                sound = self._connection.execute("PRAGMA quick_check(1)").fetchone() == ("ok",)
            except sqlite3.DatabaseError:
                sound = False
            if not sound:
                self._remove(reason)
            self._close()

    def _remove(self, reason: str) -> None:
        logger.warning("The cache of vectors %s is made anew: %s.", self.path, reason)
        self._close()
        for suffix in ("", "-wal", "-shm", "-journal"):
            self.path.with_name(self.path.name + suffix).unlink(missing_ok=True)

    def _connect(self) -> sqlite3.Connection:
        with _opening:
            _opened.add(self.path.resolve())
        connection = sqlite3.connect(self.path, timeout=WAIT_SECONDS, isolation_level=None, check_same_thread=False)
        connection.execute("PRAGMA synchronous = NORMAL")  # a power cut may then cost the last vectors, never the file
        return connection

    def _close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _file_lock(self) -> "FileLock":
        from filelock import FileLock

        return FileLock(self.path.with_name(self.path.name + ".lock"), timeout=WAIT_SECONDS)

    def _require_own_file(self) -> None:
        """Refuse to touch a file that somebody else may miss."""
        with _opening:
            if self.path.resolve() in _opened:
                return
            try:
                with self.path.open("rb") as file:
                    start = file.read(APPLICATION_AT.stop)
            except OSError:  # none yet, or none that can be read; opening it says so
                return
        whole = len(start) == APPLICATION_AT.stop
        if start[: len(MAGIC)] != MAGIC[: len(start)] or (
            whole and int.from_bytes(start[APPLICATION_AT], "big") != APPLICATION
        ):
            raise RouteError(
                f"{str(self.path)!r} is no cache of vectors. Give the path of one, or of a file to be made."
            )

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(VectorCache, self.path, max_bytes=self.max_bytes), ()

    def __repr__(self) -> str:
        return f"VectorCache({str(self.path)!r})"


def _make_table(connection: sqlite3.Connection) -> None:
    connection.execute(f"PRAGMA application_id = {APPLICATION}")  # first of all: it says whose file this is
    connection.execute("PRAGMA journal_mode = WAL")
    with connection:
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("CREATE TABLE IF NOT EXISTS vectors (id INTEGER PRIMARY KEY, key BLOB UNIQUE, vector BLOB)")
        connection.execute(f"PRAGMA user_version = {VERSION}")


def _bytes_used(connection: sqlite3.Connection) -> int:
    names = ("page_count", "freelist_count", "page_size")
    pages, free, size = (connection.execute(f"PRAGMA {name}").fetchone()[0] for name in names)
    return int((pages - free) * size)


def _keys(fingerprint: "Fingerprint", texts: Iterable[str]) -> list[bytes]:
    encoder = hashlib.blake2b(json.dumps(fingerprint.to_dict(), sort_keys=True).encode(), digest_size=16)
    keys = []
    for text in texts:
        digest = encoder.copy()
        digest.update(text.encode("utf-8", "surrogatepass"))
        keys.append(digest.digest())
    return keys
