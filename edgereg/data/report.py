"""What a check of a data set found, and the words for it."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["DataReport", "Finding"]

Kind = Literal["undecodable", "contradictory", "leaked", "duplicate"]

_SAYS: dict[Kind, str] = {
    "undecodable": "cannot be decoded",
    "contradictory": "the same pixels under another label",
    "leaked": "in the data that must not be seen",
    "duplicate": "the same as an earlier image",
}
_SHOWN = 5  # examples of each kind in the text; JSON has all
_SMALL = 10  # images; a class with fewer is pointed out


@dataclass(frozen=True)
class Finding:
    """Why an image is set aside.

    Args:
        kind: The reason.
        detail: The other image, or what the decoder said.
    """

    kind: Kind
    detail: str

    def __str__(self) -> str:
        return f"{_SAYS[self.kind]}: {self.detail}"


@dataclass(frozen=True)
class DataReport:
    """What `check_images` found.

    Args:
        name: Of the data set.
        digest: SHA-256 over every image and label, as a checkpoint names its data.
        against: The data sets that must not be seen.
        unreadable_against: For some of them, images that cannot be decoded and hence not found.
        image_names: (N,).
        hashes: (N,) SHA-256 of each image's content, in hexadecimal.
        class_names: C of them; empty without labels.
        labels: (N,) in 0..C-1, or None.
        findings: Why an image is set aside, by index in increasing order.
        sizes: Images of each (width, height).
        modes: Images of each of Pillow's modes.
        near: Pairs (i, j, differing bits) that look alike; None where nobody looked.
    """

    name: str
    digest: str
    against: tuple[str, ...]
    unreadable_against: Mapping[str, int]
    image_names: tuple[str, ...]
    hashes: tuple[str, ...]
    class_names: tuple[str, ...]
    labels: tuple[int, ...] | None
    findings: Mapping[int, Finding]
    sizes: Mapping[tuple[int, int], int]
    modes: Mapping[str, int]
    near: tuple[tuple[int, int, int], ...] | None

    @property
    def quarantined(self) -> dict[int, str]:
        """Return why each image that is set aside is, by index."""
        return {index: str(finding) for index, finding in self.findings.items()}

    @property
    def class_counts(self) -> dict[str, tuple[int, int]]:
        """Return how many images each class has, and how many are kept; {} without labels."""
        if self.labels is None:
            return {}
        whole = Counter(self.labels)
        lost = Counter(self.labels[index] for index in self.findings)
        return {
            name: (whole[label], whole[label] - lost[label])
            for label, name in enumerate(self.class_names)
        }

    @property
    def imbalance(self) -> float | None:
        """Return the largest class over the smallest, of what is kept; None if a class is empty."""
        kept = [count for _, count in self.class_counts.values()]
        smallest = min(kept, default=0)
        return max(kept) / smallest if smallest else None

    @property
    def small_classes(self) -> tuple[str, ...]:
        """Return the classes of which fewer than ten images are kept."""
        return tuple(name for name, (_, kept) in self.class_counts.items() if kept < _SMALL)

    def to_json(self) -> dict[str, Any]:
        """Return everything but the hashes as JSON values."""
        return {
            "data": self.name,
            "digest": self.digest,
            "count": len(self.hashes),
            "against": list(self.against),
            "unreadable_against": dict(self.unreadable_against),
            "counts": self._counts(),
            "quarantined": [
                {"index": index, "image": self.image_names[index], "kind": f.kind, "why": f.detail}
                for index, f in self.findings.items()
            ],
            "classes": {
                name: {"count": count, "kept": kept}
                for name, (count, kept) in self.class_counts.items()
            },
            "imbalance": self.imbalance,
            "small_classes": list(self.small_classes),
            "sizes": {f"{width}x{height}": n for (width, height), n in sorted(self.sizes.items())},
            "modes": dict(self.modes),
            "near_duplicates": self.near
            and [
                {"images": [self.image_names[i], self.image_names[j]], "bits": distance}
                for i, j, distance in self.near
            ],
        }

    def to_text(self) -> str:
        """Return the report for a reader."""
        lines = [f"{self.name}: {len(self.hashes)} images, sha256 {self.digest}"]
        lines += self._sizes_text()
        lines += self._classes_text()
        for kind, count in self._counts().items():
            if kind == "leaked" and not self.against:
                lines.append("leaked: not looked for; name the test set with --against")
                continue
            lines.append(f"{kind}: {count}" + (f" ({_SAYS[kind]})" if count else ""))
            found = [(i, f.detail) for i, f in self.findings.items() if f.kind == kind]
            lines += [f"  {self.image_names[i]}: {detail}" for i, detail in found[:_SHOWN]]
            lines += [f"  and {count - _SHOWN} more"] * (count > _SHOWN)
        lines += [
            f"{count} images of {name} cannot be decoded, and were not looked for"
            for name, count in self.unreadable_against.items()
        ]
        lines += self._near_text()
        lines.append(f"set aside: {len(self.findings)} of {len(self.hashes)}")
        return "\n".join(lines)

    def _counts(self) -> dict[Kind, int]:
        counts = Counter(finding.kind for finding in self.findings.values())
        return {kind: counts[kind] for kind in _SAYS}

    def _sizes_text(self) -> list[str]:
        if not self.sizes:
            return []
        (width, height), most = max(self.sizes.items(), key=lambda item: item[1])
        areas = sorted(self.sizes, key=lambda size: size[0] * size[1])
        (w0, h0), (w1, h1) = areas[0], areas[-1]
        sizes = f"all {width}x{height}"
        if len(self.sizes) > 1:
            sizes = (
                f"{len(self.sizes)}, from {w0}x{h0} to {w1}x{h1}; {most} images are "
                f"{width}x{height}"
            )
        modes = ", ".join(f"{mode} {count}" for mode, count in sorted(self.modes.items()))
        return [f"sizes: {sizes}", f"modes: {modes}"]

    def _classes_text(self) -> list[str]:
        if self.labels is None:
            return ["classes: no labels"]
        ratio = "no end, a class is empty" if self.imbalance is None else f"{self.imbalance:.1f}"
        lines = [f"classes: {len(self.class_names)}; the largest over the smallest is {ratio}"]
        lines += [
            f"  {name:20} {count:7}" + (f", {kept} kept" if kept < count else "")
            for name, (count, kept) in self.class_counts.items()
        ]
        if self.small_classes:
            lines.append(f"fewer than {_SMALL} images: {', '.join(self.small_classes)}")
        return lines

    def _near_text(self) -> list[str]:
        if self.near is None:
            return []
        lines = [f"near duplicates: {len(self.near)} pairs look alike, and are not set aside"]
        lines += [
            f"  {self.image_names[i]} and {self.image_names[j]} ({distance} bits)"
            for i, j, distance in self.near[:_SHOWN]
        ]
        return lines + [f"  and {len(self.near) - _SHOWN} more"] * (len(self.near) > _SHOWN)
