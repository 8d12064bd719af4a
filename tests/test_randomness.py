import hashlib

import torch
from hypothesis import given
from hypothesis import strategies as st

from undiffuse.randomness import ItemNoise, generator


def test_a_key_has_its_seed_for_good():
    digest = hashlib.blake2b(b"7/train/31", digest_size=8).digest()
    assert generator(7, "train", 31).initial_seed() == int.from_bytes(digest, "big") // 2


keys = st.tuples(st.integers(0, 2**40), st.sampled_from(["sample", "train", "nll", "data"]), st.integers(0, 2**40))


@given(st.sets(keys, min_size=2, max_size=20))
def test_keys_that_differ_give_numbers_that_differ(some):
    assert len({tuple(torch.randn(2, generator=generator(*key)).tolist()) for key in some}) == len(some)
    first = next(iter(some))
    assert torch.equal(torch.randn(9, generator=generator(*first)), torch.randn(9, generator=generator(*first)))


def test_an_items_noise_does_not_know_its_batch():
    shape = (3, 4)
    whole = ItemNoise(5, range(8), shape)
    draws = [whole(2), whole(0), whole(1)]
    assert [d.shape for d in draws] == [(2, 8, 3, 4), (0, 8, 3, 4), (1, 8, 3, 4)]
    for items in ([3], [7, 0, 3], range(2, 6)):
        part = ItemNoise(5, items, shape)
        for draw in draws:
            assert torch.equal(part(len(draw)), draw[:, list(items)])
    assert draws[0].flatten().unique().numel() == draws[0].numel()


def test_noise_depends_on_seed_and_purpose_and_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    noise = [ItemNoise(*key)(1) for key in ((0, [0], (5,)), (1, [0], (5,)), (0, [0], (5,), "other"), (0, [1], (5,)))]
    assert torch.equal(noise[0], ItemNoise(0, torch.tensor([0]), [5], "sample")(1))
    assert len({tuple(n.flatten().tolist()) for n in noise}) == 4
    assert torch.equal(torch.get_rng_state(), before)


def test_noise_has_the_dtype_and_device_asked_for():
    for draws in (0, 2):
        assert ItemNoise(0, [0, 1], (3,))(draws).dtype == torch.float32
        assert ItemNoise(0, [0, 1], (3,), dtype=torch.float64)(draws).dtype == torch.float64
        assert ItemNoise(0, [0, 1], (3,), device="meta")(draws).device.type == "meta"
        assert ItemNoise(0, [0, 1], ())(draws).shape == (draws, 2)
