"""AdamW, Muon beside it for the hidden matrices, and the schedule of their learning rates."""

import math
from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from device import choose_dtype
from trainer.config import TrainConfig

# The second beta follows language-model practice: with 0.999 the noisy first gradients would
# govern the step size for a thousand steps, which is the whole run of a small model.
ADAM_BETAS = (0.9, 0.95)

# Muon: the quintic a x + b x³ + c x⁵ drives all singular values to about 1 in five iterations.
NEWTON_SCHULZ_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_ITERATIONS = 5
MUON_MOMENTUM = 0.95

# Muon orthogonalises a matrix's step, which makes sense for a map between hidden states. The
# embedding, the projector (the input layer of the visuals), tables of queries and the router of
# experts (`mlp.gate`, whose outputs are scores) aren't such maps, nor are the factors of a low-rank
# adapter (`lora_A`, `lora_B`): their product is.
HIDDEN = {"layers", "video_summary"}


def is_hidden_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether Muon may take the parameter of that name."""
    parts = name.split(".")
    return (
        parameter.ndim == 2
        and parts[-1] == "weight"
        and parts[-2] != "gate"
        and "lora_" not in name
        and bool(HIDDEN & set(parts))
    )


def learning_rate_factor(step: int, total_steps: int, warmup: int, schedule: str) -> float:
    """Share of the peak rate at `step` (from 0): a linear rise, then a fall towards 0.

    The fall would touch 0 at `total_steps`, which doesn't come: every step counts.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, total_steps - warmup)
    return 1 - progress if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))


class Optimizers:
    """AdamW alone, or with Muon for the hidden matrices, behind one set of calls."""

    def __init__(self, model: nn.Module, config: TrainConfig):
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        assert named, "no parameter is trainable"
        projector_rate = config.projector_learning_rate or config.learning_rate
        hidden: list[nn.Parameter] = []
        groups: dict[tuple[bool, float], list[nn.Parameter]] = defaultdict(list)
        for name, p in named:
            if config.optimizer == "muon" and is_hidden_matrix(name, p):
                hidden.append(p)
                continue
            rate = config.learning_rate if name.startswith("language_model.") else projector_rate
            groups[p.ndim >= 2, rate].append(p)  # norms and biases: decay would only hurt

        self.parameters = [p for _, p in named]
        self.members: list[torch.optim.Optimizer] = []
        if groups:
            param_groups = [
                {"params": group, "weight_decay": config.weight_decay * decays, "lr": rate}
                for (decays, rate), group in groups.items()
            ]
            # fused: one kernel for all tensors; the loop over them costs on a CPU too.
            self.members.append(torch.optim.AdamW(param_groups, betas=ADAM_BETAS, fused=True))
        if hidden:
            self.members.append(Muon(hidden, config.muon_learning_rate, config.weight_decay))
        for group in self._groups():
            group["peak_lr"] = group["lr"]
        self.description = "; ".join(
            f"{type(member).__name__}: {sum(p.numel() for p in group['params']):,} parameters in "
            f"{len(group['params'])} tensors, lr {group['lr']:g}, decay {group['weight_decay']:g}"
            for member in self.members
            for group in member.param_groups
        )

    def set_learning_rates(self, factor: float) -> None:
        """Each group's rate becomes that share of its peak."""
        for group in self._groups():
            group["lr"] = group["peak_lr"] * factor

    def clip_gradients(self, scaler: torch.amp.GradScaler, max_norm: float) -> Tensor:
        """Clips the gradients of all members together (0: not at all); returns their norm before.

        With float16 they are divided by the loss's scale first.
        """
        for member in self._with_gradients():
            scaler.unscale_(member)
        return nn.utils.clip_grad_norm_(self.parameters, max_norm or math.inf)

    def step(self, scaler: torch.amp.GradScaler, grad_norm: Tensor) -> None:
        """Moves the weights, unless the norm isn't finite: then no member moves any, since clipping
        by it has made zeros or NaN of all gradients. The device decides; nobody waits for it."""
        found_inf = (~grad_norm.isfinite()).float()
        for member in (members := self._with_gradients()):
            member.found_inf = found_inf  # what torch's fused AdamW minds, and Muon below
            member.step()
        if members:
            scaler.update()

    def zero_grad(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def state_dict(self) -> list[dict]:
        return [member.state_dict() for member in self.members]

    def load_state_dict(self, states: list[dict]) -> None:
        for member, state in zip(self.members, states, strict=True):
            member.load_state_dict(state)

    def _groups(self) -> list[dict]:
        return [group for member in self.members for group in member.param_groups]

    def _with_gradients(self) -> list[torch.optim.Optimizer]:
        """A text-only batch under a frozen language model has none; the scaler would object."""
        return [
            member
            for member in self.members
            if any(p.grad is not None for group in member.param_groups for p in group["params"])
        ]


class Muon(torch.optim.Optimizer):
    """For matrices between hidden states: momentum (Nesterov's), made orthogonal.

    A step moves a matrix of R rows and C columns by `lr · √max(1, R/C)` times a nearly orthogonal
    matrix, and shrinks it by `lr · weight_decay`. It computes what torch.optim.Muon does, which
    takes every matrix alone and always in bfloat16: where a CPU has to emulate that, it was 80 % of
    a step. Here matrices of one shape go together, in a type that the device has.

    Source: Keller Jordan, "Muon: An optimizer for hidden layers in neural networks" (2024),
    https://kellerjordan.github.io/posts/muon/.
    """

    def __init__(self, params: Iterable, lr: float, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.found_inf: Tensor | float = 0.0  # as for AdamW; 1: nothing moves

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    by_shape[p.shape].append(p)
                    if not self.state[p]:
                        self.state[p]["momentum"] = torch.zeros_like(p)
            for shape, params in by_shape.items():
                grads = torch.stack([p.grad for p in params])
                momenta = [self.state[p]["momentum"] for p in params]
                good = 1 - torch.as_tensor(self.found_inf, dtype=grads.dtype, device=grads.device)
                grads = grads.where(good > 0, 0)
                momentum = torch.stack(momenta).lerp(grads, (1 - MUON_MOMENTUM) * good)
                torch._foreach_copy_(momenta, momentum.unbind())
                steps = orthogonalise(grads.lerp(momentum, MUON_MOMENTUM))
                rate = group["lr"] * max(1, shape[0] / shape[1]) ** 0.5
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"] * good)
                torch._foreach_add_(params, (steps * (-rate * good)).unbind())


def orthogonalise(matrices: Tensor) -> Tensor:
    """(N, R, C) → the same shape: each matrix with all its singular values near 1 (0.7 to 1.2).

    Newton-Schulz iteration on the wide form, in the arithmetic that the device is fastest in:
    the result needs no more than bfloat16's three digits.
    """
    a, b, c = NEWTON_SCHULZ_COEFFICIENTS
    tall = matrices.size(1) > matrices.size(2)
    x = matrices.mT if tall else matrices
    x = x.to(getattr(torch, choose_dtype("auto", matrices.device)))
    if x.dtype == torch.float16:  # squares of squares leave its range
        x = x.float()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(NEWTON_SCHULZ_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)
