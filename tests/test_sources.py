import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from deploy_bundle import SPEC, golden_pixels, write_embedding_bundle, write_small_bundle
from PIL import Image

import deploy
from deploy.errors import BadInputError, CheckFailedError
from deploy.report.annotate import Annotator
from deploy.runtime.decode import encode_png
from deploy.runtime.preprocess import Preprocessing, preprocess
from deploy.service import camera
from deploy.service.camera import Camera, camera_command
from deploy.service.pictures import Frame, Unreadable, expand, read_frames
from deploy.service.sources import read_camera, read_sources
from deploy.service.video import read_video

ROOT = Path(deploy.__file__).parent.parent
PIXELS = Preprocessing(8, 8, "stretch", 1.0, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), layout="nhwc-uint8")
WIDTH, HEIGHT = 8, 4


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "in"
    root.mkdir()
    for name, pixels in zip(("a.png", "b.png", "[1].png"), golden_pixels(3), strict=True):
        (root / name).write_bytes(encode_png(pixels))
    return root


def test_a_pattern_names_files_in_order_and_a_file_that_exists_is_itself(folder, monkeypatch):
    assert expand(f"{folder}/?.png") == [folder / "a.png", folder / "b.png"]
    assert expand(f"{folder}/[1].png") == [folder / "[1].png"]
    assert expand(f"{folder}/x*.png") == [Path(f"{folder}/x*.png")]  # reported as missing
    monkeypatch.chdir(folder.parent)
    assert expand("in/[ab].png") == [Path("in/a.png"), Path("in/b.png")]


@pytest.mark.parametrize("are_several", [True, False])
def test_an_array_of_pixels_gives_what_the_pictures_give(tmp_path, are_several):
    pixels = golden_pixels(3, size=12)
    np.save(tmp_path / "x.npy", np.stack(pixels) if are_several else pixels[0])
    frames = list(read_frames([tmp_path / "x.npy"], SPEC))
    assert [frame.name.rpartition("/")[2] for frame in frames] == (
        ["x.npy[0]", "x.npy[1]", "x.npy[2]"] if are_several else ["x.npy"]
    )
    for frame, image in zip(frames, pixels, strict=False):
        assert np.array_equal(frame.pixels, image)
        assert np.array_equal(frame.tensor, preprocess([image], SPEC))


@pytest.mark.parametrize("spec", [SPEC, PIXELS], ids=["floats", "pixels"])
def test_an_array_of_the_models_input_goes_through_as_it_is(tmp_path, spec):
    inputs = preprocess(golden_pixels(2), spec)
    np.save(tmp_path / "x.npy", inputs)
    frames = list(read_frames([tmp_path / "x.npy"], spec))
    assert np.array_equal(np.concatenate([frame.tensor for frame in frames]), inputs)
    assert (frames[0].pixels is None) == (spec is SPEC)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((3, 7, 8), np.float32),
        np.zeros((3, 8, 8), np.float64),
        np.zeros((0, 8, 8, 3), np.uint8),
        np.zeros((8, 8), np.uint8),
        np.zeros((), np.uint8),
        np.array([{}]),
    ],
    ids=["size", "dtype", "empty", "grey", "scalar", "objects"],
)
def test_an_array_of_something_else_is_reported(tmp_path, array):
    np.save(tmp_path / "x.npy", array, allow_pickle=True)
    (result,) = read_frames([tmp_path / "x.npy"], SPEC)
    assert isinstance(result, Unreadable) and "x.npy" in result.error


def test_bytes_that_are_no_array_are_reported(tmp_path):
    (tmp_path / "x.npy").write_bytes(b"no array")
    np.savez(tmp_path / "z.npz", np.zeros(3))
    (tmp_path / "z.npz").rename(tmp_path / "z.npy")
    results = list(read_frames([tmp_path / "x.npy", tmp_path / "z.npy"], SPEC))
    assert all(isinstance(result, Unreadable) for result in results)
    assert "an archive of arrays" in results[1].error


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    """Ten frames of 64 x 48: five red, then five green."""
    av = pytest.importorskip("av", reason="PyAV is not installed")
    path = tmp_path_factory.mktemp("film") / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for i in range(10):
            pixels = np.zeros((48, 64, 3), np.uint8)
            pixels[:, :, 0 if i < 5 else 1] = 200
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


def test_a_film_gives_its_frames_in_order_with_their_times(film):
    frames = list(read_video(film, SPEC))
    assert [round(frame.time_s, 3) for frame in frames] == [i / 10 for i in range(10)]
    assert [int(frame.pixels[24, 32].argmax()) for frame in frames] == [0] * 5 + [1] * 5
    assert np.array_equal(frames[3].tensor, preprocess([frames[3].pixels], SPEC))
    fewer = list(read_video(film, SPEC, every=4))
    assert [frame.name.rpartition("/")[2] for frame in fewer] == [
        "clip.mp4[0]",
        "clip.mp4[4]",
        "clip.mp4[8]",
    ]


def test_a_film_that_breaks_off_or_is_none_is_reported(film, tmp_path):
    whole = film.read_bytes()
    (tmp_path / "none.mp4").write_bytes(b"no film at all" * 9)
    (tmp_path / "list.mkv").write_bytes(b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n")
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    for name in ("none.mp4", "list.mkv", "cut.mp4"):
        *_, last = read_video(tmp_path / name, SPEC)
        assert isinstance(last, Unreadable) and name in last.error


def test_films_and_pictures_can_be_read_together(film, folder):
    names = [frame.name for frame in read_sources([str(film), f"{folder}/?.png"], SPEC, every=5)]
    assert [name.rpartition("/")[2] for name in names] == [
        "clip.mp4[0]",
        "clip.mp4[5]",
        "a.png",
        "b.png",
    ]


def test_without_pyav_a_film_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "x.mp4").write_bytes(b"")
    with pytest.raises(BadInputError, match=r"edgereg\[video\]"):
        list(read_sources([str(tmp_path / "x.mp4")], SPEC))


def pretended(script):
    """The command of a camera whose frames are a byte each, repeated."""
    head = (
        "import sys, time\n"
        "def show(byte):\n"
        f"    sys.stdout.buffer.write(bytes([byte]) * {WIDTH * HEIGHT * 3})\n"
        "    sys.stdout.buffer.flush()\n"
    )
    return [sys.executable, "-c", head + script]


def seen_by(command, *, count=None, slowly_s=0.0, **options):
    seen = []
    with Camera(command, width=WIDTH, height=HEIGHT, **options) as source:
        try:
            for pixels, _ in source.frames():
                assert pixels.shape == (HEIGHT, WIDTH, 3)
                seen.append(int(pixels[0, 0, 0]))
                time.sleep(slowly_s)
                if len(seen) == count:
                    break
        except CheckFailedError as error:
            return seen, source.counts, error
        return seen, source.counts, None


def test_a_slow_reader_sees_the_newest_frame_and_drops_are_counted():
    command = pretended("for i in range(200): show(i); time.sleep(0.01)\ntime.sleep(30)")
    seen, counts, _ = seen_by(command, count=4, slowly_s=0.25)
    assert seen == sorted(set(seen)) and seen[-1] - seen[0] > 15
    assert counts.fresh == 4 and counts.dropped >= seen[-1] - seen[0] - 3 and counts.stale == 0


def test_a_repeated_frame_is_stale_and_not_given_out():
    command = pretended("for i in (7, 7, 7, 8, 8, 9): show(i); time.sleep(0.1)\ntime.sleep(30)")
    seen, counts, _ = seen_by(command, count=3)
    assert seen == [7, 8, 9] and counts.fresh == 3 and 1 <= counts.stale <= 3


def test_a_camera_that_repeats_itself_for_ever_is_an_error():
    command = pretended("while True: show(7); time.sleep(0.02)")
    seen, counts, error = seen_by(command, silence_s=0.5)
    assert seen == [7] and "gives a fresh frame within 0.5 s" in str(error) and counts.stale > 3


def test_a_frame_that_lay_too_long_is_stale():
    command = pretended("show(1); time.sleep(0.6); show(2); time.sleep(30)")
    source = Camera(command, width=WIDTH, height=HEIGHT, max_age_s=0.2, silence_s=20)
    with source:
        until = time.monotonic() + 20
        while source._newest is None:
            assert time.monotonic() < until
            time.sleep(0.01)
        time.sleep(0.3)
        pixels, _ = next(source.frames())
        assert pixels[0, 0, 0] == 2 and source.counts.stale == 1


def test_a_camera_that_gives_nothing_or_ends_is_an_error_with_its_last_words():
    assert "gives a fresh frame" in str(seen_by(pretended("time.sleep(30)"), silence_s=0.3)[2])
    script = "show(1); sys.stderr.write('no more\\nlost the sensor\\n'); sys.exit(3)"
    seen, _, error = seen_by(pretended(script))
    assert seen == [1] and "exit code 3: lost the sensor" in str(error)
    cut = "sys.stdout.buffer.write(b'x'); sys.stdout.buffer.flush()"
    assert "exit code 0, without a word" in str(seen_by(pretended(cut))[2])
    with pytest.raises(BadInputError, match="must run"):
        Camera(["/nowhere/gst"], width=WIDTH, height=HEIGHT)


def test_a_closed_camera_leaves_no_process():
    source = Camera(pretended("while True: show(1)"), width=WIDTH, height=HEIGHT)
    source.close()
    assert source._process.poll() is not None and not source._thread.is_alive()


def test_the_pipelines_keep_the_newest_frame_and_write_rows_without_padding(monkeypatch):
    monkeypatch.setattr(camera.shutil, "which", lambda name: f"/usr/bin/{name}")
    usb = " ".join(camera_command("v4l2:/dev/video2", width=640, height=480, fps=30))
    assert "v4l2src device=/dev/video2 ! decodebin" in usb
    assert "format=RGB,width=640,height=480" in usb
    csi = " ".join(camera_command("csi:1", width=1920, height=1080, fps=60))
    assert "nvarguscamerasrc sensor-id=1" in csi and "framerate=60/1" in csi
    assert all("leaky=downstream max-size-buffers=1 ! fdsink fd=1" in each for each in (usb, csi))


@pytest.mark.parametrize(
    ("name", "width"),
    [
        ("v4l2:/dev/video0 ! filesink location=x", 640),
        ("v4l2:video0", 640),
        ("csi:", 640),
        ("csi:0;x", 640),
        ("csi:0", 642),
        ("csi:0", 0),
    ],
)
def test_what_is_no_camera_is_refused(name, width):
    with pytest.raises(BadInputError, match="a camera is"):
        camera_command(name, width=width, height=480, fps=30)


def test_without_gstreamer_a_camera_says_what_to_install(monkeypatch):
    monkeypatch.setattr(camera.shutil, "which", lambda name: None)
    with pytest.raises(BadInputError, match="apt install"):
        camera_command("csi:0", width=640, height=480, fps=30)


def test_a_camera_is_read_alone():
    with pytest.raises(BadInputError, match="read alone"):
        list(read_sources(["csi:0", "a.png"], SPEC))


def test_a_camera_gives_frames_for_the_model_and_its_counts_in_the_end():
    command, counts = pretended("for i in range(99): show(i); time.sleep(0.02)"), []
    frames = read_camera(
        "csi:0", SPEC, width=WIDTH, height=HEIGHT, fps=30, on_end=counts.append, command=command
    )
    first, second = next(frames), next(frames)
    frames.close()
    assert isinstance(first, Frame) and first.tensor.shape == (1, 3, 8, 8)
    assert first.time_s < second.time_s and second.name == "csi:0[1]"
    assert counts[0].fresh == 2


@pytest.fixture
def run(capsys):
    from test_deploy_commands import run

    def shown(*arguments):
        return run("infer", *arguments), capsys.readouterr()

    return shown


def test_infer_writes_answers_onto_pictures(run, tmp_path, folder):
    path = write_small_bundle(tmp_path / "b").path
    code, _ = run(path, f"{folder}/?.png", "--annotate", tmp_path / "out")
    assert code == 0
    written = sorted(file.name for file in (tmp_path / "out").iterdir())
    assert written == ["000000-a.png.jpg", "000001-b.png.jpg"]
    image = np.asarray(Image.open(tmp_path / "out" / written[0]))
    assert image.shape == (240, 240, 3)
    band, rest = image[:12], image[100:]
    assert (band < 40).all(axis=2).mean() > 0.3 and (band > 200).all(axis=2).any()  # white on black
    assert (rest < 40).all(axis=2).mean() < 0.05
    with pytest.raises(BadInputError, match="a new folder"):
        run(path, folder, "--annotate", tmp_path / "out")


def test_the_neighbours_of_an_encoder_can_be_written_too(run, tmp_path, folder):
    path = write_embedding_bundle(tmp_path / "b").path
    assert run(path, folder / "a.png", "--annotate", tmp_path / "out")[0] == 0
    assert len(list((tmp_path / "out").iterdir())) == 1


def test_what_is_no_picture_cannot_be_written_on(tmp_path):
    annotate = Annotator(tmp_path / "out")
    with pytest.raises(BadInputError, match="which is none"):
        annotate(None, name="x.npy", lines=["red"])
    path = annotate(golden_pixels(1)[0], name="../a/\x1b b?.png", lines=["röt", "x"])
    assert path.parent == tmp_path / "out" and path.name == "000000-b-.png.jpg"


def test_infer_stops_after_so_many_frames_and_tells_their_times(run, tmp_path, film):
    path = write_small_bundle(tmp_path / "b").path
    code, shown = run(path, film, "--frames", 2, "--json", "--every", 3)
    documents = [json.loads(line) for line in shown.out.splitlines()]
    assert code == 0 and [round(d["time_s"], 1) for d in documents] == [0.0, 0.3]
    assert documents[0]["path"].endswith("clip.mp4[0]")


def test_infer_reads_a_camera_until_it_is_told_to_stop(tmp_path):
    """With a pretended gst-launch-1.0 on the path, and a systemd that listens."""
    import socket

    path = write_small_bundle(tmp_path / "b").path
    launch = tmp_path / "bin" / "gst-launch-1.0"
    launch.parent.mkdir()
    size = 64 * 48 * 3
    launch.write_text(
        f"#!{sys.executable}\nimport sys, time, os\n"
        f"for i in range(10**6):\n"
        f"    sys.stdout.buffer.write(bytes([i % 256]) * {size})\n"
        f"    sys.stdout.buffer.flush()\n    time.sleep(0.05)\n"
    )
    launch.chmod(0o755)
    address = str(tmp_path / "notify")
    environment = dict(
        os.environ, PATH=f"{launch.parent}:{os.environ['PATH']}", NOTIFY_SOCKET=address
    )
    code = "import sys; from edgereg.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "infer", str(path), "csi:0", "--size", "64x48", "--json"]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(address)
        listener.settimeout(60)
        child = subprocess.Popen(
            command, stdout=subprocess.PIPE, cwd=ROOT, env=environment, text=True
        )
        try:
            lines = [json.loads(child.stdout.readline()) for _ in range(3)]
            assert listener.recv(100) == b"READY=1\nWATCHDOG=1"
            child.send_signal(signal.SIGTERM)
            rest = child.stdout.read().splitlines()
            assert child.wait(30) == 0
        finally:
            child.kill()
            child.wait()
            child.stdout.close()
    assert [line["path"] for line in lines] == ["csi:0[0]", "csi:0[1]", "csi:0[2]"]
    counts = json.loads(rest[-1])
    assert counts["source"] == "csi:0" and counts["fresh"] >= 3 and counts["stale"] == 0
