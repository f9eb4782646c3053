"""GET /v1/models."""

from typing import Any

from litestar import Controller, Request, get

from halyard.api.deps import host_of
from halyard.api.host import EngineHost
from halyard.api.openapi import PlainPath
from halyard.api.schemas.server import ModelCard, ModelList
from halyard.api.tenants import caller

__all__ = ["ModelController"]


class ModelController(Controller):
    """What is served."""

    path = "/v1/models"
    tags = ("OpenAI",)

    @get()
    async def list_models(self, request: Request[Any, Any, Any]) -> ModelList:
        """The model and its aliases."""
        host = host_of(request)
        return ModelList([_card(host, name) for name in self._names(host)])

    @get("/{model_id:path}", operation_class=PlainPath)
    async def get_model(self, request: Request[Any, Any, Any]) -> ModelCard:
        """One of them; a hub id with its slash is fine."""
        host = host_of(request)
        self._names(host)
        return _card(host, host.check_model(request.path_params["model_id"].removeprefix("/")))

    @staticmethod
    def _names(host: EngineHost) -> tuple[str, ...]:
        _ = host.client  # refuses while there is nothing to describe
        allowed = caller().tenant.models
        return tuple(n for n in host.served_names if allowed is None or n in allowed)


def _card(host: EngineHost, name: str) -> ModelCard:
    client = host.client
    return ModelCard(name, host.created, client.max_model_len, client.model_name)
