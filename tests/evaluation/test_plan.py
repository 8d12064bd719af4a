"""What is measured: the choice of items and conditions, and the sizes that fit into a time."""

import numpy as np
import pytest
import torch
from evaluation_models import integers, model_for, model_of

from undiffuse.data.from_array import from_array
from undiffuse.data.transform import Identity, IntegerLevels
from undiffuse.errors import ConfigError, DataError
from undiffuse.evaluation import plan as planning
from undiffuse.evaluation.plan import bit_reversed_order, check_request, select_items, shared_condition

ALL = ["discrete", "continuous", "ode"]
VALUES = torch.zeros(10_000, 20, dtype=torch.uint8)


def test_the_first_items_are_spread_over_all():
    for n in (1, 2, 3, 10, 64, 1000):
        order = bit_reversed_order(n)
        assert sorted(order) == list(range(n))
        for k in (2, 5, 16, 100):
            if k <= n:
                gaps = np.diff(np.concatenate([[-1], np.sort(order[:k]), [n]]))
                assert gaps.max() <= 3 * n / k + 1


def test_parts():
    data, others = integers(), integers(n=30)
    model, split = model_for(data, name="ours"), data.split(0.4)
    for part, items, name in (
        (None, split.test, "held out for testing"),
        ("validation", split.validation, "held out for validation"),
        ("train", split.train, "trained on"),
        ("all", np.arange(24), "all, including training items"),
    ):
        chosen, description = select_items(model, data, part)
        assert (list(chosen), description) == (list(items), name)
    assert select_items(model, others, None)[1] == "all"
    assert len(select_items(model, others, None)[0]) == 30
    assert select_items(model, others, "test")[1] == "test part of other data than the training data"


def test_data_with_the_name_of_those_of_training_are_measured_on_the_items_that_were_held_out():
    data = integers()
    model, more = model_for(data), integers(n=30)
    items, description = select_items(model, more, None)
    assert list(items) == list(more.split(0.4).test)
    assert description == "test part of data with the name, but not the content, of the training data"
    assert select_items(model, more, "all")[1] == "all of data with the name, but not the content, of the training data"
    with pytest.raises(ConfigError, match="no such part"):
        select_items(model, data, "dev")


@pytest.mark.parametrize(
    ("settings", "condition", "reason"),
    [
        ({}, "none", False),
        ({"classes": 3}, "labels", False),
        ({"classes": 4}, "none", True),
        ({"classes": 3, "vector": 2}, "none", True),
    ],
)
def test_the_condition_that_model_and_data_share(settings, condition, reason):
    values = np.zeros((12, 2), np.uint8)
    data = from_array(values, np.arange(12) % 3, num_values=5)
    model = model_of((2,), IntegerLevels(5), network=settings, classes=list(data.classes))
    assert shared_condition(model, data) == (condition, shared_condition(model, data)[1])
    assert (shared_condition(model, data)[1] is not None) == reason
    model.info["classes"] = ["a", "b", "c"]
    assert shared_condition(model, data)[0] == "none"


def test_vectors_and_tokens_as_conditions():
    values, labels = np.zeros((12, 2), np.uint8), np.arange(12) % 3
    model = model_of((2,), IntegerLevels(5), network={"classes": 3, "vector": 2}, classes=["0", "1", "2"])
    data = from_array(values, labels, num_values=5, cond=np.ones((12, 2)))
    assert shared_condition(model, data) == ("labels and vectors", None)
    model = model_of((2,), IntegerLevels(5), network={"tokens": 2})
    assert shared_condition(model, from_array(values, num_values=5, cond=np.ones((12, 1, 2)))) == ("tokens", None)


def planned(
    monkeypatch, speed, names, values=VALUES, items=None, mc_samples=None, exact=False, iw_samples=1, flow=None
):
    """The plan of a minute at ``speed`` calls per second, and (items, mc_samples, fit) of each job.

    ``flow``: seconds of an item of the flow.
    """
    monkeypatch.setattr(planning, "calls_per_second", lambda *_: speed)
    model = model_of((20,), IntegerLevels(256), steps=1000)
    sizes = (items, mc_samples, exact, iw_samples, 1.0)
    plan = planning.plan_evaluation(model, len(values), values[: planning.SPEED_ITEMS], None, names, *sizes, flow)
    return plan, {name: (job["items"], job["mc_samples"], job["fit"]) for name, job in plan.items()}


def test_a_first_batch_that_takes_too_long_is_announced(monkeypatch):
    plan = planned(monkeypatch, 100.0, ALL, flow=67.0)[0]
    assert (plan["ode"]["first"], plan["ode"]["batch"], plan["ode"]["fewest"]) == (4, 256, [4, 268.0])
    assert planning.slow_starts(plan) == [
        "probability flow (ode): 4 items, the fewest that are measured, take about 5 minutes, longer than --minutes "
        "allows; 'undiffuse evaluate' with --estimate discrete --estimate continuous leaves it out"
    ]
    (alone,) = planning.slow_starts({"ode": plan["ode"]})
    assert alone.endswith("longer than --minutes allows")
    assert planning.slow_starts(planned(monkeypatch, 100.0, ALL, flow=20.0)[0]) == []  # 80 s in place of 26
    assert planning.slow_starts(planned(monkeypatch, 1.0, ["ode"], exact=True)[0]) == []


def test_the_cost_of_the_flow_sets_its_share_of_the_time(monkeypatch):
    def shares(flow):
        return [job["expected"] for job in planned(monkeypatch, 100.0, ["continuous", "ode"], flow=flow)[0].values()]

    assert shares(0.1) == pytest.approx([25.5, 25.5])  # 51 seconds
    plan = planned(monkeypatch, 100.0, ALL, flow=0.5)[0]
    assert plan["ode"]["expected"] == pytest.approx(51 * 4 / 13)
    assert planned(monkeypatch, 100.0, ALL, flow=1.25)[0]["ode"]["expected"] == pytest.approx(20)


SIZES = {  # 51 seconds of a minute are planned, in shares of 5, 4 and 4 thirteenths, or 5, 5 and 4 fourteenths
    "fast": (1300.1, ALL, {}, [(1275, 20, True), (1275, 16, True), (10_000, 1, True)]),
    "slow": (1.0, ALL, {}, [(64, 16, True), (64, 16, True), (10_000, 1, True)]),
    "unlimited": (1e9, ALL, {}, [(10_000, None, True), (10_000, 256, True), (10_000, 1, True)]),
    "exact": (1.0, ALL, {"exact": True}, [(10_000, None, False), (10_000, 1000, False), (10_000, 1, False)]),
    "samples": (1.0, ALL, {"mc_samples": 3}, [(10_000, 3, True), (10_000, 3, True), (10_000, 1, True)]),
    "items": (
        1300.1,
        ALL,
        {"values": VALUES[:100], "items": 100, "iw_samples": 3},
        [(100, 255, False), (100, 204, False), (100, 3, False)],
    ),
    "script": (
        14001.0,
        ["discrete", "openai", "continuous"],
        {},
        [(255, None, False), (255, None, False), (10_000, 20, True)],
    ),
    "slow script": (
        1.0,
        ["discrete", "openai", "continuous"],
        {},
        [(16, None, False), (16, None, False), (64, 16, True)],
    ),
}


@pytest.mark.parametrize("case", SIZES)
def test_sizes_that_fit_into_a_minute(monkeypatch, case):
    speed, names, given, sizes = SIZES[case]
    assert planned(monkeypatch, speed, names, **given)[1] == dict(zip(names, sizes, strict=True))


def test_the_expected_time(monkeypatch):
    def expected(speed, names=ALL, **given):
        return {name: job["expected"] for name, job in planned(monkeypatch, speed, names, **given)[0].items()}

    assert sum(expected(1300.1).values()) == pytest.approx(51, rel=0.01)
    # Where 16 items of the flow take longer than its share, the bounds get less, but never less than half.
    assert expected(100.0)["ode"] == 25.5
    assert expected(16 * 400 / 20)["ode"] == pytest.approx(20)
    assert expected(16 * 400 / 20)["discrete"] == pytest.approx(31 * 5 / 9, rel=0.1)
    assert expected(100.0, ["ode"])["ode"] == 51
    fixed = {"values": VALUES[:100], "items": 100, "iw_samples": 3}
    assert expected(1300.1, **fixed)["ode"] == pytest.approx(100 * 3 * planning.ODE_COST_GUESS / 1300.1)


def test_batches_are_small_where_items_are_slow():
    small, large = model_of((20,), IntegerLevels(256)), model_of((300,), IntegerLevels(256))
    sizes = [planning.batch_size(model, slow) for model in (small, large) for slow in (False, True)]
    assert sizes == [1024, 256, 64, 16]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"estimates": ["flow"]}, "--estimate flow: no such estimate"),
        ({"compat": "mine"}, "--compat mine: no such script"),
        ({"compat": "openai", "num_values": 5}, "the script handles images of 256 grey levels only"),
        ({"estimates": ["discrete"], "iw_samples": 2}, "--iw-samples: none of the estimates discrete uses it"),
        ({"estimates": ["ode"], "mc_samples": 9}, "--mc-samples: none of the estimates ode uses it"),
        (
            {"estimates": ["ode"], "compat": "openai", "mc_samples": 9},
            "none of the estimates discrete, ode, ",
        ),
        ({"minutes": 0.0}, "--minutes 0: not a duration"),
        ({"minutes": float("nan")}, "--minutes nan: not a duration"),
    ],
)
def test_refused_requests(given, message):
    data = integers(num_values=given.get("num_values", 256))
    request = {"estimates": (), "iw_samples": 1, "compat": None, "minutes": 5.0} | given
    request.pop("num_values", None)
    with pytest.raises(ConfigError, match=message):
        check_request(model_for(data), data, **request)


def test_data_of_another_kind():
    model = model_for(integers())
    for data, kind in (
        (integers(dims=3), "3 columns with 256 possible values"),
        (integers(num_values=5), "20 columns with 5 possible values"),
    ):
        with pytest.raises(DataError, match=f"its items are {kind}, those of the model 20 columns with 256"):
            check_request(model, data, (), 1, None, 5.0)
    vectors = from_array(np.zeros((4, 2), np.float32) + np.arange(4, dtype=np.float32)[:, None])
    with pytest.raises(ConfigError, match="continuous data by the flow has no importance samples"):
        check_request(model_of((2,), Identity()), vectors, (), 2, None, 5.0)


def test_the_order_of_estimates():
    data = integers()
    assert check_request(model_for(data), data, ["ode", "discrete"], 1, None, 5.0) == ["discrete", "ode"]
    assert check_request(model_for(data), data, ["ode"], 1, "openai", 5.0) == ["discrete", "openai", "ode"]


def test_an_estimate_without_a_share_of_the_time_is_not_dropped(monkeypatch):
    data = integers()
    monkeypatch.setattr(planning, "DEFAULT_ESTIMATES", ("discrete", "new"))
    with pytest.raises(ValueError, match="'new' is not in list"):
        check_request(model_for(data), data, (), 1, None, 5.0)
