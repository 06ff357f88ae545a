"""Copy a feature store: one of November 2026 or older becomes packed, or float16 becomes int8.

    python -m scripts.pack_features --features_path out/features --packed_path out/features_packed
    python -m scripts.pack_features … --features_dtype int8     # half the bytes
    python -m scripts.pack_features … --shard 3/8               # one job of an array of 8

What was superseded is left out. The same command again resumes.
"""

from dataclasses import dataclass
from typing import Literal

from tqdm import tqdm

from cli import flag, launch, parse_flags
from dataset.feature_store import FLOAT16, INT8, FeatureStore
from extract_features import ShardFlags, finish

OF_ONE_STORE = ("sources", "failures", "packed", "journals")  # what a copy doesn't take over


@dataclass
class PackFlags(ShardFlags):
    """Packing"""

    features_path: str = flag("out/features", "folder of a complete feature store")
    packed_path: str = flag("out/features_packed", "folder of the copy")
    features_dtype: Literal["float16", "int8"] | None = flag(None, "default: as it is")


def main(argv: list[str] | None = None) -> None:
    flags = parse_flags(PackFlags, __doc__, argv)
    store, packed = FeatureStore(flags.features_path), FeatureStore(flags.packed_path)
    settings, paths = dict(store.manifest), store.paths()
    dtype = flags.features_dtype or settings.get("dtype", FLOAT16)
    if dtype == FLOAT16 and settings.get("dtype") == INT8:
        raise ValueError("int8 features don't become float16 again; extract them again")
    shard, num_shards = map(int, flags.shard.split("/"))
    settings = {k: v for k, v in settings.items() if k not in OF_ONE_STORE}
    command = f"--features_path {store.directory} --packed_path {packed.directory}"
    packed.begin(
        {**settings, "dtype": dtype},
        (shard, num_shards),
        visuals=len(paths),
        command=f"python -m scripts.pack_features {command} --features_dtype {dtype}",
    )
    for path in tqdm(paths[shard::num_shards], unit=" visuals", smoothing=0.1):
        if packed.find(path) is None and "reason" in (record := store.find(path)):
            packed.record(path, record)
        elif packed.find(path) is None:
            packed.write(path, store.rows(path), **record)
    finish(packed, paths, num_shards)


if __name__ == "__main__":
    launch(main)
