import hashlib
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import kstest

from undiffuse.process import seeded_noise
from undiffuse.process.seeded_noise import ItemNoise, generator, philox

WORD = 2**32 - 1
PI = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)


def signed(low: int, high: int) -> torch.Tensor:
    value = low | high << 32
    return torch.tensor([value - 2**64 if value >= 2**63 else value])


def words(key: tuple[int, int], counter: tuple[int, ...]) -> tuple[int, ...]:
    even, odd = philox(key[0] | key[1] << 32, signed(*counter[:2]), signed(*counter[2:]))
    return int(even[0]), int(odd[0]), int(even[1]), int(odd[1])


def reference(key: tuple[int, int], counter: tuple[int, ...]) -> tuple[int, ...]:
    """Philox 4×32-10 in Python's integers, word by word as the paper's figure has it."""
    (k0, k1), (c0, c1, c2, c3) = key, counter
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = b >> 32 ^ c1 ^ k0, b & WORD, a >> 32 ^ c3 ^ k1, a & WORD
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return c0, c1, c2, c3


@pytest.mark.parametrize(
    ("key", "counter", "expected"),
    [
        ((0, 0), (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((WORD, WORD), (WORD,) * 4, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        ((0xA4093822, 0x299F31D0), PI, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ],
)
def test_the_known_answers_of_philox(key, counter, expected):
    """The three answers that the authors' library Random123 lists for philox4x32-10."""
    assert words(key, counter) == reference(key, counter) == expected


word = st.integers(0, WORD)


@given(st.tuples(word, word), st.tuples(word, word, word, word))
def test_philox_against_integers_of_any_length(key, counter):
    assert words(key, counter) == reference(key, counter)


def test_the_seed_of_a_key_is_fixed():
    digest = hashlib.blake2b(b"7/train/31", digest_size=8).digest()
    assert generator(7, "train", 31).initial_seed() == int.from_bytes(digest, "big") // 2


def test_noise_is_the_normal_transform_of_the_words_of_its_key():
    """By Python's integers and floats: items in the counter's upper half, the position in the lower."""
    digest = int.from_bytes(hashlib.blake2b(b"7/nll", digest_size=8).digest(), "big")
    noise = ItemNoise(7, [3, 2**33 + 1], (5,), "nll", dtype=torch.float64)
    first, second = noise(1), noise(3)  # two blocks of four numbers, then four
    for i, item in enumerate((3, 2**33 + 1)):
        counters = [(position, 0, item & WORD, item >> 32) for position in range(6)]
        blocks = [reference((digest & WORD, digest >> 32), counter) for counter in counters]
        expected = []
        for part in (blocks[:2], blocks[2:]):
            pairs = [[(b[0], b[1]) for b in part], [(b[2], b[3]) for b in part]]
            polar = [
                [(math.sqrt(-2 * math.log((u + 0.5) / 2**32)), 2 * math.pi * v / 2**32) for u, v in pair]
                for pair in pairs
            ]
            flat = [r * wave(a) for wave in (math.cos, math.sin) for pair in polar for r, a in pair]
            expected.append(torch.tensor(flat, dtype=torch.float64))
        torch.testing.assert_close(first[0, i], expected[0][:5], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(second[:, i].flatten(), expected[1][:15], rtol=1e-12, atol=1e-12)


def test_the_noise_is_standard_normal_and_uncorrelated():
    """2¹⁸ numbers; each of the thirteen tests fails by chance with 1e-7.

    A standard deviation that is wrong by 1 % or a correlation of 0.02 is found with a probability above 0.999.
    """
    x = ItemNoise(0, range(64), (4096,), dtype=torch.float64)(1)[0]
    z, n = 5.33, x.numel()
    assert kstest(x.flatten().numpy(), "norm").pvalue > 1e-7
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert float((x**power).mean() - mean) == pytest.approx(0, abs=z * math.sqrt(variance / n))
    shifted = [x[:, 1:] * x[:, :-1], x[1:] * x[:-1], x[:, ::2] * x[:, 1::2], x[:, :2048] * x[:, 2048:]]
    others = [ItemNoise(*key, range(64), (4096,), *more)(1)[0] for key, more in (((1,), ()), ((0,), ("nll",)))]
    shifted += [x * other for other in others] + [(x**2 - 1) * (other**2 - 1) / 2 for other in others]
    for product in shifted:
        assert float(product.mean()) == pytest.approx(0, abs=z / math.sqrt(product.numel()))


keys = st.tuples(st.integers(0, 2**40), st.sampled_from(["sample", "train", "nll", "data"]), st.integers(0, 2**40))


@given(st.sets(keys, min_size=2, max_size=20))
def test_different_keys_give_different_numbers(distinct):
    assert len({tuple(torch.randn(2, generator=generator(*key)).tolist()) for key in distinct}) == len(distinct)
    first = next(iter(distinct))
    assert torch.equal(torch.randn(9, generator=generator(*first)), torch.randn(9, generator=generator(*first)))
    noises = [ItemNoise(seed, [item], (2,), purpose)(1) for seed, purpose, item in distinct]
    assert len({tuple(noise.flatten().tolist()) for noise in noises}) == len(distinct)


def test_the_noise_of_an_item_does_not_depend_on_its_batch():
    shape = (3, 4)
    batch = ItemNoise(5, range(8), shape)
    noises = [batch(2), batch(0), batch(1)]
    assert [n.shape for n in noises] == [(2, 8, 3, 4), (0, 8, 3, 4), (1, 8, 3, 4)]
    for items in ([3], [7, 0, 3], range(2, 6)):
        part = ItemNoise(5, items, shape)
        for noise in noises:
            assert torch.equal(part(len(noise)), noise[:, list(items)])
    assert torch.cat(noises).flatten().unique().numel() == 3 * 8 * 12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_large_calls_are_computed_in_blocks(dtype, monkeypatch):
    """The words of a block take several times the memory of its numbers; the bits are those of one block."""

    def draws():
        noise = ItemNoise(3, range(7), (5, 3), dtype=dtype)
        return [noise(40), noise(40), noise(1), noise(2)]

    whole, sizes, exact = draws(), [], philox

    def counted(key, low, high):
        even, odd = exact(key, low, high)
        sizes.append(even.numel() + odd.numel())
        return even, odd

    monkeypatch.setattr(seeded_noise, "philox", counted)
    monkeypatch.setattr(seeded_noise, "BLOCK_VALUES", 1000)
    assert all(torch.equal(one, other) for one, other in zip(draws(), whole, strict=True))
    assert max(sizes) == 980  # 35 counters of 7 items, four numbers each
    assert len(sizes) > 10


def test_noise_depends_on_seed_and_purpose_and_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    noise = [ItemNoise(*key)(1) for key in ((0, [0], (5,)), (1, [0], (5,)), (0, [0], (5,), "other"), (0, [1], (5,)))]
    assert torch.equal(noise[0], ItemNoise(0, torch.tensor([0]), [5], "sample")(1))
    assert len({tuple(n.flatten().tolist()) for n in noise}) == 4
    assert torch.equal(torch.get_rng_state(), before)


def test_dtype_and_device_of_the_noise():
    for n in (0, 2):
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            assert ItemNoise(0, [0, 1], (3,), dtype=dtype)(n).dtype == dtype
        assert ItemNoise(0, [0, 1], (3,), device="meta")(n).device.type == "meta"
        assert ItemNoise(0, [0, 1], ())(n).shape == (n, 2)
    single, double = (ItemNoise(0, range(9), (99,), dtype=dtype)(3) for dtype in (torch.float32, torch.float64))
    torch.testing.assert_close(single.double(), double, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sizes", [[1] * 12, [1, 1, 2, 2, 1, 1, 3, 0, 1, 2], [2] * 9])
def test_numbers_that_are_made_ahead_are_those_of_their_calls(sizes, monkeypatch):
    """Whatever the calls are, and for as many calls as there are numbers made at once."""
    noise = ItemNoise(1, range(3), (5,))
    made = [noise(n) for n in sizes]
    monkeypatch.setattr(seeded_noise, "CALL_VALUES", 0)
    alone = ItemNoise(1, range(3), (5,))
    assert all(torch.equal(alone(n), numbers) for n, numbers in zip(sizes, made, strict=True))
    assert alone.position == noise.position
    assert len(alone.ahead) == 0


def test_small_calls_are_made_together_from_the_second_on(monkeypatch):
    lengths, real = [], seeded_noise.philox
    monkeypatch.setattr(seeded_noise, "philox", lambda *given: lengths.append(given[1].numel()) or real(*given))
    noise = ItemNoise(1, range(64), (1, 8, 8))
    for _ in range(10):
        noise(1)
    assert lengths == [16, 8 * 16, 8 * 16]
