"""Every path to a decision and its peers in one run: time of one, of many, of concurrent callers; memory; imports.

    python benchmarks/speed.py [--pictures FOLDER]

What is compared is measured in turns, and the ratios are taken round by round, so that the machine's own speed and
what else it does cancel out; the cores' time beside the clock's has no waiting in it. Every text is new to the encoder,
which keeps no vectors here. All paths choose among CLINC150's 150 intents, from the published ten examples of each. The
requests are SNIPS's and CLINC150's training texts. The static encoder is distilled at first, which takes a minute or
two. `benchmarks/encoders.py` prints what each path's encoder costs in accuracy.
"""

import argparse
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import dspy
import numpy as np
import torch
from common import VECTORS, Row, examples, print_table, quartiles, read, semantic_router, static_folder
from latency import milliseconds, parts, ratio, timed
from tqdm.auto import tqdm

import dspy_router
from dspy_router import DifferentiableRoute, RouteFinetune, SentenceEncoder
from dspy_router.encoders.base import Encoder

DECISIONS = 300  # texts for the time of one decision
MANY, ROUNDS = 1000, 5  # texts of a batch, and batches
CALLERS, CALLS = 32, 320  # at once, and of a round
PARTS = ("one", "batches", "callers", "memory", "imports")
PROCESSES = 5  # of each kind, for memory and imports
ONNX, INT8, TORCH, STATIC = "OnnxEncoder", "OnnxEncoder, int8", "SentenceEncoder", "StaticEncoder"
ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {  # class and settings
    ONNX: ("OnnxEncoder", {"cache_size": 0}),
    INT8: ("OnnxEncoder", {"cache_size": 0, "arithmetic": "int8"}),
    TORCH: ("SentenceEncoder", {"cache_size": 0}),
    STATIC: ("StaticEncoder", {"folder": str(static_folder())}),
}
HEADERS = ("what", "calls", "p50 ms", "p95 ms", "CPU ms", "ratio (quartiles)", "of what")
DECIDING = """
from dspy_router import DifferentiableRoute, {encoder}
route = DifferentiableRoute("text -> intent", tools={tools!r}, encoder={encoder}(**{settings!r}))
route.load({saved!r})
for text in {texts!r}:
    route(text=text)
"""
AFTER = ", after dspy"
PEAK = """
for line in open("/proc/self/status"):
    if line.startswith("VmHWM"):
        print(int(line.split()[1]) / 1024)
"""


class Nothing(dspy.Module):
    """A module that does nothing: what is left is DSPy's own time."""

    def forward(self, text: str) -> dspy.Prediction:
        """Nothing decided."""
        return dspy.Prediction(intent="")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--pictures", type=Path, help="folder for the figures, as PNG files")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts to measure; all by default")
    given = parser.parse_args()
    shots = read("clinc150", "fewshot_train_10")
    routes = trained(shots)
    requests = shuffled({row.text for row in read("snips", "test")})[:DECISIONS]
    many = shuffled({row.text for row in read("clinc150", "train")} - {row.text for row in shots})
    threads = torch.get_num_threads()
    lines, processes, seconds = [], [], {}
    if "one" in given.only:
        router = served(semantic_router(kept_encoder(), shots), routes[TORCH].encoder)
        on_onnx = served(semantic_router(kept_encoder(), shots), routes[ONNX].encoder)
        torch.set_num_threads(1)
        seconds["one text"] = one_decision(routes, router, on_onnx, requests)
        lines += single_lines(seconds["one text"]) + row_lines(in_a_row(routes[STATIC], requests))
        torch.set_num_threads(threads)
    if "batches" in given.only:
        seconds[f"{MANY:,} texts"] = batches(routes, many[: ROUNDS * MANY])
        lines += batch_lines(seconds[f"{MANY:,} texts"])
    if "callers" in given.only:
        lines += caller_lines(callers({name: routes[name] for name in (ONNX, INT8, TORCH)}, many[ROUNDS * MANY :]))
    if lines:
        print_table(f"Time; torch with 1 thread for one decision, with its own {threads} for the rest", HEADERS, lines)
    if "memory" in given.only:
        processes += memory(routes, requests[:100])
    if "imports" in given.only:
        processes += imports()
    if processes:
        print_table("Processes: medians (quartiles)", ("what", "figure"), processes)
    if given.pictures is not None and seconds:
        given.pictures.mkdir(parents=True, exist_ok=True)
        draw(seconds, given.pictures / "speed.png")


def trained(shots: Sequence[Row]) -> dict[str, DifferentiableRoute]:
    """A route on each encoder, none of which keeps vectors. One head serves all forms of the default model."""
    tools = sorted({row.label for row in shots})
    route = DifferentiableRoute("text -> intent", tools=tools, encoder=kept_encoder())
    learned = RouteFinetune().compile(route, trainset=examples(shots)).dump_state()
    routes = {}
    for name, (kind, settings) in ENCODERS.items():
        encoder = getattr(dspy_router, kind)(**settings)
        routes[name] = DifferentiableRoute("text -> intent", tools=tools, encoder=encoder)
        if name == STATIC:
            routes[name] = RouteFinetune().compile(routes[name], trainset=examples(shots))
        else:
            routes[name].load_state(learned)
    return routes


def kept_encoder() -> SentenceEncoder:
    """The default encoder for what is not measured."""
    return SentenceEncoder(vector_cache=VECTORS)


def served(router: Any, encoder: Encoder) -> Any:
    """A semantic-router that encodes requests with an encoder which keeps nothing."""
    router.encoder.served = encoder
    return router


def one_decision(
    routes: dict[str, DifferentiableRoute], router: Any, on_onnx: Any, texts: Sequence[str]
) -> dict[str, np.ndarray]:
    """Seconds of each way to treat one text, on the same texts, in random turns."""
    nothing, model = Nothing(), routes[TORCH].encoder.transformer
    ways: dict[str, Callable[[str], Any]] = {
        **{f"route on {name}": lambda text, route=route: route(text=text) for name, route in routes.items()},
        **{f"{name} alone": lambda text, of=route.encoder: of._encode_batch([text]) for name, route in routes.items()},
        "SentenceTransformer.encode": lambda text: model.encode(text, show_progress_bar=False),
        "semantic-router": router,
        "semantic-router on OnnxEncoder": on_onnx,
        "DSPy's call of a module that does nothing": lambda text: nothing(text=text),
    }
    return in_turns(ways, texts, "one decision")


def in_a_row(route: DifferentiableRoute, texts: Sequence[str]) -> dict[str, np.ndarray]:
    """Seconds a call of the light paths, call after call: in turns with models, every call begins with cold caches."""
    nothing = Nothing()
    ways: dict[str, Callable[[list[str]], Any]] = {
        f"route on {STATIC}": lambda part: [route(text=text) for text in part],
        f"{STATIC} alone": lambda part: [route.encoder._encode_batch([text]) for text in part],
        "DSPy's call of a module that does nothing": lambda part: [nothing(text=text) for text in part],
    }
    return {name: found / len(texts) for name, found in in_turns(ways, [list(texts)] * ROUNDS, "in a row").items()}


def row_lines(seconds: dict[str, np.ndarray]) -> list[list[str]]:
    """The same call after call, to the encoder alone."""
    base = f"{STATIC} alone"
    return [
        [f"in a row: {name}", *times(found), ratio(found[:, 0], seconds[base][:, 0]), f"{base}'s time"]
        for name, found in seconds.items()
    ]


def batches(routes: dict[str, DifferentiableRoute], texts: Sequence[str]) -> dict[str, np.ndarray]:
    """Seconds of batches, against the bare model on as many threads as torch takes by itself."""
    model = routes[TORCH].encoder.transformer
    ways: dict[str, Callable[[list[str]], Any]] = {
        "SentenceTransformer.encode": lambda part: model.encode(part, show_progress_bar=False),
        **{
            f"route.batch on {name}": lambda part, route=route: route.batch([{"text": text} for text in part])
            for name, route in routes.items()
        },
    }
    return in_turns(ways, parts(texts), "batches")


def callers(routes: dict[str, DifferentiableRoute], texts: Sequence[str]) -> dict[str, np.ndarray]:
    """Seconds of the same calls from one thread and from many."""
    ways: dict[str, Callable[[list[str]], Any]] = {}
    for name, route in routes.items():
        ways[f"1 caller, {name}"] = lambda part, route=route: [route(text=text) for text in part]
        ways[f"{CALLERS} callers, {name}"] = lambda part, route=route: in_threads(route, part)
    rounds = [list(texts[start : start + CALLS]) for start in range(0, ROUNDS * CALLS, CALLS)]
    return in_turns(ways, rounds, "callers")


def in_threads(route: DifferentiableRoute, texts: Sequence[str]) -> None:
    with ThreadPoolExecutor(CALLERS) as pool:
        list(pool.map(lambda text: route(text=text), texts))


def in_turns(ways: dict[str, Callable[[Any], Any]], given: Sequence[Any], what: str) -> dict[str, np.ndarray]:
    """Seconds [n, 2] of each way on the same n things, in random turns: of the clock and of all cores together."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for way in ways.values():
        way("warm up" if isinstance(given[0], str) else ["warm up", "again"])
    order = random.Random(0)
    with tqdm(total=len(given) * len(ways), desc=what, unit="call") as bar:
        for argument in given:
            for name in order.sample(list(ways), len(ways)):
                started = time.process_time()
                took = timed(ways[name], argument)
                seconds[name].append((took, time.process_time() - started))
                bar.update()
    return {name: np.array(found) for name, found in seconds.items()}


def times(found: np.ndarray) -> list[str]:
    """Calls, median and 95th percentile of the clock's time, median of the cores' time."""
    return [f"{len(found)}", *milliseconds(found[:, 0]), milliseconds(found[:, 1])[0]]


def single_lines(seconds: dict[str, np.ndarray]) -> list[list[str]]:
    """One decision: each path to semantic-router and to its own encoder alone."""
    lines = []
    for name, found in seconds.items():
        bases = ["semantic-router"]
        if name.startswith("route on "):
            bases.append(f"{name.removeprefix('route on ')} alone")
        for number, base in enumerate(bases):
            shown = [f"one: {name}", *times(found)] if number == 0 else [""] * 5
            lines.append([*shown, ratio(found[:, 0], seconds[base][:, 0]), f"{base}'s time"])
    return lines


def batch_lines(seconds: dict[str, np.ndarray]) -> list[list[str]]:
    """Texts a second, to the bare model's."""
    base = "SentenceTransformer.encode"
    return [
        [f"{MANY:,}: {name}", *times(found), ratio(seconds[base][:, 0], found[:, 0]), f"{base}'s texts/s"]
        for name, found in seconds.items()
    ]


def caller_lines(seconds: dict[str, np.ndarray]) -> list[list[str]]:
    """Calls a second, to one caller's."""
    lines = []
    for name, found in seconds.items():
        base = f"1 caller, {name.split(', ', 1)[1]}"
        lines.append([f"{CALLS} calls: {name}", *times(found), ratio(seconds[base][:, 0], found[:, 0]),
                      "1 caller's calls/s"])  # fmt: skip
    return lines


def memory(routes: dict[str, DifferentiableRoute], texts: Sequence[str]) -> list[list[str]]:
    """Peak memory of processes that load a saved route and decide, beyond one that only imports dspy."""
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        codes = {}
        for number, (name, route) in enumerate(routes.items()):
            saved = str(Path(folder) / f"{number}.json")
            route.save(saved)
            tools = [option.name for option in route.fields[0].options]
            kind, settings = ENCODERS[name]
            codes[name] = DECIDING.format(encoder=kind, settings=settings, tools=tools, saved=saved, texts=list(texts))
        peaks: dict[str, list[float]] = {name: [] for name in codes}
        for _ in tqdm(range(PROCESSES), desc="memory", unit="round"):
            alone = in_process("import dspy" + PEAK)
            for name, code in codes.items():
                peaks[name].append(in_process("import dspy\n" + code + PEAK) - alone)
    for name, found in peaks.items():
        lines.append([f"peak MB beyond `import dspy`, {len(texts)} decisions on {name}", summary(found)])
    return lines


def imports() -> list[list[str]]:
    """What importing the package costs after `import dspy`, and what that cost."""
    code = "import time; start = time.perf_counter(); {}; print(1e3 * (time.perf_counter() - start))"
    ours = "from dspy_router import DifferentiableRoute, OnnxEncoder, RouteFinetune, SentenceEncoder"
    found: dict[str, list[float]] = {"import dspy": [], f"import dspy_router{AFTER}": [], f"{ours}{AFTER}": []}
    for _ in tqdm(range(PROCESSES), desc="imports", unit="round"):
        for name in found:
            statement = name.removesuffix(AFTER)
            before = "import dspy; " if name.endswith(AFTER) else ""
            found[name].append(in_process(before + code.format(statement)))
    return [[f"ms of `{name}`", summary(took)] for name, took in found.items()]


def in_process(code: str) -> float:
    """The number that code prints, in a process of its own."""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


def summary(values: Sequence[float]) -> str:
    """Median and quartiles."""
    low, middle, high = quartiles(values)
    return f"{middle:.0f} ({low:.0f}-{high:.0f})"


def shuffled(texts: set[str]) -> list[str]:
    """In an order of chance, the same every time."""
    ordered = sorted(texts)
    random.Random(0).shuffle(ordered)
    return ordered


def draw(measured: dict[str, dict[str, np.ndarray]], path: Path) -> None:
    """Medians with quartiles, on logarithmic axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1 + 0.4 * sum(map(len, measured.values()))), layout="constrained")
    FigureCanvasAgg(figure)
    heights = [len(seconds) for seconds in measured.values()]
    rows = figure.subplots(len(measured), squeeze=False, height_ratios=heights)[:, 0]
    for axes, (title, seconds) in zip(rows, measured.items(), strict=True):
        values = 1e3 * np.array([quartiles(found[:, 0]) for found in seconds.values()])
        places = range(len(seconds))
        axes.barh(places, values[:, 1], xerr=np.diff(values, axis=1).T, color="#4477aa")
        axes.set_yticks(places, list(seconds))
        axes.invert_yaxis()
        axes.set_xscale("log")
        axes.set_xlabel(f"{title}, ms")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
