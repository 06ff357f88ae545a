"""The frozen eye: transformers' CLIP vision model, one row of features for each patch and the CLS.

Shapes: N frames, S pixels a side, P tokens a frame (CLS first), D vision width.
"""

import hashlib
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

_MEND = (
    "put a CLIP model of transformers there (config.json and model.safetensors), for example with\n"
    "  hf download openai/clip-vit-base-patch32 --local-dir {directory}"
)


@contextmanager
def _quiet():
    """A CLIPModel's text tower is left out on purpose: spare the reader a warning of 200 lines."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


class VisionTower:
    """Not an nn.Module on purpose: so it never enters a checkpoint, an optimizer or `.train()`."""

    def __init__(self, clip_vision_model: torch.nn.Module):
        self.model = clip_vision_model.requires_grad_(False).eval()
        config = clip_vision_model.config
        self.hidden_size: int = config.hidden_size
        self.image_size: int = config.image_size
        self.tokens_per_frame: int = (config.image_size // config.patch_size) ** 2 + 1

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> "VisionTower":
        """Loads a directory that holds a CLIPModel or a CLIPVisionModel, in float32.

        Raises ValueError where the directory is missing, isn't CLIP, or lacks weights.
        """
        # Seconds to import: only when a tower is really needed.
        from safetensors import SafetensorError
        from transformers import AutoConfig, CLIPVisionModel

        directory = Path(directory)
        mend = _MEND.format(directory=directory)
        if not (directory / "config.json").is_file():
            raise ValueError(f"no vision tower in {directory}: {mend}")
        kind = AutoConfig.from_pretrained(directory, local_files_only=True).model_type
        if kind not in ("clip", "clip_vision_model"):
            raise ValueError(f"{directory} holds a {kind!r} model, not CLIP: {mend}")
        try:
            with _quiet():
                model, report = CLIPVisionModel.from_pretrained(
                    directory, local_files_only=True, dtype=torch.float32, output_loading_info=True
                )
        except (OSError, RuntimeError, SafetensorError) as error:
            raise ValueError(f"can't read the weights in {directory} ({error}): {mend}") from error
        # transformers fills what a file lacks with random numbers and only warns.
        if report["missing_keys"]:
            missing = ", ".join(sorted(report["missing_keys"])[:5])
            raise ValueError(f"the weights in {directory} lack {missing} …: {mend}")
        return cls(model)

    @torch.no_grad()
    def __call__(self, pixel_values: Tensor) -> Tensor:
        """(N, 3, S, S) → (N, P, D): what the last encoder layer gives, before the final norm."""
        if pixel_values.shape[-2:] != (self.image_size, self.image_size):
            raise ValueError(
                f"the vision tower takes frames of {self.image_size} x {self.image_size} pixels, "
                f"not {pixel_values.shape[-2]} x {pixel_values.shape[-1]}: use its own "
                "preprocessor_config.json"
            )
        return self.to(pixel_values.device).model(pixel_values=pixel_values).last_hidden_state

    def to(self, device: torch.device | str) -> "VisionTower":
        self.model.to(device)
        return self

    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    def fingerprint(self) -> str:
        """16 hex digits of the weights: features on disk name the tower that made them."""
        digest = hashlib.sha256()
        for name, weight in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {tuple(weight.shape)}".encode())
            digest.update(weight.detach().cpu().contiguous().numpy())
        return digest.hexdigest()[:16]
