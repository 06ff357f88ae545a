"""A conversation of many turns: what the model is told of it, and what was said."""

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

from dataset.conversation import VISUAL_TAG, ConversationError
from inference.batch import Answer, Memory, Question, Visual
from model.generate import GREEDY, Sampling

if TYPE_CHECKING:
    from inference.chat_model import Answerer


class Chat:
    """A conversation about videos and images, of as many turns as one likes."""

    def __init__(self, answerer: "Answerer", system: str | None, context_tokens: int):
        self.answerer, self.context_tokens = answerer, context_tokens
        # All turns as they were said; a question's "visuals" are the names of what it showed.
        self.transcript: list[dict] = []
        self.last: Answer | None = None  # the newest answer, with its times
        self._system = [{"role": "system", "content": system}] if system else []
        # What the model is told: the newest turns that fit, and the visuals of their tags.
        self._turns: list[dict] = []
        self._visuals: list[Visual] = []
        self._shown: list[Visual] = []
        self._forget()

    def show(self, visual: Visual) -> None:
        """Puts a visual before the next question, after those that wait for it already."""
        self._shown.append(visual)

    def ask(
        self, question: str, sampling: Sampling = GREEDY, stop: tuple[str, ...] = ()
    ) -> Iterator[str]:
        """The answer in pieces of whole characters; closing the iterator ends the answer there, and
        the chat goes on. Raises ConversationError, before the first piece, for a question that
        can't be asked; it is then as if it hadn't been."""
        content = question
        if not VISUAL_TAG.search(question):  # else the asker says where the visuals stand
            content = "".join(f"{visual.tag}\n" for visual in self._shown) + question
        turns = [*self._turns, {"role": "user", "content": content}]
        turns, visuals = self._fit(turns, [*self._visuals, *self._shown])
        try:
            told = Question([*self._system, *turns], visuals, sampling, stop, self._memory)
            (answer,) = self._batch.add([told])
            self.last, shown, self._shown = answer, self._shown, []
            try:
                while True:
                    if piece := answer.take():
                        yield piece
                    if not self._batch:
                        break
                    self._batch.step()
            finally:
                self._batch.cancel(answer)
                # Templates want some text in every turn.
                said = {"role": "assistant", "content": answer.text.strip() or "-"}
                self._turns, self._visuals = [*turns, said], visuals
                asked = {"role": "user", "content": content}
                if shown:
                    asked["visuals"] = [visual.name for visual in shown]
                self.transcript += [asked, said]
        except (GeneratorExit, ConversationError):
            raise
        except BaseException:  # an interrupt in the midst of a step: what was read may be half
            self._forget()
            raise

    def written(self, kind: str) -> str:
        """The transcript as a file of the suffix `kind`: .json for programs, .md as Markdown, else
        plain lines."""
        if kind == ".json":
            return json.dumps(self.transcript, indent=1, ensure_ascii=False) + "\n"
        marks, between = ("**{}:** ", "\n\n") if kind == ".md" else ("{}: ", "\n")
        lines = []
        for turn in self.transcript:
            lines += [f"[{name}]" for name in turn.get("visuals", ())]
            lines.append(marks.format("Q" if turn["role"] == "user" else "A") + turn["content"])
        return between.join(lines) + "\n"

    def _forget(self) -> None:
        """What was read. What was said stays, and will be read again."""
        self._memory, self._batch = Memory(), self.answerer.batch()

    def _fit(self, turns: list[dict], visuals: list[Visual]) -> tuple[list[dict], list[Visual]]:
        """Leaves out the oldest turns once the context is full; their visuals go before the first
        question that stays. Visuals go last, the oldest first, and never the only one."""

        def too_long(room: int) -> bool:
            prompt = self.answerer.encode([*self._system, *turns], visuals)
            return len(prompt.input_ids) > room

        if not too_long(self.context_tokens):
            return turns, visuals
        # A quarter more than needed: what follows a cut is read again, so not in every turn.
        room = self.context_tokens * 3 // 4
        while len(turns) > 1 and too_long(room):
            tags = "".join(f"{tag}\n" for tag in VISUAL_TAG.findall(turns[0]["content"]))
            first = {"role": "user", "content": tags + turns[2]["content"]}
            turns = [first, *turns[3:]]
        while len(visuals) > 1 and too_long(room):
            first = {"role": "user", "content": VISUAL_TAG.sub("", turns[0]["content"], 1).lstrip()}
            turns, visuals = [first, *turns[1:]], visuals[1:]
        return turns, visuals
