"""A model card from content that is known: its metadata as the hub reads them, its numbers, hostile names."""

import pytest
from huggingface_hub import ModelCard
from test_report_page import COMPARISON, EVALUATION, HOSTILE, RECORDS

from undiffuse.report.model_card import card, described_model
from undiffuse.report.run_report import RunContent


def content(**more):
    facts = {"run": "runs/x", "name": HOSTILE, "kind": "diffusion model", "record": {}, "records": RECORDS}
    facts |= {"model": [("parameters", "3,020"), ("notes", "")], "data": [("name", HOSTILE), ("fingerprint", "ab12")]}
    facts |= {"repeat": ["Save it.", "undiffuse train x --out NEW", "Note."], "recipe": '{\n "train": {}\n}'}
    return RunContent(**(facts | more))


def test_the_metadata_and_the_numbers() -> None:
    text = card(content(evaluation=EVALUATION, comparison=COMPARISON), "12ab", "hf:me/x", "text-to-image", "mit")
    read = ModelCard(text).data
    assert (read.library_name, read.license, read.pipeline_tag) == ("undiffuse", "mit", "text-to-image")
    found = [(r.metric_type, r.metric_value, r.metric_name, r.dataset_split) for r in read.eval_results]
    part = EVALUATION["part"]
    assert found == [
        ("bits_per_dim", 1.8, "bound of the chain, 7 of 10 steps: ± 0.04, n = 77", part),
        ("bits_per_dim", -1.75, "ode: ± 0.05, n = 9", part),
    ]
    assert read.eval_results[0].dataset_name == HOSTILE
    assert "| bound of the chain, 7 of 10 steps | 0.100 ± 0.010 | 1.500 ± 0.020 | 0.200 ± 0.030 |" in text
    assert "| ≤ 1.800 ± 0.040 | 77 | 8 |" in text
    assert "| −1.750 ± 0.050 | 9 | 123 |" in text
    assert "2.59 ± 0.19 | 2.22 to 2.96 | 2.54 ± 0.42 | lower | 100 | raw |" in text
    assert "No evidence that training items are copied (p ≤ 0.5)" in text
    assert "```console\n$ undiffuse train x --out NEW\n```" in text
    assert "| fingerprint | ab12 |" in text
    assert described_model(text) == "12ab"


def test_results_are_of_the_data_that_were_evaluated() -> None:
    text = card(content(evaluation=EVALUATION | {"data": "other"}), "12ab", "hf:me/x")
    assert {(r.dataset_name, r.dataset_type) for r in ModelCard(text).data.eval_results} == {("other", "other")}


@pytest.mark.parametrize("more", [{}, {"evaluation": EVALUATION, "comparison": COMPARISON}], ids=["few", "all"])
def test_names_are_text_in_every_place(more) -> None:
    text = card(content(**more), "12ab", "hf:me/x")
    body = text.split("\n---\n", 1)[1]
    assert "alert(1)" in body
    assert body.count("<") == body.count("\\<") + 1  # the comment at the end
    assert "\n# <" not in text
    ModelCard(text)


def test_a_super_resolution_model_is_used_after_a_base() -> None:
    text = card(content(), "12ab", "hf:me/x", enlarges=True)
    assert "$ undiffuse sample BASE --then hf:me/x --n 16\n" in text
    code = text.split("```python\n")[1].split("```")[0]
    assert "cascade = undiffuse.model.cascade.Cascade([base, model])" in code
    compile(code, "card", "exec")
    assert "model.sample(" not in code


def test_without_an_evaluation_it_has_the_bound_of_training() -> None:
    text = card(content(), "12ab", "hf:me/x")
    assert "At the end of training: ≤ 2.432 ± 0.099 bits per dimension" in text
    assert ModelCard(text).data.license is None
    assert "model-index" not in text
    assert "Not measured: no data." in card(content(records=[], why={"evaluation": "no data"}), "12ab", "hf:me/x")


@pytest.mark.parametrize(
    "edit", [lambda text: text + "more", lambda text: text.replace("ab12", "ab13"), lambda text: ""]
)
def test_an_edited_card_is_not_ours(edit) -> None:
    assert described_model(edit(card(content(), "12ab", "hf:me/x"))) is None
