"""The frozen vision tower: CLIP's or SigLIP's, one row of features for each patch (and CLS).

Shapes: N frames, S pixels a side, P tokens a frame (CLIP: CLS first), D vision width.
"""

import hashlib
import json
import pickle
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from model.config import has_cls

# model_type of a directory, with or without the text half → transformers' class of the vision half.
# SigLIP2 of one size is of SigLIP's class, too; "siglip2" would be NaFlex, of any size.
_FAMILIES = {"clip": "CLIPVisionModel", "siglip": "SiglipVisionModel"}
_FIX = (
    "put a CLIP or SigLIP model of transformers there (config.json and model.safetensors), for "
    "example with\n  hf download openai/clip-vit-base-patch32 --local-dir {directory}"
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

    def __init__(self, vision_model: torch.nn.Module):
        """vision_model: one of transformers' classes in `_FAMILIES`."""
        self.model = vision_model.requires_grad_(False).eval()
        # (N, S, S, 3) uint8 → (N, 3, S, S), as the tower's preprocessor_config.json says; with it,
        # a call takes frames as they are, too.
        self.normalize: Callable[[Tensor], Tensor] | None = None
        config = vision_model.config
        self.family: str = _family(config.model_type)
        self.image_size: int = config.image_size
        self.hidden_size: int = config.hidden_size
        grid = config.image_size // config.patch_size
        self.tokens_per_frame: int = grid**2 + (self.family == "clip")
        assert has_cls(self.tokens_per_frame) == (self.family == "clip"), "the rule of has_cls"

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> "VisionTower":
        """Loads a directory that holds a CLIP or SigLIP, whole or its vision half, in float32; or
        the tower within a directory that scripts/export_hf.py wrote.

        Raises ValueError where the directory is missing, is of another model, or lacks weights.
        """
        directory = Path(directory)
        fix = _FIX.format(directory=directory)
        if not (directory / "config.json").is_file():
            raise ValueError(f"no vision tower in {directory}: {fix}")
        try:
            about = json.loads((directory / "config.json").read_text(encoding="utf-8"))
            model_type = about["model_type"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{directory}/config.json names no model_type: {fix}") from error
        if model_type == "cinego":
            return cls(_exported(directory))
        if _family(model_type) not in _FAMILIES:
            raise ValueError(f"{directory} holds a {model_type!r} model, not CLIP or SigLIP: {fix}")

        # Seconds to import: only when a tower is really needed.
        import transformers
        from huggingface_hub.errors import StrictDataclassError
        from safetensors import SafetensorError

        family = getattr(transformers, _FAMILIES[_family(model_type)])
        unreadable = (OSError, RuntimeError, EOFError, pickle.UnpicklingError)
        unreadable += (SafetensorError, StrictDataclassError)  # the latter for the config's numbers
        try:
            with _quiet():
                config = family.config_class.from_pretrained(directory)
                _check_size(config, directory)
                # SigLIP's pooling head stands after what we read: neither load nor count it.
                config.vision_use_head = False
                model, report = family.from_pretrained(
                    directory,
                    config=config,
                    local_files_only=True,
                    dtype=torch.float32,
                    output_loading_info=True,
                )
        except unreadable as error:
            raise ValueError(
                f"can't read the weights in {directory} by its config.json ({error}): {fix}"
            ) from error
        # transformers fills what a file lacks with random numbers and only warns.
        if report["missing_keys"]:
            missing = ", ".join(sorted(report["missing_keys"])[:5])
            raise ValueError(f"the weights in {directory} lack {missing} …: {fix}")
        return cls(model)

    @torch.no_grad()
    def __call__(self, pixel_values: Tensor) -> Tensor:
        """(N, 3, S, S) → (N, P, D): what the last encoder layer gives, before the final norm.

        A forward hook on the encoder sees the same (MiniMind-V). With `normalize` set, it takes
        (N, S, S, 3) uint8 frames as well. ValueError for other sizes.
        """
        if pixel_values.dtype == torch.uint8 and self.normalize:
            pixel_values = self.normalize(pixel_values)
        if pixel_values.shape[-2:] != (self.image_size, self.image_size):
            raise ValueError(
                f"the vision tower takes frames of {self.image_size} x {self.image_size} pixels, "
                f"not {pixel_values.shape[-2]} x {pixel_values.shape[-1]}: use its own "
                "preprocessor_config.json"
            )
        model = self.model
        if next(model.parameters()).device != pixel_values.device:
            model.to(pixel_values.device)
        if self.family == "clip":
            return model(pixel_values=pixel_values).last_hidden_state
        # SigLIP's last_hidden_state has passed the final norm: call what stands before it.
        embeds_NPD = model.embeddings(pixel_values)
        return model.encoder(inputs_embeds=embeds_NPD).last_hidden_state

    def to(self, device: torch.device | str) -> "VisionTower":
        """Itself, moved."""
        self.model.to(device)
        return self

    def cast_matrices(self, dtype: torch.dtype) -> None:
        """Stores them as autocast takes them: weights that don't learn it would cast anew in every
        call. The results are the same; the fingerprint isn't."""
        for module in self.model.modules():
            if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
                module.to(dtype)

    def num_parameters(self) -> int:
        """All of them: none learns."""
        return sum(p.numel() for p in self.model.parameters())

    def fingerprint(self) -> str:
        """16 hex digits of the weights: features on disk name the tower that made them."""
        digest = hashlib.sha256()
        for name, weight in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {tuple(weight.shape)}".encode())
            digest.update(weight.detach().cpu().contiguous().numpy())
        return digest.hexdigest()[:16]


def _check_size(config, directory: Path) -> None:
    """RuntimeError where the matrices that a config.json describes are more than its weights hold:
    transformers would make room for them first, terabytes if it says so."""
    width = config.hidden_size
    matrices = config.num_hidden_layers * (4 * width**2 + 2 * width * config.intermediate_size)
    held = sum(path.stat().st_size for path in directory.iterdir() if path.is_file())
    if matrices > held:  # a byte a number at the least
        raise RuntimeError(f"config.json describes {matrices:,} numbers, here are {held:,} bytes")


def _family(model_type: str) -> str:
    return str(model_type).removesuffix("_vision_model")


def _exported(directory: Path) -> torch.nn.Module:
    """The tower's weights among those of an exported model. Raises ValueError where some lack."""
    from safetensors import safe_open
    from transformers import AutoConfig, AutoModel

    prefix = "vision_tower."
    try:
        settings = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        model = AutoModel.from_config(AutoConfig.for_model(**settings["vision_config"]))
        with safe_open(directory / "model.safetensors", "pt") as file:
            names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118
            state = {name.removeprefix(prefix): file.get_tensor(name) for name in names}
        model.load_state_dict(state, strict=True)
    except (OSError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(
            f"can't read the vision tower in {directory} ({error}): export it again"
        ) from error
    return model.float()
