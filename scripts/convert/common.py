"""What every converter does: read a record, turn it, check it as training will, write it, report.

A dataset's own file says what its records look like, in one function

    def convert(record: dict, media: Media) -> dict

which raises ValueError for a record that can't be used.
"""

import hashlib
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from cli import Flags, flag, launch, parse_flags
from dataset.conversation import name_and_text
from dataset.jsonl import parse_json, read_lines
from dataset.samples import parse_sample
from files import whole_file
from scripts.convert.media import Media

DATA_SUFFIXES = (".json", ".jsonl", ".parquet")
NAMES = {"user": "human", "assistant": "gpt"}

Convert = Callable[[dict, Media], dict]


@dataclass
class ConvertFlags(Flags):
    """Conversion"""

    data_path: list[str] = flag([], "annotation files, or folders of them")
    images_path: str | None = flag(
        None,
        "folder of the videos and pictures: a sample whose file isn't in it is dropped, and "
        "pictures that stand in a parquet are written into it (default: paths aren't checked)",
    )
    output: str | None = flag(None, "jsonl to write")
    val_output: str | None = flag(
        None, "another jsonl, for held-out samples: no video or picture is named in both"
    )
    val_share: float = flag(0.01, "share of the videos and pictures that are held out")

    def problems(self) -> list[str]:
        found = super().problems()
        found += ["--data_path is missing"] * (not self.data_path)
        for name in ("output", "val_output"):
            path = getattr(self, name)
            if not (path or "").endswith(".jsonl") and (path or name == "output"):
                found.append(f"--{name} must be a name that ends in .jsonl")
        if not 0 < self.val_share < 1:
            found.append(f"--val_share is {self.val_share}: give a number between 0 and 1")
        return found


def main(description: str, convert: Convert, argv: list[str] | None = None) -> None:
    """A converter's command line."""
    launch(lambda: print(run(convert, parse_flags(ConvertFlags, description, argv))))


def run(convert: Convert, flags: ConvertFlags) -> str:
    """Convert all of `--data_path`; returns a report in words.

    What is dropped goes to `<output>.dropped.jsonl` with file, line and reason. Part of an output
    never bears its name. Raises ValueError where a file can't be read to its end, or where nothing
    is left to write.
    """
    paths, output = list_files(flags.data_path), Path(flags.output)
    outputs = [output, Path(flags.val_output)] if flags.val_output else [output]
    if same := {path.resolve() for path in outputs} & {path.resolve() for path in paths}:
        raise ValueError(f"--output {same.pop().name} is an input too; give it another name")
    root = flags.images_path
    holds_pictures = any(path.suffix == ".parquet" for path in paths)  # which make the folder
    if root and not Path(root).is_dir() and not holds_pictures:
        raise ValueError(f"--images_path {root}: no such folder")
    for path in outputs:
        path.parent.mkdir(parents=True, exist_ok=True)
    media, seen, ids, counts = Media(root), set(), Counter(), Counter()
    reasons: dict[str, str] = {}  # what they say without the names in them → the first of each
    written = [0, 0]  # samples, held-out samples
    dropped_path = output.with_suffix(".dropped.jsonl")
    records = ((path, number, record) for path in paths for number, record in read_records(path))
    with ExitStack() as stack:
        dropped_file, *files = map(stack.enter_context, map(whole_file, (dropped_path, *outputs)))
        for path, number, record in tqdm(records, unit=" records", smoothing=0.1):
            try:
                if not isinstance(record, dict):
                    unlike = ValueError("a record must be a JSON object")
                    raise record if isinstance(record, ValueError) else unlike
                media.take_pictures(record, path.stem)
                converted = {k: v for k, v in convert(record, media).items() if v is not None}
                sample = parse_sample(converted, number, str(path))  # as training does
                if sample.messages[-1]["role"] != "assistant":
                    raise ValueError("the last turn must be an answer")
                text = f"{sample.visuals}{sample.messages}{sample.reverse}"
                digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
                if digest in seen:
                    raise ValueError("the same as an earlier record, word for word")
                seen.add(digest)
            except ValueError as error:
                held = record if isinstance(record, dict) else {}
                name, reason = held.get("id", held.get("video_id")), str(error)
                line = {"file": str(path), "line": number, "id": name, "reason": reason}
                # Whatever the record held may be half of a surrogate pair: escaped.
                dropped_file.write(json.dumps(line, default=str).encode() + b"\n")
                key = re.sub(r"'[^']*'|\"[^\"]*\"|\b\d+\b", "…", reason.partition("\n")[0])
                counts[key] += 1
                reasons.setdefault(key, f"{path}:{number}: {reason[:300]}")
                continue
            media.save(sample.visuals)
            ids[sample.id] += 1
            unique = f"{sample.id}#{ids[sample.id]}" if ids[sample.id] > 1 else sample.id
            first = {k: converted[k] for k in ("id", "video", "image") if converted.get(k)}
            line = first | converted | {"id": unique}
            # The same for all samples of a visual, in any run.
            key = zlib.crc32((",".join(sample.visuals) or f"{sample.messages}").encode())
            is_held_out = len(outputs) > 1 and key < flags.val_share * 2**32
            written[is_held_out] += 1
            files[is_held_out].write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
        some = "\n".join(f"{n:>9,}  {reasons[key]}" for key, n in counts.most_common())
        if not any(written):
            raise ValueError(f"none of {counts.total()} records can be used\n{some}")
    total = sum(written) + counts.total()
    lines = [f"{output}: {written[0]:,} samples of {total:,} records"]
    if flags.val_output:
        lines.append(f"{flags.val_output}: {written[1]:,} held-out samples")
    if counts:
        lines += [f"dropped {counts.total():,}, listed in {dropped_path}:", some]
    else:
        dropped_path.unlink()
    lines += [f"noted: {number:,} × {note}" for note, number in media.notes.items()]
    root = root or "FOLDER_OF_THE_MEDIA"
    lines.append(f"next: python -m scripts.check_data --data_path {output} --images_path {root}")
    return "\n".join(lines)


# -------------------------------------------------------------------------------------- reading


def list_files(data_path: list[str]) -> list[Path]:
    """The files named, and those in the folders named, sorted."""
    files = []
    for path in map(Path, data_path):
        if path.is_dir():
            inside = (part for part in sorted(path.rglob("*")) if part.suffix in DATA_SUFFIXES)
            files += [p for p in inside if p.is_file() and not p.name.endswith(".dropped.jsonl")]
        elif path.is_file():
            files.append(path)
        else:
            raise ValueError(f"--data_path {path}: no such file or folder")
    if not files:
        raise ValueError(f"--data_path: no {', '.join(DATA_SUFFIXES)} in {', '.join(data_path)}")
    return files


def read_records(path: Path) -> Iterator[tuple[int, object]]:
    """(number, record): the line of a jsonl or the item of a JSON array from 1, a row from 0.

    A record that can't be parsed comes as the ValueError that says why; ValueError is raised where
    the whole file can't be read. A JSON array is held whole, the others are not.
    """
    with path.open("rb") as file:
        head = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    if head.startswith(b"["):
        try:
            yield from enumerate(json.loads(path.read_text(encoding="utf-8-sig")), 1)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: the JSON array is broken: {error}") from error
        return
    is_parquet = head.startswith(b"PAR1")
    for number, record, *_ in read_rows(path) if is_parquet else read_lines(path):
        try:
            if not is_parquet:
                record = parse_json(record)
            elif isinstance(record.get("conversations"), str):  # MiniMind-V's are JSON
                record["conversations"] = parse_json(record["conversations"].encode())
        except ValueError as error:
            record = error
        yield number, record


def read_rows(path: Path) -> Iterator[tuple[int, dict]]:
    """Rows of a parquet, from 0; ValueError for one that can't be read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # Few rows at a time, and by a buffer: a row group of pictures may be gigabytes.
        file = pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)
        batches = file.iter_batches(64)
        yield from enumerate(record for batch in batches for record in batch.to_pylist())
    except pa.ArrowException as error:
        raise ValueError(f"{path}: not a parquet that can be read ({error})") from error


def turns(record: dict) -> list[dict]:
    """The conversation in from/value; a turn without a name gets it by its place, as MiniMind-V
    reads its own data. What is wrong with them `parse_sample` says."""
    conversations = record.get("conversations")
    if not isinstance(conversations, list) or not all(isinstance(t, dict) for t in conversations):
        raise ValueError("'conversations' must be a list of turns")
    result = []
    for number, turn in enumerate(conversations):
        name, text = name_and_text(turn)
        name = name or ("gpt" if number % 2 else "human")
        result.append({"from": NAMES.get(str(name), name), "value": text})
    return result


def one_path(record: dict, key: str) -> str:
    """The path that a record names under `key`; ValueError if there is none."""
    path = record.get(key)
    if not isinstance(path, str) or not path.strip():
        raise ValueError(f"no {key} is named")
    return path.strip()


def one_turn(question: str, answer: object) -> list[dict]:
    """A question about a video and its answer, as a conversation."""
    return [{"from": "human", "value": f"<video>\n{question}"}, {"from": "gpt", "value": answer}]
