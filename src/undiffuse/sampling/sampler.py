"""How samples are drawn, as plain data: importing this module does not import torch, calling its methods does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any

from undiffuse.errors import ConfigError, counted

if TYPE_CHECKING:
    from undiffuse.denoising.denoiser import Denoiser
    from undiffuse.denoising.guidance import Guide
    from undiffuse.networks.condition import Condition
    from undiffuse.process.noise_level import NoiseLevel
    from undiffuse.process.schedule import Schedule
    from undiffuse.sampling.solvers.solver import Solver

THRESHOLDS = ("static", "dynamic")
"""``static``: x̂ is clamped if ``clip`` says so; ``dynamic``: dynamic thresholding, then that clamp."""

DEFAULT_NUM_STEPS = 50
"""Steps of a solver that is given by its name alone."""

CLASSIFIER_FORMS = ("score", "mean")
"""``score``: the gradient is added to the score, for every solver; ``mean``: to the mean of an ancestral step."""


@dataclass(frozen=True)
class Sampler:
    """A solver with its settings, its noise levels, and guidance. The default is ddim, not `DEFAULT_SAMPLER`.

    Raises `ConfigError` for an unknown threshold or form, and for the form "mean" with another solver than "ancestral".

    Solver: ``solver`` is a name of `solvers.SOLVERS` with ``settings``, or a `Solver` object (which `to_dict` refuses).

    Noise levels: ``num_steps`` steps (None: the length of the model's chain) with a ``spacing`` of `SPACINGS`, or those
    at explicit falling ``times``, where both are ignored. A `Diffusion` refuses more steps than its chain has.

    Guidance: ``guidance`` is the scale of classifier-free guidance (1: none), within ``guidance_interval`` (low, high)
    of log-SNR and with ``guidance_rescale``, see `ClassifierFree`. ``classifier_scale`` and ``autoguidance_scale``
    apply to the classifier and the weak model of a `Guide`, the classifier in the ``classifier_form`` of
    `CLASSIFIER_FORMS`. ``threshold`` is one of `THRESHOLDS`. ``clip`` clamps x̂ to [−1, 1]; None does so if the data are
    bounded.
    """

    solver: str | Solver = "ddim"
    num_steps: int | None = DEFAULT_NUM_STEPS
    spacing: str = "uniform"
    settings: Mapping[str, Any] = field(default_factory=dict)
    times: tuple[float, ...] | None = None
    guidance: float = 1.0
    guidance_interval: tuple[float, float] | None = None
    guidance_rescale: float = 0.0
    classifier_scale: float = 1.0
    classifier_form: str = "score"
    autoguidance_scale: float = 2.0
    threshold: str = "static"
    clip: bool | None = None

    def __post_init__(self) -> None:
        if self.threshold not in THRESHOLDS:
            fix = f"Use one of {', '.join(THRESHOLDS)}"
            raise ConfigError("GUIDANCE", f"threshold {self.threshold!r}", "unknown", fix)
        if self.classifier_form not in CLASSIFIER_FORMS:
            fix = f"Use {' or '.join(map(repr, CLASSIFIER_FORMS))}"
            raise ConfigError("GUIDANCE", f"classifier_form {self.classifier_form!r}", "unknown", fix)
        if self.classifier_form == "mean" and self.solver != "ancestral":
            cause = f"it shifts the mean of a step of the solver 'ancestral', and this one is {str(self.solver)!r}"
            raise ConfigError("GUIDANCE", "classifier_form 'mean'", cause, "Use that solver, or the form 'score'")

    def __str__(self) -> str:
        """The solver with its settings, such as "ddim eta=0.5"."""
        if not isinstance(self.solver, str):
            return str(self.solver)
        return " ".join([self.solver, *(f"{name}={value}" for name, value in self.settings.items())])

    @property
    def given_steps(self) -> int | None:
        """The number of steps, also where ``times`` give it; None for all steps of the model's chain."""
        return self.num_steps if self.times is None else len(self.times) - 1

    def describe(self) -> str:
        """The solver with its settings and the number of steps, such as "ddim eta=0.5 in 50 steps"."""
        steps = self.given_steps
        return f"{self} in {'all steps' if steps is None else counted(steps, 'step')}"

    def build_solver(self) -> Solver:
        """The solver object. Raises `ConfigError` for an unknown name and for a wrong setting."""
        from undiffuse.sampling import solvers

        return solvers.build(self.solver, **self.settings) if isinstance(self.solver, str) else self.solver

    def noise_levels(self, schedule: Schedule) -> list[NoiseLevel]:
        """The noise levels on ``schedule``, from noise to data, see `time_grid`. Raises `ConfigError`."""
        from undiffuse.sampling.time_grids import time_grid

        return time_grid(schedule, self.num_steps, self.spacing, times=self.times)

    def guide(self, denoise: Denoiser, guide: Guide | None = None) -> Denoiser:
        """``denoise`` with guidance around it. Raises `ConfigError` for scales out of range.

        From the inside to the outside: classifier-free guidance, the weak model and the classifier of ``guide``,
        dynamic thresholding; only those in use.
        """
        from undiffuse.denoising.guidance import Autoguided, ClassifierFree, ClassifierGuided, DynamicThreshold

        low, high = self.guidance_interval or (None, None)
        negative = None if guide is None else guide.negative
        classifier_free = ClassifierFree(  # checks its settings
            denoise, self.guidance, low, high, self.guidance_rescale, negative
        )
        if self.guidance != 1:
            denoise = classifier_free
        if guide is not None and guide.weak is not None:
            denoise = Autoguided(denoise, guide.weak, self.autoguidance_scale)
        if guide is not None and guide.log_prob is not None and self.classifier_form == "score":
            denoise = ClassifierGuided(denoise, guide.log_prob, self.classifier_scale)
        return DynamicThreshold(denoise) if self.threshold == "dynamic" else denoise

    def guide_solver(self, solver: Solver, guide: Guide | None, cond: Condition) -> Solver:
        """``solver`` with the classifier of ``guide`` in its steps, where it has the form "mean".

        Raises `ConfigError` for a scale that is not finite.
        """
        if guide is None or guide.log_prob is None or self.classifier_form != "mean":
            return solver
        from undiffuse.sampling.solvers.ancestral import Ancestral, ClassifierGuidedAncestral

        assert isinstance(solver, Ancestral)
        return ClassifierGuidedAncestral(
            solver.variance, log_prob=guide.log_prob, cond=cond, scale=self.classifier_scale
        )

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain data for JSON. Raises `ConfigError` if the solver is an object."""
        if not isinstance(self.solver, str):
            raise ConfigError(
                "SAMPLER", str(self.solver), "a solver object has no name to store", "Use a solver's name"
            )
        return asdict(self)

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Sampler:
        """The sampler that `to_dict` described. Raises `ConfigError` unless it has exactly the fields of a sampler."""
        if not isinstance(plain, Mapping) or set(plain) != {f.name for f in fields(cls)}:
            cause, fix = "it does not have exactly the fields of a sampler", "Use what Sampler.to_dict returned"
            raise ConfigError("SAMPLER", "sampler", cause, fix)
        pairs = {name: None if plain[name] is None else tuple(plain[name]) for name in ("times", "guidance_interval")}
        return cls(**{**plain, **pairs})


def describe_stages(samplers: Sequence[Sampler]) -> str:
    """The ``samplers`` of the stages of a cascade, such as "consistency in 1 step, then ddim in 50 steps"."""
    return ", then ".join(sampler.describe() for sampler in samplers)


DEFAULT_SAMPLER = Sampler("dpm++2m_sde", 25)
"""The default sampler of commands and models; measured in docs/choosing.md."""

GUIDANCE_FIELDS = (
    "guidance",
    "guidance_interval",
    "guidance_rescale",
    "classifier_scale",
    "classifier_form",
    "autoguidance_scale",
    "threshold",
)


def guidance_changes(sampler: Sampler) -> dict[str, Any]:
    """The guidance fields of ``sampler`` that differ from their defaults."""
    default = Sampler()
    return {name: value for name in GUIDANCE_FIELDS if (value := getattr(sampler, name)) != getattr(default, name)}
