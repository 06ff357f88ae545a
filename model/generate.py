"""Answers, token by token: a prompt is read once, then each step reads one token a row.

    generation = Generation(model, tokenizer.eos_token_id)
    rows = generation.add(inputs, [Row(Sampling(temperature=0.7, seed=1), prompt_ids)])
    while generation.rows:
        for row in generation.step():
            print(row.ids[-1:], row.finish_reason)

Rows may join (`add`) and leave (`remove`) between any two steps. All rows of a batch end in the
same column: what is shorter has padding on its left, and `mask` (B, T) is False there.

Shapes: B rows, L tokens of a prompt, T columns of the cache, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from model.cinego import Cinego
from model.minimind import KVCache, MiniMind


@dataclass(frozen=True)
class Sampling:
    """How one answer's tokens are chosen. What cuts (top_k, top_p, min_p) does so in that order,
    each after the temperature, as in transformers and vLLM."""

    max_new_tokens: int = 128
    temperature: float = 0.0  # 0: always the most likely token; what cuts then has no effect
    top_k: int = 0  # only the k most likely; 0: all
    top_p: float = 1.0  # the fewest that reach this probability together (arXiv 1904.09751)
    min_p: float = 0.0  # those at least this fraction as likely as the first (arXiv 2407.01082)
    repetition_penalty: float = 1.0  # on ids of prompt and answer (CTRL, arXiv 1909.05858, 4.1)
    seed: int | None = None  # makes the draw repeatable, whatever else is in the batch

    def __post_init__(self):
        wrong = [
            f"{name} is {getattr(self, name)}, must be {rule}"
            for name, rule, fits in (
                ("max_new_tokens", "1 or more", self.max_new_tokens >= 1),
                ("temperature", "0 or more", 0 <= self.temperature < float("inf")),
                ("top_k", "0 or more", self.top_k >= 0),
                ("top_p", "in (0, 1]", 0 < self.top_p <= 1),
                ("min_p", "in [0, 1]", 0 <= self.min_p <= 1),
                ("repetition_penalty", "above 0", 0 < self.repetition_penalty < float("inf")),
                ("seed", "in 0..2^63-1", self.seed is None or 0 <= self.seed < 2**63),
            )
            if not fits
        ]
        if wrong:
            raise ValueError("; ".join(wrong))


GREEDY = Sampling()


@dataclass(eq=False)
class Row:
    """One answer in the making."""

    sampling: Sampling = GREEDY
    prompt_ids: Sequence[int] = ()  # for the repetition penalty; words, not placeholders
    keep_cache: bool = False  # hand over what was read when the row leaves: a chat goes on from it
    ids: list[int] = field(default_factory=list)  # so far, without the end token
    finish_reason: str | None = None  # "stop": the end token came; "length"; "cancelled"
    cache: KVCache | None = None  # prompt and ids (maybe without the last), where keep_cache

    def __post_init__(self):
        # Its own dice, on the CPU: neither neighbours nor the device change what it draws.
        self.dice = torch.Generator()
        if self.sampling.seed is None:
            self.dice.seed()
        else:
            self.dice.manual_seed(self.sampling.seed)


class Generation:
    """The rows that are being answered together. To be used by one thread at a time."""

    def __init__(self, model: Cinego | MiniMind, eos_token_id: int):
        assert not model.training, "dropout would fall on answers: call model.eval()"
        self.model, self.eos_token_id = model, eos_token_id
        self.rows: list[Row] = []
        self.cache, self.mask = KVCache(), None

    def add(self, inputs: dict, rows: list[Row], cache: KVCache | None = None) -> list[Row]:
        """Reads the rows' prompts and chooses the first token of each; returns `rows`.

        inputs: what `model.forward` takes, `input_ids` (B, L) left padded with `attention_mask`
        (B, T) that is False on padding (it may be left out where nothing is padded). cache: what
        was read of these rows before, T - L columns; it is taken over.
        """
        cache = KVCache() if cache is None else cache
        inputs = dict(inputs)
        mask = inputs.pop("attention_mask", None)
        if mask is not None:
            mask = mask.bool()
            if not mask[:, -1].all():
                raise ValueError("prompts must be padded on the left: a last token is padding")
            if mask.all():  # nothing is padded: plain causal attention is faster
                mask = None
        logits_BV = self._read(inputs, cache, mask)
        if self.rows:
            mask = _join_masks(self.mask, len(self.rows), len(self.cache), mask, len(rows), cache)
            cache = self.cache.join(cache)
        self.rows, self.cache, self.mask = [*self.rows, *rows], cache, mask
        self._advance(rows, logits_BV)
        return rows

    def step(self) -> list[Row]:
        """One more token, or the end, for each row; returns them all."""
        rows = self.rows
        tokens_B1 = torch.tensor([row.ids[-1:] for row in rows], device=self._device())
        if self.mask is not None:
            self.mask = F.pad(self.mask, (0, 1), value=True)
        self._advance(rows, self._read({"input_ids": tokens_B1}, self.cache, self.mask))
        return rows

    def remove(self, row: Row, reason: str = "cancelled") -> None:
        """Ends a row; nothing happens if it has ended already."""
        if row.finish_reason is None:
            row.finish_reason = reason
            self._let_go()

    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _read(self, inputs: dict, cache: KVCache, mask: Tensor | None) -> Tensor:
        """(B, V): what may come next."""
        # Entered anew each time: the caller's own code between two steps must not find it on.
        with torch.inference_mode():
            output = self.model(
                **inputs, attention_mask=mask, past_key_values=cache, logits_to_keep=1
            )
            return output.logits[:, -1].float()

    def _advance(self, rows: list[Row], logits_BV: Tensor) -> None:
        for row, token in zip(rows, choose(logits_BV, rows), strict=True):
            if token == self.eos_token_id:
                row.finish_reason = "stop"
                continue
            row.ids.append(token)
            if len(row.ids) == row.sampling.max_new_tokens:
                row.finish_reason = "length"
        self._let_go()

    def _let_go(self) -> None:
        """Rows that have ended leave the batch: they cost nothing more."""
        going = [i for i, row in enumerate(self.rows) if row.finish_reason is None]
        if len(going) == len(self.rows):
            return
        for i, row in enumerate(self.rows):
            if row.finish_reason is not None and row.keep_cache:
                row.cache = self._cache_of(i)
        self.rows = [self.rows[i] for i in going]
        if not going:
            self.cache, self.mask = KVCache(), None
            return
        self.cache.keep_rows(torch.tensor(going, device=self._device()))
        if self.mask is not None:
            self.mask = self.mask[going]
            # Columns that only longer rows needed: a server's batch never ends, but they go.
            used = self.mask.any(0)
            if not used.all():
                self.cache, self.mask = self.cache.select(used), self.mask[:, used]
            if self.mask.all():
                self.mask = None

    def _cache_of(self, i: int) -> KVCache:
        if len(self.rows) == 1 and self.mask is None:
            return self.cache
        one = self.cache.row(i)
        return one if self.mask is None else one.select(self.mask[i])


def generate(
    model: Cinego | MiniMind, inputs: dict, max_new_tokens: int, eos_token_id: int, **sampling
) -> list[list[int]]:
    """The new ids of each row of `inputs` (see `Generation.add`), without the end token.

    sampling: as in `Sampling`, the same for all rows. The model may be in training mode.
    """
    rows = [Row(Sampling(max_new_tokens, **sampling), ids) for ids in inputs["input_ids"].tolist()]
    was_training = model.training
    model.eval()
    try:
        generation = Generation(model, eos_token_id)
        generation.add(inputs, rows)
        while generation.rows:
            generation.step()
    finally:
        model.train(was_training)
    return [row.ids for row in rows]


def choose(logits_BV: Tensor, rows: list[Row]) -> list[int]:
    """One token for each row, by its own settings and dice."""
    tokens = logits_BV.argmax(-1).tolist()
    for i, row in enumerate(rows):
        how = row.sampling
        if how.temperature > 0 or how.repetition_penalty != 1:
            tokens[i] = _draw(logits_BV[i].cpu(), row)
    return tokens


def _draw(logits_V: Tensor, row: Row) -> int:
    how = row.sampling
    if how.repetition_penalty != 1:
        seen = torch.tensor(sorted({*row.prompt_ids, *row.ids}), dtype=torch.long)
        old, penalty = logits_V[seen], how.repetition_penalty
        logits_V = logits_V.index_copy(0, seen, torch.where(old > 0, old / penalty, old * penalty))
    if how.temperature == 0:
        return int(logits_V.argmax())
    probabilities, ids = (logits_V / how.temperature).softmax(-1).sort(descending=True)
    if how.top_k:
        probabilities = probabilities[: how.top_k]
        probabilities = probabilities / probabilities.sum()
    # The token that crosses top_p is still in, so that one is always left.
    within = probabilities.cumsum(-1) - probabilities < how.top_p
    within &= probabilities >= how.min_p * probabilities[0]
    return int(ids[torch.multinomial(probabilities * within, 1, generator=row.dice)])


def _join_masks(
    above: Tensor | None, num_above: int, length_above: int, below, num_below: int, cache: KVCache
) -> Tensor | None:
    """The mask of two batches one below the other, each padded on its left; None: no padding."""
    length = max(length_above, len(cache))
    if above is None and below is None and length_above == len(cache):
        return None
    device = cache.layers[0][0].device
    if above is None:
        above = torch.ones(num_above, length_above, dtype=torch.bool, device=device)
    if below is None:
        below = torch.ones(num_below, len(cache), dtype=torch.bool, device=device)
    parts = [F.pad(mask, (length - mask.shape[1], 0), value=False) for mask in (above, below)]
    return torch.cat(parts)
