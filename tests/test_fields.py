import enum
import math
from typing import Annotated, Literal

import dspy
import numpy as np
import pydantic
import pytest
from dspy.adapters.types.decision import Choice, Noul, Score

from dspy_router import RouteError
from dspy_router.fields import decision_fields, input_text


class Mood(enum.Enum):
    GOOD = "good"
    BAD = "bad"


Team = Choice[("billing", "Payment issue"), ("technical", "Product bug")]
Blocked = Noul[(True, "cannot work"), (False, "can work")]
Grade = Score["poor", "good"]
Direction = Annotated[Literal["in", "out"], Choice[("in", "stays"), ("out", "goes")]]


class Everything(dspy.Signature):
    text: str = dspy.InputField()
    tool: str = dspy.OutputField()
    number: Literal[1, 2] = dspy.OutputField()
    maybe: Literal["yes", None] = dspy.OutputField()
    urgent: bool = dspy.OutputField()
    mood: Mood = dspy.OutputField()
    team: Team = dspy.OutputField()
    blocked: Blocked = dspy.OutputField()
    native: Direction = dspy.OutputField()


def test_every_decision_type_lists_its_options() -> None:
    fields = {field.name: field for field in decision_fields(Everything, ["search", "mail"])}
    assert {name: field.option_names for name, field in fields.items()} == {
        "tool": ("search", "mail"),
        "number": ("1", "2"),
        "maybe": ("yes", "None"),
        "urgent": ("True", "False"),
        "mood": ("good", "bad"),
        "team": ("billing", "technical"),
        "blocked": ("True", "False"),
        "native": ("in", "out"),
    }
    assert [option.description for option in fields["team"].options] == ["Payment issue", "Product bug"]
    assert [option.description for option in fields["blocked"].options] == ["cannot work", "can work"]
    assert [option.description for option in fields["native"].options] == ["stays", "goes"]


def test_values_are_typed_as_declared() -> None:
    fields = {field.name: field for field in decision_fields(Everything, ["search", "mail"])}
    assert fields["number"].typed("2", {}, 0.5) == 2
    assert fields["maybe"].typed("None", {}, 0.5) is None
    assert fields["urgent"].typed("False", {}, 0.5) is False
    assert fields["mood"].typed("good", {}, 0.5) is Mood.GOOD
    assert fields["native"].typed("in", {}, 0.5) == "in"
    team = fields["team"].typed("billing", {"billing": 0.75, "technical": 0.25}, 0.75)
    assert (type(team).__mro__[1], team.value, team.confidence) == (Choice, "billing", 0.75)
    blocked = fields["blocked"].typed("True", {"True": 0.75, "False": 0.25}, 0.75)
    assert (blocked.value, blocked.probability, blocked.confidence) == (True, 0.75, 0.5)


@pytest.mark.parametrize(
    ("field", "value", "index"),
    [("number", 2, 1), ("number", "2", 1), ("number", 3, None), ("mood", Mood.BAD, 1), ("mood", "bad", 1),
     ("urgent", False, 1), ("maybe", None, 1), ("tool", "mail", 1), ("tool", "Mail", None)],
)  # fmt: skip
def test_labels_find_their_option(field: str, value: object, index: int | None) -> None:
    fields = {field.name: field for field in decision_fields(Everything, ["search", "mail"])}
    assert fields[field].index_of(value) == index


def test_one_and_true_are_different_labels() -> None:
    signature = dspy.Signature("text -> flag: bool")
    assert decision_fields(signature)[0].index_of(1) is None


@pytest.mark.parametrize(
    ("signature", "tools", "message"),
    [
        ("text -> answer", None, "'answer' is a plain str"),
        ("text -> items: list[str]", None, r"'items' is a plain list\[str\]"),
        ("text -> kind: Literal['a']", None, "'kind' has one option, 'a'"),
        ("text -> tool", ["a"], "'tool' has one option"),
        ("text -> tool, query", ["a", "b"], r"\['tool', 'query'\] are all plain str.*Free text needs an LM"),
        ("text -> tool, words: list[str]", ["a", "b"], r"\['tool', 'words'\] are all plain str or list\[str\]"),
        ("text -> kind: Literal['a', 'b']", ["c", "d"], r"Tools \['c', 'd'\] are no option"),
    ],
)
def test_signatures_that_decide_nothing_are_named(signature: str, tools: list[str] | None, message: str) -> None:
    with pytest.raises(RouteError, match=message):
        decision_fields(dspy.Signature(signature), tools)


class Graded(dspy.Signature):
    text: str = dspy.InputField()
    grade: Grade = dspy.OutputField()


def test_a_score_is_decided_among_its_levels() -> None:
    [grade] = decision_fields(Graded)
    assert [(option.name, option.text, option.value) for option in grade.options] == [
        ("0", "poor", 0),
        ("1", "good", 1),
    ]
    score = grade.typed("1", {"0": 0.25, "1": 0.75}, 0.75)
    assert (score.value, score.level, score.probabilities) == (0.75, 1, {0: 0.25, 1: 0.75})
    forced = grade.typed("0", {"0": 0.25, "1": 0.75}, 0.25)
    assert (forced.value, forced.level) == (0.0, 0)
    assert [grade.index_of(label) for label in (1, 0.4, score, Grade(value=0.6, confidence=1), 2)] == [1, 0, 1, 1, None]
    assert [grade.index_of(label) for label in (np.float32(0.4), np.int64(1), math.nan, True)] == [0, 1, None, None]


def test_a_float_is_a_level_of_a_score_only() -> None:
    [version] = decision_fields(dspy.Signature("text -> version: Literal['3.5', '4.0']"))
    assert [version.index_of(label) for label in (3.5, 4.0, 3.6)] == [0, 1, None]


def test_a_boolean_without_criteria_is_described_by_its_desc_or_its_name() -> None:
    class Flags(dspy.Signature):
        text: str = dspy.InputField()
        is_urgent: bool = dspy.OutputField()
        angry: bool = dspy.OutputField(desc="whether the customer is angry")
        blocked: Blocked = dspy.OutputField(desc="unused, there are criteria")

    texts = {field.name: [option.text for option in field.options] for field in decision_fields(Flags)}
    # "yes" alone says nothing of what it answers, so it is no text of its own.
    assert all(option.texts == (option.text,) for field in decision_fields(Flags) for option in field.options)
    assert texts == {
        "is_urgent": ["yes: is urgent", "no"],
        "angry": ["yes: whether the customer is angry", "no"],
        "blocked": ["yes: cannot work", "no: can work"],
    }


def test_tools_describe_the_options_of_a_literal() -> None:
    fields = decision_fields(dspy.Signature("text -> kind: Literal['a', 'b']"), {"a": "The first."})
    assert [option.description for option in fields[0].options] == ["The first.", ""]


def test_options_that_no_tool_describes_are_named(caplog: pytest.LogCaptureFixture) -> None:
    signature = dspy.Signature("text -> tool: Literal['search', 'mail', 'none'], urgent: bool")
    decision_fields(signature, {"search": "Look up.", "mail": "Send mail."})
    [record] = caplog.records
    assert record.getMessage().startswith("No tool describes ['none'] of the output field 'tool'")
    caplog.clear()
    decision_fields(signature, {"search": "Look up.", "mail": "Send mail.", "none": "Anything else."})
    decision_fields(signature)
    assert not caplog.records


def test_several_choices_among_the_same_tools_are_declared() -> None:
    signature = dspy.Signature("text -> first: Literal['search', 'mail'], second: Literal['search', 'mail']")
    fields = decision_fields(signature, {"search": "Look up.", "mail": "Send mail."})
    assert [field.options[0].description for field in fields] == ["Look up.", "Look up."]


def test_one_input_is_used_as_it_is_and_several_are_joined() -> None:
    two = dspy.Signature("question, hint -> ok: bool")
    assert input_text(dspy.Signature("question -> ok: bool"), {"question": " as is "}) == " as is "
    assert input_text(two, {"question": "why?", "hint": "because"}) == "question: why?\nhint: because"
    assert input_text(two, {"question": "why?", "hint": ""}) == "question: why?"
    assert input_text(two, {"question": None, "hint": " "}) == ""


def test_other_inputs_are_serialised_as_dspy_does() -> None:
    class Place(pydantic.BaseModel):
        city: str

    class Trip(dspy.Signature):
        history: dspy.History = dspy.InputField()
        place: Place = dspy.InputField()
        days: list[int] = dspy.InputField()
        ok: bool = dspy.OutputField()

    history = dspy.History(messages=[{"question": "where?"}])
    assert input_text(Trip, {"history": history, "place": Place(city="Oslo"), "days": [1, 2]}) == (
        'history: {"messages": [{"question": "where?"}]}\nplace: {"city": "Oslo"}\ndays: [1, 2]'
    )


def test_missing_and_unknown_inputs_are_named() -> None:
    class Asked(dspy.Signature):
        question: str = dspy.InputField()
        hint: str | None = dspy.InputField()
        tone: str = dspy.InputField(default="kind")
        ok: bool = dspy.OutputField()

    with pytest.raises(RouteError, match="'question' is missing"):
        input_text(Asked, {"hint": "x"})
    with pytest.raises(RouteError, match=r"Unknown input \['answer'\]"):
        input_text(Asked, {"question": "x", "answer": "y"})
    assert input_text(Asked, {"question": "x"}) == "question: x\ntone: kind"
