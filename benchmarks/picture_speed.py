"""From a JPEG to the network's input and from its logits to an answer: ours beside the usual way.

    python benchmarks/picture_speed.py          half a minute
    python benchmarks/picture_speed.py --quick  a fifth of the rounds

No network runs: it would hide what is asked. Both ways are those that latency.py times end to end
(end_to_end.py). The time is the thread's own processor time, in turns, so that others on the
machine disturb little; each sample follows a run that is not counted. Exits 1 where ours is not
at least 0.9 times as fast.
"""

import argparse
import io
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
from end_to_end import usual_end_to_end
from numpy.typing import NDArray
from peers import Ready
from PIL import Image
from rounds import ratio_of
from setting import describe_setting

from deploy.runtime.decode import decode
from deploy.runtime.postprocess import top_k
from deploy.runtime.preprocess import Preprocessing, preprocess

_FLOOR = 0.9
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_LABELS = tuple("abcdefghij")
_CASES = (  # the network's side, the picture's width and height, rounds
    (32, 64, 64, 300),
    (32, 448, 448, 100),
    (32, 1920, 1080, 30),
    (224, 64, 64, 100),
    (224, 448, 448, 60),
    (224, 1920, 1080, 30),
)


def main() -> int:
    """Time every case, print a line for each, judge."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a fifth of the rounds")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    print(describe_setting()["machine"])
    slow = 0
    for size, width, height, rounds in _CASES:
        for spec in _specs(size):
            n = max(rounds // 5, 6) if quick else rounds
            times = _time(_runs(_jpeg(width, height), spec), n)
            ratio = ratio_of(times["usual"], times["ours"])
            slow += ratio[0] < _FLOOR
            shown = ", ".join(
                f"{name} {1e3 * statistics.median(times[name]):.3f}" for name in times
            )
            print(
                f"{width}x{height} -> {size} {spec.resize}: {shown} ms; "
                f"{ratio[0]:.2f} [{ratio[1]:.2f}, {ratio[2]:.2f}] times as fast, n = {n}"
            )
    print(f"picture_speed: {slow} of {2 * len(_CASES)} below {_FLOOR}")
    return 1 if slow else 0


def _specs(size: int) -> tuple[Preprocessing, ...]:
    return (
        Preprocessing(size, size, "stretch", 1.0, _MEAN, _STD),
        Preprocessing(size, size, "cover", 0.875, _MEAN, _STD),
    )


def _jpeg(width: int, height: int) -> bytes:
    """Encode a smooth picture of random colours, with about a photograph's detail."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (max(2, height // 16), max(2, width // 16), 3), dtype=np.uint8)
    buffer = io.BytesIO()
    picture = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    picture.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def _runs(data: bytes, spec: Preprocessing) -> dict[str, Callable[[], object]]:
    image = decode(data, name="a picture")
    logits = np.linspace(-2, 2, len(_LABELS), dtype=np.float32)

    def network(images: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.repeat(logits[np.newaxis], len(images), axis=0)

    def ours() -> object:
        outputs = network(preprocess([decode(data, name="a picture")], spec))
        return [top_k(row, _LABELS, k=1) for row in outputs]

    return {
        "decode": lambda: decode(data, name="a picture"),
        "preprocess": lambda: preprocess([image], spec),
        "postprocess": lambda: top_k(logits, _LABELS, k=1),
        "ours": ours,
        "usual": usual_end_to_end(Ready(network, "fp32"), [data], spec),
    }


def _time(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of this thread's processor time of each run in each round."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            run()
            start = time.thread_time()
            run()
            times[name].append(time.thread_time() - start)
    return times


if __name__ == "__main__":
    sys.exit(main())
