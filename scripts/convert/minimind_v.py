"""MiniMind-V's data of every year: JSON (2024), jsonl (2025), parquet (2026); several pictures too.

    python -m scripts.convert.minimind_v --data_path llava_instruct_230k.json \\
        --images_path dataset/sft_images --output dataset/chinese_llava.jsonl
    python -m scripts.convert.minimind_v --data_path output.json \\
        --images_path dataset/sft_multi_images --output dataset/multi_image.jsonl
    python -m scripts.convert.minimind_v --data_path sft_i2t.parquet \\
        --images_path dataset/pictures --output dataset/sft.jsonl        # pictures become files

The forms, told apart by what is in the file:

    {"id": "000000334872", "image": "000000334872.jpg",
     "conversations": [{"from": "human", "value": "<image>\\n…"}, {"from": "gpt", "value": "…"}]}
    {"id": "000000000000", "image": "0.jpg, 1.jpg", "conversations": …}
    {"conversations": [{"role": "user", "content": "…<image>"}, {"role": "assistant", …}],
     "image": "train-00000-of-00001_image_0_0.jpg"}
    columns conversations (a JSON string of such turns) and image_bytes (bytes, or a list of them)

The loader of 2024 read COCO's pictures under `COCO_train2014_` and the first turns only: here both
names are tried, and all turns are kept. A row of a parquet without a tag is text, its picture the
8×8 black filler. Records with a tag too many are dropped: which one is stray can't be known.
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
