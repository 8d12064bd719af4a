import math

import pytest
import torch

from undiffuse.process import schedule as S
from undiffuse.process.level import NoiseLevel, frac, like, log_var_large, log_var_small, stack


@pytest.mark.parametrize(
    ("dtype", "becomes"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.uint8, torch.float32),
    ],
)
def test_like_casts_to_x_but_never_below_float32_and_broadcasts_from_the_left(dtype, becomes):
    x = torch.zeros(2, 3, 4, 5, dtype=dtype)
    for level, shape in ((S.linear()(0.5), (1, 1, 1, 1)), (S.linear()(torch.tensor([0.5, 1.0])), (2, 1, 1, 1))):
        at = level.like(x)
        for value, was in zip(at[:5], level[:5], strict=True):
            assert value.dtype == becomes
            assert value.shape == shape
            torch.testing.assert_close(value.flatten().double(), was.reshape(-1), rtol=1e-6, atol=0)
    assert like(torch.ones(2, 3), x).shape == (2, 3, 1, 1)
    assert like(torch.ones(2, 1, 1, 5), x).shape == (2, 1, 1, 5)
    assert like(torch.tensor(1.0), x[0, 0, 0, 0]).shape == ()
    assert like(torch.ones(2), x.to("meta")).device.type == "meta"


def test_a_level_without_a_floor_has_none_on_any_device():
    level = S.Flow()(torch.tensor([0.25, 0.5]))
    assert level.like(torch.zeros(2, 3)).floor is None
    assert level.take(0).floor is None
    assert level.like(torch.zeros(2, 3)).between == level.between


def test_take_and_stack_are_of_the_batch():
    level = S.linear(4)(torch.tensor([0.25, 0.5, 1.0]))
    for items in (1, slice(1, 3), torch.tensor([2, 0])):
        for value, was in zip(level.take(items)[:5], level[:5], strict=True):
            assert torch.equal(value, was[items])
        assert level.take(items).between == level.between
    back = stack([level.take(i) for i in range(3)])
    for value, was in zip(back[:5], level[:5], strict=True):
        assert torch.equal(value, was)
    assert back.between == level.between
    ladder = stack(S.chain(S.linear(4), [1.0, 0.5, 0.0]))
    assert ladder.floor.tolist() == [S.chain(S.linear(4), [1.0, 0.5, 0.0])[-1].floor.item()] * 3
    assert stack(S.chain(S.Flow(), [0.9, 0.5])).floor is None


def hand_made(snr, t=0.5):
    """A level that no schedule made: variance preserving, of this signal-to-noise ratio."""
    snr = torch.as_tensor(snr, dtype=torch.float64)
    return NoiseLevel(torch.tensor(t), (snr / (1 + snr)).sqrt(), (1 / (1 + snr)).sqrt(), torch.log(snr))


def test_frac_of_levels_without_a_common_schedule_is_that_of_their_log_snr():
    t, s = hand_made(0.25), hand_made(2.0)
    assert float(frac(t, s)) == pytest.approx(1 - 0.25 / 2)
    own = S.LinearLogSNR(9.0, -9.0)(0.5)  # log_snr 0
    other = S.LinearLogSNR(3.0, -9.0)(0.75)  # log_snr −6
    assert float(frac(other, own)) == pytest.approx(1 - math.exp(-6))
    assert float(frac(t, S.Flow()(0.0))) == 1
    assert float(frac(own, t)) == pytest.approx(1 - 4)  # t is not cleaner: no clamp hides it


@pytest.mark.parametrize("make", S.SCHEDULES.values(), ids=S.SCHEDULES)
def test_frac_is_one_where_s_is_data_and_zero_where_s_is_t(make):
    schedule = S.Tabulated([0.1, 0.4, 0.2]) if make is S.Tabulated else make()
    t = schedule(torch.linspace(0.1, 1, 40))
    share = frac(t, schedule(0.0))
    assert bool((share <= 1).all())
    if schedule(0.0).sigma == 0:
        torch.testing.assert_close(share, torch.ones_like(share), rtol=0, atol=1e-12)
    assert bool((frac(t.take(slice(0, -1)), t.take(slice(0, -1))) == 0).all())


def test_variances_by_hand():
    t, s = hand_made(0.25), hand_made(2.0)  # sigma² 0.8 and 1/3
    assert math.exp(log_var_large(t, s)) == pytest.approx(0.8 * 0.875)
    assert math.exp(log_var_small(t, s)) == pytest.approx(0.875 / 3)


def test_the_small_variance_takes_the_floor_only_where_sigma_is_zero():
    t, clean = hand_made(0.25), hand_made(2.0)._replace(sigma=torch.zeros((), dtype=torch.float64))
    clean = clean._replace(log_snr=torch.tensor(math.inf, dtype=torch.float64))
    assert math.exp(log_var_small(t, clean)) == pytest.approx(0.8)  # no floor: the large one
    assert float(log_var_small(t, clean._replace(floor=torch.tensor(-7.0)))) == -7
    both = S.linear(10)(torch.tensor([0.0, 0.1], dtype=torch.float64))
    last = log_var_small(S.linear(10)(torch.tensor([0.1, 0.2], dtype=torch.float64)), both)
    assert last[0] == both.floor[0]
    assert float(last[1]) == pytest.approx(float(both.floor[1]), abs=1e-12)  # which is the next noisier step's
    assert not S.Flow()(torch.tensor([0.5, 0.0])).sigma.isnan().any()
    flow = S.Flow()
    mixed = log_var_small(flow(torch.tensor([0.5, 0.5])), flow(torch.tensor([0.25, 0.0])))
    assert mixed[1] == log_var_large(flow(0.5), flow(0.0)) == 2 * math.log(0.5)
    assert math.exp(mixed[0]) == pytest.approx((1 - 1 / 9) * 0.0625)
