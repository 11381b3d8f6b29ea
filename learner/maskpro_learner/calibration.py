"""Reads calibration text and cuts it into equal blocks of tokens.

Three file kinds: ``.txt`` (documents separated by blank lines, or one), and ``.jsonl`` with ``{"text"}``,
``{"prefix", "gold_completion"}``, or ``{"messages"}``, which goes through the tokenizer's chat template. The same
fields are read from a dataset of the hub (:mod:`maskpro_learner.hub_text`).
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from maskpro_kernels.files import file_sha256
from maskpro_learner.errors import CalibrationError
from maskpro_learner.hub_text import PREFIX, hub_rows

_BLANK_LINE = re.compile(r"\n[ \t]*\n")
_DOC_TAG = re.compile(r"^</?doc\b[^\n]*>[ \t]*\n?", re.MULTILINE)  # <doc id= url= title=> of Wikipedia extracts


@dataclass(frozen=True)
class Document:
    """One calibration document; ``chat`` says the text already holds the model's special tokens."""

    text: str
    chat: bool = False


def read_text(path: Path) -> str:
    """A UTF-8 text file without the ``<doc ...>`` lines of Wikipedia extracts.

    Raises:
        CalibrationError: missing, not UTF-8, or nothing in it.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")  # Windows marks its files
    except FileNotFoundError as error:
        raise CalibrationError(f"{path}: no such text file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"{path}: expected a UTF-8 text file: {error}") from error
    text = _DOC_TAG.sub("", text)
    if not text.strip():
        raise CalibrationError(f"{path}: expected text, found an empty file")
    return text


def read_documents(path: Path, tokenizer: PreTrainedTokenizerBase) -> list[Document]:
    """Reads one calibration file, of the kind its name ends in.

    Raises:
        CalibrationError: missing, empty or malformed (names the file and line), an unknown ending, or a chat
            file with a tokenizer that has no chat template.
    """
    if path.suffix == ".txt":
        return [Document(part.strip() + "\n\n") for part in _BLANK_LINE.split(read_text(path)) if part.strip()]
    if path.suffix != ".jsonl":
        raise CalibrationError(f"{path}: expected a calibration file ending in .txt or .jsonl, found {path.name!r}")
    documents = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise CalibrationError(f"{path}: line {number}: not JSON: {error}") from error
        document = _document(row, f"{path}: line {number}", tokenizer)
        if document.text.strip():  # some datasets keep their blank lines as rows
            documents.append(document)
    return documents


def _document(row: Any, where: str, tokenizer: PreTrainedTokenizerBase) -> Document:
    document = _read_row(row, where, tokenizer)
    try:
        document.text.encode()
    except UnicodeEncodeError as error:  # JSON may spell half a character, where a text was cut in the middle of one
        raise CalibrationError(f"{where}: expected text, found half a surrogate pair: {error}") from error
    return document


def _read_row(row: Any, where: str, tokenizer: PreTrainedTokenizerBase) -> Document:
    fields = row if isinstance(row, dict) else {}
    match fields:
        case {"text": str(text)}:
            return Document(text.strip() + "\n\n")
        case {"prefix": str(prefix), "gold_completion": str(completion)}:
            return Document((prefix + completion).strip() + "\n\n")
        case {"messages": [_, *_] as messages} if all(_is_message(message) for message in messages):
            if not tokenizer.chat_template:
                raise CalibrationError(f"{where}: holds chat messages, but the model's tokenizer has no chat template")
            try:
                return Document(str(tokenizer.apply_chat_template(messages, tokenize=False)), chat=True)
            except TemplateError as error:
                raise CalibrationError(f"{where}: the model's chat template refuses it: {error}") from error
    found = f"the fields {sorted(fields)}" if fields else f"a {type(row).__name__}"
    raise CalibrationError(
        f"{where}: expected the fields text, prefix and gold_completion, or messages (role and content), found {found}"
    )


def _is_message(message: Any) -> bool:
    return (
        isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)
    )


def encode(document: Document, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of a document; plain text gets the special tokens the tokenizer adds by itself."""
    return list(tokenizer(document.text, add_special_tokens=not document.chat, verbose=False)["input_ids"])


def cut_blocks(documents: Sequence[Sequence[int]], samples: int, length: int, seed: int) -> Tensor:
    """Cuts shuffled documents into blocks of ``length`` tokens and draws ``samples`` of them.

    A document that fits in a block but crosses its end starts the next block again from its first token, so a
    chat is met from its beginning, as it will be in use; a longer one goes on in the next block.

    Returns:
        int64 (samples, length).

    Raises:
        ValueError: there are fewer whole blocks than ``samples``; the message gives both in tokens.
    """
    generator = random.Random(seed)
    order = list(documents)
    generator.shuffle(order)
    blocks: list[list[int]] = []
    rest: list[int] = []
    for document in order:
        crossing = len(rest) + len(document) > length
        if crossing and len(document) <= length:
            blocks.append([*rest, *document][:length])
            rest = []
        rest += document
        while len(rest) >= length:
            blocks.append(rest[:length])
            rest = rest[length:]
    if len(blocks) < samples:
        found = sum(len(document) for document in documents)
        raise ValueError(f"expected {samples * length} tokens ({samples} samples of {length}), found {found}")
    return torch.tensor(generator.sample(blocks, samples), dtype=torch.int64)


def encode_source(source: Path | str, tokenizer: PreTrainedTokenizerBase, tokens: int) -> list[list[int]]:
    """The documents of a file, or the first ones of a dataset on the hub that hold ``tokens`` tokens together.

    Raises:
        CalibrationError: as :func:`read_documents`, or as :func:`maskpro_learner.hub_text.hub_rows`.
    """
    if isinstance(source, Path) or not source.startswith(PREFIX):
        return [encode(document, tokenizer) for document in read_documents(Path(source), tokenizer)]
    encoded: list[list[int]] = []
    found = 0
    for number, row in enumerate(hub_rows(source), start=1):
        document = _document(row, f"{source}: row {number}", tokenizer)
        if document.text.strip():
            encoded.append(encode(document, tokenizer))
            found += len(encoded[-1])
            if found >= tokens:
                break
    return encoded


def source_name(source: Path | str) -> str:
    """What a mask file says of a source: a file's name and hash, never the folders it lies in; a hub source itself."""
    if isinstance(source, str) and source.startswith(PREFIX):
        name, colon, rest = source.removeprefix(PREFIX).partition(":")
        local = name.startswith((".", "/"))
        return PREFIX + (Path(name).name if local else name) + colon + rest
    return f"{Path(source).name} sha256:{file_sha256(Path(source))}"


def calibration_blocks(
    sources: Sequence[Path | str], tokenizer: PreTrainedTokenizerBase, *, samples: int, length: int, seed: int
) -> Tensor:
    """Reads, tokenises and cuts calibration text; several sources share the samples evenly, the first taking the rest.

    Args:
        sources: files, and ``hub:NAME`` datasets.
        tokenizer: the model's.
        samples: blocks to return.
        length: tokens of a block.
        seed: of the shuffling.

    Returns:
        int64 (samples, length).

    Raises:
        CalibrationError: a source cannot be used or holds too few tokens, or the numbers make no sense.
    """
    if samples < max(1, len(sources)) or length < 2:
        raise CalibrationError(
            f"calibration: expected at least one sample a file and 2 tokens a sample, found {samples} x {length}"
        )
    parts = []
    for index, source in enumerate(sources):
        share = samples // len(sources) + (index == 0) * (samples % len(sources))
        tokens = encode_source(source, tokenizer, share * length)
        try:
            parts.append(cut_blocks(tokens, share, length, seed))
        except ValueError as error:
            raise CalibrationError(f"{source}: {error}") from error
    return torch.cat(parts)
