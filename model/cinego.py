"""Cinego: frames → tower → VideoSummary → one linear layer → rows of the language model's input.

Shapes: B batch, L sequence, V visuals, P tokens a frame, D vision width, C model width, S pixels a
side; N frames and R placeholders of the whole batch.
"""

from itertools import accumulate

import torch
from torch import Tensor, nn

from model.config import CinegoConfig
from model.kv_cache import KVCache
from model.minimind import CausalLMOutput, MiniMind
from model.video_summary import VideoSummary
from model.vision_tower import VisionTower


class Cinego(nn.Module):
    def __init__(self, config: CinegoConfig, vision_tower: VisionTower | None = None):
        """The tower is only needed where `pixel_values` are handed in; it is never saved along.

        ValueError for a config that can't be built, and for a tower of another shape.
        """
        super().__init__()
        self.config = config.validate()
        size = (config.vision_hidden_size, config.tokens_per_frame)
        if vision_tower and (vision_tower.hidden_size, vision_tower.tokens_per_frame) != size:
            raise ValueError(
                f"the vision tower gives {vision_tower.tokens_per_frame} tokens of "
                f"{vision_tower.hidden_size} a frame, but the model was made for {size[1]} of "
                f"{size[0]}: use the tower that the model was trained with"
            )
        self.vision_tower = vision_tower
        self.video_summary = VideoSummary(config.summary, *size, config.num_temporal_filters)
        self.vision_proj = nn.Linear(config.vision_hidden_size, config.language_model.hidden_size)
        self.language_model = MiniMind(config.language_model)

    def forward(
        self,
        input_ids: Tensor | None = None,
        visual_features: Tensor | None = None,
        pixel_values: Tensor | None = None,
        frames_per_visual: list[int] | None = None,
        visual_mask: Tensor | None = None,
        segment_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        past_key_values: KVCache | None = None,
        logits_to_keep: int = 0,
        inputs_embeds: Tensor | None = None,
        packed=None,
    ) -> CausalLMOutput:
        """Reads (B, L) ids with the frames of all their visuals, in order of the placeholders.

        The first four after the ids, and packed, are as in `embed`, or inputs_embeds (B, L, C) is
        what it gave; the rest is as in `MiniMind.forward`. Raises ValueError as these two do.
        """
        if inputs_embeds is None:
            visuals = (visual_features, pixel_values, visual_mask)
            if past_key_values and all(part is None for part in visuals):
                inputs_embeds = self.language_model.embed(input_ids)  # an answer has no visuals
            else:
                inputs_embeds = self.embed(
                    input_ids, visual_features, pixel_values, frames_per_visual, visual_mask, packed
                )
        return self.language_model(
            inputs_embeds=inputs_embeds,
            segment_ids=segment_ids,
            position_ids=position_ids,
            attention_mask=attention_mask,
            labels=labels,
            past_key_values=past_key_values,
            logits_to_keep=logits_to_keep,
            packed=packed,
        )

    def embed(
        self,
        input_ids: Tensor,
        visual_features: Tensor | None = None,
        pixel_values: Tensor | None = None,
        frames_per_visual: list[int] | None = None,
        visual_mask: Tensor | None = None,
        packed=None,
    ) -> Tensor:
        """(B, L, C): the embeddings of (B, L) ids, with the visuals in place of the placeholders.

        visual_features (N, P, D) or pixel_values (N, 3, S, S): the frames, visual after visual;
        frames_per_visual: how many belong to each. visual_mask (B, L): the placeholders' places;
        without it the runs equal to `config.image_ids`. packed: dataset/packing.py's PackedBatch,
        which knows the places already. Raises ValueError, with the row or both numbers, where
        placeholders and visuals don't fit.
        """
        embeds_BLC = self.language_model.embed(input_ids)
        frames_V = None if packed is None else packed.frames_V
        rows_RC = self._visual_rows(visual_features, pixel_values, frames_per_visual, frames_V)
        if packed is not None:
            places_R = packed.placeholders_R
        else:
            frames = [] if rows_RC is None else frames_per_visual
            places_R = self._find_places(input_ids, visual_mask, frames)
        if rows_RC is None:
            return embeds_BLC
        if len(rows_RC) != len(places_R):
            raise ValueError(
                f"the batch has {len(places_R)} placeholders, but its visuals have {len(rows_RC)} "
                "tokens: it was made for another tower or --summary, or a visual is missing"
            )
        flat = embeds_BLC.flatten(0, 1)
        return flat.index_copy(0, places_R, rows_RC.to(flat.dtype)).view_as(embeds_BLC)

    def _visual_rows(
        self, visual_features, pixel_values, frames_per_visual, frames_V: Tensor | None
    ) -> Tensor | None:
        """(R, C): what stands at the placeholders, in their order; None without visuals."""
        if pixel_values is not None:
            if self.vision_tower is None:
                raise ValueError(
                    "pixel_values need a vision tower: load the model with vision_path"
                )
            visual_features = self.vision_tower(pixel_values)
        if visual_features is None:
            return None
        frame_shape = (self.config.tokens_per_frame, self.config.vision_hidden_size)
        if tuple(visual_features.shape[1:]) != frame_shape:
            raise ValueError(
                f"visual features of {tuple(visual_features.shape[1:])} a frame, but the model "
                f"takes {frame_shape}: extract them with the tower that it was trained with"
            )
        summary_VPD = self.video_summary(visual_features, frames_per_visual, frames_V)
        return self.vision_proj(summary_VPD.to(self.vision_proj.weight.dtype)).flatten(0, 1)

    def _find_places(
        self, input_ids: Tensor, visual_mask: Tensor | None, frames_per_visual: list[int]
    ) -> Tensor:
        """(R,) places of the placeholders in the flattened (B·L) rows.

        Each row's must end where a visual's tokens end: a misfit that passes in silence would show
        a row the end of its neighbour's video.
        """
        if visual_mask is None:
            if not self.config.image_ids and frames_per_visual:
                raise ValueError("visuals need visual_mask, as the config has no image_ids")
            visual_mask = find_placeholders(input_ids, self.config.image_ids or [])
        ends = [0, *accumulate(map(self.config.tokens_per_visual, frames_per_visual))]
        for row, seen in enumerate(visual_mask.sum(1).cumsum(0).tolist()):
            if seen not in ends:
                raise ValueError(
                    f"row {row} of the batch ends after {seen} placeholders, but the batch's "
                    f"visuals end after {ends[1:]} tokens: each row needs whole visuals"
                )
        return visual_mask.flatten().nonzero()[:, 0]

    def set_trainable(self, freeze_llm: int) -> None:
        """Summary and projector always learn; of the language model, by MiniMind-V's numbers:
        0, all of it; 1, its first and last layer; 2, nothing."""
        self.requires_grad_(True)
        self.language_model.requires_grad_(freeze_llm == 0)
        if freeze_llm == 1:
            layers = self.language_model.model.layers
            layers[0].requires_grad_(True)
            layers[-1].requires_grad_(True)

    def parameter_counts(self) -> dict[str, int]:
        """Parameters of each part, and `trainable` over all. A tower that isn't loaded counts 0."""

        def count(parameters) -> int:
            return sum(p.numel() for p in parameters)

        return {
            "vision_tower": self.vision_tower.num_parameters() if self.vision_tower else 0,
            "video_summary": count(self.video_summary.parameters()),
            "vision_proj": count(self.vision_proj.parameters()),
            "language_model": count(self.language_model.parameters()),
            "trainable": count(p for p in self.parameters() if p.requires_grad),
        }


def find_placeholders(input_ids_BL: Tensor, image_ids: list[int]) -> Tensor:
    """(B, L) mask of the runs equal to `image_ids`, for token streams that come without a mask."""
    mask_BL = torch.zeros_like(input_ids_BL, dtype=torch.bool)
    width = len(image_ids)
    if not width or input_ids_BL.shape[1] < width:
        return mask_BL
    pattern = torch.tensor(image_ids, device=input_ids_BL.device)
    matches = (input_ids_BL.unfold(1, width, 1) == pattern).all(-1).nonzero().tolist()
    free = (-1, 0)  # row and first place after the run before
    for row, start in matches:
        # A placeholder of one repeated id also matches half-way into the next one: skip those.
        if row != free[0] or start >= free[1]:
            mask_BL[row, start : start + width] = True
            free = (row, start + width)
    return mask_BL
