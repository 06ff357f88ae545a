"""What `/v1/chat/completions` takes and gives, in the form of OpenAI's API.

A video comes as vLLM takes it: {"type": "video_url", "video_url": {"url": "data:video/mp4;…"}}.
"""

import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from dataset.conversation import VISUAL_TAG
from inference.request import Sequence

MAX_MESSAGES, MAX_PARTS, MAX_STOPS = 256, 64, 16


@dataclass(eq=False)
class APIError(Exception):
    """Becomes {"error": {"message", "type", "param", "code"}} with an HTTP status."""

    status: int
    message: str
    code: str | None = None
    param: str | None = None
    headers: dict[str, str] | None = None

    def __post_init__(self):
        self.message = self.message[:1000]  # what a client wrote may stand in it

    def body(self) -> dict:
        types = {401: "authentication_error", 403: "permission_error", 404: "not_found_error"}
        fallback = "server_error" if self.status >= 500 else "invalid_request_error"
        about = {"type": types.get(self.status, fallback), "param": self.param, "code": self.code}
        return {"error": {"message": self.message, **about}}


class _Lenient(BaseModel):
    # Clients send fields of newer versions of the API, or their own: unknown ones are ignored.
    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)


def _or_text(wrap: Callable[[str], Any]) -> BeforeValidator:
    """A field may be a text in place of the structure that `wrap` makes of it."""
    return BeforeValidator(lambda value: wrap(value) if isinstance(value, str) else value)


class Source(_Lenient):
    url: str


# "image_url": "…" in place of {"url": "…"} is common enough that other servers take it too.
AsSource = Annotated[Source, _or_text(lambda url: {"url": url})]


class TextPart(_Lenient):
    type: Literal["text"]
    text: str


class ImagePart(_Lenient):
    type: Literal["image_url"]
    image_url: AsSource


class VideoPart(_Lenient):
    type: Literal["video_url"]
    video_url: AsSource


Part = Annotated[TextPart | ImagePart | VideoPart, Field(discriminator="type")]


class Message(_Lenient):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        list[Part],
        Field(max_length=MAX_PARTS),
        _or_text(lambda text: [{"type": "text", "text": text}]),
    ]


class StreamOptions(_Lenient):
    include_usage: bool = False


class ChatRequest(_Lenient):
    """Fields that would change the answer and that this server can't honour are refused; those
    that only inform a provider (`user`, `metadata`, `store`, …) are ignored like unknown ones."""

    model: str
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    stop: Annotated[list[str] | None, Field(max_length=MAX_STOPS), _or_text(lambda s: [s])] = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        neutral = {
            **{"n": (None, 1), "best_of": (None, 1), "logprobs": (None, False)},
            **{"frequency_penalty": (None, 0), "presence_penalty": (None, 0)},
            **{"response_format": (None, {"type": "text"}), "modalities": (None, ["text"])},
            **{"tool_choice": (None, "none", "auto"), "function_call": (None, "none", "auto")},
            **dict.fromkeys(("tools", "functions"), (None, [])),
            **{"logit_bias": (None, {}), "top_logprobs": (None, 0), "audio": (None,)},
        }
        for name, values in neutral.items():
            if data.get(name) not in values:
                raise APIError(400, f"{name} isn't supported", "unsupported_parameter", name)
        return data

    @classmethod
    def parse(cls, body: bytes) -> "ChatRequest":
        """Raises APIError naming the first field that is wrong."""
        try:
            return cls.model_validate_json(body)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False, include_context=False)[0]
            # Pydantic names a part's type in the path as well: messages.0.content.1.text.text.
            param = ".".join(map(str, first["loc"][:4] + first["loc"][5:])) or None
            found = f"{param}: {first['msg']}" if param else first["msg"]
            raise APIError(400, found, None, param) from None


def as_conversation(messages: list[Message]) -> tuple[list[dict], list[str]]:
    """Turns as `dataset.conversation.encode` takes them, and the visuals' URLs in order of their
    tags. Raises APIError for visuals in a turn that isn't the user's."""
    turns: list[dict] = []
    visuals: list[Part] = []
    for number, message in enumerate(messages):
        role = "system" if message.role == "developer" else message.role
        parts = message.content
        visuals_here = [part for part in parts if not isinstance(part, TextPart)]
        if visuals_here and role != "user":
            raise APIError(
                400, f"messages.{number}: only a user's turn may hold visuals", param="messages"
            )
        # Training shows the visual before the question. One that comes last (OpenAI's examples
        # write it so) goes first; one between two texts stays there.
        if visuals_here and parts[-len(visuals_here) :] == visuals_here:
            parts = visuals_here + parts[: -len(visuals_here)]
        visuals += visuals_here
        lines = [_text(part) if isinstance(part, TextPart) else "<video>" for part in parts]
        content = "\n".join(lines)
        if turns and turns[-1]["role"] == role == "user":  # two in a row are one turn
            turns[-1]["content"] += "\n" + content
        else:
            turns.append({"role": role, "content": content})
    return turns, [getattr(part, part.type).url for part in visuals]


def _text(part: TextPart) -> str:
    """A tag in a user's text is text: only a part of the message brings in a visual."""
    return VISUAL_TAG.sub(lambda tag: tag[0][0] + " " + tag[0][1:], part.text)


class Reply:
    """Makes the objects of one answer, whole or in chunks; all of them share id and time."""

    def __init__(self, model: str, sequence: Sequence, warnings: list[str]):
        self.sequence = sequence
        self.about = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time())}
        self.about |= {"model": model} | ({"warnings": warnings} if warnings else {})

    def whole(self, text: str) -> dict:
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None}
        choice["finish_reason"] = self.sequence.finish_reason
        about = {**self.about, "object": "chat.completion"}
        return {**about, "choices": [choice], "usage": self.usage()}

    def chunk(self, delta: dict | None, finish_reason: str | None = None, **usage) -> dict:
        """delta None: the last chunk, which has the usage and no choice."""
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        choices = [] if delta is None else [choice]
        return {**self.about, "object": "chat.completion.chunk", "choices": choices, **usage}

    def usage(self) -> dict:
        prompt, completion = self.sequence.prompt_tokens, self.sequence.completion_tokens
        counts = {"prompt_tokens": prompt, "completion_tokens": completion}
        return {**counts, "total_tokens": prompt + completion}
