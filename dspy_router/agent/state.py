"""What a step of an agent is decided from, and its one text form."""

import json
from dataclasses import asdict, dataclass, fields, replace


@dataclass(frozen=True)
class StepState:
    """What a route reads before a step: everything that counts of a run so far, and no more.

    A route reads text, and its log, its cache and its explanations go by text. So a state travels as the text that
    `to_text` writes, and a `StepEncoder` reads it back.

    Of an agent with one request, `request` is that request at every step. In a dialogue it is the user's turn as long
    as that is the last thing that happened; after a call it is the last but one of the `messages`.

    Attributes:
        request: What is asked.
        observation: The last tool's result as text; empty before the first call and, in a dialogue, when the user
            has spoken since.
        calls: Names of the tools called so far, in order.
        failed: Whether the last call failed.
        messages: Earlier turns of a dialogue, oldest first: what was said, called and found, each as it stood then.

    Example:
        >>> state = StepState("How old is Anna's mother?").after("search", "Anna's mother is Ruth.")
        >>> state.calls, state.observation, state.step
        (('search',), "Anna's mother is Ruth.", 1)
        >>> StepState.from_text(state.to_text()) == state
        True
    """

    request: str
    observation: str = ""
    calls: tuple[str, ...] = ()
    failed: bool = False
    messages: tuple[str, ...] = ()

    @property
    def step(self) -> int:
        """How many tools have been called."""
        return len(self.calls)

    @property
    def follows_call(self) -> bool:
        """Whether a call is the last thing that happened: not before the first, nor when the user has spoken since."""
        return bool(self.calls) and not (self.messages and self.request)

    def after(self, tool: str, observation: str, *, failed: bool = False) -> "StepState":
        """The state of an agent with one request after one more call. The observation before it is not kept.

        Args:
            tool: Name of the tool called.
            observation: Its result as text, or what went wrong.
            failed: Whether it failed.
        """
        return replace(self, observation=observation, calls=(*self.calls, tool), failed=failed)

    def to_text(self) -> str:
        """The state as one line of JSON, from which `from_text` reads an equal state.

        Example:
            >>> StepState("How far?").to_text()
            '{"request": "How far?", "observation": "", "calls": [], "failed": false, "messages": []}'
        """
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def from_text(cls, text: str) -> "StepState | None":
        """The state that `to_text` wrote; None for any other text, such as an option's description.

        Example:
            >>> StepState.from_text("search: Look it up.") is None
            True
        """
        if not text.startswith("{"):
            return None
        try:
            entry = json.loads(text)
        except (ValueError, RecursionError):
            return None
        if not isinstance(entry, dict) or entry.keys() != _NAMES:
            return None
        calls, messages = entry["calls"], entry["messages"]
        if not isinstance(calls, list) or not isinstance(messages, list) or not isinstance(entry["failed"], bool):
            return None
        if not all(isinstance(part, str) for part in (entry["request"], entry["observation"], *calls, *messages)):
            return None
        return cls(**(entry | {"calls": tuple(calls), "messages": tuple(messages)}))


_NAMES = {field.name for field in fields(StepState)}
