"""Put the doubles of CUDA and TensorRT where edgereg looks for the originals, children included."""

import sys

import fake_tensorrt
from fake_cudart import FakeCudart

from deploy.runtime import cudart, engine_build


def put_device(monkeypatch, tmp_path, style="10", *, gpu="Orin (fake)", **options):
    """Return a device's CUDA and TensorRT; engines are kept in a folder of the test's own.

    Args:
        monkeypatch: pytest's.
        tmp_path: pytest's.
        style: One of fake_tensorrt.STYLES.
        gpu: Its name.
        options: Of fake_tensorrt.make, for this process and the children.
    """
    cuda = FakeCudart(gpu=gpu)
    trt = fake_tensorrt.make(fake_tensorrt.STYLES[style], cuda, **options)
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    monkeypatch.setattr(cudart, "load_cudart", lambda: cuda)
    monkeypatch.setenv("EDGEREG_CACHE", str(tmp_path / "engines"))
    child = (
        "import sys; from fake_cudart import FakeCudart; from fake_tensorrt import install; "
        f"install({style!r}, cudart=FakeCudart(gpu={gpu!r}), **{options!r}); "
        "from deploy.runtime.engine_build import _child; _child(sys.argv[1:])"
    )
    monkeypatch.setattr(engine_build, "_CHILD", child)
    return cuda, trt
