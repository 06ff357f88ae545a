"""Files and words → the inputs of CinegoForCausalLM, by the same code that made its training data.

Visuals are paths (read by PyAV, frames sampled as in training), PIL images or uint8 arrays of
frames (F, H, W, 3). Rows of a batch are padded on the left, ready for generate().
"""

import os

import numpy as np
import torch
from transformers import BatchFeature, ProcessorMixin

from dataset.conversation import VISUAL_TAG, encode_rendered, left_pad
from model.config import CinegoConfig


class CinegoProcessor(ProcessorMixin):
    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        num_frames: int = 8,
        tokens_per_frame: int = 50,
        summary: str = "dct",
        chat_template=None,
    ):
        """num_frames: taken from a video. The other two say how many tokens a visual takes."""
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        for name in ("is_local", "local_files_only"):  # how it was loaded is nothing to be saved
            tokenizer.init_kwargs.pop(name, None)
        self.num_frames, self.tokens_per_frame, self.summary = num_frames, tokens_per_frame, summary

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "visual_mask", "pixel_values", "frames_per_visual"]

    def __call__(
        self, text=None, images=None, videos=None, num_frames: int | None = None, **kwargs
    ) -> BatchFeature:
        """A rendered prompt, or several, with one tag (<image>, <video>) for each visual.

        images, videos: one visual or a list, in order of the tags of the whole batch.
        kwargs: what processors usually take; only return_tensors="pt" and padding=True fit.
        Raises ValueError where tags and visuals don't fit, and what `read_frames` raises.
        """
        _check_usual(kwargs)
        config = CinegoConfig(tokens_per_frame=self.tokens_per_frame, summary=self.summary)
        waiting = {"<image>": _as_list(images), "<video>": _as_list(videos)}
        rows, pixels = [], []
        for prompt in _as_list(text):
            lengths = []
            for tag in VISUAL_TAG.findall(prompt):
                # `<image>` may mark a video (LLaVA-Video writes so) and a run either.
                named = waiting.get(tag) or waiting["<video>"] or waiting["<image>"]
                if not named:
                    raise ValueError(f"more tags than visuals, from {prompt!r} on")
                pixels.append(self._pixels(named.pop(0), num_frames or self.num_frames))
                lengths.append(config.tokens_per_visual(len(pixels[-1])))
            rows.append(encode_rendered(self.tokenizer, prompt, lengths))
        if left := sum(map(len, waiting.values())):
            raise ValueError(f"{left} visuals more than tags: write <video> where each belongs")
        batch = left_pad(rows, self.tokenizer.pad_token_id or 0)
        if pixels:
            batch["pixel_values"] = torch.cat(pixels)
            batch["frames_per_visual"] = torch.tensor([len(visual) for visual in pixels])
        return BatchFeature(batch)

    def apply_chat_template(
        self,
        conversation: list,
        chat_template=None,
        add_generation_prompt: bool = False,
        tokenize: bool = False,
        return_dict: bool = False,
        num_frames: int | None = None,
        **kwargs,
    ):
        """One conversation, or a list of them, of turns whose content is a text or a list of
        {"type": "text", "text": …}, {"type": "video", "path": …} and {"type": "image", …}.

        Gives the rendered text(s), or with tokenize=True the ids, or with return_dict=True all
        inputs of the model. Raises ValueError for another content, and as a call does.
        """
        if chat_template is not None:
            raise ValueError("set tokenizer.chat_template instead of handing in chat_template")
        is_batch, visuals = not isinstance(conversation[0], dict), []
        texts = self.tokenizer.apply_chat_template(
            [_messages(turns, visuals) for turns in (conversation if is_batch else [conversation])],
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
        if not tokenize:
            return texts if is_batch else texts[0]
        batch = self(texts, videos=visuals, num_frames=num_frames, **kwargs)
        return batch if return_dict else batch["input_ids"]

    def _pixels(self, visual, num_frames: int) -> torch.Tensor:
        """(F, 3, S, S) of one visual."""
        # Here, and not above: a question without a video needs no video reader.
        from dataset.clip import uniform_indices
        from dataset.transforms import FrameTransform
        from dataset.video import read_frames

        if isinstance(visual, str | os.PathLike):
            frames = read_frames(visual, num_frames=num_frames).frames
        else:
            frames = np.array(visual.convert("RGB") if hasattr(visual, "convert") else visual)
            frames = frames[None] if frames.ndim == 3 else frames
            if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8:
                raise ValueError(
                    f"frames must be uint8 of shape (F, H, W, 3), not {frames.dtype} {frames.shape}"
                )
            frames = frames[uniform_indices(len(frames), num_frames)]
        settings = self.image_processor.to_dict()
        return FrameTransform.from_config(settings, "the image processor")(frames)


def _messages(turns: list[dict], visuals: list) -> list[dict]:
    """Turns whose contents are texts with tags; their visuals join `visuals`."""
    messages = []
    for turn in turns:
        content = turn["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        texts = []
        for part in parts:
            media = part.get("type")
            if media == "text":
                texts.append(part["text"])
            elif media in ("video", "image") and (media in part or "path" in part):
                visuals.append(part.get(media, part.get("path")))
                texts.append(f"<{media}>\n")
            else:
                raise ValueError(f"{part} is no text, and no image or video with its 'path'")
        messages.append({"role": turn["role"], "content": "".join(texts)})
    return messages


def _as_list(visuals) -> list:
    if visuals is None:
        return []
    return list(visuals) if isinstance(visuals, list | tuple) else [visuals]


def _check_usual(kwargs: dict) -> None:
    """What the rows are anyway may be asked for; anything else would be dropped in silence."""
    usual = {"return_tensors": ("pt",), "padding": (True, "longest"), "padding_side": ("left",)}
    odd = [f"{k}={v!r}" for k, v in kwargs.items() if v is not None and v not in usual.get(k, ())]
    if odd:
        raise ValueError(f"CinegoProcessor doesn't know {', '.join(odd)}")
