"""Chinese-LLaVA as MiniMind-V has packed it: JSON in 2024, jsonl in 2025, parquet since.

    python -m scripts.convert.chinese_llava --data_path llava_instruct_230k.json \\
        --images_path dataset/sft_images --output dataset/chinese_llava.jsonl
    python -m scripts.convert.chinese_llava --data_path sft_i2t.parquet \\
        --images_path dataset/pictures --output dataset/sft.jsonl        # pictures become files
    python -m scripts.convert.chinese_llava --data_path sft_i2t.parquet \\
        --output dataset/sft_small.parquet                               # they stay where they are

The three forms, told apart by what is in the file:

    {"id": "000000334872", "image": "000000334872.jpg",
     "conversations": [{"from": "human", "value": "<image>\\n…"}, {"from": "gpt", "value": "…"}]}
    {"conversations": [{"role": "user", "content": "…<image>"}, {"role": "assistant", …}],
     "image": "train-00000-of-00001_image_0_0.jpg"}
    columns conversations (a JSON string of such turns) and image_bytes (bytes, or a list of them)

MiniMind-V of 2024 read COCO's pictures under `COCO_train2014_` and the first turns only: here both
names are tried, and all turns are kept. A row of a parquet without a tag is text, its picture the
8×8 black filler. Training reads a parquet directly as well; see docs/data.md for which to choose.
"""

from scripts.convert.common import Media, image_paths, main, turns


def convert(record: dict, media: Media) -> dict:
    images = [
        media.find(path, "/".join([*folders, f"COCO_train2014_{name}"]))
        for path in image_paths(record)
        for *folders, name in [path.split("/")]
    ]
    return {"id": record.get("id"), "image": images, "conversations": turns(record)}


if __name__ == "__main__":
    main(__doc__, convert)
