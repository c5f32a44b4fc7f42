"""From JPEG files to answers: as `edgereg infer` goes, and as torchvision's examples do."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from peers import Ready
from PIL import Image
from torchvision import transforms

from deploy.bundle.read import open_bundle
from deploy.runtime.decode import decode
from deploy.runtime.postprocess import top_k
from deploy.runtime.preprocess import Preprocessing, preprocess
from edgereg.data.images import Images, evenly, labels_of

__all__ = ["jpegs", "ours_end_to_end", "usual_end_to_end"]

_JPEG_SCALE = 2  # a photograph is larger than what the network takes


def jpegs(images: Images, count: int, spec: Preprocessing) -> list[bytes]:
    """Return JPEG files, twice as large on each side as the network's input."""
    size = (_JPEG_SCALE * spec.width, _JPEG_SCALE * spec.height)
    files = []
    for place in evenly(labels_of(images), count):
        buffer = io.BytesIO()
        picture = Image.fromarray(images.load(int(place)))
        picture.resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
        files.append(buffer.getvalue())
    return files


def ours_end_to_end(path: Path, ready: Ready, files: list[bytes]) -> Callable[[], object]:
    """From files to answers by what `edgereg infer` is made of."""
    bundle = open_bundle(path)
    spec, labels = bundle.manifest.preprocessing, bundle.labels

    def run() -> object:
        images = [decode(data, name="a photograph") for data in files]
        return [top_k(logits, labels, k=1) for logits in ready.run(preprocess(images, spec))]

    return run


def usual_end_to_end(ready: Ready, files: list[bytes], spec: Preprocessing) -> Callable[[], object]:
    """From files to answers, a class and its probability, as torchvision's examples do it.

    The same decoder, the same antialiased triangle, the same size before the crop as ours. Less is
    checked: no limit on the size, no EXIF, no test for transparency or for outputs not finite.
    """
    resize = (
        [transforms.Resize((spec.height, spec.width))]
        if spec.resize == "stretch"
        else [
            transforms.Resize(int(spec.height / spec.crop_fraction)),  # rounded down, as ours
            transforms.CenterCrop((spec.height, spec.width)),
        ]
    )
    normalize = transforms.Normalize(spec.mean, spec.std)
    prepare = transforms.Compose([*resize, transforms.ToTensor(), normalize])

    def run() -> object:
        images = [prepare(Image.open(io.BytesIO(data)).convert("RGB")) for data in files]
        logits = ready.run(torch.stack(images).numpy())
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
        probabilities = powers / powers.sum(axis=1, keepdims=True)
        return [(int(row.argmax()), float(row.max())) for row in probabilities]

    return run
