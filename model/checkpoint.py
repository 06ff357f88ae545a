"""Weights on disk: `name.pth` holds the state dict, `name.json` beside it says what it is.

A load either fills every parameter or stops with what didn't fit; `model.load_report` says what
was done. Other generations' files, safetensors and transformers' directories load as well
(model/import_weights.py):

    print(load_language_model("minimind_512.pth").load_report)
"""

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import torch

from files import whole_file
from model.cinego import Cinego
from model.config import CinegoConfig, LanguageModelConfig
from model.import_weights import LoadReport, import_weights, pair_halves, read_json
from model.lora import merged_state
from model.minimind import MiniMind
from model.vision_tower import VisionTower


def save_model(path: str | Path, model: Cinego | MiniMind, meta: dict) -> None:
    """Writes `path` (.pth) and its .json: the model's config and `meta`. Whole or not at all.

    LoRA adapters are merged into the matrices that they stand beside. OSError where the disk is
    full or can't be written; what stood in `path` before is then still there.
    """
    prepare_save(path, model, meta)()


def prepare_save(path: str | Path, model: Cinego | MiniMind, meta: dict) -> Callable[[], None]:
    """What `save_model` would write, copied now: the function writes it, whatever the model has
    become by then."""
    path = Path(path)
    state = {k: weight.detach().to("cpu", copy=True) for k, weight in merged_state(model).items()}
    about = {**meta, "model": type(model).__name__, "model_config": model.config.to_dict()}
    text = json.dumps(about, indent=2, ensure_ascii=False, sort_keys=True)

    def write() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        # The .pth last: where it stands, its description stands too.
        with whole_file(path.with_suffix(".json")) as file:
            file.write(text.encode())
        with whole_file(path) as file:
            torch.save(state, file)

    return write


def load_language_model(path: str | Path, **overrides) -> MiniMind:
    """The MiniMind in `path`, of any generation, in float32 and eval mode.

    path: a .pth, a .safetensors or a transformers directory. The settings come from the .json
    beside it or the config.json inside, from the shapes where there is none, and for the rest from
    the generation; `overrides` (num_attention_heads=8, rope_theta=1e4, …) have the last word.
    ValueError, with the names, where anything is missing, left over or of another shape.
    """
    found = import_weights(path, overrides)
    if found.has_vision:
        raise ValueError(f"{path} holds a video-language model: use load_video_language_model")
    return _build(found)


def load_video_language_model(
    path: str | Path, vision_path: str | Path | None = None, **overrides
) -> Cinego:
    """The Cinego (ours or of 2025) or MiniMind-V in `path`, with the tower of `vision_path` if any.

    As `load_language_model`; `overrides` are settings of CinegoConfig (image_ids=[…]) or of its
    language model. ValueError also where the tower is missing or of another shape.
    """
    found = import_weights(path, overrides)
    if not found.has_vision:
        raise ValueError(
            f"{path} isn't a video-language model: it has no vision_proj.weight. For a language "
            "model alone use load_language_model"
        )
    return _build(found, vision_path)


def load_model(path: str | Path, vision_path: str | Path | None = None) -> Cinego | MiniMind:
    """Whichever of the two is in `path`; the tower of `vision_path` goes with a Cinego.

    ValueError as in the two functions above.
    """
    return _build(import_weights(path, {}), vision_path)


def read_about(path: str | Path) -> dict:
    """What training wrote beside the weights; nothing beside the files of others.

    ValueError where it is there and isn't JSON.
    """
    path = Path(path)
    if path.is_dir():
        return read_json(path / "config.json").get("cinego", {})
    about = path.with_suffix(".json")
    return read_json(about) if about.is_file() else {}


def is_video_language_model(path: str | Path) -> bool:
    """By what lies beside the weights, or by their names; nothing is loaded. False for what can't
    be read, too."""
    path = Path(path)
    try:
        if class_name := read_about(path).get("model"):
            return class_name == "Cinego"
        if path.suffix != ".pth":
            return False
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return any("vision_proj." in name for name in state)  # every generation's has one
    except Exception:  # readers raise a dozen types, all of which mean this
        return False


def _build(found: LoadReport, vision_path: str | Path | None = None) -> Cinego | MiniMind:
    """The model with its weights and its report. Until they come it takes no memory."""
    tower = VisionTower.from_pretrained(vision_path) if vision_path and found.has_vision else None
    settings = found.assumed | found.inferred | found.given  # the surest last
    try:
        if settings["num_hidden_layers"] > len(found.state):  # building them might take for ever
            raise ValueError(
                f"{found.source} has {len(found.state)} tensors, which are no "
                f"{settings['num_hidden_layers']} layers: correct num_hidden_layers"
            )
        with torch.device("meta"):
            if found.has_vision:
                own = {f.name for f in fields(CinegoConfig)} & settings.keys()
                config = {name: settings.pop(name) for name in own}
                model = Cinego(CinegoConfig.from_dict(config | {"language_model": settings}), tower)
            else:
                model = MiniMind(LanguageModelConfig.from_dict(settings))
    except (TypeError, RuntimeError) as error:  # numbers that aren't, or that no tensor can have
        raise ValueError(f"{found.source} has impossible settings: {error}") from error
    _fill(model, found)
    found.num_parameters = sum(p.numel() for p in model.parameters())
    model.load_report = found
    return model.eval()


def _fill(model: Cinego | MiniMind, found: LoadReport) -> None:
    """Copies the state into `model`: every parameter is set and nothing is left over.

    Raises ValueError with all names that don't fit, some of each kind.
    """
    state = found.state
    expected = model.state_dict()
    shapes = [
        f"{name} is {tuple(state[name].shape)} in the file, {tuple(weight.shape)} in the model"
        for name, weight in expected.items()
        if name in state and state[name].shape != weight.shape
    ]
    missing = [f"missing {name}" for name in expected if name not in state]
    unknown = [f"unknown {name}" for name in state if name not in expected]
    problems = []
    for names in (missing, unknown, shapes):
        problems += names[:6] + [f"… {len(names) - 6} more"] * (len(names) > 6)
    if problems:
        raise ValueError(
            f"{found.source} is a checkpoint of another size or architecture: set the width, "
            "layers and heads that it was trained with\n  " + "\n  ".join(problems)
        )
    language_model = model.config.language_model if found.has_vision else model.config
    for name in expected:
        weight = state.pop(name)
        if found.interleaved and name.endswith(("q_proj.weight", "k_proj.weight")):
            weight = pair_halves(weight, language_model.head_dim)
        # Copied: names that share memory in the file would be trained as one.
        expected[name] = torch.empty(weight.shape).copy_(weight)
    model.load_state_dict(expected, strict=True, assign=True)
