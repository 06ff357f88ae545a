"""Join the features of a store in a few large files, for many machines or a slow file system.

    python -m scripts.pack_features --features_path out/features --packed_path out/features_packed
    python -m scripts.pack_features … --features_dtype int8     # half the bytes; prints the loss

A million small files take hours to copy and a look-up each to read. Here they become files of about
`--shard_gib`, mapped into memory, so that some frames of a clip cost no more than their own bytes.
Training takes `--features_path out/features_packed` like any other store. To add clips, extract
into the original store and pack again.
"""

import argparse
import json
import os
from collections.abc import Iterator

import numpy as np
import torch
from tqdm import tqdm

from cli import launch
from dataset.feature_store import (
    FLOAT16,
    INT8,
    MANIFEST,
    FeatureStore,
    as_half,
    quantize,
    relative_error,
    row_type,
)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--features_path", required=True, help="a complete feature store")
    parser.add_argument("--packed_path", required=True, help="folder of the packed one")
    parser.add_argument("--features_dtype", choices=[FLOAT16, INT8], help="default: as it is")
    parser.add_argument("--shard_gib", type=float, default=1.0, help="size of a file, about")
    args = parser.parse_args(argv)
    store, packed = FeatureStore(args.features_path), FeatureStore(args.packed_path)
    made = store.manifest
    stored_as = made.get("dtype", FLOAT16)
    dtype = args.features_dtype or stored_as
    if (packed.directory / MANIFEST).exists():
        raise ValueError(f"{packed.directory} is a feature store already; choose another folder")
    if dtype == FLOAT16 and stored_as == INT8:
        raise ValueError("int8 features don't become float16 again; extract them anew")

    row = row_type(dtype, made["tokens_per_frame"], made["hidden_size"])
    shards = list(in_shards(made["sources"], int(args.shard_gib * 2**30) // row.itemsize))
    packed.directory.mkdir(parents=True, exist_ok=True)
    sources, squares = {}, [0.0, 0.0]
    with tqdm(total=len(made["sources"]), unit=" clips", smoothing=0.1) as bar:
        for number, names in enumerate(shards):
            frames = [made["sources"][name]["frames"] for name in names]
            path = packed.shard_path(number)
            unfinished = path.with_suffix(".tmp")
            shape = (sum(frames), *row.shape)
            rows = np.lib.format.open_memmap(unfinished, "w+", row.base, shape)
            start = 0
            for name, count in zip(names, frames, strict=True):
                own = store.rows(name)
                if len(own) != count:
                    raise ValueError(f"{store.path(name)}: {len(own)} frames, not {count}")
                if dtype != stored_as:
                    exact, own = own, quantize(own)
                    error = relative_error(*(torch.from_numpy(as_half(x)) for x in (exact, own)))
                    squares = [a + b for a, b in zip(squares, error, strict=True)]
                rows[start : start + count] = own
                sources[name] = {**made["sources"][name], "shard": number, "row": start}
                start += count
                bar.update()
            rows.flush()
            os.replace(unfinished, path)

    manifest = {**made, "dtype": dtype, "packed": len(shards), "sources": sources}
    unfinished = packed.directory / "manifest.tmp"
    unfinished.write_text(json.dumps(manifest, indent=1, sort_keys=True), encoding="utf-8")
    os.replace(unfinished, packed.directory / MANIFEST)
    size = sum(packed.shard_path(number).stat().st_size for number in range(len(shards)))
    print(f"{len(sources)} visuals in {len(shards)} files, {size / 2**20:.1f} MiB, {dtype}")
    if squares[1]:
        print(f"int8: relative error {100 * (squares[0] / squares[1]) ** 0.5:.2f} %")


def in_shards(sources: dict, rows_per_shard: int) -> Iterator[list[str]]:
    """Names in order, divided so that no part has more frames than asked, if a clip allows it."""
    names, rows = [], 0
    for name in sorted(sources):
        frames = sources[name]["frames"]
        if names and rows + frames > rows_per_shard:
            yield names
            names, rows = [], 0
        names.append(name)
        rows += frames
    if names:
        yield names


if __name__ == "__main__":
    launch(main)
