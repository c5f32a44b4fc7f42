import random
import sys
import warnings

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from edgereg.augment.chain import build_chain
from edgereg.augment.draws import Draws
from edgereg.augment.foreign import import_callables
from edgereg.errors import RecipeError
from edgereg.recipe import recipe_from_json

DRAWS = Draws(5, 2, torch.arange(30))
IMAGES = torch.rand(30, 3, 12, 10, generator=torch.Generator().manual_seed(0))


class OwnGenerators:
    """Albumentations' protocol: a generator of its own, that set_random_seed seeds."""

    def __init__(self, limit):
        self.limit = limit
        self.set_random_seed(None)

    def set_random_seed(self, seed):
        self.generator = np.random.default_rng(seed)

    def __call__(self, *, image):
        assert image.dtype == np.uint8 and image.flags.c_contiguous
        return {"image": (image * self.generator.uniform(0, self.limit)).astype(np.uint8)}


class GlobalGenerators:
    """The protocol of old: the global generators; it writes into what it is given."""

    def __call__(self, *, image):
        image[:] = image * random.random() * np.random.random()
        return {"image": image}


class AllThree:
    """Torchvision's protocol."""

    def __init__(self, first=0.0):
        self.made_with = random.random() + first

    def __call__(self, image):
        image[:] = self.made_with * random.random() * np.random.random() * torch.rand(())
        return image.clamp(0, 1)


class Returns:
    def __init__(self, what):
        self.what = what

    def __call__(self, image):
        return {
            "picture": lambda: image.numpy(),
            "double": lambda: image.double(),
            "smaller": lambda: image[:, 1:],
            "normalized": lambda: (image - 0.5) / 0.1,
            "nan": lambda: image * torch.nan,
            "list": lambda: [image],
            "overshoot": lambda: image * 1.4 - 0.2,
            "array": lambda: {"image": image.astype(np.float32)},
            "narrow": lambda: {"image": image[:, 1:]},
            "no image": lambda: {"mask": image},
            "turned": lambda: {"image": image[:, ::-1]},
        }[self.what]()


def warn_of_options(**options):
    warnings.warn(f"Argument(s) {list(options)} are not valid for transform X", stacklevel=2)


def chain(path, *, kind="torchvision", probability=1.0, **options):
    path = path if "." in path else f"{__name__}.{path}"
    step = {"path": path, "options": options, "kind": kind, "probability": probability}
    return build_chain([{"callable": step}], (0.5, 0.5, 0.5), key="augment")


EVERY_KIND = {
    "elastic": lambda: chain("torchvision.transforms.v2.ElasticTransform", alpha=20.0, sigma=1.0),
    "jitter": lambda: chain("torchvision.transforms.v2.ColorJitter", brightness=0.5, hue=0.2),
    "all three": lambda: chain("AllThree"),
    "own": lambda: chain("OwnGenerators", kind="albumentations", limit=0.9),
    "global": lambda: chain("GlobalGenerators", kind="albumentations"),
    "some": lambda: chain("AllThree", probability=0.5),
}
each = pytest.mark.parametrize("build", EVERY_KIND.values(), ids=EVERY_KIND)


@each
def test_a_sample_depends_on_no_other_and_not_on_the_order(build):
    before = IMAGES.clone()
    whole = build()(IMAGES, DRAWS)
    assert torch.equal(IMAGES, before) and whole.dtype == torch.float32
    assert (whole != IMAGES).flatten(1).any(dim=1).sum() > 10
    assert whole.min() >= 0 and whole.max() <= 1
    shuffled = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    same = build()
    for places in (shuffled, torch.tensor([7]), torch.tensor([3, 29])):
        assert torch.equal(same(IMAGES[places], DRAWS.of(places)), whole[places])
    assert not torch.equal(same(IMAGES, Draws(5, 3, DRAWS.indices)), whole)


@each
def test_samples_that_are_alike_are_changed_differently(build):
    out = build()(IMAGES[:1].expand(30, -1, -1, -1), DRAWS)
    assert len(out.unique(dim=0)) > 10


def states():
    return repr((random.getstate(), np.random.get_state())), torch.get_rng_state().tolist()


@each
def test_the_global_generators_are_put_back_and_do_not_matter(build):
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    before = states()
    first = build()(IMAGES, DRAWS)
    assert states() == before
    random.seed(2)
    np.random.seed(2)
    torch.manual_seed(2)
    assert states() != before
    assert torch.equal(build()(IMAGES, DRAWS), first)


def test_the_generators_are_put_back_after_an_error():
    before = states()
    with pytest.raises(RecipeError):
        chain("Returns", what="list")(IMAGES, DRAWS)
    assert states() == before


def test_a_torchvision_transform_is_called_on_the_image_itself():
    out = chain("torchvision.transforms.v2.RandomHorizontalFlip", p=1.0)(IMAGES, DRAWS)
    assert torch.equal(out, v2.functional.horizontal_flip(IMAGES))


def test_an_albumentation_is_called_on_bytes_channels_last():
    levels = (IMAGES * 255).round().to(torch.uint8)
    out = chain("Returns", kind="albumentations", what="turned")(levels, DRAWS)
    assert torch.equal(out, levels.flip(3) / 255)


def test_a_small_overshoot_is_cut_off():
    out = chain("Returns", what="overshoot")(IMAGES, DRAWS)
    assert torch.equal(out, (IMAGES * 1.4 - 0.2).clamp(0, 1))


def test_reading_a_recipe_imports_nothing():
    assert "this" not in sys.modules
    recipe = recipe_from_json({"augment": [{"callable": {"path": "this.that"}}]})
    assert "this" not in sys.modules
    # the control: asked for, it is looked for
    with pytest.raises(RecipeError, match="no_such"):
        import_callables(
            build_chain([{"callable": {"path": "no_such.that"}}], recipe.input.mean, key="augment"),
            key="augment",
        )


@pytest.mark.parametrize(
    ("path", "options", "match"),
    [
        ("no_such.Thing", {}, r"callable\.path: 'no_such\.Thing': No module named 'no_such'"),
        (
            "torchvision.transforms.v2.NoSuch",
            {},
            r"callable\.path: .*v2\.NoSuch': module .* has no attribute",
        ),
        ("AllThree", {"second": 1}, r"callable\.options: \{'second': 1\}: TypeError: .*'second'"),
        ("OwnGenerators", {}, r"callable\.options: \{\}: TypeError: .*'limit'"),
        ("warn_of_options", {"x": 1}, r"callable\.options: \{'x': 1\}: UserWarning: .*not valid"),
    ],
)
def test_what_cannot_be_made_is_refused_by_its_place_before_an_image_is_seen(path, options, match):
    (step,) = chain(path, **options).steps
    listed = {"path": step.path, "options": options}
    within = [{"flip": {}}, {"some": {"steps": [{"one_of": [{"callable": listed}]}]}}]
    for steps, where in (
        ([{"flip": {}}, {"callable": listed}], r"augment\[1\]\."),
        (within, r"augment\[1\]\.some\.steps\[0\]\.one_of\.steps\[0\]\."),
    ):
        built = build_chain(steps, (0.5, 0.5, 0.5), key="augment")
        with pytest.raises(RecipeError, match=f"{where}{match}"):
            import_callables(built, key="augment")
    with pytest.raises(RecipeError, match=match):
        chain(path, **options)(IMAGES, DRAWS)


def test_what_can_be_imported_passes():
    import_callables(EVERY_KIND["elastic"](), key="augment")


@pytest.mark.parametrize(
    ("what", "kind", "match"),
    [
        ("picture", "torchvision", r"Returns' returned a ndarray"),
        ("double", "torchvision", r"returned \(3, 12, 10\) torch\.float64"),
        ("smaller", "torchvision", r"size it was given; found: .*\(3, 11, 10\) torch\.float32"),
        ("normalized", "torchvision", r"returned values from -\S+ to "),
        ("nan", "torchvision", r"returned values from nan to nan"),
        ("list", "torchvision", r"returned a list"),
        ("turned", "torchvision", r"callable\.kind: torchvision: ValueError"),
        ("array", "albumentations", r"returned \(12, 10, 3\) float32"),
        ("narrow", "albumentations", r"returned \(12, 9, 3\) uint8"),
        ("no image", "albumentations", r"returned a dict without an array 'image'"),
        ("list", "albumentations", r"returned a list without an array 'image'"),
        ("double", "albumentations", r"callable\.kind: albumentations: AttributeError"),
    ],
)
def test_a_result_of_another_kind_is_refused(what, kind, match):
    with pytest.raises(RecipeError, match=match):
        chain("Returns", kind=kind, what=what)(IMAGES, DRAWS)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({}, "callable needs path"),
        ({"path": "Thing"}, r"path is a module and a name.*augment\[0\]\.callable\.path: Thing"),
        ({"path": "a..b"}, r"callable\.path: a\.\.b"),
        (
            {"path": "a.b", "kind": "kornia"},
            r"one of torchvision, albumentations; .*callable\.kind",
        ),
        ({"path": "a.b", "options": [1]}, r"a mapping; found: augment\[0\]\.callable\.options"),
        ({"path": "a.b", "probability": 2}, r"callable\.probability: 2"),
    ],
)
def test_a_callable_that_cannot_be_is_refused_in_the_recipe(options, match):
    with pytest.raises(RecipeError, match=match):
        build_chain([{"callable": options}], (0.5, 0.5, 0.5), key="augment")
