"""Which model is served, and whether it can be."""

from __future__ import annotations

import importlib.metadata

from aiohttp import web

from understudy.actors.http_answers import json_response
from understudy.actors.http_choices import RequestPort
from understudy.protocol.errors import ModelNotFound, Unavailable
from understudy.protocol.openai.models import model_list, model_object
from understudy.runtime.served_model import ServedModel


class StatusEndpoints:
    """What is served, and whether it can be.

    Args:
        port: The gateway's core.
        served: The model.
    """

    def __init__(self, port: RequestPort, served: ServedModel) -> None:
        self._port = port
        self._served = served
        try:
            self.server_version = importlib.metadata.version("understudy")
        except importlib.metadata.PackageNotFoundError:
            self.server_version = "unknown"  # run from a tree that was never installed

    async def models(self, _: web.Request) -> web.Response:
        """Answer ``GET /v1/models``."""
        return json_response(model_list(self._model()))

    async def model(self, http_request: web.Request) -> web.Response:
        """Answer ``GET /v1/models/{model}``."""
        name = http_request.match_info["model"]
        if name != self._served.name:
            raise ModelNotFound(f"the model {name[:64]!r} is not served here", param="model")
        return json_response(self._model())

    async def live(self, _: web.Request) -> web.Response:
        """Answer ``GET /live``: this process runs."""
        return json_response({"status": "alive"})

    async def ready(self, _: web.Request) -> web.Response:
        """Answer ``GET /ready`` and ``GET /health``: a request sent now would be served."""
        cluster = self._port.cluster
        if not self._port.is_connected:
            raise Unavailable("the supervisor cannot be reached")
        if cluster.is_draining:
            raise Unavailable("draining")
        if cluster.engines_serving == 0:
            raise Unavailable(f"none of {cluster.engines_known} engines is serving")
        return json_response(
            {
                "status": "ready",
                "engines_serving": cluster.engines_serving,
                "engines_known": cluster.engines_known,
            }
        )

    async def version(self, _: web.Request) -> web.Response:
        """Answer ``GET /version``."""
        return json_response({"version": self.server_version})

    def _model(self) -> dict[str, object]:
        served = self._served
        traits = served.traits(max_model_len=self._port.cluster.max_model_len)
        return model_object(
            served.name,
            created=served.created,
            root=served.directory.name,
            max_model_len=traits.max_model_len,
        )
