"""The engine on a tiny real model: what one step does, and what may not change its outcome."""

import json
import math
import os
import resource
from copy import deepcopy
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

from dataset.sampler import LengthGroupedBatchSampler
from dataset.samples import read_samples
from dataset.video_dataset import VideoDataset, collate
from model.cinego import Cinego
from model.config import CinegoConfig, LanguageModelConfig
from model.lora import add_adapters
from tests.trainer import processes
from trainer.config import TrainConfig
from trainer.distributed import World, setup
from trainer.engine import TrainingStopped, fit

TOKENIZER = Path(__file__).resolve().parents[2] / "model/text_tokenizer"
TOKENS, WIDTH = 5, 16  # of a frame's features


class Source:
    """Features made up from the name; "broken" clips can't be read, "poison" clips hold NaN."""

    kind = "visual_features"

    def read(self, name):
        if name.startswith("broken"):
            raise ValueError(f"{name}: corrupt")
        generator = torch.Generator().manual_seed(sum(map(ord, name)))
        features = torch.randn(4, TOKENS, WIDTH, generator=generator)
        return features * math.nan if name.startswith("poison") else features


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    return tmp_path


# Without the balance loss: that is of a micro-batch, so it depends on how the batch is cut.
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.0}


def make_model(**settings):
    torch.manual_seed(0)
    language_model = LanguageModelConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        **settings,
    )
    return Cinego(CinegoConfig(language_model, vision_hidden_size=WIDTH, tokens_per_frame=TOKENS))


def make_loader(names, batch_size, world=None, shuffle=False, **options):
    """One sample a name; "text…" has no visual, and answers differ in length."""
    lines = []
    for i, name in enumerate(names):
        turns = [("human", f"what is {i}?"), ("gpt", "it moves left. " * (1 + i % 4) + str(i))]
        sample = {"id": f"s{i}", "conversations": [{"from": a, "value": b} for a, b in turns]}
        lines.append(json.dumps(sample | ({} if name.startswith("text") else {"video": name})))
    path = Path("data.jsonl") if world is None else Path(f"data{world.rank}.jsonl")
    path.unlink(missing_ok=True)  # the loader before goes on reading its own file
    path.write_text("\n".join(lines))
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    data = VideoDataset(read_samples(path), tokenizer, Source(), lambda frames: TOKENS)
    rank, size = (world.rank, world.size) if world else (0, 1)
    sampler = LengthGroupedBatchSampler(data.lengths, batch_size, 0, rank, size, shuffle)
    return DataLoader(data, batch_sampler=sampler, collate_fn=partial(collate, pad_id=0), **options)


def run(model, loader, val_loader=None, world=None, **settings):
    config = TrainConfig(**{"dtype": "float32", "log_interval": 1, **settings})
    save = lambda path, meta: partial(torch.save, deepcopy(model.state_dict()), path)  # noqa: E731
    lineage = {"data": "made up"}
    return fit(
        model, loader, val_loader, config, world or World(torch.device("cpu")), save, lineage
    )


def rows(run_name="run", file="metrics.jsonl"):
    return [json.loads(line) for line in Path("out", run_name, file).read_text().splitlines()]


def largest_difference(model, other):
    pairs = zip(model.state_dict().values(), other.state_dict().values(), strict=True)
    return max((a - b).abs().max().item() for a, b in pairs)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_few_samples_are_memorised(workplace, capsys, optimizer):
    names = ["a", "b", "text", "c"]
    model, loader = make_model(), make_loader(names, 4, shuffle=True)
    settings = {"epochs": 60, "learning_rate": 1e-2, "optimizer": optimizer}
    last = run(model, loader, make_loader(names, 3), **settings)
    assert rows()[0]["loss"] > 8 and last["loss"] < 1  # ln 6400 = 8.8
    assert last["val_loss"] < 1 and last["step"] == 60 and len(rows()) == 60

    before = Path("out/run.pth").stat().st_mtime_ns
    again = run(make_model(), loader, **settings)
    assert "already finished" in capsys.readouterr().out
    assert again == last and Path("out/run.pth").stat().st_mtime_ns == before


def test_accumulation_equals_one_large_batch(workplace):
    """In float64, for the reason that test_two_processes_equal_one gives."""
    names = ["a", "b", "text1", "c", "d", "e", "f", "text2"]
    whole, parts = make_model().double(), make_model().double()
    tokens = [batch["supervised_tokens"] for batch in make_loader(names, 2)]
    assert len(set(tokens)) > 1  # else a mean of means would pass too
    run(whole, make_loader(names, 8), epochs=3, run_name="whole")
    run(parts, make_loader(names, 2), epochs=3, run_name="parts", accumulation_steps=4)
    assert largest_difference(whole, parts) < 1e-7
    assert largest_difference(whole, make_model()) > 1e-4
    for a, b in zip(rows("whole"), rows("parts"), strict=True):
        assert (a["loss"], a["grad_norm"]) == pytest.approx((b["loss"], b["grad_norm"]), rel=1e-5)


# One row of the two processes' second batch is text, and one process's share of it is undecodable.
SHARED = ["a", "b", "c", "d", "broken", "text1", "e", "text2"]
BOTH = {"max_skipped_fraction": 0.5, "epochs": 2}
TWO_WAYS = {  # model, training
    "dense": ({}, BOTH),
    "experts": (EXPERTS, BOTH),
    # Muon makes a singular value that is 0 but for rounding up to 485 times as large.
    "muon": (EXPERTS, BOTH | {"optimizer": "muon", "epochs": 6}),
}


def train_both_ways(argv):
    """What each of the two processes runs, in the folder that `argv` names."""
    os.chdir(*argv)
    torch.set_num_threads(1)
    with setup("cpu") as world:
        for name, (shape, settings) in TWO_WAYS.items():
            model = make_model(**shape).double()
            if world.rank:
                torch.nn.init.ones_(model.vision_proj.weight)  # replaced by the main process's
            loader, two = make_loader(SHARED, 1, world), f"two_{name}"
            run(model, loader, world=world, run_name=two, **settings)
            torch.save(model.state_dict(), f"{name}{world.rank}.pth")


def test_two_processes_equal_one(workplace):
    """The same samples a step on one and on two processes: the same weights.

    In float64, since the question is whether both sum the same terms. In float32 a sum's order
    shows in its last digit, and Adam divides each gradient by its own size: a weight whose gradient
    is itself at the level of rounding then moves by some 1e-6 more or less, on each CPU another
    one. float64's rounding stands far below Adam's epsilon, which quenches it.
    """
    log = workplace / "log"
    processes.finish(processes.start(train_both_ways, [str(workplace)], log, 2), log)
    for name, (shape, settings) in TWO_WAYS.items():
        one, two = f"one_{name}", f"two_{name}"
        model = make_model(**shape).double()
        run(model, make_loader(SHARED, 2), run_name=one, **settings)
        assert largest_difference(model, make_model(**shape)) > 1e-3
        for rank in range(2):
            other = make_model(**shape).double()
            other.load_state_dict(torch.load(f"{name}{rank}.pth"))
            assert largest_difference(model, other) < 1e-7
        for a, b in zip(rows(one), rows(two), strict=True):
            assert (a["loss"], a["grad_norm"]) == pytest.approx((b["loss"], b["grad_norm"]))
        for run_name in (one, two):
            assert [bad["id"] for bad in rows(run_name, "quarantine.jsonl")] == ["s4"]
        assert rows(two)[-1]["bad_samples"] == rows(one)[-1]["bad_samples"] == settings["epochs"]


# What each of four processes gets in each step: text only, nothing but broken samples, nothing at
# all, more than the others; in the second step nobody sees a visual, in the third nobody anything.
STEPS = [
    [["a"], ["text1"], ["broken"], []],
    [["text1"], [], ["text2"], ["broken"]],
    [["broken"], [], [], ["broken"]],
    [["b", "c", "text3"], ["broken", "d"], [], ["a"]],
    [["text1"], ["b"], ["text2"], []],
]
FEW_LEARN = {"freeze_llm": 2, "weight_decay": 0.3}  # what nobody used mustn't decay either
UNLIKE = {
    "dense": {"weight_decay": 0.3},
    "experts": {"weight_decay": 0.3},
    "frozen": FEW_LEARN,
    "adapters": {"lora_rank": 2},
    "accumulated": {"accumulation_steps": 2, "weight_decay": 0.3},
    "float16": FEW_LEARN | {"dtype": "float16"},
}


class Loader:
    """The batches of STEPS, for however many processes share them."""

    def __init__(self, world):
        names = sorted({name for step in STEPS for part in step for name in part})
        self.data = make_loader(names, 1, world).dataset
        self.rows = {name: row for row, name in enumerate(names)}
        self.world, self.batch_sampler = world, self
        self.plan_for, self.set_epoch = (lambda _: 1), (lambda *_: None)

    def __len__(self):
        return len(STEPS)

    def __iter__(self):
        for step in STEPS:
            mine = [name for part in step[self.world.rank :: self.world.size] for name in part]
            yield collate([self.data[self.rows[name]] for name in mine], pad_id=0)


def train_unlike(argv):
    """Every case of UNLIKE in this process's share, in the folder that `argv` names."""
    os.chdir(*argv)
    torch.set_num_threads(1)
    with setup("cpu") as world:
        for name, settings in UNLIKE.items():
            model = make_model(**EXPERTS if name == "experts" else {}).double()
            model.set_trainable(settings.get("freeze_llm", 0))
            if rank := settings.get("lora_rank"):
                torch.manual_seed(0)
                add_adapters(model.language_model, rank, 4)
            training = {k: v for k, v in settings.items() if k not in ("freeze_llm", "lora_rank")}
            run_name = f"{name}{world.size}"
            training |= {"max_skipped_fraction": 1, "run_name": run_name}
            run(model, Loader(world), world=world, **training)
            torch.save(model.state_dict(), f"{run_name}_{world.rank}.pth")


def test_unlike_shares_on_one_two_and_four_processes_give_the_same_weights(workplace):
    for size in (1, 2, 4):
        log = workplace / f"log{size}"
        processes.finish(processes.start(train_unlike, [str(workplace)], log, size), log)
    for name in UNLIKE:
        one = torch.load(f"{name}1_0.pth")
        assert any(
            (one[key] - new).abs().max() > 1e-4
            for key, new in make_model().state_dict().items()
            if key in one
        )
        for size in (2, 4):
            for rank in range(size):
                other = torch.load(f"{name}{size}_{rank}.pth")
                difference = max((one[key] - other[key]).abs().max() for key in one)
                assert difference < (1e-3 if name == "float16" else 1e-7), (name, size, rank)
            for a, b in zip(rows(f"{name}1"), rows(f"{name}{size}"), strict=True):
                assert a["loss"] == pytest.approx(b["loss"], rel=1e-3), (name, size)


def test_the_state_of_another_run_is_refused(workplace):
    loader = make_loader(["a", "b"], 1)
    run(make_model(), loader, epochs=1)
    with pytest.raises(
        ValueError, match="another run(.|\n)*epochs: 1 then, 2 now(.|\n)*--resume never"
    ):
        run(make_model(), loader, epochs=2)
    assert run(make_model(), loader, epochs=2, resume="never")["step"] == 4


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_loss_that_is_no_number_stops_before_the_step(workplace, accumulation):
    model = make_model()
    loader = make_loader(["a", "b", "c", "poison"], 1)
    settings = {"accumulation_steps": accumulation, "save_interval": 1}
    with pytest.raises(TrainingStopped, match=r"loss nan.* Samples: s3\. Look"):
        run(model, loader, **settings)
    for name, weight in model.named_parameters():
        assert weight.isfinite().all(), name


def test_undecodable_samples_are_skipped_counted_and_named(workplace):
    names = ["a", "broken1", "b", "c"]
    model = make_model()
    last = run(model, make_loader(names, 1), epochs=2, max_skipped_fraction=0.25)
    assert last["bad_samples"] == 2 and last["step"] == 8
    quarantined = rows(file="quarantine.jsonl")
    assert [(bad["id"], bad["path"]) for bad in quarantined] == [("s1", "broken1")]

    with pytest.raises(TrainingStopped, match=r"1 of 4 samples can't be decoded.*quarantine"):
        run(model, make_loader(names, 1), max_skipped_fraction=0.2, run_name="strict")


def test_a_batch_without_any_good_sample_leaves_the_weights_alone(workplace):
    model = make_model()
    last = run(model, make_loader(["broken1", "broken2"], 2), max_skipped_fraction=1)
    assert largest_difference(model, make_model()) == 0
    assert last["bad_samples"] == 2 and last["loss"] == 0


def test_validation_loss_does_not_depend_on_batches(workplace):
    names = ["a", "b", "text1", "c", "d", "e", "f"]
    losses = []
    for size in (1, 3, 7):
        train_loader, val_loader = make_loader(["x"], 1), make_loader(names, size)
        last = run(make_model(), train_loader, val_loader, run_name=f"size{size}")
        losses.append(last["val_loss"])
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)


def test_a_validation_that_can_not_be_read_ends_nothing(workplace):
    last = run(make_model(), make_loader(["a"], 1), make_loader(["broken"], 1))
    assert last["val_loss"] is None and Path("out/run.pth").is_file()
    assert [bad["id"] for bad in rows(file="quarantine.jsonl")] == ["s0"]


def limit_shared_memory(worker_id):
    """Its segments are files: so small as these, no batch has room. Docker's default is 64 MB."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))


def test_a_full_shared_memory_ends_the_run_with_the_reason(workplace):
    loader = make_loader(["a", "b"], 2, num_workers=1, worker_init_fn=limit_shared_memory)
    with pytest.raises(TrainingStopped, match=r"File too large(.|\n)*/dev/shm(.|\n)*--num_workers"):
        run(make_model(), loader)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_text_under_a_frozen_language_model_teaches_nothing(workplace, dtype):
    """Such a step has no gradient; float16's scaler refuses to update where it has seen none."""
    model = make_model()
    model.set_trainable(freeze_llm=2)
    last = run(model, make_loader(["text1", "a", "text2"], 1), dtype=dtype, epochs=2)
    assert last["step"] == 6 and last["loss"] > 0
    assert largest_difference(model.language_model, make_model().language_model) == 0
    assert largest_difference(model.vision_proj, make_model().vision_proj) > 0
