"""What a route has learned, as a DSPy `Parameter`: found, copied, saved and loaded by every program around it."""

import asyncio
import copy
import threading
import uuid
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dspy.predict.parameter import Parameter

from dspy_router.encoders.base import Encoder
from dspy_router.fields import DecisionField
from dspy_router.options import encode_options

if TYPE_CHECKING:
    from dspy_router.folded import FoldedHead
    from dspy_router.guarding.guard_report import GuardReport
    from dspy_router.heads import RouteHead
    from dspy_router.training_record import TrainingRecord

_building = threading.Lock()


class RouteParameter(Parameter):
    """The head of a route, built at first use from the options' descriptions.

    It is folded as long as the route only decides, and becomes a torch module when somebody asks for `head`.

    It is a `Parameter` and no `Module`, so that DSPy saves it with any program that holds the route, while
    `set_lm`, `get_lm` and the optimizers that look for predictors pass it by and still see a fallback's
    predictors inside the route.
    """

    def __init__(self, fields: Sequence[DecisionField], encoder: Encoder) -> None:
        self.fields = tuple(fields)
        self.encoder = encoder
        self.origin = uuid.uuid4().hex  # the same in every copy, by which a copy is known
        self.record: TrainingRecord | None = None
        self.guard: GuardReport | None = None
        # In one place, so that a thread finds either form, whatever another does meanwhile. A dict never changes.
        self._heads: dict[str, FoldedHead] | RouteHead | None = None

    @property
    def head(self) -> "RouteHead":
        """The torch module; building it encodes the options' texts, unless that is done."""
        heads = self._heads
        if heads is None or isinstance(heads, dict):
            with _building:
                heads = self._heads
                if heads is None or isinstance(heads, dict):
                    heads = self._heads = self._unfolded(self._built() if heads is None else heads)
        return heads

    def folded(self, field: str) -> "FoldedHead":
        """The head of a field as it decides."""
        heads = self._heads
        if heads is None:
            with _building:
                if self._heads is None:
                    self._heads = self._built()
                heads = self._heads
        return heads[field] if isinstance(heads, dict) else heads[field].folded()

    @property
    def is_built(self) -> bool:
        """Whether the options' texts have been encoded, or a head was loaded."""
        return self._heads is not None

    @property
    def digest(self) -> str:
        """Another one after every change of the head or the options."""
        return "-".join(self.folded(field.name).digest for field in self.fields)

    def replace(self, fields: Sequence[DecisionField], head: "RouteHead") -> None:
        """Decide among other options from now on."""
        self.fields, self._heads = tuple(fields), head

    async def build(self) -> None:
        """Build the head, unless it is there, and leave the event loop free meanwhile."""
        if not self.is_built:
            await asyncio.to_thread(self.folded, self.fields[0].name)

    def _built(self) -> "dict[str, FoldedHead]":
        from dspy_router.folded_lists import folded_form

        return {
            field.name: folded_form(field).untrained(
                encode_options([option.texts for option in field.options], self.encoder.encode)
            )
            for field in self.fields
        }

    def _unfolded(self, folded: "Mapping[str, FoldedHead]") -> "RouteHead":
        from dspy_router.heads import OptionHead, RouteHead
        from dspy_router.list_heads import ListHead

        forms = [ListHead if field.several else OptionHead for field in self.fields]
        heads = [form.unfolded(folded[field.name]) for form, field in zip(forms, self.fields, strict=True)]
        return RouteHead([field.name for field in self.fields], heads)

    def reset(self) -> None:
        """Keep what was learned: optimizers call this on copies to drop demos, and a head is none."""

    def dump_state(self, json_mode: bool = True) -> dict[str, Any]:
        """The saved form, the same in every mode: see `dspy_router.persistence`."""
        from dspy_router.persistence import route_state

        folded = {field.name: self.folded(field.name) for field in self.fields}
        return route_state(self.fields, folded, self.encoder, self.record, self.guard)

    def load_state(self, state: dict[str, Any]) -> None:
        """Take over a saved state, whole or not at all.

        A program's `load` reads the file before it comes here, and tries everything on a copy first. So what DSPy
        itself finds wrong with a JSON file also leaves the program as it was: `orjson.JSONDecodeError` where it is
        no JSON; `KeyError`, `TypeError` or `AttributeError` where `"metadata"` or the entry of a route is missing or
        of another type. A `.pkl` file is code; nothing is promised of a damaged one.

        Raises:
            RouteError: If the state is damaged or does not fit this route; it is then unchanged.
        """
        from dspy_router.persistence import parse_route_state

        saved = parse_route_state(state, self.fields, self.encoder)
        if saved.network:
            self.encoder.take_weights(saved.network, self)  # type: ignore[attr-defined]
        with _building:  # a first decision in another thread may be building a head, which would come after this one
            self._heads, self.record, self.guard = saved.heads, saved.record, saved.guard

    def __getstate__(self) -> dict[str, Any]:
        # A frozen encoder is pickled without its weights, so the head keeps what they were. Folded, the head is read
        # without torch.
        if not self.is_built:
            return {**self.__dict__, "fingerprint": None}
        heads = {field.name: self.folded(field.name) for field in self.fields}
        return {**self.__dict__, "_heads": heads, "fingerprint": self.encoder.fingerprint}

    def __setstate__(self, state: dict[str, Any]) -> None:
        fingerprint = state.pop("fingerprint", None)
        self.__dict__.update(state)
        if fingerprint is not None:
            from dspy_router.persistence import require_same_encoder

            require_same_encoder(fingerprint, self.encoder)

    def __deepcopy__(self, memo: dict[int, Any]) -> "RouteParameter":
        copied = RouteParameter(self.fields, copy.deepcopy(self.encoder, memo))
        memo[id(self)] = copied
        copied.origin = self.origin
        copied.record, copied.guard = self.record, self.guard
        heads = self._heads
        copied._heads = heads if isinstance(heads, dict) else copy.deepcopy(heads, memo)
        return copied
