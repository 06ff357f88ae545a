"""MiniMind-V's data of every year: JSON (2024), jsonl (2025), parquet (2026); several pictures too.

    python -m scripts.convert.minimind_v --data_path llava_instruct_230k.json \\
        --images_path dataset/sft_images --output dataset/chinese_llava.jsonl

The forms, told apart by what is in the file:

    {"id": "0000", "image": "0.jpg, 1.jpg", "conversations": [{"from": "human", "value": "…"}, …]}
    {"image": "train_0_0.jpg", "conversations": [{"role": "user", "content": "…<image>"}, …]}
    columns conversations (a JSON string of such turns) and image_bytes (bytes, or a list of them)

The loader of 2024 read COCO's pictures under `COCO_train2014_`: both names are tried. A row of a
parquet without a tag is text. Where a tag is too many, which one is stray can't be known: dropped.
"""

from dataset.samples import split_paths
from scripts.convert.common import Media, main, turns


def convert(record: dict, media: Media) -> dict:
    images = [
        media.find(path, "/".join([*folders, f"COCO_train2014_{name}"]))
        for path in split_paths(record.get("image") or [])
        for *folders, name in [path.split("/")]
    ]
    return {"id": record.get("id"), "image": images, "conversations": turns(record)}


if __name__ == "__main__":
    main(__doc__, convert)
