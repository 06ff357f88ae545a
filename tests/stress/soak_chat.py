"""Does a chat of a thousand turns keep its memory?

    python tests/stress/soak_chat.py                 # about a CPU-minute
    python tests/stress/soak_chat.py --turns 100 --load_from out/quickstart/sft.pth

Types at the real `eval.py --chat`: questions in two languages, a new clip every 20 turns, an image
every 50, a file that can't be read every 40, and now and then a question that is refused. Prints
the memory of its processes along the way, and ends with an error where it grew by more than 5 %
after the first tenth. Without --load_from the model is a random one of the quickstart's size.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import psutil
import torch
from PIL import Image

from model.checkpoint import save_model
from model.cinego import Cinego
from model.config import CinegoConfig, LanguageModelConfig
from model.tokenizer import OURS

TOWER = "demo/tower"
QUESTIONS = ("What moves?", "它往哪个方向移动?", "And how many are there?", "它是什么颜色的?")


def make_files(folder: Path) -> None:
    language_model = LanguageModelConfig(
        hidden_size=128, num_hidden_layers=3, num_attention_heads=4, embedding_std=0.4
    )
    torch.manual_seed(0)
    model = Cinego(CinegoConfig(language_model, vision_hidden_size=128))
    meta = {"training": {"num_frames": 8}, "lineage": {"tokenizer": OURS}}
    save_model(folder / "random.pth", model, meta)
    random = np.random.default_rng(0)
    pictures = [Image.fromarray(random.integers(0, 255, (112, 112, 3), np.uint8)) for _ in range(8)]
    pictures[0].save(folder / "a.png")
    pictures[0].save(folder / "a.gif", save_all=True, append_images=pictures[1:], duration=100)
    (folder / "broken.mp4").write_text("not a video")


def lines(turn: int, folder: Path) -> list[str]:
    """What is typed at this turn; one question in the end."""
    typed = []
    if turn % 20 == 0:
        typed.append(f"/video {folder}/a.gif")
    if turn % 50 == 10:
        typed.append(f"/image {folder}/a.png")
    if turn % 40 == 5:
        typed.append(f"/video {folder}/broken.mp4")
    if turn % 70 == 3:
        typed.append("Is <video> like <video> and <video>?")  # more tags than videos: refused
    return [*typed, f"{QUESTIONS[turn % len(QUESTIONS)]} ({turn})"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--turns", type=int, default=1000)
    parser.add_argument("--load_from", help="a trained model that goes with the demo tower")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        make_files(folder)
        chat = subprocess.Popen(
            [
                *(sys.executable, "-u", "eval.py", "--chat", "--max_new_tokens", "4"),
                *("--load_from", args.load_from or folder / "random.pth", "--vision_path", TOWER),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )
        process, memory = psutil.Process(chat.pid), {}
        for turn in range(1, args.turns + 1):
            chat.stdin.write("\n".join(lines(turn, folder)) + "\n")
            chat.stdin.flush()
            for said in chat.stdout:  # up to the line of times
                if re.match(r"   \(\d+ tokens, ", said):
                    break
            else:
                raise SystemExit(f"the chat ended at turn {turn}")
            if turn == 1 or turn % max(1, args.turns // 10) == 0:
                everyone = [process, *process.children(recursive=True)]  # one of them decodes
                memory[turn] = sum(each.memory_info().rss for each in everyone) / 2**20
                print(f"turn {turn:5}: {memory[turn]:.1f} MiB, {said.strip()}", flush=True)
        chat.stdin.close()
        chat.wait()
    turns = list(memory)
    early, late = memory[turns[1]], memory[turns[-1]]
    print(
        f"from turn {turns[1]} to {turns[-1]}: {early:.1f} → {late:.1f} MiB ({late - early:+.1f})"
    )
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps({"rss_mib": memory}, indent=1) + "\n")
    raise SystemExit("memory grew" if late > 1.05 * early else 0)


if __name__ == "__main__":
    main()
