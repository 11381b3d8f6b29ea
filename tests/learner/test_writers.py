"""What a server is asked for text, and what is made of its answers."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from maskpro_learner import LearnerError
from maskpro_learner.writers import ServerWriter


class Stub(ThreadingHTTPServer):
    """A server of one model whose answers are set, and whose requests are kept."""

    models: tuple[str, ...] = ("served",)
    choice: dict[str, Any]
    status = 200

    daemon_threads = True
    silent = False  # on prompts of one token
    together: threading.Barrier | None = None  # nobody is answered before so many have asked

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.closing = threading.Event()
        self.asked: list[dict[str, Any]] = []
        self.keys: set[str] = set()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Stub

    def do_GET(self) -> None:
        data = [{"id": name, "object": "model", "created": 0, "owned_by": "stub"} for name in self.server.models]
        self._send(200, {"object": "list", "data": data})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(body)
        self.server.keys.add(self.headers["Authorization"])
        if self.server.together:
            self.server.together.wait(timeout=30)
        if self.server.silent and len(body["prompt"]) == 1:
            self.server.closing.wait()
        if self.server.status != 200:
            self._send(self.server.status, {"error": {"message": "the prompt is too long", "code": self.server.status}})
            return
        choice = {"index": 0, "text": "", "logprobs": None, **self.server.choice}
        kind = {"id": "1", "object": "text_completion", "created": 0, "model": body["model"]}
        self._send(200, {**kind, "choices": [choice]})

    def _send(self, status: int, answer: dict[str, Any]) -> None:
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stub]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with Stub() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.closing.set()
        server.shutdown()


def test_what_is_asked_and_what_is_made_of_it(
    stub: Stub, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "a key")
    stub.choice = {"finish_reason": "stop", "token_ids": [7, 8, 2]}
    writer = ServerWriter(stub.url, tokenizer)
    texts = ["the cat", "rain fell", "the cat"]
    assert writer.write(texts, 12, temperature=0.8, seed=5) == [([7, 8], True)] * 3
    assert stub.keys == {"Bearer a key"}
    assert sorted(body.pop("seed") for body in stub.asked) == [5, 6, 7]
    prompts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert sorted(body.pop("prompt") for body in stub.asked) == sorted(prompts)
    whole_softmax = {"top_p": 1.0, "top_k": 0, "min_p": 0.0}
    no_penalty = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
    wanted = {"model": "served", "max_tokens": 12, "temperature": 0.8, "return_token_ids": True}
    assert stub.asked == [wanted | whole_softmax | no_penalty] * 3
    stub.choice = {"finish_reason": "length", "token_ids": [7, 8, 9]}
    assert writer.write(["rain"], 3, temperature=0.0, seed=0) == [([7, 8, 9], False)]


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"finish_reason": "abort", "token_ids": [7]}, "expected an answer that ends by stop or length, found abort"),
        ({"finish_reason": "stop"}, "expected token ids in an answer, as vLLM gives, found none"),
    ],
)
def test_answers_that_are_none(
    stub: Stub, tokenizer: PreTrainedTokenizerFast, choice: dict[str, Any], message: str
) -> None:
    stub.choice = choice
    with pytest.raises(LearnerError, match=f"--server {stub.url}: {message}"):
        ServerWriter(stub.url, tokenizer).write(["rain", "cat"], 3, temperature=0.0, seed=0)


@pytest.mark.timeout(60)
def test_after_a_failure_nobody_waits_for_the_other_answers(stub: Stub, tokenizer: PreTrainedTokenizerFast) -> None:
    stub.together = threading.Barrier(3)
    stub.silent, stub.choice = True, {"finish_reason": "abort", "token_ids": [7]}
    with pytest.raises(LearnerError, match="found abort"):
        ServerWriter(stub.url, tokenizer).write(["rain", "the cat", "rain"], 3, temperature=0.0, seed=0)
    assert len(stub.asked) == 3


def test_what_the_server_refuses_is_said(stub: Stub, tokenizer: PreTrainedTokenizerFast) -> None:
    stub.status = 400
    with pytest.raises(LearnerError, match=r"--server http://127.0.0.1:\d+/v1: .*the prompt is too long") as error:
        ServerWriter(stub.url.replace("//", "//me:secret@"), tokenizer).write(["rain"], 3, temperature=0.0, seed=0)
    assert "secret" not in str(error.value)


def test_no_server_of_models(stub: Stub, tokenizer: PreTrainedTokenizerFast) -> None:
    stub.models = ()
    with pytest.raises(LearnerError, match="expected a model that is served there, found none"):
        ServerWriter(stub.url, tokenizer)
    for url in ("localhost:8000/v1", "http://localhost:port/v1", "ftp://localhost/v1", "http:///v1"):
        with pytest.raises(LearnerError, match="--server: expected a URL such as http://localhost:8000/v1, found"):
            ServerWriter(url, tokenizer)
    with pytest.raises(LearnerError, match=r"--server http://127\.0\.0\.1:9/v1: "):
        ServerWriter("http://127.0.0.1:9/v1", tokenizer)
