"""Evaluation by several processes, threads here: they share the batches, and the result is that of one to the bit."""

import random
import threading

import pytest
from evaluation_models import integers, model_for

from undiffuse.errors import ConfigError
from undiffuse.evaluation import plan as planning
from undiffuse.evaluation import resumable
from undiffuse.evaluation.batches import batch_stops, needed_batches
from undiffuse.evaluation.run_evaluation import evaluate
from undiffuse.model import likelihood_estimators as estimates
from undiffuse.model.diffusion import Diffusion
from undiffuse.process.ode_integrator import Integrator
from undiffuse.runtime.distributed_group import ProcessGroup, single_process
from undiffuse.runtime.file_errors import BadFilesError, FileProblem

QUICK = {"part": "all", "items": 5, "mc_samples": 2}
DATA = integers()
MODEL = model_for(DATA)


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """Small batches, a rough flow, and a plan that depends on no clock."""
    monkeypatch.setattr(estimates, "LOOSE_TOLERANCE", Integrator(rtol=0.1, atol=0.1))
    monkeypatch.setattr(planning, "batch_size", lambda *_: 2)
    monkeypatch.setattr(planning, "calls_per_second", lambda *_: 1000.0)


class KilledError(BaseException):
    """Ends a thread as a kill ends a process."""


def evaluate_together(folder, processes, killed=None, **settings):
    """The result or error of each process, and how many batches it wrote; ``killed``: (rank, its batch number).

    The processes meet at a barrier, and one that is killed ends the others, as a launcher does.
    """
    barrier, shared, written = threading.Barrier(processes, timeout=60), [None] * processes, [0] * processes
    ends, here, real, lock = [None] * processes, threading.local(), resumable.write, threading.Lock()

    def write(*arguments):
        if (here.rank, written[here.rank]) == killed:
            raise KilledError
        written[here.rank] += 1
        with lock:  # safetensors is not safe between threads
            real(*arguments)

    def gather_of(rank):
        def gather(value):
            barrier.wait()
            shared[rank] = value
            barrier.wait()
            return list(shared)

        return gather

    def run(rank):
        here.rank = rank
        group = ProcessGroup(rank, processes, "cpu", gather_of(rank))
        try:
            ends[rank] = evaluate(MODEL, DATA, folder=folder, group=group, **settings)
        except BaseException as error:
            ends[rank] = error
            if isinstance(error, KilledError):
                barrier.abort()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resumable, "write", write)
        threads = [threading.Thread(target=run, args=(rank,)) for rank in range(processes)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return ends, written


def numbers(result):
    """All numbers that do not depend on the clock."""
    summary = result.summary()
    for estimate in summary["estimates"].values():
        del estimate["seconds"]
    return summary, {name: nll.total.tolist() for name, nll in result.nll.items()}


@pytest.mark.parametrize(("processes", "written"), [(2, [6, 3]), (4, [3, 3, 3, 0])])
def test_any_number_of_processes_gives_the_same_bits(tmp_path, processes, written):
    messages = []
    ends, batches = evaluate_together(tmp_path, processes, on_message=messages.append, **QUICK)
    assert list(ends[0].nll) == ["discrete", "continuous", "ode"]
    assert all(end.nll == {} for end in ends[1:])
    assert (batches, messages) == (written, [])
    assert numbers(ends[0]) == numbers(evaluate(MODEL, DATA, **QUICK))


@pytest.mark.parametrize(("processes", "killed", "then"), [(2, (1, 1), 3), (3, (0, 2), 1), (1, (0, 4), 2)])
def test_a_killed_evaluation_resumes_with_another_number_of_processes(tmp_path, monkeypatch, processes, killed, then):
    ends, before = evaluate_together(tmp_path, processes, killed, **QUICK)
    assert isinstance(ends[killed[0]], KilledError)
    assert len(list(tmp_path.glob("*.safetensors"))) == sum(before)
    whole = evaluate(MODEL, DATA, **QUICK)
    monkeypatch.setattr(planning, "plan_evaluation", None)  # the first plan is kept
    ends, after = evaluate_together(tmp_path, then, **QUICK)
    assert sum(before) + sum(after) == 9
    assert numbers(ends[0]) == numbers(whole)


def test_an_error_of_one_process_is_raised_in_all(tmp_path, monkeypatch):
    real, messages = Diffusion.nll, []

    def nll(*arguments, first=0, estimate="discrete", **more):
        if (first, estimate) in ((2, "ode"), (4, "ode")):
            raise ConfigError("ODE_END", f"item {first}", "there is no signal", "Use others")
        return real(*arguments, first=first, estimate=estimate, **more)

    monkeypatch.setattr(Diffusion, "nll", nll)
    ends, _ = evaluate_together(tmp_path, 3, on_message=messages.append, **QUICK)
    assert list(ends[0].nll) == ["discrete", "continuous"]
    assert messages == ["probability flow (ode) is skipped: item 2: there is no signal"]
    ends, _ = evaluate_together(tmp_path, 3, items=5, part="all", estimates=["ode"])
    assert [str(end) for end in ends] == ["error[ODE_END] item 2: there is no signal. Use others."] * 3


def test_an_error_in_the_choice_of_a_plan_is_raised_in_all_processes(tmp_path, monkeypatch):
    def nll(*arguments, first=0, **more):
        raise ConfigError("ODE_END", f"item {first}", "there is no signal", "Use others")

    monkeypatch.setattr(Diffusion, "nll", nll)
    ends, _ = evaluate_together(tmp_path, 2, part="all", estimates=["ode"])
    assert [str(end) for end in ends] == ["error[ODE_END] item 0: there is no signal. Use others."] * 2


def test_an_error_of_several_files_keeps_its_list_where_it_occurred(tmp_path, monkeypatch):
    problems = [FileProblem(tmp_path / name, "TRUNCATED", "ends early") for name in ("a.png", "b.png")]

    def nll(*arguments, **more):
        raise BadFilesError(problems)

    monkeypatch.setattr(Diffusion, "nll", nll)
    ends, _ = evaluate_together(tmp_path, 2, items=2, part="all", estimates=["ode"])
    assert [end.problems for end in ends if isinstance(end, BadFilesError)] == [problems]
    assert [str(end) for end in ends] == [str(BadFilesError(problems))] * 2


def test_the_time_of_all_processes_is_planned(tmp_path, monkeypatch):
    plans, real = [], planning.plan_evaluation

    def plan(*arguments):
        plans.append(real(*arguments))
        sizes = {"items": 2, "mc_samples": 2, "first": 2, "batch": 2}
        return {"discrete": sizes | {"expected": 1.0, "fit": False, "fewest": [2, 1.0]}}

    monkeypatch.setattr(planning, "plan_evaluation", plan)
    for processes in (1, 3):
        evaluate_together(tmp_path / str(processes), processes, part="all", minutes=0.5)
    one, three = (sum(job["expected"] for job in plan.values()) for plan in plans)
    assert three == pytest.approx(3 * one, rel=1e-9)


JOB = {"items": 9, "first": 2, "batch": 2, "expected": 3.0, "fit": True}


@pytest.mark.parametrize(
    ("seconds", "counted", "missing"),
    [
        ({}, [0, 2, 4, 6, 8], [0, 2, 4, 6, 8]),
        ({0: 1.0}, [0, 2, 4], [2, 4]),
        ({0: 1.0, 2: 1.0, 4: 1.0}, [0, 2, 4], []),
        ({0: 0.5, 2: 0.5, 4: 0.6}, [0, 2, 4, 6, 8], [6, 8]),
        ({0: 0.5, 2: 0.5, 4: 1.6}, [0, 2, 4], []),
        ({0: 9.0}, [0], []),
        ({0: 1.0, 4: 99.0}, [0, 2, 4], [2]),  # a batch out of order does not set the pace
        ({2: 99.0, 8: 99.0}, [0, 2, 4, 6, 8], [0, 4, 6]),
        ({0: 0.5, 2: 2.0, 4: 0.1}, [0, 2], []),  # nor does one that no longer counts
    ],
)
def test_which_batches_count(seconds, counted, missing):
    assert needed_batches(JOB, seconds) == (counted, missing)
    assert needed_batches(JOB | {"fit": False}, seconds)[0] == [0, 2, 4, 6, 8]


def test_batches_grow_up_to_their_full_size():
    assert batch_stops({"items": 40, "first": 1, "batch": 16}) == {0: 1, 1: 2, 2: 4, 4: 8, 8: 16, 16: 32, 32: 40}
    assert batch_stops(JOB) == {0: 2, 2: 4, 4: 6, 6: 8, 8: 9}


def test_two_items_count_at_any_pace():
    job = JOB | {"first": 1}
    assert needed_batches(job, {0: 99.0}) == ([0, 1], [1])
    assert needed_batches(job, {0: 99.0, 1: 1.0}) == ([0, 1], [])


@pytest.mark.parametrize("seed", range(10))
def test_the_batches_that_count_do_not_depend_on_the_order(seed):
    """By any number of processes at any time, and with any batches lost."""
    g = random.Random(seed)
    first = g.randint(1, 3)
    job = {"items": g.randint(1, 60), "first": first, "batch": first + g.randint(0, 4), "expected": 10.0, "fit": True}
    took = {start: g.uniform(0.2, 3) for start in range(60)}
    ends = []
    for _ in range(10):
        finished = {}
        while missing := needed_batches(job, finished)[1]:
            finished |= {start: took[start] for start in missing[: g.randint(1, 6)] if g.random() < 0.8}
        ends.append(needed_batches(job, finished)[0])
    assert ends == ends[:1] * 10


def test_a_group_of_one_process():
    assert single_process("cuda").gather("x") == ["x"]
    assert single_process()[:3] == (0, 1, "cpu")
