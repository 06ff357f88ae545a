"""Files from strangers: none runs code, takes the machine's memory or opens what lies elsewhere."""

import json
import os
import resource
from pathlib import Path

import numpy as np
import pytest
import torch

from cli import parse_flags
from dataset.feature_store import FeatureStore
from model.checkpoint import load_language_model, load_video_language_model
from model.config import LanguageModelConfig
from model.minimind import MiniMind
from model.tokenizer import open_tokenizer
from model.vision_tower import VisionTower
from trainer.checkpoint import checksum, find_state
from trainer.config import TrainConfig

SHAPE = {"model_type": "minimind", "num_hidden_layers": 2, "num_attention_heads": 8}


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


def checkpoint_with_code() -> None:
    torch.save({"model.norm.weight": Malicious()}, "a.pth")
    load_language_model("a.pth")


def video_checkpoint_with_code() -> None:
    torch.save({"vision_proj.weight": Malicious()}, "a.pth")
    load_video_language_model("a.pth")


def state_with_code() -> None:
    torch.save({"identity": Malicious()}, "state.pt")
    Path("state.pt").rename(f"state-00000001-{checksum(Path('state.pt'))}.pt")
    find_state(Path(), {})


def read_features(name: str, **source) -> None:
    manifest = {"tokens_per_frame": 2, "hidden_size": 4, "dtype": "float16"}
    manifest |= {"sources": {name: {"frames": 1, **source}}}
    Path("manifest.json").write_text(json.dumps(manifest))
    FeatureStore(".").read(name)


def features_with_code() -> None:
    np.save("a.mp4.npy", np.array([Malicious()]), allow_pickle=True)  # what the attacker writes
    read_features("a.mp4")


def settings_with_code() -> None:
    Path("run.yaml").write_text("epochs: !!python/object/apply:os.mkdir [pwned]\n")
    parse_flags(TrainConfig, argv=["--config", "run.yaml"])


def load_folder(**config) -> None:
    """A folder for transformers, its weights those of a small model."""
    Path("config.json").write_text(json.dumps(SHAPE | config))
    torch.save(MiniMind(LanguageModelConfig(hidden_size=32)).state_dict(), "pytorch_model.bin")
    load_language_model(".")


def code_beside_a_config() -> None:
    Path("evil.py").write_text("import os; os.mkdir('pwned')")
    load_folder(hidden_size=64, auto_map={"AutoConfig": "evil.Config"})


def config_of_terabytes() -> None:
    load_folder(hidden_size=8 * 10**5, intermediate_size=10**8, vocab_size=6400)


def header_of_exabytes() -> None:
    Path("a.safetensors").write_bytes((2**62).to_bytes(8, "little") + b"{}")
    load_language_model("a.safetensors")


def tower_of_terabytes() -> None:
    config = {"model_type": "clip_vision_model", "hidden_size": 786_432, "num_hidden_layers": 99}
    Path("config.json").write_text(json.dumps(config))
    Path("model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    VisionTower.from_pretrained(".")


def tower_of_nonsense() -> None:
    config = {"model_type": "clip_vision_model", "hidden_size": 100, "num_attention_heads": 7}
    Path("config.json").write_text(json.dumps(config))
    VisionTower.from_pretrained(".")


def tokenizer_of_500_megabytes() -> None:
    with open("tokenizer.json", "wb") as file:
        file.truncate(500 << 20)  # takes no place on the disk
    Path("tokenizer_config.json").write_text("{}")
    open_tokenizer(Path().absolute())


def features_of_another_folder() -> None:
    Path("../secret.mp4.npy").write_bytes(b"")
    read_features("../secret.mp4")


def shard_of_another_folder() -> None:
    read_features("a.mp4", shard="../../secret", row=0)


@pytest.mark.parametrize(
    "load",
    [
        *(checkpoint_with_code, video_checkpoint_with_code, state_with_code, features_with_code),
        *(settings_with_code, code_beside_a_config, header_of_exabytes, config_of_terabytes),
        *(tower_of_terabytes, tower_of_nonsense, tokenizer_of_500_megabytes),
        *(features_of_another_folder, shard_of_another_folder),
    ],
)
def test_a_hostile_file_is_refused_with_a_message(load, tmp_path, monkeypatch):
    (tmp_path / "inner").mkdir()
    monkeypatch.chdir(tmp_path / "inner")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError):
        load()
    assert not Path("pwned").exists()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KB
