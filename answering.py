"""Joins the rooms for whoever asks a trained model: load it, read clips once, answer in batches.

`eval.py` is its first user. Training's counterpart is `stage.py`.
"""

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dataset.conversation import Encoded, encode, left_pad
from dataset.video import FrameTransform, VideoError, read_frames
from model.checkpoint import load_video_language_model
from model.cinego import Cinego
from model.generate import generate, stream
from trainer.device import choose_device

# Clips in memory as pixels at a time; their features stay, a hundredth of the size.
CLIPS_AT_ONCE = 32


@dataclass
class Answerer:
    """A model with all that turns files and words into its inputs, and its ids into words."""

    checkpoint: Path
    model: Cinego  # with its vision tower
    tokenizer: PreTrainedTokenizerBase
    transform: FrameTransform
    num_frames: int
    device: torch.device

    @classmethod
    def load(
        cls,
        checkpoint: Path,
        vision_path: str,
        tokenizer_path: str,
        num_frames: int | None = None,
        device: str = "auto",
    ) -> "Answerer":
        """num_frames: None for as many as in training. Raises ValueError, with the mend, where a
        part is missing or isn't the one that the checkpoint was trained with."""
        if not Path(tokenizer_path, "tokenizer_config.json").is_file():
            raise ValueError(
                f"no tokenizer in {tokenizer_path}: name a directory with tokenizer.json and "
                "tokenizer_config.json (--tokenizer_path)"
            )
        chosen = choose_device(device)
        model = load_video_language_model(checkpoint, vision_path).to(chosen)
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_path, local_files_only=True)
        known = model.config.language_model.vocab_size
        if len(tokenizer) > known:
            raise ValueError(
                f"{tokenizer_path} has {len(tokenizer)} entries, {checkpoint} was trained with "
                f"{known}: name its own tokenizer (--tokenizer_path)"
            )
        about = checkpoint.with_suffix(".json")  # files of others come without it
        trained = json.loads(about.read_text(encoding="utf-8")) if about.is_file() else {}
        # Another tower of the same shape gives features that mean nothing to this model.
        trained_with = trained.get("lineage", {}).get("vision_tower")
        if trained_with not in (None, model.vision_tower.fingerprint()):
            raise ValueError(
                f"{vision_path} isn't the vision tower that {checkpoint} was trained with: its "
                "weights differ; name that tower (--vision_path)"
            )
        num_frames = num_frames or trained.get("training", {}).get("num_frames", 8)
        transform = FrameTransform.from_pretrained(vision_path)
        return cls(checkpoint, model, tokenizer, transform, num_frames, chosen)

    # ---- what is seen

    def look(self, paths: list[Path]) -> tuple[dict[Path, Tensor], dict[Path, str]]:
        """Decodes each file once and runs the tower once: features (F, P, D) in fp16 by path, and
        the reasons of the files that can't be read."""

        def read(path: Path) -> Tensor | VideoError:
            try:
                return self.transform(read_frames(path, num_frames=self.num_frames).frames)
            except VideoError as error:
                return error

        features, failures = {}, {}
        bar = tqdm(total=len(paths), desc="reading clips", unit="clip", disable=len(paths) < 2)
        # Decoding works outside of Python's lock: threads do what processes would, without copies.
        with ThreadPoolExecutor(os.cpu_count()) as pool, bar:
            for start in range(0, len(paths), CLIPS_AT_ONCE):
                chunk = paths[start : start + CLIPS_AT_ONCE]
                clips = {}
                for path, clip in zip(chunk, pool.map(read, chunk), strict=True):
                    if isinstance(clip, VideoError):
                        failures[path] = str(clip)
                    else:
                        clips[path] = clip
                if clips:
                    frames = self.see(torch.cat(list(clips.values())))
                    frames = frames.split([len(clip) for clip in clips.values()])
                    features |= zip(clips, frames, strict=True)
                bar.update(len(chunk))
        return features, failures

    def see(self, pixel_values: Tensor) -> Tensor:
        """(N, 3, S, S) → (N, P, D) in fp16, as the feature store keeps them for training."""
        return self.model.vision_tower(pixel_values.to(self.device)).half()

    # ---- what is said

    def prompt(self, messages: list[dict], visuals: list[Tensor]) -> Encoded:
        lengths = [self.model.config.tokens_per_visual(len(visual)) for visual in visuals]
        return encode(self.tokenizer, messages, lengths, add_generation_prompt=True)

    def inputs(self, prompts: list[Encoded], visuals: list[list[Tensor]]) -> dict:
        """A batch for `generate`: left padded, so that all rows go on in the same column."""
        inputs = {name: tensor.to(self.device) for name, tensor in left_pad(prompts).items()}
        frames = [visual for row in visuals for visual in row]
        if frames:
            inputs["visual_features"] = torch.cat(frames).float()
            inputs["frames_per_visual"] = [len(visual) for visual in frames]
        return inputs

    def answer(
        self, prompts: list[Encoded], visuals: list[list[Tensor]], max_new_tokens: int
    ) -> list[str]:
        """The most likely answer to each prompt; `visuals` holds each row's (F, P, D) features."""
        inputs, end = self.inputs(prompts, visuals), self.tokenizer.eos_token_id
        rows = generate(self.model, inputs, max_new_tokens, end)
        return [self.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in rows]

    def stream(
        self, messages: list[dict], visuals: list[Tensor], max_new_tokens: int, **sampling
    ) -> Iterator[str]:
        """An answer in pieces as they are made; `sampling`: temperature, top_p, seed."""
        inputs = self.inputs([self.prompt(messages, visuals)], [visuals])
        ids, shown = [], ""
        end = self.tokenizer.eos_token_id
        for token in stream(self.model, inputs, max_new_tokens, end, **sampling):
            ids.append(token)
            text = self.tokenizer.decode(ids, skip_special_tokens=True)
            # A Chinese character may take several tokens: wait until it is whole.
            if not text.endswith("\ufffd"):
                yield text[len(shown) :]
                shown = text
