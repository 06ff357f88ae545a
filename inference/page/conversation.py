"""What one user has shown, asked and been told. Knows nothing of the page around it."""

import base64
import io
import os
import threading
import uuid
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from dataset.clip import ContainerInfo
from dataset.conversation import ConversationError
from inference import Answer, Answerer, Visual
from inference.page.settings import PageSettings
from model.generate import Sampling

THUMBNAIL = 160  # pixels of a frame's longer side in the strip
POSTER = 640  # of a picture that stands alone


@dataclass
class Model:
    """A loaded model and who may use it when."""

    answerer: Answerer
    # One thread computes at a time, for one token or one visual; then another may.
    lock: threading.Lock = field(default_factory=threading.Lock)
    # Frames at full size are large: as many files at a time as there are cores.
    decoders: threading.Semaphore = field(
        default_factory=lambda: threading.Semaphore(os.cpu_count() or 1)
    )


@dataclass
class Shown:
    """A video or an image on the page."""

    name: str
    file: Path  # where it lies while the page is open
    visual: Visual  # what the model has of it
    weights: list[float]  # of its frames, see Answerer.frame_weights
    pictures: list[str]  # of its frames, as data: URLs
    poster: Image.Image  # its middle frame
    info: ContainerInfo
    num_frames_total: int


@dataclass
class Turn:
    shown: list[Shown]
    question: str
    answer: str = ""
    about: Answer | None = None  # its times; None until the first word


class TooManyVisuals(ValueError):
    """The conversation holds as many as it may."""


@dataclass(eq=False)
class Conversation:
    model: Model
    settings: PageSettings
    turns: list[Turn] = field(default_factory=list)
    waiting: list[Shown] = field(default_factory=list)  # they belong to the next question
    key: str = field(default_factory=lambda: uuid.uuid4().hex)

    def __post_init__(self):
        self.chat = self.model.answerer.chat()
        # Streamlit may start a run of the page while the one before is still ending.
        self.lock = threading.Lock()

    @property
    def shown(self) -> list[Shown]:
        return [*(shown for turn in self.turns for shown in turn.shown), *self.waiting]

    def show(self, file: Path, name: str, num_frames: int) -> Shown:
        """Puts a file before the next question. Raises TooManyVisuals, and VideoError for a file
        that can't be read or is above the limits; the conversation is then as before."""
        answerer = self.model.answerer
        with self.lock:
            if len(self.shown) >= self.settings.max_visuals:
                raise TooManyVisuals
            with self.model.decoders:
                limits = self.settings.media_limits(num_frames)
                clip = answerer.decode(file, num_frames, **limits)
                with self.model.lock:
                    visual = answerer.view(name, clip, THUMBNAIL)
                    weights = answerer.frame_weights(visual)
                poster = Image.fromarray(clip.frames[len(clip.frames) // 2])
                poster.thumbnail((POSTER, POSTER))
                info, total = clip.info, clip.num_frames_total
                del clip
            pictures = [_data_url(picture) for picture in visual.frames]
            visual.frames = []
            shown = Shown(name, file, visual, weights, pictures, poster, info, total)
            self.chat.show(visual)
            self.waiting.append(shown)
        return shown

    def ask(self, question: str, sampling: Sampling) -> Iterator[str]:
        """The answer in pieces of whole characters. Closing the iterator ends the answer there.
        Raises ConversationError for what can't be asked; it is then as if it hadn't been."""
        with self.lock:
            turn, self.waiting = Turn(self.waiting, question), []
            self.turns.append(turn)
            with closing(self.chat.ask(question, sampling)) as pieces:
                try:
                    while (piece := self._next(pieces)) is not None:
                        turn.answer, turn.about = turn.answer + piece, self.chat.last
                        yield piece
                    turn.about = self.chat.last  # an answer may be empty
                except ConversationError:
                    self.turns.remove(turn)
                    self.waiting = turn.shown
                    raise

    def _next(self, pieces: Iterator[str]) -> str | None:
        with self.model.lock:
            return next(pieces, None)


def _data_url(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
