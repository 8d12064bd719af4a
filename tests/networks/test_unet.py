import pytest
import torch
from network_cases import SMALL, noise, randomized
from torch.nn.attention import SDPBackend, sdpa_kernel

from undiffuse.errors import ConfigError
from undiffuse.model.presets import PRESETS
from undiffuse.networks.condition import Condition
from undiffuse.networks.patches import fold, unfold
from undiffuse.networks.registry import build
from undiffuse.networks.unet import UNet

SIZES = [(1,), (7,), (16,), (1, 1), (3, 5), (8, 8), (9, 4), (1, 1, 1), (3, 2, 5), (4, 4, 4)]
OTHER = {"learned_resampling": False, "scale_shift": True, "fourier": (1,)}


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("options", [{}, OTHER], ids=["ho", "other"])
def test_any_size_in_any_dimension(size, options):
    network = randomized(UNet(2, 3, dims=len(size), **{**SMALL, **options}))
    y = network(noise(2, 2, *size), torch.tensor([0.1, 0.9]))
    assert y.shape == (2, 3, *size)
    assert y.isfinite().all()


def test_one_item_of_one_cell_at_one_level():
    assert UNet(1, widths=(32,), attention=())(noise(1, 1, 1, 1), torch.tensor(0.5)).shape == (1, 1, 1, 1)


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("digits", 1e5, 2e6),
        ("cpu-small", 1e6, 3e6),
        ("gpu", 3e7, 6e7),
        ("ddpm-cifar10", 35_746_307, 35_746_307),
    ],
)
def test_presets_have_their_number_of_parameters(name, low, high):
    with torch.device("meta"):
        network = build(**PRESETS[name].model.network, channels=3)
    assert low <= sum(p.numel() for p in network.parameters()) <= high


def test_odd_sizes_are_padded_by_repeating_the_edge_and_cropped():
    network, x = randomized(UNet(2, **SMALL)), noise(2, 2, 5, 6)
    padded = torch.cat([x, x[..., -1:], x[..., -1:]], 3)
    padded = torch.cat([padded, *[padded[:, :, -1:]] * 3], 2)
    torch.testing.assert_close(network(x, torch.tensor(1.0)), network(padded, torch.tensor(1.0))[..., :5, :6])


@pytest.mark.parametrize("size", [(6,), (4, 6), (2, 4, 6)], ids=str)
def test_space_to_depth_and_back(size):
    x = noise(2, 3, *size)
    folded = fold(x, 2)
    assert folded.shape == (2, 3 * 2 ** len(size), *(n // 2 for n in size))
    assert torch.equal(unfold(folded, 2), x)
    if len(size) == 2:
        assert torch.equal(folded, torch.nn.functional.pixel_unshuffle(x, 2))


def test_forward_mode_and_batched_derivatives_work_with_plain_attention():
    """Exact divergences and distillation need both; the fused attention has neither."""
    network, x = randomized(UNet(1, **SMALL)), noise(1, 1, 2, 2)
    rows = torch.eye(4).view(4, 1, 1, 2, 2)

    def function(x):
        return network(x, torch.tensor(1.0))

    jacobian = torch.autograd.functional.jacobian(function, x).view(4, 4)
    with sdpa_kernel(SDPBackend.MATH):
        (reverse,) = torch.func.vmap(torch.func.vjp(function, x)[1])(rows)
        forward = torch.stack([torch.func.jvp(function, (x,), (row,))[1] for row in rows])
    torch.testing.assert_close(reverse.view(4, 4), jacobian, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(forward.view(4, 4).T, jacobian, rtol=1e-4, atol=1e-4)


def test_lists_from_json_build_the_same_network_as_tuples():
    one = build("unet", channels=2, widths=[8, 16], attention=[1], heads=2)
    other = build("unet", channels=2, widths=(8, 16), attention=(1,), heads=2)
    assert list(one.state_dict()) == list(other.state_dict())


@pytest.mark.parametrize("size", [(6,), (4, 8), (2, 4, 6)], ids=str)
@pytest.mark.parametrize("options", [{}, OTHER], ids=["ho", "other"])
def test_an_image_is_brought_to_the_size_of_x_by_repeating_its_cells(size, options):
    network = randomized(UNet(2, 1, dims=len(size), image=3, **{**SMALL, **options}))
    x, time, image = noise(2, 2, *size), torch.tensor([0.1, 0.9]), noise(2, 3, *[n // 2 for n in size], seed=3)
    level = torch.tensor([1.0, -2.0])
    y = network(x, time, Condition(image=image, image_level=level))
    for axis in range(2, image.ndim):
        image = image.repeat_interleave(2, axis)
    torch.testing.assert_close(y, network(x, time, Condition(image=image, image_level=level)))
    assert not torch.allclose(y, network(x, time, Condition(image=-image, image_level=level)))
    assert not torch.allclose(y, network(x, time, Condition(image=image, image_level=-level)))


def test_without_an_image_it_is_one_of_noise_alone():
    network = randomized(UNet(2, 1, image=1, **SMALL))
    x, time = noise(2, 2, 4, 4), torch.tensor([0.1, 0.9])
    zeros = Condition(image=torch.zeros(2, 1, 4, 4), image_level=torch.full((2,), -torch.inf))
    torch.testing.assert_close(network(x, time), network(x, time, zeros))
    torch.testing.assert_close(network(x, time, Condition()), network(x, time, zeros))
    clean, almost = (
        network(x, time, Condition(image=torch.ones(2, 1, 2, 2), image_level=torch.full((2,), level)))
        for level in (torch.inf, 10.0)
    )
    torch.testing.assert_close(clean, almost)  # +inf, without noise, is the largest log-SNR that is embedded
    with pytest.raises(ConfigError, match=r"condition.image: its shape is \(2, 1, 4\), and x has 2 dimensions"):
        network(x, time, Condition(image=torch.zeros(2, 1, 4)))
