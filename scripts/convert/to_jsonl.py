"""A JSON array or a parquet of conversations into the jsonl that training reads.

    python -m scripts.convert.to_jsonl --data_path train.json --output train.jsonl
    python -m scripts.convert.to_jsonl --data_path train.parquet --images_path dataset/videos \\
        --output train.jsonl                    # pictures within the parquet become files there

The records are kept as they are where training can read them (docs/data.md), the others dropped
and listed: so a jsonl with bad lines can be cleaned by this as well. A turn without a name gets it
by its place. Pictures may stand in a column `image_bytes` (MiniMind-V), `image` or `images`
(as the library `datasets` writes them).
"""

from dataset.samples import split_paths
from scripts.convert.common import Media, main, turns


def convert(record: dict, media: Media) -> dict:
    found = {}
    for key in ("video", "image"):
        if record.get(key):
            found[key] = [media.find(path) for path in split_paths(record[key])]
    return record | found | {"conversations": turns(record)}


if __name__ == "__main__":
    main(__doc__, convert)
