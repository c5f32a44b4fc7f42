"""manifest.json, written and read: strict JSON of a format that is known, and that makes sense."""

from deploy import strict_json
from deploy.bundle.file_names import MANIFEST_NAME
from deploy.bundle.manifest import READ_VERSIONS, Manifest
from deploy.bundle.manifest_checks import first_problem
from deploy.errors import BadInputError

__all__ = ["manifest_from_bytes", "manifest_to_bytes"]


def manifest_to_bytes(manifest: Manifest) -> bytes:
    """Write a manifest; equal manifests give equal bytes.

    Raises:
        BadInputError: The manifest would be refused when it is read.
    """
    try:
        data = strict_json.dump(manifest)
    except (TypeError, ValueError) as error:
        raise BadInputError(
            "a manifest must hold plain JSON values only",
            found=str(error),
            remedy="convert arrays, NaN and other objects before export",
        ) from error
    if manifest_from_bytes(data, bundle=manifest.name) != manifest:
        raise BadInputError(
            "a manifest must read back as it was written",
            found="a value that JSON changes: a key that is no string, or a tuple for a list",
            remedy="use string keys; lists inside `target` and `provenance`, tuples elsewhere",
        )
    return data


def manifest_from_bytes(data: bytes, *, bundle: str) -> Manifest:
    """Read a manifest.

    Args:
        data: The content of manifest.json.
        bundle: The bundle's name, for errors.

    Raises:
        BadInputError: It is not strict JSON of this format, or says something that cannot be.
    """
    source = f"{MANIFEST_NAME} of bundle '{bundle}'"
    document = strict_json.parse(data, source=source)
    version = document.get("format_version") if isinstance(document, dict) else None
    # Before the keys: another format may have other keys.
    if type(version) is int and version not in READ_VERSIONS:
        raise BadInputError(
            "a bundle must have a format that this edgereg reads",
            found=f"bundle '{bundle}' has format {version}; this edgereg reads "
            f"{READ_VERSIONS[0]}-{READ_VERSIONS[-1]}",
            remedy="export it again or upgrade edgereg",
        )
    manifest = strict_json.decode(Manifest, document, source=source)
    problem = first_problem(manifest)
    if problem is not None:
        raise BadInputError(
            f"{source} must describe a bundle that can exist",
            found=problem,
            remedy="export the bundle again",
        )
    return manifest
