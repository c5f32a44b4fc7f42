import json
import time

import pytest

from edgereg.train import log as module
from edgereg.train.log import RunLog


@pytest.fixture(autouse=True)
def without_tensorboard(monkeypatch):
    monkeypatch.setattr(module, "_tensorboard", lambda path: None)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_event_is_a_line(tmp_path):
    with RunLog(tmp_path / "log.jsonl") as log:
        log.write("start", threads=2)
        log.write("step", step=0, loss=1.5)
    first, second = lines(tmp_path / "log.jsonl")
    assert first["event"] == "start" and first["tensorboard"] is False and first["threads"] == 2
    assert second["event"] == "step" and second["loss"] == 1.5 and second["time_s"] >= 0


def test_what_is_no_number_is_null_and_named(tmp_path):
    with RunLog(tmp_path / "log.jsonl") as log:
        log.write("skip", step=3, loss=float("nan"), lr=float("inf"), other=1.0)
    (line,) = lines(tmp_path / "log.jsonl")
    assert line["loss"] is line["lr"] is None and line["nonfinite"] == ["loss", "lr"]
    assert line["other"] == 1.0


def test_a_resume_cuts_off_what_came_after_the_state(tmp_path):
    path = tmp_path / "log.jsonl"
    with RunLog(path) as log:
        log.write("step", step=0)
        at = log.offset()
        assert at == path.stat().st_size
        log.write("step", step=1)
    path.write_text(path.read_text() + '{"event": "ste')  # a kill in the middle of a line
    with RunLog(path, resume_at=at) as log:
        log.write("resume")
        log.write("step", step=1)
    assert [(x["event"], x.get("step")) for x in lines(path)] == [
        ("step", 0),
        ("resume", None),
        ("step", 1),
    ]


def test_waiting_takes_time_and_no_processor(tmp_path):
    path = tmp_path / "log.jsonl"
    with RunLog(path) as log:
        log.write("start")
        time.sleep(0.1)
        log.write("slept")
        until = time.process_time() + 0.1
        while time.process_time() < until:
            pass
        log.write("worked")
    start, slept, worked = lines(path)
    assert slept["time_s"] - start["time_s"] >= 0.1 > slept["cpu_s"] - start["cpu_s"]
    assert worked["cpu_s"] - slept["cpu_s"] >= 0.1


def test_a_new_run_starts_a_new_log(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text("old\n")
    with RunLog(path) as log:
        log.write("start")
    assert [x["event"] for x in lines(path)] == ["start"]


def test_tensorboard_hears_the_same_figures(tmp_path, monkeypatch):
    heard = []

    class Board:
        def add_scalar(self, *what):
            heard.append(what)

        def close(self):
            heard.append("closed")

    monkeypatch.setattr(module, "_tensorboard", lambda path: Board())
    with RunLog(tmp_path / "log.jsonl") as log:
        log.write("start")
        log.write("step", step=4, loss=1.25, lr=0.5, note="x")
    assert heard == [("step/loss", 1.25, 4), ("step/lr", 0.5, 4), "closed"]
    assert lines(tmp_path / "log.jsonl")[0]["tensorboard"] is True
