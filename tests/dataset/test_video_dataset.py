"""jsonl → samples → rows → batches, with a source that makes its visuals up."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

from dataset.conversation import IGNORED, encode
from dataset.sampler import LengthGroupedBatchSampler
from dataset.samples import read_samples
from dataset.video_dataset import VideoDataset, collate

P, D = 6, 4  # tokens a visual and width


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(Path(__file__).parents[2] / "model/text_tokenizer")


class MadeUpSource:
    """`clips/3.mp4` has 3 frames, which hold 0, 1 and 2; a name with `broken` can't be read."""

    kind = "visual_features"

    def __init__(self):
        self.loaded = []

    def read(self, relative):
        self.loaded.append(relative)
        if "broken" in relative:
            raise ValueError(f"{relative}: corrupt")
        frames = torch.arange(int(Path(relative).stem), dtype=torch.float16)
        return frames[:, None, None].expand(-1, P, D)


def line(question="What?", answer="A cat.", **fields) -> dict:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"conversations": turns, **fields}


@pytest.fixture
def make(tmp_path, tokenizer):
    def make(*records, **options):
        path = tmp_path / "data.jsonl"
        path.write_text("\n".join(map(json.dumps, records)))
        samples = read_samples(path)
        return VideoDataset(samples, tokenizer, MadeUpSource(), lambda frames: P, **options)

    return make


# ---------------------------------------------------------------------------------------- rows


def test_a_row_is_one_conversation_with_its_visuals(make, tokenizer):
    pictures = line("<image>, <image>", image="1.jpg,3.jpg")
    backwards = line(video="3.mp4", reverse=True)
    dataset = make(line(video="2.mp4"), line("Say it."), pictures, backwards)
    (row,) = dataset[0]
    alone = encode(tokenizer, dataset.samples[0].messages, [P])
    end = len(row.input_ids)
    assert row.input_ids == alone.input_ids[:end] and row.labels == alone.labels[:end]
    assert row.labels[-1] == tokenizer.eos_token_id  # nothing after it is worth computing
    assert [len(visual) for visual in row.visuals] == [2]
    assert dataset[1][0].visuals == [] and not any(dataset[1][0].visual_mask)
    assert [len(visual) for visual in dataset[2][0].visuals] == [1, 3]
    assert dataset[3][0].visuals[0][:, 0, 0].tolist() == [2, 1, 0]
    assert len(dataset) == len(dataset.lengths) == 4


def test_a_visual_that_cannot_be_read_is_reported_not_raised(make):
    dataset = make(line(id="x", video="broken.mp4"), line(id="y"))
    batch = collate([dataset[0], dataset[1]], pad_id=0)
    (bad,) = batch["bad"]
    assert (bad["id"], bad["path"], bad["line"]) == ("x", "broken.mp4", 1)
    assert "corrupt" in bad["reason"] and bad["file"].endswith("data.jsonl")
    assert batch["sample_ids"] == ["y"] and batch["inputs"]["input_ids"].shape[0] == 1

    nothing = collate([dataset[0]], pad_id=0)
    assert (nothing["inputs"], nothing["supervised_tokens"], len(nothing["bad"])) == ({}, 0, 1)


def test_a_conversation_that_is_too_long_is_cut_or_reported(make):
    dataset = make(line(answer="long " * 50), line("long " * 50), max_length=30)
    (cut,) = dataset[0]
    assert len(cut.input_ids) == 30 and cut.labels[-1] != IGNORED
    (reported,) = dataset[1]
    assert reported.input_ids == [] and "--max_seq_len" in reported.bad[0]["reason"]


def test_a_sample_that_nothing_can_be_learnt_from_stops_at_once(make):
    unanswered = {"conversations": [{"from": "human", "value": "What?"}]}
    with pytest.raises(ValueError, match=r"data\.jsonl:2: .*the last turn must be an answer"):
        make(line(), unanswered)
    with pytest.raises(ValueError, match=r"data\.jsonl:2: .*training sees whole videos: cut the "):
        make(line(), line(video="3.mp4", start=1, end=2.5))


# ------------------------------------------------------------------------------- shared prefix


def rows_of(dataset) -> list[list[int]]:
    return [dataset.samples_of(row).tolist() for row in range(len(dataset))]


def conversations_of(row, pad=IGNORED):
    """Each conversation of a packed row again: what it sees, in order."""
    for number in sorted(set(row.segment_ids)):
        if number or set(row.segment_ids) == {0}:
            seen = [i for i, s in enumerate(row.segment_ids) if s in (0, number)]
            yield [[values[i] for i in seen] for values in (row.input_ids, row.labels)]
            assert [row.position_ids[i] for i in seen] == list(range(len(seen)))


QUESTIONS = [
    line("<video>\nWhat is it?", "A cat.", video="2.mp4"),
    line("<video>\nWhat is it doing?", "It sleeps.", video="2.mp4"),
    line("<video>\n它在做什么？", "睡觉。", video="2.mp4"),
]
OTHERS = [
    line("Where? <video>", "There.", video="2.mp4"),  # its text begins otherwise
    line("<video>\nWhat is it?", "A dog.", video="3.mp4"),  # another clip
    line("<video>\nWhat is it?", "A cat?", video="2.mp4", reverse=True),
    line("What is it?", "A text."),
]


def test_conversations_about_one_visual_share_a_row(make, tokenizer):
    dataset = make(*QUESTIONS, *OTHERS, share_prefix=True)
    assert rows_of(dataset) == [[0, 1, 2], [3], [4], [5], [6]]
    (row,) = dataset[0]
    assert dataset.source.loaded == ["2.mp4"] and len(row.visuals) == 1
    assert sum(row.visual_mask) == P
    assert len(set(row.segment_ids)) == 4 and len(row.sample_ids) == 3
    alone = [encode(tokenizer, sample.messages, [P]) for sample in dataset.samples[:3]]
    for (ids, labels), one in zip(conversations_of(row), alone, strict=True):
        assert ids == one.input_ids[: len(ids)] and labels == one.labels[: len(ids)]
        assert ids[-1] == tokenizer.eos_token_id
    # The last shared token predicts nothing supervised: each answer is predicted by its own.
    for i in range(1, len(row.labels)):
        if row.labels[i] != IGNORED:
            assert row.segment_ids[i - 1] == row.segment_ids[i] > 0


def test_the_same_question_keeps_a_token_of_its_own(make):
    (row,) = make(QUESTIONS[0], QUESTIONS[0], share_prefix=True)[0]
    first = next(i for i, label in enumerate(row.labels) if label != IGNORED)
    assert row.segment_ids[first - 2 : first + 1] == [0, 1, 1]


def test_a_shared_row_never_exceeds_max_length(make):
    # A token of an animal is estimated, and it takes four.
    records = [line("<video>?", f"{i} 🦎🦄🐙🦔🦥", video="2.mp4") for i in range(12)]
    loose = make(*records, share_prefix=True)
    tight = make(*records, share_prefix=True, max_length=80)
    assert rows_of(loose) == [list(range(12))] and sum(rows_of(tight), []) == list(range(12))
    assert all(P < length <= 80 for length in tight.lengths) and 1 < len(tight) < 12
    rows = [row for number in range(len(tight)) for row in tight[number]]
    assert len(rows) > len(tight) and all(len(row.input_ids) <= 80 for row in rows)
    assert [c for row in rows for c in conversations_of(row)] == list(conversations_of(loose[0][0]))
    assert all(len(row.visuals) == 1 and sum(row.visual_mask) == P for row in rows)


def test_what_only_looks_alike_is_not_shared(make):
    one, other = line("b<video>", video="2.mp4"), line("a\0b<video>", video="2.mp4")
    one["conversations"].insert(0, {"from": "system", "value": "a"})
    late = line("<video>?", video="2.mp4")  # the visual comes after an answer
    late["conversations"] = line("Hi", "Hello")["conversations"] + late["conversations"]
    dataset = make(one, other, late, late, share_prefix=True)
    assert rows_of(dataset) == [[0], [1], [2], [3]] and dataset[0] and dataset[1]


def test_shared_rows_give_the_loss_of_the_conversations_alone(make):
    from model.config import LanguageModelConfig
    from model.minimind import MiniMind

    torch.manual_seed(0)
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = MiniMind(LanguageModelConfig(**small, num_key_value_heads=2, embedding_std=0.4)).eval()

    def loss(rows):
        inputs = collate(rows, pad_id=0)["inputs"]
        for name in ("visual_mask", "visual_features", "frames_per_visual"):
            inputs.pop(name, None)  # the placeholders' own embeddings serve here
        return model(**inputs).loss.item()

    shared, alone = make(*QUESTIONS, *OTHERS, share_prefix=True), make(*QUESTIONS, *OTHERS)
    together = loss([shared[i] for i in range(len(shared))])
    one_by_one = sum(loss([alone[i]]) for i in (3, 0, 1, 2, 4, 5, 6))
    assert together == pytest.approx(one_by_one, rel=1e-5)


# ------------------------------------------------------------------------------------- batches


def test_text_image_video_and_several_share_a_batch(make):
    dataset = make(
        line(video="3.mp4"),
        line("Just text, and more of it than elsewhere.", "Yes, it is so."),
        line("<image> or <video>?", "Both.", video="1.jpg,2.mp4"),
    )
    batch = collate([dataset[i] for i in range(3)], pad_id=9)
    inputs, rows = batch["inputs"], [dataset[i][0] for i in range(3)]
    lengths = [len(row.input_ids) for row in rows]
    shape = (3, max(lengths))
    text = dict.fromkeys(("input_ids", "labels", "visual_mask"), shape)
    shapes = {n: tuple(t.shape) for n, t in inputs.items() if torch.is_tensor(t)}
    assert shapes == {**text, "visual_features": (6, P, D)}
    assert inputs["frames_per_visual"] == [3, 1, 2]
    assert inputs["visual_features"][:, 0, 0].tolist() == [0, 1, 2, 0, 0, 1]
    for row, ids, labels in zip(rows, inputs["input_ids"], inputs["labels"], strict=True):
        padding = shape[1] - len(row.input_ids)
        assert ids.tolist() == row.input_ids + [9] * padding
        assert labels.tolist() == row.labels + [IGNORED] * padding
    assert inputs["visual_mask"].sum(1).tolist() == [P, 0, 2 * P]
    assert batch["real_tokens"] == sum(lengths) and batch["padded_tokens"] == 3 * shape[1]
    assert batch["supervised_tokens"] == sum(x != IGNORED for row in rows for x in row.labels)
    assert batch["sample_ids"] == ["data-1", "data-2", "data-3"] and batch["bad"] == []


def test_a_loader_with_workers_gives_the_same_batches(make):
    dataset = make(*QUESTIONS, *OTHERS, share_prefix=True)
    sampler = LengthGroupedBatchSampler(dataset.lengths, 2, seed=1)
    options = {"batch_sampler": sampler, "collate_fn": partial(collate, pad_id=0)}
    loaders = [DataLoader(dataset, num_workers=n, **options) for n in (0, 1)]
    here, there = ([batch["inputs"]["input_ids"].tolist() for batch in x] for x in loaders)
    assert here == there and len(here) == len(sampler) == 3


# ------------------------------------------------------------------------------------- sampler

LENGTHS = [30 + (i * 37) % 101 for i in range(203)]


def batches_of_ranks(lengths, world, *arguments, **options) -> list[list[list[int]]]:
    options["world_size"] = world
    ranks = range(world)
    samplers = [LengthGroupedBatchSampler(lengths, *arguments, rank=r, **options) for r in ranks]
    batches = [list(sampler) for sampler in samplers]
    assert {len(own) for own in batches} == {len(samplers[0])}
    assert sorted(sum(sum(batches, []), [])) == list(range(len(lengths)))
    return batches


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("rows, size, world", [(203, 8, 1), (203, 8, 3), (5, 1, 4), (4, 9, 4)])
def test_every_row_once_and_every_rank_equally_many_batches(rows, size, world, shuffle):
    batches = batches_of_ranks(LENGTHS[:rows], world, size, shuffle=shuffle)
    sizes = [len(batch) for own in batches for batch in own]
    assert min(sizes) >= 1 and max(sizes) <= size + (size == 1)


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize(("rows", "budget", "world"), [(203, 400, 1), (203, 130, 3), (4, 900, 4)])
def test_a_budget_of_tokens_gives_batches_of_like_cost(rows, budget, world, shuffle):
    lengths = LENGTHS[:rows]
    batches = batches_of_ranks(lengths, world, 1, shuffle=shuffle, tokens_per_batch=budget)
    costs = [sum(lengths[row] for row in batch) for own in batches for batch in own]
    assert min(costs) > 0 and max(costs) < budget + max(lengths) + 1
    if rows > 100:
        sizes = [len(batch) for own in batches for batch in own]
        assert max(sizes) > 2 * min(sizes)  # many short rows or few long ones
        assert len(batches[0]) == pytest.approx(sum(lengths) / (budget * world), abs=1)


@pytest.mark.parametrize("budget", [0, 100])
def test_too_few_rows_for_the_processes(budget):
    with pytest.raises(ValueError, match="2 rows are too few for 3 processes"):
        batches_of_ranks([1, 2], 3, 8, tokens_per_batch=budget)
    ranks = batches_of_ranks([1, 2], 3, 8, shuffle=False, tokens_per_batch=budget)
    assert ranks == [[[1]], [[0]], [[]]]  # in validation, a process may have none
    assert collate([], pad_id=0)["inputs"] == {}


def test_rows_of_like_length_meet_in_a_batch():
    sampler = LengthGroupedBatchSampler(LENGTHS, 8, seed=0)
    spread = [max(LENGTHS[i] for i in batch) - min(LENGTHS[i] for i in batch) for batch in sampler]
    assert max(spread) < 35 < max(LENGTHS) - min(LENGTHS)
    longest = [max(LENGTHS[i] for i in batch) for batch in sampler]
    assert longest != sorted(longest)  # the batches themselves come in random order


def test_order_depends_on_seed_and_epoch_alone():
    def order(seed, epoch):
        sampler = LengthGroupedBatchSampler(LENGTHS, 8, seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(0, 1) == order(0, 1) != order(1, 1)
    first, second = ({frozenset(batch) for batch in order(0, epoch)} for epoch in (1, 2))
    assert not first & second
