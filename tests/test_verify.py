import io
import json

import numpy as np
import pytest
from deploy_bundle import bundle_parts, linear_onnx, npy, write_small_bundle
from PIL import Image

from deploy.bundle.read import open_bundle
from deploy.bundle.write import write_bundle
from deploy.errors import BadInputError
from deploy.measure.verify import verify
from deploy.runtime.runner import open_runner


def run(bundle, **options):
    return verify(bundle, open_runner(bundle, backend="onnxruntime", precision="fp32"), **options)


def outcome(report):
    return {stage.name: stage.comparison.passed for stage in report.stages}


def test_a_right_bundle_passes_every_stage(tmp_path):
    told = []
    report = run(write_small_bundle(tmp_path / "b"), on_progress=told.append)
    assert report.passed
    assert outcome(report) == {"decode+preprocess": True, "inference": True, "end to end": True}
    assert report.stages[0].comparison.max_abs_error == 0
    assert told[-1] == "6 of 6 images"


def test_a_wrong_model_fails_inference_and_the_end_but_not_the_first_stage(tmp_path):
    model = linear_onnx(np.eye(3) + 0.11)
    report = run(write_small_bundle(tmp_path / "b", **{"model.fp32.onnx": model}))
    assert not report.passed
    assert outcome(report) == {"decode+preprocess": True, "inference": False, "end to end": False}


def test_a_wrong_tensor_fails_the_stages_that_meet_it(tmp_path):
    _, contents = bundle_parts()
    tensor = np.load(io.BytesIO(contents["golden/preprocessed.npy"]))
    tensor[0, 0, 0, 0] += 1e-6 + abs(tensor[0, 0, 0, 0]) * 1e-6
    bundle = write_small_bundle(tmp_path / "b", **{"golden/preprocessed.npy": npy(tensor)})
    # The smallest difference fails the first stage, and is far below the others' tolerance.
    assert outcome(run(bundle)) == {
        "decode+preprocess": False,
        "inference": True,
        "end to end": True,
    }


def test_swapped_golden_outputs_fail(tmp_path):
    _, contents = bundle_parts()
    outputs = np.load(io.BytesIO(contents["golden/outputs.npy"]))[::-1]
    report = run(write_small_bundle(tmp_path / "b", **{"golden/outputs.npy": npy(outputs)}))
    assert outcome(report)["decode+preprocess"] and not outcome(report)["end to end"]


def test_golden_outputs_of_another_shape_are_a_bad_input(tmp_path):
    bundle = write_small_bundle(tmp_path / "b", **{"golden/outputs.npy": npy(np.zeros((6, 2)))})
    with pytest.raises(BadInputError, match="same shape"):
        run(bundle)


def jpeg(image):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=100, subsampling=0)
    return buffer.getvalue()


def test_images_coded_with_loss_are_allowed_what_their_decoders_differ_by(tmp_path):
    manifest, contents = bundle_parts(encode=jpeg, suffix="jpg")
    # The stored tensor comes from the exact pixels: a stand-in for another decoder's.
    write_bundle(tmp_path / "b", manifest, contents)
    report = run(open_bundle(tmp_path / "b"))
    assert report.passed
    assert report.stages[0].comparison.max_abs_error > 0
    assert "decoders differ" in report.stages[0].tolerance.reason
    assert report.stages[1].tolerance == manifest.variants["fp32"].tolerance
    assert report.stages[2].tolerance.max_scaled_error == 0.1


def test_a_report_is_plain_json(tmp_path):
    report = run(write_small_bundle(tmp_path / "b"))
    document = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert document["passed"] is True
    assert [stage["count"] for stage in document["stages"]] == [6, 6, 6]
