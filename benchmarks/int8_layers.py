"""Which layers are worth int8 on this CPU: the export's choice beside simpler ones, in turns.

    python benchmarks/int8_layers.py            our networks and 23 of torchvision and timm
    python benchmarks/int8_layers.py --quick    our CNN and MobileNetV2, a minute
    python benchmarks/int8_layers.py --worst    the choice turned round: it must then fail

*all* has every layer in int8, *48* those whose matrix product has 48 rows and columns or more,
*parted* those that export/precision/partition.py leaves there. One thread, batch 1, random weights
with the BatchNorm statistics of emoji-10, ranges by min and max of four of its images; a ratio is
fp32's time / this one's, the median of the rounds, with its 95 % interval. The SQNR is of the
logits of one image against fp32's, and tells choices of one network apart, no more.

The figures of partition.py are one machine's, chosen with most of these networks in sight: this
says whether they hold for the others, and for another machine. Exits with 1
where *parted* takes more than 1.05 times as long as the best of the others.
"""

import argparse
import json
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from rounds import ratio_of, time_rounds
from setting import describe_setting
from subjects import TARGET, fit_statistics

from deploy.runtime.preprocess import Preprocessing, preprocess
from edgereg.data.images import open_images
from edgereg.models.zoo import ModelConfig, build_model
from export.onnx_file.blocks import keep_blocks
from export.onnx_file.run_onnx import open_session
from export.onnx_file.to_onnx import to_onnx
from export.passes.simplify import simplify
from export.precision.calibrate import collect_histograms
from export.precision.emulate_int8 import sqnr_db
from export.precision.partition import layers_in_float
from export.precision.quantize import layers_of, observed_tensors, write_int8
from export.precision.ranges import find_ranges
from export.targets import find_target

NETWORKS = (
    "resnet",
    "torchvision:mobilenet_v2",
    "torchvision:mnasnet1_0",
    "torchvision:shufflenet_v2_x1_0",
    "torchvision:densenet121",
    "torchvision:regnet_x_400mf",
    "torchvision:regnet_y_400mf",
    "torchvision:mobilenet_v3_large",
    "torchvision:efficientnet_b0",
    "torchvision:efficientnet_v2_s",
    "torchvision:resnet18",
    "torchvision:resnet50",
    "torchvision:convnext_tiny",
    "timm:vit_tiny_patch16_224",
)
HELD_BACK = (  # not looked at when the figures were chosen
    "vit",
    "torchvision:resnext50_32x4d",
    "torchvision:mobilenet_v3_small",
    "torchvision:vgg11_bn",
    "timm:tf_efficientnet_lite0",
    "timm:ghostnet_100",
    "timm:repvgg_a0",
    "timm:dla34",
    "timm:convnextv2_atto",
    "timm:resnetv2_50",
    "timm:mobilenetv4_conv_small",
)
_SLOWEST = 1.05  # times the best of the others
_FITTED_ON, _RANGED_ON, _CLASSES = 16, 4, 10


def main() -> int:
    """Print a row for each network, and judge."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", metavar="NAMES", help="as `edgereg train --model.name` has them")
    parser.add_argument("--budget", type=float, default=10.0, help="seconds of rounds a network")
    parser.add_argument("--json", type=Path, metavar="F")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--worst", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # what torch says of its own code
    names = (
        NETWORKS[:2] if args.quick else args.only.split(",") if args.only else NETWORKS + HELD_BACK
    )
    print("| network | n | fp32, ms | " + " | ".join(("all", "48", "parted")) + " |", flush=True)
    print("|---|---|---|---|---|---|")
    rows, slow = {}, []
    for name in names:
        rows[name] = row = measure(name, 3.0 if args.quick else args.budget, worst=args.worst)
        cells = " | ".join(_cell(row[rule]) for rule in ("all", "48", "parted"))
        print(f"| {name} | {row['rounds']} | {row['ms']:.3g} | {cells} |", flush=True)
        best = max(row["all"]["speedup"][0], row["48"]["speedup"][0])
        if row["parted"]["speedup"][0] * _SLOWEST < best:
            slow.append(name)
    if args.json:
        args.json.write_text(json.dumps({**describe_setting(), "rows": rows}, indent=1) + "\n")
    print(f"parted, slower than another choice: {', '.join(slow) or 'none'} of {len(rows)}")
    return 1 if slow else 0


def measure(name: str, budget_s: float, *, worst: bool = False) -> dict[str, Any]:
    """Return how many times as fast as fp32 each choice of layers is."""
    fp32, images = _exported(name)
    histograms = collect_histograms(fp32, [images[:_RANGED_ON]], observed_tensors(fp32, "u8s8"))
    ranges = find_ranges(histograms, "minmax")
    layers, parted = layers_of(fp32), layers_in_float(fp32)
    if worst:
        parted = {layer: "" for layer in layers if layer not in parted}
    left = {"all": {}, "48": _small(fp32), "parted": parted}
    files = {"fp32": fp32} | {
        rule: write_int8(fp32, ranges, scheme="u8s8", exclude=names) for rule, names in left.items()
    }
    sessions = {rule: open_session(keep_blocks(file)) for rule, file in files.items()}
    feeds = {"images": images[:1]}
    runs = {rule: partial(each.run, None, feeds) for rule, each in sessions.items()}
    answers = {rule: run()[0] for rule, run in runs.items()}
    seconds, rounds = time_rounds(runs, budget_s)
    row: dict[str, Any] = {"rounds": rounds, "ms": 1e3 * float(np.median(seconds["fp32"]))}
    for rule, names in left.items():
        row[rule] = {
            "layers": [len(layers) - len(names), len(layers)],
            "speedup": ratio_of(seconds["fp32"], seconds[rule]),
            "sqnr_db": sqnr_db(answers[rule], answers["fp32"]),
        }
    return row


def _exported(name: str) -> tuple[bytes, NDArray[np.float32]]:
    size = 224 if ":" in name else 32
    torch.manual_seed(0)
    model = build_model(ModelConfig(name=name, image_size=size), num_classes=_CLASSES, seed=0)
    data = open_images("emoji-10:both:train")
    spec = Preprocessing(size, size, "stretch", 1.0, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    images = preprocess([data.load(i) for i in range(_FITTED_ON)], spec)
    fit_statistics(model, torch.from_numpy(images))
    model.eval().requires_grad_(False)
    example = (torch.from_numpy(images[:2]),)
    simple = simplify(model, example).model
    names = {"input_names": ("images",), "output_names": ("logits",)}
    return to_onnx(simple, example, target=find_target(TARGET), **names), images


def _small(model: bytes) -> dict[str, str]:
    """Return the layers whose product has fewer rows or columns than 48."""
    graph = onnx.load_model_from_string(model).graph
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    layers, small = {*layers_of(model)}, {}
    for node in graph.node:
        if node.name in layers:
            outputs, *inputs = shapes[node.input[1]]
            groups = {each.name: each.i for each in node.attribute}.get("group", 1)
            if min(outputs // groups, int(np.prod(inputs))) < 48:
                small[node.name] = ""
    return small


def _cell(choice: dict[str, Any]) -> str:
    middle, low, high = choice["speedup"]
    some, every = choice["layers"]
    return f"{middle:.2f} [{low:.2f}, {high:.2f}], {some}/{every}, {choice['sqnr_db']:.0f} dB"


if __name__ == "__main__":
    sys.exit(main())
