"""Joins the rooms for whoever asks a trained model: terminal, page, server, scoring.

    answerer = Answerer.load("out/sft_videolm_512.pth", vision_path, tokenizer_path)

    chat = answerer.chat()                          # many turns; what was read stays read
    chat.show(answerer.read("a.mp4"))               # decoded, and seen by the tower, once
    for piece in chat.ask("What happens?", Sampling(temperature=0.7, seed=1), stop=("\n\n",)):
        print(piece, end="", flush=True)            # close the loop and the answer is cut there
    print(chat.last.finish_reason, chat.last.time_to_first_token, chat.last.tokens_per_second)

    batch = answerer.batch()                        # many askers at once: join, leave, any time
    answers = batch.add([Question(messages, visuals, Sampling(), stop=()), …])
    while batch:
        for answer in batch.step():                 # one token for each answer in the making
            send(answer.take())                     # its new text, always whole characters
    batch.cancel(answer)                            # its asker left

One `Answerer` may serve several threads: nothing in it changes. A `Chat` or a `Batch` is to be used
by one thread at a time. Training's counterpart of this file is `stage.py`.
"""

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers.decoders import DecodeStream
from torch import Tensor
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from dataset.conversation import VISUAL_TAG, ConversationError, Encoded, encode, left_pad
from dataset.video import Frames, FrameTransform, VideoError, read_frames
from model.checkpoint import load_video_language_model
from model.checkpoint_files import is_video_language_model, read_about
from model.cinego import Cinego
from model.generate import GREEDY, Generation, Row, Sampling
from model.inference import prepare
from model.minimind import KVCache
from model.vision_tower import VisionTower
from trainer.device import choose_device

# Clips in memory as pixels at a time; their features stay, a hundredth of the size.
CLIPS_AT_ONCE = 32
VISION_PATH = "model/vision_model/clip-vit-base-patch32"
TOKENIZER_PATH = "model/text_tokenizer"
# Of a chat's history: longer rows than training had are answered badly, and cost more each turn.
CONTEXT_TOKENS = 1024


@dataclass(eq=False)
class Visual:
    """A video or an image as the model sees it. Its identity is the object's, not the file's."""

    name: str
    features: Tensor  # (F, P, D) fp16, as the feature store keeps them for training
    timestamps: list[float]  # of the F frames, in seconds
    frames: list[Image.Image] = field(default_factory=list)  # small pictures of them, if asked for

    @property
    def tag(self) -> str:
        return "<video>" if len(self.features) > 1 else "<image>"


@dataclass
class Memory:
    """What a chat has read: the cache, and what stands in its columns: an id for a word, the visual
    and the place in it for a placeholder."""

    cache: KVCache = field(default_factory=KVCache)
    columns: list = field(default_factory=list)


@dataclass
class Question:
    """A conversation whose last turn waits for its answer."""

    messages: list[dict]  # role and content; one <video> or <image> for each visual, in order
    visuals: list[Visual] = field(default_factory=list)
    sampling: Sampling = GREEDY
    stop: tuple[str, ...] = ()  # the answer ends before the first of these texts
    memory: Memory | None = None  # where given: only what it doesn't hold is read, then it is added


class Answer:
    """One answer in the making, and afterwards; made by `Batch.add`."""

    def __init__(self, question: Question, prompt: Encoded, columns: list, started: float):
        self.question, self.prompt, self.columns = question, prompt, columns
        self.started = started
        self.cached_tokens = 0  # of the prompt: read in an earlier turn
        self.text = ""  # handed out so far
        self.finish_reason: str | None = None  # "stop", "length" or "cancelled"
        self.time_to_first_token = self.seconds = 0.0  # since it was asked
        words = [column for column in columns if isinstance(column, int)]
        self.row = Row(question.sampling, words, keep_cache=question.memory is not None)
        self._decoder, self._held, self._taken = DecodeStream(skip_special_tokens=True), "", 0

    @property
    def prompt_tokens(self) -> int:
        """Visual tokens count."""
        return len(self.columns)

    @property
    def completion_tokens(self) -> int:
        return len(self.row.ids)

    @property
    def tokens_per_second(self) -> float:
        """After the first token; 0 where there is no second one."""
        seconds = self.seconds - self.time_to_first_token
        return (self.completion_tokens - 1) / seconds if seconds > 0 else 0.0

    def take(self) -> str:
        """The text that came since the last call; "" while a character or a stop isn't whole."""
        new = self.text[self._taken :]
        self._taken = len(self.text)
        return new

    def _receive(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """After a step: the row's newest id, if any, becomes text; then its end is looked at."""
        self.seconds = time.perf_counter() - self.started
        if self.finish_reason is not None:
            return
        if self.row.finish_reason in (None, "length"):
            if len(self.row.ids) == 1:
                self.time_to_first_token = self.seconds
            self._held += self._decoder.step(tokenizer.backend_tokenizer, self.row.ids[-1]) or ""
            stops = [at for stop in self.question.stop if (at := self._held.find(stop)) >= 0]
            if stops:
                self._held = self._held[: min(stops)]
                self._finish("stop")
                return
        if self.row.finish_reason is not None:
            self._finish(self.row.finish_reason)
            return
        # What may become a stop is kept back.
        keep = max((_overlap(self._held, stop) for stop in self.question.stop), default=0)
        cut = len(self._held) - keep
        self.text, self._held = self.text + self._held[:cut], self._held[cut:]

    def _finish(self, reason: str) -> None:
        self.text, self._held, self.finish_reason = self.text + self._held, "", reason


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` may be the beginning of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


@dataclass
class Answerer:
    """A model with all that turns files and words into its inputs, and its ids into words."""

    checkpoint: Path
    model: Cinego  # with its vision tower
    tokenizer: PreTrainedTokenizerBase
    transform: FrameTransform
    num_frames: int
    device: torch.device
    parameters: dict[str, int]  # of each part
    fps: float | None = None  # None: frames are taken evenly

    @classmethod
    def load(
        cls,
        checkpoint: str | Path,
        vision_path: str | Path | None = None,
        tokenizer_path: str | Path | None = None,
        num_frames: int | None = None,
        device: str = "auto",
        sampling: str | None = None,
        fps: float | None = None,
        weights: str = "float32",
        compile: bool = False,
    ) -> "Answerer":
        """checkpoint: a .pth, or a directory that convert_checkpoint wrote, which brings its own
        tower and tokenizer along. vision_path, tokenizer_path: None for those that go with the
        checkpoint, see `parts_of`. num_frames, sampling and fps: None for what they were in
        training. weights, compile: see model/inference.py.
        Raises ValueError, with the mend, where a part is missing or isn't the one that the
        checkpoint was trained with."""
        checkpoint = Path(checkpoint)
        if vision_path is None or tokenizer_path is None:
            own = parts_of(checkpoint)
            vision_path, tokenizer_path = vision_path or own[0], tokenizer_path or own[1]
        if not Path(tokenizer_path, "tokenizer_config.json").is_file():
            raise ValueError(
                f"no tokenizer in {tokenizer_path}: name a directory with tokenizer.json and "
                "tokenizer_config.json (--tokenizer_path)"
            )
        chosen = choose_device(device)
        model = load_video_language_model(checkpoint, vision_path).to(chosen)
        # An exported directory brings code along, which AutoTokenizer would ask to run.
        kind = PreTrainedTokenizerFast if tokenizer_path == checkpoint else AutoTokenizer
        tokenizer = kind.from_pretrained(tokenizer_path, local_files_only=True)
        known = model.config.language_model.vocab_size
        if len(tokenizer) > known:
            raise ValueError(
                f"{tokenizer_path} has {len(tokenizer)} entries, {checkpoint} was trained with "
                f"{known}: name its own tokenizer (--tokenizer_path)"
            )
        trained = read_about(checkpoint)
        # Another tower of the same shape gives features that mean nothing to this model.
        trained_with = trained.get("lineage", {}).get("vision_tower")
        if trained_with not in (None, model.vision_tower.fingerprint()):
            raise ValueError(
                f"{vision_path} isn't the vision tower that {checkpoint} was trained with: its "
                "weights differ; name that tower (--vision_path)"
            )
        training = trained.get("training", {})
        transform = FrameTransform.from_pretrained(vision_path, training.get("resize", "tower"))
        num_frames = num_frames or training.get("num_frames", 8)
        fps = fps or training.get("fps")
        if (sampling or training.get("sampling")) != "fps":
            fps = None
        elif fps is None:
            raise ValueError("--sampling fps needs --fps: how many frames a second")
        counts = model.parameter_counts()
        prepare(model.language_model, weights, compile)
        return cls(checkpoint, model, tokenizer, transform, num_frames, chosen, counts, fps)

    # ---- what is seen

    def read(
        self, path: str | Path, num_frames: int | None = None, fps: float | None = None, frames=0
    ) -> Visual:
        """One video or image, decoded and seen. Raises VideoError.

        num_frames and fps (frames a second, up to `num_frames`): None for what `load` got.
        frames: size in pixels of the longer side of the small pictures to keep; 0: none.
        """
        return self.view(str(path), self.decode(path, num_frames, fps), frames)

    def decode(
        self,
        path: str | Path,
        num_frames: int | None = None,
        fps: float | None = None,
        **limits: float | None,
    ) -> Frames:
        """The first half of `read`, without the model. limits: `timeout`, `max_pixels`,
        `max_seconds` and `max_bytes` of `read_frames`, for files of strangers."""
        fps = fps or self.fps
        sampling = "fps" if fps else "uniform"
        return read_frames(path, num_frames or self.num_frames, sampling, fps, **limits)

    def view(self, name: str, clip: Frames, frames: int = 0) -> Visual:
        """The other half: what the tower sees."""
        features = self.see(self.transform(clip.frames))
        pictures = [_thumbnail(frame, frames) for frame in clip.frames] if frames else []
        return Visual(name, features, clip.timestamps.tolist(), pictures)

    def look(self, paths: list[Path]) -> tuple[dict[Path, Visual], dict[Path, str]]:
        """Decodes each file once and runs the tower once: visuals by path, and the reasons of the
        files that can't be read."""

        def read(path: Path) -> tuple[Tensor, list[float]] | VideoError:
            try:
                clip = self.decode(path)
                return self.transform(clip.frames), clip.timestamps.tolist()
            except VideoError as error:
                return error

        visuals, failures = {}, {}
        bar = tqdm(total=len(paths), desc="reading clips", unit="clip", disable=len(paths) < 2)
        # Decoding works outside of Python's lock: threads do what processes would, without copies.
        with ThreadPoolExecutor(os.cpu_count()) as pool, bar:
            for start in range(0, len(paths), CLIPS_AT_ONCE):
                chunk = paths[start : start + CLIPS_AT_ONCE]
                clips = {}
                for path, clip in zip(chunk, pool.map(read, chunk), strict=True):
                    if isinstance(clip, VideoError):
                        failures[path] = str(clip)
                    else:
                        clips[path] = clip
                if clips:
                    seen = self.see(torch.cat([pixels for pixels, _ in clips.values()]))
                    seen = seen.split([len(pixels) for pixels, _ in clips.values()])
                    for (path, (_, times)), features in zip(clips.items(), seen, strict=True):
                        visuals[path] = Visual(str(path), features, times)
                bar.update(len(chunk))
        return visuals, failures

    def see(self, pixel_values: Tensor) -> Tensor:
        """(N, 3, S, S) → (N, P, D) in fp16, as the feature store keeps them for training."""
        return self.model.vision_tower(pixel_values.to(self.device)).half()

    @torch.inference_mode()
    def frame_weights(self, visual: Visual) -> list[float]:
        """How much each frame counts in what the summary says: F numbers that sum to 1.

        A frame is taken away and the clip's mean frame put in its place; its weight is how far the
        summary moves for that: the Euclidean distance over all its tokens, divided by the sum for
        all frames. So a frame counts as far as it shows, at its moment, what the clip on the whole
        doesn't, and the summary minds. This is no gradient and no attention map: it says what the
        summary would miss, for every kind of summary alike, and nothing about a question or an
        answer. A still clip has equal weights.
        """
        features_FPD = visual.features.float()
        num_frames = len(features_FPD)
        if num_frames == 1:
            return [1.0]
        mean_PD = features_FPD.mean(0)
        summary = self.model.video_summary
        whole = summary(features_FPD, [num_frames])
        moves = []
        for frame in range(num_frames):  # one at a time: all at once are F² frames in memory
            changed = features_FPD.clone()
            changed[frame] = mean_PD
            moves.append((summary(changed, [num_frames]) - whole).norm())
        moves = torch.stack(moves)
        # Rounding alone moves a still clip's summary a little.
        if moves.sum() < 1e-5 * whole.norm():
            return [1 / num_frames] * num_frames
        return (moves / moves.sum()).tolist()

    # ---- what is said

    def chat(self, system: str | None = None, context_tokens: int | None = None) -> "Chat":
        return Chat(self, system, context_tokens or CONTEXT_TOKENS)

    def batch(self) -> "Batch":
        return Batch(self)

    def encode(self, messages: list[dict], visuals: list[Visual]) -> Encoded:
        """A prompt's ids and where its visuals stand. Raises ConversationError (a ValueError)."""
        num_tokens = self.model.config.tokens_per_visual
        lengths = [num_tokens(len(visual.features)) for visual in visuals]
        return encode(self.tokenizer, messages, lengths, add_generation_prompt=True)

    def answer(self, questions: list[Question]) -> list[str]:
        """The whole answers, as if each question were asked alone."""
        batch = self.batch()
        answers = batch.add(questions)
        while batch:
            batch.step()
        return [answer.text.strip() for answer in answers]

    def inputs(self, prompts: list[Encoded], visuals: Iterable[Visual]) -> dict:
        """A batch for the model, left padded, with the visuals of all rows in order."""
        inputs = {name: tensor.to(self.device) for name, tensor in left_pad(prompts).items()}
        if frames := [visual.features for visual in visuals]:
            inputs["visual_features"] = torch.cat(frames).float()
            inputs["frames_per_visual"] = [len(features) for features in frames]
        return inputs


class Batch:
    """Answers that are made together, each as if it were made alone. `len()`: how many are left."""

    def __init__(self, answerer: Answerer):
        self.answerer = answerer
        self.generation = Generation(answerer.model, answerer.tokenizer.eos_token_id)
        self.answers: dict[Row, Answer] = {}

    def __len__(self) -> int:
        return len(self.answers)

    def add(self, questions: list[Question]) -> list[Answer]:
        """Reads the prompts and makes the first token of each answer. Raises ConversationError, and
        then none of them was added."""
        started = time.perf_counter()
        num_tokens = self.answerer.model.config.tokens_per_visual
        prompts = [self._encode(question) for question in questions]
        added = [
            Answer(question, prompt, _columns(prompt, question.visuals, num_tokens), started)
            for question, prompt in zip(questions, prompts, strict=True)
        ]
        if fresh := [answer for answer in added if answer.question.memory is None]:
            self._read(fresh)
        for answer in added:
            if answer.question.memory is not None:
                self._go_on(answer)
        self.answers |= {answer.row: answer for answer in added}
        self._settle(added)
        return added

    def step(self) -> list[Answer]:
        """One more token, or the end, for each answer; returns those that were in the making."""
        moved = [self.answers[row] for row in self.generation.step()]
        self._settle(moved)
        return moved

    def cancel(self, answer: Answer) -> None:
        """Ends an answer where it is; nothing happens if it has ended already."""
        self.generation.remove(answer.row)
        self._settle([answer])

    def _settle(self, moved: list[Answer]) -> None:
        for answer in moved:
            answer._receive(self.answerer.tokenizer)
            if answer.finish_reason is not None:
                self.generation.remove(answer.row, answer.finish_reason)  # a stop text came
                self.answers.pop(answer.row, None)
                memory, row = answer.question.memory, answer.row
                if memory is not None and row.cache is not None:
                    memory.cache, row.cache = row.cache, None
                    memory.columns = [*memory.columns, *row.ids][: len(memory.cache)]

    def _encode(self, question: Question) -> Encoded:
        prompt = self.answerer.encode(question.messages, question.visuals)
        longest = self.answerer.model.config.language_model.max_position_embeddings
        tokens = len(prompt.input_ids) + question.sampling.max_new_tokens
        if tokens > longest:  # found half-way, it would end the others' answers too
            raise ConversationError(
                f"prompt and answer take up to {tokens} tokens, the model has positions for "
                f"{longest}: shorten the conversation, or lower max_new_tokens"
            )
        return prompt

    def _read(self, answers: list[Answer]) -> None:
        """Reads prompts of unlike lengths in one batch; what several begin with, up to the end of
        the last visual, once."""
        cuts = [len(answer.prompt.input_ids) for answer in answers]
        heads: dict[tuple, int] = {}  # a beginning → its row
        for i, answer in enumerate(answers):
            mask = answer.prompt.visual_mask
            cuts[i] = len(mask) - mask[::-1].index(True) if True in mask else 0
            heads.setdefault(tuple(answer.columns[: cuts[i]]), len(heads))
        rows = [answer.row for answer in answers]
        visuals = [answer.question.visuals for answer in answers]
        if len(heads) == len(answers) or not any(cuts):  # nothing shared, or only words
            inputs = self.answerer.inputs([answer.prompt for answer in answers], chain(*visuals))
            self.generation.add(inputs, rows)
            return
        which = [heads[tuple(a.columns[:cut])] for a, cut in zip(answers, cuts, strict=True)]
        firsts = [which.index(head) for head in range(len(heads))]
        inputs = self.answerer.inputs(
            [_part(answers[i].prompt, slice(cuts[i])) for i in firsts],
            chain(*(visuals[i] for i in firsts)),
        )
        cache, mask = KVCache(), inputs["attention_mask"]
        with torch.inference_mode():
            self.answerer.model(**inputs, past_key_values=cache, logits_to_keep=1)
        cache.keep_rows(torch.tensor(which, device=mask.device))
        tails = [
            _part(answer.prompt, slice(cut, None))
            for answer, cut in zip(answers, cuts, strict=True)
        ]
        inputs = self.answerer.inputs(tails, [])
        inputs["attention_mask"] = torch.cat([mask[which], inputs["attention_mask"]], dim=1)
        self.generation.add(inputs, rows, cache)

    def _go_on(self, answer: Answer) -> None:
        """Reads what the question's memory doesn't hold yet."""
        memory, columns = answer.question.memory, answer.columns
        # Not strict: the prompt goes on where the memory ends, or was cut shorter than it.
        both = zip(memory.columns, columns, strict=False)
        known = next((i for i, (a, b) in enumerate(both) if a != b), len(memory.columns))
        # The last token is always read: the first one of the answer follows from it.
        known = min(known, len(columns) - 1)
        if isinstance(columns[known], tuple):  # a visual's tokens come in one piece
            known -= columns[known][1]
        ahead = (column for column in columns[known:] if isinstance(column, tuple))
        unseen = [visual for visual, place in ahead if place == 0]
        inputs = self.answerer.inputs([_part(answer.prompt, slice(known, None))], unseen)
        del inputs["attention_mask"]
        cache = memory.cache
        cache.crop(known)
        memory.cache, memory.columns = KVCache(), columns
        answer.cached_tokens = known
        self.generation.add(inputs, [answer.row], cache)


def _columns(prompt: Encoded, visuals: list[Visual], num_tokens: Callable[[int], int]) -> list:
    """What stands in a prompt's columns, see Memory."""
    places = iter([(v, i) for v in visuals for i in range(num_tokens(len(v.features)))])
    pairs = zip(prompt.input_ids, prompt.visual_mask, strict=True)
    return [next(places) if is_visual else token for token, is_visual in pairs]


def _part(prompt: Encoded, where: slice) -> Encoded:
    return Encoded(prompt.input_ids[where], prompt.labels[where], prompt.visual_mask[where])


class Chat:
    """A conversation about videos and images, of as many turns as one likes."""

    def __init__(self, answerer: Answerer, system: str | None, context_tokens: int):
        self.answerer, self.context_tokens = answerer, context_tokens
        # All turns as they were said; a question's "visuals" are the names of what it showed.
        self.transcript: list[dict] = []
        self.last: Answer | None = None  # the newest answer, with its times
        self._system = [{"role": "system", "content": system}] if system else []
        # What the model is told: the newest turns that fit, and the visuals of their tags.
        self._turns: list[dict] = []
        self._visuals: list[Visual] = []
        self._shown: list[Visual] = []
        self._forget()

    def show(self, visual: Visual) -> None:
        """Puts a visual before the next question, after those that wait for it already."""
        self._shown.append(visual)

    def ask(
        self, question: str, sampling: Sampling = GREEDY, stop: tuple[str, ...] = ()
    ) -> Iterator[str]:
        """The answer in pieces of whole characters; closing the iterator ends the answer there, and
        the chat goes on. Raises ConversationError, before the first piece, for a question that
        can't be asked; it is then as if it hadn't been."""
        content = question
        if not VISUAL_TAG.search(question):  # else the asker says where the visuals stand
            content = "".join(f"{visual.tag}\n" for visual in self._shown) + question
        turns = [*self._turns, {"role": "user", "content": content}]
        turns, visuals = self._fit(turns, [*self._visuals, *self._shown])
        try:
            told = Question([*self._system, *turns], visuals, sampling, stop, self._memory)
            (answer,) = self._batch.add([told])
            self.last, shown, self._shown = answer, self._shown, []
            try:
                while True:
                    if piece := answer.take():
                        yield piece
                    if not self._batch:
                        break
                    self._batch.step()
            finally:
                self._batch.cancel(answer)
                # Templates want some text in every turn.
                said = {"role": "assistant", "content": answer.text.strip() or "-"}
                self._turns, self._visuals = [*turns, said], visuals
                asked = {"role": "user", "content": content}
                if shown:
                    asked["visuals"] = [visual.name for visual in shown]
                self.transcript += [asked, said]
        except (GeneratorExit, ConversationError):
            raise
        except BaseException:  # an interrupt in the midst of a step: what was read may be half
            self._forget()
            raise

    def written(self, kind: str) -> str:
        """The transcript as a file of the suffix `kind`: .json for programs, .md as Markdown, else
        plain lines."""
        if kind == ".json":
            return json.dumps(self.transcript, indent=1, ensure_ascii=False) + "\n"
        marks, between = ("**{}:** ", "\n\n") if kind == ".md" else ("{}: ", "\n")
        lines = []
        for turn in self.transcript:
            lines += [f"[{name}]" for name in turn.get("visuals", ())]
            lines.append(marks.format("Q" if turn["role"] == "user" else "A") + turn["content"])
        return between.join(lines) + "\n"

    def _forget(self) -> None:
        """What was read. What was said stays, and will be read again."""
        self._memory, self._batch = Memory(), self.answerer.batch()

    def _fit(self, turns: list[dict], visuals: list[Visual]) -> tuple[list[dict], list[Visual]]:
        """Leaves out the oldest turns once the context is full; their visuals go before the first
        question that stays. Visuals go last, the oldest first, and never the only one."""

        def too_long(room: int) -> bool:
            prompt = self.answerer.encode([*self._system, *turns], visuals)
            return len(prompt.input_ids) > room

        if not too_long(self.context_tokens):
            return turns, visuals
        # A quarter more than needed: what follows a cut is read again, so not in every turn.
        room = self.context_tokens * 3 // 4
        while len(turns) > 1 and too_long(room):
            tags = "".join(f"{tag}\n" for tag in VISUAL_TAG.findall(turns[0]["content"]))
            first = {"role": "user", "content": tags + turns[2]["content"]}
            turns = [first, *turns[3:]]
        while len(visuals) > 1 and too_long(room):
            first = {"role": "user", "content": VISUAL_TAG.sub("", turns[0]["content"], 1).lstrip()}
            turns, visuals = [first, *turns[1:]], visuals[1:]
        return turns, visuals


def find_models(folder: str | Path) -> list[Path]:
    """The video-language models below `folder`: .pth files and exported directories, those that
    were trained to answer first, then the newest."""
    found = []
    for here, folders, files in os.walk(folder, followlinks=True):
        # An exported directory has no other models in it; runs and data have thousands of files.
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        paths = [Path(here, name) for name in files if name.endswith(".pth")]
        if "processor_config.json" in files:
            paths.append(Path(here))
        found += [path for path in paths if is_video_language_model(path)]
    return sorted(found, key=lambda path: ("pretrain" in path.name, -path.stat().st_mtime, path))


def parts_of(checkpoint: str | Path) -> tuple[Path, Path]:
    """The directories of the vision tower and of the tokenizer that go with a checkpoint.

    An exported directory is both. Else the tokenizer is that of training, where it still lies
    there, and the tower is the one that training named, the usual one or another beside that:
    the first of the right width, and of the right weights should several have it. Where nobody
    knows (files of others) or none is there, both are the usual ones.
    """
    checkpoint = Path(checkpoint)
    if (checkpoint / "processor_config.json").is_file():
        return checkpoint, checkpoint
    about = read_about(checkpoint)
    training = about.get("training", {})
    tokenizer = Path(training.get("tokenizer_path") or TOKENIZER_PATH)
    if not (tokenizer / "tokenizer_config.json").is_file():
        tokenizer = Path(TOKENIZER_PATH)
    usual = Path(VISION_PATH)
    # Training on features never looks at --vision_path: what it names may be another tower.
    places = [training.get("vision_path") or usual, usual, *sorted(usual.parent.glob("*/"))]
    width = about.get("model_config", {}).get("vision_hidden_size")
    towers = [place for place in dict.fromkeys(map(Path, places)) if _fits(place, width)]
    fingerprint = about.get("lineage", {}).get("vision_tower")
    if len(towers) > 1 and fingerprint is not None:
        towers = [place for place in towers if _fingerprint(place) == fingerprint]
    return (towers or [usual])[0], tokenizer


def _fits(place: Path, width: int | None) -> bool:
    """Whether there is a tower, and none of another width."""
    try:
        config = json.loads((place / "config.json").read_text(encoding="utf-8"))
        found = config.get("vision_config", config).get("hidden_size")
    except (OSError, ValueError, AttributeError):
        return False
    return None in (width, found) or found == width


def _fingerprint(place: Path) -> str | None:
    try:
        return VisionTower.from_pretrained(place).fingerprint()
    except ValueError:  # something else lies there
        return None


def _thumbnail(frame: np.ndarray, size: int) -> Image.Image:
    picture = Image.fromarray(frame)
    picture.thumbnail((size, size))
    return picture
