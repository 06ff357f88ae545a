"""The tokenizer: how one is opened, what tells it from others, and whether it is a model's own.

Embeddings mean something by the ids of one tokenizer alone. MiniMind's have as many entries as
ours, 6400, and under another's weights they train and answer without an error, on nonsense: of the
ids of our tokenizer 260 mean the same in MiniMind's first. So checkpoints carry a fingerprint.
"""

import hashlib
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from model.cinego import Cinego
from model.minimind import MiniMind

ROOT = Path(__file__).resolve().parents[1]

OURS = "2929fa4c907da1c8"  # of model/text_tokenizer
# MiniMind's tokenizers by fingerprint: which commit of github.com/jingyaogong/minimind has them,
# and where. The second is the first with its three special tokens renamed: the ids mean the same.
MINIMIND_2024 = "3133e0b82b0682c7"
MINIMIND_2025 = "8bec64ec93b77b5e"
MINIMIND_2026 = "97d8351719963523"
_PUBLISHED = {
    MINIMIND_2024: "58e3af0359a187bdf2d91fa737b8d1edde9a21a7/model/minimind_tokenizer",
    MINIMIND_2025: "274483cb1b5e5cc1fcd0f06e1eb96addbf91b656/model",
    MINIMIND_2026: "101d7df2da053f55b915128a733ba8b34ebe1ae5/model",
}
# Each generation of model/import_weights.py and the tokenizers that it can have, its own first
_OF_GENERATION = {
    "MiniMind, Oct 2024": (MINIMIND_2024, MINIMIND_2025),
    "MiniMind2, Feb 2025": (MINIMIND_2024, MINIMIND_2025),
    "MiniMind2, Apr 2025": (MINIMIND_2025, MINIMIND_2024),
    "MiniMind-3": (MINIMIND_2026,),
}
_MAX_BYTES = 128 << 20  # three times those of a vocabulary of 256,000 entries
_PLAIN_TEXT = (
    "The weather is fine today, so we are going for a walk in the park with our children.",
    "A language model reads the words that were written and says which word comes next.",
    "今天天气很好，我们一起去公园散步，孩子们在草地上玩。",
    "北京是中国的首都，有很长的历史，每年都有很多人来这里旅游。",
)


def open_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder; a relative path is also looked for in this repository.

    Nothing is downloaded, and no code that lies in the folder is run. Raises ValueError where there
    is no tokenizer.
    """
    folder = Path(path)
    if not folder.is_dir() and (ROOT / folder).is_dir():  # what ships is found from anywhere
        folder = ROOT / folder
    if not folder.is_dir():
        raise ValueError(f"--tokenizer_path {path}: no such folder")
    vocabulary = folder / "tokenizer.json"
    if vocabulary.is_file() and vocabulary.stat().st_size > _MAX_BYTES:
        raise ValueError(
            f"{vocabulary} has {vocabulary.stat().st_size:,} bytes; a tokenizer has at most "
            f"{_MAX_BYTES:,}: give another --tokenizer_path"
        )
    # Not AutoTokenizer alone: an exported model's folder has code beside it, which that would run.
    reader = PreTrainedTokenizerFast if vocabulary.is_file() else AutoTokenizer
    try:
        return reader.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (ValueError, OSError) as error:
        raise ValueError(
            f"--tokenizer_path {path}: no tokenizer can be read there "
            f"({str(error).splitlines()[0]}); give a folder with tokenizer.json and "
            "tokenizer_config.json, such as model/text_tokenizer"
        ) from None


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """16 hex digits of what gives text its ids: vocabulary with special tokens, and merges.

    How its files are laid out, the chat template and the limits don't count.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    merges = json.loads(backend.to_str())["model"].get("merges", []) if backend else []
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
    parts = [sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[::-1]), merges]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def check_tokenizer(
    model: Cinego | MiniMind, tokenizer: PreTrainedTokenizerBase, about: dict, accept: bool = False
) -> None:
    """Raises ValueError where `tokenizer` isn't the one that the weights were trained with.

    model: as loaded, with its report. about: what lies beside its weights, see `read_about`. Known
    by their fingerprint are the tokenizers of our own checkpoints and of MiniMind's generations.
    For other weights it is measured: whoever predicts plain text worse than by chance, which costs
    ln(vocabulary) a token, reads other tokens than it was taught, or was taught nothing. accept:
    the user knows better.
    """
    config = getattr(model.config, "language_model", model.config)
    source, folder = model.load_report.source, tokenizer.name_or_path
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"{folder} has {len(tokenizer)} entries, {source} was trained with "
            f"{config.vocab_size}: name its own tokenizer (--tokenizer_path)"
        )
    if accept:
        return
    fitting = ()
    if recorded := about.get("lineage", {}).get("tokenizer"):
        fitting = (recorded,)
    elif "model" not in about and config.vocab_size == 6400:  # as all of MiniMind's
        title = model.load_report.title
        fitting = next((its for name, its in _OF_GENERATION.items() if name in title), ())
    if fitting:
        if tokenizer_fingerprint(tokenizer) in fitting:
            return
        raise ValueError(
            f"{folder} isn't the tokenizer that {source} was trained with: the ids mean other "
            f"words. {_how_to_get(fitting[0])} If you trained these weights with it, give "
            "--accept_tokenizer."
        )
    loss, chance = _loss_on_plain_text(model, tokenizer), math.log(config.vocab_size)
    if not loss <= chance:
        raise ValueError(
            f"{source} predicts plain text worse than by chance with the tokenizer of {folder} "
            f"(loss {loss:.2f}, chance is {chance:.2f}): it was trained with another tokenizer, or "
            "on nothing like it. Name its own with --tokenizer_path, or give --accept_tokenizer if "
            "this is the one."
        )


def _how_to_get(fingerprint: str) -> str:
    if fingerprint == OURS:
        return "Give --tokenizer_path model/text_tokenizer."
    if fingerprint not in _PUBLISHED:
        return "Name that one with --tokenizer_path."
    url = f"https://raw.githubusercontent.com/jingyaogong/minimind/{_PUBLISHED[fingerprint]}"
    return (
        "Get MiniMind's own with\n\n"
        "    curl -fL --create-dirs --output-dir model/minimind_tokenizer --remote-name-all "
        f'"{url}/{{tokenizer,tokenizer_config}}.json"\n\n'
        "and name it with --tokenizer_path model/minimind_tokenizer."
    )


@torch.inference_mode()
def _loss_on_plain_text(model: Cinego | MiniMind, tokenizer: PreTrainedTokenizerBase) -> float:
    """Mean cross-entropy per predicted token of a few sentences, in nats."""
    language_model = getattr(model, "language_model", model)
    device = next(language_model.parameters()).device
    losses = []
    for text in _PLAIN_TEXT:
        ids = torch.tensor(tokenizer.encode(text, add_special_tokens=False), device=device)
        logits = language_model(ids[None, :-1]).logits[0]
        losses.append(F.cross_entropy(logits.float(), ids[1:], reduction="none"))
    return torch.cat(losses).mean().item()
