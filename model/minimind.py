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

from model.config import LanguageModelConfig
from model.moe import MixtureOfExperts

# Logits of this many tokens at a time are in memory: at 6400 entries they then stay near the cache,
# which makes the loss a quarter faster on a CPU (twice in bfloat16) and caps memory everywhere.
LOSS_CHUNK = 512
# Masked rows conversations are attended to in blocks of this many tokens, each against only the
# keys that some row needs: half of the time of the whole square, most of which is masked.
ATTENTION_BLOCK = 64


@dataclass
class CausalLMOutput:
    logits: Tensor | None = None  # (B, L, vocabulary); None where labels were given
    loss: Tensor | None = None  # cross-entropy summed over supervised tokens; None without labels
    past_key_values: "KVCache | None" = None
    aux_loss: Tensor | None = None  # of experts in training: balance, weighted, over all layers


class KVCache:
    """Keys and values of the tokens read so far, a pair of (B, H, room, E) a layer.

    There is room for tokens to come: a new one is written into its place, and nothing is copied
    around it until the room is used up and grows by half.
    """

    def __init__(self, layers: list[tuple[Tensor, Tensor]] | None = None, length: int = 0):
        self.layers, self.length = layers or [], length

    def __len__(self) -> int:
        return self.length

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Adds (B, H, L, E) of one layer, whose layers come in order; returns all T of it."""
        more = keys.shape[2]
        if layer == 0:
            self.length += more
        end = self.length
        start = end - more
        if layer == len(self.layers):
            self.layers.append((_with_room(keys[:, :, :0], end), _with_room(values[:, :, :0], end)))
        elif self.layers[layer][0].shape[2] < end:
            old_keys, old_values = self.layers[layer]
            self.layers[layer] = (
                _with_room(old_keys[:, :, :start], end),
                _with_room(old_values[:, :, :start], end),
            )
        all_keys, all_values = self.layers[layer]
        all_keys.narrow(2, start, more).copy_(keys)
        all_values.narrow(2, start, more).copy_(values)
        return all_keys.narrow(2, 0, end), all_values.narrow(2, 0, end)

    def crop(self, length: int) -> None:
        """Forgets all tokens after the first `length`."""
        self.length = min(self.length, length)

    def keep_rows(self, rows: Tensor) -> None:
        """Forgets every row of the batch but these (ids, which may repeat)."""
        self.layers = [(keys[rows], values[rows]) for keys, values in self.layers]

    def row(self, i: int) -> "KVCache":
        """A batch of one, with memory of its own."""
        layers = [
            (keys[i : i + 1].clone(), values[i : i + 1].clone()) for keys, values in self.layers
        ]
        return KVCache(layers, self.length)

    def select(self, columns: Tensor) -> "KVCache":
        """Only the tokens where `columns` (T) is True."""
        length, places = int(columns.sum()), columns.nonzero()[:, 0]
        return KVCache(
            [(keys[:, :, places], values[:, :, places]) for keys, values in self.layers], length
        )

    def join(self, below: "KVCache") -> "KVCache":
        """Both batches as one; the shorter gets zeros on its left, which attention must not see."""
        length = max(self.length, below.length)

        def stack(above: Tensor, under: Tensor) -> Tensor:
            parts = ((above, self.length), (under, below.length))
            return torch.cat(
                [
                    F.pad(part[:, :, :old], (0, 0, length - old, _room(length) - length))
                    for part, old in parts
                ]
            )

        pairs = zip(self.layers, below.layers, strict=True)
        layers = [(stack(k, more_k), stack(v, more_v)) for (k, v), (more_k, more_v) in pairs]
        return KVCache(layers, length)


def _room(length: int) -> int:
    return length + max(length // 2, 64)


def _with_room(old: Tensor, length: int) -> Tensor:
    """(B, H, old, E) in memory for `length` tokens and more to come."""
    room = old.new_empty(*old.shape[:2], _room(length), old.shape[3])
    room[:, :, : old.shape[2]] = old
    return room


def rotary_tables(position_ids: Tensor, config: LanguageModelConfig) -> tuple[Tensor, Tensor]:
    """Cosine and signed sine (B or 1, 1, L, E), RoFormer's angles (arXiv 2104.09864, eq. 15)."""
    exponents = torch.arange(0, config.head_dim, 2, device=position_ids.device).float()
    frequencies = 1.0 / config.rope_theta ** (exponents / config.head_dim)
    angles = position_ids[:, None, :, None].float() * frequencies
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def rotate(x_BHLE: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Turns channel i together with channel i + E/2 ("rotate half", as Llama in transformers)."""
    cos, sin = tables
    return torch.addcmul(x_BHLE * cos, x_BHLE.roll(x_BHLE.shape[-1] // 2, -1), sin)


@dataclass
class Span:
    """What one block of queries looks at."""

    keys: Tensor | slice  # the places in T that any row needs
    mask: Tensor  # (B or 1, 1, block, keys): True where a query may see a key


def attention_pattern(
    past: int, length: int, segment_ids: Tensor | None, attention_mask: Tensor | None, device
) -> list[Span] | None:
    """Who may attend to whom, built once for all layers. None: each to all before it."""
    if segment_ids is None and attention_mask is None and (past == 0 or length == 1):
        return None
    if length == 1 and segment_ids is None:  # the newest token sees all that is no padding
        return [Span(slice(None), attention_mask[:, None, None, :].bool())]
    keys_T = torch.arange(past + length, device=device)
    allowed = (keys_T <= keys_T[past:, None])[None]  # (1, L, T)
    if segment_ids is not None:
        assert past == 0, "rows of several conversations are for training, not for a cache"
        own_BLL = segment_ids[:, :, None] == segment_ids[:, None, :]
        shared_B1L = (segment_ids == 0)[:, None, :]
        allowed = allowed & (own_BLL | shared_B1L)
    if attention_mask is not None:
        # Padding may see itself: a row without a single key would come out as NaN.
        itself_LT = keys_T == keys_T[past:, None]
        allowed = (allowed & attention_mask[:, None, :].bool()) | itself_LT
    pattern = []
    for block in allowed.split(ATTENTION_BLOCK, dim=1):
        keys = block.any(1).any(0).nonzero()[:, 0]
        if len(keys) == past + length:  # a slice spares copying the cache
            keys = slice(None)
        pattern.append(Span(keys, block[:, None, :, keys]))
    return pattern


class Attention(nn.Module):
    def __init__(self, config: LanguageModelConfig):
        super().__init__()
        self.head_dim, self.dropout = config.head_dim, config.dropout
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
        self.qkv_proj: nn.Module | None = None  # the first three in one, for model/inference.py

    def forward(self, x_BLC, tables, pattern, cache: KVCache | None, layer: int) -> Tensor:
        if self.qkv_proj is None:
            projected = self.q_proj(x_BLC), self.k_proj(x_BLC), self.v_proj(x_BLC)
        else:
            projected = self.qkv_proj(x_BLC).split(self.widths, dim=-1)
        heads = (*x_BLC.shape[:2], -1, self.head_dim)
        q_BLHE, k_BLHE, v_BLHE = (x.view(heads) for x in projected)
        q_BHLE = self.q_norm(q_BLHE).transpose(1, 2)
        k_BHLE = self.k_norm(k_BLHE).transpose(1, 2)
        q_BHLE, k_BHTE = rotate(q_BHLE, tables), rotate(k_BHLE, tables)  # float32, as the tables
        v_BHTE = v_BLHE.transpose(1, 2).to(k_BHTE.dtype)  # so is the cache: cast once, when new
        if cache is not None:
            k_BHTE, v_BHTE = cache.extend(layer, k_BHTE, v_BHTE)
        if v_BLHE.dtype == k_BHTE.dtype:
            mixed_BHLE = self._attend(q_BHLE, k_BHTE, v_BHTE, pattern)
        else:
            # Autocast or bfloat16 weights. A CPU attends faster in float32; on CUDA
            # autocast still casts it.
            with torch.autocast("cpu", enabled=False):
                mixed_BHLE = self._attend(q_BHLE, k_BHTE, v_BHTE, pattern)
        return self.o_proj(mixed_BHLE.transpose(1, 2).flatten(2).to(x_BLC.dtype))

    def _attend(self, q_BHLE, k_BHTE, v_BHTE, pattern: list[Span] | None) -> Tensor:
        if q_BHLE.shape[2] == 1:
            # A new token sees all that its mask lets it. The queries that share keys are to them
            # as many tokens: no kernel has to find out whose keys are whose.
            mask = None if pattern is None else pattern[0].mask
            q_BHGE = q_BHLE.view(len(q_BHLE), k_BHTE.shape[1], -1, self.head_dim)
            mixed = F.scaled_dot_product_attention(q_BHGE, k_BHTE, v_BHTE, mask, **self._how())
            return mixed.reshape(q_BHLE.shape)
        if pattern is not None:
            return self._attend_in_blocks(q_BHLE, k_BHTE, v_BHTE, pattern)
        return F.scaled_dot_product_attention(q_BHLE, k_BHTE, v_BHTE, is_causal=True, **self._how())

    @torch.compiler.disable  # its blocks are as many as the rows are long: each would be compiled
    def _attend_in_blocks(self, q_BHLE, k_BHTE, v_BHTE, pattern: list[Span]) -> Tensor:
        parts = [
            F.scaled_dot_product_attention(
                q, k_BHTE[:, :, span.keys], v_BHTE[:, :, span.keys], span.mask, **self._how()
            )
            for q, span in zip(q_BHLE.split(ATTENTION_BLOCK, 2), pattern, strict=True)
        ]
        return torch.cat(parts, dim=2)

    def _how(self) -> dict:
        return {"dropout_p": self.dropout if self.training else 0.0, "enable_gqa": True}


class MLP(nn.Module):
    """SwiGLU (arXiv 2002.05202)."""

    def __init__(self, config: LanguageModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.gate_up_proj: nn.Module | None = None  # the first two in one, for model/inference.py

    def forward(self, x: Tensor) -> Tensor:
        if self.gate_up_proj is None:
            gate, up = self.gate_proj(x), self.up_proj(x)
        else:
            gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, config: LanguageModelConfig):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = MixtureOfExperts(config, MLP) if config.num_experts else MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x_BLC, tables, pattern, cache, layer: int, wanted=None, balance_losses=None
    ) -> Tensor:
        attended = self.self_attn(self.input_layernorm(x_BLC), tables, pattern, cache, layer)
        x = x_BLC + self.dropout(attended)
        if wanted is not None:  # nobody reads the other tokens after this layer: spare their MLP
            x = x[wanted]
        more = () if balance_losses is None else (balance_losses,)  # only experts have some
        return x + self.dropout(self.mlp(self.post_attention_layernorm(x), *more))


class Decoder(nn.Module):
    """The part that Llama calls `model`: it gives the parameters their prefix."""

    def __init__(self, config: LanguageModelConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class MiniMind(nn.Module):
    def __init__(self, config: LanguageModelConfig):
        super().__init__()
        self.config = config.validate()
        # Training keeps a layer's input only and runs the layer again for the gradients.
        self.gradient_checkpointing = False
        self.model = Decoder(config)
        self.head: nn.Module | None = None  # the embedding once more, for model/inference.py
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=config.initializer_range)
        nn.init.normal_(self.model.embed_tokens.weight, std=config.embedding_std)

    def embed(self, input_ids: Tensor) -> Tensor:
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
    ) -> CausalLMOutput:
        """Reads (B, L) tokens, or (B, L, C) embeddings, after those in the cache.

        segment_ids (B, L): 0 a prefix that all conversations of the row share, k the k-th of them,
        -1 padding. attention_mask (B, T): False where left padding is. labels (B, L), -100 where
        unsupervised: gives the summed loss and no logits. logits_to_keep: of the last tokens only.
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
        if position_ids is None:
            position_ids = self._positions(past, length, attention_mask, x_BLC.device)
        tables = rotary_tables(position_ids, self.config)
        pattern = attention_pattern(past, length, segment_ids, attention_mask, x_BLC.device)

        wanted = None  # the tokens whose prediction is asked for; None: all
        if labels is not None:
            targets_BL = F.pad(labels[:, 1:], (0, 1), value=-100)
            wanted = (targets_BL != -100).nonzero(as_tuple=True)
        elif logits_to_keep:
            wanted = (slice(None), slice(-logits_to_keep, None))
        x = self.model.dropout(x_BLC)
        last = len(self.model.layers) - 1
        balance = [] if self.config.num_experts and self.training and labels is not None else None
        for i, block in enumerate(self.model.layers):
            needed = wanted if i == last else None
            given = (x, tables, pattern, past_key_values, i, needed, balance)
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, *given, use_reentrant=False)
            else:
                x = block(*given)
        x = self.model.norm(x)

        if labels is None:
            return CausalLMOutput(self._logits(x), past_key_values=past_key_values)
        loss = x.sum() * 0.0  # defined, and differentiable, where nothing is supervised
        targets_N = targets_BL[wanted]
        for start in range(0, len(targets_N), LOSS_CHUNK):
            part = slice(start, start + LOSS_CHUNK)
            loss = loss + F.cross_entropy(
                self._logits(x[part]).float(), targets_N[part], reduction="sum"
            )
        aux_loss = None
        if balance:
            aux_loss = self.config.router_aux_loss_coef * sum(balance)
            # It weighs as much as a supervised token's share of the sum, and only its gradient
            # joins: the loss that is reported stays the cross-entropy, as in validation.
            loss = loss + len(targets_N) * (aux_loss - aux_loss.detach())
        return CausalLMOutput(loss=loss, past_key_values=past_key_values, aux_loss=aux_loss)

    def _logits(self, x: Tensor) -> Tensor:
        if self.head is not None:
            return self.head(x)
        return F.linear(x, self.model.embed_tokens.weight)

    @staticmethod
    def _positions(past: int, length: int, attention_mask: Tensor | None, device) -> Tensor:
        """(B or 1, L): counted from each row's first real token."""
        if attention_mask is None:
            return torch.arange(past, past + length, device=device)[None]
        return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
