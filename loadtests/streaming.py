"""One streamed request of an OpenAI client, timed chunk by chunk.

Locust's ``FastHttpUser`` cannot time a stream: its ``iter_content`` waits until 1,024 bytes have come, four or five
tokens. So this reads lines from the HTTP client beneath it, geventhttpclient, which returns what is there.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import gevent
from geventhttpclient import HTTPClient
from geventhttpclient.response import HTTPParseError, HTTPSocketPoolResponse
from records import Record
from sse import EventParser
from workloads import PATHS, Request

RETRIED_STATUS = frozenset({408, 409, 429, 500, 502, 503, 504})
"""Answers after which OpenAI's own client asks again."""
CONNECTIONS = 10_000
"""At once, in one process: never what limits the load."""


def client_headers() -> dict[str, str]:
    """What every request has; the key is OPENAI_API_KEY's, or VLLM_API_KEY's, which servers started here ask for."""
    key = os.environ.get("OPENAI_API_KEY") or os.environ.get("VLLM_API_KEY") or "none"
    return {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}


def path_prefix(url: str) -> str:
    """What comes before ``/v1`` in every path: the HTTP client keeps no more of a URL than host and port."""
    return urlsplit(url).path.rstrip("/")


class AttemptError(Exception):
    """An attempt that gave no answer; ``wait`` is what the server asked to wait, None if it may not be repeated."""

    def __init__(self, message: str, wait: float | None = None) -> None:
        super().__init__(message)
        self.wait = wait


class StreamingClient:
    """Sends requests to one endpoint; safe for many greenlets at once.

    Args:
        url: of the server, without the ``/v1``; a path in it comes before that.
        model: name of the served model.
        timeout: seconds for one attempt, from connecting to the end of the stream.
        retries: attempts after the first, when there was no answer yet. A timeout is not repeated: it is the finding.
        fixed_length: see :meth:`workloads.Request.payload`.
        clock: seconds; the same for all records of a run.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        timeout: float = 300.0,
        retries: int = 2,
        fixed_length: bool = True,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.model = model
        self._timeout = timeout
        self._retries = retries
        self._fixed_length = fixed_length
        self._clock = clock
        self._backoff = random.Random(0)
        self._path = path_prefix(url)
        self._http = HTTPClient.from_url(
            url,
            concurrency=CONNECTIONS,
            connection_timeout=timeout + 1,  # the deadline of the attempt comes first
            network_timeout=timeout + 1,
            headers=client_headers(),
        )

    def send(self, request: Request) -> Record:
        """Sends a request, again where a client would, and never raises for what the server does."""
        record = Record(index=request.index, shape=request.shape)
        first = self._clock()
        while True:
            record.begin = self._clock()
            record.lost = record.begin - first if record.retries else 0.0
            timeout = gevent.Timeout(self._timeout)
            try:
                with timeout:
                    self._attempt(request, record)
            except gevent.Timeout as error:
                if error is not timeout:
                    raise
                record.status, record.error = "timeout", f"no end within {self._timeout:g} s"
            except AttemptError as error:
                record.error = str(error)
                if error.wait is not None and record.retries < self._retries:
                    gevent.sleep(error.wait or self._backoff.uniform(0.5, 1) * min(8.0, 0.5 * 2**record.retries))
                    record.retries += 1
                    continue
            record.total = self._clock() - record.begin
            return record

    def close(self) -> None:
        """Closes the connections it keeps."""
        self._http.close()

    def _attempt(self, request: Request, record: Record) -> None:
        body = json.dumps(request.payload(self.model, fixed_length=self._fixed_length)).encode()
        try:
            response = self._http.request("POST", self._path + PATHS[request.api], body=body)
        except (OSError, HTTPParseError) as error:
            raise AttemptError(f"no answer: {error or type(error).__name__}", wait=0.0) from error
        try:
            if response.status_code != 200:
                raise _refused(response)
            self._read(response, request, record)
        except (OSError, HTTPParseError) as error:
            raise AttemptError(f"broken stream: {error or type(error).__name__}") from error
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise AttemptError(f"an event or a usage of another form: {error!r}") from error
        finally:
            response.release()  # closes the connection if there is more to come

    def _read(self, response: HTTPSocketPoolResponse, request: Request, record: Record) -> None:
        parser = EventParser()
        before = record.begin
        chunks = 0
        usage: dict[str, Any] = {}
        while line := response.readline(b"\n"):
            for data in parser.feed(line):
                now = self._clock()
                if data == "[DONE]":
                    self._finish(request, record, usage)
                    return
                try:
                    content = json.loads(data)
                except ValueError as error:
                    raise AttemptError(f"an event that is no JSON: {data[:80]!r}") from error
                if "error" in content:
                    raise AttemptError(f"error in the stream: {_message(content)}")
                usage = content.get("usage") or usage
                if not _holds_token(content):
                    continue
                if record.first_token is None:
                    record.first_token = now - record.begin
                else:
                    record.gaps.append(now - before)
                before = now
                chunks += 1
                if chunks == request.abort_after:
                    record.status, record.error = "aborted", ""
                    return
        raise AttemptError("the stream ended without [DONE]")

    def _finish(self, request: Request, record: Record, usage: dict[str, Any]) -> None:
        if not usage:
            raise AttemptError("no usage in the stream, so its tokens cannot be counted")
        record.prompt_tokens = usage["prompt_tokens"]
        record.completion_tokens = usage["completion_tokens"]
        if record.first_token is None:
            raise AttemptError("a stream without tokens")
        if self._fixed_length and record.completion_tokens != request.max_tokens:
            raise AttemptError(f"expected {request.max_tokens} tokens, found {record.completion_tokens}")
        record.status, record.error = "ok", ""


def _holds_token(content: dict[str, Any]) -> bool:
    """Whether a chunk brings a token: it may be one without text, but what only opens or ends a chat brings none."""
    if not content.get("choices"):
        return False
    choice = content["choices"][0]
    delta = choice.get("delta")
    if "role" in (delta or {}):
        return bool(delta.get("content"))
    return delta != {} or not choice.get("finish_reason")  # vLLM's last token has its content, if an empty one


def _refused(response: HTTPSocketPoolResponse) -> AttemptError:
    body = response.read().decode(errors="replace")
    try:
        message = _message(json.loads(body))
    except ValueError:
        message = body[:200]
    wait: float | None = None
    if response.status_code in RETRIED_STATUS:
        try:
            wait = min(60.0, max(0.0, float(str(response.get("retry-after", "0")))))
        except ValueError:  # a date
            wait = 0.0
    return AttemptError(f"HTTP {response.status_code}: {message}", wait)


def _message(content: Any) -> str:
    """The sentence in an error body: OpenAI's ``{"error": {"message": ...}}`` and its relatives."""
    error = content.get("error", content) if isinstance(content, dict) else content
    return str(error.get("message", error) if isinstance(error, dict) else error)[:200]


def first_model(url: str) -> str:
    """The first model that an endpoint lists.

    Raises:
        ValueError: it lists none, or gives no answer.
    """
    client = HTTPClient.from_url(url, connection_timeout=10, network_timeout=30, headers=client_headers())
    try:
        response = client.request("GET", path_prefix(url) + "/v1/models")
        return str(json.loads(response.read())["data"][0]["id"])
    except (OSError, HTTPParseError, ValueError, KeyError, IndexError, TypeError) as error:
        raise ValueError(f"{url}/v1/models: expected a list of models, found none; give --model ({error})") from error
    finally:
        client.close()
