import numpy as np
import pytest

from deploy.errors import BadInputError
from deploy.runtime.decode import decode
from edgereg.data.emoji10 import Emoji10
from edgereg.data.images import Subset
from edgereg.data.pixels import Pixels
from edgereg.errors import DataError
from edgereg.evaluation import retrieval
from edgereg.evaluation.retrieval import Gallery, write_retrieval
from edgereg.recipe import Recipe

BLUE, ORANGE, BLACK = (0x2F, 0x6F, 0xB0), (0xD9, 0x82, 0x2B), (0, 0, 0)
SPEC = Recipe().preprocessing()
NAMES = Emoji10(vendor="twitter", split="test").class_names


def gallery(split, count, *, noise=0.01, seed=0):
    """Return images whose features are their class's own axis, and a little noise."""
    whole = Emoji10(vendor="twitter", split=split)
    rng = np.random.default_rng(seed)
    images = Subset(whole, np.sort(rng.permutation(len(whole))[:count]))
    features = np.eye(10)[images.labels] + noise * rng.normal(size=(count, 10))
    return Gallery(images.name, Pixels(images, SPEC), features.astype(np.float32), images.labels)


@pytest.fixture
def drawn(monkeypatch):
    """The grids of tiles that are handed to the drawing."""
    grids, draw = [], retrieval._draw
    monkeypatch.setattr(
        retrieval, "_draw", lambda heading, grid: grids.append(grid) or draw(heading, grid)
    )
    return grids


def test_each_row_is_a_query_and_its_nearest_images(tmp_path, drawn):
    queries, bank = gallery("test", 60), gallery("train", 200, noise=0.6, seed=1)
    result = write_retrieval(
        queries, bank, tmp_path / "a.png", class_names=NAMES, rows=12, columns=5
    )
    unit = [g.features / np.linalg.norm(g.features, axis=1, keepdims=True) for g in (queries, bank)]
    cosines = unit[0][result.queries] @ unit[1].T
    assert np.array_equal(result.neighbours, np.argsort(-cosines, axis=1)[:, :5])
    (grid,) = drawn
    assert [len(row) for row in grid] == [6] * 12
    for row, query, found in zip(grid, result.queries, result.neighbours, strict=True):
        assert np.array_equal(row[0].picture, queries.pixels.fitted(np.array([query]))[0])
        assert row[0].caption == NAMES[queries.labels[query]]
        for tile, index in zip(row[1:], found, strict=True):
            assert np.array_equal(tile.picture, bank.pixels.fitted(np.array([index]))[0])
            assert tile.caption.split()[1] == NAMES[bank.labels[index]]
            is_right = bank.labels[index] == queries.labels[query]
            assert tile.colour == (retrieval._RIGHT if is_right else retrieval._WRONG)
    is_right = bank.labels[result.neighbours] == queries.labels[result.queries][:, None]
    assert 0.2 < result.right == is_right.mean() < 1
    assert result.to_json()["neighbours"][0] == result.neighbours[0].tolist()


def test_the_frames_in_the_file_say_which_neighbours_are_right(tmp_path):
    queries, bank = gallery("test", 60), gallery("train", 200, seed=1)
    wrong = Gallery(bank.name, bank.pixels, bank.features, (bank.labels + 1) % 10)
    for shown, there, missing in ((bank, BLUE, ORANGE), (wrong, ORANGE, BLUE)):
        out = tmp_path / f"{there}.png"
        result = write_retrieval(queries, shown, out, class_names=NAMES, rows=2, columns=3)
        page = decode(out.read_bytes(), name="page")
        top = 16 + 2 * 18 + 12
        assert tuple(page[top + 1, 16 + 1]) == BLACK, "the query's frame"
        across = 96 + 2 * 4 + 12
        for column in (1, 2, 3):
            assert tuple(page[top + 1, 16 + column * across + 12 + 1]) == there
        assert not (page == missing).all(axis=2).any()
        assert result.right == (there == BLUE)


def test_the_queries_are_of_all_classes_and_the_seed_decides_which(tmp_path):
    queries, bank = gallery("test", 200), gallery("train", 50)
    first, again, other = (
        write_retrieval(
            queries, bank, tmp_path / "a.png", class_names=NAMES, seed=seed, force=True
        ).queries
        for seed in (1, 1, 2)
    )
    assert np.array_equal(queries.labels[first], np.arange(10))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_the_same_galleries_give_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        queries, bank = gallery("test", 20), gallery("train", 20)
        write_retrieval(queries, bank, tmp_path / name, class_names=NAMES)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_fewer_images_than_asked_for_are_all_shown(tmp_path):
    result = write_retrieval(
        gallery("test", 3), gallery("train", 4), tmp_path / "a.png", class_names=NAMES
    )
    assert result.neighbours.shape == (3, 4) and len(set(result.queries.tolist())) == 3


def test_an_existing_picture_is_replaced_only_with_force(tmp_path):
    out = tmp_path / "a.png"
    out.write_bytes(b"theirs")
    galleries = gallery("test", 3), gallery("train", 4)
    with pytest.raises(BadInputError, match="replace a file with --force"):
        write_retrieval(*galleries, out, class_names=NAMES)
    assert out.read_bytes() == b"theirs"
    write_retrieval(*galleries, out, class_names=NAMES, force=True)
    assert out.read_bytes() != b"theirs"


def test_features_that_are_no_numbers_are_refused_and_nothing_is_written(tmp_path):
    bank = gallery("train", 4)
    bank.features[1] = np.nan
    with pytest.raises(DataError, match="NaN"):
        write_retrieval(gallery("test", 3), bank, tmp_path / "a.png", class_names=NAMES)
    assert list(tmp_path.iterdir()) == []
