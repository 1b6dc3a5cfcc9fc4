"""What can be asked of a route without a decision being made."""

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import dspy

from dspy_router.deciding import candidate_masks, policies, read_call
from dspy_router.errors import RouteError
from dspy_router.probabilities import likeliest

if TYPE_CHECKING:
    import numpy as np
    import torch

    from dspy_router.explanation import Explanation


class RouteQueries:
    """Logits, scores and rankings: the part of `DifferentiableRoute` that makes no decision; `self` is one."""

    def logits(self: Any, inputs: Sequence[Any], field: str | None = None) -> "torch.Tensor":
        """Logits [n, k] of texts, dicts or examples, differentiable in the head's parameters.

        Args:
            inputs: Texts are taken as they are; dicts and examples become text as in a call.
            field: Which field's logits; needed only if the route decides several.

        Raises:
            RouteError: If `field` is unknown, or missing where there are several.
        """
        logits: torch.Tensor = self.head[self._named(field)](self.vectors(self._texts(inputs)))
        return logits

    def vectors(self: Any, texts: Sequence[str]) -> "torch.Tensor":
        """The encoder's vectors [n, d]; differentiable only where the encoder is trainable."""
        import torch

        if self.encoder.trainable:
            network, ids = self.encoder.network, self.encoder.token_ids(list(texts))
            trained: torch.Tensor = network(ids)
            return trained
        return torch.from_numpy(self.encoder.encode(texts))

    def score(
        self: Any, inputs: Sequence[Any], *, candidates: Collection[str] | Mapping[str, Collection[str]] | None = None
    ) -> "np.ndarray":
        """How far decisions can be relied on, float64 [n], higher being surer; inputs as for `logits`.

        For a trained route it combines what the head thinks with how like the training texts an input is
        (`dspy_router.learning.familiarity`), so it is low for requests that no option fits.

        Args:
            inputs: n of them.
            candidates: The options that can be chosen, for all of the inputs; as in a call.

        Raises:
            RouteError: If candidates are unknown, or there are none.
        """
        from dspy_router.guarding.scoring import route_scores

        return route_scores(self, self.encoder.encode(self._texts(inputs)), candidate_masks(self, candidates))

    def top_k(self: Any, k: int, *, field: str | None = None, **inputs: Any) -> dict[str, float]:
        """The k likeliest options with their probabilities, likeliest first; no decision is made.

        Args:
            k: At least 1.
            field: Which decision; needed only if there are several.
            **inputs: As in a call, `candidates` included.
        """
        call = read_call(self, inputs)
        thought = policies(self, call, self.encoder.encode_one(call.text))
        return likeliest(thought.probabilities[self._named(field)], k)

    def explain(self: Any, **inputs: Any) -> "Explanation":
        """Why the route would decide these inputs as it would; no decision is made.

        For every field: the likeliest options; the training texts nearest in the head's own space, or where there are
        none, the options' descriptions; the words that carried the decision; the fewest words without which it would
        be another. `dspy_router.explaining` says how each is defined, what it costs, and what is kept for it.

        Args:
            **inputs: As in a call, `candidates` included.

        Returns:
            An object that renders as text and as HTML.

        Example:
            >>> import numpy as np
            >>> from dspy_router import DifferentiableRoute
            >>> letters = lambda texts: np.array([[text.count(c) for c in "abcdefghij"] for text in texts])
            >>> route = DifferentiableRoute("text -> fruit", tools=["fig", "date"], encoder=letters)
            >>> explanation = route.explain(text="a fig, if I may")
            >>> for sentence in explanation.fields["fruit"].sentences:
            ...     print(sentence)
            fruit: fig; log-odds against date: +9.61.
            Without 'fig', 'if' it would be date (100.0%).
            >>> [(word.word, round(word.effect, 2)) for word in explanation.fields["fruit"].carrying[:2]]
            [('fig', 9.61), ('if', 5.24)]
        """
        from dspy_router.explaining import explain

        return explain(self, inputs)

    def trained_on(self: Any, **inputs: Any) -> bool:
        """Whether the route was trained on these inputs, which must then not serve to judge it."""
        return self.learned.record is not None and self.learned.record.holds(self.text(inputs))

    def _named(self: Any, field: str | None) -> str:
        names = [decided.name for decided in self.fields]
        if field is None and len(names) > 1:
            raise RouteError(f"field={field!r}: this route decides {names}; name one of them.")
        return self.field(field or names[0]).name

    def _texts(self: Any, inputs: Sequence[Any]) -> list[str]:
        return [entry if isinstance(entry, str) else self.text(example_inputs(entry)) for entry in inputs]


def example_inputs(example: Any) -> Mapping[str, Any]:
    """The inputs of a `dspy.Example`, or of a dict.

    Raises:
        RouteError: If it is neither.
    """
    if isinstance(example, dspy.Example):
        inputs: Mapping[str, Any] = example.inputs().toDict() if example._input_keys is not None else example.toDict()
        return inputs
    if isinstance(example, Mapping):
        return example
    raise RouteError(f"{example!r} is no input: give a dspy.Example, or a dict of the signature's inputs.")
