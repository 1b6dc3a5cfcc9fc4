import subprocess
import sys
import time
from pathlib import Path

import dspy
import pytest

from dspy_router import RouteError, RouteFinetune
from tests.programs import Shop, fruit_requests, right_fruit

ROOT = Path(__file__).parents[2]
SLOW_COMPILE = """
import sys, time
from pathlib import Path
from dspy_router import RouteFinetune
from tests.programs import Shop, fruit_requests, right_fruit

def metric(example, prediction):
    time.sleep(0.02)
    return right_fruit(example, prediction)

optimizer = RouteFinetune(metric, max_metric_calls=80, num_threads=1, log_dir=Path(sys.argv[1]))
optimizer.compile(Shop(), trainset=fruit_requests(60))
"""


def finished(folder: Path) -> int:
    path = folder / "rollouts.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def killed_after(rollouts: int, folder: Path) -> subprocess.Popen[bytes]:
    """A compile in another process, running when so many rollouts are finished; kill it."""
    process = subprocess.Popen([sys.executable, "-c", SLOW_COMPILE, str(folder)], cwd=ROOT)
    deadline = time.monotonic() + 120
    while finished(folder) < rollouts and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    return process


def test_a_compile_killed_again_and_again_resumes_and_a_second_one_is_refused_meanwhile(tmp_path: Path) -> None:
    calls: list[dspy.Example] = []

    def metric(example: dspy.Example, prediction: dspy.Prediction) -> bool:
        calls.append(example)
        return right_fruit(example, prediction)

    def compiled(log_dir: Path | None) -> list[list[float]]:
        optimizer = RouteFinetune(metric, max_metric_calls=80, num_threads=1, log_dir=log_dir)
        return optimizer.compile(Shop(), trainset=fruit_requests(60)).clerk.head["fruit"].weight.tolist()

    uninterrupted = compiled(None)
    needed = len(calls)
    calls.clear()
    for moment in (1, needed - 5):  # in the first round, towards the end
        process = killed_after(moment, tmp_path)
        try:
            if moment == 1:
                with pytest.raises(RouteError, match="Another compile is writing to log_dir="):
                    compiled(tmp_path)
        finally:
            process.kill()  # SIGKILL
            process.wait()
        assert moment <= finished(tmp_path) < needed
    log = tmp_path / "rollouts.jsonl"
    log.write_bytes(log.read_bytes()[:-30])  # and once in the middle of a line
    paid = finished(tmp_path)
    assert not calls
    assert compiled(tmp_path) == uninterrupted
    assert len(calls) == needed - paid
