"""Rules of the source: import order, names, no data run as code, short modules.

Each rule is a function from a module's syntax tree to the lines that break it, tested on lines that break it and on
lines that do not.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "undiffuse"
MODULES = sorted(SOURCE.rglob("*.py"))
MAX_LINES = 350

ORDER = [
    ["runtime"],
    ["process"],
    ["networks"],
    ["data", "denoising"],
    ["sampling"],
    ["likelihood"],
    ["model"],
    ["interop", "evaluation"],
    ["report"],
    ["training"],
    ["studio"],
    ["cli"],
]
"""Folders from the bottom up. A folder imports itself and those of earlier rows; folders of one row do not meet."""
LEVEL = {folder: level for level, row in enumerate(ORDER) for folder in row}
LOOSE = {"errors", "__init__", "__main__"}
"""Modules outside of a folder. All others may import `errors`, which imports nothing of the package."""

Rule = Callable[[ast.Module, str], Iterator[tuple[int, str]]]


def imports(tree: ast.Module, module: str) -> Iterator[tuple[int, str]]:
    """The (line, dotted name) of everything imported anywhere in a module, relative imports made absolute."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = module.split(".")[: -node.level] if node.level else []
            base = ".".join([*package, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def upward_imports(tree: ast.Module, module: str) -> Iterator[tuple[int, str]]:
    folder = module.split(".")[1]
    if folder in ("__init__", "__main__"):  # the public API and the entry point
        return
    if folder not in LEVEL and folder not in LOOSE:
        yield 1, f"{folder!r} is not in the list of folders"
        return
    below = {other for other, level in LEVEL.items() if level < LEVEL.get(folder, -1)}
    for line, name in imports(tree, module):
        root, _, rest = name.partition(".")
        if root == "undiffuse" and rest.split(".")[0] not in {*below, folder, "errors", "__version__"}:
            yield line, f"imports {name}"
        if folder == "process" and root not in sys.stdlib_module_names | {"undiffuse", "torch"}:
            yield line, f"imports {name}: process/ needs torch alone"


UNSAFE_MODULES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "imp"}
UNSAFE_NAMES = {"torch.load", "torch.save", "yaml.load", "yaml.unsafe_load", "os.system", "importlib.import_module"}
UNSAFE_NAMES |= {f"accelerate.utils.{name}" for name in ("gather_object", "broadcast_object_list")}
UNSAFE_NAMES |= {f"dist.{name}" for name in ("all_gather_object", "gather_object", "broadcast_object_list")}
UNSAFE_CALLS = {"eval", "exec", "__import__", "import_module"}
UNSAFE_FLAGS = {"allow_pickle", "shell"}
UNPICKLER = "undiffuse.interop.unpickle"
"""The one module that may call torch.load, with weights_only=True: the program of a child process."""
LAZY_TABLES = {"undiffuse.__init__", "undiffuse.runtime.lazy_table"}
"""Modules that import by name, from tables written in the source: the public API, solvers and the like."""


def data_as_code(tree: ast.Module, module: str) -> Iterator[tuple[int, str]]:
    for line, name in imports(tree, module):
        if name.split(".")[0] in UNSAFE_MODULES or name in UNSAFE_NAMES:
            yield line, f"imports {name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and (name := ast.unparse(node)) in UNSAFE_NAMES:
            allowed = {"importlib.import_module": module in LAZY_TABLES, "torch.load": module == UNPICKLER}
            yield from () if allowed.get(name) else [(node.lineno, name)]
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            flags = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            yield from () if flags.get("weights_only") == "True" else [(node.lineno, "torch.load of any object")]
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in UNSAFE_CALLS:
            yield node.lineno, f"{node.func.id}()"
        if isinstance(node, ast.keyword) and node.arg in UNSAFE_FLAGS and ast.unparse(node.value) != "False":
            yield node.lineno, ast.unparse(node)


def bindings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """The (line, name) of all names that the module itself chooses; those of other libraries are their own."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.attr
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.lineno, node.name
        elif isinstance(node, ast.alias) and node.asname:
            yield node.lineno, node.asname


def foreign_letters(tree: ast.Module, module: str) -> Iterator[tuple[int, str]]:
    for line, name in bindings(tree):
        spelled = name.lower()
        words = set(spelled.split("_"))
        if "gamma" in words or "scheduler" in spelled:
            yield line, f"{name}: neither 'gamma' nor 'scheduler' is used here (docs/notation.md)"
        if module != "undiffuse.process.discrete_schedule" and (
            "beta" in words or "alpha_bar" in spelled or "cumprod" in words
        ):
            yield line, f"{name}: lives in process/discrete_schedule.py only"


def too_long(tree: ast.Module, module: str) -> Iterator[tuple[int, str]]:
    last = max((node.end_lineno or 0 for node in tree.body), default=0)
    if last > MAX_LINES:
        yield last, f"longer than {MAX_LINES} lines"


PRIVATE_WORDS = {
    *("told", "untold", "tell", "heard", "hears", "hearing", "said", "crew", "loudest", "whats_wrong", "leave_out"),
    *("left_out", "in_shares", "shared_like", "gathered", "require_room", "turning_point", "rewind", "lengthen"),
    *("lattice", "codec", "heard_by", "says_something", "album", "dequantise", "standardised", "ranged"),
    *("to_codes", "from_codes", "nudge", "misfit", "walked", "only_mask", "judge", "judged", "noisy", "leaps"),
    *("tighten", "cut_variance", "own_noise", "choose_items", "affordable", "spread_out", "forget_after"),
}
"""Words of the former private vocabulary; none is a standard term, so none may come back as a name."""


def private_words(tree: ast.Module, module: str) -> Iterator[tuple[int, str]]:
    for line, name in bindings(tree):
        spelled = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower().strip("_")
        if spelled in PRIVATE_WORDS or {"told", "heard", "said", "crew"} & set(spelled.split("_")):
            yield line, f"{name}: not a term of the field (docs/notation.md has the glossary)"


RULES: list[Rule] = [upward_imports, data_as_code, foreign_letters, private_words, too_long]


def name_of(path: Path) -> str:
    """The dotted name of a module; a package keeps its ``__init__``, so that one part less is the folder."""
    return ".".join(path.relative_to(SOURCE.parent).with_suffix("").parts)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_source_keeps_the_rule(rule: Rule) -> None:
    assert len(MODULES) > 10
    broken = []
    for path in MODULES:
        for line, what in rule(ast.parse(path.read_text()), name_of(path)):
            broken.append(f"{path.relative_to(SOURCE.parent)}:{line}: {what}")
    assert not broken, "\n".join(broken)


def test_modules_outside_of_a_folder() -> None:
    assert {path.stem for path in SOURCE.glob("*.py")} == LOOSE


def test_files_of_tests_have_names_of_their_own() -> None:
    """pytest imports them by name alone, and collects none where two are equal."""
    names = [path.name for path in Path(__file__).parent.rglob("test_*.py")]
    assert sorted({name for name in names if names.count(name) > 1}) == []


def test_there_is_no_import_cycle() -> None:
    """Of any import: at the top, in a function, or for types only."""
    names = {name_of(path).removesuffix(".__init__"): path for path in MODULES}
    graph: dict[str, set[str]] = {}
    for name, path in names.items():
        if name == "undiffuse":  # the lazy public API imports everything, and nothing imports it
            continue
        targets = {target for _, target in imports(ast.parse(path.read_text()), name_of(path))}
        modules = {t if t in names else t.rpartition(".")[0] for t in targets}
        graph[name] = {m for m in modules if m in names and m not in (name, "undiffuse")}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


HEAVY = ("torch", "numpy", "accelerate", "matplotlib", "PIL", "safetensors", "sklearn", "huggingface_hub")
COMPLETION = {"_UNDIFFUSE_COMPLETE": "complete_bash", "COMP_WORDS": "undiffuse sample --so", "COMP_CWORD": "2"}


def commands() -> list[str]:
    from undiffuse.cli.app import app

    return [command.name or "" for command in app.registered_commands]


CALLS = [(["--help"], {}), (["--version"], {}), *(([name, "--help"], {}) for name in commands()), ([], COMPLETION)]
PROCESS = f"""
import contextlib, io, json, os, sys
from undiffuse.cli import main
def answer(arguments):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try: code = main(arguments)
        except SystemExit as exit: code = exit.code or 0
    print(json.dumps([code, [m for m in {HEAVY!r} if m in sys.modules], out.getvalue()]), flush=True)
for number, (arguments, environment) in enumerate({CALLS!r}):
    if number == 0:
        answer(arguments)
    elif os.fork() == 0:
        os.environ.update(environment)
        answer(arguments)
        os._exit(0)
    else:
        os.wait()
"""
"""The first call in a fresh process, and each other in a fork of it, so that what help texts share is imported once."""


@pytest.fixture(scope="module")
def answers() -> list[tuple[int, list[str], str]]:
    """(exit code, heavy modules, output) of each of `CALLS`."""
    done = subprocess.run([sys.executable, "-c", PROCESS], capture_output=True, text=True, check=False)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lines) == len(CALLS), done.stderr[-2000:]
    return lines


@pytest.mark.parametrize("number", range(len(CALLS)), ids=[" ".join(arguments) for arguments, _ in CALLS])
def test_help_version_and_completion_import_nothing_heavy(number, answers) -> None:
    code, heavy, output = answers[number]
    assert (code, heavy) == (0, [])
    assert ("--solver" if CALLS[number] == ([], COMPLETION) else "undiffuse") in output


@pytest.mark.parametrize(
    ("rule", "module", "source"),
    [
        (upward_imports, "process.target", "from undiffuse.sampling.solvers import ddim"),
        (upward_imports, "process.target", "from undiffuse import sampling"),
        (upward_imports, "process.target", "import undiffuse"),
        (upward_imports, "process.target", "def f():\n    import undiffuse.model.losses"),
        (upward_imports, "process.target", "from ..sampling import solvers"),
        (upward_imports, "process.__init__", "from ..sampling import ddim"),
        (upward_imports, "process.target", "import numpy"),
        (upward_imports, "model.losses", "from undiffuse.training import fit"),
        (upward_imports, "networks.unet", "from undiffuse.denoising.denoiser import Denoiser"),
        (upward_imports, "solvers.ddim", "from undiffuse.model.diffusion import Diffusion"),
        (upward_imports, "train.loop", "from undiffuse.cli import main"),
        (upward_imports, "errors", "from undiffuse.process import level"),
        (upward_imports, "helpers", "x = 1"),
        *((data_as_code, "data.array", f"import {name}") for name in sorted(UNSAFE_MODULES)),
        *((data_as_code, "data.array", f"x = {name}(y)") for name in sorted(UNSAFE_NAMES | UNSAFE_CALLS)),
        (data_as_code, "data.array", "from torch import load"),
        (data_as_code, "interop.unpickle", "x = torch.load(y)"),
        (data_as_code, "interop.unpickle", "x = torch.load(y, weights_only=False)"),
        (data_as_code, "interop.diffusers", "x = torch.load(y, weights_only=True)"),
        (data_as_code, "data.array", "from yaml import load"),
        (data_as_code, "data.array", "x = numpy.load(y, allow_pickle=True)"),
        (data_as_code, "runtime.distributed_group", "from accelerate.utils import gather_object"),
        (data_as_code, "runtime.distributed_group", "dist.all_gather_object(x, y)"),
        (data_as_code, "data.array", "x = run(y, shell=flag)"),
        (foreign_letters, "model.losses", "gamma = 1"),
        (foreign_letters, "model.losses", "def f(min_snr_gamma): ..."),
        (foreign_letters, "model.losses", "class NoiseScheduler: ..."),
        (foreign_letters, "model.losses", "self.scheduler = 1"),
        (foreign_letters, "model.losses", "import a as scheduler"),
        (foreign_letters, "model.losses", "beta_t = 1"),
        (foreign_letters, "model.losses", "log_alpha_bar = 1"),
        (foreign_letters, "model.losses", "alphas_cumprod = 1"),
        (too_long, "model.losses", "\n" * MAX_LINES + "x = 1"),
    ],
)
def test_the_rule_finds_what_breaks_it(rule: Rule, module: str, source: str) -> None:
    assert list(rule(ast.parse(source), f"undiffuse.{module}"))


@pytest.mark.parametrize(
    ("rule", "module", "source"),
    [
        (upward_imports, "process.target", "import math, torch\nfrom undiffuse.errors import ConfigError"),
        (upward_imports, "process.target", "from .noise_level import NoiseLevel"),
        (upward_imports, "process.__init__", "from .noise_level import NoiseLevel\nfrom . import noise_level"),
        (
            upward_imports,
            "model.losses",
            "from undiffuse.networks.condition import Condition\nfrom undiffuse.process import noise_level",
        ),
        (upward_imports, "cli.main", "from undiffuse import __version__, training"),
        (data_as_code, "runtime.lazy_table", "importlib.import_module(name)"),
        (data_as_code, "data.array", "network.eval()\nx = numpy.load(y, allow_pickle=False)\nre.compile(y)"),
        (foreign_letters, "process.discrete_schedule", "beta = 1\nalpha_bar = 2"),
        (foreign_letters, "evaluation.metrics", "x = torch.lgamma(y) + f(betas=(0.9, 0.99))\nalphabet = 1"),
        (private_words, "training.fit", "retold = 1\naffordable_price = story_teller = 2"),
        (too_long, "model.losses", "\n" * (MAX_LINES - 1) + "x = 1"),
    ],
)
def test_the_rule_accepts_the_rest(rule: Rule, module: str, source: str) -> None:
    assert not list(rule(ast.parse(source), f"undiffuse.{module}"))


def test_the_training_loop_fits_on_two_screens() -> None:
    tree = ast.parse((SOURCE / "training" / "fit.py").read_text())
    fit = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "fit")
    assert fit.end_lineno - fit.lineno < 100
