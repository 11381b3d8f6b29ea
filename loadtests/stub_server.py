"""An OpenAI-compatible endpoint of known latency, against which the load generator is measured.

    python loadtests/stub_server.py --port 8001 [--first-token 0.1] [--gap 0.02]

It streams words at the pace it is told: the first after ``--first-token`` seconds, each further one ``--gap`` seconds
later, by the clock and not one sleep after the other, so that delays do not add up. Models other than ``stub``
misbehave, each in the way its name says (``GET /v1/models`` lists them). ``GET /counts`` tells what it has seen.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from aiohttp import ClientConnectionResetError, web

MODELS = {
    "stub": "answers",
    "stub-busy": "refuses every other request with 503 and Retry-After",
    "stub-broken": "answers 500",
    "stub-hung": "accepts and never answers",
    "stub-cut": "closes the connection after two tokens",
    "stub-error": "sends an error into the stream after two tokens",
    "stub-short": "ends after two tokens, properly",
    "stub-uncounted": "sends no usage",
    "stub-miscounted": "sends a usage without prompt_tokens",
    "stub-apart": "says in a chunk of its own, as llama.cpp does, why a chat ended",
}


@dataclass
class Stub:
    """The endpoint's pace in seconds, and how often what has happened."""

    first_token: float
    gap: float
    counts: Counter[str] = field(default_factory=Counter)

    async def complete(self, http: web.Request) -> web.StreamResponse:
        body = await http.json()
        begin = asyncio.get_running_loop().time()
        chat = http.path.endswith("/chat/completions")
        model = body["model"]
        if model not in MODELS:
            return _error(404, f"The model `{model}` does not exist.")
        self.counts["requests"] += 1
        if model == "stub-broken":
            return _error(500, "broken as told")
        if model == "stub-busy":
            self.counts["busy"] += 1
            if self.counts["busy"] % 2:
                return _error(503, "busy as told", {"Retry-After": "0.01"})
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
        try:
            if model == "stub-hung":
                await asyncio.sleep(3600)
            await response.prepare(http)
            await self._stream(response, body, chat, begin)
            self.counts["finished"] += 1
        except (asyncio.CancelledError, ClientConnectionResetError):
            # The second where it writes between the hang-up and its being told.
            self.counts["hung up on"] += 1
            raise
        return response

    async def _stream(self, response: web.StreamResponse, body: dict[str, Any], chat: bool, begin: float) -> None:
        async def send(choices: list[dict[str, Any]], **more: Any) -> None:
            event = json.dumps({"model": body["model"], "choices": choices} | more)
            await response.write(f"data: {event}\n\n".encode())

        loop = asyncio.get_running_loop()
        model, tokens = body["model"], body["max_tokens"]
        sent = 2 if model in ("stub-cut", "stub-error", "stub-short") else tokens
        for index in range(sent):
            await asyncio.sleep(max(0.0, begin + self.first_token + index * self.gap - loop.time()))
            if chat and index == 0:
                await send([{"index": 0, "delta": {"role": "assistant", "content": ""}}])
            finish = "length" if index == tokens - 1 and model != "stub-apart" else None
            word = {"delta": {"content": " word"}} if chat else {"text": " word"}
            await send([{"index": 0, "finish_reason": finish, **word}])
        if model == "stub-apart" and chat:
            await send([{"index": 0, "finish_reason": "length", "delta": {}}])
        if model == "stub-cut":
            self.counts["cut"] += 1
            raise ConnectionResetError("cut as told")  # aiohttp then closes the connection without ending the body
        if model == "stub-error":
            await response.write(b'data: {"error": {"message": "failed as told", "code": 500}}\n\n')
        elif model != "stub-uncounted":
            prompt = body["prompt"] if not chat else " ".join(message["content"] for message in body["messages"])
            words = len(prompt.split())
            usage = {"prompt_tokens": words, "completion_tokens": sent, "total_tokens": words + sent}
            if model == "stub-miscounted":
                del usage["prompt_tokens"]
            await send([], usage=usage)
        await response.write(b"data: [DONE]\n\n")

    async def models(self, _: web.Request) -> web.Response:
        data = [{"id": name, "about": text} for name, text in MODELS.items()]
        return web.json_response({"object": "list", "data": data})

    async def health(self, _: web.Request) -> web.Response:
        return web.Response()

    async def seen(self, _: web.Request) -> web.Response:
        return web.json_response(self.counts)

    def application(self) -> web.Application:
        app = web.Application()
        app.add_routes(
            [
                web.post("/v1/completions", self.complete),
                web.post("/v1/chat/completions", self.complete),
                web.get("/v1/models", self.models),
                web.get("/health", self.health),
                web.get("/counts", self.seen),
            ]
        )
        return app


def _error(status: int, message: str, headers: dict[str, str] | None = None) -> web.Response:
    return web.json_response({"error": {"message": message, "code": status}}, status=status, headers=headers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8001)
    parser.add_argument("--first-token", type=float, default=0.1, help="seconds until the first token (default 0.1)")
    parser.add_argument("--gap", type=float, default=0.02, help="seconds between tokens (default 0.02)")
    arguments = parser.parse_args()
    stub = Stub(arguments.first_token, arguments.gap)
    # A handler is cancelled when its client hangs up: how an aborted stream is noticed before the next token.
    web.run_app(stub.application(), host=arguments.host, port=arguments.port, handler_cancellation=True, print=None)


if __name__ == "__main__":
    main()
