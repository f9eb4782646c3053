"""All tenants of one server: finds the caller of a request by its key, keeps every tenant's meter."""

from __future__ import annotations

import asyncio
import base64
import binascii
import math
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

from halyard.api.errors import UnauthorizedError
from halyard.api.keys import KeyRing
from halyard.api.limits import Meter, check_seconds
from halyard.api.prompt_log import PromptLog
from halyard.api.tenants import ANYBODY, Caller, Tenant
from halyard.hal.errors import ConfigError

__all__ = ["Credentials", "Tenancy"]

Credentials = Literal["bearer", "basic"]
_RELOAD_SECONDS = 1.0


class Tenancy:
    """Belongs to the event loop.

    Args:
        keys: None: there are none, and everybody may do everything.
        request_timeout: seconds after which any answer ends; None: as long as it takes.
        prompt_log: a folder for prompts and answers; None: they are not logged.

    Raises:
        ConfigError: that folder can't be had.
    """

    def __init__(
        self,
        keys: KeyRing | None = None,
        request_timeout: float | None = None,
        prompt_log: Path | None = None,
    ) -> None:
        self.keys = keys
        self.since = time.time()
        self._request_timeout = request_timeout
        self._prompt_log = prompt_log
        if prompt_log is not None:
            try:
                prompt_log.mkdir(mode=0o700, parents=True, exist_ok=True)
            except OSError as error:
                raise ConfigError(f"can't log prompts to {prompt_log}: {error.strerror}") from None
        self._meters: dict[str, Meter] = {}

    @property
    def meters(self) -> Mapping[str, Meter]:
        """By tenant, of those that have called."""
        return self._meters

    async def watch(self) -> None:
        """Follow changes of the file of keys also while nobody calls."""
        while self.keys is not None:
            self.keys.refresh()
            await asyncio.sleep(_RELOAD_SECONDS)

    def recognise(self, headers: Iterable[tuple[bytes, bytes]]) -> tuple[Tenant, Credentials]:
        """Whose key a request brings, and how.

        Raises:
            UnauthorizedError: none, an unknown one, or two different ones.
        """
        if self.keys is None:
            return ANYBODY.tenant, "bearer"
        shown = [_shown(name, value) for name, value in headers]
        found = {key for key, _ in filter(None, shown)}
        ways = {way for _, way in filter(None, shown)}
        if not found:
            raise UnauthorizedError(
                "an API key is needed: send it as Authorization: Bearer KEY, or as x-api-key"
            )
        if len(found) > 1:
            raise UnauthorizedError("the request brings two different API keys: send one")
        tenant = self.keys.find(found.pop())
        if tenant is None:
            raise UnauthorizedError("this API key is not known here, or not any more")
        return tenant, "basic" if "basic" in ways else "bearer"

    def caller(self, tenant: Tenant, asked_seconds: str | None = None) -> Caller:
        """
        Args:
            asked_seconds: of the header x-request-timeout.

        Raises:
            RequestError: that is no sensible time.
        """
        seconds = self._request_timeout
        if asked_seconds is not None:
            asked = _seconds(asked_seconds)
            seconds = asked if seconds is None else min(asked, seconds)
        return Caller(
            tenant,
            self._meters.setdefault(tenant.name, Meter()),
            known=self.keys is not None,
            deadline=None if seconds is None else time.monotonic() + seconds,
            prompt_log=self._log_of(tenant),
        )

    def caller_named(self, name: str) -> Caller | None:
        """For work that goes on without a connection; None: that tenant has gone."""
        if self.keys is None:
            tenant: Tenant | None = ANYBODY.tenant if name == ANYBODY.tenant.name else None
        else:
            tenant = self.keys.tenants.get(name)
        if tenant is None:
            return None
        meter = self._meters.setdefault(name, Meter())
        known = self.keys is not None
        return Caller(tenant, meter, known, prompt_log=self._log_of(tenant))

    def _log_of(self, tenant: Tenant) -> PromptLog | None:
        if self._prompt_log is None or not tenant.log_prompts:
            return None
        return PromptLog(self._prompt_log, tenant.name)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    return check_seconds(seconds, "x-request-timeout")


def _shown(name: bytes, value: bytes) -> tuple[bytes, Credentials] | None:
    """The key in one header, if it is one for keys; a malformed one is a key nobody has."""
    if name == b"x-api-key":
        return value.strip(), "bearer"
    if name != b"authorization":
        return None
    scheme, _, rest = value.strip().partition(b" ")
    if scheme.lower() == b"basic":
        try:
            pair = base64.b64decode(rest.strip(), validate=True)
        except (binascii.Error, ValueError):
            return b"", "basic"
        return pair.partition(b":")[2], "basic"
    return (rest.strip() if scheme.lower() == b"bearer" else b""), "bearer"
