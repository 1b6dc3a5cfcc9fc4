"""What a `RequestWriter` wrote, as an object that renders and saves."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dspy

from dspy_router.tables import table

SHOWN = 8  # options and pairs listed in the rendering


@dataclass(frozen=True)
class ConfusedPair:
    """Two options for which hard requests were asked.

    Attributes:
        option: The option the requests belong to.
        rival: The option the route takes them for.
        probability: What the route gave the rival on the option's description and plain requests, on average.
    """

    option: str
    rival: str
    probability: float


@dataclass(frozen=True)
class SynthesisReport:
    """The requests that were kept, and what became of the rest.

    Attributes:
        examples: Examples with the route's input set, the decided field as label, and `origin`:
            `"synthetic/plain/<style>"` or `"synthetic/hard/<rival>"`.
        wanted: How many were asked for, for each option.
        options: How many were kept, by option; every option is there.
        origins: How many were kept, by origin.
        dropped: How many were dropped, by reason.
        pairs: The pairs of options that hard requests were asked for, most confused first.
        calls: Calls of the predictors, failed ones included.
        errors: Failed calls, by the type of what was raised.
        tokens: Tokens of the LM calls; answers from DSPy's cache take none.
        cost: Their price in dollars; None if a model has no known price.
        seconds: Wall time.
        seed: The seed it was written with.
    """

    examples: list[dspy.Example]
    wanted: int
    options: Mapping[str, int]
    origins: Mapping[str, int]
    dropped: Mapping[str, int]
    pairs: tuple[ConfusedPair, ...]
    calls: int
    errors: Mapping[str, int]
    tokens: int
    cost: float | None
    seconds: float
    seed: int

    def save(self, path: str | Path) -> Path:
        """Write the examples as JSONL, one a line; an Enum member is written as its value, which is a label too.

        Returns:
            The path. `dspy.Example(**json.loads(line)).with_inputs(<the input field>)` reads a line back.
        """
        lines = [
            json.dumps(example.toDict(), ensure_ascii=False, default=lambda member: member.value)
            for example in self.examples
        ]
        Path(path).write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        return Path(path)

    def _table(self, form: str) -> str:
        kinds: Counter[str] = Counter()
        for origin, count in self.origins.items():
            _, kind, *style = origin.split("/", 2)
            kinds[" ".join([kind, *(style if kind == "plain" else [])])] += count
        short = sorted((count, name) for name, count in self.options.items() if count < self.wanted)
        cost = "price unknown" if self.cost is None else f"${self.cost:.4f}"
        rows: list[list[Any]] = [
            ["requests kept", f"{len(self.examples):,} of {self.wanted * len(self.options):,}"],
            ["by kind", _listed(kinds)],
            ["hard pairs", _few([f"{pair.option} for {pair.rival} ({pair.probability:.2f})" for pair in self.pairs])],
            [f"options short of {self.wanted}", _few([f"{name} {count}" for count, name in short])],
            ["dropped", _listed(self.dropped)],
            ["LM calls", f"{self.calls:,}, {self.tokens:,} tokens, {cost}"],
            ["failed calls", _listed(self.errors)],
            ["time", f"{self.seconds:.1f} s, seed {self.seed}"],
        ]
        return table([row for row in rows if row[1]], form=form)

    def __str__(self) -> str:
        return self._table("plain")

    def _repr_html_(self) -> str:
        return self._table("html")


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in counts.items())


def _few(entries: list[str]) -> str:
    more = f" and {len(entries) - SHOWN:,} more" if len(entries) > SHOWN else ""
    return ", ".join(entries[:SHOWN]) + more
