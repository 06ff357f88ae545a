"""Answers in the making: questions to rows of one batch, its tokens to text."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING

import torch
from PIL import Image
from tokenizers.decoders import DecodeStream
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dataset.conversation import ConversationError, Encoded
from model.generate import GREEDY, Generation, Row, Sampling
from model.minimind import KVCache

if TYPE_CHECKING:
    from inference.chat_model import Answerer


@dataclass(eq=False)
class Visual:
    """A video or an image as the model sees it. Its identity is the object's, not the file's."""

    name: str
    features: Tensor  # (F, P, D) fp16, as the feature store keeps them for training
    timestamps: list[float]  # of the F frames, in seconds
    frames: list[Image.Image] = field(default_factory=list)  # small pictures of them, if asked for

    @property
    def tag(self) -> str:
        return "<video>" if len(self.features) > 1 else "<image>"


@dataclass
class Memory:
    """What a chat has read: the cache, and what stands in its columns: an id for a word, the visual
    and the place in it for a placeholder."""

    cache: KVCache = field(default_factory=KVCache)
    columns: list = field(default_factory=list)


@dataclass
class Question:
    """A conversation whose last turn waits for its answer."""

    messages: list[dict]  # role and content; one <video> or <image> for each visual, in order
    visuals: list[Visual] = field(default_factory=list)
    sampling: Sampling = GREEDY
    stop: tuple[str, ...] = ()  # the answer ends before the first of these texts
    memory: Memory | None = None  # where given: only what it doesn't hold is read, then it is added


class Answer:
    """One answer in the making, and afterwards; made by `Batch.add`."""

    def __init__(self, question: Question, prompt: Encoded, columns: list, started: float):
        self.question, self.prompt, self.columns = question, prompt, columns
        self.started = started
        self.cached_tokens = 0  # of the prompt: read in an earlier turn
        self.text = ""  # handed out so far
        self.finish_reason: str | None = None  # "stop", "length" or "cancelled"
        self.time_to_first_token = self.seconds = 0.0  # since it was asked
        words = [column for column in columns if isinstance(column, int)]
        self.row = Row(question.sampling, words, keep_cache=question.memory is not None)
        self._decoder, self._held, self._taken = DecodeStream(skip_special_tokens=True), "", 0

    @property
    def prompt_tokens(self) -> int:
        """Visual tokens count."""
        return len(self.columns)

    @property
    def completion_tokens(self) -> int:
        return len(self.row.ids)

    @property
    def tokens_per_second(self) -> float:
        """After the first token; 0 where there is no second one."""
        seconds = self.seconds - self.time_to_first_token
        return (self.completion_tokens - 1) / seconds if seconds > 0 else 0.0

    def take(self) -> str:
        """The text that came since the last call; "" while a character or a stop isn't whole."""
        new = self.text[self._taken :]
        self._taken = len(self.text)
        return new

    def _receive(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """After a step: the row's newest id, if any, becomes text; then its end is looked at."""
        self.seconds = time.perf_counter() - self.started
        if self.finish_reason is not None:
            return
        if self.row.finish_reason in (None, "length"):
            if len(self.row.ids) == 1:
                self.time_to_first_token = self.seconds
            self._held += self._decoder.step(tokenizer.backend_tokenizer, self.row.ids[-1]) or ""
            stops = [at for stop in self.question.stop if (at := self._held.find(stop)) >= 0]
            if stops:
                self._held = self._held[: min(stops)]
                self._finish("stop")
                return
        if self.row.finish_reason is not None:
            self._finish(self.row.finish_reason)
            return
        # What may become a stop is kept back.
        keep = max((_overlap(self._held, stop) for stop in self.question.stop), default=0)
        cut = len(self._held) - keep
        self.text, self._held = self.text + self._held[:cut], self._held[cut:]

    def _finish(self, reason: str) -> None:
        self.text, self._held, self.finish_reason = self.text + self._held, "", reason


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` may be the beginning of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


class Batch:
    """Answers that are made together, each as if it were made alone. `len()`: how many are left."""

    def __init__(self, answerer: "Answerer"):
        self.answerer = answerer
        self.generation = Generation(answerer.model, answerer.tokenizer.eos_token_id)
        self.answers: dict[Row, Answer] = {}

    def __len__(self) -> int:
        return len(self.answers)

    def add(self, questions: list[Question]) -> list[Answer]:
        """Reads the prompts and makes the first token of each answer. Raises ConversationError, and
        then none of them was added."""
        started = time.perf_counter()
        num_tokens = self.answerer.model.config.tokens_per_visual
        prompts = [self._encode(question) for question in questions]
        added = [
            Answer(question, prompt, _columns(prompt, question.visuals, num_tokens), started)
            for question, prompt in zip(questions, prompts, strict=True)
        ]
        if fresh := [answer for answer in added if answer.question.memory is None]:
            self._read(fresh)
        for answer in added:
            if answer.question.memory is not None:
                self._go_on(answer)
        self.answers |= {answer.row: answer for answer in added}
        self._settle(added)
        return added

    def step(self) -> list[Answer]:
        """One more token, or the end, for each answer; returns those that were in the making."""
        moved = [self.answers[row] for row in self.generation.step()]
        self._settle(moved)
        return moved

    def cancel(self, answer: Answer) -> None:
        """Ends an answer where it is; nothing happens if it has ended already."""
        self.generation.remove(answer.row)
        self._settle([answer])

    def _settle(self, moved: list[Answer]) -> None:
        for answer in moved:
            answer._receive(self.answerer.tokenizer)
            if answer.finish_reason is not None:
                self.generation.remove(answer.row, answer.finish_reason)  # a stop text came
                self.answers.pop(answer.row, None)
                memory, row = answer.question.memory, answer.row
                if memory is not None and row.cache is not None:
                    memory.cache, row.cache = row.cache, None
                    memory.columns = [*memory.columns, *row.ids][: len(memory.cache)]

    def _encode(self, question: Question) -> Encoded:
        prompt = self.answerer.encode(question.messages, question.visuals)
        longest = self.answerer.model.config.language_model.max_position_embeddings
        tokens = len(prompt.input_ids) + question.sampling.max_new_tokens
        if tokens > longest:  # found half-way, it would end the others' answers too
            raise ConversationError(
                f"prompt and answer take up to {tokens} tokens, the model has positions for "
                f"{longest}: shorten the conversation, or lower max_new_tokens"
            )
        return prompt

    def _read(self, answers: list[Answer]) -> None:
        """Reads prompts of unlike lengths in one batch; what several begin with, up to the end of
        the last visual, once."""
        cuts = [len(answer.prompt.input_ids) for answer in answers]
        heads: dict[tuple, int] = {}  # a beginning → its row
        for i, answer in enumerate(answers):
            mask = answer.prompt.visual_mask
            cuts[i] = len(mask) - mask[::-1].index(True) if True in mask else 0
            heads.setdefault(tuple(answer.columns[: cuts[i]]), len(heads))
        rows = [answer.row for answer in answers]
        visuals = [answer.question.visuals for answer in answers]
        if len(heads) == len(answers) or not any(cuts):  # nothing shared, or only words
            inputs = self.answerer.inputs([answer.prompt for answer in answers], chain(*visuals))
            self.generation.add(inputs, rows)
            return
        which = [heads[tuple(a.columns[:cut])] for a, cut in zip(answers, cuts, strict=True)]
        firsts = [which.index(head) for head in range(len(heads))]
        inputs = self.answerer.inputs(
            [_part(answers[i].prompt, slice(cuts[i])) for i in firsts],
            chain(*(visuals[i] for i in firsts)),
        )
        cache, mask = KVCache(), inputs["attention_mask"]
        with torch.inference_mode():
            self.answerer.model(**inputs, past_key_values=cache, logits_to_keep=1)
        cache.keep_rows(torch.tensor(which, device=mask.device))
        tails = [
            _part(answer.prompt, slice(cut, None))
            for answer, cut in zip(answers, cuts, strict=True)
        ]
        inputs = self.answerer.inputs(tails, [])
        inputs["attention_mask"] = torch.cat([mask[which], inputs["attention_mask"]], dim=1)
        self.generation.add(inputs, rows, cache)

    def _go_on(self, answer: Answer) -> None:
        """Reads what the question's memory doesn't hold yet."""
        memory, columns = answer.question.memory, answer.columns
        # Not strict: the prompt goes on where the memory ends, or was cut shorter than it.
        both = zip(memory.columns, columns, strict=False)
        known = next((i for i, (a, b) in enumerate(both) if a != b), len(memory.columns))
        # The last token is always read: the first one of the answer follows from it.
        known = min(known, len(columns) - 1)
        if isinstance(columns[known], tuple):  # a visual's tokens come in one piece
            known -= columns[known][1]
        ahead = (column for column in columns[known:] if isinstance(column, tuple))
        unseen = [visual for visual, place in ahead if place == 0]
        inputs = self.answerer.inputs([_part(answer.prompt, slice(known, None))], unseen)
        del inputs["attention_mask"]
        cache = memory.cache
        cache.crop(known)
        memory.cache, memory.columns = KVCache(), columns
        answer.cached_tokens = known
        self.generation.add(inputs, [answer.row], cache)


def _columns(prompt: Encoded, visuals: list[Visual], num_tokens: Callable[[int], int]) -> list:
    """What stands in a prompt's columns, see Memory."""
    places = iter([(v, i) for v in visuals for i in range(num_tokens(len(v.features)))])
    pairs = zip(prompt.input_ids, prompt.visual_mask, strict=True)
    return [next(places) if is_visual else token for token, is_visual in pairs]


def _part(prompt: Encoded, where: slice) -> Encoded:
    return Encoded(prompt.input_ids[where], prompt.labels[where], prompt.visual_mask[where])
