"""Run by tests in a process of its own: greedy token ids of model folders in vLLM, through the plugin alone; and
whether the output head runs on our kernel.

    greedy.py OUTPUT.json '{"tensor_parallel_size": 2}' FOLDER...

The second argument holds more arguments of vllm.LLM, and maybe "adapter", the folder of a LoRA: then its tokens follow
those of the model without it. A folder's expected.json brings its own prompts.
"""

import json
import os
import sys
from pathlib import Path

os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # apply_model sends a function to the worker,
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # which must find it

from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.lora.request import LoRARequest

PROMPTS = [list(span) for span in (range(3, 8), range(40, 73), range(90, 91))]
TOKENS = 24


def has_head(model) -> bool:
    return hasattr(getattr(model, "lm_head", None), "maskpro_head")


def run(folder: Path, more: dict) -> dict:
    expected = folder / "expected.json"
    prompts = json.loads(expected.read_text())["prompts"] if expected.exists() else PROMPTS
    defaults = {
        "dtype": "float32", "enforce_eager": True, "skip_tokenizer_init": True, "max_model_len": 128, "max_num_seqs": 4,
        "kv_cache_memory_bytes": 64 << 20, "enable_prefix_caching": False,
    }  # fmt: skip
    adapter = more.get("adapter")
    llm = LLM(model=str(folder), **(defaults | {key: value for key, value in more.items() if key != "adapter"}))
    sampling = SamplingParams(max_tokens=TOKENS, temperature=0, ignore_eos=True, detokenize=False)
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    outputs = llm.generate(inputs, sampling, use_tqdm=False)
    if adapter:
        outputs += llm.generate(inputs, sampling, use_tqdm=False, lora_request=LoRARequest("adapter", 1, adapter))
    head = llm.apply_model(has_head)
    del llm
    cleanup_dist_env_and_memory()
    return {"tokens": [list(output.outputs[0].token_ids) for output in outputs], "head": head[0]}


def main() -> None:
    output, more, *folders = sys.argv[1:]
    results = {folder: run(Path(folder), json.loads(more)) for folder in folders}
    Path(output).write_text(json.dumps(results))  # vLLM prints on stdout


if __name__ == "__main__":
    main()
