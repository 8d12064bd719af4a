"""The rules that the source keeps as text: layers, notation, no way to run data as code, short modules.

Each rule is a function from a module's syntax tree to the lines that break it, tried on a line that does.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "undiffuse"
MODULES = sorted(SOURCE.rglob("*.py"))
LONGEST = 350

# From the bottom up: a layer imports itself and what is below it. Parts know nothing of diffusion, and algorithms
# nothing of parts but conditions.
LAYERS = {
    "mathematics": {"process"},
    "parts": {"networks", "codec", "conditioning", "data"},
    "algorithms": {
        "denoiser",
        "lattice",
        "score",
        "loss",
        "sample",
        "solvers",
        "likelihood",
        "grids",
        "guidance",
        "inverse",
        "advise",
        "distill",
        "randomness",
    },
    "assembly": {"config", "presets", "estimate", "diffusion", "restore", "checkpoint"},
    "applications": {"train", "metrics", "interop", "report"},
    "faces": {"cli", "studio", "__main__"},
}
LAYER = {name: layer for layer, names in LAYERS.items() for name in names}
ORDER = list(LAYERS)
ALLOWED = {layer: set().union(*(LAYERS[below] for below in ORDER[: i + 1])) for i, layer in enumerate(ORDER)}
ALLOWED["parts"] = LAYERS["parts"]
ALLOWED["algorithms"] = LAYERS["algorithms"] | LAYERS["mathematics"] | {"conditioning"}

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
    part = module.split(".")[1]
    if part == "__init__":  # the package itself hands out names of every layer
        allowed = set(LAYER)
    elif part == "errors":  # below all of them
        allowed = set()
    elif part not in LAYER:
        yield 1, f"{part!r} is in no layer of the design"
        return
    else:
        allowed = ALLOWED[LAYER[part]]
    for line, name in imports(tree, module):
        root, _, rest = name.partition(".")
        target = rest.split(".")[0]
        if root == "undiffuse" and target not in allowed | {"errors", "__version__"}:
            yield line, f"imports {name}"
        if part == "process" and root not in sys.stdlib_module_names | {"undiffuse", "torch"}:
            yield line, f"imports {name}: process/ needs torch alone"


UNSAFE_MODULES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "imp"}
UNSAFE_NAMES = {"torch.load", "torch.save", "yaml.load", "yaml.unsafe_load", "os.system", "importlib.import_module"}
UNSAFE_NAMES |= {f"accelerate.utils.{name}" for name in ("gather_object", "broadcast_object_list")}
UNSAFE_NAMES |= {f"dist.{name}" for name in ("all_gather_object", "gather_object", "broadcast_object_list")}
UNSAFE_CALLS = {"eval", "exec", "__import__", "import_module"}
UNSAFE_FLAGS = {"allow_pickle", "shell"}


def data_as_code(tree: ast.Module, module: str) -> Iterator[tuple[int, str]]:
    for line, name in imports(tree, module):
        if name.split(".")[0] in UNSAFE_MODULES or name in UNSAFE_NAMES:
            yield line, f"imports {name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node) in UNSAFE_NAMES:
            yield node.lineno, ast.unparse(node)
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
        if module != "undiffuse.process.table" and ("beta" in words or "alpha_bar" in spelled or "cumprod" in words):
            yield line, f"{name}: lives in process/table.py only"


def too_long(tree: ast.Module, module: str) -> Iterator[tuple[int, str]]:
    last = max((node.end_lineno or 0 for node in tree.body), default=0)
    if last > LONGEST:
        yield last, f"longer than {LONGEST} lines"


RULES: list[Rule] = [upward_imports, data_as_code, foreign_letters, too_long]


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


@pytest.mark.parametrize(
    ("rule", "module", "source"),
    [
        (upward_imports, "process.target", "from undiffuse.solvers import ddim"),
        (upward_imports, "process.target", "from undiffuse import solvers"),
        (upward_imports, "process.target", "import undiffuse"),
        (upward_imports, "process.target", "def f():\n    import undiffuse.loss"),
        (upward_imports, "process.target", "from ..solvers import ddim"),
        (upward_imports, "process.__init__", "from ..solvers import ddim"),
        (upward_imports, "process.target", "import numpy"),
        (upward_imports, "loss", "from undiffuse.networks import unet"),
        (upward_imports, "networks.unet", "from undiffuse.process.level import NoiseLevel"),
        (upward_imports, "solvers.ddim", "from undiffuse.diffusion import Diffusion"),
        (upward_imports, "train.loop", "from undiffuse.cli import main"),
        (upward_imports, "errors", "from undiffuse.process import level"),
        (upward_imports, "helpers", "x = 1"),
        *((data_as_code, "data.array", f"import {name}") for name in sorted(UNSAFE_MODULES)),
        *((data_as_code, "data.array", f"x = {name}(y)") for name in sorted(UNSAFE_NAMES | UNSAFE_CALLS)),
        (data_as_code, "data.array", "from torch import load"),
        (data_as_code, "data.array", "from yaml import load"),
        (data_as_code, "data.array", "x = numpy.load(y, allow_pickle=True)"),
        (data_as_code, "cli.crew", "from accelerate.utils import gather_object"),
        (data_as_code, "cli.crew", "dist.all_gather_object(x, y)"),
        (data_as_code, "data.array", "x = run(y, shell=flag)"),
        (foreign_letters, "loss", "gamma = 1"),
        (foreign_letters, "loss", "def f(min_snr_gamma): ..."),
        (foreign_letters, "loss", "class NoiseScheduler: ..."),
        (foreign_letters, "loss", "self.scheduler = 1"),
        (foreign_letters, "loss", "import a as scheduler"),
        (foreign_letters, "loss", "beta_t = 1"),
        (foreign_letters, "loss", "log_alpha_bar = 1"),
        (foreign_letters, "loss", "alphas_cumprod = 1"),
        (too_long, "loss", "\n" * LONGEST + "x = 1"),
    ],
)
def test_the_rule_finds_what_breaks_it(rule: Rule, module: str, source: str) -> None:
    assert list(rule(ast.parse(source), f"undiffuse.{module}"))


@pytest.mark.parametrize(
    ("rule", "module", "source"),
    [
        (upward_imports, "process.target", "import math, torch\nfrom undiffuse.errors import ConfigError"),
        (upward_imports, "process.target", "from .level import NoiseLevel"),
        (upward_imports, "process.__init__", "from .level import NoiseLevel\nfrom . import level"),
        (upward_imports, "loss", "from undiffuse.conditioning import Condition\nfrom undiffuse.process import level"),
        (upward_imports, "cli.main", "from undiffuse import __version__, train"),
        (data_as_code, "data.array", "network.eval()\nx = numpy.load(y, allow_pickle=False)\nre.compile(y)"),
        (foreign_letters, "process.table", "beta = 1\nalpha_bar = 2"),
        (foreign_letters, "metrics.prior", "x = torch.lgamma(y) + f(betas=(0.9, 0.99))\nalphabet = 1"),
        (too_long, "loss", "\n" * (LONGEST - 1) + "x = 1"),
    ],
)
def test_the_rule_lets_the_rest_be(rule: Rule, module: str, source: str) -> None:
    assert not list(rule(ast.parse(source), f"undiffuse.{module}"))
