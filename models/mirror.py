"""A local mirror: a folder of models, owner/name below it, each with a manifest. No torch."""

from __future__ import annotations

import datetime
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from halyard.hal.errors import ModelError
from halyard.models.manifest import (
    MANIFEST,
    FileEntry,
    Manifest,
    digests_of,
    files_of,
    read_manifest,
    write_manifest,
)
from halyard.models.source import (
    EMBEDDED,
    EMBEDDED_NAMES,
    HUB_FILES,
    ModelSource,
    check_folder,
    hub_errors,
)

__all__ = ["find_in_mirror", "list_mirror", "mirror_model"]

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9_][A-Za-z0-9._-]{0,95})?")
_STAGING = ".incoming"  # downloads that are not whole yet; a later call goes on with them


def find_in_mirror(mirror: Path, name: str, revision: str | None = None) -> ModelSource:
    """A mirrored model.

    Raises:
        ModelError: it isn't there, or is another revision.
    """
    folder = _folder(mirror, name)
    found = read_manifest(folder)
    if found is None:
        known = ", ".join(model for model, _ in list_mirror(mirror)) or "none"
        raise ModelError(
            f"no model {name!r} in the mirror {mirror} (there: {known}): add it with "
            f"`halyard models mirror {name} --mirror {mirror}`"
        )
    manifest, _ = found
    if revision is not None and revision != manifest.revision:
        raise ModelError(
            f"the mirror {mirror} has {name} at revision {manifest.revision}, not {revision}"
        )
    check_folder(folder, name)
    return ModelSource(name, folder, "mirror", manifest.revision)


def list_mirror(mirror: Path) -> Iterator[tuple[str, Path]]:
    """(name, folder) of every model with a manifest."""
    for at, folders, names in os.walk(mirror):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if MANIFEST in names:
            folders.clear()
            yield Path(at).relative_to(mirror).as_posix(), Path(at)


def mirror_model(model: str, mirror: Path, revision: str | None = None) -> tuple[Path, Manifest]:
    """Fetch a hub model, or copy a folder, and write its manifest. An older copy is replaced.

    The hub's address is HF_ENDPOINT's. What the hub says about its files' digests is checked.

    Raises:
        ModelError: it can't be had whole; what was there stays.
    """
    local = EMBEDDED if model in EMBEDDED_NAMES else Path(model).expanduser()
    name = local.resolve().name if local.is_dir() else model
    target = _folder(mirror, name)
    staging = mirror / _STAGING / name.replace("/", "--")
    try:
        if local.is_dir():
            shutil.rmtree(staging, ignore_errors=True)
            commit, origin, told = _copy(local, staging)
        else:
            staging.mkdir(parents=True, exist_ok=True)
            commit, origin, told = _download(model, revision, staging)
        check_folder(staging, model)
        manifest = _describe(staging, name, commit, origin, told)
        write_manifest(staging, manifest)
        _publish(staging, target)
    except OSError as error:
        raise ModelError(f"can't mirror {model}: {error.filename}: {error.strerror}") from None
    return target, manifest


def _folder(mirror: Path, name: str) -> Path:
    if not _NAME.fullmatch(name) or ".." in name:
        raise ModelError(f"{name!r} is no name of a mirrored model (owner/name)")
    return mirror / name


def _copy(source: Path, staging: Path) -> tuple[str | None, str, dict[str, str]]:
    """Like _download."""
    check_folder(source, str(source))
    for name in files_of(source):
        if "__pycache__" in name:
            continue
        place = staging / name
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, place)
    return None, str(source.resolve()), {}


def _download(
    model: str, revision: str | None, staging: Path
) -> tuple[str | None, str, dict[str, str]]:
    """(commit, the hub's address, SHA-256 by file as far as the hub tells)."""
    from huggingface_hub import HfApi, constants, snapshot_download

    with hub_errors(model, revision):
        info = HfApi().model_info(model, revision=revision, files_metadata=True)
        commit = info.sha
        snapshot_download(model, revision=commit, local_dir=staging, allow_patterns=HUB_FILES)
    told = {
        sibling.rfilename: sibling.lfs.sha256
        for sibling in info.siblings or ()
        if sibling.lfs is not None and sibling.lfs.sha256
    }
    return commit, constants.ENDPOINT, told


def _describe(
    folder: Path, name: str, commit: str | None, origin: str, told: dict[str, str]
) -> Manifest:
    names = files_of(folder)
    digests = digests_of(folder, names)
    for file, expected in told.items():
        if file in digests and digests[file] != expected:
            (folder / file).unlink()  # a later call fetches it again
            raise ModelError(
                f"{file} of {name} did not arrive as the hub has it: its SHA-256 is "
                f"{digests[file]}, the hub's is {expected}; try again"
            )
    return Manifest(
        model=name,
        files={file: FileEntry((folder / file).stat().st_size, digests[file]) for file in names},
        revision=commit,
        source=origin,
        created=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    )


def _publish(staging: Path, target: Path) -> None:
    shutil.rmtree(staging / ".cache", ignore_errors=True)  # notes of the download
    target.parent.mkdir(parents=True, exist_ok=True)
    old = staging.with_name(staging.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    staging.rename(target)
    shutil.rmtree(old, ignore_errors=True)
