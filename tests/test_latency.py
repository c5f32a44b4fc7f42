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
import rounds
import subjects
from install import install
from latency import _parser, jobs, keep_images, read, run
from latency_job import OURS, Job, Row
from latency_report import draw, figure, misses, to_markdown
from latency_summary import to_summary
from peak import Peak
from peers import PEERS, PLAIN, Ready
from subjects import QUICK, SUBJECTS, Photos, Subject

from export.precision.variants import TOLERANCES

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
        patch.setattr(rounds, "_LEAST", 6)
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


def test_the_summary_has_a_line_for_each_job_and_says_who_failed(found):
    ours = found[0].rows[0]
    alone, whole, costs = to_summary([found[0], found[0]]).split("| model |")[1:]
    lines = [line for line in alone.splitlines() if line.startswith("| tiny | 1 | 1 |")]
    assert len(lines) == 2 and "failed" in lines[0]
    assert f"{ours.speedup[0]:.2f} [{ours.speedup[1]:.2f}, " in lines[0]
    assert f"| {ours.end_ms:.3g} |" in whole and f"{ours.share:.0%}, " in costs
    assert all(
        len({line.count("|") for line in table.splitlines()[1:4]}) == 1
        for table in (alone, whole, costs)
    )


def test_the_tolerance_of_int8_is_lifted_for_random_weights_only():
    usual = dict(TOLERANCES)
    with subjects._of_random_weights():
        assert TOLERANCES["int8"].min_top1_agreement == 0.0
        assert TOLERANCES["fp32"] == usual["fp32"]
    assert usual == TOLERANCES and usual["int8"].min_top1_agreement > 0.5


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
    assert "OpenVINO failed" in judged(found[0], speedup=enough, beside=None)[0]
    # who loses too much accuracy is no faster peer
    assert judged(found[0], speedup=enough, beside=(0.5, 0.4, 0.6), gate=False) == []
    assert "not measured" in figure([dataclasses.replace(found[0], rows=(Row(OURS),))])


def test_who_loses_too_much_in_one_job_is_no_faster_peer_in_another(found):
    ours = Row(OURS, speedup=(1.1, 1.0, 1.2))
    peers = [Row("OpenVINO", beside_ours=(0.5, 0.4, 0.6), gate=gate) for gate in (False, None)]
    results = [dataclasses.replace(found[0], rows=(ours, peer)) for peer in peers]
    assert misses(results, [SUBJECT]) == []
    assert len(misses(results[1:], [SUBJECT])) == 1


def test_noise_is_a_miss_however_fast_it_comes(found):
    for decibels, count in ((9.0, 1), (20.0, 0), (None, 0)):
        ours = Row(OURS, speedup=(9.0, 9.0, 9.0), sqnr_db=decibels)
        result = dataclasses.replace(found[0], rows=(ours,))
        assert len(misses([result], [SUBJECT])) == count


def test_what_the_quick_form_keeps_is_not_taken_for_the_full_form():
    quick, full = ({job.slug for job in jobs(_parser().parse_args(a))} for a in (["--quick"], []))
    assert len(quick) == 1 and len(full) == 4 * len(SUBJECTS) and not quick & full
    assert not {subject.slug for subject in QUICK} & {subject.slug for subject in SUBJECTS}


def test_results_on_other_images_are_not_continued(tmp_path, capsys):
    keep_images(tmp_path, None)
    keep_images(tmp_path, None)
    with pytest.raises(SystemExit):
        keep_images(tmp_path, tmp_path / "photos")
    assert "results on emoji-10, not" in capsys.readouterr().err


def test_a_batch_that_does_not_divide_the_images_is_refused(capsys):
    with pytest.raises(SystemExit):
        jobs(_parser().parse_args(["--batch", "8,3"]))
    assert "divides 64 is wanted; found: 3" in capsys.readouterr().err


def test_the_products_of_attention_are_counted():
    import torch

    class Attention(torch.nn.Module):
        def forward(self, x):
            return torch.nn.functional.scaled_dot_product_attention(x, x, x)

    images = np.zeros((1, 3, 16, 8), np.float32)
    assert latency_job.count_gflop(Attention(), images) == 2 * 2 * 3 * 16 * 16 * 8 / 1e9


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
