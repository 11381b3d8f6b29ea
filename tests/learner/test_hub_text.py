"""Calibration from a dataset: only the network is faked; the datasets library and its streaming are real."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from maskpro_kernels import read_masks
from maskpro_learner import CalibrationError, calibration_blocks
from maskpro_learner.calibration import encode_source, source_name
from maskpro_learner.cli import main
from maskpro_learner.hub_text import hub_rows

datasets = pytest.importorskip("datasets", reason="datasets is optional: pip install maskpro-serve[eval]")


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A local dataset folder, given relative to the working folder."""
    folder = tmp_path / "stories"
    folder.mkdir()
    rows = [{"text": text, "url": "x"} for text in ["the cat sat", "  ", "on a mat and", "saw one red bird"] * 25]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "test.jsonl").write_text(json.dumps({"text": "rain fell", "url": "y"}))
    monkeypatch.chdir(tmp_path)
    return "hub:./stories"


def test_documents_come_in_order_and_no_more_than_needed(dataset: str, tokenizer: PreTrainedTokenizerFast) -> None:
    documents = encode_source(dataset, tokenizer, 8)
    assert [tokenizer.decode(ids) for ids in documents] == ["the cat sat", "on a mat and", "saw one red bird"]
    blocks = calibration_blocks([dataset], tokenizer, samples=3, length=8, seed=0)
    assert blocks.shape == (3, 8)
    assert torch.equal(blocks, calibration_blocks([dataset], tokenizer, samples=3, length=8, seed=0))


def test_split_and_configuration(dataset: str) -> None:
    assert [row["text"] for row in hub_rows(f"{dataset}:default:test")] == ["rain fell"]
    assert [row["text"] for row in hub_rows(f"{dataset}::test")] == ["rain fell"]


def test_the_hub_is_streamed_and_read_only_as_far_as_needed(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[int] = []

    def endless() -> Iterator[dict[str, str]]:
        for number in range(1_000_000):
            fetched.append(number)
            yield {"text": "the cat sat on a mat"}

    def load_dataset(name: str, config: str | None, **options: Any) -> Any:
        assert (name, config, options) == ("allenai/c4", "en", {"split": "train", "streaming": True})
        return datasets.IterableDataset.from_generator(endless)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert calibration_blocks(["hub:allenai/c4:en"], tokenizer, samples=10, length=12, seed=0).shape == (10, 12)
    assert len(fetched) == 20


def test_chat_datasets_go_through_the_chat_template(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    chat = [{"role": "user", "content": "cat sat"}, {"role": "assistant", "content": "on a mat"}]
    (tmp_path / "train.jsonl").write_text(json.dumps({"messages": chat}))
    (ids,) = encode_source(f"hub:{tmp_path}", tokenizer, 100)
    assert tokenizer.decode(ids) == "<s> user : cat sat </s> <s> assistant : on a mat </s>"


def test_the_mask_file_names_the_dataset(dataset: str, model_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "mask.safetensors"
    arguments = ["--model", str(model_folder), "--init", "wanda", "--samples", "2", "--length", "8", "--device", "cpu"]
    assert main([*arguments, "--calibration", dataset, "--output", str(output)]) == 0
    assert read_masks(output).provenance["calibration"] == "hub:stories"
    assert source_name(f"hub:{tmp_path}/stories:default:test") == "hub:stories:default:test"
    assert source_name("hub:allenai/c4:en") == "hub:allenai/c4:en"


def test_one_sentence_for_what_cannot_be_read(
    dataset: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    def blocks(source: str, samples: int = 2) -> None:
        calibration_blocks([source], tokenizer, samples=samples, length=8, seed=0)

    with pytest.raises(CalibrationError, match=r"hub:\./absent: no such dataset folder"):
        blocks("hub:./absent")
    with pytest.raises(CalibrationError, match="expected hub:NAME"):
        blocks("hub:")
    with pytest.raises(CalibrationError, match=r"validation.*Available splits"):
        blocks(f"{dataset}::validation")
    with pytest.raises(CalibrationError, match=r"expected 8000 tokens \(1000 samples of 8\), found 275"):
        blocks(dataset, samples=1000)
    columns = tmp_path / "columns"
    columns.mkdir()
    (columns / "train.jsonl").write_text('{"question": "a", "answer": "b"}')
    with pytest.raises(CalibrationError, match=r"row 1: expected the fields text.*found the fields \['answer', 'qu"):
        blocks("hub:./columns")

    def offline(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach 'allenai/c4' on the Hub\n(offline)")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(CalibrationError, match=r"allenai/c4:en: its rows cannot be read: Couldn't reach.*\(offline\)"):
        blocks("hub:allenai/c4:en")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(CalibrationError, match=r"pip install maskpro-serve\[eval\]"):
        blocks("hub:allenai/c4:en")
