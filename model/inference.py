"""A language model made ready to answer: the same function, from weights that a CPU reads faster.

    prepare(model.language_model)            # float32: equal but for the order of additions
    prepare(model.language_model, "bfloat16")       # half of the bytes, answers nearly the same
    prepare(model.language_model, "int8")           # a quarter of them
    prepare(model.language_model, compile=True)     # half a minute at the start, then fewer calls

A token of one row takes each weight once and computes next to nothing with it: what counts is how
many bytes there are, and how many calls. So matrices that read the same input become one, norms
take four calls in place of a dozen, and matrices are stored in the order in which their kernel
reads them with few rows: transposed for MKL in float32, in oneDNN's blocks in bfloat16, in FBGEMM's
in int8. All else stays float32: norms, rotations, attention, and the sums that layers add to.

int8 has a scale for each output of a matrix; its inputs are rounded too, by the scale of the whole
batch: then a batch answers nearly, and no more exactly, as each row alone.
"""

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.minimind import MLP, Attention, KVCache, MiniMind

WEIGHTS = ("float32", "bfloat16", "int8")


def prepare(model: MiniMind, weights: str = "float32", compile: bool = False) -> MiniMind:
    """In place, for answering only: no training, saving or loading after this. Raises ValueError.

    bfloat16 is for GPUs, and for CPUs that have its instructions. compile: steps of one token run
    as one compiled function; without a compiler there is a warning, and they run as they did.
    """
    if weights not in WEIGHTS:
        raise ValueError(f"weights must be one of {', '.join(WEIGHTS)}, not {weights!r}")
    embedding = model.model.embed_tokens.weight
    on_cpu = embedding.device.type == "cpu"
    if weights == "int8" and not on_cpu:
        raise ValueError(f"int8 weights are for CPUs, not for {embedding.device}: use bfloat16")
    if compile and on_cpu and weights != "float32":
        raise ValueError(f"a CPU's {weights} products can't be compiled: leave out --compile")
    model.requires_grad_(False).eval()
    make = {"float32": _transposed, "bfloat16": Bfloat16Linear, "int8": Int8Linear}[weights]
    for part in list(model.modules()):
        if isinstance(part, Attention):
            part.qkv_proj = make(_joined(part.q_proj, part.k_proj, part.v_proj))
            part.o_proj = make(part.o_proj.weight)
            part.q_proj = part.k_proj = part.v_proj = None
        elif isinstance(part, MLP):
            part.gate_up_proj = make(_joined(part.gate_proj, part.up_proj))
            part.down_proj = make(part.down_proj.weight)
            part.gate_proj = part.up_proj = None
        if on_cpu:  # elsewhere torch has one kernel for a norm
            for name, child in part.named_children():
                if isinstance(child, nn.RMSNorm):
                    setattr(part, name, FewCallsRMSNorm(child))
    model.head = make(embedding)
    if weights == "float32":  # one memory for both
        model.model.embed_tokens.weight = model.head.weight
    if compile:
        _compile_steps(model)
    return model


class FewCallsRMSNorm(nn.Module):
    """x / sqrt(mean x² + eps) · weight, over the last of C channels: the root is the hypotenuse of
    |x| / √C and √eps, and torch has kernels for both lengths."""

    def __init__(self, norm: nn.RMSNorm):
        super().__init__()
        root = norm.weight.numel() ** 0.5
        self.weight = nn.Parameter(norm.weight * root, requires_grad=False)
        self.register_buffer("floor", torch.tensor(norm.eps**0.5 * root), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return x / torch.hypot(length, self.floor) * self.weight


class Bfloat16Linear(nn.Module):
    """(…, in) float32 → (…, out) bfloat16."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight.bfloat16(), requires_grad=False)
        # A CPU without the instructions would refuse oneDNN's product; torch's own emulates it.
        self.packed = None
        if weight.device.type == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported():
            self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight, 1)
            self.weight = None

    def forward(self, x: Tensor) -> Tensor:
        x = x.bfloat16()
        if self.packed is None:
            return F.linear(x, self.weight)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, None, "none", [], "")


class Int8Linear(nn.Module):
    """(…, in) → (…, out) in float32, torch's dynamic quantisation in between."""

    def __init__(self, weight: Tensor):
        super().__init__()
        # Without VNNI's instructions sums of 8-bit products overflow 16 bits: inputs get 7 then.
        self.reduce_range = not torch.cpu.get_capabilities().get("avx512_vnni", False)
        scales, zeros = weight.abs().amax(1).clamp(min=1e-12) / 127, torch.zeros(len(weight))
        with warnings.catch_warnings():  # torch means to move this into another package one day
            warnings.simplefilter("ignore")
            quantised = torch.quantize_per_channel(weight, scales, zeros.long(), 0, torch.qint8)
            self.packed = torch.ops.quantized.linear_prepack(quantised, None)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.quantized.linear_dynamic(x, self.packed, self.reduce_range)


def _joined(*layers: nn.Linear) -> Tensor:
    """A matrix whose outputs are all layers' outputs, one after the other."""
    return torch.cat([layer.weight for layer in layers])


def _transposed(weight: Tensor) -> nn.Linear:
    """The same matrix; on a CPU in the order in which MKL multiplies few rows fastest."""
    layer = nn.Linear(*weight.shape[::-1], bias=False, device="meta")
    if weight.device.type == "cpu":
        weight = weight.t().contiguous().t()
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def _compile_steps(model: MiniMind) -> None:
    """Prompts stay as they are: each has another length, and their time goes into products."""
    eager, compiled = model.forward, torch.compile(model.forward, dynamic=True)

    def forward(input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None, **more):
        given = input_ids if inputs_embeds is None else inputs_embeds
        run = compiled if given.shape[1] == 1 else eager
        return run(input_ids=input_ids, inputs_embeds=inputs_embeds, **more)

    model.forward = forward
    try:  # now, and not in the midst of the first answer
        with torch.inference_mode():
            # 37 is no width of the model: what is equal now would have to be equal ever after.
            ids = torch.zeros(
                1, 37, dtype=torch.long, device=model.model.embed_tokens.weight.device
            )
            cache, embeds_BLC = KVCache(), model.embed(ids)
            for length in (37, 1, 1):
                model(inputs_embeds=embeds_BLC[:, :length], past_key_values=cache, logits_to_keep=1)
    except Exception as error:  # whatever a compiler, or its absence, may raise
        reason = str(error).strip().partition("\n")[0]
        warnings.warn(f"can't compile, so answers come as without: {reason}", stacklevel=3)
        model.forward = eager
