"""Decoding: prompts are read once into a cache of keys and values, then a token a row and step.

    generate(model, {"input_ids": ids}, 64, eos_token_id, temperature=0.7, seed=1)  # → ids of rows

Nothing here knows of text. `inference/engine.py` lets sequences join and leave a `DecodingBatch`
between any two steps; `generate` is the same loop for a batch that starts together.

Shapes: B rows, L tokens of a prompt, T columns of the cache, V vocabulary.
"""

import random
import warnings
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from model.cinego import Cinego
from model.cuda_graph import StaticStep
from model.kv_cache import KVCache
from model.minimind import MiniMind

MAX_NEW_TOKENS = 128  # of an answer, wherever the caller doesn't say
# A CUDA graph takes as long to make as some tens of steps: a few tokens don't wait for one. It then
# serves as many rows or fewer, but for a few of many, until they have read what its columns hold.
EAGER_STEPS, CAPACITY_STEP = 8, 256


@dataclass(frozen=True)
class Sampling:
    """How one answer's tokens are sampled. top_k, top_p and min_p cut in that order, each after the
    temperature, as in transformers and vLLM. Raises ValueError that lists every wrong value."""

    max_new_tokens: int = MAX_NEW_TOKENS
    temperature: float = 0.0  # 0: always the most probable token; the cuts then have no effect
    top_k: int = 0  # only the k most probable; 0: all
    top_p: float = 1.0  # the fewest that reach this probability together (arXiv 1904.09751)
    min_p: float = 0.0  # at least this fraction of the highest probability (arXiv 2407.01082)
    repetition_penalty: float = 1.0  # on ids of prompt and answer (CTRL, arXiv 1909.05858, 4.1)
    seed: int | None = None  # repeats the same samples, whatever else is in the batch

    def __post_init__(self):
        rules = {
            "max_new_tokens": ("1 or more", self.max_new_tokens >= 1),
            "temperature": ("0 or more", 0 <= self.temperature < float("inf")),
            "top_k": ("0 or more", self.top_k >= 0),
            "top_p": ("in (0, 1]", 0 < self.top_p <= 1),
            "min_p": ("in [0, 1]", 0 <= self.min_p <= 1),
            "repetition_penalty": ("above 0", 0 < self.repetition_penalty < float("inf")),
            "seed": ("in 0..2^63-1", self.seed is None or 0 <= self.seed < 2**63),
        }
        if wrong := [
            f"{name} is {getattr(self, name)}, must be {rule}"
            for name, (rule, fits) in rules.items()
            if not fits
        ]:
            raise ValueError("; ".join(wrong))


GREEDY = Sampling()


class Sampler:
    """What one row's sampling remembers: its settings, its generator and the ids it has seen."""

    def __init__(self, sampling: Sampling = GREEDY, prompt_ids: Iterable[int] = ()):
        """prompt_ids: what the repetition penalty falls on from the start."""
        self.sampling, self.prompt_ids = sampling, list(prompt_ids)
        # Of its own and on the CPU: neither neighbours nor the device change what a row samples.
        self.generator = random.Random(sampling.seed)
        self.penalty_V: Tensor | None = None  # on the logits' device; 1 for ids that weren't seen

    def settings(self, size: int) -> tuple[float, ...]:
        """Of the next token, one of `size`: temperature, how many to sort, top_p, min_p, and a
        number in [0, 1) that float32 holds exactly."""
        how = self.sampling
        if how.temperature == 0:
            return 1e-5, 1, 1, 0, 0
        top_k = how.top_k or (size if how.top_p < 1 else 0)
        uniform = self.generator.getrandbits(24) / 2**24
        return max(how.temperature, 1e-5), min(top_k, size), how.top_p, how.min_p, uniform


def sample_tokens(logits_BV: Tensor, samplers: list[Sampler]) -> list[int]:
    """One token for each row, found where the logits are: their device is waited for once."""
    how = [sampler.sampling for sampler in samplers]
    if all(each.temperature == 0 and each.repetition_penalty == 1 for each in how):
        return logits_BV.argmax(-1).tolist()
    if any(each.repetition_penalty != 1 for each in how):
        for sampler, logits_V in zip(samplers, logits_BV, strict=True):
            if sampler.penalty_V is None:
                seen = _to_device(sampler.prompt_ids, logits_V.device).long()
                penalty = sampler.sampling.repetition_penalty
                sampler.penalty_V = torch.ones_like(logits_V).index_fill_(0, seen, penalty)
        penalty_BV = torch.stack([sampler.penalty_V for sampler in samplers])
        logits_BV = torch.where(logits_BV > 0, logits_BV / penalty_BV, logits_BV * penalty_BV)

    settings = [sampler.settings(logits_BV.shape[1]) for sampler in samplers]
    columns = _to_device(settings, logits_BV.device).split(1, dim=1)
    temperature_B1, top_k_B1, top_p_B1, min_p_B1, uniform_B1 = columns
    probabilities_BV = (logits_BV / temperature_B1).softmax(-1)
    least_B1 = min_p_B1 * probabilities_BV.amax(-1, keepdim=True)  # that may be sampled
    if width := max(top_k for _, top_k, *_ in settings):
        most_BK = probabilities_BV.topk(width).values
        most_BK = most_BK * (torch.arange(width, device=most_BK.device) < top_k_B1)
        before_BK = most_BK.cumsum(-1) - most_BK
        # The token that crosses top_p is still in, so that one is always left.
        kept_BK = (before_BK < top_p_B1 * most_BK.sum(-1, keepdim=True)) & (most_BK > 0)
        least_of_kept_B1 = most_BK.where(kept_BK, 1).amin(-1, keepdim=True)
        least_B1 = least_B1.maximum(least_of_kept_B1 * (top_k_B1 > 0))
    # The inverse of the distribution function: the first token that takes the sum above the number.
    kept_BV = probabilities_BV >= least_B1
    sums_BV = (probabilities_BV * kept_BV).cumsum(-1)
    is_above_BV = (sums_BV > uniform_B1 * sums_BV[:, -1:]) & kept_BV
    tokens = is_above_BV.byte().argmax(-1).tolist()
    for sampler, token in zip(samplers, tokens, strict=True):
        if sampler.sampling.repetition_penalty != 1:
            sampler.penalty_V[token].fill_(sampler.sampling.repetition_penalty)
    return tokens


def _to_device(numbers: list, device: torch.device) -> Tensor:
    """Without waiting for what a CUDA device still does."""
    is_cuda = device.type == "cuda"
    return torch.tensor(numbers, pin_memory=is_cuda).to(device, non_blocking=is_cuda)


class DecodingBatch:
    """The cache of rows that are decoded together; rows may come and go between steps.

    All rows end in the same column: shorter ones have padding on their left, where `mask` (B, T) is
    False. To be used by one thread at a time.
    """

    may_capture = True  # until CUDA refuses once in this process

    def __init__(self, model: Cinego | MiniMind, static: bool | None = None):
        """static: steps by `StaticStep`; None: on CUDA, where experts don't ask the device."""
        assert not model.training, "dropout would fall on answers: call model.eval()"
        self.model, self.config = model, getattr(model, "language_model", model).config
        self.num_rows, self.cache, self.mask = 0, KVCache(), None
        can_capture = self._device().type == "cuda" and not self.config.num_experts
        self.is_static = can_capture if static is None else static
        self.static_step, self.eager_steps = None, 0

    def prefill(self, inputs: dict, cache: KVCache | None = None) -> Tensor:
        """Reads the prompts of new rows, which join below; returns (B, V), their next logits.

        inputs: what `model.forward` takes, `input_ids` (B, L) left padded with `attention_mask`
        (B, T) that is False on padding (it may be left out where nothing is padded). cache: the
        T - L columns that were read of these rows before; it is taken over. Raises ValueError for
        padding on the right, and what `model.forward` raises; the batch is then as before.
        """
        cache = KVCache() if cache is None else cache
        inputs, num_new = dict(inputs), len(inputs["input_ids"])
        mask = inputs.pop("attention_mask", None)
        if mask is not None:
            mask = mask.bool()
            if not mask[:, -1].all():
                raise ValueError("prompts must be padded on the left: a last token is padding")
            if mask.all():  # nothing is padded: plain causal attention is faster
                mask = None
        logits_BV = self._forward(inputs, cache, mask)
        if self.num_rows:
            mask = self._joined_mask(mask, num_new, len(cache))
            cache = self.cache.join(cache)
        self.num_rows, self.cache, self.mask = self.num_rows + num_new, cache, mask
        return logits_BV

    def decode(self, token_ids: list[int]) -> Tensor:
        """Reads one more token of each row; returns (B, V), the next logits."""
        tokens_B1 = _to_device(token_ids, self._device())[:, None]
        if self.mask is not None:
            self.mask = F.pad(self.mask, (0, 1), value=True)
        if step := self._loaded_step():
            return step(tokens_B1)
        return self._forward({"input_ids": tokens_B1}, self.cache, self.mask)

    def keep_rows(self, rows: list[int]) -> None:
        """The other rows leave the batch: they cost nothing more."""
        if len(rows) == self.num_rows:
            return
        self.num_rows = len(rows)
        if not rows:
            self.cache, self.mask = KVCache(), None
            return
        self.cache = self.cache.keep_rows(torch.tensor(rows, device=self._device()))
        if self.mask is not None:
            self.mask = self.mask[rows]
            # Columns that only longer rows needed go, too: a server's batch never ends.
            used = self.mask.any(0)
            if not used.all():
                self.cache, self.mask = self.cache.select(used), self.mask[:, used]
            if self.mask.all():
                self.mask = None

    def cache_of(self, row: int) -> KVCache:
        """What was read of one row, without padding, for a batch that continues it later."""
        cache = self.cache.keep_rows(torch.tensor([row], device=self._device()))
        return cache if self.mask is None else cache.select(self.mask[row])

    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _loaded_step(self) -> StaticStep | None:
        """The static step with these rows in it; None while they decode one kernel at a time."""
        step, length = self.static_step, len(self.cache)
        if not (self.is_static and DecodingBatch.may_capture):
            return None
        fits = step is not None and step.rows // 16 < self.num_rows <= step.rows
        if not fits or length >= step.capacity:
            self.eager_steps += 1
            if self.eager_steps <= EAGER_STEPS or length >= self.config.max_position_embeddings:
                return None
            rows = 1 << (self.num_rows - 1).bit_length()
            capacity = -(-(length + CAPACITY_STEP // 2) // CAPACITY_STEP) * CAPACITY_STEP
            capacity = min(capacity, self.config.max_position_embeddings)
            step = self.static_step = None  # its memory goes first
            try:
                step = StaticStep(self.model, self.cache, rows, capacity)
            except RuntimeError as problem:
                DecodingBatch.may_capture = False
                why = problem.__context__ or problem  # the end of a failed capture fails, too
                warnings.warn(f"decoding goes on without CUDA graphs: {why}", stacklevel=2)
                return None
            self.static_step, self.eager_steps = step, 0
        if step.cache is not self.cache:
            self.cache = step.load(self.cache, self.mask)
        return step

    def _forward(self, inputs: dict, cache: KVCache, mask: Tensor | None) -> Tensor:
        # Entered at each step: the caller's own code between two steps must not run inside of it.
        with torch.inference_mode():
            output = self.model(
                **inputs, attention_mask=mask, past_key_values=cache, logits_to_keep=1
            )
            return output.logits[:, -1].float()

    def _joined_mask(self, mask: Tensor | None, num_new: int, length: int) -> Tensor | None:
        """The mask of the rows here and of new ones below; None where nothing is padded."""
        if self.mask is None and mask is None and len(self.cache) == length:
            return None
        new = {"dtype": torch.bool, "device": self._device()}
        above = (
            torch.ones(self.num_rows, len(self.cache), **new) if self.mask is None else self.mask
        )
        below = torch.ones(num_new, length, **new) if mask is None else mask
        width = max(len(self.cache), length)
        return torch.cat([F.pad(part, (width - part.shape[1], 0)) for part in (above, below)])


def generate(
    model: Cinego | MiniMind, inputs: dict, max_new_tokens: int, eos_token_id: int, **sampling
) -> list[list[int]]:
    """The new ids of each row of `inputs` (see `DecodingBatch.prefill`), without the end token.

    sampling: as in `Sampling`, the same for all rows. Raises ValueError for settings that make no
    sense and for prompts padded on the right.
    """
    how = Sampling(max_new_tokens, **sampling)
    samplers = [Sampler(how, ids) for ids in inputs["input_ids"].tolist()]
    answers: list[list[int]] = [[] for _ in samplers]
    rows = list(range(len(samplers)))  # those that still decode
    batch = DecodingBatch(model)
    logits_BV = batch.prefill(inputs)
    while True:
        tokens = sample_tokens(logits_BV, [samplers[row] for row in rows])
        unfinished = []
        for place, (row, token) in enumerate(zip(rows, tokens, strict=True)):
            if token != eos_token_id:
                answers[row].append(token)
                if len(answers[row]) < max_new_tokens:
                    unfinished.append(place)
        if not unfinished:
            return answers
        batch.keep_rows(unfinished)
        rows = [rows[place] for place in unfinished]
        logits_BV = batch.decode([answers[row][-1] for row in rows])
