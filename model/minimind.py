"""MiniMind: the language model, after its published architecture (github.com/jingyaogong/minimind).

A Llama-like decoder: RMSNorm before each part, rotary positions, grouped-query attention, SwiGLU
(or experts of it, model/moe.py), tied embeddings. Parameters carry MiniMind-3's names, which are
Llama's.

Shapes: B batch, L sequence of this call, T sequence with what the cache holds, H heads (of queries,
or of keys and values), E channels a head, C model width, N supervised tokens.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.attention import attend, attend_packed, compute_dtype, is_packable, make_mask
from model.config import LanguageModelConfig
from model.kv_cache import KVCache
from model.moe import MixtureOfExperts

# Logits of this many tokens at a time are in memory: at 6400 entries they then stay near a CPU's
# cache, which makes the loss a quarter faster (twice in bfloat16). A GPU wants large products.
LOSS_CHUNK, GPU_LOSS_CHUNK = 512, 16384


@dataclass
class CausalLMOutput:
    logits: Tensor | None = None  # (B, L, vocabulary); None where labels were given
    loss: Tensor | None = None  # cross-entropy summed over supervised tokens; None without labels
    past_key_values: KVCache | None = None
    aux_loss: Tensor | None = None  # of experts in training: balance, weighted, over all layers


def rotary_tables(position_ids: Tensor, config: LanguageModelConfig) -> tuple[Tensor, Tensor]:
    """Cosine and signed sine of positions (B or 1, L), each (B or 1, 1, L, E) in float32.

    RoFormer's angles (arXiv 2104.09864, eq. 15).
    """
    exponents = torch.arange(0, config.head_dim, 2, device=position_ids.device).float()
    frequencies = 1.0 / config.rope_theta ** (exponents / config.head_dim)
    angles = position_ids[:, None, :, None].float() * frequencies
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def rotate(x_BHLE: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Turns channel i together with channel i + E/2 ("rotate half", as Llama in transformers)."""
    cos, sin = tables
    return torch.addcmul(x_BHLE * cos, x_BHLE.roll(x_BHLE.shape[-1] // 2, -1), sin)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions, and with normalised q and k in MiniMind-3."""

    def __init__(self, config: LanguageModelConfig, layer_idx: int):
        super().__init__()
        self.head_dim, self.dropout, self.layer_idx = config.head_dim, config.dropout, layer_idx
        width, kv_width = config.hidden_size, config.num_key_value_heads * config.head_dim
        self.widths = (width, kv_width, kv_width)
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, kv_width, bias=False)
        self.v_proj = nn.Linear(width, kv_width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)
        if config.qk_norm:
            self.q_norm = nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps)
            self.k_norm = nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps)
        else:
            self.q_norm = self.k_norm = nn.Identity()
        self.qkv_proj: nn.Module | None = None  # the first three in one, for answering only

    def forward(self, x_BLC, tables, mask, cache: KVCache | None) -> Tensor:
        """(B, L, C) → (B, L, C). tables: of `rotary_tables`; mask: of `make_mask`, or the
        PackedBatch whose tokens these are; the cache, if any, is extended."""
        if self.qkv_proj is None:
            projected = self.q_proj(x_BLC), self.k_proj(x_BLC), self.v_proj(x_BLC)
        else:
            projected = self.qkv_proj(x_BLC).split(self.widths, dim=-1)
        heads = (*x_BLC.shape[:2], -1, self.head_dim)
        q_BLHE, k_BLHE, v_BLHE = (x.view(heads) for x in projected)
        q_BHLE = rotate(self.q_norm(q_BLHE).transpose(1, 2), tables)
        k_BHTE = rotate(self.k_norm(k_BLHE).transpose(1, 2), tables)
        v_BHTE = v_BLHE.transpose(1, 2)
        # The type of the cache as well. A CPU attends faster in float32, as the tables are.
        dtype = k_BHTE.dtype if x_BLC.device.type == "cpu" else v_BHTE.dtype
        q_BHLE, k_BHTE, v_BHTE = q_BHLE.to(dtype), k_BHTE.to(dtype), v_BHTE.to(dtype)
        if cache is not None:
            k_BHTE, v_BHTE = cache.extend(self.layer_idx, k_BHTE, v_BHTE)
        dropout = self.dropout if self.training else 0.0
        attend_by = attend if mask is None or isinstance(mask, Tensor) else attend_packed
        with torch.autocast("cpu", enabled=False):
            mixed_BHLE = attend_by(q_BHLE, k_BHTE, v_BHTE, mask, dropout)
        return self.o_proj(mixed_BHLE.transpose(1, 2).flatten(2).to(x_BLC.dtype))


class MLP(nn.Module):
    """SwiGLU (arXiv 2002.05202)."""

    def __init__(self, config: LanguageModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.gate_up_proj: nn.Module | None = None  # the first two in one, for answering only

    def forward(self, x: Tensor, balance_losses: list[Tensor] | None = None) -> Tensor:
        """(…, C) → (…, C). balance_losses: as for experts, which alone have some."""
        if self.gate_up_proj is None:
            gate, up = self.gate_proj(x), self.up_proj(x)
        else:
            gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, config: LanguageModelConfig, layer_idx: int):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config, layer_idx)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = MixtureOfExperts(config, MLP) if config.num_experts else MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_BLC, tables, mask, cache, slice_indices=None, balance_losses=None):
        """(B, L, C) → (B, L, C), or (N, C) where `slice_indices` names N tokens.

        Nobody reads the other tokens after the last layer: their MLP is spared. tables, mask and
        cache: as in `Attention.forward`. balance_losses: a list that experts append theirs to.
        """
        x = x_BLC + self.dropout(self.self_attn(self.input_layernorm(x_BLC), tables, mask, cache))
        if slice_indices is not None:
            x = x[slice_indices]
        return x + self.dropout(self.mlp(self.post_attention_layernorm(x), balance_losses))


class Decoder(nn.Module):
    """The part that Llama calls `model`: it gives the parameters their prefix."""

    def __init__(self, config: LanguageModelConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class MiniMind(nn.Module):
    def __init__(self, config: LanguageModelConfig):
        """ValueError, with all problems, for a config that can't be built."""
        super().__init__()
        self.config = config.validate()
        # Training keeps a layer's input only and runs the layer again for the gradients.
        self.gradient_checkpointing = False
        self.model = Decoder(config)
        self.head: nn.Module | None = None  # the embedding once more, for answering only
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=config.initializer_range)
        nn.init.normal_(self.model.embed_tokens.weight, std=config.embedding_std)

    def embed(self, input_ids: Tensor) -> Tensor:
        """(B, L) → (B, L, C)."""
        return self.model.embed_tokens(input_ids)

    def compile_layers(self) -> None:
        """torch.compile for the layers, which are one piece of code: made once, for any length.

        Norms, rotations and the gate's product, a pass over memory each, are fused into fewer.
        """
        for block in self.model.layers:
            block.compile(dynamic=True)

    def forward(
        self,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        segment_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        past_key_values: KVCache | None = None,
        logits_to_keep: int = 0,
        packed=None,
    ) -> CausalLMOutput:
        """Reads (B, L) tokens, or (B, L, C) embeddings, after those in the cache.

        segment_ids (B, L): 0 a prefix that all conversations of the row share, k the k-th of them,
        -1 padding. attention_mask (B, T): False where left padding is. labels (B, L), -100 where
        unsupervised: gives the summed loss and no logits. logits_to_keep: of the last tokens only.
        packed: the PackedBatch of the same rows, for training: with it nothing has to be asked of
        the device, and where its attention allows, padding costs nothing.
        ValueError where L and the cache together are more than max_position_embeddings.
        """
        assert (input_ids is None) != (inputs_embeds is None), "give input_ids or inputs_embeds"
        assert segment_ids is None or position_ids is not None, "segments restart their positions"
        x_BLC = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
        past, length = len(past_key_values or ()), x_BLC.shape[1]
        if past + length > self.config.max_position_embeddings:
            raise ValueError(
                f"{past + length} tokens are more than max_position_embeddings "
                f"{self.config.max_position_embeddings}: shorten the text or raise it"
            )
        if position_ids is None and attention_mask is None:
            position_ids = torch.arange(past, past + length, device=x_BLC.device)[None]
        elif position_ids is None:  # counted from each row's first real token
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
        slice_indices = None  # the tokens whose logits are needed; None: all
        packed = None if labels is None else packed
        if packed is not None:
            targets_N = packed.targets_N
            places_N = packed.tokens_T[packed.supervised_N]
            slice_indices = places_N // length, places_N % length
        elif labels is not None:
            targets_BL = F.pad(labels[:, 1:], (0, 1), value=-100)
            slice_indices = (targets_BL != -100).nonzero(as_tuple=True)
            targets_N = targets_BL[slice_indices]
        elif logits_to_keep:
            slice_indices = (slice(None), slice(-logits_to_keep, None))

        dropout = self.config.dropout if self.training else 0.0
        if packed is not None and is_packable(x_BLC, packed, dropout):
            position_ids = position_ids.expand(x_BLC.shape[:2]).flatten()[packed.tokens_T][None]
            x_BLC = x_BLC.flatten(0, 1).index_select(0, packed.tokens_T)[None]  # (1, T, C)
            mask, slice_indices = packed, (0, packed.supervised_N)
        else:
            mask = make_mask(past, length, segment_ids, attention_mask, x_BLC.device)
        tables = rotary_tables(position_ids, self.config)
        if x_BLC.device.type != "cpu":  # products of two types take more kernels
            tables = tuple(table.to(compute_dtype(x_BLC)) for table in tables)

        x = self.model.dropout(x_BLC)
        last = len(self.model.layers) - 1
        balance = [] if self.config.num_experts and self.training and labels is not None else None
        for i, block in enumerate(self.model.layers):
            kept = slice_indices if i == last else None
            inputs = (x, tables, mask, past_key_values, kept, balance)
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, *inputs, use_reentrant=False)
            else:
                x = block(*inputs)
        x = self.model.norm(x)
        if labels is None:
            return CausalLMOutput(self._logits(x), past_key_values=past_key_values)
        loss, aux_loss = self._loss(x, targets_N, balance)
        return CausalLMOutput(loss=loss, past_key_values=past_key_values, aux_loss=aux_loss)

    def _logits(self, x: Tensor) -> Tensor:
        if self.head is not None:
            return self.head(x)
        return F.linear(x, self.model.embed_tokens.weight)

    def _loss(self, x_NC: Tensor, targets_N: Tensor, balance_losses: list[Tensor] | None):
        """Summed cross-entropy, and the weighted balance loss of experts (None without any)."""
        loss = x_NC.sum() * 0.0  # defined, and differentiable, where nothing is supervised
        chunk = LOSS_CHUNK if x_NC.device.type == "cpu" else GPU_LOSS_CHUNK
        for x, targets in zip(x_NC.split(chunk), targets_N.split(chunk), strict=True):
            loss = loss + F.cross_entropy(self._logits(x).float(), targets, reduction="sum")
        if not balance_losses:
            return loss, None
        aux_loss = self.config.router_aux_loss_coef * sum(balance_losses)
        # It weighs as much as a supervised token's share of the sum, and only its gradient joins:
        # the loss that is reported stays the cross-entropy, as in validation.
        return loss + len(targets_N) * (aux_loss - aux_loss.detach()), aux_loss
