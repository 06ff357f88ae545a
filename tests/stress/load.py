"""Load on the server from a second process: many clients, some that hang up, some that are refused.

    python -m tests.stress.load --images_path demo/examples

Starts `serve.py` with room for fewer requests than there are clients, asks each question once while
nobody else is there, then all at the same time, mixed with streams that are left half-way and with
requests that try a limit or a path. Ends with an error unless every answer is the one given alone,
no status is 5xx but a 503 with Retry-After, memory, open files and temporary files are as before,
and the server stops when asked to.
"""

import asyncio
import json
import random
import re
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import quantiles

import httpx2
import psutil

from cli import Flags, flag, launch, parse_flags
from tests.inference.service import Server, about, conversation, data_url

QUESTIONS = ("What happens?", "发生了什么？", "What is it?", "Which way does it go?")
TEXTS = ("Hello!", "你好", "Who are you?", "What can you see?", "Tell me a story.", "一二三")
KINDS = {"text": 30, "video": 30, "video, streamed": 20, "hangs up": 10, "refused": 10}  # percent
CHAT = "/v1/chat/completions"


@dataclass
class LoadFlags(Flags):
    """Load"""

    load_from: str = flag("demo/model/sft_videolm_128.pth", "checkpoint")
    vision_path: str = flag("demo/tower", "its vision tower")
    images_path: Path = flag(Path("demo/examples"), "folder with mp4 files")
    clips: int = flag(16, "files taken from it", at_least=1)
    clients: int = flag(16, "clients at a time", at_least=1)
    requests: int = flag(400, "requests of all clients", at_least=10)
    max_queue: int = flag(
        12, "requests that the server admits: below --clients, so that 503 happens"
    )


REFUSED = [  # body, and the status that it has to get
    (conversation(about("file:///etc/passwd")), 400),
    (conversation(about("data:video/mp4;base64," + "A" * 4000)), 400),
    (conversation("x" * (5 << 20)), 413),
]


class Load:
    def __init__(self, url: str, clips: list[Path]):
        self.http = httpx2.AsyncClient(base_url=url, timeout=120)
        self.asked = [conversation(text, max_tokens=16) for text in TEXTS]
        for number, clip in enumerate(clips):
            content = about(data_url(clip), text=QUESTIONS[number % len(QUESTIONS)])
            self.asked.append(conversation(content, max_tokens=16))
        self.rng, self.alone = random.Random(0), []
        self.seconds, self.statuses, self.wrong = defaultdict(list), Counter(), []

    async def ask(self, number: int, chunks: int | None = None) -> tuple[httpx2.Response, str]:
        """The reply and its text, as a stream; after `chunks` of it the client hangs up."""
        body, text = self.asked[number] | {"stream": True}, ""
        async with self.http.stream("POST", CHAT, json=body) as reply:
            async for line in reply.aiter_lines():
                if line.startswith("data: {"):
                    text += json.loads(line[6:])["choices"][0]["delta"].get("content") or ""
                    chunks = chunks and chunks - 1
                if chunks == 0:
                    break
        return reply, text

    async def request(self, kind: str) -> None:
        videos = range(len(TEXTS), len(self.asked))
        number = self.rng.choice(range(len(TEXTS)) if kind == "text" else videos)
        (body, wanted), started = self.rng.choice(REFUSED), time.perf_counter()
        while True:
            if kind == "refused":
                reply = await self.http.post(CHAT, json=body)
                is_right = reply.status_code == wanted
            elif kind in ("video, streamed", "hangs up"):
                leaves = kind == "hangs up"
                reply, text = await self.ask(number, self.rng.randrange(1, 6) if leaves else None)
                is_right = reply.status_code == 200 and (leaves or text == self.alone[number])
            else:
                reply = await self.http.post(CHAT, json=self.asked[number])
                is_right = reply.status_code == 200 and (
                    reply.json()["choices"][0]["message"]["content"] == self.alone[number]
                )
            self.statuses[reply.status_code] += 1
            if reply.status_code != 503:
                break
            await asyncio.sleep(float(reply.headers["Retry-After"]) * self.rng.uniform(0.2, 0.6))
        if not is_right:
            self.wrong.append(f"{kind} {number}: {reply.status_code}")
        self.seconds[kind].append(time.perf_counter() - started)

    async def run(self, flags: LoadFlags, server: psutil.Process) -> list[float]:
        """MiB of the server and its decoders, from the second quarter on: nothing may grow."""
        self.alone = [(await self.ask(number))[1] for number in range(len(self.asked))]
        kinds = [k for k, share in KINDS.items() for _ in range(flags.requests * share // 100)]
        self.rng.shuffle(kinds)
        waiting, memory = iter(kinds), []

        async def client() -> None:
            for kind in waiting:
                await self.request(kind)
                if sum(map(len, self.seconds.values())) > flags.requests // 4:
                    everyone = [server, *server.children(recursive=True)]
                    memory.append(sum(each.memory_info().rss for each in everyone) / 2**20)

        await asyncio.gather(*(client() for _ in range(flags.clients)))
        return memory


def main() -> None:
    flags = parse_flags(LoadFlags, __doc__)
    clips = sorted(flags.images_path.rglob("*.mp4"))[: flags.clips]
    with tempfile.TemporaryDirectory() as folder:
        own = ("--max_queue", flags.max_queue, "--max_body_mb", 4, "--dtype", "float32")
        server = Server(flags.load_from, flags.vision_path, Path(folder), *own)
        process, load = psutil.Process(server.process.pid), Load(server.url, clips)
        files, started = process.num_fds(), time.perf_counter()
        memory = asyncio.run(load.run(flags, process))
        seconds, cpu = time.perf_counter() - started, sum(process.cpu_times()[:2])
        time.sleep(1)
        problems, files = load.wrong, process.num_fds() - files
        batch = server.metric("cinego_batch_size_sum") / server.metric("cinego_batch_size_count")
        left = [path.name for path in server.temporary.rglob("*") if path.is_file()]
        server.stop(60)

    print(
        f"{flags.requests} requests of {flags.clients} clients in {seconds:.1f} s, {cpu:.1f} CPU-s"
    )
    print(f"{dict(load.statuses)}, {batch:.2f} rows a batch; seconds with all retries:")
    for kind, times in sorted(load.seconds.items()):
        cuts = quantiles(times, n=20)
        print(f"| {kind} | {len(times)} | {cuts[9]:.2f} | {cuts[18]:.2f} |")
    early, late = (sorted(part)[len(part) // 2] for part in (memory[:50], memory[-50:]))
    print(f"memory {early:.0f} → {late:.0f} MiB, {files:+} open files")
    if late > 1.05 * early:
        problems.append("memory grew")
    if files > flags.clients + 8:  # connections that are kept alive, threads
        problems.append(f"{files} files stayed open")
    if left or server.process.returncode not in (0, -signal.SIGTERM):
        problems.append(f"left {left}, exit {server.process.returncode}")
    if re.search("Traceback", "".join(server.log)):
        problems.append("a traceback in the log")
    print("\n".join(problems) or "every answer as given alone; nothing left, nothing leaked")
    sys.exit(bool(problems))


if __name__ == "__main__":
    launch(main)
