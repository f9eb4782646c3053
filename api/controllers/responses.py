"""POST /v1/responses, and what was stored of them."""

import asyncio
from typing import Annotated, Any

from litestar import Controller, Request, delete, get, post
from litestar.params import Parameter
from litestar.types import ASGIApp

from halyard.api.chat_run import plan_chat, start_chat
from halyard.api.convert import decode_body
from halyard.api.deps import error_observer, host_of, new_id
from halyard.api.openapi import body_of
from halyard.api.paging import MOST, After, Listed, Order, page
from halyard.api.response_answers import ResponseAnswers
from halyard.api.response_convert import as_chat, input_blamed, read_items
from halyard.api.response_store import ResponseStore, StoredResponse
from halyard.api.schemas.responses import ResponseRequest
from halyard.api.sse import EventStream, JsonAnswer
from halyard.hal.errors import RequestError

__all__ = ["ResponseController"]


class ResponseController(Controller):
    """OpenAI's newer conversations."""

    path = "/v1/responses"
    tags = ("OpenAI",)

    @post(status_code=200, operation_class=body_of(ResponseRequest))
    async def create(self, request: Request[Any, Any, Any]) -> ASGIApp:
        """Answer; the conversation may go on from an earlier response."""
        host, store = host_of(request), _store(request)
        asked = decode_body(await request.body(), ResponseRequest)
        client = host.client
        model = host.check_model(asked.model)
        before: list[Any] = []
        if asked.previous_response_id is not None:
            before = store.get(asked.previous_response_id, "previous_response_id").conversation
        chat = as_chat(asked, before)
        with input_blamed():
            plan = await plan_chat(client, chat)
            generation = start_chat(chat, plan, new_id("resp").replace("-", "_"))
        answers = ResponseAnswers(generation, asked, model, plan.rules, generation.fingerprint)
        items = asked.input
        if isinstance(items, str):
            items = [{"type": "message", "role": "user", "content": items}]
        stored = StoredResponse(answers, [*before, *read_items(items)], items)
        if asked.store is not False:
            store.put(generation.answer_id, stored)
        observe = error_observer(host, request)
        if asked.background:

            async def work() -> None:
                try:
                    await answers.run()
                except Exception as error:  # noqa: BLE001 - whoever fetches the response is told
                    observe(error)

            stored.task = asyncio.create_task(work())

            async def told() -> dict[str, Any]:
                return answers.response()

            return JsonAnswer(told(), lambda: None, observe)
        if asked.stream:
            return EventStream(answers.events(), answers.cancel, observe)
        return JsonAnswer(answers.run(), answers.cancel, observe)

    @get("/{response_id:str}")
    async def retrieve(self, request: Request[Any, Any, Any], response_id: str) -> dict[str, Any]:
        """A stored response as it is now."""
        return _store(request).get(response_id).answers.response()

    @post("/{response_id:str}/cancel", status_code=200)
    async def cancel(self, request: Request[Any, Any, Any], response_id: str) -> dict[str, Any]:
        """Give up a response that runs in the background."""
        stored = _store(request).get(response_id)
        if stored.task is None:
            raise RequestError("only a response in the background can be cancelled", "response_id")
        stored.answers.cancel()
        return stored.answers.response()

    @delete("/{response_id:str}", status_code=200)
    async def remove(self, request: Request[Any, Any, Any], response_id: str) -> dict[str, Any]:
        """Forget a response."""
        _store(request).drop(response_id)
        return {"id": response_id, "object": "response.deleted", "deleted": True}

    @get("/{response_id:str}/input_items")
    async def items(
        self,
        request: Request[Any, Any, Any],
        response_id: str,
        after: After = None,
        limit: Annotated[int, Parameter(ge=1, le=100, description=MOST)] = 20,
        order: Order = "desc",
    ) -> dict[str, Any]:
        """A page of what a response was given, by default the last first."""
        listed: dict[str, Listed] = {}
        for number, item in enumerate(_store(request).get(response_id).items):
            name = item.get("id")
            if not isinstance(name, str) or name in listed:
                name = f"item_{number}"
            facts = {"type": "message", **item, "id": name}
            listed[name] = Listed((number, name), facts)
        if after is not None and after not in listed:
            raise RequestError(f"after: no item {after!r} is in this response", "after")
        place = None if after is None else listed[after].place
        return page(listed.values(), place, limit, order)


def _store(request: Request[Any, Any, Any]) -> ResponseStore:
    store: ResponseStore = request.app.state.responses
    return store
