"""A predictor split in two: a route decides what can be decided, an LM writes the rest for that decision."""

from collections.abc import Sequence
from typing import Any, Literal

import dspy
from dspy.signatures.signature import ensure_signature
from pydantic import BaseModel

from dspy_router.errors import RouteError
from dspy_router.fields import DecisionField
from dspy_router.route import DifferentiableRoute


def _of_predict(name: str) -> property:
    """An attribute of the LM's part, so that code which set it on the predictor goes on working."""
    return property(lambda self: getattr(self.predict, name), lambda self, value: setattr(self.predict, name, value))


class RoutedPredict(dspy.Module):
    """Decide some outputs of a signature with a route, and have an LM write the others for what was decided.

    Call it as a `dspy.Predict`. The LM's part is a `dspy.Predict` too, in which the decided fields are inputs: DSPy's
    optimizers find it as `predict` and its calls alone are in the trace, while `RouteFinetune` finds `route`. The LM
    is called every time; what it no longer does is choose. `lm`, `demos` and `config` are those of `predict`.

    Args:
        route: Decides its output fields.
        predict: A predictor of the whole signature. A copy of it, with its demos, config and LM, writes the outputs
            that are left; in its demos the decisions are inputs from now on.
        callbacks: DSPy callbacks of this module.

    Raises:
        RouteError: If the route decides every output of `predict`.

    Example:
        >>> import dspy
        >>> from dspy.utils import DummyLM
        >>> from dspy_router import DifferentiableRoute
        >>> planner = dspy.Predict("question -> tool: Literal['search', 'calculator'], query: str")
        >>> route = DifferentiableRoute("question -> tool: Literal['search', 'calculator']")
        >>> routed = RoutedPredict(route, planner)
        >>> routed.predict.signature.signature
        'question, tool -> query'
        >>> with dspy.context(lm=DummyLM([{"query": "3 * 17"}])):
        ...     prediction = routed(question="use the calculator: what is 3 times 17?")
        >>> prediction.tool, prediction.query, prediction.confidence > 0.5
        ('calculator', '3 * 17', True)
    """

    def __init__(
        self, route: DifferentiableRoute, predict: dspy.Predict, *, callbacks: list[Any] | None = None
    ) -> None:
        super().__init__(callbacks=callbacks)
        self.signature = predict.signature
        self.route = route
        self.predict = predict.deepcopy()
        self.predict.signature = _given_decisions(predict.signature, route.fields)
        if not self.predict.signature.output_fields:
            raise RouteError(
                f"The route decides every output, {list(self.signature.output_fields)}: nothing is left for an LM to "
                "write. Use the route alone."
            )
        decided = {field.name for field in route.fields}
        self.predict.fields = {name: state for name, state in predict.fields.items() if name not in decided}

    lm, demos, config = _of_predict("lm"), _of_predict("demos"), _of_predict("config")

    # It holds a route, which DSPy would leave out of its parent's state: see `DifferentiableRoute`.
    _compiled = property(lambda self: False, lambda self, value: None)

    def forward(self, *args: Any, **inputs: Any) -> dspy.Prediction:
        """Decide, then write; call the module itself, so that callbacks see it.

        Args:
            *args: Refused, as `dspy.Predict` does.
            **inputs: The signature's inputs; `config`, `demos`, `lm` and `signature` go to the LM's part.

        Returns:
            All declared outputs, typed as declared, and what a route adds to them (`decisions`, ...); a declared
            output of such a name takes its place. `completions` holds as many as the LM wrote.
        """
        decided = self.route(*args, **self._read(inputs))
        return self._joined(decided, self.predict(**self._given(inputs, decided)))

    async def aforward(self, *args: Any, **inputs: Any) -> dspy.Prediction:
        """`forward` for async code."""
        decided = await self.route.acall(*args, **self._read(inputs))
        return self._joined(decided, await self.predict.acall(**self._given(inputs, decided)))

    def _read(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in inputs.items() if name in self.route.signature.input_fields}

    def _given(self, inputs: dict[str, Any], decided: dspy.Prediction) -> dict[str, Any]:
        given = dict(inputs)
        if "signature" in inputs and "signature" not in self.signature.input_fields:
            given["signature"] = _given_decisions(ensure_signature(inputs["signature"]), self.route.fields)
        chosen = {name: decision.name for name, decision in decided.decisions.items()}
        given |= {field.name: field.plain(chosen) for field in self.route.fields}
        return given

    def _joined(self, decided: dspy.Prediction, written: dspy.Prediction) -> dspy.Prediction:
        columns = dict(written.completions.items())
        columns |= {field.name: [decided[field.name]] * len(written.completions) for field in self.route.fields}
        names = dict.fromkeys([*self.signature.output_fields, *columns])
        prediction = dspy.Prediction.from_completions(
            {name: columns[name] for name in names if name in columns}, signature=self.signature
        )
        for name, value in decided.items():
            if name not in prediction:
                prediction[name] = value
        return prediction


def _given_decisions(signature: type[dspy.Signature], fields: Sequence[DecisionField]) -> type[dspy.Signature]:
    """The signature with the outputs among `fields` as inputs, and a word to the LM about them."""
    decided = [field for field in fields if field.name in signature.output_fields]
    if not decided:
        return signature
    for field in decided:
        description = signature.output_fields[field.name].json_schema_extra["desc"]
        given = dspy.InputField(desc=description)
        signature = signature.delete(field.name).append(field.name, given, type_=_plain_type(field))
    names = ", ".join(f"`{field.name}`" for field in decided)
    return signature.append_instructions(f"Already decided: {names}. Write the outputs to fit.")


def _plain_type(field: DecisionField) -> Any:
    """The declared type; of DSPy's decision objects, which carry probabilities, that of the value inside."""
    declared = field.info.annotation
    if isinstance(declared, type) and issubclass(declared, BaseModel):
        return Literal[tuple(option.value for option in field.options)]
    return declared
