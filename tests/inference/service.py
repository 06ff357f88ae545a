"""A script that serves others, as its users start it: a process of its own on a free port."""

import base64
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import openai

ROOT = Path(__file__).resolve().parents[2]


class Service:
    """Ready once it has printed where it can be found.

    process, url (of this machine), port; log: all that it has printed so far, line by line;
    temporary: its own folder for temporary files.
    """

    def __init__(self, command: list, folder: Path, **environment: str):
        self.temporary = folder / "tmp"
        self.temporary.mkdir(parents=True)
        own = {"OMP_NUM_THREADS": "1", "TMPDIR": str(self.temporary), "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(
            [str(part) for part in command],
            cwd=ROOT,
            env=os.environ | own | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.log: list[str] = []
        for line in self.process.stdout:
            self.log.append(line)
            if found := re.search(r"http://127\.0\.0\.1:(\d+)", line):
                self.url, self.port = found[0], int(found[1])
                break
        else:
            raise AssertionError("".join(self.log))
        threading.Thread(target=lambda: self.log.extend(self.process.stdout), daemon=True).start()

    def stop(self, patience: float = 300) -> None:
        self.process.terminate()
        self.process.wait(patience)


class Server(Service):
    """`python serve.py` and OpenAI's client for it."""

    def __init__(self, checkpoint: Path, tower: Path, folder: Path, *flags, **environment):
        command = [sys.executable, "serve.py", "--load_from", checkpoint, "--vision_path", tower]
        super().__init__([*command, "--port", "0", *flags], folder, **environment)
        self.client = openai.OpenAI(
            base_url=f"{self.url}/v1", api_key="sesame", max_retries=0, timeout=60
        )

    def ask(self, content, **settings):
        """`content`: the one user turn. Greedy and short by default."""
        body = conversation(content, max_tokens=8, temperature=0) | settings
        return self.client.chat.completions.create(**body)

    def metric(self, name: str) -> float:
        lines = self.raw(get("/metrics"))
        found = re.search(rf"^{re.escape(name)} (\S+)$", lines, re.MULTILINE)
        return float(found[1]) if found else 0.0

    def raw(self, request: bytes, wait: float = 30, address: str = "127.0.0.1") -> str:
        """What comes back for these bytes until the server closes the connection."""
        with connect(self.port, wait, address) as connection:
            connection.sendall(request)
            return read(connection)


def connect(port: int, wait: float = 60, address: str = "127.0.0.1") -> socket.socket:
    """address: that it comes from; on Linux all of 127/8 is this machine."""
    return socket.create_connection(("127.0.0.1", port), wait, source_address=(address, 0))


def read(connection: socket.socket) -> str:
    """All that comes until it is closed."""
    return b"".join(iter(lambda: connection.recv(1 << 16), b"")).decode()


def get(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()


def conversation(content, **settings) -> dict:
    """The body of a request with one user turn."""
    return {"model": "cinego", "messages": [{"role": "user", "content": content}], **settings}


def post(body: bytes | dict, *headers: str, length: int | None = None) -> bytes:
    body = json.dumps(body).encode() if isinstance(body, dict) else body
    lines = (
        "POST /v1/chat/completions HTTP/1.1",
        *("Host: localhost", "Connection: close", "Content-Type: application/json"),
        *headers,
    )
    length = len(body) if length is None else length
    return "\r\n".join([*lines, f"Content-Length: {length}", "", ""]).encode() + body


def until(condition, seconds: float = 15) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it didn't happen in time"
        time.sleep(0.02)


def data_url(path: Path) -> str:
    return f"data:video/mp4;base64,{base64.b64encode(path.read_bytes()).decode()}"


def about(*urls: str, text: str = "What happens?") -> list[dict]:
    videos = [{"type": "video_url", "video_url": {"url": url}} for url in urls]
    return [*videos, {"type": "text", "text": text}]
