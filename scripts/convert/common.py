"""What every converter does: read a record, turn it, check it as training will, write it, report.

A dataset's own file says what its records look like, in one function

    def convert(record: dict, media: Media) -> dict

which raises ValueError for a record that can't be used. Records stream: neither the input nor the
output is ever held whole. Part of an output never bears its name.
"""

import argparse
import hashlib
import json
import os
import sys
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from dataset import parquet
from dataset.conversation import name_and_text
from dataset.records import read_records
from dataset.samples import Sample, parse_sample
from scripts.convert.media import Media
from scripts.convert.report import Report

DATA_SUFFIXES = (".json", ".jsonl", ".parquet")
NAMES = {"user": "human", "assistant": "gpt"}

Convert = Callable[[dict, Media], dict]


def main(description: str, convert: Convert, argv: list[str] | None = None) -> None:
    """A converter's command line; what a user can mend ends it with the message alone."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data_path", nargs="+", required=True, help="annotation files, or folders of them")
    add("--images_path", help="folder of the videos or pictures; what isn't in it is dropped")
    add("--output", required=True, help="the jsonl to write; of a parquet, also a parquet")
    args = parser.parse_args(argv)
    try:
        print(run(convert, args.data_path, args.images_path, args.output))
    except (ValueError, OSError) as error:
        raise SystemExit(f"{Path(sys.argv[0]).stem}: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def run(convert: Convert, data_path: list[str], images_path: str | None, output: str) -> Report:
    """Convert all of `data_path` into `output`; what is dropped goes to `<output>.dropped.jsonl`.

    Raises ValueError where a file can't be read to its end, or where nothing is left to write.
    """
    paths, output = list_files(data_path), Path(output)
    if output.suffix not in (".jsonl", ".parquet"):
        raise ValueError(f"--output {output}: its name must end in .jsonl (or .parquet)")
    if output.resolve() in map(Path.resolve, paths):
        raise ValueError(f"--output {output} is an input too; give it another name")
    is_packed = output.suffix == ".parquet"
    hold_images = [parquet.has_images(path) for path in paths]
    if is_packed and not all(hold_images):
        raise ValueError("--output can be a parquet only where each --data_path holds pictures")
    if any(hold_images) and not is_packed:
        if images_path is None:
            raise ValueError("--images_path is missing: the folder to write the pictures into")
        Path(images_path).mkdir(parents=True, exist_ok=True)
    elif images_path is not None and not is_packed and not Path(images_path).is_dir():
        raise ValueError(f"--images_path {images_path}: no such folder")

    media = Media(images_path, keep_bytes=is_packed)
    report, seen = Report(output, media.root, media.notes), Seen()
    dropped_path = output.with_suffix(".dropped.jsonl")
    total = sum(path.stat().st_size for path in paths)
    output.parent.mkdir(parents=True, exist_ok=True)
    with (
        tqdm(total=total, unit="B", unit_scale=True, smoothing=0.1) as bar,
        whole_file(dropped_path) as dropped_file,
        whole_file(output) as file,
        parquet.Writer(file, paths[0]) if is_packed else JsonlWriter(file) as writer,
    ):
        for path in paths:
            for number, record in read_source(path, media, bar.update):
                report.read += 1
                if report.read % 1000 == 0:
                    rate = report.read / max(bar.format_dict["elapsed"], 1e-9)
                    bar.set_postfix_str(f"{report.read:,} records, {rate:,.0f}/s", refresh=False)
                where = f"{path}:{number}"
                try:
                    converted, sample = check(convert, record, number, path, media)
                    if not seen.is_new(sample):
                        raise ValueError("the same as an earlier record, word for word")
                except ValueError as error:
                    # Whatever the record held may be half of a surrogate pair: escaped.
                    held = record if isinstance(record, dict) else {}
                    name = held.get("id", held.get("video_id"))
                    line = {"file": str(path), "line": number, "id": name, "reason": str(error)}
                    dropped_file.write(json.dumps(line, default=str).encode() + b"\n")
                    report.dropped.add(str(error), where)
                    continue
                if (name := seen.unique_name(sample.id)) != sample.id:
                    report.notes.add("an id came again and was numbered", f"{where}: {name}")
                writer.write({**converted, "id": name}, media.save(sample.visuals))
                report.written += 1
        if not report.written:
            raise ValueError(f"none of {report.read} records can be used\n{report.dropped}")
    if not report.dropped.count:
        dropped_path.unlink()
    return report


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


def read_source(path: Path, media: Media, advance) -> Iterator[tuple[int, object]]:
    """(number, record); pictures that stand in the record are offered to `media` under a name."""
    if not parquet.has_images(path):
        yield from read_records(path, advance)
        return
    for number, record in parquet.read_rows(str(path), with_bytes=True, advance=advance):
        if isinstance(record, dict):
            images = record.pop(parquet.IMAGES)
            try:
                is_text = parquet.count_tags(record["conversations"]) == 0
                record["image"] = media.offer(path.stem, f"{path}:{number}", images, is_text)
            except ValueError as error:
                record = error
        yield number, record


def check(
    convert: Convert, record: object, number: int, path: Path, media: Media
) -> tuple[dict, Sample]:
    """The converted record, and the sample that training will make of it; ValueError if none."""
    if isinstance(record, ValueError):
        raise record
    if not isinstance(record, dict):
        raise ValueError(f"a record must be a JSON object, not {type(record).__name__}")
    converted = {name: value for name, value in convert(record, media).items() if value is not None}
    sample = parse_sample(converted, number, str(path))
    if sample.messages[-1]["role"] != "assistant":
        raise ValueError("the last turn must be an answer")
    return converted, sample


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
    """The path that a record names under `key`."""
    path = record.get(key)
    if not isinstance(path, str) or not path.strip():
        raise ValueError(f"no {key} is named")
    return path.strip()


def image_paths(record: dict) -> list[str]:
    """The paths under `image`: a list, or one string with commas between; none is text."""
    images = record.get("image") or []
    if isinstance(images, str):
        images = [part.strip() for part in images.split(",")]
    if not isinstance(images, list) or not all(isinstance(path, str) for path in images):
        raise ValueError("'image' must be a path or a list of paths")
    return images


def caption_prompt(name: str) -> str:
    """A request for a description: always the same for the same name."""
    prompts = (
        "Describe this video in detail.",
        "What happens in this video? Give a detailed account.",
        "Please write a detailed description of the video.",
        "Explain what can be seen in the video, from its beginning to its end.",
    )
    return prompts[hashlib.blake2b(name.encode(), digest_size=1).digest()[0] % len(prompts)]


# -------------------------------------------------------------------------------------- writing


@contextmanager
def whole_file(path: Path):
    """A binary file that bears its name only once it is complete and on the disk."""
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


class JsonlWriter:
    def __init__(self, file):
        self.file = file

    def __enter__(self) -> "JsonlWriter":
        return self

    def __exit__(self, *error) -> None:
        pass

    def write(self, sample: dict, images: list[bytes]) -> None:
        first = {name: sample[name] for name in ("id", "video", "image") if sample.get(name)}
        self.file.write(json.dumps(first | sample, ensure_ascii=False).encode() + b"\n")


class Seen:
    """Which samples and ids came already: 64-bit fingerprints, 12 to 24 bytes each where Python's
    set takes 60 to 100, so that millions of records leave the memory alone."""

    def __init__(self):
        self.table, self.count = array("Q", bytes(8 << 10)), 0
        self.repeated: dict[str, int] = {}

    def is_new(self, sample: Sample) -> bool:
        return self._add(f"{sample.visuals}{sample.messages}{sample.reverse}")

    def unique_name(self, name: str) -> str:
        """`name`, or `name#2`, `name#3` … where it came before."""
        unique = name
        while not self._add(f"id {unique}"):
            self.repeated[name] = self.repeated.get(name, 1) + 1
            unique = f"{name}#{self.repeated[name]}"
        return unique

    def _add(self, text: str) -> bool:
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        if 2 * self.count > len(self.table):
            smaller = self.table
            self.table, self.count = array("Q", bytes(16 * len(smaller))), 0
            for key in smaller:
                if key:
                    self._insert(key)
        return self._insert(int.from_bytes(digest, "little") or 1)

    def _insert(self, key: int) -> bool:
        """False if it is there."""
        mask = len(self.table) - 1
        place = key & mask
        while self.table[place]:
            if self.table[place] == key:
                return False
            place = (place + 1) & mask
        self.table[place] = key
        self.count += 1
        return True
