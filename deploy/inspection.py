"""What a simplification did, as a table: a bundle's `simplify.json`, or a report of the same form.

The bundle's file is checked by size and hash before it is parsed, and needs no torch. A report that
was just made is shown by the same code: it hands over the dictionary that an export would store.
"""

import re
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from deploy import strict_json
from deploy.bundle.read import open_bundle
from deploy.errors import BadInputError
from deploy.terminal import printable, table

__all__ = ["Inspection", "counts_text", "inspect_bundle"]

SIMPLIFY_NAME = "simplify.json"
MAX_SITES = 12  # of a pass, each on a line of its own; of more, those of one kind share a line

_COLUMNS = 100
_COUNTED = {"batchnorms": "BatchNorm", "dropouts": "dropout"}  # the others are called as they are
# A module's or node's name within a phrase, "layer1.0.conv2" or "add_3", any number, or a list.
_NAME = r"(?:\w+(?:\.\w+)+|\w*[\d_]\w*)"
_NAMES = re.compile(rf"(?:\w+, )*{_NAME}(?:(?:, | and ){_NAME})*")


@dataclass(frozen=True)
class Inspection:
    """A simplification's report, and of what it is.

    Args:
        name: The bundle, the checkpoint or the model, as it was asked for.
        kind: A "model" is a freshly built one, with random weights.
        detail: What else a reader should know of it, as a phrase.
        image_size: Height and width of the input, in pixels.
        simplify: The report, as JSON values.
    """

    name: str
    kind: Literal["bundle", "checkpoint", "model"]
    detail: str
    image_size: tuple[int, int]
    simplify: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Return all of it as JSON values."""
        return {
            "name": self.name,
            "kind": self.kind,
            "detail": self.detail,
            "image_size": list(self.image_size),
            "random_weights": self.kind == "model",
            "simplify": dict(self.simplify),
        }

    def to_text(self, *, show_all: bool = False) -> str:
        """Return a section for each pass, then the sizes and the errors of the whole.

        Args:
            show_all: Whether each site has a line of its own, however many there are. What was
                skipped is always shown, with the reason.
        """
        report = _decode(self.simplify, source=self.name)
        height, width = self.image_size
        lines = [printable(f"{self.name}: {self.detail}, images of {height}x{width}")]
        if self.kind == "model":
            lines.append("random weights and statistics: what folds does not depend on them")
        errors = report.float64_relative_error_below
        for name, done in report.passes.items():
            lines += _section(name, done, errors.sites, limit=None if show_all else MAX_SITES)
        lines.append(counts_text(report.before, report.after))
        batches = " and ".join(map(str, errors.batch_sizes))
        lines += [
            f"float64 relative error of the outputs, in batches of {batches}",
            f"  simplified against traced  {_error(errors.model)}",
            f"  traced against the model   {_error(errors.trace)}",
        ]
        return "\n".join(lines)


@dataclass(frozen=True)
class _Pass:
    """What a pass changed, site by site, and what it skipped, with the reason."""

    changed: dict[str, str]
    skipped: dict[str, str]


@dataclass(frozen=True)
class _Errors:
    """Powers of ten that the errors do not exceed."""

    sites: dict[str, float]
    model: float
    trace: float
    batch_sizes: tuple[int, ...]


@dataclass(frozen=True)
class _Report:
    """The part of the report that is shown."""

    passes: dict[str, _Pass]
    float64_relative_error_below: _Errors
    before: dict[str, int]
    after: dict[str, int]


def inspect_bundle(path: Path) -> Inspection:
    """Check every byte of a bundle, and read what its export's simplification did.

    Raises:
        BadInputError: The path is no bundle, or one without a readable report.
        TamperedBundleError: A file is not the one that was written.
    """
    bundle = open_bundle(path)
    source = f"{SIMPLIFY_NAME} of bundle '{bundle.path.name}'"
    if SIMPLIFY_NAME not in {entry.path for entry in bundle.manifest.files}:
        raise BadInputError(
            f"a bundle to be inspected has a {SIMPLIFY_NAME}",
            found=f"'{path}' has none",
            remedy="export it with `edgereg export`",
        )
    document = strict_json.parse(bundle.read(SIMPLIFY_NAME), source=source)
    _decode(document, source=source)
    manifest = bundle.manifest
    return Inspection(
        name=str(path),
        kind="bundle",
        detail=f"exported for {manifest.target.get('name', 'a target without a name')}",
        image_size=(manifest.preprocessing.height, manifest.preprocessing.width),
        simplify=document,
    )


def counts_text(before: Mapping[str, int], after: Mapping[str, int]) -> str:
    """Return a line for each count of a report: nodes, parameters, and what is to disappear."""
    return "\n".join(
        f"{printable(_COUNTED.get(key, key)):12} {before[key]:>9,} -> {after[key]:>9,}"
        for key in before
        if key in after
    )


def _decode(document: Any, *, source: str) -> _Report:
    """Check the part that is shown; a later version's report may hold more."""
    shown = _only(document, _Report)
    if isinstance(shown, dict):
        errors, passes = "float64_relative_error_below", "passes"
        if errors in shown:
            shown[errors] = _only(shown[errors], _Errors)
        if isinstance(shown.get(passes), dict):
            shown[passes] = {name: _only(done, _Pass) for name, done in shown[passes].items()}
    return strict_json.decode(_Report, shown, source=source)


def _only(value: Any, kind: type) -> Any:
    """Return an object with the keys of a dataclass alone."""
    if not isinstance(value, Mapping):
        return value
    return {key: value[key] for key in kind.__annotations__ if key in value}


def _section(
    name: str, done: _Pass, errors: Mapping[str, float], *, limit: int | None
) -> Iterator[str]:
    """Yield a pass' title, a line for each site or kind of change, and what it skipped."""
    counts = [f"{len(done.changed)} changed"] if done.changed or not done.skipped else []
    counts += [f"{len(done.skipped)} skipped"] if done.skipped else []
    yield printable(f"{name}: {', '.join(counts)}")
    is_short = limit is None or len(done.changed) <= limit
    rows = _site_rows(done, errors) if is_short else _kind_rows(done, errors)
    if done.changed:
        yield textwrap.indent(table(rows, left=len(rows[0])), "  ")
    yield from _skipped(done, is_short=limit is None)


def _site_rows(done: _Pass, errors: Mapping[str, float]) -> list[tuple[str, ...]]:
    return [
        ("site", "what", "float64 error"),
        *((site, what, _error(errors.get(site))) for site, what in done.changed.items()),
    ]


def _kind_rows(done: _Pass, errors: Mapping[str, float]) -> list[tuple[str, ...]]:
    """Return a row for the sites whose phrases differ in names and numbers only."""
    kinds = _kinds(done.changed)
    heading = ("sites", "what", "float64 error")
    rows = [heading]
    for kind, sites in kinds.items():
        phrases = {done.changed[site] for site in sites}
        known = [errors[site] for site in sites if site in errors]
        what = phrases.pop() if len(phrases) == 1 else kind
        rows.append((f"{len(sites):5}", what, _error(max(known, default=None))))
    used = sum(
        max(len(printable(cell)) for cell in column) + 2 for column in zip(*rows, strict=True)
    )
    names = ("first of them", *(_fitting(s, width=_COLUMNS - 2 - used) for s in kinds.values()))
    return [(*row, cell) for row, cell in zip(rows, names, strict=True)]


def _kinds(changed: Mapping[str, str]) -> dict[str, list[str]]:
    """Group sites by their phrases, with "..." for what are names or numbers in them."""
    kind_of = {what: _NAMES.sub("...", what) for what in changed.values()}
    # "linear" looks like a word, and is a name where another phrase has "linear_1" in its place
    for kind in sorted({kind for kind in kind_of.values() if "..." in kind}):
        pattern = re.compile(r"\w+".join(map(re.escape, kind.split("..."))))
        kind_of |= {what: kind for what in kind_of if pattern.fullmatch(what)}
    kinds: dict[str, list[str]] = {}
    for site, what in changed.items():
        kinds.setdefault(kind_of[what], []).append(site)
    return kinds


def _fitting(sites: list[str], *, width: int) -> str:
    """Return as many names as there is room for, one at least."""
    for count in range(len(sites), 1, -1):
        text = ", ".join(sites[:count]) + (", ..." if count < len(sites) else "")
        if len(printable(text)) <= width:
            return text
    return sites[0] + (", ..." if len(sites) > 1 else "")


def _skipped(done: _Pass, *, is_short: bool) -> Iterator[str]:
    """Yield every skipped site with its reason; those of one reason share it."""
    reasons: dict[str, list[str]] = {}
    for site, reason in done.skipped.items():
        reasons.setdefault(f"{site}: {reason}" if is_short else reason, []).append(site)
    for reason, sites in reasons.items():
        if is_short:
            yield from _wrapped(f"skipped {reason}", indent=2)
        elif len(sites) == 1:
            yield from _wrapped(f"skipped {sites[0]}: {reason}", indent=2)
        else:
            yield from _wrapped(f"skipped {len(sites)}: {reason}", indent=2)
            yield from _wrapped(", ".join(sites), indent=6, hanging=0)


def _wrapped(text: str, *, indent: int, hanging: int = 4) -> list[str]:
    return textwrap.wrap(
        printable(text),
        _COLUMNS,
        initial_indent=" " * indent,
        subsequent_indent=" " * (indent + hanging),
        break_long_words=False,
        break_on_hyphens=False,
    )


def _error(error: float | None) -> str:
    """Return a power of ten that an error does not exceed, or 0; nothing if it is not known."""
    if error is None:
        return ""
    return f"<={error:.0e}" if error else "0"
