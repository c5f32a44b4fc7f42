import json
import subprocess
import sys

import pytest
import torch

from edgereg.errors import CheckpointError, EdgeregError
from edgereg.train.run_folder import RunFolder, State, open_run_folder, run_folder_of

IDENTITY = {"verb": "train", "recipe": {"seed": 0, "optim": {"lr": 0.1}}}


def state(value):
    tensors = {"w": torch.full((3, 2), value), "n": torch.tensor(7)}
    return State(tensors, {"step": 3, "loss": 0.1 + 0.2, "best": None})


def opened(tmp_path, identity=IDENTITY, *, resume=False, force=False):
    return open_run_folder(tmp_path / "model", identity, resume=resume, force=force)


def test_a_state_comes_back_to_the_bit(tmp_path):
    with opened(tmp_path) as folder:
        folder.write(3, state(1 / 3))
        found = folder.latest()
    assert torch.equal(found.tensors["w"], torch.full((3, 2), 1 / 3))
    assert found.tensors["n"].dtype == torch.int64 and found.facts == state(0).facts


def test_a_newer_state_replaces_the_older_one(tmp_path):
    with opened(tmp_path) as folder:
        for step in (3, 4, 20):
            folder.write(step, state(float(step)))
        assert [p.name for p in folder.path.glob("state-*")] == ["state-00000020"]
        assert folder.latest().tensors["w"][0, 0] == 20


def test_the_newest_of_several_states_counts(tmp_path):
    """A kill between the writing of one and the removal of the other leaves both."""
    with opened(tmp_path) as folder:
        folder.write(9, state(9.0))
        (folder.path / "state-00000009").rename(folder.path / "aside")
        folder.write(10, state(10.0))
        (folder.path / "aside").rename(folder.path / "state-00000009")
        assert folder.latest().tensors["w"][0, 0] == 10


def test_tensors_that_share_memory_are_written_apart(tmp_path):
    weight = torch.ones(4)
    with opened(tmp_path) as folder:
        folder.write(1, State({"a": weight, "b": weight, "part": weight[1:3]}, {}))
        assert folder.latest().tensors["part"].shape == (2,)


def test_a_state_is_gone_on_with_or_thrown_away_only_on_purpose(tmp_path):
    with opened(tmp_path) as folder:
        folder.write(1, state(1.0))
    with pytest.raises(CheckpointError, match=r"holds a state.*--resume"), opened(tmp_path):
        pass
    with opened(tmp_path, resume=True) as folder:
        assert folder.latest() is not None
    with opened(tmp_path, force=True) as folder:
        assert folder.latest() is None


def test_a_run_that_has_no_state_yet_starts_with_resume_too(tmp_path):
    with opened(tmp_path, resume=True) as folder:
        assert folder.latest() is None


@pytest.mark.parametrize(
    ("identity", "key"),
    [
        ({"verb": "pretrain", "recipe": IDENTITY["recipe"]}, "verb"),
        ({"verb": "train", "recipe": {"seed": 0, "optim": {"lr": 0.2}}}, r"recipe\.optim\.lr"),
        ({"verb": "train", "recipe": {"seed": 1, "optim": {"lr": 0.1}}}, r"recipe\.seed"),
        ({**IDENTITY, "init": "abc"}, "init"),
    ],
)
def test_another_run_is_not_gone_on_with(tmp_path, identity, key):
    with opened(tmp_path) as folder:
        folder.write(1, state(1.0))
    with (
        pytest.raises(CheckpointError, match=f"started with another {key}"),
        opened(tmp_path, identity, resume=True),
    ):
        pass


@pytest.mark.parametrize("damage", ["cut", "flip", "no json", "strange json"])
def test_a_damaged_state_is_named(tmp_path, damage):
    with opened(tmp_path) as folder:
        folder.write(1, state(1.0))
    weights, facts = (
        folder.path / "state-00000001" / f"state.{suffix}" for suffix in ("safetensors", "json")
    )
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    {
        "cut": lambda: weights.write_bytes(bytes(data[:-3])),
        "flip": lambda: weights.write_bytes(bytes(data)),
        "no json": facts.unlink,
        "strange json": lambda: facts.write_text("{}"),
    }[damage]()
    with pytest.raises(CheckpointError, match=r"state-00000001.*--force"):
        folder.latest()


def test_a_new_run_starts_a_new_log(tmp_path):
    with opened(tmp_path) as folder:
        folder.log.write_text("{}\n")
    with opened(tmp_path) as folder:
        assert not folder.log.exists()
        assert json.loads((folder.path / "run.json").read_text())["verb"] == "train"


def test_what_a_kill_left_half_written_is_cleaned(tmp_path):
    path = run_folder_of(tmp_path / "model")
    (path / ".staging-x").mkdir(parents=True)
    (path / ".staging-x" / "state.safetensors").write_bytes(b"half")
    (path / ".staging-y").write_bytes(b"half")
    with opened(tmp_path):
        assert not list(path.glob(".staging-*"))


def test_a_second_process_is_kept_out(tmp_path):
    code = (
        "from pathlib import Path\n"
        "from edgereg.train.run_folder import open_run_folder\n"
        f"with open_run_folder(Path({str(tmp_path / 'model')!r}), {IDENTITY!r}, resume=False, "
        "force=False): pass"
    )
    with opened(tmp_path):
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert EdgeregError.__name__ in result.stderr and "another one holds" in result.stderr
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_folder_lies_beside_the_checkpoint(tmp_path):
    assert run_folder_of(tmp_path / "model") == tmp_path / "model.run"
    assert RunFolder(tmp_path).last_good.parent == tmp_path
