"""Every language model class of the installed transformers: an attached student is the model itself, or is refused.

The expected verdicts stand in `table.json`; `python -m tests.sweep` measures and writes them anew.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from kd_plugin.plugin import causal_lm, probe
from kd_plugin.plugin.label_table import CONVENTIONS
from tests.sweep import conventions, dense, heads
from tests.sweep.__main__ import LABELS
from tests.sweep.shrink import small_model
from tests.sweep.table import EXPECTED, ROOT, all_rows, label_table, measured, read_table, summary
from tests.sweep.verdict import Case, facts_of, judge, make_case, verdict_of

# MobileBert's head has a weight without columns where its embedding is as wide as its layers
pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element tensors is a no-op:UserWarning")

TABLE = read_table()
QUICK = [
    "BartForCausalLM",
    "BartForConditionalGeneration",
    "BertForMaskedLM",
    "CohereForCausalLM",
    "EsmForMaskedLM",
    "Gemma2ForCausalLM",
    "GPT2LMHeadModel",
    "GraniteForCausalLM",
    "LlavaForConditionalGeneration",
    "MBartForConditionalGeneration",
    "MixtralForCausalLM",
    "MobileBertForMaskedLM",
    "ProphetNetForCausalLM",
    "T5ForConditionalGeneration",
    "WhisperForConditionalGeneration",
    "XLNetLMHeadModel",
]
FACTS = ("labels", "leaves_out_masked", "decoder_inputs", "after", "trains_after", "calls")


def check(row: str, found: dict[str, Any]) -> None:
    """A row is as the table says."""
    expected = TABLE[row]
    assert found["verdict"] == expected["verdict"], f"{row}: {found['verdict']}, {found['reason']}"
    if "late" in found:
        assert found["late"] == expected["late"], (
            f"{row}, weights after attach: {found['late']}, {found['late_reason']}"
        )
    if found["verdict"] == "cannot be built":
        assert found["reason"].partition(":")[0] == expected["reason"].partition(":")[0], found["reason"]


@pytest.mark.parametrize("row", QUICK)
def test_a_class_is_equal_or_refused(row: str) -> None:
    check(row, verdict_of(row)._asdict())


@pytest.fixture(scope="module")
def sweep(request: pytest.FixtureRequest) -> dict[str, dict[str, Any]]:
    """The chosen rows, measured one after the other in a process of their own."""
    name = "test_every_class_is_equal_or_refused"
    chosen = [item for item in request.session.items if getattr(item, "originalname", "") == name]
    return dict(measured(item.callspec.params["row"] for item in chosen))


@pytest.mark.slow
@pytest.mark.timeout(3600)  # the first one waits for all
@pytest.mark.parametrize("row", TABLE)
def test_every_class_is_equal_or_refused(row: str, sweep: dict[str, dict[str, Any]]) -> None:
    check(row, sweep[row])
    for fact in FACTS:
        assert sweep[row].get(fact) == TABLE[row].get(fact), fact


def test_the_table_has_every_class_of_the_installed_transformers() -> None:
    assert {row: entry["registered"] for row, entry in TABLE.items()} == all_rows()


def test_the_packages_table_of_labels_is_what_the_sweep_found() -> None:
    assert LABELS.read_text(encoding="utf-8") == label_table(TABLE)
    assert CONVENTIONS["MBartForConditionalGeneration"] == (False, "prepare_decoder_input_ids_from_labels", False)
    assert CONVENTIONS["LlamaForCausalLM"] == (True, None, False) and "ProphetNetForCausalLM" not in CONVENTIONS


@pytest.mark.parametrize("row", [row for row in QUICK if row in CONVENTIONS and TABLE[row]["verdict"] == "equal"])
def test_the_packages_table_says_what_a_model_shows(row: str) -> None:
    """By kd_plugin's own probe, which uses no class names, of a model whose weights are there."""
    model = make_case(row).student
    shown = probe.observe(model, causal_lm.find_head(model, "student"), "student").convention
    assert shown == CONVENTIONS[row] or model.main_input_name != "input_ids"


def test_the_table_expects_no_mismatch_and_gives_reasons() -> None:
    assert {entry["verdict"] for entry in TABLE.values()} <= set(EXPECTED)
    assert all(entry["reason"] for entry in TABLE.values() if entry["verdict"] == "cannot be built")
    assert summary(TABLE).startswith(f"{len(TABLE)} rows: ")


def test_the_readmes_numbers_are_the_tables() -> None:
    counts = Counter(entry["verdict"] for row, entry in TABLE.items() if "," not in row)
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert f"Of the {counts.total()} language model classes of Transformers" in readme
    assert f"small models of {counts['equal']} give the model's own loss" in readme
    assert f"{counts['refused']} are refused by name, and {counts['cannot be built']} could not be built" in readme


# -- that the sweep would see a fault -----------------------------------------------------------------------


def wrong_labels(case: Case) -> Case:
    return case._replace(convention={"shifted": "unshifted", "unshifted": "shifted"}[case.convention])


def test_labels_one_place_off_are_seen() -> None:
    judged = judge(wrong_labels(make_case("LlamaForCausalLM")))
    assert judged.verdict == "mismatch" and judged.reason.startswith("loss ")


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "BartForConditionalGeneration"])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_logits_that_differ_by_a_scale_are_seen(name: str, side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, own = make_case(name), dense.run

    def scaled(model: nn.Module, batch: dict[str, Any]) -> Any:
        output = own(model, batch)
        if model is getattr(case, side):
            output.logits = output.logits * 1.05  # a transform that attach does not know of
        return output

    monkeypatch.setattr(dense, "run", scaled)
    assert judge(case).verdict == "mismatch"


def test_a_gradient_that_is_missing_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.sweep import verdict

    true_gradients = verdict._attached

    def one_short(*arguments: Any, **weights: float) -> Any:
        loss, found = true_gradients(*arguments, **weights)
        return loss, {name: gradient for name, gradient in found.items() if "layers.0.mlp.up_proj" not in name}

    monkeypatch.setattr(verdict, "_attached", one_short)
    judged = verdict_of("LlamaForCausalLM")
    assert judged.verdict == "mismatch" and "layers.0.mlp.up_proj.weight" in judged.reason


def test_an_error_that_is_not_ours_is_no_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.sweep import verdict

    def fails(*_: Any, **__: Any) -> Any:
        raise ValueError("of somebody else")

    monkeypatch.setattr(verdict, "_attached", fails)
    assert verdict_of("LlamaForCausalLM").verdict == "mismatch"


# -- that the facts are right, where they are known ---------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "convention", "inputs", "after"),
    [
        ("LlamaForCausalLM", "shifted", None, "nothing"),
        ("GraniteForCausalLM", "shifted", None, "times 0.3333"),
        ("CohereForCausalLM", "shifted", None, "times 0.3"),
        ("Gemma2ForCausalLM", "shifted", None, "times 1, soft-cap 3"),
        ("BertForMaskedLM", "unshifted", None, "nothing"),
        ("BartForCausalLM", "unshifted", None, "nothing"),
        ("BartForConditionalGeneration", "unshifted", "config.decoder_start_token_id in front", "plus a bias"),
        ("MBartForConditionalGeneration", "unshifted", "last token in front, padded with config.pad_token_id", None),
    ],
)
def test_facts_of_classes_that_are_known(name: str, convention: str, inputs: str | None, after: str | None) -> None:
    facts = facts_of(make_case(name))
    assert facts["labels"] == convention
    assert (inputs in facts["decoder_inputs"]) if inputs else facts["decoder_inputs"] == []
    assert after is None or facts["after"] == after
    assert facts["kind"] == "nn.Linear" and facts["calls"] == 1


def test_a_router_loss_is_told_apart_from_the_labels() -> None:
    facts = facts_of(make_case("MixtralForCausalLM"))
    assert facts["adds_router_loss"] and facts["labels"] == "shifted"


def test_a_bias_that_trains_after_the_head_is_found() -> None:
    assert facts_of(make_case("EsmForMaskedLM"))["trains_after"] == ["lm_head.bias"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda raw: raw, "nothing"),
        (lambda raw: raw * 0.25, "times 0.25"),
        (lambda raw: 5 * torch.tanh(raw * 0.5 / 5), "times 0.5, soft-cap 5"),
        (lambda raw: raw + torch.arange(7.0), "plus a bias"),
        (lambda raw: raw.log_softmax(-1), "plus a number for each row"),
        (lambda raw: raw[..., :5], "first 5 of 7 columns; nothing"),
        (lambda raw: raw[:, -2:], "last 2 of 4 rows; nothing"),
        (lambda raw: raw.clamp(-0.1, 0.1), "something else"),
        (lambda raw: torch.where(torch.arange(7) == 3, -torch.inf, raw), "columns [3] become -inf; nothing"),
    ],
)
def test_what_happens_after_a_head_is_found(change: Callable[[torch.Tensor], torch.Tensor], words: str) -> None:
    raw = torch.randn(2, 4, 7, generator=torch.Generator().manual_seed(1))
    assert heads.after_head(raw, change(raw)) == words


def test_decoder_inputs_by_hand() -> None:
    labels = torch.tensor([[7, 8, 9, 2], [7, 2, -100, -100]])
    assert conventions.wrapped(labels, 1).tolist() == [[2, 7, 8, 9], [2, 7, 2, 1]]
    assert conventions.start_in_front(labels, 3, 1).tolist() == [[3, 7, 8, 9], [3, 7, 2, 1]]


def test_dense_values_by_hand() -> None:
    logits = torch.log(torch.tensor([[[0.5, 0.5], [0.25, 0.75], [0.9, 0.1]]]))
    labels = torch.tensor([[0, 1, -100]])
    shifted, unshifted = (rows(logits, labels) for rows in (dense.shifted, dense.unshifted))
    assert float(dense.cross_entropy(shifted)) == pytest.approx(0.693147, abs=1e-6)  # ln 2
    assert float(dense.cross_entropy(unshifted)) == pytest.approx(0.490415, abs=1e-6)  # (ln 2 + ln 4/3) / 2
    teacher = dense.Rows(torch.log(torch.tensor([[0.25, 0.75]])), torch.tensor([1]))
    student = dense.Rows(torch.log(torch.tensor([[0.5, 0.5]])), torch.tensor([1]))
    assert float(dense.forward_kl(student, teacher, 1.0)) == pytest.approx(0.130812, abs=1e-6)
    masked = dense.Rows(torch.tensor([[-torch.inf, 0.0]]), torch.tensor([1]))
    assert float(dense.forward_kl(student, masked, 1.0)) == pytest.approx(0.693147, abs=1e-6)


def test_small_models_hide_nothing() -> None:
    for name in QUICK:
        assert all(p.numel() > 0 for p in small_model(name, 1).parameters()), name
    model = small_model("BartForConditionalGeneration", 1)
    assert all(p.std() > 0.01 for p in model.parameters() if p.numel() > 1)
    assert model.final_logits_bias.std() > 0.5
    first, second = (small_model("LlamaForCausalLM", seed).lm_head.weight for seed in (1, 2))
    assert not torch.equal(first, second)
