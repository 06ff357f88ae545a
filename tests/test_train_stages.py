"""Both stages from their command lines, on features made up here: what they write and refuse."""

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train_pretrain
import train_sft
from dataset.feature_store import FeatureStore
from dataset.video import FrameTransform
from model.checkpoint import load_language_model, load_video_language_model, save_model
from model.config import LanguageModelConfig
from model.minimind import MiniMind
from model.tokenizer import OURS, open_tokenizer, tokenizer_fingerprint
from model.vision_tower import VisionTower
from tests.model.ancestors import old_state, with_experts

ROOT = Path(__file__).resolve().parents[1]
TOKENIZER = ROOT / "model/text_tokenizer"
TOKENIZERS = Path(__file__).parent / "data/tokenizers"
SIZE = "--dim 32 --n_layers 2 --n_heads 2 --n_kv_heads 1"
FRAMES, TOKENS, WIDTH = 4, 50, 32  # the latter two as the fixture tiny_tower has them


def write_features(folder, **changes):
    """A store of three clips, as extract_features.py leaves it."""
    store = FeatureStore(folder)
    settings = {"tower": "abc", "tokens_per_frame": TOKENS, "hidden_size": WIDTH}
    settings |= {"transform": {}, "num_frames": FRAMES, "sampling": "uniform"}
    store.begin(settings | changes)
    for i, name in enumerate("abc"):
        generator = torch.Generator().manual_seed(i)
        store.write(f"{name}.mp4", torch.randn(FRAMES, TOKENS, WIDTH, generator=generator))
    store.finish()


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    write_features("features")
    lines = []
    for name, i in itertools.product("abc", range(2)):
        turns = [("human", f"<video>\nquestion {i}?"), ("gpt", f"{name} is the answer")]
        turns = [{"from": who, "value": text} for who, text in turns]
        sample = {"id": f"{name}-{i}", "video": f"{name}.mp4", "conversations": turns}
        lines.append(json.dumps(sample))
    Path("data.jsonl").write_text("\n".join(lines))


def command(script, flags="", size=SIZE):
    common = f"--use_feature --features_path features --data_path data.jsonl --num_frames {FRAMES}"
    place = f"--tokenizer_path {TOKENIZER} --num_workers 0 --batch_size 2 --device cpu"
    return script.main(f"{common} {place} {size} {flags}".split())


def write_language_model(tokenizer=OURS):
    """out/lm_32.pth, the language model that pretraining starts from."""
    torch.manual_seed(1)
    config = LanguageModelConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1
    )
    save_model("out/lm_32.pth", MiniMind(config), {"lineage": {"tokenizer": tokenizer}})


def test_pretraining_then_fine_tuning(capsys):
    write_language_model()
    command(train_pretrain, "--val_path data.jsonl")
    before = load_video_language_model("out/pretrain_videolm_32.pth")
    language_model = torch.load("out/lm_32.pth")
    for name, weight in before.language_model.state_dict().items():
        assert torch.equal(weight, language_model[name]), f"{name} was frozen but moved"

    metrics = command(train_sft, "--epochs 3 --dtype float32 --learning_rate 1e-2")
    after = load_video_language_model("out/sft_videolm_32.pth")
    pairs = zip(after.state_dict().items(), before.state_dict().values(), strict=True)
    assert not [name for (name, new), old in pairs if torch.equal(new, old)]  # all parts learn
    lines = Path("out/sft_videolm_32/metrics.jsonl").read_text().splitlines()
    assert metrics == json.loads(lines[-1]) and metrics["step"] == 6 and metrics["epoch"] == 3

    about = json.loads(Path("out/sft_videolm_32.json").read_text())
    assert about["step"] == 6 and about["training"]["learning_rate"] == 1e-2
    assert about["lineage"]["vision_tower"] == "abc" and len(about["lineage"]["data"]) == 16
    assert after.config.image_ids == before.config.image_ids
    assert len(after.config.image_ids) == TOKENS
    assert "video_summary" in capsys.readouterr().out  # the parameter counts


def test_experts_go_through_both_stages_under_their_own_names():
    command(train_pretrain, "--use_moe --from_scratch --freeze_llm 0 --optimizer muon")
    flags = "--use_moe --epochs 8 --dtype float32 --learning_rate 1e-2 --log_interval 1"
    metrics = command(train_sft, flags)
    rows = Path("out/sft_videolm_32_moe/metrics.jsonl").read_text().splitlines()
    assert metrics["loss"] < 0.7 * json.loads(rows[0])["loss"]
    config = load_video_language_model("out/sft_videolm_32_moe.pth").config.language_model
    assert (config.num_experts, config.num_experts_per_tok) == (4, 1)
    with pytest.raises(ValueError, match="--use_moe: False in the file, True given"):
        command(train_pretrain, "--from_scratch --freeze_llm 0 --run_name dense")
        command(train_sft, "--use_moe --load_from out/dense.pth")


def write_minimind(path, generation, moe=False):
    """A language model as that generation saved it: one 512 wide, with two layers."""
    if generation in ("MiniMind, Oct 2024", "MiniMind2, Feb 2025"):
        heads, kv_heads = (16, 8) if "2024" in generation else (8, 2)
        state = old_state(width=512, heads=heads, kv_heads=kv_heads, vocab=6400)
        state = with_experts(state) if moe else state
    else:
        experts = {"num_experts": 4 * moe, "qk_norm": generation == "MiniMind-3"}
        state = MiniMind(LanguageModelConfig(num_hidden_layers=2, **experts)).state_dict()
    Path(path).parent.mkdir(exist_ok=True)
    torch.save(state, path)


TOKENIZER_OF = {
    "MiniMind, Oct 2024": "minimind_v1",
    "MiniMind2, Feb 2025": "minimind_v1",
    "MiniMind2, Apr 2025": "minimind_v1",  # the ids of its own are the same
    "MiniMind-3": "minimind_3",
}


@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
@pytest.mark.parametrize("generation", TOKENIZER_OF)
def test_every_minimind_brings_its_shape_and_is_trained_with_its_tokenizer(generation, moe, capsys):
    """Heads, layers and experts aren't given, and both checkpoints are named after the width."""
    name = "512" + "_moe" * moe
    write_minimind(f"out/lm_{name}.pth", generation, moe)
    own = TOKENIZERS / TOKENIZER_OF[generation]
    size = "--dim 512 --max_steps 1" + " --use_moe" * moe
    command(train_pretrain, f"--tokenizer_path {own}", size)
    assert generation in capsys.readouterr().out
    command(train_sft, f"--tokenizer_path {own}", size)
    about = json.loads(Path(f"out/sft_videolm_{name}.json").read_text())
    config, training = about["model_config"]["language_model"], about["training"]
    heads = [16, 8] if "2024" in generation else [8, 2]
    assert [config["num_attention_heads"], config["num_key_value_heads"]] == heads
    shape = [training[key] for key in ("dim", "n_layers", "n_heads", "n_kv_heads", "use_moe")]
    assert shape == [512, 2, *heads, moe]
    assert about["lineage"]["tokenizer"] == tokenizer_fingerprint(open_tokenizer(own))
    # What has learnt by one tokenizer isn't trained on by another.
    with pytest.raises(ValueError, match="isn't the tokenizer that .*pretrain.* was trained with"):
        command(train_sft, "--run_name other", size)


def test_raw_images_give_the_loss_of_their_features(tiny_tower):
    """The tower runs within the training step, or ran before: the model sees the same numbers."""
    tower = VisionTower.from_pretrained(tiny_tower)
    transform = FrameTransform.from_pretrained(tiny_tower)
    store = FeatureStore("image_features")
    settings = {"tower": tower.fingerprint(), "tokens_per_frame": TOKENS, "hidden_size": WIDTH}
    settings |= {"transform": transform.describe(), "sampling": "uniform"}
    store.begin(settings | {"num_frames": FRAMES})
    for i, name in enumerate("abc"):
        pixels = np.random.default_rng(i).integers(0, 256, (28, 28, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(f"{name}.png")
        store.write(f"{name}.png", tower(transform(pixels[None])))
    store.finish()
    Path("images.jsonl").write_text(Path("data.jsonl").read_text().replace(".mp4", ".png"))

    random = "--from_scratch --freeze_llm 0 --dtype float32 --data_path images.jsonl"
    raw = f"--no-use_feature --vision_path {tiny_tower} --images_path ."
    read = command(train_pretrain, f"{random} --features_path image_features")
    seen = command(train_pretrain, f"{random} {raw} --run_name raw")
    assert seen["loss"] == pytest.approx(read["loss"], rel=1e-4)
    assert seen["grad_norm"] == pytest.approx(read["grad_norm"], rel=1e-2)
    # Either way the checkpoint knows the tower, so that fine-tuning may change between the two.
    command(train_sft, f"--data_path images.jsonl {raw}")


def test_frames_a_second_and_the_resize_rule_reach_the_model_and_its_record(tiny_tower):
    for name in "abc":
        shades = [Image.new("RGB", (20, 10), (10 * i, 0, 0)) for i in range(12)]
        shades[0].save(f"{name}.gif", save_all=True, append_images=shades[1:], duration=500)
    Path("gifs.jsonl").write_text(Path("data.jsonl").read_text().replace(".mp4", ".gif"))
    flags = "--from_scratch --freeze_llm 0 --data_path gifs.jsonl --no-use_feature --images_path ."
    flags += f" --vision_path {tiny_tower} --dtype float32 --resume never --run_name gifs"
    losses = set()
    for given, expected in (
        ("", ("uniform", None, "crop")),
        ("--resize pad", ("uniform", None, "pad")),
        ("--resize pad --sampling fps --fps 0.5", ("fps", 0.5, "pad")),
    ):
        losses.add(command(train_pretrain, f"{flags} {given}")["loss"])
        record = json.loads(Path("out/gifs.json").read_text())["training"]
        assert (record["sampling"], record["fps"], record["resize"]) == expected
    assert len(losses) == 3


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--n_layers 3", "--n_layers: 2 .* 3 given"),
        ("--summary mean", "--summary: dct in the file, mean given"),
        ("--num_frames 8", "num_frames is 4, 8 is needed"),
        ("--sampling fps --fps 2", "sampling is 'uniform', 'fps' is"),
        ("--resize pad", "'resize': 'pad'} is needed"),
        ("--features_path other", "tower: weights: abc .* xyz given"),
        ("--val_features_path other", "tower is 'xyz', 'abc' is needed"),
        ("--features_path nowhere", "manifest.json: missing"),
        ("--data_path no.jsonl", "no.jsonl: "),
        ("--device cuda", "no such device"),
        ("--load_from out/pretrain.pth", "no such checkpoint; run train_pretrain.py first"),
    ],
)
def test_what_does_not_fit_is_refused(flags, said):
    if "cuda" in flags and torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    command(train_pretrain, "--from_scratch --freeze_llm 0 --run_name start --out_dir .")
    write_features("other", tower="xyz")
    with pytest.raises(ValueError, match=said):
        command(train_sft, f"--load_from start.pth {flags}")
    assert not Path("out").exists()


@pytest.mark.parametrize("generation", TOKENIZER_OF)
def test_a_minimind_with_a_foreign_tokenizer_is_refused(generation):
    """Ours has as many entries, and 260 that mean the same. Nothing is written."""
    write_minimind("lm.pth", generation)
    own = TOKENIZER_OF[generation]
    (other,) = set(TOKENIZER_OF.values()) - {own}
    for foreign in (TOKENIZER, TOKENIZERS / other):
        with pytest.raises(ValueError, match="lm.pth was trained with.*") as refusal:
            command(train_pretrain, f"--load_from lm.pth --tokenizer_path {foreign}", "")
        assert "curl" in str(refusal.value) and "jingyaogong/minimind/" in str(refusal.value)
    assert not Path("out").exists()
    # Who trained that architecture with a tokenizer of his own says so.
    command(train_pretrain, "--load_from lm.pth --accept_tokenizer --max_steps 1", "")


def test_weights_that_nobody_vouches_for_are_measured():
    write_language_model(tokenizer=None)
    with pytest.raises(ValueError, match=r"worse than by chance .*\(loss 8.77, chance is 8.76\)"):
        command(train_pretrain)
    command(train_pretrain, "--accept_tokenizer")
    language_model = load_language_model("out/lm_32.pth")
    text = TOKENIZER.parents[1].joinpath("scripts/tokenizer_text.txt").read_text()
    usual = torch.zeros(6400, dtype=torch.bool)
    usual[open_tokenizer(TOKENIZER).encode(text)] = True  # it has learnt which tokens there are
    with torch.no_grad():
        language_model.model.embed_tokens.weight[:] = torch.where(usual, 0.02, -0.02)[:, None]
    save_model("out/lm_32.pth", language_model, {})
    command(train_pretrain, "--run_name learnt")


@pytest.mark.parametrize("processes", ["1", "2"])
def test_an_error_is_one_message(processes):
    """By the shell scripts, of which N=2 goes through torchrun; both processes meet the error."""
    flags = f"--data_path {Path.cwd()}/data.jsonl --use_feature --features_path no/where"
    done = subprocess.run(
        ["bash", ROOT / "scripts/train/train_sft_512_8.sh", *flags.split(), "--device", "cpu"],
        env=os.environ | {"N": processes, "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and done.stdout == ""
    assert re.fullmatch(r"train_sft.py: no/where/manifest.json: missing.*\n", done.stderr)


def test_another_tokenizer_or_new_data_are_not_taken_for_a_finished_run():
    flags = "--from_scratch --freeze_llm 0"
    command(train_pretrain, flags)
    with pytest.raises(ValueError, match=f"another run(.|\n)*tokenizer: .*{OURS}"):
        command(train_pretrain, f"{flags} --tokenizer_path {TOKENIZERS / 'minimind_v1'}")
    with Path("data.jsonl").open("a") as file:
        file.write("\n" + Path("data.jsonl").read_text().splitlines()[0])
    with pytest.raises(ValueError, match="another run(.|\n)*data: "):
        command(train_pretrain, flags)


def test_wandb_keeps_its_own_log_on_this_machine(monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_MODE", "offline")
    command(train_pretrain, "--from_scratch --freeze_llm 0 --use_wandb")
    (log,) = Path("out/pretrain_videolm_32/wandb").glob("offline-run-*/*.wandb")
    assert log.read_bytes().startswith(b":W&B")  # its own process fills it, a little later
