"""The samplers of another implementation, diffusers' schedulers, against ours: the same network, noise and table.

It runs with `make test-release` where diffusers is installed. All states of a chain agree to 1e-5 in float32, of
numbers up to 4; where they do not, `docs/peers.md` says why, and a test here shows it.
"""

from __future__ import annotations

import math

import peers
import pytest
from mistakes import OtherThird
from peers import Z, differences, noises, order, strong, weak

from undiffuse.sampling.solvers.ancestral import Ancestral
from undiffuse.sampling.solvers.ddim import DDIM
from undiffuse.sampling.solvers.dpm_multistep import Multistep
from undiffuse.sampling.solvers.runge_kutta import RungeKutta
from undiffuse.sampling.solvers.unipc import UniPC

pytestmark = [pytest.mark.release, pytest.mark.filterwarnings("ignore::DeprecationWarning")]  # theirs

DPM, UNIPC = "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"
SDE = {"algorithm_type": "sde-dpmsolver++"}
ROWS = {
    "ddpm": ("DDPMScheduler", {"clip_sample": False}, Ancestral()),
    "ddpm large": ("DDPMScheduler", {"clip_sample": False, "variance_type": "fixed_large"}, Ancestral("large")),
    "ddim": ("DDIMScheduler", {"clip_sample": False}, DDIM()),
    "ddim 0.6": ("DDIMScheduler", {"clip_sample": False}, DDIM(0.6)),
    "ddim 1": ("DDIMScheduler", {"clip_sample": False}, DDIM(1.0)),
    "dpm++ 1": (DPM, {"solver_order": 1}, DDIM()),
    "dpm++ 2m": (DPM, {}, Multistep(2, rule="bh2")),
    "dpm++ 2m, heun": (DPM, {"solver_type": "heun"}, Multistep(2)),
    "dpm++ 1 sde": (DPM, {"solver_order": 1, **SDE}, Ancestral()),
    "dpm++ 2m sde": (DPM, SDE, Multistep(2, 1.0, "bh2")),
    "dpm++ 2m sde, heun": (DPM, {"solver_type": "heun", **SDE}, Multistep(2, 1.0)),
    "unipc 1": (UNIPC, {"solver_order": 1}, UniPC(1)),
    "unipc 2": (UNIPC, {}, UniPC(2)),
    "euler": ("EulerDiscreteScheduler", {}, RungeKutta("euler")),
    "heun": ("HeunDiscreteScheduler", {}, RungeKutta("heun")),
}


@pytest.fixture
def make(monkeypatch):
    """A scheduler of theirs by name, and what else its step is told: of each step the same noise as ours."""
    try:
        schedulers = peers.diffusers()
    except ModuleNotFoundError as error:
        pytest.skip(f"{error}. Install it: .venv/bin/python -m pip install -c constraints.txt -e '.[parity]'")

    def build(name: str, steps: int, eta: float | None = None, **settings):
        monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", noises())
        scheduler = getattr(schedulers, name)(**settings)
        scheduler.set_timesteps(steps)
        extra = {}
        if eta is not None:
            extra["eta"] = lambda k: eta
        if eta or settings.get("algorithm_type"):
            extra["variance_noise"] = lambda k: Z[k]
        return scheduler, extra

    return build


@pytest.mark.parametrize("steps", [10, 50])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("name", ROWS)
def test_all_states_are_the_same(make, name, spacing, steps):
    theirs, settings, solver = ROWS[name]
    eta = solver.eta if isinstance(solver, DDIM) and theirs == "DDIMScheduler" else None
    scheduler, extra = make(theirs, steps, eta, timestep_spacing=spacing, **settings)
    off = differences(scheduler, solver, **extra)
    if (name, spacing) == ("ddpm large", "trailing"):  # their last step then still draws noise: docs/peers.md
        assert off.pop() > 0.1
    assert max(off) < 1e-5  # 6e-6 at most with 0.42.1


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_their_third_order_has_another_coefficient(make, eta):
    """With it ours is theirs. The second difference is of order h², so it costs them an order, or two with the SDE."""
    algorithm = "sde-dpmsolver++" if eta else "dpmsolver++"
    for solver, same in ((OtherThird(eta=eta, more=-eta), True), (Multistep(3, eta, "bh2", "low"), False)):
        scheduler, extra = make(DPM, 20, solver_order=3, algorithm_type=algorithm, timestep_spacing="trailing")
        assert (max(differences(scheduler, solver, **extra)) < 1e-5) == same
    measure, other = (weak if eta else strong), peers.by_diffusers(algorithm, 3)
    assert abs(order([measure(other, steps) for steps in (64, 128, 256)]) - (0.8 if eta else 2)) < 0.2
    if not eta:
        assert abs(order([strong(peers.by_ours(Multistep(3)), steps) for steps in (64, 128, 256)]) - 3) < 0.15


@pytest.mark.parametrize("rule", ["bh1", "bh2"])
def test_unipc_3_is_the_same_up_to_the_points_that_they_drop_at_the_end(make, rule):
    scheduler, _ = make(UNIPC, 20, solver_order=3, solver_type=rule, timestep_spacing="trailing")
    off = differences(scheduler, UniPC(3, rule, "low"))
    assert max(off[:-2]) < 1e-5 < off[-2]


@pytest.mark.parametrize("points", [1, 2])
def test_unipc_bh1_is_the_same_up_to_its_last_step_which_is_not_a_number(make, points):
    scheduler, _ = make(UNIPC, 20, solver_order=points, solver_type="bh1", timestep_spacing="trailing")
    off = differences(scheduler, UniPC(points, "bh1"))
    assert max(off[:-1]) < 1e-5
    assert math.isnan(off[-1])
