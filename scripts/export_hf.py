"""Checkpoints to transformers' directories, and back.

    # A video-language model with its tower, tokenizer, processor and code; it stands alone:
    python -m scripts.export_hf out/sft_videolm_512.pth out/cinego_512

    # A language model without experts, as Llama (as Qwen3, where it normalises queries and keys):
    python -m scripts.export_hf out/lm_512.pth out/lm_512_llama
    python -m scripts.export_hf out/sft_videolm_512.pth out/lm_512_llama --llm_only

    # Back:
    python -m scripts.export_hf out/cinego_512 out/sft_videolm_512.pth

The first argument is anything that model/checkpoint.py loads; other generations of MiniMind come
out in our names. docs/checkpoints.md has the table of what becomes what.
"""

import re
import shutil
import sys
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import (
    CLIPImageProcessorPil,
    GenerationConfig,
    LlamaConfig,
    PreTrainedTokenizerBase,
    Qwen3Config,
)

from cli import TOKENIZER_PATH, VISION_PATH, Flags, flag, launch, parse_flags
from dataset.video import FrameTransform
from model.checkpoint import load_model, read_about, save_model
from model.cinego import Cinego
from model.generate import MAX_NEW_TOKENS
from model.minimind import MiniMind
from model.tokenizer import check_tokenizer, open_tokenizer, tokenizer_fingerprint
from scripts.transformers_code.configuration_cinego import CinegoHubConfig
from scripts.transformers_code.modeling_cinego import CinegoForCausalLM
from scripts.transformers_code.processing_cinego import CinegoProcessor

ROOT = Path(__file__).resolve().parent.parent
# `from model.cinego import …` in our files; a directory of remote code is flat and relative.
_OWN_IMPORT = re.compile(r"^( *)from (model|dataset)\.(\w+) import", re.MULTILINE)


@dataclass
class ExportFlags(Flags):
    """Export"""

    source: str | None = flag(None, "checkpoint: .pth, .safetensors or a transformers directory")
    target: str | None = flag(None, "a new directory, or a file name.pth")
    vision_path: str = flag(VISION_PATH, "vision tower that the model was trained with")
    tokenizer_path: str = flag(TOKENIZER_PATH, "tokenizer that the model was trained with")
    accept_tokenizer: bool = flag(
        False, "use the tokenizer even if the weights seem to be trained with another"
    )
    num_frames: int | None = flag(
        None, "frames taken from a video (default: as in training, or 8)", at_least=1
    )
    llm_only: bool = flag(False, "the language model of a video-language model alone")

    def problems(self) -> list[str]:
        found = super().problems()
        if not (self.source and self.target):
            found.append("name two: a checkpoint, and a new directory or a file name.pth")
        return found


def export_video_language_model(
    model: Cinego,
    about: dict,
    directory: Path,
    tokenizer: PreTrainedTokenizerBase,
    flags: ExportFlags,
) -> None:
    """Writes everything that answering about a video takes into `directory`.

    model: with the tower of --vision_path. about: what training wrote beside it, if it is ours.
    Raises ValueError for a tower that isn't the model's, and for frames that transformers' image
    processor can't make.
    """
    trained_with = about.get("lineage", {}).get("vision_tower")
    if trained_with not in (None, model.vision_tower.fingerprint()):
        raise ValueError(
            f"{flags.vision_path} isn't the vision tower that the model was trained with: its "
            "weights differ; name that tower (--vision_path)"
        )
    training = about.get("training", {})
    transform = FrameTransform.from_pretrained(flags.vision_path, training.get("resize", "tower"))
    if transform.resize == "pad":
        raise ValueError(
            "the model was trained with --resize pad, which transformers' CLIP image processor "
            "can't do: train it with crop or squash to export it"
        )
    tower = model.vision_tower.model
    config = CinegoHubConfig(
        cinego={**about, "model": "Cinego", "model_config": model.config.to_dict()},
        vision_config=tower.config.to_dict() | {"_name_or_path": ""},  # no path of this machine
    )
    with torch.device("meta"):
        exported = CinegoForCausalLM(config)
    exported.vision_tower.load_state_dict(tower.state_dict(), strict=True, assign=True)
    exported.cinego.load_state_dict(model.state_dict(), strict=True, assign=True)
    config.dtype = torch.float32

    exported.generation_config = generation_config(tokenizer)
    processor = CinegoProcessor(
        image_processor(transform),
        tokenizer,
        num_frames=flags.num_frames or training.get("num_frames", 8),
        tokens_per_frame=model.config.tokens_per_frame,
        summary=model.config.summary,
    )
    CinegoHubConfig.register_for_auto_class("AutoConfig")
    CinegoForCausalLM.register_for_auto_class("AutoModelForCausalLM")
    CinegoProcessor.register_for_auto_class("AutoProcessor")

    exported.save_pretrained(directory)
    processor.save_pretrained(directory)
    write_code(directory)


def export_language_model(
    model: MiniMind, about: dict, directory: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Writes `model` as the family in transformers that computes the same: Llama or Qwen3.

    Raises ValueError for experts."""
    ours = model.config
    if ours.num_experts:
        raise ValueError(
            "a mixture of experts isn't written for transformers alone: convert it to a .pth, or "
            "export the whole video-language model"
        )
    same = (
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
        *("num_attention_heads", "num_key_value_heads", "max_position_embeddings"),
        *("rms_norm_eps", "initializer_range", "head_dim"),
    )
    config_class = Qwen3Config if ours.qk_norm else LlamaConfig
    config = config_class(
        **{name: getattr(ours, name) for name in same},
        **special_ids(tokenizer),
        hidden_act="silu",
        attention_dropout=ours.dropout,
        rope_parameters={"rope_type": "default", "rope_theta": ours.rope_theta},
        tie_word_embeddings=True,
        architectures=[f"{'Qwen3' if ours.qk_norm else 'Llama'}ForCausalLM"],
    )
    # What this layout has no name for, so that the way back is exact.
    config.cinego = {**about, "model": "MiniMind", "model_config": ours.to_dict()}
    config.dtype = torch.float32

    config.save_pretrained(directory)
    generation_config(tokenizer).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    # Our names are these families' own, and the head is tied: there is nothing to rename.
    save_file(model.state_dict(), directory / "model.safetensors", metadata={"format": "pt"})


# ---- parts


def special_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int | None]:
    """The tokens that a config and generate()'s settings name."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {name: getattr(tokenizer, name) for name in names}


def generation_config(tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    return GenerationConfig(max_new_tokens=MAX_NEW_TOKENS, **special_ids(tokenizer))


def image_processor(transform: FrameTransform) -> CLIPImageProcessorPil:
    """The tower's settings under transformers' names."""
    size, is_crop = transform.image_size, transform.resize == "crop"
    square = {"height": size, "width": size}
    return CLIPImageProcessorPil(
        do_resize=True,
        size={"shortest_edge": size} if is_crop else square,
        do_center_crop=is_crop,
        crop_size=square,
        resample=transform.resample,
        rescale_factor=transform.rescale,
        image_mean=list(transform.mean),
        image_std=list(transform.std),
    )


def write_code(folder: Path) -> None:
    """The entry points and all of our files that they import, as a flat package."""
    entry_points = (ROOT / "scripts/transformers_code").glob("*_cinego.py")
    waiting, written = {path: path.name for path in entry_points}, set()
    while waiting:
        path, name = waiting.popitem()
        text = path.read_text(encoding="utf-8")
        for _, package, module in _OWN_IMPORT.findall(text):
            if (found := ROOT / package / f"{module}.py") not in written:
                waiting[found] = f"{package}_{module}.py"
        text = _OWN_IMPORT.sub(r"\1from .\2_\3 import", text)
        assert not re.search(r"^\s*(from|import) (model|dataset)\b", text, re.MULTILINE), path
        origin = path.relative_to(ROOT).as_posix()
        head = f"# Cinego's {origin}, copied by scripts/export_hf.py; Apache-2.0.\n"
        (folder / name).write_text(head + text, encoding="utf-8")
        written.add(path)


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    plain = takewhile(lambda word: not word.startswith("-"), argv)
    # Not strict: either may be given by its flag instead.
    named = [f"--{name}={word}" for name, word in zip(("source", "target"), plain, strict=False)]
    flags = parse_flags(ExportFlags, __doc__, named + argv[len(named) :])
    target = Path(flags.target)
    to_pth = target.suffix == ".pth"
    if not to_pth and target.exists() and (target.is_file() or any(target.iterdir())):
        raise ValueError(f"{target} is there already: remove it, or name another")
    model = load_model(flags.source, None if to_pth or flags.llm_only else flags.vision_path)
    print(model.load_report)
    about = read_about(flags.source)
    if to_pth:
        save_model(target, model, about)
    else:
        tokenizer = open_tokenizer(flags.tokenizer_path)
        check_tokenizer(model, tokenizer, about, flags.accept_tokenizer)
        about.setdefault("lineage", {})["tokenizer"] = tokenizer_fingerprint(tokenizer)
        if isinstance(model, Cinego) and not flags.llm_only:
            export_video_language_model(model, about, target, tokenizer, flags)
        else:
            language_model = getattr(model, "language_model", model)
            export_language_model(language_model, about, target, tokenizer)
        for weights in target.glob("*.safetensors"):  # 0600, which a web server can't read
            shutil.copymode(target / "config.json", weights)
    print(f"wrote {target}")


if __name__ == "__main__":
    launch(main)
