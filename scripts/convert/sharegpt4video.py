"""ShareGPT4Video: 40 thousand videos with captions by GPT-4V.

    python -m scripts.convert.sharegpt4video --data_path sharegpt4video_40k.jsonl \\
        --images_path sharegpt4video --output dataset/sharegpt4video.jsonl

A line is {"video_id": "…", "video_path": "panda/….mp4", "zip_folder": "panda_videos_1.zip",
"captions": [{"idx": "1", "content": "…"}, …]}. The caption with idx -1 is of the whole video and
answers one of four requests, always the same for a video; those of key frames are left out. The
video is looked for under `video_path`, then in a folder called as its archive, then by its name.
"""

import zlib
from pathlib import PurePosixPath

from scripts.convert.common import Media, main, one_path, one_turn

PROMPTS = (
    "Describe this video in detail.",
    "What happens in this video? Give a detailed account.",
    "Please write a detailed description of the video.",
    "Explain what can be seen in the video, from its beginning to its end.",
)


def convert(record: dict, media: Media) -> dict:
    captions = record["captions"] if isinstance(record.get("captions"), list) else []
    captions = (c for c in captions if isinstance(c, dict))
    whole = [c.get("content") for c in captions if str(c.get("idx")) == "-1"]
    if not whole:
        raise ValueError("no caption of the whole video (idx -1)")
    path, archive = one_path(record, "video_path"), record.get("zip_folder")
    places = [path]
    if isinstance(archive, str):
        places.append(f"{PurePosixPath(archive).stem}/{PurePosixPath(path).name}")
    name = record.get("video_id") or PurePosixPath(path).stem
    prompt = PROMPTS[zlib.crc32(str(name).encode()) % len(PROMPTS)]
    return {
        "id": name,
        "video": media.find(*places),
        "conversations": one_turn(prompt, whole[0]),
    }


if __name__ == "__main__":
    main(__doc__, convert)
