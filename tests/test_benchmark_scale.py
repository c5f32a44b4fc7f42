"""What scale.py and training.py of the benchmarks judge, on what takes no time."""

import dataclasses
import resource
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))

import scale
import timing
import training
import training_peers
from scale import FULL, Point, judge, linearity
from untrained import write_jpegs


def points(cpu_s, megabytes):
    return [
        Point("infer", images, 1, cpu, cpu, most)
        for images, cpu, most in zip((10, 100, 1000), cpu_s, megabytes, strict=True)
    ]


def test_a_start_and_a_slope_are_linear_and_a_square_is_not():
    line = points([1 + 0.01 * n for n in (10, 100, 1000)], [90.0, 91.0, 92.0])
    assert linearity(line) == pytest.approx(1.0) and judge(line, FULL) == []
    square = points([1 + 1e-4 * n * n for n in (10, 100, 1000)], [90.0, 91.0, 92.0])
    assert linearity(square) == pytest.approx(10.0)
    assert len(judge(square, FULL)) == 1 and "times as much" in judge(square, FULL)[0]


def test_memory_that_grows_with_the_images_is_not_flat():
    grown = points([1 + 0.01 * n for n in (10, 100, 1000)], [90.0, 91.0, 120.0])
    assert [line for line in judge(grown, FULL) if "memory" in line] == judge(grown, FULL) != []


def test_a_process_that_fails_stops_the_measurement():
    good, bad = ([sys.executable, "-S", "-c", f"raise SystemExit({code})"] for code in (0, 3))
    seconds, cpu_s, megabytes = scale.run([good, good])
    assert seconds > 0 and cpu_s > 0 and megabytes > 1
    with pytest.raises(SystemExit, match="ended with 3"):
        scale.run([good, bad])


def test_memory_that_is_hidden_by_the_measuring_process_is_an_error():
    here = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    scale.assert_its_own(2 * here)
    with pytest.raises(SystemExit, match="the memory of what measures"):
        scale.assert_its_own(min(here, scale.run([[sys.executable, "-S", "-c", "pass"]])[2]))


@pytest.mark.parametrize("sizes", [scale.SIZES, scale.QUICK_SIZES])
def test_images_are_made_for_every_size_of_every_command(tmp_path, monkeypatch, sizes):
    made = []
    monkeypatch.setattr(scale.subprocess, "run", lambda command, check: made.extend(command))
    work = scale.Work(tmp_path, None, sizes)
    needed = {size for command in scale.COMMANDS for size in work.sizes(command)}
    assert {int(size) for size in made[-1].split(",")} == needed
    assert scale.LEAST_EXPORT in needed and all(len(work.sizes(c)) > 2 for c in scale.COMMANDS)


def test_ten_classes_are_copied_and_one_without_an_image_is_named(tmp_path):
    source = tmp_path / "source"
    for i in range(12):
        (source / f"class{i:02}").mkdir(parents=True)
        (source / f"class{i:02}" / "a.jpg").write_bytes(bytes([i]))
    made = write_jpegs(tmp_path / "made", 20, side=8, source=source)
    assert sorted(path.name for path in made.iterdir()) == [f"class{i:02}" for i in range(10)]
    assert len(list(made.rglob("*.jpg"))) == 20
    (source / "class03" / "a.jpg").unlink()
    with pytest.raises(SystemExit, match="none in 'class03'"):
        write_jpegs(tmp_path / "other", 20, side=8, source=source)


@pytest.fixture
def steps(monkeypatch):
    """Our step takes 4 ms by a clock of its own, 2 of them without the suite."""
    clock = [0.0]

    def of(seconds):
        return lambda config, batch, folder=None: lambda: clock.append(clock.pop() + seconds)

    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(training, "ours", of(0.004))
    monkeypatch.setattr(training, "ours_plain", of(0.002))
    return of


def test_a_peer_is_compared_one_that_fails_is_shown_and_a_faster_one_is_a_miss(steps, monkeypatch):
    def broken(config, batch, folder):
        raise RuntimeError("no such thing")

    def breaking(config, batch, folder):
        left = iter([None, None])  # a warm-up and a round
        return lambda: next(left)

    peers = {"slower": steps(0.008), "faster": steps(0.001), "broken": broken, "late": breaking}
    monkeypatch.setattr(training, "PEERS", peers)
    name = next(iter(training.CASES))
    rows, failed = training.compare_peers(name, folder=Path(), quick=False)
    suite, slower, faster = rows
    assert [row.ratio for row in rows] == pytest.approx([2.0, 2.0, 0.25])
    assert [row.passed for row in (suite, slower, faster)] == [False, True, False]
    assert failed[0] == "broken: failed: RuntimeError: no such thing"
    assert [line.partition(":")[0] for line in failed] == ["broken", "late"]


def test_our_step_draws_its_batch_as_the_peers_do(monkeypatch):
    drawn = []

    def batch(self, indices):
        drawn.append(indices)

    monkeypatch.setattr(training_peers.Pixels, "batch", batch)
    config = dataclasses.replace(training.CASES["small ResNet 32x32"][0], width=4, image_size=16)
    steps = (
        training_peers.ours(config, 8),
        training_peers.ours_plain(config, 8),
        training_peers.ours(config, 8, count=100),
    )
    for step in steps:
        step()
    assert [len(indices) for indices in drawn] == [8, 8, 8]
    assert max(drawn[0]) < 8 <= max(drawn[2])


def test_a_case_that_is_not_known_is_named(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["training.py", "--only", "ResNet-19"])
    with pytest.raises(SystemExit):
        training.main()
    assert "found: 'ResNet-19'" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["ours", "ours_plain", "torchvision", "timm"])
def test_every_step_trains_a_small_net(name, tmp_path):
    if name == "timm":
        pytest.importorskip("timm", reason="the extra timm is not installed")
    config = dataclasses.replace(training.CASES["small ResNet 32x32"][0], width=4, image_size=16)
    make = training_peers.PEERS.get(name)
    step = getattr(training_peers, name)(config, 8) if make is None else make(config, 8, tmp_path)
    step()
    step()
