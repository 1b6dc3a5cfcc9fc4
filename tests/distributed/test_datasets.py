import dataclasses
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dspy
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray.data

from dspy_router import DifferentiableRoute, RouteError
from dspy_router.distributed import route_dataset
from dspy_router.distributed.datasets import COLUMNS, RoutingWorker, worker_arguments
from dspy_router.probabilities import likeliest
from tests.distributed.programs import Telling, once, told
from tests.programs import FRUIT, fruit_requests, fruit_route, order_route


@pytest.fixture(autouse=True)
def _quiet(cluster: Any) -> Iterator[None]:
    context = ray.data.DataContext.get_current()
    before = context.enable_progress_bars
    context.enable_progress_bars = False
    yield
    context.enable_progress_bars = before


def requests(count: int) -> list[dict[str, Any]]:
    """Rows with an id; in every tenth the request is null."""
    return [
        {"id": number, "request": example.request if number % 10 else None}
        for number, example in enumerate(fruit_requests(count))
    ]


class SlowTelling(Telling):
    """Adds a line with its process's number for every batch as well."""

    def _encode_batch(self, texts: list[str]) -> Any:
        time.sleep(0.2)
        with self.file.with_name("batches").open("a") as lines:
            lines.write(f"{os.getpid()}\n")
        return super()._encode_batch(texts)


class Old(dspy.Module):
    """A fallback that uses DSPy's settings."""

    def forward(self, request: str) -> dspy.Prediction:
        return dspy.Prediction(fruit=dspy.settings.usual)


def declining(route: DifferentiableRoute, share: float) -> DifferentiableRoute:
    """The route with a guard that declines this share of requests."""
    examples = fruit_requests(300)
    report = route.guard(examples, metric=lambda example, prediction: 0.0, risk=0.02)
    threshold = float(np.quantile(route.score(examples), share))
    route.learned.guard = dataclasses.replace(report, threshold=threshold)
    return route


def test_no_row_is_lost_where_a_worker_is_killed_and_each_is_as_the_route_decides_it(tmp_path: Path) -> None:
    rows = requests(1500)
    source = tmp_path / "requests.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    encoder = SlowTelling(tmp_path / "encoders")
    route = declining(
        DifferentiableRoute("request -> fruit", tools=FRUIT, encoder=encoder, fallback=Old(), on_abstain="raise"), 0.5
    )
    batches = tmp_path / "batches"
    batches.unlink()
    victims: list[int] = []

    def kill() -> None:
        victims.append(told(batches)[-1])
        os.kill(victims[0], signal.SIGKILL)

    killer = once(lambda: len(told(batches)) > 3, kill)
    with dspy.context(usual="cherry"):
        route_dataset(route, source, workers=2, batch_size=50, top=2).write_parquet(str(tmp_path / "decisions"))
        killer.join()
        expected = route.batch([{"request": row["request"]} for row in rows])
    assert victims[0] != os.getpid()
    assert len(set(told(tmp_path / "encoders"))) == len(told(tmp_path / "encoders")) >= 2  # once a worker
    table = pq.read_table(tmp_path / "decisions")
    decided = {row["id"]: row for row in table.to_pylist()}
    assert len(decided) == len(table) == len(rows)
    for row, prediction in zip(rows, expected, strict=True):
        found, decision = decided[row["id"]], prediction.decision
        assert found["request"] == row["request"]
        assert (found["fruit_decision"], found["fruit_abstained"]) == (prediction.fruit, decision.abstained)
        assert found["fruit_confidence"] == pytest.approx(decision.confidence)
        assert found["fruit_score"] == pytest.approx(decision.score)
        assert [pair["option"] for pair in found["fruit_probabilities"]] == list(likeliest(decision.probabilities, 2))
    assert {row["fruit_abstained"] for row in decided.values()} == {True, False}


def test_every_field_has_its_columns_of_one_type_and_a_declined_row_without_a_fallback_no_decision() -> None:
    table = pa.Table.from_pylist([{"id": 1, "request": "a pie"}, {"id": 2, "request": None}])
    sure, unsure = order_route(), declining(order_route(), 1.0)
    unsure.on_abstain = "raise"
    decided, declined = (RoutingWorker(*worker_arguments(route, ["request"], 5))(table) for route in (sure, unsure))
    assert decided.schema == declined.schema
    assert decided.column_names[2:] == [f"{field}_{name}" for field in ("fruit", "size") for name in COLUMNS]
    assert decided["fruit_score"].to_pylist() == [None, None]
    for row in declined.to_pylist():
        assert (row["fruit_decision"], row["size_decision"], row["size_abstained"]) == (None, None, True)
        assert row["fruit_score"] is not None


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (["text"], r"no column \['request'\], which the route reads; its columns are \['text'\]"),
        (["request", "fruit_score"], r"has columns \['fruit_score'\] already"),
    ],
)
def test_columns_that_do_not_fit_are_named(columns: list[str], message: str) -> None:
    data = ray.data.from_items([dict.fromkeys(columns, "pie")])
    with pytest.raises(RouteError, match=message):
        route_dataset(fruit_route(), data)


def test_a_file_of_another_kind_is_refused() -> None:
    with pytest.raises(RouteError, match=r"'requests.csv' is neither a .parquet or .jsonl file"):
        route_dataset(fruit_route(), "requests.csv")
