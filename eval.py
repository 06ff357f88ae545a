"""Answers questions about videos and images: in the terminal, or a test set with its score.

    python eval.py                                        # a chat; /help lists its commands
    python eval.py --video a.mp4 --image b.png c.png      # a chat that starts with these
    python eval.py --image a.png b.png --question "What is it?"           # asked about each file
    python eval.py --image a.png b.png --joint --question "The same?"     # about all at once
    python eval.py --data_path test.jsonl --images_path DIR --controls --output out/eval.json

A test set is a jsonl like that of training; `scoring` may give each answer a type (see
inference/scoring.py), and says how a published benchmark is scored (docs/benchmarks.md): options by
their likelihood, with the floors beside them. The controls ask the same questions with the order of
the frames changed or the picture taken away: a score that stays up there never came from the video.
"""

import json
import sys
import tempfile
import time
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Literal

from cli import flag, launch, parse_flags
from dataset.samples import read_samples
from dataset.video import MEDIA_SUFFIXES, VideoError
from inference.chat_model import ChatModel
from inference.flags import AnswerFlags
from inference.parts import DEMO_MODEL, EXAMPLES, ROOT, default_clips, find_models
from inference.summary import (
    check_comparable,
    compare_answers,
    format_comparison,
    format_summary,
    read_results,
    summarise_answers,
    write_submissions,
)
from inference.terminal import Terminal
from inference.test_set import TestSetFlags, answers_path, ask_test_set, unanswered
from model.checkpoint import read_about
from model.generate import MAX_NEW_TOKENS, Sampling

STAGES = {0: "pretrain", 1: "sft"}
DEFAULT_QUESTION = "What happens in this video?"
MAX_REPORTED = 10  # files that can't be read, by name


@dataclass
class EvalFlags(TestSetFlags, AnswerFlags):
    """Answers"""

    load_from: str | None = flag(
        None,
        "checkpoint or directory (default: out/{pretrain,sft}_videolm_<dim>.pth, else demo/model)",
    )
    model_mode: Literal[0, 1] = flag(1, "0: the pretrained model, 1: the fine-tuned one")
    dim: int | None = flag(None, "width of the language model; names the default checkpoint")
    n_layers: int | None = flag(None, "layers that the checkpoint must have")
    dtype: Literal["auto", "float32", "bfloat16"] = flag(
        "float32", "of the language model; in float32 no answer depends on those beside it"
    )
    max_new_tokens: int = flag(MAX_NEW_TOKENS, "longest answer", at_least=1)
    seed: int = flag(0, "of the shuffled control and of sampled answers")
    # a chat
    video: list[str] | None = flag(None, "videos to talk about")
    image: list[str] | None = flag(None, "images to talk about")
    eval_dir: Path | None = flag(
        None,
        "folder asked about where no file is named (default: dataset/eval_videos, else examples)",
    )
    question: str | None = flag(None, "asked once a file; without it, a chat in a terminal")
    joint: bool = flag(False, "ask the question once about all files", "--together")
    chat: bool = flag(False, "a chat also where the input is no terminal")
    temperature: float = flag(0.0, "0: the most probable answer; above: sampled")
    top_k: int = flag(0, "sample from so many of the most probable tokens; 0: all")
    top_p: float = flag(1.0, "sample from the most probable tokens of this total probability")
    min_p: float = flag(0.0, "sample from tokens of at least this fraction of the top probability")
    repetition_penalty: float = flag(1.0, "above 1: fewer words that were there before")
    stop: list[str] | None = flag(None, "texts before which an answer ends")

    def problems(self) -> list[str]:
        found = super().problems()
        if self.data_path and (self.video or self.image or self.question or self.chat):
            found.append(
                "--data_path scores a test set; --video, --image, --question are for a chat"
            )
        if self.chat and (self.question or self.joint):
            found.append("--question and --joint ask once, --chat reads questions: choose one")
        return found


def main() -> None:
    flags = parse_flags(EvalFlags, __doc__)
    if not flags.data_path:
        return talk(flags)
    result = score_test_set(flags)
    if flags.output:
        flags.output.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(result, indent=1, ensure_ascii=False)
        flags.output.write_text(text, encoding="utf-8")


def find_checkpoint(flags: EvalFlags) -> Path:
    """The one that is named; else the usual one, and where nothing was trained and no size asked
    for, the small one that ships. Raises ValueError with the command that trains it."""
    stage, dim = STAGES[flags.model_mode], flags.dim or 512
    usual = Path(f"out/{stage}_videolm_{dim}.pth")
    checkpoint = Path(flags.load_from or usual)
    if checkpoint.exists():
        return checkpoint
    if (flags.load_from, flags.dim, flags.model_mode) == (None, None, 1):
        return DEMO_MODEL
    size = "768_16" if dim == 768 else "512_8"
    trained = find_models("out")
    hint = f"{trained[0]} is there" if trained else "bash scripts/quickstart.sh trains a small one"
    raise ValueError(
        f"no checkpoint {checkpoint}: train it (bash scripts/train/train_{stage}_{size}.sh) "
        f"or name another (--load_from PATH); {hint}"
    )


def load_chat_model(flags: EvalFlags) -> ChatModel:
    checkpoint = find_checkpoint(flags)
    chat_model = flags.load_model(checkpoint)
    if note := read_about(checkpoint).get("known_frames", {}).get("note"):
        print(f"{checkpoint.relative_to(ROOT) if checkpoint == DEMO_MODEL else checkpoint}: {note}")
    shape = chat_model.model.config.language_model
    for name, trained in (("dim", shape.hidden_size), ("n_layers", shape.num_hidden_layers)):
        if (asked := getattr(flags, name)) not in (None, trained):
            raise ValueError(f"{checkpoint} was trained with --{name} {trained}, not {asked}")
    return chat_model


# ---- the terminal


def talk(flags: EvalFlags) -> None:
    """A chat, or one question about each file or all of them; a file that can't be read is named
    and skipped."""
    sampling = Sampling(
        *(flags.max_new_tokens, flags.temperature, flags.top_k, flags.top_p, flags.min_p),
        *(flags.repetition_penalty, flags.seed),
    )
    is_chat = flags.chat or (sys.stdin.isatty() and not flags.question)
    files = [Path(file) for file in chain(flags.video or [], flags.image or [])]
    if not files and not is_chat:
        files = media_in(flags.eval_dir or default_clips())
    terminal = Terminal(load_chat_model(flags), sampling, tuple(flags.stop or ()))
    attached = 0
    for file in files:
        try:
            terminal.attach(file)
            attached += 1
        except VideoError as error:
            print(error)
            continue
        if not is_chat and not flags.joint:
            ask_once(terminal, flags.question)
    if files and not attached:
        raise ValueError("none of the files can be read")
    if is_chat:
        if not files:
            print(f"Attach a video first: /video {EXAMPLES.relative_to(ROOT)}/order.mp4")
        terminal.run()
    elif flags.joint:
        ask_once(terminal, flags.question)


def media_in(folder: Path) -> list[Path]:
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    files = [file for file in files if file.suffix.lower() in MEDIA_SUFFIXES]
    if not files:
        raise ValueError(f"no video or image in {folder}: put one there or name one (--video FILE)")
    return files


def ask_once(terminal: Terminal, question: str | None) -> None:
    print(f"Q: {question or DEFAULT_QUESTION}")
    terminal.answer(question or DEFAULT_QUESTION)
    terminal.command("/reset")


# ---- a test set


def score_test_set(flags: EvalFlags) -> dict:
    """Asks the test set, prints its tables, returns what --output writes. The answers are kept
    beside that as they come: the same command continues a run that was killed."""
    start, cpu_start = time.perf_counter(), time.process_time()
    samples = read_samples(*flags.data_path)
    if flags.against:
        theirs = read_results(answers_path(flags.against))
        check_comparable(map(unanswered, samples), theirs)
    chat_model = load_chat_model(flags)
    with tempfile.TemporaryDirectory() as folder:
        answers = answers_path(flags.output or Path(folder, "eval.json"))
        ask_test_set(chat_model, samples, flags, answers)
        results = read_results(answers)
        summary = summarise_answers(results)
        for reason in list(summary["left_out"].values())[:MAX_REPORTED]:
            print(f"left out: {reason}", file=sys.stderr)
        if not summary["samples"]:
            raise ValueError(f"{', '.join(flags.data_path)}: no sample is left to ask")
        print(f"\n{format_summary(summary)}")
        if flags.against:
            summary["against"] = compare_answers(results, theirs)
            print(format_comparison(summary["against"]))
        if flags.output:
            for path in write_submissions(results, flags.output.parent):
                print(f"{path}: for the benchmark's own judge")
    return {
        "checkpoint": str(chat_model.checkpoint),
        "data_path": flags.data_path,
        "images_path": flags.images_path,
        "num_frames": chat_model.num_frames,
        "parameters": chat_model.parameters,
        "seconds": round(time.perf_counter() - start, 1),
        "cpu_seconds": round(time.process_time() - cpu_start, 1),
        **summary,
    }


if __name__ == "__main__":
    launch(main)
