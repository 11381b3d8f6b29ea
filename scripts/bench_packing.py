"""Packs a random checkpoint of a real model's shape: peak memory, time beside the disk's, and a kill in the middle.

Writes a bfloat16 Llama checkpoint and a 2:4 mask file, empties the page cache of them, and runs maskpro-pack in a
process of its own; then again with a kill -9 in the middle, and compares the files' hashes. Everything is deleted at
the end. What it is measured against is the disk alone: the same files read from start to end, while as many bytes as
the packed model has are written, in the same run.

    python scripts/bench_packing.py --shape 7b --folder /tmp/packing --json docs/results/packing_7b.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from maskpro_kernels import NMPattern
from maskpro_kernels.base_model import weights_sha256
from maskpro_kernels.bits import bitmask_width
from maskpro_kernels.files import TensorSpec, file_sha256, safetensors_stream

SHAPES: dict[str, dict[str, Any]] = {
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "1b": {
        "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
        "num_key_value_heads": 4,
    },
}  # fmt: skip
SOURCE_SHARD = 5 << 30  # what transformers used to write
COMMAND = """
import sys
from pathlib import Path
from maskpro_serve import convert
convert(sys.argv[1], sys.argv[2], mask=sys.argv[3])
print(next(line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")))
"""


def write_model(folder: Path, shape: str) -> tuple[list[TensorSpec], Path]:
    """A random checkpoint, and a random 2:4 mask of its linears; returns its tensors and the mask file."""
    config = LlamaConfig(vocab_size=32000, dtype=torch.bfloat16, architectures=["LlamaForCausalLM"], **SHAPES[shape])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    specs = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in model.state_dict().items()]
    files: list[list[TensorSpec]] = [[]]
    for spec in specs:
        if sum(each.nbytes for each in files[-1]) + spec.nbytes > SOURCE_SHARD:
            files.append([])
        files[-1].append(spec)
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    noise = (torch.randn(1 << 26, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    index = {}
    for number, held in enumerate(files, start=1):
        file = folder / f"model-{number:05}-of-{len(files):05}.safetensors"
        index |= dict.fromkeys((spec.name for spec in held), file.name)
        with safetensors_stream(file, held, {"format": "pt"}) as put:
            for spec in held:
                put(spec.name, noise.repeat(-(-spec.nbytes // noise.nbytes))[: spec.nbytes // 2].reshape(spec.shape))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return specs, write_mask(folder, [s for s in specs if "_proj." in s.name])


def write_mask(model: Path, linears: list[TensorSpec]) -> Path:
    """A mask file beside the model, which says as a learned one does which weights it is for."""
    path = model.with_suffix(".mask.safetensors")
    groups = np.array([0b0011, 0b0101, 0b1001, 0b0110, 0b1010, 0b1100], dtype=np.uint8)
    drawn = groups[np.random.default_rng(0).integers(0, 6, size=(2, 1 << 23))]
    bits = torch.from_numpy(drawn[0] | drawn[1] << 4)
    masks = [TensorSpec(f"{s.name}.mask", torch.uint8, (s.shape[0], bitmask_width(s.shape[1]))) for s in linears]
    shapes = {spec.name: list(spec.shape) for spec in linears}
    metadata = {
        "format": "maskpro-mask", "format_version": "1", "encoding": "bitmask", "pattern": str(NMPattern(2, 4)),
        "shapes": json.dumps(shapes), "base_model": model.name, "base_model_sha256": weights_sha256(str(model)) or "",
    }  # fmt: skip
    with safetensors_stream(path, masks, metadata) as put:
        for spec in masks:
            put(spec.name, bits.repeat(-(-spec.nbytes // len(bits)))[: spec.nbytes].reshape(spec.shape))
    return path


def forget(folder: Path) -> None:
    """Empties the page cache of a folder's files, so that they are read from the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def disk_alone(model: Path, mask: Path, scratch: Path, written: int) -> float:
    """Seconds to read the inputs from start to end while as many bytes as the output has are written and synced."""
    forget(model.parent)
    block = os.urandom(1 << 24)

    def write() -> None:
        with scratch.open("wb", buffering=0) as file:
            for begin in range(0, written, len(block)):
                part = block[: written - begin]
                if file.write(part) != len(part):
                    raise SystemExit(f"{scratch}: a short write: the disk is not measured")
            os.fsync(file.fileno())

    begin = time.perf_counter()
    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(write)
        buffer = bytearray(1 << 24)
        for path in (*sorted(model.iterdir()), mask):
            with path.open("rb", buffering=0) as source:
                while source.readinto(buffer):
                    pass
        writing.result()
    seconds = time.perf_counter() - begin
    scratch.unlink()
    return seconds


def pack(model: Path, output: Path, mask: Path, kill_at: int | None = None) -> tuple[float, int]:
    """Runs the conversion; seconds, and its peak resident bytes. With ``kill_at``, kills it at that many files."""
    forget(model.parent)
    begin = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-c", COMMAND, model, output, mask], stdout=subprocess.PIPE, text=True)
    work = output.parent / f".{output.name}.partial" / "content"
    while kill_at is not None and process.poll() is None:
        if len(list(work.glob("model-*"))) >= kill_at:
            time.sleep(0.5)  # into the next one
            process.send_signal(signal.SIGKILL)
            process.wait()
            return time.perf_counter() - begin, 0
        time.sleep(0.01)
    printed, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"the conversion failed: {process.returncode}")
    return time.perf_counter() - begin, 1024 * int(printed)


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: file_sha256(path) for path in sorted(folder.iterdir())}


def measure(folder: Path, shape: str) -> dict[str, Any]:
    say("writing the model")
    specs, mask = write_model(folder / "model", shape)
    model, output = folder / "model", folder / "packed"
    packing, disk, peaks = [], [], []
    for _ in range(2):  # A B A B: the disks of shared machines have good minutes and bad ones
        shutil.rmtree(output, ignore_errors=True)
        say("packing")
        seconds, peak = pack(model, output, mask)
        packing.append(seconds)
        peaks.append(peak)
        written = sum(path.stat().st_size for path in output.iterdir())
        say("the disk alone")
        disk.append(disk_alone(model, mask, folder / "scratch", written))
    read = sum(path.stat().st_size for path in (*model.iterdir(), mask))
    expected = hashes(output)
    shutil.rmtree(output)
    say("packing, killing, packing")
    killed_after, _ = pack(model, output, mask, kill_at=max(1, len(expected) // 3))
    resumed, _ = pack(model, output, mask)
    largest = max(spec.nbytes for spec in specs)
    return {
        "shape": shape,
        "machine": {"cpu": cpu(), "cores": len(os.sched_getaffinity(0)), "python": platform.python_version()},
        "command": " ".join(["python", *sys.argv]),
        "bytes": {"read": read, "written": written, "largest_tensor": largest},
        "seconds": [round(each, 2) for each in packing],
        "seconds_of_the_disk_alone": [round(each, 2) for each in disk],
        "share_of_disk_speed": round(statistics.mean(disk) / statistics.mean(packing), 3),
        "peak_rss_bytes": max(peaks),
        "peak_rss_allowed": largest + (1 << 30),
        "killed": {
            "seconds_until_the_kill": round(killed_after, 2),
            "seconds_of_the_second_run": round(resumed, 2),
            "same_bytes": hashes(output) == expected,
        },
    }


def say(what: str) -> None:
    print(f"{time.strftime('%T')} {what}", file=sys.stderr, flush=True)


def cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--folder", type=Path, required=True, help="to make and delete; 30 GB for 7b, 5 for 1b")
    parser.add_argument("--json", type=Path, help="file to write")
    options = parser.parse_args()
    options.folder.mkdir(parents=True)
    try:
        result = measure(options.folder, options.shape)
    finally:
        shutil.rmtree(options.folder)
    text = json.dumps(result, indent=2)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")
    within = result["peak_rss_bytes"] <= result["peak_rss_allowed"] and result["killed"]["same_bytes"]
    return 0 if within else 1


if __name__ == "__main__":
    sys.exit(main())
