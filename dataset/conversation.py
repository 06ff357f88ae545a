"""Conversations to token ids: template, visual placeholders by construction, label mask.

A conversation is rendered by the tokenizer's own chat template, cut where a visual or an answer
starts or ends, and the pieces are tokenised apart. So a placeholder can never merge with the text
around it, and an answer's supervised ids are exactly those that generation has to produce.
"""

import os.path
import re
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

IGNORED = -100  # torch's ignore_index: a position that isn't supervised
ROLES = {"human": "user", "gpt": "assistant"}  # LLaVA's names to the template's
ROLES |= {role: role for role in ("user", "assistant", "system")}

# `<image>` marks a video as well: LLaVA-Video-178K writes it so. The run is MiniMind-V's.
VISUAL_TAG = re.compile(r"<image>|<video>|<{25}>{25}")
# Stands for a visual while the template runs. A Unicode noncharacter, never part of real text.
VISUAL_MARK = "\ufdd0"

# Questions and short answers repeat in a data set: so many rendered or tokenised ones are kept.
CACHED_TEXTS = 1 << 12


class ConversationError(ValueError):
    """A conversation that can't be encoded; the message says why and how to fix it."""


@dataclass(slots=True)
class Encoded:
    """One conversation; three lists of the same length."""

    input_ids: list[int]
    labels: list[int]  # not shifted; IGNORED where unsupervised
    visual_mask: list[bool]


@lru_cache(maxsize=64)
def placeholder_ids(tokenizer, length: int = 50) -> list[int]:
    """Ids of one visual's placeholder: the first half `<`, the rest `>` (as MiniMind-V).

    The ids are the tokenizer's own (30/32 in MiniMind's of 2024, 63/65 in its of 2026). Raises
    ValueError for a tokenizer that has none.
    """
    vocabulary = tokenizer.get_vocab()
    if "<" not in vocabulary or ">" not in vocabulary:
        raise ValueError(
            f"the tokenizer {tokenizer.name_or_path!r} has no single tokens '<' and '>', which the "
            "placeholder of a visual is made of; use a byte-level tokenizer (--tokenizer_path)"
        )
    half = length // 2
    return [vocabulary["<"]] * half + [vocabulary[">"]] * (length - half)


def name_and_text(turn: dict) -> tuple[object, object]:
    """Who speaks and what, in either style; an Arrow table has all keys, some of them None."""
    name, text = turn.get("role"), turn.get("content")
    name = turn.get("from") if name is None else name
    return name, turn.get("value") if text is None else text


def normalise_messages(turns: Sequence[dict]) -> list[dict]:
    """Either style of turns (from/value, role/content) as role/content.

    Raises ConversationError, with the number of the turn, for wrong order, role or text.
    """
    if not isinstance(turns, list | tuple) or not turns:
        raise ConversationError("conversations must be a list of at least one turn")
    messages, expected = [], "user"
    for number, turn in enumerate(turns, 1):
        name, content = name_and_text(turn) if isinstance(turn, dict) else (turn, None)
        role, problem = ROLES.get(name) if isinstance(name, str) else None, None
        if role is None:
            problem = f"role {reprlib.repr(name)} isn't one of {sorted(ROLES)}"
        elif not isinstance(content, str):
            problem = f"its text must be a string, not {reprlib.repr(content)}"
        elif VISUAL_MARK in content:
            problem = "U+FDD0 isn't text; remove it"
        elif role == "system" and number > 1:
            problem = "a system turn may only come first"
        elif role not in ("system", expected):
            problem = f"it is {role}'s, expected {expected}'s"
        elif role == "assistant" and not content.strip():
            problem = "the answer is empty; remove it or fill it"
        if problem:
            raise ConversationError(f"turn {number}: {problem}")
        if role != "system":
            expected = "user" if role == "assistant" else "assistant"
        messages.append({"role": role, "content": content})
    return messages


def mark_visuals(messages: list[dict], num_visuals: int) -> list[dict]:
    """Replace each visual's tag by VISUAL_MARK; put one first where a single visual has no tag.

    Answers aren't searched: they may speak of `<video>`. Raises ConversationError where there are
    more or fewer tags than visuals.
    """
    marked, found = [dict(message) for message in messages], 0
    for message in marked:
        if message["role"] != "assistant" and "<" in message["content"]:
            message["content"], count = VISUAL_TAG.subn(VISUAL_MARK, message["content"])
            found += count
    first_user = next((message for message in marked if message["role"] == "user"), None)
    if found == 0 and num_visuals == 1 and first_user:
        first_user["content"] = f"{VISUAL_MARK}\n{first_user['content']}"
        found = 1
    _check_count(found, num_visuals)
    return marked


def _check_count(tags: int, visuals: int) -> None:
    if tags != visuals:
        raise ConversationError(
            f"{tags} visual tags (<image>, <video>) for {visuals} visuals; write one tag for each "
            "visual, in order"
        )


@lru_cache(maxsize=CACHED_TEXTS)
def _render(tokenizer, turns: tuple[tuple[str, str], ...], add_generation_prompt: bool) -> str:
    messages = [{"role": role, "content": content} for role, content in turns]
    return tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=add_generation_prompt
    )


def _split_answers(
    tokenizer, messages: list[dict], add_generation_prompt: bool
) -> list[tuple[str, bool]]:
    """The rendered text as (chunk, supervised); a supervised chunk is an answer with its end token.

    Answers are found by rendering prefixes: one starts where the generation prompt of the turns
    before it ends. What a template opens by itself (MiniMind-3's empty think block) thus belongs
    to the prompt in training as in generation.
    """
    turns = tuple((message["role"], message["content"]) for message in messages)
    full = _render(tokenizer, turns, add_generation_prompt)
    chunks, done = [], 0
    for i, (role, _) in enumerate(turns):
        if role != "assistant":
            continue
        prompt = _render(tokenizer, turns[:i], True)
        answered = _render(tokenizer, turns[: i + 1], False)
        # An answer with its own reasoning departs inside the think block: supervised from there.
        start = len(os.path.commonprefix([prompt, answered]))
        end = answered.rfind(tokenizer.eos_token, start)
        if not full.startswith(answered) or start < done or end < 0:
            raise ConversationError(
                f"the chat template of {tokenizer.name_or_path!r} rewrites earlier turns or doesn't"
                f" end an answer with {tokenizer.eos_token!r}; fix its template"
            )
        end += len(tokenizer.eos_token)
        chunks += [(full[done:start], False), (full[start:end], True)]
        done = end
    return [*chunks, (full[done:], False)]


@lru_cache(maxsize=CACHED_TEXTS)
def _piece_ids(tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def encode(
    tokenizer,
    messages: Sequence[dict],
    visual_lengths: Sequence[int],
    add_generation_prompt: bool = False,
) -> Encoded:
    """Encode one conversation about `len(visual_lengths)` visuals.

    messages: turns in either style, alternating human and assistant, a system turn first if any.
    visual_lengths: how many placeholder tokens each visual takes, in order of the tags.
    add_generation_prompt: the last turn is the human's, and the ids end where the answer starts.

    Raises ConversationError for a wrong order of turns, an empty answer, or a number of tags that
    differs from the number of visuals.
    """
    messages = mark_visuals(normalise_messages(messages), len(visual_lengths))
    if (messages[-1]["role"] == "assistant") == add_generation_prompt:
        wanted = "a human's turn to answer" if add_generation_prompt else "an assistant's answer"
        raise ConversationError(f"the last turn must be {wanted}")
    chunks = _split_answers(tokenizer, messages, add_generation_prompt)
    return _assemble(tokenizer, chunks, visual_lengths)


def encode_rendered(tokenizer, text: str, visual_lengths: Sequence[int]) -> Encoded:
    """Encode a prompt that the chat template has rendered already, tags of visuals and all.

    Raises ConversationError where there are more or fewer tags than visuals.
    """
    text, found = VISUAL_TAG.subn(VISUAL_MARK, text)
    _check_count(found, len(visual_lengths))
    return _assemble(tokenizer, [(text, False)], visual_lengths)


def left_pad(prompts: Sequence[Encoded], pad_id: int = 0) -> dict[str, torch.Tensor]:
    """Prompts as a batch for generation, (B, L) each: all rows end in the same column."""
    shape = (len(prompts), max(len(prompt.input_ids) for prompt in prompts))
    input_ids = torch.full(shape, pad_id)
    attention_mask = torch.zeros(shape, dtype=torch.bool)
    visual_mask = torch.zeros(shape, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        start = shape[1] - len(prompt.input_ids)
        input_ids[row, start:] = torch.tensor(prompt.input_ids)
        visual_mask[row, start:] = torch.tensor(prompt.visual_mask)
        attention_mask[row, start:] = True
    return {"input_ids": input_ids, "attention_mask": attention_mask, "visual_mask": visual_mask}


def _assemble(tokenizer, chunks: list[tuple[str, bool]], visual_lengths: Sequence[int]) -> Encoded:
    """Chunks of text with VISUAL_MARK in them → ids, each piece of text tokenised apart."""
    input_ids, labels, visual_mask = [], [], []
    lengths = iter(visual_lengths)
    for text, supervised in chunks:
        for number, piece in enumerate(text.split(VISUAL_MARK)):
            if number:
                ids = placeholder_ids(tokenizer, next(lengths))
                input_ids += ids
                labels += [IGNORED] * len(ids)
                visual_mask += [True] * len(ids)
            if piece:
                ids = _piece_ids(tokenizer, piece)
                input_ids += ids
                labels += ids if supervised else [IGNORED] * len(ids)
                visual_mask += [False] * len(ids)
    return Encoded(input_ids, labels, visual_mask)


def truncate(encoded: Encoded, max_length: int) -> Encoded:
    """Cut to `max_length` tokens; ConversationError if that loses a visual or all answers."""
    if len(encoded.input_ids) <= max_length:
        return encoded
    labels = encoded.labels[:max_length]
    if any(encoded.visual_mask[max_length:]):
        last = max(i for i, visual in enumerate(encoded.visual_mask) if visual) + 1
        lost = f"cuts into a visual, which ends at token {last}"
    elif all(label == IGNORED for label in labels):
        lost = "leaves no token of an answer"
    else:
        return Encoded(encoded.input_ids[:max_length], labels, encoded.visual_mask[:max_length])
    raise ConversationError(
        f"{len(encoded.input_ids)} tokens, and cutting at {max_length} {lost}; raise --max_seq_len "
        "or shorten the conversation"
    )
