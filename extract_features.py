"""Run the frozen vision tower over videos and images once, and keep its features on disk.

    python extract_features.py --data_path data/train.jsonl data/val.jsonl --images_path data \\
        --vision_path model/vision_model/clip-vit-base-patch32 --features_path out/features

    python extract_features.py --videos clips/ --images_path . …        # files or folders, no jsonl
    torchrun --nproc_per_node 8 extract_features.py …                   # a process for each GPU
    python extract_features.py --shard 3/8 …                            # one job of an array of 8

Processes of their own decode files while the tower runs; frames of many clips fill each of its
batches. The same command again resumes where an earlier one was killed, or adds what is new.
Shards share nothing but the store's folder; the last one to finish writes index and manifest.
The bytes of a clip's features don't depend on which clips came with it: see docs/features.md.
"""

import hashlib
import os
import shlex
import sys
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from cli import VISION_PATH, Flags, FrameFlags, flag, launch, parse_flags
from dataset.feature_store import FeatureStore
from dataset.samples import read_samples, resolve_under
from dataset.transforms import FrameTransform
from dataset.video import MEDIA_SUFFIXES, VideoError, num_cores, read_frames, reading_in_threads
from device import choose_device, choose_dtype
from model.vision_tower import VisionTower
from trainer.logger import cpu_seconds

LISTED_FAILURES = 20  # on the terminal; the store's journals name all


@dataclass
class ShardFlags(Flags):
    """Division of the work"""

    shard: str = flag("0/1", "i/n: only each n-th visual from the i-th on")

    def problems(self) -> list[str]:
        i, _, n = self.shard.partition("/")
        is_shard = i.isdecimal() and n.isdecimal() and int(i) < int(n)
        wrong = f"--shard {self.shard}: write i/n with 0 <= i < n, as 0/4"
        return super().problems() + ([] if is_shard else [wrong])


@dataclass
class ExtractFlags(FrameFlags, ShardFlags):
    """Extraction"""

    data_path: list[str] = flag([], "jsonl files: all visuals that they name")
    videos: list[str] = flag([], "video and image files, or folders that are searched for them")
    images_path: str = flag("dataset/videos", "folder that the visuals' paths start from")
    vision_path: str = flag(VISION_PATH, "vision tower")
    features_path: str = flag("out/features", "folder of the feature store")
    features_dtype: Literal["float16", "int8"] = flag("float16", "int8: half the bytes")
    batch_size: int | None = flag(
        None, "frames in one call of the tower (default: GPU 128, CPU 16)", at_least=1
    )
    num_workers: int | None = flag(
        None,
        "files decoded at a time, by as many processes (default: as many as cores); 0: one, while "
        "the tower waits",
        "--workers",
        at_least=0,
    )
    decode_seconds: float = flag(120.0, "longest time for decoding one clip", at_least=1)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = flag(
        "auto", "of the tower's arithmetic; auto: what the device is fastest in"
    )
    device: str = flag("auto", "auto, cpu, cuda, cuda:1, mps")


def main(argv: list[str] | None = None) -> None:
    arguments = list(map(str, sys.argv[1:] if argv is None else argv))
    flags = parse_flags(ExtractFlags, __doc__, arguments)
    # Under torchrun each process takes a part of its job's share, and none has to speak to another.
    rank, local_rank = (int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK"))
    size, local_size = (int(os.environ.get(f"{of}WORLD_SIZE", 1)) for of in ("", "LOCAL_"))
    shard, num_shards = map(int, flags.shard.split("/"))
    shard, num_shards = shard * size + rank, num_shards * size
    uses_cuda = flags.device in ("auto", "cuda") and torch.cuda.is_available()
    device = choose_device(f"cuda:{local_rank}" if uses_cuda else flags.device)
    num_workers = max(1, num_cores() // local_size)
    if flags.num_workers is not None:
        num_workers = flags.num_workers

    flags.dtype = choose_dtype(flags.dtype, device)
    rel_paths = list_visuals(flags.data_path, flags.videos, Path(flags.images_path))
    # What makes all that is missing, for whoever finds the store unfinished.
    command = shlex.join(["python", "extract_features.py", *arguments, "--shard", "0/1"])
    header = {"visuals": len(rel_paths), "command": command}
    store, tower, transform = begin(flags, (shard, num_shards), header)
    todo = find_outdated(store, Path(flags.images_path), rel_paths[shard::num_shards])
    in_shard = f" in shard {shard}/{num_shards}" if num_shards > 1 else ""
    print(
        f"{len(rel_paths)} visuals, {len(todo)} to do{in_shard}; tower {flags.vision_path}, "
        f"{tower.tokens_per_frame} × {tower.hidden_size} a frame, {flags.dtype} on {device}",
        flush=True,
    )

    decode = partial(decode_visual, flags=flags, transform=transform, known=todo)
    decoding = reading_in_threads(decode, todo, min(num_workers, len(todo)))
    batches = TowerBatches(tower, transform, flags.dtype, device, flags.batch_size)
    with closing(store), batches, decoding as decoded:
        about = {"total": len(todo), "desc": in_shard, "position": local_rank, "disable": not todo}
        write_features(store, batches.run(decoded), **about)
        finish(store, rel_paths, num_shards)


def begin(
    flags: ExtractFlags, shard: tuple[int, int], header: dict
) -> tuple[FeatureStore, VisionTower, FrameTransform]:
    """The store, which takes this shard's features from now on, and what makes them.

    flags.dtype: not "auto". header: as of `FeatureStore.begin`. Raises ValueError as that does, and
    where there is no tower.
    """
    transform = FrameTransform.from_pretrained(flags.vision_path, flags.resize)
    tower = VisionTower.from_pretrained(flags.vision_path)
    settings = {
        "tower": tower.fingerprint(),
        "tower_name": Path(flags.vision_path).resolve().name,
        "tokens_per_frame": tower.tokens_per_frame,
        "hidden_size": tower.hidden_size,
        "dtype": flags.features_dtype,
        "compute_dtype": flags.dtype,
        "transform": transform.describe(),
        "num_frames": flags.num_frames,
        "sampling": flags.sampling,
        "fps": flags.fps,
        "video_backend": flags.video_backend,
    }
    store = FeatureStore(flags.features_path)
    store.begin(settings, shard, **header)
    return store, tower, transform


def find_outdated(store: FeatureStore, root: Path, rel_paths: list[str]) -> dict[str, dict]:
    """The visuals that lack features of the file as it is now, with their records so far."""
    records = ((rel, store.find(rel) or {}) for rel in rel_paths)
    return {rel: record for rel, record in records if not is_current(root / rel, record)}


def write_features(store: FeatureStore, results: Iterable[tuple], **bar) -> None:
    """`results` of TowerBatches.run into the store; prints what became of them. bar: for tqdm."""
    started, cpu_before = time.perf_counter(), cpu_seconds()
    num_clips, num_frames, failed = 0, 0, {}
    interval = 0.2 if sys.stderr.isatty() else 20  # a job's log keeps every line
    with tqdm(unit=" clips", smoothing=0.1, mininterval=interval, **bar) as bar:
        for rel, record, features in results:
            if features is not None and not features.isfinite().all():
                record = {"reason": "not_finite", "detail": "the tower gave NaN or infinity"}
            if "reason" in record:
                failed[rel] = record
            if features is not None and "reason" not in record:
                store.write(rel, features, **record)
                num_frames += len(features)
            elif not record.items() <= (store.find(rel) or {}).items():
                store.record(rel, record)
            num_clips += 1
            bar.update()
            rate = num_frames / (time.perf_counter() - started)
            bar.set_postfix_str(f"{rate:.1f} frames/s, {len(failed)} failed", refresh=False)

    if num_clips:
        seconds, num_good = time.perf_counter() - started, num_clips - len(failed)
        print(
            f"{num_good} visuals, {num_frames} frames in {seconds:.1f} s "
            f"({num_good / seconds:.2f} clips/s, {num_frames / seconds:.1f} frames/s; "
            f"{cpu_seconds() - cpu_before:.1f} CPU-seconds), {len(failed)} failed"
        )
    if failed:
        reasons = Counter(record["reason"] for record in failed.values())
        print("failed: " + ", ".join(f"{number} {name}" for name, number in reasons.items()))
    for rel, record in sorted(failed.items())[:LISTED_FAILURES]:
        print(f"  {rel}: {record['reason']}: {record['detail']}")
    if len(failed) > LISTED_FAILURES:
        print(f"  all {len(failed)}: lines with a 'reason' in {store.directory}/*.jsonl")


def finish(store: FeatureStore, rel_paths: list[str], num_shards: int) -> None:
    """Complete the store if all of it is done, by this process or others; else say what isn't.
    ValueError if no source has features."""
    if store.is_complete:  # nothing was new
        return
    if lacking := set(store.finish(rel_paths)):
        shards = sorted({i % num_shards for i, rel in enumerate(rel_paths) if rel in lacking})
        print(
            f"{store.directory} is incomplete: {len(lacking)} visuals aren't done, of shards "
            + ", ".join(f"{i}/{num_shards}" for i in shards)
            + ". The same command without --shard does all that is missing"
        )


def list_visuals(data_paths: list[str], videos: list[str], root: Path) -> list[str]:
    """Paths relative to `root` of all visuals, each once, in the order in which they appear.

    ValueError names a file that is missing or lies outside of `root`, or a bad line of a jsonl.
    """
    rel_paths = {}
    for data_path in data_paths:
        for sample in read_samples(data_path):
            rel_paths |= dict.fromkeys(sample.visuals)
    for name in map(Path, videos):
        if not name.exists():
            raise ValueError(f"--videos {name}: there is no such file or folder")
        files = [name]
        if name.is_dir():
            found = sorted(name.rglob("*"))
            files = [f for f in found if f.suffix.lower() in MEDIA_SUFFIXES and f.is_file()]
        for file in files:
            try:
                rel = file.resolve().relative_to(root.resolve())
            except ValueError as error:
                raise ValueError(
                    f"--videos {file} isn't under --images_path {root}; name their common folder"
                ) from error
            rel_paths[rel.as_posix()] = None
    if not rel_paths:
        raise ValueError("no visual to extract: give --data_path or --videos with media in them")
    return list(rel_paths)


def is_current(path: Path, record: dict) -> bool:
    """Whether a source has features, made from a file of the size and date that it has now."""
    if "frames" not in record:
        return False
    try:
        stat = path.stat()
    except OSError:
        return True  # the clip is gone, its features are still good
    return (record["size"], record["mtime_ns"]) == (stat.st_size, stat.st_mtime_ns)


# ----------------------------------------------------------------------- decoding, in threads


def decode_visual(
    rel: str, flags: ExtractFlags, transform: FrameTransform, known: dict[str, dict]
) -> tuple[dict, np.ndarray | None]:
    """(record for the store, frames (F, S, S, 3) uint8 or None). Damage is an error: features are
    data. `known`: the records so far; a file with features isn't decoded again if its content is
    the same. Raises nothing: not even one in a million files may stop the others."""
    try:
        path = resolve_under(flags.images_path, rel)
        if not path.is_file():
            return {"reason": "missing", "detail": "there is no such file"}, None
        with path.open("rb") as file:
            stat, digest = path.stat(), hashlib.file_digest(file, "sha256").hexdigest()
        record = {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": digest}
        if "frames" in known[rel] and known[rel].get("sha256") == digest:  # copied, not changed
            return known[rel] | record, None
        how = flags.num_frames, flags.sampling, flags.fps, flags.video_backend, flags.decode_seconds
        return record, read_frames(path, *how, transform=transform).frames
    except VideoError as error:
        return {"reason": error.reason, "detail": error.detail}, None
    except (ValueError, OSError) as error:
        return {"reason": "bad_path", "detail": str(error)}, None
    except Exception as error:
        return {"reason": "unexpected", "detail": f"{type(error).__name__}: {error}"}, None


# -------------------------------------------------------------------- the tower, in batches


class TowerBatches:
    """Frames of many clips → features, a batch of always the same shape at a time.

    On a CPU each core runs a batch of its own, on one thread: nothing waits for the slowest of a
    team, so decoding takes no more of the cores than its work. And what is computed for a frame
    doesn't depend on the number of cores, nor, since every batch has the same shape (the last one
    is filled up with black), on what else is extracted.
    """

    def __init__(self, tower, transform, dtype: str, device: torch.device, batch_size: int | None):
        self.tower, self.transform = tower.to(device), transform
        self.batch_size = batch_size or (128 if device.type == "cuda" else 16)
        self.device, self.dtype = device, getattr(torch, dtype)
        tower.cast_matrices(self.dtype)

    def __enter__(self):
        # On a GPU, one thread fetches its results while the other's batch is computed.
        self.num_threads = torch.get_num_threads() if self.device.type == "cpu" else 2
        self.threads_before = torch.get_num_threads()
        torch.set_num_threads(1)
        self.pool = ThreadPoolExecutor(self.num_threads)
        return self

    def __exit__(self, *_):
        self.pool.shutdown(cancel_futures=True)
        torch.set_num_threads(self.threads_before)

    def run(self, decoded: Iterable) -> Iterator[tuple[str, dict, Tensor | None]]:
        """(path, (record, frames or None)) → (path, record, features (F, P, D) or None)"""
        running, clips = deque(), deque()  # batches' futures; (path, record, number of frames)
        rows = torch.empty(0, self.tower.tokens_per_frame, self.tower.hidden_size).half()  # of them

        def collect() -> Iterator:
            nonlocal rows
            rows = torch.cat([rows, running.popleft().result()])
            while clips and len(rows) >= clips[0][2]:
                path, record, number = clips.popleft()
                yield path, record, rows[:number]
                rows = rows[number:]

        size, filled = self.transform.image_size, 0
        batch = np.zeros((self.batch_size, size, size, 3), np.uint8)
        for path, (record, frames) in decoded:
            if frames is None:
                yield path, record, None
                continue
            clips.append((path, record, len(frames)))
            while len(frames):
                part, frames = np.split(frames, [self.batch_size - filled])
                batch[filled : filled + len(part)] = part
                filled += len(part)
                if filled == self.batch_size:
                    running.append(self.pool.submit(self._features, batch))
                    batch, filled = np.zeros_like(batch), 0
            while running and (running[0].done() or len(running) > 2 * self.num_threads):
                yield from collect()
        if filled:
            running.append(self.pool.submit(self._features, batch))
        while running:
            yield from collect()

    @torch.inference_mode()
    def _features(self, frames: np.ndarray) -> Tensor:
        """(N, S, S, 3) uint8 → (N, P, D) float16 on the CPU"""
        pixel_values = self.transform.normalize(torch.from_numpy(frames).to(self.device))
        is_mixed = self.dtype != torch.float32
        with torch.autocast(self.device.type, self.dtype, enabled=is_mixed):
            return self.tower(pixel_values).half().cpu()


if __name__ == "__main__":
    launch(main)
