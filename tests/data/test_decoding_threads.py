"""Images decoded by several threads: the same data, the same lines and the same order as by one."""

import threading
import time
import warnings
from contextlib import closing

import numpy as np
import pytest
import torch
from PIL import Image

from undiffuse.data.decoding_threads import CHUNK_BYTES, CHUNK_ITEMS, map_in_order, warnings_as_errors
from undiffuse.data.sources import image_folder
from undiffuse.data.sources.registry import load
from undiffuse.errors import UndiffuseError


@pytest.fixture
def set_threads():
    yield torch.set_num_threads
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A hundred images in two classes, every seventh of which cannot be used, for one of four reasons."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for i in range(100):
        path = root / "ab"[i % 2] / f"{i:03d}{('.png', '.jpg', '.tif')[i % 3]}"
        path.parent.mkdir(exist_ok=True)
        shape = (6, 6) if i % 28 == 21 else (5, 5)
        Image.fromarray(rng.integers(0, 256, shape, np.uint8)).save(path)
        if i % 7 == 0 and i % 28 != 21:
            content = path.read_bytes()
            path.write_bytes((content[:-30], b"", b"<html>" + content)[i % 3])
    return root


def outcome(folder, **options):
    """What `load` returns, or the error that it raises, as data that can be compared."""
    try:
        data = load(folder, **options)
    except UndiffuseError as error:
        return str(error), [(p.path, p.code, p.reason) for p in error.problems]
    values = data.values[np.arange(len(data))]
    report = [(p.path, p.code, p.reason) for p in data.report.skipped]
    return values.tobytes(), data.names, data.labels.tolist(), data.notes, report, data.report.formats


@pytest.mark.parametrize("on_bad", ["stop", "skip"])
def test_the_data_and_the_errors_do_not_depend_on_the_threads(folder, on_bad, set_threads):
    alone = outcome(folder, on_bad=on_bad)
    assert len(alone[1 if on_bad == "stop" else 4]) >= 10
    set_threads(3)
    assert outcome(folder, on_bad=on_bad) == alone


def test_results_are_in_order_by_all_threads(set_threads):
    set_threads(3)
    barrier = threading.Barrier(3, timeout=20)
    seen = set()

    def work(i):
        if threading.get_ident() not in seen:
            seen.add(threading.get_ident())
            barrier.wait()  # until three threads work at once
        time.sleep(0.002 * (i % 3 == 0))
        return i * i

    with closing(map_in_order(work, range(200))) as results:
        assert list(results) == [i * i for i in range(200)]
    assert len(seen) == 3
    assert threading.get_ident() not in seen


def test_one_thread_is_the_calling_one():
    with closing(map_in_order(lambda i: threading.get_ident(), range(5))) as results:
        assert set(results) == {threading.get_ident()}


def test_few_results_wait_for_a_slow_reader(set_threads):
    """Memory holds at most threads + 2 chunks, and a chunk of large items is one item."""
    set_threads(2)
    done = []
    with closing(map_in_order(done.append, range(50), lambda i: CHUNK_BYTES)) as results:
        next(results)
        time.sleep(0.05)
        assert len(done) <= 4
        list(results)
    assert sorted(done) == list(range(50))
    done.clear()
    with closing(map_in_order(done.append, range(1000))) as results:
        next(results)
        time.sleep(0.05)
        assert len(done) <= 4 * CHUNK_ITEMS


def test_an_exception_ends_the_threads(set_threads):
    set_threads(2)
    began = threading.active_count()
    with pytest.raises(MemoryError, match="17"), closing(map_in_order(raise_at_17, range(1000))) as results:
        list(results)
    assert threading.active_count() == began


def raise_at_17(i):
    if i >= 17:
        raise MemoryError(str(i))


def test_a_thread_that_leaves_does_not_end_the_strictness_of_another(set_threads):
    filters, leave, entered = warnings.filters[:], threading.Event(), threading.Event()

    def stay():
        with warnings_as_errors():
            entered.set()
            leave.wait(20)

    thread = threading.Thread(target=stay)
    thread.start()
    entered.wait(20)
    with warnings_as_errors():
        pass
    with pytest.raises(UserWarning):
        warnings.warn("still strict", stacklevel=1)
    leave.set()
    thread.join()
    assert warnings.filters == filters


def test_a_file_that_changes_while_it_is_read_is_found_by_several_threads(folder, set_threads, monkeypatch, tmp_path):
    set_threads(2)
    real = image_folder._bytes

    def touch_first(path, stamp):
        if path.name == "005.tif":
            path = tmp_path / path.name  # another file
            path.write_bytes(b"II*\0")
        return real(path, stamp)

    monkeypatch.setattr(image_folder, "_bytes", touch_first)
    problems = outcome(folder, on_bad="skip")[4]
    assert ("005.tif", "CHANGED_DURING_RUN") in [(path.name, code) for path, code, _ in problems]
