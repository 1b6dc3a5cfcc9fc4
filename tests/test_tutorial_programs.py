"""`replace_predictor` on programs in the shapes of DSPy's tutorials."""

import asyncio

import dspy
import pytest

from dspy_router import DifferentiableRoute, RouteError, RouteFinetune, SentenceEncoder, replace_predictor
from dspy_router.overrides import force_decisions
from tests.conftest import bag_of_words
from tests.tutorial_programs import (
    AIRLINE_TOOLS,
    INTENTS,
    EmailProcessor,
    EmailType,
    Entity,
    FacilitySupport,
    Hops,
    Sentiment,
    Team,
    ToolUser,
    Urgency,
    airline_agent,
    intent_classifier,
    writes,
)


@pytest.mark.parametrize("path", ["self", "predict"])
def test_classification_of_many_classes_needs_no_lm(path: str) -> None:
    classify = replace_predictor(intent_classifier(), path, encoder=bag_of_words)
    assert isinstance(classify, DifferentiableRoute)
    assert classify.fields[0].option_names == tuple(INTENTS)
    prediction = classify(text="my pin was blocked")
    assert prediction.label == "pin_blocked"
    unlabelled = [dspy.Example(text=name.replace("_", " ")).with_inputs("text") for name in INTENTS]
    scores = dspy.Evaluate(devset=unlabelled, metric=lambda x, y: x.text.replace(" ", "_") == y.label)(classify)
    assert scores.score == 100


def test_sentiment_keeps_its_confidence_without_an_lm() -> None:
    classify = replace_predictor(dspy.Predict(Sentiment), "self", encoder=bag_of_words)
    prediction = classify(sentence="a positive surprise")
    assert prediction.sentiment == "positive"
    assert prediction.confidence == pytest.approx(prediction.probabilities["positive"])


def test_sentiment_can_keep_the_confidence_an_lm_states(scripted_lm: object) -> None:
    server = scripted_lm(writes({"confidence": "0.25"}))
    classify = replace_predictor(dspy.Predict(Sentiment), "self", keep_lm=["confidence"], encoder=bag_of_words)
    with dspy.context(lm=server.lm):
        prediction = classify(sentence="a positive surprise")
    assert (prediction.sentiment, prediction.confidence) == ("positive", 0.25)


def test_emails_are_classified_by_a_route_and_read_by_the_lm(scripted_lm: object) -> None:
    server = scripted_lm(
        writes(
            {
                "reasoning": "it says so",
                "entities": '[{"kind": "order", "value": "12345"}]',
                "amount": "null",
                "action_items": '["pay"]',
            }
        )
    )
    processor = replace_predictor(EmailProcessor(), "classifier.predict", keep_lm=["reasoning"], encoder=bag_of_words)
    processor = replace_predictor(processor, "actions", keep_lm=True, encoder=bag_of_words)
    assert [name for name, _ in processor.named_predictors()] == [
        "classifier.predict", "extractor.predict", "actions.predict",
    ]  # fmt: skip
    with dspy.context(lm=server.lm):
        email = processor(subject="order confirmation", body="order 12345, low urgency")
    assert (email.email_type, email.urgency) == (EmailType.ORDER, Urgency.LOW)
    assert (email.reasoning, email.entities) == ("it says so", [Entity(kind="order", value="12345")])
    assert isinstance(email.action_required, bool)
    assert email.action_items == ["pay"]
    classified = server.requests[0]
    assert "[[ ## email_type ## ]]\norder_confirmation" in classified
    assert "starting with the field `[[ ## reasoning ## ]]`, and then ending" in classified


def test_extraction_is_no_decision_and_that_is_said() -> None:
    message = r"'extractor' cannot be replaced by a route: .*'entities' has type .*None of its outputs is a decision"
    with pytest.raises(RouteError, match=message):
        replace_predictor(EmailProcessor(), "extractor", encoder=bag_of_words)


def test_a_list_of_categories_is_decided_as_one() -> None:
    support = replace_predictor(FacilitySupport(), "urgency_module", encoder=bag_of_words)
    support = replace_predictor(support, "categories_module", encoder=bag_of_words)
    trainset = [
        dspy.Example(message=message, urgency="low", categories=categories).with_inputs("message")
        for message, categories in [
            ("the floor is dirty", ["cleaning"]),
            ("the lamp is broken", ["repair"]),
            ("the floor is dirty and the lamp is broken", ["cleaning", "repair"]),
            ("thank you", []),
        ]
        for _ in range(5)
    ]
    support = RouteFinetune().compile(support, trainset=trainset)
    assert support(message="the floor is dirty and the lamp is broken").categories == ["cleaning", "repair"]
    assert support(message="thank you").categories == []


def test_a_program_without_forward_is_routed(scripted_lm: object) -> None:
    server = scripted_lm(writes({"categories": '["repair"]'}))
    support = replace_predictor(FacilitySupport(), "urgency_module", encoder=bag_of_words)
    with dspy.context(lm=server.lm):
        prediction = support(message="the urgency is high")
    assert (prediction.urgency, prediction.categories) == ("high", ["repair"])
    assert len(server.requests) == 1


def test_react_without_the_lm_is_refused_with_the_way_out() -> None:
    message = (
        r"'react' cannot be replaced by a route: Output field 'next_thought' is a plain str.*"
        r"keep_lm=\['next_thought', 'next_tool_args'\]"
    )
    with pytest.raises(RouteError, match=message):
        replace_predictor(airline_agent(), "react", encoder=bag_of_words)


def test_react_learns_from_its_metric_which_tool_to_call_and_when_to_finish(scripted_lm: object) -> None:
    server = scripted_lm(
        writes(
            {
                "next_thought": "as decided",
                "next_tool_args": "{}",
                "process_result": "done",
            }
        )
    )
    requests = {
        "please cancel it": "cancel_itinerary", "cancel my trip": "cancel_itinerary",
        "book it": "book_flight", "please book one": "book_flight",
    }  # fmt: skip
    examples = [
        dspy.Example(user_request=text, tool=tool).with_inputs("user_request") for text, tool in requests.items()
    ]

    def right(example: dspy.Example, prediction: dspy.Prediction, trace: object = None) -> bool:
        calls = [value for name, value in prediction.trajectory.items() if name.startswith("tool_name")]
        return calls == [example.tool, "finish"]

    agent = airline_agent()
    routed = replace_predictor(agent, "react", agent.tools.values(), keep_lm=True, encoder=bag_of_words)
    with dspy.context(lm=server.lm):
        assert not all(right(example, routed(user_request=example.user_request)) for example in examples)
        trained = RouteFinetune(metric=right, max_metric_calls=60, num_threads=1).compile(routed, trainset=examples)
        runs = [trained(user_request=example.user_request) for example in examples]
    assert all(right(example, run) for example, run in zip(examples, runs, strict=True))
    assert runs[0].trajectory["thought_0"] == "as decided"
    assert runs[0].process_result == "done"


def test_react_runs_the_routes_tool_with_the_lms_arguments_in_async_code(scripted_lm: object) -> None:
    server = scripted_lm(writes({"next_tool_args": '{"confirmation_number": "7xyz"}', "process_result": "done"}))
    routed = replace_predictor(airline_agent(), "react", keep_lm=True, encoder=bag_of_words)
    with dspy.context(lm=server.lm), force_decisions({"next_tool_name": "fetch_itinerary"}):
        run = asyncio.run(routed.acall(user_request="what about my trip?"))
    assert run.trajectory["observation_0"] == "itinerary 7xyz"
    assert "[[ ## next_tool_name ## ]]\nfetch_itinerary" in server.requests[0]


def test_tool_calls_as_one_object_are_refused_with_the_way_out() -> None:
    caller = dspy.Predict("question, tools: list[dspy.Tool] -> outputs: dspy.ToolCalls")
    with pytest.raises(RouteError, match=r"'outputs' has type ToolCalls.*of a dspy.ToolCalls, the tool's name"):
        replace_predictor(caller, "self", encoder=bag_of_words)
    agent = dspy.ReActV2("question -> answer", tools=AIRLINE_TOOLS)
    with pytest.raises(RouteError, match="None of its outputs is a decision"):
        replace_predictor(agent, "react", encoder=bag_of_words)


def test_a_tool_named_in_a_plain_str_is_routed_with_its_arguments_kept(scripted_lm: object) -> None:
    server = scripted_lm(writes({"reasoning": "it must be", "args": '{"name": "Ada"}'}))
    routed = replace_predictor(
        ToolUser(), "react", AIRLINE_TOOLS, keep_lm=["reasoning", "args"], encoder=bag_of_words
    )  # fmt: skip
    with dspy.context(lm=server.lm):
        run = routed(question="get user info", functions={tool.__name__: tool for tool in AIRLINE_TOOLS})
    assert (run.answer, run.trajectory) == ("Ada is user 1", ["it must be"])


def test_a_loop_stops_by_the_route_and_searches_by_the_lm(scripted_lm: object) -> None:
    server = scripted_lm(writes({"query": "the author", "titles": '["a book"]'}))
    routed = replace_predictor(Hops(), "hop", keep_lm=["query"], encoder=bag_of_words)
    with dspy.context(lm=server.lm), force_decisions({"enough": "False"}):
        assert routed(claim="a claim").notes == ["found for the author"] * 3
    with dspy.context(lm=server.lm), force_decisions({"enough": "True"}):
        assert routed(claim="a claim").notes == []


def test_the_next_agent_is_chosen_by_the_route_and_instructed_by_the_lm(scripted_lm: object) -> None:
    server = scripted_lm(writes({"instruction": "refund it", "reply": "refunded"}))
    routed = replace_predictor(
        Team(), "supervisor", {"billing": "invoices and refunds", "travel": "flights"}, keep_lm=True,
        encoder=bag_of_words,
    )  # fmt: skip
    with dspy.context(lm=server.lm):
        assert routed(request="refunds please").reply == "refunded"
    inner = replace_predictor(routed, "agents['travel'].react", keep_lm=True, encoder=bag_of_words)
    assert len(list(inner.named_sub_modules(DifferentiableRoute))) == 2


def test_an_airlines_tools_are_found_by_their_descriptions(sentence_encoder: SentenceEncoder) -> None:
    requests = {
        "Are there any flights from SFO to JFK on September 1st?": "fetch_flight_info",
        "Which planes go to Boston tomorrow?": "fetch_flight_info",
        "Show me the details of my trip with confirmation number 7xyz": "fetch_itinerary",
        "What is on my itinerary abc123?": "fetch_itinerary",
        "Please book flight DA123 for Adam": "book_flight",
        "I want to reserve a seat on the cheapest flight": "book_flight",
        "Cancel my trip, confirmation number 7xyz": "cancel_itinerary",
        "I no longer want to fly, call off the reservation": "cancel_itinerary",
        "Look up the profile of the customer named Chelsie": "get_user_info",
        "My bag was damaged, I need a human to help me": "file_ticket",
    }
    agent = airline_agent()
    routed = replace_predictor(agent, "react", agent.tools.values(), keep_lm=True, encoder=sentence_encoder)
    first = [routed.react.route(user_request=text, trajectory="").next_tool_name for text in requests]
    right = sum(chosen == wanted for chosen, wanted in zip(first, requests.values(), strict=True))
    assert right >= 7, list(zip(first, requests.values(), strict=True))
