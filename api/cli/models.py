"""`halyard models`: mirror models for use without the hub, verify and list them."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from halyard.hal.errors import ConfigError

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    mirror = actions.add_parser("mirror", help="fetch models, or copy folders, with a manifest")
    mirror.add_argument("models", nargs="+", metavar="MODEL", help="Hugging Face id or folder")
    mirror.add_argument("--revision", metavar="REV", help="branch, tag or commit")
    verify = actions.add_parser("verify", help="check files against their manifests")
    verify.add_argument("models", nargs="*", metavar="MODEL",
                        help="names in the mirror, or folders (default: all of the mirror)")  # fmt: skip
    listing = actions.add_parser("list", help="what the mirror holds")
    for action in (mirror, verify, listing):
        action.add_argument("--mirror", type=Path, metavar="DIR",
                            default=os.environ.get("HALYARD_MIRROR"),
                            help="the mirror's folder (default: HALYARD_MIRROR)")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    return {"mirror": _mirror, "verify": _verify, "list": _list}[args.action](args)


def _root(args: argparse.Namespace) -> Path:
    if args.mirror is None:
        raise ConfigError("which mirror? give --mirror DIR or set HALYARD_MIRROR")
    return Path(args.mirror)


def _mirror(args: argparse.Namespace) -> int:
    from halyard.models.mirror import mirror_model

    root = _root(args)
    if args.revision is not None and len(args.models) > 1:
        raise ConfigError("--revision is for one model at a time")
    for model in args.models:
        folder, manifest = mirror_model(model, root, args.revision)
        print(f"{manifest.model}: {len(manifest.files)} files, {_size(manifest.size)} in {folder}")
    return 0


def _verify(args: argparse.Namespace) -> int:
    from halyard.models.manifest import problems, read_manifest
    from halyard.models.mirror import find_in_mirror, list_mirror

    folders: list[tuple[str, Path]] = []
    for model in args.models:
        if Path(model).is_dir():
            folders.append((model, Path(model)))
        else:
            folders.append((model, find_in_mirror(_root(args), model).path))
    if not args.models:
        folders = list(list_mirror(_root(args)))
    if not folders:
        raise ConfigError(f"{_root(args)} holds no mirrored models")
    bad = 0
    for name, folder in folders:
        found = read_manifest(folder)
        told = ["it has no manifest"] if found is None else problems(folder, found[0])
        for line in told:
            print(f"{name}: {line}", file=sys.stderr)
        bad += bool(told)
        if not told and found is not None:
            print(f"{name}: {len(found[0].files)} files are as the manifest says")
    return 1 if bad else 0


def _list(args: argparse.Namespace) -> int:
    from halyard.models.manifest import read_manifest
    from halyard.models.mirror import list_mirror

    root = _root(args)
    if not root.is_dir():
        raise ConfigError(f"no such mirror: {root}; `halyard models mirror` makes it")
    for name, folder in list_mirror(root):
        found = read_manifest(folder)
        if found is not None:
            manifest, digest = found
            where = f"revision {manifest.revision}" if manifest.revision else "from a folder"
            print(f"{name}  {_size(manifest.size)}  {where}  {manifest.created}  manifest {digest}")
    return 0


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
