"""Every command that README and docs print, and every ``next:`` line that a command prints, run as it is printed.

To take seconds, trainings are two steps of a tiny network, evaluations measure a few items, `advise` tries one spacing
of the steps, and a command that several pages print runs once; the commands themselves, their options and their files
are those of the page. Errors of `docs/questions` and `docs/start.md` are compared to the letter: that of a command that
the page prints above it, others with the line that the code makes of the same cause. Python of these pages runs too.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from diffusers_cases import write_folder
from fake_hub import served as hub_served
from PIL import Image
from test_docs import PAGES, ROOT, blocks
from torch.distributed.run import get_args_parser

import undiffuse
from undiffuse.cli import error_lines, main
from undiffuse.cli.app import app
from undiffuse.cli.messages import error_line
from undiffuse.data.dataset import Dataset, Split
from undiffuse.data.from_array import from_array
from undiffuse.errors import UndiffuseError
from undiffuse.evaluation import plan
from undiffuse.evaluation.comparison import compare
from undiffuse.model import presets
from undiffuse.model.config import Config, ModelConfig, TrainConfig
from undiffuse.sampling import sampler_search
from undiffuse.studio.server import STATIC, VENDOR, listen
from undiffuse.training import diffusion_task, memory_estimate, nonfinite
from undiffuse.training import fit as loop
from undiffuse.training.progress import Progress
from undiffuse.training.run_folder import ChangedError, Run

UNET = {"kind": "unet", "widths": (4,), "blocks": 1, "attention": (), "patch": 2}
RECIPE = Config(
    ModelConfig(network=UNET, schedule={"name": "linear_log_snr", "high": 6.0}, chain_length=25),
    TrainConfig(batch=8, lr=3e-3, warmup=1, precision="float32", previews=1),
)
NETWORK = '''"""A network of the user's own."""

from torch import nn


class Net(nn.Module):
    def __init__(self, channels, out_channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, out_channels, 3, padding=1)

    def forward(self, x, time, cond=None):
        return self.conv(x)
'''
PREPARATION = (
    "train DATA --out RUN --conditional --minutes 1",
    "train DATA --steps 2",
    "sample RUN --n 60 --out SAMPLES",
    "train shirts --steps 2",
    "train digits --steps 2",
    "sample runs/digits --n 60",
)
HOLIDAY_SIZES = ((128, 128), (200, 133), (180, 240), (120, 160), (160, 120))
START = ROOT / "docs/start.md"
GUIDE = [START, *sorted((ROOT / "docs/questions").glob("*.md"))]
"""Pages for users whose errors and Python are tested too."""
KEPT = 60
"""Pictures of the folder ``photos``, of which the example writes ten times as many."""
PRINTED = re.compile(r"^next: (.*)$", re.M)
done: dict[str, str] = {}
"""What each command that has run printed."""


def console_commands(path: Path) -> list[str]:
    """The commands after ``$`` in the console blocks of a page, without comments; ``make`` runs these tests itself."""
    lines = re.findall(r"^\$ (.*)$", "\n".join(blocks(path, "console")), re.M)
    commands = [line.split("  #")[0].strip() for line in lines]
    return [command for command in commands if command.split()[0] in ("undiffuse", "python")]


def table_commands(path: Path) -> list[str]:
    """The complete commands in the cells of a page's tables."""
    cells = re.findall(r"\| `(undiffuse [^`]+)` \|", path.read_text())
    return [cell for cell in cells if len(cell.split()) > 2]


def photographs(folder: Path, count: int, shape: tuple[int, ...], classes: tuple[str, ...] = ("",)) -> None:
    random = np.random.default_rng(0)
    for i in range(count):
        path = folder / classes[i % len(classes)] / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(256, size=shape).astype(np.uint8)).save(path)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with every file and run that the pages name, in which the commands run, and a hub on this machine."""
    folder = tmp_path_factory.mktemp("commands")
    with pytest.MonkeyPatch.context() as patch, hub_served(folder / "hub"):
        patch.chdir(folder)
        patch.setattr(undiffuse, "preset", lambda name: RECIPE)
        patch.setattr(presets, "get", lambda name: RECIPE)
        patch.setattr(loop, "plan_lr_decay", two_steps)
        patch.setattr(diffusion_task, "HELD_OUT_ITEMS", 8)
        patch.setattr(diffusion_task, "FINAL_ITEMS", 16)
        patch.setattr(plan, "PLANNED_FRACTION", 0.002)
        patch.setattr(plan, "MIN_ITEMS", 2)
        patch.setattr(sampler_search, "SEARCH_SPACINGS", ("uniform",))
        patch.setattr(sampler_search, "NUM_REFINED", 1)
        (folder / "examples").symlink_to(ROOT / "examples")
        photographs(folder / "DATA", 400, (8, 8), classes=("cat", "dog"))
        rows = [
            f"{path.relative_to(folder / 'DATA')},a {path.parent.name}" for path in (folder / "DATA").rglob("*.png")
        ]
        (folder / "DATA" / "metadata.csv").write_text("\n".join(["file_name,text", *rows]))
        photographs(folder / "shirts", 40, (28, 28))
        photographs(folder / "photos", KEPT, (32, 32, 3))
        write_holiday(folder / "holiday")
        write_arrays(folder)
        for name, size in {"IMAGE": 8, "A": 8, "B": 8, "photo.png": 28, "thumbnail.png": 7}.items():
            picture(folder / name, size)
        for name in ("boot.png", "trousers.png"):
            picture(folder / name, 28)
        for name, size in {"MASK": 8, "hole.png": 28}.items():
            Image.fromarray(255 * np.eye(size, dtype=np.uint8)).save(folder / name, "PNG")
        (folder / "my_net.py").write_text(NETWORK)
        write_folder(folder / "SOURCE")
        (folder / "my.toml").write_text("[train]\nlr = 0.002\n")
        for arguments in PREPARATION:
            assert main(arguments.split()) == 0
        yield folder


def write_holiday(folder: Path) -> None:
    """240 photographs of five sizes, each of one colour."""
    folder.mkdir()
    random = np.random.default_rng(0)
    for i, colour in enumerate(random.integers(256, size=(240, 3)).tolist()):
        Image.new("RGB", HOLIDAY_SIZES[i % 5], tuple(colour)).save(folder / f"IMG_{i:04d}.jpg", quality=10)


def write_arrays(folder: Path) -> None:
    """Signals, volumes, a table with words, and vectors of which one is NaN."""
    random = np.random.default_rng(0)
    np.save(folder / "signals.npy", random.normal(size=(400, 1, 128)).astype(np.float32))
    np.save(folder / "volumes.npy", random.integers(256, size=(60, 8, 16, 16)).astype(np.uint8))
    rows = [f"{i % 7},{i % 5},{i % 3},{'ab'[i % 2]}" for i in range(150)]
    (folder / "measurements.csv").write_text("\n".join(["length,width,weight,species", *rows]))
    vectors = random.normal(size=(40, 8)).astype(np.float32)
    vectors[3, 2] = np.nan
    np.save(folder / "nan.npy", vectors)


def two_steps(progress, settings) -> None:
    progress.decay_from, progress.last_step, progress.length = 1, 2, 2


def picture(path: Path, side: int) -> None:
    Image.fromarray(np.random.default_rng(1).integers(256, size=(side, side)).astype(np.uint8)).save(path, "PNG")


def run(command: str, capsys) -> str:
    """Run one command as printed, unless it has run, and return what it prints."""
    if command not in done:
        done[command] = output_of(command, capsys)
    return done[command]


def output_of(command: str, capsys) -> str:
    program, *arguments = shlex.split(command)
    if program == "python":
        ended = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
        assert ended.returncode == 0, ended.stderr
        for picture in sorted(Path("photos").iterdir())[KEPT:]:
            picture.unlink()
        return ended.stdout
    if arguments[0] == "studio":
        return served(arguments, capsys)
    code = main(arguments)
    out, err = capsys.readouterr()
    assert (code, err) == (0, ""), f"{command}\n{out[-2000:]}{err}"
    return out


def served(arguments: list[str], capsys) -> str:
    """The output of ``studio``, which does not end by itself: once its page is loaded, Ctrl-C stops it.

    On a free port. Without the libraries of the page, which `make studio` copies from npm, it says so instead.
    """
    if not all((STATIC / "vendor" / name).is_file() for name in VENDOR):
        code = main(arguments)
        out, err = capsys.readouterr()
        assert (code, out, "Run 'make studio'" in err) == (2, "", True), err
        return out
    with listen(0) as free:
        port = free.getsockname()[1]
    pages: list[bytes] = []

    def visit() -> None:
        for _ in range(600):
            with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=60) as page:
                pages.append(page.read())
                break
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)

    visitor = threading.Thread(target=visit)
    visitor.start()
    code = main([*arguments, "--port", str(port)])
    visitor.join()
    out, err = capsys.readouterr()
    assert (code, err, len(pages)) == (0, "", 1)
    assert b"undiffuse studio" in pages[0]
    return out


def run_with_next(command: str, capsys) -> None:
    """Run a command, then the commands of its ``next:`` line."""
    if command in done:
        return
    for line in PRINTED.findall(run(command, capsys)):
        for following in re.split(r"\s{2,}", line.strip()):
            run(following, capsys)


def heavy(pages: list[Path]) -> list:
    """``pages`` as parameters; the run of the page `START` takes seconds, and is one of the release suite."""
    return [pytest.param(page, marks=[pytest.mark.release] if page == START else [], id=page.name) for page in pages]


@pytest.mark.parametrize("path", heavy([page for page in PAGES if console_commands(page)]))
def test_the_commands_of_a_page_run_as_printed(path, place, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    if path.name == "README.md":
        shutil.rmtree("photos")  # its example writes them
    for command in console_commands(path):
        run_with_next(command, capsys)


@pytest.mark.parametrize("path", heavy([page for page in GUIDE if blocks(page, "python")]))
def test_the_python_of_a_page_runs(path, place, capsys) -> None:
    """After the commands of the page, whose files it reads; its blocks are one program."""
    for command in console_commands(path):
        run(command, capsys)
    names: dict[str, object] = {}
    for source in blocks(path, "python"):
        exec(compile(source, path.name, "exec"), names)


def failing_commands(path: Path) -> list[tuple[str, str]]:
    """(command, error) of the text blocks that begin with a command."""
    return re.findall(r"^\$ undiffuse (.*)\n(error\[.*)$", "\n".join(blocks(path, "text")), re.M)


@pytest.mark.parametrize(
    ("command", "error"), [case for page in GUIDE for case in failing_commands(page)], ids=lambda text: text[:30]
)
def test_a_command_of_a_question_fails_as_printed(command, error, place, capsys) -> None:
    assert main(shlex.split(command)) > 0
    assert capsys.readouterr().err.splitlines()[-1] == error


def test_other_errors_of_the_questions_are_those_of_the_code(tmp_path, monkeypatch, capsys) -> None:
    """Each is made by the function that finds its cause, with the numbers of the page."""
    printed = {line for page in GUIDE for line in re.findall(r"^error\[.*$", "\n".join(blocks(page, "text")), re.M)}
    printed -= {error for page in GUIDE for _, error in failing_commands(page)}
    monkeypatch.chdir(tmp_path)
    made: set[str] = set()

    def make(arguments: list[str], call) -> None:
        with pytest.raises(UndiffuseError) as found:
            call()
        made.add(error_line(found.value, arguments))

    monkeypatch.setattr(memory_estimate, "available_memory", lambda: 20.2e9)
    batch = TrainConfig(batch=20_000_000)
    make(["train", "--batch"], lambda: memory_estimate._require(batch, 0, 20.5e9, "Give a smaller batch"))
    Path("runs/e2/checkpoints/step-00000038").mkdir(parents=True)
    names, all_items = np.array([26, 50, 55, 56, 59, *range(123)]), np.ones(128, bool)
    problem, progress = nonfinite.NonFinite("gradient", all_items), Progress(step=42)
    make(["train"], lambda: nonfinite.skip_step(problem, names, progress, TrainConfig(), Path("runs/e2")))
    make(["train", "--lr"], lambda: raise_(ChangedError(Path("runs/e2"), [("train.lr", "10.0", "0.001")])))
    monkeypatch.setattr(Run, "record", {"data": {"source": "/data/holiday"}})
    make(["evaluate"], lambda: Run("runs/holiday").load_data())
    make(["compare"], lambda: too_few("holiday"))
    error_lines.run(lambda: raise_(MemoryError()), [], debug=False)
    made.add(capsys.readouterr().err.strip())
    assert made == printed


def raise_(error: BaseException):
    raise error


def too_few(name: str) -> None:
    """16 samples beside 186 training and 54 held-out items."""
    values = np.random.default_rng(0).integers(256, size=(240, 1, 2, 2)).astype(np.uint8)
    data = from_array(values, name=name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Dataset, "split", lambda *_: Split(np.arange(186), np.arange(186, 212), np.arange(212, 240)))
        compare(values[:16], data, extractor="pca")


def test_the_code_about_the_hub_runs(place, capsys) -> None:
    (source,) = blocks(ROOT / "docs/hub.md", "python")
    names: dict[str, object] = {}
    exec(compile(source, "hub.md", "exec"), names)
    assert len(names["samples"]) == 16
    assert (place / "digits-saved" / "README.md").is_file()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("command", table_commands(ROOT / "README.md"))
def test_the_commands_of_the_readmes_table_run(command, place, capsys) -> None:
    if command.startswith("undiffuse train DATA"):  # a run of its own, but for the one that extends a finished run
        out = "RUN" if "--extend" in command else f"runs/{abs(hash(command))}"
        command = f"{command} --out {out}"
    run_with_next(command, capsys)


def commands_for_two(path: Path) -> list[str]:
    return re.findall(r"`(torchrun [^`]*--nproc-per-node 2 [^`]*)`", path.read_text())


def test_the_commands_for_two_processes_run(place, capsys) -> None:
    """On a finished run, since this training cannot be made tiny from here: `tests/scaling` trains on processes.

    Two processes run the command of `docs/scaling.md`. Those of the README differ from it in what torchrun starts,
    which runs here.
    """
    launched, started = commands_for_two(ROOT / "docs/scaling.md"), commands_for_two(ROOT / "README.md")
    assert launched
    assert started
    for command in launched:
        arguments = [sys.executable, "-m", "torch.distributed.run", *shlex.split(command)[1:]]
        ended = subprocess.run(arguments, capture_output=True, text=True, check=False)
        assert ended.returncode == 0, ended.stderr
        assert "is a finished run already" in ended.stdout
    for command in started:
        options = get_args_parser().parse_args(shlex.split(command)[1:])
        assert (options.standalone, options.module, options.training_script) == (True, True, "undiffuse")
        assert main(options.training_script_args) == 0
        assert "is a finished run already" in capsys.readouterr().out


def test_the_table_lists_every_command() -> None:
    listed = {cell.split()[1] for cell in re.findall(r"\| `(undiffuse [^`]+)` \|", (ROOT / "README.md").read_text())}
    assert listed == {command.name for command in app.registered_commands}
