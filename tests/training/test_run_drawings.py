"""Pictures for a page of every kind of item: images, volumes, series, tables, points, latents, stages of a cascade."""

import re

import numpy as np
import pytest
from evaluation_models import model_of

from undiffuse.data.from_array import from_array
from undiffuse.data.stage_data import split_data
from undiffuse.data.transform import transform_for
from undiffuse.evaluation.process_states import reverse_states
from undiffuse.report.figures import image_strip
from undiffuse.report.run_report import Drawing
from undiffuse.training.run_drawings import ModelPictures, data_picture, nearest_picture, sampling_speed

RNG = np.random.default_rng(0)


def dataset(shape, num_values=None, **more):
    values = RNG.integers(num_values, size=(30, *shape)) if num_values else RNG.normal(size=(30, *shape))
    return from_array(values if num_values else values.astype(np.float32), num_values=num_values, name="d", **more)


CASES = {
    "image": (dataset((1, 4, 4), 5), 1),
    "colours": (dataset((3, 4, 4), 256), 1),
    "volume": (dataset((1, 4, 4, 4), 5), 1),
    "series": (dataset((2, 8), layout="NCL"), 1),
    "table": (dataset((3,)), 4),
}


def pictures_of(data, max_calls=1e9, minutes_per_call=0.0, **network):
    moments = data.moments(np.arange(len(data))) if data.num_values is None else None
    info = {"num_values": data.num_values, "fingerprint": data.fingerprint, "held_out": 0.2}
    model = model_of(data.item_shape, transform_for(data, moments), network=network, **info)
    return ModelPictures(model, data, data.split(0.2), max_calls, "undiffuse report run", minutes_per_call)


@pytest.mark.parametrize("name", CASES)
def test_every_kind_of_item_is_drawn(name):
    data, images = CASES[name]
    pictures = pictures_of(data)
    plot = len(data.item_shape) <= 2
    for drawing in (pictures.forward(), pictures.reverse()):
        assert (len(drawing.images), drawing.plot) == (images, plot), drawing
        assert "log-SNR" in drawing.caption
    solvers = pictures.solvers()
    assert len(solvers.images) == len(solvers.titles) == len(solvers.alts) == 5
    assert len(data_picture(data, data.split(0.2)).images) == 1
    assert len(nearest_picture([], "missing.npz", data).images) == 0


def test_each_held_out_item_is_drawn_once():
    pictures = pictures_of(CASES["table"][0])  # fewer are held out than are plotted at most
    held_out = len(pictures.split.shown)
    assert held_out < 10
    assert pictures.forward().caption.startswith(f"Forward process, from data to noise: {held_out} held-out items;")


def test_states_have_their_log_snr():
    pictures = pictures_of(CASES["table"][0])
    points = pictures.reverse()
    pictures.model.info["columns"] = ["age", "height", "weight"]
    table = pictures.reverse()
    assert len(points.titles) == 4
    assert all(re.fullmatch(r"log-SNR −?\d+\.\d", title) for title in points.titles)
    assert not np.array_equal(*(np.asarray(drawing.images[0])[-40:] for drawing in (points, table)))  # other names
    for name in ("image", "series", "volume"):
        pictures = pictures_of(CASES[name][0])
        levels, frames = reverse_states(pictures.model, range(pictures._strip_items), pictures._columns)
        labels = [f"{float(level.log_snr):.1f}".replace("-", "−") for level in levels]
        expected = image_strip(frames, labels, pictures.num_values)
        assert np.array_equal(np.asarray(pictures.reverse().images[0]), np.asarray(expected))


def test_super_resolution_needs_the_images_that_it_enlarges():
    data = split_data(dataset((1, 8, 8), 16), 4)
    pictures = pictures_of(data, image=1)
    reverse = pictures.reverse()
    assert reverse.images[0].size == pictures.forward().images[0].size  # whole images, not what is learned
    assert sampling_speed(pictures.model, data, data.split(0.2)) > 0
    without = ModelPictures(pictures.model, None, None, 1e9, "undiffuse report run")
    assert "in the data of the run" in without.solvers().reason
    assert sampling_speed(pictures.model, None, None) == 0


def test_labels_that_training_did_not_give_are_not_drawn():
    pictures = pictures_of(dataset((1, 4, 4), 5, labels=np.arange(30) % 3), classes=3)
    assert pictures.condition(4).cond.label.tolist() == [0, 1, 2, 0]
    pictures.model.info["conditional"] = False
    assert pictures.condition(4).cond is None


def test_calls_are_counted():
    pictures = pictures_of(CASES["image"][0], max_calls=20)
    assert pictures.reverse().images  # four items by five steps
    assert pictures.left == 0
    missing = pictures.solvers()
    assert isinstance(missing, Drawing)
    assert (missing.images, missing.command) == ((), "undiffuse report run")


def test_the_command_for_what_does_not_fit_names_minutes_that_suffice():
    pictures = pictures_of(CASES["image"][0], max_calls=20, minutes_per_call=0.1)
    assert pictures.reverse().images
    command, of_command, minutes = pictures.solvers().command.rpartition(" --minutes ")
    assert (command, of_command) == ("undiffuse report run", " --minutes ")
    assert pictures_of(CASES["image"][0], max_calls=int(minutes) / 0.1).solvers().images
