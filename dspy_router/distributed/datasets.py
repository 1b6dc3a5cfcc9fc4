"""`route_dataset`: a route's decisions for every row of a dataset, made by the worker processes of a Ray cluster."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dspy
from dspy.adapters.utils import annotation_allows_none
from pydantic_core import PydanticUndefined

from dspy_router.decisions import Decision
from dspy_router.distributed.cluster import ray_module
from dspy_router.distributed.parcels import Opener, Parcels, settings_of_here
from dspy_router.errors import RouteError
from dspy_router.probabilities import likeliest
from dspy_router.route import DifferentiableRoute

if TYPE_CHECKING:
    import pyarrow
    from ray.data import Dataset

COLUMNS = ("decision", "confidence", "probabilities", "abstained", "score")  # after the field's name and `_`


def route_dataset(
    route: DifferentiableRoute,
    data: "Dataset | str | Path",
    *,
    workers: int = 2,
    batch_size: int = 256,
    top: int = 5,
    num_cpus: float = 1,
) -> "Dataset":
    """A dataset with the route's decisions beside its rows, to be made as it is read or written.

    Columns named as the signature's inputs are what the route reads; a null is an empty input, as None is in a call,
    and may be missing where the signature gives an input a default or allows None. All columns stay, so that an id goes
    with its row. Rows come in any order, unless `ray.data.DataContext` is told to `preserve_order`.

    For every field that the route decides there are then:

    | column | type | what it holds |
    |---|---|---|
    | `<field>_decision` | string | the option chosen; the fallback's choice where the route declined, else null there |
    | `<field>_confidence` | float64 | the chosen option's probability |
    | `<field>_probabilities` | list of {option: string, probability: float64} | the `top` likeliest, likeliest first |
    | `<field>_abstained` | bool | whether the route declined |
    | `<field>_score` | float64 | how far the decision can be relied on; null without a guard |

    Each worker loads the encoder once and uses one torch thread for each of its CPUs. Where a worker is killed, Ray
    makes its batches anew elsewhere: no row is lost, and none comes twice.

    A fallback answers in the worker, one row after the other, and what it raises ends the reading; DSPy's settings go
    there with it. Then the API keys of LMs pass through Ray's object store, which is in memory and can be written to
    disk where that runs out.

    Args:
        route: Decides; its audit, if it has one, does not take part.
        data: A `ray.data.Dataset`, or the path of a `.parquet` or `.jsonl` file or of a folder of Parquet files.
        workers: Most worker processes. Ray keeps CPUs back for reading and writing, so a cluster needs one more than
            all workers take.
        batch_size: Rows encoded together.
        top: How many options `<field>_probabilities` names.
        num_cpus: What each worker takes of the cluster's CPUs.

    Raises:
        RouteError: If this process is connected to no Ray cluster, `data` cannot be read so, an input's column is
            missing or a column of the result there already, or the route cannot be pickled.

    Example:
        >>> def route_file(route):
        ...     import ray
        ...     ray.init()
        ...     route_dataset(route, "requests.jsonl", workers=4).write_parquet("decisions")
    """
    ray = ray_module()
    for name, value in (("workers", workers), ("batch_size", batch_size), ("top", top)):
        if value < 1:
            raise RouteError(f"{name}={value}; give 1 or more.")
    dataset = _read(data)
    inputs = _input_columns(route, dataset.columns() or [])
    # A pool that took all CPUs would wait for ever for what it is to read.
    cpus = ray.cluster_resources().get("CPU", 0) - 1
    room = max(1, int(cpus / num_cpus)) if num_cpus else workers
    routed: Dataset = dataset.map_batches(
        RoutingWorker,
        fn_constructor_args=worker_arguments(route, inputs, top),
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=workers, initial_size=min(workers, room)),
        batch_size=batch_size,
        batch_format="pyarrow",
        num_cpus=num_cpus,
    )
    return routed


def worker_arguments(route: DifferentiableRoute, inputs: Sequence[str], top: int) -> tuple[Any, ...]:
    """What a `RoutingWorker` is made from, to be sent to its process."""
    settings = {} if route.fallback is None else settings_of_here()
    route = route.deepcopy()  # without its audit
    route.on_abstain = "none"  # an error would end the reading
    parcels = Parcels()
    parcel = parcels.pack(route=route, settings=settings)
    encoders, _ = parcels.encoders_beside(set())
    return encoders, parcel, inputs, top


class RoutingWorker:
    """A process that routes batches of rows; an actor of Ray Data.

    Args:
        encoders: As `Parcels.encoders_beside` gives them.
        parcel: The route and DSPy's settings.
        inputs: The columns that the route reads.
        top: How many probabilities are kept.
    """

    def __init__(self, encoders: bytes, parcel: bytes, inputs: Sequence[str], top: int) -> None:
        opener = Opener()
        opener.add_encoders(encoders)
        parts = opener.open(parcel)
        self._route: DifferentiableRoute = parts["route"]
        self._settings = parts["settings"]
        self._inputs = list(inputs)
        self._top = top

    def __call__(self, table: "pyarrow.Table") -> "pyarrow.Table":
        """The rows with the columns that `route_dataset` names."""
        with dspy.context(**self._settings):
            predictions = self._route.batch(table.select(self._inputs).to_pylist())
        for field in self._route.fields:
            for name, column in self._columns([prediction["decisions"][field.name] for prediction in predictions]):
                table = table.append_column(f"{field.name}_{name}", column)
        return table

    def _columns(self, decisions: Sequence[Decision]) -> "list[tuple[str, pyarrow.Array]]":
        import pyarrow

        undecided = self._route.fallback is None  # where it declined
        top = [likeliest(dict(decision.probabilities), self._top).items() for decision in decisions]
        pair = pyarrow.struct({"option": pyarrow.string(), "probability": pyarrow.float64()})
        columns: list[tuple[list[Any], Any]] = [
            ([None if one.abstained and undecided else one.name for one in decisions], pyarrow.string()),
            ([one.confidence for one in decisions], pyarrow.float64()),
            ([[{"option": name, "probability": value} for name, value in row] for row in top], pyarrow.list_(pair)),
            ([one.abstained for one in decisions], pyarrow.bool_()),
            ([one.score for one in decisions], pyarrow.float64()),
        ]
        return [(name, pyarrow.array(values, kind)) for name, (values, kind) in zip(COLUMNS, columns, strict=True)]


def _read(data: "Dataset | str | Path") -> "Dataset":
    import ray.data

    if isinstance(data, ray.data.Dataset):
        return data
    if not isinstance(data, str | Path):
        raise RouteError(f"data={data!r} is no dataset: give a ray.data.Dataset, or a path.")
    path = str(data)
    if path.endswith((".jsonl", ".ndjson")):
        return ray.data.read_json(path)
    if path.endswith(".parquet") or Path(path).is_dir():
        return ray.data.read_parquet(path)
    raise RouteError(
        f"{path!r} is neither a .parquet or .jsonl file nor a folder of Parquet files. Read it with ray.data, and give "
        "the dataset."
    )


def _input_columns(route: DifferentiableRoute, columns: Sequence[str]) -> list[str]:
    """The columns that the route reads.

    Raises:
        RouteError: If one is missing, or one of the result is there already.
    """
    missing = [
        name
        for name, info in route.signature.input_fields.items()
        if name not in columns and info.default is PydanticUndefined and not annotation_allows_none(info.annotation)
    ]
    if missing:
        raise RouteError(
            f"The dataset has no column {missing}, which the route reads; its columns are {list(columns)}. Rename them "
            "(Dataset.rename_columns)."
        )
    results = [f"{field.name}_{name}" for field in route.fields for name in COLUMNS]
    if taken := [name for name in results if name in columns]:
        raise RouteError(f"The dataset has columns {taken} already. Drop or rename them: the decisions go there.")
    return [name for name in route.signature.input_fields if name in columns]
