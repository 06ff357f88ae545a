"""What an operator decides: each field is a flag of `python serve.py`, with its reason."""

import math
import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from trainer.config import flag

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass
class Settings:
    load_from: str = flag("out/sft_videolm_512.pth", "checkpoint, or a directory of transformers")
    vision_path: str | None = flag(
        None, "vision tower; none: the one that an exported directory brings, or CLIP ViT-B/32"
    )
    tokenizer_path: str | None = flag(None, "folder of the tokenizer; none: likewise, or ours")
    num_frames: int | None = flag(None, "frames taken from a video; none: as in training")
    device: str = flag("auto", "auto, cpu, cuda, cuda:1, ...")
    weights: Literal["float32", "bfloat16", "int8"] = flag(
        "float32",
        "of the language model; with int8 neighbours in a batch change an answer a little",
    )
    model_name: str = flag("cinego", "its name in the API")
    temperature: float = flag(0.0, "where a request has none; 0: the most likely answer")

    host: str = flag("127.0.0.1", "address to listen on; 0.0.0.0 opens it to the network")
    port: int = flag(8000, "0: a free one, which is printed")
    api_key: str | None = flag(
        None,
        "asked of clients as a bearer token; better set as $CINEGO_API_KEY, which no list of "
        "processes shows",
    )
    stop_timeout: int = flag(30, "seconds that running answers get after SIGTERM")

    allowed_media_path: str | None = flag(None, "folder whose files file:// URLs may open")
    allowed_media_domains: list[str] | None = flag(
        None,
        "hosts, HOST or HOST:PORT, whose http(s):// URLs may be fetched; a name must lead to "
        "public addresses alone: to fetch from a machine of your own network, name its address",
    )

    max_body_mb: float = flag(32, "MiB of a request, and of a file that it names; above: 413")
    max_visuals: int = flag(8, "videos and images in a request")
    max_pixels: int = flag(3840 * 2160, "of one frame")
    max_video_seconds: float = flag(600, "length of a video")
    max_prompt_tokens: int = flag(1024, "of a conversation; visual tokens count")
    max_new_tokens: int = flag(512, "longest answer, whatever a request asks for")
    default_new_tokens: int = flag(128, "longest answer where a request says nothing")
    max_queue: int = flag(64, "requests that may be under way; above: 503 with Retry-After")
    max_batch: int = flag(16, "answers that are made together")
    batch_wait_ms: float = flag(5, "how long an idle model waits for a second request")
    request_timeout: float = flag(120, "seconds for all of a request; above: 504")
    upload_timeout: float = flag(30, "seconds for its body to arrive; above: 408")
    media_timeout: float = flag(20, "seconds to fetch a file, and to decode it")
    decoders: int = flag(os.cpu_count() or 1, "processes that decode at a time")

    def __post_init__(self):
        # Not the field's default, which --help would print.
        if self.api_key is None:
            self.api_key = os.environ.get("CINEGO_API_KEY")

    def validate(self) -> None:
        """Raises ValueError that lists all problems at once."""
        zero_too = ("port", "temperature", "batch_wait_ms", "stop_timeout")
        found = []
        for field in fields(self):
            value, low = getattr(self, field.name), 0 if field.name in zero_too else 1
            # A limit of less than one second makes sense, and of less than a whole MiB.
            if isinstance(value, float) and field.name not in zero_too:
                low = 1e-3
            if isinstance(value, int | float) and not low <= value < math.inf:
                found.append(f"--{field.name} is {value}: give {low} or more")
        if self.allowed_media_path and not Path(self.allowed_media_path).is_dir():
            found.append(f"--allowed_media_path {self.allowed_media_path}: no such folder")
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.strip()):
            found.append("--api_key must be ASCII text, and not empty")
        if found:
            raise ValueError("\n".join(found))

    @property
    def is_local(self) -> bool:
        return self.host in LOOPBACK
