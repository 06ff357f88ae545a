"""Continuous batching: sequences join, take one token a step together, and leave, at any step.

    engine = Engine(model, tokenizer)
    engine.add([Sequence(request), …])                # prompts are read, first tokens sampled
    while engine.sequences:
        for sequence in engine.step():
            print(sequence.take_text(), sequence.finish_reason)

In float32 each sequence is answered as if it were alone.
"""

from collections.abc import Iterable, Iterator
from itertools import chain

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dataset.conversation import Encoded, left_pad
from inference.request import Sequence, Visual
from model.cinego import Cinego
from model.generate import DecodingBatch, sample_tokens
from model.kv_cache import KVCache


class Engine:
    """To be used by one thread at a time; `Scheduler` gives it one of its own."""

    def __init__(self, model: Cinego, tokenizer: PreTrainedTokenizerBase):
        self.model, self.tokenizer = model, tokenizer
        self.reset()

    def reset(self) -> None:
        """Forgets all sequences, for instance after an error in the midst of a step."""
        self.batch = DecodingBatch(self.model)
        self.sequences: list[Sequence] = []  # in the order of the batch's rows

    def add(self, sequences: list[Sequence]) -> None:
        """Reads their prompts and samples the first token of each."""
        if fresh := [each for each in sequences if each.request.prefix_cache is None]:
            self._append_tokens(fresh, self.prefill(fresh))
        for sequence in sequences:
            if sequence.request.prefix_cache is not None:
                self._append_tokens([sequence], self._prefill_rest(sequence))

    def step(self) -> list[Sequence]:
        """One more token, or the end, for each sequence; returns those that took part."""
        sequences = self.sequences
        logits_BV = self.batch.decode([each.token_ids[-1] for each in sequences])
        self._append_tokens([], logits_BV)
        return sequences

    def cancel(self, sequence: Sequence) -> None:
        """Ends a sequence where it is; nothing happens if it has ended already."""
        sequence.finish("cancelled")
        self._remove_finished()

    def stream(self, sequence: Sequence) -> Iterator[str]:
        """Answers one sequence here and now; its text in pieces of whole characters. Closing the
        iterator ends the answer there."""
        try:
            self.add([sequence])
            while sequence.finish_reason is None:
                if text := sequence.take_text():
                    yield text
                self.step()
            if text := sequence.take_text():
                yield text
        except (Exception, KeyboardInterrupt):
            self.reset()
            raise
        finally:
            self.cancel(sequence)

    def _append_tokens(self, new: list[Sequence], logits_BV: Tensor) -> None:
        """logits_BV: of the new sequences, which join here, or else of all."""
        self.sequences = [*self.sequences, *new]
        sequences = new or self.sequences
        tokens = sample_tokens(logits_BV, [each.sampler for each in sequences])
        for sequence, token in zip(sequences, tokens, strict=True):
            sequence.append(token, self.tokenizer)
        self._remove_finished()

    def _remove_finished(self) -> None:
        keep = []
        for row, sequence in enumerate(self.sequences):
            prefix = sequence.request.prefix_cache
            if sequence.finish_reason is None:
                keep.append(row)
            elif prefix is not None:
                prefix.cache = self.batch.cache_of(row)
                columns = [*sequence.request.columns, *sequence.token_ids]
                prefix.columns = columns[: len(prefix.cache)]  # the last id was never read
        self.batch.keep_rows(keep)
        self.sequences = [self.sequences[row] for row in keep]

    def prefill(self, sequences: list[Sequence]) -> Tensor:
        """Reads prompts of any lengths in one batch; what several start with, up to the end of the
        last visual, once. Returns (B, V)."""
        prompts = [each.request.prompt for each in sequences]
        visuals = [each.request.visuals for each in sequences]
        cuts, heads = [], {}  # where a prompt's last visual ends; what stands before that → its row
        for sequence in sequences:
            mask = sequence.request.prompt.visual_mask
            cuts.append(len(mask) - mask[::-1].index(True) if True in mask else 0)
            heads.setdefault(tuple(sequence.request.columns[: cuts[-1]]), len(heads))
        if len(heads) == len(sequences) or not any(cuts):  # nothing shared, or only words
            return self.batch.prefill(self._inputs(prompts, chain(*visuals)))
        head_of = [
            heads[tuple(each.request.columns[:cut])]
            for each, cut in zip(sequences, cuts, strict=True)
        ]
        firsts = [head_of.index(head) for head in range(len(heads))]
        inputs = self._inputs(
            [_slice(prompts[row], slice(cuts[row])) for row in firsts],
            chain(*(visuals[row] for row in firsts)),
        )
        cache, mask = KVCache(), inputs["attention_mask"]
        with torch.inference_mode():
            self.model(**inputs, past_key_values=cache, logits_to_keep=1)
        cache = cache.keep_rows(torch.tensor(head_of, device=mask.device))
        tails = [
            _slice(prompt, slice(cut, None)) for prompt, cut in zip(prompts, cuts, strict=True)
        ]
        inputs = self._inputs(tails, [])
        inputs["attention_mask"] = torch.cat([mask[head_of], inputs["attention_mask"]], dim=1)
        return self.batch.prefill(inputs, cache)

    def _prefill_rest(self, sequence: Sequence) -> Tensor:
        """Reads what the request's prefix cache doesn't hold. Returns (1, V)."""
        prefix, columns = sequence.request.prefix_cache, sequence.request.columns
        cache, known_columns = prefix.cache, prefix.columns
        prefix.cache, prefix.columns = KVCache(), []  # an interrupt leaves nothing half read
        # Not strict: the prompt continues where the cache ends, or was cut shorter than it.
        pairs = zip(known_columns, columns, strict=False)
        known = next((i for i, (a, b) in enumerate(pairs) if a != b), len(known_columns))
        # The last token is always read: the first one of the answer follows from it.
        known = min(known, len(columns) - 1)
        if isinstance(columns[known], tuple):  # a visual's tokens come in one piece
            known -= columns[known][1]
        ahead = (column for column in columns[known:] if isinstance(column, tuple))
        unread = [visual for visual, place in ahead if place == 0]
        inputs = self._inputs([_slice(sequence.request.prompt, slice(known, None))], unread)
        del inputs["attention_mask"]
        cache.crop(known)
        sequence.cached_tokens = known
        return self.batch.prefill(inputs, cache)

    def _inputs(self, prompts: list[Encoded], visuals: Iterable[Visual]) -> dict:
        """A batch for the model, left padded, with the visuals of all rows in order."""
        device = next(self.model.parameters()).device
        inputs = {name: tensor.to(device) for name, tensor in left_pad(prompts).items()}
        if frames := [visual.features for visual in visuals]:
            inputs["visual_features"] = torch.cat(frames).to(device).float()
            inputs["frames_per_visual"] = [len(features) for features in frames]
        return inputs


def _slice(prompt: Encoded, where: slice) -> Encoded:
    return Encoded(prompt.input_ids[where], prompt.labels[where], prompt.visual_mask[where])
