"""Vectors, scores and rankings over HTTP, by the official client where it has them: real processes.

With the bundled model, an encoder and a cross-encoder; and while engines and supervisors die.
"""

from __future__ import annotations

import base64
import json
import math
import os
import signal
import struct
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import openai
import pytest
import torch
from openai import OpenAI
from tokenizers import Tokenizer

from tests.cluster import Cluster, running_cluster
from tests.encoders import (
    BERT,
    BERT_SCORER,
    LENGTH_MAX,
    reference,
    write_encoder,
    write_sentence_transformers,
)

TEXTS = ["the quick brown fox", "jumps over the lazy dog", "def add(a, b):", "Sylter Deich"]


class Answer(NamedTuple):
    status: int
    body: Any


def post(cluster: Cluster, path: str, body: dict[str, Any]) -> Answer:
    request = urllib.request.Request(
        cluster.base_url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return Answer(response.status, json.load(response))
    except urllib.error.HTTPError as error:
        return Answer(error.code, json.load(error))


def get(cluster: Cluster, path: str) -> Any:
    with urllib.request.urlopen(cluster.base_url + path, timeout=60) as response:
        return json.load(response)


def client_of(cluster: Cluster) -> OpenAI:
    base_url = f"{cluster.base_url}/v1"
    return OpenAI(base_url=base_url, api_key="none", max_retries=0, timeout=60)


def tokenizer_of(directory: Path) -> Tokenizer:
    return Tokenizer.from_file(str(directory / "tokenizer.json"))


def cosine(one: list[float], other: list[float]) -> float:
    return sum(a * b for a, b in zip(one, other, strict=True))


# The bundled model, which generates as well


@pytest.fixture(scope="module")
def decoder() -> Iterator[Cluster]:
    with running_cluster(engines=2, engine="model") as cluster:
        yield cluster


def test_the_official_client_gets_vectors_of_length_1(decoder: Cluster) -> None:
    with client_of(decoder) as client:
        answer = client.embeddings.create(model="understudy-demo", input=TEXTS)
    assert [one.index for one in answer.data] == [0, 1, 2, 3]
    assert len({tuple(one.embedding) for one in answer.data}) == 4
    for one in answer.data:
        assert len(one.embedding) == 256
        assert math.isclose(math.hypot(*one.embedding), 1.0, rel_tol=1e-6)
    assert answer.usage.prompt_tokens == answer.usage.total_tokens > 4


def test_all_forms_of_input_and_of_numbers_say_the_same(decoder: Cluster) -> None:
    tokens = post(decoder, "/tokenize", {"prompt": TEXTS[0]}).body["tokens"]

    def vector(**body: Any) -> Any:
        status, answer = post(decoder, "/v1/embeddings", body)
        assert status == 200, answer
        return answer["data"][0]["embedding"]

    plain = vector(input=TEXTS[0])
    assert vector(input=[TEXTS[0], TEXTS[1]]) == plain
    assert vector(input=tokens) == plain
    assert vector(input=[tokens, [1, 2]]) == plain
    packed = base64.b64decode(vector(input=TEXTS[0], encoding_format="base64"))
    assert struct.unpack("<256f", packed) == tuple(plain)
    short = vector(input=TEXTS[0], dimensions=16)
    length = math.hypot(*plain[:16])
    assert short == pytest.approx([number / length for number in plain[:16]], abs=1e-6)


def test_a_ranking_is_ordered_by_the_angle_of_embeddings(decoder: Cluster) -> None:
    documents = ["lorem ipsum", "def sub(a, b):", "class A:"]
    with client_of(decoder) as client:
        made = client.embeddings.create(model="understudy-demo", input=[TEXTS[2], *documents])
    query, *others = [one.embedding for one in made.data]
    angles = [cosine(query, other) for other in others]
    scores = post(decoder, "/v1/score", {"text_1": TEXTS[2], "text_2": documents}).body
    assert [one["index"] for one in scores["data"]] == [0, 1, 2]
    assert {one["object"] for one in scores["data"]} == {"score"}
    assert [one["score"] for one in scores["data"]] == pytest.approx(angles, abs=1e-6)
    named = {"queries": [TEXTS[2]] * 3, "documents": documents}
    assert post(decoder, "/v1/score", named).body["data"] == scores["data"]
    ranked = post(
        decoder,
        "/v1/rerank",
        {"query": TEXTS[2], "documents": [documents[0], {"text": documents[1]}], "top_n": 1},
    ).body
    assert ranked["results"] == [
        {
            "index": 1,
            "relevance_score": pytest.approx(angles[1], abs=1e-6),
            "document": {"text": documents[1]},
        }
    ]
    bare = {"query": TEXTS[2], "documents": documents, "return_documents": False}
    results = post(decoder, "/v1/rerank", bare).body["results"]
    assert [one["index"] for one in results] == sorted(range(3), key=lambda i: -angles[i])
    assert all("document" not in one for one in results)


def test_a_call_is_counted_and_its_course_is_told(decoder: Cluster) -> None:
    before = get(decoder, "/v1/usage")["total"]["prompt_tokens"]
    answer = post(decoder, "/v1/embeddings", {"input": TEXTS}).body
    after = get(decoder, "/v1/usage")["total"]["prompt_tokens"]
    assert after - before == answer["usage"]["prompt_tokens"]
    told = get(decoder, f"/v1/requests/{answer['id']}")["requests"]
    assert [one["finish_reason"] for one in told] == ["stop"] * 4
    assert all(one["metrics"]["latency_s"] is not None for one in told)


def test_a_prefix_that_was_computed_changes_no_bit(decoder: Cluster) -> None:
    text = "import os\n\n\ndef read(path):\n" * 8
    first = post(decoder, "/v1/embeddings", {"input": text}).body
    again = [post(decoder, "/v1/embeddings", {"input": text}).body["data"] for _ in range(3)]
    assert again == [first["data"]] * 3


def test_a_deadline_and_a_vector_that_cannot_be_are_told(decoder: Cluster) -> None:
    many = ["import os\n" * 60] * 500
    late = post(decoder, "/v1/embeddings", {"input": many, "deadline_ms": 30})
    assert late.status == 504, late.body
    wide = post(decoder, "/v1/embeddings", {"input": "a", "dimensions": 257})
    assert (wide.status, wide.body["error"]["param"]) == (400, "dimensions")
    large = post(decoder, "/v1/embeddings", {"input": [[5] * 1000] * 301})
    assert (large.status, large.body["error"]["param"]) == (413, "input")


# An encoder


class Encoder(NamedTuple):
    cluster: Cluster
    directory: Path


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Encoder]:
    directory = write_encoder(tmp_path_factory.mktemp("encoder") / "tiny-bert", BERT)
    with running_cluster(f"--model={directory}", engines=2, engine="model") as cluster:
        yield Encoder(cluster, directory)


def expected(directory: Path, texts: list[str]) -> list[list[float]]:
    """What transformers makes of texts: means of states, at length 1."""
    model, tokenizer = reference(directory, BERT), tokenizer_of(directory)
    made = []
    with torch.inference_mode():
        for text in texts:
            ids = torch.tensor([tokenizer.encode(text).ids])
            mean = model(input_ids=ids).last_hidden_state[0].mean(0)
            made.append(torch.nn.functional.normalize(mean, dim=0).tolist())
    return made


def test_an_encoder_makes_the_vectors_of_transformers(encoder: Encoder) -> None:
    with client_of(encoder.cluster) as client:
        [model] = client.models.list()
        assert model.id == "tiny-bert"
        answer = client.embeddings.create(model="tiny-bert", input=TEXTS)
    for one, theirs in zip(answer.data, expected(encoder.directory, TEXTS), strict=True):
        assert one.embedding == pytest.approx(theirs, abs=1e-5)


def test_an_encoder_generates_nothing_and_says_so(encoder: Encoder) -> None:
    message = [{"role": "user", "content": "hello"}]
    bodies: dict[str, dict[str, Any]] = {
        "/v1/completions": {"prompt": "a"},
        "/v1/chat/completions": {"messages": message},
        "/v1/messages": {"messages": message, "max_tokens": 5},
        "/v1/responses": {"input": "a"},
        "/v1/generate": {"prompt": "a"},
    }
    for path, body in bodies.items():
        status, answer = post(encoder.cluster, path, body)
        assert status == 400, path
        assert "is an encoder and generates no text" in json.dumps(answer)


def test_a_text_that_an_encoder_cannot_read_at_once_is_refused(encoder: Encoder) -> None:
    fits = post(encoder.cluster, "/v1/embeddings", {"input": [[5] * LENGTH_MAX]})
    assert fits.status == 200, fits.body
    over = post(encoder.cluster, "/v1/embeddings", {"input": [[5] * (LENGTH_MAX + 1)]})
    assert over.status == 400
    assert over.body["error"]["code"] == "context_length_exceeded"


def test_vectors_outlive_an_engine_that_is_killed(encoder: Encoder) -> None:
    """Each input has its vector once, and the same, whoever computed it."""
    cluster = encoder.cluster
    inputs = [[number % 400 + 5] * (LENGTH_MAX - 8) for number in range(2000)]
    body = {"input": inputs, "encoding_format": "base64"}
    golden = post(cluster, "/v1/embeddings", body)
    assert golden.status == 200, golden.body
    answers: list[Answer] = []
    call = threading.Thread(target=lambda: answers.append(post(cluster, "/v1/embeddings", body)))
    victim = cluster.engine("engine-0")
    resumed = cluster.reply().resumed
    call.start()
    cluster.wait_until(lambda _: cluster.engine("engine-0").outstanding > 0)
    os.kill(victim.pid, signal.SIGKILL)
    call.join(60)
    assert [answer.status for answer in answers] == [200]
    assert cluster.reply().resumed > resumed, "no vector was being computed"
    assert answers[0].body["data"] == golden.body["data"]
    cluster.wait_until_serving(engines=2)


def test_vectors_outlive_a_supervisor_that_is_killed(encoder: Encoder) -> None:
    cluster = encoder.cluster
    inputs = [[number % 400 + 5] * (LENGTH_MAX - 8) for number in range(1500)]
    body = {"input": inputs, "encoding_format": "base64"}
    golden = post(cluster, "/v1/embeddings", body).body["data"]
    answers: list[Answer] = []
    call = threading.Thread(target=lambda: answers.append(post(cluster, "/v1/embeddings", body)))
    finished = cluster.reply().finished
    call.start()
    cluster.wait_until(
        lambda report: report.reply is not None and report.reply.finished > finished + 100
    )
    os.kill(cluster.pids()["supervisor"], signal.SIGKILL)
    call.join(60)
    assert [answer.status for answer in answers] == [200], (answers, cluster.log[-2000:])
    assert answers[0].body["data"] == golden
    cluster.wait_until_serving(engines=2)


def test_pooling_is_what_sentence_transformers_wrote_down(tmp_path: Path) -> None:
    directory = write_encoder(tmp_path / "first", BERT)
    write_sentence_transformers(directory, "cls")
    model, tokenizer = reference(directory, BERT), tokenizer_of(directory)
    with torch.inference_mode():
        ids = torch.tensor([tokenizer.encode(TEXTS[0]).ids])
        states = model(input_ids=ids).last_hidden_state[0]
    with running_cluster(f"--model={directory}", engines=1, engine="model") as cluster:
        [made] = post(cluster, "/v1/embeddings", {"input": TEXTS[0]}).body["data"]
    theirs = torch.nn.functional.normalize(states[0], dim=0).tolist()
    assert made["embedding"] == pytest.approx(theirs, abs=1e-5)


# A cross-encoder


def test_a_cross_encoder_scores_pairs_and_embeds_nothing(tmp_path: Path) -> None:
    directory = write_encoder(tmp_path / "scorer", BERT_SCORER)
    model, tokenizer = reference(directory, BERT_SCORER), tokenizer_of(directory)
    theirs = []
    with torch.inference_mode():
        for text in TEXTS[1:]:
            pair = tokenizer.encode(TEXTS[0], text)
            logits = model(
                input_ids=torch.tensor([pair.ids]), token_type_ids=torch.tensor([pair.type_ids])
            ).logits
            theirs.append(float(torch.sigmoid(logits)[0, 0]))
    with running_cluster(f"--model={directory}", engines=1, engine="model") as cluster:
        body = {"query": TEXTS[0], "documents": TEXTS[1:]}
        ranked = post(cluster, "/v1/rerank", body).body["results"]
        scores = post(cluster, "/v1/score", {"text_1": TEXTS[0], "text_2": TEXTS[1:]}).body
        with client_of(cluster) as client, pytest.raises(openai.BadRequestError) as raised:
            client.embeddings.create(model="scorer", input="a")
    assert [one["score"] for one in scores["data"]] == pytest.approx(theirs, abs=1e-5)
    assert [one["index"] for one in ranked] == sorted(range(3), key=lambda i: -theirs[i])
    assert scores["usage"]["prompt_tokens"] > 0
    assert "makes scores, not embeddings" in raised.value.message
