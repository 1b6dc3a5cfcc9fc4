"""From a DSPy signature to the decisions a route makes for it, and from call inputs to the text it reads."""

import enum
import logging
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import dspy
from dspy.adapters.utils import annotation_allows_none, format_field_value
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from dspy_router.decision_types import (
    DecisionKind,
    decision_kind,
    declared_options,
    declared_value,
    level_of,
    plain_value,
)
from dspy_router.errors import RouteError
from dspy_router.options import Option, Tools, parse_tools, require_distinct

if TYPE_CHECKING:
    import numpy as np

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DecisionField:
    """One output field and the options it is decided among, in declaration order.

    It is decided by one decision, unless it is a `dspy_router.lists.ListField`, with a decision for each option.
    """

    several: ClassVar[bool] = False  # whether the value is a list
    fewest: ClassVar[int] = 2  # options

    name: str
    options: tuple[Option, ...]
    info: FieldInfo
    kind: DecisionKind = "choice"

    def __deepcopy__(self, memo: dict[int, Any]) -> "DecisionField":
        return self  # immutable

    @cached_property
    def declared_options(self) -> tuple[Option, ...]:
        """The options as the signature alone describes them; none where they come from tools."""
        return _enum_options(self.one.annotation) or declared_options(self.name, self.one) or ()

    @cached_property
    def option_names(self) -> tuple[str, ...]:
        """The options' names, in declaration order."""
        return tuple(option.name for option in self.options)

    @property
    def one(self) -> FieldInfo:
        """How a single option is declared."""
        return self.info

    @property
    def is_open(self) -> bool:
        """Whether its options come from tools."""
        return self.one.annotation is str

    @property
    def output(self) -> str:
        """The output field that holds what is decided."""
        return self.name

    @property
    def decides_first(self) -> bool:
        """Whether it is the first decision of its output."""
        return True

    @property
    def decision_fields(self) -> tuple["DecisionField", ...]:
        """What is decided one by one."""
        return (self,)

    def single(self, probabilities: Mapping[str, float]) -> "list[tuple[DecisionField, Mapping[str, float]]]":
        """The decisions to make, with the probabilities of their options; `probabilities` are the candidates'."""
        return [(self, probabilities)]

    def explained(self, probabilities: Mapping[str, float]) -> "list[tuple[DecisionField, Mapping[str, float]]]":
        """Those of `single` that are worth explaining."""
        return self.single(probabilities)

    def plain(self, chosen: Mapping[str, str]) -> Any:
        """The bare value that its decisions stand for: by their names, the options taken."""
        return next(option.value for option in self.options if option.name == chosen[self.name])

    def value_of(self, chosen: Mapping[str, str], probabilities: Mapping[str, float]) -> Any:
        """The output's value as declared, for what its decisions have taken; `probabilities` are the candidates'."""
        return self.typed(chosen[self.name], probabilities, probabilities[chosen[self.name]])

    def confidence(self, confidences: Sequence[float]) -> float:
        """That of the output, from those of its decisions."""
        [confidence] = confidences
        return confidence

    def policy(self, route: Any, vectors: "np.ndarray", candidates: "np.ndarray | None" = None) -> "np.ndarray":
        """Probabilities [n, k] of the options for vectors [n, d], by the route's head among the output's candidates."""
        policy: np.ndarray = route.learned.folded(self.name).policy(vectors, candidates)
        return policy

    @cached_property
    def positions(self) -> dict[str, int]:
        """From each option's name to its place among the options."""
        return {name: place for place, name in enumerate(self.option_names)}

    def typed(self, name: str, probabilities: Mapping[str, float], confidence: float) -> Any:
        """The option of that name as the signature declares it (an int for `Literal[1, 2]`, a `Choice`, ...)."""
        return declared_value(self.info, self.options[self.positions[name]], probabilities, confidence)

    def index_of(self, value: Any) -> int | None:
        """Where `value` (a label, or a decision object around one) stands among the options; None if nowhere.

        A value of the declared type wins over a name, so that `1` and `"1"` both find the option `1`. For a score, a
        number is at the level next to it.
        """
        value = plain_value(value)
        if self.kind == "score" and isinstance(value, numbers.Real) and not isinstance(value, bool):
            value = level_of(float(value))
        for index, option in enumerate(self.options):
            if type(option.value) is type(value) and option.value == value:
                return index
        name = str(value.value if isinstance(value, enum.Enum) else value)
        return next((index for index, option in enumerate(self.options) if option.name == name), None)

    def strays(self, value: Any) -> list[str]:
        """What is wrong with a value that has no index, as errors quote it."""
        return [repr(plain_value(value))]


def declared_field(name: str, info: FieldInfo) -> DecisionField:
    """The field of an output, still without options.

    Raises:
        RouteError: If it is a collection that no route decides.
    """
    from dspy_router.lists import ListField, is_list  # made of what is above

    return (
        ListField(name, (), info)
        if is_list(name, info.annotation)
        else DecisionField(name, (), info, decision_kind(info))
    )


def decision_fields(signature: type[dspy.Signature], tools: Tools | None = None) -> tuple[DecisionField, ...]:
    """The decisions a signature asks for.

    `tools` are the options of the one output that is a plain `str` or `list[str]`. For a field that lists its options
    itself, tools of the same name describe them.

    Raises:
        RouteError: If an output is no decision, several are plain `str` or `list[str]`, a field has fewer than two
            options, two options share a name, or a tool belongs to no field.

    Example:
        >>> from typing import Literal
        >>> signature = dspy.Signature("text -> mood: Literal['good', 'bad'], urgent: bool")
        >>> [(field.name, field.option_names) for field in decision_fields(signature)]
        [('mood', ('good', 'bad')), ('urgent', ('True', 'False'))]
    """
    if not signature.output_fields:
        raise RouteError("The signature has no output field, so there is nothing to decide.")
    if not signature.input_fields:
        raise RouteError("The signature has no input field, so there is nothing to decide from.")
    described = parse_tools(tools) if tools is not None else ()
    by_name = {option.name: option for option in described}
    used: set[str] = set()
    fields = []
    for name, info in signature.output_fields.items():
        field = declared_field(name, info)
        if field.is_open:
            options = described
            if not options:
                declared_as = "list[Literal[...]]" if field.several else "Literal[...]"
                raise RouteError(
                    f"Output field {name!r} is a plain {_type_name(info.annotation)}. If it names tools, pass "
                    f"tools=[...]; if it takes a few values, declare them: {name}: {declared_as}. Free text needs an "
                    "LM: keep a dspy.Predict for this field."
                )
        else:
            declared = field.declared_options
            if not declared:
                raise RouteError(
                    f"Output field {name!r} has type {_type_name(info.annotation)}, which is not a decision. A route "
                    "decides Literal[...], bool, Enum, Choice[...], Noul, Score[...], a str field whose options come "
                    "from tools=, or a list of Literal[...], Enum or such str. Leave other fields to a dspy.Predict "
                    "with a signature of their own."
                )
            options = tuple(_described(option, by_name) for option in declared)
            _warn_of_undescribed(name, options, by_name)
        used.update(option.name for option in options)
        if len(options) < field.fewest:
            raise RouteError(
                f"Output field {name!r} has one option, {options[0].name!r}: there is nothing to decide. "
                "Give at least two."
            )
        require_distinct(options, f"Output field {name!r}")
        fields.append(replace(field, options=options))
    if len(open_ := [field.name for field in fields if field.is_open]) > 1:
        raise RouteError(
            f"The output fields {open_} are all plain str or list[str], and tools= are the options of one such field. "
            "Free text needs an LM: keep a dspy.Predict for it. Where several are choices, declare each with its "
            'options, as Literal["search", "mail"] or a list of it; tools of those names describe them.'
        )
    if strays := [name for name in by_name if name not in used]:
        raise RouteError(
            f"Tools {strays} are no option of any output field; the fields list "
            f"{ {field.name: field.option_names for field in fields} }. Rename the tools or add them to the type."
        )
    return tuple(fields)


def input_text(signature: type[dspy.Signature], inputs: Mapping[str, Any]) -> str:
    """The text a route reads for a call.

    One input field is used as it is. Several are joined, in the signature's order, one `name: value` a line;
    empty ones are left out. Values that are not strings are serialised the way DSPy's adapters do it.

    Raises:
        RouteError: If a required input is missing or an input is unknown.

    Example:
        >>> signature = dspy.Signature("question, hints: list[str] -> tool: bool")
        >>> print(input_text(signature, {"question": "How far is it?", "hints": ["a map", "a car"]}))
        question: How far is it?
        hints: ["a map", "a car"]
    """
    fields = signature.input_fields
    if unknown := [name for name in inputs if name not in fields]:
        raise RouteError(f"Unknown input {unknown}: the signature's inputs are {list(fields)}.")
    parts = {}
    for name, info in fields.items():
        value = inputs.get(name, None if info.default is PydanticUndefined else info.default)
        if name not in inputs and info.default is PydanticUndefined and not annotation_allows_none(info.annotation):
            raise RouteError(f"Input {name!r} is missing: call the route with {', '.join(f'{f}=...' for f in fields)}.")
        # A string stays as it is; DSPy's way to say so costs as much as the rest of a decision.
        text = value if type(value) is str else "" if value is None else str(format_field_value(info, value))
        if text.strip():
            parts[name] = text
    if len(fields) == 1:
        return next(iter(parts.values()), "")
    return "\n".join(f"{name}: {text}" for name, text in parts.items())


def _described(option: Option, by_name: Mapping[str, Option]) -> Option:
    tool = by_name.get(option.name)
    if tool is None:
        return option
    return replace(
        option,
        description=tool.description or option.description,
        arguments=tool.arguments,
        argument_descriptions=tool.argument_descriptions,
    )


def _warn_of_undescribed(name: str, options: Sequence[Option], by_name: Mapping[str, Option]) -> None:
    """Say which options no tool describes where tools describe others of the field."""
    bare = [option.name for option in options if option.name not in by_name and not option.description]
    if bare and any(option.name in by_name for option in options):
        logger.warning(
            "No tool describes %s of the output field %r: before training the route knows them by their names alone. "
            "Give tools of these names too.", bare, name,
        )  # fmt: skip


def _enum_options(annotation: Any) -> tuple[Option, ...] | None:
    if not isinstance(annotation, enum.EnumMeta):
        return None
    return tuple(Option(str(member.value), value=member) for member in annotation)  # type: ignore[var-annotated]


def _type_name(annotation: Any) -> str:
    return annotation.__name__ if isinstance(annotation, type) else str(annotation)
