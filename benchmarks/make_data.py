"""Rebuild the compressed data of the demo and the benchmarks from the published sources.

    python benchmarks/make_data.py SOURCE

SOURCE holds the folders `snips`, `clinc150` and `banking77` with gzipped JSON lines of `text` and the label,
`routellm_mmlu/mmlu.jsonl.gz` with `prompt` and whether each LLM was right, `bfcl` with `messages`, `functions` and the
right one (`answer`, where one is), and `tau_bench/airline_gpt4o.jsonl.gz` with tau-bench's own results, converted from
the repositories named in `benchmarks/data/README.md`.
"""

import gzip
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
DEMO = HERE.parent / "dspy_router" / "demo" / "data"
LABELS = {"snips": "tool", "clinc150": "intent", "banking77": "intent"}
PARTS = {
    "snips": ["train", "test"],
    "clinc150": ["train", "val", "test", "oos_val", "oos_test", "fewshot_train_5", "fewshot_train_10", "fewshot_test"],
    "banking77": ["train", "test", "fewshot_train_5", "fewshot_train_10", "fewshot_test"],
}
FUNCTION_CALLS = ["live_multiple", "irrelevance", "live_irrelevance"]
LLMS = {"mixtral-8x7b": "mixtral", "gpt-4": "gpt4"}
DEMO_ROWS_A_TOOL = 300


def read(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def labelled(path: Path, label: str) -> list[dict[str, str]]:
    return [{"text": row["text"], "label": row[label]} for row in read(path)]


def outcomes(path: Path) -> list[dict[str, Any]]:
    return [{"text": row["prompt"]} | {short: int(row[llm]) for llm, short in LLMS.items()} for row in read(path)]


def dialogue(row: dict[str, Any]) -> dict[str, Any]:
    """A recorded run without the instructions, which are the same in all, and without what the task's author knows."""
    messages = [message for message in row["traj"] if message["role"] != "system"]
    return {"traj": messages} | {key: row[key] for key in ("task_id", "trial", "reward")}


def write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # No name and no time in the header, so that the same rows give the same file.
    with path.open("wb") as raw, gzip.GzipFile(filename="", fileobj=raw, mode="wb", mtime=0) as file:
        file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


def main(source: Path) -> None:
    for name, parts in PARTS.items():
        for part in parts:
            rows = labelled(source / name / f"{part}.jsonl.gz", LABELS[name])
            write(HERE / "data" / name / f"{part}.jsonl.gz", rows)
    domains = json.loads((source / "clinc150" / "domains.json").read_text(encoding="utf-8"))
    text = json.dumps(domains, indent=1) + "\n"
    (HERE / "data" / "clinc150" / "domains.json").write_text(text, encoding="utf-8")
    rows = outcomes(source / "routellm_mmlu" / "mmlu.jsonl.gz")
    write(HERE / "data" / "routellm_mmlu" / "outcomes.jsonl.gz", rows)
    for part in FUNCTION_CALLS:
        write(HERE / "data" / "bfcl" / f"{part}.jsonl.gz", read(source / "bfcl" / f"{part}.jsonl.gz"))
    rows = [dialogue(row) for row in read(source / "tau_bench" / "airline_gpt4o.jsonl.gz")]
    write(HERE / "data" / "tau_bench" / "airline.jsonl.gz", rows)
    train = labelled(source / "snips" / "train.jsonl.gz", "tool")
    random.Random(0).shuffle(train)
    tools = sorted({row["label"] for row in train})
    chosen = [row for tool in tools for row in [row for row in train if row["label"] == tool][:DEMO_ROWS_A_TOOL]]
    random.Random(1).shuffle(chosen)
    write(DEMO / "train.jsonl.gz", chosen)
    write(DEMO / "test.jsonl.gz", labelled(source / "snips" / "test.jsonl.gz", "tool"))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]))
