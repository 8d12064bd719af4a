import itertools
import math
from types import MethodType

import pytest
import torch

from undiffuse.data.transform import Identity, IntegerLevels, Standardized
from undiffuse.denoising.denoiser import ConditionedDenoiser
from undiffuse.denoising.guidance import Guide
from undiffuse.errors import ConfigError, NonFiniteError
from undiffuse.model.config import Config, ModelConfig, TrainConfig
from undiffuse.model.diffusion import Diffusion
from undiffuse.model.inversion import interpolate
from undiffuse.model.restoration import Degradation, restore
from undiffuse.model.sdedit import sdedit
from undiffuse.networks.condition import Condition
from undiffuse.process.seeded_noise import ItemNoise
from undiffuse.sampling.sampler import Sampler
from undiffuse.sampling.solvers.ancestral import Ancestral
from undiffuse.training.diffusion_task import DiffusionTask

NET = {"kind": "unet", "widths": (8,), "blocks": 1, "attention": ()}
MLP = {"kind": "mlp", "width": 8, "depth": 1}
NOISY = {"schedule": {"name": "linear_log_snr", "high": 1.0}}
HO = {
    "schedule": {"name": "linear", "T": 10, "first": 0.01, "last": 0.3},
    "target": {"name": "eps"},
    "weight": {"name": "simple"},
    "times": {"name": "steps"},
    "preconditioning": {"scale": "none", "time": "step"},
}


def model(shape=(1, 4, 4), codec=None, seed=0, scale=0.3, **settings) -> Diffusion:
    """A tiny model with all weights random (of ``scale``), since a new network returns 0."""
    network = MLP if len(shape) == 1 else NET
    torch.manual_seed(seed)
    built = Diffusion(
        ModelConfig(**({"network": network, "chain_length": 10} | settings)),
        shape,
        IntegerLevels(5) if codec is None else codec,
    )
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.normal_(std=scale)
    return built.eval()


def numbers(n=6, shape=(1, 4, 4), levels=5):
    g = torch.Generator().manual_seed(3)
    values = torch.randint(levels, (n, *shape), generator=g, dtype=torch.uint8)
    return values, (torch.arange(n) + 0.5) / n, torch.randn(n, *shape, generator=g)


def test_loss_of_ho_by_hand():
    diffusion = model(**HO)
    values, u, eps = numbers()
    k = (u * 10).floor().long()  # 0..9, as in Ho's code
    beta = torch.linspace(0.01, 0.3, 10, dtype=torch.float64)
    alpha_bar = torch.cumprod(1 - beta, 0)[k].view(-1, 1, 1, 1)
    x = values / 2 - 1  # five levels on [-1, 1]
    x_t = (alpha_bar.sqrt() * x + (1 - alpha_bar).sqrt() * eps).float()
    expected = ((eps - diffusion.network(x_t, k.float(), None)) ** 2).mean((1, 2, 3))
    assert torch.equal(values.unique(), torch.arange(5, dtype=torch.uint8))
    torch.testing.assert_close(diffusion.loss(values, u, eps), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("target", ["x", "eps", "v", "edm", "posterior", "previous"])
@pytest.mark.parametrize("weight", ["simple", "bound", "edm"])
def test_the_loss_of_every_target_is_that_of_its_eps(target, weight):
    """w_eps ‖eps − ε̂‖², where the bound's weight counts all steps; only `previous` has a term c z."""
    diffusion = model(**(HO | {"target": {"name": target}, "weight": {"name": weight}}))
    values, u, eps = numbers()
    z = torch.zeros_like(eps)
    loss = diffusion.loss(values, u, eps, z)
    t, s = diffusion.schedule((u * 10).floor() / 10 + 0.1), diffusion.schedule((u * 10).floor() / 10)
    x_t = t.broadcast_like(eps).alpha * (values / 2 - 1) + t.broadcast_like(eps).sigma * eps
    error = ((eps - diffusion.denoiser()(x_t, t).eps) ** 2).mean((1, 2, 3))
    s = s._replace(final_log_var=diffusion.chain[-1].final_log_var.expand(6))
    w = 10 * diffusion.weight(t, s) if weight == "bound" else diffusion.weight(t)
    torch.testing.assert_close(loss, w.float() * error, rtol=1e-4, atol=1e-5)
    changed = diffusion.loss(values, u, eps, z + 1)
    first = u < 0.1  # the last step adds no noise
    assert torch.equal(changed != loss, ~first if target == "previous" else torch.zeros(6, dtype=torch.bool))


@pytest.mark.parametrize("loss", ["weighted_mse", "bound"])
@pytest.mark.parametrize("schedule", ["linear_log_snr", "linear", "cosine", "sigmoid", "variance_exploding"])
def test_gradients_reach_the_whole_network(loss, schedule):
    table = {"T": 10, "first": 0.01, "last": 0.3} if schedule == "linear" else {"T": 10} if schedule == "cosine" else {}
    diffusion = model(schedule={"name": schedule, **table}, loss=loss)
    values, u, eps = numbers()
    result = diffusion.loss(values, u, eps)
    assert result.shape == (6,)
    assert torch.isfinite(result).all()
    result.mean().backward()
    for name, parameter in diffusion.network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_the_loss_is_of_the_network_that_is_passed():
    one, other = model(seed=0), model(seed=1)
    values, u, eps = numbers()
    assert torch.equal(one.loss(values, u, eps, network=other.network), other.loss(values, u, eps))


@pytest.mark.parametrize("settings", [{"loss": "hybrid"}, {"loss": "bound"}])
@pytest.mark.parametrize("schedule", [HO["schedule"], {"name": "linear_log_snr", "high": 6.0}])
def test_learned_variance(settings, schedule):
    diffusion = model(variance="learned", schedule=schedule, scale=0.1, **settings)
    values, u, eps = numbers()
    loss = diffusion.loss(values, u, eps)
    assert torch.isfinite(loss).all()
    loss.mean().backward()
    gradient = diffusion.network.conv_out.weight.grad.flatten(1).abs().sum(1)
    assert gradient.shape == (2,)  # one channel of the mean, one of the variance
    assert (gradient > 0).all()
    assert torch.isfinite(diffusion.nll(values).total).all()
    assert diffusion.sample(2, sampler=Sampler("ancestral", None)).dtype == torch.uint8


def test_the_hybrid_loss_is_the_simple_one_plus_a_thousandth_of_the_bound():
    learned = HO | {"variance": "learned"}
    hybrid, bound = model(loss="hybrid", **learned), model(loss="bound", **learned)
    values, u, eps = numbers()
    t = hybrid.schedule((u * 10).floor() / 10 + 0.1)
    x_t = t.broadcast_like(eps).alpha * (values / 2 - 1) + t.broadcast_like(eps).sigma * eps
    simple = ((eps - hybrid.denoiser()(x_t, t).eps) ** 2).mean((1, 2, 3))
    expected = simple + 0.001 * bound.loss(values, u, eps)
    torch.testing.assert_close(hybrid.loss(values, u, eps), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("variance", ["small", "large", "learned"])
@pytest.mark.parametrize("schedule", [HO["schedule"], {"name": "linear_log_snr", "high": 6.0}])
def test_the_bound_as_a_loss_is_the_step_of_the_bound(variance, schedule):
    """T times the term of `nll` for the same step and noise, per dimension, also of step 1."""
    diffusion = model(**(HO | {"schedule": schedule}), loss="bound", variance=variance, scale=0.1)
    values, _, _ = numbers(4)
    terms = diffusion.nll(values, seed=1).per_step
    noise = ItemNoise(1, range(4), (1, 4, 4), "bound")
    for k in range(1, 11):
        loss = diffusion.loss(values, torch.full((4,), (k - 0.5) / 10), noise(1)[0])
        torch.testing.assert_close(loss.double(), 10 * terms[:, k - 1] / 16, rtol=1e-3, atol=1e-4)


FLOW = {"schedule": {"name": "flow"}}


@pytest.mark.parametrize(
    ("settings", "cause"),
    [
        ({"loss": "best"}, "model.loss = 'best': unknown"),
        ({"variance": "best"}, "model.variance = 'best': unknown"),
        ({"loss": "hybrid"}, "loss 'hybrid' does not train variance 'small'"),
        ({"loss": "hybrid", "variance": "large"}, "loss 'hybrid' does not train variance 'large'"),
        ({"variance": "learned"}, "loss 'weighted_mse' does not train variance 'learned'"),
        (
            {"chain_length": 20, "schedule": {"name": "linear", "T": 10}},
            "model.chain_length: 20, but the schedule has 10",
        ),
        *[
            ({"chain_length": n}, f"model.chain_length: {n} steps. Give a number from 1 to 10,000")
            for n in (0, -1, 10**9)
        ],
        (FLOW | {"target": {"name": "eps"}}, "zero-terminal SNR"),
        (FLOW | {"target": {"name": "score"}}, "zero-terminal SNR"),
        ({"target": {"name": "previous"}}, "defined by the steps of a chain"),
        *[({part: {"name": "best"}}, "'best'") for part in ("schedule", "target", "weight", "times")],
        *[({part: {}}, f"model.{part}: {{}}: this part has no name") for part in ("schedule", "target", "times")],
        ({"network": {}}, "model.network: {}: this part has no kind"),
        ({"network": {"kind": "best"}}, "there is no network 'best'"),
        ({"weight": {"name": ["edm"]}}, "this part has no name"),
        *[({part: {"name": name, "zz": 1}}, "no ") for part, name in (("target", "v"), ("weight", "edm"))],
        ({"times": {"name": "uniform", "zz": 1}}, "no such setting"),
        ({"times": {"name": "uniform", "low": "a"}}, "model.times: '<=' not supported"),
        ({"times": {"name": "uniform", "low": -1.0}}, "low and high are not 0 <= low <= high <= 1"),
        ({"times": {"name": "uniform", "T": 3}}, "model.times.T = 3: the rest of the model and the data make it 10"),
        ({"weight": {"name": "min_snr", "limit": "a"}}, "do not work together"),
        ({"preconditioning": {"zz": 1}}, "model.preconditioning: "),
        ({"preconditioning": {"scale": "best"}}, "scale = 'best': unknown"),
        ({"preconditioning": {"time": "best"}}, "time = 'best': unknown"),
        ({"network": NET | {"zz": 1}}, "no such setting"),
        ({"network": NET | {"channels": 3}}, "model.network.channels = 3"),
        ({"network": NET | {"dims": 3}}, "model.network.dims = 3: the rest of the model and the data make it 2"),
        ({"network": MLP}, "a network of kind 'mlp' does not take items of shape (1, 4, 4)"),
        ({"network": NET, "shape": (2,)}, "a network of kind 'unet' does not take items of shape (2,)"),
    ],
)
def test_parts_that_do_not_fit_are_refused_at_construction(settings, cause):
    with pytest.raises(ConfigError) as caught:
        model(**settings)
    text = str(caught.value)
    assert cause in text
    assert "\n" not in text


def test_settings_may_repeat_what_the_model_supplies():
    assert model(network=NET | {"dims": 2, "channels": 1}).dims == 16
    assert model((3,), Identity(), **FLOW).dims == 3


def test_samples_do_not_depend_on_the_batch_and_continue_from_any_item():
    diffusion = model(codec=Identity())
    for solver in ("ddim", "ancestral"):
        whole = diffusion.sample(7, seed=5, sampler=Sampler(solver, num_steps=5))
        assert whole.shape == (7, 1, 4, 4)
        for batch in (1, 3):
            torch.testing.assert_close(
                diffusion.sample(7, seed=5, batch=batch, sampler=Sampler(solver, num_steps=5)), whole, rtol=0, atol=1e-4
            )
        later = diffusion.sample(3, seed=5, first=4, sampler=Sampler(solver, num_steps=5))
        torch.testing.assert_close(later, whole[4:], rtol=0, atol=1e-4)
        assert torch.equal(diffusion.sample(7, seed=5, sampler=Sampler(solver, num_steps=5)), whole)
        assert (diffusion.sample(7, seed=6, sampler=Sampler(solver, num_steps=5)) - whole).abs().min(
            0
        ).values.max() > 1e-2
    first = [next(diffusion.trajectory(items, seed=5)).x for items in (range(4), range(2, 4))]
    assert torch.equal(first[0][2:], first[1])


def test_the_ends_of_an_interpolation_have_the_first_and_the_last_condition():
    diffusion = model((2,), Identity(), network={**MLP, "classes": 3})
    ends, cond = torch.tensor([[0.5, -1.0], [1.5, 0.2]]), Condition(label=torch.tensor([0, 2, 2, 1]))
    values = interpolate(diffusion, ends, 4, cond=cond)
    torch.testing.assert_close(values[[0, -1]], ends, rtol=0, atol=2e-2)
    swapped = interpolate(diffusion, ends, 4, cond=Condition(label=torch.tensor([0, 2, 2, 2])))
    torch.testing.assert_close(swapped[[0, -1]], ends, rtol=0, atol=2e-2)
    assert (swapped - values).abs().max() > 1e-3


@pytest.mark.parametrize("call", ["sample", "to_noise", "from_noise"])
def test_an_item_that_becomes_infinite_is_an_error_and_no_value(call):
    diffusion = model((2,), Identity())
    with torch.no_grad():
        for parameter in diffusion.parameters():
            parameter.fill_(3e19)
    given = 5 if call == "sample" else torch.ones(5, 2)
    with pytest.raises(NonFiniteError, match="item 0: 5 of 5 samples became NaN or infinite"):
        getattr(diffusion, call)(given)


def test_samples_are_values_of_the_data():
    diffusion = model(scale=1.0)
    counted = []
    values = diffusion.sample(20, sampler=Sampler(num_steps=5), batch=8, progress=counted.append)
    assert values.dtype == torch.uint8
    assert values.max() <= 4
    assert counted == [8] * 5 + [8] * 5 + [4] * 5  # item-steps
    states = [s.x for s in diffusion.trajectory(range(20), sampler=Sampler(num_steps=5))]
    assert len(states) == 6
    assert states[-1].abs().max() <= 1.0001 / 0.9  # clipped
    unclipped = list(diffusion.trajectory(range(20), sampler=Sampler(num_steps=5, clip=False)))[-1].x
    assert unclipped.abs().max() > 2
    shifted = Standardized((100.0, -7.0), (1e-3, 2.0))
    vectors = model((2,), shifted, scale=0.1).sample(50, sampler=Sampler(num_steps=5))
    assert (vectors[:, 0] - 100).abs().max() < 0.1
    assert vectors[:, 1].std() > 0.3


def test_a_trajectory_records_no_gradients_and_needs_no_eval():
    diffusion = model(network={**NET, "dropout": 0.5}).train()
    states = [step.x for step in diffusion.trajectory(range(2), sampler=Sampler(num_steps=3))]
    assert not any(x.requires_grad for x in states)
    assert torch.equal(diffusion.sample(2, sampler=Sampler(num_steps=3)), diffusion.transform.to_data(states[-1]))


METHODS = {
    "sample": lambda model, values: model.sample(2, sampler=Sampler(num_steps=2)),
    "nll": lambda model, values: model.nll(values, mc_samples=2).total,
    "to_noise": lambda model, values: model.to_noise(values, 2),
    "from_noise": lambda model, values: model.from_noise(values / 2 - 1, 2),
    "restore": lambda model, values: restore(model, Degradation((1, 4, 4)), values[0] / 2 - 1, 2, num_steps=2),
    "sdedit": lambda model, values: sdedit(model, values[0] / 2 - 1, 2, 0.5, num_steps=2),
}


@pytest.mark.parametrize("method", METHODS)
def test_the_modes_of_a_network_stay_as_they_are(method):
    """A preview in the middle of a training does not end its dropout; a part in evaluation mode stays there."""
    diffusion, values = model(network={**NET, "dropout": 0.5}).train(), numbers(2)[0]
    part = next(iter(diffusion.network.children())).eval()
    modes = [module.training for module in diffusion.modules()]
    torch.manual_seed(0)
    one, other = (METHODS[method](diffusion, values) for _ in range(2))
    assert [module.training for module in diffusion.modules()] == modes
    assert (diffusion.training, part.training) == (True, False)
    assert torch.equal(one, other)
    if method == "sample":  # between two steps too
        assert [diffusion.training for _ in diffusion.trajectory(range(2), sampler=Sampler(num_steps=2))] == [True] * 3


def test_the_models_of_a_guide_have_no_dropout():
    weak, classifier = (model((2,), Identity(), seed=seed, network={**MLP, "dropout": 0.5}).train() for seed in (1, 2))
    settings = {"network": {**MLP, "classes": 2}, "chain_length": 5}
    diffusion, cond = model((2,), Identity(), **settings), Condition(label=torch.tensor([0, 1]))

    def log_prob(self, x_t, level, cond):
        return self.denoiser()(x_t, level).x.square().sum(1)

    for guide in (
        Guide(weak=weak.denoiser()),
        Guide(weak=ConditionedDenoiser(weak.denoiser(), None)),
        Guide(log_prob=MethodType(log_prob, classifier)),
    ):
        one, other = (diffusion.sample(2, sampler=Sampler(num_steps=3), cond=cond, guide=guide) for _ in range(2))
        assert torch.equal(one, other)
    assert (weak.training, classifier.training) == (True, True)
    assert Guide(log_prob=lambda *given: given).networks == Guide().networks == []


def test_flows_within_a_tolerance_compute_in_float32(monkeypatch):
    """Rounding to bfloat16 is above the tolerance of `adaptive`, and above the error of a way to noise and back."""
    data, weak = Standardized((0.0, 0.0), (1.0, 1.0)), model((2,), Identity(), seed=1).denoiser()
    diffusion, values = model((2,), data), torch.tensor([[0.5, -1.0], [1.5, 0.2]])
    weak.autocast, found, calls = torch.bfloat16, [], []
    forward = type(diffusion.network).forward
    monkeypatch.setattr(type(diffusion.network), "forward", lambda *given: calls.append(0) or forward(*given))
    for precision in (None, torch.bfloat16):
        diffusion.autocast = precision
        calls.clear()
        samples = [diffusion.sample(3, sampler="adaptive", guide=guide) for guide in (None, Guide(weak=weak))]
        found.append([*samples, diffusion.to_noise(values), diffusion.from_noise(values), torch.tensor(len(calls))])
    assert all(map(torch.equal, *found))
    assert weak.autocast == diffusion.denoiser().autocast == torch.bfloat16
    rounded = diffusion.sample(3, sampler="ddim")
    diffusion.autocast = None
    assert not torch.equal(rounded, diffusion.sample(3, sampler="ddim"))


def test_inversion_needs_no_eval():
    diffusion, (values, *_) = model(network={**NET, "dropout": 0.5}, codec=Identity(), scale=0.1), numbers()
    noise, *again = (diffusion.train(mode).to_noise(values / 2 - 1, 3) for mode in (False, True, True))
    assert all(torch.equal(noise, other) for other in again)
    items = [diffusion.train(mode).from_noise(noise, 3) for mode in (False, True)]
    assert torch.equal(*items)


def test_no_steps_are_an_error():
    with pytest.raises(ConfigError):
        model().sample(1, sampler=Sampler(num_steps=0))


def test_ancestral_sampling_by_name_uses_the_variance_of_the_model():
    for variance in ("small", "large"):
        diffusion = model(codec=Identity(), variance=variance, **HO)
        by_name = diffusion.sample(2, sampler=Sampler("ancestral", 10))
        by_hand = diffusion.sample(2, sampler=Sampler(Ancestral(variance), 10))
        assert torch.equal(by_name, by_hand)
    assert not torch.equal(by_name, diffusion.sample(2, sampler=Sampler(Ancestral(), 10)))


@pytest.mark.parametrize("settings", [HO, {"schedule": {"name": "linear_log_snr", "high": 6.0}}])
def test_bounds_do_not_depend_on_the_batch(settings):
    diffusion = model(**settings)
    values, _, _ = numbers(7)
    for draws in (None, 3):
        counted = []
        whole = diffusion.nll(values, seed=2, mc_samples=draws, progress=counted.append)
        parts = diffusion.nll(values, seed=2, mc_samples=draws, batch=3, progress=counted.append)
        assert counted == [7, 3, 3, 1]
        later = diffusion.nll(values[4:], seed=2, mc_samples=draws, first=4)
        for name in ("prior", "diffusion_nats", "decoder", "total"):
            torch.testing.assert_close(getattr(parts, name), getattr(whole, name), rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(getattr(later, name), getattr(whole, name)[4:], rtol=1e-5, atol=1e-5)
        assert torch.equal(parts.per_step.isnan(), whole.per_step.isnan())
        decoder_calls = int(draws is not None and float(diffusion.chain[-1].sigma) == 0)  # beside the draws
        assert whole.calls == parts.calls == (draws or 10) + decoder_calls
        assert float(whole.stderr) == pytest.approx(float(whole.total.std() / math.sqrt(7)))
        assert not torch.equal(diffusion.nll(values, seed=3, mc_samples=draws).total, whole.total)
    exact = diffusion.nll(values, seed=2)
    assert torch.equal(diffusion.nll(values, seed=2, mc_samples=10).total, exact.total)
    assert torch.equal(diffusion.nll(values, seed=2, mc_samples=99).total, exact.total)


def test_a_part_of_the_steps_estimates_the_sum_of_all():
    """With x̂ = 0 every term except the decoder's has a closed form, and the mean of the estimates is their sum."""
    diffusion = model(scale=0.0, target={"name": "x"}, schedule={"name": "linear_log_snr", "high": 6.0})
    values = numbers(1)[0].repeat(4000, 1, 1, 1)
    x = values[:1].double() / 2 - 1
    levels = diffusion.chain
    terms = [
        0.5 * (math.exp(float(s.log_snr)) - math.exp(float(t.log_snr))) * float((x**2).sum())
        for t, s in itertools.pairwise(levels)
    ]  # ½ (SNR(s) − SNR(t)) ‖x − 0‖² [VDM21 eq. 13]
    exact = diffusion.nll(values[:1]).diffusion_nats
    assert float(exact) == pytest.approx(sum(terms), rel=1e-6)
    drawn = diffusion.nll(values, mc_samples=4, batch=4000).diffusion_nats  # of ten equally probable steps
    assert abs(float(drawn.mean() - exact)) < 4.9 * float(drawn.std()) / math.sqrt(4000)
    # 0.62 in closed form; a draw more or less would change the mean by a quarter, which is 25 standard errors
    assert float(drawn.std()) < 0.65 * float(exact)


def test_rescaled_continuous_data_shift_the_bound_by_the_log_of_the_factor():
    """−log p(v) = −log p(x) − log |det|, for the same x from values of several scales."""
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    mean, std, factor = torch.tensor([3.0, -1.0]), torch.tensor([0.5, 4.0]), 8.0
    plain = model((2,), Identity()).nll(x)
    for scale in (1.0, factor):
        codec = Standardized(tuple((scale * mean).tolist()), tuple((scale * std).tolist()))
        moved = model((2,), codec).nll(scale * (mean + std * x))
        shift = math.log(0.5 * 4.0) + 2 * math.log(scale)
        torch.testing.assert_close(moved.total - plain.total, torch.full((5,), shift).double(), rtol=0, atol=1e-4)
        torch.testing.assert_close(moved.decoder - plain.decoder, torch.full((5,), shift).double(), rtol=0, atol=1e-4)


def test_the_groups_of_an_optimizer():
    settings = Config(train=TrainConfig(weight_decay=0.5))
    plain, vdm = model(), model(schedule={"name": "learned"}, loss="continuous", times={"name": "uniform", "low": 0.0})
    (group,) = DiffusionTask(settings).parameter_groups(plain)
    assert (group["weight_decay"], group["lr_factor"]) == (0.5, 1.0)
    assert [id(p) for p in group["params"]] == [id(p) for p in plain.parameters()]
    network, schedule = DiffusionTask(settings).parameter_groups(vdm)
    assert [id(p) for p in network["params"]] == [id(p) for p in vdm.network.parameters()]
    assert [id(p) for p in schedule["params"]] == [id(p) for p in vdm.schedule.parameters()]
    assert (network["weight_decay"], network["lr_factor"]) == (0.5, 1.0)
    assert (schedule["weight_decay"], schedule["lr_factor"]) == (0.0, 10.0)


def test_the_conditions_that_a_model_accepts():
    assert model().condition_sizes == {}
    assert model(network=NET | {"classes": 3, "tokens": 5, "vector": 0}).condition_sizes == {"classes": 3, "tokens": 5}


LABELS = torch.tensor([2, 0, -1, 1, 2, 0, 1])


def conditional() -> Diffusion:
    return model(network=NET | {"classes": 3})


def test_each_sample_is_of_its_own_label_in_any_batch():
    diffusion = conditional()
    whole = [s.x for s in diffusion.trajectory(range(7), cond=Condition(label=LABELS), sampler=Sampler(num_steps=5))][
        -1
    ]
    for i, label in enumerate(LABELS[:4]):
        alone = [
            s.x
            for s in diffusion.trajectory(
                range(i, i + 1), cond=Condition(label=label[None]), sampler=Sampler(num_steps=5)
            )
        ][-1]
        torch.testing.assert_close(alone[0], whole[i], rtol=0, atol=1e-5)
    unconditional = [s.x for s in diffusion.trajectory(range(7), sampler=Sampler(num_steps=5))][-1]
    apart = (unconditional - whole).abs().amax((1, 2, 3))
    assert apart[2] < 1e-5  # the null label equals no label
    assert apart[LABELS >= 0].min() > 1e-3
    values = diffusion.sample(7, sampler=Sampler(num_steps=5), cond=Condition(label=LABELS))
    assert torch.equal(diffusion.sample(7, sampler=Sampler(num_steps=5), batch=3, cond=Condition(label=LABELS)), values)
    assert torch.equal(
        diffusion.sample(3, sampler=Sampler(num_steps=5), first=4, cond=Condition(label=LABELS[4:])), values[4:]
    )
    assert torch.equal(values, diffusion.transform.to_data(whole))


def test_noises_are_those_of_the_conditional_flow():
    diffusion = model(codec=Identity(), network=NET | {"classes": 3})
    values = torch.randn(7, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    cond = Condition(label=LABELS)
    code = diffusion.to_noise(values, cond=cond)
    torch.testing.assert_close(diffusion.from_noise(code, cond=cond), values, rtol=0, atol=1e-3)
    for apart in (diffusion.to_noise(values) - code, diffusion.from_noise(code) - values):
        assert apart[LABELS >= 0].abs().amax((1, 2, 3)).min() > 1e-2
        assert apart[2].abs().max() < 1e-3  # the null label equals no label


@pytest.mark.parametrize("estimate", ["discrete", "continuous", "ode", "openai"])
def test_the_likelihood_of_each_item_is_given_its_own_label(estimate):
    diffusion = model((3,), IntegerLevels(256), network=MLP | {"classes": 3}, scale=0.5, **HO)
    values = numbers(7, (3,), 256)[0]
    chosen = {"seed": 2, "estimate": estimate}
    whole = diffusion.nll(values, cond=Condition(label=LABELS), batch=4, **chosen)
    unconditional = diffusion.nll(values, **chosen)
    for i in (0, 5):
        cond = Condition(label=LABELS[i : i + 1])
        alone = diffusion.nll(values[i : i + 1], cond=cond, first=i, **chosen)
        torch.testing.assert_close(alone.total[0], whole.total[i], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(alone.decoder[0], whole.decoder[i], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(whole.total[2], unconditional.total[2], rtol=1e-3, atol=1e-3)
    assert (whole.total - unconditional.total)[LABELS >= 0].abs().min() > 0.05
    assert (whole.decoder - unconditional.decoder)[LABELS >= 0].abs().min() > 0.01


@pytest.mark.parametrize("estimate", ["discrete", "continuous", "ode"])
def test_the_decoder_of_a_categorical_output_has_the_condition(estimate):
    diffusion = model((3,), IntegerLevels(5), network=MLP | {"classes": 3}, output="categorical", **NOISY)
    values = numbers(7, (3,))[0]
    given, without = (diffusion.nll(values, seed=2, estimate=estimate, cond=c) for c in (Condition(label=LABELS), None))
    assert (given.decoder - without.decoder)[LABELS >= 0].abs().min() > 1e-4


@pytest.mark.parametrize(
    "call",
    [
        lambda m, cond: m.sample(7, cond=cond),
        lambda m, cond: next(m.trajectory(range(7), cond=cond)),
        lambda m, cond: m.nll(numbers(7)[0], cond=cond),
    ],
    ids=["sample", "trajectory", "nll"],
)
def test_a_condition_that_the_network_does_not_accept_is_refused(call):
    with pytest.raises(ConfigError, match=r"condition\.label: the model was trained without it"):
        call(model(), Condition(label=LABELS))
    with pytest.raises(ConfigError, match=r"its shape is \(6,\), not \(7,\)"):
        call(conditional(), Condition(label=LABELS[:6]))
