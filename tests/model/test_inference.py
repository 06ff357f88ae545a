"""A prepared model answers as the one it was made from."""

import copy

import pytest
import torch

from model.config import LanguageModelConfig
from model.generate import generate
from model.inference import prepare
from model.minimind import MiniMind

KINDS = {
    "dense": {},
    "qk_norm": {"qk_norm": True},
    "experts": {"num_experts": 3, "num_experts_per_tok": 2, "num_shared_experts": 1},
}


def make(**settings) -> MiniMind:
    torch.manual_seed(0)
    settings |= {"initializer_range": 0.1, "embedding_std": 0.5}
    return MiniMind(LanguageModelConfig(97, 64, 2, 4, **settings)).eval()


def inputs() -> dict:
    """Three prompts of unlike lengths."""
    ids = torch.randint(3, 97, (3, 12), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.arange(12) >= torch.tensor([[0], [3], [7]])}


@pytest.mark.parametrize("kind", KINDS)
def test_float32_gives_the_same_logits_and_answers(kind):
    model = make(**KINDS[kind])
    ready = prepare(copy.deepcopy(model), "float32")
    with torch.no_grad():
        expected, logits = model(**inputs()).logits, ready(**inputs()).logits
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    together, rows = generate(ready, inputs(), 20, 0), zip(*inputs().values(), strict=True)
    assert together == generate(model, inputs(), 20, 0)
    alone = [generate(ready, {"input_ids": ids[mask][None]}, 20, 0)[0] for ids, mask in rows]
    assert together == alone
    assert sum(p.numel() for p in ready.parameters()) == sum(p.numel() for p in model.parameters())


FEWER_BITS = [({"dtype": "bfloat16"}, 0.995), ({"quantize": "int8"}, 0.99)]


@pytest.mark.parametrize("how, alike", FEWER_BITS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_fewer_bits_stay_near(kind, how, alike):
    model = make(**KINDS[kind])
    ready = prepare(copy.deepcopy(model), **how)
    with torch.no_grad():
        expected, logits = model(**inputs()).logits, ready(**inputs()).logits.float()
    # Of a mixture of experts a token may meet others: the mean.
    assert torch.cosine_similarity(expected, logits, dim=-1).mean() > alike
    assert [len(ids) for ids in generate(ready, inputs(), 20, 96)] != [0, 0, 0]


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="--dtype float32 --quantize int4: choose of .* int8"):
        prepare(make(), "float32", "int4")
