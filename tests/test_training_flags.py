"""Flags of training: each has an effect that is seen from the command line, or in the weights."""

import json
from pathlib import Path

import pytest
from test_trainer_stage import command, workplace, write_language_model  # noqa: F401

import train_pretrain
import train_sft
from model.checkpoint import load_video_language_model
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
