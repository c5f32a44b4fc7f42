"""A child process with this Python and this edgereg, for what may crash or must start fresh."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

__all__ = ["ask_child", "child_command"]

_CALL = (
    "import importlib, json, sys; sys.path[0] = sys.argv[1]; "  # in place of the working directory
    "function = getattr(importlib.import_module(sys.argv[2]), sys.argv[3]); "
    "print('\\n' + json.dumps(function(*json.loads(sys.argv[4]))), flush=True)"
)


def child_command(module: str, function: str, *arguments: Any) -> list[str]:
    """The command of a Python that calls a function and prints its result as a last line of JSON.

    Args:
        module: Its module.
        function: Its name.
        arguments: JSON values.
    """
    root = str(Path(__file__).parent.parent)
    return [sys.executable, "-c", _CALL, root, module, function, json.dumps(arguments)]


def ask_child(
    module: str, function: str, *arguments: Any, timeout_s: float = 120.0
) -> tuple[Any, str]:
    """Call a function in a child process; a crash there is an answer here.

    Returns:
        What it returned, as JSON has it, and "". Or None, and why there is no answer.
    """
    try:
        child = subprocess.run(
            child_command(module, function, *arguments),
            capture_output=True,
            stdin=subprocess.DEVNULL,
            text=True,
            errors="replace",
            timeout=timeout_s,
        )
    except subprocess.TimeoutExpired:
        return None, f"no answer within {timeout_s:g} s"
    if child.returncode < 0:
        return None, f"the process was killed by signal {-child.returncode}"
    if child.returncode > 0:
        lines = child.stderr.strip().splitlines()
        return None, lines[-1] if lines else f"exit code {child.returncode}"
    return json.loads(child.stdout.splitlines()[-1]), ""
