"""How time and memory grow with the training rows, the options, the callers, the Ray workers: with fitted exponents.

    python benchmarks/scaling.py [--only rows|options|callers|workers] [--pictures FOLDER]

Rows and options are synthetic, since no dataset here has a million of the one or 100,000 of the other: rows are noisy
unit vectors around their option's, options are mixtures of real sentence vectors. Decisions are made with the default
encoder on real texts. Memory is that of a process of its own for each size, less what it had before it began: the peak
of a fit, and what a route holds. The last table sets the exact search beside an approximate index, with its recall.

An exponent is the slope of a least-squares line through the logarithms of size and figure, with its standard error: 1
is proportional growth, 0 none. It is fitted to the larger sizes, where fixed costs no longer hide it. Of Ray workers
there are two sizes, and so no error.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import psutil
import torch
from common import print_table, quartiles, read
from scipy.stats import linregress

from dspy_router import DifferentiableRoute, SentenceEncoder
from dspy_router.heads import OptionHead, RouteHead
from dspy_router.learning.fit import fit_head
from dspy_router.learning.rows import TargetRows

DIMENSION = 384
ROWS = (1_000, 10_000, 100_000, 1_000_000)
ROW_OPTIONS = 150
OPTIONS = (10, 100, 1_000, 10_000, 100_000)
BASE = 100  # options that the other numbers of options are compared with
ROUNDS = 60  # decisions timed for each number of options, in turns
CALLERS = (1, 2, 4, 8, 16, 32, 64)
CALLS = 256  # decisions for each number of callers
REAL = 500  # sentence vectors that synthetic options are mixed from
QUERIES = 100
PROBES = (8, 32, 128)  # lists that the approximate index looks through
FITTED = 3  # largest sizes that an exponent is fitted to


@dataclass(frozen=True)
class Curve:
    """A figure at several sizes."""

    name: str
    sizes: Sequence[float]
    values: Sequence[float]
    unit: str

    @property
    def exponent(self) -> str:
        """Of the growth, with its standard error."""
        pairs = [(size, value) for size, value in zip(self.sizes, self.values, strict=True) if value > 0][-FITTED:]
        if len(pairs) < 2:
            return "-"
        line = linregress(*np.log(np.array(pairs)).T)
        return f"{line.slope:.2f} ± {line.stderr:.2f}" if len(pairs) > 2 else f"{line.slope:.2f}"


def main() -> None:
    """Run what the command line asks for, print the tables and draw the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=SECTIONS, help="one section")
    parser.add_argument("--pictures", type=Path, help="folder for the pictures")
    parser.add_argument(
        "--measure", nargs=2, metavar=("WHAT", "SIZE"), help="one size, as JSON: what each process runs"
    )
    options = parser.parse_args()
    if options.measure:
        what, size = options.measure
        print(json.dumps(MEASURED[what](int(size))))
        return
    for name, section in SECTIONS.items():
        if options.only in (None, name):
            curves = section()
            print_table(
                f"Growth with the {name}", ("what", "exponent", "from", "to"),
                [[curve.name, curve.exponent, f"{curve.sizes[-FITTED:][0]:,.0f}", f"{curve.sizes[-1]:,.0f}"]
                 for curve in curves],
            )  # fmt: skip
            if options.pictures:
                draw(name, curves, options.pictures)


# Training rows


def rows_section() -> list[Curve]:
    """Fits of one head to more and more rows."""
    found = [in_process("rows", size) for size in ROWS]
    print_table(
        f"A fit among {ROW_OPTIONS} options, {torch.get_num_threads()} threads",
        ("rows", "seconds", "CPU seconds", "passes", "right on new rows, %", "peak memory, MB"),
        [[f"{size:,}", f"{each['seconds']:.2f}", f"{each['cpu']:.2f}", f"{each['iterations']:.0f}",
          f"{100 * each['right']:.1f}", f"{each['megabytes']:,.0f}"]
         for size, each in zip(ROWS, found, strict=True)],
    )  # fmt: skip
    return curves(ROWS, found, {"cpu": ("CPU time of a fit", "s"), "megabytes": ("peak memory of a fit", "MB")})


def measure_rows(size: int) -> dict[str, float]:
    """One fit."""
    random = np.random.default_rng(0)
    centers = unit(random.standard_normal((ROW_OPTIONS, DIMENSION), dtype=np.float32))
    vectors, labels = noisy(centers, size, random)
    rows = TargetRows.from_labels(labels, ROW_OPTIONS)
    head = OptionHead(torch.from_numpy(centers))
    fit_head(OptionHead(torch.from_numpy(centers)), vectors[:500], rows.part(np.arange(500)))  # warm
    before, started, cpu = memory(), time.perf_counter(), time.process_time()
    result = fit_head(head, vectors, rows)
    found = {"seconds": time.perf_counter() - started, "cpu": time.process_time() - cpu}
    new, right = noisy(centers, 10_000, random)
    return found | {
        "iterations": result.iterations,
        "right": float(np.mean(head.logits(new).argmax(axis=1) == right)),
        "megabytes": peak() - before,
    }


def noisy(centers: np.ndarray, size: int, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors around centers, with the index of each one's center."""
    labels = random.integers(len(centers), size=size)
    vectors = random.standard_normal((size, DIMENSION), dtype=np.float32)
    vectors *= 0.2
    vectors += centers[labels]
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors, labels


# Options


def options_section() -> list[Curve]:
    """Decisions among more and more options."""
    found = [in_process("options", size) for size in OPTIONS]
    seconds = decisions_in_turns()
    base = np.array(seconds[BASE])
    lines = []
    for size, each in zip(OPTIONS, found, strict=True):
        each["decision"] = float(np.median(seconds[size]))
        low, middle, high = quartiles(np.array(seconds[size]) / base)
        lines.append(
            [f"{size:,}", f"{1e3 * each['decision']:.2f}", f"{middle:.2f} ({low:.2f}-{high:.2f})",
             f"{1e3 * each['head']:.3f}", f"{each['megabytes']:,.0f}", f"{each['copy']:.3f}",
             f"{each['saved']:,.1f}", f"{each['save']:.2f}", f"{each['load']:.2f}"]
        )  # fmt: skip
    print_table(
        f"A decision, {ROUNDS} for each number of options, in turns, one thread; the default encoder",
        ("options", "p50 ms", f"to {BASE} options (quartiles)", "without the encoder, ms", "memory, MB", "deepcopy s",
         "saved, MB", "save s", "load s"),
        lines,
    )  # fmt: skip
    index_table()
    return curves(
        OPTIONS, found,
        {"decision": ("a decision", "s"), "head": ("a decision without the encoder", "s"),
         "megabytes": ("memory of a route", "MB")},
    )  # fmt: skip


def measure_options(size: int) -> dict[str, float]:
    """One route: memory, and the time of all but the encoder."""
    torch.set_num_threads(1)
    vectors, queries = option_vectors(size)
    known = dict(zip((f"request {place}" for place in range(len(queries))), queries, strict=True))
    before = memory()
    route = route_among(vectors, lambda texts: np.stack([known.get(text, queries[0]) for text in texts]))
    for text in known:
        route(text=text)
    taken = []
    for text in known:  # their vectors are in the encoder's cache by now
        started = time.perf_counter()
        route(text=text)
        taken.append(time.perf_counter() - started)
    found = {"head": float(np.median(taken)), "megabytes": memory() - before}
    found["copy"] = seconds_of(route.deepcopy)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "route.json"
        found["save"] = seconds_of(lambda: route.save(path))
        found["saved"] = path.stat().st_size / 1e6
        found["load"] = seconds_of(lambda: route.load(path))
    return found


def decisions_in_turns() -> dict[int, list[float]]:
    """Seconds of decisions, by number of options."""
    encoder = SentenceEncoder(cache_size=0)
    routes = {size: route_among(option_vectors(size)[0], encoder) for size in OPTIONS}
    texts = sorted({row.text for row in read("snips", "test")})
    np.random.default_rng(0).shuffle(texts)
    seconds: dict[int, list[float]] = {size: [] for size in OPTIONS}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for route in routes.values():
        route(text="warm up")
    for text in texts[:ROUNDS]:
        for size, route in routes.items():
            started = time.perf_counter()
            route(text=text)
            seconds[size].append(time.perf_counter() - started)
    torch.set_num_threads(threads)
    return seconds


def index_table() -> None:
    """What an approximate index would bring, and what it would miss: faiss on the most options."""
    try:
        import faiss
    except ImportError:
        print("\nfaiss-cpu is not installed: no comparison with an approximate index.")
        return
    faiss.omp_set_num_threads(1)
    vectors, queries = option_vectors(OPTIONS[-1])
    head = OptionHead(torch.from_numpy(vectors))
    weights, exact = head.folded().weights, [np.argsort(-(head.folded().weights @ query))[:10] for query in queries]
    found = [np.argsort(-head.logits(query))[:10] for query in queries]
    taken = seconds_each(head.logits, queries)
    lines = [index_line("this package: all, in half precision", exact, 0.0, taken, found)]
    index = faiss.IndexIVFFlat(
        faiss.IndexFlatIP(DIMENSION), DIMENSION, int(4 * len(weights) ** 0.5), faiss.METRIC_INNER_PRODUCT
    )
    index.cp.niter, index.cp.max_points_per_centroid = 5, 64
    built = seconds_of(lambda: (index.train(weights), index.add(weights)))
    for probes in PROBES:
        index.nprobe = probes
        found = [index.search(query[None], 10)[1][0] for query in queries]
        taken = seconds_each(lambda query: index.search(query[None], 10), queries)
        lines.append(index_line(f"faiss inverted file, {probes} of {index.nlist:,} lists", exact, built, taken, found))
    print_table(
        f"The likeliest among {len(weights):,} options, {len(queries)} requests, against float32",
        ("what", "built in s", "p50 ms", "the likeliest found, %", "of the ten likeliest, %"),
        lines,
    )


def index_line(
    name: str, exact: Sequence[np.ndarray], built: float, seconds: Sequence[float], found: Sequence[np.ndarray]
) -> list[str]:
    """One way to find the likeliest, against the exact order."""
    first = np.mean([ours[0] == right[0] for ours, right in zip(found, exact, strict=True)])
    ten = np.mean([len(set(ours) & set(right)) / len(right) for ours, right in zip(found, exact, strict=True)])
    return [name, f"{built:.1f}", f"{1e3 * np.median(seconds):.2f}", f"{100 * first:.1f}", f"{100 * ten:.1f}"]


def route_among(vectors: np.ndarray, encoder: Any) -> DifferentiableRoute:
    """An untrained route among options with these description vectors, which stand in for encoded texts."""
    names = [f"option {place}" for place in range(len(vectors))]
    route = DifferentiableRoute("text -> option", tools=names, encoder=encoder)
    route.learned.replace(route.fields, RouteHead(["option"], [OptionHead(torch.from_numpy(vectors))]))
    return route


@lru_cache(maxsize=1)
def real_vectors() -> tuple[np.ndarray, np.ndarray]:
    """Sentence vectors to mix options from, and those of other requests."""
    texts = sorted({row.text for row in read("clinc150", "train")})
    queries = sorted({row.text for row in read("clinc150", "test")} - set(texts))
    np.random.default_rng(0).shuffle(texts)
    np.random.default_rng(1).shuffle(queries)
    encoder = SentenceEncoder()
    return encoder.encode(texts[:REAL]), encoder.encode(queries[:QUERIES])


def option_vectors(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors of synthetic options, each a mixture of two real ones with noise; and of requests."""
    real, queries = real_vectors()
    random = np.random.default_rng(2)
    first, second = random.integers(len(real), size=(2, size))
    noise = random.standard_normal((size, DIMENSION), dtype=np.float32) * np.float32(0.3 / DIMENSION**0.5)
    return unit(real[first] + np.float32(0.5) * real[second] + noise), queries


# Callers


def callers_section() -> list[Curve]:
    """One route shared by more and more threads."""
    encoder = SentenceEncoder(cache_size=0)
    route = route_among(option_vectors(ROW_OPTIONS)[0], encoder)
    texts = sorted({row.text for row in read("snips", "test")})[:CALLS]
    route(text="warm up")
    rates: list[float] = []
    for callers in CALLERS:
        with ThreadPoolExecutor(callers) as pool:
            taken = seconds_of(lambda pool=pool: list(pool.map(lambda text: route(text=text), texts)))
        rates.append(len(texts) / taken)
    print_table(
        f"{len(texts)} decisions of one route, {torch.get_num_threads()} threads of torch",
        ("callers", "decisions a second", "to one caller"),
        [
            [f"{callers}", f"{rate:,.0f}", f"{rate / rates[0]:.2f}"]
            for callers, rate in zip(CALLERS, rates, strict=True)
        ],
    )
    return [Curve("decisions a second", CALLERS, rates, "1/s")]


# Ray workers


def workers_section() -> list[Curve]:
    """Rollouts in one worker process of a Ray cluster and in two: `scaling_ray`, which also has datasets."""
    import ray
    from scaling_ray import ONE, ROLLOUTS, TWO, print_rollouts, rollouts, start_cluster

    threads = torch.get_num_threads()
    start_cluster()
    seconds = rollouts()
    ray.shutdown()
    torch.set_num_threads(threads)
    print_rollouts(seconds)
    return [
        Curve(f"rollouts a second: {what}", (1, 2), [ROLLOUTS / np.median(each[place]) for place in (ONE, TWO)], "1/s")
        for what, each in seconds.items()
    ]


# What the sections share


SECTIONS: dict[str, Callable[[], list[Curve]]] = {
    "rows": rows_section,
    "options": options_section,
    "callers": callers_section,
    "workers": workers_section,
}
MEASURED: dict[str, Callable[[int], dict[str, float]]] = {"rows": measure_rows, "options": measure_options}


def in_process(what: str, size: int) -> dict[str, float]:
    """A measurement in a process of its own."""
    command = [sys.executable, __file__, "--measure", what, str(size)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def curves(
    sizes: Sequence[int], found: Sequence[Mapping[str, float]], figures: Mapping[str, tuple[str, str]]
) -> list[Curve]:
    """Figures at all sizes as curves."""
    return [Curve(name, sizes, [each[key] for each in found], unit) for key, (name, unit) in figures.items()]


def draw(section: str, found: Sequence[Curve], folder: Path) -> None:
    """Draw the curves of a section, each in axes of its own, on logarithmic scales."""
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=(4 * len(found), 3.5), layout="constrained")
    for axes, curve in zip(np.ravel(figure.subplots(1, len(found))), found, strict=True):
        axes.loglog(curve.sizes, curve.values, marker="o")
        axes.set(xlabel=section, ylabel=curve.unit, title=f"{curve.name}\nexponent {curve.exponent}")
        axes.set_ylim(min(curve.values) / 3, max(curve.values) * 3)  # so that what hardly grows looks so
        axes.grid(alpha=0.3)
    figure.savefig(folder / f"scaling_{section}.png", dpi=150)


def unit(vectors: np.ndarray) -> np.ndarray:
    """Vectors at length one."""
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def seconds_of(call: Callable[[], Any]) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def seconds_each(call: Callable[[np.ndarray], Any], queries: Sequence[np.ndarray]) -> list[float]:
    """Seconds of a call with each query."""
    return [seconds_of(lambda query=query: call(query)) for query in queries]


def memory() -> float:
    """What this process holds, in MB."""
    return psutil.Process().memory_info().rss / 1e6


def peak() -> float:
    """The most this process has held, in MB."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / 1e6 if sys.platform == "darwin" else most * 1024 / 1e6


if __name__ == "__main__":
    main()
