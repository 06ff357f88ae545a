"""A language model made ready to answer: the same function, by weights that are read faster.

    prepare(model.language_model)                         # bfloat16 where the device computes in it
    prepare(model.language_model, "float32")              # equal but for the order of additions
    prepare(model.language_model, quantize="int8")        # a quarter of the bytes, for CPUs

A token of one row takes each weight once and computes next to nothing with it: what counts is how
many bytes there are, and how many calls. So matrices that read the same input become one, stored in
the order in which their kernel reads them with few rows. All else stays float32.
"""

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from device import choose_dtype
from model.minimind import MLP, Attention, MiniMind

DTYPES, QUANTIZATIONS = ("auto", "float32", "bfloat16"), ("none", "int8")


def prepare(model: MiniMind, dtype: str = "auto", quantize: str = "none") -> MiniMind:
    """In place, for answering only: no training, saving or loading after this. Raises ValueError
    for names that aren't known, and for int8 on a device that isn't a CPU."""
    if dtype not in DTYPES or quantize not in QUANTIZATIONS:
        known = f"{', '.join(DTYPES)} and {', '.join(QUANTIZATIONS)}"
        raise ValueError(f"--dtype {dtype} --quantize {quantize}: choose of {known}")
    embedding = model.model.embed_tokens.weight
    if quantize == "int8" and embedding.device.type != "cpu":
        raise ValueError(f"int8 weights are for CPUs, not for {embedding.device}: use bfloat16")
    if dtype == "auto":
        dtype = choose_dtype("auto", embedding.device)
    make = _int8_linear if quantize == "int8" else _float32_linear
    if quantize == "none" and dtype == "bfloat16":
        make = Bfloat16Linear

    def join(*layers: nn.Linear) -> nn.Module:
        return make(torch.cat([layer.weight for layer in layers]))

    model.requires_grad_(False).eval()
    for part in list(model.modules()):
        if isinstance(part, Attention):
            part.qkv_proj = join(part.q_proj, part.k_proj, part.v_proj)
            part.o_proj = make(part.o_proj.weight)
            part.q_proj = part.k_proj = part.v_proj = None
        elif isinstance(part, MLP):
            part.gate_up_proj = join(part.gate_proj, part.up_proj)
            part.down_proj = make(part.down_proj.weight)
            part.gate_proj = part.up_proj = None
    model.head = make(embedding)
    if isinstance(model.head, nn.Linear):  # one memory for both
        model.model.embed_tokens.weight = model.head.weight
    return model


class Bfloat16Linear(nn.Module):
    """(…, in) float32 → (…, out) bfloat16.

    On a CPU, oneDNN's product of weights that lie in its own blocks takes a third of the time of
    `F.linear`, which puts them in order at each call. torch has no public name for it: where it
    lacks the private ones, or the CPU the instructions, it is `F.linear`.
    """

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight, self.packed = nn.Parameter(weight.bfloat16(), requires_grad=False), None
        ops = torch.ops.mkldnn
        private = ("_is_mkldnn_bf16_supported", "_reorder_linear_weight", "_linear_pointwise")
        is_known = weight.device.type == "cpu" and all(hasattr(ops, name) for name in private)
        if is_known and ops._is_mkldnn_bf16_supported():
            self.packed, self.weight = ops._reorder_linear_weight(self.weight, 1), None

    def forward(self, x: Tensor) -> Tensor:
        x = x.bfloat16()
        if self.packed is None:
            return F.linear(x, self.weight)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, None, "none", [], "")


def _float32_linear(weight: Tensor) -> nn.Linear:
    """The same matrix; on a CPU in the order in which MKL multiplies few rows fastest."""
    layer = nn.Linear(*weight.shape[::-1], bias=False, device="meta")
    if weight.device.type == "cpu":
        weight = weight.t().contiguous().t()
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def _int8_linear(weight: Tensor) -> nn.Module:
    """torch's dynamic quantisation, with a scale for each output. Inputs are rounded, too, by the
    scale of the whole batch: then a batch answers nearly, not exactly, as each row alone."""
    from torch.ao.quantization import per_channel_dynamic_qconfig, quantize_dynamic

    with warnings.catch_warnings():  # that torch means to move this into torchao
        warnings.simplefilter("ignore")
        layers = nn.Sequential(_float32_linear(weight))
        return quantize_dynamic(layers, {nn.Linear: per_channel_dynamic_qconfig})[0]
