"""`DifferentiableRoute`: a trained decision in the place of an LM planner."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import dspy
from dspy.signatures.signature import ensure_signature

from dspy_router.deciding import Call, policies, read_call, settled
from dspy_router.encoders.base import Encoder, shortened
from dspy_router.encoders.choose import as_encoder
from dspy_router.errors import RouteError
from dspy_router.fields import DecisionField, decision_fields, input_text
from dspy_router.options import Tools
from dspy_router.parameter import RouteParameter
from dspy_router.route_changes import RouteChanges
from dspy_router.route_queries import RouteQueries, example_inputs

if TYPE_CHECKING:
    import numpy as np

    from dspy_router.clients.decision_client import DecisionClient
    from dspy_router.deciding import Policies
    from dspy_router.guarding.auditing import Audit
    from dspy_router.heads import RouteHead

LEARNED = "learned"  # the attribute by which DSPy names what a route saves
OnAbstain = Literal["none", "raise"]
# What `dspy.Predict` takes beside its inputs: meaningless to a route, accepted so that call sites need no change.
PREDICT_ARGUMENTS = ("config", "demos", "lm", "signature")


class DifferentiableRoute(RouteQueries, RouteChanges, dspy.Module):
    """Decide the output fields of a signature with a small trained head on frozen sentence embeddings.

    Call it as a `dspy.Predict`. Before training it decides by the options' descriptions; `RouteFinetune` trains it.

    Args:
        signature: Inputs and outputs. Each output is `Literal[...]`, `bool`, an `Enum`, `Choice[...]`, `Noul`,
            `Score[...]`, a `str` whose options come from `tools`, or a list of `Literal[...]`, `Enum` or such `str`:
            any number of the options. One output at most is a plain `str` or `list[str]`.
        tools: `dspy.Tool`s, callables, names, `(name, description)` pairs, or a dict from name to description or tool.
        encoder: The name of a sentence-transformers model, an encoder, or a callable from a list of strings
            to an array; all-MiniLM-L6-v2 by default.
        fallback: Answers where the guard declines: any module with the route's inputs and outputs, usually the old
            planner, as in `replace_predictor(program, "planner", fallback=program.planner)`.
        on_abstain: Without a fallback, whether the outputs are then None (`"none"`) or an `AbstainError` is raised
            (`"raise"`).
        callbacks: DSPy callbacks of this module.

    Raises:
        RouteError: If an output field is no decision, or the options are unusable.

    Example:
        >>> from dspy_router import DifferentiableRoute
        >>> def get_weather(city): "The weather forecast for a city."
        >>> def play_music(artist): "Play songs by an artist."
        >>> route = DifferentiableRoute("request -> tool", tools=[get_weather, play_music])
        >>> prediction = route(request="will it rain in Oslo tomorrow?")
        >>> prediction.tool, prediction.decision.name, prediction.confidence > 0.5
        ('get_weather', 'get_weather', True)
        >>> needs = DifferentiableRoute("request -> tools: list[str]", tools=[get_weather, play_music])
        >>> needs(request="play songs and tell me the weather").tools
        ['get_weather', 'play_music']
    """

    def __init__(
        self,
        signature: str | type[dspy.Signature],
        tools: Tools | None = None,
        *,
        encoder: Encoder | str | Callable[[list[str]], Any] | None = None,
        fallback: dspy.Module | None = None,
        on_abstain: OnAbstain = "none",
        callbacks: list[Any] | None = None,
    ) -> None:
        super().__init__(callbacks=callbacks)
        if on_abstain not in get_args(OnAbstain):
            raise RouteError(f"on_abstain={on_abstain!r}; give 'none' or 'raise'.")
        self.fallback = fallback
        self.on_abstain = on_abstain
        self.signature = ensure_signature(signature)
        self.learned = RouteParameter(decision_fields(self.signature, tools), as_encoder(encoder))

    # DSPy leaves a sub-module that is marked compiled out of its parent's state: a route is never marked.
    _compiled = property(lambda self: False, lambda self, value: None)

    @property
    def fields(self) -> tuple[DecisionField, ...]:
        """The decisions this route makes, in the signature's order."""
        return self.learned.fields

    @property
    def decision_fields(self) -> tuple[DecisionField, ...]:
        """What it decides one by one: the fields, a list as a boolean for each of its options."""
        return tuple(decided for field in self.fields for decided in field.decision_fields)

    @property
    def encoder(self) -> Encoder:
        """The encoder, shared with every copy of this route."""
        return self.learned.encoder

    @property
    def head(self) -> "RouteHead":
        """The trainable `torch.nn.Module`."""
        return self.learned.head

    def field(self, name: str) -> DecisionField:
        """The decision of that name.

        Raises:
            RouteError: If the route makes no such decision.
        """
        for field in self.fields:
            if field.name == name:
                return field
        raise RouteError(f"field={name!r}: this route decides {[field.name for field in self.fields]}; name one.")

    def as_lm(self, *, cache: bool = True, callbacks: list[Any] | None = None) -> "DecisionClient":
        """This route as the `lm` of a plain `dspy.Predict` with the same outputs: one head, two faces.

        Args:
            cache: Whether answers are kept in DSPy's cache.
            callbacks: DSPy callbacks of the client.

        Example:
            >>> import dspy, numpy as np
            >>> from typing import Literal
            >>> from dspy_router import DifferentiableRoute
            >>> class Pick(dspy.Signature):
            ...     text: str = dspy.InputField()
            ...     fruit: Literal["fig", "date"] = dspy.OutputField(desc="the fruit asked for")
            >>> letters = lambda texts: np.array([[text.count(c) for c in "abcdefghij"] for text in texts])
            >>> predictor = dspy.Predict(Pick)
            >>> predictor.lm = DifferentiableRoute(Pick, encoder=letters).as_lm()
            >>> predictor(text="a fig, if I may").fruit
            'fig'
        """
        from dspy_router.clients.decision_client import DecisionClient

        return DecisionClient(self, cache=cache, callbacks=callbacks)

    def __call__(self, *args: Any, **inputs: Any) -> dspy.Prediction:
        """Decide for one input; see the class.

        Returns:
            A prediction with the declared fields typed as declared and `decisions` (field to `Decision`); with
            one field also `decision`, `probabilities` (name to float) and `confidence`. A declared field of
            such a name takes its place. A list `topics` has a decision for each option, `topics[billing]` between
            "True" and "False", and no `decision`; its `probabilities` are those of the options to be in it, its
            `confidence` that of the whole list, the options taken as independent. Where the guard declines, the
            probabilities are the route's own all the same, and `confidence` is what they give to the option that the
            fallback took, or without one to the likeliest.
        """
        return super().__call__(**self._checked(args, inputs))

    async def acall(self, *args: Any, **inputs: Any) -> dspy.Prediction:
        """`__call__` for async code: the event loop is free while the encoder runs."""
        return await super().acall(**self._checked(args, inputs))

    def forward(self, **inputs: Any) -> dspy.Prediction:
        """Decide for one input; call the route itself, so that callbacks see it."""
        call = read_call(self, inputs)
        return self._answer(call, self.encoder.encode_one(call.text))

    async def aforward(self, **inputs: Any) -> dspy.Prediction:
        """`forward` for async code."""
        call = read_call(self, inputs)
        vector = await self.encoder.aencode_one(call.text)
        await self.learned.build()
        thought = policies(self, call, vector)
        audit = self._drawn_by(thought)
        if thought.declined and self.fallback is not None:
            return settled(self, thought, await self.fallback.acall(**call.inputs))
        prediction = settled(self, thought)
        if audit is not None:
            await audit.acheck(self, call, prediction)
        return prediction

    def _answer(self, call: Call, vector: "np.ndarray") -> dspy.Prediction:
        thought = policies(self, call, vector)
        audit = self._drawn_by(thought)
        if thought.declined and self.fallback is not None:
            return settled(self, thought, self.fallback(**call.inputs))
        prediction = settled(self, thought)
        if audit is not None:
            audit.check(self, call, prediction)
        return prediction

    def _drawn_by(self, thought: "Policies") -> "Audit | None":
        return self._audit if self._audit is not None and self._audit.draws(self, thought) else None

    def batch(self, examples: Sequence[Any], *args: Any, **settings: Any) -> Any:
        """Decide for many inputs in one encoder pass.

        Args:
            examples: `dspy.Example`s (their inputs are used) or dicts.
            *args: With `settings`, the thread settings of `dspy.Module.batch`. There are no threads to set here;
                `return_failed_examples=True` takes DSPy's own way, one call an example.
            **settings: As above.

        Returns:
            One prediction an example, in order.
        """
        if settings.get("return_failed_examples"):
            return super().batch(list(examples), *args, **settings)
        calls = [read_call(self, example_inputs(example)) for example in examples]
        vectors = self.encoder.encode([call.text for call in calls])
        return [self._answer(call, vector) for call, vector in zip(calls, vectors, strict=True)]

    def load(self, path: str | Path, *args: Any, **settings: Any) -> None:
        """Load a saved route, as every DSPy module does; the arguments are the same.

        Raises:
            RouteError: If the file is damaged or holds something else; the route is then unchanged. Around a route,
                a program's own part of the file is read by DSPy, with errors of its own.
        """
        try:
            super().load(path, *args, **settings)
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise RouteError(
                f"{str(path)!r} is not the file of a saved route ({error!r}). Save the route again."
            ) from error

    def load_state(self, state: dict[str, Any], **settings: Any) -> None:
        """Take over a state that a route dumped, as every DSPy module does.

        Raises:
            RouteError: If it holds something else; the route is then unchanged.
        """
        if LEARNED not in state:
            raise RouteError(
                f"The state holds no route: it has no {LEARNED!r}, only {shortened(repr(list(state)), 200)}. Load a "
                "file that route.save(...) wrote; the file of a program around a route is loaded by that program."
            )
        super().load_state(state, **settings)

    def text(self, inputs: Mapping[str, Any]) -> str:
        """The text the encoder reads for a call's inputs; the template is `dspy_router.fields.input_text`."""
        return input_text(self.signature, inputs)

    def _checked(self, args: tuple[Any, ...], inputs: dict[str, Any]) -> dict[str, Any]:
        if args:
            names = ", ".join(f"{name}=..." for name in self.signature.input_fields)
            raise RouteError(f"A route takes keyword inputs, as dspy.Predict does: route({names}).")
        if inputs.keys().isdisjoint(PREDICT_ARGUMENTS):
            return inputs
        declared = self.signature.input_fields
        return {name: value for name, value in inputs.items() if name in declared or name not in PREDICT_ARGUMENTS}

    def __repr__(self) -> str:
        sizes = ", ".join(f"{field.name} among {len(field.options)}" for field in self.fields)
        return f"DifferentiableRoute({sizes})"
