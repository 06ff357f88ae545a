"""Flags of whatever lets people ask a model: terminal, page and API."""

import math
import os
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from cli import TOKENIZER_PATH, VISION_PATH, Flags, flag
from model.generate import MAX_NEW_TOKENS

LOOPBACK = ("127.0.0.1", "localhost", "::1")
MAX_PAGE_FRAMES = 64  # of a visual: the page shows each one


@dataclass
class ModelFlags(Flags):
    """Model"""

    load_from: str | None = flag(None, "checkpoint, or a directory of transformers")
    vision_path: str | None = flag(
        None, f"vision tower (default: the checkpoint's own, or {VISION_PATH})"
    )
    tokenizer_path: str | None = flag(
        None, f"folder of the tokenizer (default: the checkpoint's own, or {TOKENIZER_PATH})"
    )
    accept_tokenizer: bool = flag(
        False, "use the tokenizer even if the weights seem to be trained with another"
    )
    device: str = flag("auto", "auto, cpu, cuda, cuda:1, mps", scope="process")


@dataclass
class TrainedFrameFlags(Flags):
    """Frames (default: as in the model's training)"""

    num_frames: int | None = flag(None, "frames taken from a video, at most", at_least=1)
    sampling: Literal["uniform", "fps"] | None = flag(
        None, "uniform: num_frames over the whole video; fps: so many a second, up to that"
    )
    fps: float | None = flag(None, "frames a second with --sampling fps")


@dataclass
class PrecisionFlags(Flags):
    """Precision of the language model"""

    dtype: Literal["auto", "float32", "bfloat16"] = flag(
        "auto", "of its weights; auto: bfloat16 where the device computes in it, else float32"
    )
    quantize: Literal["none", "int8"] = flag(
        "none", "int8: the fastest on a CPU, less exact; an answer depends a little on its batch"
    )
    weights: Literal["auto", "float32", "bfloat16", "int8"] | None = flag(
        None, "old name of --dtype, and of --quantize int8"
    )

    def __post_init__(self):
        if self.weights == "int8":
            self.quantize = "int8"
        elif self.weights is not None:
            self.dtype = self.weights


@dataclass
class LimitFlags(Flags):
    """What one user gets"""

    max_visuals: int = flag(8, "videos and images in a conversation")
    max_pixels: int = flag(3840 * 2160, "of one frame")
    max_video_seconds: float = flag(600, "length of a video")
    max_new_tokens: int = flag(512, "longest answer, whatever is asked for")
    media_timeout: float = flag(20, "seconds for decoding all files of a request; to fetch one")

    def problems(self) -> list[str]:
        found = super().problems()
        for field in fields(self):
            value = getattr(self, field.name)
            # A limit of less than one second makes sense, and of less than a whole MiB.
            low = 1e-3 if isinstance(value, float) else 1
            unchecked = field.metadata["at_least"] is None and type(value) in (int, float)
            if unchecked and not low <= value < math.inf:
                found.append(f"--{field.name} is {value}: give {low} or more")
        return found

    def media_limits(self, num_frames: int, seconds: float | None = None) -> dict[str, Any]:
        """Of `dataset.video.read_frames`, for a file of which `num_frames` frames are wanted;
        seconds: what is left of `media_timeout`."""
        return {
            "timeout": self.media_timeout if seconds is None else seconds,
            "max_pixels": self.max_pixels,
            "max_seconds": self.max_video_seconds,
            "max_bytes": num_frames * self.max_pixels * 3,
        }


@dataclass
class AnswerFlags(PrecisionFlags, TrainedFrameFlags, ModelFlags):
    """Model, frames and precision of whatever answers"""

    def load_model(self, checkpoint: str | None = None):
        """The ChatModel that the flags describe. Raises ValueError with the fix."""
        from inference.chat_model import ChatModel  # takes seconds: flags are checked first
        from inference.parts import default_model

        path = checkpoint or self.load_from or default_model()
        return ChatModel.load(
            *(path, self.vision_path, self.tokenizer_path, self.num_frames, self.device),
            *(self.sampling, self.fps, self.dtype, self.quantize, self.accept_tokenizer),
        )


@dataclass
class ServerFlags(LimitFlags, AnswerFlags):
    """Server"""

    load_from: str | None = flag(
        None,
        "checkpoint, or a directory of transformers (default: out/sft_videolm_512.pth, or the "
        "small model that ships)",
    )
    model_name: str = flag("cinego", "the model's name in the API")
    temperature: float = flag(0.0, "where a request has none; 0: greedy", at_least=0)
    host: str = flag("127.0.0.1", "address to listen on; 0.0.0.0 opens it to the network")
    port: int = flag(8000, "port to listen on; 0: a free one, which is printed", at_least=0)
    api_key: str | None = flag(
        None,
        "bearer token that clients must send; better set as $CINEGO_API_KEY, which no list of "
        "processes shows",
    )
    trusted_proxies: str | None = flag(
        None, "addresses, A,B or A/24, whose X-Forwarded-For names the client"
    )
    stop_timeout: int = flag(30, "seconds that running answers get after SIGTERM", at_least=0)
    allowed_media_path: str | None = flag(None, "folder whose files file:// URLs may open (Linux)")
    allowed_media_domains: list[str] | None = flag(
        None, "hosts, HOST or HOST:PORT, whose http(s):// URLs may be fetched, exactly these"
    )
    max_body_mb: float = flag(32, "MiB of a request, and of a file that it names; above: 413")
    max_prompt_tokens: int = flag(1024, "tokens of a conversation; visual tokens count")
    default_new_tokens: int = flag(MAX_NEW_TOKENS, "longest answer where a request says nothing")
    max_queue: int = flag(
        64, "requests under way, one client's seven eighths; above: 503 with Retry-After"
    )
    max_batch: int = flag(16, "answers that are decoded together")
    batch_wait_ms: float = flag(5, "how long an idle model waits for a second request", at_least=0)
    request_timeout: float = flag(120, "seconds for all of a request; above: 504")
    header_timeout: float = flag(10, "seconds for a request's header, on a new connection or later")
    upload_timeout: float = flag(20, "seconds for a request's body; above: 408")
    decoders: int = flag(
        max(2, os.cpu_count() or 1), "processes that decode at a time; one client gets all but one"
    )

    def __post_init__(self):
        super().__post_init__()
        # Not the field's default, which --help would print.
        if self.api_key is None:
            self.api_key = os.environ.get("CINEGO_API_KEY")

    def problems(self) -> list[str]:
        found = super().problems()
        if self.allowed_media_path:
            if not Path(self.allowed_media_path).is_dir():
                found.append(f"--allowed_media_path {self.allowed_media_path}: no such folder")
            if sys.platform != "linux":
                found.append("--allowed_media_path needs Linux, which tells what was opened")
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.strip()):
            found.append("--api_key must be ASCII text, and not empty")
        return found

    @property
    def max_body(self) -> int:
        """Bytes."""
        return int(self.max_body_mb * 2**20)

    @property
    def is_local(self) -> bool:
        return self.host in LOOPBACK


@dataclass
class PageFlags(LimitFlags, AnswerFlags):
    """Page"""

    load_from: str | None = flag(None, "checkpoint or directory chosen first; none: in --out_dir")
    out_dir: str = flag("out", "folder whose models can be chosen")
    examples: list[str] | None = flag(
        None, "folders of clips to try; none: dataset/eval_videos, or demo/examples"
    )

    def problems(self) -> list[str]:
        found = super().problems()
        missing = (name for name in self.examples or () if not Path(name).is_dir())
        found += [f"--examples {folder}: no such folder" for folder in missing]
        if (self.num_frames or 0) > MAX_PAGE_FRAMES:
            found.append(f"--num_frames is {self.num_frames}: give {MAX_PAGE_FRAMES} or fewer")
        return found
