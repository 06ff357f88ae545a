"""A batch without its padding: the same loss and gradients, and nothing is asked of the device."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from dataset.samples import read_samples
from dataset.video_dataset import VideoDataset, collate
from model.cinego import Cinego
from model.config import CinegoConfig, LanguageModelConfig
from model.tokenizer import open_tokenizer

P, D = 6, 16
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "num_shared_experts": 1}
# What makes a GPU's process wait: reading a number, or a result as long as its values say; and a
# tensor made of Python numbers, which is copied.
WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "lift_fresh", "bincount", "unique")


class Features:
    """As many frames as the name says."""

    kind = "visual_features"

    def read(self, name: str) -> torch.Tensor:
        return torch.randn(int(name), P, D, generator=torch.Generator().manual_seed(int(name)))


@pytest.fixture(scope="module")
def make_batch(tmp_path_factory):
    """A training batch: rows shared or not, of none, one and several visuals of unlike length."""
    rng, lines = np.random.default_rng(0), []
    for visuals in ("", "3", "8", "1,5", "2,2,9"):
        for _ in range(3):
            question = " ".join(rng.choice(["red", "left", "up"], rng.integers(1, 30)))
            answer = " ".join(rng.choice(["to", "is", "all"], rng.integers(1, 200)))
            tags = "<video>" * len(visuals.split(",")) if visuals else ""
            texts = [f"{tags}\n{question}", answer, question, answer][: 2 * rng.integers(1, 3)]
            turns = [{"from": ("human", "gpt")[i % 2], "value": t} for i, t in enumerate(texts)]
            lines.append({"conversations": turns} | ({"video": visuals} if visuals else {}))
    path = tmp_path_factory.mktemp("packed") / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    parts = read_samples(path), open_tokenizer("model/text_tokenizer"), Features()

    def make(share: bool, tokens_per_visual=lambda frames: P) -> dict:
        dataset = VideoDataset(*parts, tokens_per_visual, share_prefix=share)
        return collate([dataset[row] for row in range(len(dataset))], pad_id=0)["inputs"]

    return make


def make_model(summary="dct", **settings) -> Cinego:
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}
    config = LanguageModelConfig(6400, 32, 2, embedding_std=0.5, **sizes | settings)
    return Cinego(CinegoConfig(config, summary, D, P)).eval()


def loss_and_gradients(model, inputs):
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("summary, settings", [("dct", {}), ("concat", {"qk_norm": True})])
def test_without_padding_loss_and_gradients_are_those_of_masked_rows(
    make_batch, share, summary, settings, monkeypatch
):
    """One sequence after the other, as FlashAttention takes them, against one mask over all."""
    monkeypatch.setattr("model.attention.PRODUCTS_A_CALL", 0)  # never one mask to save calls
    model = make_model(summary, **settings)
    inputs = make_batch(share, model.config.tokens_per_visual)
    assert ("segment_ids" in inputs) == share
    loss, gradients = loss_and_gradients(model, inputs)
    masked_loss, masked = loss_and_gradients(model, inputs | {"packed": None})
    torch.testing.assert_close(loss, masked_loss, atol=0, rtol=1e-6)
    assert gradients.keys() == masked.keys()
    for name, gradient in gradients.items():
        error = (gradient - masked[name]).norm() / masked[name].norm()
        assert error < 1e-5, name


def test_sequences_are_told_to_a_kernel_as_to_the_loop(make_batch):
    packed = make_batch(True)["packed"]
    assert packed.query_starts.diff().tolist() == packed.query_lengths
    assert packed.key_starts.diff().tolist() == packed.key_lengths
    assert packed.query_starts[-1] == len(packed.tokens_T)
    assert packed.key_starts[-1] == len(packed.keys_K) > len(packed.tokens_T)
    assert max(packed.key_lengths) <= packed.max_length
    keys = packed.keys_K.split(packed.key_lengths)
    own = [rows[-n:] for rows, n in zip(keys, packed.query_lengths, strict=True)]
    assert torch.equal(torch.cat(own), torch.arange(len(packed.tokens_T)))
    assert make_batch(False)["packed"].keys_K is None


class CountOperators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.all, self.waiting = Counter(), Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("aten::")
        self.all[name] += 1
        indices = args[1] if name in ("index", "index_put", "index_put_") else ()
        by_mask = any(torch.is_tensor(i) and i.dtype in (torch.bool, torch.uint8) for i in indices)
        if name in WAITING or by_mask:
            self.waiting[name] += 1
        return function(*args, **kwargs or {})


@pytest.mark.parametrize(
    "summary, share, moe",
    [("dct", False, {}), ("gpt4video", True, {}), ("mean", True, EXPERTS), ("concat", True, {})],
)
def test_nothing_is_asked_of_the_device_between_forward_and_backward(
    make_batch, summary, share, moe, monkeypatch
):
    monkeypatch.setattr("model.moe.takes_grouped_products", lambda x: True)  # as a GPU does
    model = make_model(summary, **moe).train()
    inputs = make_batch(share, model.config.tokens_per_visual)
    with CountOperators() as operators:
        model(**inputs).loss.backward()
    assert not operators.waiting
    with CountOperators() as operators:  # the count sees what a batch without places asks for
        model(**inputs | {"packed": None}).loss.backward()
    assert operators.waiting["nonzero"]


@pytest.mark.parametrize(
    "dtype, moe", [(torch.bfloat16, {}), (torch.float32, {}), (torch.bfloat16, EXPERTS)], ids=str
)
@pytest.mark.parametrize("share", [True, False])
def test_a_gpu_s_way_needs_shapes_only(make_batch, share, dtype, moe):
    """The meta device has no numbers: whatever read one, or had a shape that follows from numbers,
    would raise. It takes the ways of CUDA: FlashAttention in half precision, else one mask."""
    model = make_model("gpt4video", **moe).to("meta", dtype).train()
    inputs = make_batch(share)
    inputs = tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), inputs)
    with CountOperators() as operators:
        model(**inputs).loss.backward()
    layers, flash = 2, operators.all["torch_attn::_varlen_attn"]
    assert flash == (layers if dtype == torch.bfloat16 else 0)
    assert all(p.grad is not None for p in model.parameters())
