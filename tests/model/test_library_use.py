"""A model in a program of one's own: other types, copies, inference mode, and arguments that are refused by name."""

import copy
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_diffusion import HO, MLP, NET, model, numbers
from torch import nn

from undiffuse.data.transform import Identity, IntegerLevels
from undiffuse.denoising.guidance import Guide
from undiffuse.errors import CheckpointError, ConfigError, DataError
from undiffuse.model import noisy_classifier
from undiffuse.model.checkpoint import load, save
from undiffuse.model.config import ModelConfig
from undiffuse.model.diffusion import Diffusion
from undiffuse.model.noisy_classifier import NoisyClassifier, NoisyClassifierConfig
from undiffuse.model.restoration import Degradation, restore
from undiffuse.networks.condition import Condition
from undiffuse.process.schedule import SCHEDULES
from undiffuse.process.target import TARGETS
from undiffuse.sampling.sampler import DEFAULT_SAMPLER, Sampler

LEARNED = {"schedule": {"name": "learned"}, "times": {"name": "uniform", "low": 0.0}, "loss": "continuous"}
KINDS = {
    "values": {},
    "categorical": {"output": "categorical"},
    "ho": HO,
    "learned variance": {**HO, "loss": "hybrid", "variance": "learned"},
    "conditional": {"network": {**NET, "classes": 3, "vector": 2, "tokens": 4}},
}
FOUR = Sampler(num_steps=4)


def condition(settings, n=6):
    if "network" not in settings:
        return None
    g = torch.Generator().manual_seed(1)
    label, tokens = torch.arange(n) % 3, torch.randn(n, 5, 4, generator=g)
    return Condition(label=label, vector=torch.randn(n, 2, generator=g), tokens=tokens)


def results(diffusion, settings):
    """(bound, last states of samples, noise) of a model, float64."""
    values, cond = numbers()[0], condition(settings)
    *_, last = diffusion.trajectory(range(6), 2, FOUR, cond)
    bound = diffusion.nll(values, mc_samples=2, cond=cond).total / 16
    return [x.double() for x in (bound, last.x, diffusion.to_noise(values, 4, cond))]


@pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS)
def test_a_cast_model_gives_the_same_to_the_precision_of_its_type(settings):
    expected = results(model(scale=0.1, **settings), settings)
    for cast, tolerance in (("double", 1e-4), ("bfloat16", 0.1), ("half", 0.02)):
        diffusion = getattr(model(scale=0.1, **settings), cast)()
        got = results(diffusion, settings)
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance, msg=cast)
        assert diffusion.dtype == (torch.float64 if cast == "double" else torch.float32)
        values, u, eps = numbers()
        if diffusion.config.loss == "weighted_mse":
            diffusion.loss(values, u, eps, cond=condition(settings)).mean().backward()
            assert all(p.grad.dtype == p.dtype for p in diffusion.parameters() if p.grad is not None)


@pytest.mark.parametrize("estimate", ["continuous", "ode"])
def test_the_other_estimates_of_a_cast_model(estimate):
    values = torch.tensor([[0, 4], [2, 1]])
    expected = model((2,), scale=0.1).nll(values, estimate=estimate, mc_samples=2).total
    for cast, tolerance in (("double", 1e-4), ("bfloat16", 0.05), ("half", 0.01)):
        got = getattr(model((2,), scale=0.1), cast)().nll(values, estimate=estimate, mc_samples=2).total
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def test_double_precision_reaches_from_the_input_to_the_state():
    """In float64 the flow and its inverse agree to 1e-10 of the values' size, which float32 does not reach."""
    noise = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    diffusion = model(scale=0.1, codec=Identity()).double()
    again = diffusion.to_noise(diffusion.from_noise(noise, 10), 10)
    assert diffusion.from_noise(noise, 10).dtype == again.dtype == torch.float64
    one, other = (diffusion.from_noise(noise + shift, 10) for shift in (0.0, 1e-12))
    assert 0 < float((one - other).abs().max()) < 1e-10


def test_a_learned_schedule_stays_float64():
    diffusion = Diffusion(ModelConfig(network=MLP, chain_length=10, **LEARNED), (2,), IntegerLevels(5)).bfloat16()
    assert all(p.dtype == torch.float64 for p in diffusion.schedule.parameters())
    for estimate in ("discrete", "continuous", "ode"):
        nll = diffusion.nll(torch.tensor([[0, 4], [2, 1]]), estimate=estimate, mc_samples=1)
        assert torch.isfinite(nll.total).all()


def test_a_network_of_ones_own_gets_its_input_in_its_own_type():
    class Net(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.conv = nn.Conv2d(channels, channels, 1)

        def forward(self, x, time, cond=None):
            assert x.dtype == self.conv.weight.dtype
            assert time.dtype == torch.promote_types(x.dtype, torch.float32), (
                "in bfloat16 the steps 999 and 1000 are equal"
            )
            return self.conv(x)

    for network in (Net, Net(1).double(), Net(1).bfloat16()):
        diffusion = Diffusion(ModelConfig(chain_length=5), (1, 4, 4), IntegerLevels(5), network=network)
        for cast in (diffusion, diffusion.bfloat16(), diffusion.double()):
            assert cast.sample(1).shape == (1, 1, 4, 4)
            assert torch.isfinite(cast.nll(numbers()[0][:2]).total).all()


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_model_is_copied_and_pickled(copied, target):
    schedule = {} if target not in ("posterior", "previous") else HO
    diffusion = model(**(schedule | {"target": {"name": target}}))
    again, values = copied(diffusion), numbers()[0]
    assert torch.equal(again.nll(values, mc_samples=2).total, diffusion.nll(values, mc_samples=2).total)
    assert torch.equal(again.sample(2), diffusion.sample(2))
    assert not {p.data_ptr() for p in again.parameters()} & {p.data_ptr() for p in diffusion.parameters()}


TABLES = ("linear", "linear_rescaled", "quadratic", "cosine", "diffusers", "learned_chain")


@pytest.mark.parametrize("name", sorted(set(SCHEDULES) - {"tabulated"}))
def test_a_model_of_every_schedule_is_pickled(name):
    settings = {"name": name, **({"T": 10} if name in TABLES else {})}
    settings |= {"first": 0.01, "last": 0.3} if name in ("linear", "quadratic", "diffusers") else {}
    others = {k: v for k, v in LEARNED.items() if k != "schedule"} if name == "learned" else {}
    others |= {"loss": "full_bound"} if name == "learned_chain" else {}
    diffusion = Diffusion(ModelConfig(MLP, settings, chain_length=10, **others), (2,), Identity())
    again, chain = pickle.loads(pickle.dumps(diffusion)), diffusion.chain
    for one, other in zip(again.chain, chain, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one[:4], other[:4], strict=True))
    assert torch.equal(again.sample(1), diffusion.sample(1))


@pytest.mark.parametrize("estimate", ["discrete", "continuous", "ode"])
@pytest.mark.parametrize("codec", [IntegerLevels(5), Identity()], ids=["integers", "numbers"])
def test_everything_works_under_inference_mode(estimate, codec):
    settings = {"network": {**MLP, "classes": 3, "vector": 2, "tokens": 4}}
    diffusion, values, cond = model((2,), codec, **settings), torch.tensor([[0, 4], [2, 1]]), condition(settings, 2)
    values = values if isinstance(codec, IntegerLevels) else values.float()
    expected = diffusion.nll(values, estimate=estimate, mc_samples=2, cond=cond).total
    with torch.inference_mode():
        inside = Condition(
            *(None if v is None else v.clone() for v in (cond.label, cond.vector, cond.tokens, cond.mask))
        )
        assert torch.equal(diffusion.nll(values.clone(), estimate=estimate, mc_samples=2, cond=inside).total, expected)
        built = model((2,), codec, **settings)
        assert torch.equal(built.nll(values, estimate=estimate, mc_samples=2, cond=cond).total, expected)


def classifier(classes=3):
    torch.manual_seed(0)
    names = tuple(map(str, range(classes)))
    return NoisyClassifier(NoisyClassifierConfig(NET), (1, 4, 4), IntegerLevels(5), names).eval()


def test_guided_samples_and_restorations_under_inference_mode(tmp_path):
    diffusion, cond, guide = model(), Condition(label=torch.tensor([0, 2])), Guide(classifier().log_prob)
    known = torch.tensor([[1, 1, 0, 0]] * 4, dtype=torch.bool)[None]
    work = [
        lambda cond: diffusion.sample(2, sampler=FOUR, cond=cond, guide=guide),
        lambda cond: list(diffusion.trajectory(range(2), 0, FOUR, cond, guide))[-1].x,
        lambda cond: restore(diffusion, Degradation((1, 4, 4), known=known), torch.zeros(1, 4, 4), 2, num_steps=3),
    ]
    expected = [one(cond) for one in work]
    with torch.inference_mode():
        for one, result in zip(work, expected, strict=True):
            assert torch.equal(one(Condition(label=cond.label.clone())), result)


def test_weights_made_under_inference_mode_are_named():
    with torch.inference_mode():
        diffusion = model().double()
    with pytest.raises(ConfigError, match=r"INFERENCE_MODE\] model: the weights were made under .*flow's likelihood"):
        diffusion.nll(numbers()[0], estimate="ode")
    with pytest.raises(ConfigError, match="classifier's guidance needs gradients"):
        diffusion.sample(2, cond=Condition(label=torch.tensor([0, 1])), guide=Guide(classifier().log_prob))
    assert torch.isfinite(diffusion.nll(numbers()[0], mc_samples=2).total).all()


INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.int64, torch.bool]


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_labels_of_any_integer_type(dtype):
    diffusion, label = model(network={**NET, "classes": 3}), torch.tensor([0, 1])
    values, sampler = numbers()[0][:2], Sampler(num_steps=2, guidance=2.0)
    cond, same = Condition(label=label.to(dtype)), Condition(label=label)
    assert torch.equal(diffusion.sample(2, sampler=sampler, cond=cond), diffusion.sample(2, sampler=sampler, cond=same))
    assert torch.equal(diffusion.nll(values, cond=cond).total, diffusion.nll(values, cond=same).total)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"label": torch.zeros(2)}, "condition.label: it holds torch.float32, not whole numbers"),
        ({"label": [0, 1]}, "condition.label: it is a list, not a tensor"),
        ({"label": np.zeros(2, int)}, "condition.label: it is a ndarray, not a tensor"),
        ({"tokens": [[1.0]]}, "condition.tokens: it is a list, not a tensor"),
        ({"tokens": torch.zeros(2, 1, 4), "mask": torch.ones(2, 1)}, "condition.mask: it holds torch.float32"),
    ],
)
def test_fields_of_a_condition_of_other_types_are_refused(fields, words):
    with pytest.raises(ConfigError, match=words):
        Condition(**fields)


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize(
    ("cond", "words"),
    [
        (Condition(label=torch.tensor([0, 3])), "it ranges from 0 to 3"),
        (Condition(label=torch.tensor([0, -2])), "it ranges from -2 to 0"),
        (Condition(label=torch.tensor([0, 1, 2])), r"its shape is \(3,\), not \(2,"),
        (torch.tensor([0, 1]), "cond: it is a Tensor, not a Condition"),
        (Condition(vector=torch.zeros(3, 2)), r"condition.vector"),
    ],
)
def test_a_condition_is_validated_with_a_guide_as_without(cond, words, guided):
    guide = Guide(classifier().log_prob) if guided else None
    with pytest.raises(ConfigError, match=words):
        model(network={**NET, "classes": 3}).sample(2, sampler=FOUR, cond=cond, guide=guide)


def test_a_label_that_only_the_classifier_takes_is_validated():
    diffusion, guide = model(), Guide(classifier(3).log_prob)
    assert diffusion.sample(2, sampler=FOUR, cond=Condition(label=torch.tensor([2, -1])), guide=guide).shape[0] == 2
    wrong = Condition(label=torch.tensor([0, 3]))
    for use in (
        lambda: diffusion.sample(2, 0, FOUR, wrong, guide=guide),
        lambda: diffusion.trajectory(range(2), 0, FOUR, wrong, guide),  # before the first step
        lambda: guide.log_prob(torch.zeros(2, 1, 4, 4), diffusion.chain[0], wrong),
    ):
        with pytest.raises(ConfigError, match=r"the classifier has no label 3\. Labels are 0 to 2"):
            use()
    with pytest.raises(ConfigError, match=r"its shape is \(3,\), not \(2, \.\.\.\)"):
        diffusion.sample(2, sampler=FOUR, cond=Condition(label=torch.tensor([0, 1, 2])), guide=guide)


COUNTS = [("n", 0), ("n", -1), ("n", 1.5), ("n", True), ("n", "2"), ("batch", 0), ("batch", -1), ("batch", None)]
COUNTS += [("first", -1), ("seed", -1), ("seed", "a"), ("seed", 1.0), ("seed", None)]


@pytest.mark.parametrize(("name", "value"), COUNTS)
def test_wrong_numbers_are_refused(name, value):
    diffusion, values = model(), numbers()[0]
    with pytest.raises(ConfigError, match=rf"error\[ARGUMENT\] {name} = .*: it is not a whole number of at least [01]"):
        diffusion.sample(**({"n": 2} | {name: value}))
    if name != "n":
        with pytest.raises(ConfigError, match=rf"error\[ARGUMENT\] {name} = "):
            diffusion.nll(values, **{name: value})
    if name != "first":
        with pytest.raises(ConfigError, match=rf"error\[ARGUMENT\] {name} = "):
            restore(diffusion, Degradation((1, 4, 4)), torch.zeros(1, 4, 4), **({"n": 1} | {name: value}))


def test_numbers_of_numpy_are_numbers():
    diffusion = model()
    one = diffusion.sample(np.int64(2), seed=np.int32(1), batch=np.int16(1), first=np.uint8(3))
    assert torch.equal(one, diffusion.sample(2, seed=1, first=3))


@pytest.mark.parametrize("value", [0, -1, 1.5])
def test_a_wrong_number_of_draws_or_steps_is_refused(value):
    with pytest.raises(ConfigError, match=r"mc_samples = "):
        model().nll(numbers()[0], mc_samples=value)
    with pytest.raises(ConfigError, match=r"num_steps = "):
        model().to_noise(numbers()[0], num_steps=value)
    with pytest.raises(ConfigError, match=r"num_steps = "):
        model().sample(1, sampler=Sampler(num_steps=value))


@pytest.mark.parametrize("sampler", [3, {"solver": "ddim"}, Sampler])
def test_what_is_no_sampler_is_refused(sampler):
    with pytest.raises(ConfigError, match="neither a Sampler nor the name of a solver"):
        model().sample(1, sampler=sampler)


SHAPES = [(1, 4, 3), (4, 4), (1, 1, 4, 4), (2, 4, 4), ()]


@pytest.mark.parametrize("shape", SHAPES)
def test_items_of_another_shape_are_refused(shape):
    values = torch.zeros(2, *shape, dtype=torch.uint8)
    _, u, eps = numbers(2)
    for use in (
        lambda m: m.nll(values),
        lambda m: m.to_noise(values),
        lambda m: m.from_noise(values.float()),
        lambda m: m.loss(values, u, eps),
        lambda m: m.loss(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), u, values.float()),
        lambda m: m.loss(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), u, eps, values.float()),
        lambda m: restore(m, Degradation((1, 4, 4)), torch.zeros(shape), 1),
    ):
        with pytest.raises(
            ConfigError, match=r"error\[ARGUMENT\] (values|noise|eps|z|image): its shape is .*, not \(n, "
        ):
            use(model())


def test_batches_of_unequal_length_and_no_items_are_refused():
    diffusion, (values, u, eps) = model(), numbers()
    for arguments in ((values, u[:3], eps), (values, u[:, None], eps), (values, None, eps), (values, u, eps[:3])):
        with pytest.raises(ConfigError, match=r"error\[ARGUMENT\] (u|eps): "):
            diffusion.loss(*arguments)
    for use in (diffusion.nll, diffusion.to_noise):
        with pytest.raises(ConfigError, match="values: it has no items"):
            use(values[:0])
        for wrong in (values.numpy(), values.tolist(), None):
            with pytest.raises(ConfigError, match=r"values: it is a .*, not a tensor"):
                use(wrong)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64], ids=str)
@pytest.mark.parametrize("value", [5, 255, -1])
def test_values_outside_of_the_levels_are_refused(dtype, value):
    values = numbers()[0].to(dtype)
    values[3, 0, 1, 2] = value
    shown = int(values.max()) if value > 0 or dtype == torch.uint8 else value
    for use in (model().nll, model().to_noise):
        with pytest.raises(DataError, match=rf"error\[RANGE\] values: they range from .*{shown}.* values are 0 to 4"):
            use(values)


def test_fractions_and_numbers_that_are_not_finite_are_refused():
    with pytest.raises(ConfigError, match=r"values: they are torch.float32, and the model is of whole numbers"):
        model().nll(numbers()[0].float())
    for value in (float("nan"), float("inf")):
        with pytest.raises(DataError, match=r"error\[NON_FINITE\] values: some are NaN or infinite"):
            model(codec=Identity()).nll(torch.full((1, 1, 4, 4), value))


def test_more_steps_than_the_chain_has_are_refused():
    diffusion, values = model(), numbers()[0]
    for use in (
        lambda: diffusion.sample(1, sampler=Sampler(num_steps=11)),
        lambda: diffusion.sample(1, sampler=Sampler()),
        lambda: diffusion.trajectory(range(1), sampler=Sampler("heun", 11)),
        lambda: diffusion.to_noise(values, 11),
        lambda: diffusion.from_noise(values.float(), 11),
        lambda: restore(diffusion, Degradation((1, 4, 4)), torch.zeros(1, 4, 4), 1, num_steps=11),
    ):
        with pytest.raises(
            ConfigError, match=r"num_steps = (11|50): the model's chain has 10 steps\. Give at most as ma"
        ):
            use()
    whole = diffusion.sample(1, sampler=Sampler(num_steps=None))
    assert torch.equal(diffusion.sample(1, sampler="ddim"), whole), "50 steps, or those of a shorter chain"
    default = replace(DEFAULT_SAMPLER, num_steps=None)
    assert torch.equal(diffusion.sample(1), diffusion.sample(1, sampler=default)), "25 steps, or those of a shorter one"
    assert torch.equal(diffusion.to_noise(values), diffusion.to_noise(values, 10))
    falling = tuple(i / 20 for i in range(20, -1, -1))
    assert len(diffusion.noise_levels(Sampler(times=falling))) == 21, "explicit times are the user's own"


def test_loading_does_not_move_the_global_generator(tmp_path):
    save(model(), tmp_path / "model.safetensors")
    noisy_classifier.save(classifier(), tmp_path / "classifier.safetensors")
    for read, name in ((load, "model"), (noisy_classifier.load, "classifier")):
        torch.manual_seed(5)
        before = torch.get_rng_state()
        read(tmp_path / f"{name}.safetensors")
        assert torch.equal(torch.get_rng_state(), before)


def broken(kind):
    diffusion = model()
    if kind in ("double", "bfloat16"):
        return getattr(diffusion, kind)(), r"\[TENSOR\].*holds torch.(float64|bfloat16), not torch.float32"
    if kind == "meta":
        return diffusion.to("meta"), r"\[TENSOR\].*holds no data"
    if kind == "other layer":
        diffusion.network.conv_out = nn.Conv2d(8, 3, 3)
        return diffusion, r"\[TENSOR\] .*conv_out.bias' has the shape \(3,\), not \(1,\)"
    if kind in ("tensor", "loop", "set", "long", "keys"):
        info = {
            "tensor": {"a": torch.zeros(1)},
            "set": {"a": {1}},
            "long": {"a": "a" * (5 << 20)},
            "keys": {1: 1, "a": 2},
        }
        diffusion.info = info.get(kind, {})
        if kind == "loop":
            diffusion.info["a"] = diffusion.info
        return diffusion, r"\[DESCRIPTION\]"
    if kind == "float chain":
        return Diffusion(
            ModelConfig(NET, chain_length=10.0), (1, 4, 4), IntegerLevels(5)
        ), r"\[DESCRIPTION\].*chain_length"
    with torch.no_grad():
        next(diffusion.parameters()).fill_(float(kind))
    return diffusion, r"\[NON_FINITE\].*holds values that are NaN or infinite"


KINDS_OF_DAMAGE = ["nan", "inf", "double", "bfloat16", "meta", "other layer", "tensor", "loop", "set", "long", "keys"]


@pytest.mark.parametrize("kind", [*KINDS_OF_DAMAGE, "float chain"])
def test_what_load_would_refuse_is_not_saved(tmp_path, kind):
    diffusion, words = broken(kind)
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"the model before")
    with pytest.raises(CheckpointError, match=words):
        save(diffusion, path)
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
    assert path.read_bytes() == b"the model before"


def test_a_classifier_that_load_would_refuse_is_not_saved(tmp_path):
    with pytest.raises(CheckpointError, match=r"holds torch\.float64, not torch\.float32"):
        noisy_classifier.save(classifier().double(), tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())
    x, level = torch.randn(2, 1, 4, 4), classifier().schedule(torch.tensor(0.5))
    for cast in ("double", "bfloat16"):
        torch.testing.assert_close(
            getattr(classifier(), cast)()(x, level).float(), classifier()(x, level), atol=0.1, rtol=0.1
        )
