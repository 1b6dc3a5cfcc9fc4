import asyncio
import math
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import dspy
import numpy as np
import pytest
import torch

from dspy_router import DifferentiableRoute, RouteError, SentenceEncoder, TokenEncoder
from tests.conftest import bag_of_words
from tests.programs import FRUIT, fruit_requests, fruit_route


class Triage(dspy.Signature):
    message: str = dspy.InputField()
    priority: Literal[1, 2, 3] = dspy.OutputField()
    refund: bool = dspy.OutputField()


def test_a_call_gives_what_predict_gives_and_the_evidence() -> None:
    prediction = fruit_route()(request="a ripe banana")
    assert isinstance(prediction, dspy.Prediction)
    assert prediction.fruit == prediction.decision.name == "banana"
    assert list(prediction.probabilities) == FRUIT
    assert math.isclose(sum(prediction.probabilities.values()), 1.0)
    assert prediction.confidence == max(prediction.probabilities.values())
    assert prediction.decisions == {"fruit": prediction.decision}
    assert prediction.decision.text == "a ripe banana"


def test_several_fields_are_decided_in_one_pass() -> None:
    batches = []

    def encoder(texts: list[str]) -> np.ndarray:
        batches.append(texts)
        return bag_of_words(texts)

    route = DifferentiableRoute(Triage, encoder=encoder)
    route.head  # noqa: B018
    batches.clear()
    prediction = route(message="my money back, please")
    assert batches == [["my money back, please"]]
    assert isinstance(prediction.priority, int)
    assert isinstance(prediction.refund, bool)
    assert set(prediction.decisions) == {"priority", "refund"}
    assert "decision" not in prediction


def test_ties_go_to_the_option_declared_first_and_empty_text_is_marked() -> None:
    prediction = fruit_route()(request="  ")
    assert prediction.fruit == "apple"
    assert prediction.decision.empty_input
    assert set(prediction.probabilities.values()) == {1 / 3}


def test_a_declared_output_named_like_the_evidence_keeps_its_name() -> None:
    route = DifferentiableRoute("text -> decision: bool, confidence: bool", encoder=bag_of_words)
    prediction = route(text="yes")
    assert isinstance(prediction.decision, bool)
    assert isinstance(prediction.confidence, bool)
    assert prediction.decisions["decision"].field == "decision"


def test_logits_are_differentiable_in_the_head() -> None:
    route = fruit_route()
    examples = fruit_requests(6, label=True)
    logits = route.logits(examples)
    assert logits.shape == (6, 3)
    assert torch.equal(logits, route.logits([example.request for example in examples]))
    assert torch.equal(logits, route.logits([{"request": example.request} for example in examples]))
    labels = torch.tensor([FRUIT.index(example.fruit) for example in examples])
    optimizer = torch.optim.Adam(route.head.parameters(), lr=0.1)
    for _ in range(30):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(route.logits(examples), labels).backward()
        optimizer.step()
    assert [route(request=example.request).fruit for example in examples] == [example.fruit for example in examples]


def test_logits_of_a_token_encoder_reach_its_weights() -> None:
    route = DifferentiableRoute("text -> kind: Literal['a', 'b']", encoder=TokenEncoder(32))
    with torch.no_grad():
        route.head["kind"].weight.normal_()
    route.logits(["some text"]).sum().backward()
    assert any(
        parameter.grad is not None and bool(parameter.grad.any()) for parameter in route.encoder.network.parameters()
    )


def test_logits_of_several_fields_need_a_name() -> None:
    route = DifferentiableRoute(Triage, encoder=bag_of_words)
    assert route.logits(["x"], field="priority").shape == (1, 3)
    for field in (None, "urgency"):
        with pytest.raises(RouteError, match=r"this route decides \['priority', 'refund'\]"):
            route.logits(["x"], field=field)


def test_async_and_batch_agree_with_a_call() -> None:
    route = fruit_route()
    examples = fruit_requests(9)
    calls = [route(request=example.request).probabilities for example in examples]
    batch = [prediction.probabilities for prediction in route.batch(examples)]

    async def gather() -> list[dspy.Prediction]:
        return await asyncio.gather(*(route.acall(request=example.request) for example in examples))

    tasks = [prediction.probabilities for prediction in asyncio.run(gather())]
    for one, many, task in zip(calls, batch, tasks, strict=True):
        assert one == pytest.approx(many)
        assert one == pytest.approx(task)


def test_batch_encodes_once_and_takes_the_arguments_of_dspy() -> None:
    batches = []

    def encoder(texts: list[str]) -> np.ndarray:
        batches.append(texts)
        return bag_of_words(texts)

    route = DifferentiableRoute("request -> fruit", tools=FRUIT, encoder=encoder)
    route.head  # noqa: B018
    batches.clear()
    assert len(route.batch(fruit_requests(20), num_threads=4, disable_progress_bar=True)) == 20
    assert len(batches) == 1
    good = dspy.Example(request="apple").with_inputs("request")
    bad = dspy.Example(wish="apple").with_inputs("wish")
    results, failed, errors = route.batch([good, bad], return_failed_examples=True, disable_progress_bar=True)
    assert results[0].fruit == "apple"
    assert failed == [bad]
    assert isinstance(errors[0], RouteError)
    with pytest.raises(RouteError, match="3 is no input"):
        route.batch([3])


def test_calls_written_for_predict_go_on_working() -> None:
    route = fruit_route()
    assert route(request="apple", config={"temperature": 1.0}, lm=None, demos=[]).fruit == "apple"
    with pytest.raises(RouteError, match=r"keyword inputs.*route\(request=\.\.\.\)"):
        route("apple")
    with pytest.raises(RouteError, match="Unknown input"):
        route(request="apple", colour="red")
    with pytest.raises(RouteError, match="'request' is missing"):
        route()


def test_sixty_four_threads_decide_as_one_does(sentence_encoder: SentenceEncoder) -> None:
    route = DifferentiableRoute("request -> fruit", tools=FRUIT, encoder=sentence_encoder)
    texts = [f"{fruit} number {number}" for number in range(100) for fruit in FRUIT]
    with ThreadPoolExecutor(64) as pool:
        threaded = list(pool.map(lambda text: route(request=text).fruit, texts))
    alone = DifferentiableRoute("request -> fruit", tools=FRUIT, encoder=SentenceEncoder())
    assert threaded == [prediction.fruit for prediction in alone.batch([{"request": text} for text in texts])]


def test_an_encoder_that_gives_nan_is_named_in_a_call() -> None:
    vectors = iter([bag_of_words(FRUIT), np.full((1, 64), np.nan)])
    route = DifferentiableRoute("request -> fruit", tools=FRUIT, encoder=lambda texts: next(vectors))
    route.head  # noqa: B018
    with pytest.raises(RouteError, match="not finite for the text 'a pear'"):
        route(request="a pear")


@pytest.mark.parametrize("outputs", ["fruit: Literal['fig', 'date']", "fruit: list[Literal['fig', 'date']]"])
@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_a_head_that_diverged_decides_nothing(outputs: str) -> None:
    route = DifferentiableRoute(f"request -> {outputs}", encoder=bag_of_words)
    with torch.no_grad():
        route.head["fruit"].weight.fill_(torch.nan)
    with pytest.raises(RouteError, match="head of field 'fruit' gives probabilities that are no numbers"):
        route(request="a ripe fig")


def test_a_decision_of_dspys_rich_types_carries_its_evidence(sentence_encoder: SentenceEncoder) -> None:
    from dspy.adapters.types.decision import Choice, Noul

    Team = Choice[("billing", "Payment and invoices"), ("technical", "The product fails")]

    class Ticket(dspy.Signature):
        message: str = dspy.InputField()
        team: Team = dspy.OutputField()
        blocked: Noul = dspy.OutputField()

    prediction = DifferentiableRoute(Ticket, encoder=sentence_encoder)(message="my invoice is wrong")
    assert prediction.team.value == "billing"
    assert prediction.team.probabilities == dict(prediction.decisions["team"].probabilities)
    assert prediction.blocked.probability == prediction.decisions["blocked"].probabilities["True"]
