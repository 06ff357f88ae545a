"""A trained model and what stands around it: files to visuals, questions to answers."""

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from dataset.conversation import Encoded, encode, left_pad
from dataset.video import Frames, FrameTransform, VideoError, read_frames
from device import choose_device
from inference.batch import Batch, Question, Visual
from inference.chat import Chat
from inference.parts import parts_of
from model.checkpoint import load_video_language_model, read_about
from model.cinego import Cinego
from model.inference import prepare

# Clips in memory as pixels at a time; their features stay, a hundredth of the size.
CLIPS_AT_ONCE = 32
# Of a chat's history: longer rows than training had are answered badly, and cost more each turn.
CONTEXT_TOKENS = 1024


@dataclass
class Answerer:
    """A model with all that turns files and words into its inputs, and its ids into words."""

    checkpoint: Path
    model: Cinego  # with its vision tower
    tokenizer: PreTrainedTokenizerBase
    transform: FrameTransform
    num_frames: int
    device: torch.device
    parameters: dict[str, int]  # of each part
    fps: float | None = None  # None: frames are taken evenly

    @classmethod
    def load(
        cls,
        checkpoint: str | Path,
        vision_path: str | Path | None = None,
        tokenizer_path: str | Path | None = None,
        num_frames: int | None = None,
        device: str = "auto",
        sampling: str | None = None,
        fps: float | None = None,
        weights: str = "float32",
        compile: bool = False,
    ) -> "Answerer":
        """checkpoint: a .pth, or a directory that convert_checkpoint wrote, which brings its own
        tower and tokenizer along. vision_path, tokenizer_path: None for those that go with the
        checkpoint, see `parts_of`. num_frames, sampling and fps: None for what they were in
        training. weights, compile: see model/inference.py.
        Raises ValueError, with the mend, where a part is missing or isn't the one that the
        checkpoint was trained with."""
        checkpoint = Path(checkpoint)
        if vision_path is None or tokenizer_path is None:
            own = parts_of(checkpoint)
            vision_path, tokenizer_path = vision_path or own[0], tokenizer_path or own[1]
        if not Path(tokenizer_path, "tokenizer_config.json").is_file():
            raise ValueError(
                f"no tokenizer in {tokenizer_path}: name a directory with tokenizer.json and "
                "tokenizer_config.json (--tokenizer_path)"
            )
        chosen = choose_device(device)
        model = load_video_language_model(checkpoint, vision_path).to(chosen)
        # An exported directory brings code along, which AutoTokenizer would ask to run.
        kind = PreTrainedTokenizerFast if tokenizer_path == checkpoint else AutoTokenizer
        tokenizer = kind.from_pretrained(tokenizer_path, local_files_only=True)
        known = model.config.language_model.vocab_size
        if len(tokenizer) > known:
            raise ValueError(
                f"{tokenizer_path} has {len(tokenizer)} entries, {checkpoint} was trained with "
                f"{known}: name its own tokenizer (--tokenizer_path)"
            )
        trained = read_about(checkpoint)
        # Another tower of the same shape gives features that mean nothing to this model.
        trained_with = trained.get("lineage", {}).get("vision_tower")
        if trained_with not in (None, model.vision_tower.fingerprint()):
            raise ValueError(
                f"{vision_path} isn't the vision tower that {checkpoint} was trained with: its "
                "weights differ; name that tower (--vision_path)"
            )
        training = trained.get("training", {})
        transform = FrameTransform.from_pretrained(vision_path, training.get("resize", "tower"))
        num_frames = num_frames or training.get("num_frames", 8)
        fps = fps or training.get("fps")
        if (sampling or training.get("sampling")) != "fps":
            fps = None
        elif fps is None:
            raise ValueError("--sampling fps needs --fps: how many frames a second")
        counts = model.parameter_counts()
        prepare(model.language_model, weights, compile)
        return cls(checkpoint, model, tokenizer, transform, num_frames, chosen, counts, fps)

    # ---- what is seen

    def read(
        self, path: str | Path, num_frames: int | None = None, fps: float | None = None, frames=0
    ) -> Visual:
        """One video or image, decoded and seen. Raises VideoError.

        num_frames and fps (frames a second, up to `num_frames`): None for what `load` got.
        frames: size in pixels of the longer side of the small pictures to keep; 0: none.
        """
        return self.view(str(path), self.decode(path, num_frames, fps), frames)

    def decode(
        self,
        path: str | Path,
        num_frames: int | None = None,
        fps: float | None = None,
        **limits: float | None,
    ) -> Frames:
        """The first half of `read`, without the model. limits: `timeout`, `max_pixels`,
        `max_seconds` and `max_bytes` of `read_frames`, for files of strangers."""
        fps = fps or self.fps
        sampling = "fps" if fps else "uniform"
        return read_frames(path, num_frames or self.num_frames, sampling, fps, **limits)

    def view(self, name: str, clip: Frames, frames: int = 0) -> Visual:
        """The other half: what the tower sees."""
        features = self.see(self.transform(clip.frames))
        pictures = [_thumbnail(frame, frames) for frame in clip.frames] if frames else []
        return Visual(name, features, clip.timestamps.tolist(), pictures)

    def look(self, paths: list[Path]) -> tuple[dict[Path, Visual], dict[Path, str]]:
        """Decodes each file once and runs the tower once: visuals by path, and the reasons of the
        files that can't be read."""

        def read(path: Path) -> tuple[Tensor, list[float]] | VideoError:
            try:
                clip = self.decode(path)
                return self.transform(clip.frames), clip.timestamps.tolist()
            except VideoError as error:
                return error

        visuals, failures = {}, {}
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
                    seen = self.see(torch.cat([pixels for pixels, _ in clips.values()]))
                    seen = seen.split([len(pixels) for pixels, _ in clips.values()])
                    for (path, (_, times)), features in zip(clips.items(), seen, strict=True):
                        visuals[path] = Visual(str(path), features, times)
                bar.update(len(chunk))
        return visuals, failures

    def see(self, pixel_values: Tensor) -> Tensor:
        """(N, 3, S, S) → (N, P, D) in fp16, as the feature store keeps them for training."""
        return self.model.vision_tower(pixel_values.to(self.device)).half()

    @torch.inference_mode()
    def frame_weights(self, visual: Visual) -> list[float]:
        """How much each frame counts in what the summary says: F numbers that sum to 1.

        A frame is taken away and the clip's mean frame put in its place; its weight is how far the
        summary moves for that: the Euclidean distance over all its tokens, divided by the sum for
        all frames. So a frame counts as far as it shows, at its moment, what the clip on the whole
        doesn't, and the summary minds. This is no gradient and no attention map: it says what the
        summary would miss, for every kind of summary alike, and nothing about a question or an
        answer. A still clip has equal weights.
        """
        features_FPD = visual.features.float()
        num_frames = len(features_FPD)
        if num_frames == 1:
            return [1.0]
        mean_PD = features_FPD.mean(0)
        summary = self.model.video_summary
        whole = summary(features_FPD, [num_frames])
        moves = []
        for frame in range(num_frames):  # one at a time: all at once are F² frames in memory
            changed = features_FPD.clone()
            changed[frame] = mean_PD
            moves.append((summary(changed, [num_frames]) - whole).norm())
        moves = torch.stack(moves)
        # Rounding alone moves a still clip's summary a little.
        if moves.sum() < 1e-5 * whole.norm():
            return [1 / num_frames] * num_frames
        return (moves / moves.sum()).tolist()

    # ---- what is said

    def chat(self, system: str | None = None, context_tokens: int | None = None) -> "Chat":
        return Chat(self, system, context_tokens or CONTEXT_TOKENS)

    def batch(self) -> "Batch":
        return Batch(self)

    def encode(self, messages: list[dict], visuals: list[Visual]) -> Encoded:
        """A prompt's ids and where its visuals stand. Raises ConversationError (a ValueError)."""
        num_tokens = self.model.config.tokens_per_visual
        lengths = [num_tokens(len(visual.features)) for visual in visuals]
        return encode(self.tokenizer, messages, lengths, add_generation_prompt=True)

    def answer(self, questions: list[Question]) -> list[str]:
        """The whole answers, as if each question were asked alone."""
        batch = self.batch()
        answers = batch.add(questions)
        while batch:
            batch.step()
        return [answer.text.strip() for answer in answers]

    def inputs(self, prompts: list[Encoded], visuals: Iterable[Visual]) -> dict:
        """A batch for the model, left padded, with the visuals of all rows in order."""
        inputs = {name: tensor.to(self.device) for name, tensor in left_pad(prompts).items()}
        if frames := [visual.features for visual in visuals]:
            inputs["visual_features"] = torch.cat(frames).float()
            inputs["frames_per_visual"] = [len(features) for features in frames]
        return inputs


def _thumbnail(frame: np.ndarray, size: int) -> Image.Image:
    picture = Image.fromarray(frame)
    picture.thumbnail((size, size))
    return picture
