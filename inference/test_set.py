"""Asks a model a test set, under each control, and keeps the answers as they come.

    settings = TestSetFlags(data_path=["test.jsonl"], images_path="videos", controls=True)
    ask_test_set(chat_model, read_samples("test.jsonl"), settings, Path("out/eval.answers.jsonl"))

The first line of the answers' file says what was asked of what; then comes a line for each sample,
in the order of their videos. A run that was killed resumes after the last whole line. Memory holds
the videos of BATCHES batches at a time, whatever the size of the test set.
"""

import json
import os
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from cli import Flags, flag
from dataset.conversation import VISUAL_TAG, ConversationError
from dataset.samples import Sample, Samples
from inference.chat_model import ChatModel
from inference.likelihood import answer_ids, log_likelihoods
from inference.metrics import LETTERS
from inference.request import Request, Visual
from inference.scoring import prompt_messages, true_answers
from model.generate import Sampling

BATCHES = 4  # of questions, whose videos are in memory together
REMEMBERED = 1 << 14  # answers without a video, which many questions share
LETTER_TOKENS = 8
ONLY_LETTER = {
    "en": "Answer with the letter of the right option.",
    "zh": "请回答正确选项的字母。",
}


@dataclass
class TestSetFlags(Flags):
    """Test set"""

    data_path: list[str] | None = flag(None, "jsonl files of questions with true answers")
    images_path: str = flag("dataset/videos", "folder that the paths of --data_path start from")
    controls: bool = flag(False, "ask again with the frames changed, or grey")
    generate: Literal["letter", "text", "none"] = flag(
        "letter", "what is generated beside the options' likelihoods: their letter, or their text"
    )
    batch_size: int = flag(64, "questions answered at a time", at_least=1)
    limit: int = flag(0, "ask only so many samples; 0: all", at_least=0)
    output: Path | None = flag(None, "JSON file for all figures; the answers are kept beside it")
    against: Path | None = flag(None, "another run's eval.json: the paired difference to it")
    max_new_tokens: int = flag(64, "longest answer", at_least=1)
    seed: int = flag(0, "of the shuffled control")


def ask_test_set(
    chat_model: ChatModel, samples: Samples, settings: TestSetFlags, path: Path
) -> None:
    """Writes the answers to all samples into `path`, or those that it doesn't hold yet.

    Raises ValueError that names the line of a conversation that can't be asked.
    """
    # Questions about one clip together, whatever their places in the file.
    groups_N = samples.column("group")[: settings.limit or None]
    order = np.argsort(groups_N, kind="stable")
    header = _header(chat_model, samples, settings)
    done = _resume(path, header)
    asker = _Asker(chat_model, settings)
    with path.open("ab") as file, tqdm(total=len(order), initial=done, unit="sample") as bar:
        if not file.tell():
            file.write(json.dumps(header).encode() + b"\n")
        at_once = BATCHES * settings.batch_size
        for start in range(done, len(order), at_once):
            chunk = [samples[int(place)] for place in order[start : start + at_once]]
            lines = asker.answer(chunk)
            file.write(b"".join(json.dumps(x, ensure_ascii=False).encode() + b"\n" for x in lines))
            file.flush()
            os.fsync(file.fileno())
            bar.update(len(chunk))


def answers_path(output: str | Path) -> Path:
    """The answers' file that belongs to an eval.json, or is named itself."""
    output = Path(output)
    return output if output.suffix == ".jsonl" else output.with_suffix(".answers.jsonl")


def read_answers(path: Path) -> Iterator[dict]:
    """The header, then one line a sample; a line that was cut by a kill isn't read. Raises
    ValueError where there is no such file."""
    if not path.is_file():
        raise ValueError(f"no answers in {path}: eval.py --output writes them")
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield json.loads(line)


def _header(chat_model: ChatModel, samples: Samples, settings: TestSetFlags) -> dict:
    """All that the answers depend on."""
    checkpoint = chat_model.checkpoint
    files = list(checkpoint.iterdir()) if checkpoint.is_dir() else [checkpoint]
    weights = max((file.stat() for file in files if file.is_file()), key=lambda stat: stat.st_size)
    names = ("data_path", "images_path", "controls", "generate", "max_new_tokens", "limit", "seed")
    return {
        "checkpoint": str(checkpoint),
        "weights": [weights.st_size, weights.st_mtime_ns],
        "data": samples.fingerprint,
        "num_frames": chat_model.num_frames,
        "fps": chat_model.fps,
        **{name: getattr(settings, name) for name in names},
    }


def _resume(path: Path, header: dict) -> int:
    """How many samples the file holds answers to. What a kill cut off is removed; the answers of
    another run are put aside."""
    path.parent.mkdir(parents=True, exist_ok=True)
    held, count, end = {}, 0, 0
    with path.open("ab+") as file:
        file.seek(0)
        for line in file:
            if not line.endswith(b"\n"):
                break
            held = held or json.loads(line)
            count, end = count + 1, end + len(line)
        file.truncate(end)
    if held in (header, {}):
        return max(count - 1, 0)
    differs = ", ".join(key for key in header if held.get(key) != header[key])
    aside = path.with_suffix(".old.jsonl")
    os.replace(path, aside)
    print(f"{path} held another run's answers ({differs}): now in {aside}", file=sys.stderr)
    return 0


# ---- controls

# What each does to a clip's features (F, P, D), given a grey frame's and a generator. The tower
# sees frames one by one, so this equals changing the frames, and no clip is decoded twice.
CONTROLS: dict[str, Callable[[Tensor, Tensor, torch.Generator], Tensor]] = {
    "normal": lambda frames, grey, generator: frames,
    "no video": lambda frames, grey, generator: grey.expand_as(frames),
    "first frame": lambda frames, grey, generator: frames[:1].expand_as(frames),
    "shuffled": lambda frames, grey, generator: frames[shuffled_order(len(frames), generator)],
    "reversed": lambda frames, grey, generator: frames.flip(0),
}


def shuffled_order(num_frames: int, generator: torch.Generator) -> list[int]:
    """A permutation that is neither the order nor its reverse; fewer than three frames have none
    and stay as they are. One for all clips would keep some order, the same for each of them."""
    order = shuffled = list(range(num_frames))
    while num_frames > 2 and shuffled in (order, order[::-1]):
        shuffled = torch.randperm(num_frames, generator=generator).tolist()
    return shuffled


# ---- asking


def with_letters(message: dict, entry: dict, language: str | None) -> dict:
    """The question with its options behind letters."""
    lines = [message["content"]]
    if "letters" in entry:  # what to ask where the likelihood is that of a description
        lines = [*VISUAL_TAG.findall(message["content"]), entry["letters"]]
    # Not strict: there are more letters than options.
    lines += [f"{letter}. {text}" for letter, text in zip(LETTERS, entry["options"], strict=False)]
    lines.append(ONLY_LETTER["zh" if language == "zh" else "en"])
    return {**message, "content": "\n".join(lines)}


class _Asker:
    def __init__(self, chat_model: ChatModel, settings: TestSetFlags):
        self.chat_model, self.settings = chat_model, settings
        size = chat_model.transform.image_size
        grey = chat_model.transform(np.full((1, size, size, 3), 127, np.uint8))
        self.grey = chat_model.encode_frames(grey).cpu()
        self.blank: dict[str, dict] = {}  # a question without its video in words → its turn

    def answer(self, samples: list[Sample]) -> list[dict]:
        """One line a sample, as it stands in the answers' file."""
        files = [
            [(path, sample.bounds) for path in sample.files(self.settings.images_path)]
            for sample in samples
        ]
        visuals, failures = self.chat_model.encode_videos(dict.fromkeys(chain(*files)))
        lines = [
            unanswered(sample, "; ".join(failures[file] for file in own if file in failures))
            for sample, own in zip(samples, files, strict=True)
        ]
        for control, change in CONTROLS.items():
            made: dict[tuple, Visual] = {}
            jobs = []
            for sample, line, own in zip(samples, lines, files, strict=True):
                if self._is_asked(line, control):
                    changed = [self._change(visuals[file], sample, change, made) for file in own]
                    jobs.append((sample, line, changed))
            for turn in range(max((len(line["turns"]) for _, line, _ in jobs), default=0)):
                left = [job for job in jobs if turn < len(job[1]["turns"])]
                # Questions about one clip stand together: what they share is read once.
                for start in range(0, len(left), self.settings.batch_size):
                    self._ask(control, turn, left[start : start + self.settings.batch_size])
        return lines

    def _is_asked(self, line: dict, control: str) -> bool:
        metrics = {turn["scoring"].get("metric") for turn in line["turns"]}
        if line["missing"] or "faulty" in metrics:
            return False
        # The difference to a blank video is a way of ranking options: no control of the score.
        is_rank = metrics == {"choice"} and control == "no video"
        is_wanted = metrics != {"judge"} and (self.settings.controls or is_rank)
        return control == "normal" or is_wanted

    def _change(self, visual: Visual, sample: Sample, change: Callable, made: dict) -> Visual:
        """The visual under a control, one object for all questions about it."""
        key = (visual, sample.reverse)
        if key not in made:
            features = visual.features.flip(0) if sample.reverse else visual.features
            # Seeded by the clip: a resumed run shuffles as one that wasn't killed.
            seed = zlib.crc32(f"{self.settings.seed} {Path(visual.name).name}".encode())
            generator = torch.Generator().manual_seed(seed)
            made[key] = replace(visual, features=change(features, self.grey, generator))
        return made[key]

    def _ask(self, control: str, turn: int, batch: list[tuple[Sample, dict, list[Visual]]]) -> None:
        """One turn of some samples. A later turn is asked with the model's own earlier answers
        before it, as in use; the true ones would help."""
        texts, ranked, same = [], [], []
        for sample, line, visuals in batch:
            given = [earlier["answers"][control] for earlier in line["turns"][:turn]]
            messages, now = prompt_messages(sample, given), line["turns"][turn]
            options = now["scoring"].get("options", ())
            if control == "no video":  # the same words get the same answer
                first = self.blank.setdefault(json.dumps([messages, options, len(visuals)]), now)
                if first is not now:
                    same.append((now, first))
                    continue
            tokenizer = self.chat_model.tokenizer
            longest = max((len(answer_ids(tokenizer, option)) for option in options), default=0)
            length = longest or self.settings.max_new_tokens
            request = self._request(sample, messages, visuals, length)
            (ranked if options else texts).append((sample, now, request))
        if texts:
            answers = self.chat_model.generate([request for *_, request in texts])
            for (_, now, _), answer in zip(texts, answers, strict=True):
                now["answers"][control] = answer
        if ranked:
            self._rank(control, ranked)
        for now, first in same:
            now["answers"][control] = first["answers"][control]
            if control in first["logprobs"]:
                now["logprobs"][control] = first["logprobs"][control]
        if len(self.blank) > REMEMBERED:
            self.blank.clear()
        choices = [job for job in ranked if job[1]["scoring"]["metric"] == "choice"]
        if control == "normal" and self.settings.generate != "none" and choices:
            self._generate_choice(choices)

    def _rank(self, control: str, jobs: list[tuple[Sample, dict, Request]]) -> None:
        options = [now["scoring"]["options"] for _, now, _ in jobs]
        scored = log_likelihoods(self.chat_model, [request for *_, request in jobs], options)
        for (_, now, _), values in zip(jobs, scored, strict=True):
            sums, now["tokens"] = map(list, zip(*values, strict=True))
            now["logprobs"][control] = [round(value, 4) for value in sums]
            now["answers"][control] = now["scoring"]["options"][int(np.argmax(sums))]

    def _generate_choice(self, jobs: list[tuple[Sample, dict, Request]]) -> None:
        requests = []
        for sample, now, request in jobs:
            messages, length = request.messages, self.settings.max_new_tokens
            if self.settings.generate == "letter":
                last = with_letters(messages[-1], now["scoring"], sample.language)
                messages, length = [*messages[:-1], last], LETTER_TOKENS
            requests.append(self._request(sample, messages, request.visuals, length))
        for (_, now, _), answer in zip(jobs, self.chat_model.generate(requests), strict=True):
            now[self.settings.generate] = answer

    def _request(
        self, sample: Sample, messages: list[dict], visuals: list[Visual], max_new_tokens: int
    ) -> Request:
        try:
            return self.chat_model.make_request(messages, visuals, Sampling(max_new_tokens))
        except ConversationError as error:
            raise ValueError(f"{sample.where}: {error}") from None


def unanswered(sample: Sample, missing: str = "") -> dict:
    """A sample's line of the answers' file, before anything is answered."""
    answers, turns = true_answers(sample), []
    scoring = sample.scoring or [{} for _ in answers]
    for turn, (answer, entry) in enumerate(zip(answers, scoring, strict=True)):
        question = prompt_messages(sample, [""] * turn)[-1]["content"]
        turns.append({"question": VISUAL_TAG.sub("", question).strip(), "answer": answer})
        turns[-1] |= {"scoring": entry, "answers": {}, "logprobs": {}}
    return {
        **{"id": sample.id, "where": sample.where, "visuals": sample.visuals},
        **{"language": sample.language or "-", "missing": missing, "turns": turns},
    }
