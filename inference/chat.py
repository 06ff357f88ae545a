"""A conversation of many turns, about as many videos and images as one likes."""

import json
from collections.abc import Callable, Iterator

from dataset.conversation import VISUAL_TAG, Encoded
from inference.chat_model import ChatModel
from inference.request import PrefixCache, Sequence, Visual
from model.generate import GREEDY, Sampling

# Longer rows than training had are answered badly, and cost more at each turn.
CONTEXT_TOKENS = 1024


class Chat:
    def __init__(
        self,
        chat_model: ChatModel,
        stream: Callable[[Sequence], Iterator[str]] | None = None,
        system: str | None = None,
        context_tokens: int = CONTEXT_TOKENS,
    ):
        """stream: who answers, `Scheduler.stream` for one of many users; None: an engine of its
        own, in the thread that asks. context_tokens: of the turns that the model still gets."""
        self.chat_model, self.context_tokens = chat_model, context_tokens
        self.stream = stream or chat_model.engine().stream
        # All turns; a question's "visuals" are the names of those that came with it.
        self.transcript: list[dict] = []
        self.last: Sequence | None = None  # the newest answer, with its times
        self._system = [{"role": "system", "content": system}] if system else []
        # What the model still gets: the newest turns that fit, and the visuals of their tags.
        self._turns: list[dict] = []
        self._visuals: list[Visual] = []
        self._attached: list[Visual] = []
        self._prefix_cache = PrefixCache()

    def attach(self, visual: Visual) -> None:
        """Puts a visual before the next question, after those that wait for it already."""
        self._attached.append(visual)

    def ask(
        self, question: str, sampling: Sampling = GREEDY, stop: tuple[str, ...] = ()
    ) -> Iterator[str]:
        """The answer in pieces of whole characters. Closing the iterator ends the answer there; the
        next question continues the chat. Raises ConversationError before the first piece for a
        question that can't be asked; the chat is then as before."""
        content = question
        if not VISUAL_TAG.search(question):  # else the question says where the visuals stand
            content = "".join(f"{visual.tag}\n" for visual in self._attached) + question
        turns, visuals, prompt = self._fit(
            [*self._turns, {"role": "user", "content": content}],
            [*self._visuals, *self._attached],
        )
        messages = [*self._system, *turns]
        sequence = Sequence(
            self.chat_model.make_request(
                messages, visuals, sampling, stop, self._prefix_cache, prompt
            )
        )
        self.last, attached, self._attached = sequence, self._attached, []
        try:
            yield from self.stream(sequence)
        finally:
            # Templates want some text in every turn.
            answer = {"role": "assistant", "content": sequence.text.strip() or "-"}
            self._turns, self._visuals = [*turns, answer], visuals
            asked = {"role": "user", "content": content}
            if attached:
                asked["visuals"] = [visual.name for visual in attached]
            self.transcript += [asked, answer]

    def format_transcript(self, suffix: str) -> str:
        """For a file of that suffix: .json for programs, .md as Markdown, else plain lines."""
        if suffix == ".json":
            return json.dumps(self.transcript, indent=1, ensure_ascii=False) + "\n"
        marks, between = ("**{}:** ", "\n\n") if suffix == ".md" else ("{}: ", "\n")
        lines = []
        for turn in self.transcript:
            lines += [f"[{name}]" for name in turn.get("visuals", ())]
            lines.append(marks.format("Q" if turn["role"] == "user" else "A") + turn["content"])
        return between.join(lines) + "\n"

    def _fit(
        self, turns: list[dict], visuals: list[Visual]
    ) -> tuple[list[dict], list[Visual], Encoded]:
        """Leaves out the oldest turns once the context is full; their visuals go before the first
        question that stays. Visuals go last, the oldest first, and never the only one. Also returns
        the tokens of what stays."""

        def tokenize() -> Encoded:
            return self.chat_model.tokenize([*self._system, *turns], visuals)

        prompt = tokenize()
        if len(prompt.input_ids) <= self.context_tokens:
            return turns, visuals, prompt
        # A quarter more than needed: what follows a cut is read again, so not in every turn.
        capacity = self.context_tokens * 3 // 4
        while len(turns) > 1 and len(prompt.input_ids) > capacity:
            tags = "".join(f"{tag}\n" for tag in VISUAL_TAG.findall(turns[0]["content"]))
            first = {"role": "user", "content": tags + turns[2]["content"]}
            turns = [first, *turns[3:]]
            prompt = tokenize()
        while len(visuals) > 1 and len(prompt.input_ids) > capacity:
            first = {"role": "user", "content": VISUAL_TAG.sub("", turns[0]["content"], 1).lstrip()}
            turns, visuals = [first, *turns[1:]], visuals[1:]
            prompt = tokenize()
        return turns, visuals, prompt
