import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from undiffuse.codec import Ranged, codec_for
from undiffuse.data import arrays, dataset, from_array, load, load_conditions
from undiffuse.data.rows import Rows
from undiffuse.errors import ConfigError, DataError

SMALL = np.arange(24, dtype=np.uint8).reshape(2, 3, 2, 2)


@pytest.mark.parametrize(
    ("values", "options", "shape", "dtype", "levels"),
    [
        (SMALL, {}, (2, 3, 2, 2), "uint8", 256),
        (SMALL, {"levels": 24}, (2, 3, 2, 2), "uint8", 24),
        (SMALL.astype(np.int64), {}, (2, 3, 2, 2), "uint8", 24),
        (SMALL.astype(">i4") * 100, {}, (2, 3, 2, 2), "uint16", 2301),
        (SMALL.astype(">u2"), {}, (2, 3, 2, 2), "uint16", 65536),
        (SMALL > 7, {}, (2, 3, 2, 2), "uint8", 2),
        (SMALL[:, 0], {}, (2, 1, 2, 2), "uint8", 256),
        (SMALL.reshape(2, 12), {}, (2, 12), "uint8", 256),
        (SMALL.reshape(2, 3, 4), {"layout": "NLC"}, (2, 4, 3), "uint8", 256),
        (SMALL.reshape(2, 3, 4) / 7, {"layout": "NCL"}, (2, 3, 4), "float32", None),
        (SMALL.reshape(1, 2, 3, 2, 2) / 7, {}, (1, 2, 3, 2, 2), "float32", None),
        (SMALL.astype(np.float16) / 8, {}, (2, 3, 2, 2), "float32", None),
        (np.asfortranarray(SMALL.astype(">f8")), {}, (2, 3, 2, 2), "float32", None),
    ],
)
def test_what_arrays_become(values, options, shape, dtype, levels):
    data = from_array(values, **options)
    assert (data.values.shape, data.values.dtype.name, data.levels) == (shape, dtype, levels)
    assert data.values.flags.c_contiguous
    expected = np.moveaxis(values, -1, 1) if options.get("layout") == "NLC" else values
    np.testing.assert_array_equal(data.values.reshape(-1), expected.astype(dtype).reshape(-1))
    changed = values.dtype.newbyteorder("=").name != dtype or values.shape != shape
    assert bool(data.notes) == changed or "whole numbers" in data.notes[-1]


def test_channels_last_is_moved_only_when_asked():
    images = np.random.default_rng(0).integers(0, 256, (4, 8, 6, 3), np.uint8)
    with pytest.raises(DataError, match=r"^error\[SHAPE\] array: 4x8x6x3 looks like NHWC"):
        from_array(images)
    data = from_array(images, layout="NHWC")
    np.testing.assert_array_equal(data.values, images.transpose(0, 3, 1, 2))
    assert data.notes == ("channels moved from last to first",)
    assert from_array(images, layout="NCHW").item_shape == (8, 6, 3)


@pytest.mark.parametrize(
    ("values", "options", "code"),
    [
        (np.zeros((4, 8, 8)), {}, "SHAPE"),
        (np.zeros(4), {}, "SHAPE"),
        (np.zeros(()), {}, "SHAPE"),
        (np.zeros((1,) * 6), {}, "SHAPE"),
        (np.zeros((0, 4)), {}, "SHAPE"),
        (np.zeros((4, 0)), {}, "SHAPE"),
        (np.zeros((4, 4)), {"layout": "NCHW"}, "SHAPE"),
        (np.array([[0.0, np.nan]]), {}, "NON_FINITE"),
        (np.array([[0.0, 1e300]]), {}, "NON_FINITE"),
        (np.array([[0, -1]]), {}, "RANGE"),
        (np.array([[0, 65536]]), {}, "RANGE"),
        (np.array([[0, 17]], np.uint8), {"levels": 17}, "RANGE"),
        (np.array([[0, 0]]), {}, "RANGE"),
        (np.array([[1j]]), {}, "DTYPE"),
        (np.array([["a"]]), {}, "DTYPE"),
        (np.array([["2020-01-01"]], "M8[D]"), {}, "DTYPE"),
        (np.array([[None]]), {}, "DTYPE"),
        (np.zeros((2, 2)), {"levels": 4}, "DTYPE"),
    ],
)
def test_arrays_that_are_refused(values, options, code):
    with pytest.raises(DataError) as caught:
        from_array(values, **options)
    assert caught.value.code == code


def test_non_finite_names_the_first():
    values = np.zeros((5000, 2, 2, 3), np.float32)
    values[4999, 1, 0, 2] = np.inf
    values[4999, 1, 1, 0] = np.nan
    with pytest.raises(DataError, match=r"the value at \(4999, 1, 0, 2\) is inf"):
        from_array(values)


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ([0, 2, 0], "go up to 2, but 1"),
        ([0, -1, -1], "2 are negative, first at 1, 2"),
        ([0.0, 1.0, 0.0], "float64"),
        ([0, 1], "for 3 items"),
        (np.eye(3, dtype=int), "one-hot"),
        ([0, 1, 10**12], "go up to 1000000000000"),
    ],
)
def test_labels_that_are_refused(labels, words):
    with pytest.raises(DataError, match=words) as caught:
        from_array(np.eye(3, dtype=np.uint8), labels)
    assert caught.value.code == "LABELS"


@pytest.mark.parametrize("options", [{"layout": "HWC"}, {"levels": 1}, {"levels": 65537}])
def test_options_that_are_refused(options):
    with pytest.raises(ConfigError, match=r"^error\[OPTION\]"):
        from_array(SMALL, **options)


@pytest.mark.parametrize("names", [("images", "labels"), ("x", "y"), ("data", "y"), ("anything", "labels")])
def test_files_hold_the_same_as_memory(tmp_path, names):
    labels = np.array([1, 0])
    expected = from_array(SMALL, labels)
    np.savez(tmp_path / "a.npz", **dict(zip(names, (SMALL, labels), strict=True)))
    np.savez_compressed(tmp_path / "b.npz", **dict(zip(names, (SMALL, labels), strict=True)))
    save_file(
        {name: torch.from_numpy(a) for name, a in zip(names, (SMALL, labels), strict=True)}, tmp_path / "c.safetensors"
    )
    for name in ("a.npz", "b.npz", "c.safetensors"):
        data = load(tmp_path / name)
        assert data.fingerprint == expected.fingerprint
        assert data.classes == ("0", "1")
        assert data.name == name[0]


def test_npy_stays_on_disk_when_it_is_final(tmp_path):
    np.save(tmp_path / "d.npy", SMALL)
    data = load(str(tmp_path / "d.npy"))
    assert isinstance(data.values, Rows)
    np.testing.assert_array_equal(data.values, SMALL)
    assert data.fingerprint == from_array(SMALL).fingerprint


def test_bfloat16_is_widened(tmp_path):
    save_file({"x": torch.tensor([[0.5, -0.25]], dtype=torch.bfloat16)}, tmp_path / "a.safetensors")
    data = load(tmp_path / "a.safetensors")
    assert data.values.tolist() == [[0.5, -0.25]]
    assert "bfloat16 widened to float32" in data.notes


VECTORS = np.array([[0.5, -1.0, 2.0], [1e3, 0.0, 7.0]])
TOKENS = np.arange(24, dtype=np.float32).reshape(2, 4, 3)
MASK = np.array([[True, True, False, False], [True] * 4])


def test_vectors_and_tokens_stand_beside_the_values():
    data = from_array(SMALL, [1, 0], cond=VECTORS)
    assert (data.cond.dtype, data.mask, data.hearing) == (np.float32, None, {"classes": 2, "vector": 3})
    np.testing.assert_array_equal(data.cond, VECTORS)
    told = data.condition(np.array([1, 1, 0]))
    assert told.label.tolist() == [0, 0, 1]
    assert told.vector.tolist() == VECTORS[[1, 1, 0]].tolist()
    assert told.tokens is None
    for mask, expected in ((MASK, MASK), (None, np.ones((2, 4), bool))):
        data = from_array(SMALL, cond=TOKENS, mask=mask)
        assert data.hearing == {"tokens": 3}
        np.testing.assert_array_equal(data.mask, expected)
        told = data.condition(np.array([1]))
        assert (told.label, told.vector, told.mask.tolist()) == (None, None, expected[1:].tolist())
        np.testing.assert_array_equal(told.tokens, TOKENS[1:])
    assert from_array(SMALL).hearing == {}
    assert from_array(SMALL).condition(np.array([0])).label is None


def test_conditions_are_part_of_the_fingerprint():
    sets = [{}, {"cond": VECTORS}, {"cond": VECTORS + 1}, {"cond": TOKENS}, {"cond": TOKENS, "mask": MASK}]
    sets.append({"cond": TOKENS.reshape(2, 12)})
    prints = [from_array(SMALL, **more).fingerprint for more in sets]
    assert len(set(prints)) == len(sets)
    assert from_array(SMALL, cond=TOKENS, mask=np.ones((2, 4), bool)).fingerprint == prints[3]


@pytest.mark.parametrize(
    ("cond", "mask", "words"),
    [
        (np.zeros((3, 2)), None, r"their shape is \(3, 2\), for 2 items"),
        (np.zeros(2), None, r"their shape is \(2,\)"),
        (np.zeros((2, 0)), None, r"their shape is \(2, 0\)"),
        (np.zeros((2, 2, 2, 2)), None, r"their shape is \(2, 2, 2, 2\)"),
        (np.array([["a"], ["b"]]), None, "<U1, not numbers"),
        (np.zeros((2, 1), np.clongdouble), None, "not numbers"),
        (np.array([[0.0], [np.nan]]), None, r"the value at \(1, 0\) is nan"),
        (np.array([[0.0], [1e300]]), None, r"the value at \(1, 0\) is inf \(in float32\)"),
        (VECTORS, MASK, "a mask is of tokens"),
        (TOKENS, MASK[:, :3], r"the mask is bool \(2, 3\), not bool \(2, 4\)"),
        (TOKENS, MASK.astype(int), r"the mask is int64"),
        (None, MASK, "a mask is given, but no tokens"),
    ],
)
def test_conditions_that_are_refused(cond, mask, words):
    with pytest.raises(DataError, match=words) as caught:
        from_array(SMALL, cond=cond, mask=mask)
    assert caught.value.code == "CONDITION"


def test_conditions_in_files(tmp_path):
    np.savez(tmp_path / "a.npz", x=SMALL, y=np.array([1, 0]), cond=TOKENS, mask=MASK)
    save_file(
        {n: torch.from_numpy(v) for n, v in {"x": SMALL, "cond": TOKENS, "mask": MASK}.items()},
        tmp_path / "b.safetensors",
    )
    assert load(tmp_path / "a.npz").fingerprint == from_array(SMALL, [1, 0], cond=TOKENS, mask=MASK).fingerprint
    assert load(tmp_path / "b.safetensors").fingerprint == from_array(SMALL, cond=TOKENS, mask=MASK).fingerprint
    np.savez(tmp_path / "c.npz", cond=TOKENS, mask=MASK)
    for name in ("a.npz", "b.safetensors", "c.npz"):
        cond, mask = load_conditions(tmp_path / name)
        np.testing.assert_array_equal(cond, TOKENS)
        np.testing.assert_array_equal(mask, MASK)
    np.save(tmp_path / "d.npy", VECTORS)
    np.savez(tmp_path / "e.npz", cond=VECTORS)
    for name in ("d.npy", "e.npz"):
        cond, mask = load_conditions(tmp_path / name)
        assert (cond.tolist(), mask) == (VECTORS.tolist(), None)
    assert load(tmp_path / "e.npz").values.tolist() == VECTORS.tolist()  # the only array is the data
    np.savez(tmp_path / "f.npz", x=SMALL, mask=MASK)  # without cond, mask is any other array
    assert load(tmp_path / "f.npz").fingerprint == from_array(SMALL).fingerprint
    np.savez(tmp_path / "d.npz", a=SMALL, b=SMALL)
    with pytest.raises(DataError, match=r"d.npz: holds a, b"):
        load_conditions(tmp_path / "d.npz")


def test_a_declared_range(tmp_path):
    values = np.linspace(-0.5, 2, 24).reshape(2, 3, 4).astype(np.float32)
    np.save(tmp_path / "x.npy", values)
    data = load(tmp_path / "x.npy", layout="NCL", value_range=(-0.5, 2.0))
    free = load(tmp_path / "x.npy", layout="NCL")
    assert (data.value_range, free.value_range) == ((-0.5, 2.0), None)
    assert codec_for(data) == Ranged(-0.5, 2.0)
    wider = from_array(values, layout="NCL", value_range=(-1.0, 2.0))
    assert len({data.fingerprint, free.fingerprint, wider.fingerprint}) == 3
    assert np.array_equal(data.digests, free.digests)
    for ends in ((-0.4, 2.0), (-0.5, 1.9)):
        with pytest.raises(DataError, match=r"error\[RANGE\] array: values run from -0.5 to 2, outside of the range"):
            from_array(values, layout="NCL", value_range=ends)
    edge = np.full((2, 1), 0.1)  # in float32 it is more than in float64
    assert from_array(edge, value_range=(0.0, 0.1)).value_range == (0.0, 0.1)
    with pytest.raises(DataError, match=r"error\[DTYPE\] array: uint8 values have levels, not a range"):
        from_array(SMALL, value_range=(0.0, 255.0))
    for ends in ((1.0, 1.0), (2.0, 1.0), (0.0, float("inf")), (float("nan"), 1.0)):
        with pytest.raises(ConfigError, match=r"error\[OPTION\] value_range"):
            from_array(values, layout="NCL", value_range=ends)


def test_large_arrays_on_disk_are_converted_as_they_are_read(tmp_path, monkeypatch):
    values = np.random.default_rng(0).normal(size=(50, 4, 5, 3))
    np.save(tmp_path / "x.npy", values)
    whole = load(tmp_path / "x.npy", layout="NHWC")
    assert isinstance(whole.values, np.ndarray)
    monkeypatch.setattr(arrays, "COPIED", 1000)
    monkeypatch.setattr(dataset, "CHUNK", 7)
    data = load(tmp_path / "x.npy", layout="NHWC")
    assert isinstance(data.values, Rows)
    assert (data.fingerprint, data.notes, len(data)) == (whole.fingerprint, whole.notes, 50)
    assert np.array_equal(data.digests, whole.digests)
    np.testing.assert_allclose(data.moments(np.arange(50)), whole.moments(np.arange(50)), atol=1e-12)
    some = np.array([3, 40, 3])
    for key in (some, slice(2, 9), slice(None, None, 20), 5):
        assert data.values[key].flags.c_contiguous
        np.testing.assert_array_equal(data.values[key], whole.values[key], strict=True)
    assert isinstance(from_array(values, layout="NHWC").values, np.ndarray)  # in memory it is already
    mapped = from_array(np.load(tmp_path / "x.npy", mmap_mode="r"), layout="NHWC")
    assert isinstance(mapped.values, Rows)
    assert mapped.fingerprint == whole.fingerprint


def test_arrays_on_disk_are_never_whole_in_memory(tmp_path, monkeypatch):
    """Neither their type nor their order has to be changed, so that they stay on the disk."""
    np.save(tmp_path / "x.npy", np.random.default_rng(0).integers(0, 256, (5000, 3, 2, 2)).astype(np.uint8))
    read = []
    monkeypatch.setattr(dataset, "CHUNK_BYTES", 12 * 100)
    kept = dataset._bytes
    monkeypatch.setattr(dataset, "_bytes", lambda array: read.append(array.nbytes) or kept(array))
    data = load(tmp_path / "x.npy")
    assert isinstance(data.values, Rows)
    assert len(data.fingerprint) == 64
    assert (max(read), sum(read)) == (1200, 60000)  # one pass
    assert [len(chunk) for chunk in dataset.chunks(data.values, np.arange(250))] == [100, 100, 50]


@pytest.mark.parametrize("order", ["C", "F"])
def test_rows_of_a_file_are_those_of_the_array(tmp_path, monkeypatch, order):
    monkeypatch.setattr(arrays, "COPIED", 0)
    random = np.random.default_rng(0)
    values = np.asarray(random.normal(size=(200, 3, 4)).astype(">f4"), order=order)
    np.save(tmp_path / "x.npy", values)
    data = load(tmp_path / "x.npy", layout="NCL")
    assert data.values.beside
    assert (data.values.nbytes, data.values.size) == (9600, 2400)
    keys = [
        random.integers(0, 200, 50),
        np.sort(random.integers(0, 200, 50)),
        np.arange(200),
        np.arange(20)[::-1],
        random.permutation(200),
    ]
    for key in (*keys, -np.ones(3, int), np.array([0, 0, 2]), slice(3, 3), slice(None, None, -7), np.int64(5), -1):
        np.testing.assert_array_equal(data.values[key], values[key].astype(np.float32), strict=True)
    mask = random.random(200) < 0.3
    parts = [(slice(None), 0), (slice(3, 90), slice(1, None), 2), (7, 1), (mask, ..., 0), (slice(5), None)]
    for key in (mask, ~mask & False, *parts, (np.array([4, 2]), 1)):
        np.testing.assert_array_equal(data.values[key], values[key].astype(np.float32), strict=True)
    for key in (200, -201, np.array([3, 200]), mask[:50]):
        with pytest.raises(IndexError, match=r"there are 200 items|size of axis is 200"):
            _ = data.values[key]
    assert np.asarray(data.values, np.float64).dtype == np.float64
    moved = load(tmp_path / "x.npy", layout="NLC").values
    np.testing.assert_array_equal(moved[40:90], np.moveaxis(values, -1, 1)[40:90].astype(np.float32), strict=True)
    np.save(tmp_path / "grey.npy", np.asarray(values > 0, order=order))
    np.testing.assert_array_equal(load(tmp_path / "grey.npy").values[7:9], (values > 0)[7:9, None])
