"""A server of the tiny model with a tokenizer, long enough streams, and clients that say how each request ended."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
from server import Server
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

MODEL = "tiny"
SEQUENCES = 4
FLAGS = [
    "--served-model-name", MODEL, "--enforce-eager", "--max-model-len", "32768", "--dtype", "float32",
    "--hf-overrides", '{"max_position_embeddings": 32768}', "--kv-cache-memory-bytes", "100M",
    "--max-num-seqs", str(SEQUENCES), "--stream-interval", "20",
    # As where threads are not bound by ONE_THREAD.
    "--distributed-executor-backend", "maskpro_serve.executor.OneProcessExecutor",
]  # fmt: skip

ONE_THREAD = {"VLLM_CPU_OMP_THREADS_BIND": str(min(os.sched_getaffinity(0)))}
"""Two threads on this model do nothing but wait for each other, for ever where a core is busy with something else."""


def with_tokenizer(packed: Path, folder: Path) -> Path:
    """A copy of the packed tiny model whose tokens are bytes."""
    shutil.copytree(packed, folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<unk>", "<s>", "</s>", *alphabet])}
    vocabulary |= {f"<{index}>": index for index in range(len(vocabulary), 320)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    return folder


@dataclass
class Ending:
    """How a request ended, seconds after it was sent."""

    status: int
    tokens: int = 0
    error: str = ""
    seconds: float = 0.0
    headers: dict[str, str] = field(default_factory=dict)


def complete(
    url: str, tokens: int, *, stream: bool = True, prompt: str = "hello", n: int = 1, **headers: str
) -> Ending:
    """One request for n completions; every way it can end is an Ending, but a hang: the client waits for 90 s."""
    begin = time.monotonic()
    body = {"model": MODEL, "prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "n": n}
    body["temperature"] = 0 if n == 1 else 1
    options = {"include_usage": True}
    ending = Ending(0)
    try:
        with httpx.stream(
            "POST", f"{url}/v1/completions", headers={name.replace("_", "-"): v for name, v in headers.items()},
            json={**body, "stream": True, "stream_options": options} if stream else body, timeout=90,
            verify=False,  # plain HTTP: without it, every client first reads the certificates, a tenth of a second each
        ) as response:  # fmt: skip
            ending.status, ending.headers = response.status_code, dict(response.headers)
            for event in _events(response):
                if "error" in event:
                    ending.error = json.dumps(event["error"])
                elif event.get("usage"):
                    ending.tokens = event["usage"]["completion_tokens"]
    except httpx.TransportError as error:
        ending.error = type(error).__name__
    ending.seconds = time.monotonic() - begin
    return ending


def _events(response: httpx.Response) -> Iterator[dict[str, Any]]:
    for line in _lines(response):
        text = line.removeprefix("data: ")
        if text.startswith("{"):
            yield json.loads(text)


def _lines(response: httpx.Response) -> Iterator[str]:
    """Not httpx's, which also end at U+0085 and other characters that a random model says."""
    rest = ""
    for text in response.iter_text():
        *lines, rest = (rest + text).split("\n")
        yield from lines
    yield rest


class Load:
    """Requests under way in threads, every second one not streamed, for n completions each.

    Many threads that read streams leave too little of two cores for the server they ask: prefer a larger n.
    """

    def __init__(self, url: str, requests: int, tokens: int, *, n: int = 1, **headers: str) -> None:
        self._pool = ThreadPoolExecutor(requests)
        self.futures: list[Future[Ending]] = [
            self._pool.submit(complete, url, tokens, stream=index % 2 == 0, n=n, **headers) for index in range(requests)
        ]

    def endings(self) -> list[Ending]:
        """Waits for all; one that hangs is a TimeoutError here."""
        try:
            return [future.result(timeout=100) for future in self.futures]
        finally:
            self._pool.shutdown(wait=False, cancel_futures=True)


def engine_processes(server: Server) -> list[psutil.Process]:
    """vLLM's engine core under the server."""
    engine = []
    for child in psutil.Process(server.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # ended since: while a server loads, it starts others
            if "EngineCore" in " ".join([child.name(), *child.cmdline()]):
                engine.append(child)
    return engine


def stand_still(server: Server) -> None:
    """Stops the engine until :func:`go_on`.

    So small a model makes tokens faster than vLLM's front end can pass them on, and meanwhile nobody else is answered.
    """
    for process in engine_processes(server):
        process.suspend()


def go_on(server: Server) -> None:
    """Lets the engine run again."""
    for process in engine_processes(server):
        process.resume()


def stand_still_when(server: Server, condition: Callable[[], bool]) -> None:
    """Lets the engine run for a moment at a time until the condition holds, and stops it there."""
    deadline = time.monotonic() + 60
    engine = engine_processes(server)  # found once: on a busy machine that takes longer than a moment
    while True:
        for process in engine:
            process.suspend()
        if condition():
            return
        assert time.monotonic() < deadline, "not within the time"
        for process in engine:
            process.resume()
        time.sleep(0.1)


def wait_until(condition, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "not within the time"
        time.sleep(0.1)


def sample(metrics: str, name: str) -> float:
    """The sum of a metric's samples."""
    return sum(
        float(line.rsplit(" ", 1)[1]) for line in metrics.splitlines() if line.startswith((name + "{", name + " "))
    )


def records(log: str) -> list[dict[str, Any]]:
    """The request log's lines among the others."""
    return [json.loads(line) for line in log.splitlines() if line.startswith('{"time"')]


def programs(repository: Path) -> tuple[Path, Path] | None:
    """Where ``prometheus`` and ``promtool`` are: on the PATH, or where scripts/get_prometheus.sh puts them."""
    local = repository / "build" / "prometheus" / "usr" / "bin"
    path = os.pathsep.join([os.environ["PATH"], str(local)])
    found = [shutil.which(name, path=path) for name in ("prometheus", "promtool")]
    return (Path(found[0]), Path(found[1])) if found[0] and found[1] else None
