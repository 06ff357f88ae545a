"""extract_features.py on a Ray cluster: every node's CPUs decode, its GPUs run the vision tower.

    pip install "ray[data]"                                       # on all nodes
    python -m scripts.extract_with_ray --towers 8 --data_path …   # and extract_features.py's flags

For clusters whose machines with GPUs have too few cores to keep them busy. All nodes see code,
videos and store under the same paths. Each tower appends to files of its own in the store, which
extract_features.py and training read like any other. The same command again resumes.
"""

import json
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from cli import flag, launch, parse_flags
from dataset.transforms import FrameTransform
from device import choose_device, choose_dtype
from extract_features import (
    ExtractFlags,
    TowerBatches,
    begin,
    decode_visual,
    find_outdated,
    finish,
    list_visuals,
    write_features,
)

CLIPS_A_TASK = 32  # are decoded again when their node dies


@dataclass
class RayFlags(ExtractFlags):
    """Ray"""

    towers: int = flag(1, "processes with a vision tower, each on a GPU if there are", at_least=1)


def main(argv: list[str] | None = None) -> None:
    arguments = list(map(str, sys.argv[1:] if argv is None else argv))
    flags = parse_flags(RayFlags, __doc__, arguments)
    try:
        import ray
    except ImportError as error:
        raise ValueError(f'{error}: pip install "ray[data]", on all nodes') from None
    # Joins the cluster of RAY_ADDRESS or of this machine, or starts one here.
    ray.init(ignore_reinit_error=True)
    resources = ray.cluster_resources()
    gpus = int(resources.get("GPU", 0))
    room = gpus or int(resources["CPU"]) - 1  # one is left to decode
    if flags.towers > room:
        raise ValueError(f"--towers {flags.towers}: this cluster has room for {room}")
    # Not again by itself: the other towers' share of the stream would wait for it for ever.
    on_tower = ray.remote(max_retries=0, **{"num_gpus" if gpus else "num_cpus": 1})

    for name in ("images_path", "vision_path", "features_path"):  # nodes run in other folders
        setattr(flags, name, str(Path(getattr(flags, name)).resolve()))
    flags.dtype = ray.get(on_tower(choose_arithmetic).remote(flags))
    rel_paths = list_visuals(flags.data_path, flags.videos, Path(flags.images_path))
    command = shlex.join(["python", "-m", "scripts.extract_with_ray", *arguments])
    header = {"visuals": len(rel_paths), "command": command}
    shard, num_shards = map(int, flags.shard.split("/"))
    numbers = [(shard * flags.towers + i, num_shards * flags.towers) for i in range(flags.towers)]
    store, _, transform = begin(flags, numbers[0], header)
    todo = find_outdated(store, Path(flags.images_path), rel_paths[shard::num_shards])
    store.close()  # the towers write
    print(f"{len(rel_paths)} visuals, {len(todo)} to do; {flags.towers} towers in {flags.dtype}")
    if todo:
        rows = [{"path": rel, "known": json.dumps(record)} for rel, record in todo.items()]
        decoded = ray.data.from_items(rows, override_num_blocks=-(-len(rows) // CLIPS_A_TASK)).map(
            partial(decode_row, flags=flags, transform=transform),
            concurrency=flags.num_workers or None,
        )
        parts = zip(decoded.streaming_split(flags.towers), numbers, strict=True)
        run = on_tower(run_tower).remote
        try:
            ray.get([run(part.iter_rows, number, flags, header) for part, number in parts])
        except ray.exceptions.RayError as error:
            raise ValueError(f"{error}\nA tower ended. The same command resumes") from error
    finish(store, rel_paths, num_shards)


def choose_arithmetic(flags: ExtractFlags) -> str:
    """--dtype where a tower runs, which isn't where the command was given."""
    return choose_dtype(flags.dtype, choose_device(flags.device))


def decode_row(row: dict, flags: ExtractFlags, transform: FrameTransform) -> dict:
    """A path and what the store knows of it → its new record, and its frames as bytes."""
    known = {row["path"]: json.loads(row["known"])}
    record, frames = decode_visual(row["path"], flags, transform, known)
    frames = None if frames is None else frames.tobytes()
    return {"path": row["path"], "record": json.dumps(record), "frames": frames}


def run_tower(
    rows: Callable[[], Iterable[dict]], shard: tuple[int, int], flags: ExtractFlags, header: dict
) -> None:
    """Features of `decode_row`'s rows into that shard of the store."""
    store, tower, transform = begin(flags, shard, header)
    shape = -1, transform.image_size, transform.image_size, 3

    def decoded() -> Iterator[tuple]:
        for row in rows():
            frames = row["frames"]
            if frames is not None:
                frames = np.frombuffer(frames, np.uint8).reshape(shape)
            yield row["path"], (json.loads(row["record"]), frames)

    device = choose_device(flags.device)
    batches = TowerBatches(tower, transform, flags.dtype, device, flags.batch_size)
    with closing(store), batches:
        write_features(store, batches.run(decoded()), desc=f"tower {shard[0]}", disable=True)


if __name__ == "__main__":
    launch(main)
