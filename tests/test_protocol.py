import dataclasses
import json
import math

import numpy as np
import pytest
from deploy_bundle import SIZE, bundle_parts
from hypothesis import given, settings
from hypothesis import strategies as st

from deploy.bundle.manifest import TensorSpec
from deploy.service.protocol import (
    HEADER_LENGTH,
    ProtocolError,
    infer_response,
    model_metadata,
    parse_infer,
)

MANIFEST, _ = bundle_parts()
ONE = (1, 3, SIZE, SIZE)


def tensor(**changes):
    data = np.zeros(ONE, np.float32).ravel().tolist()
    return {"name": "images", "shape": list(ONE), "datatype": "FP32", "data": data} | changes


def body(inputs=None, **changes):
    return json.dumps({"inputs": [tensor()] if inputs is None else inputs} | changes).encode()


def parse(data, header_length=None, manifest=MANIFEST):
    return parse_infer(data, header_length=header_length, manifest=manifest)


def binary(array, *, size=None, extra=b"", **changes):
    data = array.astype("<f4").tobytes() + extra
    size = len(data) if size is None else size
    document = tensor(shape=list(array.shape), parameters={"binary_data_size": size})
    del document["data"]
    head = json.dumps({"inputs": [document]} | changes).encode()
    return head + data, str(len(head))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 16), st.integers(0, 2**32 - 1), st.booleans(), st.booleans())
def test_a_tensor_comes_and_goes_as_it_was(count, seed, as_bytes, is_nested):
    rng = np.random.default_rng(seed)
    array = rng.normal(size=(count, 3, SIZE, SIZE)).astype(np.float32)
    if as_bytes:
        request = parse(*binary(array))
    else:
        data = array.tolist() if is_nested else array.ravel().tolist()
        request = parse(body([tensor(shape=list(array.shape), data=data)]))
    assert request.batch.dtype == np.float32 and np.array_equal(request.batch, array)


@pytest.mark.parametrize("wants", [True, False])
def test_an_answer_says_what_it_answers(wants):
    outputs = np.array([[0.1, -2.0, 3.5], [1e-9, 0.0, 7.0]], np.float32)
    request = parse(body(id="x", parameters={"binary_data_output": wants}))
    headers, data = infer_response(outputs, request, manifest=MANIFEST)
    end = int(headers.get(HEADER_LENGTH, len(data)))
    document = json.loads(data[:end])
    (found,) = document["outputs"]
    assert (document["model_name"], document["id"]) == ("colours", "x")
    assert (found["name"], found["datatype"], found["shape"]) == ("logits", "FP32", [2, 3])
    if wants:
        assert found["parameters"] == {"binary_data_size": 24} and "data" not in found
        back = np.frombuffer(data[end:], "<f4")
    else:
        back = np.array(found["data"], np.float32)
    assert np.array_equal(back, outputs.ravel())


def test_what_is_asked_of_one_output_goes_before_what_is_asked_of_all():
    outputs = [{"name": "logits", "parameters": {"binary_data": False}}]
    request = parse(body(outputs=outputs, parameters={"binary_data_output": True}))
    assert request.wants_binary is False and request.request_id is None
    assert parse(body(outputs=[])).wants_binary is False


def test_unknown_parameters_and_keys_are_left_alone():
    assert parse(body(parameters={"priority": 3}, extra=1)).batch.shape == ONE


def test_metadata_name_the_free_batch_minus_one():
    said = model_metadata(MANIFEST, precision="fp16", backend="onnxruntime 1.2 CPU")
    assert said["name"] == "colours" and said["platform"] == "onnxruntime_fp16"
    assert said["inputs"] == [{"name": "images", "datatype": "FP32", "shape": [-1, 3, 8, 8]}]
    assert said["outputs"] == [{"name": "logits", "datatype": "FP32", "shape": [-1, 3]}]


NUMBERS = math.prod(ONE)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "must be JSON"),
        (b"\xff\xfe", "must be JSON"),
        (b"[" * 100_000, "must be JSON"),
        (b"[]", "must be a JSON object"),
        (b"{}", "a list of one tensor"),
        (body(inputs={}), "a list of one tensor"),
        (body(inputs=[]), "a list of one tensor"),
        (body(inputs=[tensor(), tensor()]), "a list of one tensor"),
        (body(inputs=["images"]), "a list of one tensor"),
        (body(inputs=[tensor(name="x")]), "is called 'images'"),
        (body(inputs=[tensor(datatype="FP64")]), "is FP32"),
        (body(inputs=[tensor(datatype=None)]), "is FP32"),
        (body(inputs=[tensor(shape=None)]), r"\[1 to 16, 3, 8, 8\]"),
        (body(inputs=[tensor(shape=[0, 3, 8, 8])]), r"\[1 to 16, 3, 8, 8\]"),
        (body(inputs=[tensor(shape=[17, 3, 8, 8])]), r"\[1 to 16, 3, 8, 8\]"),
        (body(inputs=[tensor(shape=[-1, 3, 8, 8])]), r"\[1 to 16, 3, 8, 8\]"),
        (body(inputs=[tensor(shape=[True, 3, 8, 8])]), r"\[1 to 16, 3, 8, 8\]"),
        (body(inputs=[tensor(shape=[1.0, 3, 8, 8])]), r"\[1 to 16, 3, 8, 8\]"),
        (body(inputs=[tensor(shape=[1, 3, 8])]), r"\[1 to 16, 3, 8, 8\]"),
        (body(inputs=[tensor(shape=[10**30, 3, 8, 8])]), r"\[1 to 16, 3, 8, 8\]"),
        (body(inputs=[tensor(data=None)]), "no list of data"),
        (body(inputs=[tensor(data=[])]), "has shape"),
        (body(inputs=[tensor(data=[0.0] * 191)]), r"has shape \[191\]"),
        (body(inputs=[tensor(data=[[0.0], [0.0, 1.0]])]), "is no array"),
        (body(inputs=[tensor(data=["1"] * NUMBERS)]), "must be numbers"),
        (body(inputs=[tensor(data=[True] * NUMBERS)]), "must be numbers"),
        (body(inputs=[tensor(data=[None] * NUMBERS)]), "must be numbers"),
        (body(inputs=[tensor(data=[10**400] * NUMBERS)]), "must be numbers"),
        (body(inputs=[tensor(data=[1e39] * NUMBERS)]), "must be finite"),
        (body().replace(b"0.0", b"NaN", 1), "NaN is no JSON number"),
        (body(id=7), "an id is a string"),
        (body(id="x" * 1025), "an id is a string"),
        (body(parameters=[]), "parameters must be an object"),
        (body(parameters={"binary_data_output": 1}), "must be true or false"),
        (body(outputs=[{"name": "x"}]), "outputs must be a list of one"),
        (body(outputs="logits"), "outputs must be a list of one"),
        (body(inputs=[tensor(parameters={"binary_data_size": 768})]), "data and binary_data_size"),
    ],
    ids=lambda value: value[:40].decode("latin-1") if isinstance(value, bytes) else value,
)
def test_what_is_wrong_is_said(data, said):
    with pytest.raises(ProtocolError, match=said) as caught:
        parse(data)
    assert caught.value.status == 400


@pytest.mark.parametrize("length", ["-1", "x", "", "1e3", "9" * 40, "99999", "\u0663"])
def test_a_header_length_that_is_no_part_of_the_body_is_refused(length):
    with pytest.raises(ProtocolError, match=HEADER_LENGTH):
        parse(body(), length)


@pytest.mark.parametrize("size", [0, 767, 769, "768", 768.0, True, 1e99])
def test_bytes_that_are_not_the_tensors_are_refused(size):
    array = np.zeros(ONE, np.float32)
    with pytest.raises(ProtocolError, match="768 bytes after the JSON"):
        parse(*binary(array, extra=b"x"))
    data, length = binary(array, size=size)
    with pytest.raises(ProtocolError, match="768 bytes after the JSON"):
        parse(data, length)
    plain = body()
    with pytest.raises(ProtocolError, match="belong to no tensor"):
        parse(plain + b"12", str(len(plain)))


def test_bytes_that_are_no_finite_numbers_are_refused():
    with pytest.raises(ProtocolError, match="must be finite"):
        parse(*binary(np.full(ONE, np.nan, np.float32)))


def test_pixels_are_whole_numbers_from_0_to_255():
    pixels = dataclasses.replace(
        MANIFEST, inputs=(TensorSpec("images", "uint8", ("batch", 2, 2, 3)),)
    )

    def ask(data):
        wanted = tensor(shape=[1, 2, 2, 3], datatype="UINT8", data=data)
        return parse(body([wanted]), manifest=pixels).batch

    assert ask(list(range(244, 256))).dtype == np.uint8
    for wrong in ([0.5] * 12, [256] * 12, [-1] * 12, [1.0] * 12):
        with pytest.raises(ProtocolError):
            ask(wrong)
