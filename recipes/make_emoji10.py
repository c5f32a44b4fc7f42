"""Make edgereg/data/emoji10.npz from two npm packages.

    npm pack emoji-datasource-twitter@16.0.0 emoji-datasource-google@16.0.0
    python recipes/make_emoji10.py emoji-datasource-twitter-16.0.0.tgz
    emoji-datasource-google-16.0.0.tgz

emoji-10 is 1,243 emoji in ten classes, each drawn by two vendors: the same labels by another hand,
which is what a model meets when it leaves the laboratory. Both packages are MIT; the images are CC
BY 4.0 (Twitter) and Apache-2.0 (Google): see NOTICE. The same packages give the same bytes.
"""

import argparse
import hashlib
import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = 32
HELD_OUT_SHARE = 0.2
CLASSES: dict[str, tuple[tuple[str, str], ...]] = {
    "face": (
        ("Smileys & Emotion", "face-"),
        ("Smileys & Emotion", "cat-face"),
        ("Smileys & Emotion", "monkey-face"),
    ),
    "animal": (("Animals & Nature", "animal-"),),
    "plant": (
        ("Animals & Nature", "plant-"),
        ("Food & Drink", "food-fruit"),
        ("Food & Drink", "food-vegetable"),
    ),
    "food": (
        ("Food & Drink", "dishware"),
        ("Food & Drink", "drink"),
        ("Food & Drink", "food-asian"),
        ("Food & Drink", "food-prepared"),
        ("Food & Drink", "food-sweet"),
    ),
    "person": (("People & Body", "person"), ("People & Body", "family")),
    "hand": (("People & Body", "hand"),),
    "vehicle": (("Travel & Places", "transport-"),),
    "place": (("Travel & Places", "place-"),),
    "clothing": (("Objects", "clothing"),),
    "flag": (("Flags", ""),),
}


def main() -> None:
    """Read the two packages and write the archive."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("twitter", type=Path)
    parser.add_argument("google", type=Path)
    parser.add_argument("--out", type=Path, default=Path("edgereg/data/emoji10.npz"))
    args = parser.parse_args()

    glyphs = select_glyphs(args.twitter)
    codes = [code for code, _, _ in glyphs]
    labels = np.array([label for _, label, _ in glyphs], dtype=np.int64)
    np.savez_compressed(
        args.out,
        twitter=read_images(args.twitter, "twitter", [image for _, _, image in glyphs]),
        google=read_images(args.google, "google", [image for _, _, image in glyphs]),
        labels=labels,
        held_out=hold_out(codes, labels),
        codes=np.array(codes),
        class_names=np.array(list(CLASSES)),
    )
    print(f"{args.out}: {len(codes)} glyphs, {args.out.stat().st_size / 1e6:.2f} MB")


def select_glyphs(package: Path) -> list[tuple[str, int, str]]:
    """Return (code points, label, image file) of the ten classes' emoji that both vendors draw."""
    with tarfile.open(package) as archive:
        table = json.loads(_member(archive, "package/emoji.json"))
    glyphs = []
    for emoji in table:
        label = _label(emoji["category"], emoji["subcategory"])
        if label is not None and emoji["has_img_twitter"] and emoji["has_img_google"]:
            glyphs.append((emoji["unified"], label, emoji["image"]))
    return sorted(glyphs)


def read_images(package: Path, vendor: str, names: list[str]) -> np.ndarray:
    """Return (N, 32, 32, 3) uint8, composited on white."""
    images = []
    with tarfile.open(package) as archive:
        for name in names:
            drawn = Image.open(
                io.BytesIO(_member(archive, f"package/img/{vendor}/64/{name}"))
            ).convert("RGBA")
            page = Image.new("RGBA", drawn.size, "white")
            page.alpha_composite(drawn)
            images.append(
                np.asarray(page.convert("RGB").resize((SIZE, SIZE), Image.Resampling.LANCZOS))
            )
    return np.stack(images)


def hold_out(codes: list[str], labels: np.ndarray) -> np.ndarray:
    """Return a mask of the held-out fifth of each class: the smallest SHA-256 of the code."""
    held_out = np.zeros(len(codes), dtype=bool)
    for label in range(len(CLASSES)):
        members = sorted(
            np.flatnonzero(labels == label),
            key=lambda i: hashlib.sha256(codes[i].encode()).hexdigest(),
        )
        held_out[members[: round(HELD_OUT_SHARE * len(members))]] = True
    return held_out


def _label(category: str, subcategory: str) -> int | None:
    for label, rules in enumerate(CLASSES.values()):
        if any(category == wanted and subcategory.startswith(start) for wanted, start in rules):
            return label
    return None


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    file = archive.extractfile(name)
    if file is None:
        raise SystemExit(f"the package must hold {name}")
    return file.read()


if __name__ == "__main__":
    main()
