"""Every command that README and docs print, and every ``next:`` line that a command prints, run as it is printed.

To take seconds, trainings are two steps of a tiny network, evaluations measure a few items, `advise` tries one spacing
of the steps, and a command that several pages print runs once; the commands themselves, their options and their files
are those of the page.
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

from undiffuse.cli import main
from undiffuse.cli.app import app
from undiffuse.evaluation import plan
from undiffuse.model import presets
from undiffuse.model.config import Config, ModelConfig, TrainConfig
from undiffuse.sampling import sampler_search
from undiffuse.studio.server import STATIC, VENDOR, listen
from undiffuse.training import diffusion_task
from undiffuse.training import fit as loop

UNET = {"kind": "unet", "widths": (4,), "blocks": 1, "attention": (), "patch": 2}
RECIPE = Config(
    ModelConfig(network=UNET, schedule={"name": "linear_log_snr", "high": 6.0}, chain_length=25),
    TrainConfig(batch=8, warmup=1, precision="float32", previews=1),
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
        for name, size in {"IMAGE": 8, "A": 8, "B": 8, "photo.png": 28, "thumbnail.png": 7}.items():
            picture(folder / name, size)
        for name in ("boot.png", "trousers.png"):
            picture(folder / name, 28)
        for name, size in {"MASK": 8, "hole.png": 28}.items():
            Image.fromarray(255 * np.eye(size, dtype=np.uint8)).save(folder / name, "PNG")
        (folder / "my_net.py").write_text(NETWORK)
        write_folder(folder / "PIPELINE")
        (folder / "my.toml").write_text("[train]\nlr = 0.002\n")
        for arguments in PREPARATION:
            assert main(arguments.split()) == 0
        yield folder


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


@pytest.mark.parametrize("path", [page for page in PAGES if console_commands(page)], ids=lambda path: path.name)
def test_the_commands_of_a_page_run_as_printed(path, place, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    if path.name == "README.md":
        shutil.rmtree("photos")  # its example writes them
    for command in console_commands(path):
        run_with_next(command, capsys)


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


@pytest.mark.parametrize("path", [ROOT / "README.md", ROOT / "docs/scaling.md"], ids=lambda path: path.name)
def test_the_commands_for_two_processes_run(path, place) -> None:
    """On a finished run, since this training cannot be made tiny from here: `tests/scaling` trains on processes."""
    commands = re.findall(r"`(torchrun [^`]*--nproc-per-node 2 [^`]*)`", path.read_text())
    assert commands
    for command in commands:
        if command not in done:
            arguments = [sys.executable, "-m", "torch.distributed.run", *shlex.split(command)[1:]]
            ended = subprocess.run(arguments, capture_output=True, text=True, check=False)
            assert ended.returncode == 0, ended.stderr
            done[command] = ended.stdout
        assert "is a finished run already" in done[command]


def test_the_table_lists_every_command() -> None:
    listed = {cell.split()[1] for cell in re.findall(r"\| `(undiffuse [^`]+)` \|", (ROOT / "README.md").read_text())}
    assert listed == {command.name for command in app.registered_commands}
