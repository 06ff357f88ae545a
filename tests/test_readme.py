"""The commands of the README, in their order, as a new user types them.

What comes from the net is a stand-in of the same format, small (with `-m slow`: of full size): a
CLIP directory, MiniMind2 with its own tokenizer as transformers saves it, LLaVA-Video-178K's JSON
with its archive of videos.
"""

import json
import os
import re
import shutil
import sys
import tarfile
import zlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, CLIPVisionModel

from model.config import LanguageModelConfig
from model.minimind import MiniMind
from tests.commands import ROOT
from tests.commands import run as run_command

BASH = "bash", "-euo", "pipefail", "-c"
SUBSET = "0_30_s_academic_v0_1"


def blocks(name: str) -> list[str]:
    """The README's bash commands, a text for each block."""
    return re.findall(r"```bash\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), re.DOTALL)


def save_minimind2(directory: Path, layers: int) -> None:
    """What `hf download jingyaogong/MiniMind2-Small` brings, which has eight layers."""
    shutil.copytree(ROOT / "tests/data/tokenizers/minimind_v1", directory)
    torch.manual_seed(0)
    shape = {"hidden_size": 512, "num_hidden_layers": layers}
    shape |= {"num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 6400}
    state = MiniMind(LanguageModelConfig(**shape)).state_dict()
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    save_file(state, directory / "model.safetensors", {"format": "pt"})
    about = {"model_type": "minimind", "rope_theta": 1e6, "rms_norm_eps": 1e-5}
    (directory / "config.json").write_text(json.dumps(about | shape))


def save_llava_video(directory: Path) -> None:
    """One subset of LLaVA-Video-178K: captions, questions, and the videos in an archive. Two of 12
    videos are among those that a share of 1 % holds out."""
    folder = directory / SUBSET
    folder.mkdir(parents=True)
    names = (f"academic_source/Charades/{number}.mp4" for number in range(10_000))
    sets = {True: [], False: []}
    for name in names:
        sets[zlib.crc32(f"{SUBSET}/{name}".encode()) < 0.01 * 2**32].append(name)
    videos = sets[True][:2] + sets[False][:10]
    clips = sorted((ROOT / "demo/examples").glob("*.mp4"))
    with tarfile.open(folder / f"{SUBSET}_videos_1.tar.gz", "w:gz") as archive:
        for number, name in enumerate(videos):
            archive.add(clips[number % len(clips)], name)

    def record(name: str, question: str, answer: str) -> dict:
        turns = [{"from": "human", "value": f"<image>\n{question}"}]
        turns.append({"from": "gpt", "value": answer})
        return {"id": Path(name).stem, "conversations": turns, "data_source": SUBSET, "video": name}

    for kind, question, answer in (
        ("cap_processed", "Describe the video.", "A shape moves across a soft background."),
        ("oe_v0_1_qa_processed", "What moves first?", "The triangle."),
    ):
        data = [record(name, question, answer) for name in videos]
        (folder / f"{SUBSET}_{kind}.json").write_text(json.dumps(data))


@pytest.fixture(scope="module", params=[1, pytest.param(8, marks=pytest.mark.slow)])
def clone(request, tmp_path_factory, tiny_tower) -> Path:
    """A copy of the repository, and an `hf download` that copies a stand-in: a language model of so
    many layers, a tower as large as CLIP ViT-B/32 under the one of eight."""
    folder = tmp_path_factory.mktemp("readme")
    left_out = shutil.ignore_patterns(".git", ".venv*", "out", "__pycache__", ".*_cache", "tests")
    shutil.copytree(ROOT, folder / "cinego", ignore=left_out)
    tower = shutil.copytree(tiny_tower, folder / "hub/openai/clip-vit-base-patch32")
    if request.param == 8:
        shape = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}
        config = CLIPVisionConfig(**shape, num_attention_heads=12, image_size=224, patch_size=32)
        CLIPVisionModel(config).save_pretrained(tower)
        preprocessor = (tower / "preprocessor_config.json").read_text().replace("112", "224")
        (tower / "preprocessor_config.json").write_text(preprocessor)
    save_minimind2(folder / "hub/jingyaogong/MiniMind2-Small", layers=request.param)
    save_llava_video(folder / "hub/lmms-lab/LLaVA-Video-178K")
    bin = folder / "bin"
    bin.mkdir()
    (bin / "python").symlink_to(sys.executable)
    (bin / "hf").write_text(
        '#!/bin/sh\n# hf download REPOSITORY … --local-dir FOLDER\nfor to in "$@"; do :; done\n'
        f'mkdir -p "$to" && cp -r "{folder}/hub/$2/." "$to"\n'
    )
    (bin / "hf").chmod(0o755)
    return folder / "cinego"


def run(clone: Path, commands: str) -> str:
    environment = {
        "PATH": f"{clone.parent / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "OMP_NUM_THREADS": "2",
    }
    told = run_command(*BASH, commands, cwd=clone, **environment)
    return told.stdout + told.stderr


def test_both_readmes_have_the_same_commands():
    assert blocks("README.md") == blocks("README_zh.md")


def test_the_first_minute_ends_with_the_right_answer(clone):
    lines = blocks("README.md")[0].splitlines()
    assert lines[0].startswith("git clone") and lines[1].startswith("pip install")
    said = run(clone, "\n".join(lines[2:]))
    assert "the blue triangle" in said and "knows only the demo world" in said


def test_the_real_road_goes_from_downloads_to_a_score(clone, request):
    (road,) = (block for block in blocks("README.md") if "hf download" in block)
    said = run(clone, road)
    assert "20 samples of 24 records" in said and "4 held-out samples" in said
    for stage in ("pretrain", "sft"):
        rows = (clone / f"out/{stage}_videolm_512/metrics.jsonl").read_text().splitlines()
        assert json.loads(rows[-1])["val_loss"] > 0
    about = json.loads((clone / "out/sft_videolm_512.json").read_text())
    layers = request.node.callspec.params["clone"]
    assert about["model_config"]["language_model"]["num_hidden_layers"] == layers
    assert json.loads((clone / "out/eval.json").read_text())["samples"] == 4
    assert said.count("Q: ") == 4  # without a terminal, eval.py asks about the examples
