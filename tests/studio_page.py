"""For tests of the studio: a run of digits with an untrained model, the files of the page, a client with the token."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from urllib.parse import unquote

import torch
from PIL import Image
from starlette.testclient import TestClient

from undiffuse.data.sources.registry import load
from undiffuse.data.transform import IntegerLevels, Standardized
from undiffuse.model import checkpoint
from undiffuse.model.config import Config, ModelConfig, TrainConfig
from undiffuse.model.diffusion import Diffusion
from undiffuse.studio.server import STATIC, VENDOR
from undiffuse.training.run_folder import Run, describe

HANDLERS = ("onerror", "onload", "onclick", "onfocus", "onmouseover", "ontoggle", "onanimationstart")
HOSTILE = [
    *(
        f'<{tag} src=x {handler}="window.xss=1">'
        for tag in ("img", "video", "body", "input autofocus")
        for handler in HANDLERS
    ),
    *(f'"><svg {handler}="window.xss=1">' for handler in HANDLERS),
    *(f"<{tag}>window.xss=1</{tag}>" for tag in ("script", "SCRIPT", "svg><script", "math><script", "style><script")),
    *("javascript:window.xss=1", "data:text/html,<script>window.xss=1</script>", "';window.xss=1//", "${window.xss=1}"),
    *("</script><script>window.xss=1</script>", "<iframe srcdoc='<script>parent.xss=1</script>'>", "{{window.xss=1}}"),
    *(
        "<a href='javascript:window.xss=1'>a</a>",
        "<form action='javascript:window.xss=1'>",
        "&lt;script&gt;window.xss=1",
    ),
    *(
        "<base href='//evil.test/'>",
        "<meta http-equiv=refresh content='0;url=//evil.test'>",
        "<!--><script>window.xss=1",
    ),
]
"""Names that a page must show and not run: each would set ``window.xss``, or leave the page."""

PORT, TOKEN = 8421, "the-token"
NETWORK = {"kind": "unet", "widths": (4,), "blocks": 1, "attention": (), "classes": 10}
CONFIG = Config(
    ModelConfig(network=NETWORK, schedule={"name": "linear_log_snr", "high": 6.0}, chain_length=12),
    TrainConfig(batch=8, warmup=1, max_steps=4, precision="float32", conditional=True),
)


def make_run(folder, model=None, **info):
    """A run folder as training leaves it, without the training: random weights, two records, two pictures.

    ``model`` replaces settings of `CONFIG`, and ``info`` facts about the data in the model's file.
    """
    data, run = load("digits"), Run(folder)
    config = replace(CONFIG, model=replace(CONFIG.model, **(model or {})))
    run.open(config, data)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Diffusion(config.model, data.item_shape, IntegerLevels(17), describe(data) | info)
        for parameter in model.network.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
    checkpoint.save(model, run.model)
    run.append_metrics({"step": 2, "seconds": 1.0, "loss": 0.5})
    run.append_metrics({"step": 4, "seconds": 2.0, "bits_per_dim": 3.0})
    for name in ("samples-00000002.png", "samples.png"):
        Image.new("L", (8, 8)).save(run.pictures / name)
    run.finish()
    return folder


def make_model(folder, data, **settings):
    """A folder with the file of an untrained model of ``data``, and no run."""
    config = ModelConfig(schedule={"name": "linear_log_snr", "high": 6.0}, chain_length=6, **settings)
    transform = IntegerLevels(data.num_values) if data.num_values else Standardized((0.0, 0.0), (1.0, 1.0))
    folder.mkdir()
    checkpoint.save(Diffusion(config, data.item_shape, transform, {"name": data.name}), folder / "model.safetensors")
    return folder


def page_files():
    """The files of the page; in place of the libraries of others, which `make studio` copies, empty ones."""
    files = {path.name: path.read_bytes() for path in STATIC.glob("*.*")}
    return files | {f"vendor/{name}": b"" for name in VENDOR}


class Page(TestClient):
    """What the page does: requests with the token, jobs with their events."""

    def submit(self, view, **content):
        answer = self.post("/api/jobs", json={"view": view, "run": 0, **content})
        assert answer.status_code == 200, answer.text
        return answer.json()["job"]

    def events(self, id, **headers):
        text = self.get(f"/api/jobs/{id}/events", headers=headers).text
        lines = [line for line in text.split("\n") if line.startswith("data: ")]
        return [json.loads(line[6:]) for line in lines]

    def job(self, view, **content):
        """The events of a job that is expected to be done, without progress."""
        events = [event for event in self.events(self.submit(view, **content)) if event["kind"] != "progress"]
        assert events[-1]["kind"] == "done", events[-1]
        return events


def raw_get(app, paths):
    """[(status, body)] of a GET for each path exactly as written, which an HTTP client would tidy up."""

    async def get_all():
        return [await asyncio.wait_for(_raw_get(app, path), 20) for path in paths]

    return asyncio.run(get_all())


async def _raw_get(app, path):
    sent, host = [], f"127.0.0.1:{PORT}".encode()
    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": "GET",
        "scheme": "http",
        "query_string": b"",
        "root_path": "",
    }
    scope |= {
        "path": unquote(path),
        "raw_path": path.encode("utf-8", "surrogateescape"),
        "client": None,
        "server": None,
    }
    scope |= {"headers": [(b"host", host), (b"x-studio-token", TOKEN.encode())]}

    async def receive():
        await asyncio.sleep(60)

    async def send(message):
        sent.append(message)

    await app(scope, receive, send)
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:])
