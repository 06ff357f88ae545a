"""What an operator decides: each field is a flag, with its reason; `Settings` those of
`python serve.py`, `page.settings.PageSettings` those of `streamlit run web_demo.py`."""

import math
import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from cli import Flags, flag

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass
class Shared(Flags):
    """The model, and how much of it and of this machine a stranger gets."""

    load_from: str | None = flag(None, "checkpoint, or a directory of transformers")
    vision_path: str | None = flag(None, "vision tower; none: the one that the model has learnt by")
    tokenizer_path: str | None = flag(None, "folder of the tokenizer; none: likewise")
    num_frames: int | None = flag(None, "frames taken from a video; none: as in training")
    device: str = flag("auto", "auto, cpu, cuda, cuda:1, ...")
    weights: Literal["float32", "bfloat16", "int8"] = flag(
        "float32",
        "of the language model; with int8 neighbours in a batch change an answer a little",
    )
    max_visuals: int = flag(8, "videos and images in a conversation")
    max_pixels: int = flag(3840 * 2160, "of one frame")
    max_video_seconds: float = flag(600, "length of a video")
    max_new_tokens: int = flag(512, "longest answer, whatever is asked for")
    media_timeout: float = flag(20, "seconds to fetch a file, and to decode it")

    def problems(self) -> list[str]:
        """Everything that is wrong with the values, one sentence each."""
        found = super().problems()
        for field in fields(self):
            value = getattr(self, field.name)
            # A limit of less than one second makes sense, and of less than a whole MiB.
            low = 1e-3 if isinstance(value, float) else 1
            unchecked = field.metadata["at_least"] is None and isinstance(value, int | float)
            if unchecked and not low <= value < math.inf:
                found.append(f"--{field.name} is {value}: give {low} or more")
        return found

    def media_limits(self, num_frames: int) -> dict[str, Any]:
        """Of `dataset.video.read_frames`, for a file of which `num_frames` frames are wanted."""
        return {
            "timeout": self.media_timeout,
            "max_pixels": self.max_pixels,
            "max_seconds": self.max_video_seconds,
            "max_bytes": num_frames * self.max_pixels * 3,
        }


@dataclass
class Settings(Shared):
    """Server"""

    load_from: str = flag("out/sft_videolm_512.pth", "checkpoint, or a directory of transformers")
    model_name: str = flag("cinego", "its name in the API")
    temperature: float = flag(0.0, "where a request has none; 0: the likeliest answer", at_least=0)

    host: str = flag("127.0.0.1", "address to listen on; 0.0.0.0 opens it to the network")
    port: int = flag(8000, "0: a free one, which is printed", at_least=0)
    api_key: str | None = flag(
        None,
        "asked of clients as a bearer token; better set as $CINEGO_API_KEY, which no list of "
        "processes shows",
    )
    stop_timeout: int = flag(30, "seconds that running answers get after SIGTERM", at_least=0)

    allowed_media_path: str | None = flag(None, "folder whose files file:// URLs may open")
    allowed_media_domains: list[str] | None = flag(
        None,
        "hosts, HOST or HOST:PORT, whose http(s):// URLs may be fetched; a name must lead to "
        "public addresses alone: to fetch from a machine of your own network, name its address",
    )

    max_body_mb: float = flag(32, "MiB of a request, and of a file that it names; above: 413")
    max_prompt_tokens: int = flag(1024, "of a conversation; visual tokens count")
    default_new_tokens: int = flag(128, "longest answer where a request says nothing")
    max_queue: int = flag(64, "requests that may be under way; above: 503 with Retry-After")
    max_batch: int = flag(16, "answers that are made together")
    batch_wait_ms: float = flag(5, "how long an idle model waits for a second request", at_least=0)
    request_timeout: float = flag(120, "seconds for all of a request; above: 504")
    upload_timeout: float = flag(30, "seconds for its body to arrive; above: 408")
    decoders: int = flag(os.cpu_count() or 1, "processes that decode at a time")

    def __post_init__(self):
        # Not the field's default, which --help would print.
        if self.api_key is None:
            self.api_key = os.environ.get("CINEGO_API_KEY")

    def problems(self) -> list[str]:
        found = super().problems()
        if self.allowed_media_path and not Path(self.allowed_media_path).is_dir():
            found.append(f"--allowed_media_path {self.allowed_media_path}: no such folder")
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.strip()):
            found.append("--api_key must be ASCII text, and not empty")
        return found

    @property
    def is_local(self) -> bool:
        return self.host in LOOPBACK
