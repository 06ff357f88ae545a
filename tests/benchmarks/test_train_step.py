"""The benchmark of a step counts operations by hand: here torch's own counter looks over it."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoTokenizer

from benchmarks import train_step
from trainer.config import TrainConfig
from trainer.engine import compute_loss


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(train_step.ROOT / "model/text_tokenizer")


@pytest.mark.parametrize("share", [False, True])
def test_useful_operations_are_those_of_a_step_without_padding(tokenizer, share):
    samples = train_step.make_samples(2 if share else 1, seed=0)
    source = train_step.Source(num_frames=2)
    (batch,) = train_step.make_way("one", samples, tokenizer, source, 4096, 1, share).batches
    assert batch["padded_tokens"] == batch["real_tokens"]
    model = train_step.make_model(dim=64, n_layers=2)
    with FlopCounterMode(display=False) as counter:
        compute_loss(model, batch, "float32", torch.device("cpu")).backward()
    # The counter doesn't know attention on a CPU: here its pairs are counted one by one.
    segments = batch["inputs"].get("segment_ids", torch.zeros_like(batch["inputs"]["input_ids"]))[0]
    pairs = sum(
        bool(segments[key] in (0, segments[query]))
        for query in range(len(segments))
        for key in range(query + 1)
    )
    attention = 6 * 2 * pairs * 64 * 2  # two products of 64 channels in each of two layers
    counted = counter.get_total_flops() + attention
    assert train_step.useful_operations(model, batch) == pytest.approx(counted, rel=1e-3)


def test_the_made_up_conversations_have_the_lengths_that_they_claim(tokenizer):
    way = train_step.make_way(
        "all", train_step.make_samples(140, 0), tokenizer, train_step.Source(1), 4096, 10
    )
    samples = sum(len(batch["sample_ids"]) for batch in way.batches)
    supervised = sum(batch["supervised_tokens"] for batch in way.batches)
    assert supervised / samples == pytest.approx(train_step.ANSWER["mean"], rel=0.15)


def test_padding_to_a_length_gives_the_loss_of_the_rows_themselves(tokenizer):
    source, samples = train_step.Source(2), train_step.make_samples(3, 0)
    way = train_step.make_way("padded 512", samples, tokenizer, source, 0, 1, pad_to=512, rows=3)
    (batch,) = way.batches
    model, config = train_step.make_model(64, 2), TrainConfig(dtype="float32")
    device = torch.device("cpu")
    padded = train_step.padded_loss(model, batch, 512, config, device)
    assert padded.item() == pytest.approx(
        compute_loss(model, batch, config.dtype, device).item(), rel=1e-5
    )
