"""A prepared model answers as the one it was made from."""

import copy
import os
import subprocess
import sys

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
    config = LanguageModelConfig(
        *(97, 64, 2, 4), initializer_range=0.1, embedding_std=0.5, **settings
    )
    return MiniMind(config).eval()


def inputs() -> dict:
    """Three prompts of unlike lengths."""
    ids = torch.randint(3, 97, (3, 12), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.arange(12) >= torch.tensor([[0], [3], [7]])}


@pytest.mark.parametrize("kind", KINDS)
def test_float32_gives_the_same_logits_and_answers(kind):
    model = make(**KINDS[kind])
    ready = prepare(copy.deepcopy(model))
    with torch.no_grad():
        expected, logits = model(**inputs()).logits, ready(**inputs()).logits
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    together, (ids, mask) = generate(ready, inputs(), 20, 0), inputs().values()
    assert together == generate(model, inputs(), 20, 0)
    assert together == [
        generate(ready, {"input_ids": ids[i][mask[i]][None]}, 20, 0)[0] for i in range(3)
    ]
    assert sum(p.numel() for p in ready.parameters()) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("weights, alike", [("bfloat16", 0.995), ("int8", 0.99)])
@pytest.mark.parametrize("kind", KINDS)
def test_fewer_bits_stay_near(kind, weights, alike):
    model = make(**KINDS[kind])
    ready = prepare(copy.deepcopy(model), weights)
    with torch.no_grad():
        expected, logits = model(**inputs()).logits, ready(**inputs()).logits.float()
    # Of a mixture of experts a token may meet others: the mean.
    assert torch.cosine_similarity(expected, logits, dim=-1).mean() > alike
    assert [len(ids) for ids in generate(ready, inputs(), 20, 96)] != [0, 0, 0]


def test_unknown_weights_are_refused():
    with pytest.raises(ValueError, match="float32, bfloat16, int8"):
        prepare(make(), "int4")
    for weights in ("bfloat16", "int8"):
        with pytest.raises(ValueError, match=f"{weights} products can't be compiled"):
            prepare(make(), weights, compile=True)


SCRIPT = """
import copy, torch
from tests.model.test_inference import inputs, make
from model.generate import generate
from model.inference import prepare
model = make()
ready = prepare(copy.deepcopy(model), compile=True)
assert generate(ready, inputs(), 20, 0) == generate(model, inputs(), 20, 0)
one = {"input_ids": inputs()["input_ids"][:1]}
assert generate(ready, one, 80, 0) == generate(model, one, 80, 0)
print("same answers", ready.forward.__name__, torch._dynamo.utils.counters["stats"])
"""


def test_without_a_compiler_answers_come_as_they_did():
    from torch._inductor import config

    model = make()
    no_compiler = config.patch({"cpp.cxx": (None, "/no/compiler")})  # what CXX=/no/compiler does
    warning = pytest.warns(UserWarning, match="can't compile, so answers come as without")
    with no_compiler, warning:
        ready = prepare(copy.deepcopy(model), compile=True)
    assert generate(ready, inputs(), 20, 0) == generate(model, inputs(), 20, 0)


@pytest.mark.slow
def test_compiled_steps_give_the_same_answers_for_any_length_and_batch(tmp_path):
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=900
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "can't compile" not in result.stderr and "same answers" in result.stdout
