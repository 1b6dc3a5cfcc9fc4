import asyncio

import dspy

from dspy_router import record_decisions
from dspy_router.decisions import choosing
from tests.programs import Shop, fruit_route


def test_blocks_nest_and_end() -> None:
    route = fruit_route()
    with record_decisions() as outer:
        route(request="apple")
        with record_decisions() as inner:
            route(request="banana")
    route(request="cherry")
    assert [decision.name for decision in outer] == ["apple", "banana"]
    assert [decision.name for decision in inner] == ["banana"]
    assert len({decision.id for decision in outer}) == 2


def test_dspy_threads_and_async_tasks_are_recorded() -> None:
    shop = Shop()
    examples = [dspy.Example(request=f"apple {number}").with_inputs("request") for number in range(12)]
    with record_decisions() as decisions:
        shop.batch(examples, num_threads=4, disable_progress_bar=True)

        async def calls() -> None:
            await asyncio.gather(*(shop.clerk.acall(request=f"cherry {number}") for number in range(5)))

        asyncio.run(calls())
    assert sorted(decision.name for decision in decisions) == ["apple"] * 12 + ["cherry"] * 5


def test_a_chooser_decides_and_names_its_propensity() -> None:
    class Second:
        def choose(self, route: object, field: str, probabilities: dict[str, float]) -> tuple[int, float]:
            assert field == "fruit"
            return 1, 0.25

    route = fruit_route()
    with choosing(Second()):
        chosen = route(request="apple")
    assert (chosen.fruit, chosen.decision.propensity) == ("banana", 0.25)
    assert chosen.confidence == chosen.probabilities["banana"] < 0.5
    assert route(request="apple").decision.propensity == 1.0
