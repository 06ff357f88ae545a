"""Weights as others wrote them, brought to our names and settings. Nothing in a file is ever run.

Four generations of MiniMind have been published. Ours has the names and the rotary pairs (of
channels i and i + E/2, where a head has E) of the last two, so the first two are converted:

    MiniMind, Oct 2024    layers.0.attention.wq …            pairs 2i, 2i+1   theta 1e4
    MiniMind2, Feb 2025   the same                           the same         theta 1e6
    MiniMind2, Apr 2025   model.layers.0.self_attn.q_proj …  pairs i, i+E/2   theta 1e6
    MiniMind-3, 2026      the same, and q_norm, k_norm       the same         theta 1e6

Each may be a mixture of experts: two of four and a shared one for a token up to MiniMind2, one of
four in MiniMind-3. MiniMind-V (a linear projector) and Cinego 2025 (a two-branch summary, too)
stand on one of them. A transformers directory of the same architecture loads as well.
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

LLM = "language_model."  # the prefix of MiniMind's names within Cinego's
PROJECTOR, SUMMARY = "vision_proj.", "video_summary."

# What torch.compile, DDP and scripts/export_hf.py put into names.
_WRAPPER = re.compile(r"(^|\.)(_orig_mod|module|cinego)(?=\.)")
# Tables that a model computes for itself, and the tower, which comes from its own directory.
_UNNEEDED = re.compile(
    r"(^|\.)(pos_cis|freqs_cos|freqs_sin|inv_freq)$|\.attention\.mask$|^vision_(encoder|tower)\."
)
_VISION_NAMES = (
    (re.compile(r"^vision_proj\.vision_proj\.0\."), PROJECTOR),  # MiniMind-V
    (re.compile(r"^video_summarizer\."), SUMMARY),  # Cinego 2025
)
_OLD_NAMES = (
    (re.compile(r"^tok_embeddings\."), "model.embed_tokens."),
    (re.compile(r"^norm\."), "model.norm."),
    (re.compile(r"^output\."), "lm_head."),
    (re.compile(r"^layers\."), "model.layers."),
    (re.compile(r"\.attention\.w([qkvo])\."), r".self_attn.\1_proj."),
    (re.compile(r"\.feed_forward\."), ".mlp."),
    (re.compile(r"\.shared_experts\.w"), ".shared_experts.0.w"),
    (re.compile(r"\.w1\.(?=weight$)"), ".gate_proj."),
    (re.compile(r"\.w2\.(?=weight$)"), ".down_proj."),
    (re.compile(r"\.w3\.(?=weight$)"), ".up_proj."),
    (re.compile(r"\.attention_norm\."), ".input_layernorm."),
    (re.compile(r"\.ffn_norm\."), ".post_attention_layernorm."),
)
# Families in transformers that compute what MiniMind does. Others share the names and differ
# inside (Gemma's norms, SmolLM3's layers without positions), and would answer nonsense.
_FAMILIES = ("llama", "qwen3", "qwen3_moe", "minimind", "minimind-v", "cinego")
_SETTINGS = {  # of LanguageModelConfig: in MiniMind's own config.json, where its name differs
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "rms_norm_eps": "norm_eps",
    **dict.fromkeys(("vocab_size", "intermediate_size", "max_position_embeddings", "rope_theta")),
}


@dataclass
class LoadReport:
    """What is known of a file's weights, and what became of them; `print` gives a paragraph."""

    state: dict[str, Tensor]  # under our names; empty once a model has taken the tensors over
    source: str | Path
    given: dict  # settings from elsewhere: files beside it, overrides
    title: str = ""  # the generation
    has_vision: bool = False
    interleaved: bool = False  # rows of q and k are still in the order of pairs 2i, 2i+1
    inferred: dict = field(default_factory=dict)  # settings that the shapes tell,
    assumed: dict = field(default_factory=dict)  # and those that only the generation does
    left_out: list[str] = field(default_factory=list)  # tensors that the model makes for itself
    num_parameters: int = 0

    def __str__(self) -> str:
        assumed = ", ".join(f"{name} {_brief(value)}" for name, value in self.assumed.items())
        more = len(self.left_out) - 3
        left_out = ", ".join(self.left_out[:3] + [f"{more} more"] * (more > 0))
        return (
            f"{self.source}: {self.title}, {self.num_parameters / 1e6:.2f} M parameters; "
            f"assumed, as the file doesn't say: {assumed or 'nothing'}; "
            f"left out: {left_out or 'nothing'}."
        )


def _brief(value) -> str:
    """Placeholder ids are long and dull: 34 x 197."""
    if not isinstance(value, list):
        return f"{value:g}" if isinstance(value, float) else str(value)
    return " + ".join(f"{i} x {value.count(i)}" for i in dict.fromkeys(value))


def import_weights(path: str | Path, overrides: dict) -> LoadReport:
    """The weights in `path` (.pth, .safetensors or a transformers directory) under our names.

    overrides: settings that decide over those beside the weights. Raises ValueError for what isn't
    a checkpoint, or none of the models above.
    """
    path = Path(path)
    if path.is_dir():
        state, given = _read_directory(path)
    elif path.is_file():
        state, about = read_tensors(path), path.with_suffix(".json")
        given = _flat_settings(read_json(about), about) if about.is_file() else {}
    else:
        raise ValueError(f"no checkpoint {path}: train one first, or put the published file there")
    try:
        return _recognise(state, path, given | overrides)
    except (TypeError, ZeroDivisionError) as error:  # numbers that aren't, or none
        raise ValueError(f"{path} has impossible settings: {error}") from error


# ---- files


def read_json(path: Path) -> dict:
    """The object in a JSON file; ValueError where it is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # no JSON, or no UTF-8
        raise ValueError(f"{path} isn't JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold an object")
    return value


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors in a .pth or .safetensors by name.

    ValueError for what isn't a plain state dict. weights_only: a checkpoint from the net may hold
    any code, and this never runs it.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
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
    return state


def _read_directory(directory: Path) -> tuple[dict[str, Tensor], dict]:
    """What transformers' save_pretrained wrote."""
    about, names = directory / "config.json", ("model.safetensors", "pytorch_model.bin")
    file = next((directory / name for name in names if (directory / name).is_file()), None)
    if file is None or not about.is_file():
        raise ValueError(
            f"no checkpoint in {directory}: a transformers directory has config.json and "
            f"{' or '.join(names)}, in one piece"
        )
    config = read_json(about)
    # What scripts/export_hf.py wrote brings our own settings along, and its tower.
    exported = config.get("cinego")
    given = {} if exported is None else _flat_settings(exported, about)
    if exported is None or config.get("model_type") != "cinego":  # 2025's is "cinego", too
        given |= _transformers_settings(config, about)
    return read_tensors(file), given


def _flat_settings(about: dict, source: Path) -> dict:
    """The settings in what save_model writes beside the weights, without levels."""
    try:
        config = dict(about["model_config"])
        return config | config.pop("language_model", {})
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{source} doesn't hold a model_config: {error!r}") from error


def _transformers_settings(config: dict, about: Path) -> dict:
    """The language model's settings in a config.json; refuses what MiniMind doesn't compute."""
    family = config.get("model_type") or "minimind"
    found = {name: config.get(name, config.get(theirs)) for name, theirs in _SETTINGS.items()}
    found = {name: value for name, value in found.items() if value is not None}
    rope = config.get("rope_parameters") or config.get("rope_scaling")
    rope = rope if isinstance(rope, dict) else {}
    if "rope_theta" in rope:
        found["rope_theta"] = rope["rope_theta"]
    if family in ("llama", "qwen3", "qwen3_moe"):  # what these leave out is transformers' default
        found = {"rope_theta": 1e4, "rms_norm_eps": 1e-6, "qk_norm": family != "llama"} | found
    if config.get("use_moe") or family == "qwen3_moe":
        found.pop("intermediate_size", None)  # may be a dense layer's: the experts' shapes tell
        names = ("num_experts_per_tok", "norm_topk_prob")
        found |= {name: config[name] for name in names if name in config}
        if found.get("num_experts_per_tok") == 1 and "n_routed_experts" in config:
            found["norm_topk_prob"] = False  # MiniMind2 never scaled a single weight

    rope_type, act = rope.get("rope_type", rope.get("type")), config.get("hidden_act")
    scoring, sparse_step = config.get("scoring_func"), config.get("decoder_sparse_step", 1)
    misfits = {
        f"model_type {family}": family not in _FAMILIES,
        "use_sliding_window": config.get("use_sliding_window"),
        "dense layers among experts": config.get("mlp_only_layers") or sparse_step != 1,
        f"rope_type {rope_type}": rope_type not in (None, "default"),
        f"hidden_act {act}": act not in (None, "silu"),
        f"scoring_func {scoring}": scoring not in (None, "softmax"),
    }
    if problems := [name for name, is_there in misfits.items() if is_there]:
        raise ValueError(f"{about}: Cinego's language model has no {', '.join(problems)}")
    if family in ("minimind-v", "cinego") and isinstance(config.get("image_ids"), list):
        found["image_ids"] = config["image_ids"]
    return found


# ---- generations


def _recognise(state: dict[str, Tensor], source: Path, given: dict) -> LoadReport:
    """Reads the generation from names and shapes. Tensors move over from `state`, uncopied."""
    plain = {name: _WRAPPER.sub("", name).removeprefix(".") for name in state}
    left_out = [name for name in state if _UNNEEDED.search(plain[name])]
    for name in left_out:
        del state[name], plain[name]
    # Quantised weights would be read as nonsense, and a crafted tensor that claims a shape that its
    # bytes don't fill would fill the memory once it is copied.
    floats = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    odd = [
        f"{name} ({weight.dtype}, {tuple(weight.shape)})"
        for name, weight in state.items()
        if weight.dtype not in floats
        or weight.layout != torch.strided
        or weight.nbytes > weight.untyped_storage().nbytes()
    ]
    if odd:
        raise ValueError(
            f"{source} isn't a readable state dict: these aren't whole tensors of floating-point "
            f"numbers: {', '.join(odd[:6])}"
        )

    def has(*starts: str) -> bool:
        return any(name.startswith(starts) for name in plain.values())

    ancestor = "Cinego 2025" if has("video_summarizer.") else "Cinego"
    if has(PROJECTOR + PROJECTOR):
        ancestor = "MiniMind-V"
    has_vision = ancestor != "Cinego" or has(LLM, PROJECTOR, SUMMARY)
    old = has("tok_embeddings.")
    found = LoadReport({}, source, given, has_vision=has_vision, interleaved=old, left_out=left_out)
    for name, new in plain.items():
        for theirs, our in _VISION_NAMES + (_OLD_NAMES if old else ()):
            new = theirs.sub(our, new)
        if has_vision and not new.startswith((LLM, PROJECTOR, SUMMARY)):
            new = LLM + new
        if new in found.state:
            raise ValueError(f"{source} has {new} twice, the second time as {name}")
        found.state[new] = state.pop(name)
    prefix = LLM if has_vision else ""
    head, embedding = f"{prefix}lm_head.weight", f"{prefix}model.embed_tokens.weight"
    if head in found.state:  # MiniMind writes the tied weight twice
        weight = found.state.pop(head)
        # safetensors' save_model keeps one name of a shared tensor, the first by alphabet.
        if not torch.equal(weight, found.state.setdefault(embedding, weight)):
            raise ValueError(f"{source}: {head} isn't tied to {embedding}, which Cinego needs")
    found.title = _infer_language_model(found, prefix)
    if has_vision:
        _infer_vision(found, ancestor)
        found.title = f"{ancestor} on {found.title}"
    found.assumed = {name: v for name, v in found.assumed.items() if name not in given}
    return found


def pair_halves(weight: Tensor, head_dim: int) -> Tensor:
    """(H · E, C) rows of q or k for rotary pairs (2i, 2i+1) → for pairs (i, i + E/2), head by head.

    Queries and keys move alike, so their products stay, and attention sees nothing else of them.
    """
    return weight.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def _matrix(found: LoadReport, name: str) -> Tensor:
    if name in found.state and found.state[name].ndim == 2:
        return found.state[name]
    raise ValueError(
        f"{found.source} isn't a MiniMind that Cinego can read: no matrix {name} among its "
        f"{len(found.state)} tensors ({', '.join(list(found.state)[:4])}, …)"
    )


def _count(state: dict[str, Tensor], start: str) -> int:
    """Members of the list whose names begin with `start`."""
    return len({name.removeprefix(start).split(".")[0] for name in state if name.startswith(start)})


def _infer_language_model(found: LoadReport, prefix: str) -> str:
    """Fills in the language model's settings; gives the generation."""
    given, first = found.given, f"{prefix}model.layers.0."
    vocab_size, width = _matrix(found, prefix + "model.embed_tokens.weight").shape
    kv_width = len(_matrix(found, first + "self_attn.k_proj.weight"))
    q_norm = found.state.get(first + "self_attn.q_norm.weight")

    theta, eps, heads = 1e6, 1e-5, 8
    if found.interleaved and 2 * kv_width >= width:
        # Names don't tell Oct 2024 from Feb 2025, but 2 queries share a key there, and 4 here.
        title, theta = "MiniMind, Oct 2024", 1e4
        # None narrower than 512 was published, and in 16 its heads would be slivers.
        heads = 16 if width >= 512 else 8
    elif found.interleaved:
        title = "MiniMind2, Feb 2025"
    elif q_norm is None:
        title = "MiniMind2, Apr 2025"
    else:
        title, eps = "MiniMind-3", 1e-6

    if "num_attention_heads" in given:
        heads = given["num_attention_heads"]
    elif q_norm is not None:
        heads = width // len(q_norm)
    else:
        found.assumed["num_attention_heads"] = heads
    found.assumed |= {"rope_theta": theta, "rms_norm_eps": eps}
    mlp = first + "mlp."
    if mlp + "gate.weight" in found.state:
        routed = found.inferred["num_experts"] = len(_matrix(found, mlp + "gate.weight"))
        found.inferred["num_shared_experts"] = _count(found.state, mlp + "shared_experts.")
        # How many of them a token takes, no shape tells.
        usual = min(2 if q_norm is None else 1, routed)
        # MiniMind2 leaves a single weight as it is, MiniMind-3 makes it 1.
        normalise = given.get("num_experts_per_tok", usual) > 1 or q_norm is not None
        found.assumed |= {"num_experts_per_tok": usual, "norm_topk_prob": normalise}
        title, mlp = f"{title}, mixture of {routed} experts", mlp + "experts.0."
    found.inferred |= {
        "vocab_size": vocab_size,
        "hidden_size": width,
        "intermediate_size": len(_matrix(found, mlp + "gate_proj.weight")),
        "num_hidden_layers": _count(found.state, prefix + "model.layers."),
        "num_attention_heads": heads,
        "num_key_value_heads": max(1, kv_width * heads // width),
        "qk_norm": q_norm is not None,
    }
    return title


def _infer_vision(found: LoadReport, ancestor: str) -> None:
    """Fills in the settings of CinegoConfig."""
    width = found.inferred["vision_hidden_size"] = _matrix(found, PROJECTOR + "weight").shape[1]
    queries = found.state.get(SUMMARY + "queries", found.state.get(SUMMARY + "query_s"))
    if queries is None:
        # Nothing tells `mean` from `concat`; for the images of MiniMind-V they are the same.
        found.assumed["summary"] = "mean"
    else:
        found.inferred |= {"summary": "gpt4video", "tokens_per_frame": queries.shape[-2:][0]}
    if SUMMARY + "spatial.weight" in found.state:
        coefficients = _matrix(found, SUMMARY + "spatial.weight").shape[1]
        found.inferred |= {"summary": "dct", "num_temporal_filters": coefficients // width - 1}

    if ancestor == "Cinego 2025":
        found.assumed["image_ids"] = [34] * found.inferred.get("tokens_per_frame", 197)
    elif ancestor == "MiniMind-V":
        # Oct 2024: 50 tokens of ViT-B/32 for 25 "<" and 25 ">". Later: 196 of ViT-B/16 for "@".
        first = found.title.startswith("MiniMind, Oct 2024")
        ids = found.given.get("image_ids") or ([30] * 25 + [32] * 25 if first else [34] * 196)
        found.assumed |= {"image_ids": ids, "tokens_per_frame": len(ids)}
