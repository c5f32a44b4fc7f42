import numpy as np
import pytest
import torch

from deploy.errors import BadInputError
from deploy.runtime.decode import decode
from edgereg.augment import preview
from edgereg.augment.draws import Draws
from edgereg.augment.mixing import mix
from edgereg.augment.preview import write_preview
from edgereg.data.emoji10 import Emoji10
from edgereg.data.images import Subset
from edgereg.data.pixels import Pixels
from edgereg.errors import DataError
from edgereg.recipe import load_recipe, recipe_from_json

IMAGES = Subset(Emoji10(vendor="twitter", split="train"), np.arange(0, 40))
MIXED = {
    "seed": 3,
    "augment": [{"flip": {}}, {"some": {"probability": 0.3, "steps": [{"rgb_shift": {}}]}}],
    "mix": {"mixup": 0.4, "cutmix": 1.0, "probability": 0.8},
}


class Unlabelled(Subset):
    def __init__(self, images, count):
        super().__init__(images, np.arange(count))
        self.labels, self.class_names = None, ()


@pytest.fixture
def drawn(monkeypatch):
    """What is handed to the drawing: (heading, columns), one call after the other."""
    calls, draw = [], preview._draw
    monkeypatch.setattr(preview, "_draw", lambda *args: calls.append(args) or draw(*args))
    return calls


def test_the_pictures_are_the_originals_the_trainings_draws_and_the_mixes(tmp_path, drawn):
    recipe = recipe_from_json(MIXED)
    result = write_preview(IMAGES, recipe, tmp_path / "a.png", rows=5, columns=4)
    ((_, columns),) = drawn
    names = [IMAGES.image_name(index) for index in range(40)]
    chosen = torch.tensor([names.index(name) for name in result.images])
    originals = Pixels(IMAGES, recipe.preprocessing()).batch(chosen.numpy())
    shown = [recipe.chain()(originals, Draws(3, epoch, chosen)) for epoch in range(4)]
    mixed = [mix(shown[0], torch.eye(5), recipe.mix, seed=3, step=step)[0] for step in range(3)]
    expected = [originals / 255, *shown, *mixed]
    assert [column.title for column in columns] == [
        *("original", "epoch 0", "epoch 1", "epoch 2", "epoch 3"),
        *("mixed, step 0", "mixed, step 1", "mixed, step 2"),
    ]
    for column, images in zip(columns, expected, strict=True):
        pixels = (images * 255).round().byte().permute(0, 2, 3, 1).numpy()
        assert np.array_equal(column.pictures, pixels)
    assert not np.array_equal(columns[1].pictures, columns[2].pictures)
    assert result.to_json() == {
        "preview": str(tmp_path / "a.png"),
        "images": list(result.images),
        "draws": 4,
        "mixes": 3,
    }


def test_a_caption_says_what_a_mixed_picture_consists_of():
    targets = torch.tensor([[0.75, 0.0, 0.25], [0.0, 1.0, 0.0], [0.6, 0.0, 0.4]])
    assert preview._shares(targets) == ["75 % + 25 % of 3", "by itself", "40 % + 60 % of 1"]


def test_each_class_is_shown_and_named(tmp_path, drawn):
    count = len(set(IMAGES.labels))
    write_preview(IMAGES, load_recipe(None), tmp_path / "a.png", rows=count, columns=1)
    captions = drawn[0][1][0].captions
    assert {caption.split()[1] for caption in captions} == {
        IMAGES.class_names[label] for label in IMAGES.labels
    }


def test_images_without_labels_are_taken_from_all_over_the_set(tmp_path, drawn):
    images = Unlabelled(IMAGES, 40)
    result = write_preview(images, load_recipe(None), tmp_path / "a.png", rows=4, columns=1)
    assert result.images == tuple(images.image_name(index) for index in (0, 10, 20, 30))
    assert list(drawn[0][1][0].captions) == ["1", "2", "3", "4"]
    few = write_preview(Unlabelled(IMAGES, 3), load_recipe(None), tmp_path / "b.png", columns=1)
    assert len(few.images) == 3


def test_the_heading_names_each_step_and_its_options(tmp_path, drawn):
    write_preview(IMAGES, recipe_from_json(MIXED), tmp_path / "a.png", rows=2, columns=1)
    steps = [{"affine": {"scale": [0.9, 1.1]}}, {"cutout": None}, {"blur": {}}]
    plain = recipe_from_json({"augment": steps})
    write_preview(IMAGES, plain, tmp_path / "b.png", rows=2, columns=1)
    (heading, _), (plain_heading, columns) = drawn
    assert heading == [
        "augment: flip, some (probability 0.3, steps (rgb_shift))",
        "mix: mixup 0.4, cutmix 1, probability 0.8",
    ]
    assert plain_heading == ["augment: affine (scale (0.9, 1.1)), cutout, blur", "mix: none"]
    assert len(columns) == 2


def test_the_file_is_a_picture_with_each_column_in_its_place(tmp_path, drawn):
    write_preview(IMAGES, recipe_from_json(MIXED), tmp_path / "a.png", rows=3, columns=2)
    page = decode((tmp_path / "a.png").read_bytes(), name="a.png")
    for place, column in enumerate(drawn[0][1]):
        scale = 96 // column.pictures.shape[1]
        tile = np.kron(column.pictures[0], np.ones((scale, scale, 1), np.uint8))
        left = 16 + place * (96 + 8)
        strip = page[:, left : left + 96]
        tops = [y for y in range(len(page) - 96) if np.array_equal(strip[y : y + 96], tile)]
        assert len(tops) == 1 and 50 < tops[0] < 130
    assert page.shape[1] == 2 * 16 + 6 * 96 + 5 * 8


def test_long_texts_stay_within_the_page(tmp_path, drawn):
    steps = [{"translate": {"pixels": n}} for n in range(30)]
    write_preview(IMAGES, recipe_from_json({"augment": steps}), tmp_path / "a.png", columns=1)
    page = decode((tmp_path / "a.png").read_bytes(), name="a.png")
    assert (page[:, -12:] == 0xEE).all() and (page[:, :12] == 0xEE).all()
    assert (page[:200] < 100).any(), "there is no text at all"
    assert preview._wrapped("aa bb ccc d", lambda line: len(line) <= 5) == ["aa bb", "ccc d"]
    assert preview._wrapped("aaaaaaa b", lambda line: len(line) <= 3) == ["aaaaaaa", "b"]


def test_the_same_recipe_gives_the_same_file_and_another_seed_another(tmp_path):
    files = []
    for place, seed in enumerate((3, 3, 4)):
        recipe = recipe_from_json({**MIXED, "seed": seed})
        write_preview(IMAGES, recipe, tmp_path / f"{place}.png", rows=2, columns=2)
        files.append((tmp_path / f"{place}.png").read_bytes())
    assert files[0] == files[1] != files[2]


def test_an_earlier_file_is_replaced_by_force_alone_and_a_folder_never(tmp_path):
    out, recipe = tmp_path / "new" / "a.png", load_recipe(None)
    write_preview(IMAGES, recipe, out, rows=1, columns=1)
    before = out.read_bytes()
    with pytest.raises(BadInputError, match=r"a\.png' exists"):
        write_preview(IMAGES, recipe, out, rows=2, columns=1)
    assert out.read_bytes() == before
    write_preview(IMAGES, recipe, out, rows=2, columns=1, force=True)
    assert out.read_bytes() != before
    assert list(out.parent.iterdir()) == [out]
    with pytest.raises(BadInputError, match="exists"):
        write_preview(IMAGES, recipe, tmp_path, force=True)


@pytest.mark.parametrize(("count", "columns"), [(0, 1), (3, 0)])
def test_a_preview_of_nothing_is_refused(tmp_path, count, columns):
    images = Unlabelled(IMAGES, count)
    with pytest.raises(DataError, match="an image and an epoch at least"):
        write_preview(images, load_recipe(None), tmp_path / "a.png", columns=columns)
    assert not (tmp_path / "a.png").exists()


def test_windows_stand_in_the_middle_of_the_page(tmp_path, drawn):
    recipe = recipe_from_json({"epochs": 2, "progressive": {"smallest": 20}, **MIXED})
    write_preview(IMAGES, recipe, tmp_path / "out.png", rows=3, columns=2)
    ((_, heading, _), columns), *_ = drawn
    assert heading == ("progressive: windows from 20 pixels on, whole images after 80% of 2 epochs")
    small, whole, mixed = columns[1].pictures, columns[2].pictures, columns[3].pictures
    for pictures in (small, mixed):
        frame = np.ones((32, 32), bool)
        frame[6:26, 6:26] = False
        assert (pictures[:, frame] == 238).all()
    assert not (whole[:, :6] == 238).all()
    corner = small[0, 6:26, 6:26]
    assert len(np.unique(corner)) > 2
