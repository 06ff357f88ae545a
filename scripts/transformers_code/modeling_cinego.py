"""Cinego as transformers' generate(), Trainer and from_pretrained know a model.

Only the handles are here. The model itself is Cinego's own code, which stands beside this file in
an exported directory (`from model.cinego import …` reads `from .model_cinego import …` there).

    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(directory, trust_remote_code=True)
    content = [{"type": "video", "path": "a.mp4"}, {"type": "text", "text": "What happens?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True, tokenize=True, return_dict=True,
    )
    ids = model.generate(**inputs, max_new_tokens=64)[0, inputs["input_ids"].shape[1] :]
    print(processor.decode(ids, skip_special_tokens=True))

Shapes: B batch, L sequence, C model width.
"""

import torch
from torch import Tensor, nn
from transformers import AutoModel, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from model.cinego import Cinego
from model.vision_tower import VisionTower

from .configuration_cinego import CinegoHubConfig


class Cache:
    """transformers' cache under the two names by which MiniMind uses its own."""

    def __init__(self, cache):
        self.cache = cache

    def __len__(self) -> int:
        return self.cache.get_seq_length()

    def extend(self, layer_idx: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return self.cache.update(keys, values, layer_idx)


class CinegoForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = CinegoHubConfig
    main_input_name = "input_ids"
    _supports_sdpa = True
    _no_split_modules = ["Block"]

    def __init__(self, config: CinegoHubConfig):
        super().__init__(config)
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.cinego = Cinego(config.model_config(), VisionTower(self.vision_tower))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Cinego's parts have drawn their numbers when they were made."""

    def get_input_embeddings(self) -> nn.Module:
        return self.cinego.language_model.model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.cinego.language_model.model.embed_tokens = value

    def train(self, mode: bool = True) -> "CinegoForCausalLM":
        super().train(mode)
        # Frozen; said here because loading puts new parameters in the place of those first made.
        self.vision_tower.requires_grad_(False).eval()
        return self

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values=None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        visual_features: Tensor | None = None,
        frames_per_visual: Tensor | list[int] | None = None,
        visual_mask: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        num_items_in_batch: Tensor | int | None = None,
        return_dict: bool | None = None,
    ) -> CausalLMOutputWithPast:
        """As `Cinego.forward`, but what transformers expects comes out.

        attention_mask (B, L with what the cache holds), 0 on left padding. labels (B, L), -100
        where unsupervised: the loss is the mean over supervised tokens (of all batches that are
        accumulated, where Trainer gives `num_items_in_batch`), and there are no logits. ValueError
        for a mask of another form, and as there.
        """
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if attention_mask is not None:
            if attention_mask.ndim != 2:
                raise ValueError("Cinego takes no 4-D attention masks or static, compiled caches")
            # Nothing padded: plain causal attention is exactly what Cinego's own generate runs.
            attention_mask = None if attention_mask.all() else attention_mask.bool()
        output = self.cinego(
            input_ids,
            **self._plain(pixel_values, visual_features, frames_per_visual, visual_mask),
            inputs_embeds=inputs_embeds,
            position_ids=position_ids,
            attention_mask=attention_mask,
            labels=labels,
            past_key_values=None if past_key_values is None else Cache(past_key_values),
            logits_to_keep=logits_to_keep,
        )
        loss = output.loss
        if loss is not None:
            supervised = (labels[:, 1:] != -100).sum().clamp(min=1)
            loss = loss / (supervised if num_items_in_batch is None else num_items_in_batch)
        return CausalLMOutputWithPast(
            loss=loss, logits=output.logits, past_key_values=past_key_values
        )

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        visual_features: Tensor | None = None,
        frames_per_visual: Tensor | list[int] | None = None,
        visual_mask: Tensor | None = None,
        **kwargs,
    ):
        """transformers' generate. Visuals are read once, however many beams and tokens follow: from
        here on they stand in the prompt's embeddings. ValueError for use_cache=False."""
        if not kwargs.get("use_cache", True):
            raise ValueError("Cinego generates with a cache: leave use_cache=False out")
        visuals = self._plain(pixel_values, visual_features, frames_per_visual, visual_mask)
        embeds_BLC = self.cinego.embed(input_ids, **visuals)
        return super().generate(input_ids, inputs_embeds=embeds_BLC, **kwargs)

    def _plain(self, pixel_values, visual_features, frames_per_visual, visual_mask) -> dict:
        """As a processor gives them → as `Cinego.embed` takes them."""
        if isinstance(frames_per_visual, Tensor):
            frames_per_visual = frames_per_visual.tolist()
        if pixel_values is not None:
            pixel_values = pixel_values.to(self.vision_tower.dtype)
        return {
            "visual_features": visual_features,
            "pixel_values": pixel_values,
            "frames_per_visual": frames_per_visual,
            "visual_mask": None if visual_mask is None else visual_mask.bool(),
        }
