"""Where to compute, and in which precision, if the user doesn't say."""

import os
import time
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only


def choose_device(name: str = "auto") -> torch.device:
    """`auto` is CUDA where there is one, else Apple's MPS, else the CPU.

    Raises ValueError for a device that this torch doesn't see.

    On CUDA attention no longer goes to cuDNN from then on: it builds a plan for each new shape of a
    batch, and here nearly every batch has another.
    """
    if name == "auto":
        has_mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
    for kind, module in (("cuda", torch.cuda), ("mps", torch.backends.mps)):
        if name.startswith(kind) and not module.is_available():
            raise ValueError(f"--device {name}: this torch sees no such device; use --device cpu")
    if name.startswith("cuda"):
        torch.backends.cuda.enable_cudnn_sdp(False)
        # Every batch has another shape: blocks of fixed sizes would leave gaps that nothing fits.
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    return torch.device(name)


def choose_dtype(name: str, device: torch.device) -> str:
    """`auto` is the fastest type that the device's arithmetic really has.

    A CPU without bfloat16 instructions takes it and emulates it: 40 times slower than float32 for
    a matrix product, where a CPU with them is up to twice as fast. GPUs before Ampere have float16
    only.
    """
    if name != "auto":
        return name
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return "bfloat16" if native else "float16"
    if device.type == "cpu":
        has = torch.cpu.get_capabilities()
        return "bfloat16" if has.get("avx512_bf16") or has.get("amx_bf16") else "float32"
    return "float32"


def to_device(inputs: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The same on the device; to a GPU on a stream of their own, while it computes the batch
    before."""
    if device.type != "cuda":
        return tree_map_only(Tensor, lambda tensor: tensor.to(device), inputs)
    compute, copying = torch.cuda.current_stream(), copy_stream(device)
    with torch.cuda.stream(copying):
        moved = tree_map_only(Tensor, lambda t: t.to(device, non_blocking=True), inputs)
    compute.wait_stream(copying)
    # Else their memory could be given away before they are read.
    tree_map_only(Tensor, lambda tensor: tensor.record_stream(compute), moved)
    return moved


@cache
def copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def peak_flops(device: torch.device, dtype: str) -> float:
    """FLOP/s of a large product, here and not on a data sheet: what MFU is a share of."""
    size = 1024 if device.type == "cpu" else 8192
    a = torch.randn(size, size, device=device, dtype=getattr(torch, dtype))
    for times in (3, 20):
        started = time.perf_counter()
        for _ in range(times):
            product = a @ a
        product[0, 0].item()  # all are done
    return 2 * size**3 * times / (time.perf_counter() - started)
