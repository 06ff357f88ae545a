"""One user's conversation: files, questions, answers. Knows nothing of the page around it."""

import base64
import io
import os
import threading
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from dataset.clip import ContainerInfo
from inference.chat import Chat
from inference.chat_model import ChatModel
from inference.request import Visual
from inference.scheduler import Scheduler
from model.generate import Sampling

THUMBNAIL = 160  # pixels of a frame's longer side in the strip
POSTER = 640  # of a picture that stands alone


class SharedModel:
    """A loaded model and the thread that runs it for all users of the page."""

    def __init__(self, chat_model: ChatModel):
        self.chat_model, self.scheduler = chat_model, Scheduler(chat_model)
        # Frames at full size are large: as many files at a time as there are cores.
        self.decoders = threading.Semaphore(os.cpu_count() or 1)

    def encode(self, path: Path, name: str, num_frames: int, **limits) -> "Attachment":
        """Raises VideoError for a file that can't be read or is above the limits."""
        with self.decoders:
            clip = self.chat_model.decode_frames(path, num_frames, **limits)
            visual = self.scheduler.run(self.chat_model.encode_clip, name, clip).result()
            pictures = [_data_url(_scaled(frame, THUMBNAIL)) for frame in clip.frames]
            poster = _scaled(clip.frames[len(clip.frames) // 2], POSTER)
        weights = self.scheduler.run(self.chat_model.frame_weights, visual).result()
        return Attachment(path, visual, weights, pictures, poster, clip.info, clip.num_frames_total)


@dataclass
class Attachment:
    """A video or an image on the page."""

    path: Path  # where it lies while the page is open
    visual: Visual  # what the model has of it
    weights: list[float]  # of its frames, see ChatModel.frame_weights
    pictures: list[str]  # of its frames, as data: URLs
    poster: Image.Image  # its middle frame
    info: ContainerInfo
    num_frames_total: int


@dataclass(eq=False)
class Conversation:
    model: SharedModel
    attachments: list[Attachment] = field(default_factory=list)  # of all turns, then those waiting
    key: str = field(default_factory=lambda: uuid.uuid4().hex)

    def __post_init__(self):
        self.chat = Chat(self.model.chat_model, self.model.scheduler.stream)
        # Streamlit may start a run of the page while the one before is still ending.
        self.lock = threading.Lock()

    def attach(self, path: Path, name: str, num_frames: int, **limits) -> None:
        """Puts a file before the next question. Raises VideoError for a file that can't be read or
        is above the limits; the conversation is then as before."""
        with self.lock:
            self.attachments.append(self.model.encode(path, name, num_frames, **limits))
            self.chat.attach(self.attachments[-1].visual)

    def ask(self, question: str, sampling: Sampling) -> Iterator[str]:
        """As `Chat.ask`."""
        with self.lock:
            yield from self.chat.ask(question, sampling)


def _scaled(frame: np.ndarray, longer_side: int) -> Image.Image:
    picture = Image.fromarray(frame)
    picture.thumbnail((longer_side, longer_side))
    return picture


def _data_url(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
