"""The shipped tokenizer, and the command that trains one like it."""

import re
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from scripts.train_tokenizer import TEXT_FILE, read_sections, train

ROOT = Path(__file__).resolve().parents[2]
PLACEHOLDER = "<" * 25 + ">" * 25


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ROOT / "model" / "text_tokenizer")


def test_it_has_6400_entries_and_minimind_special_tokens(tokenizer):
    assert len(tokenizer) == len(tokenizer.get_vocab()) == 6400
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert tokenizer.convert_tokens_to_ids(special) == [0, 1, 2]
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)


def test_the_template_is_plain_chatml(tokenizer):
    messages = [{"role": "user", "content": "谁在动?"}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt == "<|im_start|>user\n谁在动?<|im_end|>\n<|im_start|>assistant\n"
    messages.append({"role": "assistant", "content": "一只猫。"})
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == prompt + "一只猫。<|im_end|>\n"


def test_angle_brackets_and_digits_never_merge(tokenizer):
    merged = [tokenizer.decode([i]) for i in range(3, len(tokenizer))]
    assert [t for t in merged if len(t) > 1 and re.search("[<>0-9]", t)] == []
    for text in (PLACEHOLDER, f"a {PLACEHOLDER} b", f"视频{PLACEHOLDER}\n里", f"({PLACEHOLDER})"):
        ids = tokenizer.encode(text)
        assert [ids.count(i) for i in tokenizer.convert_tokens_to_ids(["<", ">"])] == [25, 25]
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("2026")) == ["2", "0", "2", "6"]


@pytest.mark.parametrize(
    "text", ["", "  two  spaces\n\n\ttab", "café 日本語 한국 🎬", "a<b>c 3.14", "罕见字：龘"]
)
def test_any_text_survives_the_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_words_about_videos_are_single_tokens(tokenizer):
    sections = read_sections(TEXT_FILE)
    words = " ".join(sections["words zh"]).split()
    words += [f" {word}" for word in " ".join(sections["words en"]).split()]
    assert len(words) > 500
    assert [word for word in words if len(tokenizer.encode(word)) != 1] == []


def test_training_keeps_the_rules_whatever_the_text(tmp_path):
    texts = ["moves <b> 12 12 12", "<<< moves >>> <<<", "moves 移动 移动 12"] * 50
    train(iter(texts), vocab_size=300).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokens = tokenizer.convert_ids_to_tokens(tokenizer.encode("moves 12 <b>"))
    assert tokens == ["moves", "Ġ", "1", "2", "Ġ", "<", "b", ">"]
    assert tokenizer.decode(tokenizer.encode("移动")) == "移动"
