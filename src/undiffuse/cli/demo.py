"""``make demo``: from real images to samples and a likelihood, with honest baselines beside it, in five minutes.

On a slow machine training takes longer, up to six minutes, and says so."""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from undiffuse.cli import guard, run
from undiffuse.errors import counted

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image
    from rich.console import Console

    from undiffuse.data.dataset import Dataset
    from undiffuse.evaluation.baselines import Baseline
    from undiffuse.evaluation.process_states import States
    from undiffuse.model.diffusion import Diffusion

MINUTES = 2.5
MIN_STEPS, MAX_MINUTES = 300, 6.0
"""With fewer steps the model is behind the baselines: a slow machine trains for longer, at most so many minutes."""
LOG2 = math.log(2)
STRIP_ITEMS, STRIP_COLUMNS = 4, 9


def demo(folder: Path, minutes: float | None, console: Console) -> None:
    """Trains on scikit-learn's digits into ``folder`` (unless that is done), samples, measures, draws.

    By default training takes `MINUTES`, or more where it makes fewer than `MIN_STEPS` in them.
    """
    import torch

    from undiffuse.data.sources.registry import load
    from undiffuse.evaluation.baselines import gaussian_mixtures, independent_pixels
    from undiffuse.evaluation.comparison import compare
    from undiffuse.evaluation.process_states import forward_states, reverse_states
    from undiffuse.model import checkpoint
    from undiffuse.report import figures as pictures
    from undiffuse.report import table
    from undiffuse.report.comparison_report import comparison_rows
    from undiffuse.report.evaluation_report import save_bits_figure
    from undiffuse.report.progress_bar import ProgressBar
    from undiffuse.report.sample_folder import write_samples
    from undiffuse.runtime.own_output import save_picture
    from undiffuse.sampling.sampler import Sampler
    from undiffuse.training.run_folder import Run
    from undiffuse.training.run_report import NAME as REPORT

    began = time.perf_counter()
    console.rule("1. train on 8×8 digits, seventeen grey levels")
    data, run = load("digits"), Run(folder)
    if run.finished:
        console.print(f"{folder} holds a finished run; remove it to train again")
    train(data, run, minutes or MINUTES, console)
    if minutes is None:
        extend_to_floor(data, run, console)
    model = checkpoint.load(folder)

    console.rule("2. sample")
    split = data.split()
    held_out, steps = data.values[split.test], 125
    work = len(held_out) * (steps + model.chain_length)
    with ProgressBar(console, "sampling", work) as bar:
        samples = model.sample(
            len(held_out), seed=1, sampler=Sampler("ancestral", num_steps=steps), batch=180, progress=bar.advance
        ).numpy()
        write_samples(run.folder / "samples" / "demo", samples, data.num_values, {"seed": 1})
        save_picture(pictures.image_grid(samples[:64], data.num_values, columns=16), run.pictures / "grid.png")
        shown = torch.from_numpy(held_out[:STRIP_ITEMS])
        save_picture(strip(model, forward_states(model, shown, STRIP_COLUMNS)), run.pictures / "forward.png")
        backward = reverse_states(model, range(STRIP_ITEMS), STRIP_COLUMNS)
        save_picture(strip(model, backward), run.pictures / "reverse.png")
        bar.title = "measuring"
        result = model.nll(
            torch.from_numpy(held_out), batch=26, progress=lambda items: bar.advance(items * model.chain_length)
        )

    console.rule("3. measure: held-out digits, bits per dimension")
    save_bits_figure(model, {"discrete": result}, run.pictures / "bits-per-step.png")
    parts = [data.values[items].reshape(len(items), -1) for items in (split.train, split.validation, split.test)]
    independent = independent_pixels(*parts, num_values=17)
    with ProgressBar(console, "fitting mixtures, to compare with") as bar:
        single, eight = gaussian_mixtures(*parts, num_values=17, averages=(1, 8), progress=bar.advance)
    ours = result.bits_per_dim(model.dims).numpy()
    rows = [
        {"model": "undiffuse: prior", "bits/dim": with_error(result.prior.numpy() / model.dims / LOG2)},
        {"model": "undiffuse: steps", "bits/dim": with_error(result.diffusion_nats.numpy() / model.dims / LOG2)},
        {"model": "undiffuse: decoder", "bits/dim": with_error(result.decoder.numpy() / model.dims / LOG2)},
        {"model": "undiffuse: in all, at most", "bits/dim": with_error(ours)},
        *(
            against(ours, name, base)
            for name, base in (
                (f"Gaussian mixture, {counted(int(single.chosen['components']), 'component')}", single),
                ("Gaussian mixture, mean of the best eight", eight),
                ("independent pixels", independent),
            )
        ),
    ]
    table.render(rows, f"{len(held_out)} held-out digits, all {model.chain_length} steps of the chain")
    console.print("ahead: how much lower our bound is, item by item; baselines are exact, tuned on validation data")

    compared = compare(samples, data, metrics=("frechet", "kernel"))
    title = f"samples and digits: n = {compared.n}, features {compared.extractor}, ± standard error"
    table.render(comparison_rows(compared.summary()), title)
    for line in compared.explanations():
        console.print(line)

    console.rule("4. look")
    for name, what in (
        ("grid", "samples"),
        ("forward", "the forward process, digits to noise"),
        ("reverse", "the reverse process, noise to digits"),
        ("bits-per-step", "where the bits are"),
    ):
        console.print(f"{run.pictures / name}.png  {what}")
    console.print(f"{run.folder / REPORT}  the training curve and everything else about the run, on one page")
    console.print(f"model: {run.model}; {time.perf_counter() - began:.0f} s in all")


def train(data: Dataset, run: Any, minutes: float, console: Console) -> None:
    """Train the run to its end: as it began, or for ``minutes``."""
    from undiffuse.model import presets
    from undiffuse.model.config import Config, from_dict, replace_train
    from undiffuse.training.diffusion_task import fit_diffusion

    record = run.record
    recipe = replace_train(presets.get("digits"), minutes=minutes)
    fit_diffusion(recipe if record is None else from_dict(Config, record["config"]), data, run.folder)


def extend_to_floor(data: Dataset, run: Any, console: Console) -> None:
    """Extend a run by the clock of fewer than `MIN_STEPS` steps; all training takes at most `MAX_MINUTES`."""
    from undiffuse.training.extend import extend
    from undiffuse.training.run_folder import checkpoint_folders
    from undiffuse.training.train_state import resume_step_for_extension, verify_checkpoint

    minutes = run.record["config"]["train"]["minutes"]
    if minutes is None:
        return
    steps = verify_checkpoint(checkpoint_folders(run.checkpoints)[-1]).step
    kept = verify_checkpoint(run.checkpoints / f"step-{resume_step_for_extension(run.checkpoints):08d}").seconds / 60
    longer = min(1.1 * minutes * MIN_STEPS / steps, MAX_MINUTES - (minutes - kept))
    if steps >= MIN_STEPS or minutes > MINUTES or longer <= minutes:
        return
    console.print(
        f"{counted(steps, 'step')} in {minutes:g} minutes are too few on this machine: training goes on for "
        f"{longer - kept:.1f} minutes, so that it takes at most {MAX_MINUTES:g} in all, for {MIN_STEPS} steps",
    )
    extend(run.folder, data, minutes=longer - minutes)
    train(data, run, longer, console)


def with_error(bits: np.ndarray) -> tuple[float, float]:
    return float(bits.mean()), float(bits.std(ddof=1) / math.sqrt(len(bits)))


def against(ours: np.ndarray, name: str, baseline: Baseline) -> dict[str, object]:
    """A baseline's row: its bits, and the paired difference to ours with its standard error."""
    return {
        "model": name,
        "bits/dim": with_error(baseline.bits_per_dim),
        "ahead (paired)": with_error(baseline.bits_per_dim - ours),
    }


def strip(model: Diffusion, states: States) -> Image:
    """A picture of states on their way, captioned with their log-SNR."""
    from undiffuse.report import figures as pictures

    levels, frames = states
    captions = [f"log SNR {float(level.log_snr):.1f}" for level in levels]
    return pictures.image_strip(frames, captions, model.info.get("num_values"))


def main() -> int:
    def command() -> int:
        from undiffuse.runtime.terminal import make_console

        folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path("runs/demo")
        minutes = float(sys.argv[2]) if len(sys.argv) > 2 else None
        demo(folder, minutes, make_console(soft_wrap=True))
        return 0

    return guard(command)


if __name__ == "__main__":
    run(main)
