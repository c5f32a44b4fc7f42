"""How long an export takes, beside a bare torch.onnx.export and onnx's checker, in turns.

    python benchmarks/export_time.py            5 rounds of ResNet-18 and ViT-Ti at 224 px
    python benchmarks/export_time.py --quick    1 round of our CNN

*file*: the simplification and its proof in float64, ONNX, its check against the module, the gates.
*bundle*: all that `export_bundle` does for fp32 and a Jetson, without held-out images: NVIDIA's
parser and builder, too, and 64 golden images through the model in float64 and the file. Exits
with 1 where the median ratio of a file is above 1.5; the bundle's is only reported.
"""

import argparse
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import torch
from randomize import images, randomize
from setting import describe_setting
from timing import compare
from torch import nn

from deploy.runtime.decode import encode_png
from deploy.runtime.preprocess import Preprocessing
from export.exporter import ExportRequest, export_bundle
from export.onnx_file.gates import assert_exportable
from export.onnx_file.to_onnx import to_onnx
from export.passes.simplify import simplify
from export.targets import find_target

_WANTED = 1.5


def main() -> int:
    """Print a ratio for each model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # what torch says of its own code
    print(describe_setting())
    rows = []
    for name, (size, build) in _models(quick=args.quick).items():
        model = build()
        randomize(model, images(8, size, seed=0))
        request = _request(size)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder)
            _bare(model, size, path / "bare.onnx")  # the first one imports and compiles
            runs: dict[str, tuple[Callable[[], object], float | None]] = {
                "file": (lambda: _file(model, size), None if args.quick else _WANTED),  # noqa: B023
                "bundle": (
                    lambda: export_bundle(model, path / "b", request=request, force=True),  # noqa: B023
                    None,
                ),
            }
            for what, (ours, wanted) in runs.items():
                rows.append(
                    compare(
                        f"{name}, {what}",
                        lambda: _bare(model, size, path / "bare.onnx"),  # noqa: B023
                        ours,
                        rounds=1 if args.quick else args.rounds,
                        wanted=wanted,
                        is_limit=True,
                    )
                )
                print(rows[-1].to_text(), flush=True)
    return 0 if all(row.passed for row in rows) else 1


def _models(*, quick: bool) -> dict[str, tuple[int, Callable[[], nn.Module]]]:
    import timm
    import torchvision

    from edgereg.models.zoo import ModelConfig, build_model

    if quick:
        return {"our CNN": (32, lambda: build_model(ModelConfig(name="convnet"), num_classes=1000))}
    return {
        "ResNet-18": (224, torchvision.models.resnet18),
        "ViT-Ti": (224, lambda: timm.create_model("vit_tiny_patch16_224")),
    }


def _bare(model: nn.Module, size: int, path: Path) -> None:
    torch.onnx.export(
        model,
        (torch.zeros(1, 3, size, size),),
        path,
        dynamo=True,
        opset_version=20,
        external_data=False,
        verbose=False,
    )
    onnx.checker.check_model(path, full_check=True)


def _file(model: nn.Module, size: int) -> None:
    x, target = images(2, size, seed=1), find_target("jetpack6.2")
    assert_exportable(to_onnx(simplify(model, (x,)).model, (x,), target=target), target)


def _request(size: int) -> ExportRequest:
    rng = np.random.default_rng(0)
    golden = [rng.integers(0, 256, (size, size, 3), dtype=np.uint8) for _ in range(64)]
    return ExportRequest(
        name="model",
        target="jetpack6.2",
        labels=tuple(f"class {i}" for i in range(1000)),
        preprocessing=Preprocessing(size, size, "stretch", 1.0, (0.5,) * 3, (0.25,) * 3),
        golden_images=[encode_png(image) for image in golden],
    )


if __name__ == "__main__":
    sys.exit(main())
