"""GET / and the page's two files. Everything comes from here: no build step, no other server."""

from importlib.resources import files

from litestar import Controller, Response, get

__all__ = ["PageController"]

_POLICY = "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'"


class PageController(Controller):
    """The page that chats with the model."""

    include_in_schema = False

    @get("/")
    async def index(self) -> Response[bytes]:
        return _file("index.html", "text/html; charset=utf-8")

    @get("/page/app.js")
    async def script(self) -> Response[bytes]:
        return _file("app.js", "text/javascript; charset=utf-8")

    @get("/page/style.css")
    async def style(self) -> Response[bytes]:
        return _file("style.css", "text/css; charset=utf-8")

    @get("/favicon.ico")
    async def icon(self) -> Response[None]:
        return Response(None, status_code=204)


def _file(name: str, media_type: str) -> Response[bytes]:
    body = files("halyard.api").joinpath("page", name).read_bytes()
    headers = {"Cache-Control": "no-cache", "Content-Security-Policy": _POLICY}
    return Response(body, media_type=media_type, headers=headers)
