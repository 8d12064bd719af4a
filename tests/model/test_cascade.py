"""Cascades: the sum of the stages' bounds is a bound, seeds, fit of the stages, and sampling."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from undiffuse.data.from_array import from_array
from undiffuse.data.resolution import ResolutionSplit
from undiffuse.data.stage_data import reduce_data, split_data
from undiffuse.data.transform import Identity, IntegerLevels
from undiffuse.errors import ConfigError, DataError
from undiffuse.evaluation.plan import calls_per_second
from undiffuse.evaluation.summary import stage_lines
from undiffuse.likelihood.nll import make_nll
from undiffuse.model import checkpoint
from undiffuse.model.cascade import Cascade, stage_seed
from undiffuse.model.config import ModelConfig
from undiffuse.model.diffusion import Diffusion
from undiffuse.networks.condition import Condition
from undiffuse.sampling.sampler import Sampler
from undiffuse.training.run_folder import describe

IMAGES = np.array(list(itertools.product(range(3), repeat=4)), np.uint8).reshape(-1, 1, 2, 2)
"""All 81 images of 2×2 pixels and three levels."""
P = np.random.default_rng(0).dirichlet(np.full(81, 0.3)) * 0.9 + 0.1 / 81


class Table:
    """A model of one table of −log p: of ``rest`` given the image of the condition, or of small images alone."""

    def __init__(self, split: ResolutionSplit, cost, *, base: bool) -> None:
        self.cost, self.chain_length, self.device = cost, 10, torch.device("cpu")
        self.condition_sizes = {} if base else {"image": 1}
        self.trained_condition_sizes: dict[str, int] = {}
        self.item_shape, levels = (split.low_shape, 3) if base else (split.rest_shape, split.rest_num_values)
        self.transform = IntegerLevels(levels)
        self.info = {"name": "all", "stage": split.to_dict() | {"is_base": base, "fingerprint": ""}}

    def nll(self, values, seed, mc_samples, *, batch, first, estimate, cond):
        image = None if cond is None else cond.image[:, 0, 0, 0].double().numpy()
        nats = torch.from_numpy(self.cost(values.numpy().reshape(len(values), -1), image))
        return make_nll(0 * nats, nats, 0 * nats, 1, nats[:, None])


def key(rows):
    return [tuple(int(v) for v in row) for row in rows]


def cascade_of(name, joint):
    """The cascade whose parts are the conditionals of ``joint``, a table {(low, rest): probability}."""
    split = ResolutionSplit(name, 2, (1, 2, 2), 3)
    low = {}
    for (image, _), p in joint.items():
        low[image] = low.get(image, 0.0) + p
    base = Table(split, lambda rows, _: np.array([-math.log(low[k[0]]) for k in key(rows)]), base=True)

    def given(rows, image):
        pairs = zip(image, key(rows), strict=True)
        return np.array([-math.log(joint[round(z) + 1, k] / low[round(z) + 1]) for z, k in pairs])

    return Cascade([base, Table(split, given, base=False)])


def pairs_of(name):
    split = ResolutionSplit(name, 2, (1, 2, 2), 3)
    return list(zip(split.low(IMAGES).ravel().tolist(), key(split.rest(IMAGES).reshape(81, -1)), strict=True))


@pytest.mark.parametrize("name", ["mean", "haar"])
def test_with_exact_conditionals_the_parts_add_up_to_the_likelihood(name):
    pairs = pairs_of(name)
    assert len(set(pairs)) == 81
    nll = cascade_of(name, dict(zip(pairs, P, strict=True))).nll(torch.from_numpy(IMAGES))
    assert nll.total.numpy() == pytest.approx(-np.log(P), abs=1e-12)
    assert nll.per_step.sum(1).numpy() == pytest.approx(nll.total.numpy(), abs=1e-12)
    assert nll.calls == 2


@pytest.mark.parametrize(("name", "rests"), [("mean", 3**4), ("haar", 5**3)])
def test_any_two_models_are_a_bound(name, rests):
    """Models that know nothing of the map: each assigns probability to rests that no image with that mean has."""
    random = np.random.default_rng(1)
    every = list(itertools.product(range(3 if name == "mean" else 5), repeat=4 if name == "mean" else 3))
    assert len(every) == rests
    low, given = random.dirichlet(np.ones(3)), random.dirichlet(np.ones(rests), 3)
    joint = {(z, rest): low[z] * given[z, i] for z in range(3) for i, rest in enumerate(every)}
    bound = cascade_of(name, joint).nll(torch.from_numpy(IMAGES)).total.numpy()
    total = np.exp(-bound).sum()
    assert total < 1 - 1e-3
    lost = sum(p for pair, p in joint.items() if pair not in set(pairs_of(name)))
    assert total == pytest.approx(1 - lost, abs=1e-12)
    assert (P * bound).sum() > -(P * np.log(P)).sum()


@pytest.mark.parametrize("std", [0.3, 0.8])
@pytest.mark.parametrize("name", ["mean", "haar"])
def test_with_a_noisy_image_the_expectation_is_a_bound(name, std):
    """Exact p(rest given z), z = √(1 − s²) D x + s ε, expectations over ε by quadrature.

    Of each image E[bound] ≥ −log p(x), p(x) = p(low) ∫ q(z given low) p(rest given z) dz, which add up to at most 1.
    """
    split = ResolutionSplit(name, 2, (1, 2, 2), 3)
    lows, rests = zip(*pairs_of(name), strict=True)
    p_low = np.bincount(lows, P, minlength=3)
    x_low = np.arange(3) - 1.0
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    weights /= weights.sum()

    def given(rows, z):
        q = np.exp(-((z[:, None] - math.sqrt(1 - std**2) * x_low) ** 2) / (2 * std**2))  # (n, 3), up to a constant
        found = np.zeros(len(rows))
        for i, row in enumerate(key(rows)):
            found[i] = sum(P[j] * q[i, lows[j]] for j in range(81) if rests[j] == row)
        return -np.log(found / (q * p_low).sum(1))

    base = Table(split, lambda rows, _: -np.log(p_low[rows[:, 0]]), base=True)
    cascade = Cascade([base, Table(split, given, base=False)])
    marginal, bound = np.zeros(81), np.zeros(81)
    for node, weight in zip(nodes, weights, strict=True):
        image = torch.full((81, 1, 1, 1), node)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("undiffuse.model.cascade.ItemNoise", lambda *_, image=image: lambda n: image[None].float())
            total = cascade.nll(torch.from_numpy(IMAGES), image_noise=std).total.numpy()
        bound += weight * total
        marginal += weight * np.exp(-total)
    assert (bound > -np.log(marginal) + 1e-9).all()
    assert marginal.sum() < 1 + 1e-6
    assert (P * (bound + np.log(P))).sum() > 1e-3


class Exact(nn.Module):
    """x̂ = E[rest given x_t and z] of a table of images: the best network that there is; z is the noisy image."""

    item_dims = (2,)

    def __init__(self, channels: int, out_channels: int, image: int = 0, name: str = "haar", std: float = 0.3) -> None:
        super().__init__()
        self.unused, self.std = nn.Parameter(torch.zeros(1)), std
        split = ResolutionSplit(name, 2, (1, 2, 2), 2)
        low, rest = split.low(BINARY), split.rest(BINARY)
        self.given = bool(image)
        to_x = IntegerLevels(split.rest_num_values if image else 2).to_model
        self.rows = to_x(torch.from_numpy((rest if image else low).astype(np.int64))).double()
        self.low = IntegerLevels(2).to_model(torch.from_numpy(low.astype(np.int64))).double()
        self.log_p = torch.from_numpy(np.log(Q))

    def forward(self, x, time, cond=None):
        alpha, sigma = (torch.sigmoid(sign * time.double()).sqrt().view(-1, 1) for sign in (1, -1))
        rows = self.rows.flatten(1)
        logits = self.log_p - ((x.double().flatten(1)[:, None] - alpha[..., None] * rows) ** 2).sum(2) / (2 * sigma**2)
        if self.given and cond is not None:
            z = cond.image.double().flatten(1)
            gap = (z[:, None] - math.sqrt(1 - self.std**2) * self.low.flatten(1)) ** 2
            logits = logits - gap.sum(2) / (2 * self.std**2)
        return (logits.softmax(1) @ rows).reshape(x.shape).to(x.dtype)


BINARY = np.array(list(itertools.product(range(2), repeat=4)), np.uint8).reshape(-1, 1, 2, 2)
Q = np.sort(np.random.default_rng(2).dirichlet(np.full(16, 0.5)) * 0.9 + 0.1 / 16)  # the white image has the most


@pytest.mark.parametrize("name", ["mean", "haar"])
def test_the_bound_of_diffusion_models_with_a_noisy_image(name):
    """The bounds of two chains with exact denoisers on all 16 binary images, each from 300 draws of noise.

    exp(−mean bound) of all images add up to at most 1, and the mean over the images is at least the entropy, within 6
    standard errors (false alarms 2e-9). Power: of either stage alone one of the two is false by more than that.
    """
    std = 0.3
    split = ResolutionSplit(name, 2, (1, 2, 2), 2)
    chain = ModelConfig(
        {"kind": "Exact", "name": name},
        {"name": "linear_log_snr", "high": 5.0, "low": -7.0},
        target={"name": "x"},
        chain_length=40,
    )
    stage = split.to_dict() | {"fingerprint": ""}
    facts = {"name": "all", "num_values": 2}
    base = Diffusion(chain, split.low_shape, IntegerLevels(2), facts, Exact)
    network = chain.network | {"image": 1}
    above = Diffusion(
        replace(chain, network=network),
        split.rest_shape,
        IntegerLevels(split.rest_num_values),
        facts | {"stage": stage},
        Exact,
    )
    cascade = Cascade([base, above])
    draws = 300
    values = torch.from_numpy(BINARY).repeat_interleave(draws, 0)
    nll = cascade.nll(values, mc_samples=8, image_noise=std, batch=len(values))
    bound = nll.total.reshape(16, draws)
    mean, stderr = bound.mean(1).numpy(), (bound.std(1) / math.sqrt(draws)).numpy()
    entropy, error = -(Q * np.log(Q)).sum(), math.sqrt(((Q * stderr) ** 2).sum())
    assert entropy - 6 * error < (Q * mean).sum() < entropy + 1
    sum_error = 6 * math.sqrt(((np.exp(-mean) * stderr) ** 2).sum())
    assert np.exp(-mean).sum() < 1 + sum_error
    small, large = nll.per_step.reshape(16, draws, 2).mean(1).numpy().T
    assert (Q * small).sum() < entropy - 6 * error
    assert np.exp(-large).sum() > 1 + sum_error


def tiny(data, **network):
    torch.manual_seed(0)
    sizes = {name: size for name, size in data.condition_sizes.items() if name == "image"}
    config = ModelConfig(
        {"kind": "unet", "widths": (8,), "blocks": 1, "attention": ()} | sizes | network,
        {"name": "linear_log_snr", "high": 6.0},
        chain_length=4,
    )
    model = Diffusion(config, data.item_shape, IntegerLevels(data.num_values), describe(data) | {"held_out": 0.1})
    with torch.no_grad():
        for p in model.network.parameters():
            p.add_(0.1 * torch.randn(p.shape))
    return model.eval()


DATA = from_array(np.random.default_rng(0).integers(5, size=(20, 1, 8, 8)), np.arange(20) % 2, num_values=5, name="d")


@pytest.fixture(scope="module")
def stages():
    middle = reduce_data(DATA, 4, "haar")
    return [tiny(reduce_data(middle, 2)), tiny(split_data(middle, 2)), tiny(split_data(DATA, 4, "haar"))]


def test_items_are_held_out_that_every_stage_held_out():
    base, top = tiny(reduce_data(DATA, 4)), tiny(split_data(DATA, 4))
    for of_base, of_top, both in ((0.1, 0.1, 0.1), (0.0, 0.2, 0.0), (0.2, 0.1, 0.1)):
        base.info["held_out"], top.info["held_out"] = of_base, of_top
        assert Cascade([base, top]).info["held_out"] == both
    del base.info["held_out"]
    assert "held_out" not in Cascade([base, top]).info


def test_samples_depend_on_seed_and_item_alone(stages, tmp_path):
    cascade = Cascade(stages)
    assert (cascade.item_shape, cascade.notes, cascade.chain_length) == ((1, 8, 8), [], 4)
    assert cascade.info["fingerprint"] == DATA.fingerprint
    steps = []
    x = cascade.sample(5, 3, progress=lambda stage, n: steps.append((stage, n)), batch=3)
    assert (x.shape, x.dtype, int(x.max()) < 5) == ((5, 1, 8, 8), torch.uint8, True)
    assert steps == [(stage, n) for n in (3, 2) for stage in range(3) for _ in range(4)]
    assert torch.equal(x, cascade.sample(5, 3))
    assert torch.equal(x[:1], cascade.sample(1, 3, batch=1))
    assert torch.equal(cascade.sample(2), cascade.sample(2, 0))
    assert torch.equal(x[2:], cascade.sample(3, 3, first=2))
    assert not torch.equal(x, cascade.sample(5, 3, image_noise=0.9))
    assert torch.equal(cascade.sample(2, 3, "heun"), cascade.sample(2, 3, Sampler("heun", 50)))
    for i, model in enumerate(stages):
        checkpoint.save(model, tmp_path / f"{i}.safetensors")
    loaded = Cascade.load([tmp_path / f"{i}.safetensors" for i in range(3)])
    assert loaded.fingerprints == cascade.fingerprints
    assert loaded.names == [str(tmp_path / f"{i}.safetensors") for i in range(3)]
    assert torch.equal(loaded.sample(2, 3), x[:2])


def test_stages_draw_other_noise(stages):
    """With the same seed the noise of a stage would begin with that of the base."""
    assert stage_seed(3, 0) == 3
    assert len({stage_seed(seed, stage) for seed in range(5) for stage in range(3)}) == 15
    values = []
    with pytest.MonkeyPatch.context() as patch:
        real = Cascade._with_image
        patch.setattr(Cascade, "_with_image", lambda *given: values.append(given[3]) or real(*given))
        Cascade(stages[:2]).sample(2, 3)
    assert torch.equal(values[0], stages[0].sample(2, 3))  # the base draws what it draws alone


def test_the_bound_of_every_stage(stages):
    cascade, x = Cascade(stages), torch.from_numpy(DATA.values[:6])
    nll = cascade.nll(x, seed=1)
    top, middle = cascade.splits[1], cascade.splits[0]
    low = top.low(x.numpy())
    lowest = middle.low(low)
    image = IntegerLevels(5).to_model
    by_hand = [
        stages[0].nll(torch.from_numpy(lowest), 1),
        stages[1].nll(
            torch.from_numpy(middle.rest(low)), stage_seed(1, 1), cond=Condition(image=image(torch.from_numpy(lowest)))
        ),
        stages[2].nll(
            torch.from_numpy(top.rest(x.numpy())), stage_seed(1, 2), cond=Condition(image=image(torch.from_numpy(low)))
        ),
    ]
    torch.testing.assert_close(nll.total, sum(part.total for part in by_hand))
    torch.testing.assert_close(nll.per_step, torch.stack([part.total for part in by_hand], 1))
    torch.testing.assert_close(nll.prior + nll.diffusion_nats + nll.decoder, nll.total)
    torch.testing.assert_close(cascade.nll(x[2:], seed=1, first=2).total, nll.total[2:])
    bits = (nll.per_step.mean(0) / (64 * math.log(2))).tolist()
    shapes = ("1×2×2", "1×4×4", "1×8×8")
    parts = ", ".join(f"{shape} {b:.4f}" for shape, b in zip(shapes, bits, strict=True))
    assert stage_lines(cascade, nll) == f"{parts} bits per dimension of x"
    assert not torch.equal(cascade.nll(x, seed=1, image_noise=0.3).total, nll.total)
    assert cascade.nll(x[:2], estimate="continuous", mc_samples=2).total.isfinite().all()


def test_the_speed_of_a_cascade_is_that_of_items_not_of_stages(stages, monkeypatch):
    """An item costs a call of every stage for each step, and a plan counts its steps."""
    cascade, x = Cascade(stages), torch.from_numpy(DATA.values[:6])
    seconds = iter((0.0, 2.0))
    monkeypatch.setattr("undiffuse.evaluation.plan.time.perf_counter", lambda: next(seconds))
    calls = cascade.nll(x, mc_samples=4).calls
    assert calls % 3 == 0
    assert calls_per_second(cascade, x, None) == calls / 3 * 6 / 2


def test_labels_reach_the_stages_that_accept_them(stages):
    cascade = Cascade([tiny(reduce_data(DATA, 4), classes=2), tiny(split_data(DATA, 4))])
    assert cascade.condition_sizes == {"classes": 2}
    cond = Condition(label=torch.tensor([0, 1]))
    guided = cascade.sample(2, cond=cond, sampler=Sampler(num_steps=4, guidance=3.0))
    assert not torch.equal(guided, cascade.sample(2, cond=cond, sampler=Sampler(num_steps=4)))
    avoiding = {"cond": cond, "sampler": Sampler(num_steps=4, guidance=3.0)}
    away = cascade.sample(2, **avoiding, negative=Condition(label=torch.tensor([1])))
    assert not torch.equal(away[0], guided[0])
    assert torch.equal(cascade.sample(2, **avoiding, negative=Condition(label=torch.tensor([-1]))), guided)  # null
    assert cascade.stage_sampler(1, Sampler(num_steps=9, guidance=3.0)) == Sampler(num_steps=4)
    assert cascade.nll(torch.from_numpy(DATA.values[:2]), cond=cond).total.isfinite().all()
    with pytest.raises(ConfigError, match=r"label: the model was trained without it"):
        Cascade(stages).sample(2, cond=cond)


def test_a_distilled_base_has_its_own_sampler_with_the_guidance():
    like = tiny(reduce_data(DATA, 4), classes=2)
    base = Diffusion(replace(like.config, calls=2), like.item_shape, like.transform, like.info)
    base.load_state_dict(like.state_dict())
    cascade, guided = Cascade([base, tiny(split_data(DATA, 4))]), Sampler(guidance=3.0, threshold="dynamic")
    own, cond = replace(base.default_sampler, guidance=3.0, threshold="dynamic"), Condition(label=torch.tensor([0, 1]))
    assert [cascade.stage_sampler(0, sampler) for sampler in (None, "ddim", guided)] == [base.default_sampler] * 2 + [
        own
    ]
    assert not torch.equal(cascade.sample(2, cond=cond, sampler=guided), cascade.sample(2, cond=cond))
    plain = tiny(split_data(DATA, 4), classes=2)
    base.info |= {"conditional": False}
    assert Cascade([base, plain]).stage_sampler(0, Sampler(guidance=3.0)) == base.default_sampler


def test_a_stage_that_was_trained_without_its_conditions_is_given_none():
    """Its network still accepts the labels of the model that it started from, which need not be those of the base."""
    base, top = tiny(reduce_data(DATA, 4), classes=2), tiny(split_data(DATA, 4), classes=3)
    top.info |= {"conditional": False, "classes": ["a", "b", "c"]}
    cascade, cond = Cascade([base, top]), Condition(label=torch.tensor([0, 1]))
    assert (cascade.condition_sizes, cascade.info["classes"]) == ({"classes": 2}, ["0", "1"])
    assert [cascade._accepted(stage, cond) is None for stage in range(2)] == [False, True]
    assert cascade.stage_sampler(1, Sampler(num_steps=4, guidance=3.0)) == Sampler(num_steps=4)
    guided = {"sampler": Sampler(num_steps=4, guidance=3.0), "negative": cond.take(slice(1))}
    assert cascade.sample(2, cond=cond, **guided).shape == (2, 1, 8, 8)
    base.info["conditional"] = False
    with pytest.raises(ConfigError, match=r"label: the model was trained without it"):
        Cascade([base, top]).sample(2, cond=cond)


def test_stages_of_the_same_images_have_no_note():
    """The base reduces the images of the last stage in one step; those of the stage between are of another map."""
    stages = [reduce_data(DATA, 2), split_data(reduce_data(DATA, 4), 2), split_data(DATA, 4, "haar")]
    (note,) = Cascade([tiny(data) for data in stages], ["base", "middle", "top"]).notes
    assert note.startswith("middle was not trained on the images that top reduces (by --reduce 4 --map haar): ")


def test_stages_that_do_not_fit_are_refused(stages):
    base, middle, top = stages
    named = {"names": ["small", "large"]}
    for models, message in [
        ([base], "at least one more"),
        ([middle, top], "small: it is a super-resolution model, and the first"),
        ([base, base], "large: it is not a super-resolution model.*--from"),
        ([base, top], "small: its images are 1×2×2 with 5 values, and large enlarges 1×4×4 with 5 values"),
        ([tiny(replace(reduce_data(DATA, 4), name="e")), top], "small: it was trained on 'e', and large on 'd'"),
    ]:
        with pytest.raises(ConfigError, match=message):
            Cascade(models, **named)
    other = from_array(DATA.values, num_values=6, name="d")
    with pytest.raises(ConfigError, match="1×4×4 with 6 values, and large enlarges 1×4×4 with 5"):
        Cascade([tiny(reduce_data(other, 4)), top], **named)
    grey = from_array(np.repeat(DATA.values, 3, 1), num_values=5, name="d")
    with pytest.raises(ConfigError, match="3×4×4 with 5 values, and large enlarges 1×4×4"):
        Cascade([tiny(reduce_data(grey, 4)), top], **named)
    continuous = Diffusion(base.config, (1, 4, 4), Identity(), {"name": "d"})
    with pytest.raises(ConfigError, match="1×4×4 with continuous values"):
        Cascade([continuous, top], **named)
    classes = [tiny(reduce_data(DATA, 4), classes=2), tiny(split_data(DATA, 4), classes=3)]
    with pytest.raises(ConfigError, match="text encoder are not those of large"):
        Cascade(classes, **named)
    embedded = [tiny(reduce_data(DATA, 4), tokens=2, vector=2), tiny(split_data(DATA, 4), tokens=2, vector=2)]
    embedded[0].info["text_encoder"] = {"name": "enc", "digest": "1"}
    for name in ("enc", "moved"):
        embedded[1].info["text_encoder"] = {"name": name, "digest": "1"}
        Cascade(embedded, **named)
    embedded[1].info["text_encoder"] = {"name": "enc", "digest": "2"}
    with pytest.raises(ConfigError, match="text encoder are not those of large"):
        Cascade(embedded, **named)
    damaged = tiny(split_data(DATA, 4))
    damaged.info["stage"] = {**damaged.info["stage"], "map": "haar"}
    with pytest.raises(ConfigError, match="large: its facts about the data"):
        Cascade([base, damaged], **named)
    damaged.info["stage"] = "?"
    with pytest.raises(ConfigError, match="large: it is not a super-resolution model"):
        Cascade([base, damaged], **named)
    with pytest.raises(ConfigError, match=r"image_noise = 1.5: it is not .*\. Give 0 for none"):
        Cascade(stages).sample(1, image_noise=1.5)
    with pytest.raises(DataError, match="range from 9 to 9"):
        Cascade(stages).nll(torch.full((1, 1, 8, 8), 9))
    resized = tiny(from_array(DATA.values[:, :, ::2, ::2], num_values=5, name="d"))
    assert "was not trained on the images that" in Cascade([resized, top], **named).notes[0]
