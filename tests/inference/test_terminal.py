"""The chat in the terminal: the real eval.py, typed at through a pseudo-terminal."""

import io
import json
import os
import pty
import re
import select
import signal
import sys
import time

from inference.parts import ROOT, TOKENIZER_PATH
from scripts.export_hf import main as convert


class Typist:
    """Types at a program in a terminal of its own, and reads along."""

    def __init__(self, *command):
        self.pid, self.terminal = pty.fork()
        if self.pid == 0:
            os.chdir(ROOT)
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a runner in the background ignores it
            os.environ |= {"TERM": "dumb", "OMP_NUM_THREADS": "1"}
            os.execv(sys.executable, [sys.executable, *map(str, command)])
        self.output, self.read = "", 0

    def type(self, text: str) -> None:
        os.write(self.terminal, text.encode())

    def interrupt(self) -> None:
        os.kill(self.pid, signal.SIGINT)

    def until(self, pattern: str, seconds: float = 240, silence=lambda: None) -> str:
        """The output from here on, up to and with `pattern`; in each silent second `silence` is
        called."""
        end = time.monotonic() + seconds
        while not (found := re.compile(pattern).search(self.output, self.read)):
            assert time.monotonic() < end, f"no {pattern!r} in {self.output[self.read :]!r}"
            if not select.select([self.terminal], [], [], 1)[0]:
                silence()
            else:
                try:
                    self.output += os.read(self.terminal, 65536).decode(errors="replace")
                except OSError:  # Linux's way to say that the program has ended
                    self.output += "<end>"
        output, self.read = self.output[self.read : found.end()], found.end()
        return output

    def end(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


TIMES = (
    r"\((\d+) tokens, the first after [\d.]+ s, then \d+ a second; (\d+) read, (\d+) of them.*\)"
)


def test_a_chat_of_many_turns_about_several_visuals(folder, tiny_checkpoint, tiny_tower, tmp_path):
    """The exported directory brings its own tower and tokenizer along."""
    paths = ["--vision_path", str(tiny_tower), "--tokenizer_path", str(TOKENIZER_PATH)]
    convert([str(tiny_checkpoint), str(tmp_path / "hf"), *paths])
    user = Typist("eval.py", "--load_from", tmp_path / "hf", "--video", folder / "clip.gif")
    assert "4 frames, at 0.0, 0.1, 0.2, 0.3 s" in user.until("Q: ")
    user.type("/set max_new_tokens 5\n\nWhat moves?\n")
    output = user.until(TIMES)
    assert "A: " in output and output.endswith(" 0 of them earlier)")

    user.type(f"/image {folder}/a.png '{folder}/b c.png'\n")
    user.until("b c.png: 1 frames, at 0.0 s")
    user.type("And these?\n")
    read, earlier = re.search(TIMES, user.until(TIMES)).groups()[1:]
    assert int(read) > 150 and int(earlier) > 50  # the video was not read again

    user.until("Q: ")  # between two prompts the terminal, not readline, would take such keys
    user.type("\x1b[A\n")  # the arrow up: the question before, out of readline's memory
    assert "And these?" in user.until(TIMES)

    user.type("/video nowhere.mp4\n")
    user.until(r"nowhere\.mp4: missing")
    user.type("/dance\n")
    user.until("isn't one of")
    user.type("/set temperature -1\n")
    user.until("temperature is -1.0, must be 0 or more")

    # Ctrl-C stops an answer, not the chat.
    user.type("/set max_new_tokens 20000\nTell me all.\n")
    user.until("A: .{20}")
    user.interrupt()
    user.until("Ctrl-D or /quit ends the chat")
    # At the prompt neither; again, should readline not have been listening yet.
    user.until("Ctrl-D or /quit ends the chat", silence=user.interrupt)
    user.type("/set max_new_tokens 5\nStill there?\n")
    user.until(TIMES)

    for name in ("chat.json", "chat.txt", "chat.md"):
        user.type(f"/save {tmp_path}/{name}\n")
        user.until(f"wrote .*{name}")
    user.type(f"/save {tmp_path}/chat.txt\n")
    user.until("File exists")
    user.type("/reset\nWhat now?\n")
    assert re.search(TIMES, user.until(TIMES)).groups()[2] == "0"
    user.until("Q: ")
    user.type("\x04")
    user.until("<end>")
    assert user.end() == 0

    turns = json.loads((tmp_path / "chat.json").read_text())
    questions = [turn["content"] for turn in turns[::2]]
    assert questions == [
        "<video>\nWhat moves?",
        "<image>\n<image>\nAnd these?",
        "And these?",
        "Tell me all.",
        "Still there?",
    ]
    assert turns[2]["visuals"] == [f"{folder}/a.png", f"{folder}/b c.png"]
    assert "Q: Tell me all.\nA: " in (tmp_path / "chat.txt").read_text()
    assert "\n\n**Q:** Tell me all.\n\n**A:** " in (tmp_path / "chat.md").read_text()


def test_several_images_are_asked_about_one_by_one_or_together(run, folder):
    images = ["--image", folder / "a.png", folder / "b c.png", "--question", "Alike?"]
    apart = run(*images).out
    assert apart.count("Q: Alike?") == 2
    together = run(*images, "--together").out
    assert together.count("Q: Alike?") == 1
    reads = [int(read) for _, read, _ in re.findall(TIMES, apart + together)]
    assert reads[0] == reads[1] and reads[2] > reads[1] + 50


def test_questions_come_from_a_pipe_with_chat(run, folder, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"/image {folder}/a.png\nWhat is it?\n"))
    output = run("--chat").out
    assert re.search(r"Q: A: .*\n +" + TIMES + r"\nQ: \n$", output, re.DOTALL)


def test_what_is_mistyped_is_named(run, folder, monkeypatch):
    typed = {
        "/set": "top_k 0  top_p 1.0",
        "/set top_k 1.5": "top_k must be a whole number, not '1.5'",
        "/set temperature hot": "temperature must be a number, not 'hot'",
        "/set warmth 1": "'warmth' isn't one of max_new_tokens, temperature",
        "/video": "type /video FILE …",
        '/video "a b.mp4': "a quotation mark isn't closed",
        f"/image {folder}/*.png": "b c.png: 1 frames",
        "/save /nowhere/chat.md": "/nowhere/chat.md can't be written: No such file or directory",
        "/reset now": "type /reset",
        "/reset": "are forgotten",
        "/help": "/quit             end",
    }
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(typed) + "\n"))
    output = run("--chat").out.split("Q: ")[1:]
    assert len(output) == len(typed) + 1  # the last one waits, and the pipe has ended
    for (line, expected), answer in zip(typed.items(), output[:-1], strict=True):
        assert expected in answer, line
