"""Only our own page reaches the server: the matrix of Host, Origin, site and content type, tokens, bodies, headers."""

from __future__ import annotations

import asyncio
from itertools import product

import pytest
from studio_page import PORT, TOKEN

from undiffuse.studio import guard
from undiffuse.studio.guard import Guard, RefusedError
from undiffuse.studio.server import content_policy

OURS = [b"127.0.0.1:%d" % PORT, b"localhost:%d" % PORT]
HOSTS = [
    [host]
    for host in (
        *(b"evil.com", b"evil.com:%d" % PORT, b"127.evil.com:%d" % PORT, b"localhost.evil.com:%d" % PORT),
        *(b"127.1:%d" % PORT, b"0x7f000001:%d" % PORT, b"2130706433:%d" % PORT, b"[::ffff:127.0.0.1]:%d" % PORT),
        *(b"[::1]:%d" % PORT, b"localhost.:%d" % PORT, b"127.0.0.1.:%d" % PORT, b"127.0.0.1", b"localhost"),
        *(b"127.0.0.1:80", b"127.0.0.2:%d" % PORT, b"0.0.0.0:%d" % PORT, b"user@127.0.0.1:%d" % PORT, b""),
        *(b"LOCALHOST:%d" % PORT, b"127.0.0.1:%d " % PORT, b"127.0.0.1:%d@evil.com" % PORT, b"127.0.0.1:0%d" % PORT),
        *(b"127.0.0.1:%d,evil.com" % PORT, b"http://127.0.0.1:%d" % PORT),
    )
]
HOSTS += [[], [OURS[0], b"evil.com"], [OURS[0], OURS[0]]]
ORIGINS = [b"null", b"http://evil.com", b"https://127.0.0.1:%d" % PORT, b"http://127.0.0.1", b"http://127.0.0.1:80"]
ORIGINS += [b"http://localhost.evil.com:%d" % PORT, b"http://127.0.0.1:%d.evil.com" % PORT, b"", b"file://"]
SITES = [None, b"same-origin", b"none", b"same-site", b"cross-site"]
TYPES = [b"application/json", b"text/plain", b"application/x-www-form-urlencoded", b"multipart/form-data; boundary=x"]
ROUTES = [("GET", "/"), ("GET", "/static/app.js"), ("GET", "/api/state"), ("GET", "/api/jobs"), ("POST", "/api/jobs")]
ROUTES += [("GET", "/api/runs/0/training"), ("GET", "/api/jobs/x/events"), ("POST", "/api/jobs/x/cancel")]
ROUTES += [("GET", "/api/runs/0/pictures/0"), ("POST", "/api/images")]


def request(method="GET", path="/", hosts=(OURS[0],), origin=None, site=None, kind=None, token=TOKEN, more=()):
    headers = [(b"host", host) for host in hosts]
    headers += [(b"x-studio-token", token.encode())] if token is not None else []
    named = {b"origin": origin, b"sec-fetch-site": site, b"content-type": kind}
    headers += [(name, value) for name, value in named.items() if value is not None]
    return {"type": "http", "method": method, "path": path, "headers": [*headers, *more]}


GUARD = Guard(None, PORT, TOKEN, "")


def status(scope) -> int:
    """What the guard answers; 200 where it lets the request pass."""
    try:
        GUARD.check(scope)
    except RefusedError as refused:
        return refused.status
    return 200


def test_a_refusal_is_one_line():
    for scope in (request(hosts=[]), request(hosts=[b"evil\n"]), request(path="/api/state", token=None)):
        with pytest.raises(RefusedError, match=r"^error\[[A-Z]+\] request: [^\n]+$"):
            GUARD.check(scope)


def test_every_combination_but_ours_is_refused():
    passed = 0
    good_origins = [None, *(b"http://" + host for host in OURS)]
    requests = [(*route, kind) for route in ROUTES for kind in (TYPES if route[0] == "POST" else [None])]
    combinations = product([*([host] for host in OURS), *HOSTS], [*good_origins, *ORIGINS], SITES, requests)
    for hosts, origin, site, (method, path, kind) in combinations:
        fits_type = method == "GET" or kind == (b"image/png" if path == guard.IMAGES else b"application/json")
        ours = hosts[:1] in ([OURS[0]], [OURS[1]]) and len(hosts) == 1 and origin in (None, b"http://" + hosts[0])
        expected = ours and site in (None, b"same-origin", b"none") and fits_type
        found = status(request(method, path, hosts, origin, site, kind))
        assert (found == 200) == expected, (hosts, origin, site, kind, method, path, found)
        assert found in (200, 400, 403, 415)
        passed += expected
    assert passed == 2 * 2 * 3 * (7 + 2)


@pytest.mark.parametrize("kind", guard.IMAGE_TYPES)
def test_an_image_may_be_sent_as_an_image(kind):
    assert status(request("POST", guard.IMAGES, kind=kind.encode())) == 200


@pytest.mark.parametrize("name", sorted(guard.PROXY_HEADERS))
def test_a_request_through_a_proxy_is_refused(name):
    assert status(request(more=[(name, OURS[0])])) == 403


@pytest.mark.parametrize("token", [None, "", "the-token ", "THE-TOKEN", "the-toke", "the-token2"])
@pytest.mark.parametrize(("method", "path"), [route for route in ROUTES if route[1].startswith("/api")])
def test_everything_but_the_files_of_the_page_needs_the_token(method, path, token):
    kind = b"image/png" if path == guard.IMAGES else b"application/json"
    assert status(request(method, path, kind=kind, token=token)) == 403
    assert status(request(method, path, kind=kind)) == 200
    assert status(request(method, path, kind=kind, more=[(b"x-studio-token", TOKEN.encode())])) == 403


def test_other_methods_and_targets_are_refused():
    for method in ("PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", "PROPFIND"):
        assert status(request(method, "/api/jobs")) == 405
    assert status(request(path="http://evil.com/")) == 400
    assert status(request(path="*")) == 400


def ask(scope, messages, policy="default-src 'none'"):
    """(status, headers, the body that the application got) of one request to a guarded application."""
    sent, got = [], []

    async def app(scope, receive, send):
        got.append(await receive())
        await send({"type": "http.response.start", "status": 200, "headers": [(b"x-own", b"1")]})
        await send({"type": "http.response.body", "body": b""})

    async def receive():
        if not messages:
            await asyncio.sleep(60)
        return messages.pop(0)

    async def send(message):
        sent.append(message)

    asyncio.run(Guard(app, PORT, TOKEN, policy)(scope, receive, send))
    return sent[0]["status"], dict(sent[0]["headers"]), got[0]["body"] if got else None


def post(**more):
    return request("POST", "/api/jobs", kind=b"application/json", **more)


def part(body, more=True):
    return {"type": "http.request", "body": body, "more_body": more}


def test_a_body_arrives_whole():
    assert ask(post(), [part(b"ab"), part(b"c", False)])[::2] == (200, b"abc")
    full = b"x" * guard.MAX_JSON_BYTES
    assert ask(post(), [part(full, False)])[::2] == (200, full)


def test_a_body_beyond_the_limit_is_refused_before_it_is_read():
    limit = guard.MAX_JSON_BYTES
    declared = [(b"content-length", str(limit + 1).encode())]
    assert ask(post(more=declared), [])[0] == 413
    assert ask(post(), [part(b"x" * limit), part(b"x")])[0] == 413
    lie = [(b"content-length", b"3")]
    assert ask(post(more=lie), [part(b"x" * limit), part(b"x")])[0] == 413
    for wrong in (b"-1", b"1e3", b"", b"0x10", b"9" * 20, b"1_0"):
        assert ask(post(more=[(b"content-length", wrong)]), [])[0] == 413
    assert ask(request(more=[(b"content-length", b"1")]), [])[0] == 413
    large = request("POST", guard.IMAGES, kind=b"image/png", more=declared)
    assert ask(large, [part(b"x" * (limit + 1), False)])[0] == 200


def test_a_refused_body_is_not_kept_by_its_error():
    parts = [part(b"x" * guard.MAX_JSON_BYTES), part(b"x")]

    async def receive():
        return parts.pop(0)

    with pytest.raises(RefusedError) as caught:
        asyncio.run(GUARD._read(receive, guard.MAX_JSON_BYTES))
    kept = [entry.frame.f_locals["parts"] for entry in caught.traceback if "parts" in entry.frame.f_locals]
    assert [] in kept
    assert sum(map(len, (chunk for found in kept for chunk in found))) == 0


def test_a_body_that_does_not_arrive_is_given_up(monkeypatch):
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.05)
    assert ask(post(), [part(b"a")])[0] == 408
    assert ask(post(), [{"type": "http.disconnect"}])[0] == 400


def test_bodies_that_arrive_at_one_time_are_bounded_together(monkeypatch):
    monkeypatch.setattr(guard, "MAX_BUFFERED_BYTES", 100)
    kept, sent = Guard(None, PORT, TOKEN, ""), []

    async def send(message):
        sent.append(message)

    async def both():
        more = asyncio.Event()

        async def first():
            await more.wait()
            return part(b"", False)

        parts = [part(b"x" * 60)]

        async def receive_first():
            return parts.pop() if parts else await first()

        async def receive_second():
            return part(b"x" * 50, False)

        async def app(scope, receive, send):
            await receive()

        kept.app = app
        waiting = asyncio.create_task(kept(post(), receive_first, send))
        await asyncio.sleep(0.01)
        assert kept.buffered == 60
        await kept(post(), receive_second, send)
        assert sent[0]["status"] == 503
        more.set()
        await waiting

    asyncio.run(both())
    assert kept.buffered == 0


def test_every_answer_has_the_headers_that_keep_a_browser_safe():
    for scope in (request(), request(hosts=[b"evil.com"])):
        headers = ask(scope, [part(b"", False)])[1]
        assert headers[b"content-security-policy"] == b"default-src 'none'"
        assert headers[b"x-content-type-options"] == b"nosniff"
        assert headers[b"x-frame-options"] == b"DENY"
        assert headers[b"cache-control"] == b"no-store"
        assert not [name for name in headers if name.startswith(b"access-control")]


def test_a_websocket_is_closed():
    sent = []

    async def send(message):
        sent.append(message)

    asyncio.run(Guard(None, PORT, TOKEN, "")({"type": "websocket", "headers": []}, None, send))
    assert sent == [{"type": "websocket.close", "code": 1008}]


def test_the_policy_allows_our_files_and_the_import_map_only():
    policy = content_policy(b'<script type="importmap">{}</script>')
    parts = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert parts["script-src"] == "'self' 'sha256-RBNvo1WzZ4oRRq0W9+hknpT7T8If536DEMBg9hyq/4o='"
    assert parts["default-src"] == parts["base-uri"] == parts["frame-ancestors"] == parts["form-action"] == "'none'"
    assert "unsafe" not in policy
