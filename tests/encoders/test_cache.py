import asyncio
import logging
import os
import pickle
import signal
import sqlite3
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

from dspy_router import DifferentiableRoute, RouteError
from dspy_router.encoders.base import Fingerprint
from dspy_router.encoders.cache import VectorCache
from dspy_router.encoders.function import FunctionEncoder
from tests.conftest import bag_of_words
from tests.encoders.numbered_vectors import ENCODER, vectors


class Counting:
    def __init__(self) -> None:
        self.texts: list[str] = []

    def __call__(self, texts: list[str]) -> np.ndarray:
        self.texts += texts
        return bag_of_words(texts)


def child(code: str, *arguments: object) -> "subprocess.Popen[str]":
    """A process that runs code, with the names of `tests.encoders.numbered_vectors`."""
    code = "import sys\nfrom tests.encoders.numbered_vectors import *\n" + textwrap.dedent(code)
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "vectors.sqlite"


def test_each_text_is_encoded_once_whichever_way_and_run(path: Path) -> None:
    first, second = Counting(), Counting()
    expected = FunctionEncoder(first, vector_cache=path).encode(["a fig", "a date", "a fig"])
    encoder = FunctionEncoder(second, vector_cache=path, cache_size=0)
    np.testing.assert_array_equal(encoder.encode(["a fig", "a date", "a fig"]), expected)
    np.testing.assert_array_equal(encoder.encode_one("a date"), expected[1])
    np.testing.assert_array_equal(asyncio.run(encoder.aencode_one("a fig")), expected[0])
    assert first.texts[-2:] == ["a fig", "a date"]
    assert set(second.texts) & {"a fig", "a date"} == set()
    encoder.encode_one("new")
    assert VectorCache(path).get(encoder.fingerprint, ["new"])


def test_a_route_goes_through_it(path: Path) -> None:
    tools = {"play_music": "play songs", "get_weather": "the weather forecast"}
    for count in (1, 0):
        function = Counting()
        route = DifferentiableRoute("text -> tool", tools=tools, encoder=FunctionEncoder(function, vector_cache=path))
        assert route(text="play songs for me").tool == "play_music"
        assert function.texts.count("play songs for me") == count


def test_encoders_do_not_get_each_others_vectors(path: Path) -> None:
    cache = VectorCache(path)
    cache.put(ENCODER, vectors(0, 3))
    for other in (Fingerprint("words", "", "60", 64), Fingerprint("words", "2", "5f", 64)):
        assert cache.get(other, ["text 0"]) == {}
    assert list(cache.get(ENCODER, ["text 2", "text 9", "text 0"])) != []


def test_many_texts_are_read_at_once_and_exactly(path: Path) -> None:
    cache = VectorCache(path)
    stored = {f"text {n}": vector for n, vector in enumerate(np.random.default_rng(0).random((1300, 64), np.float32))}
    cache.put(ENCODER, stored)
    found = cache.get(ENCODER, stored)
    assert found.keys() == stored.keys()
    assert all(np.array_equal(found[text], vector) for text, vector in stored.items())


def test_texts_are_not_in_the_file(path: Path) -> None:
    cache = VectorCache(path)
    cache.put(ENCODER, {"a secret request": np.ones(64, np.float32)})
    cache.close()
    assert b"secret" not in path.read_bytes()


def test_it_stays_within_its_bytes_and_drops_the_oldest(path: Path) -> None:
    cache = VectorCache(path, max_bytes=200_000)
    for start in range(0, 3000, 100):
        cache.put(ENCODER, vectors(start, start + 100))
    cache.close()
    assert path.stat().st_size < 260_000
    assert cache.get(ENCODER, ["text 0"]) == {}
    assert len(cache.get(ENCODER, vectors(2900, 3000))) == 100


@pytest.mark.parametrize("share", [0.0005, 0.01, 0.3, 0.6, 0.95])
def test_a_file_cut_short_is_made_anew_and_that_is_said_once(
    path: Path, share: float, caplog: pytest.LogCaptureFixture
) -> None:
    cache = VectorCache(path)
    cache.put(ENCODER, vectors(0, 2000))
    cache.close()
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    cache = VectorCache(path)
    with caplog.at_level(logging.WARNING, logger="dspy_router"):
        cache.get(ENCODER, vectors(0, 2000))
        cache.put(ENCODER, vectors(0, 2000))
        found = cache.get(ENCODER, vectors(0, 2000))
    assert len(found) == 2000
    assert [record.getMessage().split("made anew")[1:] != [] for record in caplog.records] == [True]


def test_bytes_that_went_bad_are_found_out(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = VectorCache(path)
    cache.put(ENCODER, vectors(0, 500))
    cache.close()
    data = bytearray(path.read_bytes())
    data[4096:40960] = bytes(36864)
    path.write_bytes(data)
    encoder = FunctionEncoder(bag_of_words, vector_cache=path)
    with caplog.at_level(logging.WARNING, logger="dspy_router"):
        encoder.encode([f"text {number}" for number in range(500)])
    assert "is made anew" in caplog.text
    assert len(VectorCache(path).get(encoder.fingerprint, vectors(0, 500))) == 500


def test_a_file_of_another_version_is_made_anew(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = VectorCache(path)
    cache.put(ENCODER, vectors(0, 5))
    cache.close()
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 7")
    connection.close()
    with caplog.at_level(logging.WARNING, logger="dspy_router"):
        assert VectorCache(path).get(ENCODER, vectors(0, 5)) == {}
    assert "it has version 7, and this release writes 1" in caplog.text


def test_somebody_elses_file_is_left_alone(tmp_path: Path) -> None:
    notes, database = tmp_path / "notes.txt", tmp_path / "users.sqlite"
    notes.write_text("buy figs")
    with sqlite3.connect(database) as connection:
        connection.execute("CREATE TABLE users (name TEXT)")
    connection.close()
    before = database.read_bytes()
    for path in (notes, database):
        with pytest.raises(RouteError, match="is no cache of vectors"):
            FunctionEncoder(bag_of_words, vector_cache=path)
    assert (notes.read_text(), database.read_bytes()) == ("buy figs", before)
    with pytest.raises(RouteError, match="max_bytes=0 must be positive"):
        VectorCache(tmp_path / "new", max_bytes=0)


def test_on_a_full_disk_routing_goes_on_and_that_is_said_once(path: Path) -> None:
    process = child(
        """
        import resource
        from dspy_router import DifferentiableRoute
        from dspy_router.encoders.function import FunctionEncoder
        from tests.conftest import bag_of_words

        encoder = FunctionEncoder(bag_of_words, vector_cache=sys.argv[1])
        route = DifferentiableRoute("text -> tool", tools=["play music", "get weather"], encoder=encoder)
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))  # no file of this process may grow beyond
        assert [route(text=f"play music number {number}").tool for number in range(200)] == ["play music"] * 200
        """,
        path,
    )
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert said.count("cannot be used") == 1


def test_where_nothing_can_be_written_texts_are_encoded_all_the_same(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    encoder = FunctionEncoder(bag_of_words, vector_cache=tmp_path / "file" / "vectors.sqlite")
    with caplog.at_level(logging.WARNING, logger="dspy_router"):
        assert encoder.encode(["a", "b"]).shape == (2, 64)
        assert encoder.encode_one("c").shape == (64,)
    assert caplog.text.count("cannot be used") == 1


def test_two_processes_write_at_once(path: Path) -> None:
    code = """
        cache, start = VectorCache(sys.argv[1]), int(sys.argv[2])
        for number in range(start, start + 1000, 10):
            cache.put(ENCODER, vectors(number, number + 10))
        """
    writers = [child(code, path, start) for start in (0, 500)]
    for writer in writers:
        said, _ = writer.communicate(timeout=60)
        assert (writer.returncode, said) == (0, "")
    found = VectorCache(path).get(ENCODER, vectors(0, 1500))
    assert all(np.array_equal(found[text], vector) for text, vector in vectors(0, 1500).items())


def test_a_second_cache_of_a_process_does_not_free_the_file_for_others(path: Path) -> None:
    # Closing any handle of a file drops all of the process's locks on it, so nobody may read it beside SQLite.
    first = VectorCache(path)
    first.put(ENCODER, vectors(0, 5))
    VectorCache(path)
    other = child("cache = VectorCache(sys.argv[1]); cache.put(ENCODER, vectors(5, 10)); cache.close()", path)
    assert other.communicate(timeout=60) == ("", None)
    assert path.with_name(path.name + "-wal").stat().st_size > 0  # the last one to close would have removed it
    first.put(ENCODER, vectors(10, 15))
    assert len(first.get(ENCODER, vectors(0, 15))) == 15


def test_a_kill_in_the_middle_of_writing_leaves_whole_batches(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    code = """
        cache = VectorCache(sys.argv[1])
        print("ready", flush=True)
        for number in range(0, 10**6, 200):
            cache.put(ENCODER, vectors(number, number + 200))
        """
    for delay in (0.02, 0.1, 0.2):
        writer = child(code, path)
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
        time.sleep(delay)
        writer.send_signal(signal.SIGKILL)
        writer.communicate()
        with caplog.at_level(logging.WARNING, logger="dspy_router"):
            found = VectorCache(path).get(ENCODER, vectors(0, 100_000))
        assert len(found) % 200 == 0
        assert all(np.array_equal(found[text], vector) for text, vector in vectors(0, len(found)).items())
    assert found
    assert not caplog.records


def test_a_forked_child_opens_the_file_for_itself(path: Path) -> None:
    encoder = FunctionEncoder(bag_of_words, vector_cache=path)
    encoder.encode(["before"])
    process = os.fork()
    if process == 0:
        cache = encoder.vector_cache
        assert cache is not None
        encoder.encode(["in the child"])
        os._exit(0 if cache.get(encoder.fingerprint, ["before", "in the child"]).keys() else 1)
    assert os.waitpid(process, 0)[1] == 0
    assert encoder.vector_cache is not None
    assert len(encoder.vector_cache.get(encoder.fingerprint, ["before", "in the child"])) == 2


def test_pickling_keeps_the_path(path: Path) -> None:
    cache = pickle.loads(pickle.dumps(VectorCache(path, max_bytes=5000)))
    assert (cache.path, cache.max_bytes) == (path, 5000)
