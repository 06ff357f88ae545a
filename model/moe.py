"""A mixture of experts in place of a layer's MLP: a router sends each token to a few of several.

After MiniMind: four experts of which a token takes one (MiniMind-3), or two and a shared expert
that every token passes (MiniMind2). Parameters carry the names of MiniMind-3 and of MiniMind2 of
Apr 2025.

Shapes: T tokens, E experts, K experts a token, A = T·K assignments, C model width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention import compute_dtype, is_recent_gpu
from model.config import LanguageModelConfig


class MixtureOfExperts(nn.Module):
    def __init__(self, config: LanguageModelConfig, expert: type[nn.Module]):
        """expert: the class of a dense layer's MLP, made from `config`."""
        super().__init__()
        self.top_k, self.normalise = config.num_experts_per_tok, config.norm_topk_prob
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = nn.ModuleList(expert(config) for _ in range(config.num_experts))
        shared = [expert(config) for _ in range(config.num_shared_experts)]
        if shared:
            self.shared_experts = nn.ModuleList(shared)

    def forward(self, x: Tensor, balance_losses: list[Tensor] | None = None) -> Tensor:
        """(…, C) → (…, C). This layer's balance loss is appended to `balance_losses`.

        Tokens are sorted by expert, so that each expert reads its own in one piece and nobody's
        else: as much work as the chosen experts are, however many there are. A GPU is asked for
        nothing in bfloat16; in other types it is, once a layer, for the sizes of the pieces.
        """
        x_TC = x.flatten(0, -2)
        # At least float32, also under autocast: rounding mustn't decide which expert a token meets.
        wide = torch.promote_types(x_TC.dtype, torch.float32)
        device = "cpu" if x.is_meta else x.device.type  # meta has no autocast
        with torch.autocast(device, enabled=False):
            scores_TE = F.linear(x_TC.to(wide), self.gate.weight.to(wide)).softmax(-1)
        weights_TK, experts_TK = scores_TE.topk(self.top_k)
        if self.normalise:
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)

        experts_A = experts_TK.flatten()
        order_A = experts_A.argsort(stable=True)
        chosen_AC = x_TC[order_A // self.top_k]
        # Prepared for answering, or with an adapter beside it, a matrix is a module of its own.
        if (
            takes_grouped_products(x_TC)
            and type(self.experts[0].up_proj) is nn.Linear
            and len(x_TC)
        ):
            ids_E = torch.arange(len(self.experts), device=x.device)
            counts_E = (experts_A[:, None] == ids_E).sum(0)  # bincount would wait for the device
            done_AC = self._run_grouped(chosen_AC, counts_E)
        else:
            counts_E = experts_A.bincount(minlength=len(self.experts))
            done_AC = self._run_in_turn(chosen_AC, counts_E)
        done_TKC = done_AC[order_A.argsort()].unflatten(0, (-1, self.top_k))
        y_TC = (done_TKC * weights_TK[..., None].to(done_TKC.dtype)).sum(1)
        for expert in getattr(self, "shared_experts", ()):
            y_TC = y_TC + expert(x_TC)

        if balance_losses is not None and len(x_TC) and self.gate.weight.requires_grad:
            balance_losses.append(balance_loss(scores_TE, counts_E))
        return y_TC.view_as(x)

    def _run_in_turn(self, x_AC: Tensor, counts_E: Tensor) -> Tensor:
        """Each expert's MLP on its own tokens, which lie together in x_AC."""
        # In training an expert without a token runs on none and gets a gradient of zeros, not None:
        # then all processes, and all steps, have gradients for the same parameters.
        everyone = torch.is_grad_enabled() or not len(x_AC)
        parts = zip(self.experts, x_AC.split(counts_E.tolist()), strict=True)
        return torch.cat([expert(part) for expert, part in parts if everyone or len(part)])

    def _run_grouped(self, x_AC: Tensor, counts_E: Tensor) -> Tensor:
        """The same in one product for all experts, whose sizes stay on the device (bfloat16)."""
        ends_E = counts_E.cumsum(0).int()

        def project(name: str, x: Tensor) -> Tensor:
            weights = [getattr(expert, name).weight for expert in self.experts]
            return F.grouped_mm(x, torch.stack(weights).bfloat16().mT, offs=ends_E)

        x_AC = x_AC.bfloat16()
        return project("down_proj", F.silu(project("gate_proj", x_AC)) * project("up_proj", x_AC))


def takes_grouped_products(x: Tensor) -> bool:
    """Whether the device of x multiplies groups of rows, each by its own matrix, in one call: a GPU
    in bfloat16, since torch 2.10."""
    return is_recent_gpu(x) and hasattr(F, "grouped_mm") and compute_dtype(x) == torch.bfloat16


def balance_loss(scores_TE: Tensor, counts_E: Tensor) -> Tensor:
    """Switch Transformer (arXiv 2101.03961), eq. 4: 1 where all experts get as many tokens, up to E
    where one gets all. A count has no gradient; the mean score beside it has, and pushes it down.
    """
    shares_E = counts_E / counts_E.sum()
    return len(counts_E) * (shares_E * scores_TE.mean(0)).sum()
