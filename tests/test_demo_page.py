import pytest

from edgereg.demo import run
from edgereg.demo.jobs import TrainJob
from edgereg.errors import DataError


def test_a_job_that_fails_in_its_process_stops_the_demo_which_leaves_nothing(
    tmp_path, monkeypatch, capfd
):
    good = TrainJob("good", "cnn-plain")
    bad = TrainJob("bad", "cnn-plain", data="emoji-10:nobody:train")
    waiting = TrainJob("waiting", "few-labels", init="bad")
    monkeypatch.setattr(run, "TRAINING", (bad, good, waiting))
    with pytest.raises(DataError) as caught:
        run.run_demo(tmp_path / "demo", quick=True, force=False)
    error = caught.value
    assert "vendor of emoji-10" in error.rule and error.found == "'nobody'" and error.remedy
    assert list(tmp_path.iterdir()) == []
    assert "Traceback" not in capfd.readouterr().err
