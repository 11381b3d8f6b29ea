"""Run by tests in a process of its own: greedy token ids of a model folder in vLLM, through the plugin alone; and
whether its output head runs on our kernel."""

import json
import os
import sys
from pathlib import Path

os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # apply_model sends a function to the worker,
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # which must find it

from vllm import LLM, SamplingParams


def main() -> None:
    llm = LLM(
        model=sys.argv[1], dtype="float32", enforce_eager=True, skip_tokenizer_init=True, max_model_len=128,
        max_num_seqs=4, kv_cache_memory_bytes=64 << 20, enable_prefix_caching=False,
    )  # fmt: skip
    spans = (range(3, 8), range(40, 73), range(90, 91))
    prompts = [{"prompt_token_ids": list(span)} for span in spans]
    sampling = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True, detokenize=False)
    outputs = llm.generate(prompts, sampling, use_tqdm=False)
    head = llm.apply_model(lambda model: hasattr(model.lm_head, "maskpro_head"))
    tokens = [list(output.outputs[0].token_ids) for output in outputs]
    Path(sys.argv[2]).write_text(json.dumps({"tokens": tokens, "head": head[0]}))  # vLLM prints on stdout


if __name__ == "__main__":
    main()
