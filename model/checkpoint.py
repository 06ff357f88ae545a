"""Weights on disk: `name.pth` holds the state dict, `name.json` beside it says what it is.

A load either fills every parameter or stops with what didn't fit.
"""

import json
import os
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import torch
from torch import Tensor, nn

from model.cinego import Cinego
from model.config import CinegoConfig, LanguageModelConfig
from model.minimind import MiniMind
from model.vision_tower import VisionTower

_LLM = "language_model."  # the prefix of MiniMind's names within Cinego's


def save_model(path: str | Path, model: Cinego | MiniMind, meta: dict) -> None:
    """Writes `path` (.pth) and its .json: the model's config and `meta`. Whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {name: weight.detach().cpu() for name, weight in model.state_dict().items()}
    about = {"model": type(model).__name__, "model_config": model.config.to_dict(), **meta}
    text = json.dumps(about, indent=2, ensure_ascii=False)
    # The .pth last: where it stands, its description stands too.
    _replace(path.with_suffix(".json"), lambda file: file.write(text.encode()))
    _replace(path, lambda file: torch.save(state, file))


def load_language_model(path: str | Path, **overrides) -> MiniMind:
    """The MiniMind in `path`, in float32 and eval mode.

    The config comes from the .json beside it, or from the shapes where there is none; `overrides`
    (num_attention_heads=8, rope_theta=1e6, …) have the last word. ValueError where it doesn't fit.
    """
    state, config = read_checkpoint(path)
    if "language_model" in config:
        raise ValueError(f"{path} holds a video-language model: use load_video_language_model")
    config = _infer_language_model(path, state, overrides) | config | overrides
    model = MiniMind(LanguageModelConfig.from_dict(config))
    fill(model, state, path)
    return model.eval()


def load_video_language_model(
    path: str | Path, vision_path: str | Path | None = None, **overrides
) -> Cinego:
    """The Cinego in `path`, in float32 and eval mode; with the tower of `vision_path` if given.

    `overrides` are settings of CinegoConfig (image_ids=[…]) or of its language model.
    """
    state, config = read_checkpoint(path)
    own = {f.name for f in fields(CinegoConfig)}
    for_llm = {name: value for name, value in overrides.items() if name not in own}
    config = _infer_cinego(path, state) | config | {k: overrides[k] for k in overrides if k in own}
    llm = {name.removeprefix(_LLM): w for name, w in state.items() if name.startswith(_LLM)}
    inferred = _infer_language_model(path, llm, overrides)
    config["language_model"] = inferred | config.get("language_model", {}) | for_llm
    tower = VisionTower.from_pretrained(vision_path) if vision_path else None
    model = Cinego(CinegoConfig.from_dict(config), tower)
    fill(model, state, path)
    return model.eval()


def read_checkpoint(path: str | Path) -> tuple[dict[str, Tensor], dict]:
    """The state dict, and the model config of the .json beside it ({} without one)."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no checkpoint {path}: train one first, or put the published file there")
    try:
        # weights_only: a checkpoint from the net may hold any code, and this never runs it.
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling raises a dozen types, all of which mean this
        raise ValueError(f"{path} isn't a readable state dict: {error}") from error
    if not (isinstance(state, dict) and all(isinstance(v, Tensor) for v in state.values())):
        raise ValueError(f"{path} isn't a state dict: it must map names to tensors")
    about = path.with_suffix(".json")
    if not about.is_file():
        return state, {}
    try:
        return state, json.loads(about.read_text(encoding="utf-8"))["model_config"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{about} doesn't hold a model_config: {error!r}") from error


def fill(model: nn.Module, state: dict[str, Tensor], source: str | Path) -> None:
    """Loads `state` so that every parameter is set and none is left over, or raises ValueError."""
    state = dict(state)
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    if head in state:  # MiniMind writes the tied weight twice
        if embedding not in state or not torch.equal(state[head], state[embedding]):
            raise ValueError(f"{source}: {head} isn't tied to {embedding}, which Cinego needs")
        del state[head]
    wanted = model.state_dict()
    problems = [f"missing {name}" for name in wanted if name not in state]
    problems += [f"unknown {name}" for name in state if name not in wanted]
    problems += [
        f"{name} is {tuple(state[name].shape)} in the file, {tuple(weight.shape)} in the model"
        for name, weight in wanted.items()
        if name in state and state[name].shape != weight.shape
    ]
    if problems:
        shown = "\n  ".join(problems[:12] + [f"… {len(problems) - 12} more"] * (len(problems) > 12))
        raise ValueError(
            f"{source} is a checkpoint of another size or kind: set the width, layers and heads "
            f"that it was trained with\n  {shown}"
        )
    model.load_state_dict(state, strict=True)


def _infer_language_model(path, state: dict[str, Tensor], overrides: dict) -> dict:
    """What the shapes tell; the number of heads only where q/k norms show a head's width."""
    first = "model.layers.0."
    try:
        vocab_size, hidden_size = state["model.embed_tokens.weight"].shape
        intermediate_size = state[first + "mlp.gate_proj.weight"].shape[0]
        kv_width = state[first + "self_attn.k_proj.weight"].shape[0]
    except KeyError as missing:
        raise ValueError(f"{path} isn't a MiniMind that Cinego can read: no {missing}") from None
    layers = {name.split(".")[2] for name in state if name.startswith("model.layers.")}
    q_norm = state.get(first + "self_attn.q_norm.weight")
    heads = overrides.get(
        "num_attention_heads", 8 if q_norm is None else hidden_size // len(q_norm)
    )
    return {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": len(layers),
        "num_attention_heads": heads,
        "num_key_value_heads": max(1, kv_width * heads // hidden_size),
        "qk_norm": q_norm is not None,
        "rms_norm_eps": 1e-5 if q_norm is None else 1e-6,  # MiniMind-3 changed both at once
    }


def _infer_cinego(path, state: dict[str, Tensor]) -> dict:
    if "vision_proj.weight" not in state:
        raise ValueError(
            f"{path} isn't a video-language model: it has no vision_proj.weight. For a language "
            "model alone use load_language_model"
        )
    width = state["vision_proj.weight"].shape[1]
    found = {"vision_hidden_size": width}
    summary = {n.split(".")[1]: w for n, w in state.items() if n.startswith("video_summary.")}
    if "queries" in summary:
        filters = state["video_summary.spatial.weight"].shape[1] // width - 1
        found |= {"summary": "ours", "num_temporal_filters": filters}
    else:  # nothing tells `mean` from `concat`: that is an override
        found["summary"] = "gpt4video" if "query_s" in summary else "mean"
    queries = summary.get("queries", summary.get("query_s"))
    return found if queries is None else found | {"tokens_per_frame": queries.shape[1]}


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
