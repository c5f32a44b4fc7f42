import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deploy.errors import CheckFailedError
from deploy.runtime.neighbours import NEIGHBOURS, TEMPERATURE, ReferenceIndex, unit_rows
from edgereg.evaluation.knn import knn_predict

RNG = np.random.default_rng(0)
UNITS = unit_rows(RNG.normal(size=(30, 8)))
LABELS = RNG.integers(0, 3, 30)
INDEX = ReferenceIndex(UNITS, tuple(map(str, range(30))), LABELS, ("a", "b", "c"))
QUERIES = RNG.normal(size=(5, 8)).astype(np.float32)


def _reference_shares(query):
    """Wu et al., 1805.01978, section 3.4: each of the k nearest votes with exp(cosine / t)."""
    cosines = [
        sum(float(a) * float(b) for a, b in zip(query, unit, strict=True))
        / math.sqrt(sum(float(a) ** 2 for a in query))
        for unit in UNITS
    ]
    nearest = sorted(range(30), key=lambda i: -cosines[i])[:NEIGHBOURS]
    votes = [0.0, 0.0, 0.0]
    for i in nearest:
        votes[LABELS[i]] += math.exp(cosines[i] / TEMPERATURE)
    return [vote / sum(votes) for vote in votes], nearest, cosines


def test_the_vote_is_that_of_the_paper():
    logits = INDEX.vote_logits(QUERIES)
    for query, row in zip(QUERIES, logits, strict=True):
        shares, nearest, cosines = _reference_shares(query)
        np.testing.assert_allclose(np.exp(row), shares, rtol=1e-4)
        found, vote = INDEX.nearest(query, k=4)
        assert [near.name for near in found] == [str(i) for i in nearest[:4]]
        assert found[0].cosine == pytest.approx(max(cosines), abs=1e-6)
        assert found[0].label == INDEX.class_names[LABELS[nearest[0]]]
        assert dict(vote) == pytest.approx(dict(zip("abc", shares, strict=True)), rel=1e-4)
        assert [share for _, share in vote] == sorted((s for _, s in vote), reverse=True)


def test_a_device_votes_as_the_evaluation_of_an_encoder_does():
    queries = RNG.normal(size=(200, 8)).astype(np.float32)
    expected = knn_predict(queries, UNITS, LABELS, num_classes=3)
    assert INDEX.vote_logits(queries).argmax(axis=1).tolist() == expected.tolist()


@settings(max_examples=20, deadline=None)
@given(st.floats(1e-3, 1e3))
def test_the_length_of_an_embedding_does_not_matter(factor):
    scaled = (QUERIES * factor).astype(np.float32)
    np.testing.assert_allclose(INDEX.vote_logits(scaled), INDEX.vote_logits(QUERIES), atol=1e-3)


def test_how_many_are_shown_does_not_change_the_vote():
    assert INDEX.nearest(QUERIES[0], k=1)[1][0] == INDEX.nearest(QUERIES[0], k=9)[1][0]


def test_fewer_references_than_neighbours_all_vote():
    few = ReferenceIndex(UNITS[:2], ("0", "1"), np.array([0, 1]), ("a", "b"))
    np.testing.assert_allclose(np.exp(few.vote_logits(QUERIES)).sum(axis=1), 1, rtol=1e-5)


def test_references_without_labels_have_neighbours_and_no_vote():
    index = ReferenceIndex(UNITS, INDEX.names, None, ())
    found, vote = index.nearest(QUERIES[0], k=3)
    assert len(found) == 3 and vote == () and found[0].label is None


@pytest.mark.parametrize(
    ("embedding", "found"),
    [([np.nan] * 8, "8 of 8 are not"), ([np.inf] + [0] * 7, "1 of 8"), ([0] * 8, "8 zeros")],
)
def test_an_embedding_without_a_direction_is_refused(embedding, found):
    with pytest.raises(CheckFailedError, match=found):
        INDEX.nearest(np.array(embedding, np.float32), k=1)


def test_an_embedding_that_is_not_finite_gives_no_finite_vote():
    broken = QUERIES.copy()
    broken[1, 2] = np.inf
    assert np.isfinite(INDEX.vote_logits(broken)).all(axis=1).tolist() == [True, False] + [True] * 3
