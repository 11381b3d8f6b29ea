"""Calibration text: file kinds, cutting, and a clear sentence for each way it can be wrong."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from maskpro_learner import CalibrationError, calibration_blocks
from maskpro_learner.calibration import cut_blocks, read_documents, read_text

CHAT = [{"role": "user", "content": "cat sat"}, {"role": "assistant", "content": "on a mat"}]


def write_rows(path: Path, *rows: object) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return path


def test_text_is_split_at_blank_lines(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "a.txt"
    path.write_text('<doc id="1" title="x">\nthe cat\nsat\n\n\n \non a mat\n</doc>\n')
    assert [document.text for document in read_documents(path, tokenizer)] == ["the cat\nsat\n\n", "on a mat\n\n"]
    assert read_text(path) == "the cat\nsat\n\n\n \non a mat\n"


def test_jsonl_kinds(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write_rows(
        tmp_path / "a.jsonl",
        {"text": "one red bird"},
        {"prefix": "rain ", "gold_completion": "fell"},
        {"messages": CHAT},
    )
    documents = read_documents(path, tokenizer)
    assert [document.text for document in documents[:2]] == ["one red bird\n\n", "rain fell\n\n"]
    assert documents[2].text == "<s> user : cat sat </s> <s> assistant : on a mat </s> "
    assert [document.chat for document in documents] == [False, False, True]


def test_rows_without_text_are_no_documents(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write_rows(tmp_path / "a.jsonl", {"text": ""}, {"text": "one red bird"}, {"text": " \n"})
    assert [document.text for document in read_documents(path, tokenizer)] == ["one red bird\n\n"]


def test_half_a_surrogate_pair(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write_rows(tmp_path / "a.jsonl", {"text": "one"}, {"text": "red \ud83d"})
    with pytest.raises(CalibrationError, match=r"a\.jsonl: line 2: expected text, found half a surrogate pair"):
        read_documents(path, tokenizer)


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_the_mark_of_a_windows_file_is_no_text(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    path = tmp_path / name
    path.write_text('{"text": "bird"}' if name.endswith("l") else "bird", encoding="utf-8-sig")
    assert [document.text for document in read_documents(path, tokenizer)] == ["bird\n\n"]


def test_line_separators_inside_a_text_end_no_line(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "one\u2028red\u0085bird"}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert [document.text for document in read_documents(path, tokenizer)] == ["one\u2028red\u0085bird\n\n"]


def test_chats_that_the_template_refuses(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = "{{ raise_exception('no system role here') }}"
    path = write_rows(tmp_path / "a.jsonl", {"messages": CHAT})
    with pytest.raises(CalibrationError, match=r"a\.jsonl: line 1: .*template refuses it: no system role here"):
        read_documents(path, tokenizer)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "expected text, found an empty file"),
        ("\n \n", "expected text, found an empty file"),
        ("{\n", "line 1: not JSON"),
        ('{"text": "a"}\n[1]\n', "line 2: expected the fields text, .*found a list"),
        ('{"words": "a"}\n', r"line 1: .*found the fields \['words'\]"),
        ('{"messages": []}\n', r"line 1: .*found the fields \['messages'\]"),
        ('{"messages": [{"role": "user"}]}\n', "line 1: expected the fields"),
    ],
)
def test_bad_jsonl(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, content: str, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    with pytest.raises(CalibrationError, match=message) as raised:
        read_documents(path, tokenizer)
    assert str(path) in str(raised.value)


def test_other_bad_files(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(CalibrationError, match="no such text file"):
        read_documents(tmp_path / "absent.txt", tokenizer)
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CalibrationError, match="expected a UTF-8 text file"):
        read_documents(tmp_path / "binary.txt", tokenizer)
    (tmp_path / "a.csv").write_text("a")
    with pytest.raises(CalibrationError, match=r"ending in \.txt or \.jsonl, found 'a\.csv'"):
        read_documents(tmp_path / "a.csv", tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(CalibrationError, match=r"line 1: holds chat messages, but .* no chat template"):
        read_documents(write_rows(tmp_path / "a.jsonl", {"messages": CHAT}), tokenizer)


@given(st.lists(st.integers(0, 12), min_size=1, max_size=12), st.integers(2, 9), st.integers(1, 3), st.integers(0, 5))
def test_blocks_are_pieces_of_the_documents(lengths: list[int], length: int, samples: int, seed: int) -> None:
    documents = [[100 * i + k for k in range(size)] for i, size in enumerate(lengths)]
    try:
        blocks = cut_blocks(documents, samples, length, seed)
    except ValueError as error:
        assert f"found {sum(lengths)}" in str(error)  # noqa: PT017
        return
    assert blocks.shape == (samples, length)
    assert torch.equal(blocks, cut_blocks(documents, samples, length, seed))
    for row in blocks.tolist():
        for before, after in itertools.pairwise(row):
            # a token follows its own document's last one, or starts a document
            assert after == before + 1 or after % 100 == 0
        if len(documents[row[0] // 100]) <= length:
            # a document that fits begins its block, or follows whole documents: never its tail alone
            assert row[0] % 100 == 0 or row[0] // 100 == row[-1] // 100


def test_too_few_tokens_names_both_numbers(text_file: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(CalibrationError, match=r"expected 500000 tokens \(5000 samples of 100\), found \d+") as raised:
        calibration_blocks([text_file], tokenizer, samples=5000, length=100, seed=0)
    assert str(text_file) in str(raised.value)
    with pytest.raises(CalibrationError, match="at least one sample a file"):
        calibration_blocks([text_file, text_file], tokenizer, samples=1, length=100, seed=0)


def test_files_share_the_samples(tmp_path: Path, text_file: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    chat = write_rows(tmp_path / "chat.jsonl", *[{"messages": CHAT}] * 30)
    blocks = calibration_blocks([chat, text_file], tokenizer, samples=5, length=14, seed=0)
    assert blocks.shape == (5, 14)
    begins = (blocks == tokenizer.bos_token_id).any(1)
    assert begins.tolist() == [True, True, True, False, False]
    assert blocks[:3, 0].tolist() == [tokenizer.bos_token_id] * 3
