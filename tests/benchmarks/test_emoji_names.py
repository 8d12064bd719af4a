"""The pure functions of ``benchmarks/emoji/drawings.py``: names, parts, captions, held-out pairs, colours."""

from __future__ import annotations

import importlib.util
from importlib.machinery import SourceFileLoader
from pathlib import Path

import numpy as np
import pytest

PATH = Path(__file__).parents[2] / "benchmarks/emoji/drawings.py"
spec = importlib.util.spec_from_file_location("emoji_drawings", PATH)
drawings = importlib.util.module_from_spec(spec)
spec.loader.exec_module(drawings)


@pytest.mark.parametrize(
    ("icon", "base", "tones"),
    [
        ("waving-hand-dark", "waving-hand", ("dark",)),
        ("waving-hand-medium-light", "waving-hand", ("medium-light",)),
        ("waving-hand-medium-dark-skin-tone", "waving-hand", ("medium-dark",)),
        ("men-holding-hands-dark-skin-tone-light-skin-tone", "men-holding-hands", ("dark", "light")),
        ("man-dark-skin-tone-bald", "man-bald", ("dark",)),
        ("breast-feeding-tone5", "breast-feeding", ("dark",)),
        ("waving-hand", "waving-hand", ()),
        ("horizontal-traffic-light", "horizontal-traffic-light", ()),
        ("light-bulb", "light-bulb", ()),
    ],
)
def test_skin_tones_are_split_from_names(icon: str, base: str, tones: tuple[str, ...]) -> None:
    assert drawings.split_tones(icon, {"waving-hand", icon}) == (base, tones)


def test_a_short_ending_is_a_tone_only_behind_an_icon() -> None:
    assert drawings.split_tones("light-rail-dark", {"light-rail-dark"}) == ("light-rail-dark", ())
    assert drawings.split_tones("signal-light-dark-skin-tone", {"signal"}) == ("signal-light", ("dark",))


@pytest.mark.parametrize(
    "same",
    [
        ("man-astronaut", "woman-astronaut", "astronaut"),
        ("red-heart", "light-blue-heart", "white-heart"),
        ("person-running", "man-running-facing-right", "woman-running"),
        ("backhand-index-pointing-left", "backhand-index-pointing-up"),
        ("man-blonde-hair", "man-red-hair"),
        ("girl", "boy"),
    ],
)
def test_gender_direction_and_colour_stay_in_one_part(same: tuple[str, ...]) -> None:
    assert len({drawings.family(name) for name in same}) == 1
    assert len({drawings.part(drawings.family(name)) for name in same}) == 1


def test_a_family_is_never_empty_and_differs_between_things() -> None:
    assert [drawings.family(name) for name in ("mango", "woman", "pear")] == ["mango", "person", "pear"]


def test_parts_have_their_shares() -> None:
    """Of 20,000 names, 4 % and 6 % each ± 5 standard deviations: a wrong share of 5 % would differ by 6 or more."""
    parts = [drawings.part(str(i)) for i in range(20_000)]
    assert abs(parts.count("test") - 1200) < 5 * 34
    assert abs(parts.count("val") - 800) < 5 * 28


def test_captions() -> None:
    assert drawings.caption("waving hand", ("medium-dark",)) == "waving hand, medium-dark skin tone"
    assert drawings.caption("holding hands", ("dark", "light")) == "holding hands, dark and light skin tone"
    assert drawings.caption("red apple") == "red apple"


def test_keywords_add_words_and_fit() -> None:
    text = drawings.keyword_caption("red apple", ["apple", "fruit", ":D", "RED", "health", "fruit", "24h", "mac_os"])
    assert text == "red apple: fruit, health, mac os"
    assert drawings.keyword_caption("red apple", ["apple", "red"]) is None
    assert drawings.keyword_caption("apple", ["fruit", "school"], longest=len("apple: fruit")) == "apple: fruit"
    assert drawings.keyword_caption("apple", ["fruit"], longest=len("apple: fruit") - 1) is None
    assert drawings.keyword_caption("a", ["bb", "cc", "dd"], most=2) == "a: bb, cc"


def test_held_out_pairs_leave_each_word_in_others() -> None:
    colours, things = list(drawings.COLOURS), [f"thing-{i}" for i in range(12)]
    pairs = [(colour, thing) for colour in colours for thing in things]
    chosen = drawings.held_out(pairs, 0.1)
    kept = set(pairs) - chosen
    assert len(chosen) == 12
    assert chosen == drawings.held_out(pairs[::-1], 0.1)
    for colour, thing in chosen:
        assert sum(pair[0] == colour for pair in kept) >= 3
        assert sum(pair[1] == thing for pair in kept) >= 3
    assert max(sum(pair[1] == thing for pair in chosen) for thing in things) <= 3
    assert not drawings.held_out([("red", "car"), ("red", "hat"), ("blue", "car")], 1.0)


def test_each_held_out_word_stays_in_three_pairs() -> None:
    """A thing or colour of four pairs can lose one: the first in the order, then only pairs without its words."""
    square = [(colour, thing) for colour in "abcd" for thing in "wxyz"]
    chosen = drawings.held_out(square, 1.0)
    assert 3 <= len(chosen) <= 4
    assert len({colour for colour, _ in chosen}) == len({thing for _, thing in chosen}) == len(chosen)


def test_split_colour() -> None:
    assert drawings.split_colour("blue-book") == ("blue", "book")
    assert drawings.split_colour("blue") is None
    assert drawings.split_colour("blueberries") is None


def test_oklab_is_its_published_examples_and_inverts() -> None:
    """Red, green, blue and white in OKLab, as published with the definition (three decimals)."""
    lab = drawings.oklab(np.array([[1.0, 1, 1], [1, 0, 0], [0, 1, 0], [0, 0, 1]]))
    expected = [[1, 0, 0], [0.628, 0.225, 0.126], [0.866, -0.234, 0.179], [0.452, -0.032, -0.312]]
    assert np.abs(lab - expected).max() < 6e-4
    rgb = np.random.default_rng(0).random((50, 3))
    assert np.abs(drawings.srgb(drawings.oklab(rgb)) - rgb).max() < 1e-6
    assert drawings.to_hex(drawings.from_hex("#f80")) == "#ff8800"


def picture(*shares: tuple[str, int]) -> np.ndarray:
    """A strip of pixels of each colour, and as many transparent ones."""
    rows = [[*(round(255 * v) for v in drawings.from_hex(code)), 255] for code, count in shares for _ in range(count)]
    return np.array([[*rows, *[[0, 0, 0, 0]] * len(rows)]], np.uint8)


def test_main_colour_and_its_share() -> None:
    main = drawings.main_colour(picture(("#f8312f", 70), ("#d3231f", 20), ("#00b85c", 10), ("#808080", 100)))
    assert main.share == pytest.approx(0.45)
    assert drawings.near_colours(main.lab, drawings.SAME_COLOUR) == ["red"]
    assert drawings.main_colour(picture(("#808080", 5))) is None


@pytest.mark.parametrize("word", list(drawings.COLOURS))
def test_recolouring_moves_the_main_colour_alone(word: str) -> None:
    main = drawings.main_colour(picture(("#f8312f", 90), ("#00b85c", 10)))
    svg = '<path fill="#f8312f"/><path fill="#00b85c"/><path fill="#ccc4c4"/><g id="#face-1"/>'
    body, leaf, grey, _ = drawings.recolour(svg, main, word).split("/>")[:4]
    lab = drawings.oklab(drawings.from_hex(body.split('"')[1]))
    assert np.linalg.norm(lab - drawings.oklab(drawings.from_hex(drawings.COLOURS[word]))) < 0.03
    assert (leaf, grey) == ('<path fill="#00b85c"', '<path fill="#ccc4c4"')


def test_recolouring_keeps_light_and_dark_shades_apart() -> None:
    main = drawings.main_colour(picture(("#f8312f", 80), ("#a01010", 20)))
    light, dark = drawings.recolour("#f8312f #a01010", main, "blue").split()
    assert drawings.oklab(drawings.from_hex(light))[0] > drawings.oklab(drawings.from_hex(dark))[0] + 0.1


def test_the_nearest_drawing_and_its_difference() -> None:
    loader = SourceFileLoader("emoji_picture", str(PATH.with_name("picture")))
    picture_script = importlib.util.module_from_spec(importlib.util.spec_from_loader("emoji_picture", loader))
    loader.exec_module(picture_script)
    drawn = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 3)).astype(np.uint8)
    sample = drawn[[3, 1]].copy()
    sample[0, 0, 0, 0] ^= 64  # one of 48 values by a quarter of the range
    index, percent = picture_script.nearest(sample, drawn)
    assert index.tolist() == [3, 1]
    assert percent == pytest.approx([100 * 64 / 255 / 48**0.5, 0], abs=0.05)
