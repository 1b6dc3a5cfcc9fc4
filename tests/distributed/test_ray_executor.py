import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dspy
import psutil
import pytest
import ray

from dspy_router import RouteError, RouteFinetune
from dspy_router.distributed import RayExecutor
from dspy_router.optimizers.override import Site
from dspy_router.optimizers.rollout_log import RolloutLog
from dspy_router.optimizers.rollouts import Job, Rollout, RolloutRunner, keyed
from dspy_router.optimizers.runs import find_routes
from tests.distributed.programs import Ending, Greeting, TellingShop, once, told
from tests.programs import FRUIT, Shop, fruit_requests, right_fruit

SITE = Site("self.clerk", "fruit", 0)
SECRET = "sk-not-to-be-written"


@pytest.fixture(scope="module")
def workers() -> Iterator[RayExecutor]:
    executor = RayExecutor(2, threads=2)
    yield executor
    executor.close()


def runner(program: dspy.Module, metric: Any = right_fruit, **settings: Any) -> RolloutRunner:
    defaults = {"num_threads": 2, "failure_score": 0.0, "max_errors": 5, **settings}
    return RolloutRunner(program, find_routes(program), metric, **defaults)


class Elsewhere:
    """Can be pickled here and not opened there."""

    def __reduce__(self) -> Any:
        return missing, ()


def missing() -> None:
    raise LookupError("no such package")


def kill(process: int) -> None:
    os.kill(process, signal.SIGKILL)


def test_rollouts_are_those_of_threads_with_their_tokens_and_cost(
    cluster: Any, workers: RayExecutor, scripted_lm: Any
) -> None:
    server = scripted_lm(lambda text: '{"reply": "hello"}')
    base = server.lm.kwargs["api_base"]
    lm = dspy.LM("openai/gpt-4.1-mini", api_base=base, api_key=SECRET, cache=False)
    examples = keyed(fruit_requests(9))
    jobs = [Job(index, ((SITE, FRUIT[index % 2]),)) for index in range(3)]
    jobs += [Job(index, look=index, sampled=True) for index in range(3, 9)]

    def rollouts(executor: RayExecutor | None) -> tuple[list[Rollout], list[str]]:
        server.requests.clear()
        callback = dspy.utils.callback.BaseCallback()
        callback.lock = threading.Lock()  # which cannot be pickled, and stays here
        with dspy.context(lm=lm, adapter=dspy.JSONAdapter(), callbacks=[callback]):
            found = runner(Greeting(), executor=executor).run(jobs, examples, phase="train")
        return found, sorted(server.requests)

    in_threads, asked = rollouts(None)
    lm.history.append({"never": threading.Lock()})  # nor is the record of calls sent
    assert rollouts(workers) == (in_threads, asked)
    assert {rollout.tokens for rollout in in_threads} == {25}
    assert all(rollout.cost for rollout in in_threads)
    session = Path(cluster._private.worker.global_worker.node.get_session_dir_path())
    written = [path for path in session.rglob("*") if path.is_file() and not path.is_symlink()]
    assert written
    assert not [path for path in written if SECRET.encode() in path.read_bytes()]


def test_new_heads_are_sent_and_an_encoder_is_loaded_once_a_worker(
    cluster: Any, workers: RayExecutor, tmp_path: Path
) -> None:
    program, examples = TellingShop(tmp_path, seconds=0.05), keyed(fruit_requests(8))
    own = runner(program, executor=workers)
    jobs = [Job(index) for index in range(8)]
    chosen = []
    for fruit in range(3):
        program.clerk.head["fruit"].bias.data[:] = 0
        program.clerk.head["fruit"].bias.data[fruit] = 100
        chosen.append({run.decisions[0].chosen for run in own.run(jobs, examples, phase=str(fruit))})
    assert chosen == [{"apple"}, {"banana"}, {"cherry"}]
    processes, loaded = set(told(tmp_path / "runs")), told(tmp_path / "encoders")
    assert os.getpid() not in processes
    assert processes <= set(loaded)  # one may have started too late to run anything
    assert len(loaded) == len(set(loaded)) <= 2


@pytest.mark.parametrize("culprit", ["metric", "program", "settings", "example"])
def test_what_cannot_be_pickled_is_named(cluster: Any, workers: RayExecutor, culprit: str) -> None:
    lock = threading.Lock()
    program, metric, example = Shop(), right_fruit, fruit_requests(1)[0]
    if culprit == "program":
        program.lock = lock
    if culprit == "metric":
        metric = lambda example, prediction: lock.locked()  # noqa: E731
    if culprit == "example":
        example["lock"] = lock
    with (
        dspy.context(**({"own": lock} if culprit == "settings" else {})),
        pytest.raises(RouteError, match=rf"The {culprit} cannot be sent to a worker process: .*lock"),
    ):
        runner(program, metric, executor=workers).run([Job(0)], keyed([example]), phase="train")


def test_too_many_errors_stop_the_rollouts(cluster: Any, workers: RayExecutor) -> None:
    def metric(example: dspy.Example, prediction: dspy.Prediction) -> bool:
        raise LookupError("no such shelf")

    own = runner(Shop(), metric, max_errors=3, executor=workers)
    with pytest.raises(RouteError, match=r"Stopped after \d+ rollouts .*: LookupError: no such shelf"):
        own.run([Job(index) for index in range(40)], keyed(fruit_requests(40)), phase="train")
    assert 3 <= len(own.finished) <= 3 + 2 * workers.threads


def test_a_program_that_a_worker_cannot_open_is_said_to_be_so(cluster: Any, workers: RayExecutor) -> None:
    program = Shop()
    program.elsewhere = Elsewhere()
    with pytest.raises(RouteError, match=r"A Ray worker could not load the program: LookupError\('no such package'\)"):
        runner(program, executor=workers).run([Job(0)], keyed(fruit_requests(1)), phase="train")


def test_a_program_that_ends_its_process_stops_the_rollouts(
    cluster: Any, workers: RayExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "retries", 0)
    with pytest.raises(RouteError, match="1 times a Ray worker died while it ran the example"):
        runner(Ending(), executor=workers).run([Job(0)], keyed(fruit_requests(1)), phase="train")


def test_a_compile_whose_worker_is_killed_pays_for_every_rollout_once(
    cluster: Any, workers: RayExecutor, tmp_path: Path
) -> None:
    def compiled(folder: Path, executor: RayExecutor | None) -> RouteFinetune:
        optimizer = RouteFinetune(right_fruit, max_metric_calls=60, log_dir=folder / "log", executor=executor)
        program = optimizer.compile(TellingShop(folder, seconds=0.2), trainset=fruit_requests(40))
        heads.append(program.clerk.head["fruit"].weight.tolist())
        return optimizer

    heads: list[Any] = []
    folders = [tmp_path / name for name in ("threads", "ray")]
    for folder in folders:
        folder.mkdir()
    in_threads = compiled(folders[0], None)
    runs = folders[1] / "runs"
    killer = once(lambda: len(told(runs)) > 12, lambda: kill(told(runs)[-1]))
    report = compiled(folders[1], workers).report
    killer.join()
    assert heads[0] == heads[1]
    assert report.rollouts == in_threads.report.rollouts
    assert 1 <= report.lost <= workers.threads
    assert report.rollouts <= len(told(runs)) <= report.rollouts + report.lost  # none that had ended was run again
    assert "lost with their worker and run again" in str(report)
    logs = [sorted((folder / "log" / "rollouts.jsonl").read_text().splitlines()) for folder in folders]
    assert logs[0] == logs[1]


def test_a_cluster_that_is_shut_down_leaves_what_was_paid(cluster: Any, tmp_path: Path) -> None:
    program, examples, jobs = TellingShop(tmp_path, 0.1), keyed(fruit_requests(20)), [Job(index) for index in range(20)]
    log = tmp_path / "log"
    own = runner(program, log=RolloutLog(log), executor=RayExecutor(1, threads=2))
    stopper = once(lambda: len(told(tmp_path / "runs")) > 5, cluster.shutdown)
    with pytest.raises(RouteError, match=r"The Ray cluster is gone. What was paid for is kept in .*rollouts.jsonl"):
        own.run(jobs, examples, phase="train")
    stopper.join()
    paid = len(RolloutLog(log))
    assert 3 <= paid == len(own.finished) < 20
    again = runner(program, log=RolloutLog(log))
    (tmp_path / "runs").unlink()
    assert len(again.run(jobs, examples, phase="train")) == 20
    assert len(told(tmp_path / "runs")) == 20 - paid


def test_a_cluster_that_is_killed_gives_way_to_threads(cluster: Any, tmp_path: Path) -> None:
    # Longer than the workers of a killed node live, and than it takes to ask for a sign of life.
    program, examples, jobs = TellingShop(tmp_path, 0.5), keyed(fruit_requests(40)), [Job(index) for index in range(40)]
    own = runner(program, num_threads=16, executor=RayExecutor(1, threads=2, on_lost="threads"))
    # That of a cluster before may still be on its way out.
    raylet = max((one for one in psutil.Process().children() if one.name() == "raylet"), key=psutil.Process.create_time)
    killer = once(lambda: len(told(tmp_path / "runs")) > 3, raylet.kill)
    rollouts = own.run(jobs, examples, phase="train")
    killer.join()
    assert rollouts == runner(Shop()).run(jobs, examples, phase="train")
    runs = told(tmp_path / "runs")
    assert 40 <= len(runs) <= 40 + own.lost
    assert os.getpid() in runs
    assert not cluster.is_initialized()


def test_without_a_cluster_it_says_how_to_get_one() -> None:
    ray.shutdown()
    with pytest.raises(RouteError, match=r"connected to no Ray cluster. Call ray.init\(\)"):
        runner(Shop(), executor=RayExecutor()).run([Job(0)], keyed(fruit_requests(1)), phase="train")


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"workers": 0}, "workers=0"), ({"threads": 0}, "threads=0"), ({"on_lost": "wait"}, "on_lost='wait'")],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RouteError, match=message):
        RayExecutor(**settings)
