"""Manifests: the SHA-256 of every file of a model, beside them, and checking files against it. No torch.

A manifest proves that files are as they were mirrored. It can't prove that nobody wrote both anew:
for that its own digest, kept elsewhere, is given too.
"""

from __future__ import annotations

import hashlib
import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import msgspec

from halyard.hal.errors import ModelError

__all__ = [
    "MANIFEST",
    "FileEntry",
    "Manifest",
    "VerifiedFiles",
    "problems",
    "read_manifest",
    "sha256_of",
    "verify",
    "write_manifest",
]

MANIFEST = "halyard-manifest.json"
_FORMAT, _VERSION = "halyard-manifest", 1
_CHUNK = 4 << 20  # bytes
_THREADS = 4  # hashing lets go of the interpreter's lock; more than that the disk rarely feeds
_SHA256 = re.compile(r"[0-9a-f]{64}")


class FileEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a file must be."""

    size: int  # bytes
    sha256: str  # in hex


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The content of a manifest file."""

    model: str  # its name where it came from
    files: dict[str, FileEntry]  # by path in the folder, with forward slashes
    revision: str | None = None  # commit on the hub, if it came from there
    source: str | None = None  # where it came from: the hub's address or a folder
    created: str = ""  # date and time, UTC
    format: str = _FORMAT
    version: int = _VERSION

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(entry.size for entry in self.files.values())


@dataclass(frozen=True, slots=True)
class VerifiedFiles:
    """Files that were as their manifest says, and how to see that nobody touched them since."""

    folder: Path
    manifest_digest: str  # SHA-256 of the manifest's own bytes
    stamps: dict[str, tuple[int, int, int]]

    def check_untouched(self) -> None:
        """
        Raises:
            ModelError: a file was replaced or written to after it was verified.
        """
        for name, stamp in self.stamps.items():
            if _stamp(self.folder / name) != stamp:
                raise ModelError(
                    f"{self.folder / name} was changed after it was verified: start again"
                )


def read_manifest(folder: Path) -> tuple[Manifest, str] | None:
    """A folder's manifest and its own SHA-256; None: it has none.

    Raises:
        ModelError: it is malformed, of another version, or names files outside the folder.
    """
    path = folder / MANIFEST
    try:
        text = path.read_bytes()
        manifest = msgspec.json.decode(text, type=Manifest)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ModelError(f"can't read {path}: {error.strerror}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ModelError(f"{path} is no manifest: {error}") from None
    if (manifest.format, manifest.version) != (_FORMAT, _VERSION):
        raise ModelError(
            f"{path} is {manifest.format!r} version {manifest.version}; this halyard reads "
            f"{_FORMAT!r} version {_VERSION}"
        )
    for name, entry in manifest.files.items():
        parts = PurePosixPath(name).parts
        if not parts or name.startswith("/") or ".." in parts or "\\" in name or "\0" in name:
            raise ModelError(f"{path} names {name!r}, which is no file of this folder")
        if not _SHA256.fullmatch(entry.sha256) or entry.size < 0:
            raise ModelError(f"{path} has a malformed digest or size for {name}")
    return manifest, hashlib.sha256(text).hexdigest()


def write_manifest(folder: Path, manifest: Manifest) -> str:
    """Write it; its own SHA-256."""
    text = msgspec.json.format(msgspec.json.encode(manifest)) + b"\n"
    fresh = folder / f"{MANIFEST}.new"
    fresh.write_bytes(text)
    fresh.replace(folder / MANIFEST)
    return hashlib.sha256(text).hexdigest()


def files_of(folder: Path) -> list[str]:
    """All files of a model's folder but the manifest and what is hidden, as manifests name them."""
    found = []
    for at, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [
            (Path(at) / name).relative_to(folder).as_posix()
            for name in names
            if not name.startswith(".")
        ]
    return sorted(name for name in found if name not in (MANIFEST, f"{MANIFEST}.new"))


def sha256_of(path: Path) -> str:
    """In hex. Reads the file once, in order."""
    hasher = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(_CHUNK):
            hasher.update(chunk)
    return hasher.hexdigest()


def digests_of(folder: Path, names: list[str]) -> dict[str, str]:
    """SHA-256 of several files, some at a time; the largest first."""
    order = sorted(names, key=lambda name: -(folder / name).stat().st_size)
    with ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip(order, pool.map(lambda n: sha256_of(folder / n), order), strict=True))


def problems(folder: Path, manifest: Manifest) -> list[str]:
    """Everything that is not as the manifest says: one line a file, with both digests.

    Raises:
        ModelError: a file can't be read.
    """
    try:
        present = files_of(folder)
        digests = digests_of(folder, present)
    except OSError as error:
        raise ModelError(f"can't read {error.filename}: {error.strerror}") from None
    told = []
    for name in sorted({*present, *manifest.files}):
        entry, digest = manifest.files.get(name), digests.get(name)
        if entry is None:
            told.append(f"{name} is not listed: its SHA-256 is {digest}, the manifest has none")
        elif digest is None:
            told.append(f"{name} is missing: the manifest's SHA-256 is {entry.sha256}")
        elif digest != entry.sha256:
            size = (folder / name).stat().st_size
            how = "was changed" if size == entry.size else f"has {size} of {entry.size} bytes"
            told.append(f"{name} {how}: its SHA-256 is {digest}, the manifest's is {entry.sha256}")
    return told


def verify(folder: Path, *, manifest_digest: str | None = None) -> VerifiedFiles:
    """Check every file of a model's folder against its manifest. Reads each once.

    Args:
        manifest_digest: SHA-256 that the manifest itself must have; None: any manifest is believed.

    Raises:
        ModelError: there is no manifest, or something is not as it says.
    """
    found = read_manifest(folder)
    if found is None:
        raise ModelError(
            f"{folder} has no {MANIFEST}, so it can't be verified: mirror it with "
            "`halyard models mirror`"
        )
    manifest, own = found
    if manifest_digest is not None and own != manifest_digest.removeprefix("sha256:"):
        raise ModelError(
            f"{folder / MANIFEST} has SHA-256 {own}, but {manifest_digest} was asked for"
        )
    stamps = {name: _stamp(folder / name) for name in manifest.files if (folder / name).is_file()}
    told = problems(folder, manifest)
    if told:
        more = f"; and {len(told) - 3} more files" if len(told) > 3 else ""
        raise ModelError(f"{folder} is not what its manifest says: {'; '.join(told[:3])}{more}")
    verified = VerifiedFiles(folder, own, stamps)
    verified.check_untouched()
    return verified


def _stamp(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns
