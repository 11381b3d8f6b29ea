"""The chat corpus a model writes for itself."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from maskpro_learner import ModelError, chat_corpus
from maskpro_learner.chat_corpus import answer, main, own_prompts, render_prompt, write_chat_corpus
from maskpro_learner.chat_prompts import prompt_families, seed_prompts, short_families
from maskpro_learner.partial_chats import PartialChats
from maskpro_learner.writers import ModelWriter


@pytest.mark.parametrize("families", [prompt_families(), short_families()], ids=["varied", "short"])
def test_prompts_are_distinct_varied_and_seeded(families: dict[str, list[str]]) -> None:
    everything = [prompt for family in families.values() for prompt in family]
    assert len(everything) == len(set(everything)) > 1500
    prompts = seed_prompts(200, 3, families)
    assert len(set(prompts)) == 200
    assert prompts == seed_prompts(200, 3, families) != seed_prompts(200, 4, families)
    assert prompts[:50] == seed_prompts(50, 3, families)
    for name, family in families.items():
        assert set(prompts) & set(family), name
    assert sorted(seed_prompts(len(everything), 0, families)) == sorted(everything)
    for count in (0, len(everything) + 1):
        with pytest.raises(ValueError, match=f"prompts: expected between 1 and {len(everything)}, found {count}"):
            seed_prompts(count, 0, families)


def test_short_questions_are_short_and_filled_in() -> None:
    for name, family in short_families().items():
        for prompt in family:
            assert prompt[0].isupper(), (name, prompt)
            assert prompt.endswith(("?", ".")), (name, prompt)
            assert len(prompt.split()) <= 16, (name, prompt)
            assert not {"{", "}"} & set(prompt), (name, prompt)
            assert prompt == " ".join(prompt.split()), (name, prompt)


def test_batched_answers_are_those_of_one_prompt_alone(
    tiny_model: Callable[[], PreTrainedModel], tokenizer: PreTrainedTokenizerFast
) -> None:
    model, prompts = tiny_model(), ["cat", "the red bird sat on a mat", "rain fell"]
    with torch.no_grad():  # an end token that comes up now and then
        model.lm_head.weight[2] = model.lm_head.weight[5:20].mean(0) * 3
    writer = ModelWriter(model, tokenizer)
    model.generation_config.repetition_penalty = 5.0  # which the model's maker wants, and a corpus does not
    together = answer(writer, prompts, max_new_tokens=12)
    assert together == [answer(writer, [prompt], max_new_tokens=12)[0] for prompt in prompts]
    for prompt, text in zip(prompts, together, strict=True):
        ids = tokenizer(render_prompt(tokenizer, [{"role": "user", "content": prompt}]))["input_ids"]
        new: list[int] = []
        while len(new) < 12 and (not new or new[-1] != 2):
            with torch.inference_mode():
                new.append(int(model(torch.tensor([ids + new])).logits[0, -1].argmax()))
        assert text == (tokenizer.decode(new[:-1], skip_special_tokens=True).strip() if new[-1] == 2 else None)
    sampled = [answer(writer, prompts, max_new_tokens=40, temperature=1.0, seed=seed) for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]
    whole = answer(writer, prompts, max_new_tokens=12, keep_unfinished=True)
    assert None in together  # so that something is left to keep
    for text, kept in zip(together, whole, strict=True):
        assert kept is not None
        assert text in (None, kept)


def test_sampled_answers_follow_the_softmax(
    tiny_model: Callable[[], PreTrainedModel], tokenizer: PreTrainedTokenizerFast
) -> None:
    model, draws, temperature = tiny_model(), 4000, 0.7
    with torch.no_grad():
        model.lm_head.weight *= 15  # or all tokens would be about as likely, whatever the temperature
    ids = torch.tensor([tokenizer(render_prompt(tokenizer, [{"role": "user", "content": "cat"}]))["input_ids"]])
    with torch.inference_mode():
        logits = model(ids).logits[0, -1].float()
    texts = answer(
        ModelWriter(model, tokenizer),
        ["cat"] * draws,
        max_new_tokens=1,
        temperature=temperature,
        seed=5,
        keep_unfinished=True,
    )
    words = [tokenizer.decode([token], skip_special_tokens=True).strip() for token in range(len(logits))]
    found = Counter(texts)
    assert found.keys() <= set(words)

    def deviates(temperature: float) -> bool:
        """Whether the counts are improbable: chi-square has mean k, variance 2 k; rare words are counted together."""
        likely = (logits / temperature).softmax(-1)
        expected = {
            word: draws * sum(float(p) for p, w in zip(likely, words, strict=True) if w == word) for word in words
        }
        rare = {word for word, count in expected.items() if count < 5}
        counts = [(found[word], count) for word, count in expected.items() if word not in rare]
        counts.append((sum(found[word] for word in rare), sum(expected[word] for word in rare) or 1e-9))
        assert len(counts) > 5
        return sum((n - count) ** 2 / count for n, count in counts) > len(counts) + 5 * (2 * len(counts)) ** 0.5

    assert not deviates(temperature)
    assert deviates(1.0)  # the test can tell


def test_a_model_writes_prompts_of_its_own(
    tiny_model: Callable[[], PreTrainedModel], tokenizer: PreTrainedTokenizerFast
) -> None:
    model = tiny_model()
    with torch.no_grad():  # an end token that comes up now and then
        model.lm_head.weight[2] = model.lm_head.weight[5:20].mean(0) * 3
    writer, tried = ModelWriter(model, tokenizer), list[int]()
    prompts = own_prompts(writer, 80, batch=32, max_tokens=50, seed=1, advance=tried.append)
    assert tried == [32, 32, 16]
    assert 1 < len(prompts) == len(set(prompts)) < 80
    assert all(prompts)
    assert prompts == own_prompts(writer, 80, batch=32, max_tokens=50, seed=1)
    # Neither another seed nor the one that counts its batches from there repeats them.
    for seed in (2, 33):
        assert not set(prompts) & set(own_prompts(writer, 80, batch=32, max_tokens=50, seed=seed))


def test_own_prompts_are_what_follows_the_head_of_a_users_turn(
    tiny_model: Callable[[], PreTrainedModel], tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, asked = tiny_model(), []
    written = "rain fell cat sat on"

    def generate(inputs: torch.Tensor, **_: object) -> torch.Tensor:
        asked.append(tokenizer.decode(inputs[0]))
        new = torch.tensor(tokenizer(written, add_special_tokens=False)["input_ids"])
        return torch.cat([inputs, new.expand(len(inputs), -1)], dim=1)

    monkeypatch.setattr(model, "generate", generate)
    writer = ModelWriter(model, tokenizer)
    with pytest.raises(ModelError, match="no message of a user ended within 48 tokens"):
        own_prompts(writer, 2)
    written += " </s>"
    assert own_prompts(writer, 2) == ["rain fell cat sat on"]
    # Turns that end with words of the template, which the model writes and goes on.
    tokenizer.chat_template = "{% for m in messages %}<s> user : {{ m.content }} cat sat {% endfor %}"
    assert own_prompts(writer, 2) == ["rain fell"]
    assert set(asked) == {"<s> user :"}
    tokenizer.chat_template = "{{ 'always the same' }}"
    with pytest.raises(ModelError, match="leaves out the user's message"):
        own_prompts(writer, 4)


def test_command_line(model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "corpus.jsonl"
    arguments = ["--model", str(model_folder), "--output", str(output), "--device", "cpu"]
    assert main([*arguments, "--prompts", "12", "--max-new-tokens", "96", "--temperature", "1", "--batch", "8"]) == 0
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert 1 <= len(rows) <= 12
    for row in rows:
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
        assert all(message["content"] for message in row["messages"])
    assert f"{len(rows)} conversations from 12 prompts" in capsys.readouterr().out
    own = tmp_path / "own.jsonl"
    assert main([*arguments, "--output", str(own), "--own-prompts", "--prompts", "24", "--keep-unfinished"]) == 0
    assert 1 <= len(own.read_text().splitlines()) <= 24
    capsys.readouterr()
    before = output.read_bytes()
    for bad, message in (
        (["--model", str(tmp_path / "absent")], "no such model folder"),
        (["--prompts", "0"], "prompts: expected between 1"),
        (["--prompts", "0", "--own-prompts"], "--prompts: expected at least 1, found 0"),
        (["--batch", "0"], "--batch: expected at least 1, found 0"),
        (["--temperature", "-1"], "--temperature: expected 0 or above, found -1"),
        (["--own-prompts", "--prompt-temperature", "0"], "--prompt-temperature: expected above 0, found 0"),
        (["--device", "gpu"], "--device gpu: "),
        (["--server", "http://127.0.0.1:9/v1", "--dtype", "bfloat16"], "--dtype is for a model loaded here"),
        (["--server", "http://127.0.0.1:9/v1"], "--device is for a model loaded here"),
        (["--output", str(tmp_path / "no" / "x.jsonl")], "its folder does not exist"),
    ):
        assert main([*arguments, *bad]) == 2
        assert message in capsys.readouterr().err
    assert output.read_bytes() == before


@pytest.mark.parametrize("own", [False, True], ids=["seeds", "own prompts"])
def test_a_stopped_run_goes_on_to_the_same_bytes(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], own: bool
) -> None:
    whole, output = tmp_path / "whole.jsonl", tmp_path / "chats.jsonl"
    partial = tmp_path / "chats.jsonl.partial"
    arguments = [
        "--model", str(model_folder), "--device", "cpu", "--prompts", "40", "--batch", "4", "--keep-unfinished",
        "--max-new-tokens", "6", "--temperature", "1", *(["--own-prompts"] if own else []), "--output",
    ]  # fmt: skip
    assert main([*arguments, str(whole)]) == 0
    batches = []

    def stopping(*positional: Any, **named: Any) -> list[str | None]:
        if batches:
            raise KeyboardInterrupt
        batches.append(positional[1])
        return answer(*positional, **named)

    with monkeypatch.context() as patch:
        patch.setattr(chat_corpus, "answer", stopping)
        assert main([*arguments, str(output)]) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert not output.exists()
    with partial.open("ab") as file:
        file.write(b'{"answered": 4, "cha')  # as a kill leaves it
    kept = partial.read_bytes()
    assert main([*arguments, str(output), "--seed", "9"]) == 2
    assert "chats.jsonl.partial: chats of another run" in capsys.readouterr().err
    assert partial.read_bytes() == kept
    again = []
    with monkeypatch.context() as patch:
        patch.setattr(chat_corpus, "own_prompts", lambda *_, **__: pytest.fail("prompts written again"))
        patch.setattr(chat_corpus, "answer", lambda *a, **k: again.append(a[1]) or answer(*a, **k))
        assert main([*arguments, str(output)]) == 0
    assert output.read_bytes() == whole.read_bytes()
    assert not partial.exists()
    assert again
    assert not {prompt for part in batches for prompt in part} & {prompt for part in again for prompt in part}


def test_a_model_without_chat_template(
    tmp_path: Path, tiny_model: Callable[[], PreTrainedModel], tokenizer: PreTrainedTokenizerFast
) -> None:
    tokenizer.chat_template = None
    with pytest.raises(ModelError, match="no chat template"):
        write_chat_corpus(ModelWriter(tiny_model(), tokenizer), PartialChats(tmp_path / "a", {}), prompts=["cat"])
    assert not list(tmp_path.iterdir())
