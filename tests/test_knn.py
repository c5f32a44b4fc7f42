import numpy as np
import pytest

from edgereg.errors import DataError
from edgereg.evaluation import neighbours
from edgereg.evaluation.knn import knn_predict, leave_one_out, usual_k
from edgereg.evaluation.neighbours import nearest


def clusters(count, *, classes=4, dim=8, noise=0.4, seed=0):
    """Return features (N, D), each class around a direction of its own, and their labels."""
    rng = np.random.default_rng(seed)
    centres = np.eye(dim)[:classes]
    labels = np.arange(count) % classes
    features = centres[labels] + noise * rng.normal(size=(count, dim))
    lengths = rng.uniform(0.1, 10, size=(count, 1))  # which must not matter
    return (features * lengths).astype(np.float32), labels


def _reference_knn(features, bank, labels, *, num_classes, k, temperature):
    """One image at a time, in float64, as the formula reads."""
    unit = [v / np.linalg.norm(v) for v in bank.astype(np.float64)]
    answers = []
    for vector in features.astype(np.float64):
        cosines = np.array([vector @ other / np.linalg.norm(vector) for other in unit])
        votes = np.zeros(num_classes)
        for at in sorted(range(len(unit)), key=lambda at: -cosines[at])[:k]:
            votes[labels[at]] += np.exp(cosines[at] / temperature)
        answers.append(votes.argmax())
    return np.array(answers)


def at_angles(*degrees):
    radians = np.radians(degrees)
    return np.stack([np.cos(radians), np.sin(radians)], axis=1).astype(np.float32)


def test_a_near_neighbour_outvotes_two_far_ones_only_at_a_low_temperature():
    # cosines 1, 0.5 and 0.5: e^(0.5/t) against 2 decides, at t = 0.72
    query, bank, labels = at_angles(0), at_angles(0, 60, -60), np.array([0, 1, 1])
    for temperature, winner in ((0.7, 0), (0.75, 1)):
        answer = knn_predict(query, bank, labels, num_classes=2, k=3, temperature=temperature)
        assert answer.tolist() == [winner]
    assert knn_predict(query, bank, labels, num_classes=2, k=1, temperature=9.0).tolist() == [0]


@pytest.mark.parametrize("k", [1, 5, 60])
@pytest.mark.parametrize("temperature", [0.01, 0.1, 1.0])
def test_the_votes_are_those_of_the_formula(k, temperature):
    bank, labels = clusters(60, noise=0.8)
    features, _ = clusters(50, noise=0.8, seed=1)
    options = {"num_classes": 4, "k": k, "temperature": temperature}
    expected = _reference_knn(features, bank, labels, **options)
    assert knn_predict(features, bank, labels, **options).tolist() == expected.tolist()
    assert len(set(expected.tolist())) > 1, "the reference must tell images apart"


def test_chunks_change_nothing(monkeypatch):
    bank, _ = clusters(60, noise=0.8)
    features, _ = clusters(50, noise=0.8, seed=1)
    whole, own = nearest(features, bank, k=7), nearest(bank, None, k=7)
    monkeypatch.setattr(neighbours, "_CHUNK_CELLS", 3 * 60)  # three rows a chunk
    for before, after in ((whole, nearest(features, bank, k=7)), (own, nearest(bank, None, k=7))):
        np.testing.assert_allclose(after[0], before[0], rtol=1e-5, atol=1e-6)
        assert np.array_equal(after[1], before[1])


def test_leaving_one_out_is_a_prediction_from_the_others():
    features, labels = clusters(40, noise=0.5)
    right = []
    for at in range(40):
        others = np.delete(np.arange(40), at)
        options = {"num_classes": 4, "k": 5}
        guess = knn_predict(features[[at]], features[others], labels[others], **options)
        right.append(guess[0] == labels[at])
    assert leave_one_out(features, labels, num_classes=4, k=5) == np.mean(right)
    assert 0.3 < np.mean(right) < 0.95


def test_no_image_is_its_own_neighbour():
    # each class twice, far apart: whoever saw itself would be right
    features, labels = at_angles(0, 1, 90, 91), np.array([0, 1, 0, 1])
    assert leave_one_out(features, labels, num_classes=2, k=1) == 0.0
    assert knn_predict(features, features, labels, num_classes=2, k=1).tolist() == [0, 1, 0, 1]


def test_clusters_are_told_apart_and_shuffled_labels_are_not():
    bank, labels = clusters(2000)
    features, truth = clusters(1000, seed=1)
    answers = knn_predict(features, bank, labels, num_classes=4)
    assert (answers == truth).mean() > 0.9
    shuffled = np.random.default_rng(0).permutation(labels)
    by_chance = (knn_predict(features, bank, shuffled, num_classes=4) == truth).mean()
    assert abs(by_chance - 0.25) < 0.06  # 4 standard errors of n = 1000


def test_features_that_are_all_the_same_give_chance():
    features = np.ones((400, 8), np.float32)
    labels = np.arange(400) % 4
    assert leave_one_out(features, labels, num_classes=4) <= 0.3


def test_two_hundred_neighbours_are_usual_and_twenty_among_few():
    assert [usual_k(n) for n in (5, 1000, 9999, 10_000)] == [5, 20, 20, 200]


def test_more_neighbours_than_images_are_refused():
    features, labels = clusters(10)
    with pytest.raises(DataError, match=r"k: 11, and 10 images"):
        knn_predict(features, features, labels, num_classes=4, k=11)
    with pytest.raises(DataError, match=r"k: 10, and 9 images"):
        leave_one_out(features, labels, num_classes=4, k=10)


def test_features_of_two_encoders_are_refused():
    with pytest.raises(DataError, match="vectors of 8 and of 7 numbers"):
        nearest(clusters(4)[0], clusters(4, dim=7)[0], k=1)


def test_what_is_no_number_is_refused():
    features, labels = clusters(10)
    features[3, 2] = np.nan
    with pytest.raises(DataError, match=r"NaN or infinity in features of shape \(10, 8\)"):
        leave_one_out(features, labels, num_classes=4, k=3)
