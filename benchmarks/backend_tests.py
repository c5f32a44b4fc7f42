"""ONNX's own backend tests, of the operators that a bundle may have, through our reader and runner.

    python benchmarks/backend_tests.py              all of them, against backend_tests.txt
    python benchmarks/backend_tests.py --quick      those of some operators of vision
    python benchmarks/backend_tests.py --write      note what is found as what is expected

The models, inputs and expected outputs are those that the package onnx ships: its tests of single
operators, and its exports of PyTorch's layers. A test is taken if each of its nodes is one that
`allow_list.py` names. It is made what a bundle's model is: one input, the first; the others are
weights; one output, each in turn. Opsets below 17 and above 23 are brought to these by onnx's
converter, where it can. What the device's reader takes is run by the session and the binding of our
runner for ONNX Runtime, and compared at the tolerance of onnx's own runner.

Each test passes, is refused by our reader, or ends otherwise, with the reason. Exits with 1 where a
test ends otherwise than backend_tests.txt says, where the two do not name the same tests, or where
one that is not refused fails without an entry in EXPLAINED.
"""

import argparse
import importlib
import pkgutil
import re
import sys
import warnings
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper, version_converter
from setting import describe_setting

from deploy.bundle.allow_list import OPERATORS, OPSETS
from deploy.bundle.onnx_structure import structural_problem
from deploy.errors import BadInputError
from deploy.runtime.ort_runner import open_session, run_bound, runtime_name

__all__ = [
    "EXPECTED",
    "EXPLAINED",
    "VISION",
    "Case",
    "differences",
    "node_cases",
    "outcome",
    "pytorch_cases",
    "read_expected",
    "unexplained",
    "versions",
]

EXPECTED = Path(__file__).with_suffix(".txt")
VISION = (
    *("averagepool", "conv", "convtranspose", "depthtospace", "globalaveragepool", "hardswish"),
    *("layernormalization", "maxpool", "qlinearconv", "relu", "resize", "softmax"),
)
"""Modules of onnx with the tests of some operators, for a short run."""

EXPLAINED = {
    "test_attention_4d_causal_fp16 differs: .*": "two spacings of fp16, of which onnx allows one",
    "test_attention_4d_with_past.*_mask_causal differs: .*": "masked scores, which are an output "
    "there, are the lowest float32 to ONNX Runtime, and not minus infinity",
    "test_resize_downsample_scales_(cubic|linear)_align_corners differs: .*": "where scale times "
    "size is no integer, ONNX Runtime takes corners of the size in whole pixels",
    "test_PReLU_.*_multiparam not run: .*": "a slope for each channel lay along axis 1 in opset "
    "6; from 7 on it lies along the last, and onnx's converter leaves it as it is",
    ".* not loaded: .*Could not find an implementation .*": "ONNX Runtime has no such kernel for "
    "these types on the CPU",
    "test_(gru|lstm|simple_rnn)_batchwise not loaded: .*": "ONNX Runtime has no such layout",
    "test_convinteger_with_padding not run: .*": "ONNX Runtime wants one zero point",
    "test_reduce_max_empty_set_bool not run: .*": "ONNX Runtime has no least bool",
}
"""Why tests that we do not refuse do not pass: of a test and its end, as a pattern."""

_NODES = "onnx.backend.test.case.node"
_FROM_PYTORCH = ("pytorch-converted", "pytorch-operator")
_NOT_CONVERTED = (RuntimeError, version_converter.ConvertError, onnx.shape_inference.InferenceError)
_IR_VERSION = 10
_LONGEST_REASON = 160


@dataclass(frozen=True)
class Case:
    """One test: a model, what it is given, and what it should answer.

    Attributes:
        name: As onnx calls it.
        model: As onnx ships it.
        inputs: In the order of the model's inputs.
        outputs: In the order of its outputs.
        rtol: How far an answer may be off, relative to what is expected.
        atol: What may be added to that.
    """

    name: str
    model: onnx.ModelProto
    inputs: Sequence[Any]
    outputs: Sequence[Any]
    rtol: float
    atol: float


def node_cases(modules: Collection[str] | None = None) -> list[Case]:
    """The tests of single operators in onnx's modules, or in some of them, that are taken."""
    package = importlib.import_module(_NODES)
    names = {module.name for module in pkgutil.iter_modules(package.__path__)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some divide by zero, as they are to
        for name in sorted(names if modules is None else modules):
            importlib.import_module(f"{_NODES}.{name}")
    return [
        Case(case.name, case.model, *map(_arrays, case.data_sets[0]), case.rtol, case.atol)
        for case in package._NodeTestCases
        if _is_taken(case.model)
    ]


def _arrays(values: Sequence[Any]) -> list[Any]:
    """Some tests hand over tensors as messages; what is no tensor stays what it is."""
    messages = onnx.TensorProto
    return [numpy_helper.to_array(v) if isinstance(v, messages) else v for v in values]


def pytorch_cases() -> Iterator[Case]:
    """The exports of PyTorch's layers that are taken; each of them has one set of data."""
    loader = importlib.import_module("onnx.backend.test.loader")
    for kind in _FROM_PYTORCH:
        for found in loader.load_model_tests(kind=kind):
            folder = Path(found.model_dir)
            model = onnx.load(folder / "model.onnx")
            if _is_taken(model):
                inputs, outputs = (
                    [
                        numpy_helper.to_array(onnx.load_tensor(path))
                        for path in sorted(folder.glob(f"test_data_set_0/{what}_*.pb"), key=_place)
                    ]
                    for what in ("input", "output")
                )
                yield Case(found.name, model, inputs, outputs, found.rtol, found.atol)


def _is_taken(model: onnx.ModelProto) -> bool:
    return all(node.op_type in OPERATORS and not node.domain for node in model.graph.node)


def _place(path: Path) -> int:
    return int(path.stem.rpartition("_")[2])


def outcome(case: Case) -> str:
    """Say how a test ends: "passes", or why not."""
    model = _of_known_opset(case.model)
    names = {weight.name for weight in model.graph.initializer}
    inputs = [value.name for value in model.graph.input if value.name not in names]
    given = dict(zip(inputs, case.inputs, strict=True))
    for output, expected in zip(model.graph.output, case.outputs, strict=True):
        end = _run(_as_exported(model, given, output), given, output.name, expected, case)
        if end != "passes":
            return end
    return "passes"


def _of_known_opset(model: onnx.ModelProto) -> onnx.ModelProto:
    """Bring a model to an opset that the reader takes; one that cannot be brought stays."""
    version = max(entry.version for entry in model.opset_import)
    target = min(max(version, OPSETS[0]), OPSETS[-1])
    if version != target:
        try:
            model = version_converter.convert_version(model, target)
        except _NOT_CONVERTED:  # to be refused for its opset
            return model
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    copy.ir_version = _IR_VERSION
    return copy


def _as_exported(
    model: onnx.ModelProto, given: dict[str, Any], output: onnx.ValueInfoProto
) -> onnx.ModelProto:
    """Keep the first input and one output; make weights of the other inputs."""
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    others = list(given)[1:]
    weights = [name for name in others if isinstance(given[name], np.ndarray | np.generic)]
    kept = [value for value in model.graph.input if value.name in given.keys() - set(weights)]
    del changed.graph.input[:], changed.graph.output[:]
    changed.graph.input.extend(kept)
    changed.graph.output.append(output)
    changed.graph.initializer.extend(
        numpy_helper.from_array(np.asarray(given[name]), name) for name in weights
    )
    return changed


def _run(
    model: onnx.ModelProto, given: dict[str, Any], output: str, expected: Any, case: Case
) -> str:
    data = model.SerializeToString()
    problem = structural_problem(data)
    if problem is not None:
        return _reason("refused", problem)
    name, expected = model.graph.input[0].name, np.asarray(expected)
    answer = np.full(expected.shape, 85, expected.dtype)  # not what most expect
    try:
        session = open_session(data, file=case.name, threads=1)
        binding = session.io_binding()
        run_bound(
            session, binding, inputs={name: np.asarray(given[name])}, outputs={output: answer}
        )
    except BadInputError as error:
        return _reason("not loaded", error.found)
    except Exception as error:  # ONNX Runtime's share no documented base
        return _reason("not run", str(error))
    return _difference(answer, expected, case)


def _difference(answer: np.ndarray, expected: np.ndarray, case: Case) -> str:
    is_close = np.isclose(answer, expected, rtol=case.rtol, atol=case.atol, equal_nan=True)
    if is_close.all():
        return "passes"
    return f"differs: {int((~is_close).sum())} of {is_close.size} values"


def _reason(kind: str, text: str) -> str:
    """A reason on one line, without the places in ONNX Runtime's own source."""
    text = " ".join(text.split())
    for before in ("ONNX Runtime says: ", " : FAIL : ", "Status Message: ", "was false. "):
        text = text.rpartition(before)[2]
    return f"{kind}: {text[:_LONGEST_REASON]}"


def unexplained(found: dict[str, str]) -> list[str]:
    """The tests that neither pass nor are refused, and of which EXPLAINED does not say why."""
    return [
        f"{name}: {end}; unexplained"
        for name, end in sorted(found.items())
        if not end.startswith(("passes", "refused: "))
        and not any(re.fullmatch(pattern, f"{name} {end}") for pattern in EXPLAINED)
    ]


def differences(found: dict[str, str], expected: dict[str, str], *, is_all: bool) -> list[str]:
    """What is not as expected, one line each.

    Args:
        found: How each test ended, by its name.
        expected: How it should.
        is_all: Whether every test that is expected should have been run.
    """
    names = sorted(found.keys() | (expected.keys() if is_all else set()))
    return [
        f"{name}: {found.get(name, 'not there')}; expected: {expected.get(name, 'not there')}"
        for name in names
        if found.get(name) != expected.get(name)
    ]


def read_expected() -> tuple[str, dict[str, str]]:
    """The versions that the list holds for, and how each test should end."""
    versions, *lines = EXPECTED.read_text("utf-8").splitlines()
    return versions, dict(line.split(" ", 1) for line in lines)


def versions() -> str:
    """What decides over how a test ends."""
    return f"onnx {onnx.__version__}, {runtime_name()}"


def main() -> int:
    """Run them, and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="those of some operators of vision")
    parser.add_argument("--write", action="store_true", help="write what is found as expected")
    args = parser.parse_args()
    print(describe_setting())
    cases = node_cases(VISION) if args.quick else [*node_cases(), *pytorch_cases()]
    found = {case.name: outcome(case) for case in cases}
    for kind, count in sorted(Counter(end.partition(":")[0] for end in found.values()).items()):
        print(f"{count:6} {kind}")
    if args.write:
        lines = [versions(), *(f"{name} {end}" for name, end in sorted(found.items()))]
        EXPECTED.write_text("\n".join(lines) + "\n", "utf-8")
        return 0
    held_for, expected = read_expected()
    if held_for != versions():
        print(f"the list is for {held_for}; here is {versions()}")
    wrong = differences(found, expected, is_all=not args.quick) + unexplained(found)
    if "passes" not in found.values():
        wrong.append("no test passes")
    print("\n".join(wrong) or "all as expected")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
