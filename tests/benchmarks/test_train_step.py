"""The made-up data of the benchmark of a step, and the loss of the ancestors' padded rows."""

import pytest
import torch

from benchmarks import train_step
from trainer.engine import SummedLoss, compute_loss


def test_the_made_up_conversations_have_the_lengths_that_they_claim(tmp_path):
    batches = train_step.make_batches(
        train_step.make_samples(140, tmp_path),
        train_step.Source(1),
        10,
        tokens=4096,
        max_length=1024,
    )
    samples = sum(len(batch["sample_ids"]) for batch in batches)
    supervised = sum(batch["supervised_tokens"] for batch in batches)
    assert supervised / samples == pytest.approx(train_step.ANSWER_MEAN, rel=0.15)


def test_padding_to_a_length_gives_the_loss_of_the_rows_themselves(tmp_path):
    (batch,) = train_step.make_batches(
        train_step.make_samples(3, tmp_path), train_step.Source(2), 1, rows=3, max_length=512
    )
    model, device = train_step.make_model(64, 2), torch.device("cpu")
    padded = train_step.padded_loss(model, batch, 512, "float32", device)
    ragged = compute_loss(SummedLoss(model), batch, "float32", device)
    assert padded.item() == pytest.approx(ragged.item(), rel=1e-5)
