"""What the benchmark times as a peer's way from JPEG to answer is the same work as ours."""

import sys
import time
from pathlib import Path

import numpy as np
import pytest
from deploy_bundle import LABELS, SPEC, write_small_bundle

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))

import picture_speed
from end_to_end import jpegs, ours_end_to_end, usual_end_to_end
from peers import Ready

from deploy.runtime.decode import decode
from deploy.runtime.preprocess import Preprocessing, preprocess
from deploy.runtime.runner import open_runner
from edgereg.data.images import open_images

IDENTITY = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


@pytest.fixture(scope="module")
def photos():
    return open_images("emoji-10:both:test")


def levels_apart(files, spec, theirs):
    """How many grey levels what a peer's network is shown differs from what ours is."""
    shown = []

    def run(images):
        shown.append(images)
        return np.zeros((len(images), 10), np.float32)

    usual_end_to_end(Ready(run, "fp32"), files, theirs)()
    ours = preprocess([decode(data, name="a photograph") for data in files], spec)
    assert shown[0].shape == ours.shape and shown[0].dtype == ours.dtype
    return 255 * np.abs(shown[0] - ours).max()


@pytest.mark.parametrize(("resize", "fraction"), [("stretch", 1.0), ("cover", 0.875)])
@pytest.mark.parametrize("size", [32, 60, 224])  # of 60 / 0.875 = 68.6 the two roundings differ
def test_a_peers_network_is_shown_the_same_picture(photos, size, resize, fraction):
    spec = Preprocessing(size, size, resize, fraction, *IDENTITY)
    files = jpegs(photos, 2, spec)
    assert levels_apart(files, spec, spec) <= 1.01
    other = Preprocessing(size, size, "cover", 0.7, *IDENTITY)
    assert levels_apart(files, spec, other) > 10  # the control


def test_a_peer_answers_with_the_same_class_and_probability(photos, tmp_path):
    bundle = write_small_bundle(tmp_path / "small.bundle")
    runner = open_runner(bundle, backend="onnxruntime", precision="fp32", threads=1)
    files = jpegs(photos, 10, SPEC)
    ours = ours_end_to_end(bundle.path, Ready(runner, "fp32"), files)()
    theirs = usual_end_to_end(Ready(runner, "fp32"), files, SPEC)()
    assert len(ours) == len(theirs) == 10
    for ((label, probability),), (place, other) in zip(ours, theirs, strict=True):
        assert label == LABELS[place]
        assert probability == pytest.approx(other, abs=0.01)


@pytest.mark.parametrize(("delay_s", "code"), [(0.0, 0), (0.05, 1)])
def test_picture_speed_fails_where_ours_is_slow(monkeypatch, capsys, delay_s, code):
    def slowed(images, spec):
        end = time.thread_time() + delay_s
        while time.thread_time() < end:
            pass
        return preprocess(images, spec)

    monkeypatch.setattr(picture_speed, "_CASES", ((8, 16, 16, 6),))
    monkeypatch.setattr(picture_speed, "_FLOOR", 0.1)  # a machine's noise is not the question
    monkeypatch.setattr(picture_speed, "preprocess", slowed)
    monkeypatch.setattr(sys, "argv", ["picture_speed.py"])
    assert picture_speed.main() == code
    assert f"{2 * code} of 2 below" in capsys.readouterr().out
