"""What a tenant has used and may still use: buckets that refill, requests under way, totals."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

from halyard.hal.errors import HalyardError, RequestError

__all__ = ["Admission", "Bucket", "Meter", "RateLimitedError", "Usage", "check_seconds"]

_MOST_SECONDS = 24 * 3600.0


class RateLimitedError(HalyardError):
    """A tenant is over a limit; `retry_after` seconds from now it may be under it again."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


def check_seconds(seconds: float, param: str) -> float:
    """A time limit that somebody asks for.

    Raises:
        RequestError: out of range.
    """
    if not 0 < seconds <= _MOST_SECONDS:
        raise RequestError(
            f"{param} must be seconds, greater than 0 and at most {_MOST_SECONDS:.0f}", param
        )
    return seconds


@dataclass(slots=True)
class Bucket:
    """Holds a minute's worth, refills steadily. May be overdrawn: what is owed is waited for."""

    level: float = 0.0
    stamp: float | None = None  # of the level; None: full, never used
    limit: int = 0  # a minute, when it was last looked at

    def fill(self, limit: int, now: float) -> float:
        """Its level now; a changed limit holds from now on."""
        if self.stamp is None or limit != self.limit:
            self.level = limit if self.stamp is None else min(self.level, limit)
        else:
            self.level = min(limit, self.level + (now - self.stamp) * limit / 60)
        self.stamp, self.limit = now, limit
        return self.level

    def wait(self, amount: float, limit: int, now: float) -> float:
        """Seconds until that much can be taken; more than a bucketful is taken from a full one."""
        lacking = min(amount, limit) - self.fill(limit, now)
        return max(0.0, lacking * 60 / limit)

    def take(self, amount: float) -> None:
        self.level -= amount


@dataclass(slots=True)
class Usage:
    """A tenant's totals since the server counts."""

    requests: int = 0  # answers begun
    refused: int = 0  # over a limit
    prompt_tokens: int = 0
    cached_tokens: int = 0  # of these, found in the prefix cache
    completion_tokens: int = 0


@dataclass(slots=True)
class Meter:
    """One tenant's. Belongs to the event loop; limits are told at each call, so they can change."""

    usage: Usage = field(default_factory=Usage)
    running: int = 0  # answers under way, waiting ones included
    _requests: Bucket = field(default_factory=Bucket)
    _tokens: Bucket = field(default_factory=Bucket)

    def count_request(self, per_minute: int | None) -> None:
        """
        Raises:
            RateLimitedError: too many requests this minute.
        """
        if per_minute is None:
            return
        wait = self._requests.wait(1, per_minute, time.monotonic())
        if wait > 0:
            self.usage.refused += 1
            raise RateLimitedError(f"this key may make {per_minute} requests a minute", wait)
        self._requests.take(1)

    def begin(
        self, prompt_tokens: int, concurrent: int | None, tokens_per_minute: int | None
    ) -> Admission:
        """
        Raises:
            RateLimitedError: too many requests at once, or too many tokens this minute.
        """
        if concurrent is not None and self.running >= concurrent:
            self.usage.refused += 1
            raise RateLimitedError(f"this key may have {concurrent} requests at once", 1.0)
        if tokens_per_minute is not None:
            wait = self._tokens.wait(prompt_tokens, tokens_per_minute, time.monotonic())
            if wait > 0:
                self.usage.refused += 1
                raise RateLimitedError(
                    f"this key may use {tokens_per_minute} tokens a minute", wait
                )
        self._tokens.take(prompt_tokens)
        self.running += 1
        self.usage.requests += 1
        self.usage.prompt_tokens += prompt_tokens
        return Admission(self, prompt_tokens)

    def headers(self, per_minute: int | None, tokens_per_minute: int | None) -> dict[str, str]:
        """What is left, in OpenAI's headers."""
        now = time.monotonic()
        told: dict[str, str] = {}
        for name, bucket, limit in (
            ("requests", self._requests, per_minute),
            ("tokens", self._tokens, tokens_per_minute),
        ):
            if limit is not None:
                left = bucket.fill(limit, now)
                told[f"x-ratelimit-limit-{name}"] = str(limit)
                told[f"x-ratelimit-remaining-{name}"] = str(max(0, math.floor(left)))
                told[f"x-ratelimit-reset-{name}"] = f"{(limit - left) * 60 / limit:.3f}s"
        return told

    def spend(self, completion_tokens: int) -> None:
        self._tokens.take(completion_tokens)
        self.usage.completion_tokens += completion_tokens


class Admission:
    """One answer under way. `end` it, in any case."""

    __slots__ = ("_meter", "_open", "_prompt_tokens")

    def __init__(self, meter: Meter, prompt_tokens: int) -> None:
        self._meter = meter
        self._prompt_tokens = prompt_tokens
        self._open = True

    def __del__(self) -> None:
        self.end()  # whoever began it is gone without a word: its place is free

    def spend(self, completion_tokens: int) -> None:
        """Count tokens as they come."""
        self._meter.spend(completion_tokens)

    def withdraw(self) -> None:
        """It was refused after all: nothing of it is charged, so that who comes again pays once."""
        if self._open:
            meter = self._meter
            meter._tokens.take(-self._prompt_tokens)
            meter.usage.requests -= 1
            meter.usage.prompt_tokens -= self._prompt_tokens
            self.end()

    def end(self, cached_tokens: int = 0) -> None:
        """It runs no more. Idempotent."""
        if self._open:
            self._open = False
            self._meter.running -= 1
            self._meter.usage.cached_tokens += cached_tokens
