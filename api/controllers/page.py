"""GET / and the page's files. Everything comes from here: no build step, no other server."""

from functools import cache
from importlib.resources import files

from litestar import Controller, Response, get
from litestar.exceptions import NotFoundException

__all__ = ["POLICY", "PageController"]

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_TYPES = {"js": "text/javascript; charset=utf-8", "css": "text/css; charset=utf-8"}


class PageController(Controller):
    """The page: chat, and what the server does."""

    include_in_schema = False

    @get("/")
    async def index(self) -> Response[bytes]:
        return _answer(_content()["index.html"], "text/html; charset=utf-8")

    @get("/page/{name:str}")
    async def file(self, name: str) -> Response[bytes]:
        body = _content().get(name)
        kind = _TYPES.get(name.rpartition(".")[2])
        if body is None or kind is None:
            raise NotFoundException
        return _answer(body, kind)

    @get("/favicon.ico")
    async def icon(self) -> Response[None]:
        return Response(None, status_code=204)


@cache
def _content() -> dict[str, bytes]:
    """Name -> content. Names come from this list, never from a request's path."""
    folder = files("halyard.api").joinpath("page")
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


def _answer(body: bytes, media_type: str) -> Response[bytes]:
    headers = {
        "Cache-Control": "no-cache",
        "Content-Security-Policy": POLICY,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
    }
    return Response(body, media_type=media_type, headers=headers)
