"""A bundle's labelled sample: written at export, measured on the device; and a device that has
nothing but numpy and ONNX Runtime."""

import dataclasses
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from deploy_bundle import (
    FP32,
    REFERENCES,
    embedding_parts,
    golden_pixels,
    labelled_parts,
    linear_onnx,
    npy,
    write_labelled_bundle,
    write_small_bundle,
)
from export_models import randomized, small_cnn
from PIL import Image

import deploy
from deploy.bundle.manifest_json import manifest_from_bytes, manifest_to_bytes
from deploy.bundle.read import open_bundle
from deploy.bundle.write import write_bundle
from deploy.errors import BadInputError
from deploy.measure.holdout import measure_holdout
from deploy.measure.verify import verify
from deploy.runtime.decode import encode_png
from deploy.runtime.preprocess import Preprocessing
from deploy.runtime.runner import open_runner
from edgereg import ship
from edgereg.data.emoji10 import Emoji10
from edgereg.errors import DataError
from export.exporter import export_bundle
from export.request import ExportRequest

EYE = np.eye(3) + 0.1
CLASSES = ("circle", "square", "star", "none")


def runner_of(bundle):
    return open_runner(bundle, backend="onnxruntime", precision="fp32")


def measured(path, **options):
    bundle = write_labelled_bundle(path, **options)
    return measure_holdout(bundle, runner_of(bundle))


def losing():
    """A model that takes blue for red: it loses 10 of the 30 images."""
    weight = EYE.copy()
    weight[:, 0] = weight[:, 2]
    return {"model.fp32.onnx": linear_onnx(weight)}


def test_a_right_model_loses_nothing(tmp_path):
    report = measured(tmp_path / "b")
    paired = report.paired
    assert (paired.count, paired.top1, paired.lost, paired.flips) == (30, 1.0, 0, 0)
    assert report.passed and report.allowed == 0
    assert paired.interval[0] < 0 < paired.interval[1]


def test_fp32_may_lose_no_image_that_decodes_exactly(tmp_path):
    report = measured(tmp_path / "b", changes=losing())
    assert (report.paired.lost, report.paired.gained) == (10, 0)
    assert not report.passed


def test_what_the_gate_allows_or_was_lost_at_export_may_be_lost_here(tmp_path):
    for name, options, passes in (
        ("gate", {"gate": 10 / 30}, True),
        ("less", {"gate": 9.9 / 30}, False),
        ("export", {"net_lost": 10}, True),
        ("fewer", {"net_lost": 9}, False),
    ):
        report = measured(tmp_path / name, changes=losing(), **options)
        assert report.passed is passes, name


def test_one_more_image_may_be_lost_where_decoders_differ(tmp_path):
    def encode_bmp(image):
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, format="BMP")
        return buffer.getvalue()

    assert measured(tmp_path / "b", encode=encode_bmp, suffix="bmp").allowed == 1


def test_a_tie_is_not_held_against_the_device_and_a_clear_loss_is(tmp_path):
    _, contents = labelled_parts()
    labels, reference = (
        np.load(io.BytesIO(contents[f"holdout/{name}.npy"])) for name in ("labels", "outputs")
    )
    labels[0] = 1  # the device will say 0, of which the reference is nearly as sure
    for margin, passes in ((5e-5, True), (2e-4, False)):
        reference[0, 1] = reference[0, 0] + margin * np.ptp(reference)
        files = {"holdout/labels.npy": npy(labels), "holdout/outputs.npy": npy(reference)}
        report = measured(tmp_path / str(margin), changes=files)
        assert (report.paired.lost, report.paired.ties) == (1, int(passes))
        assert report.passed is passes


def test_the_sample_of_an_encoder_is_judged_by_votes(tmp_path):
    labelled, sample_files = labelled_parts()
    manifest, contents = embedding_parts()
    accuracy = labelled.variants["fp32"].accuracy
    variant = dataclasses.replace(manifest.variants["fp32"], accuracy=accuracy)
    manifest = dataclasses.replace(manifest, variants={"fp32": variant}, holdout=labelled.holdout)
    files = {name: data for name, data in sample_files.items() if name.startswith("holdout/")}
    write_bundle(tmp_path / "b", manifest, contents | files)
    bundle = open_bundle(tmp_path / "b")
    report = measure_holdout(bundle, runner_of(bundle))
    assert report.passed and report.paired.flips == 0 and REFERENCES == 9
    wrong = {"model.fp32.onnx": linear_onnx(EYE[:, [1, 2, 0]], output="embedding")}
    write_bundle(tmp_path / "w", manifest, contents | files | wrong)
    bundle = open_bundle(tmp_path / "w")
    assert not measure_holdout(bundle, runner_of(bundle)).passed


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("holdout/labels.npy", np.zeros(30)),
        ("holdout/labels.npy", np.full(30, 3)),
        ("holdout/labels.npy", np.zeros(29, np.int64)),
        ("holdout/outputs.npy", np.zeros((30, 4), np.float32)),
        ("holdout/outputs.npy", np.full((30, 3), np.nan, np.float32)),
    ],
)
def test_a_sample_that_is_not_what_the_manifest_says_is_refused(tmp_path, name, array):
    with pytest.raises(BadInputError):
        measured(tmp_path / "b", changes={name: npy(array)})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"count": 31}, "holdout.count 31 for 30"),
        ({"net_lost": {}}, r"net_lost {} for 30"),
        ({"net_lost": {"fp32": 31}}, "net_lost .* for 30"),
        ({"net_lost": {"int8": 0}}, "net_lost .* for 30"),
    ],
)
def test_a_manifest_whose_sample_cannot_be_is_refused(change, said):
    manifest, _ = labelled_parts()
    sample = dataclasses.replace(manifest.holdout, **change)
    with pytest.raises(BadInputError, match=said):
        manifest_to_bytes(dataclasses.replace(manifest, holdout=sample))


def test_a_sample_without_a_measured_accuracy_is_refused():
    manifest, _ = labelled_parts()
    bare = {"fp32": dataclasses.replace(manifest.variants["fp32"], accuracy=None)}
    with pytest.raises(BadInputError, match="whose accuracy was not measured"):
        manifest_to_bytes(dataclasses.replace(manifest, variants=bare))


def test_a_manifest_without_a_sample_does_not_mention_one(tmp_path):
    data = (write_small_bundle(tmp_path / "b").path / "manifest.json").read_bytes()
    assert b"holdout" not in data
    assert manifest_from_bytes(data, bundle="b").holdout is None


def test_verify_shows_it_in_the_same_table_and_exits_by_it(tmp_path, capsys):
    from test_deploy_commands import run

    loose = dataclasses.replace(FP32, max_scaled_error=1.0, min_top1_agreement=0.0)
    for name, changes, code in (("good", {}, 0), ("bad", losing(), 1)):
        manifest, contents = labelled_parts()
        variant = dataclasses.replace(manifest.variants["fp32"], tolerance=loose)
        manifest = dataclasses.replace(manifest, variants={"fp32": variant})
        write_bundle(tmp_path / name, manifest, contents | changes)
        assert run("verify", tmp_path / name) == code
        shown = capsys.readouterr().out
        row = next(line for line in shown.splitlines() if line.startswith("hold-out  "))
        assert row.split()[-1] == ("FAIL" if code else "pass") and " 30 " in row
        assert "net loss" in shown
        assert run("verify", tmp_path / name, "--json") == code
        document = json.loads(capsys.readouterr().out)
        assert document["holdout"]["passed"] is (code == 0)
        assert all(stage["passed"] for stage in document["stages"])


def run_without(packages, *arguments):
    """The command line in a child process in which some packages cannot be imported."""
    code = f"""
import importlib.abc, sys

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {set(packages)!r}:
            raise ImportError(f"{{name}} is blocked")

sys.meta_path.insert(0, Blocker())
from edgereg.cli import main
sys.exit(main(sys.argv[1:]))
"""
    root = Path(deploy.__file__).parent.parent
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=root,
    )


BARE = ("torch", "onnx", "PIL", "matplotlib", "jsonargparse", "yaml")


def test_verify_without_pillow_checks_the_model_and_says_what_it_does_not(tmp_path):
    path = write_labelled_bundle(tmp_path / "b").path
    done = run_without(BARE, "verify", path)
    assert done.returncode == 0, done.stderr
    assert "decode stage not checked" in done.stdout and "hold-out not checked" in done.stdout
    assert done.stdout.rstrip().endswith("verified as far as it was checked")
    wrong = write_labelled_bundle(tmp_path / "w", changes=losing()).path
    done = run_without(BARE, "verify", wrong, "--json")
    assert done.returncode == 1
    document = json.loads(done.stdout)
    assert [stage["name"] for stage in document["stages"]] == ["inference"]
    assert len(document["not_checked"]) == 2 and document["holdout"] is None


def test_bench_without_pillow_times_what_is_left(tmp_path):
    path = write_labelled_bundle(tmp_path / "b").path
    done = run_without(BARE, "bench", path, "--count", "70", "--no-cold-start", "--json")
    assert done.returncode == 0, done.stderr
    (timed,) = json.loads(done.stdout)["runs"]
    assert set(timed["samples_ms"]) == {"infer", "postprocess", "end to end"}
    assert timed["check"]["passed"] is True
    done = run_without(BARE, "bench", path, "--count", "70", "--no-cold-start")
    assert "decode and preprocess are not timed: no Pillow here" in done.stdout


def test_infer_without_pillow_takes_npy_and_refuses_pictures(tmp_path):
    path = write_labelled_bundle(tmp_path / "b").path
    np.save(tmp_path / "pixels.npy", np.stack(golden_pixels(3)))
    inputs = path / "golden" / "preprocessed.npy"
    done = run_without(BARE, "infer", path, tmp_path / "pixels.npy", inputs, "--json")
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line)["top"][0]["label"] for line in done.stdout.splitlines()]
    assert answers == ["red", "green", "blue"] * 3
    done = run_without(BARE, "infer", path, path / "golden" / "0.png")
    assert done.returncode == 2 and "edgereg[image]" in done.stderr


@pytest.fixture(scope="module")
def request_():
    rng = np.random.default_rng(1)
    pictures = list(rng.integers(0, 256, (90, 20, 24, 3), np.uint8))
    labels = [i % 4 for i in range(90)]
    return ExportRequest(
        name="shapes",
        target="onnxruntime-x86",
        labels=CLASSES,
        preprocessing=Preprocessing(16, 16, "stretch", 1.0, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)),
        golden_images=[encode_png(image) for image in pictures[:64]],
        holdout=(pictures, labels),
        sample={i: encode_png(pictures[i]) for i in range(3, 90, 3)},
    )


def test_an_export_carries_the_sample_and_the_device_finds_the_same(request_, tmp_path):
    paths = [tmp_path / name for name in ("a.bundle", "b.bundle")]
    for path in paths:
        export_bundle(randomized(small_cnn()), path, request=request_)
    files = [
        {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*") if p.is_file()}
        for path in paths
    ]
    assert files[0] == files[1]
    bundle = open_bundle(paths[0])
    sample = bundle.manifest.holdout
    assert sample.count == 29 and sample.net_lost == {"fp32": 0}
    assert bundle.read(sample.images[1]) == request_.sample[6]
    assert bundle.array(sample.labels).tolist() == [i % 4 for i in range(3, 90, 3)]
    report = verify(bundle, runner_of(bundle), with_holdout=True)
    assert report.passed and report.holdout.paired.count == 29


@pytest.mark.parametrize("sample", [{90: b""}, {-1: b""}, dict.fromkeys(range(2001), b"")])
def test_an_export_refuses_a_sample_that_is_not_of_its_held_out_images(request_, sample, tmp_path):
    request = dataclasses.replace(request_, sample=sample)
    with pytest.raises(BadInputError, match="at most 2000 of its held-out images"):
        export_bundle(randomized(small_cnn()), tmp_path / "x", request=request)


EMOJI = Emoji10(vendor="twitter", split="test")


@pytest.mark.parametrize(("wanted", "count"), [(None, 248), (0, 0), (5, 5)])
def test_a_sample_is_drawn_at_random_from_the_judged_images(wanted, count):
    drawn = np.random.default_rng(0).permutation(len(EMOJI))
    sample = ship._sample(EMOJI, drawn, True, wanted)
    held_out = np.sort(drawn)
    assert len(sample) == count
    for place, data in sample.items():
        assert data == EMOJI.encoded(int(held_out[place]))
    if count == 5:
        assert {int(held_out[place]) for place in sample} == set(drawn[:5].tolist())


def test_a_sample_of_large_images_is_smaller_unless_it_is_asked_for(monkeypatch):
    drawn = np.arange(len(EMOJI))
    size = sum(len(EMOJI.encoded(i)) for i in range(3))
    monkeypatch.setattr(ship, "MAX_SAMPLE_BYTES", size)
    assert sorted(ship._sample(EMOJI, drawn, True, None)) == [0, 1, 2]
    assert len(ship._sample(EMOJI, drawn, True, 4)) == 4


def test_without_labels_there_is_no_sample_and_asking_for_one_is_refused():
    drawn = np.arange(len(EMOJI))
    assert ship._sample(EMOJI, drawn, False, None) == {}
    for has_labels, wanted in ((False, 1), (True, 249)):
        with pytest.raises(DataError, match="labelled held-out images"):
            ship._sample(EMOJI, drawn, has_labels, wanted)
