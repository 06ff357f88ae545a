"""Check samples against their media, or their features, before a long run; write what is good.

    python -m scripts.check_data --data_path train.jsonl --images_path videos
    python -m scripts.check_data --data_path train.jsonl --use_feature --features_path features

Reads each record as training does: its form, its tags against its visuals, its length in tokens;
decodes each visual once (or finds its features). `--out_dir` gets

    <name>.clean.jsonl   the good records of <name>, unchanged
    problems.jsonl       file, line, id, reason and detail of the others
    lengths.png          a histogram of the lengths
    report.json          all figures

Exit codes: 0 everything is good, 3 there are problems, 1 the check itself couldn't be done.
"""

import argparse
import json
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from cli import launch
from dataset.conversation import IGNORED, ConversationError, encode, truncate
from dataset.feature_store import FeatureStore
from dataset.parallel import in_any_order
from dataset.records import read_records
from dataset.samples import parse_sample, resolve_under
from dataset.video import VideoError, ending_workers, read_frames
from extract_features import num_cores

CHUNK = 256  # records that a worker gets at once
LISTED = 20  # problems on the terminal
FOUND_PROBLEMS = 3  # exit code


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data_path", nargs="+", required=True, help="jsonl, JSON arrays or parquets of samples")
    add("--images_path", default="dataset/videos", help="root that the visuals' paths start from")
    add("--use_feature", action="store_true", help="look for features, decode nothing")
    add("--features_path", default="dataset/features", help="their folder")
    add("--num_frames", type=int, default=8)
    add("--sampling", choices=["uniform", "fps"], default="uniform")
    add("--fps", type=float, help="frames a second with --sampling fps")
    add("--video_backend", choices=["pyav", "decord"], default="pyav")
    add("--tokenizer_path", default="model/text_tokenizer")
    add("--visual_tokens", type=int, default=50, help="placeholder tokens of a visual")
    add("--max_seq_len", type=int, default=1024, help="what training cuts at")
    add(*("--num_workers", "--workers"), type=int, default=num_cores(), help="processes")
    add("--decode_seconds", type=float, default=120, help="longest time for one visual")
    add("--out_dir", type=Path, default=Path("out/check_data"))
    args = parser.parse_args(argv)
    stems = [Path(path).stem for path in args.data_path]
    if len(set(stems)) < len(stems):
        parser.error("two files of --data_path have the same name: check them one by one")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    if not Path(args.tokenizer_path).is_dir():
        raise ValueError(f"--tokenizer_path {args.tokenizer_path}: no such folder")
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer_path)
    check = TextCheck(tokenizer, args.visual_tokens, args.max_seq_len)
    samples = list(check_texts(check, args.data_path, args.num_workers))
    if not samples:
        raise ValueError(f"{', '.join(args.data_path)}: no sample in it")
    reasons = check_visuals(args, dict.fromkeys(chain.from_iterable(s.visuals for s in samples)))
    for sample in samples:
        for visual in sample.visuals:
            if sample.problem is None and visual in reasons:
                reason, detail = reasons[visual]
                sample.problem = {"reason": reason, "visual": visual, "detail": detail}

    args.out_dir.mkdir(parents=True, exist_ok=True)
    report = summarize(samples, reasons, args.max_seq_len)
    (args.out_dir / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    problems = [sample for sample in samples if sample.problem]
    with open(args.out_dir / "problems.jsonl", "w", encoding="utf-8") as file:
        for sample in problems:
            where = {"file": sample.path, "line": sample.line, "id": sample.id}
            file.write(json.dumps({**where, **sample.problem}, ensure_ascii=False) + "\n")
    draw_lengths([s.length for s in samples if s.length], args.max_seq_len, args.out_dir)
    for path in args.data_path:
        bad = {sample.line for sample in problems if sample.path == path}
        write_clean(path, bad, args.out_dir / f"{Path(path).stem}.clean.jsonl")
    tell(report, problems, args)
    if problems:
        raise SystemExit(FOUND_PROBLEMS)


# ------------------------------------------------------------------------------------- records


@dataclass(slots=True)
class Checked:
    """What the check remembers of a sample: little, for there may be millions."""

    path: str
    line: int
    id: str | None = None
    visuals: tuple[str, ...] = ()
    length: int = 0  # tokens, before any cut
    supervised: int = 0
    problem: dict | None = None


@dataclass
class TextCheck:
    """(file, [(line, record)]) → [Checked]: all that can be said without opening a visual."""

    tokenizer: PreTrainedTokenizerBase
    visual_tokens: int
    max_length: int

    def __call__(self, chunk: tuple[str, list]) -> list[Checked]:
        path, records = chunk
        return [self.check(path, line, record) for line, record in records]

    def check(self, path: str, line: int, record: object) -> Checked:
        checked = Checked(path, line, record.get("id") if isinstance(record, dict) else None)
        try:
            sample = parse_sample(record, line, path)
            checked.id, checked.visuals = sample.id, tuple(sample.visuals)
            lengths = [self.visual_tokens] * len(sample.visuals)
            encoded = encode(self.tokenizer, sample.messages, lengths)
        except ConversationError as error:
            checked.problem = {"reason": "conversation", "detail": str(error)}
            return checked
        except ValueError as error:
            checked.problem = {"reason": "malformed", "detail": str(error)}
            return checked
        checked.length = len(encoded.input_ids)
        checked.supervised = sum(label != IGNORED for label in encoded.labels)
        try:
            truncate(encoded, self.max_length)
        except ConversationError as error:
            checked.problem = {"reason": "too_long", "detail": str(error)}
        return checked


_check: TextCheck | None = None  # in a worker process: a tokenizer takes long to send


def _start_worker(check: TextCheck) -> None:
    global _check
    _check = check


def _check_chunk(chunk: tuple[str, list]) -> list[Checked]:
    return _check(chunk)


def check_texts(check: TextCheck, paths: list[str], workers: int) -> Iterator[Checked]:
    _start_worker(check)  # where there are none, this process does their work
    processes = partial(ProcessPoolExecutor, initializer=_start_worker, initargs=(check,))
    total = sum(Path(path).stat().st_size for path in paths if Path(path).is_file())
    with tqdm(total=total, unit="B", unit_scale=True, desc="records", smoothing=0.1) as bar:
        chunks = _chunks(paths, bar.update)
        for _, checked in in_any_order(_check_chunk, chunks, workers, processes):
            yield from checked


def _chunks(paths: list[str], advance) -> Iterator[tuple[str, list]]:
    for path in paths:
        chunk = []
        for numbered in read_records(path, advance):
            chunk.append(numbered)
            if len(chunk) == CHUNK:
                yield path, chunk
                chunk = []
        if chunk:
            yield path, chunk


# ------------------------------------------------------------------------------------- visuals


def check_visuals(args: argparse.Namespace, visuals) -> dict[str, tuple[str, str]]:
    """The bad ones of `visuals`: path → (reason, detail)."""
    how = {"num_frames": args.num_frames, "sampling": args.sampling, "fps": args.fps}
    if args.use_feature:
        store = FeatureStore(args.features_path)
        store.check(how)
        look = partial(find_features, store)
    else:
        how |= {"backend": args.video_backend, "timeout": args.decode_seconds}
        look = partial(decode, partial(read_frames, **how), Path(args.images_path))
    found = in_any_order(look, visuals, min(args.num_workers, len(visuals)))
    bar = tqdm(total=len(visuals), unit=" visuals", desc="visuals", smoothing=0.1)
    bad = {}
    with bar, ending_workers(), closing(found):
        for visual, problem in found:
            if problem:
                bad[visual] = problem
                bar.set_postfix_str(f"{len(bad)} bad", refresh=False)
            bar.update()
    return bad


def decode(read: Callable, root: Path, visual: str) -> tuple[str, str] | None:
    try:
        read(resolve_under(root, visual))
    except VideoError as error:
        return error.reason, error.detail
    except (ValueError, OSError) as error:
        return "bad_path", str(error)
    except Exception as error:
        return "unexpected", f"{type(error).__name__}: {error}"
    return None


def find_features(store: FeatureStore, visual: str) -> tuple[str, str] | None:
    try:
        store.read(visual, [0])
    except (ValueError, IndexError) as error:
        failure = store.manifest["failures"].get(visual)
        return (failure["reason"] if failure else "no_features"), str(error)
    return None


# -------------------------------------------------------------------------------------- report


def summarize(samples: list[Checked], bad_visuals: dict, max_length: int) -> dict:
    lengths = np.array([sample.length for sample in samples if sample.length] or [0])
    kinds = Counter(
        "text" if not s.visuals else "one visual" if len(s.visuals) == 1 else "several visuals"
        for s in samples
        if s.length  # the form of the others couldn't be read
    )
    return {
        "samples": len(samples),
        "good": sum(sample.problem is None for sample in samples),
        "kinds": dict(kinds),
        "visuals": len({visual for sample in samples for visual in sample.visuals}),
        "bad_visuals": len(bad_visuals),
        "problems": dict(Counter(s.problem["reason"] for s in samples if s.problem)),
        "tokens": {
            "total": int(lengths.sum()),
            "supervised": sum(sample.supervised for sample in samples),
            "mean": round(float(lengths.mean()), 1),
            **{
                name: int(np.percentile(lengths, share, method="higher"))
                for name, share in (("min", 0), ("median", 50), ("p95", 95), ("p99", 99))
            },
            "max": int(lengths.max()),
        },
        "max_seq_len": max_length,
        "truncated_share": round(float((lengths > max_length).mean()), 6),
    }


def draw_lengths(lengths: list[int], max_length: int, folder: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.hist(lengths, bins=min(60, max(10, len(set(lengths)))), color="tab:blue")
    longer = sum(length > max_length for length in lengths)
    axes.set_title(f"{longer} of {len(lengths)} are longer than max_seq_len {max_length}")
    if 2 * max(lengths, default=0) > max_length:  # else the line would stand far off
        axes.axvline(max_length, color="tab:red", linestyle="--")
    axes.set(xlabel="tokens in a sample, visuals included", ylabel="samples", yscale="log")
    figure.savefig(folder / "lengths.png", dpi=120)


def write_clean(path: str, bad: set[int], output: Path) -> None:
    with open(path, "rb") as file:
        is_parquet = file.read(4) == b"PAR1"
    if is_parquet:  # its pictures aren't files that a jsonl could name
        if bad:
            print(f"{path}: no clean copy of a parquet; python -m scripts.convert.chinese_llava")
        return
    unfinished = output.with_suffix(".tmp")
    with open(unfinished, "w", encoding="utf-8") as file:
        for line, record in read_records(path):
            if line not in bad:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
    unfinished.replace(output)


def tell(report: dict, problems: list[Checked], args: argparse.Namespace) -> None:
    tokens = report["tokens"]
    kinds = ", ".join(f"{number} {kind}" for kind, number in report["kinds"].items())
    print(
        f"{report['samples']} samples ({kinds}), {report['visuals']} visuals\n"
        f"tokens: {tokens['min']} to {tokens['max']}, median {tokens['median']}, 95 % up to "
        f"{tokens['p95']}; {tokens['supervised']} of {tokens['total']} supervised\n"
        f"{100 * report['truncated_share']:.2f} % are longer than --max_seq_len {args.max_seq_len}"
    )
    for sample in problems[:LISTED]:
        problem = sample.problem
        print(f"  {sample.path}:{sample.line}: {problem['reason']}: {problem['detail']}")
    if len(problems) > LISTED:
        print(f"  … and {len(problems) - LISTED} more in problems.jsonl")
    reasons = ", ".join(f"{number} {reason}" for reason, number in report["problems"].items())
    print(f"{report['good']} good, {len(problems)} bad" + (f": {reasons}" if reasons else ""))
    print(f"written to {args.out_dir}")


if __name__ == "__main__":
    launch(main)
