"""Pretrained encoders: what they are given, pooling, identity, the cache, and folders that fail.

Without the library transformers a model of our own stands in for those that it loads; with it, tiny folders of random
weights that it writes itself.
"""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from undiffuse.data import text_encoders
from undiffuse.data.from_array import from_array
from undiffuse.data.sources.packed_array import load, pack_writer
from undiffuse.data.text_encoders import find_encoder, with_encoder
from undiffuse.errors import ConfigError, DataError

CAPTIONS = (("a red disc",), ("a box", "a red box"))
WORDS = ["a", "red", "green", "blue", "disc", "box", "photo", "of"]


class Words:
    """A tokenizer and a model: token k, of words by length, has the state k times (1, 2, 3)."""

    pad_token_id = 0
    config = SimpleNamespace(hidden_size=3)
    calls = 0

    def tokens(self, text, truncation=False, max_length=None):
        return {"input_ids": [len(word) for word in text.split()][: max_length if truncation else None]}

    def encode(self, input_ids, attention_mask):
        type(self).calls += 1
        states = input_ids[..., None] * torch.tensor([1.0, 2.0, 3.0]) + 100.0 * (1 - attention_mask[..., None])
        return SimpleNamespace(last_hidden_state=states, pooler_output=states[:, 0] + 1)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The folder of an encoder that `Words` computes, and a cache of its own."""
    words = Words()
    model = lambda **inputs: words.encode(**inputs)  # noqa: E731
    model.config = words.config
    tokenizer = lambda text, **options: words.tokens(text, **options)  # noqa: E731
    tokenizer.pad_token_id = 0
    monkeypatch.setattr(text_encoders, "_load", lambda folder: (model, tokenizer, 4))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(Words, "calls", 0)
    (tmp_path / "enc").mkdir()
    (tmp_path / "enc" / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "enc" / "model.safetensors").write_bytes(b"weights")
    return tmp_path / "enc"


def captioned():
    return replace(from_array(np.arange(8.0).reshape(2, 4)), captions=CAPTIONS)


def test_embeddings_by_formula(folder):
    data = with_encoder(captioned(), str(folder))
    assert data.condition_sizes == {"vector": 3, "tokens": 3}
    cond = data.condition(np.array([1, 0]), np.array([0.6, 0.0]))
    lengths = torch.tensor([[1.0, 3, 3], [1, 3, 4]])
    torch.testing.assert_close(cond.tokens, lengths[..., None] * torch.tensor([1.0, 2, 3]))
    torch.testing.assert_close(cond.vector, lengths.mean(1, keepdim=True) * torch.tensor([1.0, 2, 3]))
    box = data.condition(np.array([1]))
    assert box.mask.tolist() == [[True, True, False]]
    assert not box.tokens[~box.mask].any()
    np.testing.assert_allclose(data.condition_vectors(np.array([1]))[:, 0], [2, 7 / 3], rtol=1e-6)
    null = data.embeddings.condition(["", "a box"])
    assert null.vector[0].isnan().all()
    assert (null.mask.sum(1).tolist(), null.tokens[0].abs().sum().item()) == ([0, 2], 0)
    assert "3 captions embedded by enc" in data.notes


def test_pooling_of_sentence_encoders_and_of_clip(folder):
    plain = find_encoder(str(folder)).embed(["a box"])[0].pooled
    (folder / "modules.json").write_text("[]")
    np.testing.assert_allclose(find_encoder(str(folder)).embed(["a box"])[0].pooled, plain / np.linalg.norm(plain))
    (folder / "config.json").write_text('{"model_type": "clip_text_model"}')
    np.testing.assert_allclose(find_encoder(str(folder)).embed(["a box"])[0].pooled, [[2, 3, 4]])


def test_embeddings_are_computed_once_and_again_after_damage_or_change(folder, tmp_path):
    first = with_encoder(captioned(), str(folder))
    assert Words.calls == 1
    again = with_encoder(captioned(), str(folder))
    assert (Words.calls, again.fingerprint) == (1, first.fingerprint)
    np.testing.assert_array_equal(again.embeddings.tokens, first.embeddings.tokens)
    (file,) = (tmp_path / "cache").rglob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    np.testing.assert_array_equal(with_encoder(captioned(), str(folder)).embeddings.mask, first.embeddings.mask)
    assert Words.calls == 2
    (folder / "model.safetensors").write_bytes(b"others")
    other = with_encoder(captioned(), str(folder))
    assert Words.calls == 3
    assert len({captioned().fingerprint, first.fingerprint, other.fingerprint}) == 3
    (folder / "README.md").write_text("words")
    assert with_encoder(captioned(), str(folder)).fingerprint == other.fingerprint


def test_a_pack_holds_the_embeddings(folder, tmp_path):
    data = with_encoder(captioned(), str(folder))
    with pack_writer(tmp_path / "p.npy") as writer:
        writer.write(data, tmp_path / "p.npy")
    packed = load(tmp_path / "p.npy", captions=True)
    assert (packed.fingerprint, packed.text_encoder) == (data.fingerprint, data.text_encoder)
    assert with_encoder(packed, str(folder)) is packed
    cond, expected = packed.condition(np.array([0, 1])), data.condition(np.array([0, 1]))
    assert torch.equal(cond.tokens, expected.tokens)
    assert torch.equal(cond.vector, expected.vector)
    assert with_encoder(packed, "bytes").condition_sizes == {"text": 64}


def test_long_captions_are_counted_and_a_cache_is_not_needed(folder, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null/none")
    data = replace(captioned(), captions=(("a b c d e",), ("f",)))
    notes = with_encoder(data, str(folder)).notes
    assert "1 caption cut to the tokens that enc takes" in notes
    assert with_encoder(data, str(folder)).embeddings.mask.sum(1).tolist() == [4, 1]


def test_what_is_no_encoder_is_one_line(folder, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="no such text encoder, and no folder"):
        find_encoder("minillm")
    with pytest.raises(DataError, match=r"there is no config.json"):
        find_encoder(str(tmp_path))
    (tmp_path / "pickles").mkdir()
    (tmp_path / "pickles" / "config.json").write_text("{}")
    (tmp_path / "pickles" / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(DataError, match=r"no .safetensors file in it; others may run code"):
        find_encoder(str(tmp_path / "pickles"))
    with pytest.raises(ConfigError, match="read without captions"):
        with_encoder(from_array(np.zeros((2, 2)) + 1.5), str(folder))
    for failure, message in ((ImportError(name="transformers"), "MISSING_PACKAGE"), (OSError("no\nfile"), "no file")):
        monkeypatch.setattr(text_encoders, "_load", lambda folder, failure=failure: (_ for _ in ()).throw(failure))
        with pytest.raises(DataError, match=message) as error:
            find_encoder(str(folder)).embed(["a"])
        assert len(str(error.value).splitlines()) == 1


def test_infinite_embeddings_are_refused(folder, monkeypatch):
    monkeypatch.setattr(
        Words,
        "encode",
        lambda *_, input_ids, attention_mask: SimpleNamespace(
            last_hidden_state=torch.full((*input_ids.shape, 3), 1e6), pooler_output=None
        ),
    )
    with pytest.raises(DataError, match="NaN or infinite"), np.errstate(over="ignore"):
        find_encoder(str(folder)).embed(["a"])


def tokenizer(transformers, special, template):
    tokenizers = pytest.importorskip("tokenizers", reason="needs the extra `text`")
    words = [*special.values(), *WORDS]
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, special["unk_token"]))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    ends = [(word, i) for i, word in enumerate(special.values()) if word in template]
    inner.post_processor = tokenizers.processors.TemplateProcessing(single=template, special_tokens=ends)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **special), len(words)


SPECIAL = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
SIZES = {"intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 12}


def clip(transformers, words):
    ids = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    config = transformers.CLIPTextConfig(vocab_size=words, hidden_size=16, **SIZES, **ids)
    return transformers.CLIPTextModel(config)


def t5(transformers, words):
    config = transformers.T5Config(vocab_size=words, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    return transformers.T5EncoderModel(config)


def bert(transformers, words):
    return transformers.BertModel(transformers.BertConfig(vocab_size=words, hidden_size=16, **SIZES))


@pytest.mark.parametrize("make", [clip, t5, bert])
@pytest.mark.filterwarnings("ignore")
def test_folders_that_transformers_writes(make, tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers", reason="needs the extra `text`")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    torch.manual_seed(0)
    tokens, words = tokenizer(transformers, SPECIAL, "<s> $A </s>" if make is not t5 else "$A </s>")
    model = make(transformers, words).eval()
    model.save_pretrained(tmp_path / "enc")
    tokens.save_pretrained(tmp_path / "enc")
    data = with_encoder(captioned(), str(tmp_path / "enc"))
    for text in ("a red disc", "a box"):
        ids = torch.tensor([tokens(text)["input_ids"]])
        with torch.no_grad():
            output = model(input_ids=ids)
        cond = data.embeddings.condition([text])
        assert int(cond.mask.sum()) == ids.shape[1]
        torch.testing.assert_close(cond.tokens[cond.mask], output.last_hidden_state[0], rtol=2e-3, atol=2e-3)
        pooled = output.pooler_output if make is clip else output.last_hidden_state.mean(1)
        torch.testing.assert_close(cond.vector, pooled, rtol=1e-4, atol=1e-5)
    config = json.loads((tmp_path / "enc" / "config.json").read_text())
    config |= {"model_type": "other", "auto_map": {"AutoModel": "code.Model", "AutoConfig": "code.Config"}}
    (tmp_path / "enc" / "config.json").write_text(json.dumps(config))
    (tmp_path / "enc" / "code.py").write_text("raise SystemExit('code was run')")
    with pytest.raises(DataError, match="does not load as a text encoder"):
        with_encoder(captioned(), str(tmp_path / "enc"))
