"""The main job from end to end: `python -m dspy_router.demo`, or `make demo`.

A voice assistant's LM planner is replaced by a route, which learns from the assistant's metric alone.
"""

import argparse
import statistics
import time
from pathlib import Path

import dspy
from tabulate import tabulate
from tqdm.auto import tqdm

from dspy_router import DifferentiableRoute, RouteFinetune, replace_predictor
from dspy_router.costs import run_costs
from dspy_router.demo.assistant import TOOLS, VoiceAssistant, labelled_requests, outcome_reached, requests
from dspy_router.demo.lm_planner import ask, how_to_read, planner_lm
from dspy_router.evaluation.confusion import save_confusion

SHOWN = [
    "put some miles davis on",
    "is it going to snow in Oslo on Friday",
    "a table for four near the harbour tonight please",
    "which films start after nine at the Odeon",
    "give the last thing I read four stars out of five",
]


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m dspy_router.demo", description=__doc__)
    parser.add_argument("--budget", type=int, default=4200, help="most rollouts (default: %(default)s, two an example)")
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="folder to write to")
    parser.add_argument("--price-model", default="gpt-4.1", help="model of the cost table (default: %(default)s)")
    parser.add_argument("--lm", help="also run this LM (a litellm name) as planner on 100 requests")
    parser.add_argument("--api-base", help="address of an OpenAI-compatible server for --lm")
    parser.add_argument("--api-key", help="key for --lm, where it needs one")
    return parser.parse_args()


def main() -> None:
    """Run the main job and print what came of it."""
    options = arguments()
    costs = run_costs(options.price_model)
    options.output.mkdir(parents=True, exist_ok=True)
    train, test = requests("train"), requests("test")

    print("A voice assistant with an LM planner; a route takes the planner's place.\n")
    assistant = VoiceAssistant()
    untrained = replace_predictor(assistant, "planner", tools=TOOLS)
    decision_ms, known_ms = time_decisions(untrained.planner, [example.request for example in test[:60]])
    untrained.planner.encoder.encode([example.request for example in test])

    from_metric = RouteFinetune(outcome_reached, max_metric_calls=options.budget)
    by_metric = from_metric.compile(untrained, trainset=train)
    from_labels = RouteFinetune()
    by_labels = from_labels.compile(untrained, trainset=labelled_requests("train"))
    assert from_metric.report is not None
    rollouts = from_metric.report.rollouts
    print("\nWhat the compile from the metric did\n")
    print(from_metric.report)

    rows = [
        ["untrained, by the tools' descriptions", 0, 0, f"{accuracy(untrained, test):.1%}"],
        ["compiled from the program's metric", rollouts, 0, f"{accuracy(by_metric, test):.1%}"],
        ["compiled from labels", 0, len(train), f"{accuracy(by_labels, test):.1%}"],
    ]
    print(f"\nRight tool on the {len(test)} test requests\n")
    print(tabulate(rows, headers=["route", "rollouts", "labels", "accuracy"]))

    print("\nFive requests\n")
    print(
        tabulate(
            [describe(by_metric, text) for text in SHOWN],
            headers=["request", "tool", "p", "next", "p"],
            disable_numparse=True,
        )
    )

    print("\nTime\n")
    print(f"one decision {decision_ms:.1f} ms, on a text that the encoder knows {known_ms:.2f} ms (medians of 60)")

    print(f"\nCost of a run ({costs.model} at litellm's prices)\n")
    print(costs)

    saved = options.output / "voice_assistant.json"
    by_metric.save(saved)
    gold = [example.tool for example in labelled_requests("test")]
    chosen = [prediction.tool for prediction in by_metric.planner.batch([{"request": e.request} for e in test])]
    picture = save_confusion(
        gold, chosen, by_metric.planner.fields[0].option_names, options.output / "confusion.png",
        title="Compiled from the metric",
    )  # fmt: skip
    print(f"\nThe program is saved in {saved}, the confusion matrix in {picture}.")
    if options.lm:
        compare(options, assistant, by_metric, test[::7], decision_ms)


def accuracy(program: dspy.Module, examples: list[dspy.Example]) -> float:
    """Share of examples on which the program's metric is satisfied."""
    return sum(outcome_reached(example, program(**example.inputs())) for example in examples) / len(examples)


def time_decisions(route: DifferentiableRoute, texts: list[str]) -> tuple[float, float]:
    """Median milliseconds of a decision on a text that is new to the encoder, and of the same without the encoder."""
    route(request="warm up")
    decisions: list[float] = []
    known: list[float] = []
    for text in texts:
        for seconds in (decisions, known):  # the second time, the encoder has the vector in its cache
            started = time.perf_counter()
            route(request=text)
            seconds.append(time.perf_counter() - started)
    return 1e3 * statistics.median(decisions), 1e3 * statistics.median(known)


def describe(program: dspy.Module, text: str) -> list[str]:
    """A request with its two likeliest tools."""
    probabilities = program.planner(request=text).probabilities
    (first, p), (second, q) = sorted(probabilities.items(), key=lambda item: -item[1])[:2]
    return [text, first, f"{p:.2f}", second, f"{q:.2f}"]


def compare(
    options: argparse.Namespace,
    planned: dspy.Module,
    routed: dspy.Module,
    examples: list[dspy.Example],
    decision_ms: float,
) -> None:
    """The LM planner and the route on the same requests, side by side."""
    print(f"\nThe LM planner, {options.lm}, on {len(examples)} of the test requests\n")
    with planner_lm(options.lm, api_base=options.api_base, api_key=options.api_key):
        answers = [ask(planned, **e.inputs()) for e in tqdm(examples, desc="LM planner", unit="request")]
    predictions = [answer.prediction for answer in answers]
    right = sum(p is not None and outcome_reached(e, p) for e, p in zip(examples, predictions, strict=True))
    seconds = statistics.median(answer.seconds for answer in answers)
    tokens = sum(answer.prompt_tokens + answer.completion_tokens for answer in answers)
    rows = [
        [options.lm, f"{right / len(examples):.0%}", predictions.count(None), f"{1e3 * seconds:,.0f}",
         f"{tokens / len(examples):,.0f}"],
        ["route", f"{accuracy(routed, examples):.0%}", 0, f"{decision_ms:,.1f}", "0"],
    ]  # fmt: skip
    print(tabulate(rows, headers=["planner", "right", "failed", "ms a decision", "tokens a decision"]))
    print(f"\n{how_to_read(options.lm)}")


if __name__ == "__main__":
    main()
