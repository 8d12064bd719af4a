"""The server on a socket: what a client library would not send, stopping with a stream open."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections import Counter

import psutil
import pytest
from studio_page import page_files

from undiffuse.studio import guard
from undiffuse.studio.runs import MAX_IMAGES_BYTES, open_runs
from undiffuse.studio.server import Studio, build_server, listen


@pytest.fixture(scope="module")
def live(run_folder):
    """(port, token, studio) of a server in a thread, which stops within seconds while a stream is open."""
    studio, bound = Studio(open_runs([run_folder]), page_files()), listen(0)
    bound.listen(64)
    server, address = build_server(studio, bound)
    thread = threading.Thread(target=server.run, args=([bound],), daemon=True)
    thread.start()
    port, token = re.fullmatch(r"http://127\.0\.0\.1:(\d+)/#token=(.*)", address).groups()
    yield int(port), token, studio
    job = studio.queue.submit("endless", endless)
    with connect(int(port)) as client:
        client.sendall(head("GET", f"/api/jobs/{job.id}/events", int(port), token))
        client.recv(100)
        server.should_exit = True
        thread.join(15)
    assert not thread.is_alive()
    assert job.state == "cancelled"
    bound.close()


def endless(job):
    while True:
        time.sleep(0.005)
        job.check()


def connect(port):
    return socket.create_connection(("127.0.0.1", port), timeout=20)


def head(method, path, port, token, *more):
    lines = [f"{method} {path} HTTP/1.1", f"Host: 127.0.0.1:{port}", f"X-Studio-Token: {token}", *more]
    return "\r\n".join([*lines, "", ""]).encode()


def ask(port, content):
    """(status, the whole answer) of bytes that are sent as they are."""
    with connect(port) as client:
        client.sendall(content)
        answer = b""
        while b"\r\n\r\n" not in answer and (part := client.recv(65536)):
            answer += part
        return int(answer.split()[1]), answer


def test_requests_that_no_browser_sends(live):
    port, token, _ = live
    ours = f"Host: 127.0.0.1:{port}\r\n"
    for lines, expected in (
        (f"GET / HTTP/1.1\r\n{ours}\r\n", {200}),
        ("GET / HTTP/1.1\r\n\r\n", {400}),
        ("GET / HTTP/1.0\r\n\r\n", {400}),
        (f"GET / HTTP/1.1\r\n{ours}{ours}\r\n", {400}),
        (f"GET / HTTP/1.1\r\n{ours}Host: evil.com\r\n\r\n", {400}),
        (f"GET http://evil.com/ HTTP/1.1\r\n{ours}\r\n", {400}),
        (f"GET http://127.0.0.1:{port}/ HTTP/1.1\r\nHost: evil.com\r\n\r\n", {400, 403}),
        (f"GET /../../etc/passwd HTTP/1.1\r\n{ours}\r\n", {404}),
        (f"GET /static/..%2f..%2fserver.py HTTP/1.1\r\n{ours}\r\n", {404}),
        (f"GET /static/../server.py HTTP/1.1\r\n{ours}\r\n", {404}),
        (f"OPTIONS /api/jobs HTTP/1.1\r\n{ours}Origin: http://evil.com\r\n\r\n", {403}),
        (f"GET /api/state HTTP/1.1\r\n{ours}Upgrade: websocket\r\nConnection: Upgrade\r\n\r\n", {403}),
        (f"GET /api/state HTTP/1.1\r\n{ours}X-Studio-Token: {token}\r\n\r\n", {200}),
        ("nonsense\r\n\r\n", {400}),
    ):
        status, answer = ask(port, lines.encode())
        assert status in expected, (lines[:80], status)
        assert b"access-control" not in answer.lower()
        assert b"server:" not in answer.lower()


def test_a_chunked_body_is_cut_at_the_limit(live):
    port, token, studio = live
    content = head("POST", "/api/jobs", port, token, "Content-Type: application/json", "Transfer-Encoding: chunked")
    assert ask(port, content + b"11000\r\n" + b" " * 0x11000 + b"\r\n")[0] == 413
    assert not studio.queue.jobs()


def test_the_events_arrive_while_the_job_runs(live):
    port, token, studio = live
    gate = threading.Event()

    def work(job):
        job.emit("frame", number=1)
        assert gate.wait(20)
        return {"number": 2}

    job = studio.queue.submit("", work)
    with connect(port) as client:
        client.sendall(head("GET", f"/api/jobs/{job.id}/events", port, token))
        text = ""
        while '"frame"' not in text:
            text += client.recv(65536).decode()
        assert '"done"' not in text
        gate.set()
        while '"done"' not in text:
            text += client.recv(65536).decode()
    data = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: ")]
    assert [event.get("number") for event in data][-2:] == [1, 2]


@pytest.mark.release
def test_sixty_large_uploads_at_one_time_leave_memory_and_the_page(live):
    """Each of 60 connections sends 32 MB, as fast as it can, or stops halfway; the page is answered all the while."""
    port, token, studio = live
    content = bytes(guard.MAX_IMAGE_BYTES)
    statuses, waits, most = [], [], 0
    before = psutil.Process().memory_info().rss

    def upload(number):
        try:
            with connect(port) as client:
                length = f"Content-Length: {len(content)}"
                client.sendall(head("POST", guard.IMAGES, port, token, "Content-Type: image/png", length))
                client.sendall(memoryview(content)[: len(content) // (1 + number % 2)])
                statuses.append(int(client.recv(100).split()[1]))
        except OSError:  # refused and closed before all was sent
            statuses.append(503)

    threads = [threading.Thread(target=upload, args=(number,)) for number in range(60)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        began = time.monotonic()
        assert ask(port, head("GET", "/", port, token))[0] in (200, 503)
        waits.append(time.monotonic() - began)
        most = max(most, psutil.Process().memory_info().rss - before)
        time.sleep(0.02)
    assert len(statuses) == 60
    assert set(statuses) <= {200, 408, 503}
    assert studio.images.num_bytes <= MAX_IMAGES_BYTES
    print(f"{most / 1e6:.0f} MB more, slowest page {max(waits):.2f} s, {dict(Counter(statuses))}")
    assert most < 200e6
    assert sorted(waits)[len(waits) * 99 // 100 - 1] < 1
