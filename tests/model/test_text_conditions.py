"""Prompts as conditions of a model, and negative prompts in guidance."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_run import global_batch

from undiffuse.data import text_encoders
from undiffuse.data.caption_embeddings import CaptionEmbeddings, text_rows
from undiffuse.data.from_array import from_array
from undiffuse.data.text_encoders import FrozenEncoder
from undiffuse.data.transform import IntegerLevels
from undiffuse.denoising.guidance import ClassifierFree, Guide
from undiffuse.errors import ConfigError
from undiffuse.evaluation.plan import shared_condition
from undiffuse.model import checkpoint
from undiffuse.model.config import Config, ModelConfig, TrainConfig
from undiffuse.model.diffusion import Diffusion
from undiffuse.model.presets import adapt_to_data
from undiffuse.networks.condition import Condition
from undiffuse.process.seeded_noise import generator
from undiffuse.sampling.sampler import Sampler
from undiffuse.training.batches import batch_items
from undiffuse.training.run_folder import describe

NET = {"kind": "unet", "widths": [8], "blocks": 1, "attention": [0]}
SCHEDULE = {"name": "linear_log_snr", "high": 6.0}


def model(info=None, **sizes) -> Diffusion:
    torch.manual_seed(0)
    config = ModelConfig(network=NET | sizes, schedule=SCHEDULE, chain_length=20)
    built = Diffusion(config, (1, 4, 4), IntegerLevels(256), info).eval()
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.normal_(std=0.4)
    return built


def captioned(**embedded):
    data = from_array(np.arange(96).reshape(6, 1, 4, 4) % 5, num_values=5)
    captions = tuple((f"item {i}",) if i % 2 else (f"item {i}", "thing", "it") for i in range(6))
    return replace(data, captions=captions, **embedded)


def test_text_condition_gives_bytes():
    cond = model(text=64).text_condition(["a red apple", "", " cafe\u0301"])
    assert torch.equal(cond.text, text_rows(["a red apple", "", "café"]))
    assert not cond.text[1].any()
    assert bytes((cond.text[2, :5] - 1).tolist()) == "café".encode()


def test_an_empty_prompt_gives_the_samples_of_no_condition():
    text_model, sampler = model(text=64), Sampler(num_steps=3)
    plain = text_model.sample(2, sampler=sampler)
    assert torch.equal(text_model.sample(2, sampler=sampler, cond=text_model.text_condition(["", ""])), plain)
    assert not torch.equal(text_model.sample(2, sampler=sampler, cond=text_model.text_condition(["a", "b"])), plain)


@pytest.mark.parametrize(
    ("sizes", "prompt", "encoder", "message"),
    [
        ({}, "a", None, "trained without captions"),
        ({"vector": 3, "tokens": 3}, "a", None, "trained without captions"),
        ({"text": 64}, "é" * 33, None, "it has 66 bytes, and the model takes prompts of up to 64"),
        ({"text": 64}, "a", "minilm", "the text encoder is a part of the model's network"),
    ],
)
def test_prompts_that_do_not_fit(sizes, prompt, encoder, message):
    with pytest.raises(ConfigError, match=message):
        model(**sizes).text_condition([prompt], encoder)


def test_a_negative_condition_takes_the_place_of_null():
    text_model = model(text=64)
    x, t = torch.randn(2, 1, 4, 4), text_model.schedule(torch.full((2,), 0.5))
    cond, negative = text_model.text_condition(["a red box", "a disc"]), text_model.text_condition(["no"])
    denoise = text_model.denoiser()
    with torch.no_grad():
        good = denoise(x, t, cond)
        for avoided in (negative, None):
            poor = denoise(x, t, text_model.text_condition(["no", "no"]) if avoided else cond.null())
            guided = ClassifierFree(denoise, 3.0, negative=avoided)(x, t, cond)
            torch.testing.assert_close(guided.x, poor.x + 3 * (good.x - poor.x))
    samples = [
        text_model.sample(2, sampler=Sampler(num_steps=3, guidance=3.0), cond=cond, guide=guide)
        for guide in (None, Guide(negative=negative), Guide(negative=text_model.text_condition([""])))
    ]
    assert torch.equal(samples[0], samples[2])
    assert not torch.equal(samples[0], samples[1])


def test_a_negative_prompt_leaves_other_conditions_null():
    both = model(text=64, classes=3)
    cond = replace(both.text_condition(["a"]), label=torch.tensor([1]))
    null = ClassifierFree(both.denoiser(), 2.0, negative=both.text_condition(["longer"]))._null(cond, 1)
    assert null.label.tolist() == [-1]
    assert torch.equal(null.text, text_rows(["longer"]))


@pytest.mark.parametrize("sizes", [{"text": 64}, {"vector": 2, "tokens": 3}])
def test_a_negative_prompt_beside_a_label_alone(sizes):
    """(label, no prompt) is led away from (null label, negative prompt): null + scale (conditional − null), by hand."""
    both = model(classes=3, **sizes)
    denoise, x, t = both.denoiser(), torch.randn(2, 1, 4, 4), both.schedule(torch.full((2,), 0.5))
    label, null = torch.tensor([1, 2]), torch.tensor([-1, -1])
    embedded = Condition(vector=torch.tensor([[0.5, -1.0]]), tokens=torch.tensor([[[1.0, 2.0, -1.0]]]))
    negative = both.text_condition(["no"]) if "text" in sizes else embedded
    with torch.no_grad():
        good = denoise(x, t, Condition(label=label))
        poor = denoise(x, t, replace(negative.take(torch.zeros(2, dtype=torch.int64)), label=null))
        guided = ClassifierFree(denoise, 3.0, negative=negative)(x, t, Condition(label=label))
        torch.testing.assert_close(guided.x, poor.x + 3 * (good.x - poor.x), rtol=1e-4, atol=1e-4)
        assert not torch.allclose(guided.x, ClassifierFree(denoise, 3.0)(x, t, Condition(label=label)).x, atol=1e-2)


class Encoder(FrozenEncoder):
    def embed(self, texts):
        lengths = np.array([[len(text)] for text in texts], np.float32)
        tokens = np.repeat(lengths[:, None], 3, 2).astype(np.float16)
        embeddings = CaptionEmbeddings(self.identity, tuple(texts), lengths, tokens, np.ones((len(texts), 1), bool))
        return embeddings, [text for text in texts if len(text) > 20]


@pytest.fixture
def encoders(monkeypatch, tmp_path):
    """Encoders called one and two, of folders that are not read."""
    found = {name: Encoder(name, tmp_path, name * 20) for name in ("one", "two")}
    monkeypatch.setattr(text_encoders, "find_encoder", found.get)
    monkeypatch.setattr("undiffuse.model.text_conditions.find_encoder", found.get)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return found


def test_a_model_of_embeddings_needs_its_own_encoder(encoders, tmp_path):
    data = text_encoders.with_encoder(captioned(), "one")
    embedded = model(describe(data), vector=1, tokens=3)
    checkpoint.save(embedded, tmp_path / "m.safetensors")
    embedded = checkpoint.load(tmp_path / "m.safetensors")
    assert embedded.info["text_encoder"] == {"name": "one", "digest": "one" * 20}
    cond = embedded.text_condition(["a red box", ""], "one")
    assert cond.vector[0].tolist() == [9]
    assert cond.vector[1].isnan().all()
    assert cond.mask.tolist() == [[True], [False]]
    assert embedded.text_condition([""], "one").mask.tolist() == [[False]]
    embedded.sample(2, sampler=Sampler(num_steps=2, guidance=2.0), cond=cond)
    for encoder, message in (
        (None, "is a folder, which the model's file does not contain"),
        ("two", "it is 'two' .* trained with 'one'"),
    ):
        with pytest.raises(ConfigError, match=message):
            embedded.text_condition(["a"], encoder)
    with pytest.raises(ConfigError, match="more tokens than the text encoder takes"):
        embedded.text_condition(["a" * 21], "one")
    assert shared_condition(embedded, data) == ("captions", None)
    assert shared_condition(embedded, text_encoders.with_encoder(captioned(), "two"))[0] == "none"
    assert shared_condition(embedded, captioned())[0] == "none"
    embedded.info["text_encoder"] = {"name": "moved", "digest": "one" * 20}
    assert shared_condition(embedded, data) == ("captions", None)


def test_the_bound_is_given_the_captions_that_fit():
    data = captioned()
    sizes = adapt_to_data(Config(train=TrainConfig(conditional=True)), 5, data.condition_sizes).model.network
    assert sizes["text"] == 64
    assert shared_condition(model(text=64), data) == ("captions", None)
    longer = replace(data, captions=(*data.captions[1:], ("x" * 65,)))
    assert longer.condition_sizes == {"text": 96}
    assert shared_condition(model(text=64), longer)[0] == "none"
    assert shared_condition(model(text=96), data) == ("captions", None)
    larger = Config(ModelConfig(network={"kind": "unet", "text": 128}), TrainConfig(conditional=True))
    assert adapt_to_data(larger, 5, data.condition_sizes).model.network["text"] == 128
    with pytest.raises(ConfigError, match=r"model.network.text = 32"):
        adapt_to_data(replace(larger, model=ModelConfig(network={"kind": "unet", "text": 32})), 5, data.condition_sizes)


def test_a_caption_of_several_is_a_function_of_seed_and_step():
    """Of 1,500 draws with three captions each has the share 1/3 ± 0.062: false alarm 7e-7 (5.1 sigma)."""
    data, items, settings = captioned(), np.arange(6), TrainConfig(batch=12, conditional=True, condition_dropout=0.0)
    counts: dict[str, int] = {}
    for step in range(250):
        batch = global_batch(data, items, settings, step)
        chosen, texts = batch_items(items, settings, step), batch.cond.text
        for item, row in zip(chosen, texts, strict=True):
            text = bytes((row[row > 0] - 1).tolist()).decode()
            assert text in data.captions[item]
            counts[text] = counts.get(text, 0) + 1
    for name in ("thing", "it"):
        assert abs(counts[name] / 1500 - 1 / 3) < 0.062
    again = global_batch(data, items, settings, 7)
    assert torch.equal(again.cond.text, global_batch(data, items, settings, 7).cond.text)
    other = [global_batch(data, items, replace(settings, seed=seed), 7).cond.text for seed in (1, 2, 3)]
    assert any(not torch.equal(again.cond.text, text) for text in other)
    plain = global_batch(replace(data, captions=()), items, replace(settings, conditional=False), 7)
    assert torch.equal(again.eps, plain.eps)
    assert torch.equal(again.u, plain.u)


def test_a_dropped_caption_is_the_null_prompt():
    data, settings = captioned(), TrainConfig(batch=12, conditional=True, condition_dropout=0.5)
    batch = global_batch(data, np.arange(6), settings, 0)
    dropped = torch.rand(12, generator=generator(0, "condition", 0)) < 0.5
    assert torch.equal(~batch.cond.text.any(1), dropped)


def test_captions_of_a_condition_need_no_other_field():
    assert Condition(text=text_rows(["a"])).validate_for({"text": 4}, 1).given().keys() == {"text"}
