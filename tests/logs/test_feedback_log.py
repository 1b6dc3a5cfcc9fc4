import json
import math
import multiprocessing
import resource
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from filelock import FileLock, Timeout

from dspy_router import Feedback, RouteError
from dspy_router.feedback import read_feedback, read_feedback_table, write_feedback
from dspy_router.logs import feedback_log
from dspy_router.logs.feedback_log import FeedbackLog

ROOT = Path(__file__).parents[2]
ROW = Feedback("log", "a", "clerk", "fruit", "a ripe fig", ("apple", "fig"), "fig", 0.5, None)
WRITE_UNTIL_KILLED = """
import sys
from dataclasses import replace
from dspy_router.logs.feedback_log import FeedbackLog
from tests.logs.test_feedback_log import ROW

log = FeedbackLog(sys.argv[1])
for number in range(10**9):
    log.append(replace(ROW, id=f"{sys.argv[2]}-{number}", text=ROW.text * 200))
    print(number, flush=True)
"""


def row(number: int | str, **changes: object) -> Feedback:
    return replace(ROW, id=str(number), **changes)


def write_some(path: Path, writer: int, count: int) -> None:
    log = FeedbackLog(path, max_bytes=8_000)
    for number in range(count):
        log.append(row(f"{writer}-{number}"))


def files(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.parent.iterdir() if not entry.name.endswith(".lock"))


def test_eight_threads_share_a_log_that_rotates(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda writer: write_some(path, writer, 60), range(8)))
    table = read_feedback_table(path)
    assert sorted(found.id for found in table.rows) == sorted(f"{w}-{n}" for w in range(8) for n in range(60))
    assert not table.skipped
    assert len(files(path)) > 10
    assert max(entry.stat().st_size for entry in tmp_path.iterdir()) <= 8_000
    for writer in range(8):  # time order, through all files
        assert [found.id for found in table.rows if found.id.startswith(f"{writer}-")] == [
            f"{writer}-{number}" for number in range(60)
        ]


def test_four_processes_share_a_log_that_rotates_while_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    FeedbackLog(path).append(row("first"))
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=write_some, args=(path, writer, 150)) for writer in range(4)]
    for process in processes:
        process.start()
    seen = [1]
    while any(process.is_alive() for process in processes):
        table = read_feedback_table(path)
        assert not set(table.skipped) - {"damaged line"}  # a line that is just being written
        seen.append(len(table.rows))
    for process in processes:
        process.join()
        assert process.exitcode == 0
    table = read_feedback_table(path)
    assert {found.id for found in table.rows} == {"first"} | {f"{w}-{n}" for w in range(4) for n in range(150)}
    assert not table.skipped
    assert seen == sorted(seen)  # nothing that was there is ever missing


def test_a_process_killed_with_sigkill_loses_at_most_the_row_it_was_writing(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    for attempt in range(2):
        command = [sys.executable, "-c", WRITE_UNTIL_KILLED, str(path), str(attempt)]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        while process.stdout.readline() != "20\n":
            assert process.poll() is None
        process.send_signal(signal.SIGKILL)
        told = [20, *map(int, process.stdout.read().split())]
        process.wait()
        table = read_feedback_table(path)
        written = sum(found.id.startswith(f"{attempt}-") for found in table.rows)
        assert told[-1] + 1 <= written <= told[-1] + 2
        assert table.skipped.get("damaged line", 0) <= 1
    FeedbackLog(path).append(row("after"))  # the lock of the dead does not hold anybody up
    assert read_feedback(path)[-1].id == "after"


def test_a_log_cut_at_any_byte_of_its_last_line_keeps_every_other_row(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    FeedbackLog(path).append(row(1), row(2), row(3, text="späte Feige"))
    whole = path.read_bytes()
    last = whole.rindex(b"\n", 0, -1) + 1
    for cut in range(last, len(whole)):
        path.write_bytes(whole[:cut])
        complete = cut == len(whole) - 1  # only the newline is missing
        expected = ["1", "2", "3"] if complete else ["1", "2"]
        assert [found.id for found in read_feedback(path)] == expected
        FeedbackLog(path).append(row(4))
        table = read_feedback_table(path)
        assert [found.id for found in table.rows] == [*expected, "4"]
        assert table.skipped == ({} if complete or cut == last else {"damaged line": 1})


def test_the_oldest_file_goes_when_there_are_more_than_backups(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    log = FeedbackLog(path, max_bytes=len(ROW.to_json()) * 2, backups=2)
    for number in range(9):
        log.append(row(number))
    assert files(path) == ["log.jsonl", "log.jsonl.1", "log.jsonl.2"]
    assert [found.id for found in log.read().rows] == ["6", "7", "8"]
    FeedbackLog(path, max_bytes=1, backups=1).append(row(9))
    assert [found.id for found in log.read().rows] == ["8", "9"]


def test_by_default_nothing_is_dropped_and_ten_files_are_in_time_order(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    log = FeedbackLog(path, max_bytes=1)
    for number in range(12):
        log.append(row(number))
    assert len(files(path)) == 12
    assert [found.id for found in read_feedback(path)] == [str(number) for number in range(12)]


def test_a_rotation_that_was_cut_short_is_completed(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    log = FeedbackLog(path, max_bytes=1)
    for number in range(4):
        log.append(row(number))
    (tmp_path / "log.jsonl.3").rename(tmp_path / "log.jsonl.4")  # as if killed between two renames
    (tmp_path / "log.jsonl.2").rename(tmp_path / "log.jsonl.3")
    log.append(row(4))
    assert [found.id for found in read_feedback(path)] == ["0", "1", "2", "3", "4"]
    assert files(path)[1:] == [f"log.jsonl.{number}" for number in range(1, 5)]
    path.rename(tmp_path / "elsewhere")  # as if killed before the new file was begun
    assert [found.id for found in read_feedback(path)] == ["0", "1", "2", "3"]


def test_rewards_arrive_later_and_the_last_one_counts(tmp_path: Path) -> None:
    log = FeedbackLog(tmp_path / "log.jsonl")
    log.append(row(1), row(2), row(3))
    log.reward("1", 0.25, cost=0.002)
    log.reward("2", True)
    log.reward("1", 0.75)
    log.reward("none", 1.0)
    table = log.read()
    assert [(found.reward, found.sole, found.cost) for found in table.rows] == [
        (0.75, True, 0.002),
        (1.0, True, None),
        (None, True, None),
    ]
    assert table.skipped == {"reward of an unknown decision": 1}


def test_a_reward_is_found_in_a_later_file_than_its_row(tmp_path: Path) -> None:
    log = FeedbackLog(tmp_path / "log.jsonl", max_bytes=1)
    log.append(row(1))
    log.append(row(2))
    log.reward("1", 1.0)
    assert [found.reward for found in log.read().rows] == [1.0, None]


def test_the_reward_of_a_run_speaks_of_one_decision_only_if_the_run_had_one(tmp_path: Path) -> None:
    log = FeedbackLog(tmp_path / "log.jsonl")
    log.append(row(1, run="lone"), row(2, run="pair"), row(3, run="pair"), row(4, run="torn"), row(5, run="open"))
    log.append(row(6, run="open"))
    log.reward("3", 0.5)  # its own reward stays, though the run's comes later
    log.reward_run("lone", 1.0)
    log.reward_run("pair", 0.0, cost=0.1)
    log.reward_run("torn", 1.0, decisions=2)  # its other row was lost
    log.reward_run("none", 1.0)
    table = log.read()
    assert [(found.id, found.reward, found.sole, found.cost) for found in table.rows] == [
        ("1", 1.0, True, None),
        ("2", 0.0, False, 0.1),
        ("3", 0.5, True, 0.1),
        ("4", 1.0, False, None),
        ("5", None, False, None),
        ("6", None, False, None),
    ]
    assert table.skipped == {"reward of an unknown run": 1}
    write_feedback(table.rows, tmp_path / "rows.jsonl")
    assert read_feedback(tmp_path / "rows.jsonl") == list(table.rows)


@pytest.mark.parametrize(
    ("reward", "error"),
    [(math.nan, "reward is nan"), (-math.inf, "reward is -inf"), (None, "reward is None"), ("ok", "reward is 'ok'")],
)
def test_a_reward_that_is_no_finite_number_makes_an_error_row_and_valid_json(
    reward: object, error: str, tmp_path: Path
) -> None:
    log = FeedbackLog(tmp_path / "log.jsonl")
    log.append(row(1), row(2, reward=reward if isinstance(reward, float) else math.nan))
    log.reward("1", reward, cost=math.nan)
    for line in log.path.read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)
    first, second = log.read().rows
    assert (first.reward, first.error, first.cost) == (None, error, None)
    assert second.reward is None
    assert second.error is not None
    log.reward("1", 1.0)
    assert (log.read().rows[0].reward, log.read().rows[0].error) == (1.0, None)


def test_a_full_disk_leaves_no_part_of_a_row(tmp_path: Path) -> None:
    log = FeedbackLog(tmp_path / "log.jsonl")
    log.append(row(1))
    before = log.path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 100, limits[1]))
    try:
        with pytest.raises(OSError, match=r"No space left|File too large"):
            log.append(row(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert log.path.read_bytes() == before


def test_a_lock_that_is_held_is_a_timeout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feedback_log, "LOCK_SECONDS", 0.05)
    log = FeedbackLog(tmp_path / "log.jsonl")
    with ThreadPoolExecutor(1) as pool, FileLock(f"{log.path}.lock"), pytest.raises(Timeout):
        pool.submit(log.append, ROW).result()


def test_a_log_made_before_a_fork_serves_the_child(tmp_path: Path) -> None:
    log = FeedbackLog(tmp_path / "log.jsonl")
    log.append(row(1))
    child = multiprocessing.get_context("fork").Process(target=log.append, args=(row(2),))
    child.start()
    child.join()
    assert [found.id for found in log.read().rows] == ["1", "2"]


@pytest.mark.parametrize("settings", [{"max_bytes": 0}, {"backups": 0}])
def test_settings_that_would_keep_nothing_are_refused(settings: dict[str, int], tmp_path: Path) -> None:
    with pytest.raises(RouteError, match="give at least 1"):
        FeedbackLog(tmp_path / "log.jsonl", **settings)
