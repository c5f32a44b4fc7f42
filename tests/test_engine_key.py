import dataclasses

import pytest

from deploy.runtime.engine_key import PLACE, EngineKey, changed_fields, jetpack_release

KEY = EngineKey(
    onnx_sha256="a" * 64,
    tensorrt="10.3.0",
    gpu="Orin",
    sm="8.7",
    jetpack="R36.4.3",
    precision="fp16",
    profile=(1, 1, 16),
    flags=("STRONGLY_TYPED",),
)
OTHER = {
    "onnx_sha256": "b" * 64,
    "tensorrt": "10.13.3",
    "gpu": "Thor",
    "sm": "11.0",
    "jetpack": "R38.2.0",
    "precision": "int8",
    "profile": (1, 8, 16),
    "flags": ("STRONGLY_TYPED", "TF32"),
}


def test_an_equal_key_has_changed_nowhere():
    assert changed_fields(KEY, dataclasses.replace(KEY)) == ()


def test_every_field_is_known_to_this_test():
    assert OTHER.keys() == {field.name for field in dataclasses.fields(EngineKey)}


@pytest.mark.parametrize("field", OTHER)
def test_a_field_that_changed_is_named_with_both_values(field):
    (phrase,) = changed_fields(KEY, dataclasses.replace(KEY, **{field: OTHER[field]}))
    assert phrase.startswith(f"{field}: built with ")
    values = [getattr(KEY, field), OTHER[field]]
    shown = [", ".join(map(str, v)) if isinstance(v, tuple) else v for v in values]
    assert phrase == f"{field}: built with {shown[0]}, here {shown[1]}"


def test_of_several_changes_each_is_named_in_order():
    changed = changed_fields(KEY, EngineKey(**OTHER))
    assert [phrase.partition(":")[0] for phrase in changed] == list(OTHER)


def test_how_an_engine_was_built_can_be_left_aside_and_what_for_cannot():
    assert {"profile", "flags"} == OTHER.keys() - set(PLACE)
    other = dataclasses.replace(KEY, profile=OTHER["profile"], flags=())
    assert changed_fields(KEY, other, fields=PLACE) == ()
    assert changed_fields(KEY, EngineKey(**OTHER), fields=PLACE)


def test_no_flags_are_shown_as_none():
    (phrase,) = changed_fields(dataclasses.replace(KEY, flags=()), KEY)
    assert phrase == "flags: built with none, here STRONGLY_TYPED"


@pytest.mark.parametrize(
    ("text", "release"),
    [
        ("# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic\n", "R36.4.3"),
        ("# R38 (release), REVISION: 2.0, GCID: 1, BOARD: generic\n", "R38.2.0"),
        ("Something new", "Something new"),
        (None, "none"),
    ],
)
def test_the_jetpack_is_read_from_its_release_file(tmp_path, text, release):
    (tmp_path / "etc").mkdir()
    if text is not None:
        (tmp_path / "etc/nv_tegra_release").write_text(text, "utf-8")
    assert jetpack_release(tmp_path) == release
