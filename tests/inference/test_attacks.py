"""What an attack on the server found: nobody locks the others out, nobody reads their files.

Each of these succeeded against an earlier version. `pytest -s tests/inference/test_attacks.py`
prints the longest wait of /health during each; the assertion is looser, for busy machines.
"""

import asyncio
import json
import os
import re
import signal
import socket
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from inference.server.media import MediaSource
from inference.server.schema import APIError
from tests.clips import make_clip
from tests.inference.service import Server, about, data_url, post, until

HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
OTHER = "127.0.0.2"  # another client's address: on Linux all of 127/8 is this machine


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("media") / "open"
    folder.mkdir()
    make_clip(folder / "clip.mp4", 30)
    return folder


@pytest.fixture(scope="module")
def server(tiny_checkpoint, tiny_tower, folder, tmp_path_factory):
    server = Server(
        *(tiny_checkpoint, tiny_tower, tmp_path_factory.mktemp("server")),
        *("--allowed_media_path", folder, "--header_timeout", 3, "--media_timeout", 2),
        *("--decoders", 2, "--request_timeout", 300),
    )
    yield server
    server.stop()
    assert "Traceback" not in "".join(server.log)


@pytest.fixture
def healthy(server, request):
    """Another client asks for /health all along, and is always answered."""
    waits, failures, done = [], [], threading.Event()

    def watch() -> None:
        while not waits or not done.wait(0.05):
            begun = time.monotonic()
            try:
                reply = server.raw(HEALTH, 60, OTHER)
                failures.extend([] if '{"status":"ok"}' in reply else [reply])
            except OSError as error:
                failures.append(error)
            waits.append(time.monotonic() - begun)

    thread = threading.Thread(target=watch)
    thread.start()
    yield
    done.set()
    thread.join()
    print(f"\n{request.node.name}: {len(waits)} × /health, at most {max(waits):.2f} s")
    assert not failures and max(waits) < 10


def send(server: Server, content, address: str = "127.0.0.1") -> tuple[int, dict]:
    """Status and body of a request from this address of the machine."""
    body = {"model": "cinego", "messages": [{"role": "user", "content": content}]}
    body = json.dumps({**body, "max_tokens": 4}).encode()
    reply = server.raw(post(body), 300, address)
    return int(reply[9:12]), json.loads(reply.partition("\r\n\r\n")[2])


# ---- who locks the others out


@pytest.mark.parametrize("url", ["file://{}/" + "a/" * 1_000_000, "http://" + "a." * 1_000_000])
def test_a_path_of_megabytes(server, folder, healthy, url):
    status, reply = send(server, about(url.format(folder)))
    assert status == 400 and "characters is above" in reply["error"]["message"]


@pytest.mark.parametrize("words", [b"", b"POST /v1/chat/completions HTTP/1.1\r\nHost: "])
def test_hundreds_of_connections_that_say_nothing(server, healthy, words):
    peers = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(600)]
    for peer in peers:
        with suppress(OSError):
            peer.sendall(words)
    for address in ("127.0.0.1", OTHER):
        assert send(server, "Hello", address)[0] == 200
    for peer in peers:
        peer.settimeout(60)
        with suppress(ConnectionResetError):
            assert peer.recv(1 << 16) == b""  # closed by the server
        peer.close()


def test_a_connection_that_falls_silent_after_an_answer(server):
    with socket.create_connection(("127.0.0.1", server.port), 60) as peer:
        peer.sendall(HEALTH.replace(b"Connection: close\r\n", b""))
        while not peer.recv(1 << 16).endswith(b"}"):
            pass
        peer.sendall(b"G")  # ends uvicorn's own timeout for kept connections
        assert peer.recv(1 << 16) == b""


def bomb() -> bytes:
    """A GIF of 69 kB that takes seconds: 3,000 frames of 2,800 × 2,900, each of which draws one
    pixel."""
    screen = b"GIF89a" + struct.pack("<HHBBB", 2800, 2900, 0x80, 0, 0) + bytes(6)
    frame = b"!\xf9\x04\0\x01\0\0\0" + b"," + struct.pack("<HHHHB", 0, 0, 1, 1, 0)
    return screen + (frame + b"\x02\x02D\x01\0") * 3000 + b";"


def test_clips_that_take_seconds_to_decode(server, folder, healthy, tmp_path):
    """Each request gets --media_timeout in all, and another client's clip doesn't wait for them."""
    (tmp_path / "bomb.gif").write_bytes(bomb())
    url = data_url(tmp_path / "bomb.gif")
    with ThreadPoolExecutor(6) as pool:
        attacks = [pool.submit(send, server, about(*[url] * 8)) for _ in range(6)]
        until(lambda: server.metric("cinego_in_flight") >= 6, 60)
        for _ in range(3):
            assert send(server, about(data_url(folder / "clip.mp4")), OTHER)[0] == 200
        assert sum(attack.done() for attack in attacks) < 5
        for attack in attacks:
            status, reply = attack.result()
            assert (status, reply["error"]["code"]) == (400, "media_timeout")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("extra", b"[" + b"0, " * 10_000_000 + b"0]"),
        ("extra", b"[" + b'{"": []}, ' * 3_000_000 + b"0]"),
        ("messages", b'[{"role": "user", "content": "' + b"x" * 31_000_000 + b'"}]'),
        ("messages", b'[{"role": "user", "content": "' + b"\\\\" * 15_000_000 + b'"}]'),
    ],
    ids=["numbers", "objects", "text", "escapes"],
)
def test_megabytes_of_json(server, healthy, field, value):
    body = b'{"model": "cinego", "%s": %s}' % (field.encode(), value)
    assert server.raw(post(body), wait=300)[9:12] in ("400", "413")


# ---- who reads what isn't theirs


def test_a_folder_that_is_exchanged_for_a_link_between_check_and_open(tmp_path):
    inside, outside = tmp_path / "open/a", tmp_path / "outside"
    for folder, text in ((inside, b"ours"), (outside, b"secret")):
        folder.mkdir(parents=True)
        (folder / "clip.mp4").write_bytes(text)
    done = threading.Event()

    def exchange() -> None:
        (tmp_path / "open/link").symlink_to(outside)
        while not done.is_set():
            with suppress(OSError):
                os.rename(inside, tmp_path / "open/b")
                os.rename(tmp_path / "open/link", inside)
                os.rename(inside, tmp_path / "open/link")
                os.rename(tmp_path / "open/b", inside)

    async def read_all() -> dict[bytes, int]:
        source, found = MediaSource(1 << 20, 1, tmp_path / "open"), {}
        for _ in range(2000):
            try:
                with await source.open(f"file://{inside}/clip.mp4") as file:
                    content = file.read()
            except APIError:
                content = b"refused"
            found[content] = found.get(content, 0) + 1
        return found

    thread = threading.Thread(target=exchange)
    thread.start()
    found = asyncio.run(read_all())
    done.set()
    thread.join()
    print("\n", found)
    assert found[b"ours"] and found[b"refused"] and b"secret" not in found


# ---- the end


def test_a_body_that_is_half_sent_at_sigterm_leaves_no_traceback(
    tiny_checkpoint, tiny_tower, tmp_path
):
    flags = ("--stop_timeout", 5, "--upload_timeout", 60)
    server = Server(tiny_checkpoint, tiny_tower, tmp_path, *flags)
    with socket.create_connection(("127.0.0.1", server.port)) as peer:
        peer.sendall(post(b'{"model": ', length=1000))
        until(lambda: server.metric("cinego_in_flight") == 1)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) in (0, -signal.SIGTERM)
    until(lambda: "Finished server process" in "".join(server.log))
    assert not re.search("Traceback|ERROR", "".join(server.log))
