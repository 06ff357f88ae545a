"""Optimizers and the schedule of their rates."""

import math

import torch
from torch import nn

from trainer.config import TrainConfig
from trainer.muon import Muon

# The second beta follows language-model practice: with 0.999 the noisy first gradients would
# govern the step size for a thousand updates, which is the whole run of a small model.
ADAM_BETAS = (0.9, 0.95)

# Muon orthogonalises a matrix's update, which makes sense for a map between hidden states. The
# embedding, the projector (the input layer of the visuals), tables of queries and the router of
# experts (`mlp.gate`, whose outputs are scores) aren't such maps, nor are the factors of a low-rank
# adapter (`lora_A`, `lora_B`): their product is.
HIDDEN = {"layers", "video_summary"}

Named = list[tuple[str, nn.Parameter]]


def by_rate(named: Named, config: TrainConfig) -> list[tuple[Named, float]]:
    """The parameters of the language model and those in front of it, each with its peak rate of
    AdamW; one list where the rates are the same. A part that has none is left out."""
    rate = config.learning_rate
    other = config.projector_learning_rate or rate
    groups: dict[float, Named] = {}
    for name, parameter in named:
        own = rate if name.startswith("language_model.") else other
        groups.setdefault(own, []).append((name, parameter))
    return [(group, rate) for rate, group in groups.items()]


def is_hidden_matrix(name: str, parameter: nn.Parameter) -> bool:
    parts = name.split(".")
    return (
        parameter.ndim == 2
        and parts[-1] == "weight"
        and parts[-2] != "gate"
        and "lora_" not in name
        and bool(HIDDEN & set(parts))
    )


def rate_factor(step: int, total_steps: int, warmup: int, schedule: str) -> float:
    """Share of the peak rate at update `step` (from 0): a linear rise, then a fall towards 0.

    The fall would touch 0 at update `total_steps`, which doesn't come: every update counts.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, total_steps - warmup)
    return 1 - progress if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))


class Optimizers:
    """AdamW alone, or Muon for the hidden matrices beside it, behind one set of calls."""

    def __init__(self, model: nn.Module, config: TrainConfig):
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        assert named, "no parameter is trainable"
        muon = [p for n, p in named if config.optimizer == "muon" and is_hidden_matrix(n, p)]
        chosen = {id(p) for p in muon}
        decayed = [(n, p) for n, p in named if id(p) not in chosen and p.ndim >= 2]
        plain = [(n, p) for n, p in named if p.ndim < 2]  # norms, biases: decay would only hurt
        groups = [
            {"params": [p for _, p in group], "weight_decay": decay, "lr": rate}
            for whole, decay in ((decayed, config.weight_decay), (plain, 0.0))
            for group, rate in by_rate(whole, config)
        ]

        self.parameters = [p for _, p in named]
        self.members: list[torch.optim.Optimizer] = []
        if groups:
            self.members.append(
                torch.optim.AdamW(
                    groups,
                    betas=ADAM_BETAS,
                    fused=True,  # one kernel for all tensors: the loop over them costs on a CPU
                )
            )
        if muon:
            self.members.append(
                Muon(muon, lr=config.muon_learning_rate, weight_decay=config.weight_decay)
            )
        self.peaks = [[group["lr"] for group in member.param_groups] for member in self.members]
        self.description = ", ".join(
            f"{label} {sum(p.numel() for p in group):,} parameters in {len(group)} tensors"
            for label, group in (
                ("Muon", muon),
                ("AdamW with decay", [p for _, p in decayed]),
                ("AdamW without", [p for _, p in plain]),
            )
            if group
        )

    def set_rates(self, factor: float) -> None:
        for member, peaks in zip(self.members, self.peaks, strict=True):
            for group, peak in zip(member.param_groups, peaks, strict=True):
                group["lr"] = peak * factor

    def unscale_and_clip(self, scaler: torch.amp.GradScaler, largest: float) -> torch.Tensor:
        """Clips the gradients of all members together; returns their norm before clipping."""
        for member in self._with_gradients():
            scaler.unscale_(member)
        return nn.utils.clip_grad_norm_(self.parameters, largest or math.inf)

    def step(self, scaler: torch.amp.GradScaler) -> None:
        for member in self._with_gradients():
            scaler.step(member)
        scaler.update()

    def zero_grad(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def state_dict(self) -> list[dict]:
        return [member.state_dict() for member in self.members]

    def load_state_dict(self, states: list[dict]) -> None:
        for member, state in zip(self.members, states, strict=True):
            member.load_state_dict(state)

    def _with_gradients(self) -> list[torch.optim.Optimizer]:
        """A text-only batch under a frozen language model has none; the scaler would object."""
        return [
            member
            for member in self.members
            if any(p.grad is not None for group in member.param_groups for p in group["params"])
        ]
