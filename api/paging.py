"""Lists in pages, as OpenAI's clients turn them: `after` is the last id of the page before."""

from collections.abc import Iterable
from typing import Annotated, Any, Literal, NamedTuple

from litestar.params import Parameter

__all__ = ["MOST", "After", "Listed", "Order", "Place", "page"]

MOST = "things on a page, at most"
After = Annotated[str | None, Parameter(description="the last id of the page before")]
Order = Annotated[Literal["asc", "desc"], Parameter(description="by when they were made")]
Place = tuple[int, str]
"""When something was made, in nanoseconds, and its id: no two are at one place."""


class Listed(NamedTuple):
    """One thing of a list."""

    place: Place
    facts: dict[str, Any]  # what a client sees, its id among them


def page(
    listed: Iterable[Listed], after: Place | None, limit: int, order: Order = "desc"
) -> dict[str, Any]:
    """At most `limit` of them that come after a place, which may be empty by now."""
    newest_first = order == "desc"
    left = sorted(listed, key=lambda one: one.place, reverse=newest_first)
    if after is not None:
        left = [one for one in left if (one.place < after if newest_first else one.place > after)]
    data = [one.facts for one in left[:limit]]
    return {"object": "list", "data": data, "has_more": len(left) > limit,
            "first_id": data[0]["id"] if data else None,
            "last_id": data[-1]["id"] if data else None}  # fmt: skip
