"""What a model is made of: two dataclasses that travel as JSON beside every checkpoint."""

import math
from dataclasses import asdict, dataclass, field, fields
from typing import Self

SUMMARY_KINDS = ("dct", "gpt4video", "mean", "concat")
SUMMARY_ALIASES = {"ours": "dct"}  # its name in checkpoints and commands until Nov 2026


def has_cls(tokens_per_frame: int) -> bool:
    """Whether a frame's first token is a CLS. CLIP gives n x n places after one, SigLIP n x n
    places alone, and no number is both: features on disk and checkpoints needn't record it."""
    return math.isqrt(tokens_per_frame) ** 2 != tokens_per_frame


class _Config:
    """What both configs share: a check of all values at once, and the way to JSON and back."""

    def validate(self) -> Self:
        """Itself, or a ValueError that lists all `problems`, of which each class has its own."""
        if problems := self.problems():
            raise ValueError(f"{type(self).__name__}: " + "; ".join(problems))
        return self

    def to_dict(self) -> dict:
        """Plain values, nested as the dataclasses are."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> Self:
        """The way back from `to_dict`. ValueError for names that it doesn't have: a misspelt
        setting that is silently dropped trains the wrong model."""
        names = [f.name for f in fields(cls)]
        if unknown := sorted(set(values) - set(names)):
            raise ValueError(
                f"{cls.__name__} doesn't know {', '.join(unknown)}; it knows {', '.join(names)}"
            )
        return cls(**values)


@dataclass
class LanguageModelConfig(_Config):
    """MiniMind's numbers, under the names of transformers. Embeddings are always tied."""

    vocab_size: int = 6400
    hidden_size: int = 512
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    num_key_value_heads: int = 2
    intermediate_size: int | None = None  # None: 8/3 of hidden_size, rounded up to a multiple of 64
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 32768
    qk_norm: bool = False  # MiniMind-3 normalises each head's queries and keys
    num_experts: int = 0  # 0: dense layers; else routed experts a layer, each of intermediate_size
    num_experts_per_tok: int = 1
    num_shared_experts: int = 0  # MiniMind2 has one beside the routed: every token passes it
    # A token's weights sum to 1. With one expert a token (MiniMind-3) the weight is then always 1,
    # and the router learns from the balance loss alone.
    norm_topk_prob: bool = True
    router_aux_loss_coef: float = 0.01  # weight of the balance loss, Switch Transformer's
    dropout: float = 0.0
    initializer_range: float = 0.02
    # A narrow model learns faster from larger ones (.4 at 128 wide): its logits come from them.
    embedding_std: float = 0.02

    def __post_init__(self):
        if self.intermediate_size is None:
            self.intermediate_size = 64 * -(-8 * self.hidden_size // (3 * 64))

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return self.hidden_size // self.num_attention_heads

    def problems(self) -> list[str]:
        found = [
            f"{name} must be a positive number, not {getattr(self, name)!r}"
            for name in (
                *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"),
                *("num_key_value_heads", "intermediate_size", "max_position_embeddings"),
                *("rope_theta", "rms_norm_eps", "initializer_range", "embedding_std"),
            )
            if not getattr(self, name) > 0
        ]
        if found:  # what follows divides by these numbers
            return found
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if self.hidden_size % (2 * heads):
            found.append(
                f"hidden_size {self.hidden_size} must be a multiple of 2 x num_attention_heads "
                f"{heads}: rotary positions turn pairs of a head's channels"
            )
        if heads % kv_heads:
            found.append(
                f"num_attention_heads {heads} must be a multiple of num_key_value_heads {kv_heads}"
            )
        if self.num_experts and not 1 <= self.num_experts_per_tok <= self.num_experts:
            found.append(
                f"num_experts_per_tok must be in 1..{self.num_experts} (num_experts), not "
                f"{self.num_experts_per_tok}"
            )
        found += [
            f"{name} must not be negative, but is {getattr(self, name)}"
            for name in ("num_experts", "num_shared_experts", "router_aux_loss_coef")
            if not getattr(self, name) >= 0
        ]
        if not 0 <= self.dropout < 1:
            found.append(f"dropout must be in [0, 1), not {self.dropout}")
        return found


@dataclass
class CinegoConfig(_Config):
    """A language model, the tower's two numbers, and how a video is condensed between them."""

    language_model: LanguageModelConfig = field(default_factory=LanguageModelConfig)
    summary: str = "dct"  # one of SUMMARY_KINDS
    vision_hidden_size: int = 768
    tokens_per_frame: int = 50
    num_temporal_filters: int = 8
    # The ids of one visual's placeholder; only needed where the caller hands in no visual_mask.
    image_ids: list[int] | tuple[int, ...] | None = None

    def __post_init__(self):
        self.summary = SUMMARY_ALIASES.get(self.summary, self.summary)
        if isinstance(self.language_model, dict):
            self.language_model = LanguageModelConfig.from_dict(self.language_model)

    def tokens_per_visual(self, num_frames: int) -> int:
        """Rows of the language model's input that a visual of `num_frames` frames takes."""
        return self.tokens_per_frame * (num_frames if self.summary == "concat" else 1)

    def problems(self) -> list[str]:
        found = self.language_model.problems()
        if self.summary not in SUMMARY_KINDS:
            found.append(f"summary must be one of {', '.join(SUMMARY_KINDS)}, not {self.summary!r}")
        for name in ("vision_hidden_size", "tokens_per_frame", "num_temporal_filters"):
            if getattr(self, name) < 1:
                found.append(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.summary == "gpt4video" and self.vision_hidden_size % 8:
            found.append(
                f"summary gpt4video attends with 8 heads: vision_hidden_size "
                f"{self.vision_hidden_size} must be a multiple of 8"
            )
        if self.image_ids is not None:
            if self.summary != "concat" and len(self.image_ids) != self.tokens_per_frame:
                found.append(
                    f"image_ids has {len(self.image_ids)} ids, but a visual takes "
                    f"{self.tokens_per_frame} tokens"
                )
            if not all(0 <= i < self.language_model.vocab_size for i in self.image_ids):
                found.append(f"image_ids must lie in 0..{self.language_model.vocab_size - 1}")
        return found
