"""The benchmark against the peers, in-process on a tiny model, without any peer to install."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))

import latency_job
import peak
from install import install
from latency import read, run
from latency_job import OURS, Job, Row
from latency_report import draw, figure, misses, to_markdown
from peak import Peak
from peers import PEERS, PLAIN, Ready
from subjects import Photos, Subject

SUBJECT = Subject("tiny", "convnet", 32, flags=("--model.width", "8"), wanted=1.0, beats_peers=True)


def broken(case):
    raise RuntimeError("no such\nlibrary")


def wrong(case):
    """Answer noise, at once."""
    return Ready(lambda images: np.random.default_rng(0).normal(size=(len(images), 10)), "fp32")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """One real job: ours, two peers that are always there, one that fails, one that is wrong."""
    out = tmp_path_factory.mktemp("bench")
    peaks = {kind: Peak(kind, 100.0, "a test", 1) for kind in ("fp32", "bf16", "int8")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latency_job, "measure_peaks", lambda threads: peaks)
        patch.setattr(latency_job, "_LEAST", 6)
        patch.setitem(PEERS, "OpenVINO", broken)
        patch.setitem(PEERS, "onnxslim", wrong)
        job = Job(SUBJECT, 1, 1, 0.0, (PLAIN, "torch eager", "OpenVINO", "onnxslim"))
        (result,) = run([job], Photos(None), out)
    return result, out


def test_a_job_times_ours_and_the_peers_and_keeps_the_result(found):
    result, out = found
    rows = {row.peer: row for row in result.rows}
    assert result.rows[0].peer == OURS and result.rounds == (6, 6)
    for name in (OURS, PLAIN, "torch eager"):
        assert rows[name].ms > 0 and rows[name].end_ms > rows[name].ms
        assert rows[name].speedup[1] <= rows[name].speedup[0] <= rows[name].speedup[2]
    assert rows[PLAIN].speedup == (1.0, 1.0, 1.0) and rows[OURS].beside_ours == (1.0, 1.0, 1.0)
    assert rows["torch eager"].sqnr_db is None  # the reference itself
    assert rows[PLAIN].sqnr_db > 80
    document = json.loads((out / "tiny-t1-b1.json").read_text())
    assert document["machine"] and document["versions"]["torch"] and "command" in document
    assert read(out / "tiny-t1-b1.json") == result


def test_a_peer_that_fails_is_a_row_with_its_error(found):
    (row,) = [row for row in found[0].rows if row.peer == "OpenVINO"]
    assert row == Row("OpenVINO", error="RuntimeError: no such library")
    assert "failed: RuntimeError: no such library" in to_markdown([found[0]])


def test_wrong_answers_are_seen(found):
    (row,) = [row for row in found[0].rows if row.peer == "onnxslim"]
    assert row.sqnr_db < 10


def test_a_finished_job_is_not_run_again(found, monkeypatch):
    monkeypatch.setattr("latency.measure", broken)
    (again,) = run([Job(SUBJECT, 1, 1, 0.0)], Photos(None), found[1])
    assert again == found[0]


def test_a_plot_is_written_for_each_question(found, tmp_path):
    plots = draw([found[0]], tmp_path)
    assert [path.stem for path in plots] == [
        "latency-network-t1-b1",
        "latency-end-to-end-t1-b1",
        "latency-peak-t1-b1",
        "latency-error",
    ]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in plots)


def judged(result, *, speedup, beside, gate=None):
    """Return what is missed where ours is so fast, and one peer takes so much of our time."""
    ours = Row(OURS, computes="int8", ms=1.0, speedup=speedup)
    peer = Row("OpenVINO", computes="bf16", ms=1.0, beside_ours=beside, gate=gate)
    return misses([dataclasses.replace(result, rows=(ours, peer))], [SUBJECT])


def test_the_gates(found):
    enough, level = (1.1, 1.0, 1.2), (0.99, 0.9, 1.05)
    assert judged(found[0], speedup=enough, beside=level) == []
    assert "wanted 1x" in judged(found[0], speedup=(0.9, 0.8, 1.0), beside=level)[0]
    assert "OpenVINO takes 0.97" in judged(found[0], speedup=enough, beside=(0.97, 0.9, 1.1))[0]
    assert "OpenVINO takes 0.99" in judged(found[0], speedup=enough, beside=(0.99, 0.98, 0.995))[0]
    # who loses too much accuracy is no faster peer
    assert judged(found[0], speedup=enough, beside=(0.5, 0.4, 0.6), gate=False) == []
    assert "not measured" in figure([dataclasses.replace(found[0], rows=(Row(OURS),))])


def test_the_machines_peak_is_the_best_of_all(monkeypatch):
    monkeypatch.setattr(peak, "_SIZES", (64,))
    peaks = peak.measure_peaks(1)
    assert {"fp32", "bf16", "int8"} == set(peaks)
    assert all(each.gflops > 0.1 and each.size == 64 for each in peaks.values())


def test_no_installation_is_tried_where_all_is_there(tmp_path, monkeypatch):
    metadata = tmp_path / "a_peer-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: A.Peer\nVersion: 1.0\n")
    asked = []

    def pip(command, **options):
        asked.append(command)
        return subprocess.CompletedProcess(command, 1, "", "no network")

    monkeypatch.setattr("install.subprocess.run", pip)
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert install(tmp_path, ["a-peer>=1"]) == "" and asked == []
    assert install(tmp_path, ["a-peer", "another"]) == "no network"
    assert asked[0][-1] == "another" and "a-peer" not in asked[0]
    assert sys.path[-1] == str(tmp_path)


def test_the_peers_export_is_onnx(tmp_path):
    import torch
    from peers import Case
    from torch import nn

    images = np.zeros((2, 3, 8, 8), np.float32)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 3)).eval()
    case = Case(model, images, images, 1, tmp_path)
    assert onnx.load(case.plain).graph.node
    expected = model(torch.from_numpy(images)).detach().numpy()
    for name in (PLAIN, "torch eager", "ORT static int8"):
        np.testing.assert_allclose(PEERS[name](case).run(images), expected, atol=0.05)
