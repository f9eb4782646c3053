"""The file of API keys: made by `halyard keys`, read by the server, read again when it changes.

A key is 256 random bits, so nobody guesses one from its digest, however fast the digest is: SHA-256
with a salt of its own is enough, and a request costs microseconds. A slow hash such as scrypt
protects passwords, which are guessable; here it would only let strangers burn the server's time.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import logging
import os
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from halyard.api.tenants import Tenant
from halyard.hal.errors import ConfigError

__all__ = ["Key", "KeyFile", "KeyRing", "create_key", "edit_keys", "read_keys"]

logger = logging.getLogger("halyard.api")

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_KEY = re.compile(rb"hal-([0-9a-f]{12})-[A-Za-z0-9_-]{43}")
_LOOK_EVERY = 1.0  # seconds between looks at the file


class Key(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is kept of a key: not the key."""

    id: str  # its second part, by which it is found and revoked
    tenant: str
    salt: str  # 16 bytes in hex
    sha256: str  # of salt and key, in hex
    created: int  # Unix time
    expires: int | None = None  # Unix time; null: never
    note: str = ""

    @property
    def expired(self) -> bool:
        return self.expires is not None and time.time() >= self.expires

    def fits(self, presented: bytes) -> bool:
        """Whether it is this key; takes the same time for any other."""
        return hmac.compare_digest(_digest(self.salt, presented), self.sha256)


class KeyFile(msgspec.Struct, forbid_unknown_fields=True):
    """Everything in the file."""

    version: int = 1
    tenants: dict[str, Tenant] = msgspec.field(
        default_factory=dict
    )  # by name; it need not repeat it
    keys: list[Key] = msgspec.field(default_factory=list)


_NOBODY = Key("0" * 12, "", "00" * 16, "0" * 64, 0)  # compared with when no key has the id


def _digest(salt: str, presented: bytes) -> str:
    return hashlib.sha256(bytes.fromhex(salt) + presented).hexdigest()


def read_keys(path: Path) -> KeyFile:
    """
    Raises:
        ConfigError: the file is missing, malformed or contradicts itself.
    """
    try:
        found = msgspec.json.decode(path.read_bytes(), type=KeyFile)
    except OSError as error:
        raise ConfigError(
            f"can't read the keys in {path}: {error.strerror}; "
            "make the file with `halyard keys create`"
        ) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path} is no file of API keys: {error}") from None
    if found.version != 1:
        raise ConfigError(f"{path} has version {found.version}; this halyard reads version 1")
    named = {}
    for name, tenant in found.tenants.items():
        check_tenant_name(name)
        if tenant.name not in (name, "default"):
            raise ConfigError(f"{path}: tenant {name} calls itself {tenant.name}")
        named[name] = msgspec.structs.replace(tenant, name=name)
    found.tenants = named
    seen: set[str] = set()
    for key in found.keys:
        if key.tenant not in named:
            raise ConfigError(f"{path}: key {key.id} is of tenant {key.tenant!r}, who is not there")
        if key.id in seen:
            raise ConfigError(f"{path}: key {key.id} stands twice")
        if len(key.sha256) != 64 or not re.fullmatch(r"[0-9a-f]{32}", key.salt):
            raise ConfigError(f"{path}: key {key.id} has a malformed digest or salt")
        seen.add(key.id)
    return found


def check_tenant_name(name: str) -> None:
    """
    Raises:
        ConfigError: it can't name a log file or a metric's label.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"tenant {name!r}: names are up to 63 of a-z, 0-9, '.', '_' and '-', "
            "and begin with a letter or digit"
        )


@contextmanager
def edit_keys(path: Path) -> Iterator[KeyFile]:
    """The file's content, to be changed: written whole at the end, by one at a time.

    Raises:
        ConfigError: it can't be read or written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.with_name(path.name + ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            content = read_keys(path) if path.exists() else KeyFile()
            yield content
            fresh = path.with_name(path.name + ".new")
            handle = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(handle, "wb") as file:
                file.write(msgspec.json.format(msgspec.json.encode(content)) + b"\n")
                file.flush()
                os.fsync(file.fileno())
            fresh.replace(path)  # whole, or as it was
    except OSError as error:
        raise ConfigError(f"can't write {path}: {error.strerror}") from None


def create_key(content: KeyFile, tenant: str, *, expires: int | None = None, note: str = "") -> str:
    """Add a key for a tenant who is there; the key itself, which nobody can read again."""
    key_id = secrets.token_hex(6)
    key = f"hal-{key_id}-{secrets.token_urlsafe(32)}"
    salt = secrets.token_hex(16)
    content.keys.append(
        Key(key_id, tenant, salt, _digest(salt, key.encode()), int(time.time()), expires, note)
    )
    return key


class KeyRing:
    """The keys of a running server.

    Raises:
        ConfigError: the file can't be used at the start. Later the last good one stays in force.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen = self._stamp()
        self._looked = time.monotonic()
        self._take(read_keys(path))

    def find(self, presented: bytes) -> Tenant | None:
        """Whose key that is; None: nobody's, or revoked, or expired."""
        self.refresh()
        parts = _KEY.fullmatch(presented)
        key = self._keys.get(parts[1].decode(), _NOBODY) if parts is not None else _NOBODY
        fits = key.fits(presented)  # also for nobody's: a stranger learns nothing from the time
        if not fits or key is _NOBODY or key.expired:
            return None
        return self.tenants[key.tenant]

    def refresh(self, now: bool = False) -> None:
        """Read the file again if it has changed; `now`: without waiting for the next look."""
        moment = time.monotonic()
        if not now and moment - self._looked < _LOOK_EVERY:
            return
        self._looked = moment
        stamp = self._stamp()
        if stamp == self._seen and not now:
            return
        self._seen = stamp
        try:
            self._take(read_keys(self._path))
        except ConfigError as error:
            logger.error("the API keys stay as they were: %s", error)
        else:
            logger.warning("the API keys were read again: there are %d now", len(self._keys))

    def _take(self, content: KeyFile) -> None:
        self.tenants = content.tenants
        self._keys = {key.id: key for key in content.keys}

    def _stamp(self) -> tuple[int, int, int] | None:
        try:
            status = self._path.stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_size, status.st_ino
