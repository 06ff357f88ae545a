"""Load on the server from a second process: many clients, some that hang up, some that mean harm.

    python -m tests.stress.load --load_from out/quickstart/sft.pth \\
        --vision_path demo/tower --images_path out/quickstart/data/test

Starts `serve.py` with room for fewer requests than there are clients, asks each question once while
nobody else is there, then all of them at the same time, mixed with streams that are left half-way
and with requests that try a limit or a path. Ends with an error unless every answer is the one that
was given alone, no status is 5xx but a 503 with Retry-After, the server's memory, open files and
folder for temporary files are as before, and it stops by itself when asked to.
"""

import argparse
import asyncio
import base64
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path
from statistics import quantiles

import httpx2
import psutil
from PIL import Image

QUESTIONS = ("What happens?", "发生了什么？", "What is it?", "Which way does it go?")
TEXTS = ("Hello!", "你好", "Who are you?", "What can you see?", "Tell me a story.", "一二三")
KINDS = {"text": 30, "video": 30, "video, streamed": 20, "hangs up": 10, "hostile": 10}  # percent
CHAT = "/v1/chat/completions"


def conversation(text: str, url: str | None = None, **more) -> dict:
    content = [{"type": "text", "text": text}]
    if url:
        content.insert(0, {"type": "video_url", "video_url": {"url": url}})
    return {"model": "cinego", "messages": [{"role": "user", "content": content}]} | more


def hostile_requests(folder: Path) -> dict[str, tuple[dict | bytes, int]]:
    """Name → (body, the status that it has to get)."""
    bomb = folder / "bomb.png"
    Image.new("1", (16384, 8192)).save(bomb)
    (folder / "link.mp4").symlink_to("/etc/passwd")

    def data(content: bytes) -> str:
        return f"data:video/mp4;base64,{base64.b64encode(content).decode()}"

    urls = {
        "a file of the system": "file:///etc/passwd",
        "a path upwards": f"file://{folder}/../../../../etc/passwd",
        "a link out": f"file://{folder}/link.mp4",
        "the cloud's metadata": "http://169.254.169.254/latest/meta-data/",
        "an allowed name of a private address": "http://localhost/",
        "a number for an address": "http://2130706433/",
        "134 megapixels": data(bomb.read_bytes()),
        "no video": data(b"\0" * 5000),
    }
    requests = {name: (conversation("x", url), 400) for name, url in urls.items()}
    return requests | {
        "a body above the limit": (conversation("x" * (5 << 20)), 413),
        "a prompt above the limit": (conversation("word " * 5000), 400),
        "no JSON": (b"[" * 100_000, 400),
        "a million answers": (conversation("x", n=1_000_000), 400),
    }


class Load:
    def __init__(self, url: str, clips: list[Path], folder: Path, seed: int):
        self.http = httpx2.AsyncClient(base_url=url, timeout=120)
        self.hostile = hostile_requests(folder)
        self.asked = [conversation(text, max_tokens=16) for text in TEXTS]
        for number, clip in enumerate(clips):
            url = f"data:video/mp4;base64,{base64.b64encode(clip.read_bytes()).decode()}"
            question = QUESTIONS[number % len(QUESTIONS)]
            self.asked.append(conversation(question, url, max_tokens=16))
        self.dice = random.Random(seed)
        self.truth: list[str] = []
        self.seconds = defaultdict(list)
        self.statuses, self.wrong, self.done = Counter(), [], 0

    async def ask(self, number: int) -> tuple[int, str]:
        reply = await self.http.post(CHAT, json=self.asked[number])
        said = reply.status_code == 200 and reply.json()["choices"][0]["message"]["content"]
        return reply, said

    async def stream(self, number: int, leave_after: int | None = None) -> tuple[int, str]:
        said, chunks = "", 0
        body = self.asked[number] | {"stream": True}
        async with self.http.stream("POST", CHAT, json=body) as reply:
            if reply.status_code == 200:
                async for line in reply.aiter_lines():
                    if line.startswith("data: {"):
                        chunk = json.loads(line[6:])
                        said += chunk["choices"][0]["delta"].get("content") or ""
                        chunks += 1
                    if chunks == leave_after:
                        break
        return reply, said

    async def one(self, kind: str) -> None:
        first_video = len(TEXTS)
        if kind == "text":
            number = self.dice.randrange(first_video)
        else:
            number = self.dice.randrange(first_video, len(self.asked))
        if kind == "hostile":
            name, (body, wanted) = self.dice.choice(list(self.hostile.items()))
            body = body if isinstance(body, bytes) else json.dumps(body).encode()
        while True:
            begun = time.perf_counter()
            if kind == "hostile":
                headers = {"Content-Type": "application/json"}
                reply = await self.http.post(CHAT, content=body, headers=headers)
                if reply.status_code not in (wanted, 503) or "root:" in reply.text:
                    self.wrong.append(f"{name}: {reply.status_code} {reply.text[:200]}")
            elif kind == "hangs up":
                reply, _ = await self.stream(number, leave_after=self.dice.randrange(1, 6))
            else:
                reply, said = await (self.stream if "stream" in kind else self.ask)(number)
                if reply.status_code == 200 and said != self.truth[number]:
                    self.wrong.append(f"{kind} {number}: {said!r}, alone {self.truth[number]!r}")
            self.statuses[kind, reply.status_code] += 1
            if reply.status_code != 503:
                break
            await asyncio.sleep(float(reply.headers["Retry-After"]) * self.dice.uniform(0.2, 0.6))
        if reply.status_code >= 500:
            self.wrong.append(f"{kind}: {reply.status_code} {reply.text[:200]}")
        self.seconds[kind].append(time.perf_counter() - begun)
        self.done += 1

    async def run(self, clients: int, requests: int, watch) -> None:
        kinds = [kind for kind, share in KINDS.items() for _ in range(requests * share // 100)]
        self.dice.shuffle(kinds)
        waiting = iter(kinds)

        async def client() -> None:
            for kind in waiting:
                await self.one(kind)

        watcher = asyncio.create_task(watch(self))
        await asyncio.gather(*(client() for _ in range(clients)))
        watcher.cancel()


def start_server(args: argparse.Namespace, folder: Path) -> tuple[subprocess.Popen, str]:
    command = [sys.executable, "serve.py", "--load_from", args.load_from, "--port", "0"]
    command += ["--vision_path", args.vision_path, "--max_queue", str(args.max_queue)]
    command += ["--max_body_mb", "4", "--allowed_media_path", str(folder / "open")]
    command += ["--allowed_media_domains", "localhost"]
    environment = os.environ | {"TMPDIR": str(folder / "tmp")}
    log = open(folder / "serve.log", "w+")  # noqa: SIM115 (the server writes on)
    process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    while not (found := re.search(r"running on (http://\S+)", Path(log.name).read_text())):
        if process.poll() is not None:
            raise SystemExit(Path(log.name).read_text())
        time.sleep(0.2)
    return process, found[1]


def footprint(process: psutil.Process) -> tuple[float, int]:
    """MiB of the server and of what it started, and its open files."""
    everyone = [process, *process.children(recursive=True)]
    resident = 0
    for one in everyone:
        try:
            resident += one.memory_info().rss
        except psutil.NoSuchProcess:  # a decoder that has just ended
            continue
    return resident / 2**20, process.num_fds()


async def measure(args: argparse.Namespace, url: str, process: psutil.Process, folder: Path):
    clips = sorted(Path(args.images_path).rglob("*.mp4"))[: args.clips]
    if not clips:
        raise SystemExit(f"no mp4 in {args.images_path}: render some with demo.world")
    load = Load(url, clips, folder / "open", args.seed)
    for number in range(len(load.asked)):
        reply, said = await load.ask(number)
        reply.raise_for_status()
        load.truth.append(said)

    # Allocators and caches fill while the load is new; from a quarter on, nothing may grow.
    sizes = []

    async def watch(load: Load) -> None:
        while True:
            await asyncio.sleep(0.2)
            if load.done >= args.requests // 4:
                sizes.append(footprint(process)[0])

    before, begun = footprint(process), time.perf_counter()
    await load.run(args.clients, args.requests, watch)
    seconds = time.perf_counter() - begun
    await asyncio.sleep(1)
    after = footprint(process)
    metrics = (await load.http.get("/metrics")).text
    await load.http.aclose()
    return load, seconds, before, after, sizes, metrics


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--load_from", default="out/quickstart/sft.pth")
    add("--vision_path", default="demo/tower")
    add("--images_path", default="out/quickstart/data/test", help="folder with mp4 files")
    add("--clips", type=int, default=16)
    add("--clients", type=int, default=16)
    add("--requests", type=int, default=400)
    add("--max_queue", type=int, default=12, help="below --clients, so that 503 happens")
    add("--seed", type=int, default=0)
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "open").mkdir()
        (folder / "tmp").mkdir()
        server, url = start_server(args, folder)
        process = psutil.Process(server.pid)
        try:
            result = asyncio.run(measure(args, url, process, folder))
            cpu = sum(process.cpu_times()[:2])
            server.terminate()
            code = server.wait(timeout=60)
        finally:
            server.kill()
        load, seconds, before, after, sizes, metrics = result
        left = [path.name for path in (folder / "tmp").rglob("*") if path.is_file()]
        traces = (folder / "serve.log").read_text().count("Traceback")

    print(f"{load.done} requests of {args.clients} clients in {seconds:.1f} s", end=", ")
    print(f"{cpu:.1f} CPU-seconds of the server in all, {load.statuses.total()} attempts")
    print(f"{'':<16} requests   p50 s   p95 s   statuses")
    for kind, times in sorted(load.seconds.items()):
        cuts = quantiles(times, n=20)
        statuses = {s: n for (k, s), n in sorted(load.statuses.items()) if k == kind}
        print(f"{kind:<16} {len(times):>8} {cuts[9]:>7.3f} {cuts[18]:>7.3f}   {statuses}")
    mean = [float(x) for x in re.findall(r"cinego_batch_size_(?:sum|count) (\S+)", metrics)]
    print(f"rows of a batch, mean: {mean[1] / mean[0]:.2f}")
    quarter = max(1, len(sizes) // 4)
    early = sorted(sizes[:quarter])[quarter // 2]
    late = sorted(sizes[-quarter:])[quarter // 2]
    print(f"memory MiB: before {before[0]:.0f}, second quarter {early:.0f}, ", end="")
    print(f"last quarter {late:.0f}, afterwards {after[0]:.0f}; files {before[1]} → {after[1]}")

    problems = load.wrong
    if late > 1.05 * early:
        problems.append("memory grew")
    if after[1] > before[1] + args.clients:  # connections that are kept alive
        problems.append(f"{after[1] - before[1]} files stayed open")
    if left:
        problems.append(f"files were left: {left}")
    if code not in (0, -signal.SIGTERM) or traces:  # uvicorn ends by the signal, once all is done
        problems.append(f"the server ended with {code}, {traces} tracebacks in its log")
    print("\n".join(problems) or "every answer as given alone; nothing left, nothing leaked")
    raise SystemExit(bool(problems))


if __name__ == "__main__":
    main()
