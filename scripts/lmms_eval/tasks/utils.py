"""What cinego_questions.yaml calls: the first turn of each line, scored as eval.py scores it."""

from collections.abc import Callable

from dataset.conversation import VISUAL_TAG
from inference.scoring import fact_vocabulary, score_turn, summarise


def visuals(doc: dict, lmms_eval_specific_kwargs: dict) -> list[str]:
    return [f"{lmms_eval_specific_kwargs['images_path']}/{doc['video']}"]


def text(doc: dict, lmms_eval_specific_kwargs: dict | None = None) -> str:
    return VISUAL_TAG.sub("", doc["conversations"][0]["value"]).strip()


def messages(doc: dict, lmms_eval_specific_kwargs: dict) -> list[dict]:
    content = [{"type": "video", "url": url} for url in visuals(doc, lmms_eval_specific_kwargs)]
    return [{"role": "user", "content": [*content, {"type": "text", "text": text(doc)}]}]


def target(doc: dict) -> str:
    return doc["conversations"][1]["value"]


def score(doc: dict, results: list[str]) -> dict:
    """All that a figure of the whole set needs, under the name of each metric."""
    answered = (doc["scoring"][0], doc["language"], results[0], target(doc))
    return dict.fromkeys(("all", "reversed", "captions"), answered)


def _figure(name: str) -> Callable[[list[tuple]], float | None]:
    def figure(answered: list[tuple]) -> float | None:
        vocabulary = fact_vocabulary((language, entry) for entry, language, _, _ in answered)
        return summarise([score_turn(*each, vocabulary) for each in answered])[name]

    return figure


mean_all, mean_reversed, mean_captions = map(_figure, ("all", "reversed", "captions"))
