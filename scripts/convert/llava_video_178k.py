"""LLaVA-Video-178K: captions, open-ended and multiple-choice questions about 178 thousand videos.

    python -m scripts.convert.llava_video_178k --data_path LLaVA-Video-178K \\
        --images_path LLaVA-Video-178K --output dataset/llava_video.jsonl

`--data_path` takes the folder, or single files of it. A record is {"id": "1006-8968804598",
"data_source": "0_30_s_nextqa", "video": "NextQA/NExTVideo/1006/8968804598.mp4", "conversations":
[{"from": "human", "value": "<image>\\nQ…"}, {"from": "gpt", "value": "E. …"}]}. The tag becomes
<video>. The path starts in the folder of the dataset or of its subset (`data_source`).
"""

from scripts.convert.common import Media, main, one_path, turns


def convert(record: dict, media: Media) -> dict:
    conversations = turns(record)
    for turn in conversations:
        if turn["from"] == "human" and isinstance(turn["value"], str):
            turn["value"] = turn["value"].replace("<image>", "<video>")
    video, subset = one_path(record, "video"), record.get("data_source")
    places = [video, f"{subset}/{video}"] if isinstance(subset, str) else [video]
    return {
        "id": record.get("id"),
        "video": media.find(*places),
        "conversations": conversations,
        "data_source": subset if isinstance(subset, str) else None,
    }


if __name__ == "__main__":
    main(__doc__, convert)
