import json
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from board_trees import OC, orin, write
from deploy_bundle import linear_onnx, write_small_bundle
from test_bench import CountingRunner
from test_deploy_commands import run

from deploy.errors import BadInputError, CheckFailedError
from deploy.measure.bench import bench
from deploy.measure.bench_report import BenchReport, Platform, read_platform
from deploy.measure.cold_start import measure_cold_start, peak_memory_bytes
from deploy.measure.interleaved import compare_speed
from deploy.measure.repeated_input import check_repeated_input
from deploy.report.bench_page import bench_page, interleaved_page

QUICK = ("--count", 70, "--no-cold-start")


@pytest.fixture
def path(tmp_path):
    return write_small_bundle(tmp_path / "b").path


@pytest.fixture
def wrong(tmp_path):
    model = linear_onnx(-np.eye(3))
    return write_small_bundle(tmp_path / "w", **{"model.fp32.onnx": model}).path


def report_of(bundle, *, root, **changes):
    runner = CountingRunner(bundle)
    options = {
        "platform": read_platform(root),
        "runs": tuple(bench(bundle, runner, count=160, batch=b, root=root) for b in (1, 2)),
        "repeated": check_repeated_input(bundle, runner),
        "cold_start": None,
        "peak_memory_bytes": None,
        "max_p99_ms": None,
        "min_throughput": None,
    }
    return BenchReport(**options | changes)


def assert_is_a_page(html):
    """One file of well-formed plots, without a script or anything from elsewhere."""
    assert html.startswith("<!doctype html>") and html.rstrip().endswith("</html>")
    assert not re.search(r"<script|https?:|src=|href=|nan|inf\b", html)
    plots = re.findall(r"<svg.*?</svg>", html, re.DOTALL)
    assert plots and all(ElementTree.fromstring(plot).find("title").text for plot in plots)
    return len(plots)


def test_a_sweep_over_batches_has_a_run_for_each(path, capsys):
    assert run("bench", path, "--batch", "1,4", "--json", *QUICK) == 0
    document = json.loads(capsys.readouterr().out)
    assert [(r["batch"], r["count"]) for r in document["runs"]] == [(1, 70), (4, 18)]
    assert run("bench", path, "--batch", "1,4", *QUICK) == 0
    shown = capsys.readouterr().out
    assert "ms per image" in shown and "ms per 4 images" in shown


def test_a_limit_that_is_kept_passes_and_one_that_is_not_exits_1(path, capsys):
    long = ("--count", 700, "--no-cold-start")
    assert run("bench", path, "--max-p99-ms", 1e4, "--min-throughput", 1, *long) == 0
    assert "FAILED" not in capsys.readouterr().out
    assert run("bench", path, "--max-p99-ms", 1e-3, *long) == 1
    assert re.search(r"FAILED: batch 1: p99 is \d+\.\d+ ms; at most 0.001", capsys.readouterr().out)
    assert run("bench", path, "--min-throughput", 1e9, *QUICK) == 1
    assert "images/s; at least 1e+09" in capsys.readouterr().out


def test_a_limit_on_a_percentile_that_is_not_known_is_not_kept(path, capsys):
    assert run("bench", path, "--max-p99-ms", 1e4, *QUICK) == 1
    assert "p99 is not known from 70 samples; it takes 662" in capsys.readouterr().out


def test_a_cold_start_is_the_sum_of_its_steps(path):
    start = measure_cold_start(path, backend="onnxruntime", precision="fp32", threads=1)
    assert list(start.steps_s) == ["python", "bundle", "model", "answer"]
    assert all(seconds > 0 for seconds in start.steps_s.values())
    assert start.total_s == pytest.approx(sum(start.steps_s.values()))
    assert 0.05 < start.total_s < 60 and start.peak_memory_bytes > 10 << 20
    assert "first answer after" in str(start)


def test_a_process_without_an_answer_is_no_cold_start(path):
    (path / "model.fp32.onnx").write_bytes(b"x")
    with pytest.raises(CheckFailedError, match=r"model\.fp32\.onnx"):
        measure_cold_start(path, backend="onnxruntime", precision="fp32", threads=1)


def test_the_peak_memory_is_the_kernels(tmp_path):
    root = write(tmp_path, {"proc/self/status": "Name: x\nVmHWM:\t  2048 kB"})
    assert peak_memory_bytes(root) == 2 << 20
    assert peak_memory_bytes(tmp_path / "none") is None


def test_a_bundle_against_another_prints_ratios_and_writes_a_page(path, tmp_path, capsys):
    other = write_small_bundle(tmp_path / "other").path
    page, out = tmp_path / "p.html", tmp_path / "p.json"
    flags = ("--duration", 0.01, "--html", page, "--out", out)
    assert run("bench", path, "--against", f"{other}:fp32:onnxruntime", *flags) == 0
    shown = capsys.readouterr().out
    assert "20 alternations" in shown and re.search(r"infer: the first takes [\d.]+ \[", shown)
    assert json.loads(out.read_text())["second"]["bundle"] == "other"
    assert assert_is_a_page(page.read_text()) == 2


def test_a_wrong_contender_exits_1(path, wrong, capsys):
    assert run("bench", path, "--against", wrong, "--duration", 0.01) == 1
    assert "FAILED: the outputs of w fp32 are wrong" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "found"),
    [
        (("--count", 5), "--count"),
        (("--batch", "2"), "--batch"),
        (("--max-p99-ms", 5), "--max-p99-ms"),
    ],
)
def test_what_makes_no_sense_with_against_is_refused(path, flags, found):
    with pytest.raises(BadInputError, match=found):
        run("bench", path, "--against", path, *flags)


def test_an_unknown_precision_or_backend_of_the_other_is_refused(path):
    with pytest.raises(BadInputError, match="'int8'"):
        run("bench", path, "--against", f"{path}:int8")
    with pytest.raises(BadInputError, match="the backend 'onnx'"):
        run("bench", path, "--against", f"{path}:fp32:onnx")


def test_a_batch_of_nothing_is_wrong_use(path, capsys):
    with pytest.raises(SystemExit):
        run("bench", path, "--batch", "1,0")
    assert "0 is not 1 or more" in capsys.readouterr().err


def test_the_page_of_a_board_draws_its_temperatures_clocks_and_power(tmp_path):
    bundle, root = write_small_bundle(tmp_path / "bundle"), orin(tmp_path / "board")
    html = bench_page(report_of(bundle, root=root))
    assert assert_is_a_page(html) == 1 + 2 * (2 + 3) + 1  # stages, each run's, the batches
    assert "the board was watched and kept its pace" in html.lower()
    assert "MAXN_SUPER (mode 2)" in html


def test_the_page_of_a_machine_without_sensors_says_so(tmp_path):
    bundle = write_small_bundle(tmp_path / "bundle")
    html = bench_page(report_of(bundle, root=tmp_path / "none"))
    assert assert_is_a_page(html) == 1 + 2 * 2 + 1
    assert "could not be watched" in html


def test_an_invalid_run_fails_the_report_and_stands_first_on_its_page(tmp_path):
    bundle, root = write_small_bundle(tmp_path / "bundle"), orin(tmp_path / "board")

    class Throttling(CountingRunner):
        def __call__(self, batch):
            if self.calls == 30:
                write(root, {f"{OC}/oc3_event_cnt": 9})
            return super().__call__(batch)

    run = bench(bundle, Throttling(bundle), count=40, root=root)
    report = report_of(bundle, root=root, runs=(run,))
    assert ["throttle events oc3" in reason for reason in report.failures] == [True]
    html = bench_page(report)
    assert html.index("9 throttle events oc3") < html.index("<svg")
    assert report.to_json()["failures"] == list(report.failures)


def test_names_cannot_inject_into_a_page(tmp_path):
    bundle = write_small_bundle(tmp_path / "<b>&'", **{"model.fp32.onnx": linear_onnx(-np.eye(3))})
    html = bench_page(report_of(bundle, root=tmp_path / "none"))
    assert "<b>" not in html and "&lt;b&gt;&amp;" in html
    runner = CountingRunner(bundle)
    pair = compare_speed((bundle, runner), (bundle, runner), alternations=20)
    assert "<b>" not in interleaved_page(pair) and "outputs of &lt;b&gt;" in interleaved_page(pair)


def test_a_platform_is_told_with_its_power_mode(tmp_path):
    shown = str(read_platform(orin(tmp_path)))
    assert shown.endswith("Developer Kit, L4T 36.4.3, power mode MAXN_SUPER (mode 2)")
    assert str(Platform(None, None, None)) == "no Jetson"
    assert str(Platform(None, "36.4.3", None)).endswith("power mode not told")
