"""VideoSummary: any number of frames in, the tokens of one frame out.

GPT4Video (arXiv 2311.16511) condenses a video with learned queries along a spatial and a temporal
branch. Attention over frames learns slowly which way time runs, or never where frames carry no
position, so `dct` keeps the two branches but shows them each token's *temporal coefficients*: the
cosine transform (DCT-II) of its features over time. The first coefficient is the mean, the second
is negative for what grows and positive for what fades, and so on: a linear layer then reads
direction at once.

A tower without a CLS (SigLIP) has P places: the mean of their coefficients stands in for the CLS's.

Shapes: N frames of the whole batch, V visuals, F frames of the longest visual, P tokens a frame (a
CLS first), D vision width, K temporal coefficients, X = (K + 1) · D.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from model.config import SUMMARY_ALIASES, SUMMARY_KINDS, has_cls

# What changes within a clip is small beside what stays: where the mean of normalised features is
# 1, signed coefficients are 0.05 to 0.2 and the mean change is 0.3. Raised, they learn as early.
CHANGE_GAIN = 4.0


def pad_frames(features_NPD: Tensor, frames_per_visual: list[int]) -> Tensor:
    """(N, P, D), the frames of all visuals → (V, F, P, D), zeros after a visual's last frame."""
    longest = max(frames_per_visual)
    if min(frames_per_visual) == longest:  # the usual batch: no copy
        return features_NPD.unflatten(0, (-1, longest))
    return pad_sequence(features_NPD.split(frames_per_visual), batch_first=True)


def temporal_filters(lengths_V: Tensor, num_filters: int, max_frames: int) -> Tensor:
    """(V, K, F) weights of the DCT-II over each visual's own frames; row 0 takes the mean.

    Frame t of n stands at time (t + ½) / n, so that clips of different lengths are comparable. Zero
    on padding, and for the coefficients k ≥ n, which n frames can't tell from the lower ones.
    """
    frames_F = torch.arange(max_frames, device=lengths_V.device)
    orders_K1 = torch.arange(num_filters, device=lengths_V.device)[:, None]
    lengths_V11 = lengths_V[:, None, None]
    waves_VKF = torch.cos(math.pi * orders_K1 * (frames_F + 0.5) / lengths_V11)
    scales_K1 = torch.where(orders_K1 == 0, 1.0, math.sqrt(2))  # then all have the same energy
    defined_VKF = (frames_F < lengths_V11) & (orders_K1 < lengths_V11)
    return waves_VKF * scales_K1 / lengths_V11 * defined_VKF


def mean_change(tokens_VFPD: Tensor, lengths_V: Tensor) -> Tensor:
    """(V, P, D) mean |difference| of neighbouring frames; zero for a single frame.

    It tells spinning from standing still, which signed filters average away.
    """
    steps_F = torch.arange(1, tokens_VFPD.shape[1], device=lengths_V.device)
    weights_VF = (steps_F < lengths_V[:, None]) / (lengths_V[:, None] - 1).clamp(min=1)
    change_VFPD = (tokens_VFPD[:, 1:] - tokens_VFPD[:, :-1]).abs()
    return torch.einsum("vf,vfpd->vpd", weights_VF, change_VFPD)


class CrossAttention(nn.Module):
    """torch's attention under the name and with the dropout of Cinego 2025's block."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.mha = nn.MultiheadAttention(hidden_size, 8, dropout=0.1, batch_first=True)
        self.dropout = nn.Dropout(0.1)

    def forward(self, queries_VPD: Tensor, keys_VTD: Tensor, padding_VT: Tensor | None) -> Tensor:
        """(V, P, D): what the queries read at T keys, of which those marked True are padding."""
        mixed_VPD, _ = self.mha(
            queries_VPD, keys_VTD, keys_VTD, key_padding_mask=padding_VT, need_weights=False
        )
        return self.dropout(mixed_VPD)


class VideoSummary(nn.Module):
    """The frames of all visuals, condensed to the tokens of one frame each.

    dct        temporal coefficients, described above
    gpt4video  Cinego 2025's block, for its checkpoints; it can't tell a video from its reverse
    mean       the mean over frames; the identity for one image, which is MiniMind-V
    concat     no summary: every frame's tokens go to the language model
    """

    def __init__(
        self, kind: str, hidden_size: int = 768, tokens_per_frame: int = 50, num_filters: int = 8
    ):
        """ValueError where `kind` is none of the four (or the old name of `dct`)."""
        super().__init__()
        kind = SUMMARY_ALIASES.get(kind, kind)
        if kind not in SUMMARY_KINDS:
            raise ValueError(f"summary must be one of {', '.join(SUMMARY_KINDS)}, not {kind!r}")
        self.kind, self.num_filters = kind, num_filters
        self.has_cls = has_cls(tokens_per_frame)
        if kind == "dct":
            coefficients = (num_filters + 1) * hidden_size
            # Its own 2·D would be 10 M parameters at 768 wide, twice the spatial branch.
            hidden = min(2 * hidden_size, 384)
            self.queries = nn.Parameter(torch.randn(1, tokens_per_frame, hidden_size) * 0.02)
            self.spatial = nn.Linear(coefficients, hidden_size)
            self.temporal = nn.Sequential(
                nn.Linear(coefficients, hidden), nn.GELU(), nn.Linear(hidden, hidden_size)
            )
            self.ffn = nn.Sequential(
                nn.LayerNorm(hidden_size),
                nn.Linear(hidden_size, 2 * hidden_size),
                nn.GELU(),
                nn.Linear(2 * hidden_size, hidden_size),
            )
        elif kind == "gpt4video":
            self.query_s = nn.Parameter(torch.randn(1, tokens_per_frame, hidden_size))
            self.query_t = nn.Parameter(torch.randn(1, tokens_per_frame, hidden_size))
            # Lists of one, because Cinego's names have the layer's number in them.
            self.cross_attn_s = nn.ModuleList([CrossAttention(hidden_size)])
            self.cross_attn_t = nn.ModuleList([CrossAttention(hidden_size)])

    def forward(
        self,
        features_NPD: Tensor,
        frames_per_visual: list[int],
        frames_V: Tensor | None = None,
    ) -> Tensor:
        """(N, P, D) frames, visual after visual → (V, P, D); for `concat` (N, P, D) as they are.

        frames_per_visual: V numbers, at least 1 each, that sum to N; ValueError where they don't.
        frames_V: the same on the device, where they are there already: copying them would wait.
        A visual's summary depends neither on its neighbours in the batch nor on their lengths.
        """
        frames = frames_per_visual or []
        if sum(frames) != len(features_NPD) or min(frames, default=0) < 1:
            raise ValueError(
                f"frames_per_visual {frames_per_visual} doesn't add up to the {len(features_NPD)} "
                "frames of visual_features"
            )
        if self.kind == "concat":
            return features_NPD.float()
        lengths_V = frames_V
        if lengths_V is None:
            lengths_V = torch.tensor(frames, device=features_NPD.device)
        if self.kind == "gpt4video":
            return self._cross_attend(features_NPD.to(self.query_s.dtype), frames, lengths_V)
        # The filters are exact numbers on frozen features: no bfloat16, and nothing to learn.
        with torch.autocast(features_NPD.device.type, enabled=False):
            frames_VFPD = pad_frames(features_NPD.float(), frames)
            if self.kind == "mean":
                mean_VF = temporal_filters(lengths_V, 1, frames_VFPD.shape[1])[:, 0]
                return torch.einsum("vf,vfpd->vpd", mean_VF, frames_VFPD)
            coefficients_VPKD = self._temporal_coefficients(frames_VFPD, lengths_V)
        mean_VPD = coefficients_VPKD[:, :, 0].to(self.queries.dtype)
        coefficients_VPX = coefficients_VPKD.flatten(2).to(self.queries.dtype)
        if self.has_cls:
            cls_V1X, places_VPX = coefficients_VPX[:, :1], coefficients_VPX[:, 1:]
        else:
            cls_V1X, places_VPX = coefficients_VPX.mean(1, keepdim=True), coefficients_VPX
        cls_V1D = self.temporal(cls_V1X)
        branches_VPD = self.spatial(places_VPX) + cls_V1D
        if self.has_cls:
            branches_VPD = torch.cat([cls_V1D, branches_VPD], dim=1)
        # The mean frame passes through: an untrained summary is already a picture of the video. It
        # is the normalised one, since a tower's raw features, many times larger than what the
        # branches say of time, would drown it: with them, 500 steps learned no direction at all.
        summary_VPD = mean_VPD + self.queries + branches_VPD
        return summary_VPD + self.ffn(summary_VPD)

    def _temporal_coefficients(self, frames_VFPD: Tensor, lengths_V: Tensor) -> Tensor:
        """(V, P, K + 1, D): the mean, the K - 1 signed coefficients and the mean change."""
        tokens_VFPD = F.layer_norm(frames_VFPD, frames_VFPD.shape[-1:])
        filters_VKF = temporal_filters(lengths_V, self.num_filters, frames_VFPD.shape[1])
        coefficients_VPKD = torch.einsum("vkf,vfpd->vpkd", filters_VKF, tokens_VFPD)
        change_VP1D = mean_change(tokens_VFPD, lengths_V)[:, :, None]
        mean_VP1D, signed_VPKD = coefficients_VPKD.tensor_split([1], dim=2)
        return torch.cat([mean_VP1D, CHANGE_GAIN * signed_VPKD, CHANGE_GAIN * change_VP1D], dim=2)

    def _cross_attend(self, features_NPD: Tensor, frames: list[int], lengths_V: Tensor) -> Tensor:
        """(V, P, D): each branch's queries read all tokens of all frames, and themselves."""
        frames_VFPD = pad_frames(features_NPD, frames)
        num_visuals, longest, tokens_per_frame, _ = frames_VFPD.shape
        padding_VT = None
        if min(frames) < longest:
            padding_VF = torch.arange(longest, device=lengths_V.device) >= lengths_V[:, None]
            padding_VT = padding_VF.repeat_interleave(tokens_per_frame, 1)
            padding_VT = F.pad(padding_VT, (0, tokens_per_frame), value=False)
        summary_VPD = 0
        for queries_1PD, attention in (
            (self.query_s, self.cross_attn_s[0]),
            (self.query_t, self.cross_attn_t[0]),
        ):
            queries_VPD = queries_1PD.expand(num_visuals, -1, -1)
            keys_VTD = torch.cat([frames_VFPD.flatten(1, 2), queries_VPD], dim=1)
            summary_VPD = summary_VPD + attention(queries_VPD, keys_VTD, padding_VT)
        return summary_VPD
