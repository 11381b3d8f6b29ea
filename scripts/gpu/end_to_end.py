"""vLLM end to end, dense against 2:4: a Llama of random weights, one process for each.

    python scripts/gpu/end_to_end.py FOLDER --shape 8b --layers 8 [--sparse]

Prints one line of JSON: milliseconds of a decoding step at several batch sizes, seconds of a prefill, bytes of weights.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rows import Rows

SHAPES = {"1b": (2048, 8192, 16, 32, 64), "8b": (4096, 14336, 32, 32, 128)}
"""hidden_size, intermediate_size, layers, heads, size of a head; 8 heads of keys and values."""

_BATCHES = (1, 8, 32)
_PREFILL = 2048
_NEW = 64
_START_SECONDS = 90
_MARK = "RESULT "


def serve_rows(rows: Rows, everything: bool) -> None:
    for shape, layers in (("1b", 16), ("8b", 32 if everything else 8)):
        rows.row(f"{shape} shape, {layers} layers", lambda s=shape, n=layers: both(s, n), needs=_START_SECONDS)


def both(shape: str, layers: int) -> dict[str, Any]:
    """One row: every figure dense and sparse, and the ratio."""
    found = {}
    for kind, flags in (("dense", []), ("sparse", ["--sparse"])):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, __file__, folder, "--shape", shape, "--layers", str(layers), *flags]
            done = subprocess.run(command, capture_output=True, text=True, timeout=420)
        lines = [line for line in done.stdout.splitlines() if line.startswith(_MARK)]
        if done.returncode or not lines:
            raise RuntimeError(f"vLLM did not run the {kind} model: {(done.stderr or done.stdout)[-2000:]}")
        found[kind] = json.loads(lines[-1].removeprefix(_MARK))
    row: dict[str, Any] = {}
    for name, dense in found["dense"].items():
        sparse = found["sparse"][name]
        row[name] = f"{dense:.4g} / {sparse:.4g} = {dense / sparse:.2f}"
    return row


def write_model(folder: Path, shape: str, layers: int, sparse: bool) -> None:
    """A config.json: vLLM's dummy loader makes the weights."""
    hidden, intermediate, _, heads, head = SHAPES[shape]
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden,
        "intermediate_size": intermediate, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": 8, "head_dim": head, "vocab_size": 32000, "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "hidden_act": "silu", "dtype": "bfloat16",
        "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    if sparse:
        config["quantization_config"] = {
            "quant_method": "maskpro", "format": "nm-bitmask", "format_version": 1, "pattern": "2:4",
            "ignore": ["lm_head"],
        }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))


def run(folder: Path) -> dict[str, float]:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the model in this process, to be asked for its bytes
    from vllm import LLM, SamplingParams

    from maskpro_serve.plugin import register

    register()
    llm = LLM(
        model=str(folder), load_format="dummy", dtype="bfloat16", skip_tokenizer_init=True, max_model_len=4096,
        max_num_batched_tokens=4096, max_num_seqs=max(_BATCHES), enable_prefix_caching=False, seed=0,
        gpu_memory_utilization=0.8, compilation_config={"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"},
    )  # fmt: skip

    def generate(sequences: int, prompt: int, new: int) -> float:
        prompts = [{"prompt_token_ids": [(7 * i + j) % 30000 + 3 for j in range(prompt)]} for i in range(sequences)]
        sampling = SamplingParams(max_tokens=new, temperature=0, ignore_eos=True, detokenize=False)
        start = time.perf_counter()
        llm.generate(prompts, sampling, use_tqdm=False)
        return time.perf_counter() - start

    generate(max(_BATCHES), 16, 8)
    figures = {}
    for batch in _BATCHES:  # a long run less a short one leaves prefill and start out
        short = min(generate(batch, 16, 8) for _ in range(3))
        long = min(generate(batch, 16, 8 + _NEW) for _ in range(3))
        figures[f"decode ms, batch {batch}"] = (long - short) / _NEW * 1000
    figures[f"prefill ms, {_PREFILL} tokens"] = min(generate(1, _PREFILL, 1) for _ in range(5)) * 1000
    figures["weights MB"] = sum(llm.apply_model(weight_bytes)) / 1e6
    return figures


def weight_bytes(model: Any) -> int:
    """Bytes of the storages of a model's parameters: what they share counts once, and metadata behind them too."""
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    return sum(storages.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--sparse", action="store_true")
    arguments = parser.parse_args()
    write_model(arguments.folder, arguments.shape, arguments.layers, arguments.sparse)
    print(_MARK + json.dumps(run(arguments.folder)), flush=True)


if __name__ == "__main__":
    main()
