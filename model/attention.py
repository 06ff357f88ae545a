"""How tokens attend: plain causal, by a mask, or as a batch without padding, on CPUs and GPUs.

Training reads a batch without its padding (dataset/packing.py's PackedBatch): one row of all T real
tokens, in which every sequence attends to itself and to the prefix that it shares.

Shapes: B batch, L sequence of this call, T sequence with what the cache holds, H heads (of queries,
or of keys and values), E channels a head, K keys of all sequences.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # torch before 2.10
    varlen_attn = None

# On a CPU so many queries attend at a time, each block to only the keys before its end: of the
# square of queries and keys, half is masked.
ATTENTION_BLOCK = 64
# What a call of its own costs a CPU, in products of a query's and a key's channel that it could
# have done instead. So short rows of many short sequences are cheaper under one mask.
PRODUCTS_A_CALL = 1_000_000


def make_mask(
    past: int, length: int, segment_ids: Tensor | None, attention_mask: Tensor | None, device
) -> Tensor | None:
    """(B or 1, 1, L, T) keys that each of `length` new tokens after `past` in the cache may attend
    to; None: all before it.

    segment_ids (B, L) and attention_mask (B, T) are those of `MiniMind.forward`.
    """
    if segment_ids is None and attention_mask is None and (past == 0 or length == 1):
        return None
    if length == 1 and segment_ids is None:  # the newest token sees all that is no padding
        return attention_mask[:, None, None].bool()
    keys_T = torch.arange(past + length, device=device)
    allowed_BLT = (keys_T <= keys_T[past:, None])[None]
    if segment_ids is not None:
        assert past == 0, "rows of several conversations are for training, not for a cache"
        own_BLL = segment_ids[:, :, None] == segment_ids[:, None, :]
        shared_B1L = (segment_ids == 0)[:, None, :]
        allowed_BLT = allowed_BLT & (own_BLL | shared_B1L)
    if attention_mask is not None:
        # Padding may see itself: a row without a single key would come out as NaN.
        itself_LT = keys_T == keys_T[past:, None]
        allowed_BLT = (allowed_BLT & attention_mask[:, None, :].bool()) | itself_LT
    return allowed_BLT[:, None]


def attend(
    q_BHLE: Tensor, k_BHTE: Tensor, v_BHTE: Tensor, mask: Tensor | None, dropout: float = 0.0
) -> Tensor:
    """(B, H, L, E): softmax(q kᵀ / √E) v, where several queries' heads share one of the keys
    (grouped-query attention, arXiv 2305.13245). mask: of `make_mask`; None: plain causal."""
    groups = q_BHLE.shape[1] // k_BHTE.shape[1]
    if q_BHLE.shape[2] == 1:
        # A new token sees all that its mask lets it. The heads of queries that share keys are to
        # them as many tokens: no kernel has to find out whose keys are whose.
        q_BHGE = q_BHLE.view(len(q_BHLE), k_BHTE.shape[1], groups, q_BHLE.shape[-1])
        mixed = F.scaled_dot_product_attention(q_BHGE, k_BHTE, v_BHTE, mask, dropout)
        return mixed.reshape(q_BHLE.shape)
    if q_BHLE.device.type == "cpu" and mask is not None:
        return attend_in_blocks(q_BHLE, k_BHTE, v_BHTE, mask, dropout)
    # torch's masked kernel for GPUs wants as many heads of keys as of queries: with fewer, masked
    # attention falls back to products in float32.
    k_BHTE, v_BHTE = k_BHTE.repeat_interleave(groups, 1), v_BHTE.repeat_interleave(groups, 1)
    return F.scaled_dot_product_attention(
        q_BHLE, k_BHTE, v_BHTE, mask, dropout, is_causal=mask is None
    )


@torch.compiler.disable  # there are as many calls as blocks: each would be compiled
def attend_in_blocks(
    q_BHLE: Tensor, k_BHTE: Tensor, v_BHTE: Tensor, mask: Tensor, dropout: float
) -> Tensor:
    """`attend` on a CPU. The queries are the last L of the T tokens, and see none after them."""
    end = k_BHTE.shape[2] - q_BHLE.shape[2]
    mixed = []
    for q, allowed in zip(
        q_BHLE.split(ATTENTION_BLOCK, 2), mask.split(ATTENTION_BLOCK, -2), strict=True
    ):
        end += q.shape[2]
        k, v, allowed = k_BHTE[:, :, :end], v_BHTE[:, :, :end], allowed[..., :end]
        mixed.append(F.scaled_dot_product_attention(q, k, v, allowed, dropout, enable_gqa=True))
    return torch.cat(mixed, 2)


def is_packable(x_BLC: Tensor, packed, dropout: float) -> bool:
    """Whether attention takes a batch without padding rather than with one mask: a CPU where the
    masked squares of the rows cost more than a call for each sequence; of GPUs, FlashAttention,
    which is for half precision and knows no dropout here."""
    if x_BLC.device.type == "cpu":
        masked_products = x_BLC.numel() * x_BLC.shape[1]
        return masked_products > PRODUCTS_A_CALL * len(packed.query_lengths)
    is_half = compute_dtype(x_BLC) in (torch.bfloat16, torch.float16)
    return varlen_attn is not None and is_half and not dropout and is_recent_gpu(x_BLC)


def is_recent_gpu(x: Tensor) -> bool:
    """CUDA since Ampere. The meta device, which computes shapes only, counts as one."""
    return x.is_meta or (x.is_cuda and torch.cuda.get_device_capability(x.device) >= (8, 0))


def compute_dtype(x: Tensor) -> torch.dtype:
    """The type of products with x: that of autocast, where it is on."""
    device = x.device.type
    if device in ("cpu", "cuda") and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def attend_packed(q_1HTE: Tensor, k_1HTE: Tensor, v_1HTE: Tensor, packed, dropout: float) -> Tensor:
    """(1, H, T, E): `attend` for the T tokens of a PackedBatch, each sequence to its own keys."""
    if q_1HTE.device.type == "cpu":
        return attend_in_turn(q_1HTE, k_1HTE, v_1HTE, packed, dropout)
    q_THE, k_KHE, v_KHE = (x[0].transpose(0, 1) for x in (q_1HTE, k_1HTE, v_1HTE))
    if packed.keys_K is not None:
        k_KHE, v_KHE = (x.index_select(0, packed.keys_K) for x in (k_KHE, v_KHE))
    mixed_THE = varlen_attn(
        q_THE,
        k_KHE,
        v_KHE,
        packed.query_starts,
        packed.key_starts,
        packed.max_length,
        packed.max_length,
        window_size=(-1, 0),  # causal: a sequence's last query sees its last key
        enable_gqa=True,
    )
    return mixed_THE.transpose(0, 1)[None]


@torch.compiler.disable  # as above, a call for each sequence
def attend_in_turn(
    q_1HTE: Tensor, k_1HTE: Tensor, v_1HTE: Tensor, packed, dropout: float = 0.0
) -> Tensor:
    """`attend_packed` by one sequence after the other."""
    if packed.keys_K is not None:
        k_1HTE, v_1HTE = (x.index_select(2, packed.keys_K) for x in (k_1HTE, v_1HTE))
    longest = max(packed.key_lengths)
    causal = torch.full((longest, longest), -torch.inf, dtype=q_1HTE.dtype).triu(1)
    mixed = []
    for q, k, v in zip(
        q_1HTE.split(packed.query_lengths, 2),
        k_1HTE.split(packed.key_lengths, 2),
        v_1HTE.split(packed.key_lengths, 2),
        strict=True,
    ):
        end = k.shape[2]
        mask = causal[end - q.shape[2] : end, :end]
        mixed.append(attend_in_blocks(q, k, v, mask, dropout))
    return torch.cat(mixed, 2)
