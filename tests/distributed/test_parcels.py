"""What is sent to a worker process, opened here in the same way."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dspy
import pytest

from dspy_router import DecisionClient, DifferentiableRoute, TokenEncoder
from dspy_router.decisions import record_decisions
from dspy_router.distributed.parcels import Opener, Parcels, cache_of_here, settings_of_here
from dspy_router.optimizers.override import Site
from dspy_router.optimizers.rollouts import Job, ScoredProgram, keyed
from dspy_router.optimizers.runs import bind_clients, find_routes
from tests.conftest import bag_of_words
from tests.programs import PlannedShop, Wrapping, fruit_requests, fruit_route, right_fruit


def sent(**parts: Any) -> dict[str, Any]:
    parcels, opener = Parcels(), Opener()
    parcel = parcels.pack(**parts)
    opener.add_encoders(parcels.encoders_beside(set())[0])
    return opener.open(parcel)


@pytest.fixture
def _own_cache() -> Iterator[None]:
    before = dspy.cache
    yield
    dspy.cache = before


def test_frozen_encoders_are_sent_once_and_trained_ones_with_every_program() -> None:
    frozen, trained = fruit_route(), DifferentiableRoute("request -> ripe: bool", encoder=TokenEncoder())
    parcels, opener = Parcels(), Opener()
    parcel = parcels.pack(routes=[frozen, frozen.deepcopy(), trained])
    encoders, names = parcels.encoders_beside(set())
    assert len(names) == 1
    opener.add_encoders(encoders)
    opened = [opener.open(parcel)["routes"] for _ in range(2)]
    assert len({id(routes[place].encoder) for routes in opened for place in (0, 1)}) == 1
    assert opened[0][2].encoder is not opened[1][2].encoder
    assert parcels.encoders_beside(names)[1] == set()


@pytest.mark.parametrize("client", [False, True])
def test_a_program_runs_there_as_here(client: bool) -> None:
    program: dspy.Module = Wrapping()
    if client:
        program = PlannedShop()
        program.clerk.signature = program.clerk.signature.with_updated_fields("fruit", desc="the fruit asked for")
        program.clerk.lm = DecisionClient(encoder=bag_of_words)
        bind_clients(program)
    routes = find_routes(program)
    here = ScoredProgram(program, routes, right_fruit, failure_score=0.0, seed=3)
    there = sent(program=here)["program"]
    assert there.program is not program
    site = Site(next(iter(routes)), "fruit", 0)
    for index, example in enumerate(keyed(fruit_requests(4))):
        for job in (Job(index), Job(index, ((site, "cherry"),)), Job(index, look=1, sampled=True)):
            rollout = here.run(job, example)
            assert rollout.decisions
            assert there.run(job, example) == rollout


def test_an_lm_keeps_its_settings_and_leaves_its_history() -> None:
    lm = dspy.LM("openai/gpt-4.1-mini", api_key="a key", temperature=0.5)
    lm.history.append({"never": threading.Lock()})
    found = sent(lm=lm)["lm"]
    assert found.kwargs == lm.kwargs
    assert found.history == []
    assert len(lm.history) == 1


def test_settings_of_the_call_and_its_listeners_stay() -> None:
    lm = dspy.LM("openai/gpt-4.1-mini", api_key="a key")
    with dspy.context(lm=lm, house="mine", callbacks=[threading.Lock()], trace=[threading.Lock()]), record_decisions():
        settings = sent(settings=settings_of_here())["settings"]
    assert settings["lm"].model == lm.model
    assert settings["house"] == "mine"
    assert not [name for name in settings if name.startswith("_")]
    assert not settings.keys() & {"callbacks", "trace", "usage_tracker"}


@pytest.mark.usefixtures("_own_cache")
@pytest.mark.parametrize("restricted", [False, True])
def test_a_cache_is_opened_as_it_was(tmp_path: Path, restricted: bool) -> None:
    dspy.configure_cache(
        disk_cache_dir=str(tmp_path),
        disk_size_limit_bytes=10**6 * 16,
        memory_max_entries=7,
        restrict_pickle=restricted,
        safe_types=[Site] if restricted else None,
    )
    before, settings = dspy.cache, sent(cache=cache_of_here())["cache"]
    dspy.configure_cache(**settings)
    assert dspy.cache.disk_cache_dir == before.disk_cache_dir
    assert dspy.cache.memory_cache.maxsize == 7
    assert dspy.cache.disk_cache.size_limit == before.disk_cache.size_limit == 10**6
    allowed = [getattr(cache.disk_cache.disk, "_allowed", None) for cache in (before, dspy.cache)]
    assert allowed[0] == allowed[1] == ({(Site.__module__, "Site")} if restricted else None)
    dspy.configure_cache(enable_disk_cache=False, enable_memory_cache=False)
    dspy.configure_cache(**cache_of_here())
    assert not dspy.cache.enable_disk_cache
    assert not dspy.cache.enable_memory_cache
