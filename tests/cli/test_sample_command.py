"""The commands sample and advise on a model as built: what they write, how they go on, and what they refuse."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from undiffuse import advise, checkpoint
from undiffuse.advise import Choice
from undiffuse.cli import sample as sampling
from undiffuse.cli.choose import QUALITIES, choose, read_advice, unit, write_advice
from undiffuse.codec import Identity, Pixels, Standardised
from undiffuse.config import ModelConfig
from undiffuse.diffusion import Diffusion
from undiffuse.errors import ConfigError
from undiffuse.report.files import Album

NET = {"kind": "unet", "widths": [8], "blocks": 1, "attention": []}
CLASSES = ["circle", "square", "star"]


def model(seed=0, shape=(1, 4, 4), codec=None, **network) -> Diffusion:
    torch.manual_seed(seed)
    kind = NET if len(shape) > 1 else {"kind": "mlp", "width": 8, "depth": 1}
    codec = codec or Pixels(17)
    info = {"levels": getattr(codec, "levels", None), "classes": CLASSES if "classes" in network else []}
    settings = {"schedule": {"name": "linear_log_snr", "high": 6.0}, "steps": 50}
    built = Diffusion(ModelConfig(network=kind | network, **settings), shape, codec, info)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.normal_(std=0.3)
    return built.eval()


@pytest.fixture
def run(tmp_path):
    checkpoint.save(model(), tmp_path / "model.safetensors")
    return tmp_path


def array(folder):
    with np.load(folder / "samples.npz") as file:
        return file["x"]


def manifest(folder):
    return json.loads((folder / "manifest.json").read_text())


def test_what_people_get_who_ask_for_nothing(run, call):
    said = call("sample", run)
    assert (said.code, said.err) == (0, "")
    good = QUALITIES["good"]
    assert f"64 samples by {good} in {good.steps} steps" in said.out
    folder = run / "samples" / f"{good.solver}-{good.steps}-seed-0"
    assert str(folder / "grid.png") in said.out
    values, told = array(folder), manifest(folder)
    assert (values.shape, values.dtype) == ((64, 1, 4, 4), np.uint8)
    assert len(list(folder.glob("0*.png"))) == 64
    for item in (0, 63):
        with Image.open(folder / f"{item:06d}.png") as picture:
            np.testing.assert_array_equal(np.asarray(picture), np.rint(values[item, 0] * (255 / 16)))
    assert told["items"] == [*range(64)]
    assert told["weights"] == checkpoint.fingerprint(checkpoint.load(run))
    assert (told["seed"], told["solver"], told["steps"]) == (0, good.solver, good.steps)
    assert (told["spacing"], told["model"]) == (good.spacing, str(run))
    straight = model().sample(64, 0, good.solver, good.steps, spacing=good.spacing)
    np.testing.assert_array_equal(values, straight.numpy())


def test_flags_are_what_the_library_is_asked(run, call, tmp_path):
    flags = ["--n", 3, "--seed", 1, "--solver", "ddim", "--set", "eta=0.5", "--steps", 7, "--spacing", "karras"]
    said = call("sample", run / "model.safetensors", *flags)
    assert (said.code, said.err) == (0, "")
    folder = run / "samples" / "ddim-eta-0.5-7-karras-seed-1"
    own = model()
    straight = own.sample(3, 1, own.solver("ddim", eta=0.5), 7, spacing="karras")
    np.testing.assert_array_equal(array(folder), straight.numpy())
    assert manifest(folder)["settings"] == {"eta": 0.5}
    assert call("sample", run, *flags, "--quality", "best").code == 2
    assert call("sample", run, "--n", 2, "--quality", "draft", "--out", tmp_path / "draft").code == 0
    assert manifest(tmp_path / "draft")["steps"] == QUALITIES["draft"].steps
    assert call("sample", run, "--n", 2, "--solver", "ancestral", "--out", tmp_path / "old").code == 0
    assert manifest(tmp_path / "old")["steps"] == 50  # the chain has no more
    long = call("sample", run, "--n", 2, "--solver", "ddim", "--steps", 5000, "--out", tmp_path / "long")
    assert "5,000 steps are more than the chain of this model has: all its 50 are walked\n" in long.out
    assert "in 50 steps" in long.out
    assert "more than" not in call("sample", run, "--n", 2, "--steps", 50, "--out", tmp_path / "whole").out


def test_labels_guidance_and_thresholds(tmp_path, call):
    told = model(classes=3)
    checkpoint.save(told, tmp_path / "model.safetensors")
    flags = ["--n", 5, "--batch", 2, "--solver", "ddim", "--steps", 4, "--label", "star", "--label", 0]
    said = call("sample", tmp_path, *flags, "--guidance", 2.5, "--threshold", "static")
    assert (said.code, said.err) == (0, "")
    (folder,) = (tmp_path / "samples").iterdir()
    assert folder.name == "ddim-4-star-0-scale-2.5-threshold-static-seed-0"
    from undiffuse.conditioning import Condition
    from undiffuse.denoiser import Clipped
    from undiffuse.guidance import ClassifierFree

    cond = Condition(label=torch.tensor([2, 0, 2, 0, 2]))
    expected = told.sample(5, 0, "ddim", 4, cond=cond, guide=lambda d: Clipped(ClassifierFree(d, 2.5)))
    np.testing.assert_array_equal(array(folder), expected.numpy())
    assert not np.array_equal(array(folder), told.sample(5, 0, "ddim", 4, cond=cond).numpy())
    assert manifest(folder)["label"] == ["star", "0"]
    assert manifest(folder)["guidance"]["scale"] == 2.5
    assert call("sample", tmp_path, *flags).code == 0
    assert len(list((tmp_path / "samples").iterdir())) == 2
    said = call("sample", tmp_path, "--label", "none", "--guidance", 3)
    assert (said.code, "--guidance: nothing is told that it could guide to" in said.err) == (2, True)
    assert call("sample", tmp_path, *flags, "--label", "none", "--guidance", 3).code == 0  # the others are told
    said = call("sample", tmp_path, "--label", "sqare")
    assert (said.code, "Did you mean square" in said.err) == (2, True)


def test_a_killed_command_goes_on(run, call, monkeypatch, tmp_path):
    flags = ["--n", 11, "--solver", "ancestral", "--steps", 6]
    assert call("sample", run, *flags, "--batch", 4, "--out", tmp_path / "straight").code == 0
    real, added = Album.add, []

    def add(album, first, values):
        if len(added) == 2:
            raise KeyboardInterrupt
        added.append(first)
        real(album, first, values)

    monkeypatch.setattr(Album, "add", add)
    said = call("sample", run, *flags, "--batch", 4, "--out", tmp_path / "killed")
    assert said.code == 130
    assert said.err == "stopped; all is saved, and the same command goes on from here\n"
    assert not (tmp_path / "killed" / "samples.npz").exists()
    monkeypatch.setattr(Album, "add", real)
    said = call("sample", run, *flags, "--batch", 2, "--out", tmp_path / "killed")
    assert "goes on: 8 samples are kept" in said.out
    np.testing.assert_array_equal(array(tmp_path / "killed"), array(tmp_path / "straight"))
    assert len(list((tmp_path / "killed").glob("0*.png"))) == 11
    (tmp_path / "killed" / "parts").mkdir()
    said = call("sample", run, *flags, "--out", tmp_path / "killed")
    assert not (tmp_path / "killed" / "parts").exists()
    assert "these 11 samples are all there already" in said.out
    assert str(tmp_path / "killed" / "grid.png") in said.out


def test_other_weights_are_drawn_anew(run, call, tmp_path):
    flags = ["sample", run, "--n", 2, "--quality", "draft", "--out", tmp_path / "x"]
    call(*flags)
    before = array(tmp_path / "x")
    checkpoint.save(model(1), run / "model.safetensors")
    said = call(*flags)
    assert "drawn anew" in said.out
    assert "differs in weights" in said.out
    assert not np.array_equal(array(tmp_path / "x"), before)


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_the_same_noise_and_samples_in_any_batch(run, call, batch, tmp_path):
    flags = ["--n", 7, "--solver", "ancestral", "--steps", 9, "--batch", batch, "--out", tmp_path / "x"]
    assert call("sample", run, *flags).code == 0
    whole = model().sample(7, 0, "ancestral", 9)
    assert np.abs(array(tmp_path / "x").astype(int) - whole.numpy().astype(int)).max() <= 1  # a tie may round elsewhere
    assert (array(tmp_path / "x") == whole.numpy()).mean() > 0.99


def test_processes_draw_what_one_does(run, call, monkeypatch, tmp_path):
    """Each draws parts of its own: here one after the other, the first of them last, for it puts them together."""
    flags = ["--n", 9, "--solver", "ancestral", "--steps", 5, "--batch", 2, "--out"]
    assert call("sample", run, *flags, tmp_path / "one").code == 0
    (tmp_path / "three" / "parts").mkdir(parents=True)
    added, real = [], Album.add
    monkeypatch.setattr(Album, "add", lambda album, first, values: (added.append(first), real(album, first, values)))
    for rank in (2, 1, 0):
        assert not (tmp_path / "three" / "samples.npz").exists()
        monkeypatch.setattr(sampling, "join", lambda device, rank=rank: (rank, 3, device, lambda _: None))
        said = call("sample", run, *flags, tmp_path / "three")
        assert (said.code, said.err, said.out == "") == (0, "", rank > 0)
    assert len(added) == 5
    assert sorted(added) == [0, 2, 4, 6, 8]
    assert np.abs(array(tmp_path / "one").astype(int) - array(tmp_path / "three").astype(int)).max() <= 1
    assert {f.name for f in (tmp_path / "one").iterdir()} == {f.name for f in (tmp_path / "three").iterdir()}


@pytest.mark.release
def test_two_real_processes_draw_what_one_does(run, call, tmp_path):
    """Over gloo."""
    flags = ["--n", "9", "--solver", "ancestral", "--steps", "5", "--batch", "2", "--device", "cpu"]
    assert call("sample", run, *flags, "--out", tmp_path / "one").code == 0
    own = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "undiffuse", "sample", str(run), *flags, "--out", str(tmp_path / "two")]
    crew = [subprocess.Popen(command, env=own | {"RANK": r, "LOCAL_RANK": r}, stdout=-1, stderr=-1) for r in ("0", "1")]
    said = [process.communicate(timeout=120) for process in crew]
    assert [process.returncode for process in crew] == [0, 0], said
    assert b"9 samples by ancestral" in said[0][0]
    assert said[1][0] == b""
    np.testing.assert_array_equal(array(tmp_path / "one"), array(tmp_path / "two"))
    assert {f.name for f in (tmp_path / "one").iterdir()} == {f.name for f in (tmp_path / "two").iterdir()}


def test_a_moving_picture(run, call, tmp_path):
    flags = ["--n", 3, "--solver", "ddim", "--steps", 5, "--out", tmp_path / "x"]
    said = call("sample", run, *flags, "--animate", tmp_path / "way.gif")
    assert (said.code, said.err) == (0, "")
    assert f"moving: {tmp_path / 'way.gif'}" in said.out
    with Image.open(tmp_path / "way.gif") as picture, Image.open(tmp_path / "x" / "grid.png") as grid:
        assert picture.n_frames == 6
        picture.seek(5)
        np.testing.assert_array_equal(np.asarray(picture.convert("RGB")), np.asarray(grid.convert("RGB")))
    said = call("sample", run, *flags, "--animate", tmp_path / "way.png")
    assert (said.code, said.err.count("\n"), "ends in .gif" in said.err) == (2, 1, True)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--solver", "best"], "error[SOLVER] 'best': no such solver"),
        (["--solver", "ddim", "--set", "eta"], "--set eta: no setting. Write name=value"),
        (["--solver", "ddim", "--set", "heat=2"], "ddim: heat = 2: there is no such setting"),
        (["--quality", "great"], "--quality great: unknown. Use one of draft, good, best"),
        (["--quality", "good", "--steps", "3"], "--quality, --steps: each says how long the walk is"),
        (["--calls", "9", "--steps", "3"], "--calls, --steps: each says how long"),
        (["--calls", "3", "--solver", "rk4", "--set", "variable=u"], "Use"),
        (["--calls", "1", "--solver", "annealed_langevin"], "a step of annealed_langevin takes 100"),
        (["--spacing", "wide"], "no such spacing of levels"),
        (["--label", "star"], "the model was trained without labels"),
        (["--guidance", "2"], "there is nothing to be guided to"),
        (["--threshold", "soft"], "threshold 'soft': unknown"),
        (
            ["--classifier-scale", "5"],
            "--classifier-scale: it does nothing without --classifier. Give both, or neither",
        ),
        (
            ["--calls", "30", "--solver", "adaptive"],
            "--calls 30: adaptive takes as many calls as its tolerances ask for",
        ),
        (
            ["--solver", "ddim", "--set", "eta=NaN"],
            "ddim: eta = nan: it has to be a finite number. Its settings are eta",
        ),
        (
            ["--solver", "ancestral", "--set", "draws=0"],
            "draws = 0: there is no such setting. Its settings are variance",
        ),
    ],
)
def test_what_cannot_be_done(run, call, flags, words):
    said = call("sample", run, *flags)
    assert (said.code, said.err.count("\n"), said.err[:6]) == (2, 1, "error["), said
    assert words in said.err


def test_calls_without_advice(run, call, tmp_path):
    said = call("sample", run, "--n", 1, "--calls", 12, "--out", tmp_path / "x")
    assert "no advice for this model yet: 'undiffuse advise RUN --calls 12' would measure" in said.out
    good = QUALITIES["good"]
    assert (manifest(tmp_path / "x")["solver"], manifest(tmp_path / "x")["steps"]) == (good.solver, 12)
    said = call("sample", run, "--n", 1, "--calls", 12, "--solver", "heun", "--out", tmp_path / "x")
    assert "advice for this model" not in said.out
    assert (manifest(tmp_path / "x")["solver"], manifest(tmp_path / "x")["steps"]) == ("heun", 6)


def test_advise_and_use_it(run, call, tmp_path, monkeypatch):
    few = {name: advise.solvers.SOLVERS[name] for name in ("dpm++2m", "dpm++2m_sde", "ancestral", "unipc")}
    monkeypatch.setattr(advise.solvers, "SOLVERS", few)
    said = call("advise", run, "--calls", 5, "--items", 8, "--fine", 12)
    assert (said.code, said.err) == (0, "")
    for words in (
        "error (levels)",
        "behind the best",
        "left out: dpm++2m_sde, ancestral (draws noise)",
        "sample --calls",
        "of 4 items",
        "not judged: give held-out DATA beside RUN",
    ):
        assert words.replace("sample --calls", "--calls 5") in said.out, said.out
    told = json.loads((run / "advice.json").read_text())
    best = told["advice"]["5"]
    assert told["weights"] == checkpoint.fingerprint(checkpoint.load(run))
    assert best["ranking"][0]["solver"] == str(Choice(best["solver"], 1, settings=best["settings"]))
    assert best["ranking"][0]["error (levels)"] == best["error"]
    errors = [row["error (levels)"][0] for row in best["ranking"]]
    assert errors == sorted(errors)
    again = call("advise", run, "--calls", 5, "--items", 8, "--fine", 12)
    assert json.loads((run / "advice.json").read_text())["advice"]["5"]["ranking"] == best["ranking"]
    assert again.code == 0
    call("advise", run, "--calls", 2, "--items", 8, "--fine", 12)
    assert set(json.loads((run / "advice.json").read_text())["advice"]) == {"2", "5"}

    said = call("sample", run, "--n", 2, "--calls", 5, "--out", tmp_path / "x")
    told = manifest(tmp_path / "x")
    assert "advice" not in said.out
    assert {name: told[name] for name in ("solver", "settings", "steps", "times")} == {
        name: best[name] for name in ("solver", "settings", "steps", "times")
    }
    own = model()
    straight = own.sample(
        2,
        0,
        own.solver(best["solver"], **best["settings"]),
        best["steps"],
        spacing="uniform" if best["times"] else best["spacing"],
        times=best["times"],
    )
    np.testing.assert_array_equal(array(tmp_path / "x"), straight.numpy())
    said = call("sample", run, "--n", 1, "--calls", 4, "--out", tmp_path / "y")
    assert "says nothing of 4 calls, but of 5, 2" in said.out
    checkpoint.save(model(1), run / "model.safetensors")
    said = call("sample", run, "--n", 1, "--calls", 5, "--out", tmp_path / "y")
    assert "advice.json is not used: the weights have changed since. Run advise again" in said.out
    (run / "advice.json").write_text("{}")
    said = call("sample", run, "--n", 1, "--calls", 5, "--out", tmp_path / "z")
    assert "advice.json is not used: it is damaged" in said.out


def test_advice_for_a_label_says_so(call, tmp_path, monkeypatch):
    """It is measured on all items, each told its own; samples that are told or guided otherwise are told of it."""
    few = {name: advise.solvers.SOLVERS[name] for name in ("dpm++2m_sde", "unipc")}
    monkeypatch.setattr(advise.solvers, "SOLVERS", few)
    checkpoint.save(model(classes=3), tmp_path / "model.safetensors")
    flags = ["--calls", 3, "--items", 9, "--fine", 8]
    said = call("advise", tmp_path, *flags, "--label", "star", "--label", 0)
    assert (said.code, said.err) == (0, "")
    assert "not judged: that is done for samples that are told nothing" in said.out
    assert "--calls 3 --label star --label 0" in " ".join(said.out.split())
    told = json.loads((tmp_path / "advice.json").read_text())["advice"]["3"]
    assert (told["label"], told["items"]) == (["star", "0"], 9)
    for label, words in (
        (["--label", "star", "--label", 0], None),
        ([], "was measured for label star, 0, unguided: other label may want another walk"),
        (["--label", "star", "--guidance", 2], "other label, guidance may want another walk"),
    ):
        said = call("sample", tmp_path, "--n", 1, "--calls", 3, *label)
        assert (said.code, said.err, "was measured for" in said.out) == (0, "", words is not None)
        assert words is None or words in said.out
    call("advise", tmp_path, *flags)
    said = call("sample", tmp_path, "--n", 1, "--calls", 3, "--label", "star")
    assert "was measured for samples that are told nothing, unguided: other label may want another walk" in said.out


def test_advice_by_the_law_of_the_samples(run, call, tmp_path, monkeypatch):
    few = {name: advise.solvers.SOLVERS[name] for name in ("unipc", "dpm++2m_sde", "ancestral")}
    monkeypatch.setattr(advise.solvers, "SOLVERS", few)
    path, quick = tmp_path / "some.npy", ("--calls", 3, "--items", 8, "--fine", 12, "--samples", 40)
    np.save(path, np.random.default_rng(0).integers(0, 17, (60, 1, 4, 4), dtype=np.uint8))
    said = call("advise", run, path, "--levels", 17, *quick)
    assert (said.code, said.err) == (0, "")
    for words in ("the law: 40 samples of 3 calls", "training items", "kernel", "kept in"):
        assert words in said.out
    told = json.loads((run / "advice.json").read_text())["advice"]["3"]
    rows = told["laws"]
    assert (told["samples"], len(rows), rows[-1]["solver"]) == (40, 5, "training items")
    assert rows[0]["solver"] == str(Choice(told["solver"], 1, settings=told["settings"]))
    assert rows[0]["levels"] == ("fitted" if told["times"] else told["spacing"])
    apart = [row["Fréchet"][0] for row in rows[:-1]]
    assert apart == sorted(apart)
    assert rows[1]["behind the best"][0] == pytest.approx(apart[1] - apart[0])
    said = call("advise", run, path, "--levels", 18, *quick)
    assert (said.code, said.err[:13]) == (3, "error[SHAPE] ")
    assert "of 18 levels" in said.err
    np.save(path, np.random.default_rng(1).integers(0, 17, (19, 1, 4, 4), dtype=np.uint8))
    said = call("advise", run, path, "--levels", 17, *quick)
    assert (said.code, said.err[:11]) == (3, "error[FEW] ")


def test_a_built_in_set_is_judged_without_being_named(call, tmp_path, monkeypatch):
    few = {name: advise.solvers.SOLVERS[name] for name in ("unipc", "dpm++2m_sde")}
    monkeypatch.setattr(advise.solvers, "SOLVERS", few)
    own = model(0, (2,), Identity())
    own.info = {"name": "two-moons", "levels": None}
    checkpoint.save(own, tmp_path / "model.safetensors")
    said = call("advise", tmp_path, "--calls", 2, "--items", 8, "--fine", 8, "--samples", 20)
    assert "the law: 20 samples" in said.out, said


def test_advice_is_kept_as_it_was_given(tmp_path):
    said = []
    first, second = Choice("ddim", 3, "fitted", {"eta": 0.0}, (1.0, 0.5, 0.25, 0.0)), Choice("heun", 2, "karras")
    assert read_advice(tmp_path, "a", 3, said.append) is None
    write_advice(tmp_path, "a", 3, first, {})
    write_advice(tmp_path, "a", 4, second, {"error": (1, 2)})
    assert read_advice(tmp_path, "a", 3, said.append) == first
    assert read_advice(tmp_path, "a", 4, said.append) == second
    assert len(said) == 1
    write_advice(tmp_path, "b", 4, first, {})
    assert read_advice(tmp_path, "b", 3, said.append) is None
    assert read_advice(tmp_path, "b", 4, said.append) == first


def test_units_of_the_data():
    assert unit(model()) == (8.0, "levels")  # 17 levels on [-1, 1]
    scale, name = unit(model(0, (2,), Standardised((1.0, 0.0), (2.0, 8.0))))
    assert (scale, name) == (pytest.approx(4.0), "units of the data")
    assert unit(model(0, (2,), Identity())) == (1.0, "units of the data")


def test_every_quality_is_a_walk_that_can_be_made():
    own = model()
    steps = [choose(own, lambda calls: None, quality=name).calls(own.schedule) for name in QUALITIES]
    assert steps == sorted(steps)
    assert choose(own, lambda calls: None) == choose(own, lambda calls: None, "good")
    with pytest.raises(ConfigError):
        choose(own, lambda calls: None, settings=["nothing=1"])
