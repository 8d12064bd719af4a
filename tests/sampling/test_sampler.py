"""Samplers as plain data, and the tables whose names can be listed without torch."""

import json
import subprocess
import sys

import pytest

from undiffuse.denoising.denoiser import Clipped
from undiffuse.errors import ConfigError
from undiffuse.process import discrete_schedule as DS
from undiffuse.runtime.lazy_table import LazyTable, row
from undiffuse.sampling.sampler import Sampler, guidance_changes
from undiffuse.sampling.solvers import SOLVERS
from undiffuse.sampling.solvers.ddim import DDIM
from undiffuse.sampling.tables import RESTORATION_METHODS, SPACINGS

SAMPLERS = [
    Sampler(),
    Sampler("heun", None, "karras"),
    Sampler("ddim", 3, "fitted", {"eta": 0.5}, (1.0, 0.5, 0.25, 0.0)),
    Sampler(
        "unipc", 9, guidance=2.0, guidance_interval=(-1.0, 3.0), guidance_rescale=0.7, threshold="dynamic", clip=False
    ),
]


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_a_sampler_survives_json(sampler):
    assert Sampler.from_dict(json.loads(json.dumps(sampler.to_dict()))) == sampler


@pytest.mark.parametrize("plain", [{}, {**SAMPLERS[0].to_dict(), "steps": 3}, [], None])
def test_other_data_describe_no_sampler(plain):
    with pytest.raises(ConfigError, match="exactly the fields of a sampler"):
        Sampler.from_dict(plain)


def test_a_solver_may_be_an_object():
    sampler = Sampler(DDIM(0.5), 4)
    assert sampler.build_solver() is sampler.solver
    assert Sampler("ddim", settings={"eta": 0.5}).build_solver() == sampler.solver
    with pytest.raises(ConfigError, match="a solver object has no name to store"):
        sampler.to_dict()


def test_noise_levels_are_spaced_or_at_the_times():
    schedule = DS.linear(10)
    assert [float(level.t) for level in Sampler(num_steps=2).noise_levels(schedule)] == [1.0, 0.5, 0.0]
    assert len(Sampler(num_steps=None).noise_levels(schedule)) == 11
    fitted = Sampler(num_steps=2, spacing="fitted", times=(1.0, 0.2, 0.0))
    assert [float(level.t) for level in fitted.noise_levels(schedule)] == [1.0, 0.2, 0.0]


def test_names_and_guidance_changes():
    assert [str(sampler) for sampler in SAMPLERS[1:3]] == ["heun", "ddim eta=0.5"]
    assert guidance_changes(SAMPLERS[2]) == {}
    assert guidance_changes(SAMPLERS[3]) == {
        "guidance": 2.0,
        "guidance_interval": (-1.0, 3.0),
        "guidance_rescale": 0.7,
        "threshold": "dynamic",
    }


def test_a_description_counts_the_steps():
    assert Sampler("ddim", 1, settings={"eta": 0.5}).describe() == "ddim eta=0.5 in 1 step"
    assert Sampler("ddim", 9, times=(1.0, 0.5, 0.0)).describe() == "ddim in 2 steps"
    assert Sampler("ancestral", None).describe() == "ancestral in all steps"


@pytest.mark.parametrize("table", [SOLVERS, SPACINGS, RESTORATION_METHODS])
def test_every_row_of_a_table_can_be_looked_up(table):
    assert len(table) == len(list(table)) > 3
    assert all(callable(table[name]) for name in table)
    assert "unknown" not in table


def test_rows_fix_arguments_and_set_defaults():
    table = LazyTable({"clipped": row("denoising.denoiser", "Clipped", "denoise", low=-2.0)})
    assert table["clipped"]() == Clipped("denoise", -2.0)
    assert table["clipped"](low=0.0) == Clipped("denoise", 0.0)
    with pytest.raises(KeyError):
        table["os:system"]


def test_names_are_listed_without_torch():
    code = (
        "import sys; from undiffuse.sampling import sampler, solvers, tables; "
        "print(*solvers.SOLVERS, *tables.SPACINGS, *sampler.THRESHOLDS, 'torch' in sys.modules)"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert printed[-1] == "False"
    assert {"ddim", "karras", "dynamic"} <= set(printed)
