"""Load a model for the first time, and let it answer once, in a process that may crash.

A model that passed the checks of its bytes and of its structure can still bring down the C++ that
loads it, take all memory, or never end. So a child goes first, with caps on memory and time, and is
the first to be killed where memory runs out. What it survived is remembered by the hash of the
manifest, which names every byte of the bundle, and the runtime's version: it happens once. Only a
success is remembered: a failure may have been the machine's.

Batches larger than one are not tried, nor other images.
"""

import ctypes
import hashlib
import resource
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy import strict_json
from deploy.bundle.read import Bundle, open_bundle
from deploy.errors import BadInputError, CheckFailedError, DeployError, TamperedBundleError
from deploy.private_folder import default_folder, private_folder
from deploy.runtime.ort_runner import OrtRunner, runtime_name

__all__ = ["FirstLoad", "LoadLimits", "assert_first_load", "load_once"]

FORMAT_VERSION = 1
_CHILD = (__name__, "load_once")
_FIXED_BYTES = 2 << 30  # an export's activations are at most 1 GiB; an arena may double them
_COPIES = 8  # of the weights: file, parsed, in the session, packed, and what optimising makes
_PARENT_DIES = 1  # prctl's PR_SET_PDEATHSIG
_REFUSALS = {kind.__name__: kind for kind in (BadInputError, TamperedBundleError, CheckFailedError)}


@dataclass(frozen=True)
class LoadLimits:
    """What the child may use.

    Attributes:
        memory_bytes: Of address space, beyond what Python and the runtime take. None is 2 GiB and
            eight times the model's file.
        time_s: From its start to its answer.
    """

    memory_bytes: int | None = None
    time_s: float = 120.0


@dataclass(frozen=True)
class FirstLoad:
    """What a child survived."""

    format_version: int
    manifest_sha256: str
    precision: str
    runtime: str


def assert_first_load(bundle: Bundle, precision: str, *, limits: LoadLimits | None = None) -> None:
    """Insist that a child has loaded and run a variant by ONNX Runtime, now or earlier.

    Args:
        bundle: The opened bundle.
        precision: Which of its variants.
        limits: Of the child.

    Raises:
        BadInputError: ONNX Runtime is missing or refuses the model, or there is no place for the
            verdict.
        CheckFailedError: The model made the child crash, or take too much memory or time.
    """
    wanted = FirstLoad(FORMAT_VERSION, bundle.manifest_sha256, precision, runtime_name())
    name = hashlib.sha256(strict_json.dump(wanted)).hexdigest()  # the precision may be a path
    folder = private_folder(default_folder(), what="verdicts") / "first-loads"
    path = private_folder(folder, what="verdicts") / f"{name}.json"
    if _read(path) == wanted:
        return
    from deploy.children import ask_child  # which a start that finds a verdict does without
    from deploy.publish import publish_bytes

    limits = limits or LoadLimits()
    memory_bytes = limits.memory_bytes or _default_bytes(bundle, precision)
    answer, problem = ask_child(
        *_CHILD,
        str(bundle.path),
        precision,
        bundle.manifest_sha256,
        memory_bytes,
        timeout_s=limits.time_s,
    )
    if answer is None:
        raise CheckFailedError(
            "a model's first load, in a process of its own, comes to its end",
            found=f"'{bundle.manifest.variants[precision].file}' made {wanted.runtime} fail: "
            f"{problem or 'no reason given'} (at most {memory_bytes >> 20} MiB, "
            f"{limits.time_s:g} s)",
            remedy="do not run a bundle from an unknown source; if it is your own, free memory or "
            "add swap, and export it again",
        )
    if answer != "loaded":
        kind = _REFUSALS[answer["kind"]]
        raise kind(answer["rule"], found=answer["found"], remedy=answer["remedy"])
    publish_bytes(path, strict_json.dump(wanted))


def load_once(path: str, precision: str, manifest_sha256: str, memory_bytes: int) -> Any:
    """Load a variant and let it answer one golden image; runs in the child.

    Returns:
        "loaded", or a refusal: its kind, rule, found and remedy.
    """
    runtime_name()  # before the caps: what an import takes is not the model's
    try:
        # This, too, before the caps, by which no copy of the model could be written; the parent
        # has opened the same bundle without any.
        bundle = open_bundle(Path(path), keep=precision)
        _confine(memory_bytes)
        if bundle.manifest_sha256 != manifest_sha256:
            raise TamperedBundleError(
                "a bundle must stay as it is while it is loaded",
                found=f"another {path}",
                remedy="try again",
            )
        runner = OrtRunner(bundle, precision, None)
        runner(bundle.array(bundle.manifest.golden.preprocessed)[:1])
    except DeployError as error:
        refusal = {"rule": error.rule, "found": error.found, "remedy": error.remedy}
        return {"kind": type(error).__name__} | refusal
    return "loaded"


def _confine(memory_bytes: int) -> None:
    """End with the parent, be the first to go, and take no more than this from here on."""
    ctypes.CDLL(None).prctl(_PARENT_DIES, signal.SIGKILL)
    Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    cap = pages * resource.getpagesize() + memory_bytes
    for limit, most in (
        (resource.RLIMIT_AS, cap),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
    ):
        resource.setrlimit(limit, (most, most))


def _default_bytes(bundle: Bundle, precision: str) -> int:
    sizes = {entry.path: entry.size for entry in bundle.manifest.files}
    return _FIXED_BYTES + _COPIES * sizes[bundle.manifest.variants[precision].file]


def _read(path: Path) -> FirstLoad | None:
    """The verdict in a file; None if there is none, or none that can be believed."""
    if not path.is_file():
        return None
    try:
        document = strict_json.parse(path.read_bytes(), source=path.name)
        return strict_json.decode(FirstLoad, document, source=path.name)
    except DeployError:  # damaged: the child goes again
        return None
