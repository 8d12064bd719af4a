import json
import math
from dataclasses import replace

import pytest

from undiffuse.errors import ConfigError
from undiffuse.model.config import Config, ModelConfig, TrainConfig, from_dict, read, replace_train, to_dict


def error_of(call, *arguments):
    """The one-line message of the ConfigError that ``call`` raises."""
    with pytest.raises(ConfigError) as caught:
        call(*arguments)
    text = str(caught.value)
    assert caught.value.exit_code == 2
    assert text.startswith("error[CONFIG] ")
    assert "\n" not in text
    assert len(text) < 500
    return text


@pytest.mark.parametrize(
    "config",
    [
        Config(),
        Config(
            ModelConfig(
                {"kind": "mlp", "width": 8}, {"name": "tabulated", "beta": [0.1, 0.2]}, chain_length=2, loss="bound"
            ),
            TrainConfig(batch=12, accumulate=3, betas=(0.5, 0.25), minutes=1.5, precision="float32", flip=True, seed=9),
        ),
    ],
)
def test_round_trip(config):
    plain = to_dict(config)
    assert json.loads(json.dumps(plain)) == plain
    assert from_dict(Config, plain) == config


def test_types_are_kept():
    config = from_dict(TrainConfig, {"betas": [0, 0.5], "lr": 1, "max_steps": None, "minutes": 3})
    assert config.betas == (0.0, 0.5)
    assert [type(v) for v in (*config.betas, config.lr, config.minutes)] == [float] * 4
    assert config.max_steps is None
    assert replace_train(Config(), max_steps=7).train.max_steps == 7


@pytest.mark.parametrize(
    ("data", "where", "cause"),
    [
        ({"train": {"bacth": 1}}, "config.train.bacth", "no such setting. Did you mean 'batch'"),
        ({"modle": {}}, "config.modle", "Did you mean 'model'"),
        ({"zzz": {}}, "config.zzz", "It has model, train"),
        ({"train": {"batch": True}}, "config.train.batch", "expected int, got True"),
        ({"train": {"batch": 1.0}}, "config.train.batch", "expected int, got 1.0"),
        ({"train": {"lr": True}}, "config.train.lr", "expected float"),
        ({"train": {"lr": "fast"}}, "config.train.lr", "expected float, got 'fast'"),
        ({"train": {"lr": math.nan}}, "config.train.lr", "expected float, got nan"),
        ({"train": {"lr": 10**400}}, "config.train.lr", "expected float, got 1000"),
        ({"train": {"minutes": math.inf}}, "config.train.minutes", "expected float"),
        ({"train": {"max_steps": "3"}}, "config.train.max_steps", "expected int"),
        ({"train": {"flip": 1}}, "config.train.flip", "expected bool"),
        ({"train": {"precision": 32}}, "config.train.precision", "expected str"),
        ({"train": {"betas": [0.9]}}, "config.train.betas", "expected tuple"),
        ({"train": {"betas": [0.9, "x"]}}, "config.train.betas[1]", "expected float, got 'x'"),
        ({"train": [1]}, "config.train", "expected a table of settings, got list"),
        ({"model": {"network": "unet"}}, "config.model.network", "expected dict"),
        ({"model": {"schedule": {"high": math.nan}}}, "config.model.schedule", "expected dict"),
        ({"model": {"schedule": {"beta": [0.1, math.inf]}}}, "config.model.schedule", "expected dict"),
        ({"model": {"network": json.loads('{"a":' * 900 + "1" + "}" * 900)}}, "config.model.network", "expected dict"),
        ({"model": {"network": {"widths": "x" * 10**6, "bad": object()}}}, "config.model.network", "expected dict"),
        (3, "config", "expected a table of settings, got int"),
    ],
)
def test_the_loader_is_strict(data, where, cause):
    text = error_of(from_dict, Config, data)
    assert text.startswith(f"error[CONFIG] {where}: ")
    assert cause in text


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("batch", v) for v in (0, -1, 1.5)],
        *[("accumulate", v) for v in (0, 3)],  # 3 does not divide 128
        *[("lr", v) for v in (0.0, -1e-3, math.nan, math.inf)],
        *[("decay", v) for v in (-0.1, 1.1, math.nan)],
        *[("ema", v) for v in (0.0, 0.28, 1.0)],
        *[("clip", v) for v in (0.0, -1.0, math.nan, math.inf)],
        *[("save_minutes", v) for v in (0.0, math.inf)],
        *[("max_steps", v) for v in (0, -3, 2**63)],
        *[("minutes", v) for v in (0.0, -1.0, math.nan, math.inf)],
        *[("warmup", -1), ("weight_decay", -0.1), ("previews", -1), ("precision", "float16")],
        *[("betas", (1.0, 0.9)), ("betas", (0.9, -0.1)), ("betas", (0.9, math.nan))],
        *[("held_out", v) for v in (-0.1, 0.5, math.nan)],
        *[("seed", v) for v in (-1, 2**63)],
    ],
)
def test_settings_of_training_outside_their_range(name, value):
    text = error_of(lambda: TrainConfig(**{name: value}))
    assert text.startswith(f"error[CONFIG] train.{name} = {value!r}: ")


def test_the_limits_of_the_ranges_are_accepted():
    TrainConfig(batch=1, decay=0.0, warmup=0, held_out=0.0, previews=0, seed=2**63 - 1, betas=(0.0, 0.0))
    TrainConfig(decay=1.0, minutes=1e-3, precision="bfloat16", batch=6, accumulate=6)


def test_a_run_has_one_length(tmp_path):
    text = error_of(lambda: TrainConfig(max_steps=1, minutes=2.0))
    assert text.startswith("error[CONFIG] train.max_steps = 1: minutes = 2.0 is the length of the run too")
    (tmp_path / "a.toml").write_text("train = {minutes = 60}")
    assert read(tmp_path / "a.toml", Config(train=TrainConfig(max_steps=9))).train == TrainConfig(minutes=60)
    (tmp_path / "b.toml").write_text("train = {lr = 0.5}")
    assert read(tmp_path / "b.toml", Config(train=TrainConfig(max_steps=9))).train == TrainConfig(max_steps=9, lr=0.5)


TOML = """
[model]
chain_length = 10
target = {name = "eps"}
[train]
batch = 12
"""


def test_a_file_overrides_a_recipe(tmp_path):
    base = Config(ModelConfig(loss="bound"), TrainConfig(lr=0.5))
    (tmp_path / "a.toml").write_text(TOML)
    (tmp_path / "a.json").write_text(
        '{"model": {"chain_length": 10, "target": {"name": "eps"}}, "train": {"batch": 12}}'
    )
    config = read(tmp_path / "a.toml", base)
    assert config == read(tmp_path / "a.json", base)
    assert config == Config(
        ModelConfig(loss="bound", chain_length=10, target={"name": "eps"}), TrainConfig(lr=0.5, batch=12)
    )  # settings that the file lacks stay; a part that it has is replaced as a whole
    (tmp_path / "empty.toml").write_text("")
    assert read(tmp_path / "empty.toml", base) == base


@pytest.mark.parametrize(
    ("text", "network"),
    [
        ("widths = [8, 16]", {"kind": "unet", "widths": [8, 16], "blocks": 2}),
        ('kind = "unet"\nwidths = [8, 16]', {"kind": "unet", "widths": [8, 16]}),
        ("", {"kind": "unet", "widths": [4], "blocks": 2}),
    ],
)
def test_a_table_without_its_kind_changes_settings(tmp_path, text, network):
    (tmp_path / "a.toml").write_text(f"[model.network]\n{text}\n")
    base = Config(ModelConfig({"kind": "unet", "widths": [4], "blocks": 2}, {"name": "cosine"}))
    assert read(tmp_path / "a.toml", base) == replace(base, model=replace(base.model, network=network))


@pytest.mark.parametrize(
    ("name", "content", "cause"),
    [
        ("a.toml", b"model = 3", "a.toml.model: expected a table of settings, got int"),
        ("a.toml", b"[train]\nbacth = 3", "a.toml.train.bacth: no such setting"),
        ("a.toml", b"[train]\nlr = nan", "a.toml.train.lr: expected float, got nan"),
        ("a.toml", b"[train]\nmax_steps = 0", "train.max_steps = 0: must be above 0"),
        ("a.toml", b"train]", "cannot be read as a recipe"),
        ("a.toml", b"\xff\xfe", "cannot be read as a recipe"),
        ("a.toml", b"a = " + b"[" * 20_000, "cannot be read as a recipe"),
        ("a.json", b"[1]", "expected tables, got list"),
        ("a.json", b"{", "cannot be read as a recipe"),
        ("a.json", b'{"a":' * 50_000, "cannot be read as a recipe"),
        ("a.json", b'{"train": {"lr": 1e999}}', "expected float, got inf"),
    ],
)
def test_files_that_are_not_a_recipe(tmp_path, name, content, cause):
    (tmp_path / name).write_bytes(content)
    assert cause in error_of(read, tmp_path / name, Config())


def test_a_missing_file(tmp_path):
    assert "No such file" in error_of(read, tmp_path / "none.toml", Config())
    assert "cannot be read" in error_of(read, tmp_path, Config())
