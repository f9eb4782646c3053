"""`halyard keys`: make, list and revoke API keys."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from halyard.hal.errors import ConfigError

__all__ = ["add_arguments", "run"]

_DAY = 24 * 3600


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    create = actions.add_parser("create", help="make a key, and its tenant if need be")
    create.add_argument("tenant", help="whose key it is")
    create.add_argument("--days", type=float, metavar="N", help="it ends then (default: never)")
    create.add_argument("--note", default="", help="for people who read the list")
    limits = create.add_argument_group("the tenant's limits (what is left out stays as it is)")
    limits.add_argument("--requests-per-minute", type=int, metavar="N")
    limits.add_argument("--tokens-per-minute", type=int, metavar="N")
    limits.add_argument("--concurrent-requests", type=int, metavar="N")
    limits.add_argument("--max-context", type=int, metavar="N", help="tokens")
    limits.add_argument("--models", nargs="+", metavar="NAME", help="served names it may use")
    limits.add_argument("--priority", type=int, metavar="N", help="lower goes first")
    limits.add_argument("--share", type=float, metavar="X", help="of the engine, default 1")
    limits.add_argument("--admin", action=argparse.BooleanOptionalAction, default=None,
                        help="metrics, everybody's usage, /admin")  # fmt: skip
    limits.add_argument("--log-prompts", action=argparse.BooleanOptionalAction, default=None,
                        help="where the server logs prompts")  # fmt: skip
    listing = actions.add_parser("list", help="tenants, their limits and keys")
    revoke = actions.add_parser("revoke", help="end a key, or all keys of a tenant")
    revoke.add_argument("id", help="a key's id as `list` shows it, or a tenant")
    for action in (create, listing, revoke):
        action.add_argument("--api-keys", type=Path, default=Path("keys.json"), metavar="FILE",
                            help="the file (default %(default)s)")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    return {"create": _create, "list": _list, "revoke": _revoke}[args.action](args)


def _create(args: argparse.Namespace) -> int:
    import msgspec

    from halyard.api.keys import check_tenant_name, create_key, edit_keys
    from halyard.api.tenants import Tenant

    check_tenant_name(args.tenant)
    given: dict[str, Any] = {
        name: getattr(args, name)
        for name in Tenant.__struct_fields__
        if getattr(args, name, None) is not None
    }
    if args.models is not None:
        given["models"] = tuple(args.models)
    if args.days is not None and args.days <= 0:
        raise ConfigError(f"--days must be greater than 0, got {args.days:g}")
    expires = None if args.days is None else int(time.time() + args.days * _DAY)
    with edit_keys(args.api_keys) as content:
        tenant = content.tenants.get(args.tenant, Tenant(args.tenant))
        content.tenants[args.tenant] = msgspec.structs.replace(tenant, **given)
        key = create_key(content, args.tenant, expires=expires, note=args.note)
    print(f"a key of {args.tenant}, kept in {args.api_keys}:", file=sys.stderr)
    print(key)  # alone on standard output, for scripts; it can't be shown again
    return 0


def _list(args: argparse.Namespace) -> int:
    import msgspec

    from halyard.api.keys import read_keys

    content = read_keys(args.api_keys)
    for name, tenant in sorted(content.tenants.items()):
        limits = {k: v for k, v in msgspec.to_builtins(tenant).items() if k != "name"}
        told = ", ".join(f"{field} {value}" for field, value in limits.items()) or "no limits"
        print(f"{name}: {told}")
        for key in content.keys:
            if key.tenant == name:
                made = time.strftime("%Y-%m-%d", time.gmtime(key.created))
                until = "never ends" if key.expires is None else (
                    "ended" if key.expired
                    else time.strftime("ends %Y-%m-%d", time.gmtime(key.expires))
                )  # fmt: skip
                print(f"  {key.id}  made {made}, {until}{'  ' + key.note if key.note else ''}")
    return 0


def _revoke(args: argparse.Namespace) -> int:
    from halyard.api.keys import edit_keys

    with edit_keys(args.api_keys) as content:
        gone = [key for key in content.keys if args.id in (key.id, key.tenant)]
        if not gone:
            raise ConfigError(f"no key and no tenant {args.id!r} in {args.api_keys}")
        content.keys = [key for key in content.keys if key not in gone]
    print(f"revoked {', '.join(key.id for key in gone)}")
    return 0
