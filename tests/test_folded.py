import ast
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import dspy
import numpy as np
import pytest
import torch

from dspy_router import DifferentiableRoute, RouteFinetune
from dspy_router.folded import FoldedHead, product
from dspy_router.folded_lists import FoldedListHead
from dspy_router.heads import OptionHead
from dspy_router.list_heads import ListHead
from tests.conftest import bag_of_words
from tests.programs import FRUIT, fruit_requests, fruit_route

FORMS = [(OptionHead, FoldedHead), (ListHead, FoldedListHead)]


def unit(count: int, seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((count, 8)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def trained(form: type[OptionHead]) -> OptionHead:
    torch.manual_seed(0)
    head = form(torch.from_numpy(unit(5)))
    with torch.no_grad():
        for tensor in head.parameters():
            tensor.normal_()
    head.begin_training()
    return head


@pytest.mark.parametrize(("form", "folded"), FORMS)
def test_both_forms_begin_alike(form: type[OptionHead], folded: type[FoldedHead]) -> None:
    state = form(torch.from_numpy(unit(5))).state_dict()
    parameters = folded.untrained(unit(5)).parameters
    assert parameters.keys() == state.keys()
    assert all(np.array_equal(parameters[name], tensor.numpy()) for name, tensor in state.items())


@pytest.mark.parametrize(("form", "folded"), FORMS)
def test_unfolded_and_pickled_it_stays_the_same(form: type[OptionHead], folded: type[FoldedHead]) -> None:
    head = trained(form)
    inputs = unit(20, seed=1)
    np.testing.assert_allclose(head.folded().logits(inputs), head(torch.from_numpy(inputs)).detach(), atol=1e-4)
    for same in (form.unfolded(head.folded()).folded(), pickle.loads(pickle.dumps(head.folded()))):
        assert type(same) is folded
        assert same.digest == head.digest
        assert np.array_equal(same.policy(inputs), head.policy(inputs))


def test_the_digest_is_that_of_the_parameters_and_not_of_their_product() -> None:
    head = trained(OptionHead).folded()
    elsewhere = FoldedHead(head.parameters)
    elsewhere.weights = np.nextafter(head.weights, np.float32(np.inf))  # as another processor sums
    assert elsewhere.digest == head.digest
    for name, value in head.parameters.items():
        assert FoldedHead({**head.parameters, name: value + np.float32(0.5)}).digest != head.digest


def test_what_torch_changes_is_decided_with_and_what_only_decides_stays_folded() -> None:
    route = fruit_route()
    before = route(request="an apple").probabilities
    folded = route.learned.folded("fruit")
    assert route.deepcopy().learned.folded("fruit") is folded
    with torch.no_grad():
        route.head["fruit"].bias[2] = 100.0
    assert route(request="an apple").fruit == "cherry"
    assert folded.biases[2] == 0
    assert route.deepcopy()(request="an apple").fruit == "cherry"
    assert fruit_route()(request="an apple").probabilities == before


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_a_fused_step_which_torch_does_not_count_is_seen(optimizer: type[torch.optim.Optimizer]) -> None:
    route = fruit_route()
    before, digest = route(request="an apple").probabilities, route.learned.digest
    fused = optimizer(route.head.parameters(), lr=0.1, fused=True)  # type: ignore[call-arg]
    route(request="an apple")
    torch.nn.functional.cross_entropy(route.logits(["an apple"]), torch.tensor([2])).backward()
    fused.step()
    assert route(request="an apple").probabilities["cherry"] > 1.5 * before["cherry"]
    assert route.learned.digest != digest


def test_a_torch_form_made_in_inference_mode_decides_and_is_trained() -> None:
    route = fruit_route()
    with torch.inference_mode():
        route.logits(["an apple"])
    assert route(request="an apple").fruit == "apple"
    route.logits(["an apple"]).sum().backward()


def test_bfloat16_which_numpy_has_not_decides_and_is_saved() -> None:
    route = fruit_route()
    route.head.bfloat16()
    same = fruit_route()
    same.learned.load_state(route.learned.dump_state())
    assert same(request="an apple").probabilities == route(request="an apple").probabilities


def test_a_load_beside_the_first_decision_is_not_lost() -> None:
    deciding, loaded = threading.Event(), threading.Event()

    def slow(texts: list[str]) -> np.ndarray:
        if threading.current_thread() is first:
            deciding.set()
            loaded.wait(0.5)
        return bag_of_words(texts)

    def made() -> DifferentiableRoute:
        return DifferentiableRoute("request -> fruit", tools=FRUIT, encoder=slow)

    route, trained = made(), made()
    first = threading.Thread(target=lambda: route(request="an apple"))
    with torch.no_grad():
        trained.head["fruit"].bias[2] = 100.0
    state = trained.learned.dump_state()
    first.start()
    deciding.wait()
    route.learned.load_state(state)
    loaded.set()
    first.join()
    assert route(request="an apple").fruit == "cherry"


def test_threads_find_what_was_learned_while_its_form_changes() -> None:
    trained, route = fruit_route(), fruit_route()
    with torch.no_grad():
        trained.head["fruit"].bias[2] = 100.0
    state = trained.learned.dump_state()
    route.learned.load_state(state)
    done, found = threading.Event(), set[str]()

    def over_and_over(change: Callable[[], object]) -> None:
        while not done.is_set():
            change()

    works: list[Callable[[], object]] = [
        *6 * [lambda: found.add(route(request="an apple").fruit)],
        *2 * [lambda: found.add(route.deepcopy()(request="an apple").fruit)],
        *2 * [lambda: route.head],
        *2 * [lambda: route.learned.load_state(state)],
    ]
    threads = [threading.Thread(target=over_and_over, args=[work]) for work in works]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        done.wait(2)
    finally:
        done.set()
        sys.setswitchinterval(interval)
    for thread in threads:
        thread.join()
    assert found == {"cherry"}


@pytest.mark.parametrize("rows", [1, 3000, 3001])
def test_a_product_in_blocks_is_the_product(rows: int) -> None:
    matrix, vector = np.random.default_rng(0).standard_normal((rows, 200), np.float32), unit(25).reshape(-1)
    np.testing.assert_allclose(product(matrix, vector), matrix @ vector, atol=1e-4)


def test_one_decision_among_many_options_takes_one_thread() -> None:
    code = """
import time
import numpy as np
from dspy_router.folded import FoldedHead
head = FoldedHead.untrained(np.ones((6000, 384), np.float32))
vector = np.ones(384, np.float32)
head.logits(vector)
shares = []
for _ in range(5):
    everyone, own = time.process_time(), time.thread_time()
    for _ in range(100):
        head.logits(vector)
    shares.append((time.process_time() - everyone) / (time.thread_time() - own))
print(min(shares))  # at first, threads that numpy has just started may still spin; two at work would be 2 each time
"""
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "2", "OMP_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1.05


def test_a_process_that_only_decides_imports_no_torch() -> None:
    code = """
import sys
import dspy
from dspy_router import DifferentiableRoute
from tests.conftest import bag_of_words
from tests.programs import FRUIT, fruit_route
untrained, route = fruit_route(), fruit_route()
route.load("tests/persistence/version_4.json")
made = route(request="peel for me now")
route.explain(request="peel for me now"), route.top_k(2, request="now"), route.dump_state(), route.deepcopy()
DifferentiableRoute("request -> fruits: list[str]", tools=FRUIT, encoder=bag_of_words)(request="a cherry")
signature = dspy.Signature("request -> fruit: Literal['fig', 'date']")
predictor = dspy.Predict(signature.with_updated_fields("fruit", desc="the fruit asked for"))
predictor.lm = DifferentiableRoute(predictor.signature, encoder=bag_of_words).as_lm(cache=False)
predictor(request="a fig")
heavy = [name for name in ("torch", "scipy", "sklearn", "transformers") if name in sys.modules]
print([untrained(request="a ripe apple").fruit, made.fruit, made.decision.score is not None, heavy])
"""
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    assert ast.literal_eval(done.stdout) == ["apple", "banana", True, []]


def test_a_pickled_route_that_was_trained_decides_without_torch(tmp_path: Path) -> None:
    route = RouteFinetune().compile(fruit_route(), trainset=fruit_requests(30, label=True))
    route.save(tmp_path / "route", save_program=True)
    code = "import dspy, sys; route = dspy.load(sys.argv[1], allow_pickle=True)\n"
    code += "print([route(request='peel for me now').fruit, 'torch' in sys.modules])"
    command = [sys.executable, "-c", code, str(tmp_path / "route")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert done.returncode == 0, done.stderr
    assert ast.literal_eval(done.stdout) == ["banana", False]
    loaded = dspy.load(tmp_path / "route", allow_pickle=True)
    assert loaded.dump_state() == route.dump_state()
    assert torch.equal(loaded.head["fruit"].weight, route.head["fruit"].weight)
