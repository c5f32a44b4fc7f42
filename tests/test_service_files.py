"""The unit, the Dockerfiles and the pages name what there is; none of them can be run here."""

import configparser
import re
import shlex
from pathlib import Path

import pytest

from edgereg.cli import build_parser
from export.targets import TARGETS

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "docs" / f"{name}.md" for name in ("jetpack6", "jetpack7", "serving")]
DOCKERFILES = sorted((ROOT / "deploy" / "box").glob("*.Dockerfile"))


class Unit(configparser.ConfigParser):
    def optionxform(self, optionstr):
        return optionstr


@pytest.fixture(scope="module")
def service():
    unit = Unit(interpolation=None)
    unit.read(ROOT / "deploy" / "box" / "edgereg.service")
    return unit["Service"]


def test_the_unit_starts_a_command_that_there_is(service):
    program, *arguments = shlex.split(service["ExecStart"])
    args = build_parser().parse_args(arguments)
    assert program.endswith("/bin/edgereg") and service["Type"] == "notify"
    folder = Path("/var/lib") / service["StateDirectory"]
    assert args.bundle == folder / "current" / "bundle" and args.host == "127.0.0.1"
    assert service["Environment"] == f"EDGEREG_CACHE={folder}/current/engines"
    assert args.drain_s < float(service["TimeoutStopSec"])


def test_the_unit_gives_no_more_than_the_gpu_needs(service):
    for wanted in ("NoNewPrivileges", "ProtectHome", "PrivateTmp", "LockPersonality"):
        assert service[wanted] == "yes"
    assert service["ProtectSystem"] == "strict" and service["CapabilityBoundingSet"] == ""
    assert "PrivateDevices" not in service and "MemoryDenyWriteExecute" not in service


def extras():
    text = (ROOT / "pyproject.toml").read_text()
    table = text.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    return set(re.findall(r"^(\w+) = ", table, re.MULTILINE))


@pytest.mark.parametrize("file", [*DOCKERFILES, *PAGES], ids=lambda file: file.name)
def test_extras_that_are_named_exist_and_nothing_is_said_to_have_run(file):
    text = file.read_text()
    named = {name for group in re.findall(r"\w\[([\w,]+)\]'", text) for name in group.split(",")}
    assert named <= extras() and "board" in text and re.search(r"(?i)not.{0,20}run", text)


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.name)
def test_a_container_runs_as_nobody_special_and_sees_the_bindings(file):
    text = file.read_text()
    assert "USER edgereg" in text and "--system-site-packages" in text
    assert re.search(r"ARG BASE_IMAGE=nvcr\.io/nvidia/[\w-]+:[\w.-]+\n", text)


@pytest.mark.parametrize("file", PAGES, ids=lambda file: file.name)
def test_commands_on_the_pages_are_commands(file):
    found = 0
    for line in file.read_text().splitlines():
        if line.startswith("    ") and line.strip().startswith("edgereg "):
            command = re.sub(r"[\[\]]", "", line.partition("#")[0])
            build_parser().parse_args(shlex.split(command)[1:])
            found += 1
    targets = set(re.findall(r"jetpack\d[\w.]*(?:-thor|-orin)?(?=`)", file.read_text()))
    assert targets <= set(TARGETS) and (found or file.name == "jetpack7.md")
