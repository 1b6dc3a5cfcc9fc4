import copy
import json

import numpy as np
import pytest
from safetensors.numpy import load, save
from sklearn.metrics import roc_auc_score

from dspy_router.learning.familiarity import (
    FEWEST_ROWS,
    build_reference,
    decision_score,
    familiarity,
)
from dspy_router.learning.reference import KEPT_AN_OPTION, TEXT_LENGTH, Reference
from dspy_router.learning.rows import Objective, TargetRows

DIMENSION = 32
CENTERS = np.linalg.qr(np.random.default_rng(99).standard_normal((DIMENSION, DIMENSION)))[0]
NAMES = [f"option {number}" for number in range(20)]


def drawn(labels: np.ndarray, seed: int = 0) -> np.ndarray:
    """Unit vectors around the centres of their options, which share a common part."""
    random = np.random.default_rng(seed)
    vectors = CENTERS[labels] + 0.5 * CENTERS[-1] + 0.15 * random.standard_normal((len(labels), DIMENSION))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def logits(vectors: np.ndarray, options: int) -> np.ndarray:
    return (10 * vectors @ CENTERS[:options].T).astype(np.float32)


def descriptions(options: int) -> np.ndarray:
    """Half as near to an option's texts as these are to each other."""
    vectors = CENTERS[:options] + CENTERS[20]
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def referred(labels: np.ndarray, options: int = 5, rows: TargetRows | None = None, **settings) -> Reference:
    vectors = drawn(labels)
    rows = rows or TargetRows.from_labels(labels, options)
    texts = [f"text {row} of {label}" for row, label in enumerate(labels)]
    reference = build_reference(
        NAMES[:options], descriptions(options), vectors, rows, logits(vectors, options), texts, **settings
    )
    assert reference is not None
    return reference


def scored(reference: Reference, labels: np.ndarray, score=familiarity, **settings) -> np.ndarray:
    vectors = drawn(labels, seed=1)
    return score(reference, logits(vectors, len(reference.options)), vectors, **settings)


def area(inside: np.ndarray, outside: np.ndarray) -> float:
    return roc_auc_score(np.r_[np.ones(len(inside)), np.zeros(len(outside))], np.r_[inside, outside])


SEEN, STRANGE = np.arange(500) % 5, 8 + np.arange(300) % 6  # centres 8 to 13 are no option's


def test_what_no_option_is_like_is_unfamiliar() -> None:
    reference = referred(SEEN)
    inside, outside = scored(reference, SEEN), scored(reference, STRANGE)
    assert inside.dtype == np.float64
    assert area(inside, outside) > 0.99
    assert abs(inside.mean()) < 0.2
    assert 0.5 < inside.std() < 1.2


def test_the_three_scores_together_beat_the_logit_where_it_is_blind() -> None:
    # A head whose weights happen to point where training never went.
    weights = 10 * (CENTERS[:5] + CENTERS[8:14].sum(axis=0)).T
    reference, inside, outside = referred(SEEN), drawn(SEEN, seed=1), drawn(STRANGE, seed=1)
    logit = [(part @ weights).max(axis=1) for part in (inside, outside)]
    together = [familiarity(reference, part @ weights, part) for part in (inside, outside)]
    assert area(*logit) < 0.7
    assert area(*together) > 0.95


def test_the_decision_score_also_sees_a_tie_between_two_options() -> None:
    reference = referred(SEEN)
    tied = drawn(SEEN, seed=3) + drawn((SEEN + 1) % 5, seed=4)
    tied /= np.linalg.norm(tied, axis=1, keepdims=True)
    falls = [
        scored(reference, SEEN, score).mean() - score(reference, logits(tied, 5), tied).mean()
        for score in (familiarity, decision_score)
    ]
    assert falls[1] > falls[0] + 0.5


def test_held_out_rows_standardise_the_scores() -> None:
    mask = np.arange(500) % 7 == 0
    reference = referred(SEEN, held_out=mask)
    assert abs(scored(reference, SEEN).mean()) < 0.3
    assert reference.rows == 500


def test_soft_rows_are_as_good_as_labels_where_the_head_is() -> None:
    failures = np.ones((500, 5))
    failures[np.arange(500), (SEEN + 1) % 5] = 0  # known is only that one option failed
    rewards = 0.5 * np.eye(5)[SEEN]
    teacher = 0.6 * np.eye(5)[SEEN] + 0.08
    for objective, target in (
        (Objective.LIKELIHOOD, failures),
        (Objective.REWARD, rewards),
        (Objective.DISTRIBUTION, teacher),
    ):
        reference = referred(SEEN, rows=TargetRows.of(objective, target))
        assert reference.texts == referred(SEEN).texts
        assert area(scored(reference, SEEN), scored(reference, STRANGE)) > 0.99


@pytest.mark.parametrize("rows", [FEWEST_ROWS, 15, 40])
def test_few_rows_are_enough_to_tell_something(rows: int) -> None:
    reference = referred(SEEN[:rows])
    assert area(scored(reference, SEEN), scored(reference, STRANGE)) > 0.95


def test_one_row_an_option() -> None:
    reference = referred(np.arange(12), options=12)
    assert area(scored(reference, np.arange(300) % 12), scored(reference, 13 + np.arange(300) % 6)) > 0.9


def test_fewer_rows_give_no_reference_and_descriptions_serve_instead() -> None:
    vectors = drawn(SEEN[: FEWEST_ROWS - 1])
    rows = TargetRows.from_labels(SEEN[: FEWEST_ROWS - 1], 5)
    texts = ["-"] * len(rows)
    assert build_reference(NAMES[:5], descriptions(5), vectors, rows, logits(vectors, 5), texts) is None


def test_inputs_that_are_all_alike_do_not_break_it() -> None:
    vectors = np.eye(5, DIMENSION, dtype=np.float32)[SEEN]
    rows = TargetRows.from_labels(SEEN, 5)
    reference = build_reference(NAMES[:5], descriptions(5), vectors, rows, logits(vectors, 5), ["-"] * 500)
    assert reference is not None
    assert np.isfinite(familiarity(reference, logits(vectors, 5), vectors)).all()


def test_an_option_added_later_makes_its_inputs_familiar_and_leaves_the_others() -> None:
    before = referred(SEEN)
    after = before.with_options(NAMES[5:7], descriptions(7)[5:])
    new = 5 + np.arange(200) % 2
    assert scored(before, new).mean() < -2
    assert scored(after, new).mean() > -0.7
    assert area(scored(after, new), scored(after, STRANGE)) > 0.95
    then, now = scored(before, SEEN), scored(after, SEEN)
    assert (now >= then - 1e-6).all()
    np.testing.assert_allclose(now[then > -1.5], then[then > -1.5], atol=1e-6)  # others may be more like the new ones


def test_an_option_without_rows_is_judged_by_its_description_from_the_start() -> None:
    reference = referred(SEEN[SEEN != 2])
    assert reference.untrained.tolist() == [2]
    assert scored(reference, np.full(100, 2)).mean() > -0.7
    assert area(scored(reference, SEEN), scored(reference, STRANGE)) > 0.95


def test_inputs_of_a_removed_option_become_unfamiliar() -> None:
    reference = referred(SEEN).with_options(NAMES[5:7], descriptions(7)[5:])
    fewer = reference.without_options([NAMES[1], NAMES[5]])
    assert fewer is not None
    assert fewer.options == (NAMES[0], *NAMES[2:5], NAMES[6])
    assert not any(text.endswith("of 1") for text in fewer.texts)
    kept = [0, 2, 3, 4, 6]
    for labels, familiar in (([0], True), ([4], True), ([6], True), ([1], False), ([5], False)):
        vectors = drawn(np.repeat(labels, 100), seed=1)
        assert (familiarity(fewer, logits(vectors, 7)[:, kept], vectors).mean() > -1) == familiar
    assert referred(SEEN).with_options(["new"], descriptions(1)).without_options(NAMES[:5]) is None


def test_candidates_are_the_options_that_count() -> None:
    reference = referred(SEEN).with_options(["new"], descriptions(6)[5:])
    candidates = np.array([True, True, False, False, False, False])
    assert scored(reference, np.array([0, 1] * 50), candidates=candidates).mean() > -0.7
    assert scored(reference, np.array([2, 5] * 50), candidates=candidates).max() < -1
    alone = np.array([False] * 5 + [True])  # only the option that has a description and no rows
    assert area(*(scored(reference, np.full(100, label), candidates=alone) for label in (5, 0))) > 0.95


def test_what_is_kept_is_bounded_and_drawn_by_seed() -> None:
    labels = np.arange(1000) % 5
    reference, again, other = referred(labels), referred(labels), referred(labels, seed=1)
    assert np.bincount(reference.text_options).tolist() == [KEPT_AN_OPTION] * 5
    assert reference.texts == again.texts != other.texts
    assert reference.text_vectors.dtype == np.float16
    for text, option in zip(reference.texts, reference.text_options, strict=True):
        assert text.endswith(f"of {option}")
    many = TargetRows.from_labels(labels, 5)
    cut = build_reference(NAMES[:5], descriptions(5), drawn(labels), many, logits(drawn(labels), 5), ["x" * 999] * 1000)
    assert cut is not None
    assert {len(text) for text in cut.texts} == {TEXT_LENGTH}


def test_copies_share_it() -> None:
    reference = referred(SEEN)
    assert copy.deepcopy(reference) is reference


def test_a_saved_reference_gives_the_same_scores() -> None:
    for reference in (referred(SEEN), referred(SEEN).with_options(["new"], descriptions(6)[5:])):
        tensors, metadata = reference.to_state()
        metadata = json.loads(json.dumps(metadata))
        expected = Reference.expected_tensors(metadata, DIMENSION)
        assert {name: (tensor.dtype.name, tensor.shape) for name, tensor in tensors.items()} == expected
        loaded = Reference.from_state(load(save(tensors)), metadata)
        assert loaded.texts == reference.texts
        for score in (familiarity, decision_score):
            np.testing.assert_array_equal(scored(loaded, SEEN, score), scored(reference, SEEN, score))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("options", ["a", "a", "b", "c", "d"]),
        ("options", "abcde"),
        ("trained", [0, 1, 2, 3, 5]),
        ("trained", [1, 0, 2, 3, 4]),
        ("trained", [True, 1, 2, 3, 4]),
        ("texts", []),
        ("texts", ["x"] * 3001),
        ("text_options", [7] * 500),
        ("text_options", [0]),
        ("moments", {}),
        ("rows", 0),
        ("rows", None),
    ],
)
def test_damaged_metadata_is_refused(name: str, value: object) -> None:
    tensors, metadata = referred(SEEN).to_state()
    with pytest.raises(ValueError, match=r"reference|texts"):
        Reference.from_state(tensors, {**metadata, name: value})
    with pytest.raises(ValueError, match="keys"):
        Reference.from_state(tensors, {key: entry for key, entry in metadata.items() if key != name})


@pytest.mark.parametrize("pair", [[0.0, 0.0], [float("nan"), 1.0], [0.0], [0, 1], None])
def test_damaged_moments_are_refused(pair: object) -> None:
    tensors, metadata = referred(SEEN).to_state()
    with pytest.raises(ValueError, match="moments of 'logit'"):
        Reference.from_state(tensors, {**metadata, "moments": {**metadata["moments"], "logit": pair}})


def test_damaged_tensors_are_refused() -> None:
    tensors, metadata = referred(SEEN).to_state()
    for damaged in (
        {name: tensor for name, tensor in tensors.items() if name != "center"},
        {**tensors, "linear": tensors["linear"][1:]},
        {**tensors, "constant": tensors["constant"].astype(np.float64)},
        {**tensors, "quadratic": np.full_like(tensors["quadratic"], np.nan)},
    ):
        with pytest.raises(ValueError, match=r"expected|finite"):
            Reference.from_state(damaged, metadata)


def test_bad_input_is_refused() -> None:
    reference, vectors = referred(SEEN), drawn(SEEN)
    with pytest.raises(ValueError, match=r"\[n, 5\]"):
        familiarity(reference, logits(vectors, 6), vectors)
    with pytest.raises(ValueError, match="not all False"):
        familiarity(reference, logits(vectors, 5), vectors, np.zeros(5, bool))
    with pytest.raises(ValueError, match="already there"):
        reference.with_options([NAMES[0]], descriptions(1))
    with pytest.raises(ValueError, match="cherry"):
        reference.without_options(["cherry"])
    with pytest.raises(ValueError, match="499"):
        build_reference(
            NAMES[:5], descriptions(5), vectors, TargetRows.from_labels(SEEN, 5), logits(vectors, 5), ["-"] * 499
        )
    with pytest.raises(ValueError, match="held_out"):
        referred(SEEN, held_out=np.ones(500, bool))
