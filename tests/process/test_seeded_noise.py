import hashlib

import torch
from hypothesis import given
from hypothesis import strategies as st

from undiffuse.process.seeded_noise import ItemNoise, generator


def test_the_seed_of_a_key_is_fixed():
    digest = hashlib.blake2b(b"7/train/31", digest_size=8).digest()
    assert generator(7, "train", 31).initial_seed() == int.from_bytes(digest, "big") // 2


keys = st.tuples(st.integers(0, 2**40), st.sampled_from(["sample", "train", "nll", "data"]), st.integers(0, 2**40))


@given(st.sets(keys, min_size=2, max_size=20))
def test_different_keys_give_different_numbers(distinct):
    assert len({tuple(torch.randn(2, generator=generator(*key)).tolist()) for key in distinct}) == len(distinct)
    first = next(iter(distinct))
    assert torch.equal(torch.randn(9, generator=generator(*first)), torch.randn(9, generator=generator(*first)))


def test_the_noise_of_an_item_does_not_depend_on_its_batch():
    shape = (3, 4)
    batch = ItemNoise(5, range(8), shape)
    noises = [batch(2), batch(0), batch(1)]
    assert [n.shape for n in noises] == [(2, 8, 3, 4), (0, 8, 3, 4), (1, 8, 3, 4)]
    for items in ([3], [7, 0, 3], range(2, 6)):
        part = ItemNoise(5, items, shape)
        for noise in noises:
            assert torch.equal(part(len(noise)), noise[:, list(items)])
    assert noises[0].flatten().unique().numel() == noises[0].numel()


def test_noise_depends_on_seed_and_purpose_and_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    noise = [ItemNoise(*key)(1) for key in ((0, [0], (5,)), (1, [0], (5,)), (0, [0], (5,), "other"), (0, [1], (5,)))]
    assert torch.equal(noise[0], ItemNoise(0, torch.tensor([0]), [5], "sample")(1))
    assert len({tuple(n.flatten().tolist()) for n in noise}) == 4
    assert torch.equal(torch.get_rng_state(), before)


def test_dtype_and_device_of_the_noise():
    for n in (0, 2):
        assert ItemNoise(0, [0, 1], (3,))(n).dtype == torch.float32
        assert ItemNoise(0, [0, 1], (3,), dtype=torch.float64)(n).dtype == torch.float64
        assert ItemNoise(0, [0, 1], (3,), device="meta")(n).device.type == "meta"
        assert ItemNoise(0, [0, 1], ())(n).shape == (n, 2)
