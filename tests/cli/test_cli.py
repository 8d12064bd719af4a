"""The commands, called in this process: what they print, write and return."""

import json
import re
import signal
import subprocess
import sys
from contextlib import suppress

import numpy as np
import pytest
import torch
import typer

from undiffuse.cli import guard, main
from undiffuse.model.checkpoint import load
from undiffuse.training.monitor import Monitor
from undiffuse.training.run_folder import Run

RECIPE = """
[model]
network = {kind = "unet", widths = [8], blocks = 1, attention = []}
schedule = {name = "linear_log_snr", high = 6.0}
chain_length = 5
[train]
batch = 8
warmup = 1
precision = "float32"
held_out = 0.2
previews = 1
"""


@pytest.fixture
def refused(call):
    """A command line that ends with one line on stderr, and the line."""

    def run(code, *arguments) -> str:
        said = call(*arguments)
        assert said.code == code, said
        assert said.err.count("\n") == 1, said.err
        assert said.err.startswith("error["), said.err
        assert "Traceback" not in said.out + said.err
        return said.err

    return run


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with data, a recipe and a trained run."""
    folder = tmp_path_factory.mktemp("place")
    values = np.random.default_rng(0).integers(256, size=(40, 4, 4)).astype(np.uint8)
    np.save(folder / "data.npy", values)
    np.save(folder / "wide.npy", values.reshape(20, 4, 8))
    (folder / "recipe.toml").write_text(RECIPE)
    arguments = ["train", "data.npy", "--out", "run", "--steps", "3", "--config", "recipe.toml", "--device", "cpu"]
    at = [str(folder / a) if a in ("data.npy", "run", "recipe.toml") else a for a in arguments]
    assert main(at) == 0
    return folder


def test_train(place, call):
    run = place / "run"
    assert Run(run).finished
    assert Run(run).record["config"]["train"]["max_steps"] == 3
    assert {f.name for f in run.iterdir()} >= {"model.safetensors", "metrics.jsonl", "metrics.csv", "run.json"}
    assert {f.name for f in (run / "pictures").iterdir()} == {"samples-00000003.png", "samples.png"}
    before = (run / "model.safetensors").read_bytes()
    said = call("train", place / "data.npy", "--out", run, "--steps", 3, "--config", place / "recipe.toml")
    assert (said.code, said.err) == (0, "")
    assert "is a finished run already" in said.out
    assert call("train", place / "data.npy", "--out", run).code == 0  # with no other flag either
    assert (run / "model.safetensors").read_bytes() == before


def test_inspect(place, call):
    said = call("inspect", place / "run")
    assert (said.code, said.err) == (0, "")
    for word in ("1×4×4, 256 values", "widths=[8]", "5 steps", "steps 3", "precision float32"):
        assert word in said.out, said.out
    described = json.loads(call("inspect", place / "run", "--json").out)
    assert (described["item_shape"], described["transform"]) == ([1, 4, 4], {"kind": "integer", "num_values": 256})
    assert described["info"]["steps"] == 3


def test_check(place, call):
    said = call("check", place / "data.npy", "--out", place / "sheet.png")
    assert (said.code, said.err) == (0, "")
    for word in ("40 of 1×4×4", "integers 0 to 255", "train", "one channel added"):
        assert word in said.out, said.out
    assert (place / "sheet.png").is_file()


def test_a_stopped_run_goes_on(place, call, monkeypatch):
    arguments = ["train", place / "data.npy", "--out", place / "stopped", "--steps", 3]
    arguments += ["--config", place / "recipe.toml", "--device", "cpu"]
    real = Monitor.record_step

    def step(watch, *numbers):
        real(watch, *numbers)
        if watch.progress.step == 1:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Monitor, "record_step", step)
    said = call(*arguments)
    assert said.code == 143
    assert said.err == "stopped; everything is saved, and the same command continues from here\n"
    monkeypatch.setattr(Monitor, "record_step", real)
    said = call(*arguments)
    assert said.code == 0
    assert "training resumes" in said.out
    ours, straight = load(place / "stopped"), load(place / "run")
    for name, tensor in straight.network.state_dict().items():
        assert (ours.network.state_dict()[name] == tensor).all()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trian"], "error[USAGE] undiffuse: No such command 'trian'"),
        (["train"], "error[USAGE] undiffuse train: Missing argument 'DATA'"),
        (["sample"], "error[USAGE] undiffuse sample: Missing argument 'RUN'"),
        (["train", "DATA", "--bacth", "3"], "No such option"),
        (["train", "DATA", "--steps", "many"], "Invalid value for '--steps'"),
        (["train", "DATA", "--steps", "0"], "--steps 0: must be above 0"),
        (["train", "DATA", "--minutes", "nan"], "--minutes nan"),
        (["train", "DATA", "--minutes", "inf"], "--minutes inf"),
        (["train", "DATA", "--seed", "-1"], "--seed -1"),
        (["train", "DATA", "--minutes", "1", "--steps", "3"], "each determines the length of the run"),
        (["train", "DATA", "--preset", "best"], "error[PRESET] --preset best: no such preset"),
        (["train", "DATA", "--steps", "1", "--preset", "vector"], "does not take items of shape (1, 4, 4)"),
        (["train", "DATA", "--steps", "1", "--preset", "volume"], "model.network.dims = 3"),
        (["train", "DATA", "--device", "tpu"], "error[DEVICE] --device tpu: torch has no such device"),
        (["train", "DATA", "--config", "none.toml"], "none.toml: cannot be read as a recipe"),
        (["train", "DATA", "--layout", "HWN"], "error[OPTION] --layout"),
        (["train", "DATA", "--size", "3"], "error[OPTION] --size: an array file does not take this option"),
        (["train", "two-mons"], "Did you mean two-moons?"),
        (["train", "two-moons", "--steps", "1", "--preset", "gpu"], "does not take items of shape (2,)"),
        (["train", "nowhere/none"], "nowhere/none: no such file or folder"),
        (["check", "none.npy"], "none.npy: no such file or folder"),
        (["check", "digitz"], "Did you mean digits?"),
        (["sample", "RUN", "--n", "0"], "Invalid value for '--n'"),
        (
            ["sample", "RUN", "--solver", "best"],
            "error[SOLVER] --solver best: no such solver. Use one of ancestral, ddim",
        ),
        (["evaluate", "RUN", "DATA", "--part", "best"], "error[PART] --part best: no such part"),
        (["evaluate", "RUN", "DATA", "--estimate", "openai"], "Use one of discrete, continuous, ode"),
        (["evaluate", "RUN", "DATA", "--compat", "best"], "error[COMPAT] --compat best: no such script"),
        (["evaluate", "RUN", "DATA", "--minutes", "nan"], "error[MINUTES] --minutes nan: not a duration"),
        (["evaluate", "RUN", "DATA", "--items", "1"], "Invalid value for '--items'"),
        (["train", "DATA", "--out", "SOMEBODY"], "is neither empty nor a run"),
    ],
)
def test_usage_errors(place, refused, arguments, words, monkeypatch):
    monkeypatch.chdir(place)  # whatever is written by mistake is written here
    (place / "somebody").mkdir(exist_ok=True)
    (place / "somebody" / "thesis.tex").touch()
    names = {"DATA": place / "data.npy", "RUN": place / "run", "SOMEBODY": place / "somebody"}
    line = refused(2, *(names.get(a, a) for a in arguments))
    assert words in line
    assert not (place / "runs").exists()


def test_the_help_of_train_lists_schedules_and_networks(capsys):
    from undiffuse.networks.registry import BUILT_IN
    from undiffuse.process.schedule import SCHEDULES

    with suppress(SystemExit):
        main(["train", "--help"])
    text = re.sub(r"(?<=\w-)\s+", "", capsys.readouterr().out)  # a name may be broken after its hyphen
    words = set(re.findall(r"\w[\w-]*", text))
    assert {*SCHEDULES, *dict(BUILT_IN)} <= words


def test_no_gpu(place, refused):
    assert "torch finds no such device" in refused(2, "train", place / "data.npy", "--device", "cuda:99")


def test_data_errors(place, refused, tmp_path):
    (tmp_path / "empty").mkdir()
    refused(3, "train", tmp_path / "empty")
    refused(3, "check", tmp_path / "empty")
    (tmp_path / "bad.npy").write_bytes(b"\x93NUMPY")
    refused(3, "train", tmp_path / "bad.npy")
    line = refused(3, "evaluate", place / "run", place / "wide.npy")
    assert "1×4×8 with 256 possible values, those of the model 1×4×4 with 256 possible values" in line
    assert "17" in refused(3, "evaluate", place / "run", "digits")


def test_checkpoint_errors(place, refused, tmp_path):
    for command in ("sample", "inspect"):
        assert "no such file" in refused(4, command, tmp_path / "none")
        assert "no model.safetensors" in refused(4, command, tmp_path)
    (tmp_path / "model.safetensors").write_bytes((place / "run" / "model.safetensors").read_bytes()[:-9])
    assert "error[DAMAGED]" in refused(4, "evaluate", tmp_path, place / "data.npy")
    arguments = ["--out", tmp_path / "new", "--steps", 1, "--config", place / "recipe.toml"]
    assert "no such file" in refused(4, "train", place / "data.npy", "--init", tmp_path / "none", *arguments)
    (tmp_path / "run.json").write_text("{")
    assert "not the record of a run" in refused(4, "train", place / "data.npy", "--out", tmp_path)


def test_other_errors(place, call, monkeypatch):
    def fails(error):
        def raise_it(*_, **__):
            raise error

        monkeypatch.setattr("undiffuse.model.checkpoint.load", raise_it)
        return call("inspect", place / "run")

    said = fails(OSError(28, "No space left on device", "run/file"))
    assert (said.code, said.err) == (
        6,
        "error[SYSTEM] run/file: No space left on device. Free some space.\n",
    )
    full = [MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")]
    with pytest.raises(RuntimeError, match="can't allocate memory") as caught:
        torch.empty(10**15)
    for error in [*full, caught.value]:
        said = fails(error)
        assert (said.code, said.err.startswith("error[MEMORY]")) == (6, True)
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        fails(RuntimeError("a mistake of ours"))
    said = fails(KeyboardInterrupt())
    assert (said.code, said.err) == (130, "stopped\n")  # there is nothing to save, and nothing is said of it


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_any_command_in_one_line(place, call, monkeypatch, number):
    """Also where what is interrupted makes another exception of it, as imports of compiled modules do."""

    def interrupted(*_, **__):
        signal.raise_signal(number)

    def replaced(*_, **__):
        try:
            signal.raise_signal(number)
        except BaseException as error:
            raise ImportError("initialization failed") from error

    for stop in (interrupted, replaced):
        monkeypatch.setattr("undiffuse.model.checkpoint.load", stop)
        for arguments in (["inspect", "RUN"], ["sample", "RUN"], ["restore", "RUN", "x.png"], ["evaluate", "RUN", "D"]):
            said = call(*[place / "run" if a == "RUN" else a for a in arguments])
            assert (said.code, said.err) == (128 + number, "stopped\n"), arguments


IMPORTS = """
import sys
class Interrupts:
    def find_spec(self, name, *_):
        if name == {name!r}:
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupts())
from {module} import main
sys.argv = ["undiffuse"]
sys.exit(main())
"""


@pytest.mark.parametrize(
    ("module", "name"),
    [("undiffuse.cli", "typer"), ("undiffuse.cli", "undiffuse.cli.app"), ("undiffuse.cli.demo", "torch")],
)
def test_ctrl_c_during_the_imports_is_one_line(module, name):
    """In a process of its own, because this one has imported everything."""
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS.format(module=module, name=name)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (130, "stopped\n")


def test_before_the_first_checkpoint_a_second_signal_speaks_of_none(place, call, monkeypatch):
    real = Monitor.record_step

    def twice(monitor, *numbers):
        real(monitor, *numbers)
        if monitor.progress.step == 2:
            signal.raise_signal(signal.SIGHUP)
            signal.raise_signal(signal.SIGHUP)

    monkeypatch.setattr(Monitor, "record_step", twice)
    arguments = ["train", place / "data.npy", "--steps", 3, "--config", place / "recipe.toml", "--device", "cpu"]
    said = call(*arguments, "--out", place / "twice")
    assert (said.code, said.err) == (129, "stopped\n")
    (place / "often.toml").write_text(RECIPE.replace("previews = 1", "previews = 3"))
    arguments = [place / "often.toml" if a == place / "recipe.toml" else a for a in arguments]
    said = call(*arguments, "--out", place / "thrice")  # it has saved step 1, for an evaluation
    assert (said.code, said.err) == (129, "stopped at once; the last checkpoint is valid\n")


def test_a_changed_recipe(place, call, refused, monkeypatch):
    def step(watch, *_):
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Monitor, "record_step", step)
    arguments = ["train", place / "data.npy", "--out", place / "begun", "--config", place / "recipe.toml"]
    assert call(*arguments, "--steps", 3).code == 143
    assert "--seed was 0, now 1" in refused(2, *arguments, "--steps", 3, "--seed", 1)


def test_debug_shows_the_traceback(place, call):
    said = call("inspect", place / "nothing", "--debug")
    assert said.code == 4
    assert "Traceback" in said.err
    assert said.err.splitlines()[-1].startswith("error[NOT_FOUND]")
    assert call("--debug", "trian").code == 2


@pytest.mark.parametrize(
    ("command", "names"),
    [
        ("train", ["DATA", "--out", "--steps", "--minutes", "--seed", "--device", "--preset", "--init"]),
        ("sample", ["RUN", "--n", "--seed"]),
        (
            "evaluate",
            [
                "RUN",
                "DATA",
                "--exact",
                "--estimate",
                "--items",
                "--mc-samples",
                "--iw-samples",
                "--compat",
                "--minutes",
            ],
        ),
        ("inspect", ["RUN"]),
        ("check", ["DATA"]),
    ],
)
def test_help(call, command, names):
    said = call(command, "--help")
    assert (said.code, said.err) == (0, "")
    for name in names:
        assert name in said.out
    overview = call("--help")
    assert overview.code == 0
    assert command in overview.out


def test_80_columns_hold_the_whole_line_of_each_command(call, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    lines = call("--help").out.split("Commands:\n")[1].splitlines()
    assert len(lines) > 20
    assert [line for line in lines if "..." in line or "…" in line] == []


def test_no_arguments_show_the_help(call):
    assert "train" in call().out


def test_continuous_data_of_any_width(tmp_path, call, monkeypatch):
    """Vectors in their own units, from a table."""
    values = np.random.default_rng(0).normal(7, 3, (60, 3))
    np.savetxt(tmp_path / "vectors.csv", values, delimiter=",", header="a,b,c", comments="")
    recipe = RECIPE.replace('kind = "unet", widths = [8], blocks = 1, attention = []', 'kind = "mlp", width = 8')
    (tmp_path / "recipe.toml").write_text(recipe)
    monkeypatch.chdir(tmp_path)
    said = call("train", "vectors.csv", "--steps", 2, "--config", "recipe.toml")
    assert (said.code, said.err) == (0, "")
    assert "note: 3 columns: a, b, c" in said.out
    said = call("sample", "runs/vectors", "--n", 5)
    assert (said.code, said.err) == (0, "")
    assert "grid" in said.out
    (table,) = (tmp_path / "runs" / "vectors").glob("samples/*/samples.csv")
    assert (table.read_text().count("\n"), table.read_text()[:6]) == (6, "a,b,c\n")
    said = call("evaluate", "runs/vectors", "vectors.csv", "--items", 4, "--mc-samples", 2)
    assert (said.code, said.err) == (0, "")
    assert "a density" in said.out
    assert "probability flow: exact, to the integrator's tolerance" in said.out
    (flow,) = (line for line in said.out.splitlines() if line.startswith("  probability flow"))
    assert "≤" not in flow
    for option, value in (("--iw-samples", 2), ("--compat", "openai")):
        said = call("evaluate", "runs/vectors", "vectors.csv", option, value)
        assert (said.code, said.err.count("\n")) == (2, 1)


def test_training_on_what_the_data_tell(place, call, refused, capsys):
    values = np.load(place / "data.npy")
    np.savez(place / "told.npz", x=values, y=np.arange(40) % 4, cond=np.ones((40, 3, 2)))
    said = call("check", place / "told.npz")
    assert "up to 3 tokens of 2 numbers" in said.out
    assert "a vector of" not in said.out
    np.savez(place / "vectors.npz", x=values, cond=np.ones((40, 7)))
    assert "a vector of 7 numbers" in call("check", place / "vectors.npz").out
    assert "conditions" in call("check", place / "data.npy").out
    recipe = ["--steps", 2, "--config", place / "recipe.toml", "--device", "cpu"]
    line = refused(3, "train", place / "data.npy", "--out", place / "none", *recipe, "--conditional")
    assert line.startswith("error[NO_CONDITIONS] data: these data have no labels, vectors, tokens or captions")
    said = call("train", place / "told.npz", "--out", place / "told", *recipe, "--conditional")
    assert f"next: undiffuse sample {place / 'told'} --label all\n" in said.out
    model = load(place / "told")
    assert (model.config.network["classes"], model.config.network["tokens"]) == (4, 2)
    assert Run(place / "told").record["config"]["train"]["conditional"] is True
    assert model.info["classes"] == ["0", "1", "2", "3"]
    said = call("train", place / "told.npz", "--out", place / "plain", *recipe)
    assert f"next: undiffuse sample {place / 'plain'}\n" in said.out
    assert "classes" not in load(place / "plain").config.network


@pytest.mark.parametrize(("code", "exit_code"), [(None, 0), (0, 0), (3, 3), ("a message", 1), (1, 141)])
def test_a_program_that_exits_inside_a_command_keeps_its_code(code, exit_code):
    """A file of --network that called sys.exit once ended `train` with success; rich exits so at a closed pipe."""
    assert guard(lambda: sys.exit(code)) == exit_code


def test_an_exit_of_typer_keeps_its_code():
    def command():
        raise typer.Exit(4)

    assert guard(command) == 4
