"""``benchmarks/bench``: its statistics by known numbers, its table of parts, its records, and the clock's resumption.

The clock is run with packages of numbers; nothing is trained, and no other package is needed.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
from bench import clock, clock_packages, growth, limits, measure, parts, record  # noqa: E402
from bench.clock_packages import PACKAGES, SETTINGS, Job  # noqa: E402

sys.path.remove(str(ROOT / "benchmarks"))


def test_each_part_is_a_module_with_a_function_run(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    for part in parts.PARTS.values():
        assert callable(importlib.import_module(f"bench.{part.module}").run)


@pytest.mark.release
def test_the_dry_run_of_the_part_for_a_gpu():
    pytest.importorskip("diffusers", reason="the extra `peers` is not installed")
    command = [sys.executable, "benchmarks/bench/run", "gpu", "--dry-run", "--rounds", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": "src"})
    assert done.returncode == 0, done.stderr
    for said in ("fraction of the matrix product's rate", "convolution", "diffusers' example", "bits/dim, chain"):
        assert said in done.stdout


def test_without_a_gpu_the_part_says_what_to_do(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=r"No GPU is at hand\. --dry-run does the same on the processor"):
        importlib.import_module("bench.gpu").run(argparse.Namespace(dry_run=False))


def test_spread_and_ratio_by_hand():
    assert measure.spread([5.0, 1.0, 2.0, 3.0, 4.0]) == (3.0, 2.0, 4.0, 5)
    assert measure.spread([7.0]) == (7.0, 7.0, 7.0, 1)
    ratio = measure.paired_ratio([1.0, 2.0, 4.0], [2.0, 4.0, 2.0])  # 2, 2, 1/2: not the ratio of the medians
    assert ratio.median == 2.0
    assert f"{ratio:.2f}" == "2.00 [1.25, 2.00]"


def test_power_law_by_known_exponents():
    x = [1, 2, 4, 8]
    slope, r2 = measure.power_law(x, [3 * v**1.5 for v in x])
    assert (slope, r2) == (pytest.approx(1.5), pytest.approx(1.0))
    slope, r2 = measure.power_law([math.e**k for k in (0, 1, 2)], [math.e**k for k in (0.0, 2.0, 1.0)])
    assert (slope, r2) == (pytest.approx(0.5), pytest.approx(0.25))  # the correlation of (0, 1, 2) and (0, 2, 1) is ½
    slope, r2 = measure.power_law(x, [2.0] * 4)
    assert slope == 0
    assert math.isnan(r2)


def test_rows_alternate_in_both_orders_after_the_warm_up():
    order: list[str] = []
    ticks = itertools.count()
    times = measure.alternate(
        {name: lambda name=name: order.append(name) for name in "ab"}, 2, 1, clock=lambda: float(next(ticks))
    )
    assert "".join(order) == "ba" + "ab" + "ba"
    assert times == {"a": [1.0, 1.0], "b": [1.0, 1.0]}


def test_operations_are_counted_forward_and_backward():
    """Two for each multiplication: of a matrix product 2 n³; of a convolution three times 2·9·C²·B·H·W."""
    assert limits.operations(limits.matrix_product(torch.float32)) == 2 * limits.MATRIX**3
    batch, channels, side = limits.CONVOLUTION.values()
    assert limits.operations(limits.convolution(torch.float32)) == 3 * 2 * 9 * channels**2 * batch * side**2


def test_the_sizes_of_growth_are_built(tmp_path):
    rows = {row.what: row for row in growth.rows(tmp_path)}
    assert growth.of_chain(7).chain_length == 7
    read = rows["reading PNG files, by their number"].build(3)
    assert read().shape == (3, 3, growth.FILES, growth.FILES)  # pyright: ignore


def a_result():
    rows = [{"package": "ours", "ms": "1.0 [0.9, 1.1]"}]
    return record.Result(
        "A title", [record.Table("Of this", rows)], {"numbers": [1.0]}, [3, 4], ["a note"], {"p.png": b"x"}
    )


def test_a_record_is_appended_and_nothing_is_overwritten(tmp_path):
    (tmp_path / "RECORDS.md").write_text("# Records\n\n## Earlier\n")
    first = record.append("part", a_result(), tmp_path)
    record.append("part", a_result(), tmp_path)
    text = (tmp_path / "RECORDS.md").read_text()
    assert text.startswith("# Records\n\n## Earlier\n\n## A title (`part`, ")
    assert text.count("## A title") == 2
    for needed in ("benchmarks/bench/run", "commit ", "seeds 3, 4", "processor ", "bfloat16 products", "torch "):
        assert needed in first
    assert "| package | ms |\n| --- | --- |\n| ours | 1.0 [0.9, 1.1] |" in first
    one, two = sorted((tmp_path / "records").iterdir(), key=lambda path: len(path.name))
    assert two.name == f"{one.name}-2"
    content = json.loads((one / "numbers.json").read_bytes())
    assert content["numbers"] == [1.0]
    assert content["where"]["machine"]["vector instructions"]
    assert (two / "p.png").read_bytes() == b"x"


# --- the clock -------------------------------------------------------------------------------------------------------


def options(out, **changed) -> argparse.Namespace:
    base = {"packages": None, "set": [], "data": None, "seeds": [0, 1], "minutes": [1.0, 2.0], "out": out, "n": 8}
    return argparse.Namespace(**{**base, **changed})


def test_only_ours_has_our_choice_of_waiting():
    ours, other = (clock.environment_of(name, threads=2) for name in ("undiffuse", "diffusers"))
    assert ours["OMP_NUM_THREADS"] == other["OMP_NUM_THREADS"] == "2"
    assert other["GOMP_SPINCOUNT"] == clock.LIBGOMP_SPINCOUNT != ours.get("GOMP_SPINCOUNT")


def test_jobs_alternate_and_settings_have_folders_of_their_own(tmp_path):
    found = clock.jobs(options(tmp_path))
    assert [job.package for job in found[:3]] == list(PACKAGES)
    assert [job.package for job in found[6:9]] == [*list(PACKAGES)[1:], next(iter(PACKAGES))]
    assert len({job.folder for job in found}) == len(found) == 12
    base = clock.jobs(options(tmp_path, packages=["diffusers"]))[0]
    other = clock.jobs(options(tmp_path, packages=["diffusers"], set=["diffusers.lr=0.25"]))[0]
    assert other.settings["lr"] == 0.25
    assert other.folder != base.folder
    calls = clock.jobs(options(tmp_path, packages=["diffusers"], set=["diffusers.calls=7", "diffusers.sampler=ddpm"]))[
        0
    ]
    assert calls.folder == base.folder  # the same training
    assert calls.drawn(8) == "8-ddpm-7"
    assert SETTINGS["diffusers"]["lr"] != 0.25


def test_other_images_have_another_folder_of_pictures(tmp_path, monkeypatch):
    from PIL import Image

    job = clock.jobs(options(tmp_path, packages=["denoising-diffusion-pytorch"]))[0]
    folders = []
    for value in (1, 2, 1):
        images = np.full((3, 1, 28, 28), value, np.uint8)
        monkeypatch.setattr(clock_packages, "training_images", lambda job, images=images: images)
        folders.append(clock_packages.write_pictures(job))
        written = sorted(folders[-1].glob("*.png"))
        assert [np.unique(np.asarray(Image.open(path))).tolist() for path in written] == [[value]] * 3
    assert folders[0] == folders[2] != folders[1]
    assert len([*tmp_path.iterdir()]) == 2


@pytest.mark.parametrize("wrong", [{"set": ["diffusers.speed=1"]}, {"set": ["lr"]}, {"packages": ["fast"]}])
def test_unknown_names_are_refused(tmp_path, wrong):
    with pytest.raises(SystemExit, match="No such"):
        clock.jobs(options(tmp_path, **wrong))


def test_a_package_that_is_not_installed_is_named(tmp_path):
    with pytest.raises(SystemExit, match="diffusers is not installed"):
        clock.jobs(options(tmp_path), installed=["undiffuse", "denoising-diffusion-pytorch"])
    assert "undiffuse" in clock.installed_packages()


def test_a_stage_that_fails_in_its_process_says_what_to_do(tmp_path, monkeypatch):
    job, commands = clock.jobs(options(tmp_path))[0], []

    def run(command, **settings):
        commands.append(command)
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(clock.subprocess, "run", run)
    job.folder.mkdir()
    with pytest.raises(SystemExit, match=r"train ended with 1\. What is done is kept"):
        clock.in_own_process("train", 1)(job, 8)
    program, stage, place = commands[0][1:]
    assert (Path(program).name, stage) == ("clock_packages.py", "train")
    assert Job(**json.loads(Path(place).read_bytes())) == job


def metric(value):
    return {"value": [value, 0.1, 0.0, 0.0], "floor": [10.0, 0.1, 0.0, 0.0]}


def fake_stages(calls, fail=None):
    """Stages that count themselves; the one called ``fail`` stops."""

    def stage(name):
        def work(job, n):
            calls.append((job.package, job.minutes, job.seed, name))
            if (job.package, name) == fail:
                raise KeyboardInterrupt
            distance = {"undiffuse": 30.0, "diffusers": 110.0}.get(job.package, 60.0) / job.minutes
            return {
                "train": {"steps": 5, "images": 100, "seconds": 50.0},
                "sample": {"seconds": 3.0, "n": n},
                "compare": {"metrics": {m: metric(distance + 10.0) for m in clock.METRICS}},
                "likelihood": {"discrete": [3.0, 0.1], "continuous": [2.9, 0.1]},
            }[name]

        return work

    return {name: stage(name) for name in ("train", "sample", "compare", "likelihood")}


def run_all(jobs, stages):
    return [(job, clock.run_job(job, 8, stages, lambda line: None)) for job in jobs]


def test_a_stopped_clock_goes_on_where_it_stopped(tmp_path):
    jobs, before, after = clock.jobs(options(tmp_path)), [], []
    with pytest.raises(KeyboardInterrupt):
        run_all(jobs, fake_stages(before, fail=("denoising-diffusion-pytorch", "compare")))
    assert before[-1][-1] == "compare"
    (jobs[0].folder / "likelihood.json").write_text('{"discrete": [')  # written by something that was killed
    found = run_all(jobs, fake_stages(after))
    assert after[0] == ("undiffuse", 1.0, 0, "likelihood")
    assert after[1] == before[-1]
    assert not set(before[:-1]) & set(after) - {("undiffuse", 1.0, 0, "likelihood")}
    assert len(set(before) | set(after)) == 4 * 12
    again = []
    assert run_all(jobs, fake_stages(again)) == found
    assert not again


def test_a_clock_records_the_machine_and_commit_of_its_trainings(tmp_path):
    """They were those of the process that wrote the record, which may be another day's."""
    job = clock.jobs(options(tmp_path))[0]
    for where in ("then", "now"):
        found = clock.run_job(job, 8, fake_stages([]), lambda line: None, {"commit": where})
    assert found["train"]["where"] == {"commit": "then"}
    assert "where" not in found["sample"]
    section = record.append("part", replace(a_result(), where={"commit": "then"}), tmp_path)
    assert "commit then;" in section


def test_the_table_has_medians_with_ranges_and_the_excess_is_a_fraction(tmp_path):
    found = run_all(clock.jobs(options(tmp_path)), fake_stages([]))
    lines = clock.rows(found)
    assert [(line["package"], line["minutes"]) for line in lines[:2]] == [
        ("undiffuse", "1"),
        ("denoising-diffusion-pytorch", "1"),
    ]
    assert lines[0]["Fréchet"] == "40.0 [40.0, 40.0], ± 0.1 each"
    assert lines[0]["images/s"] == "2 [2, 2]"
    assert clock.excess(found) == [
        f"After {m} minutes our Fréchet distance above the floor is 0.50 [0.50, 0.50] of the best other package's "
        "(median and range over 2 seeds)."
        for m in (1, 2)
    ]
    assert clock.curves(found).startswith(b"\x89PNG")


def test_the_grid_has_three_rows():
    from io import BytesIO

    from PIL import Image

    assert Image.open(BytesIO(clock.grid(np.zeros((40, 1, 4, 4), np.uint8)))).size == (64, 24)
