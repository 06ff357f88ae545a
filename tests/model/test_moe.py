"""A mixture of experts: the right experts with the right weights, all used, all learning."""

import copy

import pytest
import torch

from model.config import LanguageModelConfig
from model.minimind import MLP, MiniMind
from model.moe import MixtureOfExperts, balance_loss
from trainer.optim import is_hidden_matrix

SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
MINIMIND3 = {"num_experts": 4, "num_experts_per_tok": 1}
MINIMIND2 = {"num_experts": 4, "num_experts_per_tok": 2, "num_shared_experts": 1}
FRESH = MINIMIND3 | {"norm_topk_prob": False}  # what --use_moe starts from


def make(**moe):
    torch.manual_seed(0)
    return MiniMind(LanguageModelConfig(**SMALL, initializer_range=0.1, embedding_std=0.5, **moe))


@pytest.mark.parametrize("settings", [MINIMIND3, MINIMIND2, FRESH, {"num_experts": 1}])
def test_each_token_gets_its_most_probable_experts(settings):
    config = LanguageModelConfig(**SMALL, **settings)
    layer, x = MixtureOfExperts(config, MLP), torch.randn(3, 11, 32)
    rows = []
    for token in x.view(33, 32):
        scores = layer.gate(token).softmax(0)
        best = scores.argsort(descending=True)[: config.num_experts_per_tok]
        total = scores[best].sum() if config.norm_topk_prob else 1
        row = sum(scores[e] / total * layer.experts[e](token) for e in best)
        if config.num_shared_experts:
            row = row + layer.shared_experts[0](token)
        rows.append(row)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(layer(x).view(33, 32), torch.stack(rows))


@pytest.mark.parametrize("settings", [MINIMIND3, MINIMIND2])
def test_one_product_for_all_experts_is_each_in_turn(settings, monkeypatch):
    """A GPU's way, on a CPU; an expert without a token has a gradient of zeros in both."""
    layer = MixtureOfExperts(LanguageModelConfig(**SMALL, **settings), MLP).bfloat16()
    x = torch.randn(3, 32).bfloat16()
    found = []
    for grouped in (False, True):
        monkeypatch.setattr("model.moe.takes_grouped_products", lambda x, grouped=grouped: grouped)
        y = layer(x)
        found.append([y, *torch.autograd.grad((y * x).sum(), layer.parameters())])
    for in_turn, together in zip(*found, strict=True):
        torch.testing.assert_close(together, in_turn)


@pytest.mark.parametrize("settings", [MINIMIND2, FRESH])
def test_every_parameter_has_a_gradient_even_of_an_expert_without_tokens(settings):
    """Processes of a distributed run then have gradients for the same parameters."""
    model = make(**settings).train()
    ids = torch.tensor([[5, 6, 7]])  # 3 tokens, and the last layer sees the 2 supervised ones
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    experts = [expert.up_proj.weight.grad for expert in model.model.layers[1].mlp.experts]
    assert 0 < sum(grad.any() for grad in experts) < 4 or settings == MINIMIND2


def test_a_batch_without_supervised_tokens_is_no_accident():
    model = make(**MINIMIND2).train()
    ids, labels = torch.zeros(1, 5, dtype=torch.long), torch.full((1, 5), -100)
    model(ids, labels=labels).loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    with torch.no_grad():
        assert model.eval()(ids, labels=labels).loss == 0


def test_the_reported_loss_is_the_cross_entropy_and_the_balance_is_in_the_gradient():
    model = make(**MINIMIND2)
    ids = torch.randint(0, 64, (2, 20))
    validated = model.eval()(ids, labels=ids)
    trained = model.train()(ids, labels=ids)
    torch.testing.assert_close(trained.loss, validated.loss)
    assert validated.aux_loss is None and trained.aux_loss > 0

    def gradient(loss):
        (grad,) = torch.autograd.grad(loss, model.model.layers[0].mlp.gate.weight)
        return grad

    total = gradient(model(ids, labels=ids).loss)
    output, model.config.router_aux_loss_coef = model(ids, labels=ids), 0.0
    plain = gradient(model(ids, labels=ids).loss)
    weighted = 38 * gradient(output.aux_loss)  # 2 x 19 supervised tokens
    assert weighted.abs().max() > 1e-3
    torch.testing.assert_close(total, plain + weighted)


def test_the_balance_loss_is_that_of_the_switch_transformer():
    even = torch.full((8, 4), 0.25)
    torch.testing.assert_close(balance_loss(even, torch.tensor([2, 2, 2, 2])), torch.tensor(1.0))
    one = torch.tensor([[1.0, 0, 0, 0]]).expand(8, 4)
    torch.testing.assert_close(balance_loss(one, torch.tensor([8, 0, 0, 0])), torch.tensor(4.0))


@pytest.mark.parametrize("settings", [MINIMIND2, FRESH])
def test_it_learns_and_the_balance_loss_spreads_the_tokens(settings):
    """All tokens are made to prefer one expert; only with the balance loss do they leave it."""

    def busiest_share_after(coefficient):
        model = make(**settings, router_aux_loss_coef=coefficient).train()
        with torch.no_grad():  # a direction that all embeddings share, and expert 0 likes it
            model.model.embed_tokens.weight[:, 0] = 2
            for block in model.model.layers:
                block.mlp.gate.weight[0, 0] += 1
        ids = torch.randint(0, 64, (8, 17))
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0)
        first = model(ids, labels=ids).loss.item()
        for _ in range(100):
            optimizer.zero_grad()
            loss = model(ids, labels=ids).loss
            (loss / 128).backward()
            optimizer.step()
        assert loss < 0.6 * first
        shares = []  # of a layer's assignments, what its most popular expert gets

        def count(layer, inputs, output):
            chosen = (inputs[0] @ layer.gate.weight.T).topk(layer.top_k).indices.flatten()
            shares.append(chosen.bincount().max().item() / len(chosen))

        for block in model.eval().model.layers:
            block.mlp.register_forward_hook(count)
        model(ids)
        return max(shares)

    with_balance, without = busiest_share_after(0.3), busiest_share_after(0.0)
    assert with_balance < 0.35 and without > 0.45  # of two experts a token, none has above 0.5


def test_a_frozen_router_leaves_its_inputs_alone():
    """Under --freeze_llm 2 the balance loss could only push the visuals about."""
    model = make(**FRESH).train().requires_grad_(False)
    embeds, labels = torch.randn(1, 9, 32, requires_grad=True), torch.randint(0, 64, (1, 9))
    output = model(inputs_embeds=embeds, labels=labels)
    output.loss.backward()
    assert output.aux_loss is None and embeds.grad.any()


def test_in_bfloat16_the_routing_is_that_of_float32():
    model = make(**MINIMIND2).eval()
    layer, x = model.model.layers[0].mlp, torch.randn(50, 32)
    full = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        half = layer(x)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), full, atol=0.02 * full.abs().max().item(), rtol=0)
    assert copy.deepcopy(model).bfloat16()(torch.zeros(1, 3).long()).logits.dtype == torch.bfloat16


def test_muon_leaves_the_router_to_adamw():
    hidden = {name for name, p in make(**MINIMIND2).named_parameters() if is_hidden_matrix(name, p)}
    assert "model.layers.0.mlp.experts.3.gate_proj.weight" in hidden
    assert "model.layers.0.mlp.shared_experts.0.up_proj.weight" in hidden
    assert not any(name.endswith("mlp.gate.weight") for name in hidden)
