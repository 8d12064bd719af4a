"""What the views compute is what the commands and the lines of Python that they show compute, to the bit."""

from __future__ import annotations

import base64
import io
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from latent_models import tiny_latent_model
from PIL import Image
from studio_page import CONFIG, PORT, TOKEN, Page, make_model, page_files

from undiffuse.cli import main
from undiffuse.data.caption_embeddings import text_rows
from undiffuse.data.from_array import from_array
from undiffuse.data.sources.registry import load
from undiffuse.data.transform import IntegerLevels
from undiffuse.model import checkpoint
from undiffuse.sampling.sampler import Sampler
from undiffuse.studio import views
from undiffuse.studio.commands import command, forward, likelihood
from undiffuse.studio.jobs import Cancelled, Job
from undiffuse.studio.pictures import decode_upload, encode, from_values
from undiffuse.studio.runs import open_runs
from undiffuse.studio.server import Studio, build_app
from undiffuse.studio.views import checked_calls
from undiffuse.training.run_folder import Run

HALF = np.tile(np.arange(8) >= 4, (8, 1))


def pixels(image):
    """(N, C, H, W) uint8 of what the page gets."""
    shape = (image["n"], image["height"], image["width"], image["channels"])
    return np.moveaxis(np.frombuffer(base64.b64decode(image["data"]), np.uint8).reshape(shape), -1, 1)


def save(path, image):
    """A PNG file as the page saves it: RGBA from a canvas."""
    grey = np.repeat(image[0][..., None], 3, -1)
    Image.fromarray(np.concatenate([grey, np.full_like(grey[..., :1], 255)], -1)).save(path)


def run_command(line, folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert main([*shlex.split(line)[1:], "--out", "out"]) == 0
    values = np.load("out/samples.npz")
    return from_values(values[values.files[0]], 17)


def of(events, kind):
    return [event for event in events if event["kind"] == kind]


@pytest.mark.parametrize(
    "panel",
    [
        {"solver": "ddim", "steps": 3},
        {"solver": "dpm++2m", "steps": 4, "spacing": "log_snr", "label": 3},
        {"solver": "heun", "steps": 2, "label": 7, "guidance": 2.5},
    ],
    ids=lambda panel: panel["solver"],
)
def test_samples_are_those_of_the_command(panel, page, tmp_path, monkeypatch):
    events = page.job("sample", n=3, seed=5, panels=[panel])
    (shown,) = of(events, "panel")
    frames = of(events, "frame")
    assert [frame["step"] for frame in frames] == list(range(panel["steps"] + 1))
    assert [frame["t"] for frame in frames] == sorted((frame["t"] for frame in frames), reverse=True)
    assert frames[-1]["x"] == frames[-1]["prediction"]
    assert frames[0]["x"] != frames[0]["prediction"]
    assert np.array_equal(pixels(frames[-1]["x"]), run_command(shown["command"], tmp_path, monkeypatch))


def test_one_seed_gives_the_same_noise_to_every_panel(page):
    solvers = [{"solver": name, "steps": 2} for name in ("ddim", "ancestral", "euler")]
    frames = of(page.job("sample", n=1, seed=1, panels=solvers), "frame")
    first = [frame for frame in frames if frame["step"] == 0]
    assert [frame["panel"] for frame in first] == [0, 1, 2]
    assert len({frame["x"]["data"] for frame in first}) == 1
    assert len({frame["prediction"]["data"] for frame in first}) == 1


def test_the_prediction_is_that_of_the_model_at_the_state_shown(page, run_folder):
    model = checkpoint.load(run_folder)
    frame = of(page.job("sample", n=2, seed=2, panels=[{"solver": "ddim", "steps": 4}]), "frame")[2]
    sampler = Sampler("ddim", 4)
    state = list(model.trajectory(range(2), 2, sampler))[2]
    with torch.no_grad():
        expected = model.sampling_denoiser(sampler)(state.x, state.level).x
    assert np.array_equal(pixels(frame["prediction"]), from_values(model.transform.to_data(expected), 17))
    assert frame["log_snr"] == pytest.approx(float(state.level.log_snr))


def test_frames_are_spread_evenly_where_there_are_many(page, monkeypatch):
    monkeypatch.setattr("undiffuse.studio.views.MAX_FRAMES", 3)
    frames = of(page.job("sample", n=1, panels=[{"solver": "ddim", "steps": 12}]), "frame")
    assert [frame["step"] for frame in frames] == [0, 4, 8, 12]


def test_an_item_is_that_of_the_data(page):
    (event,) = of(page.job("picture", source={"item": 7}), "picture")
    assert np.array_equal(pixels(event)[0], from_values(load("digits").values[7], 17))


def test_the_data_are_those_of_the_run_that_is_in_the_folder_now(tmp_path):
    """They are read once, and again when another run has taken its place."""
    folder, runs = tmp_path / "run", []
    for seed in range(2):
        array = np.random.default_rng(seed).integers(17, size=(8, 1, 8, 8), dtype=np.uint8)
        np.save(tmp_path / f"{seed}.npy", array)
        shutil.rmtree(folder, ignore_errors=True)
        Run(folder).open(CONFIG, load(str(tmp_path / f"{seed}.npy"), num_values=17))
        runs = runs or open_runs([folder])
        assert np.array_equal(runs[0].data.values, array)
        assert runs[0].data is runs[0].data


def upload(page, content):
    return page.post("/api/images", content=content, headers={"content-type": "image/png"}).json()["image"]


def test_ones_own_image_is_fitted_to_the_model(page):
    content = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(256, size=(40, 64, 3)).astype(np.uint8)).save(content, "PNG")
    (event,) = of(page.job("picture", source={"image": upload(page, content.getvalue())}), "picture")
    assert pixels(event).shape == (1, 1, 8, 8)
    assert event["changes"]


def test_the_forward_process_goes_from_the_image_to_noise(page, run_folder):
    events = page.job("forward", seed=3, source={"item": 7})
    frames, (picture,) = of(events, "frame"), of(events, "picture")
    assert np.array_equal(pixels(frames[0]["x"]), pixels(picture))
    log_snr = [frame["log_snr"] for frame in frames]
    assert log_snr == sorted(log_snr, reverse=True)
    difference = [np.abs(pixels(frame["x"]).astype(int) - pixels(picture)).mean() for frame in (frames[1], frames[-1])]
    assert difference[0] < difference[1]


def test_the_lines_of_python_compute_what_is_shown(page, tmp_path, monkeypatch, capsys):
    source = {"source": {"item": 11}}
    monkeypatch.chdir(tmp_path)
    for label in (None, 4):
        events = page.job("likelihood", seed=2, draws=6, points=5, label=label, **source)
        save("image.png", pixels(of(events, "picture")[0])[0])
        names = {}
        exec(compile(events[-1]["command"], "likelihood.py", "exec"), names)
        bound = of(events, "bound")[-1]
        assert float(names["bits"].mean()) == pytest.approx(bound["bits_per_dim"], rel=1e-6)
        assert f"at most {bound['bits_per_dim']:.3f} bits" in capsys.readouterr().out
        assert sum(bound["bits"]) == pytest.approx(bound["parts"]["diffusion"], rel=1e-6)
        assert len(bound["edges"]) == len(bound["bits"]) + 1
    events = page.job("forward", seed=2, **source)
    names = {}
    exec(compile(events[-1]["command"], "forward.py", "exec"), names)
    last = IntegerLevels(17).to_data(names["state"].x)
    assert np.array_equal(from_values(last, 17), pixels(of(events, "frame")[-1]["x"]))


def test_the_lines_of_python_have_label_and_prompt(tmp_path, monkeypatch):
    data = from_array(np.zeros((8, 1, 8, 8), np.uint8), num_values=256, name="images", layout="NCHW")
    network = {"kind": "unet", "widths": (4,), "attention": (), "classes": 3, "text": 32}
    folder = make_model(tmp_path / "model", data, network=network)
    Image.new("L", (8, 8)).save(tmp_path / "image.png")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(likelihood(folder, 1, 2, 0, 4, 1, 'it\'s a "box"'), "likelihood.py", "exec"), names)
    assert names["cond"].label.tolist() == [1, 1]
    assert torch.equal(names["cond"].text, text_rows(['it\'s a "box"'] * 2))
    assert names["bits"].shape == (2,)


def test_the_lines_of_python_of_a_latent_model_have_the_values_of_the_image(tmp_path, monkeypatch):
    """Its transform maps them to latents; the image holds them in 256 levels."""
    checkpoint.save(tiny_latent_model(), tmp_path / "model.safetensors")
    values = np.random.default_rng(0).integers(17, size=(1, 1, 8, 8), dtype=np.uint8)
    save(tmp_path / "image.png", from_values(values, 17)[0])
    monkeypatch.chdir(tmp_path)
    folder = Path("model.safetensors")
    for lines, given in ((likelihood(folder, 1, 2, 0, 4, None, ""), "bits"), (forward(folder, 1, 0, 3), "state")):
        names = {}
        exec(compile(lines, "lines.py", "exec"), names)
        assert np.array_equal(names["values"].numpy(), values)
        assert given in names


def bits(mask):
    return base64.b64encode(np.packbits(mask)).decode()


@pytest.mark.parametrize("method", ["mmps", "repaint"])
def test_inpainting_is_that_of_the_command(method, page, tmp_path, monkeypatch):
    content = {"source": {"item": 2}, "mask": bits(HALF), "n": 2, "seed": 1, "steps": 3, "method": method, "label": 2}
    events = page.job("inpaint", **content)
    (picture,), images = of(events, "picture"), pixels(events[-1]["images"])
    save(tmp_path / "image.png", pixels(picture)[0])
    save(tmp_path / "mask.png", 255 * HALF[None].astype(np.uint8))
    assert np.array_equal(images, run_command(events[-1]["command"], tmp_path, monkeypatch))
    assert np.array_equal(images[..., :4], np.repeat(pixels(picture)[..., :4], 2, 0))


def test_variants_are_those_of_the_command(page, tmp_path, monkeypatch):
    events = page.job("variants", source={"item": 2}, n=2, seed=1, steps=6, strength=0.5)
    save(tmp_path / "image.png", pixels(of(events, "picture")[0])[0])
    assert np.array_equal(pixels(events[-1]["images"]), run_command(events[-1]["command"], tmp_path, monkeypatch))


def test_interpolation_is_that_of_the_command(page, tmp_path, monkeypatch, capsys):
    events = page.job("interpolate", source={"item": 2}, other={"item": 9}, n=3, steps=2)
    for picture, name in zip(of(events, "picture"), ("image.png", "other.png"), strict=True):
        save(tmp_path / name, pixels(picture)[0])
    kept = {}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "undiffuse.report.figures.image_strip", lambda values, *_: kept.update(values=values) or _blank()
    )
    assert main([*shlex.split(events[-1]["command"])[1:], "--out", "strip.png"]) == 0
    assert np.array_equal(pixels(events[-1]["images"]), from_values(kept["values"][:, 0], 17))


def _blank():
    return Image.new("L", (1, 1))


def test_a_cancelled_job_stops_at_the_next_call(studio, page):
    id = page.submit("sample", n=1, panels=[{"solver": "ddim", "steps": 12}] * 4)
    studio.queue.cancel(studio.queue.find(id))
    assert page.events(id)[-1]["kind"] == "cancelled"
    assert not studio.runs[0].model.network._forward_pre_hooks


def test_a_cancelled_job_raises_at_the_next_network_call(run_folder):
    model, job = checkpoint.load(run_folder), Job("", lambda job: {})
    with checked_calls(model, job):
        model.sample(1, sampler=Sampler(num_steps=1))
        job.request_cancel()
        with pytest.raises(Cancelled):
            model.sample(1, sampler=Sampler(num_steps=1))
    model.sample(1, sampler=Sampler(num_steps=1))


def test_inpainting_adds_the_rounding_of_the_file_to_the_noise(page, monkeypatch):
    given = {}
    real = views.restore
    monkeypatch.setattr(views, "restore", lambda *values: given.update(floor=values[8]) or real(*values))
    page.job("inpaint", source={"item": 2}, mask=bits(HALF), n=1, steps=1)
    assert given == {"floor": 2 / 255 / 12**0.5}


@pytest.fixture
def other_page(tmp_path):
    """A page of points, of a sequence and of a consistency model of images, all without data."""
    g = np.random.default_rng(0)
    points = from_array(g.normal(size=(8, 2)).astype(np.float32), name="points")
    sequence = from_array(g.integers(5, size=(8, 1, 6)), num_values=5, name="sequence", layout="NCL")
    folders = [make_model(tmp_path / "points", points, network={"kind": "mlp", "width": 8})]
    folders += [make_model(tmp_path / "sequence", sequence, network={"kind": "unet", "widths": (4,), "attention": ()})]
    images = from_array(g.integers(256, size=(8, 1, 8, 8)), num_values=256, name="images", layout="NCHW")
    unet = {"kind": "unet", "widths": (4,), "attention": ()}
    folders += [make_model(tmp_path / "images", images, network=unet, calls=1)]
    made = Studio(open_runs(folders), page_files())
    app = build_app(made, PORT, TOKEN)
    with Page(app, base_url=f"http://127.0.0.1:{PORT}", headers={"X-Studio-Token": TOKEN}) as client:
        yield client
    made.queue.close()


def test_points_are_shown_and_other_shapes_refused(other_page):
    assert [other_page.get(f"/api/runs/{i}").json()["kind"] for i in range(2)] == ["points", "other"]
    frames = of(other_page.job("sample", n=20, panels=[{"solver": "ddim", "steps": 2}]), "frame")
    assert np.shape(frames[-1]["x"]["points"]) == (20, 2)
    content = {"view": "sample", "run": 1, "panels": [{"solver": "ddim", "steps": 2}]}
    answer = other_page.post("/api/jobs", json=content)
    assert answer.json()["error"].startswith("error[KIND] ")
    assert "undiffuse sample" in answer.json()["error"]
    for view in ("forward", "likelihood", "inpaint", "interpolate", "picture", "variants"):
        answer = other_page.post("/api/jobs", json={"view": view, "run": 0, "source": {"item": 0}})
        assert answer.json()["error"].startswith("error[NOT_IMAGES] ")
    assert other_page.get("/api/runs/0/training").json()["error"].startswith("error[NOT_FOUND] ")


def test_a_consistency_model_makes_variants_and_no_view_that_needs_means(other_page):
    content = io.BytesIO()
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(content, "PNG")
    source = {"image": upload(other_page, content.getvalue())}
    events = other_page.job("variants", run=2, source=source, n=2)
    assert pixels(events[-1]["images"]).shape == (2, 1, 8, 8)
    for view in ("forward", "likelihood", "inpaint", "interpolate"):
        answer = other_page.post("/api/jobs", json={"view": view, "run": 2, "source": source})
        assert "error[DISTILLED]" in answer.json()["error"]


def test_commands_are_quoted_for_a_shell():
    line = command("sample", Path("-my run's"), ("a b.png",), {"--prompt": "it's <b>", "--label": "-1", "--n": 2})
    assert shlex.split(line) == [
        "undiffuse",
        "sample",
        "./-my run's",
        "a b.png",
        "--prompt",
        "it's <b>",
        "--label=-1",
        "--n",
        "2",
        "--precision",
        "float32",
    ]
    assert command("restore", Path("run"), ("a.png",)) == "undiffuse restore run a.png --precision float32"
    assert command("interpolate", Path("run"), ("a.png",)) == "undiffuse interpolate run a.png"


def test_pictures_keep_their_values():
    values = np.arange(17, dtype=np.uint8).reshape(1, 1, 17)
    eight = from_values(values, 17)
    assert np.array_equal(IntegerLevels(17).to_data(IntegerLevels(256).to_model(torch.from_numpy(eight))), values)
    colours = np.arange(2 * 3 * 2 * 2, dtype=np.uint8).reshape(2, 3, 2, 2)
    assert np.array_equal(pixels(encode(colours)), colours)
    content = io.BytesIO()
    Image.fromarray(eight[0]).save(content, "PNG")
    assert np.array_equal(decode_upload(content.getvalue(), 1, (1, 17)).pixels, eight)
