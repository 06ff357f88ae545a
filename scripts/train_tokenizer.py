"""Train the shipped tokenizer: 6400 entries, byte-level BPE, English and Chinese in equal parts.

    python -m scripts.train_tokenizer --out model/text_tokenizer

No corpus is downloaded. The text is (a) English: the docstrings of Python's own standard library;
(b) Chinese: the 3755 characters of GB2312 level 1, read from Python's codec; (c) the words and
sentences about videos in `tokenizer_text.txt` beside this script, in both languages; (d) any jsonl
given with `--extra`. The same Python version gives the same file, byte for byte.
"""

import ast
import json
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from cli import Flags, flag, launch, parse_flags

# MiniMind's special tokens since 2025, in the order of their ids.
END_OF_TEXT, TURN_START, TURN_END = SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# ChatML without a default system prompt: what isn't in the conversation isn't in the text.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# How often each kind of text is seen. Docstrings count once and are by far the longest text, so
# these weights decide which words become tokens, and that the merges are shared about equally.
WORD_WEIGHT, SENTENCE_WEIGHT, COMMON_CHARACTER_WEIGHT, CHARACTER_WEIGHT = 400, 4, 120, 48
TEXT_FILE = Path(__file__).with_name("tokenizer_text.txt")


def standard_library_docstrings() -> Iterator[str]:
    """Docstrings of the standard library's modules, classes and functions, in order of path."""
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if skipped.intersection(relative.parts) or relative.name.startswith("_sysconfigdata"):
            continue
        for node in ast.walk(ast.parse(path.read_bytes())):
            if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                continue
            text = ast.get_docstring(node) or ""
            # Prose only: examples and tables would spend merges on prompts, rulers and indents.
            lines = [line.strip() for line in text.splitlines() if ">>>" not in line]
            yield from (re.sub(" {2,}", " ", line) for line in lines if re.search("[a-z]{2}", line))


def read_sections(path: Path) -> dict[str, list[str]]:
    """`[name]` headed lists of lines; `#` starts a comment line."""
    sections: dict[str, list[str]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            lines = sections.setdefault(line.strip("[]"), [])
        elif line and not line.startswith("#"):
            lines.append(line)
    return sections


def training_text(extra: list[str]) -> Iterator[str]:
    """All texts, each as often as its weight says. Raises OSError or ValueError for `extra`."""
    sections = read_sections(TEXT_FILE)
    common = dict.fromkeys("".join(sections["characters zh"]))
    yield from standard_library_docstrings()
    # GB2312 level 1: rows 16 to 55 of the code table, 3755 characters in common use.
    table = b"".join(bytes([row, cell]) for row in range(0xB0, 0xD8) for cell in range(0xA1, 0xFF))
    weighted = [(character, CHARACTER_WEIGHT) for character in table.decode("gb2312", "ignore")]
    weighted += [(character, COMMON_CHARACTER_WEIGHT) for character in common]
    weighted += [(word, WORD_WEIGHT) for word in " ".join(sections["words zh"]).split()]
    for word in " ".join(sections["words en"]).split():
        # In a sentence first; then as the first word of an answer, small and capital.
        weighted.append((f" {word}", WORD_WEIGHT))
        weighted += [(start, WORD_WEIGHT // 4) for start in (word, word.capitalize())]
    sentences = sections["sentences en"] + sections["sentences zh"]
    weighted += [(sentence, SENTENCE_WEIGHT) for sentence in sentences]
    for text, weight in weighted:
        yield from [text] * weight
    for path in extra:
        for line in Path(path).read_text(encoding="utf-8").splitlines():
            for turn in json.loads(line)["conversations"]:
                yield re.sub("<(image|video)>", "", turn.get("value") or turn["content"])


def train(texts: Iterator[str], vocab_size: int = 6400) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            # A visual's placeholder is a run of `<` and `>`: neither may melt into a neighbour,
            # a space before it included, or the run would be lost in the ids.
            pre_tokenizers.Split(Regex("[<>]"), behavior="isolated"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, special=True) for token in SPECIAL_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        # In bytes: five Chinese characters. Whole clauses as tokens would starve the words.
        max_token_length=15,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=TURN_START,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
        model_max_length=32768,
        chat_template=CHAT_TEMPLATE,
    )


@dataclass
class TokenizerFlags(Flags):
    """Tokenizer"""

    out: Path = flag(Path("model/text_tokenizer"), "directory to write")
    extra: list[str] = flag([], "jsonl files of conversations to learn from as well")


def main() -> None:
    flags = parse_flags(TokenizerFlags, __doc__)
    tokenizer = train(training_text(flags.extra))
    # The template inside tokenizer_config.json, where every version of transformers finds it.
    tokenizer.save_pretrained(flags.out, save_jinja_files=False)
    path = flags.out / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    # transformers 5 writes a class name that version 4 doesn't know; both read this one.
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(config, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    merged = tokenizer.convert_ids_to_tokens(range(len(SPECIAL_TOKENS) + 256, len(tokenizer)))
    chinese = sum(not token.replace("Ġ", "").isascii() for token in merged)
    print(f"{flags.out}: {len(tokenizer)} entries, {len(merged)} merges, {chinese} of them Chinese")


if __name__ == "__main__":
    launch(main)
