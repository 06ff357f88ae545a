"""A trained model and what stands around it: files to visuals, conversations to requests."""

import os
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dataset.conversation import ConversationError, Encoded, encode
from dataset.video import Frames, FrameTransform, VideoError, read_frames
from demo.known_world import warn_unlike_training
from device import choose_device
from inference.engine import Engine
from inference.parts import find_parts
from inference.request import PrefixCache, Request, Sequence, Visual
from model.checkpoint import load_video_language_model, read_about
from model.cinego import Cinego
from model.generate import GREEDY, Sampling
from model.inference import prepare
from model.tokenizer import check_tokenizer, open_tokenizer

CLIPS_AT_ONCE = 32  # in memory as pixels; their features stay, a hundredth of the size
FRAMES_AT_ONCE = 64  # through the tower; bounds its memory


@dataclass
class ChatModel:
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
        dtype: str = "auto",
        quantize: str = "none",
        accept_tokenizer: bool = False,
    ) -> "ChatModel":
        """checkpoint: a .pth, or a directory of scripts/export_hf.py. vision_path, tokenizer_path:
        None for those that go with it, see `find_parts`. num_frames, sampling and fps: None for
        what they were in training. dtype, quantize: of the language model, see model/inference.py.
        accept_tokenizer: see `check_tokenizer`. Raises ValueError, with the fix, where a part is
        missing or isn't the one that the checkpoint was trained with."""
        checkpoint = Path(checkpoint)
        if vision_path is None or tokenizer_path is None:
            own = find_parts(checkpoint)
            vision_path, tokenizer_path = vision_path or own[0], tokenizer_path or own[1]
        tokenizer = open_tokenizer(tokenizer_path)
        chosen = choose_device(device)
        model = load_video_language_model(checkpoint, vision_path).to(chosen)
        trained = read_about(checkpoint)
        check_tokenizer(model, tokenizer, trained, accept_tokenizer)
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
        prepare(model.language_model, dtype, quantize)
        return cls(checkpoint, model, tokenizer, transform, num_frames, chosen, counts, fps)

    # ---- files to visuals

    def decode_frames(
        self,
        path: str | Path,
        num_frames: int | None = None,
        fps: float | None = None,
        resize: bool = False,
        on_damage: str = "keep",
        **limits: float | None,
    ) -> Frames:
        """A video's or image's frames, without the model. Raises VideoError.

        num_frames and fps (frames a second, up to `num_frames`): None for what `load` got. resize:
        to the tower's size, where they are decoded. on_damage: "keep" takes what a player shows and
        tells near which seconds it is damaged; "error" refuses it. limits: `timeout`, `max_pixels`,
        `max_seconds` and `max_bytes` of `read_frames`, for untrusted files.
        """
        num_frames, fps = num_frames or self.num_frames, fps or self.fps
        limits |= {"transform": self.transform if resize else None, "on_damage": on_damage}
        return read_frames(path, num_frames, "fps" if fps else "uniform", fps, **limits)

    def encode_frames(self, pixel_values: Tensor) -> Tensor:
        """(N, 3, S, S) → (N, P, D) in fp16, as the feature store keeps them for training."""
        parts = pixel_values.split(FRAMES_AT_ONCE)
        return torch.cat([self.model.vision_tower(part.to(self.device)).half() for part in parts])

    def encode_clip(self, name: str, clip: Frames) -> Visual:
        """Decoded frames as the model gets them."""
        features = self.encode_frames(self.transform(clip.frames)).cpu()  # a test set has thousands
        unlike = warn_unlike_training(self.checkpoint, features)
        return Visual(name, features, clip.timestamps.tolist(), clip.damaged, unlike)

    def encode_video(
        self, path: str | Path, num_frames: int | None = None, fps: float | None = None
    ) -> Visual:
        """One video or image, decoded and encoded; the arguments are those of `decode_frames`.
        Raises VideoError."""
        return self.encode_clip(str(path), self.decode_frames(path, num_frames, fps))

    def encode_videos(
        self, files: Collection[tuple[Path, tuple[float, float] | None]]
    ) -> tuple[dict[tuple, Visual], dict[tuple, str]]:
        """Decodes files in parallel, each with the seconds of the part of it that is meant (None:
        all of it): visuals by file, and why the others can't be used; damaged ones can't, as in
        training."""

        def decode(file: tuple) -> Frames | VideoError:
            try:
                return self.decode_frames(file[0], resize=True, on_damage="error", bounds=file[1])
            except VideoError as error:
                return error

        visuals, failures, files = {}, {}, list(files)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for start in range(0, len(files), CLIPS_AT_ONCE):
                chunk = files[start : start + CLIPS_AT_ONCE]
                for file, clip in zip(chunk, pool.map(decode, chunk), strict=True):
                    if isinstance(clip, VideoError):
                        failures[file] = str(clip)
                    else:
                        visuals[file] = self.encode_clip(str(file[0]), clip)
        return visuals, failures

    @torch.inference_mode()
    def frame_weights(self, visual: Visual) -> list[float]:
        """How much each frame counts in what the summary says: F numbers that sum to 1.

        Its weight is how far the summary moves when the clip's mean frame stands in its place:
        the Euclidean distance over all its tokens, divided by the sum for all frames. It says what
        the summary would miss, nothing about a question or an answer. A still clip has equal ones.
        """
        features_FPD = visual.features.to(self.device).float()
        num_frames = len(features_FPD)
        mean_PD = features_FPD.mean(0)
        summary = self.model.video_summary
        whole = summary(features_FPD, [num_frames])
        moves = torch.zeros(num_frames)
        for frame in range(num_frames):  # one at a time: all at once are F² frames in memory
            changed = features_FPD.clone()
            changed[frame] = mean_PD
            moves[frame] = (summary(changed, [num_frames]) - whole).norm()
        # Rounding alone moves a still clip's summary a little.
        if moves.sum() < 1e-5 * whole.norm():
            return [1 / num_frames] * num_frames
        return (moves / moves.sum()).tolist()

    # ---- conversations to requests, and requests to text

    def tokenize(self, messages: list[dict], visuals: Collection[Visual]) -> Encoded:
        """A prompt's ids and where its visuals stand. Raises ConversationError (a ValueError)."""
        num_tokens = self.model.config.tokens_per_visual
        lengths = [num_tokens(len(visual.features)) for visual in visuals]
        return encode(self.tokenizer, messages, lengths, add_generation_prompt=True)

    def make_request(
        self,
        messages: list[dict],
        visuals: Collection[Visual] = (),
        sampling: Sampling = GREEDY,
        stop: tuple[str, ...] = (),
        prefix_cache: PrefixCache | None = None,
        prompt: Encoded | None = None,
    ) -> Request:
        """prompt: the messages' tokens, where the caller has them already. Raises
        ConversationError for a conversation that can't be asked, or that the model has no positions
        for: found half-way, it would end its neighbours' answers, too."""
        prompt = prompt or self.tokenize(messages, visuals)
        longest = self.model.config.language_model.max_position_embeddings
        if (tokens := len(prompt.input_ids) + sampling.max_new_tokens) > longest:
            raise ConversationError(
                f"prompt and answer take up to {tokens} tokens, the model has positions for "
                f"{longest}: shorten the conversation, or lower max_new_tokens"
            )
        num_tokens = self.model.config.tokens_per_visual
        places = ((v, i) for v in visuals for i in range(num_tokens(len(v.features))))
        pairs = zip(prompt.input_ids, prompt.visual_mask, strict=True)
        columns = [next(places) if is_visual else token for token, is_visual in pairs]
        return Request(
            messages, list(visuals), prompt, columns, sampling, tuple(stop), prefix_cache
        )

    def engine(self) -> Engine:
        return Engine(self.model, self.tokenizer)

    def generate(self, requests: list[Request]) -> list[str]:
        """The whole answers, made together; in float32 as if each request were made alone."""
        engine, sequences = self.engine(), [Sequence(request) for request in requests]
        engine.add(sequences)
        while engine.sequences:
            engine.step()
        return [sequence.text.strip() for sequence in sequences]
