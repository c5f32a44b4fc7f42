import errno
import fcntl
import hashlib
import os
import resource
import runpy
import signal
from pathlib import Path

import pytest

from deploy.bundle import read as bundle_read
from deploy.bundle import sealed
from deploy.bundle.sealed import SealedCopy, hash_file
from deploy.errors import BadInputError

DATA = bytes(range(256)) * 3000 + b"tail"  # more than one piece, and no whole number of them


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "f"
    path.write_bytes(DATA)
    return path


@pytest.mark.parametrize("data", [b"", b"x", DATA])
def test_a_copy_has_the_bytes_that_were_hashed(file, data):
    file.write_bytes(data)
    copy = SealedCopy(file, size=len(data))
    assert copy.sha256 == hash_file(file, size=len(data)) == hashlib.sha256(data).hexdigest()
    assert bytes(copy.view()) == data
    assert Path(copy.path).read_bytes() == data


def test_a_copy_stays_as_it_is_whatever_becomes_of_the_file(file):
    copy = SealedCopy(file, size=len(DATA))
    file.write_bytes(b"another")
    assert bytes(copy.view()) == DATA


def test_nobody_can_change_a_copy(file):
    copy = SealedCopy(file, size=len(DATA))
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
    copy = SealedCopy(file, size=len(DATA))
    path, view = copy.path, copy.view()
    del copy
    assert not os.path.lexists(path)
    assert bytes(view) == DATA


def test_of_a_file_that_grows_for_ever_one_byte_too_many_is_read():
    for size in (0, 10, len(DATA)):
        one_more = hashlib.sha256(bytes(size + 1)).hexdigest()
        assert hash_file(Path("/dev/zero"), size=size) == one_more
        copy = SealedCopy(Path("/dev/zero"), size=size)
        assert copy.sha256 == one_more and len(copy.view()) == size + 1


def test_a_python_without_memfd_create_of_its_own_makes_copies_too(file, monkeypatch):
    monkeypatch.delattr(os, "memfd_create")
    for name in [name for name in dir(fcntl) if name.startswith(("F_SEAL", "F_ADD_SEALS"))]:
        monkeypatch.delattr(fcntl, name)
    copy = runpy.run_path(sealed.__file__)["SealedCopy"](file, size=len(DATA))
    assert bytes(copy.view()) == DATA
    with pytest.raises(PermissionError):
        os.truncate(copy.path, 1)


def open_numbers():
    return sorted(path.name for path in Path("/proc/self/fd").iterdir())


@pytest.mark.parametrize(
    ("limit", "most", "found"),
    [
        (resource.RLIMIT_NOFILE, 0, "Too many open files: 'memfd_create'"),
        (resource.RLIMIT_FSIZE, 4096, "File too large"),
    ],
)
def test_memory_that_is_refused_is_explained_and_no_file_is_left_open(file, limit, most, found):
    opened = open_numbers()
    before = resource.getrlimit(limit)
    resource.setrlimit(limit, (most, before[1]))
    try:
        with pytest.raises(BadInputError, match="sealed copy") as caught:
            SealedCopy(file, size=len(DATA))
    finally:
        resource.setrlimit(limit, before)
    assert found in caught.value.found and "memfd_create" in caught.value.remedy
    del caught
    assert open_numbers() == opened


def test_a_system_without_memfd_create_or_proc_is_explained(file, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(sealed.ctypes, "CDLL", lambda *_, **__: object())
        with pytest.raises(BadInputError, match=os.strerror(errno.ENOSYS)):
            SealedCopy(file, size=len(DATA))

    def missing(path):
        raise FileNotFoundError(errno.ENOENT, "not there", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(sealed.Path, "stat", missing)
        with pytest.raises(BadInputError, match="/proc/self/fd"):
            SealedCopy(file, size=len(DATA))


def test_a_file_that_cannot_be_read_is_not_blamed_on_memory(tmp_path):
    with pytest.raises(FileNotFoundError):
        SealedCopy(tmp_path / "none", size=1)


@pytest.fixture
def pipe(tmp_path):
    """A pipe where a file was; whoever waits for its writer is stopped."""

    def stop(*_):
        raise TimeoutError("it waits")

    os.mkfifo(tmp_path / "pipe")
    signal.signal(signal.SIGALRM, stop)
    signal.alarm(5)
    yield tmp_path / "pipe"
    signal.alarm(0)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)


@pytest.mark.parametrize("has_writer", [False, True])
def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(pipe, has_writer):
    writer = os.open(pipe, os.O_RDWR | os.O_NONBLOCK) if has_writer else None
    assert hash_file(pipe, size=3) == hashlib.sha256(b"").hexdigest()
    assert bundle_read._read(pipe, size=3) == b""
    with pytest.raises(BadInputError, match="Invalid argument"):
        SealedCopy(pipe, size=3)
    if writer is not None:
        os.close(writer)
