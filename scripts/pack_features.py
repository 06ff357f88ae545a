"""Join the features of a store in a few large files, for many machines or a slow file system.

    python -m scripts.pack_features --features_path out/features --packed_path out/features_packed
    python -m scripts.pack_features … --features_dtype int8     # half the bytes

A million small files take hours to copy and a look-up each to read. Here they become files of about
`--shard_gib`, mapped into memory, so that some frames of a clip cost no more than their own bytes.
Training takes `--features_path out/features_packed` like any other store. To add clips, extract
into the original store and pack again.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from tqdm import tqdm

from cli import Flags, flag, launch, parse_flags
from dataset.feature_store import FLOAT16, INT8, MANIFEST, FeatureStore, quantize, row_type
from files import whole_file


@dataclass
class PackFlags(Flags):
    """Packing"""

    features_path: str = flag("out/features", "folder of a complete feature store")
    packed_path: str = flag("out/features_packed", "folder of the packed one")
    features_dtype: Literal["float16", "int8"] | None = flag(None, "default: as it is")
    shard_gib: float = flag(1.0, "size of a file, about", at_least=0)


def main(argv: list[str] | None = None) -> None:
    flags = parse_flags(PackFlags, __doc__, argv)
    store, packed = FeatureStore(flags.features_path), FeatureStore(flags.packed_path)
    manifest = store.manifest
    stored_as = manifest.get("dtype", FLOAT16)
    dtype = flags.features_dtype or stored_as
    if (packed.directory / MANIFEST).exists():
        raise ValueError(f"{packed.directory} is a feature store already; choose another folder")
    if dtype == FLOAT16 and stored_as == INT8:
        raise ValueError("int8 features don't become float16 again; extract them again")

    row = row_type(dtype, manifest["tokens_per_frame"], manifest["hidden_size"])
    shards = list(in_shards(manifest["sources"], int(flags.shard_gib * 2**30) // row.itemsize))
    packed.directory.mkdir(parents=True, exist_ok=True)
    sources, size = {}, 0
    with tqdm(total=len(manifest["sources"]), unit=" clips", smoothing=0.1) as bar:
        for number, names in enumerate(shards):
            frames = [manifest["sources"][name]["frames"] for name in names]
            path, shape = packed.shard_path(number), (sum(frames), *row.shape)
            with whole_file(path) as file:
                rows = np.lib.format.open_memmap(file.name, "w+", row.base, shape)
                start = 0
                for name, count in zip(names, frames, strict=True):
                    own = store.rows(name)
                    if len(own) != count:
                        raise ValueError(f"{store.path(name)}: {len(own)} frames, not {count}")
                    rows[start : start + count] = own if dtype == stored_as else quantize(own)
                    sources[name] = {**manifest["sources"][name], "shard": number, "row": start}
                    start += count
                    bar.update()
                rows.flush()
            size += path.stat().st_size

    manifest = {**manifest, "dtype": dtype, "packed": len(shards), "sources": sources}
    with whole_file(packed.directory / MANIFEST) as file:
        file.write(json.dumps(manifest, indent=1, sort_keys=True).encode())
    print(f"{len(sources)} visuals in {len(shards)} files, {size / 2**20:.1f} MiB, {dtype}")


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
