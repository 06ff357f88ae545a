"""Files from strangers: none runs code, takes the machine's memory or opens what lies elsewhere."""

import io
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

SHAPE = {"model_type": "minimind", "num_hidden_layers": 8, "num_attention_heads": 8}


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


def config_of_terabytes() -> None:
    load_folder(hidden_size=8 * 10**5, intermediate_size=10**8, vocab_size=6400)


def code_beside_a_tower() -> None:
    Path("evil.py").write_text("import os; os.mkdir('pwned')")
    config = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.C", "AutoModel": "evil.M"}}
    Path("config.json").write_text(json.dumps(config))
    VisionTower.from_pretrained(".")


def code_beside_a_tokenizer() -> None:
    Path("evil.py").write_text("import os; os.mkdir('pwned')")
    config = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    Path("tokenizer_config.json").write_text(json.dumps(config))
    open_tokenizer(Path().absolute())


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


REASONS = {
    checkpoint_with_code: "Weights only load failed",
    video_checkpoint_with_code: "Weights only load failed",
    state_with_code: "Weights only load failed",
    features_with_code: "allow_pickle=False",
    settings_with_code: "could not determine a constructor for the tag",
    code_beside_a_tower: "an? 'evil' model, not CLIP or SigLIP",
    code_beside_a_tokenizer: "contains custom code",
    header_of_exabytes: "header too large",
    config_of_terabytes: r"is \(6400, 32\) in the file, \(6400, 800000\) in the model",
    tower_of_terabytes: "describes 245,394,567,069,696 numbers",
    tower_of_nonsense: "not a multiple of the number of attention heads",
    tokenizer_of_500_megabytes: "has 524,288,000 bytes; a tokenizer has at most",
    features_of_another_folder: r"must be a relative path without '\.\.'",
    shard_of_another_folder: r"manifest.json.*the shard '\.\./\.\./secret'.* are no numbers",
}


@pytest.mark.parametrize("load", REASONS)
def test_a_hostile_file_is_refused_with_the_reason(load, tmp_path, monkeypatch):
    (tmp_path / "inner").mkdir()
    monkeypatch.chdir(tmp_path / "inner")
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))  # whoever is asked agrees
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=REASONS[load]):
        load()
    assert not Path("pwned").exists()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KB
