"""How often an engine that died is started again, and when that is given up."""

from dataclasses import dataclass

__all__ = ["RestartConfig", "Restarts"]


@dataclass(frozen=True, slots=True)
class RestartConfig:
    """What a user chooses about restarts."""

    max_in_a_row: int = 5  # short-lived engines in a row, then the server stays down; 0: no restart
    max_delay_seconds: float = 30.0  # between two starts; it doubles from a quarter of a second
    stable_seconds: float = 60.0  # an engine that served that long was no failed start


class Restarts:
    """Counts failures in a row."""

    def __init__(self, config: RestartConfig) -> None:
        self.config = config
        self.in_a_row = 0

    def delay(self, lived_seconds: float) -> float | None:
        """Seconds until the next start of an engine that served for so long; None: no more."""
        if lived_seconds >= self.config.stable_seconds:
            self.in_a_row = 0
        self.in_a_row += 1
        if self.in_a_row > self.config.max_in_a_row:
            return None
        if self.in_a_row == 1:
            return 0.0
        return min(self.config.max_delay_seconds, 0.25 * 2.0 ** (self.in_a_row - 2))
