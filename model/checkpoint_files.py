"""What lies on disk as weights: a .pth, a .safetensors or a transformers directory.

Here is only read: the tensors as they stand there, and the settings that lie beside them. What they
are is for model/import_weights.py to say. Nothing in a file is ever run.
"""

import json
import re
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

# Families in transformers that compute what MiniMind does. Others share the names and differ
# inside (Gemma's norms, SmolLM3's layers without positions), and would answer nonsense.
_FAMILIES = ("llama", "qwen3", "qwen3_moe", "minimind", "minimind-v", "cinego")
_SETTINGS = {  # of LanguageModelConfig ← of MiniMind's own config.json, where transformers' differs
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "rms_norm_eps": "norm_eps",
    "vocab_size": None,
    "intermediate_size": None,
    "max_position_embeddings": None,
    "rope_theta": None,
}
# What every generation's video-language model has and no language model does.
_VISION = re.compile(r"(module\.|_orig_mod\.)*(vision_proj|video_summar)")
# The tower's tensors in an exported directory: a loader takes the tower from one of its own.
_TOWER = "vision_tower."


def read_checkpoint(path: str | Path) -> tuple[dict[str, Tensor], dict]:
    """The state dict as it stands in `path`, and the settings that lie beside it, in one flat dict.

    Raises ValueError for what isn't a checkpoint, and never runs what a file brings along.
    """
    path = Path(path)
    if path.is_dir():
        return _read_directory(path)
    if not path.is_file():
        raise ValueError(f"no checkpoint {path}: train one first, or put the published file there")
    state, about = _read_tensors(path), path.with_suffix(".json")
    if not about.is_file():
        return state, {}
    return state, _flat(_read_json(about), about)


def read_about(path: str | Path) -> dict:
    """What training wrote beside the weights; nothing beside the files of others."""
    path = Path(path)
    if path.is_dir():
        return _read_json(path / "config.json").get("cinego", {})
    about = path.with_suffix(".json")
    return _read_json(about) if about.is_file() else {}


def is_video_language_model(path: str | Path) -> bool:
    """A look at what lies beside the weights, or at their names: nothing is loaded. False for what
    can't be read, too."""
    path = Path(path)
    try:
        if kind := read_about(path).get("model"):
            return kind == "Cinego"
        if path.suffix != ".pth":
            return False
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return any(_VISION.match(name) for name in state)
    except Exception:  # as in _read_tensors
        return False


def _read_tensors(path: Path, unneeded: str | None = None) -> dict[str, Tensor]:
    """Every tensor but those whose names begin with `unneeded`, each in memory of its own."""
    try:
        if path.suffix == ".safetensors":
            return _read_safetensors(path, unneeded)
        # weights_only: a checkpoint from the net may hold any code, and this never runs it.
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # readers raise a dozen types, all of which mean this
        raise ValueError(f"{path} isn't a readable state dict: {error}") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path} isn't a state dict but a {type(state).__name__}")
    for name, weight in state.items():
        if not isinstance(name, str) or not isinstance(weight, Tensor):
            raise ValueError(
                f"{path} isn't a state dict: it must map names to tensors, but {name!r} is a "
                f"{type(weight).__name__}; save the model's state_dict() alone"
            )
    return {n: w for n, w in state.items() if unneeded is None or not n.startswith(unneeded)}


def _read_safetensors(path: Path, unneeded: str | None) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as file:
        names = list(file.keys())
    state = {}
    for name in names:
        if unneeded is None or not name.startswith(unneeded):
            # Opened anew each time: a page once read stays mapped, and counts, until it is closed.
            with safe_open(path, framework="pt") as file:
                state[name] = file.get_tensor(name).clone()
    return state


def _read_directory(directory: Path) -> tuple[dict[str, Tensor], dict]:
    """What transformers' save_pretrained wrote: its config.json and one or several files."""
    files, about = _weight_files(directory), directory / "config.json"
    if not about.is_file():
        raise ValueError(f"{about} is missing: copy the model's config there")
    config = _read_json(about)
    # What scripts/export_hf.py wrote brings our own settings along, and its tower.
    exported = config.get("cinego")
    known = _flat(exported, about) if exported is not None else {}
    is_ours = exported is not None and config.get("model_type") == "cinego"  # 2025's is so, too
    if not is_ours:
        known |= _read_transformers_config(config, about)
    state = {}
    for file in files:
        part = _read_tensors(file, _TOWER if is_ours else None)
        if twice := sorted(state.keys() & part.keys()):
            raise ValueError(f"{file} has {twice[0]}, which another file of {directory} has too")
        state |= part
    if is_ours:
        state = {name.removeprefix("cinego."): state.pop(name) for name in list(state)}
    return state, known


def _weight_files(directory: Path) -> list[Path]:
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (directory / name).is_file():
            return [directory / name]
        if not (index := directory / f"{name}.index.json").is_file():
            continue
        weight_map = _read_json(index).get("weight_map")
        parts = weight_map.values() if isinstance(weight_map, dict) else ()
        if not parts or not all(isinstance(part, str) for part in parts):
            raise ValueError(f"{index} names no files: its weight_map must map tensors to them")
        parts = sorted(set(parts))
        if any(Path(part).name != part for part in parts):
            raise ValueError(f"{index} names files outside of {directory}")
        for part in parts:
            if not (directory / part).is_file():
                raise ValueError(f"{index} names {part}, which is missing: copy it there")
        return [directory / part for part in parts]
    raise ValueError(
        f"no checkpoint in {directory}: a transformers directory has config.json and "
        "model.safetensors or pytorch_model.bin"
    )


def _flat(about: dict, source: Path) -> dict:
    """The settings in what save_model writes beside the weights, without levels."""
    try:
        config = dict(about["model_config"])
        return config | config.pop("language_model", {})
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{source} doesn't hold a model_config: {error!r}") from error


def _read_transformers_config(config: dict, about: Path) -> dict:
    """The language model's settings in a config.json; refuses what MiniMind doesn't compute."""
    family = config.get("model_type") or "minimind"
    found = {}
    for name, minimind_name in _SETTINGS.items():
        value = config.get(name, config.get(minimind_name))
        if value is not None:
            found[name] = value
    rope = config.get("rope_parameters") or config.get("rope_scaling")
    rope = rope if isinstance(rope, dict) else {}
    rope_type = rope.get("rope_type", rope.get("type"))
    if "rope_theta" in rope:
        found["rope_theta"] = rope["rope_theta"]
    if family in ("llama", "qwen3", "qwen3_moe"):  # what these leave out is transformers' default
        found = {"rope_theta": 1e4, "rms_norm_eps": 1e-6, "qk_norm": family != "llama"} | found
    if config.get("use_moe") or family == "qwen3_moe":
        found.pop("intermediate_size", None)  # may be a dense layer's: the experts' shapes tell
        for name in ("num_experts_per_tok", "norm_topk_prob"):
            if name in config:
                found[name] = config[name]
        if found.get("num_experts_per_tok") == 1 and "n_routed_experts" in config:
            found["norm_topk_prob"] = False  # MiniMind2 never scaled a single weight
    wrong = [name for name, value in found.items() if not isinstance(value, int | float)]
    if wrong:
        raise ValueError(f"{about}: {', '.join(wrong)} must be a number")
    head_dim = found.get("hidden_size", 0) // (found.get("num_attention_heads") or 1)
    problems = {
        f"model_type {family}": family not in _FAMILIES,
        f"rope_type {rope_type}": rope_type not in (None, "default"),
        f"head_dim {config.get('head_dim')}": config.get("head_dim") not in (None, head_dim),
        f"hidden_act {config.get('hidden_act')}": config.get("hidden_act") not in (None, "silu"),
        "use_sliding_window": config.get("use_sliding_window"),
        "dense layers among experts": config.get("mlp_only_layers")
        or config.get("decoder_sparse_step", 1) != 1,
        f"scoring_func {config.get('scoring_func')}": config.get("scoring_func")
        not in (None, "softmax"),
    }
    problems = [problem for problem, there in problems.items() if there]
    if problems:
        raise ValueError(f"{about}: Cinego's language model has no {', '.join(problems)}")
    if family in ("minimind-v", "cinego") and isinstance(config.get("image_ids"), list):
        found["image_ids"] = config["image_ids"]
    return found


def _read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # no JSON, or no UTF-8
        raise ValueError(f"{path} isn't JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold an object")
    return value
