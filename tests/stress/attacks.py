"""Attacks on `serve.py`, each while another client asks for /health all along.

    pytest -s -m slow tests/inference/test_attacks.py                     # all, at full size
    pytest -s -m slow tests/inference/test_attacks.py -k "silent_connections or slow_bodies"

Each got at a file, kept others waiting or left a traceback in an earlier version, or was tried and
held. Prints requests, answers and the longest wait of /health, which may be half a second; without
`-m slow` the attacks run in their short form.
"""

import base64
import http.server
import json
import multiprocessing
import os
import re
import signal
import struct
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import psutil
from PIL import Image

from inference.parts import DEMO_MODEL, DEMO_TOWER
from tests.clips import make_clip
from tests.inference.service import (
    Server,
    about,
    connect,
    conversation,
    data_url,
    get,
    post,
    read,
    until,
)

ATTACKER, OTHER = "127.0.0.1", "127.0.0.2"  # clients' addresses
KEY = "Authorization: Bearer sesame"
MIB = 1 << 20
PATIENCE = 0.5  # seconds that /health may take
FLAGS = (
    *("--header_timeout", 2, "--upload_timeout", 2, "--media_timeout", 2, "--request_timeout", 300),
    *("--decoders", 2, "--max_queue", 32, "--max_video_seconds", 30, "--max_new_tokens", 2000),
)


class Target:
    """A server under attack, with the folder and the host that it opens; another client asks for
    its /health all along."""

    def __init__(self, server: Server, folder: Path, web: str, is_short: bool):
        self.server, self.folder, self.web, self.is_short = server, folder, web, is_short
        self.clip = data_url(folder / "clip.mp4")
        self.answers: Counter[str] = Counter()
        self.asked: list[tuple[float, float, str]] = []  # for /health: when, how long, the answer
        context = multiprocessing.get_context("spawn")
        pipe, end = context.Pipe(duplex=False)
        self.watcher = context.Process(target=watch_health, args=(server.port, end), daemon=True)
        self.watcher.start()
        threading.Thread(target=self._collect, args=(pipe,), daemon=True).start()
        until(lambda: self.asked, 60)

    def _collect(self, pipe) -> None:
        with suppress(EOFError):  # the watcher has ended
            while True:
                self.asked.append(pipe.recv())

    def run(self, attack: Callable[["Target"], None]) -> None:
        """Prints what came of it. Raises AssertionError for a wrong answer, or none of /health."""
        self.answers.clear()
        before, started = len(self.asked), time.monotonic()
        attack(self)
        ended = time.monotonic()
        if attack is not sigterm:
            until(lambda: self.asked[-1][0] > ended, 60)
        asked = self.asked[before:]
        longest = max((wait for _, wait, _ in asked), default=0)
        answers = ", ".join(f"{n} × {status}" for status, n in sorted(self.answers.items()))
        about = f"{ended - started:.0f} s, {answers}; /health asked {len(asked)} times"
        print(f"\n{attack.__name__}: {about}, longest wait {longest:.2f} s")
        if attack is not sigterm:
            assert not [text for _, _, text in asked if '{"status":"ok"}' not in text]
            assert self.is_short or longest < PATIENCE

    def many(self, full: int, short: int) -> int:
        return short if self.is_short else full

    def note(self, reply: str) -> str:
        self.answers[reply[9:12] or "closed"] += 1  # closed: without an answer
        return reply

    def send(self, request: bytes, *wanted: str, address: str = ATTACKER) -> str:
        """The reply, which has to have one of these statuses."""
        reply = self.note(self.server.raw(request, 300, address))
        assert reply[9:12] in wanted, reply[:500]
        return reply.partition("\r\n\r\n")[2]

    def ask(self, content, *wanted: str, address: str = ATTACKER, **settings) -> dict:
        body = conversation(content, **{"max_tokens": 4} | settings)
        return json.loads(self.send(post(body, KEY), *wanted, address=address))

    def refuse(self, url: str, *codes: str) -> str:
        """The message; the error has to have one of these codes."""
        error = self.ask(about(url), "400", "413")["error"]
        assert error["code"] in codes, (url[:100], error)
        return error["message"]

    def open(self, number: int, *pieces: bytes) -> list:
        """So many connections that send this and then wait."""
        peers = [connect(self.server.port, address=ATTACKER) for _ in range(number)]
        for piece in pieces:
            for peer in peers:
                with suppress(OSError):
                    peer.sendall(piece)
        return peers

    def expect_closed(self, peers: list, *wanted: str) -> None:
        """The server ends them, with one of these statuses or with none."""
        for peer in peers:
            reply = ""
            with peer, suppress(ConnectionError):
                reply = read(peer)
            assert self.note(reply)[9:12] in ("", *wanted), reply

    def expect_service(self) -> None:
        """A text and a clip are answered to the other client."""
        self.ask("Hello", "200", address=OTHER)
        self.ask(about(self.clip), "200", address=OTHER)


# ---- who keeps the others waiting


def nobody(target: Target) -> None:
    """How long /health takes on this machine anyway."""
    time.sleep(target.many(10, 1))


def paths_of_megabytes(target: Target) -> None:
    urls = f"file://{target.folder}/" + "a/" * MIB, "http://" + "a." * MIB
    for url in urls * target.many(5, 1):
        assert "characters is above" in target.refuse(url, "media_refused")


def silent_connections(target: Target) -> None:
    for words in (b"", b"POST /v1/chat/completions HTTP/1.1\r\nHost: "):
        peers = target.open(600, words)
        target.expect_service()
        target.expect_closed(peers)


def dripping_headers(target: Target) -> None:
    peers = target.open(50, *[b"P"] * 50)
    for _ in range(25):
        time.sleep(0.1)
        for peer in peers:
            with suppress(OSError):
                peer.sendall(b"P")
    target.expect_closed(peers, "400")


def silence_after_an_answer(target: Target) -> None:
    kept = get("/health").replace(b"Connection: close\r\n", b"")
    peers = target.open(50, kept)
    for peer in peers:
        assert '{"status":"ok"}' in "".join(iter(lambda p=peer: p.recv(1).decode(), "}")) + "}"
        peer.sendall(b"G")  # ends uvicorn's own timeout for kept connections
    target.expect_closed(peers)


def slow_bodies(target: Target) -> None:
    peers = target.open(600, post(b"{", KEY, length=1000), b'"')
    target.expect_service()
    target.expect_closed(peers, "408")


def large_bodies_that_stop(target: Target) -> None:
    start = post(b" " * (31 * MIB), KEY, length=32 * MIB)
    with ThreadPoolExecutor(12) as pool:
        sent = [pool.submit(target.open, 1, start) for _ in range(12)]
        until(lambda: any(each.done() for each in sent), 60)
        target.expect_service()
        target.expect_closed([each.result()[0] for each in sent], "408", "503")


def tiny_chunks(target: Target) -> None:
    head = post(b"", KEY).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
    chunks = b"1\r\n \r\n" * target.many(400_000, 100_000)
    for _ in range(target.many(5, 1)):
        target.expect_closed(target.open(1, head + chunks + b"0\r\n\r\n"), "411")


def megabytes_of_json(target: Target) -> None:
    turn = b'{"role": "user", "content": "' + b"<" * 190_000 + b'"}'
    part = json.dumps({"type": "text", "text": "<" * 190_000}).encode()
    junk = [
        (b"extra", b"[" + b"0, " * 10_000_000 + b"0]"),
        (b"extra", b"[" + b'{"": []}, ' * 3_000_000 + b"0]"),
        (b"extra", b"[" + b"[]," * 14_000 + b"0]"),
        (b"messages", b'[{"role": "user", "content": "' + b"x" * 31_000_000 + b'"}]'),
        (b"messages", b'[{"role": "user", "content": "' + b"\\\\" * 15_000_000 + b'"}]'),
        (b"messages", b'[{"role": "user", "content": "' + b"\\u4e2d" * 5_000_000 + b'"}]'),
        (b"messages", b'[{"role": "user", "content": [' + b",".join([part] * 60) + b"]}]"),
        (b"messages", b"[" + b",".join([turn] * 160) + b"]"),
    ]
    requests = [post(b'{"model": "cinego", "%s": %s}' % field, KEY) for field in junk]
    with ThreadPoolExecutor(target.many(4, 1)) as pool:
        for _ in range(target.many(4, 1)):
            list(pool.map(lambda request: target.send(request, "400", "413", "503"), requests))


def bomb() -> bytes:
    """A GIF of 69 kB that takes seconds: 3,000 frames of 2,800 × 2,900, each of which draws one
    pixel."""
    screen = b"GIF89a" + struct.pack("<HHBBB", 2800, 2900, 0x80, 0, 0) + bytes(6)
    frame = b"!\xf9\x04\0\x01\0\0\0" + b"," + struct.pack("<HHHHB", 0, 0, 1, 1, 0)
    return screen + (frame + b"\x02\x02D\x01\0") * 3000 + b";"


def clips_that_take_seconds(target: Target) -> None:
    """Each request gets --media_timeout in all, and another client's clip doesn't wait for them."""
    url = "data:image/gif;base64," + base64.b64encode(bomb()).decode()
    number = target.many(40, 4)
    with ThreadPoolExecutor(number) as pool:
        attacks = [pool.submit(target.ask, about(*[url] * 8), "400", "503") for _ in range(number)]
        until(lambda: target.server.metric("cinego_in_flight") >= min(number, 28), 60)
        for _ in range(3):
            target.expect_service()
        assert sum(attack.done() for attack in attacks) < number - 1
        codes = Counter(attack.result()["error"]["code"] for attack in attacks)
    assert codes["media_timeout"] and set(codes) <= {"media_timeout", "server_busy"}, codes


def clips_that_cost_too_much(target: Target) -> None:
    for name, reason in (("long.mp4", "media_too_long"), ("wide.png", "media_too_large")):
        target.refuse(data_url(target.folder / name), reason)
    whole = (target.folder / "clip.mp4").read_bytes()
    for data in (whole[:700], b"", b"RIFF" + bytes(4000), b"<svg/>", bytes(8 * MIB), bomb()[:100]):
        url = f"data:video/mp4;base64,{base64.b64encode(data).decode()}"
        assert "/proc/" not in target.refuse(url, "media_unreadable", "media_corrupt")
    target.refuse("data:video/mp4;base64,!" + "A" * 40_000_000, "body_too_large")
    for url in ("data:video/mp4;base64,!", "data:,x", "data:" + "A" * 4000):
        target.refuse(url, "media_refused")
    assert target.ask(about(*["data:,x"] * 9), "400")["error"]["code"] == "too_many_visuals"


# ---- who reads what isn't theirs


def files_outside_of_the_open_folder(target: Target) -> None:
    folder, answers = target.folder, []
    for url in (target.clip, *(f"file://{folder}/{name}" for name in ("clip.mp4", "./inside.mp4"))):
        answers.append(target.ask(about(url), "200")["choices"][0]["message"])
    assert answers[0] == answers[1] == answers[2]  # a link within the folder may be followed
    for path in (  # the same answer, whatever exists there
        *(folder.parent / "secret.mp4", folder / "../secret.mp4", folder / "link.mp4"),
        *("/etc/passwd", "/proc/self/environ", f"{folder}/%2e%2e/secret.mp4", "/nothing/here"),
        *(folder / "none.mp4", folder / "pipe.mp4", folder, f"{folder}/a%00.mp4", "/dev/zero"),
        *("otherhost" + str(folder / "clip.mp4"), "[", "x" * 4000, "/proc/self/fd/0"),
        *(f"{folder}/..%2fsecret.mp4", f"{folder}//../secret.mp4", f"{folder}/%252e%252e/a"),
    ):
        message = target.refuse(f"file://{path}", "media_refused")
        assert "no such file in the folder" in message, path
    target.refuse(f"file://{folder}/large.mp4", "media_too_large")
    for url in (
        *(f"FILE:{folder.parent}/secret.mp4", str(folder / "clip.mp4"), "concat:a|b"),
        *("ftp://a/b", "", "file:" + "/x" * 5000, "javascript:1", "gopher://a"),
    ):
        target.refuse(url, "media_refused")


def folders_exchanged_for_links(target: Target) -> None:
    """Between check and open. What lies outside is too large: that has an answer of its own."""
    inside, outside, done = target.folder / "a", target.folder.parent / "a", threading.Event()
    for place, size in ((inside, 100), (outside, 33 * MIB)):
        place.mkdir()
        with open(place / "clip.mp4", "wb") as file:
            file.truncate(size)
    (target.folder / "b").symlink_to(outside)

    def exchange() -> None:
        while not done.is_set():
            for old, new in (("a", "c"), ("b", "a"), ("a", "b"), ("c", "a")):
                os.rename(target.folder / old, target.folder / new)

    thread, codes = threading.Thread(target=exchange), Counter()
    thread.start()
    try:
        for _ in range(target.many(2000, 200)):
            error = target.ask(about(f"file://{inside}/clip.mp4"), "400", "413")["error"]
            codes[error["code"]] += 1
    finally:
        done.set()
        thread.join()
    assert codes.keys() == {"media_unreadable", "media_refused"}, codes


def hosts_that_are_not_named(target: Target) -> None:
    web, port = target.web, target.web.rpartition(":")[2]
    target.ask(about(f"http://{web}/clip.mp4"), "200")
    hosts = ["127.1", "2130706433", "0177.0.0.1", "0x7f.1", "[::1]", "[::ffff:127.0.0.1]", "0"]
    hosts += ["0.0.0.0", "localhost", "127.0.0.2", "127.0.0.1.", "①②⑦.0.0.1", "[::ffff:7f00:1]"]
    for url in (
        *(f"http://{host}:{port}/clip.mp4" for host in hosts),
        *("http://169.254.169.254/", "http://127.0.0.1/clip.mp4"),
        "http://metadata.google.internal",
        *(f"http://{web}@example.com/", f"http://a:b@{web}/clip.mp4", f"http://{web}\\@a.b/"),
        *(f"http://{web}%20.a.b/", f"http://a.b#@{web}/", f"http://{web}.a.b/", f"https://{port}/"),
        *("http://", "http://[", "http:///clip.mp4", "http://a\tb/", "http://a\r\nb/", "http:a"),
    ):
        message = target.refuse(url, "media_refused")
        assert re.search("isn't allowed on this server|not an http URL", message), (url, message)
    for place in (f"http://{web}/clip.mp4", "http://[", f"file://{target.folder}/clip.mp4"):
        url = f"http://{web}/to/{base64.b64encode(place.encode()).decode()}"
        assert "status 302" in target.refuse(url, "media_refused")
    assert "status 404" in target.refuse(f"http://{web}/none.mp4", "media_refused")
    assert "longer than 2 s" in target.refuse(f"http://{web}/slow", "media_refused")
    target.refuse(f"http://{web}/large.mp4", "media_too_large")


def requests_that_are_none(target: Target) -> None:
    for body in (b"", b"{", b"[]", b"[" * 100_000, b"null", b'{"model": "\xff"}', b'"\\ud800"'):
        target.send(post(body, KEY), "400", "413")
    request, kind = post(b"{}", KEY), b"application/json"
    for old, new, status in (
        (kind, b"text/plain", "415"),
        (kind, b"Application/JSON; charset=utf-8", "400"),
        # A page of the web that has its own name lead here can't talk to it.
        (b"Host: localhost", b"Host: evil.com", "400"),
        (b"POST", b"PUT", "405"),
        (b"/v1/chat", b"/v1/../etc", "404"),
        (b"HTTP/1.1", b"HTTP/9", "400"),
    ):
        target.send(request.replace(old, new), status)
    target.send(post(b"{", KEY, length=40 * MIB), "413")  # before the rest has come
    target.send(post(b" " * (40 * MIB), KEY), "413")  # all of it, before a look at the answer


def keys_that_are_wrong(target: Target) -> None:
    for header in ("", "Bearer ", "Bearer sesam", "sesame", "Basic sesame", "Bearer sesame2"):
        reply = target.send(post(b"{}", f"Authorization: {header}"), "401")
        assert '"code":"invalid_api_key"' in reply
    for header in (KEY, "authorization: bearer sesame"):  # RFC 9110: a scheme's case doesn't count
        target.send(post(b"{}", header), "400")
    assert "sesame" not in "".join(target.server.log)


# ---- who leaves, and the end


def hang_ups(target: Target) -> None:
    """While they send, while they wait and while they are answered: nothing stays behind."""
    server, process = target.server, psutil.Process(target.server.process.pid)
    settings = {"max_tokens": 1900, "temperature": 2.0}
    asked = (("Go on.", False), (about(target.clip), False), ("Go on.", True))
    requests = [post(conversation(it, stream=s, **settings), KEY) for it, s in asked]
    files = process.num_fds()
    for number in range(target.many(300, 30)):
        request = requests[number % 3]
        (peer,) = target.open(1, request[: -1 if number % 4 == 0 else None])
        is_answered = number % 3 == 2 and number % 4
        target.note(peer.recv(1 << 16).decode(errors="ignore") if is_answered else "")
        peer.close()
    until(lambda: server.metric("cinego_in_flight") == server.metric("cinego_batch_rows") == 0)
    until(lambda: process.num_fds() <= files + 2)
    assert [path for path in server.temporary.rglob("*") if path.is_file()] == []


def sigterm(target: Target) -> None:
    """Who talks is heard out, a half-sent body is dropped without a traceback."""
    body = conversation("Go on.", max_tokens=400, temperature=2.0, stream=True)
    streams = target.open(28, post(body, KEY))
    for stream in streams:
        assert b"200 OK" in stream.recv(15)
    halves = target.open(3, post(b'{"model": ', KEY, length=1000))
    target.server.process.send_signal(signal.SIGTERM)
    for stream in streams:
        text = read(stream)
        target.answers["200"] += 1
        assert "data: [DONE]" in text and re.search('"finish_reason": "(stop|length)"', text)
    target.expect_closed(halves, "400", "408")
    assert target.server.process.wait(60) in (0, -signal.SIGTERM)
    until(lambda: "Finished server process" in "".join(target.server.log))


ATTACKS = [
    *(nobody, paths_of_megabytes, silent_connections, dripping_headers, silence_after_an_answer),
    *(slow_bodies, large_bodies_that_stop, tiny_chunks, megabytes_of_json),
    *(clips_that_take_seconds, clips_that_cost_too_much),
    *(files_outside_of_the_open_folder, folders_exchanged_for_links, hosts_that_are_not_named),
    *(requests_that_are_none, keys_that_are_wrong, hang_ups, sigterm),  # the last one ends it
]


# ---- around them


def watch_health(port: int, pipe) -> None:
    """Sends when it asked, how long that took and the answer. In a process of its own, which waits
    for nobody but the server."""
    with suppress(BrokenPipeError):
        while True:
            asked = time.monotonic()
            try:
                with connect(port, address=OTHER) as peer:
                    peer.sendall(get("/health"))
                    answer = read(peer)
            except OSError as error:
                answer = repr(error)
            pipe.send((asked, time.monotonic() - asked, answer))
            time.sleep(0.02)


class Web(http.server.SimpleHTTPRequestHandler):
    """A host that gives out the files of a folder, sends elsewhere (to/BASE64) or is slow."""

    def do_GET(self):
        with suppress(BrokenPipeError, ConnectionResetError):  # nobody waits for all of it
            if self.path.startswith("/to/"):
                self.send_response(302)
                self.send_header("Location", base64.b64decode(self.path[4:]).decode())
                self.end_headers()
            elif self.path == "/slow":
                self.send_response(200)
                self.end_headers()
                for _ in range(40):
                    self.wfile.write(b"slow")
                    time.sleep(0.1)
            else:
                super().do_GET()

    def log_message(self, *_):
        pass


@contextmanager
def attacked_server(is_short: bool) -> Iterator[Target]:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "open")
        folder.mkdir()
        make_clip(folder / "clip.mp4", 30)
        make_clip(folder.parent / "secret.mp4", 99)
        make_clip(folder / "long.mp4", 0, (16, 16), frames=40, rate=1)
        Image.new("1", (4000, 3000)).save(folder / "wide.png")
        with open(folder / "large.mp4", "wb") as file:
            file.truncate(33 * MIB)
        (folder / "link.mp4").symlink_to(folder.parent / "secret.mp4")
        (folder / "inside.mp4").symlink_to(folder / "clip.mp4")
        os.mkfifo(folder / "pipe.mp4")
        web = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Web, directory=folder))
        threading.Thread(target=web.serve_forever, daemon=True).start()
        name = f"127.0.0.1:{web.server_port}"
        flags = ["--allowed_media_path", folder, "--allowed_media_domains", name, *FLAGS]
        parts = DEMO_MODEL, DEMO_TOWER, Path(temporary)
        server = Server(*parts, *flags, CINEGO_API_KEY="sesame")
        target = Target(server, folder, name, is_short)
        try:
            yield target
        finally:
            target.watcher.kill()
            server.stop()
            web.shutdown()
        log = "".join(server.log)
        assert not re.search("Traceback|ERROR", log), log
