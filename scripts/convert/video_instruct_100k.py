"""VideoInstruct-100K of Video-ChatGPT: 100 thousand questions about ActivityNet's videos.

    python -m scripts.convert.video_instruct_100k --data_path VideoInstruct100K.json \\
        --images_path ActivityNet --output dataset/video_instruct.jsonl

A record is {"video_id": "v_k_ZXmr8pmrs", "q": "…", "a": "…"}; the file's suffix is found under
`--images_path` (without it, .mp4 is assumed). What Video-ChatGPT's own converter makes of these,
{"id": …, "video": "v_k_ZXmr8pmrs.pkl", "conversations": …}, is taken too, its tags where they are;
here the tag comes first, so that all questions about a video share a row in training.
"""

from pathlib import PurePosixPath

from dataset.video import VIDEO_SUFFIXES
from scripts.convert.common import Media, main, one_path, one_turn, turns


def convert(record: dict, media: Media) -> dict:
    if "conversations" in record:
        name = str(PurePosixPath(one_path(record, "video")).with_suffix(""))
        conversations = turns(record)
    else:
        name, question = (one_path(record, key) for key in ("video_id", "q"))
        conversations = one_turn(question, record.get("a"))
    video = media.find(*(name + suffix for suffix in VIDEO_SUFFIXES))
    return {"id": record.get("id", name), "video": video, "conversations": conversations}


if __name__ == "__main__":
    main(__doc__, convert)
