"""Names, captions, parts and colours of named drawings: the pure functions of ``benchmarks/emoji/prepare``.

A drawing has an icon name as npm's icon sets give it, such as ``waving-hand-medium-dark``. Its base name is the name
without skin tones; its family is the base name without gender, direction and colour, and decides its part of the data.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

import numpy as np

COLOURS = {
    "red": "#f8312f",
    "orange": "#ff822d",
    "yellow": "#fcd53f",
    "green": "#00b85c",
    "blue": "#0074ba",
    "purple": "#8d65c5",
    "pink": "#ff8fc5",
    "brown": "#6d4534",
    "grey": "#9b9b9b",
    "black": "#282828",
}
"""The colour words of combinations, and the sRGB colour of each, near those of Fluent's own circles and hearts."""
TEST, VALIDATION = 0.06, 0.04
"""Shares of the families that are test and validation items."""
LONGEST = 72
"""Bytes of a caption, at most: words of the name are kept, keywords are left out from the end."""
MIN_CHROMA, HUE_WINDOW = 0.05, 40.0
"""OKLCH: a colour below this chroma is a grey; colours within so many degrees of the main hue are recoloured."""
LEAST_SHARE, LEAST_CHROMA = 0.85, 0.07
"""Of a thing that can be recoloured: the share of its main hue in the drawn pixels, and the chroma of its mean."""
NO_NEW_COLOUR, SAME_COLOUR = 0.13, 0.08
"""Distances in OKLab: a drawing is not recoloured to a nearer colour; one still nearer is called by its word."""

TONE = re.compile(r"-(?:medium-light|medium-dark|light|medium|dark)-skin-tone(?=-|$)")
SHORT_TONE = re.compile(r"-(medium-light|medium-dark|light|medium|dark)$")
NUMBERED_TONE = re.compile(r"(?:-tone[1-5])+$")
PREFIX = re.compile(rf"^(?:(?:man|woman|person|men|women|people|mens|womens|{'|'.join(COLOURS)}|white|light-blue)-)+")
TOGETHER = {
    "girl": "boy",
    "princess": "prince",
    "old-woman": "old-man",
    "old-person": "old-man",
    "older-person": "old-man",
}
TOGETHER |= {"blonde-hair": "hair", "blond-hair": "hair", "curly-hair": "hair", "man": "person", "woman": "person"}
"""Families that are one, beside those that the rules find."""


class Name(NamedTuple):
    """``base`` is an icon name; ``tones`` are skin tones in words, empty for most drawings."""

    base: str
    tones: tuple[str, ...]


def split_tones(icon: str, icons: Collection[str]) -> Name:
    """``waving-hand-dark`` and ``waving-hand-dark-skin-tone`` as (``waving-hand``, (``dark``,)), in a set of ``icons``.

    Short endings such as ``-light`` are tones only if the name before them is an icon too (no ``traffic-light``).
    """
    tones = tuple(tone[1 : -len("-skin-tone")] for tone in TONE.findall(icon))
    base = TONE.sub("", icon)
    if numbered := NUMBERED_TONE.search(base):
        words = ("light", "medium-light", "medium", "medium-dark", "dark")
        tones += tuple(words[int(number) - 1] for number in re.findall(r"\d", numbered[0]))
        base = base[: numbered.start()]
    if not tones and (short := SHORT_TONE.search(base)) and base[: short.start()] in icons:
        return Name(base[: short.start()], (short[1],))
    return Name(base, tones)


def family(base: str) -> str:
    """The name without gender, direction, colour: ``astronaut`` of ``woman-astronaut``, ``heart`` of ``red-heart``."""
    name = base.removesuffix("-facing-right")
    name = PREFIX.sub("", name) or name
    name = re.sub(r"-(?:left|right|up|down)$", "", name)
    return TOGETHER.get(name, name)


def part(family_name: str) -> str:
    """``train``, ``val`` or ``test``, by the first 64 bits of BLAKE2b of the family's name."""
    digest = hashlib.blake2b(family_name.encode(), digest_size=8).digest()
    u = int.from_bytes(digest, "big") / 2**64
    return "test" if u < TEST else "val" if u >= 1 - VALIDATION else "train"


def words(icon: str) -> str:
    return icon.replace("-", " ").replace("_", " ").strip()


def caption(title: str, tones: Sequence[str] = ()) -> str:
    """``waving hand, medium-dark skin tone``; two tones are joined by ``and``."""
    return f"{title}, {' and '.join(tones)} skin tone" if tones else title


def keyword_caption(name: str, keywords: Iterable[str], longest: int = LONGEST, most: int = 4) -> str | None:
    """``red apple: fruit, health``: the name with the first keywords that add a word and fit; None if none does.

    Keywords that are no words (``:D``) or hold only words of the name are left out.
    """
    known, chosen = set(re.findall(r"[a-z]+", name.lower())), []
    for keyword in keywords:
        text = words(keyword).lower()
        new = set(re.findall(r"[a-z]+", text))
        longer = f"{name}: {', '.join([*chosen, text])}"
        if re.fullmatch(r"[a-z][a-z ]+", text) and new - known and len(longer.encode()) <= longest:
            chosen.append(text)
            known |= new
        if len(chosen) == most:
            break
    return f"{name}: {', '.join(chosen)}" if chosen else None


def split_colour(base: str) -> tuple[str, str] | None:
    """``blue-book`` as (``blue``, ``book``); None if the name does not begin with a colour word."""
    colour, _, thing = base.partition("-")
    return (colour, thing) if colour in COLOURS and thing else None


def held_out(pairs: Sequence[tuple[str, str]], share: float) -> set[tuple[str, str]]:
    """About ``share`` of the (colour, thing) pairs; each colour and each thing also occurs in pairs that stay.

    Pairs are taken in the order of a hash of their words; at most three of a thing, and never the last but two.
    """
    order = sorted(pairs, key=lambda pair: hashlib.blake2b(" ".join(pair).encode()).digest())
    kept: dict[str, int] = {}
    for word in (word for pair in pairs for word in pair):
        kept[word] = kept.get(word, 0) + 1
    first, chosen = dict(kept), set()
    for colour, thing in order:
        if len(chosen) >= round(share * len(pairs)):
            break
        if first[thing] - kept[thing] < 3 and kept[thing] > 3 and kept[colour] > 3:
            chosen.add((colour, thing))
            kept[colour] -= 1
            kept[thing] -= 1
    return chosen


# Colours. OKLab: B. Ottosson, "A perceptual color space for image processing" (2020).
TO_LMS = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
TO_LAB = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)


def oklab(rgb: np.ndarray) -> np.ndarray:
    """(..., 3) sRGB in [0, 1] to OKLab."""
    rgb = np.asarray(rgb, float)
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return np.cbrt(linear @ TO_LMS.T) @ TO_LAB.T


def srgb(lab: np.ndarray) -> np.ndarray:
    """(..., 3) OKLab to sRGB, clipped to [0, 1]."""
    linear = (np.asarray(lab, float) @ np.linalg.inv(TO_LAB).T) ** 3 @ np.linalg.inv(TO_LMS).T
    linear = np.clip(linear, 0, 1)
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def from_hex(code: str) -> np.ndarray:
    """``#rgb`` or ``#rrggbb`` as (3,) in [0, 1]."""
    digits = code[1:] if len(code) == 7 else "".join(2 * digit for digit in code[1:])
    return np.array([int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)])


def to_hex(rgb: np.ndarray) -> str:
    return "#" + "".join(f"{round(255 * value):02x}" for value in np.clip(rgb, 0, 1))


class MainColour(NamedTuple):
    """The colour of most of a drawing: mean in OKLab, hue in degrees, and its share of the drawn pixels."""

    lab: np.ndarray
    hue: float
    share: float


def main_colour(rgba: np.ndarray) -> MainColour | None:
    """The main hue of a drawing (H, W, 4) uint8: the window of hues that holds the most pixels. None if all is grey."""
    pixels = rgba.reshape(-1, 4)
    lab = oklab(pixels[pixels[:, 3] > 200, :3] / 255)
    chroma, hue = np.hypot(lab[:, 1], lab[:, 2]), np.degrees(np.arctan2(lab[:, 2], lab[:, 1]))
    coloured = chroma > MIN_CHROMA
    if not coloured.any():
        return None
    centres = np.arange(0, 360, 5.0)
    near = hue_distance(hue[None, coloured], centres[:, None]) < HUE_WINDOW
    best = near[near.sum(1).argmax()]
    mean = lab[coloured][best].mean(0)
    return MainColour(mean, math.degrees(math.atan2(mean[2], mean[1])), float(best.sum() / len(lab)))


def hue_distance(a: np.ndarray, b: np.ndarray | float) -> np.ndarray:
    return np.abs((a - b + 180) % 360 - 180)


def near_colours(lab: np.ndarray, within: float) -> list[str]:
    """The words of the colours nearer to ``lab`` than ``within``, the nearest first."""
    distance = {word: float(np.linalg.norm(oklab(from_hex(code)) - lab)) for word, code in COLOURS.items()}
    return sorted((word for word in COLOURS if distance[word] < within), key=distance.__getitem__)


def recolour(svg: str, main: MainColour, word: str) -> str:
    """``svg`` with every colour near the main hue moved to that of ``word``; lighter and darker shades stay so."""
    target = oklab(from_hex(COLOURS[word]))
    strength = math.hypot(*target[1:]) / math.hypot(*main.lab[1:])
    turn = math.radians(math.degrees(math.atan2(target[2], target[1])) - main.hue)
    turned = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])

    def replace(match: re.Match[str]) -> str:
        lab = oklab(from_hex(match[0]))
        hue = np.degrees(np.arctan2(lab[2], lab[1]))
        if math.hypot(*lab[1:]) <= MIN_CHROMA or hue_distance(hue, main.hue) >= HUE_WINDOW:
            return match[0]
        lightness = np.clip(target[0] + 0.8 * (lab[0] - main.lab[0]), 0.1, 0.97)
        return to_hex(srgb(np.array([lightness, *(strength * (turned @ lab[1:]))])))

    return re.sub(r"#(?:[0-9a-fA-F]{6}|[0-9a-fA-F]{3})(?![0-9a-zA-Z])", replace, svg)
