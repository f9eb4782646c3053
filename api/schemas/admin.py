"""Bodies of the routes below /admin."""

from typing import Literal

import msgspec

__all__ = ["Asleep", "Awake", "ReloadRequest", "Reloaded", "SleepRequest"]


class ReloadRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """POST /admin/reload."""

    model: str | None = None  # folder or hub id; None: the one served now, read anew
    revision: str | None = None  # of a hub model
    manifest_digest: str | None = None  # SHA-256 of its manifest; None: as the server was started
    digests: dict[str, str] = {}  # file name -> "sha256:...": it must be so, or nothing happens
    mode: Literal["auto", "beside", "in_place"] = "auto"  # auto: beside, if memory allows


class Reloaded(msgspec.Struct, frozen=True):
    """The new engine answers."""

    fingerprint: str
    previous_fingerprint: str
    mode: Literal["beside", "in_place"]
    seconds: float


class SleepRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """POST /admin/sleep."""

    level: Literal[1, 2] = 1  # 1: weights stay on the host; 2: nothing stays
    grace_seconds: float = 5.0  # requests that run get that long
    wake_on_request: bool = False  # a request wakes it and waits, instead of 503


class Asleep(msgspec.Struct, frozen=True):
    """It sleeps."""

    level: int


class Awake(msgspec.Struct, frozen=True):
    """It answers again."""

    seconds: float
