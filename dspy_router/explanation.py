"""Why a route thinks what it thinks of one call, as an object that renders as text and as HTML."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from typing import Any

from dspy_router.encoders.base import shortened
from dspy_router.tables import table
from dspy_router.tool_formats import one_line

WORDS_SHOWN = 8  # of a field, those with the largest effects; the object has them all
LONGEST_TEXT, LONGEST_WORD = 100, 30  # characters shown


@dataclass(frozen=True)
class Neighbour:
    """A text that the head finds like the input.

    Attributes:
        text: A training text, or an option's description.
        option: The option it belongs to.
        similarity: Cosine, in [-1, 1], in the space that `dspy_router.explaining` defines.
        trained: True for a training text, False for the description of an option of which no training text is kept.
    """

    text: str
    option: str
    similarity: float
    trained: bool


@dataclass(frozen=True)
class WordEffect:
    """What the decision owes to a word, or to a run of adjacent words where the text is long.

    Attributes:
        word: As it stands in the text.
        start: Where it begins in the text.
        effect: Log-odds of the option against the runner-up that are lost without the word; negative for a word that
            spoke against the option.
    """

    word: str
    start: int
    effect: float


@dataclass(frozen=True)
class Change:
    """The fewest words without which the decision is another.

    Attributes:
        removed: The words, in the text's order.
        option: What is chosen without them.
        probability: Its probability then.
    """

    removed: tuple[str, ...]
    option: str
    probability: float


@dataclass(frozen=True)
class FieldExplanation:
    """Why one output field would be decided as it would.

    Attributes:
        field: The output field.
        option: The option its probabilities select.
        likeliest: The likeliest candidates' probabilities, likeliest first.
        runner_up: The likeliest other candidate; None if there is no other.
        margin: Log-odds of the option against the runner-up. Below 0 only for a `Score`, whose level is the mean's.
        familiarity: How like the training texts the input is, about 0 for a typical one and lower for others
            (`dspy_router.learning.familiarity`); None for a field that was not trained.
        neighbours: The texts most like the input, nearest first.
        words: Every word's effect, in the text's order.
        change: What would have changed the decision; None if none of the removals tried does.
        tried: The words that were also left out together, in all sets that leave a word; the others were one by one.
    """

    field: str
    option: str
    likeliest: Mapping[str, float]
    runner_up: str | None
    margin: float | None
    familiarity: float | None
    neighbours: tuple[Neighbour, ...]
    words: tuple[WordEffect, ...]
    change: Change | None
    tried: tuple[str, ...]

    @property
    def carrying(self) -> tuple[WordEffect, ...]:
        """The words with the largest effects, for the option or against it, largest first."""
        return tuple(sorted(self.words, key=lambda word: -abs(word.effect)))

    @property
    def sentences(self) -> tuple[str, ...]:
        """Option, runner-up, familiarity and what would have had to change."""
        if self.runner_up is None:
            return (f"{self.field}: {self.option}, the only candidate.",)
        said = [
            f"{self.field}: {self.option}; log-odds against {self.runner_up}: {self.margin:+.2f}.",
            *([] if self.familiarity is None else [f"Familiarity: {self.familiarity:.2f} (about 0 is typical)."]),
        ]
        if self.change is not None:
            removed = _quoted(self.change.removed)
            said.append(f"Without {removed} it would be {self.change.option} ({self.change.probability:.1%}).")
        elif len(self.words) > 1:
            together = f", and without several of {_quoted(self.tried)}" if self.tried else ""
            said.append(f"It stays without any one word{together}.")
        return tuple(said)

    def tables(self, form: str) -> list[tuple[str, str]]:
        """Titles and tables, in a format of tabulate."""
        against = f"for {self.option}, against {self.runner_up}"
        contents: list[tuple[str, Sequence[str], list[tuple[str, ...]]]] = [
            (
                "Likeliest options",
                ("option", "probability"),
                [(name, f"{probability:.1%}") for name, probability in self.likeliest.items()],
            ),
            (
                "Words that carried it",
                ("word", against),
                [
                    (shortened(one_line(word.word), LONGEST_WORD), f"{word.effect:+.2f}")
                    for word in self.carrying[:WORDS_SHOWN]
                ],
            ),
            (
                "Nearest texts",
                ("option", "cosine", "text"),
                [(near.option, f"{near.similarity:.2f}", _shown(near)) for near in self.neighbours],
            ),
        ]
        return [(title, table(rows, headers=headers, form=form)) for title, headers, rows in contents if rows]


@dataclass(frozen=True)
class Explanation:
    """What a route thinks of one call, and why: made by `DifferentiableRoute.explain`; no decision was made.

    Attributes:
        text: What the encoder read.
        fields: One explanation an output field, by name, in the signature's order; of a list `topics`, one for each
            option that is in it or for the likeliest, as `topics[billing]`.
        score: What a guard holds against its threshold: see `DifferentiableRoute.score`.
        threshold: The guard's; None without a guard, or with one that declines everything.
        abstains: Whether the guard would decline; None without a guard.
    """

    text: str
    fields: Mapping[str, FieldExplanation]
    score: float
    threshold: float | None
    abstains: bool | None

    @property
    def sentences(self) -> tuple[str, ...]:
        """What was read, and what the guard would do."""
        read = f"Read: {self.text}" if self.text.strip() else "There is no text: the biases alone decide."
        score = f"Score: {self.score:.3g}"
        if self.abstains is None:
            return read, f"{score}; no guard is set."
        if self.threshold is None:
            return read, f"{score}; the guard declines every request."
        does = "declines, being below" if self.abstains else "decides, being not below"
        return read, f"{score}; the route {does} the guard's threshold of {self.threshold:.3g}."

    def to_dict(self) -> dict[str, Any]:
        """The explanation as JSON-compatible values."""
        return asdict(self)

    def __str__(self) -> str:
        blocks = ["\n".join(self.sentences)]
        for field in self.fields.values():
            blocks.append("\n".join(field.sentences))
            blocks += [f"{title}\n{table}" for title, table in field.tables("simple")]
        return "\n\n".join(blocks)

    def _repr_html_(self) -> str:
        blocks = [f"<p>{'<br>'.join(map(escape, self.sentences))}</p>"]
        for field in self.fields.values():
            first, *others = map(escape, field.sentences)
            blocks.append(f"<h4>{first}</h4>\n<p>{'<br>'.join(others)}</p>")
            if field.words:
                blocks.append(f'<p style="white-space: pre-wrap">{_marked(self.text, field.words)}</p>')
            blocks += [f"<p>{title}</p>\n{table}" for title, table in field.tables("html")]
        return "\n".join(blocks)


def _shown(near: Neighbour) -> str:
    text = shortened(one_line(near.text), LONGEST_TEXT)
    return text if near.trained else f"(description) {text}"


def _quoted(words: Sequence[str]) -> str:
    return ", ".join(repr(shortened(one_line(word), LONGEST_WORD)) for word in words)


def _marked(text: str, words: Sequence[WordEffect]) -> str:
    """The text as HTML, green behind words for the option and red behind those against it."""
    largest = max(abs(word.effect) for word in words) or 1.0
    pieces, done = [], 0
    for word in words:
        color = "0,160,0" if word.effect > 0 else "200,0,0"
        shade = f"background: rgba({color},{0.6 * abs(word.effect) / largest:.2f})"
        pieces.append(f'{escape(text[done : word.start])}<span style="{shade}">{escape(word.word)}</span>')
        done = word.start + len(word.word)
    return "".join((*pieces, escape(text[done:])))
