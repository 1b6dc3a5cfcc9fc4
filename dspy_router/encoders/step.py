"""What a step of an agent is decided from, as one vector: the request, what came back, what was called."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from math import inf, log1p
from typing import TYPE_CHECKING, Any

from dspy_router.agent.state import StepState
from dspy_router.encoders.base import Encoder, Fingerprint
from dspy_router.encoders.weights import FORMS_OF_DEFAULT
from dspy_router.errors import RouteError

if TYPE_CHECKING:
    import numpy as np

# What each block is multiplied with before the whole is scaled to length one. Chosen on tau-bench's airline dialogues,
# on folds by task inside the training part of each fold: `benchmarks/tau_bench.py --choose`.
WEIGHTS = {
    "request": 1.0,
    "observation": 1.0,
    "messages": 0.5,
    "calls": 0.5,
    "last": 0.5,
    "step": 0.5,
    "failed": 0.5,
}
STEP_SCALE = 3.0  # log(1 + calls) is at most this in runs of up to 19 calls


class StepEncoder(Encoder):
    """The text of a `StepState` to one unit vector, block by block.

    | block | what it holds | numbers |
    |---|---|---|
    | `request` | the request's vector | d |
    | `observation` | the last result's vector | d |
    | `messages` | the vectors of the last `turns` earlier turns, the latest first | turns · d |
    | `calls` | log(1 + how often each tool was called) | k |
    | `last` | which tool the last call was of; at the end, that the step follows no call | k + 1 |
    | `step` | log(1 + calls) / `STEP_SCALE` | 1 |
    | `failed` | whether the last call failed | 1 |

    for k tools and base vectors of length d. Every block is multiplied by its entry in `WEIGHTS` and the whole scaled
    to length one. Any other text, such as an option's description, is a request and nothing else: so descriptions are
    the head's prior here as everywhere.

    The base encodes the parts of all states at once and through its own cache, so that at each step of a run only what
    is new is encoded.

    Args:
        base: The frozen encoder of requests, observations and messages, or what `DifferentiableRoute` takes for one.
        tools: Names of the tools that `calls` and `last` tell apart. Calls of others count as steps alone.
        turns: How many earlier turns of a dialogue are read; none for an agent with one request.
        without: Blocks that states are read without, to see what each brings.
        weights: Other weights by block. Those left out keep theirs.
        cache_size: How many states' vectors are kept in memory.

    Raises:
        RouteError: If the base is trained, a tool is named twice, a block is unknown or `turns` negative.

    Example:
        >>> import numpy as np
        >>> letters = lambda texts: np.array([[text.count(letter) for letter in "abc"] for text in texts])
        >>> encoder = StepEncoder(letters, ["map", "search"], without=("step", "failed"))
        >>> encoder.encode_one("abba").round(1)  # a description
        array([0.7, 0.7, 0. , 0. , 0. , 0. , 0. , 0. , 0. , 0. , 0. , 0. , 0. ],
              dtype=float32)
        >>> state = StepState("a?").after("search", "b c")
        >>> encoder.encode_one(state.to_text()).round(1)
        array([0.6, 0. , 0. , 0. , 0.5, 0.5, 0. , 0.2, 0. , 0.3, 0. , 0. , 0. ],
              dtype=float32)
    """

    def __init__(
        self,
        base: Encoder | str | Callable[[list[str]], Any] | None,
        tools: Iterable[str],
        *,
        turns: int = 0,
        without: Iterable[str] = (),
        weights: Mapping[str, float] | None = None,
        cache_size: int = 5_000,
    ) -> None:
        from dspy_router.encoders.choose import as_encoder

        self.base = as_encoder(base)
        self.tools = tuple(tools)
        self.turns = turns
        if self.base.trainable:
            raise RouteError(f"The base {self.base!r} is trained with its route; give a frozen encoder.")
        if len(set(self.tools)) < len(self.tools):
            raise RouteError(f"tools={list(self.tools)} names one twice. Tools are told apart by name.")
        if turns < 0:
            raise RouteError(f"turns={turns} is negative; give 0 to read no earlier turns.")
        self.weights = WEIGHTS | dict(weights or {}) | dict.fromkeys(without, 0.0)
        if strays := [block for block in self.weights if block not in WEIGHTS]:
            raise RouteError(f"There is no block {strays}; the blocks are {list(WEIGHTS)}.")
        if wrong := {block: weight for block, weight in self.weights.items() if not 0 <= weight < inf}:
            raise RouteError(f"weights={wrong}: expected finite numbers, 0 or more.")
        super().__init__(cache_size=cache_size)

    def _encode_batch(self, texts: list[str]) -> "np.ndarray":
        import numpy as np

        states = [StepState.from_text(text) for text in texts]
        nothing = [""] * (1 + self.turns)
        read = [
            [text, *nothing] if state is None else self._read(state) for text, state in zip(texts, states, strict=True)
        ]
        vectors = self.base.encode([part for parts in read for part in parts]).reshape(*np.shape(read), -1)
        # Of texts that are no state, the request block is all there is: its weight changes nothing.
        weights = [
            self.weights["request"] or 1.0,
            self.weights["observation"],
            *[self.weights["messages"]] * self.turns,
        ]
        vectors = vectors * np.array(weights, np.float32)[:, None]
        numbers = np.array([self._numbers(state) for state in states], np.float32)
        return np.concatenate([vectors.reshape(len(texts), -1), numbers], axis=1)

    def _read(self, state: StepState) -> list[str]:
        """The texts of the request, the observation and the last turns, latest first; empty where there is none."""
        latest = state.messages[::-1][: self.turns]
        texts = [state.request, state.observation, *latest, *[""] * (self.turns - len(latest))]
        blocks = ["request", "observation", *["messages"] * self.turns]
        return [text if self.weights[block] else "" for block, text in zip(blocks, texts, strict=True)]

    def _numbers(self, state: StepState | None) -> list[float]:
        """The blocks that hold no vector, weights included."""
        if state is None:
            return [0.0] * (2 * len(self.tools) + 3)
        last = state.calls[-1] if state.follows_call else None
        numbers = {
            "calls": [log1p(state.calls.count(tool)) for tool in self.tools],
            "last": [float(tool == last) for tool in (*self.tools, None)],
            "step": [log1p(state.step) / STEP_SCALE],
            "failed": [float(state.failed)],
        }
        return [self.weights[block] * number for block, found in numbers.items() for number in found]

    def _fingerprint(self) -> Fingerprint:
        base = self.base.fingerprint
        return Fingerprint(
            name=f"steps read by {base.name}",
            revision=base.revision,
            weights=self._digest(base.weights),
            dimension=(2 + self.turns) * base.dimension + 2 * len(self.tools) + 3,
        )

    def _digest(self, base: str) -> str:
        """Of the weights of a base and of how its vectors are put together."""
        layout = json.dumps([self.tools, self.turns, sorted(self.weights.items()), STEP_SCALE])
        return hashlib.sha256(f"{base} {layout}".encode()).hexdigest()

    def serves(self, saved: Fingerprint) -> bool:
        """As for every encoder, if the bases are one model in two forms."""
        forms = FORMS_OF_DEFAULT if self.base.fingerprint.weights in FORMS_OF_DEFAULT else ()
        return super().serves(saved) or saved.weights in map(self._digest, forms)

    def __getstate__(self) -> dict[str, Any]:
        kept = ("base", "tools", "turns", "weights", "cache_size")
        return {name: getattr(self, name) for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset_runtime()

    def __repr__(self) -> str:
        return f"StepEncoder({self.base!r}, {list(self.tools)})"
