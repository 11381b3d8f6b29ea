"""What the commands check before anything slow."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from maskpro_kernels.model_folder import CheckpointError, weight_files
from maskpro_learner.errors import LearnerError, ModelError


def check_device(name: str) -> None:
    """Checks that torch can compute there.

    Raises:
        LearnerError: it cannot.
    """
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch was built without CUDA
        raise LearnerError(f"--device {name}: {str(error).strip().partition(chr(10))[0]}") from error


def check_output(output: Path, beside: Iterable[Path], inputs: Iterable[Path | str]) -> None:
    """Checks that an output can be written, and that neither it nor a file named after it is one that is read.

    Args:
        output: a .safetensors file.
        beside: the files that are written beside it.
        inputs: files, folders of models, which stand for their weight files, and names of other things.

    Raises:
        LearnerError: another ending, a folder of that name, no folder to write it to, or the same file as an input.
    """
    if output.suffix != ".safetensors":
        raise LearnerError(f"--output {output}: expected a name ending in .safetensors, found {output.name!r}")
    if not output.parent.is_dir():
        raise LearnerError(f"{output}: its folder does not exist")
    if output.is_dir():
        raise LearnerError(f"--output {output}: expected the name of a file, found a folder")
    if not os.access(output.parent, os.W_OK | os.X_OK):
        raise LearnerError(f"{output}: its folder cannot be written to")
    read = {Path(name).resolve(): name for name in inputs if Path(name).exists()}
    for folder in [path for path in read if path.is_dir()]:
        with suppress(CheckpointError):  # of no safetensors files, or none of a model: what else reads it will say
            read |= {path.resolve(): path for path in weight_files(folder)}
    for written in (output, *beside):
        if (name := read.get(written.resolve())) is not None:
            raise LearnerError(f"--output {output}: would write over {name}, which is an input: choose another name")


def context_length(model: PreTrainedModel) -> float:
    """Tokens that a model sees at most; infinity where its configuration says none."""
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None) or 0  # some say -1 for none, and ALiBi has none
    return math.inf if limit < 1 or getattr(config, "alibi", False) else limit


def check_ids(model: PreTrainedModel, name: str, tokens: Tensor) -> None:
    """Checks that a model knows all tokens of a text, and sees as far as its blocks are long.

    Raises:
        ModelError: its embedding does not have them, or its context is shorter.
    """
    context = context_length(model)
    if tokens.shape[-1] > context:
        raise ModelError(
            f"{name}: --length: the model's context has {context} tokens, found blocks of {tokens.shape[-1]}"
        )
    if int(tokens.max()) >= model.get_input_embeddings().num_embeddings:  # type: ignore[operator]
        raise ModelError(f"{name}: the tokenizer makes ids that the model's embedding does not have")
