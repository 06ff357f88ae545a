"""Weights on disk: `name.pth` holds the state dict, `name.json` beside it says what it is.

A load either fills every parameter or stops with what didn't fit; `model.load_report` says what
was done. Other generations' files, safetensors and transformers' directories load as well:

    print(load_language_model("minimind_512.pth").load_report)
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from model.cinego import Cinego
from model.config import CinegoConfig, LanguageModelConfig
from model.convert import LLM, SUMMARY, Recognised, pair_halves, recognise
from model.lora import merged_state
from model.minimind import MiniMind
from model.video_summary import VideoSummary
from model.vision_tower import VisionTower

# Families in transformers that compute what MiniMind does. Others share the names and differ
# inside (Gemma's norms, SmolLM3's layers without positions), and would answer nonsense.
_FAMILIES = ("llama", "qwen3", "qwen3_moe", "minimind", "minimind-v")
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


@dataclass
class LoadReport:
    """What became of a file; `print` gives it as a paragraph."""

    source: str
    title: str  # the generation
    num_parameters: int = 0
    dtypes: list[str] = field(default_factory=list)
    converted: list[str] = field(default_factory=list)
    assumed: dict = field(default_factory=dict)  # settings that only the generation tells
    left_out: list[str] = field(default_factory=list)  # tensors that the model makes for itself
    initialised: list[str] = field(default_factory=list)  # tensors that the file doesn't have

    def __str__(self) -> str:
        def several(names: list[str]) -> str:
            return ", ".join(names[:3]) + f" and {len(names) - 3} more" * (len(names) > 3)

        assumed = [f"{k} {_brief(v)}" for k, v in self.assumed.items()]
        parts = [
            f"{self.source}: {self.title}, {self.num_parameters / 1e6:.2f} M parameters "
            f"({', '.join(self.dtypes)} → float32)",
            f"converted: {', '.join(self.converted) or 'nothing'}",
            f"assumed, as the file doesn't tell: {', '.join(assumed) or 'nothing'}",
            f"left out: {several(self.left_out) or 'nothing'}",
            f"initialised anew: {several(self.initialised) or 'nothing'}",
        ]
        return "; ".join(parts) + "."


def save_model(path: str | Path, model: Cinego | MiniMind, meta: dict) -> None:
    """Writes `path` (.pth) and its .json: the model's config and `meta`. Whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {name: weight.detach().cpu() for name, weight in merged_state(model).items()}
    about = {"model": type(model).__name__, "model_config": model.config.to_dict(), **meta}
    text = json.dumps(about, indent=2, ensure_ascii=False, sort_keys=True)
    # The .pth last: where it stands, its description stands too.
    _replace(path.with_suffix(".json"), lambda file: file.write(text.encode()))
    _replace(path, lambda file: torch.save(state, file))


def load_language_model(path: str | Path, **overrides) -> MiniMind:
    """The MiniMind in `path`, of any generation, in float32 and eval mode.

    path: a .pth, a .safetensors or a transformers directory. The settings come from the .json
    beside it or the config.json inside, from the shapes where there is none, and for the rest from
    the generation; `overrides` (num_attention_heads=8, rope_theta=1e4, …) have the last word.
    ValueError, with the names, where anything is missing, left over or of another shape.
    """
    state, known = read_checkpoint(path)
    known |= overrides
    found = recognise(state, path, known)
    if found.has_vision:
        raise ValueError(f"{path} holds a video-language model: use load_video_language_model")
    config = LanguageModelConfig.from_dict(found.assumed | found.told | known)
    with torch.device("meta"):  # no memory, and no random numbers that the file replaces
        model = MiniMind(config)
    return _finish(model, found, path, known, fresh={})


def load_video_language_model(
    path: str | Path, vision_path: str | Path | None = None, **overrides
) -> Cinego:
    """The Cinego (ours or of 2025) or MiniMind-V in `path`, with the tower of `vision_path` if any.

    As `load_language_model`; `overrides` are settings of CinegoConfig (image_ids=[…]) or of its
    language model. A `summary` that the file has no weights for starts from random ones.
    """
    state, known = read_checkpoint(path)
    known |= overrides
    found = recognise(state, path, known)
    if not found.has_vision:
        raise ValueError(
            f"{path} isn't a video-language model: it has no vision_proj.weight. For a language "
            "model alone use load_language_model"
        )
    settings = found.assumed | found.told | known
    own = {f.name for f in fields(CinegoConfig)}
    config = {name: settings.pop(name) for name in own & settings.keys()}
    config = CinegoConfig.from_dict(config | {"language_model": settings})
    tower = VisionTower.from_pretrained(vision_path) if vision_path else None
    with torch.device("meta"):
        model = Cinego(config, tower)
    fresh = {}
    if "summary" in overrides and not any(name.startswith(SUMMARY) for name in found.state):
        size = (config.vision_hidden_size, config.tokens_per_frame, config.num_temporal_filters)
        summary = VideoSummary(config.summary, *size)
        fresh = {SUMMARY + name: weight for name, weight in summary.state_dict().items()}
    return _finish(model, found, path, known, fresh)


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


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                names = list(file.keys())
            state = {}
            for name in names:  # opened anew each time: a page once read stays mapped until closed
                with safe_open(path, framework="pt") as file:
                    state[name] = file.get_tensor(name).clone()
            return state
        # weights_only: a checkpoint from the net may hold any code, and this never runs it.
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # readers raise a dozen types, all of which mean this
        raise ValueError(f"{path} isn't a readable state dict: {error}") from error
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(weight, Tensor) for name, weight in state.items()
    ):
        raise ValueError(f"{path} isn't a state dict: it must map names to tensors")
    return dict(state)


def _read_directory(directory: Path) -> tuple[dict[str, Tensor], dict]:
    """What transformers' save_pretrained wrote: one file of weights, or several with an index."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (directory / name).is_file():
            state = _read_tensors(directory / name)
            break
        if (index := directory / f"{name}.index.json").is_file():
            parts = set(_read_json(index).get("weight_map", {}).values())
            if any(Path(part).name != part for part in parts):
                raise ValueError(f"{index} names files outside of {directory}")
            state = {}
            for part in sorted(parts):
                if not (directory / part).is_file():
                    raise ValueError(f"{index} names {part}, which is missing: copy it there")
                state |= _read_tensors(directory / part)
            break
    else:
        raise ValueError(
            f"no checkpoint in {directory}: a transformers directory has config.json and "
            "model.safetensors or pytorch_model.bin"
        )
    about = directory / "config.json"
    if not about.is_file():
        raise ValueError(f"{about} is missing: copy the model's config there")
    config = _read_json(about)
    # What scripts/convert_checkpoint.py wrote brings our own settings along, and its tower.
    exported = config.get("cinego")
    ours = _flat(exported, about) if exported is not None else {}
    if config.get("model_type") != "cinego":
        return state, ours | _read_transformers_config(config, about)
    for name in [name for name in state if name.startswith("vision_tower.")]:
        del state[name]
    return {name.removeprefix("cinego."): state.pop(name) for name in list(state)}, ours


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
    return found


def _read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # no JSON, or no UTF-8
        raise ValueError(f"{path} isn't JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold an object")
    return value


def _finish(model, found: Recognised, source, known: dict, fresh: dict[str, Tensor]):
    """Fills `model`, which has no memory yet, and hands it over with its report."""
    dtypes = sorted({str(w.dtype).removeprefix("torch.") for w in found.state.values()})
    found.state |= fresh
    config = getattr(model.config, "language_model", model.config)
    fill(model, found.state, source, config.head_dim if found.interleaved else None)
    model.load_report = LoadReport(
        source=str(source),
        title=found.title,
        num_parameters=sum(p.numel() for p in model.parameters()),
        dtypes=dtypes,
        converted=found.converted,
        assumed={name: value for name, value in found.assumed.items() if name not in known},
        left_out=found.left_out,
        initialised=list(fresh),
    )
    return model.eval()


def fill(
    model: nn.Module, state: dict[str, Tensor], source: str | Path, interleaved: int | None = None
) -> None:
    """Moves `state` into `model` so that every parameter is set and none is left over, in float32.

    interleaved: the width of a head where q and k still have their rows in pairs 2i, 2i+1.
    `state` is emptied on the way, so that no more than one tensor is in memory twice. Raises
    ValueError, before anything is moved, with all names that don't fit.
    """
    prefix = LLM if any(name.startswith(LLM) for name in state) else ""
    head, embedding = f"{prefix}lm_head.weight", f"{prefix}model.embed_tokens.weight"
    if head in state:  # MiniMind writes the tied weight twice
        if embedding not in state or not torch.equal(state[head], state[embedding]):
            raise ValueError(f"{source}: {head} isn't tied to {embedding}, which Cinego needs")
        del state[head]
    wanted = model.state_dict()
    shapes = [
        f"{name} is {tuple(state[name].shape)} in the file, {tuple(weight.shape)} in the model"
        for name, weight in wanted.items()
        if name in state and state[name].shape != weight.shape
    ]
    missing = [f"missing {name}" for name in wanted if name not in state]
    unknown = [f"unknown {name}" for name in state if name not in wanted]
    problems = []
    for kind in (missing, unknown, shapes):
        problems += kind[:6] + [f"… {len(kind) - 6} more"] * (len(kind) > 6)
    if problems:
        raise ValueError(
            f"{source} is a checkpoint of another size or kind: set the width, layers and heads "
            "that it was trained with\n  " + "\n  ".join(problems)
        )
    for name in wanted:
        weight = state.pop(name)
        if interleaved and name.endswith(("q_proj.weight", "k_proj.weight")):
            weight = pair_halves(weight, interleaved)
        # A copy: two names in the file may share memory, and would then be trained as one.
        wanted[name] = torch.empty(weight.shape, dtype=torch.float32).copy_(weight)
    model.load_state_dict(wanted, strict=True, assign=True)


def _brief(value) -> str:
    """Placeholder ids are long and dull: 34 x 197."""
    if not isinstance(value, list):
        return f"{value:g}" if isinstance(value, float) else str(value)
    runs = [f"{i} x {value.count(i)}" for i in dict.fromkeys(value)]
    return " + ".join(runs)


def _replace(path: Path, write: Callable) -> None:
    """Writes beside `path` and renames: a reader, or a crash, never meets half a file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
