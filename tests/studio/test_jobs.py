"""One queue and one thread: order, places, cancelling, errors, closing."""

from __future__ import annotations

import threading

import pytest

from undiffuse.errors import ConfigError, ResourceError
from undiffuse.studio.jobs import MAX_KEPT, MAX_WAITING, JobQueue


@pytest.fixture
def queue():
    made = JobQueue()
    yield made
    made.close()


class Gate:
    """Work that waits until it is opened or cancelled, and records what ran at the same time."""

    def __init__(self):
        self.started, self.open = threading.Event(), threading.Event()

    def __call__(self, job):
        self.started.set()
        while not self.open.wait(0.005):
            job.check()
        return {}


def last(job):
    """The last event of a job that ends within seconds."""
    ended = threading.Event()
    job.listeners.add(lambda: job.ended and ended.set())
    assert job.ended or ended.wait(20)
    return job.events[-1]


def kinds(job):
    return [event["kind"] for event in job.events]


def test_jobs_run_one_after_the_other_in_their_order(queue):
    ran, inside = [], []

    def work(number):
        def run(job):
            inside.append(1)
            assert len(inside) == 1
            ran.append(number)
            inside.pop()
            return {"number": number}

        return run

    jobs = [queue.submit("", work(i)) for i in range(8)]
    assert [last(job)["number"] for job in jobs] == list(range(8))
    assert ran == list(range(8))
    assert {job.state for job in jobs} == {"done"}


def test_a_waiting_job_knows_how_many_are_before_it(queue):
    gates = [Gate() for _ in range(3)]
    first, second, third = (queue.submit("", gate) for gate in gates)
    gates[0].started.wait(20)
    assert [job.events[-1].get("before") for job in (second, third)] == [1, 2]
    gates[0].open.set()
    gates[1].started.wait(20)
    assert kinds(second)[-1] == "running"
    assert third.events[-1] == {"kind": "waiting", "before": 1}
    for gate in gates:
        gate.open.set()
    assert [last(job)["kind"] for job in (first, second, third)] == ["done"] * 3


def test_a_new_job_does_not_wait_for_abandoned_ones(queue):
    gate = Gate()
    running, waiting, kept = queue.submit("", gate), queue.submit("", Gate()), queue.submit("", lambda job: {})
    gate.started.wait(20)
    running.abandoned = waiting.abandoned = True
    after = queue.submit("", lambda job: {})
    assert [last(job)["kind"] for job in (running, waiting, kept, after)] == ["cancelled", "cancelled", "done", "done"]


def test_a_job_is_cancelled_while_it_runs_and_while_it_waits(queue):
    gate = Gate()
    running, waiting, after = queue.submit("", gate), queue.submit("", Gate()), queue.submit("", lambda job: {"x": 1})
    gate.started.wait(20)
    queue.cancel(waiting)
    assert (waiting.state, kinds(waiting)[-1]) == ("cancelled", "cancelled")
    queue.cancel(running)
    assert last(running) == {"kind": "cancelled"}
    assert last(after) == {"kind": "done", "x": 1}
    queue.cancel(after)
    assert after.state == "done"
    assert "running" not in kinds(waiting)


def test_an_error_is_one_line_and_the_queue_goes_on(queue, capsys):
    def refuse(job):
        raise ConfigError("MASK", "mask", "it hides nothing", "Paint something")

    def bug(job):
        raise KeyError("secret\nline")

    def full(job):
        raise MemoryError

    jobs = [queue.submit("", work) for work in (refuse, bug, full, lambda job: {})]
    assert last(jobs[0])["error"] == "error[MASK] mask: it hides nothing. Paint something."
    assert last(jobs[1])["error"].startswith("error[BUG] studio: KeyError: ")
    assert "\n" not in last(jobs[1])["error"]
    assert last(jobs[2])["error"].startswith("error[MEMORY] ")
    assert last(jobs[3])["kind"] == "done"
    assert "KeyError" in capsys.readouterr().err


def test_too_many_jobs_are_refused(queue):
    gate = Gate()
    queue.submit("", gate)
    gate.started.wait(20)
    for _ in range(MAX_WAITING):
        queue.submit("", gate)
    with pytest.raises(ResourceError, match="BUSY"):
        queue.submit("", gate)
    gate.open.set()


def test_old_jobs_are_forgotten(queue):
    jobs = [queue.submit("", lambda job: {}) for _ in range(MAX_KEPT + 2)]
    last(jobs[-1])
    queue.submit("", lambda job: {})
    assert queue.find(jobs[0].id) is None
    assert queue.find(jobs[-1].id) is jobs[-1]


def test_closing_ends_every_job():
    queue, gate = JobQueue(), Gate()
    jobs = [queue.submit("", gate) for _ in range(3)]
    gate.started.wait(20)
    queue.close()
    assert [job.state for job in jobs] == ["cancelled"] * 3
    assert not queue._thread.is_alive()
    with pytest.raises(ResourceError, match="stopping"):
        queue.submit("", gate)


def test_progress_is_a_fraction_and_not_too_often(queue):
    def work(job):
        for i in range(1000):
            job.progress(i, 1000)
        return {}

    job = queue.submit("", work)
    last(job)
    fractions = [event["fraction"] for event in job.events if event["kind"] == "progress"]
    assert 1 <= len(fractions) < 100
    assert fractions == sorted(fractions)
    assert max(fractions) <= 1
