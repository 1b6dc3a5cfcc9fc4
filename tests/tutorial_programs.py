"""Small programs in the shapes of DSPy's own tutorials, and an LM server's script for them."""

import enum
import re
from collections.abc import Callable
from typing import Any, Literal

import dspy
from pydantic import BaseModel

INTENTS = [
    "activate_my_card", "age_limit", "apple_pay_or_google_pay", "atm_support", "automatic_top_up", "cancel_transfer",
    "card_about_to_expire", "card_arrival", "card_delivery_estimate", "card_linking", "card_not_working",
    "card_swallowed", "change_pin", "compromised_card", "contactless_not_working", "country_support",
    "edit_personal_details", "exchange_rate", "fiat_currency_support", "getting_virtual_card", "lost_or_stolen_card",
    "passcode_forgotten", "pin_blocked", "request_refund", "terminate_account", "top_up_failed", "verify_my_identity",
]  # fmt: skip


def writes(values: dict[str, str]) -> Callable[[str], str]:
    """An LM that writes the fields it is asked for."""

    def answer(prompt: str) -> str:
        asked = prompt.rsplit("Respond with the corresponding output fields", 1)[-1]
        names = re.findall(r"\[\[ ## (\w+) ## \]\]", asked)
        return "\n\n".join(f"[[ ## {name} ## ]]\n{values.get(name, '')}" for name in names)

    return answer


def intent_classifier() -> dspy.ChainOfThought:
    """Classification finetuning: a signature written at run time from the list of classes."""
    return dspy.ChainOfThought(f"text -> label: Literal{INTENTS}")


class Sentiment(dspy.Signature):
    """Classify the sentiment of a sentence."""

    sentence: str = dspy.InputField()
    sentiment: Literal["positive", "negative", "neutral"] = dspy.OutputField()
    confidence: float = dspy.OutputField()


class EmailType(str, enum.Enum):
    ORDER = "order_confirmation"
    SUPPORT = "support_request"
    MEETING = "meeting_invitation"


class Urgency(str, enum.Enum):
    LOW = "low"
    HIGH = "high"


class Entity(BaseModel):
    kind: str
    value: str


class ClassifyEmail(dspy.Signature):
    """Classify an email by type and urgency."""

    subject: str = dspy.InputField()
    body: str = dspy.InputField()
    email_type: EmailType = dspy.OutputField(desc="What kind of email it is")
    urgency: Urgency = dspy.OutputField()
    reasoning: str = dspy.OutputField(desc="Why, in a few words")


class ExtractEntities(dspy.Signature):
    """Extract what an email speaks of."""

    content: str = dspy.InputField()
    email_type: EmailType = dspy.InputField()
    entities: list[Entity] = dspy.OutputField()
    amount: float | None = dspy.OutputField()


class PlanActions(dspy.Signature):
    """Say what is to be done about an email."""

    content: str = dspy.InputField()
    email_type: EmailType = dspy.InputField()
    action_required: bool = dspy.OutputField()
    action_items: list[str] = dspy.OutputField()


class EmailProcessor(dspy.Module):
    """Email information extraction: decisions among extraction steps."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier = dspy.ChainOfThought(ClassifyEmail)
        self.extractor = dspy.ChainOfThought(ExtractEntities)
        self.actions = dspy.ChainOfThought(PlanActions)

    def forward(self, subject: str, body: str) -> dspy.Prediction:
        kind = self.classifier(subject=subject, body=body)
        found = self.extractor(content=f"{subject}\n{body}", email_type=kind.email_type)
        todo = self.actions(content=body, email_type=kind.email_type)
        return dspy.Prediction(
            email_type=kind.email_type, urgency=kind.urgency, reasoning=kind.reasoning, entities=found.entities,
            action_required=todo.action_required, action_items=todo.action_items,
        )  # fmt: skip


class FacilitySupport(dspy.Module):
    """GEPA's support analyzer: no `super().__init__()`, and `__call__` in place of `forward`."""

    def __init__(self) -> None:
        self.urgency_module = dspy.ChainOfThought("message -> urgency: Literal['low', 'medium', 'high']")
        self.categories_module = dspy.ChainOfThought("message -> categories: list[Literal['cleaning', 'repair']]")

    def __call__(self, message: str) -> dspy.Prediction:
        return dspy.Prediction(
            urgency=self.urgency_module(message=message).urgency,
            categories=self.categories_module(message=message).categories,
        )


def fetch_flight_info(date: str, origin: str, destination: str) -> str:
    """Fetch flight information from origin to destination on the given date"""
    return "flight DA123 at noon"


def fetch_itinerary(confirmation_number: str) -> str:
    """Fetch a booked itinerary from the database"""
    return f"itinerary {confirmation_number}"


def book_flight(flight: str, user: str) -> str:
    """Book a flight on behalf of the user"""
    return f"{flight} is booked"


def cancel_itinerary(confirmation_number: str) -> str:
    """Cancel an itinerary on behalf of the user"""
    return f"itinerary {confirmation_number} is cancelled"


def get_user_info(name: str) -> str:
    """Fetch the user profile with the given name from the database"""
    return f"{name} is user 1"


def file_ticket(user_request: str) -> str:
    """File a customer support ticket if this is something the agent cannot handle"""
    return "ticket 5"


AIRLINE_TOOLS = [fetch_flight_info, fetch_itinerary, book_flight, cancel_itinerary, get_user_info, file_ticket]


def airline_agent() -> dspy.ReAct:
    """The customer service agent."""
    signature = dspy.Signature("user_request -> process_result", "You are an airline's agent: help users with flights.")
    return dspy.ReAct(signature, tools=AIRLINE_TOOLS, max_iters=3)


class ToolUser(dspy.Module):
    """Tool use: a loop of its own, in which the tool's name is a plain str."""

    def __init__(self) -> None:
        self.react = dspy.ChainOfThought("question, trajectory -> next_selected_fn, args: dict[str, Any]")

    def forward(self, question: str, functions: dict[str, Callable[..., Any]]) -> dspy.Prediction:
        step = self.react(question=question, trajectory=[])
        output = functions[step.next_selected_fn.strip('"')](**step.args)
        return dspy.Prediction(answer=output, trajectory=[step.reasoning])


class Hops(dspy.Module):
    """Multi-hop search: a decision to stop beside the next query."""

    def __init__(self) -> None:
        super().__init__()
        self.hop = dspy.ChainOfThought("claim, notes: list[str] -> enough: bool, query: str")
        self.answer = dspy.ChainOfThought("claim, notes: list[str] -> titles: list[str]")

    def forward(self, claim: str) -> dspy.Prediction:
        notes: list[str] = []
        for _ in range(3):
            step = self.hop(claim=claim, notes=notes)
            if step.enough:
                break
            notes.append(f"found for {step.query}")
        return dspy.Prediction(notes=notes, titles=self.answer(claim=claim, notes=notes).titles)


class Team(dspy.Module):
    """Which agent next."""

    def __init__(self) -> None:
        super().__init__()
        self.supervisor = dspy.Predict("request -> next_agent: Literal['billing', 'travel'], instruction: str")
        self.agents = {
            "billing": dspy.Predict("instruction -> reply"),
            "travel": airline_agent(),
        }

    def forward(self, request: str) -> dspy.Prediction:
        step = self.supervisor(request=request)
        if step.next_agent == "billing":
            return self.agents["billing"](instruction=step.instruction)
        return self.agents["travel"](user_request=step.instruction)
