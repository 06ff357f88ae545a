"""What is asked of a model (`Visual`, `Request`) and what comes of it (`Sequence`)."""

import time
from dataclasses import dataclass, field

from tokenizers.decoders import DecodeStream
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dataset.conversation import Encoded
from model.generate import GREEDY, Sampler, Sampling
from model.kv_cache import KVCache


@dataclass(eq=False)
class Visual:
    """A video or an image as the model gets it. Its identity is the object's, not the file's."""

    name: str
    features: Tensor  # (F, P, D) fp16, as the feature store keeps them for training
    timestamps: list[float]  # of the F frames, in seconds
    damaged: list[float] = field(default_factory=list)  # seconds near which the file is broken
    unlike_training: str | None = None  # a sentence, where frames look like nothing learned

    @property
    def tag(self) -> str:
        return "<video>" if len(self.features) > 1 else "<image>"

    @property
    def damaged_near(self) -> str:
        """Some of the seconds, to read; "" where nothing is damaged."""
        return ", ".join(list(dict.fromkeys(f"{seconds:.1f}" for seconds in self.damaged))[:8])

    @property
    def warnings(self) -> list[str]:
        """What the user should know of it, a sentence each."""
        times = self.damaged_near
        found = f"{self.name} is damaged near {times} s; frames there are as a player shows them"
        return [found] * bool(times) + ([self.unlike_training] if self.unlike_training else [])


@dataclass
class PrefixCache:
    """What a conversation has read: keys and values, and what stands in their columns, an id for a
    word, (visual, place in it) for a placeholder. A request that brings one along reads only what
    it doesn't hold, and leaves its own tokens in it."""

    cache: KVCache = field(default_factory=KVCache)
    columns: list = field(default_factory=list)


@dataclass(eq=False)
class Request:
    """A conversation whose last turn waits for its answer; made by `ChatModel.make_request`."""

    messages: list[dict]  # role and content; one <video> or <image> for each visual, in order
    visuals: list[Visual]
    prompt: Encoded  # the messages' tokens: this is the one time that they are tokenised
    columns: list  # what stands in the prompt's columns, see PrefixCache
    sampling: Sampling = GREEDY
    stop: tuple[str, ...] = ()  # the answer ends before the first of these texts
    prefix_cache: PrefixCache | None = None


class Sequence:
    """One request's way through the model: its tokens, its text, how it ended and when."""

    def __init__(self, request: Request):
        self.request = request
        words = (column for column in request.columns if isinstance(column, int))
        self.sampler = Sampler(request.sampling, words)
        self.token_ids: list[int] = []  # of the answer, without the end token
        self.text = ""  # of the answer, as far as no stop text can begin in it
        self.finish_reason: str | None = None  # "stop", "length", "cancelled" or "error"
        self.prompt_tokens = len(request.columns)  # visual tokens count
        self.cached_tokens = 0  # of the prompt, read in an earlier turn
        self.started = time.perf_counter()
        self.time_to_first_token = self.seconds = 0.0  # since then
        self._decoder, self._held, self._taken = DecodeStream(skip_special_tokens=True), "", 0

    @property
    def completion_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def tokens_per_second(self) -> float:
        """After the first token; 0 where there is no second one."""
        seconds = self.seconds - self.time_to_first_token
        return (self.completion_tokens - 1) / seconds if seconds > 0 else 0.0

    def take_text(self) -> str:
        """The text since the last call; "" while a character or a stop text isn't whole."""
        new = self.text[self._taken :]
        self._taken = len(self.text)
        return new

    def append(self, token_id: int, tokenizer: PreTrainedTokenizerBase) -> None:
        """Takes the newest token: its text, and whether the answer ends with it."""
        self.seconds = time.perf_counter() - self.started
        if not self.token_ids:
            self.time_to_first_token = self.seconds
        if token_id == tokenizer.eos_token_id:
            return self.finish("stop")
        self.token_ids.append(token_id)
        self._held += self._decoder.step(tokenizer.backend_tokenizer, token_id) or ""
        stops = self.request.stop
        if found := [at for stop in stops if (at := self._held.find(stop)) >= 0]:
            self._held = self._held[: min(found)]
            return self.finish("stop")
        if len(self.token_ids) == self.request.sampling.max_new_tokens:
            return self.finish("length")
        # What may become a stop text is held back.
        keep = max((_overlap(self._held, stop) for stop in stops), default=0)
        end = len(self._held) - keep
        self.text, self._held = self.text + self._held[:end], self._held[end:]

    def finish(self, reason: str) -> None:
        """Nothing happens if it has ended already."""
        if self.finish_reason is None:
            self.text, self._held, self.finish_reason = self.text + self._held, "", reason


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` may be the start of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
