"""A conversation of many turns, about as many videos and images as one likes."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from dataset.conversation import VISUAL_TAG, Encoded
from inference.chat_model import ChatModel
from inference.request import PrefixCache, Sequence, Visual
from model.generate import GREEDY, Sampling

# Longer rows than training had are answered badly, and cost more at each turn.
CONTEXT_TOKENS = 1024


@dataclass
class Turn:
    """A question and its answer, as far as it is made."""

    question: str  # as it was typed
    content: str  # as the model gets it: with a tag for each visual
    visuals: list[str]  # names of those that came with it
    sequence: Sequence

    @property
    def answer(self) -> str:
        return self.sequence.text.strip() or "-"  # templates want some text in every turn


class Chat:
    def __init__(
        self,
        chat_model: ChatModel,
        stream: Callable[[Sequence], Iterator[str]] | None = None,
        context_tokens: int = CONTEXT_TOKENS,
    ):
        """stream: who answers, `Scheduler.stream` for one of many users; None: an engine of its
        own, in the thread that asks. context_tokens: of the turns that the model still gets."""
        self.chat_model, self.context_tokens = chat_model, context_tokens
        self.stream = stream or chat_model.engine().stream
        self.turns: list[Turn] = []
        self.attached: list[Visual] = []  # they wait for the next question
        # What the model still gets: the newest turns that fit, and the visuals of their tags.
        self._turns: list[dict] = []
        self._visuals: list[Visual] = []
        self._prefix_cache = PrefixCache()

    @property
    def last(self) -> Sequence:
        """The newest answer, with its times."""
        return self.turns[-1].sequence

    @property
    def transcript(self) -> list[dict]:
        """All turns, also those that the model no longer gets, with the names of the visuals."""
        found = []
        for turn in self.turns:
            names = {"visuals": turn.visuals} if turn.visuals else {}
            found.append({"role": "user", "content": turn.content, **names})
            found.append({"role": "assistant", "content": turn.answer})
        return found

    def attach(self, visual: Visual) -> None:
        """Puts a visual before the next question, after those that wait for it already."""
        self.attached.append(visual)

    def ask(
        self, question: str, sampling: Sampling = GREEDY, stop: tuple[str, ...] = ()
    ) -> Iterator[str]:
        """The answer in pieces of whole characters. Closing the iterator ends the answer there; the
        next question continues the chat. Raises ConversationError before the first piece for a
        question that can't be asked; the chat is then as before."""
        content = question
        if not VISUAL_TAG.search(question):  # else the question says where the visuals stand
            content = "".join(f"{visual.tag}\n" for visual in self.attached) + question
        turns, visuals, prompt = self._fit(
            [*self._turns, {"role": "user", "content": content}],
            [*self._visuals, *self.attached],
        )
        sequence = Sequence(
            self.chat_model.make_request(turns, visuals, sampling, stop, self._prefix_cache, prompt)
        )
        if self.turns:  # a long chat keeps what was said, not what was read for it
            self.last.request = self.last.sampler = None
        turn = Turn(question, content, [visual.name for visual in self.attached], sequence)
        self.attached = []
        self.turns.append(turn)
        try:
            yield from self.stream(sequence)
        finally:
            self._turns = [*turns, {"role": "assistant", "content": turn.answer}]
            self._visuals = visuals

    def format_transcript(self, suffix: str) -> str:
        """For a file of that suffix: .json for programs, .md as Markdown, else plain lines."""
        if suffix == ".json":
            return json.dumps(self.transcript, indent=1, ensure_ascii=False) + "\n"
        marks, between = ("**{}:** ", "\n\n") if suffix == ".md" else ("{}: ", "\n")
        lines = []
        for turn in self.turns:
            lines += [f"[{name}]" for name in turn.visuals]
            lines += [marks.format("Q") + turn.content, marks.format("A") + turn.answer]
        return between.join(lines) + "\n"

    def _fit(
        self, turns: list[dict], visuals: list[Visual]
    ) -> tuple[list[dict], list[Visual], Encoded]:
        """Leaves out the oldest turns once the context is full; their visuals go before the first
        question that stays. Visuals go last, the oldest first, and never the only one. Also returns
        the tokens of what stays."""
        tokenize = self.chat_model.tokenize
        prompt = tokenize(turns, visuals)
        if len(prompt.input_ids) <= self.context_tokens:
            return turns, visuals, prompt
        # A quarter more than needed: what follows a cut is read again, so not in every turn.
        capacity = self.context_tokens * 3 // 4
        while len(turns) > 1 and len(prompt.input_ids) > capacity:
            tags = "".join(f"{tag}\n" for tag in VISUAL_TAG.findall(turns[0]["content"]))
            first = {"role": "user", "content": tags + turns[2]["content"]}
            turns = [first, *turns[3:]]
            prompt = tokenize(turns, visuals)
        while len(visuals) > 1 and len(prompt.input_ids) > capacity:
            first = {"role": "user", "content": VISUAL_TAG.sub("", turns[0]["content"], 1).lstrip()}
            turns, visuals = [first, *turns[1:]], visuals[1:]
            prompt = tokenize(turns, visuals)
        return turns, visuals, prompt
