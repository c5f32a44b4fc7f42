"""What NVIDIA's parser and builder say of each model, for each Jetson, in each precision.

    python benchmarks/conformance.py --out OUT --report docs/conformance.md
    python benchmarks/conformance.py --quick

The weights are random, fitted to images so that the output depends on them: this is about operators
and types, and the errors are those of rounding. Whether int8 costs accuracy takes a trained model.
Targets for which the same bytes are judged by the same proxy share a verdict.
Rows are kept in OUT/rows.jsonl; a run that was stopped goes on.
"""

import argparse
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from randomize import images, randomize
from setting import describe_setting
from torch import nn

from deploy.bundle.manifest import Tolerance
from deploy.errors import BadInputError, CheckFailedError
from deploy.measure.compare import compare
from export.onnx_file.conformance import judge
from export.onnx_file.gates import assert_exportable
from export.onnx_file.to_onnx import to_onnx
from export.passes.simplify import simplify
from export.precision.mixed_precision import to_fp16
from export.precision.sensitivity import quantize_until
from export.precision.variants import open_variant
from export.targets import TARGETS, Precision, Target

PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "int8")
_ANY = Tolerance(max_scaled_error=1.0, min_top1_agreement=0.0, reason="measured, not judged")
_CALIBRATION, _JUDGED = 16, 8  # images


def main() -> int:
    """Run the models that have no row yet, print the table, and say whether all is accepted."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", help="names of models, such as ResNet-18,Swin-T")
    parser.add_argument("--report", type=Path, help="the table, in Markdown")
    parser.add_argument("--quick", action="store_true", help="our CNN for one target")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # what torch and timm say of their own code
    with tempfile.TemporaryDirectory() as folder:
        out = args.out or Path(folder)
        out.mkdir(parents=True, exist_ok=True)
        rows = _run(args, out / "rows.jsonl")
    text = _table(rows)
    print(text)
    if args.report is not None:
        args.report.write_text(text, "utf-8")
    refused = [row for row in rows if row["verdict"] != "accepted"]
    print(f"{len(rows) - len(refused)} of {len(rows)} accepted")
    return 1 if refused else 0


def models() -> dict[str, tuple[int, Callable[[], nn.Module]]]:
    """Return each model's usual image size, and what builds it."""
    import timm
    import torchvision

    from edgereg.models.zoo import ModelConfig, build_model

    def ours(name: str) -> Callable[[], nn.Module]:
        return lambda: build_model(ModelConfig(name=name), num_classes=10)

    def tv(name: str) -> Callable[[], nn.Module]:
        return lambda: torchvision.models.get_model(name)

    def of_timm(name: str) -> Callable[[], nn.Module]:
        return lambda: timm.create_model(name)

    return {
        "our CNN": (32, ours("convnet")),
        "our transformer": (32, ours("vit")),
        "ResNet-18": (224, tv("resnet18")),
        "ResNet-50": (224, tv("resnet50")),
        "MobileNetV3-L": (224, tv("mobilenet_v3_large")),
        "EfficientNet-B0": (224, tv("efficientnet_b0")),
        "ConvNeXt-T": (224, tv("convnext_tiny")),
        "ViT-Ti": (224, of_timm("vit_tiny_patch16_224")),
        "ViT-S": (224, of_timm("vit_small_patch16_224")),
        "Swin-T": (224, tv("swin_t")),
        "RepVGG-A0": (224, of_timm("repvgg_a0")),
        "MobileOne-S0": (224, of_timm("mobileone_s0")),
    }


def _run(args: argparse.Namespace, path: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    done = {row["model"] for row in rows}
    chosen = models()
    names = ["our CNN"] if args.quick else args.only.split(",") if args.only else [*chosen]
    targets = [target for target in TARGETS.values() if target.proxy]
    if args.quick:
        targets = [TARGETS["jetpack6.2"]]
    for name in names:
        if name in done:
            continue
        size, build = chosen[name]
        print(f"conformance: {name}", file=sys.stderr, flush=True)
        new = _measure(name, build(), size, targets)
        with path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in new)
        rows += new
    return rows


def _measure(name: str, model: nn.Module, size: int, targets: list[Target]) -> list[dict[str, Any]]:
    randomize(model, images(8, size, seed=0))
    x = images(_CALIBRATION + _JUDGED, size, seed=1)
    inputs, judged = x[:_CALIBRATION].numpy(), x[_CALIBRATION:].numpy()
    with torch.no_grad():
        reference = model(x[_CALIBRATION:]).numpy()
    simple = simplify(model, (x[:2],)).model
    rows, files, verdicts = [], {}, {}
    for target in targets:
        if target.opset not in files:
            fp32 = to_onnx(simple, (x[:2],), target=target)
            files[target.opset] = {p: _make(p, fp32, target, inputs) for p in PRECISIONS}
        for precision in PRECISIONS:
            file, seconds, more = files[target.opset][precision]
            key = (target.opset, target.proxy, precision)
            if key not in verdicts:
                verdicts[key] = _judge(file, target)
            verdict, said, judging = verdicts[key]
            scaled = compare(open_variant(precision, file, target)(judged), reference, _ANY)
            rows.append(
                {
                    "model": name,
                    "target": target.name,
                    "precision": precision,
                    "verdict": verdict,
                    "said": said,
                    "error": scaled.max_scaled_error,
                    "nodes": len(onnx.load_model_from_string(file).graph.node),
                    "size": len(file),
                    "make_s": seconds,
                    "judge_s": judging,
                    "more": more,
                }
            )
    return rows


def _make(
    precision: Precision, fp32: bytes, target: Target, inputs: NDArray[np.float32]
) -> tuple[bytes, float, str]:
    begun = time.perf_counter()
    file, more = fp32, ""
    if precision == "fp16":
        mixed = to_fp16(fp32, inputs)
        file, more = mixed.model, f"{len(mixed.islands)} nodes in fp32" if mixed.islands else ""
    if precision == "int8":
        quantized = quantize_until(
            fp32,
            [inputs[_CALIBRATION // 4 :]],
            scheme=target.scheme,
            held_back=inputs[: _CALIBRATION // 4],
            is_good=lambda file: True,
        )
        file, more = quantized.model, f"{quantized.method}, {quantized.sqnr_db:.0f} dB"
    return file, time.perf_counter() - begun, more


def _judge(file: bytes, target: Target) -> tuple[str, str, float]:
    begun = time.perf_counter()
    try:
        assert_exportable(file, target)
        verdict = judge(file, target)
        said = f"{verdict.verdict}", verdict.judge
    except (BadInputError, CheckFailedError) as error:
        said = "refused", error.found
    return *said, time.perf_counter() - begun


def _table(rows: list[dict[str, Any]]) -> str:
    setting = describe_setting()
    versions = ", ".join(f"{name} {number}" for name, number in setting["versions"].items())
    accepted = sum(row["verdict"] == "accepted" for row in rows)
    judges = ", ".join(sorted({row["said"] for row in rows if row["verdict"] == "accepted"}))
    lines = [
        "# Conformance: what NVIDIA's parser and builder accept",
        "",
        f"    {setting['command']}",
        "",
        f"{setting['machine']}, Python {setting['python']}, {versions}. Judge: {judges}, on the "
        "CPU, for the proxy of each",
        "board's GPU; no Jetson was at hand, and nothing was run on one. Random weights, fitted to "
        "images; batch 1.",
        "",
        f"**{accepted} of {len(rows)} accepted.**",
        "",
        "*error*: largest difference to the PyTorch model's outputs over their range, on "
        f"{_JUDGED} images; fp16 and int8 emulated.",
        "int8: all layers with weights, the method by measurement, SQNR of the logits. *s*: to "
        "make the file, and to judge it, on one core.",
        "",
        "| model | target | precision | verdict | error | nodes | MB | s | |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        said = row["more"] if row["verdict"] == "accepted" else row["said"].replace("|", "/")
        lines.append(
            f"| {row['model']} | {row['target']} | {row['precision']} | {row['verdict']} "
            f"| {row['error']:.1e} | {row['nodes']} | {row['size'] / 1e6:.1f} "
            f"| {row['make_s']:.0f} + {row['judge_s']:.0f} | {said} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
