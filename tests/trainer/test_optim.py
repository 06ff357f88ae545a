"""Optimizers: which parameters they take, at which rates, and what a float16 overflow does."""

import math
from functools import partial

import pytest
import torch

from model.cinego import Cinego
from model.config import CinegoConfig, LanguageModelConfig
from trainer.config import TrainConfig
from trainer.optim import Muon, Optimizers, learning_rate_factor

SHAPES = [(8, 8), (8, 8), (24, 8), (8, 24), (24, 8)]


@pytest.fixture
def model():
    torch.manual_seed(0)
    language_model = LanguageModelConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    return Cinego(CinegoConfig(language_model, vision_hidden_size=16, tokens_per_frame=5))


def matrices(seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator) for shape in SHAPES]


def test_schedules():
    factors = partial(learning_rate_factor, total_steps=12, warmup=3)
    linear = [factors(step, schedule="linear") for step in range(12)]
    assert linear[:4] == [0.25, 0.5, 0.75, 1.0]
    assert linear[3:] == pytest.approx([1 - i / 9 for i in range(9)])
    cosine = [factors(step, schedule="cosine") for step in range(12)]
    assert cosine[:4] == linear[:4]
    assert cosine[6] == pytest.approx(0.75) and cosine[9] == pytest.approx(0.25)
    assert 0 < cosine[-1] < linear[-1]


def test_muon_takes_hidden_matrices_and_decay_only_matrices(model):
    names = {parameter: name for name, parameter in model.named_parameters()}
    config = TrainConfig(optimizer="muon", learning_rate=1e-3, muon_learning_rate=0.02)
    optimizers = Optimizers(model, config)
    adamw, muon = optimizers.members
    decayed, plain = ([names[p] for p in group["params"]] for group in adamw.param_groups)
    hidden = [names[p] for p in muon.param_groups[0]["params"]]
    assert {"language_model.model.embed_tokens.weight", "vision_proj.weight"} <= set(decayed)
    assert "video_summary.queries" in decayed and "language_model.model.norm.weight" in plain
    assert len(hidden) == 2 * 7 + 5 and not any("norm" in name for name in hidden)
    assert sorted(hidden + decayed + plain) == sorted(names.values())
    assert adamw.param_groups[1]["weight_decay"] == 0 < adamw.param_groups[0]["weight_decay"]
    optimizers.set_learning_rates(0.5)
    rates = [group["lr"] for member in optimizers.members for group in member.param_groups]
    assert rates == [5e-4, 5e-4, 0.01]


@pytest.mark.parametrize("grad_clip", [0.0, 1.0])
def test_an_overflow_of_float16_skips_the_step_of_all_optimizers(model, grad_clip):
    optimizers = Optimizers(model, TrainConfig(optimizer="muon"))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.zeros(()))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}

    def step(overflow):
        for p in model.parameters():
            p.grad = torch.full_like(p, 8e-3)
        if overflow:
            model.language_model.model.layers[0].mlp.up_proj.weight.grad[0, 0] = math.inf
        norm = optimizers.clip_gradients(scaler, grad_clip)
        optimizers.step(scaler, norm)
        return norm.item()

    assert step(overflow=True) == math.inf
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert scaler.get_scale() == 4.0
    assert math.isfinite(step(overflow=False))
    assert all(p.isfinite().all() for p in model.parameters())
    assert not any(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_muon_steps_as_torchs_does():
    ours, theirs = ([torch.nn.Parameter(matrix / 10) for matrix in matrices(0)] for _ in range(2))
    settings = {"lr": 0.02, "weight_decay": 0.1}
    optimizers = Muon(ours, **settings), torch.optim.Muon(theirs, **settings)
    for step in range(4):
        for a, b, gradient in zip(ours, theirs, matrices(step + 1), strict=True):
            a.grad, b.grad = gradient.clone(), gradient.clone()
        ours[-1].grad = theirs[-1].grad = None if step == 2 else ours[-1].grad
        for optimizer in optimizers:
            optimizer.step()
    for a, b, start in zip(ours, theirs, matrices(0), strict=True):
        moved = (b - start / 10).abs().max()
        assert (a - b).abs().max() < 0.03 * moved  # theirs computes in bfloat16
