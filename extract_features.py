"""Run the frozen vision tower over videos and images once, and keep its features on disk.

    python extract_features.py --data_path data/train.jsonl data/val.jsonl --images_path data \\
        --vision_path model/vision_model/clip-vit-base-patch32 --features_path out/features

    python extract_features.py --videos clips/ --images_path . …        # files or folders, no jsonl

Worker processes decode and resize while the tower runs; frames of many clips fill each of its
batches. Run it again after an interruption, or with more data: what is there is kept. On a job
array, run `--shard 0/8` … `--shard 7/8`, then once without --shard to write the manifest.
"""

import argparse
import hashlib
import sys
import time
from collections import deque
from functools import partial
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from dataset.feature_store import FeatureStore
from dataset.video import FrameTransform, VideoError, read_frames
from dataset.video_dataset import read_samples, resolve_under
from model.vision_tower import VisionTower
from trainer.device import choose_device, choose_dtype

VIDEO_SUFFIXES = ".mp4 .m4v .mov .mkv .webm .avi .ts .mpg .mpeg .flv .wmv .3gp .ogv .gif"
IMAGE_SUFFIXES = ".jpg .jpeg .png .webp .bmp .tif .tiff"
MEDIA = {*VIDEO_SUFFIXES.split(), *IMAGE_SUFFIXES.split()}
CLIPS_PER_MESSAGE = 16  # a worker hands over several small clips at once


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
    add("--num_frames", type=int, default=8, help="at most so many frames a clip")
    add("--sampling", choices=["uniform", "fps"], default="uniform")
    add("--fps", type=float, help="frames a second with --sampling fps")
    add("--video_backend", choices=["pyav", "decord"], default="pyav")
    add("--batch_size", type=int, default=128, help="frames in one call of the tower")
    add("--num_workers", type=int, default=2, help="decoding processes")
    add(
        "--dtype",
        choices=["auto", "float32", "bfloat16", "float16"],
        default="auto",
        help="autocast of the tower; auto: what the device is fastest in",
    )
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, …")
    add("--shard", default="0/1", help="i/n: only each n-th visual from the i-th on")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    shard, num_shards = parse_shard(args.shard)
    device = choose_device(args.device)
    dtype = choose_dtype(args.dtype, device)
    root, store = Path(args.images_path), FeatureStore(args.features_path)
    rel_paths = list_visuals(args.data_path, args.videos, root)
    transform = FrameTransform.from_pretrained(args.vision_path)
    tower = VisionTower.from_pretrained(args.vision_path).to(device)
    sources, failures = store.begin(
        {
            "tower": tower.fingerprint(),
            "tower_name": Path(args.vision_path).resolve().name,
            "tokens_per_frame": tower.tokens_per_frame,
            "hidden_size": tower.hidden_size,
            "dtype": "float16",
            "compute_dtype": dtype,
            "transform": transform.describe(),
            "num_frames": args.num_frames,
            "sampling": args.sampling,
            "fps": args.fps,
            "video_backend": args.video_backend,
        }
    )
    work = [
        rel for rel in rel_paths[shard::num_shards] if not is_current(store, sources, root, rel)
    ]
    print(
        f"{len(rel_paths)} visuals, {len(work)} to do"
        + (f" in shard {args.shard}" if num_shards > 1 else "")
        + f"; tower {args.vision_path}, {tower.tokens_per_frame} × {tower.hidden_size} a frame, "
        f"on {device} in {dtype}"
    )

    read = partial(
        read_frames,
        num_frames=args.num_frames,
        sampling=args.sampling,
        fps=args.fps,
        backend=args.video_backend,
    )
    loader = DataLoader(
        Decoder(work, root, store, set(sources), read, transform),
        batch_size=CLIPS_PER_MESSAGE,
        num_workers=min(args.num_workers, len(work)),  # each decodes in one thread
        prefetch_factor=4 if args.num_workers and work else None,
        collate_fn=join_frames,
    )

    def run_tower(frames):  # (N, S, S, 3) uint8 → (N, P, D)
        pixel_values = transform.normalize(frames.to(device))
        with torch.autocast(device.type, getattr(torch, dtype), enabled=dtype != "float32"):
            return tower(pixel_values)

    started, num_frames, failed = time.perf_counter(), 0, []
    with tqdm(total=len(work), unit=" clips", smoothing=0.1, disable=not work) as bar:
        for rel, record, features in extract(loader, run_tower, args.batch_size):
            bar.update()
            if features is not None and not features.isfinite().all():
                record = {"reason": "not_finite", "detail": "the tower gave NaN or infinity"}
            if "reason" in record:
                failed.append(rel)
                failures[rel] = record
                if sources.pop(rel, None):  # of what the file was before
                    store.path(rel).unlink(missing_ok=True)
                continue
            if features is not None:  # None where an interrupted run wrote them
                store.write(rel, features)
                num_frames += len(features)
            sources[rel] = record
            failures.pop(rel, None)

    seconds = time.perf_counter() - started
    print(
        f"{len(work) - len(failed)} visuals, {num_frames} frames in {seconds:.1f} s "
        f"({num_frames / seconds:.0f} frames/s), {len(failed)} failed"
    )
    for rel in failed:
        print(f"  {rel}: {failures[rel]['reason']}: {failures[rel]['detail']}")
    if num_shards == 1:
        store.finish(sources, failures)
    return 1 if failed and not sources else 0


def parse_shard(text: str) -> tuple[int, int]:
    try:
        shard, num_shards = map(int, text.split("/"))
    except ValueError:
        shard, num_shards = -1, 0
    if not 0 <= shard < num_shards:
        raise ValueError(f"--shard {text}: it is i/n with 0 <= i < n, such as 0/4")
    return shard, num_shards


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
            if name.is_dir() and not (file.suffix.lower() in MEDIA and file.is_file()):
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
    record = sources.get(rel)
    if record is None or not store.has(rel):
        return False
    try:
        stat = (root / rel).stat()
    except OSError:
        return True  # the clip is gone, its features are still good
    return (record["size"], record["mtime_ns"]) == (stat.st_size, stat.st_mtime_ns)


class Decoder(Dataset):
    """Decodes and resizes in worker processes; a visual that fails becomes a record of why."""

    def __init__(self, rel_paths, root, store, known, read, transform):
        self.rel_paths, self.root, self.store, self.known = rel_paths, root, store, known
        self.read, self.transform = read, transform

    def __len__(self) -> int:
        return len(self.rel_paths)

    def __getitem__(self, index: int):
        """(relative path, record for the manifest, frames (F, S, S, 3) uint8 or None)"""
        rel, frames = self.rel_paths[index], None
        try:
            path = resolve_under(self.root, rel)
            if not self.lacks_only_its_record(rel, path):
                frames = torch.from_numpy(self.transform.resize_frames(self.read(path).frames))
            stat = path.stat()
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except VideoError as error:
            return rel, {"reason": error.reason, "detail": error.detail}, None
        except (ValueError, OSError) as error:
            return rel, {"reason": "bad_path", "detail": str(error)}, None
        record = {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": digest}
        return rel, record, frames

    def lacks_only_its_record(self, rel: str, path: Path) -> bool:
        """A run that was killed wrote the features, but no manifest that tells of them."""
        if rel in self.known or not self.store.has(rel):
            return False
        return self.store.path(rel).stat().st_mtime_ns >= path.stat().st_mtime_ns


def join_frames(clips):
    """One tensor for many clips is one hand-over between processes, not many."""
    arrived = [(rel, record, 0 if frames is None else len(frames)) for rel, record, frames in clips]
    frames = [frames for *_, frames in clips if frames is not None]
    return arrived, torch.cat(frames) if frames else None


def extract(messages, run_tower, batch_size: int):
    """Yield (relative path, record, features (F, P, D) or None) in order.

    The tower sees `batch_size` frames at a time, wherever one clip ends and the next begins.
    """
    waiting, frames, features = deque(), [], []  # clips in order, their frames, their features

    def run(fewest: int) -> None:
        nonlocal frames, features
        joined = torch.cat(frames) if frames else []
        while len(joined) >= fewest:
            features = [torch.cat([*features, run_tower(joined[:batch_size]).half().cpu()])]
            joined = joined[batch_size:]
        frames = [joined] if len(joined) else []

    def completed():
        while waiting:
            rel, record, count = waiting[0]
            if count > sum(map(len, features)):
                return
            waiting.popleft()
            yield rel, record, features[0][:count] if count else None
            if count:
                features[0] = features[0][count:]

    for arrived, new_frames in messages:
        waiting.extend(arrived)
        if new_frames is not None:
            frames.append(new_frames)
            if sum(map(len, frames)) >= batch_size:
                run(batch_size)
        yield from completed()
    run(1)
    yield from completed()
    assert not waiting, f"{len(waiting)} clips got no features"


if __name__ == "__main__":
    sys.exit(main())
