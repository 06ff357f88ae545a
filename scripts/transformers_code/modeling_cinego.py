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

Shapes: B batch, L sequence, N frames of the whole batch, P tokens a frame, D vision width.
"""

import torch
from torch import Tensor, nn
from transformers import AutoModel, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from model.cinego import Cinego, find_placeholders
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
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values=None,
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
        accumulated, where Trainer gives `num_items_in_batch`), and there are no logits.
        """
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if attention_mask is not None and attention_mask.ndim != 2:
            raise ValueError("Cinego takes no 4-D attention masks, nor static or compiled caches")
        # Nothing padded: plain causal attention is exactly what Cinego's own generate runs.
        if attention_mask is not None and attention_mask.all():
            attention_mask = None
        if pixel_values is not None:
            pixel_values = pixel_values.to(self.vision_tower.dtype)
        output = self.cinego(
            input_ids,
            visual_features=visual_features,
            pixel_values=pixel_values,
            frames_per_visual=_as_list(frames_per_visual),
            visual_mask=None if visual_mask is None else visual_mask.bool(),
            position_ids=position_ids,
            attention_mask=None if attention_mask is None else attention_mask.bool(),
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
    def generate(self, *args, pixel_values: Tensor | None = None, **kwargs):
        if pixel_values is not None:
            # Once, and not for each beam, nor for each token where there is no cache.
            features = self.cinego.vision_tower(pixel_values.to(self.vision_tower.dtype))
            kwargs["visual_features"] = features
        return super().generate(*args, **kwargs)

    def prepare_inputs_for_generation(self, input_ids, is_first_iteration=False, **kwargs):
        """Visuals go where their placeholders do: along at first, or always without a cache."""
        names = ("pixel_values", "visual_features", "frames_per_visual", "visual_mask")
        visuals = {name: kwargs.pop(name, None) for name in names}
        inputs = super().prepare_inputs_for_generation(
            input_ids, is_first_iteration=is_first_iteration, **kwargs
        )
        if is_first_iteration or not kwargs.get("use_cache", True):
            mask = visuals["visual_mask"]
            if mask is not None:  # of the prompt: what was generated has no visuals
                mask = nn.functional.pad(mask, (0, input_ids.shape[1] - mask.shape[1]))
                visuals["visual_mask"] = mask = mask[:, -inputs["input_ids"].shape[1] :]
            if mask is None or mask.any():
                inputs |= visuals
        return inputs

    def _expand_inputs_for_generation(
        self, expand_size=1, is_encoder_decoder=False, input_ids=None, **kwargs
    ):
        """Beams and several answers a prompt: each row's visuals are repeated as a whole."""
        frames = _as_list(kwargs.pop("frames_per_visual", None))
        features = kwargs.pop("visual_features", None)
        if features is not None and expand_size > 1:
            mask = kwargs.get("visual_mask")
            if mask is None:
                mask = self._find_placeholders(input_ids)
            features, frames = self._repeat_visuals(features, frames, mask, expand_size)
        input_ids, kwargs = super()._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **kwargs
        )
        if features is not None:
            kwargs |= {"visual_features": features, "frames_per_visual": frames}
        return input_ids, kwargs

    def _find_placeholders(self, input_ids: Tensor) -> Tensor:
        if not self.cinego.config.image_ids:
            raise ValueError("visuals came without visual_mask, and the config has no image_ids")
        return find_placeholders(input_ids, self.cinego.config.image_ids)

    def _repeat_visuals(self, features_NPD, frames: list[int], mask_BL, times: int):
        tokens = self.cinego.config.tokens_per_visual
        visuals = list(zip(features_NPD.split(frames), frames, strict=True))
        rows = []
        for placeholders in mask_BL.sum(1).tolist():
            row = []
            while placeholders > 0 and visuals:
                row.append(visuals.pop(0))
                placeholders -= tokens(row[-1][1])
            rows += [row] * times
        repeated = [visual for row in rows for visual in row]
        return torch.cat([features for features, _ in repeated]), [n for _, n in repeated]


def _as_list(frames_per_visual: Tensor | list[int] | None) -> list[int] | None:
    if isinstance(frames_per_visual, Tensor):
        return frames_per_visual.tolist()
    return frames_per_visual
