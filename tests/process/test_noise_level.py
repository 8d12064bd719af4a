import math

import pytest
import torch
from simulated_gpu import GPU, simulated_gpu

from undiffuse.process import discrete_schedule as DS
from undiffuse.process import schedule as S
from undiffuse.process.noise_level import (
    NoiseLevel,
    broadcast_like,
    broadcast_together,
    log_var_large,
    log_var_small,
    stack,
    transition_frac,
)


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
def test_broadcast_like_uses_at_least_float32_and_aligns_the_batch(dtype, becomes):
    x = torch.zeros(2, 3, 4, 5, dtype=dtype)
    for level, shape in ((DS.linear()(0.5), (1, 1, 1, 1)), (DS.linear()(torch.tensor([0.5, 1.0])), (2, 1, 1, 1))):
        at = level.broadcast_like(x)
        for value, was in zip(at[:5], level[:5], strict=True):
            assert value.dtype == becomes
            assert value.shape == shape
            torch.testing.assert_close(value.flatten().double(), was.reshape(-1), rtol=1e-6, atol=0)
    assert broadcast_like(torch.ones(2, 3), x).shape == (2, 3, 1, 1)
    assert broadcast_like(torch.ones(2, 1, 1, 5), x).shape == (2, 1, 1, 5)
    assert broadcast_like(torch.tensor(1.0), x[0, 0, 0, 0]).shape == ()
    assert broadcast_like(torch.ones(2), x.to("meta")).device.type == "meta"


def test_a_missing_final_log_var_stays_missing():
    level = S.Flow()(torch.tensor([0.25, 0.5]))
    assert level.broadcast_like(torch.zeros(2, 3)).final_log_var is None
    assert level.take(0).final_log_var is None
    assert level.broadcast_like(torch.zeros(2, 3)).frac_fn == level.frac_fn


def test_take_and_stack():
    level = DS.linear(4)(torch.tensor([0.25, 0.5, 1.0]))
    for items in (1, slice(1, 3), torch.tensor([2, 0])):
        for value, was in zip(level.take(items)[:5], level[:5], strict=True):
            assert torch.equal(value, was[items])
        assert level.take(items).frac_fn == level.frac_fn
    back = stack([level.take(i) for i in range(3)])
    for value, was in zip(back[:5], level[:5], strict=True):
        assert torch.equal(value, was)
    assert back.frac_fn == level.frac_fn
    ladder = stack(S.chain(DS.linear(4), [1.0, 0.5, 0.0]))
    assert ladder.final_log_var.tolist() == [S.chain(DS.linear(4), [1.0, 0.5, 0.0])[-1].final_log_var.item()] * 3
    assert stack(S.chain(S.Flow(), [0.9, 0.5])).final_log_var is None


def hand_made(snr, t=0.5):
    """A variance-preserving level of this signal-to-noise ratio, without a schedule."""
    snr = torch.as_tensor(snr, dtype=torch.float64)
    return NoiseLevel(torch.tensor(t), (snr / (1 + snr)).sqrt(), (1 / (1 + snr)).sqrt(), torch.log(snr))


def test_frac_of_levels_without_a_common_schedule_comes_from_log_snr():
    t, s = hand_made(0.25), hand_made(2.0)
    assert float(transition_frac(t, s)) == pytest.approx(1 - 0.25 / 2)
    own = S.LinearLogSNR(9.0, -9.0)(0.5)  # log_snr 0
    other = S.LinearLogSNR(3.0, -9.0)(0.75)  # log_snr −6
    assert float(transition_frac(other, own)) == pytest.approx(1 - math.exp(-6))
    assert float(transition_frac(t, S.Flow()(0.0))) == 1
    assert float(transition_frac(own, t)) == pytest.approx(
        1 - 4
    )  # negative: t is the cleaner one, and there is no clamp


@pytest.mark.parametrize("make", S.SCHEDULES.values(), ids=S.SCHEDULES)
def test_frac_is_one_where_s_is_data_and_zero_where_s_is_t(make):
    schedule = DS.Tabulated([0.1, 0.4, 0.2]) if make is DS.Tabulated else make()
    t = schedule(torch.linspace(0.1, 1, 40))
    frac = transition_frac(t, schedule(0.0))
    assert bool((frac <= 1).all())
    if schedule(0.0).sigma == 0:
        torch.testing.assert_close(frac, torch.ones_like(frac), rtol=0, atol=1e-12)
    assert bool((transition_frac(t.take(slice(0, -1)), t.take(slice(0, -1))) == 0).all())


def test_variances_by_hand():
    t, s = hand_made(0.25), hand_made(2.0)  # sigma² 0.8 and 1/3
    assert math.exp(log_var_large(t, s)) == pytest.approx(0.8 * 0.875)
    assert math.exp(log_var_small(t, s)) == pytest.approx(0.875 / 3)


def test_final_log_var_is_used_only_where_sigma_is_zero():
    t, clean = hand_made(0.25), hand_made(2.0)._replace(sigma=torch.zeros((), dtype=torch.float64))
    clean = clean._replace(log_snr=torch.tensor(math.inf, dtype=torch.float64))
    assert math.exp(log_var_small(t, clean)) == pytest.approx(0.8)  # without final_log_var: the large variance
    assert float(log_var_small(t, clean._replace(final_log_var=torch.tensor(-7.0)))) == -7
    both = DS.linear(10)(torch.tensor([0.0, 0.1], dtype=torch.float64))
    last = log_var_small(DS.linear(10)(torch.tensor([0.1, 0.2], dtype=torch.float64)), both)
    assert last[0] == both.final_log_var[0]
    assert float(last[1]) == pytest.approx(float(both.final_log_var[1]), abs=1e-12)  # that of the next noisier step
    assert not S.Flow()(torch.tensor([0.5, 0.0])).sigma.isnan().any()
    flow = S.Flow()
    mixed = log_var_small(flow(torch.tensor([0.5, 0.5])), flow(torch.tensor([0.25, 0.0])))
    assert mixed[1] == log_var_large(flow(0.5), flow(0.0)) == 2 * math.log(0.5)
    assert math.exp(mixed[0]) == pytest.approx((1 - 1 / 9) * 0.0625)


def test_values_reach_a_gpu_in_one_copy_and_have_the_shape_of_x():
    values, x = [torch.tensor([0.25, 0.5, 0.75]), torch.tensor(3.0, dtype=torch.float64)], torch.zeros(3, 2, 4)
    on_cpu = broadcast_together(values, x)
    assert [value.flatten().tolist() for value in on_cpu] == [[0.25, 0.5, 0.75], [3.0, 3.0, 3.0]]
    assert [(tuple(value.shape), value.dtype) for value in on_cpu] == [((3, 1, 1), torch.float32)] * 2
    with simulated_gpu() as counts:
        x = x.to(GPU)
        counts.clear()
        on_gpu = broadcast_together(values, x)
        assert (counts["copy"], counts["waiting copy"]) == (1, 0)
        assert all((value.device, value.dtype, value.ndim) == (GPU, torch.float32, 3) for value in on_gpu)
        moved = [value.cpu() for value in on_gpu]
    for found, expected in zip(moved, on_cpu, strict=True):
        torch.testing.assert_close(found, expected)
