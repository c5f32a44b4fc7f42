"""The page of curves: what it counts, what it draws, what it refuses."""

import json
import re

import pytest

from deploy.errors import BadInputError
from edgereg.errors import DataError
from edgereg.report.run_report import read_run, write_report


def log(folder, *events):
    folder.mkdir()
    (folder / "log.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return folder


def step(number, loss):
    return {"event": "step", "step": number, "epoch": number // 2, "loss": loss, "lr": 0.1}


def epoch(number, top1, val=None):
    return {
        "event": "epoch",
        "epoch": number,
        "loss": 1.0,
        "lr": 0.1,
        "top1": top1,
        "skipped": 1,
        "val": {} if val is None else {"top1": val, "loss": 0.5},
        "images_per_second": 100.0,
    }


@pytest.fixture
def run(tmp_path):
    return log(
        tmp_path / "model.run",
        {"event": "start"},
        step(0, 2.0),
        {"event": "skip", "step": 1, "epoch": 0, "loss": None, "lr": 0.1},
        epoch(0, 0.5, 0.4),
        {"event": "resume"},
        step(2, 1.0),
        step(3, 0.9),
        epoch(1, 0.75, 0.625),
    )


def test_a_log_is_counted(run, tmp_path):
    # by the checkpoint's name, or by the folder's
    assert read_run(tmp_path / "model") == (found := read_run(run))
    assert (found.name, found.skips, found.resumes, found.resumed_at) == ("model", 1, 1, (2,))
    assert [event["step"] for event in found.steps] == [0, 2, 3]
    assert [event["top1"] for event in found.epochs] == [0.5, 0.75]


def test_half_a_line_of_a_run_that_goes_on_is_left_out(run):
    with (run / "log.jsonl").open("a") as file:
        file.write('{"event": "step", "st')
    assert len(read_run(run).steps) == 3


def test_the_page_has_a_curve_of_everything_that_was_logged(run, tmp_path):
    other = log(tmp_path / "<other>.run", {"event": "start"}, step(0, 3.0), epoch(0, None))
    result = write_report([run, other], tmp_path / "curves.html")
    page = result.path.read_text()
    titles = re.findall("<h2>(.*?)</h2>", page)
    assert titles[0] == "Loss"
    assert len(titles) == page.count("<svg") == 6
    assert re.search("<td>model</td><td>2</td><td>1.000</td><td>75.0%</td><td>62.5%</td>", page)
    assert "&lt;other&gt;</td><td>1</td><td>1.000</td><td>-</td><td>-</td>" in page
    assert "<other>" not in page
    assert not re.search("""(src|href)=["']?http|@import|url\\(http""", page)  # self-contained
    assert [run["resumes"] for run in result.to_json()["runs"]] == [1, 0]


def test_what_nobody_measured_has_no_curve(tmp_path):
    run = log(tmp_path / "encoder.run", {"event": "start"}, step(0, 3.0), epoch(0, None))
    titles = re.findall("<h2>(.*?)</h2>", write_report([run], tmp_path / "a.html").path.read_text())
    assert titles == ["Loss", "Learning rate", "Speed"]


def test_the_same_runs_are_the_same_page(run, tmp_path):
    first, again = (write_report([run], tmp_path / name).path for name in ("a.html", "b.html"))
    assert first.read_bytes() == again.read_bytes()


def test_a_report_replaces_nothing_unasked(run, tmp_path):
    out = tmp_path / "curves.html"
    out.write_text("mine")
    with pytest.raises(BadInputError, match=r"curves\.html' exists; remedy: .*--force"):
        write_report([run], out)
    assert out.read_text() == "mine"
    assert "<svg" in write_report([run], out, force=True).path.read_text()


@pytest.mark.parametrize("text", [None, "no json\n", "[1]\n", "\xff\n"])
def test_a_log_that_is_none_is_refused(tmp_path, text):
    folder = tmp_path / "model.run"
    folder.mkdir()
    if text is not None:
        (folder / "log.jsonl").write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=r"model\.run/log\.jsonl': .*; remedy: name a checkpoint"):
        write_report([folder], tmp_path / "curves.html")
    assert not (tmp_path / "curves.html").exists()
