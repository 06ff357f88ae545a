"""Does a chat of a thousand turns keep its memory?

    python -m tests.stress.soak_chat                 # about a CPU-minute
    python -m tests.stress.soak_chat --turns 100

Types at the real `eval.py --chat`: questions in two languages, a clip every 20 turns, an image all
50, a file that can't be read every 40, and now and then a question that is refused. Prints the
memory of its processes along the way, and ends with an error where it grew by more than 5 % after
the first tenth.
"""

import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import psutil
from PIL import Image

from cli import Flags, flag, launch, parse_flags
from inference.parts import DEMO_MODEL, ROOT

QUESTIONS = ("What moves?", "它往哪个方向移动?", "And how many are there?", "它是什么颜色的?")


@dataclass
class SoakFlags(Flags):
    """Soak"""

    turns: int = flag(1000, "questions in all", at_least=20)
    load_from: str = flag(str(DEMO_MODEL), "the model to talk to")


def lines_of(turn: int, folder: Path) -> list[str]:
    """What is typed at this turn; one question in the end."""
    files = {
        f"/video {ROOT}/demo/examples/order.mp4": turn % 20 == 0,
        f"/image {folder}/a.png": turn % 50 == 10,
        f"/video {folder}/broken.mp4": turn % 40 == 5,
        "Is <video> like <video> and <video>?": turn % 70 == 3,  # more tags than videos: refused
    }
    typed = [line for line, is_due in files.items() if is_due]
    return [*typed, f"{QUESTIONS[turn % len(QUESTIONS)]} ({turn})"]


def main() -> None:
    flags, memory = parse_flags(SoakFlags, __doc__), {}
    command = [sys.executable, "-u", "eval.py", "--chat", "--max_new_tokens", "4"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        Image.effect_noise((112, 112), 64).save(folder / "a.png")
        (folder / "broken.mp4").write_text("not a video")
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "encoding": "utf-8"}
        chat = subprocess.Popen([*command, "--load_from", flags.load_from], cwd=ROOT, **pipes)
        process = psutil.Process(chat.pid)
        for turn in range(1, flags.turns + 1):
            chat.stdin.write("\n".join(lines_of(turn, folder)) + "\n")
            chat.stdin.flush()
            if not any(re.match(r"   \(\d+ tokens, ", line) for line in chat.stdout):
                raise SystemExit(f"the chat ended at turn {turn}")
            if turn % (flags.turns // 10) == 0:
                everyone = [process, *process.children(recursive=True)]  # one of them decodes
                memory[turn] = sum(each.memory_info().rss for each in everyone) / 2**20
                print(f"turn {turn:5}: {memory[turn]:.1f} MiB", flush=True)
        chat.stdin.close()
        chat.wait()
    early, *_, late = memory.values()
    raise SystemExit("memory grew" if late > 1.05 * early else 0)


if __name__ == "__main__":
    launch(main)
