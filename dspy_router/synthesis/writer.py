"""`RequestWriter`: the DSPy module that has an LM write training requests for a route."""

import logging
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import dspy
from dspy.utils.usage_tracker import track_usage
from tqdm.auto import tqdm

from dspy_router.costs import usage_cost
from dspy_router.errors import RouteError
from dspy_router.fields import DecisionField
from dspy_router.route import DifferentiableRoute
from dspy_router.synthesis.calls import RequestCalls
from dspy_router.synthesis.prompts import WriteHardRequests, WriteRequests
from dspy_router.synthesis.report import SynthesisReport
from dspy_router.synthesis.writing import Writing, WrittenRequest

logger = logging.getLogger(__name__)

ORIGIN = "origin"  # the field of an example that says where it comes from


class RequestWriter(dspy.Module):
    """Have an LM write labelled requests for a route, from the descriptions of its options.

    For each option the LM writes requests in several styles, and hard ones: requests that belong to the option but
    sound near to another that the route, as it is now, takes them for. What is written is filtered: empty, long
    and near-duplicate requests are dropped, and those near the validation set.

    The LM is asked through the predictors `plain` and `hard`, so DSPy's LM settings, adapters, cache and optimizers
    apply. Labels are as good as the LM: nothing here checks that a request belongs to its option.

    Args:
        route: A route with one text input.
        field: The decision to write requests for; needed only if the route decides several.
        requests_per_call: The most requests asked for in one LM call.
        max_length: Requests of more characters are dropped.
        max_similarity: A request is dropped if its cosine, by the route's encoder, to one already kept or to a text
            of the validation set is larger. On all-MiniLM-L6-v2, "play some jazz" and "Play some jazz please"
            have 0.94, "turn on the lights" and "turn off the lights" 0.87.
        num_threads: As in `dspy.Evaluate`.
        max_errors: Stop after so many LM calls that failed; DSPy's setting by default.
        callbacks: DSPy callbacks of this module.

    Raises:
        RouteError: If the route has other inputs than one text, `field` is none of its decisions, or a setting is out
            of range.

    Example:
        >>> import dspy
        >>> from dspy_router import DifferentiableRoute
        >>> class Canned(dspy.Module):  # stands here for an LM: any module with the fields of the predictor may
        ...     def forward(self, option, **inputs):
        ...         rain = ["will it rain?", "storm warnings"]
        ...         return dspy.Prediction(requests=rain if "forecast" in option else ["play jazz", "play Jazz"])
        >>> route = DifferentiableRoute("request -> tool", tools={"weather": "The forecast.", "music": "Play songs."})
        >>> writer = RequestWriter(route)
        >>> writer.plain = Canned()
        >>> written = writer(per_option=2, hard=0.0)
        >>> [(example.request, example.tool) for example in written.examples]
        [('will it rain?', 'weather'), ('storm warnings', 'weather'), ('play jazz', 'music')]
        >>> written.report.options, "near-duplicate" in written.report.dropped
        ({'weather': 2, 'music': 1}, True)
    """

    def __init__(
        self,
        route: DifferentiableRoute,
        *,
        field: str | None = None,
        requests_per_call: int = 5,
        max_length: int = 500,
        max_similarity: float = 0.92,
        num_threads: int | None = None,
        max_errors: int | None = None,
        callbacks: list[Any] | None = None,
    ) -> None:
        super().__init__(callbacks=callbacks)
        _require_one_text(route.signature)
        if requests_per_call < 1 or max_length < 1 or not -1.0 < max_similarity <= 1.0:
            raise RouteError(
                f"requests_per_call={requests_per_call}, max_length={max_length}, max_similarity={max_similarity}: "
                "the first two must be at least 1, the last a cosine in (-1, 1]."
            )
        self.route = route
        self.decided = _decided_field(route, field)
        self.requests_per_call = requests_per_call
        self.max_length = max_length
        self.max_similarity = max_similarity
        self.num_threads = num_threads
        self.max_errors = max_errors
        self.plain = dspy.Predict(WriteRequests)
        self.hard = dspy.Predict(WriteHardRequests)

    def forward(
        self, per_option: int = 20, hard: float = 0.25, valset: Sequence[dspy.Example] = (), seed: int = 0
    ) -> dspy.Prediction:
        """Write requests; call the writer itself, so that callbacks see it.

        Args:
            per_option: Requests for each option.
            hard: The share of them, in [0, 1], that are hard.
            valset: Examples that training data must not repeat; they need the route's input.
            seed: Orders the styles. With the same seed and the same answers of the LM the result is the same,
                whatever the threads; another seed is answered anew where DSPy's cache is on.

        Returns:
            A prediction with `examples`, a trainset for `RouteFinetune`, and `report`, a `SynthesisReport`.

        Raises:
            RouteError: If an argument is out of range, a validation example lacks the input, or no request was
                kept, and when `max_errors` calls have failed.
        """
        if per_option < 1 or not 0.0 <= hard <= 1.0:
            raise RouteError(f"per_option={per_option}, hard={hard}: give at least 1, and a share in [0, 1].")
        started = time.perf_counter()
        hard_count = round(hard * per_option)
        options = self.decided.option_names
        with (
            track_usage() as usage,
            tqdm(total=per_option * len(options), desc="requests kept", unit="request", delay=2) as bar,
        ):
            calls = RequestCalls(self.num_threads, self.max_errors, usage, bar)
            writing = Writing(
                self.route,
                self.decided,
                calls,
                validation=self._texts(valset),
                requests_per_call=self.requests_per_call,
                max_length=self.max_length,
                max_similarity=self.max_similarity,
                seed=seed,
            )
            writing.write_plain(self.plain, per_option - hard_count)
            pairs = writing.write_hard(self.hard, hard_count)
        if not writing.kept:
            raise RouteError(
                f"No request was kept of {calls.made} LM calls: {calls.errors.total()} failed (the last: "
                f"{calls.last_error or 'none'}), and dropped were {dict(writing.dropped)}. Look at the LM's answers "
                "with dspy.inspect_history()."
            )
        counts = Counter(options[request.option] for request in writing.kept)
        tokens_by_model = usage.get_total_tokens()
        cost, tokens = usage_cost(tokens_by_model) if tokens_by_model else (0.0, 0)
        report = SynthesisReport(
            examples=[self._example(request) for request in writing.kept],
            wanted=per_option,
            options={name: counts[name] for name in options},
            origins=dict(Counter(request.origin for request in writing.kept)),
            dropped=dict(writing.dropped),
            pairs=pairs,
            calls=calls.made,
            errors=dict(calls.errors),
            tokens=tokens,
            cost=cost,
            seconds=time.perf_counter() - started,
            seed=seed,
        )
        if short := [name for name, count in report.options.items() if count < per_option]:
            logger.warning("%d options have fewer than %d requests; see the report.", len(short), per_option)
        return dspy.Prediction(examples=report.examples, report=report)

    def _example(self, request: WrittenRequest) -> dspy.Example:
        [name] = self.route.signature.input_fields
        label = self.decided.options[request.option].value
        return dspy.Example(**{name: request.text, self.decided.name: label, ORIGIN: request.origin}).with_inputs(name)

    def _texts(self, examples: Sequence[dspy.Example]) -> list[str]:
        [name] = self.route.signature.input_fields
        if lacking := next((example for example in examples if name not in example), None):
            raise RouteError(
                f"A valset example has no {name!r}, which the route reads: {str(lacking)[:80]}. Give examples with it, "
                "so that requests near them can be dropped."
            )
        return [self.route.text({name: example[name]}) for example in examples]


def _require_one_text(signature: type[dspy.Signature]) -> None:
    fields = signature.input_fields
    if [info.annotation in (str, str | None) for info in fields.values()] != [True]:
        raise RouteError(
            f"The route's inputs are {list(fields)}; requests are written for a route with one text input. Make a "
            "route of the input that holds the request, with the same options and encoder, write for that, and add "
            "the other inputs to the examples."
        )
    if ORIGIN in signature.fields:
        raise RouteError(
            f"The route's signature has a field {ORIGIN!r}, which examples need for themselves: rename it."
        )


def _decided_field(route: DifferentiableRoute, name: str | None) -> DecisionField:
    found = [decided for decided in route.fields if name in (None, decided.name)]
    if len(found) != 1:
        names = [decided.name for decided in route.fields]
        raise RouteError(f"field={name!r}: this route decides {names}; name one of them.")
    if found[0].several:
        raise RouteError(
            f"{found[0].name!r} is a list: requests are written for one option at a time, and nothing would say which "
            "others they need. Write them for a route with a single option, and add the lists yourself."
        )
    return found[0]
