import io
import sys

import pytest

from deploy import terminal
from deploy.terminal import Progress, printable, table


def test_a_table_is_aligned():
    assert table([("name", "n"), ("a", "100"), ("long name", "1")]).splitlines() == [
        "name         n",
        "a          100",
        "long name    1",
    ]


def test_what_a_terminal_would_obey_is_escaped():
    assert printable("grün \x1b[31m\n\udcff") == "grün \\x1b[31m\\n\\udcff"


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("stream", [Terminal, io.StringIO])
def test_progress_is_drawn_on_a_terminal_only_and_wiped_at_the_end(stream, monkeypatch):
    monkeypatch.setattr(terminal, "_PATIENCE_S", 0.0)
    monkeypatch.setattr(sys, "stderr", stream())
    with Progress("verify") as progress:
        progress("1 of 2")
        progress("2 of 2")  # too soon after the first to be drawn
    expected = "\r\x1b[Kverify: 1 of 2\r\x1b[K" if stream is Terminal else ""
    assert sys.stderr.getvalue() == expected


def test_short_work_shows_no_progress(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with Progress("verify") as progress:
        progress("1 of 2")
    assert sys.stderr.getvalue() == ""
