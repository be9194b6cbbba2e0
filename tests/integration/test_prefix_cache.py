"""Prefixes that are computed once and shared, as clients and operators see it: real processes."""

from __future__ import annotations

import asyncio
import json
import urllib.request
from typing import Any

import aiohttp
import pytest

from tests.cluster import Cluster, running_cluster
from understudy.actors.http_admin import admin_socket

PROMPT = "import os\n\n\ndef read(path):\n" * 6
SPECULATION = "--speculative-config=" + json.dumps({"method": "ngram"})


def complete(cluster: Cluster, **fields: Any) -> dict[str, Any]:
    body = {"prompt": PROMPT, "max_tokens": 8, "temperature": 0, **fields}
    request = urllib.request.Request(
        f"{cluster.base_url}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        answer: dict[str, Any] = json.load(response)
    return answer


def num_cached(answer: dict[str, Any]) -> int:
    found: int = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
    return found


async def reset(cluster: Cluster) -> int:
    connector = aiohttp.UnixConnector(str(admin_socket(cluster.run_dir, "gateway-0")))
    async with (
        aiohttp.ClientSession(connector=connector) as session,
        session.post("http://understudy/reset_prefix_cache") as response,
    ):
        return response.status


@pytest.mark.parametrize("flags", [pytest.param((), marks=pytest.mark.soak), (SPECULATION,)])
def test_a_prefix_is_computed_once_for_those_who_share_it(flags: tuple[str, ...]) -> None:
    with running_cluster(*flags, engines=1, engine="model") as cluster:
        first = complete(cluster)
        assert num_cached(first) == 0
        again = complete(cluster)
        assert num_cached(again) == again["usage"]["prompt_tokens"] - 1
        assert again["choices"] == first["choices"]
        assert num_cached(complete(cluster, cache_salt="mine")) == 0
        assert num_cached(complete(cluster, cache_salt="mine")) > 0
        assert asyncio.run(reset(cluster)) == 200
        forgotten = complete(cluster)
        assert num_cached(forgotten) == 0
        assert forgotten["choices"] == first["choices"]
