"""The commands sample and advise on an untrained model: their output, how they resume, and their errors."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from undiffuse.cli.sampler_options import QUALITIES, parse_sampler, read_advice, write_advice
from undiffuse.data.sources.registry import load
from undiffuse.data.transform import Identity, IntegerLevels, Standardized
from undiffuse.errors import ConfigError
from undiffuse.evaluation.sampler_ranking import data_unit
from undiffuse.model import checkpoint
from undiffuse.model.config import ModelConfig
from undiffuse.model.diffusion import Diffusion
from undiffuse.networks.condition import Condition
from undiffuse.report import sample_folder
from undiffuse.report.figures import prompt_grid
from undiffuse.report.sample_folder import SampleFolder
from undiffuse.runtime import distributed_group
from undiffuse.sampling import sampler_search
from undiffuse.sampling.sampler import Sampler
from undiffuse.sampling.sampler_search import count_calls
from undiffuse.sampling.solvers import SOLVERS

NET = {"kind": "unet", "widths": [8], "blocks": 1, "attention": []}
CLASSES = ["circle", "square", "star"]


def model(seed=0, shape=(1, 4, 4), codec=None, **network) -> Diffusion:
    torch.manual_seed(seed)
    kind = NET if len(shape) > 1 else {"kind": "mlp", "width": 8, "depth": 1}
    codec = codec or IntegerLevels(17)
    info = {"num_values": getattr(codec, "num_values", None), "classes": CLASSES if "classes" in network else []}
    settings = {"schedule": {"name": "linear_log_snr", "high": 6.0}, "chain_length": 50}
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


def advice_of(folder):
    """What the folder's advice.json has for the weights of its model.safetensors, by calls."""
    advice = json.loads((folder / "advice.json").read_text())["advice"]
    return advice[checkpoint.fingerprint(checkpoint.load(folder))]


def manifest(folder):
    return json.loads((folder / "manifest.json").read_text())


def sampler_of(folder) -> Sampler:
    return Sampler.from_dict(manifest(folder)["sampler"])


@pytest.fixture
def few_solvers(monkeypatch):
    """few_solvers(*names) makes advise measure only those solvers."""
    return lambda *names: monkeypatch.setattr(sampler_search, "SOLVERS", {name: SOLVERS[name] for name in names})


def test_defaults(run, call):
    said = call("sample", run)
    assert (said.code, said.err) == (0, "")
    good = QUALITIES["good"]
    assert f"64 samples by {good} in {good.num_steps} steps" in said.out
    folder = run / "samples" / f"{good.solver}-{good.num_steps}-seed-0"
    assert str(folder / "grid.png") in said.out
    values, stored = array(folder), manifest(folder)
    assert (values.shape, values.dtype) == ((64, 1, 4, 4), np.uint8)
    assert len(list(folder.glob("0*.png"))) == 64
    for item in (0, 63):
        with Image.open(folder / f"{item:06d}.png") as picture:
            np.testing.assert_array_equal(np.asarray(picture), np.rint(values[item, 0] * (255 / 16)))
    assert (stored["first"], stored["n"]) == (0, 64)
    assert stored["weights"] == checkpoint.fingerprint(checkpoint.load(run))
    assert (stored["seed"], stored["model"], sampler_of(folder)) == (0, str(run), good)
    np.testing.assert_array_equal(values, model().sample(64, 0, good).numpy())


def test_options_make_the_sampler(run, call, tmp_path):
    flags = ["--n", 3, "--seed", 1, "--solver", "ddim", "--set", "eta=0.5", "--steps", 7, "--spacing", "karras"]
    said = call("sample", run / "model.safetensors", *flags)
    assert (said.code, said.err) == (0, "")
    folder = run / "samples" / "ddim-eta-0.5-7-karras-seed-1"
    sampler = Sampler("ddim", 7, "karras", {"eta": 0.5})
    np.testing.assert_array_equal(array(folder), model().sample(3, 1, sampler).numpy())
    assert sampler_of(folder) == sampler
    assert call("sample", run, *flags, "--quality", "best").code == 2
    assert call("sample", run, "--n", 2, "--quality", "draft", "--out", tmp_path / "draft").code == 0
    assert sampler_of(tmp_path / "draft") == QUALITIES["draft"]
    assert call("sample", run, "--n", 2, "--solver", "ancestral", "--out", tmp_path / "old").code == 0
    assert sampler_of(tmp_path / "old") == Sampler("ancestral", 50)  # the length of the chain
    long = call("sample", run, "--n", 2, "--solver", "ddim", "--steps", 5000, "--out", tmp_path / "long")
    assert "5,000 steps exceed the model's chain: 50 steps are used\n" in long.out
    assert "in 50 steps" in long.out
    assert "more than" not in call("sample", run, "--n", 2, "--steps", 50, "--out", tmp_path / "whole").out


def test_labels_guidance_and_thresholds(tmp_path, call):
    conditional = model(classes=3)
    checkpoint.save(conditional, tmp_path / "model.safetensors")
    flags = ["--n", 5, "--batch", 2, "--solver", "ddim", "--steps", 4, "--label", "star", "--label", 0]
    said = call("sample", tmp_path, *flags, "--guidance", 2.5, "--threshold", "dynamic")
    assert (said.code, said.err) == (0, "")
    (folder,) = (tmp_path / "samples").iterdir()
    assert folder.name == "ddim-4-star-0-guidance-2.5-threshold-dynamic-seed-0"
    cond = Condition(label=torch.tensor([2, 0, 2, 0, 2]))
    sampler = Sampler("ddim", 4, guidance=2.5, threshold="dynamic")
    np.testing.assert_array_equal(array(folder), conditional.sample(5, 0, sampler, cond).numpy())
    assert not np.array_equal(array(folder), conditional.sample(5, 0, Sampler("ddim", 4), cond).numpy())
    assert (manifest(folder)["label"], sampler_of(folder)) == (["star", "0"], sampler)
    assert call("sample", tmp_path, *flags).code == 0
    assert len(list((tmp_path / "samples").iterdir())) == 2
    said = call("sample", tmp_path, "--label", "none", "--guidance", 3)
    assert (said.code, "--guidance: it needs a condition. Give --label or --cond" in said.err) == (2, True)
    assert (
        call("sample", tmp_path, *flags, "--label", "none", "--guidance", 3).code == 0
    )  # the other labels are classes
    said = call("sample", tmp_path, "--label", "sqare")
    assert (said.code, "Did you mean square" in said.err) == (2, True)


def test_samples_of_all_labels_are_labelled_data(tmp_path, call):
    checkpoint.save(model(classes=3), tmp_path / "model.safetensors")
    flags = ["sample", tmp_path, "--solver", "ddim", "--steps", 2]
    for n in (4, 7):
        assert call(*flags, "--n", n, "--label", "all", "--out", tmp_path / "all").code == 0
        data = load(tmp_path / "all" / "samples.npz", num_values=17)
        np.testing.assert_array_equal(data.labels, [0, 1, 2, 0, 1, 2, 0][:n])
        assert (manifest(tmp_path / "all")["labels"], manifest(tmp_path / "all")["classes"]) == (CLASSES, CLASSES)
        np.testing.assert_array_equal(np.asarray(data.values), array(tmp_path / "all"))
    (tmp_path / "all" / "grid.png").unlink()
    assert "made again" in call(*flags, "--n", 7, "--label", "all", "--out", tmp_path / "all").out
    named = prompt_grid(array(tmp_path / "all"), CLASSES, 17)
    with Image.open(tmp_path / "all" / "grid.png") as grid:
        np.testing.assert_array_equal(np.asarray(grid), np.asarray(named))
    for labels, names in (([2, 0], ["star", "circle"]), (["all", "none"], [*CLASSES, "none"])):
        given = [word for label in labels for word in ("--label", label)]
        assert call(*flags, "--n", 4, *given, "--out", tmp_path / "some").code == 0
        assert manifest(tmp_path / "some")["labels"] == names
        assert load(tmp_path / "some" / "samples.npz", num_values=17).labels is None  # classes without an item


@pytest.mark.parametrize("characters", [60, 200])
def test_the_name_of_a_folder_is_short_in_every_script(tmp_path, call, characters):
    own = model(classes=3)
    own.info["classes"] = ["红" * characters, "b", "c"]
    checkpoint.save(own, tmp_path / "model.safetensors")
    said = call("sample", tmp_path, "--n", 1, "--quality", "draft", "--label", 0, "--label", "红" * characters)
    assert (said.code, said.err) == (0, "")
    (folder,) = (tmp_path / "samples").iterdir()
    assert 110 < len(folder.name.encode()) <= 120
    assert folder.name.startswith("dpm++2m_sde-10-0-红")
    assert folder.name.endswith("-seed-0")


def test_other_weights_and_precisions_have_folders_of_their_own(run, call):
    checkpoint.save(model(seed=1), run / "model-ema-0.1.safetensors")
    flags = ["--n", 1, "--solver", "ddim", "--steps", 2]
    for path, more in ((run, []), (run / "model-ema-0.1.safetensors", []), (run, ["--precision", "float32"])):
        said = call("sample", path, *flags, *more)
        assert (said.code, said.err, "starting over" in said.out) == (0, "", False)
    names = {folder.name for folder in (run / "samples").iterdir()}
    assert names == {"ddim-2-seed-0", "ddim-2-model-ema-0.1-seed-0", "ddim-2-float32-seed-0"}


def test_resume_after_an_interrupt(run, call, monkeypatch, tmp_path):
    flags = ["--n", 11, "--solver", "ancestral", "--steps", 6]
    assert call("sample", run, *flags, "--batch", 4, "--out", tmp_path / "straight").code == 0
    real, added = SampleFolder.add, []

    def add(album, first, values):
        if len(added) == 2:
            raise KeyboardInterrupt
        added.append(first)
        real(album, first, values)

    monkeypatch.setattr(SampleFolder, "add", add)
    said = call("sample", run, *flags, "--batch", 4, "--out", tmp_path / "killed")
    assert said.code == 130
    assert said.err == "stopped; everything is saved, and the same command continues from here\n"
    assert not (tmp_path / "killed" / "samples.npz").exists()
    monkeypatch.setattr(SampleFolder, "add", real)
    said = call("sample", run, *flags, "--batch", 2, "--out", tmp_path / "killed")
    assert "resuming: 8 samples in" in said.out
    np.testing.assert_array_equal(array(tmp_path / "killed"), array(tmp_path / "straight"))
    assert len(list((tmp_path / "killed").glob("0*.png"))) == 11
    said = call("sample", run, *flags, "--out", tmp_path / "killed")
    assert "these 11 samples exist already" in said.out
    assert str(tmp_path / "killed" / "grid.png") in said.out


def test_a_folder_of_other_files_is_refused(run, call, tmp_path):
    """`sample` and `restore` once removed DIR/parts/* and replaced files of the names that they use."""
    photos = tmp_path / "photos"
    (photos / "parts").mkdir(parents=True)
    names = ["000000.png", "grid.png", "manifest.json", "parts/000000000-000000001.safetensors"]
    for name in names:
        (photos / name).write_text("mine")
    said = call("sample", run, "--n", 2, "--quality", "draft", "--out", photos)
    assert (said.code, said.err.count("\n"), said.err[:11]) == (2, 1, "error[OUT] ")
    assert {str(f.relative_to(photos)): f.read_text() for f in photos.rglob("*.*")} == dict.fromkeys(names, "mine")


def test_samples_that_exist_already_are_whole(run, call, tmp_path):
    flags = ["sample", run, "--n", 4, "--quality", "draft", "--out", tmp_path / "x"]
    assert call(*flags).code == 0
    whole = {f: f.read_bytes() for f in (tmp_path / "x").iterdir()}
    (tmp_path / "x" / "000000.png").unlink()
    (tmp_path / "x" / "000001.png").write_bytes(b"")
    said = call(*flags)
    assert "made again, as they were missing or changed: 000000.png, 000001.png\n" in said.out
    assert "these 4 samples exist already" in said.out
    assert {f: f.read_bytes() for f in (tmp_path / "x").iterdir()} == whole


def test_two_samplers_in_one_folder(run, call, monkeypatch, tmp_path):
    flags = ["sample", run, "--n", 4, "--batch", 2, "--quality", "draft", "--out", tmp_path / "x", "--seed"]
    real, others = SampleFolder.add, []

    def add(album, first, values):
        real(album, first, values)
        if not others:
            others.append(None)
            others.append(call(*flags, 2))

    monkeypatch.setattr(SampleFolder, "add", add)
    assert call(*flags, 1).code == 0
    assert (others[1].code, f"process {os.getpid()} is writing samples into this folder" in others[1].err) == (6, True)
    assert manifest(tmp_path / "x")["seed"] == 1
    np.testing.assert_array_equal(array(tmp_path / "x"), model().sample(4, 1, QUALITIES["draft"]).numpy())


def test_other_weights_replace_the_samples(run, call, tmp_path):
    flags = ["sample", run, "--n", 2, "--quality", "draft", "--out", tmp_path / "x"]
    call(*flags)
    before = array(tmp_path / "x")
    checkpoint.save(model(1), run / "model.safetensors")
    said = call(*flags)
    assert "starting over" in said.out
    assert "differ in weights" in said.out
    assert not np.array_equal(array(tmp_path / "x"), before)


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_batch_does_not_change_the_samples(run, call, batch, tmp_path):
    flags = ["--n", 7, "--solver", "ancestral", "--steps", 9, "--batch", batch, "--out", tmp_path / "x"]
    assert call("sample", run, *flags).code == 0
    whole = model().sample(7, 0, Sampler("ancestral", 9))
    assert np.abs(array(tmp_path / "x").astype(int) - whole.numpy().astype(int)).max() <= 1  # ties may round either way
    assert (array(tmp_path / "x") == whole.numpy()).mean() > 0.99


def test_a_gpu_with_too_little_memory_gets_smaller_batches(run, call, monkeypatch, tmp_path):
    flags = ["--n", 9, "--solver", "ancestral", "--steps", 9, "--out"]
    assert call("sample", run, *flags, tmp_path / "x", "--batch", 2).code == 0
    trajectory, batches = Diffusion.trajectory, []

    def little_memory(self, items, *arguments):
        batches.append(len(items))
        if len(items) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return trajectory(self, items, *arguments)

    monkeypatch.setattr(Diffusion, "trajectory", little_memory)
    said = call("sample", run, *flags, tmp_path / "y", "--batch", 8)
    assert "the GPU has too little memory for batches of 8: 2 from here on" in said.out
    assert batches == [8, 4, 2, 2, 2, 2, 1]
    np.testing.assert_array_equal(array(tmp_path / "y"), array(tmp_path / "x"))


def test_processes_share_the_samples(run, call, monkeypatch, tmp_path):
    """Each process draws its own parts; here one after the other, rank 0 last because it joins the parts."""
    flags = ["--n", 9, "--solver", "ancestral", "--steps", 5, "--batch", 2, "--out"]
    assert call("sample", run, *flags, tmp_path / "one").code == 0
    added, real, opened = [], SampleFolder.add, SampleFolder.missing_items
    monkeypatch.setattr(
        SampleFolder, "add", lambda album, first, values: (added.append(first), real(album, first, values))
    )
    (tmp_path / "three" / "parts").mkdir(parents=True)
    monkeypatch.setattr(sample_folder, "check_output_folder", lambda *_: None)  # the parts come before rank 0 opens it
    monkeypatch.setattr(SampleFolder, "missing_items", lambda album, items: [range(9)] if len(added) < 5 else [])
    for rank in (2, 1, 0):
        assert not (tmp_path / "three" / "samples.npz").exists()
        group = distributed_group.ProcessGroup(rank, 3, "cpu", lambda data: [[[0, 9]]])
        monkeypatch.setattr(distributed_group, "init_process_group", lambda device, group=group: group)
        said = call("sample", run, *flags, tmp_path / "three")
        assert (said.code, said.err) == (0, "")
        assert ("9 samples by ancestral" in said.out) == (rank == 0)
        assert rank == 0 or said.out == ""
    assert opened(SampleFolder(tmp_path / "three", {}, (1, 4, 4), 17), range(9)) == [range(9)]
    assert len(added) == 5
    assert sorted(added) == [0, 2, 4, 6, 8]
    assert np.abs(array(tmp_path / "one").astype(int) - array(tmp_path / "three").astype(int)).max() <= 1
    assert {f.name for f in (tmp_path / "one").iterdir()} == {f.name for f in (tmp_path / "three").iterdir()}


@pytest.mark.release
def test_two_processes_over_gloo_draw_the_same_samples(run, call, tmp_path):
    flags = ["--n", "9", "--solver", "ancestral", "--steps", "5", "--batch", "2", "--precision", "float32"]
    assert call("sample", run, *flags, "--out", tmp_path / "one").code == 0
    own = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "undiffuse", "sample", str(run), *flags, "--out", str(tmp_path / "two")]
    processes = [
        subprocess.Popen(command, env=own | {"RANK": r, "LOCAL_RANK": r}, stdout=-1, stderr=-1) for r in ("0", "1")
    ]
    said = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert b"9 samples by ancestral" in said[0][0]
    assert said[1][0] == b""
    np.testing.assert_array_equal(array(tmp_path / "one"), array(tmp_path / "two"))
    assert {f.name for f in (tmp_path / "one").iterdir()} == {f.name for f in (tmp_path / "two").iterdir()}


def test_animation(run, call, tmp_path):
    flags = ["--n", 3, "--solver", "ddim", "--steps", 5, "--out", tmp_path / "x"]
    said = call("sample", run, *flags, "--animate", tmp_path / "way.gif")
    assert (said.code, said.err) == (0, "")
    assert f"animation: {tmp_path / 'way.gif'}" in said.out
    with Image.open(tmp_path / "way.gif") as picture, Image.open(tmp_path / "x" / "grid.png") as grid:
        assert picture.n_frames == 6
        picture.seek(5)
        np.testing.assert_array_equal(np.asarray(picture.convert("RGB")), np.asarray(grid.convert("RGB")))
    said = call("sample", run, *flags, "--animate", tmp_path / "way.png")
    assert (said.code, said.err.count("\n"), "ends in .gif" in said.err) == (2, 1, True)
    assert call("sample", run, *flags, "--animate", tmp_path / "way.gif").code == 0  # its own file
    (tmp_path / "holiday.gif").write_bytes(b"GIF89a")
    said = call("sample", run, *flags, "--animate", tmp_path / "holiday.gif")
    assert (said.code, "is not marked as a picture of undiffuse" in said.err) == (2, True)
    assert (tmp_path / "holiday.gif").read_bytes() == b"GIF89a"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--solver", "best"], "error[SOLVER] --solver best: no such solver"),
        (["--solver", "product"], "--solver product: no such solver"),  # it needs a factor: restore --method product
        (["--solver", "inversion"], "--solver inversion: no such solver"),  # its chain does not end in samples
        (["--solver", "ddim", "--set", "eta"], "--set eta: not a setting. Write name=value"),
        (["--solver", "ddim", "--set", "heat=2"], "ddim: heat = 2: there is no such setting"),
        (["--quality", "great"], "--quality great: unknown. Use one of draft, good, best"),
        (["--quality", "good", "--steps", "3"], "--quality, --steps: each determines the number of steps"),
        (["--calls", "9", "--steps", "3"], "--calls, --steps: each determines the number of steps"),
        (["--calls", "3", "--solver", "rk4", "--set", "variable=u"], "Use"),
        (["--calls", "1", "--solver", "annealed_langevin"], "a step of annealed_langevin takes 100"),
        (["--spacing", "wide"], "no such spacing of noise levels"),
        (["--label", "star"], "the model was trained without labels"),
        (["--guidance", "2"], "the model was trained without labels or other conditions"),
        (["--threshold", "soft"], "--threshold soft: unknown"),
        (
            ["--classifier-scale", "5"],
            "--classifier-scale: it has no effect without --classifier. Give both, or neither",
        ),
        (
            ["--calls", "30", "--solver", "adaptive"],
            "--calls 30: the number of calls of adaptive depends on its tolerances",
        ),
        (
            ["--solver", "ddim", "--set", "eta=NaN"],
            "ddim: eta = nan: it has to be a finite number. Its settings are eta",
        ),
        (
            ["--solver", "ancestral", "--set", "noises_per_step=0"],
            "noises_per_step = 0: there is no such setting. Its settings are variance",
        ),
    ],
)
def test_errors(run, call, flags, words):
    said = call("sample", run, *flags)
    assert (said.code, said.err.count("\n"), said.err[:6]) == (2, 1, "error["), said
    assert words in said.err


def test_a_wrong_argument_leaves_earlier_samples(run, call, tmp_path):
    flags = ["--n", 2, "--steps", 2, "--out", tmp_path / "x"]
    assert call("sample", run, *flags).code == 0
    before = sorted(f.name for f in (tmp_path / "x").iterdir())
    np.save(tmp_path / "cond.npy", np.zeros((2, 3), np.float32))
    for wrong in (["--seed", -1], ["--cond", tmp_path / "cond.npy"], ["--spacing", "karas"], ["--spacing", "leading"]):
        assert call("sample", run, *flags, *wrong).code == 2
        assert sorted(f.name for f in (tmp_path / "x").iterdir()) == before


def test_calls_without_advice(run, call, tmp_path):
    said = call("sample", run, "--n", 1, "--calls", 12, "--out", tmp_path / "x")
    assert f"yet; to measure which sampler is best: undiffuse advise {run} --calls 12\n" in said.out
    assert sampler_of(tmp_path / "x") == Sampler(QUALITIES["good"].solver, 12)
    said = call("sample", run, "--n", 1, "--calls", 12, "--solver", "heun", "--out", tmp_path / "x")
    assert "advice for this model" not in said.out
    assert sampler_of(tmp_path / "x") == Sampler("heun", 6)


def test_advise_and_sample(run, call, tmp_path, few_solvers):
    few_solvers("dpm++2m", "dpm++2m_sde", "ancestral", "unipc")
    said = call("advise", run, "--calls", 5, "--items", 8, "--fine", 12)
    assert (said.code, said.err) == (0, "")
    for words in (
        "error (levels)",
        "behind the best",
        "excluded: dpm++2m_sde, ancestral (draws noise)",
        "sample --calls",
        "over 4 items",
        "stochastic solvers were not compared: no run.json in this folder records the data; give held-out DATA",
    ):
        assert words.replace("sample --calls", "--calls 5") in said.out, said.out
    best = advice_of(run)["5"]
    sampler = Sampler.from_dict(best["sampler"])
    assert best["ranking"][0]["solver"] == str(sampler)
    assert best["ranking"][0]["error (levels)"] == best["error"]
    errors = [row["error (levels)"][0] for row in best["ranking"]]
    assert errors == sorted(errors)
    again = call("advise", run, "--calls", 5, "--items", 8, "--fine", 12)
    assert advice_of(run)["5"]["ranking"] == best["ranking"]
    assert again.code == 0
    said = call("advise", run, "--calls", 2, "--items", 8, "--fine", 12, "--json")
    printed, kept = json.loads(said.out), advice_of(run)["2"]
    assert printed["best"] == kept["sampler"]
    assert (printed["error"], printed["ranking"], printed["calls"]) == (kept["error"], kept["ranking"], 2)
    assert "stochastic solvers were not compared" in said.err
    assert set(advice_of(run)) == {"2", "5"}

    said = call("sample", run, "--n", 2, "--calls", 5, "--out", tmp_path / "x")
    assert "advice" not in said.out
    assert sampler_of(tmp_path / "x") == sampler
    np.testing.assert_array_equal(array(tmp_path / "x"), model().sample(2, 0, sampler).numpy())
    said = call("sample", run, "--n", 1, "--calls", 4, "--out", tmp_path / "y")
    assert "has no advice for 4 calls, only for 5, 2" in said.out
    checkpoint.save(model(1), run / "model.safetensors")
    said = call("sample", run, "--n", 1, "--calls", 5, "--out", tmp_path / "y")
    assert "advice.json is not used: the weights have changed since. Run advise again" in said.out
    whole = (run / "advice.json").read_text()
    for i, content in enumerate(("{}", "[" * 10**5, whole.replace('"solver": "', '"solver": "x', 1))):
        (run / "advice.json").write_text(content)
        said = call("sample", run, "--n", 1, "--calls", 5, "--out", tmp_path / f"z{i}")
        assert (said.code, "advice.json is not used: it is damaged. Run advise again" in said.out) == (0, True)


def test_advice_names_its_label(call, tmp_path, few_solvers):
    """It is measured with the labels of the items; samples with other labels or with guidance get a warning."""
    few_solvers("dpm++2m_sde", "unipc")
    checkpoint.save(model(classes=3), tmp_path / "model.safetensors")
    flags = ["--calls", 3, "--items", 9, "--fine", 8]
    said = call("advise", tmp_path, *flags, "--label", "star", "--label", 0)
    assert (said.code, said.err) == (0, "")
    assert "stochastic solvers were not compared: " in said.out  # the model has no data
    assert "--calls 3 --label star --label 0" in " ".join(said.out.split())
    stored = advice_of(tmp_path)["3"]
    assert (stored["label"], stored["items"]) == (["star", "0"], 9)
    for label, words in (
        (["--label", "star", "--label", 0], None),
        ([], "was measured for label star, 0 and without guidance; with other --label the best sampler may differ"),
        (["--label", "star", "--guidance", 2], "with other --label, --guidance the best sampler may differ"),
    ):
        said = call("sample", tmp_path, "--n", 1, "--calls", 3, *label)
        assert (said.code, said.err, "was measured for" in said.out) == (0, "", words is not None)
        assert words is None or words in said.out
    call("advise", tmp_path, *flags)
    said = call("sample", tmp_path, "--n", 1, "--calls", 3, "--label", "star")
    assert (
        "was measured without labels and without guidance; with other --label the best sampler may differ" in said.out
    )


def test_advice_by_items_with_labels(call, tmp_path, few_solvers):
    """Samples have the labels of the held-out items, or are compared with items of the labels given."""
    few_solvers("dpm++2m_sde", "unipc")
    own, random, path = model(classes=3), np.random.default_rng(0), tmp_path / "some.npz"
    own.info["classes"] = ["0", "1", "2"]
    checkpoint.save(own, tmp_path / "model.safetensors")
    np.savez(path, x=random.integers(0, 17, (150, 1, 4, 4), dtype=np.uint8), y=random.integers(3, size=150))
    flags = [path, "--num-values", 17, "--calls", 3, "--items", 9, "--fine", 8, "--samples", 20]
    said = call("advise", tmp_path, *flags)
    assert (said.code, said.err) == (0, "")
    assert "compared with held-out items with the same labels" in " ".join(said.out.split())
    assert f"next: undiffuse sample {tmp_path} --calls 3 --label all" in " ".join(said.out.split())
    stored = advice_of(tmp_path)["3"]
    assert (stored["label"], stored["conditions"]) == (["all"], "labels")
    said = call("sample", tmp_path, "--n", 1, "--calls", 3, "--label", "all")
    assert (said.code, "was measured for" in said.out) == (0, False)
    said = call("advise", tmp_path, *flags, "--label", 1)
    assert (said.code, "--calls 3 --label 1" in " ".join(said.out.split())) == (0, True)
    said = call("advise", tmp_path, *flags, "--label", "none")
    assert (said.code, "with the same labels" in said.out) == (0, False)


def test_advice_for_a_prompt_takes_no_data(run, call):
    option = ("--prompt", "a star")
    said = call("advise", run, "x.npy", *option)
    cause = "with prompts samples are not compared with data"
    assert (said.code, said.err) == (2, f"error[USAGE] x.npy: {cause}. Leave DATA and its options out.\n")
    said = call("advise", run, *option, "--size", 16)
    assert (said.code, said.err[:20]) == (2, "error[USAGE] --size:")


def test_advice_by_distance_to_held_out_data(run, call, tmp_path, few_solvers):
    few_solvers("unipc", "dpm++2m_sde", "ancestral")
    path, quick = tmp_path / "some.npy", ("--calls", 3, "--items", 8, "--fine", 12, "--samples", 40)
    np.save(path, np.random.default_rng(0).integers(0, 17, (60, 1, 4, 4), dtype=np.uint8))
    said = call("advise", run, path, "--num-values", 17, *quick)
    assert (said.code, said.err) == (0, "")
    for words in ("samples: 40 per sampler of 3 calls", "other items", "kernel", "stored in"):
        assert words in said.out
    stored = advice_of(run)["3"]
    rows, sampler = stored["scores"], Sampler.from_dict(stored["sampler"])
    assert (stored["samples"], len(rows), rows[-1]["solver"]) == (40, 5, "15 other items")
    assert (rows[0]["solver"], rows[0]["levels"]) == (str(sampler), sampler.spacing)
    distances = [row["Fréchet"][0] for row in rows[:-1]]
    assert distances == sorted(distances)
    assert rows[1]["behind the best"][0] == pytest.approx(distances[1] - distances[0])
    said = call("advise", run, path, "--num-values", 18, *quick)
    assert (said.code, said.err[:13]) == (3, "error[SHAPE] ")
    assert "with 18 possible values" in said.err
    np.save(path, np.random.default_rng(1).integers(0, 17, (19, 1, 4, 4), dtype=np.uint8))
    said = call("advise", run, path, "--num-values", 17, *quick)
    assert (said.code, said.err[:11]) == (3, "error[FEW] ")


def test_data_of_a_built_in_set_need_not_be_given(call, tmp_path, few_solvers):
    few_solvers("unipc", "dpm++2m_sde")
    own = model(0, (2,), Identity())
    own.info = {"name": "two-moons", "num_values": None}
    checkpoint.save(own, tmp_path / "model.safetensors")
    said = call("advise", tmp_path, "--calls", 2, "--items", 8, "--fine", 8, "--samples", 20)
    assert "samples: 20 per sampler" in said.out, said


def test_advice_is_stored_and_read(tmp_path):
    lines = []
    first, second = Sampler("ddim", 3, "fitted", {"eta": 0.0}, (1.0, 0.5, 0.25, 0.0)), Sampler("heun", 2, "karras")
    assert read_advice(tmp_path, "a", 3, lines.append) is None
    write_advice(tmp_path, "a", 3, first, {})
    write_advice(tmp_path, "a", 4, second, {"error": (1, 2)})
    assert read_advice(tmp_path, "a", 3, lines.append) == first
    assert read_advice(tmp_path, "a", 4, lines.append) == second
    assert len(lines) == 1
    write_advice(tmp_path, "b", 4, first, {})
    assert read_advice(tmp_path, "b", 3, lines.append) is None
    assert read_advice(tmp_path, "b", 4, lines.append) == first


def test_advice_of_each_model_in_a_folder_stays(run):
    """That of weights that no file has any more is dropped; a model without advice beside others has none yet."""
    (own, other), lines = (Sampler("ddim", 3), Sampler("heun", 2)), []
    (run / "damaged.safetensors").write_bytes(b"no model")
    checkpoint.save(model(1), run / "model-ema-0.08.safetensors")
    checkpoint.save(model(2), run / "model-ema-0.1.safetensors")
    first, second, third, later = (checkpoint.fingerprint(model(seed)) for seed in range(4))
    write_advice(run, first, 3, own, {})
    write_advice(run, second, 3, other, {})
    assert [read_advice(run, weights, 3, lines.append) for weights in (first, second)] == [own, other]
    assert lines == []
    file = run / "model-ema-0.1.safetensors"
    assert read_advice(file, third, 3, lines.append) is None
    assert lines.pop().endswith(f": undiffuse advise {file} --calls 3")
    checkpoint.save(model(3), run / "model.safetensors")
    assert read_advice(run, later, 3, lines.append) is None
    assert "the weights have changed since. Run advise again" in lines.pop()
    write_advice(run, later, 4, own, {})
    assert json.loads((run / "advice.json").read_text())["advice"].keys() == {second, later}


def test_advice_is_stored_in_a_folder_that_is_not_there(tmp_path):
    folder = tmp_path / "runs" / "me--x"
    write_advice(folder, "a", 3, Sampler("ddim", 3), {})
    assert read_advice(folder, "a", 3, print) == Sampler("ddim", 3)


def test_advice_replaces_no_file_of_the_user(tmp_path):
    """A model file may lie beside files of the user; damaged advice is kept too, as a damaged plan is."""
    (tmp_path / "advice.json").write_text('{"mine": 1}')
    write_advice(tmp_path, "a", 3, Sampler("ddim", 3), {})
    assert read_advice(tmp_path, "a", 3, print) == Sampler("ddim", 3)
    assert (tmp_path / "advice.json.damaged").read_text() == '{"mine": 1}'


def test_units_of_the_data():
    assert data_unit(model()) == (8.0, "levels")  # 17 levels on [-1, 1]
    scale, name = data_unit(model(0, (2,), Standardized((1.0, 0.0), (2.0, 8.0))))
    assert (scale, name) == (pytest.approx(4.0), "units of the data")
    assert data_unit(model(0, (2,), Identity())) == (1.0, "units of the data")


def test_every_quality_can_be_sampled():
    schedule = model().schedule
    calls = [count_calls(parse_sampler(quality), schedule) for quality in QUALITIES]
    assert calls == sorted(calls)
    assert parse_sampler() == parse_sampler("good")
    with pytest.raises(ConfigError):
        parse_sampler(settings=["unknown=1"]).build_solver()
