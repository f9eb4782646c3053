"""/v1/files and /v1/batches."""

from typing import Annotated, Any

from litestar import Controller, Request, Response, delete, get, post
from litestar.datastructures import UploadFile
from litestar.params import Parameter

from halyard.api.batches import BatchStore
from halyard.api.convert import decode_body
from halyard.api.files import FileStore, Purpose
from halyard.api.openapi import body_of
from halyard.api.paging import MOST, After, Order, page
from halyard.api.schemas.batches import BatchRequest
from halyard.hal.errors import RequestError

__all__ = ["BatchController", "FileController"]


class FileController(Controller):
    """Files of batches."""

    path = "/v1/files"
    tags = ("Batches",)

    @post(status_code=200)
    async def create(self, request: Request[Any, Any, Any]) -> dict[str, Any]:
        """Upload one: a form with `file` and `purpose`."""
        form = await request.form()
        file, purpose = form.get("file"), form.get("purpose")
        if not isinstance(file, UploadFile):
            raise RequestError("file is missing: send a multipart form", "file")
        if not isinstance(purpose, str):
            raise RequestError("purpose is missing", "purpose")
        return _files(request).create(await file.read(), file.filename, purpose)

    @get()
    async def list_files(
        self,
        request: Request[Any, Any, Any],
        after: After = None,
        limit: Annotated[int, Parameter(ge=1, le=10_000, description=MOST)] = 10_000,
        order: Order = "desc",
        purpose: Annotated[Purpose | None, Parameter(description="of the files wanted")] = None,
    ) -> dict[str, Any]:
        """A page of them, by default the newest first."""
        files = _files(request)
        place = None if after is None else files.place(after)
        return page(files.listed(purpose), place, limit, order)

    @get("/{file_id:str}")
    async def retrieve(self, request: Request[Any, Any, Any], file_id: str) -> dict[str, Any]:
        """Facts about one."""
        return _files(request).facts(file_id)

    @get("/{file_id:str}/content")
    async def content(self, request: Request[Any, Any, Any], file_id: str) -> Response[bytes]:
        """Its bytes."""
        body = _files(request).path(file_id).read_bytes()
        return Response(body, media_type="application/octet-stream")

    @delete("/{file_id:str}", status_code=200)
    async def remove(self, request: Request[Any, Any, Any], file_id: str) -> dict[str, Any]:
        """Forget one."""
        _files(request).delete(file_id)
        return {"id": file_id, "object": "file", "deleted": True}


class BatchController(Controller):
    """Many requests in a file, answered in their own time."""

    path = "/v1/batches"
    tags = ("Batches",)

    @post(status_code=200, operation_class=body_of(BatchRequest))
    async def create(self, request: Request[Any, Any, Any]) -> dict[str, Any]:
        """Start one."""
        asked = decode_body(await request.body(), BatchRequest)
        if asked.completion_window != "24h":
            raise RequestError("completion_window must be 24h", "completion_window")
        return _batches(request).create(asked.input_file_id, asked.endpoint, asked.metadata)

    @get()
    async def list_batches(
        self,
        request: Request[Any, Any, Any],
        after: After = None,
        limit: Annotated[int, Parameter(ge=1, le=100, description=MOST)] = 20,
        order: Order = "desc",
    ) -> dict[str, Any]:
        """A page of them, by default the newest first."""
        batches = _batches(request)
        place = None if after is None else batches.place(after)
        return page(batches.listed(), place, limit, order)

    @get("/{batch_id:str}")
    async def retrieve(self, request: Request[Any, Any, Any], batch_id: str) -> dict[str, Any]:
        """How far one is."""
        return _batches(request).get(batch_id)

    @post("/{batch_id:str}/cancel", status_code=200)
    async def cancel(self, request: Request[Any, Any, Any], batch_id: str) -> dict[str, Any]:
        """End one."""
        return _batches(request).cancel(batch_id)


def _files(request: Request[Any, Any, Any]) -> FileStore:
    store: FileStore = request.app.state.files
    return store


def _batches(request: Request[Any, Any, Any]) -> BatchStore:
    store: BatchStore = request.app.state.batches
    return store
