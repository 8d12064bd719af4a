"""The mutation tester, on a package of two modules, one of them with too few tests."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

SCRIPT = Path(__file__).parent.parent / "scripts" / "mutate"
mutate = SimpleNamespace(**runpy.run_path(str(SCRIPT), run_name="mutate"))


def changed(source: str) -> set[str]:
    return {f"{m.old} -> {m.new}" for m in mutate.mutants("src/toy/some.py", source)}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("y = 3 * n", {"3 * n -> 3 / n", "3 * n -> 4 * n", "3 * n -> 2 * n", "3 * n -> 6 * n"}),
        ("y = -n", {"-n -> +n"}),
        ("y = n < m", {"n < m -> n <= m", "n < m -> n >= m"}),
        ("y = n and m", {"n and m -> n or m"}),
        ("y = True", {"y = True -> y = False"}),
        ("y += n", {"y += n -> y -= n"}),
        ("y = level.alpha", {"y = level.alpha -> y = level.sigma"}),
        ("y = math.sqrt(n)", {"math.sqrt(n) -> math.fabs(n)"}),
        ("y = n.sqrt()", {"n.sqrt() -> n.positive()"}),
        ("y = torch.exp(n)", {"torch.exp(n) -> torch.expm1(n)"}),
        ("y = n.clamp(min=m)", {"n.clamp(min=m) -> n.clamp(max=m)"}),
        ("y = n.clamp(min=m, max=k)", set()),
        ("def f(alpha, n, sigma): return alpha", {"return alpha -> return sigma"}),
        ("def f(n, alpha): return alpha", {"return alpha -> return n"}),
        ("def f(n):\n m = g()\n return n", {"return n -> return m"}),
        ("def f(n):\n y = n\n m = 'later'", set()),
        ("def f(n): return m", set()),
        ("@cached(True)\ndef f(n: Array[3] = None) -> Array[2]:\n 'Returns 1.'\n raise E(f'{n + 1}')", set()),
        ("n: Literal[1]", set()),
    ],
)
def test_it_changes_one_symbol_and_no_text_or_annotation(source: str, expected: set[str]) -> None:
    assert changed(source) == expected


def test_ids_are_unique_and_do_not_depend_on_line_numbers() -> None:
    source = "def f(n):\n    return g(n + 1) * h(n + 1)\n"
    here, below = (mutate.mutants("src/toy/some.py", space + source) for space in ("", "\n\n# moved\n"))
    assert [m.id for m in here] == [m.id for m in below]
    assert [m.line + 3 for m in here] == [m.line for m in below]
    assert len({m.id for m in here}) == len(here) == 7
    assert {m.id for m in mutate.mutants("src/toy/other.py", source)}.isdisjoint(m.id for m in here)


@pytest.mark.parametrize(
    ("line", "body"), [(1, (1, 10)), (2, (1, 10)), (3, (3, 8)), (5, (5, 6)), (6, (3, 8)), (8, (1, 10))]
)
def test_a_change_belongs_to_the_body_of_its_innermost_function(line: int, body: tuple[int, int]) -> None:
    source = (
        "N = 1\ndef outer(n=N):\n    m = n\n    def inner(k=m):\n        return k\n    m += 1\n    return m\nM = 2\n"
    )
    assert mutate.body_of(source, line) == range(*body)


TOY = {
    "src/toy/__init__.py": "",
    "src/toy/loose.py": "def near(n):\n    return n < 4\n",
    "src/toy/tight.py": "def down(n):\n    while n > 0:\n        n -= 2\n    return n\n",
    "src/toy/idle.py": "def idle(n):\n    return n + 1\n",
    "tests/test_loose.py": "import toy.idle\nfrom toy.loose import near\n\ndef test_near():\n"
    "    assert [near(n) for n in (0, 7)] == [True, False]\n",
    "tests/test_tight.py": "from toy.tight import down\n\ndef test_down():\n"
    "    assert [down(n) for n in (0, 1, 2, 3)] == [0, -1, 0, -1]\n",
    "tests/equivalent-mutants.txt": "# id, and why no test can detect it\n",
}
DRIVER = """
import runpy, sys, tempfile, time
from pathlib import Path
mutate, root = runpy.run_path(sys.argv[1], run_name="mutate"), Path.cwd()
mutate["warm"].__globals__["WARM"] = ("pytest", "hypothesis", "_hypothesis_pytestplugin")  # the toy needs no more
table = {"src/toy/loose.py": "tests/test_loose.py", "src/toy/tight.py": "tests/test_tight.py",
         "src/toy/__init__.py": "tests/absent", "src/toy/idle.py": "tests/test_loose.py"}
print("exit", mutate["main"](["--only", "src/toy/loose.py"], root, table))
print("exit", mutate["main"](["--only", "src/toy/idle.py"], root, table))
stuck = [m for m in mutate["mutants"]("src/toy/tight.py", Path("src/toy/tight.py").read_text()) if "n += 2" in m.new]
with tempfile.TemporaryDirectory() as logs:
    [(_, status, _)] = mutate["outcomes"](root, [(stuck[0], ["tests/test_tight.py"], 1.0)], 1, Path(logs))
print("stuck", status)
Path("tests/test_loose.py").write_text("def test_fails():\\n    assert False\\n")
print("exit", mutate["main"]([], root, table))
"""


def test_it_finds_survivors_kills_endless_loops_and_refuses_failing_tests(tmp_path: Path) -> None:
    for name, text in TOY.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    mutants = mutate.mutants("src/toy/loose.py", TOY["src/toy/loose.py"])  # five
    by_change = {f"{m.old} -> {m.new}": m for m in mutants}
    reason = f"{by_change['n < 4 -> n <= 4'].id} a reason\n{by_change['n < 4 -> n < 5'].id}\n"  # one without a reason
    with (tmp_path / "tests/equivalent-mutants.txt").open("a") as file:
        file.write(reason)

    plugins = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_PLUGINS": "_hypothesis_pytestplugin"}
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, SCRIPT],
        cwd=tmp_path, env=os.environ | plugins, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    survived = {line.partition("py:2: ")[2] for line in lines if line.startswith("survived")}
    assert survived == {"n < 4 -> n <= 4", "n < 4 -> n < 5", "n < 4 -> n < 3"}, done.stdout + done.stderr
    assert [line for line in lines if "justified)  " in line] == [
        f"survived (justified)  {by_change['n < 4 -> n <= 4']}"
    ]
    assert "caught 40.0 % (required 95), 60.0 % with the justified (required 100)" in lines
    assert [line for line in lines if line.startswith("exit")] == ["exit 1", "exit 1", "exit 2"]
    assert sum(line.startswith("no test runs it  ") for line in lines) == 3  # n - 1, n + 2 and n + 0
    assert "stuck -9" in lines
    assert "skipped src/toy/__init__.py: tests/absent does not exist" in lines
    assert any("no mutant was tried" in line for line in lines)
