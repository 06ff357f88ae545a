"""Answers, token by token: one prefill over the prompt, then one step a token from the cache.

Prompts of a batch are left padded, so that all of them end, and go on, in the same column.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from model.cinego import Cinego
from model.minimind import KVCache, MiniMind


def generate(
    model: Cinego | MiniMind,
    inputs: dict,
    max_new_tokens: int,
    eos_token_id: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
) -> list[list[int]]:
    """The new ids of each row, without the end token.

    inputs: what `model.forward` takes, `input_ids` (B, L) left padded with `attention_mask` (B, L)
    that is False on padding (it may be left out where nothing is padded). temperature 0 takes the
    most likely token, whatever the other rows are; above 0, top_p keeps the fewest tokens that
    reach that probability (arXiv 1904.09751) and `seed` makes the draw repeatable.
    """
    answers: list[list[int]] = [[] for _ in inputs["input_ids"]]
    for row, token in _tokens(
        model, inputs, max_new_tokens, eos_token_id, temperature, top_p, seed
    ):
        answers[row].append(token)
    return answers


def stream(
    model: Cinego | MiniMind,
    inputs: dict,
    max_new_tokens: int,
    eos_token_id: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
) -> Iterator[int]:
    """As `generate` for one row, but each id comes as soon as it is known."""
    if len(inputs["input_ids"]) != 1:
        raise ValueError(f"stream answers one prompt, not {len(inputs['input_ids'])}: use generate")
    for _, token in _tokens(model, inputs, max_new_tokens, eos_token_id, temperature, top_p, seed):
        yield token


def _tokens(
    model, inputs, max_new_tokens, eos_token_id, temperature, top_p, seed
) -> Iterator[tuple[int, int]]:
    """(row, id) of every new token. Rows that have ended leave the batch, and the cache."""
    if temperature < 0 or not 0 < top_p <= 1:
        raise ValueError(f"temperature {temperature} must be ≥ 0 and top_p {top_p} in (0, 1]")
    inputs = dict(inputs)
    input_ids, attention_mask = inputs["input_ids"], inputs.pop("attention_mask", None)
    if attention_mask is not None:
        attention_mask = attention_mask.bool()
        if not attention_mask[:, -1].all():
            raise ValueError("prompts must be padded on the left: a last token is padding")
        if attention_mask.all():  # nothing is padded: plain causal attention is faster
            attention_mask = None
    generator = None
    if seed is not None:
        generator = torch.Generator(input_ids.device).manual_seed(seed)

    was_training = model.training
    model.eval()
    try:
        cache, rows = KVCache(), torch.arange(len(input_ids), device=input_ids.device)
        for _ in range(max_new_tokens):
            # Entered anew each step: a caller who stops half-way must not find it switched on.
            with torch.inference_mode():
                output = model(
                    **inputs,
                    attention_mask=attention_mask,
                    past_key_values=cache,
                    logits_to_keep=1,
                )
                tokens = _choose(output.logits[:, -1].float(), temperature, top_p, generator)
                going = (tokens != eos_token_id).nonzero()[:, 0]
                if len(going) < len(rows):
                    rows, tokens = rows[going], tokens[going]
                    cache.keep_rows(going)
                    attention_mask = None if attention_mask is None else attention_mask[going]
                inputs = {"input_ids": tokens[:, None]}
                if attention_mask is not None:
                    attention_mask = torch.nn.functional.pad(attention_mask, (0, 1), value=True)
            yield from zip(rows.tolist(), tokens.tolist(), strict=True)
            if not len(rows):
                return
    finally:
        model.train(was_training)


def _choose(logits_BV: Tensor, temperature: float, top_p: float, generator) -> Tensor:
    if temperature == 0:
        return logits_BV.argmax(-1)
    probabilities, ids = (logits_BV / temperature).softmax(-1).sort(descending=True)
    # The token that crosses top_p is still in, so that one is always left.
    outside = probabilities.cumsum(-1) - probabilities >= top_p
    drawn = torch.multinomial(probabilities.masked_fill(outside, 0.0), 1, generator=generator)
    return ids.gather(-1, drawn)[:, 0]
