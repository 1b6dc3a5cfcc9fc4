"""List outputs: `topics: list[Literal["billing", "bug"]]` as one yes-or-no decision for each option.

The output has one head over its options (`dspy_router.folded_lists`), and every option a decision of its own, with a
probability, a propensity and an id: in feedback, logs and overrides it is a boolean named `topics[billing]`. So
whatever is learned from booleans is learned from lists, and what the options have in common is learned once.
"""

import copy
import enum
import math
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from dspy_router.errors import RouteError
from dspy_router.fields import DecisionField
from dspy_router.options import Option

if TYPE_CHECKING:
    import numpy as np

COLLECTIONS = (list, tuple, set, frozenset)  # in which options are given; what a route gives is a list
YES, NO = Option("True", value=True), Option("False", value=False)


@dataclass(frozen=True)
class ListField(DecisionField):
    """An output field whose value is a list of options: any of them, in the order in which they are declared."""

    several: ClassVar[bool] = True
    fewest: ClassVar[int] = 1

    @cached_property
    def one(self) -> FieldInfo:
        """See `DecisionField`."""
        one = copy.copy(self.info)
        one.annotation = get_args(self.info.annotation)[0]
        return one

    @cached_property
    def decision_fields(self) -> tuple[DecisionField, ...]:
        """For each option, whether it is in the list."""
        return tuple(self._members.values())

    @cached_property
    def _members(self) -> dict[str, "MemberField"]:
        return {
            option.name: MemberField(
                name=f"{self.name}[{option.name}]",
                options=(YES, NO),
                info=FieldInfo(annotation=bool),
                kind="noul",
                owner=self,
                member=index,
            )
            for index, option in enumerate(self.options)
        }

    def single(self, probabilities: Mapping[str, float]) -> list[tuple[DecisionField, Mapping[str, float]]]:
        """See `DecisionField`: each option in question is in the list or not."""
        return [
            (self._members[name], {YES.name: probability, NO.name: 1.0 - probability})
            for name, probability in probabilities.items()
        ]

    def explained(self, probabilities: Mapping[str, float]) -> list[tuple[DecisionField, Mapping[str, float]]]:
        """See `DecisionField`: the options that are in the list; if none is, the likeliest."""
        least = min(0.5, max(probabilities.values()))
        return self.single({name: probability for name, probability in probabilities.items() if probability >= least})

    def plain(self, chosen: Mapping[str, str]) -> list[Any]:
        """See `DecisionField`: the options that are in the list."""
        members = zip(self.options, self.decision_fields, strict=True)
        return [option.value for option, member in members if chosen.get(member.name) == YES.name]

    def value_of(self, chosen: Mapping[str, str], probabilities: Mapping[str, float]) -> list[Any]:
        """See `DecisionField`."""
        return self.plain(chosen)

    def confidence(self, confidences: Sequence[float]) -> float:
        """See `DecisionField`: the probability of the whole list, the options taken as independent."""
        return math.prod(confidences)

    def members(self, value: Any) -> frozenset[int] | None:
        """The options in a list, tuple or set, by index; None if something else is in it, or it is none of these."""
        if not isinstance(value, COLLECTIONS):
            return None
        found = [self._index(entry) for entry in value]
        return None if None in found else frozenset(index for index in found if index is not None)

    def strays(self, value: Any) -> list[str]:
        """See `DecisionField`: those in the list that are no options."""
        if not isinstance(value, COLLECTIONS):
            return [f"{value!r} in place of a list of options"]
        return [repr(entry) for entry in value if self._index(entry) is None]

    @cached_property
    def _indices(self) -> dict[tuple[type, Any], int]:
        return {(type(option.value), option.value): index for index, option in enumerate(self.options)}

    def _index(self, entry: Any) -> int | None:
        """What `index_of` is for an output of one option, but fast: every label comes by here once for every option."""
        try:
            index = self._indices.get((type(entry), entry))
        except TypeError:  # not hashable
            return None
        return super().index_of(entry) if index is None else index

    def index_of(self, value: Any) -> int | None:
        """Not for a list: each of its `decision_fields` tells its own."""
        raise TypeError(f"{self.name!r} is a list: ask its decision_fields.")


@dataclass(frozen=True, kw_only=True)
class MemberField(DecisionField):
    """Whether one option is in a list: a boolean that nobody declared.

    Attributes:
        owner: The list's field.
        member: The option's index there.
    """

    owner: ListField = field(repr=False)
    member: int

    @property
    def output(self) -> str:
        """See `DecisionField`."""
        return self.owner.name

    @property
    def decides_first(self) -> bool:
        """See `DecisionField`."""
        return self.member == 0

    def index_of(self, value: Any) -> int | None:
        """Where it stands among the options whether this one is in a list; None if the value is no list of options."""
        members = self.owner.members(value)
        return None if members is None else 0 if self.member in members else 1

    def strays(self, value: Any) -> list[str]:
        """See `DecisionField`."""
        return self.owner.strays(value)

    def policy(self, route: Any, vectors: "np.ndarray", candidates: "np.ndarray | None" = None) -> "np.ndarray":
        """See `DecisionField`: float64 [n, 2], the probabilities of True and False."""
        import numpy as np

        policy = route.learned.folded(self.owner.name).policy(vectors, candidates)
        within: np.ndarray = policy[..., self.member]
        return np.stack([within, 1.0 - within], axis=-1)


def is_list(name: str, annotation: Any) -> bool:
    """Whether an output is a list of options.

    Raises:
        RouteError: If it is a collection of another kind, an optional list, or a list of something else.

    Example:
        >>> is_list("topics", list[Literal["billing", "bug"]]), is_list("topic", Literal["billing", "bug"])
        (True, False)
    """
    parts = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else ()
    if any(_is_collection(part) for part in parts):
        raise RouteError(
            f"Output field {name!r} has type {annotation}: a list or something else. Declare the list alone, such as "
            f"{name}: list[Literal[...]]; where no option fits, it is []."
        )
    if not _is_collection(annotation):
        return False
    item = get_args(annotation)[0] if get_origin(annotation) is list else None
    if item is not str and get_origin(item) is not Literal and not isinstance(item, enum.EnumMeta):
        raise RouteError(
            f"Output field {name!r} has type {annotation}. Of collections a route decides lists of options alone: "
            "list[Literal[...]], a list of an Enum, or list[str] with options from tools=."
        )
    return True


def _is_collection(annotation: Any) -> bool:
    kind = get_origin(annotation) or annotation
    return isinstance(kind, type) and issubclass(kind, (*COLLECTIONS, dict))
