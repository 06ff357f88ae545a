"""Check samples against their media before a long run; write what is good.

    python -m scripts.check_data --data_path train.jsonl --val_path val.jsonl --images_path videos

Reads each line as training does: its form, its tags against its visuals, its length in tokens, and
whether a sample of --val_path is one of --data_path too; decodes each visual once. `--out_dir` gets

    <name>.clean.jsonl   the good lines of <name>, unchanged
    problems.jsonl       file, line, id, reason and detail of the others
    report.json          all figures, of the lengths in tokens too

Exit codes: 0 everything is good, 3 there are problems, 1 the check itself couldn't be done.
"""

import json
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from cli import TOKENIZER_PATH, FrameFlags, flag, launch, parse_flags
from dataset.conversation import IGNORED, ConversationError, encode, truncate
from dataset.jsonl import parse_json, read_lines
from dataset.samples import parse_sample, resolve_under
from dataset.video import VideoError, read_frames, reading_in_threads
from files import whole_file
from model.tokenizer import open_tokenizer

LISTED = 20  # problems on the terminal
FOUND_PROBLEMS = 3  # exit code


@dataclass
class CheckFlags(FrameFlags):
    """Check"""

    data_path: list[str] = flag([], "jsonl files of samples")
    val_path: list[str] = flag([], "held-out jsonl files: no sample may be in --data_path too")
    images_path: str = flag("dataset/videos", "folder that the visuals' paths start from")
    tokenizer_path: str = flag(TOKENIZER_PATH, "folder of the tokenizer")
    visual_tokens: int = flag(50, "placeholder tokens of a visual", at_least=1)
    max_seq_len: int = flag(1024, "tokens that training cuts a sample at", at_least=1)
    num_workers: int = flag(os.cpu_count() or 1, "visuals decoded at a time", "--workers")
    decode_seconds: float = flag(120, "longest time for one visual")
    out_dir: str = flag("out/check_data", "folder for what is found")

    def problems(self) -> list[str]:
        found = super().problems()
        stems = [Path(path).stem for path in self.data_path + self.val_path]
        if not self.data_path:
            found.append("--data_path is missing: give one or more jsonl files")
        if len(set(stems)) < len(stems):
            found.append("two files have the same name: check them one by one")
        if not Path(self.tokenizer_path).is_dir():
            found.append(f"--tokenizer_path {self.tokenizer_path}: no such folder")
        return found


@dataclass(slots=True)
class Checked:
    """What the check remembers of a line."""

    path: str
    line: int
    id: str | None = None
    visuals: tuple[str, ...] = ()
    content: int = 0  # a hash of all that the model sees
    length: int = 0  # tokens, before any cut
    supervised: int = 0
    problem: tuple[str, str] | None = None  # reason, detail


def main(argv: list[str] | None = None) -> None:
    flags = parse_flags(CheckFlags, __doc__, argv)
    tokenizer = open_tokenizer(flags.tokenizer_path)
    paths, samples = flags.data_path + flags.val_path, []
    for path in paths:
        lines = tqdm(read_lines(path), unit=" lines", desc=Path(path).name, smoothing=0.1)
        found = [check_line(text, line, path, tokenizer, flags) for line, text, _ in lines]
        if not found:
            raise ValueError(f"{path}: no sample in it")
        samples += found
    bad_visuals = check_visuals(flags, list(dict.fromkeys(v for s in samples for v in s.visuals)))
    trained_on = {s.content for s in samples if s.path in flags.data_path}
    for sample in (sample for sample in samples if sample.problem is None):
        if bad := next((bad_visuals[v] for v in sample.visuals if v in bad_visuals), None):
            sample.problem = bad
        elif sample.path in flags.val_path and sample.content in trained_on:
            sample.problem = "in_training_data", "its visuals and words are in --data_path too"

    problems = [sample for sample in samples if sample.problem]
    out = Path(flags.out_dir)
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "problems.jsonl", "w", encoding="utf-8") as file:
        for sample in problems:
            where = {"file": sample.path, "line": sample.line, "id": sample.id}
            what = dict(zip(("reason", "detail"), sample.problem, strict=True))
            file.write(json.dumps(where | what, ensure_ascii=False) + "\n")
    for path in paths:
        bad_lines = {sample.line for sample in problems if sample.path == path}
        with whole_file(out / f"{Path(path).stem}.clean.jsonl") as file:
            file.writelines(t + b"\n" for line, t, _ in read_lines(path) if line not in bad_lines)
    report = summarize(samples, len(bad_visuals), flags.max_seq_len)
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n")

    for sample in problems[:LISTED]:
        print(f"{sample.path}:{sample.line}: {': '.join(sample.problem)}")
    if len(problems) > LISTED:
        print(f"… and {len(problems) - LISTED} more in problems.jsonl")
    print("\n".join(f"{name}: {figure}" for name, figure in report.items()))
    print(f"{report['good']} good, {len(problems)} bad; written to {out}")
    if problems:
        raise SystemExit(FOUND_PROBLEMS)


def check_line(text: bytes, line: int, path: str, tokenizer, flags: CheckFlags) -> Checked:
    """All that can be known of a line without opening a visual."""
    checked = Checked(path, line)
    try:
        record = parse_json(text)
        checked.id = record.get("id") if isinstance(record, dict) else None
        sample = parse_sample(record, line, path)
        checked.id, checked.visuals = sample.id, tuple(sample.visuals)
        checked.content = hash((checked.visuals, sample.reverse, str(sample.messages)))
        encoded = encode(tokenizer, sample.messages, [flags.visual_tokens] * len(sample.visuals))
        checked.length = len(encoded.input_ids)
        checked.supervised = sum(label != IGNORED for label in encoded.labels)
        truncate(encoded, flags.max_seq_len)
    except ConversationError as error:
        checked.problem = "too_long" if checked.length else "conversation", str(error)
    except ValueError as error:
        checked.problem = "malformed", str(error)
    return checked


def check_visuals(flags: CheckFlags, visuals: list[str]) -> dict[str, tuple[str, str]]:
    """The bad ones of `visuals`: path → (reason, detail)."""

    def decode(visual: str) -> tuple[str, str] | None:
        try:
            read_frames(
                resolve_under(flags.images_path, visual),
                num_frames=flags.num_frames,
                sampling=flags.sampling,
                fps=flags.fps,
                backend=flags.video_backend,
                timeout=flags.decode_seconds,
            )
        except VideoError as error:
            return error.reason, f"{visual}: {error.detail}"
        except Exception as error:  # one file in a million may not stop the others
            return "bad_path", str(error) or type(error).__name__

    num_workers = min(flags.num_workers, len(visuals))
    with reading_in_threads(decode, visuals, num_workers) as found:
        bar = tqdm(found, total=len(visuals), unit=" visuals", desc="visuals", smoothing=0.1)
        return {visual: problem for visual, problem in bar if problem}


def summarize(samples: list[Checked], bad_visuals: int, max_length: int) -> dict:
    """All figures of report.json."""
    readable = [sample for sample in samples if sample.length]
    lengths = np.array([sample.length for sample in readable] or [0])
    median, p95, p99 = (int(x) for x in np.percentile(lengths, (50, 95, 99), method="higher"))
    return {
        "samples": len(samples),
        "good": sum(sample.problem is None for sample in samples),
        "visuals_a_sample": dict(sorted(Counter(len(s.visuals) for s in readable).items())),
        "visuals": len({visual for sample in samples for visual in sample.visuals}),
        "bad_visuals": bad_visuals,
        "problems": dict(Counter(s.problem[0] for s in samples if s.problem)),
        "tokens": int(lengths.sum()),
        "supervised_tokens": sum(sample.supervised for sample in samples),
        "length": {"median": median, "p95": p95, "p99": p99, "max": int(lengths.max())},
        "max_seq_len": max_length,
        "truncated_share": round(float((lengths > max_length).mean()), 6),
    }


if __name__ == "__main__":
    launch(main)
