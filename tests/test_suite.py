"""The suite is run as on a device: by pytest in a child process, in a folder of its own."""

import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
from deploy_bundle import linear_onnx, write_labelled_bundle, write_small_bundle

import deploy

ROOT = Path(deploy.__file__).parent.parent


def run(folder, *arguments):
    command = [sys.executable, "-m", "pytest", "-p", "deploy.suite.plugin", "-ra"]
    command += ["-p", "no:cacheprovider", "--tb=short", *map(str, arguments)]
    environment = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)


def suite(folder, *arguments):
    report = folder / "report.xml"
    done = run(folder, "--pyargs", "deploy.suite", f"--junitxml={report}", *arguments)
    found = {}
    for case in ElementTree.parse(report).iter("testcase"):
        name = f"{case.get('classname').rpartition('.')[2]}: {case.get('name')}"
        outcome = [child.tag for child in case if child.tag in ("failure", "error", "skipped")]
        found[name] = outcome[0] if outcome else "passed"
    return done, found, ElementTree.parse(report)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("suite")


@pytest.fixture(scope="module")
def labelled(folder):
    return write_labelled_bundle(folder / "labelled").path


@pytest.fixture(scope="module")
def good(folder, labelled):
    limits = ("--max-p99-ms", "1000", "--timed-seconds", "2")
    return suite(folder, "--bundle", labelled, *limits)


def test_a_good_bundle_passes_test_by_test(good):
    done, found, _ = good
    assert done.returncode == 0, done.stdout
    watched = found.pop("test_latency: test_the_board_kept_its_pace")
    assert watched in ("passed", "skipped")  # not every machine tells its clocks
    assert set(found.values()) == {"passed"}
    assert len(found) == 8 and {name.partition(":")[0] for name in found} == {
        "test_parity",
        "test_accuracy",
        "test_latency",
    }


def test_junit_holds_what_was_measured_and_on_what(good):
    _, _, tree = good
    properties = {p.get("name"): p.get("value") for p in tree.iter("property")}
    assert properties["precision"] == "fp32" and "onnxruntime" in properties["backend"]
    assert float(properties["max_scaled_error"]) < 1e-5
    assert properties["net_loss"] == "0.0"
    assert float(properties["p99_ms"]) > 0


def test_a_wrong_model_fails_parity_and_accuracy_and_a_short_run_has_no_p99(folder):
    wrong = write_labelled_bundle(
        folder / "wrong", changes={"model.fp32.onnx": linear_onnx(-np.eye(3))}
    ).path
    done, found, _ = suite(
        folder, "--bundle", wrong, "--timed-seconds", "0.002", "--max-p99-ms", "9"
    )
    assert done.returncode == 1
    failed = {name for name, outcome in found.items() if outcome == "failure"}
    assert failed == {
        "test_parity: test_golden_images_come_out_as_the_reference[inference]",
        "test_parity: test_golden_images_come_out_as_the_reference[end to end]",
        "test_accuracy: test_the_net_loss_on_held_out_images_is_within_the_gate",
        "test_latency: test_timed_outputs_are_right",
        "test_latency: test_the_99th_percentile_is_within_its_limit",
    }
    assert re.search("n too small: .* a p99 needs 662", done.stdout)
    assert "scaled error" in done.stdout and "net loss 100.00 points" in done.stdout


def test_a_bundle_that_is_too_slow_fails_and_says_by_how_much(folder, labelled):
    limits = ("--max-p99-ms", "0.0001", "--timed-seconds", "1.5")
    done = run(
        folder, "--pyargs", "deploy.suite", "-k", "percentile", "--bundle", labelled, *limits
    )
    assert done.returncode == 1
    assert re.search(r"p99 \S+ ms > 0.0001 ms, n = \d+", done.stdout), done.stdout


def test_a_bundle_without_a_sample_skips_its_accuracy_and_says_so(folder):
    bare = write_small_bundle(folder / "bare").path
    done = run(folder, "--pyargs", "deploy.suite", "-k", "net_loss", "--bundle", bare)
    assert done.returncode == 0 and "the bundle carries no labelled sample" in done.stdout


def test_a_tampered_bundle_is_an_error_that_names_the_file(folder):
    path = write_small_bundle(folder / "tampered").path
    (path / "golden/0.png").write_bytes(b"x")
    done = run(folder, "--pyargs", "deploy.suite", "-x", "--bundle", path)
    assert done.returncode == 1 and "'golden/0.png' is 1 bytes" in done.stdout
    assert "Traceback" not in done.stdout and "conftest.py" not in done.stdout


def test_the_suite_without_a_bundle_is_wrong_use(folder):
    done = run(folder, "--pyargs", "deploy.suite")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR and "no --bundle" in done.stderr


def test_another_run_of_pytest_collects_nothing_of_it():
    done = run(ROOT, "deploy", "--collect-only", "-q")
    assert done.returncode == pytest.ExitCode.NO_TESTS_COLLECTED, done.stdout


@pytest.mark.parametrize("value", ["0", "-1", "nan", "ten"])
def test_a_limit_that_is_no_positive_number_is_refused(folder, labelled, value):
    done = run(folder, "--pyargs", "deploy.suite", "--bundle", labelled, f"--max-p99-ms={value}")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
