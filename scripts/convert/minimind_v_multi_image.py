"""MiniMind-V's conversations about several pictures (2024): edits, and birds to compare.

    python -m scripts.convert.minimind_v_multi_image --data_path output.json \\
        --images_path dataset/sft_multi_images --output dataset/multi_image.jsonl

A record is

    {"id": "000000000000", "image": "0.jpg, 1.jpg",
     "conversations": [{"from": "human", "value": "Source Image: <image> Target Image: <image> …"},
                       {"from": "gpt", "value": "…"}]}

The annotations lie inside of the archive of the pictures. A republished jsonl has records with a
tag too many: which one is stray can't be known, so those are dropped and listed. role/content and
a parquet with a list of pictures a row are read too.
"""

from scripts.convert.common import Media, image_paths, main, turns


def convert(record: dict, media: Media) -> dict:
    images = [media.find(path) for path in image_paths(record)]
    return {"id": record.get("id"), "image": images, "conversations": turns(record)}


if __name__ == "__main__":
    main(__doc__, convert)
