"""Flags of training: each has an effect that is seen from the command line, or in the weights."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_trainer_stage import SIZE, command, workplace  # noqa: F401

import train_pretrain
import train_sft
from model.checkpoint import load_video_language_model
from model.config import LanguageModelConfig
from model.lora import add_adapters, merged_state
from model.minimind import MiniMind
from stage import StageConfig
from trainer.config import TrainConfig, parse
from trainer.optim import Optimizers

RANDOM = "--from_scratch --freeze_llm 0 --dtype float32"


def metrics(run="pretrain_videolm_32"):
    return [json.loads(line) for line in Path("out", run, "metrics.jsonl").read_text().splitlines()]


def about(run="pretrain_videolm_32"):
    return json.loads(Path(f"out/{run}.json").read_text())["training"]


def refused(capsys, *argv, cls=StageConfig):
    with pytest.raises(SystemExit):
        parse(cls, "", list(argv))
    return capsys.readouterr().err


def test_a_config_file_gives_flags_and_the_command_line_wins():
    Path("run.yaml").write_text(
        "# a comment\nepochs: 3\nlearning_rate: 1e-3\nuse_wandb: false\nval_path: [data.jsonl]\n"
        "dtype: float32\nfrom_scratch: true\nfreeze_llm: 0\nload_from:\n"
    )
    last = command(train_pretrain, "--config run.yaml --epochs 2")
    said = about()
    assert (said["epochs"], said["learning_rate"], said["dtype"]) == (2, 1e-3, "float32")
    assert said["load_from"] is None and last["step"] == 4 and "val_loss" in last


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("epoch: 3", "run.yaml: unknown key 'epoch'; did you mean 'epochs'?"),
        ("epochs: many", "argument --epochs: invalid int value: 'many'"),
        ("use_wandb: 1", "run.yaml: use_wandb is 1; give true or false"),
        ("epochs: 0", "--epochs is 0: give 1 or more"),
        ("optimizer: sgd", "invalid choice: 'sgd'"),
        ("- epochs", "write one `flag: value` a line"),
        ("a: [", "not YAML"),
        (None, "can't be read"),
    ],
)
def test_a_config_file_with_a_mistake_is_refused(capsys, text, said):
    if text is not None:
        Path("run.yaml").write_text(text)
    assert said in refused(capsys, "--data_path", "x", "--config", "run.yaml")


def test_a_misspelt_flag_is_told_the_nearest(capsys):
    assert "--use_wand; did you mean '--use_wandb'?" in refused(capsys, "--use_wand")


def test_minimind_v_s_names_are_understood():
    flags = {"data_path": "x", "hidden_size": "768", "num_hidden_layers": "16", "save_dir": "there"}
    config = parse(StageConfig, "", [f"--{name}={value}" for name, value in flags.items()])
    assert (config.dim, config.n_layers, config.out_dir) == (768, 16, "there")


def test_tokens_per_batch_replaces_the_number_of_rows(capsys):
    data = Path("data.jsonl").read_text().splitlines()
    Path("data.jsonl").write_text("\n".join(data * 4))
    flags = f"{RANDOM} --no-share_prefix --max_seq_len 140 --log_interval 1"
    few = command(train_pretrain, f"{flags} --tokens_per_batch 140 --run_name few")
    many = command(train_pretrain, f"{flags} --tokens_per_batch 500 --run_name many")
    assert few["step"] > 2 * many["step"] > 2
    said = refused(capsys, "--data_path", "x", "--tokens_per_batch", "500")
    assert "--tokens_per_batch 500 can't hold a row of --max_seq_len 1024" in said


def test_a_rate_of_its_own_for_projector_and_summary():
    command(train_pretrain, f"{RANDOM} --run_name start")
    start = "--load_from out/start.pth --dtype float32 --learning_rate 1e-3"
    command(train_sft, f"{start} --run_name one")
    command(train_sft, f"{start} --run_name two --projector_learning_rate 1e-9")
    before, one, two = (
        load_video_language_model(f"out/{name}.pth") for name in ("start", "one", "two")
    )

    def moved(model, part):
        old, new = before.get_submodule(part), model.get_submodule(part)
        pairs = zip(old.parameters(), new.parameters(), strict=True)
        return max((a - b).abs().max().item() for a, b in pairs)

    for part in ("vision_proj", "video_summary"):
        assert moved(one, part) > 5e-4 and moved(two, part) < 1e-6
    assert moved(two, "language_model") > 5e-4

    config = TrainConfig(projector_learning_rate=0.5, learning_rate=0.25)
    (adamw,) = Optimizers(before, config).members
    rates = {id(p): group["lr"] for group in adamw.param_groups for p in group["params"]}
    for name, parameter in before.named_parameters():
        assert rates[id(parameter)] == (0.25 if name.startswith("language_model") else 0.5)


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
        tuned, start = (
            load_video_language_model(f"out/{run}.pth").state_dict()[layer]
            for run in ("tuned", "start")
        )
        moved = tuned - start
        assert torch.linalg.matrix_rank(moved, rtol=1e-4) == 4


def test_adapters_begin_as_nothing_and_learn():
    command(train_pretrain, f"{RANDOM} --run_name start")
    tuning = "--load_from out/start.pth --dtype float32 --learning_rate 1e-2 --log_interval 1"
    command(train_sft, f"{tuning} --run_name whole")
    command(train_sft, f"{tuning} --run_name adapters --lora_rank 2 --lora_alpha 8 --epochs 2")
    assert metrics("adapters")[0]["loss"] == pytest.approx(metrics("whole")[0]["loss"], rel=1e-6)
    losses = [row["loss"] for row in metrics("adapters")]
    assert losses[2] < losses[0]

    model = load_video_language_model("out/start.pth")
    plain = model.state_dict()
    add_adapters(model.language_model, rank=2, alpha=8)
    merged = merged_state(model)
    assert merged.keys() == plain.keys()
    assert all(torch.equal(merged[name], plain[name]) for name in plain)


def test_flags_of_freezing_that_contradict(capsys):
    said = refused(capsys, "--data_path", "x", "--lora_rank", "4", "--freeze_llm", "1")
    assert "leave --from_scratch and --freeze_llm 1 out" in said


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


def test_gradient_checkpointing_is_passed_on(monkeypatch):
    seen = []
    forward = MiniMind.forward
    monkeypatch.setattr(
        MiniMind,
        "forward",
        lambda self, *a, **k: seen.append(self.gradient_checkpointing) or forward(self, *a, **k),
    )
    command(train_pretrain, f"{RANDOM} --gradient_checkpointing")
    assert set(seen) == {True}
