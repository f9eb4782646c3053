"""What the engine is at, in one word, and what somebody without a key is told of it."""

from typing import Literal, get_args

__all__ = ["PLAINLY", "STATES", "State"]

State = Literal["loading", "ready", "restarting", "asleep", "stopping", "failed"]
"""Restarting: another engine takes the place of one that died, or of one that is exchanged."""

STATES: tuple[State, ...] = get_args(State)

PLAINLY: dict[State, str] = {
    "loading": "the engine is loading",
    "ready": "ready",
    "restarting": "the engine is being replaced",
    "asleep": "the engine sleeps",
    "stopping": "shutting down",
    "failed": "the engine has failed: the server's log says why",
}
"""Without an error's own words, which may tell of paths, models and devices."""
