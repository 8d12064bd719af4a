"""The server of the page: its files, the runs, uploaded images, jobs and their events. It listens on 127.0.0.1 only."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import re
import secrets
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from undiffuse.errors import ConfigError, ResourceError, UndiffuseError
from undiffuse.sampling.sampler import Sampler
from undiffuse.sampling.solvers import SOLVERS
from undiffuse.sampling.tables import RESTORATION_METHODS, SPACINGS
from undiffuse.studio.fields import Fields
from undiffuse.studio.guard import Guard
from undiffuse.studio.jobs import Job, JobQueue
from undiffuse.studio.runs import Images, StudioRun
from undiffuse.studio.training import pictures_of, read_picture, training_state
from undiffuse.studio.views import VIEWS

STATIC = Path(__file__).parent / "static"
VENDOR = ("preact.mjs", "hooks.mjs", "htm.mjs", "htm-preact.mjs", "uPlot.esm.js", "uPlot.min.css", "LICENSES.txt")
"""Files of other projects, which `make studio` copies to ``static/vendor`` and the wheel holds."""
MEDIA_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".mjs": "text/javascript"}
MEDIA_TYPES |= {".svg": "image/svg+xml", ".txt": "text/plain"}
HEARTBEAT_SECONDS = 15.0
GRACE_SECONDS = 5.0
"""A job whose page has gone is cancelled after this time, or when another job is started."""


class Studio:
    """What the routes share: the runs, the images, the queue."""

    def __init__(self, runs: Sequence[StudioRun], files: dict[str, bytes]) -> None:
        self.runs, self.files = list(runs), files
        self.images, self.queue = Images(), JobQueue()

    def run(self, index: int) -> StudioRun:
        """Raises `ConfigError` for an index that is not there."""
        if not 0 <= index < len(self.runs):
            raise ConfigError("RUN", f"run {index}", "no such run", "Use an index of the list of runs")
        return self.runs[index]

    async def page(self, request: Request) -> Response:
        return self._file("index.html")

    async def static(self, request: Request) -> Response:
        return self._file(request.path_params["name"])

    def _file(self, name: str) -> Response:
        """A file of the page, by its exact name in the table that was read at the start."""
        if name not in self.files:
            return _error(404, ConfigError("NOT_FOUND", "request", "no such file", "Open the page itself"))
        media = MEDIA_TYPES.get(Path(name).suffix, "application/octet-stream")
        return Response(self.files[name], media_type=media)

    async def state(self, request: Request) -> Response:
        """The paths of the runs and the names that the page offers."""
        runs = [str(run.path) for run in self.runs]
        names = {"solvers": list(SOLVERS), "spacings": list(SPACINGS), "methods": list(RESTORATION_METHODS)}
        return JSONResponse({"runs": runs, **names})

    async def describe(self, request: Request) -> Response:
        """What the page shows of a run; loads its model."""
        return JSONResponse(await run_in_threadpool(self.run(request.path_params["index"]).describe))

    async def training(self, request: Request) -> Response:
        run = self.run(request.path_params["index"])
        return JSONResponse(await run_in_threadpool(training_state, run.run))

    async def picture(self, request: Request) -> Response:
        """A picture that training wrote, by its index."""
        names = await run_in_threadpool(pictures_of, self.run(request.path_params["index"]).run)
        if not 0 <= request.path_params["picture"] < len(names):
            return _error(404, ConfigError("NOT_FOUND", "picture", "no such picture", "Load the page again"))
        content = await run_in_threadpool(read_picture, names[request.path_params["picture"]])
        return Response(content, media_type="image/png")

    async def upload(self, request: Request) -> Response:
        """Keep an image; it is decoded by the job that uses it."""
        name = secrets.token_hex(8)
        self.images.add(name, await request.body())
        return JSONResponse({"image": name})

    async def submit(self, request: Request) -> Response:
        """Add a job; its fields are checked first, so that a mistake is the answer to this request."""
        body = await request.body()
        return JSONResponse({"job": (await run_in_threadpool(self._submit, body)).id})

    def _submit(self, body: bytes) -> Job:
        fields = Fields.parse(body)
        view, run = fields.choice("view", VIEWS), self.run(fields.integer("run", 0, 10_000))
        return self.queue.submit(f"{view} of {run.path.name}", VIEWS[view](run, self.images, fields))

    async def jobs(self, request: Request) -> Response:
        jobs = [{"id": job.id, "title": job.title, "state": job.state} for job in self.queue.jobs()]
        return JSONResponse({"jobs": jobs})

    async def cancel(self, request: Request) -> Response:
        job = self._job(request)
        self.queue.cancel(job)
        return JSONResponse({"state": job.state})

    async def events(self, request: Request) -> Response:
        """The events of a job as server-sent events, from the one after ``Last-Event-ID`` on."""
        job, last = self._job(request), request.headers.get("last-event-id", "")
        start = int(last) + 1 if re.fullmatch(r"\d{1,9}", last) else 0
        return StreamingResponse(self._stream(job, start), media_type="text/event-stream")

    async def _stream(self, job: Job, index: int) -> AsyncIterator[bytes]:
        loop, news = asyncio.get_running_loop(), asyncio.Event()

        def listener() -> None:
            loop.call_soon_threadsafe(news.set)

        job.listeners.add(listener)
        job.abandoned = False
        try:
            while True:
                news.clear()
                ended = job.ended  # before the events are counted: nothing follows the last one
                while index < len(job.events):
                    event = job.events[index]
                    yield f"id: {index}\nevent: {event['kind']}\ndata: {json.dumps(event)}\n\n".encode()
                    index += 1
                if ended:
                    return
                try:
                    await asyncio.wait_for(news.wait(), HEARTBEAT_SECONDS)
                except TimeoutError:
                    yield b": waiting\n\n"
        finally:
            job.listeners.discard(listener)
            job.abandoned = not job.listeners
            if not job.ended:
                loop.call_later(GRACE_SECONDS, self._cancel_abandoned, job)

    def _cancel_abandoned(self, job: Job) -> None:
        if job.abandoned:
            self.queue.cancel(job)

    def _job(self, request: Request) -> Job:
        if (job := self.queue.find(request.path_params["id"])) is None:
            raise ResourceError("NO_JOB", "job", "it is no longer known", "Start it again")
        return job


def _error(status: int, error: UndiffuseError) -> Response:
    return JSONResponse({"error": str(error)}, status)


async def _on_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, UndiffuseError)
    return _error({"NO_JOB": 404, "NOT_FOUND": 404, "BUSY": 429}.get(error.code, 400), error)


async def _on_http_error(request: Request, error: Exception) -> Response:
    status = getattr(error, "status_code", 400)
    return _error(status, ConfigError("NOT_FOUND", "request", "no such address", "Open the page itself"))


async def _on_bug(request: Request, error: Exception) -> Response:
    cause = f"{type(error).__name__} in the server"
    return _error(500, ResourceError("BUG", "studio", cause, "The terminal shows where; please report it"))


def build_app(studio: Studio, port: int, token: str) -> Guard:
    """The application behind its `Guard`."""
    routes: list[tuple[str, Callable[[Request], Awaitable[Response]], str]] = [
        ("/", studio.page, "GET"),
        ("/static/{name:path}", studio.static, "GET"),
        ("/api/state", studio.state, "GET"),
        ("/api/runs/{index:int}", studio.describe, "GET"),
        ("/api/runs/{index:int}/training", studio.training, "GET"),
        ("/api/runs/{index:int}/pictures/{picture:int}", studio.picture, "GET"),
        ("/api/images", studio.upload, "POST"),
        ("/api/jobs", studio.jobs, "GET"),
        ("/api/jobs", studio.submit, "POST"),
        ("/api/jobs/{id}/events", studio.events, "GET"),
        ("/api/jobs/{id}/cancel", studio.cancel, "POST"),
    ]
    handlers: dict[Any, Any] = {UndiffuseError: _on_error, 404: _on_http_error, 405: _on_http_error, 500: _on_bug}
    app = Starlette(
        routes=[Route(path, endpoint, methods=[method]) for path, endpoint, method in routes],
        exception_handlers=handlers,
    )
    return Guard(app, port, token, content_policy(studio.files["index.html"]))


def content_policy(page: bytes) -> str:
    """The content security policy: our own files, and the import map inside the page by its hash."""
    maps = re.findall(rb'<script type="importmap">(.*?)</script>', page, re.S)
    hashes = [f"'sha256-{base64.b64encode(hashlib.sha256(text).digest()).decode()}'" for text in maps]
    sources = {"script-src": ["'self'", *hashes], "style-src": ["'self'"], "connect-src": ["'self'"]}
    sources |= {"img-src": ["'self'", "data:", "blob:"]}
    sources |= {name: ["'none'"] for name in ("default-src", "base-uri", "form-action", "frame-ancestors")}
    return "; ".join(f"{name} {' '.join(values)}" for name, values in sources.items())


def read_files() -> dict[str, bytes]:
    """The files of the page by name. Raises `ConfigError` if those of other projects are missing."""
    missing = [name for name in VENDOR if not (STATIC / "vendor" / name).is_file()]
    if missing:
        cause = f"the page's libraries are missing ({', '.join(missing)}): this is a copy of the source"
        fix = "Run 'make studio' there, which needs Node.js and npm, or install the wheel, which holds them"
        raise ConfigError("STUDIO_FILES", STATIC / "vendor", cause, fix)
    paths = [path for path in STATIC.rglob("*") if path.is_file()]
    return {path.relative_to(STATIC).as_posix(): path.read_bytes() for path in paths}


class Server(uvicorn.Server):
    """Ends the jobs before it waits for connections, so that no stream of events keeps it from stopping."""

    def __init__(self, config: uvicorn.Config, studio: Studio) -> None:
        super().__init__(config)
        self.studio = studio

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await run_in_threadpool(self.studio.queue.close)
        await super().shutdown(sockets)


def listen(port: int) -> socket.socket:
    """A socket on 127.0.0.1, on a free port for 0. Raises `ResourceError`."""
    bound = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind(("127.0.0.1", port))
    except OSError as error:
        bound.close()
        raise ResourceError(
            "PORT", f"port = {port}", f"{error.strerror}", "Give another one, or 0 for a free one"
        ) from None
    return bound


def warm_up(run: StudioRun) -> dict[str, Any]:
    """Load the model of the first picture and call it once, so that the page need not wait for that."""
    run.model.sample(1, sampler=Sampler(num_steps=1))
    return {}


def build_server(studio: Studio, bound: socket.socket) -> tuple[Server, str]:
    """The server of ``studio`` on a socket of `listen`, and the address with its token."""
    token, port = secrets.token_urlsafe(24), bound.getsockname()[1]
    config = uvicorn.Config(
        build_app(studio, port, token),
        log_level="warning",
        access_log=False,
        lifespan="off",
        ws="none",
        http="h11",
        server_header=False,
        date_header=False,
        proxy_headers=False,
        limit_concurrency=64,
        timeout_graceful_shutdown=2,
    )
    return Server(config, studio), f"http://127.0.0.1:{port}/#token={token}"


def serve(runs: Sequence[StudioRun], port: int, announce: Callable[[str], None]) -> None:
    """Serve the page until a signal; ``announce`` gets its address when it can be opened."""
    files = read_files()
    with listen(port) as bound:
        bound.listen(64)
        studio = Studio(runs, files)
        try:
            server, address = build_server(studio, bound)
            studio.queue.submit("warm up", lambda job: warm_up(runs[0]))
            announce(address)
            server.run([bound])
        finally:
            studio.queue.close()
