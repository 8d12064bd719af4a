"""Models as ONNX, run by onnxruntime: for a batch of another size, and as all that a sampler in NumPy needs.

It runs with `make test-release` where onnx, onnxscript and onnxruntime are installed.
"""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers_models import model
from network_cases import randomized

from undiffuse.data.transform import IntegerLevels
from undiffuse.interop.graph_export import LEVELS, ONNX, export_onnx
from undiffuse.model import presets
from undiffuse.model.diffusion import Diffusion
from undiffuse.sampling.sampler import Sampler
from undiffuse.sampling.trajectory import last_step, trajectory

pytestmark = [pytest.mark.release, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def onnxruntime():
    try:
        import onnxruntime
        import onnxscript  # noqa: F401
    except ModuleNotFoundError as error:
        pytest.skip(f"{error}. Install it: .venv/bin/python -m pip install -c constraints.txt -e '.[onnx]'")
    return onnxruntime


TRANSFORMER = {"kind": "dit", "patch": 2, "width": 12, "depth": 2, "heads": 2}


def digits(**changes) -> Diffusion:
    config = presets.adapt_to_data(presets.get("digits"), 17).model
    diffusion = Diffusion(replace(config, chain_length=20, **changes), (1, 8, 8), IntegerLevels(17))
    randomized(diffusion.network)
    return diffusion


@torch.no_grad()
@pytest.mark.parametrize(
    "make", [digits, lambda: digits(network=TRANSFORMER), lambda: model("own kind"), lambda: model("classes")]
)
def test_the_file_is_all_that_a_sampler_needs(onnxruntime, make, tmp_path):
    diffusion = make()
    (check,) = export_onnx(diffusion, tmp_path)
    print(f"{check.what} {check.difference:.1e} from {check.against}")
    assert check.difference < 1e-5
    session = onnxruntime.InferenceSession(str(tmp_path / ONNX), providers=["CPUExecutionProvider"])
    chain = json.loads((tmp_path / LEVELS).read_text())["chain"]
    x = start = np.random.default_rng(0).normal(size=(5, *diffusion.x_shape)).astype(np.float32)
    labels = {"label": np.full(5, -1)} if diffusion.condition_sizes else {}
    ends = [(row["alpha"], row["sigma"]) for row in chain[1:]]
    clean_end = [(1.0, 0.0)] if len(chain) == 20 else []  # levels with sigma 0 are not among those of the network
    for row, (alpha, sigma) in zip(chain, [*ends, *clean_end], strict=False):
        level = {name: np.full(5, row[name], np.float32) for name in ("alpha", "sigma", "time")}
        clean = session.run(None, {"x_t": x, **level, **labels})[0].clip(-1, 1)
        x = alpha * clean + sigma * (x - row["alpha"] * clean) / row["sigma"]
        x = x.astype(np.float32)
    sampler = Sampler("ddim", 20)
    solver, levels = diffusion.build_solver(sampler), diffusion.noise_levels(sampler)
    denoise, none = diffusion.sampling_denoiser(sampler), torch.empty(0)
    own = last_step(trajectory(denoise, solver, levels, torch.from_numpy(start), lambda _: none))
    torch.testing.assert_close(torch.from_numpy(x), own.x, rtol=0, atol=1e-4)
