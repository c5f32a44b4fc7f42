import hashlib
import os
from pathlib import Path

import pytest

from deploy.bundle.sealed import SealedCopy, hash_file

DATA = bytes(range(256)) * 3000 + b"tail"  # more than one piece, and no whole number of them


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "f"
    path.write_bytes(DATA)
    return path


@pytest.mark.parametrize("data", [b"", b"x", DATA])
def test_a_copy_has_the_bytes_that_were_hashed(file, data):
    file.write_bytes(data)
    copy = SealedCopy(file)
    assert copy.sha256 == hash_file(file) == hashlib.sha256(data).hexdigest()
    assert bytes(copy.view()) == data
    assert Path(copy.path).read_bytes() == data


def test_a_copy_stays_as_it_is_whatever_becomes_of_the_file(file):
    copy = SealedCopy(file)
    file.write_bytes(b"another")
    assert bytes(copy.view()) == DATA


def test_nobody_can_change_a_copy(file):
    copy = SealedCopy(file)
    with Path(copy.path).open("r+b", buffering=0) as opened:
        with pytest.raises(PermissionError):
            opened.write(b"y")
        for size in (1, len(DATA) + 1):
            with pytest.raises(PermissionError):
                opened.truncate(size)
    with pytest.raises(TypeError, match="read-only"):
        copy.view()[0] = 1
    assert bytes(copy.view()) == DATA


def test_a_copy_ends_with_the_last_that_refers_to_it(file):
    copy = SealedCopy(file)
    path, view = copy.path, copy.view()
    del copy
    assert not os.path.lexists(path)
    assert bytes(view) == DATA
