"""The chat in the terminal: many turns about several videos and images. `eval.py` opens it."""

import os
import shlex
import sys
from contextlib import closing
from dataclasses import replace
from glob import glob
from itertools import chain
from pathlib import Path

from inference.chat import Chat
from inference.chat_model import ChatModel
from model.generate import Sampling

COMMANDS = {  # → what follows it, and what it does
    "/video": ("FILE …", "attach videos to your next question"),
    "/image": ("FILE …", "attach images to your next question"),
    "/set": (
        "NAME VALUE",
        "temperature, top_k, top_p, min_p, repetition_penalty, seed, max_new_tokens;\n"
        f"{'':20}/set alone prints them",
    ),
    "/reset": ("", "forget all turns and files"),
    "/save": ("FILE", "write the chat; name.json for programs, .md as Markdown, else plain text"),
    "/help": ("", "these lines"),
    "/quit": ("", "end (or Ctrl-D); Ctrl-C stops an answer"),
}
PROMPT = "Q: "


class Terminal:
    """Reads questions and commands line by line, writes answers as they are made."""

    def __init__(self, chat_model: ChatModel, sampling: Sampling, stop: tuple[str, ...] = ()):
        self.chat_model, self.sampling, self.stop = chat_model, sampling, stop
        self.chat = Chat(chat_model)

    def attach(self, *files: str | Path) -> None:
        """Puts files before the next question. Raises VideoError."""
        for file in files:
            visual = self.chat_model.encode_video(file)
            self.chat.attach(visual)
            times = ", ".join(f"{time:.1f}" for time in visual.timestamps[:32])
            print(f"{file}: {len(visual.features)} frames, at {times} s")
            for warning in visual.warnings:
                print(f"  {warning}")

    def run(self) -> None:
        """Until /quit or the end of input. Errors are printed, and the chat continues."""
        if sys.stdin.isatty():
            import readline  # noqa: F401  input() then edits the line and remembers the last ones
        print("Type a question, or /help.")
        while True:
            try:
                line = input(PROMPT).strip()
                if line == "/quit":
                    return
                if line.startswith("/"):
                    self.command(line)
                elif line:
                    self.answer(line)
            except EOFError:  # Ctrl-D
                print()
                return
            except KeyboardInterrupt:  # what was answered till then stays
                print("\n(stopped; Ctrl-D or /quit ends the chat)")
            except (ValueError, OSError) as error:
                print(error)

    def answer(self, question: str) -> None:
        """Prints the answer piece by piece and a line of times."""
        print("A: ", end="", flush=True)
        with closing(self.chat.ask(question, self.sampling, self.stop)) as pieces:
            for piece in pieces:
                print(piece, end="", flush=True)
        last = self.chat.last
        print(
            f"\n   ({last.completion_tokens} tokens, the first after "
            f"{last.time_to_first_token:.2f} s, then {last.tokens_per_second:.0f} a second; "
            f"{last.prompt_tokens} read, {last.cached_tokens} of them earlier)"
        )

    def command(self, line: str) -> None:
        """Raises ValueError with what is wrong with it."""
        try:
            name, *words = shlex.split(line)
        except ValueError:
            raise ValueError(f"a quotation mark isn't closed in {line}") from None
        if name in ("/video", "/image") and words:
            self.attach(*chain.from_iterable(map(_matching, words)))
        elif name == "/set" and not words:
            print("  ".join(f"{name} {value}" for name, value in vars(self.sampling).items()))
        elif name == "/set" and len(words) == 2:
            self.set(*words)
        elif name == "/reset" and not words:
            self.chat = Chat(self.chat_model)
            print("(all turns and files are forgotten)")
        elif name == "/save" and len(words) == 1:
            self.save(Path(words[0]).expanduser())
        elif name == "/help":
            for name, (words, what) in COMMANDS.items():
                print(f"  {f'{name} {words}':18}{what}")
        elif name in COMMANDS:
            raise ValueError(f"type {name} {COMMANDS[name][0]}".strip())
        else:
            raise ValueError(f"{name} isn't one of the commands; /help lists them")

    def set(self, name: str, value: str) -> None:
        """Changes one setting of sampling. Raises ValueError."""
        types = {field: type(default) for field, default in vars(Sampling(seed=0)).items()}
        if name not in types:
            raise ValueError(f"{name!r} isn't one of {', '.join(types)}")
        try:
            number = types[name](value)
        except ValueError:
            wanted = "a whole number" if types[name] is int else "a number"
            raise ValueError(f"{name} must be {wanted}, not {value!r}") from None
        self.sampling = replace(self.sampling, **{name: number})

    def save(self, path: Path) -> None:
        """The whole chat, also turns that the model no longer gets."""
        try:
            with open(path, "x", encoding="utf-8") as file:  # never over another file
                file.write(self.chat.format_transcript(path.suffix))
        except OSError as error:
            raise ValueError(f"{path} can't be written: {error.strerror}") from None
        print(f"wrote {path}")


def _matching(name: str) -> list[str]:
    """The files that a pattern such as `*.mp4` means; a name that is none stays as it is."""
    name = os.path.expanduser(name)
    return [name] if os.path.exists(name) else sorted(glob(name)) or [name]
