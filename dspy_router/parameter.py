"""What a route has learned, as a DSPy `Parameter`: found, copied, saved and loaded by every program around it."""

import copy
import threading
import uuid
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dspy.predict.parameter import Parameter

from dspy_router.encoders.base import Encoder
from dspy_router.fields import DecisionField

if TYPE_CHECKING:
    from dspy_router.heads import RouteHead

_building = threading.Lock()


class RouteParameter(Parameter):
    """The head of a route, built at first use from the options' descriptions.

    It is a `Parameter` and no `Module`, so that DSPy saves it with any program that holds the route, while
    `set_lm`, `get_lm` and the optimizers that look for predictors pass it by and still see a fallback's
    predictors inside the route.
    """

    def __init__(self, fields: Sequence[DecisionField], encoder: Encoder) -> None:
        self.fields = tuple(fields)
        self.encoder = encoder
        self.origin = uuid.uuid4().hex  # the same in every copy, by which a copy is known
        self._head: RouteHead | None = None

    @property
    def head(self) -> "RouteHead":
        """The torch module; building it encodes the options' texts."""
        if self._head is None:
            with _building:
                if self._head is None:
                    self._head = self._build()
        return self._head

    def _build(self) -> "RouteHead":
        import torch

        from dspy_router.heads import OptionHead, RouteHead

        heads = []
        for field in self.fields:
            vectors = self.encoder.encode([option.text for option in field.options])
            heads.append(OptionHead(torch.from_numpy(vectors)))
        return RouteHead([field.name for field in self.fields], heads)

    def reset(self) -> None:
        """Keep what was learned: optimizers call this on copies to drop demos, and a head is none."""

    def dump_state(self, json_mode: bool = True) -> dict[str, Any]:
        """The saved form, the same in every mode: see `dspy_router.persistence`."""
        from dspy_router.persistence import route_state

        return route_state(self.fields, self.head, self.encoder)

    def load_state(self, state: dict[str, Any]) -> None:
        """Take over a saved state, whole or not at all.

        Raises:
            RouteError: If the state does not fit this route; it is then unchanged.
        """
        from dspy_router.persistence import parse_route_state

        head, network = parse_route_state(state, self.fields, self.encoder)
        self._head = head
        if network:
            self.encoder.network.load_state_dict(network)  # type: ignore[attr-defined]

    def __deepcopy__(self, memo: dict[int, Any]) -> "RouteParameter":
        copied = RouteParameter(self.fields, copy.deepcopy(self.encoder, memo))
        memo[id(self)] = copied
        copied.origin = self.origin
        copied._head = copy.deepcopy(self._head, memo)
        return copied
