"""What MiniMind of Oct 2024 and Feb 2025, and Cinego of 2025, save and compute, written out.

In their names and conventions, and not by our code: rotary pairs of neighbouring channels, experts
looked up token by token, torch's own attention.
"""

import torch
import torch.nn.functional as F
from torch import nn


def old_state(width=64, heads=8, kv_heads=2, layers=2, vocab=96, hidden=96):
    torch.manual_seed(0)
    kv_width = width // heads * kv_heads

    def weight(*shape):
        return torch.randn(shape) * 0.2

    state = {"tok_embeddings.weight": weight(vocab, width), "norm.weight": 1 + weight(width)}
    for i in range(layers):
        shapes = {
            **{"attention.wq": (width, width), "attention.wo": (width, width)},
            **{"attention.wk": (kv_width, width), "attention.wv": (kv_width, width)},
            **{"feed_forward.w1": (hidden, width), "feed_forward.w3": (hidden, width)},
            "feed_forward.w2": (width, hidden),
        }
        state |= {f"layers.{i}.{name}.weight": weight(*shape) for name, shape in shapes.items()}
        for name in ("attention_norm", "ffn_norm"):
            state[f"layers.{i}.{name}.weight"] = 1 + weight(width)
    state["output.weight"] = state["tok_embeddings.weight"]
    return state


def old_rotate(x, theta):
    """(L, H, E): channels 2i and 2i+1 are a complex number, turned by its place."""
    length, _, width = x.shape
    frequencies = theta ** (-torch.arange(0, width, 2) / width)
    angles = torch.arange(length)[:, None] * frequencies
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turn).flatten(-2)


def old_feed_forward(layer, y, top_k=2):
    """(L, C): SwiGLU, or for each token that of its most probable experts and of the shared one."""

    def swiglu(y, module="feed_forward"):
        w1, w2, w3 = (layer[f"{module}.w{i}.weight"] for i in (1, 2, 3))
        return (F.silu(y @ w1.T) * (y @ w3.T)) @ w2.T

    if "feed_forward.gate.weight" not in layer:
        return swiglu(y)
    rows = []
    for token in y:
        scores = (layer["feed_forward.gate.weight"] @ token).softmax(0)
        best = scores.argsort(descending=True)[:top_k].tolist()
        total = sum(scores[e] for e in best)
        routed = sum(scores[e] / total * swiglu(token, f"feed_forward.experts.{e}") for e in best)
        rows.append(routed + swiglu(token, "feed_forward.shared_experts"))
    return torch.stack(rows)


def old_forward(state, x, heads, kv_heads, theta, eps=1e-5):
    """Logits (L, vocabulary) of one row of embeddings (L, C)."""

    def norm(x, name):
        return F.rms_norm(x, x.shape[-1:], state[f"{name}.weight"], eps)

    length = len(x)
    future = torch.ones(length, length).triu(1).bool()
    for i in range(sum(name.endswith("wq.weight") for name in state)):
        layer = {k.split(".", 2)[2]: v for k, v in state.items() if k.startswith(f"layers.{i}.")}
        y = norm(x, f"layers.{i}.attention_norm")
        q = old_rotate((y @ layer["attention.wq.weight"].T).unflatten(-1, (heads, -1)), theta)
        k = old_rotate((y @ layer["attention.wk.weight"].T).unflatten(-1, (kv_heads, -1)), theta)
        v = (y @ layer["attention.wv.weight"].T).unflatten(-1, (kv_heads, -1))
        k, v = (t.repeat_interleave(heads // kv_heads, 1) for t in (k, v))
        scores = torch.einsum("qhe,khe->hqk", q, k) / q.shape[-1] ** 0.5
        mixed = torch.einsum("hqk,khe->qhe", scores.masked_fill(future, -torch.inf).softmax(-1), v)
        x = x + mixed.flatten(1) @ layer["attention.wo.weight"].T
        x = x + old_feed_forward(layer, norm(x, f"layers.{i}.ffn_norm"))
    return norm(x, "norm") @ state["tok_embeddings.weight"].T


def with_experts(state, routed=4):
    """Each layer's feed_forward becomes a router, `routed` experts and a shared one."""
    for i in range(2):
        module = f"layers.{i}.feed_forward"
        weights = {f"w{k}": state.pop(f"{module}.w{k}.weight") for k in (1, 2, 3)}
        for expert in (*(f"experts.{e}" for e in range(routed)), "shared_experts"):
            for name, weight in weights.items():
                state[f"{module}.{expert}.{name}.weight"] = 0.2 * torch.randn(weight.shape)
        state[f"{module}.gate.weight"] = torch.randn(routed, weights["w1"].shape[1])
    return state


def add_projector(state, name, vision_width):
    """One linear layer, into `state`: MiniMind-V is nothing more."""
    torch.manual_seed(1)
    width = state["norm.weight"].shape[0]
    state[f"{name}.weight"] = torch.randn(width, vision_width) * 0.2
    state[f"{name}.bias"] = torch.randn(width)
    return state[f"{name}.weight"], state[f"{name}.bias"]


def cinego_2025(vision_width, tokens=197, **sizes):
    """A state dict, and the queries and the attention of its two branches."""
    state, branches = old_state(**{"heads": 8, "kv_heads": 2, **sizes}), []
    add_projector(state, "vision_proj", vision_width)
    for branch in "st":
        attention = nn.MultiheadAttention(vision_width, 8, batch_first=True).eval()
        nn.init.normal_(attention.in_proj_bias)
        queries = torch.randn(1, tokens, vision_width)
        state[f"video_summarizer.query_{branch}"] = queries
        for name, parameter in attention.state_dict().items():
            state[f"video_summarizer.cross_attn_{branch}.0.mha.{name}"] = parameter
        branches.append((queries, attention))
    return state, branches
