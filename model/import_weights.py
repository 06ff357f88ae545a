"""Any MiniMind's state dict, under our names and with the settings that its shapes tell.

Four generations of the language model have been published. Ours has the names and the rotary pairs
(of channels i and i + E/2, where a head has E) of the last two, so the first two are converted:

    MiniMind, Oct 2024    layers.0.attention.wq …            pairs 2i, 2i+1   theta 1e4
    MiniMind2, Feb 2025   the same                           the same         theta 1e6
    MiniMind2, Apr 2025   model.layers.0.self_attn.q_proj …  pairs i, i+E/2   theta 1e6
    MiniMind-3, 2026      the same, and q_norm, k_norm       the same         theta 1e6

Each may be a mixture of experts: two of four and a shared one for a token up to MiniMind2, one of
four in MiniMind-3. MiniMind-V (a linear projector) and Cinego 2025 (a two-branch summary, too)
stand on one of them.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

LLM = "language_model."  # the prefix of MiniMind's names within Cinego's
PROJECTOR, SUMMARY = "vision_proj.", "video_summary."

# What torch.compile and DDP put into names.
_WRAPPER = re.compile(r"(^|\.)(_orig_mod|module)(?=\.)")
# Tables that a model computes for itself, and the tower, which comes from its own directory.
_UNNEEDED = re.compile(
    r"(^|\.)(pos_cis|freqs_cos|freqs_sin|inv_freq)$|\.attention\.mask$|^vision_encoder\."
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


@dataclass
class Recognised:
    state: dict[str, Tensor]  # under our names
    source: str | Path  # where it comes from, for messages
    known: dict  # settings from elsewhere: files beside it, overrides
    title: str = ""
    has_vision: bool = False
    interleaved: bool = False  # rows of q and k are still in the order of pairs 2i, 2i+1
    told: dict = field(default_factory=dict)  # settings that the shapes tell,
    assumed: dict = field(default_factory=dict)  # and those that only the generation does
    converted: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


def recognise(state: dict[str, Tensor], source: str | Path, known: dict) -> Recognised:
    """Reads the generation of `state` from names and shapes. Its tensors move over, uncopied.

    known: settings from elsewhere. They decide where shapes leave a choice: 64 rows may be 4 heads
    or 8. Raises ValueError where it is no MiniMind.
    """
    plain = {name: _WRAPPER.sub("", name).removeprefix(".") for name in state}
    left_out = [name for name in state if _UNNEEDED.search(plain[name])]
    for name in left_out:
        del state[name], plain[name]
    _check_tensors(state, source)
    _check_settings(known, source)

    def has(*starts: str) -> bool:
        return any(name.startswith(starts) for name in plain.values())

    old, ours = has("tok_embeddings."), has(LLM)
    ancestor = "Cinego"
    if has("vision_proj.vision_proj."):
        ancestor = "MiniMind-V"
    elif has("video_summarizer."):
        ancestor = "Cinego 2025"
    has_vision = ours or ancestor != "Cinego" or has(PROJECTOR, SUMMARY)
    found = Recognised({}, source, known, has_vision=has_vision, interleaved=old, left_out=left_out)
    for name, new in plain.items():
        for theirs, our in _VISION_NAMES + (_OLD_NAMES if old else ()):
            new = theirs.sub(our, new)
        if has_vision and not new.startswith((LLM, PROJECTOR, SUMMARY)):
            new = LLM + new
        for part, weight in _unfuse(new, state.pop(name)).items():
            if part in found.state:
                raise ValueError(f"{source} has {part} twice, the second time as {name}")
            found.state[part] = weight
    prefix = LLM if has_vision else ""
    head, embedding = f"{prefix}lm_head.weight", f"{prefix}model.embed_tokens.weight"
    tied = head in found.state and embedding not in found.state
    if tied:  # safetensors' save_model keeps one name of a shared tensor, the first by alphabet
        found.state[embedding] = found.state.pop(head)
    changes = {
        "wrappers' prefixes": list(plain) != list(plain.values()),
        "names": old or (has_vision and not ours),
        "fused matrices": len(found.state) > len(plain),
        "order of rotary pairs": old,
        "head as embeddings": tied,
    }
    found.converted = [change for change, happened in changes.items() if happened]

    found.title = _read_language_model(found)
    if has_vision:
        _read_vision(found, ancestor)
        found.title = f"{ancestor} on {found.title}"
    return found


def pair_halves(weight: Tensor, head_dim: int) -> Tensor:
    """Rows of q or k for pairs (2i, 2i+1) → rows for pairs (i, i + E/2), within each head.

    Queries and keys move alike, so their products stay, and attention sees nothing else of them.
    """
    return weight.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def _check_tensors(state: dict[str, Tensor], source) -> None:
    """A crafted tensor claims a shape that its bytes don't fill: copied, it fills the memory."""
    floats = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    odd = [
        f"{name} ({weight.dtype}, {tuple(weight.shape)})"
        for name, weight in state.items()
        if weight.dtype not in floats
        or weight.layout != torch.strided
        or weight.numel() == 0
        or weight.ndim == 0
        or weight.nbytes > weight.untyped_storage().nbytes()
    ]
    if odd:
        raise ValueError(
            f"{source} isn't a readable state dict: these aren't whole tensors of floating-point "
            f"numbers: {', '.join(odd[:6])}"
        )


def _check_settings(known: dict, source) -> None:
    """Of those that are reckoned with below; the model's config checks all of them."""
    for name in ("num_attention_heads", "num_key_value_heads", "num_experts_per_tok"):
        value = known.get(name, 1)
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{source}: {name} must be a positive number, not {value!r}")


def _unfuse(name: str, weight: Tensor) -> dict[str, Tensor]:
    """Some serving engines write q, k and v, or gate and up, as one matrix."""
    if name.endswith(".qkv_proj.weight"):
        width = weight.shape[-1]  # q's rows; the rest is half k, half v
        parts = weight.tensor_split((width, (weight.shape[0] + width) // 2))
        names = ("q_proj", "k_proj", "v_proj")
    elif name.endswith(".gate_up_proj.weight"):
        parts, names = weight.tensor_split(2), ("gate_proj", "up_proj")
    else:
        return {name: weight}
    start = name.rsplit(".", 2)[0]
    return {f"{start}.{n}.weight": part for n, part in zip(names, parts, strict=True)}


def _matrix(found: Recognised, name: str) -> Tensor:
    if name in found.state and found.state[name].ndim == 2:
        return found.state[name]
    raise ValueError(
        f"{found.source} isn't a MiniMind that Cinego can read: no matrix {name} among its "
        f"{len(found.state)} tensors ({', '.join(list(found.state)[:4])}, …)"
    )


def _count(state: dict[str, Tensor], start: str) -> int:
    """Members of the list whose names begin with `start`."""
    return len({name.removeprefix(start).split(".")[0] for name in state if name.startswith(start)})


def _read_language_model(found: Recognised) -> str:
    """Fills in the settings; gives the generation."""
    prefix = LLM if found.has_vision else ""
    first = f"{prefix}model.layers.0."
    vocab_size, width = _matrix(found, prefix + "model.embed_tokens.weight").shape
    kv_width = len(_matrix(found, first + "self_attn.k_proj.weight"))
    q_norm = found.state.get(first + "self_attn.q_norm.weight")

    theta, eps, usual_heads = 1e6, 1e-5, 8
    if found.interleaved and 2 * kv_width >= width:
        # Names don't tell Oct 2024 from Feb 2025, but 2 queries share a key there, and 4 here.
        title, theta = "MiniMind, Oct 2024", 1e4
        if width >= 512:  # no narrower one was published, and in 16 its heads would be slivers
            usual_heads = 16
    elif found.interleaved:
        title = "MiniMind2, Feb 2025"
    elif q_norm is None:
        title = "MiniMind2, Apr 2025"
    else:
        title, eps = "MiniMind-3", 1e-6

    if "num_attention_heads" in found.known:
        heads = found.known["num_attention_heads"]
    elif q_norm is not None:
        heads = width // len(q_norm)
    elif "num_key_value_heads" in found.known:
        heads = width * found.known["num_key_value_heads"] // kv_width
    else:
        heads = found.assumed["num_attention_heads"] = usual_heads
    found.assumed |= {"rope_theta": theta, "rms_norm_eps": eps}
    mlp = first + "mlp."
    if mlp + "gate.weight" in found.state:
        routed = found.told["num_experts"] = len(_matrix(found, mlp + "gate.weight"))
        found.told["num_shared_experts"] = _count(found.state, mlp + "shared_experts.")
        # How many of them a token takes, no shape tells.
        usual = min(2 if q_norm is None else 1, routed)
        chosen = found.known.get("num_experts_per_tok", usual)
        # MiniMind2 leaves a single weight as it is, MiniMind-3 makes it 1.
        normalise = chosen > 1 or q_norm is not None
        found.assumed |= {"num_experts_per_tok": usual, "norm_topk_prob": normalise}
        title, mlp = f"{title}, mixture of {routed} experts", mlp + "experts.0."
    found.told |= {
        "vocab_size": vocab_size,
        "hidden_size": width,
        "intermediate_size": len(_matrix(found, mlp + "gate_proj.weight")),
        "num_hidden_layers": _count(found.state, prefix + "model.layers."),
        "num_attention_heads": heads,
        "num_key_value_heads": max(1, kv_width * heads // width),
        "qk_norm": q_norm is not None,
    }
    return title


def _read_vision(found: Recognised, ancestor: str) -> None:
    width = _matrix(found, PROJECTOR + "weight").shape[1]
    found.told["vision_hidden_size"] = width
    queries = found.state.get(SUMMARY + "queries", found.state.get(SUMMARY + "query_s"))
    if queries is None:
        # Nothing tells `mean` from `concat`; for the images of MiniMind-V they are the same.
        found.assumed["summary"] = "mean"
    else:
        found.told |= {"summary": "gpt4video", "tokens_per_frame": queries.shape[-2:][0]}
    if SUMMARY + "spatial.weight" in found.state:
        courses = _matrix(found, SUMMARY + "spatial.weight").shape[1]
        found.told |= {"summary": "dct", "num_temporal_filters": courses // width - 1}

    if ancestor == "Cinego 2025":
        found.assumed["image_ids"] = [34] * found.told.get("tokens_per_frame", 197)
    elif ancestor == "MiniMind-V":
        # Oct 2024: 50 tokens of ViT-B/32 for 25 "<" and 25 ">". Later: 196 of ViT-B/16 for "@".
        first = found.title.startswith("MiniMind, Oct 2024")
        ids = found.known.get("image_ids") or ([30] * 25 + [32] * 25 if first else [34] * 196)
        found.assumed |= {"image_ids": ids, "tokens_per_frame": len(ids)}
