"""Flags of training: each has an effect that is seen from the command line, or in the weights."""

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import train_pretrain
import train_sft
from build import StageConfig, open_visuals
from cli import parse_flags
from model.checkpoint import load_video_language_model
from model.config import LanguageModelConfig
from model.minimind import MiniMind
from tests.test_train_stages import SIZE, command, workplace  # noqa: F401
from trainer.config import TrainConfig
from trainer.optim import Optimizers

RANDOM = "--from_scratch --freeze_llm 0 --dtype float32"


def metrics(run="pretrain_videolm_32"):
    return [json.loads(line) for line in Path("out", run, "metrics.jsonl").read_text().splitlines()]


def test_minimind_v_s_names_are_understood():
    flags = {"data_path": "x", "hidden_size": "768", "num_hidden_layers": "16", "save_dir": "there"}
    config = parse_flags(StageConfig, argv=[f"--{name}={value}" for name, value in flags.items()])
    assert (config.dim, config.n_layers, config.out_dir) == (768, 16, "there")


def test_auto_is_a_loading_process_a_core(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    for cores, workers in ((1, 1), (8, 3), (64, 8)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: range(cores))
        for flags in ([], ["--num_workers", "auto"]):
            assert parse_flags(TrainConfig, argv=flags).num_workers == workers
    assert parse_flags(TrainConfig, argv=["--num_workers", "0"]).num_workers == 0
    with pytest.raises(ValueError, match="--num_workers.*'many' is neither a number nor auto"):
        parse_flags(TrainConfig, argv=["--num_workers", "many"])


@pytest.mark.parametrize(
    ("flags", "messages"),
    [
        ("--from_scratch --n_heads 0 --freeze_llm 2", ["random language model", "--n_heads is 0"]),
        ("--sampling fps", ["go together"]),
        ("--lora_rank 4 --freeze_llm 1", ["leave --from_scratch and --freeze_llm 1 out"]),
        ("--patience 2", ["give --val_path and --eval_interval"]),
        ("--epochs 0 --learning_rate nan", ["--epochs is 0", "--learning_rate is nan"]),
    ],
)
def test_flags_that_contradict_each_other_are_named_at_once(flags, messages):
    with pytest.raises(ValueError) as refusal:
        parse_flags(StageConfig, argv=["--data_path", "x", *flags.split()])
    assert [words for words in messages if words not in str(refusal.value)] == []


def changed(before, after):
    """Names of the parameters that aren't what they were."""
    old, new = (load_video_language_model(f"out/{run}.pth").state_dict() for run in (before, after))
    assert old.keys() == new.keys()
    return {name for name in old if not torch.equal(old[name], new[name])}


THREE_LAYERS = SIZE.replace("layers 2", "layers 3")


@pytest.mark.parametrize(
    ("flags", "learning"),
    [
        ("--freeze_llm 0", {"embed_tokens", "norm", "layers.0", "layers.1", "layers.2"}),
        ("--freeze_llm 1", {"layers.0", "layers.2"}),
        ("--freeze_llm 2", set()),
        ("--lora_rank 4", {"layers.0", "layers.1", "layers.2"}),
    ],
)
def test_what_learns_of_the_language_model(flags, learning):
    command(train_pretrain, f"{RANDOM} --run_name start", THREE_LAYERS)
    tuning = "--load_from out/start.pth --dtype float32 --learning_rate 1e-2 --run_name tuned"
    command(train_sft, f"{tuning} {flags}", THREE_LAYERS)
    names = changed("start", "tuned")
    assert any(name.startswith("vision_proj") for name in names)
    parts = {name.removeprefix("language_model.model.") for name in names if "language" in name}
    parts = {".".join(name.split(".")[: 2 if "layers" in name else 1]) for name in parts}
    assert parts == learning
    if "lora" in flags:  # the matrices of the layers, not their norms
        assert not any("norm" in name for name in names)
        layer = "language_model.model.layers.1.mlp.up_proj.weight"
        tuned, start = (torch.load(f"out/{run}.pth")[layer] for run in ("tuned", "start"))
        assert torch.linalg.matrix_rank(tuned - start, rtol=1e-4) == 4


def test_adapters_begin_as_nothing_and_learn():
    command(train_pretrain, f"{RANDOM} --run_name start")
    tuning = "--load_from out/start.pth --dtype float32 --learning_rate 1e-2 --log_interval 1"
    command(train_sft, f"{tuning} --run_name whole")
    command(train_sft, f"{tuning} --run_name adapters --lora_rank 2 --lora_alpha 8 --epochs 2")
    assert metrics("adapters")[0]["loss"] == pytest.approx(metrics("whole")[0]["loss"], rel=1e-6)
    assert metrics("adapters")[2]["loss"] < metrics("adapters")[0]["loss"]


@pytest.mark.parametrize("experts", [{}, {"num_experts": 4, "num_experts_per_tok": 2}])
def test_gradient_checkpointing_keeps_less_and_changes_nothing(experts):
    torch.manual_seed(0)
    config = LanguageModelConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=4, num_attention_heads=2, dropout=0.1
    )
    model = MiniMind(replace(config, **experts)).train()
    ids = torch.randint(0, 99, (2, 40))
    kept, grads = [], []
    for model.gradient_checkpointing in (False, True):
        sizes = {}

        def keep(tensor, sizes=sizes):
            sizes[tensor.data_ptr()] = tensor.numel()
            return tensor

        torch.manual_seed(1)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(ids, labels=ids).loss
            kept.append(sum(sizes.values()))
            loss.backward()
        grads.append([loss, *(p.grad.clone() for p in model.parameters())])
        model.zero_grad()
    assert kept[1] < 0.5 * kept[0]
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*grads, strict=True))


def interrupt(monkeypatch, after: int) -> None:
    """Has the run that comes break off after so many optimizer steps."""
    steps = []

    def interrupted(*arguments, step=Optimizers.step):
        step(*arguments)
        steps.append(1)
        if len(steps) == after:
            raise KeyboardInterrupt

    monkeypatch.setattr(Optimizers, "step", interrupted)


@pytest.mark.parametrize(
    "flags",
    [
        "--lora_rank 2 --optimizer muon",
        "--patience 2 --eval_interval 1 --val_path data.jsonl",
        "--tokens_per_batch 140 --max_seq_len 140 --no-share_prefix --projector_learning_rate 1e-2",
    ],
)
def test_an_interrupted_run_goes_on_exactly(monkeypatch, capsys, flags):
    command(train_pretrain, f"{RANDOM} --run_name start")
    flags = f"--load_from out/start.pth --dtype float32 --epochs 4 --log_interval 1 {flags}"
    command(train_sft, f"{flags} --run_name whole")

    interrupt(monkeypatch, after=6)
    with pytest.raises(KeyboardInterrupt):
        command(train_sft, f"{flags} --run_name resumed --save_interval 3")
    command(train_sft, f"{flags} --run_name resumed --save_interval 3")
    # Each better validation is a state too.
    begun = 5 if "patience" in flags else 3
    assert f"steps {begun} to" in capsys.readouterr().out
    assert changed("whole", "resumed") == set() != changed("start", "whole")
    whole, resumed = metrics("whole"), metrics("resumed")
    assert [row["step"] for row in resumed] == list(range(1, len(whole) + 1))
    for name in ("loss", "val_loss", "lr"):
        assert [row.get(name) for row in whole] == [row.get(name) for row in resumed]


def test_patience_keeps_the_best_and_stops(capsys):
    """At such a rate the loss on other answers rises soon."""
    held_out = Path("data.jsonl").read_text().replace("is the answer", "moves to the left, then up")
    Path("val.jsonl").write_text(held_out)
    flags = f"{RANDOM} --epochs 30 --learning_rate 2e-2 --val_path val.jsonl --eval_interval 1"
    last = command(train_pretrain, f"{flags} --patience 3 --log_interval 100")
    losses = [row["val_loss"] for row in metrics()]
    best = losses.index(min(losses)) + 1
    assert last["step"] == len(losses) == best + 3 < 60
    assert json.loads(Path("out/pretrain_videolm_32.json").read_text())["step"] == best
    said = capsys.readouterr().out
    assert f"3 validations without a val_loss under {min(losses):.4f}" in said
    assert f"weights of step {best} in" in said

    command(train_pretrain, f"{flags} --patience 3 --log_interval 100")
    assert "already finished" in capsys.readouterr().out


def test_a_dry_run_tells_what_the_run_will_cost_and_writes_nothing(capsys):
    given = RANDOM.replace("float32", "auto")  # as without the flag
    command(train_pretrain, f"{given} --dry_run --epochs 10 --val_path data.jsonl")
    output = capsys.readouterr().out
    assert not Path("out").exists() and "weights" not in output and "in /tmp" not in output
    assert "0 h 1 min, without validation" in output and re.search(r"MFU +\d+%", output)
    speed, flops = re.search(
        r"([\d,]+) tokens/s(?:.|\n)*: (\S+) TFLOP/s a process", output
    ).groups()
    counted = float(flops) * 1e12 / int(speed.replace(",", "")) / 6  # parameters that read text
    known = int(re.search(r"language_model ([\d,]+)", output)[1].replace(",", ""))
    assert counted == pytest.approx(known, rel=0.05)
    tokens = re.search("20 steps of about (\\d+) tokens", output)[1]
    assert command(train_pretrain, f"{RANDOM} --epochs 10")["step"] == 20
    # An epoch of two micro-batches is one step, however many might be accumulated.
    command(train_pretrain, f"{RANDOM} --dry_run --accumulation_steps 99")
    assert f"1 steps of about {2 * int(tokens)} tokens" in capsys.readouterr().out


@pytest.mark.slow
def test_compiled_layers_train_as_they_are():
    flags = f"{RANDOM} --val_path data.jsonl --epochs 2"
    plain = command(train_pretrain, f"{flags} --run_name plain")
    compiled = command(train_pretrain, f"{flags} --run_name compiled --compile")
    for name in ("loss", "val_loss", "grad_norm"):
        assert compiled[name] == pytest.approx(plain[name], rel=1e-5)


def test_every_flag_of_training_changes_what_comes_out():
    flags = ["", "--grad_clip 0.01", "--weight_decay 0.5", "--warmup_iters 3", "--seed 1"]
    flags += ["--schedule linear", "--learning_rate 1e-4", "--optimizer muon"]
    flags += ["--optimizer muon --muon_learning_rate 0.1", "--dtype bfloat16"]
    flags += ["--batch_size 1", "--accumulation_steps 2", "--max_steps 3", "--epochs 1"]
    flags += ["--embedding_std 0.4", "--summary mean", "--no-share_prefix"]
    flags += ["--projector_learning_rate 1e-9", "--tokens_per_batch 140 --no-share_prefix"]
    flags += ["--max_seq_len 80"]  # no room for the second question of a clip
    results = {}
    for number, given in enumerate(flags):
        command(train_pretrain, f"{RANDOM} --epochs 2 --run_name run{number} {given}")
        weights = torch.load(f"out/run{number}.pth")
        results[given] = weights["language_model.model.layers.0.mlp.up_proj.weight"]
    results["--optimizer muon --muon_learning_rate 0.1"] -= results["--optimizer muon"]
    for given in flags[1:]:
        assert not torch.equal(results[given], results[""]) and results[given].any(), given


def test_an_out_dir_that_will_not_do_is_named():
    Path("file").write_text("")
    with pytest.raises(ValueError, match="file/.*Not a directory"):
        command(train_pretrain, f"{RANDOM} --out_dir file")


def test_the_reader_of_videos_is_the_one_chosen(tiny_tower):
    needed = ["--data_path=x", f"--vision_path={tiny_tower}"]
    for flags, backend in ((["--video_backend", "decord"], "decord"), ([], "pyav")):
        config = parse_flags(StageConfig, argv=[*needed, *flags])
        assert open_visuals(config).train.backend == backend
