"""The routes: files by exact names, runs and pictures by index, mistakes as one line of JSON, abandoned jobs."""

from __future__ import annotations

import json
import sys
import threading
import time
from urllib.parse import quote

import pytest
from starlette.testclient import TestClient
from studio_page import HOSTILE, PORT, TOKEN, make_run, page_files, raw_get

from undiffuse.errors import ConfigError, ResourceError
from undiffuse.studio import server
from undiffuse.studio.runs import MAX_IMAGES, MAX_IMAGES_BYTES, Images, open_runs
from undiffuse.studio.server import Studio, build_app, listen, read_files
from undiffuse.studio.training import pictures_of, read_picture, training_state
from undiffuse.training.run_folder import Run

SECRET = "the content of a file outside"
ESCAPES = ["..", "../secret.txt", "../../secret.txt", "..%2fsecret.txt", "%2e%2e/secret.txt", "%2e%2e%2fsecret.txt"]
ESCAPES += ["..%252fsecret.txt", "%252e%252e%252fsecret.txt", "....//secret.txt", "..;/secret.txt", "..\\secret.txt"]
ESCAPES += ["..%5csecret.txt", "%2e%2e%5csecret.txt", "/secret.txt", "//secret.txt", "%2fetc%2fpasswd", "/etc/passwd"]
ESCAPES += [
    "secret.txt",
    "./secret.txt",
    "app.js/../../secret.txt",
    "app.js%00",
    "app.js%00.png",
    "%00",
    "C:\\secret.txt",
]
ESCAPES += [
    "C:/secret.txt",
    "\\\\server\\share",
    "file:///etc/passwd",
    "app.js.",
    "APP.JS",
    "app.js/",
    "vendor",
    "vendor/",
]
ESCAPES += ["．．/secret.txt", "%ef%bc%8e%ef%bc%8e/secret.txt", "‥/secret.txt", "..%c0%afsecret.txt", "~/secret.txt"]
ESCAPES += ["link.png", "..\x00", "a" * 5000, "-1", "1e9", "0x0", "１", "0;ls", "0'", "$(ls)", "`ls`", "{{7*7}}", "con"]
ESCAPES += ["..%2f" * 20 + "etc/passwd", "../" * 20 + "etc/passwd", "%2e%2e/" * 20 + "etc/passwd", ".%2e/secret.txt"]
DOTS = ("..", "%2e%2e", ".%2e", "%252e%252e", "．．", "%ef%bc%8e%ef%bc%8e", "‥", "%c0%ae%c0%ae", "..;", "....")
SLASHES = ("/", "\\", "%2f", "%5c", "%252f", "%c0%af", "//", "/./", "%00/", "∕")
ESCAPES += [
    dots.join(["", *[slash] * depth]).removeprefix(slash) + target
    for dots in DOTS
    for slash in SLASHES
    for depth, target in ((1, "secret.txt"), (12, "etc/passwd"))
]
PLACES = [
    "/static/{}",
    "/static/vendor/{}",
    "/api/jobs/{}/events",
    "/api/runs/{}",
    "/api/runs/{}/training",
    "/api/runs/0/pictures/{}",
]


@pytest.mark.parametrize("place", PLACES)
def test_no_path_leads_outside(place, studio, run_folder):
    outside = run_folder.parent / "secret.txt"
    outside.write_text(SECRET)
    link = run_folder / "pictures" / "link.png"
    if not link.is_symlink():
        link.symlink_to(outside)
    app, before = build_app(studio, PORT, TOKEN), sorted(outside.parent.rglob("*"))
    payloads = dict.fromkeys([*ESCAPES, *map(quote, ESCAPES)])
    assert len(payloads) > 250
    for payload, (status, body) in zip(payloads, raw_get(app, map(place.format, payloads)), strict=True):
        assert SECRET.encode() not in body
        assert b"root:" not in body
        assert status in (400, 404), (payload, status)
    assert sorted(outside.parent.rglob("*")) == before
    assert outside.read_text() == SECRET


def test_a_link_in_place_of_the_pictures_is_not_followed(tmp_path):
    """Before the pictures are listed, and between that and the reading, of the file and of its folder."""
    run, outside = Run(tmp_path / "run"), tmp_path / "outside"
    for folder in (run.pictures, outside):
        folder.mkdir(parents=True)
        (folder / "a.png").write_text(SECRET if folder == outside else "ours")
    (listed,) = pictures_of(run)
    assert read_picture(listed) == b"ours"
    listed.unlink()
    listed.symlink_to(outside / "a.png")
    assert pictures_of(run) == []
    with pytest.raises(ResourceError, match="UNREADABLE"):
        read_picture(listed)
    listed.unlink()
    run.pictures.rmdir()
    run.pictures.symlink_to(outside)
    assert pictures_of(run) == []
    with pytest.raises(ResourceError, match="UNREADABLE"):
        read_picture(listed)


def swap_links(run, outside, tries):
    """What is read in ``tries`` readings while a thread swaps the picture, then its folder, for a link."""
    done, found = threading.Event(), set()

    def swap():
        place, kept = run.pictures / "a.png", run.folder / "kept"
        while not done.is_set():
            for path, target in ((place, outside / "a.png"), (run.pictures, outside)):
                path.rename(kept)
                path.symlink_to(target)
                path.unlink()
                kept.rename(path)

    swapping = threading.Thread(target=swap)
    swapping.start()
    for _ in range(tries):
        try:
            found |= {read_picture(path) for path in pictures_of(run)}
        except ResourceError:
            found.add(None)
    done.set()
    swapping.join()
    return found


def test_links_that_are_swapped_in_while_pictures_are_read(tmp_path):
    run, outside = Run(tmp_path / "run"), tmp_path / "outside"
    for folder in (run.pictures, outside):
        folder.mkdir(parents=True)
        (folder / "a.png").write_text(SECRET if folder == outside else "ours")
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        found = swap_links(run, outside, 10_000)
    finally:
        sys.setswitchinterval(usual)
    assert b"ours" in found
    assert found <= {b"ours", None}


def test_hostile_names_are_never_answered_as_html(page, run_folder):
    """As a prompt, a solver, a view, a path, a job, a file and the name of a picture."""
    for name in HOSTILE:
        jobs = [{"view": name}, {"view": "sample", "run": 0, "panels": panels(solver=name)}]
        jobs += [{"view": "sample", "run": 0, "panels": panels(prompt=name)}]
        answers = [page.post("/api/jobs", json=content) for content in jobs]
        answers += [page.get(f"{place}{quote(name, safe='')}") for place in ("/", "/static/", "/api/", "/api/runs/0/")]
        answers += [page.get(f"/api/jobs/{quote(name, safe='')}/events")]
        answers += [page.post("/api/images", content=name.encode(), headers={"content-type": "image/png"})]
        for answer in answers:
            assert answer.status_code in (200, 400, 404), answer.text
            check_headers(answer, "application/json")
    picture = run_folder / "pictures" / "<img src=x onerror=alert(1)>.png"
    picture.write_text(HOSTILE[0])
    try:
        index = page.get("/api/runs/0/training").json()["pictures"].index(picture.name)
        check_headers(page.get(f"/api/runs/0/pictures/{index}"), "image/png")
    finally:
        picture.unlink()


def check_headers(answer, kind):
    assert answer.headers["content-type"] == kind
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["content-security-policy"].startswith("script-src 'self' 'sha256-")
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_pictures_are_those_of_the_training_and_no_links(page, run_folder):
    state = page.get("/api/runs/0/training").json()
    assert state["pictures"] == ["samples-00000002.png", "samples.png"]
    assert page.get("/api/runs/0/pictures/1").content == (run_folder / "pictures" / "samples.png").read_bytes()
    assert page.get("/api/runs/0/pictures/1").headers["content-type"] == "image/png"
    assert page.get("/api/runs/0/pictures/2").status_code == 404
    assert state["state"] == "finished"
    assert [record["step"] for record in state["records"]] == [2, 4]
    assert state["command"] == f"undiffuse watch {run_folder}"


def test_the_page_and_its_files(page):
    answer = page.get("/")
    assert answer.headers["content-type"].startswith("text/html")
    assert "importmap" in answer.text
    for name in ("app.js", "style.css", "vendor/preact.mjs"):
        assert page.get(f"/static/{name}").status_code == 200
    assert page.get("/static/app.js").headers["content-type"].startswith("text/javascript")
    assert TOKEN not in answer.text


def test_names_in_the_page_are_files_of_the_page():
    """Every address in the page and every import of its modules."""
    import re

    files = page_files()
    named = set(re.findall(r"/static/([\w./-]+)", files["index.html"].decode()))
    imported = {
        name
        for path, text in files.items()
        if path.endswith(".js")
        for name in re.findall(r'from "\./(.*?)"', text.decode())
    }
    assert named | imported <= files.keys()
    assert {name for name in files if name.endswith(".js") and "/" not in name} <= named | imported | {"app.js"}


def test_the_state_describes_the_runs(page, run_folder):
    state, run = page.get("/api/state").json(), page.get("/api/runs/0").json()
    assert state["runs"] == [str(run_folder)]
    assert (run["path"], run["kind"], run["shape"]) == (str(run_folder), "images", [1, 8, 8])
    assert run["classes"] == [str(i) for i in range(10)]
    assert (run["kind"], run["likelihood"], run["prompts"], run["longest"]) == ("images", True, False, 12)
    assert "ddim" in state["solvers"]
    assert "mmps" in state["methods"]


def panels(**change):
    return [{"solver": "ddim", "steps": 2, **change}]


SOURCE = {"source": {"item": 0}}
MISTAKES = [
    ("not JSON", "REQUEST"),
    ([], "REQUEST"),
    ({}, "REQUEST"),
    ({"view": "evil", "run": 0}, "REQUEST"),
    ({"view": "sample", "run": 1, "panels": panels()}, "RUN"),
    ({"view": "sample", "run": -1, "panels": panels()}, "REQUEST"),
    ({"view": "sample", "run": "0", "panels": panels()}, "REQUEST"),
    ({"view": "sample", "run": True, "panels": panels()}, "REQUEST"),
    ({"view": "sample", "run": 0}, "REQUEST"),
    ({"view": "sample", "run": 0, "panels": []}, "REQUEST"),
    ({"view": "sample", "run": 0, "panels": panels() * 5}, "REQUEST"),
    ({"view": "sample", "run": 0, "panels": [1]}, "REQUEST"),
    ({"view": "sample", "run": 0, "panels": panels(), "n": 17}, "REQUEST"),
    ({"view": "sample", "run": 0, "panels": panels(), "n": 10**30}, "REQUEST"),
    ({"view": "sample", "run": 0, "panels": panels(), "seed": -1}, "REQUEST"),
    ({"view": "sample", "run": 0, "panels": panels(), "seed": 0.5}, "REQUEST"),
    ({"view": "sample", "run": 0, "panels": panels(), "out": "/tmp/x"}, "REQUEST"),
    ({"view": "sample", "run": 0, "panels": panels(solver="rm -rf")}, "REQUEST"),
    ({"view": "sample", "run": 0, "panels": panels(solver="")}, "SOLVER"),
    ({"view": "sample", "run": 0, "panels": panels(steps=13)}, "REQUEST"),
    ({"view": "sample", "run": 0, "panels": panels(spacing="x")}, "REQUEST"),
    ({"view": "sample", "run": 0, "panels": panels(label=10)}, "REQUEST"),
    ({"view": "sample", "run": 0, "panels": panels(prompt="a cat")}, "PROMPT"),
    ({"view": "sample", "run": 0, "panels": panels(guidance=2)}, "GUIDANCE"),
    ({"view": "sample", "run": 0, "panels": panels(guidance=float("nan"), label=1)}, "REQUEST"),
    ({"view": "sample", "run": 0, "panels": panels(guidance=10**400, label=1)}, "REQUEST"),
    ({"view": "sample", "run": 0, "panels": panels(guidance=-(10**400), label=1)}, "REQUEST"),
    ({"view": "sample", "run": 0, "panels": panels(classifier="/etc/passwd")}, "REQUEST"),
    ({"view": "forward", "run": 0}, "REQUEST"),
    ({"view": "forward", "run": 0, "source": "/etc/passwd"}, "REQUEST"),
    ({"view": "variants", "run": 0, **SOURCE, "strength": 0}, "REQUEST"),
    ({"view": "likelihood", "run": 0, **SOURCE, "draws": 1}, "REQUEST"),
    ({"view": "inpaint", "run": 0, **SOURCE}, "REQUEST"),
    ({"view": "inpaint", "run": 0, **SOURCE, "mask": "AA=="}, "MASK"),
    ({"view": "inpaint", "run": 0, **SOURCE, "mask": "<svg>"}, "MASK"),
    ({"view": "inpaint", "run": 0, **SOURCE, "mask": "AAAAAAAAAAA="}, "MASK"),
    ({"view": "inpaint", "run": 0, **SOURCE, "mask": "/wAAAAAAAAA=", "method": "evil"}, "REQUEST"),
    ({"view": "interpolate", "run": 0, **SOURCE, "n": 1}, "REQUEST"),
]


@pytest.mark.parametrize(("content", "code"), MISTAKES, ids=lambda value: str(value)[:60])
def test_a_mistake_is_answered_by_one_line(content, code, page):
    body = content if isinstance(content, str) else json.dumps(content)
    answer = page.post("/api/jobs", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400, answer.text
    line = answer.json()["error"]
    assert line.startswith(f"error[{code}] "), line
    assert "\n" not in line
    assert len(line) < 600
    assert page.get("/api/jobs").json() == {"jobs": []}


def test_deep_json_is_a_mistake(page):
    answer = page.post("/api/jobs", content="[" * 30_000, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert "it is not JSON" in answer.json()["error"]


def test_many_fields_and_long_names_are_mistakes(page):
    for fields, status in (({str(i): 0 for i in range(6_000)}, 400), ({str(i): 0 for i in range(100_000)}, 413)):
        assert (
            page.post("/api/jobs", json={"view": "sample", "run": 0, "panels": panels(), **fields}).status_code
            == status
        )
    assert page.post("/api/jobs", json={"x" * 1_000_000: 0}).status_code == 413
    answer = page.post("/api/jobs", json={"view": "sample", "run": 0, "panels": panels(), "x" * 60_000: 0})
    assert answer.status_code == 400
    assert len(answer.json()["error"]) < 200
    answer = page.get("/static/app.js", headers={"Range": "bytes=" + ",".join(f"{i}-{i}" for i in range(10_000))})
    assert answer.status_code == 200
    assert answer.content == page_files()["app.js"]


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"", "EMPTY_FILE"),
        (b"<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>", "FORMAT_NOT_ALLOWED"),
        (b"<html><script>alert(1)</script>", "NOT_AN_IMAGE"),
        (b"\x89PNG\r\n\x1a\n" + b"<script>alert(1)</script>", ""),
        (b"%PDF-1.7", "FORMAT_NOT_ALLOWED"),
    ],
)
def test_an_upload_that_is_no_image_is_an_error_of_the_job(content, code, page):
    name = page.post("/api/images", content=content, headers={"content-type": "image/png"}).json()["image"]
    last = page.events(page.submit("picture", source={"image": name}))[-1]
    assert last["kind"] == "failed"
    assert last["error"].startswith(f"error[{code}" if code else "error[")
    assert "\n" not in last["error"]


def test_images_and_items_that_are_not_there(page):
    for source, code in (({"image": "../../secret"}, "NO_IMAGE"), ({"item": 5000}, "ITEM"), ({"item": -1}, "REQUEST")):
        last = page.events(page.submit("picture", source=source))[-1]
        assert (last["kind"], last["error"].split("]")[0]) == ("failed", f"error[{code}")


def test_only_the_newest_images_are_kept():
    images = Images()
    for i in range(2_000):
        images.add(str(i), b"x")
    assert images.get(str(2_000 - MAX_IMAGES)) == b"x"
    with pytest.raises(ResourceError, match="NO_IMAGE"):
        images.get(str(1_999 - MAX_IMAGES))
    images.add("large", bytes(MAX_IMAGES_BYTES))
    with pytest.raises(ResourceError, match="NO_IMAGE"):
        images.get("1999")


def test_events_continue_after_the_last_one_seen(page):
    id = page.submit("picture", source={"item": 3})
    events = page.events(id)
    assert [event["kind"] for event in events][-2:] == ["picture", "done"]
    assert page.events(id, **{"Last-Event-ID": str(len(events) - 2)}) == events[-1:]
    assert page.events(id, **{"Last-Event-ID": "nonsense"}) == events


def test_unknown_addresses_and_jobs(page):
    for answer in (page.get("/api/nothing"), page.get("/api/jobs/nothing/events"), page.get("/nothing")):
        assert answer.status_code == 404
        assert answer.json()["error"].startswith("error[")
    assert page.post("/api/jobs/nothing/cancel", json={}).status_code == 404
    assert page.post("/api/state", json={}).status_code == 405


def test_a_job_is_cancelled_by_a_request(page, studio):
    started = threading.Event()

    def work(job):
        started.set()
        while True:
            time.sleep(0.002)
            job.check()

    job = studio.queue.submit("endless", work)
    started.wait(20)
    assert page.get("/api/jobs").json()["jobs"][-1] == {"id": job.id, "title": "endless", "state": "running"}
    assert page.post(f"/api/jobs/{job.id}/cancel", json={}).status_code == 200
    assert page.events(job.id)[-1]["kind"] == "cancelled"


def test_a_job_whose_page_has_gone_is_cancelled(page, studio, monkeypatch):
    import asyncio

    monkeypatch.setattr(server, "GRACE_SECONDS", 0.01)

    def work(job):
        while True:
            time.sleep(0.002)
            job.check()

    job = studio.queue.submit("endless", work)

    async def leave():
        for _ in range(2):
            stream = studio._stream(job, 0)
            await anext(stream)
            assert not job.abandoned
            await stream.aclose()
            assert job.abandoned
        assert not job.listeners
        await asyncio.sleep(0.2)

    asyncio.run(leave())
    assert page.events(job.id)[-1]["kind"] == "cancelled"


def test_a_run_without_a_model_is_shown_with_its_error(tmp_path):
    folder = make_run(tmp_path / "young")
    (folder / "model.safetensors").unlink()
    studio = Studio(open_runs([folder]), page_files())
    headers = {"X-Studio-Token": TOKEN}
    with TestClient(build_app(studio, PORT, TOKEN), base_url=f"http://localhost:{PORT}", headers=headers) as client:
        assert client.get("/api/runs/0").json()["error"].startswith("error[NO_MODEL] ")
        answer = client.post("/api/jobs", json={"view": "sample", "run": 0, "panels": panels()})
        assert (answer.status_code, answer.json()["error"][:15]) == (400, "error[NO_MODEL]")
        assert client.get("/api/runs/0/training").json()["state"] == "finished"
        make_run(tmp_path / "other").joinpath("model.safetensors").rename(folder / "model.safetensors")
        assert "error" not in client.get("/api/runs/0").json()
    studio.queue.close()


def test_metrics_that_are_no_finite_numbers_are_null(tmp_path):
    run = Run(make_run(tmp_path / "run"))
    run.append_metrics({"step": 6, "loss": float("nan"), "gradient_norm": float("inf"), "lr": 0.5})
    records = json.loads(json.dumps(training_state(run), allow_nan=False))["records"]
    assert records[-1] == {"step": 6, "loss": None, "gradient_norm": None, "lr": 0.5}


def test_runs_that_are_not_there(tmp_path):
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(ConfigError, match="NOT_FOUND"):
            open_runs([path])


def test_missing_libraries_are_named_with_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(server, "STATIC", tmp_path)
    (tmp_path / "vendor").mkdir()
    (tmp_path / "vendor" / "preact.mjs").touch()
    with pytest.raises(ConfigError, match=r"htm\.mjs.*make studio.*Node\.js"):
        read_files()


def test_a_port_in_use_is_an_error():
    with listen(0) as bound:
        bound.listen()
        assert bound.getsockname()[0] == "127.0.0.1"
        with pytest.raises(ResourceError, match="PORT"):
            listen(bound.getsockname()[1])


def test_a_bug_of_the_server_is_one_line(studio, monkeypatch):
    monkeypatch.setattr(Studio, "run", lambda self, index: 1 / 0)
    headers = {"X-Studio-Token": TOKEN}
    app = build_app(studio, PORT, TOKEN)
    with TestClient(app, f"http://127.0.0.1:{PORT}", raise_server_exceptions=False, headers=headers) as client:
        answer = client.get("/api/runs/0/training")
    assert answer.status_code == 500
    assert answer.json()["error"].startswith("error[BUG] studio: ZeroDivisionError")
