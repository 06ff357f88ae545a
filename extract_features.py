"""Run the frozen vision tower over videos and images once, and keep its features on disk.

    python extract_features.py --data_path data/train.jsonl data/val.jsonl --images_path data \\
        --vision_path model/vision_model/clip-vit-base-patch32 --features_path out/features

    python extract_features.py --videos clips/ --images_path . …        # files or folders, no jsonl
    torchrun --nproc_per_node 8 extract_features.py …                   # a process for each GPU
    python extract_features.py --shard 3/8 …                            # one job of an array of 8

Processes of their own decode files while the tower runs; frames of many clips fill each of its
batches. The same command again goes on where an earlier one was killed, or takes up what is new.
Several extractions share nothing but the store's folder, and the last one to finish writes its
manifest. The bytes of a clip's features don't depend on which clips came with it: see
docs/features.md.
"""

import argparse
import hashlib
import os
import shlex
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from cli import launch
from dataset.feature_store import FLOAT16, INT8, FeatureStore, relative_error
from dataset.parallel import in_any_order
from dataset.samples import read_samples, resolve_under
from dataset.video import MEDIA_SUFFIXES, FrameTransform, VideoError, ending_workers, read_frames
from device import choose_device, choose_dtype
from model.vision_tower import VisionTower
from trainer.logger import cpu_seconds

LISTED_FAILURES = 20  # on the terminal; the manifest names all


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data_path", nargs="+", default=[], help="jsonl files: all visuals that they name")
    add("--videos", nargs="+", default=[], help="files, or folders that are searched")
    add("--images_path", default=".", help="root that the paths of visuals are relative to")
    add("--vision_path", default="model/vision_model/clip-vit-base-patch32")
    add("--features_path", required=True, help="folder of the feature store")
    add("--features_dtype", choices=[FLOAT16, INT8], default=FLOAT16, help="int8: half the bytes")
    add("--num_frames", type=int, default=8, help="at most so many frames a clip")
    add("--sampling", choices=["uniform", "fps"], default="uniform")
    add("--fps", type=float, help="frames a second with --sampling fps")
    add(
        "--resize",
        choices=["tower", "crop", "squash", "pad"],
        default="tower",
        help="how a frame becomes square; tower: as its preprocessor_config.json says",
    )
    add("--video_backend", choices=["pyav", "decord"], default="pyav")
    add("--batch_size", type=int, help="frames in one call of the tower (GPU: 128, CPU: 16)")
    add(
        *("--num_workers", "--workers"),
        type=int,
        help="files decoded at a time, by as many processes (default: as many as cores); 0: one, "
        "while the tower waits",
    )
    add("--decode_seconds", type=float, default=120, help="longest time for one clip")
    add(
        "--dtype",
        choices=["auto", "float32", "bfloat16", "float16"],
        default="auto",
        help="of the tower; auto: what the device is fastest in",
    )
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, …")
    add("--shard", default="0/1", help="i/n: only each n-th visual from the i-th on")
    args = parser.parse_args(arguments)
    # Under torchrun each process takes a part of its job's share, and none has to speak to another.
    shard, num_shards = parse_shard(args.shard)
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    args.shard = shard * size + rank, num_shards * size
    if args.num_frames < 1 or (args.batch_size or 1) < 1 or (args.num_workers or 0) < 0:
        parser.error("--num_frames and --batch_size are 1 or more, --num_workers 0 or more")
    if args.device in ("auto", "cuda") and torch.cuda.is_available():
        args.device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    args.device = choose_device(args.device)
    args.dtype = choose_dtype(args.dtype, args.device)
    args.batch_size = args.batch_size or (128 if args.device.type == "cuda" else 16)
    if args.num_workers is None:
        args.num_workers = max(1, num_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    return args


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    shard, num_shards = args.shard
    root, store = Path(args.images_path), FeatureStore(args.features_path)
    rel_paths = list_visuals(args.data_path, args.videos, root)
    transform = FrameTransform.from_pretrained(args.vision_path, args.resize)
    tower = VisionTower.from_pretrained(args.vision_path)
    sources, failures = store.begin(
        {
            "tower": tower.fingerprint(),
            "tower_name": Path(args.vision_path).resolve().name,
            "tokens_per_frame": tower.tokens_per_frame,
            "hidden_size": tower.hidden_size,
            "dtype": args.features_dtype,
            "compute_dtype": args.dtype,
            "transform": transform.describe(),
            "num_frames": args.num_frames,
            "sampling": args.sampling,
            "fps": args.fps,
            "video_backend": args.video_backend,
        },
        visuals=len(rel_paths),
        command=command_without_shard(sys.argv[1:] if arguments is None else arguments),
    )
    todo = [
        rel for rel in rel_paths[shard::num_shards] if not is_current(store, sources, root, rel)
    ]
    print(
        f"{len(rel_paths)} visuals, {len(todo)} to do"
        + (f" in shard {shard}/{num_shards}" if num_shards > 1 else "")
        + f"; tower {args.vision_path}, {tower.tokens_per_frame} × {tower.hidden_size} a frame, "
        f"{args.dtype} on {args.device}",
        flush=True,
    )

    read = partial(
        read_frames,
        num_frames=args.num_frames,
        sampling=args.sampling,
        fps=args.fps,
        backend=args.video_backend,
        timeout=args.decode_seconds,
        transform=transform,
    )
    made = {rel: sources[rel] for rel in todo if is_made(store, sources, rel)}
    decode = Decoder(root, made, read)
    decoded = in_any_order(decode, todo, min(args.num_workers, len(todo)))
    started, cpu_before = time.perf_counter(), cpu_seconds()
    num_frames, failed, squares = 0, {}, [0.0, 0.0]
    bar = tqdm(
        total=len(todo),
        unit=" clips",
        smoothing=0.1,
        disable=not todo,
        desc=f"shard {shard}/{num_shards}" if num_shards > 1 else None,
        position=int(os.environ.get("LOCAL_RANK", 0)),
        mininterval=0.2 if sys.stderr.isatty() else 20,  # a job's log keeps every line
    )
    batches = TowerBatches(tower, transform, args.dtype, args.device, args.batch_size)
    with bar, batches, ending_workers(), closing(decoded):
        for rel, record, features in batches.run(decoded):
            if features is not None and not features.isfinite().all():
                record = {"reason": "not_finite", "detail": "the tower gave NaN or infinity"}
            if "reason" in record:
                failed[rel] = record
                if rel in sources:  # of what the file was before
                    store.path(rel).unlink(missing_ok=True)
            elif features is not None:  # None where the file is the same with another date
                store.write(rel, features)
                num_frames += len(features)
                if args.features_dtype == INT8:
                    error = relative_error(features, store.read(rel))
                    squares = [a + b for a, b in zip(squares, error, strict=True)]
            if failures.get(rel) != record:
                store.record(rel, record)
            bar.update()
            bar.set_postfix_str(
                f"{num_frames / (time.perf_counter() - started):.1f} frames/s, "
                f"{len(failed)} failed",
                refresh=False,
            )

    seconds, num_clips = time.perf_counter() - started, len(todo) - len(failed)
    if todo:
        print(
            f"{num_clips} visuals, {num_frames} frames in {seconds:.1f} s "
            f"({num_clips / seconds:.2f} clips/s, {num_frames / seconds:.1f} frames/s; "
            f"{cpu_seconds() - cpu_before:.1f} CPU-seconds), {len(failed)} failed"
        )
    if squares[1]:
        print(
            f"int8: relative error {100 * (squares[0] / squares[1]) ** 0.5:.2f} % of the features"
        )
    list_failures(failed)
    finish(store, rel_paths, num_shards)


def finish(store: FeatureStore, rel_paths: list[str], num_shards: int) -> None:
    """Write the manifest if all visuals are done, by this process or others; else say what isn't.

    Two that finish together both see all of it and write the same; none has to wait for another.
    """
    if store.is_complete:  # nothing was new
        return
    sources, failures = store.recorded()
    lacking = [i for i, rel in enumerate(rel_paths) if rel not in sources and rel not in failures]
    if lacking:
        shards = sorted({i % num_shards for i in lacking})
        print(
            f"{store.directory} is incomplete: {len(lacking)} visuals aren't done, of shards "
            + ", ".join(f"{i}/{num_shards}" for i in shards)
            + ". The last shard to finish writes the manifest; without --shard, the same command "
            "does all that is missing"
        )
        return
    if not sources:
        raise ValueError(f"none of {len(rel_paths)} visuals could be read; mend them and run again")
    store.finish(sources, failures)


def list_failures(failed: dict[str, dict]) -> None:
    reasons = Counter(record["reason"] for record in failed.values())
    if reasons:
        print("failed: " + ", ".join(f"{number} {reason}" for reason, number in reasons.items()))
    for rel, record in sorted(failed.items())[:LISTED_FAILURES]:
        print(f"  {rel}: {record['reason']}: {record['detail']}")
    if len(failed) > LISTED_FAILURES:
        print(f"  … and {len(failed) - LISTED_FAILURES} more: 'failures' in the manifest")


def parse_shard(text: str) -> tuple[int, int]:
    try:
        shard, num_shards = map(int, text.split("/"))
    except ValueError:
        shard, num_shards = -1, 0
    if not 0 <= shard < num_shards:
        raise ValueError(f"--shard {text}: it is i/n with 0 <= i < n, such as 0/4")
    return shard, num_shards


def command_without_shard(arguments: list[str]) -> str:
    """How to make all that is missing, for the store to tell whoever finds it unfinished."""
    kept, skipped = [], False
    for argument in map(str, arguments):
        if not skipped and argument != "--shard" and not argument.startswith("--shard="):
            kept.append(argument)
        skipped = argument == "--shard"
    return shlex.join(["python", "extract_features.py", *kept])


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def list_visuals(data_paths: list[str], videos: list[str], root: Path) -> list[str]:
    """Paths relative to `root` of all visuals, each once, in the order in which they appear."""
    rel_paths = {}
    for data_path in data_paths:
        for sample in read_samples(data_path):
            rel_paths |= dict.fromkeys(sample.visuals)
    for name in map(Path, videos):
        if not name.exists():
            raise ValueError(f"--videos {name}: there is no such file or folder")
        files = sorted(name.rglob("*")) if name.is_dir() else [name]
        for file in files:
            if name.is_dir() and not (file.suffix.lower() in MEDIA_SUFFIXES and file.is_file()):
                continue
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


def is_current(store: FeatureStore, sources: dict, root: Path, rel: str) -> bool:
    """Whether features are there and recorded, and the source is the file they were made from."""
    if not is_made(store, sources, rel):
        return False
    try:
        stat = (root / rel).stat()
    except OSError:
        return True  # the clip is gone, its features are still good
    return (sources[rel]["size"], sources[rel]["mtime_ns"]) == (stat.st_size, stat.st_mtime_ns)


def is_made(store: FeatureStore, sources: dict, rel: str) -> bool:
    return rel in sources and store.has(rel, sources[rel].get("frames", 0))


# ----------------------------------------------------------------------- decoding, in threads


@dataclass
class Decoder:
    """A visual's relative path → (record for the manifest, frames (F, S, S, 3) uint8 or None)."""

    root: Path
    made: dict[str, dict]  # visuals with features, and the record of the file they were made from
    read: Callable

    def __call__(self, rel: str):
        try:
            path = resolve_under(self.root, rel)
            record = self.describe(path)
            made = self.made.get(rel)
            if made and made["sha256"] == record["sha256"]:  # copied or touched, but not changed
                return {**made, **record}, None
            frames = self.read(path).frames
        except VideoError as error:
            return {"reason": error.reason, "detail": error.detail}, None
        except (ValueError, OSError) as error:
            return {"reason": "bad_path", "detail": str(error)}, None
        except Exception as error:  # not even one in a million files may stop the others
            return {"reason": "unexpected", "detail": f"{type(error).__name__}: {error}"}, None
        return {**record, "frames": len(frames)}, frames

    def describe(self, path: Path) -> dict:
        if not path.is_file():
            raise VideoError(path, "missing", "there is no such file")
        with path.open("rb") as file:
            stat, digest = path.stat(), hashlib.file_digest(file, "sha256")
        return {
            "size": stat.st_size,
            "mtime_ns": stat.st_mtime_ns,
            "sha256": digest.hexdigest(),
        }


# -------------------------------------------------------------------- the tower, in batches


def convert_matrices(tower: VisionTower, dtype: str) -> None:
    """Where autocast computes in half precision anyway; or it converts weights in every call."""
    for module in tower.model.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            module.to(getattr(torch, dtype))


@dataclass(eq=False)
class Clip:
    """A clip on its way through the batches, which may divide it."""

    rel: str
    record: dict
    missing: int  # frames without features so far
    features: list[Tensor] = field(default_factory=list)


class TowerBatches:
    """Frames of many clips → features, a batch of always the same shape at a time.

    On a CPU each core runs a batch of its own, on one thread: nothing waits for the slowest of a
    team, so decoding takes no more of the cores than its work. And what is computed for a frame
    doesn't depend on the number of cores, nor, since every batch has the same shape (the last one
    is filled up with black), on what else is extracted.
    """

    def __init__(self, tower, transform, dtype: str, device: torch.device, batch_size: int):
        self.tower, self.transform = tower.to(device), transform
        self.device, self.dtype, self.batch_size = device, dtype, batch_size
        convert_matrices(tower, dtype)

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
        shape = (self.batch_size, self.transform.image_size, self.transform.image_size, 3)
        batch, layout, filled = np.zeros(shape, np.uint8), [], 0
        running = deque()  # (future of a batch, [(clip, its number of frames in the batch)])

        def collect() -> Iterator:
            future, layout = running.popleft()
            features, start = future.result(), 0
            for clip, number in layout:
                clip.features.append(features[start : start + number])
                clip.missing -= number
                start += number
                if not clip.missing:
                    yield clip.rel, clip.record, torch.cat(clip.features)

        for rel, (record, frames) in decoded:
            if frames is None:
                yield rel, record, None
                continue
            clip = Clip(rel, record, len(frames))
            while len(frames):
                part = frames[: self.batch_size - filled]
                batch[filled : filled + len(part)] = part
                layout.append((clip, len(part)))
                filled, frames = filled + len(part), frames[len(part) :]
                if filled == self.batch_size:
                    running.append((self.pool.submit(self._features, batch), layout))
                    batch, layout, filled = np.zeros(shape, np.uint8), [], 0
            while running and (running[0][0].done() or len(running) > 2 * self.num_threads):
                yield from collect()
        if layout:
            running.append((self.pool.submit(self._features, batch), layout))
        while running:
            yield from collect()

    @torch.inference_mode()
    def _features(self, frames: np.ndarray) -> Tensor:
        """(N, S, S, 3) uint8 → (N, P, D) float16 on the CPU"""
        pixel_values = self.transform.normalize(torch.from_numpy(frames).to(self.device))
        dtype = getattr(torch, self.dtype)
        with torch.autocast(self.device.type, dtype, enabled=self.dtype != "float32"):
            return self.tower(pixel_values).half().cpu()


if __name__ == "__main__":
    launch(main)
