"""A language model made ready to answer: the same function, from weights that a CPU reads faster.

    prepare(model.language_model)            # float32: equal but for the order of additions
    prepare(model.language_model, "int8")    # a quarter of the bytes, answers nearly the same
    prepare(model.language_model, compile=True)     # half a minute at the start, then no overhead

A token of one row takes each weight once and computes next to nothing with it: what counts is how
many bytes there are, and how many calls. So matrices that read the same input become one, and all
are stored transposed, which MKL multiplies with few rows up to half again as fast. int8 is torch's
dynamic quantisation: a scale for each output, and inputs rounded to 7 bits on the way, by the scale
of the whole batch: then a batch answers nearly, and no more exactly, as each row alone.
"""

import warnings

import torch
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
    if weights == "int8" and embedding.device.type != "cpu":
        raise ValueError(f"int8 weights are for CPUs, not for {embedding.device}: use bfloat16")
    if weights == "int8" and compile:
        raise ValueError("int8 products can't be compiled and a step gets slower: choose one")
    model.requires_grad_(False).eval()
    if weights == "bfloat16":
        model.bfloat16()
    make = _quantised if weights == "int8" else _transposed
    for part in model.modules():
        if isinstance(part, Attention):
            part.qkv_proj = make(part.q_proj, part.k_proj, part.v_proj)
            part.o_proj = make(part.o_proj)
            part.q_proj = part.k_proj = part.v_proj = None
        elif isinstance(part, MLP):
            part.gate_up_proj = make(part.gate_proj, part.up_proj)
            part.down_proj = make(part.down_proj)
            part.gate_proj = part.up_proj = None
    model.head = make(model.model.embed_tokens)
    if weights != "int8":  # one memory for both
        model.model.embed_tokens.weight = model.head.weight
    if compile:
        _compile_steps(model)
    return model


def _transposed(*layers: nn.Linear | nn.Embedding) -> nn.Linear:
    """All layers' outputs, one after the other."""
    weight = torch.cat([layer.weight for layer in layers])
    joined = nn.Linear(*weight.shape[::-1], bias=False, device="meta")
    if weight.device.type == "cpu":
        weight = weight.t().contiguous().t()
    joined.weight = nn.Parameter(weight, requires_grad=False)
    return joined


def _quantised(*layers: nn.Linear | nn.Embedding) -> nn.Module:
    from torch.ao.nn.quantized.dynamic import Linear
    from torch.ao.quantization import per_channel_dynamic_qconfig

    joined = _transposed(*layers)
    joined.qconfig = per_channel_dynamic_qconfig
    with warnings.catch_warnings():  # torch means to move this into another package one day
        warnings.simplefilter("ignore")
        return Linear.from_float(joined)


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
