from pathlib import Path

import pytest

from undiffuse import errors
from undiffuse.cli.recipe_options import format_length
from undiffuse.model.config import TrainConfig

CODES = {
    errors.UndiffuseError: 1,
    errors.ConfigError: 2,
    errors.DataError: 3,
    errors.CheckpointError: 4,
    errors.NonFiniteError: 5,
    errors.ResourceError: 6,
}


@pytest.mark.parametrize("kind", CODES)
def test_every_error_is_one_line_with_an_exit_code(kind):
    error = kind("SHORT", Path("runs/a"), "it ends early", "Copy it again")
    assert str(error) == "error[SHORT] runs/a: it ends early. Copy it again."
    assert error.args == (str(error),)
    assert (error.code, error.where, error.cause, error.fix) == ("SHORT", "runs/a", "it ends early", "Copy it again")
    assert error.exit_code == CODES[kind]
    assert isinstance(error, errors.UndiffuseError)


@pytest.mark.parametrize(
    ("text", "printed"),
    [
        ("plain, ü, 語, ᾱ", "plain, ü, 語, ᾱ"),
        ("a\nb\tc\r", "a\\nb\\tc\\r"),
        ("\x1b[31mred\x07", "\\x1b[31mred\\x07"),
        ("\u202egnp.exe", "\\u202egnp.exe"),  # right to left
        ("\u200b\u2028", "\\u200b\\u2028"),
        ("bad \udc80 byte", "bad \\udc80 byte"),
    ],
)
def test_control_characters_in_messages_are_escaped(text, printed):
    assert errors.printable(text) == printed
    line = str(errors.DataError("X", text, text, text))
    assert line == f"error[X] {printed}: {printed}. {printed}."
    assert line.isprintable()
    line.encode()


def test_one_is_singular():
    numbers = [(1, "minute"), (1.0, "minute"), (2.5, "minute"), (0, "step"), (1000, "class"), (1, "class")]
    expected = ["1 minute", "1 minute", "2.5 minutes", "0 steps", "1,000 classes", "1 class"]
    assert [errors.counted(*number) for number in numbers] == expected
    assert format_length(TrainConfig(minutes=1.0)) == "1 minute"
    assert format_length(TrainConfig(max_steps=1)) == "1 step"
