"""Where a part takes a slower way than the best it knows, it says so here: counted and logged.

For what still gives right answers. What can't be done raises instead.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter

__all__ = ["counts", "note"]

logger = logging.getLogger("halyard.fallbacks")

_lock = threading.Lock()
_counts: Counter[str] = Counter()


def note(part: str, reason: str) -> None:
    """Count a fallback and log it.

    Args:
        part: one of few words, a metric's label: "graph_capture", "program_cache", ...
        reason: one line on what is done instead and why.
    """
    with _lock:
        _counts[part] += 1
    logger.warning("%s: %s", part, reason)


def counts() -> dict[str, int]:
    """Part -> how often, in this process."""
    with _lock:
        return dict(_counts)
