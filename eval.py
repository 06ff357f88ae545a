"""Answers questions about videos and images: in the terminal, or a test set with its score.

    python eval.py                                        # a chat; /help says what it knows
    python eval.py --video a.mp4 --image b.png c.png      # a chat that starts with these
    python eval.py --image a.png b.png --question "What is it?"              # asked about each file
    python eval.py --image a.png b.png --together --question "The same?"     # about all at once
    python eval.py --data_path test.jsonl --images_path DIR --controls --output out/eval.json

A test set is a jsonl like that of training; `scoring` may give each answer a type (see
dataset/scoring.py). The controls ask the same questions with the order of the frames changed or the
picture taken away: a score that stays up there was never read from the video.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dataset.conversation import ConversationError
from dataset.samples import Sample, read_samples
from dataset.scoring import fact_vocabulary, format_table, score_turn, summarise
from dataset.video import MEDIA_SUFFIXES, VideoError
from inference import TOKENIZER_PATH, VISION_PATH, ChatModel, Visual, find_models
from inference.terminal import Terminal
from model.generate import Sampling
from model.inference import DTYPES, QUANTIZATIONS

STAGES = {0: "pretrain", 1: "sft"}
DEFAULT_QUESTION = "What happens in this video?"


def load(args: argparse.Namespace) -> ChatModel:
    stage, dim = STAGES[args.model_mode], args.dim or 512
    checkpoint = Path(args.load_from or f"out/{stage}_videolm_{dim}.pth")
    if not checkpoint.exists():
        size = "768_16" if dim == 768 else "512_8"
        found = find_models("out")
        hint = f"{found[0]} is there" if found else "bash scripts/quickstart.sh trains a small one"
        raise ValueError(
            f"no checkpoint {checkpoint}: train it (bash scripts/train/train_{stage}_{size}.sh) "
            f"or name another (--load_from PATH); {hint}"
        )
    chat_model = ChatModel.load(
        *(checkpoint, args.vision_path, args.tokenizer_path, args.num_frames, args.device),
        *(args.sampling, args.fps, args.dtype, args.quantize, args.accept_tokenizer),
    )
    has = chat_model.model.config.language_model
    for flag, asked, trained in (
        ("--dim", args.dim, has.hidden_size),
        ("--n_layers", args.n_layers, has.num_hidden_layers),
    ):
        if asked not in (None, trained):
            raise ValueError(f"{checkpoint} was trained with {flag} {trained}, not {asked}")
    return chat_model


# ---- a test set ----------------------------------------------------------------------------------


def controls(chat_model: ChatModel, seed: int) -> dict[str, Callable[[Tensor], Tensor]]:
    """What is done to a visual's features (F, P, D). The tower sees frames one by one, so this
    equals changing the frames themselves, and no clip is read twice."""
    size = chat_model.transform.image_size
    grey = np.full((1, size, size, 3), 127, np.uint8)
    grey = chat_model.encode_frames(chat_model.transform(grey))
    dice = torch.Generator().manual_seed(seed)
    return {
        "normal": lambda frames: frames,
        "reversed": lambda frames: frames.flip(0),
        "shuffled": lambda frames: frames[shuffled_order(len(frames), dice)],
        "first frame": lambda frames: frames[:1].expand_as(frames),
        "no video": lambda frames: grey.expand_as(frames),
    }


def changed(visual: Visual, reverse: bool, change: Callable, made: dict[tuple, Visual]) -> Visual:
    """The visual under a control; the same one for all questions about it, so that what they share
    is read once."""
    key = (visual, reverse)
    if key not in made:
        frames = visual.features.flip(0) if reverse else visual.features
        made[key] = replace(visual, features=change(frames))
    return made[key]


def shuffled_order(num_frames: int, dice: torch.Generator) -> list[int]:
    """A permutation that is neither the order nor its reverse; fewer than three frames have none
    and stay as they are. One for all clips would keep some order, the same for each of them."""
    order = shuffled = list(range(num_frames))
    while num_frames > 2 and shuffled in (order, order[::-1]):
        shuffled = torch.randperm(num_frames, generator=dice).tolist()
    return shuffled


def true_answers(sample: Sample) -> list[str]:
    return [turn["content"] for turn in sample.messages if turn["role"] == "assistant"]


def asked(sample: Sample, answers: list[str]) -> list[dict]:
    """The conversation up to the question that follows the model's own `answers`."""
    messages, given = [], iter(answers)
    for message in sample.messages:
        if message["role"] == "assistant":
            answer = next(given, None)
            if answer is None:
                break
            message = {"role": "assistant", "content": answer or "-"}  # templates want some text
        messages.append(message)
    return messages


def answer_all(
    chat_model: ChatModel,
    samples: list[Sample],
    visuals: list[list[Visual]],
    args: argparse.Namespace,
    label: str,
) -> list[list[str]]:
    """Greedy answers to every turn of every sample. A later turn is asked with the model's own
    earlier answers before it, as in use; the true ones would help."""
    turns, sampling = [true_answers(sample) for sample in samples], Sampling(args.max_new_tokens)
    answers: list[list[str]] = [[] for _ in samples]
    clips: dict[tuple, int] = {}
    with tqdm(total=sum(map(len, turns)), desc=label, unit="answer") as bar:
        for turn in range(max(map(len, turns))):
            rows = [row for row in range(len(samples)) if turn < len(turns[row])]
            requests = {}
            for row in rows:
                messages = asked(samples[row], answers[row])
                try:
                    requests[row] = chat_model.make_request(messages, visuals[row], sampling)
                except ConversationError as error:
                    raise ValueError(f"{samples[row].where}: {error}") from None
            # Questions about one clip come together: the batch reads what they share once.
            rows.sort(key=lambda row: clips.setdefault(tuple(visuals[row]), len(clips)))
            for start in range(0, len(rows), args.batch_size):
                batch = rows[start : start + args.batch_size]
                texts = chat_model.generate([requests[row] for row in batch])
                for row, text in zip(batch, texts, strict=True):
                    answers[row].append(text)
                bar.update(len(batch))
    return answers


def score(samples: list[Sample], answers: list[list[str]]) -> list[dict]:
    """One record a turn, for `summarise` and for the report."""
    entries = [sample.scoring or [{}] * len(true_answers(sample)) for sample in samples]
    languages = [sample.language or "-" for sample in samples]
    vocabulary = fact_vocabulary(
        (language, entry) for language, row in zip(languages, entries, strict=True) for entry in row
    )
    records = []
    for sample, language, row, given in zip(samples, languages, entries, answers, strict=True):
        turns = zip(row, given, true_answers(sample), strict=True)
        for turn, (entry, prediction, true) in enumerate(turns):
            question = asked(sample, given[:turn])[-1]["content"]
            question = question.replace("<video>", "").replace("<image>", "").strip()
            about = {"id": sample.id, "visuals": sample.visuals, "turn": turn, "question": question}
            records.append(about | score_turn(entry, language, prediction, true, vocabulary))
    return records


def evaluate(args: argparse.Namespace) -> dict:
    """Scores the test set under each control, prints the table, returns what --output writes."""
    start, cpu_start = time.perf_counter(), time.process_time()
    samples = [sample for path in args.data_path for sample in read_samples(path)]
    samples = samples[: args.limit or None]
    paths = [sample.files(args.images_path) for sample in samples]
    chat_model = load(args)
    seen, failures = chat_model.encode_videos(list(dict.fromkeys(chain(*paths))))
    for reason in failures.values():
        print(f"left out: {reason}", file=sys.stderr)
    read = [row for row, files in enumerate(paths) if not failures.keys() & set(files)]
    if not read:
        raise ValueError(f"{', '.join(args.data_path)}: no sample is left to ask")
    left_out = len(samples) - len(read)
    samples, paths = [samples[row] for row in read], [paths[row] for row in read]

    records = {}
    for name, change in controls(chat_model, args.seed).items():
        if name != "normal" and not args.controls:
            continue
        made: dict[tuple, Visual] = {}
        visuals = [
            [
                changed(seen[path], sample.reverse, change, {} if name == "shuffled" else made)
                for path in files
            ]
            for sample, files in zip(samples, paths, strict=True)
        ]
        records[name] = score(samples, answer_all(chat_model, samples, visuals, args, name))

    summaries = {name: summarise(rows) for name, rows in records.items()}
    print(f"\n{format_table(summaries)}")
    if left_out:
        print(f"{left_out} samples were left out: {len(failures)} files can't be read")
    return {
        "checkpoint": str(chat_model.checkpoint),
        "data_path": args.data_path,
        "images_path": args.images_path,
        "samples": len(samples),
        "clips": len(seen),
        "left_out": {str(path): reason for path, reason in failures.items()},
        "num_frames": chat_model.num_frames,
        "parameters": chat_model.parameters,
        "seconds": round(time.perf_counter() - start, 1),
        "cpu_seconds": round(time.process_time() - cpu_start, 1),
        "accuracy": summaries["normal"],
        "controls": summaries,
        "answers": records["normal"],
    }


# ---- the terminal --------------------------------------------------------------------------------


def named_files(args: argparse.Namespace) -> list[Path]:
    return [Path(file) for file in [*(args.video or []), *(args.image or [])]]


def files_of(folder: Path) -> list[Path]:
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    files = [file for file in files if file.suffix.lower() in MEDIA_SUFFIXES]
    if not files:
        raise ValueError(f"no video or image in {folder}: put one there or name one (--video FILE)")
    return files


def talk(args: argparse.Namespace) -> None:
    """A chat, or one question about each file or all of them; a file that can't be read is named
    and passed over."""
    sampling = Sampling(
        *(args.max_new_tokens, args.temperature, args.top_k, args.top_p, args.min_p),
        *(args.repetition_penalty, args.seed),
    )
    is_chat = args.chat or (sys.stdin.isatty() and not args.question)
    files = named_files(args) or ([] if is_chat else files_of(Path(args.eval_dir)))
    terminal = Terminal(load(args), sampling, tuple(args.stop))
    question = args.question or DEFAULT_QUESTION
    shown = 0
    for file in files:
        try:
            terminal.attach(file)
            shown += 1
        except VideoError as error:
            print(error)
            continue
        if not is_chat and not args.together:
            ask(terminal, question)
    if files and not shown:
        raise ValueError("none of the files can be read")
    if is_chat:
        terminal.run()
    elif args.together:
        ask(terminal, question)


def ask(terminal: Terminal, question: str) -> None:
    print(f"Q: {question}")
    terminal.answer(question)
    terminal.command("/reset")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model_mode", type=int, choices=STAGES, default=1, help="0: pretrained, 1: fine-tuned")
    add("--dim", type=int, help="width of the language model; names the default checkpoint too")
    add("--n_layers", type=int, help="its layers; the checkpoint knows, this checks")
    add(
        "--load_from",
        help=".pth or transformers directory (default: out/{pretrain,sft}_videolm_<dim>.pth)",
    )
    add("--vision_path", help=f"vision tower (default: the checkpoint's own, or {VISION_PATH})")
    add("--tokenizer_path", help=f"tokenizer (default: the checkpoint's own, or {TOKENIZER_PATH})")
    add("--accept_tokenizer", action="store_true", help="even if it seems to be another model's")
    add("--num_frames", type=int, help="frames taken from a video (default: as in training)")
    add("--sampling", choices=["uniform", "fps"], help="which of them (default: as in training)")
    add("--fps", type=float, help="frames a second with --sampling fps")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    add("--dtype", choices=DTYPES, default="auto", help="auto: bfloat16 where the device has it")
    add("--quantize", choices=QUANTIZATIONS, default="none", help="int8: fastest on a CPU")
    add("--max_new_tokens", type=int, default=64, help="longest answer")
    add("--seed", type=int, default=0, help="of the shuffled control and of sampled answers")
    add = parser.add_argument_group("chat").add_argument
    add("--video", nargs="+", metavar="FILE", help="videos to talk about")
    add("--image", nargs="+", metavar="FILE", help="images to talk about")
    add("--eval_dir", default="dataset/eval_videos", help="folder asked about if none is named")
    add("--question", help="asked once a file; without it, a chat if there is a terminal")
    add("--together", action="store_true", help="ask once about all files instead")
    add("--chat", action="store_true", help="a chat also where the input is no terminal")
    add("--temperature", type=float, default=0.0, help="0: the most likely answer; above: sampled")
    add("--top_k", type=int, default=0, help="sample from so many of the likeliest tokens; 0: all")
    add("--top_p", type=float, default=1.0, help="sample from the likeliest tokens of this sum")
    add("--min_p", type=float, default=0.0, help="or at least so likely, compared with the first")
    add(
        "--repetition_penalty", type=float, default=1.0, help="above 1: say other words than before"
    )
    add("--stop", nargs="+", default=[], metavar="TEXT", help="end an answer before such a text")
    add = parser.add_argument_group("test set").add_argument
    add("--data_path", nargs="+", metavar="JSONL", help="files of questions with true answers")
    add("--images_path", default="dataset/videos", help="folder that their paths start from")
    add("--controls", action="store_true", help="ask again with the frames changed, or grey")
    add("--batch_size", type=int, default=64, help="questions answered at a time")
    add("--limit", type=int, default=0, help="only so many samples; 0: all")
    add("--output", help="JSON file for all figures and answers")
    args = parser.parse_args(argv)
    for name in ("num_frames", "max_new_tokens", "batch_size"):
        if (value := getattr(args, name)) is not None and value < 1:
            parser.error(f"--{name} is {value}: give 1 or more")
    if args.data_path and (args.video or args.image or args.question or args.chat):
        parser.error("--data_path scores a test set; --video, --image, --question are for a chat")
    if args.chat and (args.question or args.together):
        parser.error("--question and --together ask once, --chat reads questions: choose one")
    return args


def main() -> None:
    args = parse_arguments()
    try:
        if not args.data_path:
            return talk(args)
        result = evaluate(args)
        if args.output:
            output = Path(args.output)
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(json.dumps(result, indent=1, ensure_ascii=False), encoding="utf-8")
    except (ValueError, OSError) as error:
        raise SystemExit(f"eval.py: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
