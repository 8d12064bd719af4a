"""`from_array` and array files: dtypes, layouts, labels, conditions, ranges, and arrays on disk."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from undiffuse.data import dataset
from undiffuse.data import from_array as arrays
from undiffuse.data.from_array import from_array
from undiffuse.data.lazy_array import LazyArray
from undiffuse.data.sources.array_files import load_conditions
from undiffuse.data.sources.registry import load
from undiffuse.data.transform import MinMax, transform_for
from undiffuse.errors import ConfigError, DataError

SMALL = np.arange(24, dtype=np.uint8).reshape(2, 3, 2, 2)


@pytest.mark.parametrize(
    ("values", "options", "shape", "dtype", "num_values"),
    [
        (SMALL, {}, (2, 3, 2, 2), "uint8", 256),
        (SMALL, {"num_values": 24}, (2, 3, 2, 2), "uint8", 24),
        (np.zeros((8, 1, 4, 4), np.int64), {"num_values": 2}, (8, 1, 4, 4), "uint8", 2),
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
def test_supported_arrays(values, options, shape, dtype, num_values):
    data = from_array(values, **options)
    assert (data.values.shape, data.values.dtype.name, data.num_values) == (shape, dtype, num_values)
    assert data.values.flags.c_contiguous
    expected = np.moveaxis(values, -1, 1) if options.get("layout") == "NLC" else values
    np.testing.assert_array_equal(data.values.reshape(-1), expected.astype(dtype).reshape(-1))
    changed = values.dtype.newbyteorder("=").name != dtype or values.shape != shape
    assert bool(data.notes) == changed or "all values are integers" in data.notes[-1]


def test_channels_last_needs_a_layout():
    images = np.random.default_rng(0).integers(0, 256, (4, 8, 6, 3), np.uint8)
    with pytest.raises(DataError, match=r"^error\[SHAPE\] array: 4x8x6x3 looks like NHWC"):
        from_array(images)
    data = from_array(images, layout="NHWC")
    np.testing.assert_array_equal(data.values, images.transpose(0, 3, 1, 2))
    assert data.notes == ("channels moved from last to first",)
    assert from_array(images, layout="NCHW").item_shape == (8, 6, 3)


def test_tensors_and_numbers():
    values = torch.randn(6, 3, requires_grad=True)
    labels, cond = torch.arange(6) % 2, torch.randn(6, 2, requires_grad=True)
    data = from_array(values, labels=labels, cond=cond)
    np.testing.assert_array_equal(data.values, values.detach().numpy())
    np.testing.assert_array_equal(data.cond, cond.detach().numpy())
    assert data.labels.tolist() == labels.tolist()
    for value, shape in ((np.float32(3), "a single number has 0 dimensions"), (np.ones(5), "5 has 1 dimension")):
        with pytest.raises(DataError, match=rf"array: {shape}\. Give items of one or more dimensions in an array"):
            from_array(value)
    assert from_array(values.bfloat16()).values.tolist() == values.bfloat16().tolist()
    masked = np.ma.masked_greater(np.arange(6.0).reshape(3, 2), 4)
    assert from_array(masked[:2]).values.shape == (2, 2)
    with pytest.raises(DataError, match=r"DTYPE.*array: some values are masked\. Fill them"):
        from_array(masked)
    with pytest.raises(DataError, match=r"SHAPE.*array: it cannot become an array \(.*\)\. Give items of equal shapes"):
        from_array([[1.0, 2.0], [3.0]])
    with pytest.raises(DataError, match=r"array: 5x3 has 2 dimensions, NCHW has 4\. "):
        from_array(np.ones((5, 3)), layout="NCHW")


@pytest.mark.parametrize("channels", [5, 16, 32])
def test_four_dimensions_may_be_images_or_volumes(channels):
    values = np.random.default_rng(0).integers(0, 256, (4, channels, 8, 6), np.uint8)
    cause = rf"4x{channels}x8x6 could be images of {channels} channels, or volumes without channels"
    with pytest.raises(DataError, match=rf"^error\[SHAPE\] array: {cause}. Give layout=NCHW \(images\) or layout=NDHW"):
        from_array(values)
    np.testing.assert_array_equal(from_array(values, layout="NCHW").values, values)
    data = from_array(values, layout="NDHW")
    np.testing.assert_array_equal(data.values, values[:, None])
    assert data.notes == ("one channel added",)
    assert from_array(values[:, :4]).item_shape == (4, 8, 6)


def test_volumes_with_channels_last_need_a_layout():
    values = np.zeros((4, 5, 6, 7, 2), np.uint8)
    with pytest.raises(DataError, match="4x5x6x7x2 looks like NDHWC"):
        from_array(values)
    assert from_array(values, layout="NDHWC").item_shape == (2, 5, 6, 7)
    assert from_array(np.zeros((4, 5, 6, 7, 8), np.uint8)).item_shape == (5, 6, 7, 8)


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
        (np.array([[0, 17]], np.uint8), {"num_values": 17}, "RANGE"),
        (np.array([[0, 0]]), {}, "RANGE"),
        (np.array([[1j]]), {}, "DTYPE"),
        (np.array([["a"]]), {}, "DTYPE"),
        (np.array([["2020-01-01"]], "M8[D]"), {}, "DTYPE"),
        (np.array([[None]]), {}, "DTYPE"),
        (np.zeros((2, 2)), {"num_values": 4}, "DTYPE"),
    ],
)
def test_unsupported_arrays(values, options, code):
    with pytest.raises(DataError) as caught:
        from_array(values, **options)
    assert caught.value.code == code


def test_the_first_non_finite_value_is_named():
    values = np.zeros((5000, 2, 2, 3), np.float32)
    values[4999, 1, 0, 2] = np.inf
    values[4999, 1, 1, 0] = np.nan
    with pytest.raises(DataError, match=r"the value at \(4999, 1, 0, 2\) is inf"):
        from_array(values)


@pytest.mark.parametrize(
    ("labels", "text"),
    [
        ([0, 2, 0], "go up to 2, but 1"),
        ([0, -1, -1], "2 labels are negative, the first at 1, 2"),
        ([0.0, 1.0, 0.0], "float64"),
        ([0, 1], "for 3 items"),
        (np.eye(3, dtype=int), "one-hot"),
        ([0, 1, 10**12], "go up to 1000000000000"),
    ],
)
def test_invalid_labels(labels, text):
    with pytest.raises(DataError, match=text) as caught:
        from_array(np.eye(3, dtype=np.uint8), labels)
    assert caught.value.code == "LABELS"


@pytest.mark.parametrize("options", [{"layout": "HWC"}, {"num_values": 1}, {"num_values": 65537}])
def test_invalid_options(options):
    with pytest.raises(ConfigError, match=r"^error\[OPTION\]"):
        from_array(SMALL, **options)


@pytest.mark.parametrize("names", [("images", "labels"), ("x", "y"), ("data", "y"), ("anything", "labels")])
def test_array_files_equal_arrays_in_memory(tmp_path, names):
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


def test_npy_without_conversion_stays_on_disk(tmp_path):
    np.save(tmp_path / "d.npy", SMALL)
    data = load(str(tmp_path / "d.npy"))
    assert isinstance(data.values, LazyArray)
    np.testing.assert_array_equal(data.values, SMALL)
    assert data.fingerprint == from_array(SMALL).fingerprint


def test_bfloat16_becomes_float32(tmp_path):
    save_file({"x": torch.tensor([[0.5, -0.25]], dtype=torch.bfloat16)}, tmp_path / "a.safetensors")
    data = load(tmp_path / "a.safetensors")
    assert data.values.tolist() == [[0.5, -0.25]]
    assert "bfloat16 converted to float32" in data.notes


VECTORS = np.array([[0.5, -1.0, 2.0], [1e3, 0.0, 7.0]])
TOKENS = np.arange(24, dtype=np.float32).reshape(2, 4, 3)
MASK = np.array([[True, True, False, False], [True] * 4])


def test_conditions_of_a_data_set():
    data = from_array(SMALL, [1, 0], cond=VECTORS)
    assert (data.cond.dtype, data.mask, data.condition_sizes) == (np.float32, None, {"classes": 2, "vector": 3})
    np.testing.assert_array_equal(data.cond, VECTORS)
    cond = data.condition(np.array([1, 1, 0]))
    assert cond.label.tolist() == [0, 0, 1]
    assert cond.vector.tolist() == VECTORS[[1, 1, 0]].tolist()
    assert cond.tokens is None
    for mask, expected in ((MASK, MASK), (None, np.ones((2, 4), bool))):
        data = from_array(SMALL, cond=TOKENS, mask=mask)
        assert data.condition_sizes == {"tokens": 3}
        np.testing.assert_array_equal(data.mask, expected)
        cond = data.condition(np.array([1]))
        assert (cond.label, cond.vector, cond.mask.tolist()) == (None, None, expected[1:].tolist())
        np.testing.assert_array_equal(cond.tokens, TOKENS[1:])
    assert from_array(SMALL).condition_sizes == {}
    assert from_array(SMALL).condition(np.array([0])).label is None


def test_conditions_are_part_of_the_fingerprint():
    arguments = [{}, {"cond": VECTORS}, {"cond": VECTORS + 1}, {"cond": TOKENS}, {"cond": TOKENS, "mask": MASK}]
    arguments.append({"cond": TOKENS.reshape(2, 12)})
    fingerprints = [from_array(SMALL, **kwargs).fingerprint for kwargs in arguments]
    assert len(set(fingerprints)) == len(arguments)
    assert from_array(SMALL, cond=TOKENS, mask=np.ones((2, 4), bool)).fingerprint == fingerprints[3]


@pytest.mark.parametrize(
    ("cond", "mask", "text"),
    [
        (np.zeros((3, 2)), None, r"conditions have shape \(3, 2\), for 2 items"),
        (np.zeros(2), None, r"conditions have shape \(2,\)"),
        (np.zeros((2, 0)), None, r"conditions have shape \(2, 0\)"),
        (np.zeros((2, 2, 2, 2)), None, r"conditions have shape \(2, 2, 2, 2\)"),
        (np.array([["a"], ["b"]]), None, "<U1, not numbers"),
        (np.zeros((2, 1), np.clongdouble), None, "not numbers"),
        (np.array([[0.0], [np.nan]]), None, r"the value at \(1, 0\) is nan"),
        (np.array([[0.0], [1e300]]), None, r"the value at \(1, 0\) is inf \(in float32\)"),
        (VECTORS, MASK, "a mask needs tokens"),
        (TOKENS, MASK[:, :3], r"the mask is bool \(2, 3\), not bool \(2, 4\)"),
        (TOKENS, MASK.astype(int), r"the mask is int64"),
        (None, MASK, "a mask is given, but no tokens"),
    ],
)
def test_invalid_conditions(cond, mask, text):
    with pytest.raises(DataError, match=text) as caught:
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
    assert load(tmp_path / "e.npz").values.tolist() == VECTORS.tolist()  # the only array is the values
    np.savez(tmp_path / "f.npz", x=SMALL, mask=MASK)  # without cond, mask is any other array
    assert load(tmp_path / "f.npz").fingerprint == from_array(SMALL).fingerprint
    np.savez(tmp_path / "d.npz", a=SMALL, b=SMALL)
    with pytest.raises(DataError, match=r"d.npz: contains a, b"):
        load_conditions(tmp_path / "d.npz")


def test_value_range(tmp_path):
    values = np.linspace(-0.5, 2, 24).reshape(2, 3, 4).astype(np.float32)
    np.save(tmp_path / "x.npy", values)
    data = load(tmp_path / "x.npy", layout="NCL", value_range=(-0.5, 2.0))
    free = load(tmp_path / "x.npy", layout="NCL")
    assert (data.value_range, free.value_range) == ((-0.5, 2.0), None)
    assert transform_for(data) == MinMax(-0.5, 2.0)
    for same in ((np.float32(-0.5), 2), [-0.5, np.int64(2)]):
        assert from_array(values, layout="NCL", value_range=same).fingerprint == data.fingerprint
    wider = from_array(values, layout="NCL", value_range=(-1.0, 2.0))
    assert len({data.fingerprint, free.fingerprint, wider.fingerprint}) == 3
    assert np.array_equal(data.digests, free.digests)
    for ends in ((-0.4, 2.0), (-0.5, 1.9)):
        with pytest.raises(
            DataError, match=r"error\[RANGE\] array: values run from -0.5 to 2, outside of the given range"
        ):
            from_array(values, layout="NCL", value_range=ends)
    edge = np.full((2, 1), 0.1)  # rounded up in float32
    assert from_array(edge, value_range=(0.0, 0.1)).value_range == (0.0, 0.1)
    assert from_array(-edge, value_range=(-0.1, 0.0)).value_range == (-0.1, 0.0)
    with pytest.raises(DataError, match=r"error\[DTYPE\] array: uint8 values are integers and have no range"):
        from_array(SMALL, value_range=(0.0, 255.0))
    for ends in ((1.0, 1.0), (2.0, 1.0), (0.0, float("inf")), (float("nan"), 1.0)):
        with pytest.raises(ConfigError, match=r"error\[OPTION\] value_range"):
            from_array(values, layout="NCL", value_range=ends)


def test_large_arrays_on_disk_are_converted_at_each_access(tmp_path, monkeypatch):
    values = np.random.default_rng(0).normal(size=(50, 4, 5, 3))
    np.save(tmp_path / "x.npy", values)
    whole = load(tmp_path / "x.npy", layout="NHWC")
    assert isinstance(whole.values, np.ndarray)
    monkeypatch.setattr(arrays, "MAX_CONVERTED_BYTES", 1000)
    monkeypatch.setattr(dataset, "MAX_CHUNK_ITEMS", 7)
    data = load(tmp_path / "x.npy", layout="NHWC")
    assert isinstance(data.values, LazyArray)
    assert (data.fingerprint, data.notes, len(data)) == (whole.fingerprint, whole.notes, 50)
    assert np.array_equal(data.digests, whole.digests)
    np.testing.assert_allclose(data.moments(np.arange(50)), whole.moments(np.arange(50)), atol=1e-12)
    for key in (np.array([3, 40, 3]), slice(2, 9), slice(None, None, 20), 5):
        assert data.values[key].flags.c_contiguous
        np.testing.assert_array_equal(data.values[key], whole.values[key], strict=True)
    assert isinstance(from_array(values, layout="NHWC").values, np.ndarray)  # it is in memory already
    mapped = from_array(np.load(tmp_path / "x.npy", mmap_mode="r"), layout="NHWC")
    assert isinstance(mapped.values, LazyArray)
    assert mapped.fingerprint == whole.fingerprint


def test_arrays_on_disk_are_read_in_chunks(tmp_path, monkeypatch):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).integers(0, 256, (5000, 3, 2, 2)).astype(np.uint8))
    sizes = []
    monkeypatch.setattr(dataset, "MAX_CHUNK_BYTES", 12 * 100)
    to_bytes = dataset._bytes
    monkeypatch.setattr(dataset, "_bytes", lambda array: sizes.append(array.nbytes) or to_bytes(array))
    data = load(tmp_path / "x.npy")
    assert isinstance(data.values, LazyArray)
    assert len(data.fingerprint) == 64
    assert (max(sizes), sum(sizes)) == (1200, 60000)  # one pass
    assert [len(chunk) for chunk in dataset.chunks(data.values, np.arange(250))] == [100, 100, 50]


@pytest.mark.parametrize("order", ["C", "F"])
def test_indexing_a_lazy_array(tmp_path, monkeypatch, order):
    monkeypatch.setattr(arrays, "MAX_CONVERTED_BYTES", 0)
    random = np.random.default_rng(0)
    values = np.asarray(random.normal(size=(200, 3, 4)).astype(">f4"), order=order)
    np.save(tmp_path / "x.npy", values)
    data = load(tmp_path / "x.npy", layout="NCL")
    assert data.values.thread_safe
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
