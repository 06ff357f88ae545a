"""What both training stages build from their flags: visuals, model, loaders, lineage.

`train_pretrain.py` and `train_sft.py` call these functions one after another. model/, dataset/ and
trainer/ don't know of each other; here they meet.
"""

import hashlib
import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from cli import TOKENIZER_PATH, VISION_PATH, Flags, FrameFlags, flag
from dataset.conversation import placeholder_ids
from dataset.feature_store import FeatureStore
from dataset.sampler import LengthGroupedBatchSampler
from dataset.samples import Samples, read_samples
from dataset.video import FrameTransform
from dataset.video_dataset import (
    VideoDataset,
    VideoSource,
    collate,
)
from device import choose_device, choose_dtype
from model.checkpoint import prepare_save, read_about
from model.cinego import Cinego
from model.config import SUMMARY_ALIASES, CinegoConfig, LanguageModelConfig
from model.lora import add_adapters
from model.minimind import MiniMind
from model.tokenizer import check_tokenizer, tokenizer_fingerprint
from model.vision_tower import VisionTower
from trainer.config import TrainConfig, run_flag
from trainer.distributed import World
from trainer.interrupt import ignore_signals_in_worker

local_flag = partial(flag, scope="process")  # each machine may have its own folders
SHAPE_FLAGS = {  # and their names in LanguageModelConfig
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
}


@dataclass
class DataFlags(FrameFlags):
    """Data"""

    data_path: list[str] | None = local_flag(None, "training samples, one or more jsonl files")
    val_path: list[str] | None = local_flag(
        None, "held-out samples for the validation loss, one or more jsonl files"
    )
    images_path: str = local_flag("dataset/videos", "folder that the samples' paths start from")
    use_feature: bool = flag(False, "read features that extract_features.py wrote, not videos")
    features_path: str = local_flag("dataset/features", "folder of the features")
    val_features_path: str | None = local_flag(
        None, "folder of the held-out samples' features (default: --features_path)"
    )
    vision_path: str = local_flag(VISION_PATH, "frozen vision tower, for reading videos")
    tokenizer_path: str = local_flag(TOKENIZER_PATH, "folder of the tokenizer")
    accept_tokenizer: bool = run_flag(
        False, "use the tokenizer even if the weights seem to be trained with another"
    )
    max_seq_len: int = flag(1024, "longest row in tokens; visual tokens count", at_least=1)
    share_prefix: bool = flag(True, "all samples of one visual share a row, the visual comes once")


@dataclass
class BuildFlags(Flags):
    """Model"""

    load_from: str | None = local_flag(None, "weights to start from (default: by stage and --dim)")
    from_scratch: bool = flag(False, "start from random weights instead")
    # Weights know their own shape; these describe a language model that starts from scratch.
    dim: int | None = flag(
        None,
        "width from scratch (default: 512); of weights, which to start from: OUT_DIR/lm_DIM.pth",
        "--hidden_size",
        at_least=1,
    )
    n_layers: int | None = flag(
        None, "layers from scratch (default: 8)", "--num_hidden_layers", at_least=1
    )
    n_heads: int | None = flag(None, "attention heads from scratch (default: 8)", at_least=1)
    n_kv_heads: int | None = flag(None, "key/value heads from scratch (default: 2)", at_least=1)
    use_moe: bool = flag(
        False, "mixture of 4 experts in each layer, a token takes one; of weights: lm_DIM_moe.pth"
    )
    embedding_std: float = flag(0.02, "spread of random embeddings, for --from_scratch")
    summary: Literal["dct", "gpt4video", "mean", "concat", "ours"] = flag(
        "dct", "how frames are condensed; ours: the old name of dct"
    )
    freeze_llm: Literal[0, 1, 2] = flag(
        0, "of the language model, 0: all is trained, 1: its first and last layer, 2: nothing"
    )
    lora_rank: int = flag(
        0, "rank of low-rank adapters, trained in place of the language model; 0: none", at_least=0
    )
    lora_alpha: float = flag(
        0.0, "adapters are scaled by lora_alpha / lora_rank; 0: twice the rank", at_least=0
    )
    gradient_checkpointing: bool = run_flag(
        False, "keep less for the backward pass and compute it again: memory for time"
    )
    compile: bool = run_flag(False, "torch.compile the layers; the first steps are slow")


@dataclass
class StageConfig(DataFlags, BuildFlags, TrainConfig):
    """Before the run"""

    dry_run: bool = run_flag(False, "two steps, and what the whole run will cost; nothing else")

    def __post_init__(self):
        self.summary = SUMMARY_ALIASES.get(self.summary, self.summary)

    def problems(self) -> list[str]:
        found = super().problems()
        if not self.data_path:
            found.append("--data_path is missing: give one or more jsonl files")
        if self.from_scratch and self.freeze_llm:
            frozen = f"--freeze_llm {self.freeze_llm}"
            found.append(f"--from_scratch with {frozen} would keep a random language model")
        if self.lora_rank and (self.from_scratch or self.freeze_llm == 1):
            found.append("--lora_rank: adapters stand beside a trained, frozen language model; ")
            found[-1] += "leave --from_scratch and --freeze_llm 1 out"
        if self.patience and not (self.val_path and self.eval_interval):
            found.append("--patience counts validations: give --val_path and --eval_interval")
        return found


@dataclass
class Visuals:
    """Where a stage's visuals come from, and what a model must take to read them."""

    train: FeatureStore | VideoSource
    val: FeatureStore | VideoSource
    tokens_per_frame: int
    hidden_size: int
    tower: VisionTower | None  # None: features on disk, the tower has done its work
    tower_fingerprint: str


def open_visuals(config: StageConfig) -> Visuals:
    """The feature store(s), or the videos and the tower; `config` gets their resize rule.

    Raises ValueError where there is none, or where the features were made with other settings.
    """
    if config.use_feature:
        store, frames = FeatureStore(config.features_path), ("num_frames", "sampling", "fps")
        store.check({name: getattr(config, name) for name in frames})
        val = FeatureStore(config.val_features_path) if config.val_features_path else store
        made = store.manifest
        if config.resize != "tower":
            store.check({"transform": {**made["transform"], "resize": config.resize}})
        config.resize = made["transform"].get("resize", "tower")  # eval.py resizes alike
        alike = ("tower", "tokens_per_frame", "hidden_size", "transform", *frames)
        val.check({key: made.get(key) for key in alike})
        size = (made["tokens_per_frame"], made["hidden_size"])
        return Visuals(store, val, *size, None, made["tower"])
    tower = VisionTower.from_pretrained(config.vision_path)
    transform = FrameTransform.from_pretrained(config.vision_path, config.resize)
    config.resize, tower.normalize = transform.resize, transform.normalize
    source = VideoSource(
        config.images_path,
        transform.resize_frames,
        config.num_frames,
        config.sampling,
        config.fps,
        config.video_backend,
    )
    size = (tower.tokens_per_frame, tower.hidden_size)
    return Visuals(source, source, *size, tower, tower.fingerprint())


def start_path(config: StageConfig, name: str, fix: str) -> Path:
    """The weights to start from: --load_from, or OUT_DIR/NAME with its `{dim}` filled in, as
    MiniMind names them: 512, or 512_moe with experts. ValueError, with `fix`, if it isn't there."""
    size = f"{config.dim or 512}" + "_moe" * config.use_moe
    start = Path(config.load_from or Path(config.out_dir, name.format(dim=size)))
    if not config.from_scratch and not start.exists():
        raise ValueError(f"{start}: no such checkpoint; {fix}")
    return start


def build_model(
    config: StageConfig,
    tokenizer: PreTrainedTokenizerBase,
    visuals: Visuals,
    language_model: MiniMind | None = None,
) -> Cinego:
    """A model with a random summary and projector, on `language_model` or a random one.

    Raises ValueError for a shape that can't be built.
    """
    shape = LanguageModelConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.dim or 512,
        num_hidden_layers=config.n_layers or 8,
        num_attention_heads=config.n_heads or 8,
        num_key_value_heads=config.n_kv_heads or 2,
        embedding_std=config.embedding_std,
        num_experts=4 if config.use_moe else 0,
        # Unlike MiniMind-3's, so that a router that starts here learns from the answers too.
        norm_topk_prob=not config.use_moe,
    )
    torch.manual_seed(config.seed)
    model_config = CinegoConfig(
        language_model=language_model.config if language_model else shape,
        summary=config.summary,
        vision_hidden_size=visuals.hidden_size,
        tokens_per_frame=visuals.tokens_per_frame,
        image_ids=placeholder_ids(tokenizer, visuals.tokens_per_frame),
    )
    model = Cinego(model_config.validate(), visuals.tower)
    if language_model:
        model.language_model, model.load_report = language_model, language_model.load_report
    return model


def check_start(
    model: Cinego,
    start: Path,
    config: StageConfig,
    tokenizer: PreTrainedTokenizerBase,
    visuals: Visuals,
) -> None:
    """Raises ValueError where the weights in `start` don't go with the flags, the tokenizer or the
    visuals; it names all that differs."""
    about, tower = read_about(start), visuals.tower_fingerprint
    check_tokenizer(model, tokenizer, about, config.accept_tokenizer)
    shape = _shape_of(model).items()
    pairs = {
        # Flags of the shape are for random weights; where they are given, they must be right.
        **{f"--{name}": (has, getattr(config, name) or has) for name, has in shape},
        "--tokenizer_path: placeholder": (
            list(model.config.image_ids or ()),  # a list or a tuple, as its file has it
            placeholder_ids(tokenizer, visuals.tokens_per_frame),
        ),
        "--summary": (model.config.summary, config.summary),
        "tower: weights": (about.get("lineage", {}).get("vision_tower") or tower, tower),
        "tower: tokens a frame": (model.config.tokens_per_frame, visuals.tokens_per_frame),
        "tower: width": (model.config.vision_hidden_size, visuals.hidden_size),
    }
    misfits = [f"  {key}: {a} in the file, {b} given" for key, (a, b) in pairs.items() if a != b]
    if misfits:
        raise ValueError(f"{start} doesn't fit the settings:\n" + "\n".join(misfits))


def _shape_of(model: Cinego) -> dict[str, int | bool]:
    """The language model's, by the names of the flags."""
    config = model.config.language_model
    shape = {flag: getattr(config, name) for flag, name in SHAPE_FLAGS.items()}
    return shape | {"use_moe": config.num_experts > 0}


def set_up_training(model: Cinego, config: StageConfig, world: World) -> None:
    """What is trained of the model and how, in place; `config` takes the model's shape and name."""
    for name, value in _shape_of(model).items():
        setattr(config, name, value)
    size = f"{config.dim}" + "_moe" * config.use_moe
    config.run_name = config.run_name.replace("{dim}", size)
    model.set_trainable(config.freeze_llm)
    language_model = model.language_model
    if config.lora_rank:
        torch.manual_seed(config.seed)
        add_adapters(language_model, config.lora_rank, config.lora_alpha or 2 * config.lora_rank)
    language_model.gradient_checkpointing = config.gradient_checkpointing
    if model.vision_tower:
        dtype = choose_dtype(config.dtype, choose_device(config.device))
        model.vision_tower.cast_matrices(getattr(torch, dtype))
    if config.compile:
        language_model.compile_layers()  # in place: the weights keep their names
    counts = ", ".join(f"{name} {n:,}" for name, n in model.parameter_counts().items())
    world.print_rank0(f"parameters: {counts}")


def build_loader(
    paths: list[str],
    source: FeatureStore | VideoSource,
    config: StageConfig,
    tokenizer: PreTrainedTokenizerBase,
    model: Cinego,
    world: World,
    shuffle: bool = False,
) -> DataLoader:
    """Batches of rows of like length; each process gets its own share of them.

    Raises ValueError for a file of samples that can't be read, and names the line.
    """
    length = {"num_tokens": model.config.tokens_per_visual, "max_length": config.max_seq_len}
    samples = read_samples(*paths)
    dataset = VideoDataset(samples, tokenizer, source, **length, share_prefix=config.share_prefix)
    size = (config.batch_size, config.seed, world.rank, world.size)
    batches = LengthGroupedBatchSampler(
        dataset.lengths, *size, shuffle=shuffle, tokens_per_batch=config.tokens_per_batch
    )
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=partial(collate, pad_id=tokenizer.pad_token_id or 0),
        num_workers=config.num_workers,
        worker_init_fn=ignore_signals_in_worker,
        persistent_workers=shuffle and config.num_workers > 0,
        pin_memory=world.device.type == "cuda",
    )


def describe_lineage(
    config: StageConfig,
    start: Path,
    tokenizer: PreTrainedTokenizerBase,
    visuals: Visuals,
    samples: Samples,
) -> dict[str, str]:
    """Fingerprints of all that a run is made of; a resumed run must share them."""
    return {
        "data": samples.fingerprint,
        "start": "random" if config.from_scratch else fingerprint(start),
        "vision_tower": visuals.tower_fingerprint,
        "tokenizer": tokenizer_fingerprint(tokenizer),
    }


def save_checkpoint(
    model: Cinego, config: StageConfig, path: Path, meta: dict[str, Any]
) -> Callable[[], None]:
    """Copies the weights; the function writes them, and beside them how they came to be. It raises
    OSError where they can't be written."""
    return prepare_save(path, model, {**meta, "training": asdict(config), "commit": commit()})


def fingerprint(path: Path) -> str:
    """16 hex digits of a file or folder: a moved one is the same, a changed one another."""
    digest = hashlib.sha256()
    for part in sorted(p for p in (path, *path.rglob("*")) if p.is_file()):
        with open(part, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def commit() -> str | None:
    """The commit of this code, for the record in a checkpoint; None outside a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
