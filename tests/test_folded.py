import ast
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from dspy_router.folded import FoldedHead
from dspy_router.folded_lists import FoldedListHead
from dspy_router.heads import OptionHead
from dspy_router.list_heads import ListHead
from tests.programs import fruit_route

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
