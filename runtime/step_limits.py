"""How much a step may hold: less after the device's memory ran out, slowly more again. No torch."""

from __future__ import annotations

__all__ = ["StepLimits"]

_GROW_AFTER = 64  # steps that went well, before the limits grow a little
_SLOWEST = 4096
_SHARE = 8  # they grow by one part in that many


class StepLimits:
    """Limits on the rows and tokens of a step, at most those that were configured.

    Halved when a step failed, raised by an eighth after some that went well; each failure makes the
    way back slower, so that a limit that is too high for good is tried seldom.
    """

    def __init__(self, max_rows: int, max_tokens: int) -> None:
        self.num_rows = self._max_rows = max_rows
        self.num_tokens = self._max_tokens = max_tokens
        self.num_failures = 0
        self._after = _GROW_AFTER
        self._well = 0  # steps since the limits changed
        self._before = (max_rows, max_tokens)  # before the failures in a row that go on now

    def shrink(self, num_rows: int, num_tokens: int) -> bool:
        """A step of that size failed. False: there is no smaller one."""
        self.num_failures += 1
        self._well = 0
        if num_rows == num_tokens == 1:
            self.num_rows, self.num_tokens = self._before  # that one row is to blame
            return False
        self._after = min(_SLOWEST, 2 * self._after)
        self.num_rows = min(self.num_rows, max(1, num_rows // 2))
        self.num_tokens = max(self.num_rows, min(self.num_tokens, num_tokens // 2))
        return True

    def grow(self) -> None:
        """A step went well."""
        self._before = (self.num_rows, self.num_tokens)
        if self.num_rows == self._max_rows and self.num_tokens == self._max_tokens:
            return
        self._well += 1
        if self._well >= self._after:
            self._well = 0
            self.num_rows = min(self._max_rows, self.num_rows + 1 + self.num_rows // _SHARE)
            grown = self.num_tokens + 1 + self.num_tokens // _SHARE
            self.num_tokens = min(self._max_tokens, max(grown, self.num_rows))
            if self.num_rows == self._max_rows and self.num_tokens == self._max_tokens:
                self._after = _GROW_AFTER
