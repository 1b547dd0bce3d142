"""Which classes of the installed Transformers add something to the loss of their labels, and what becomes of it."""

from __future__ import annotations

import ast
import inspect
import textwrap

import pytest
import transformers
from torch import nn
from transformers.models.auto import modeling_auto

from kd_plugin.plugin import router_loss
from tests.experts import MIXTURES

ELSEWHERE = dict.fromkeys(
    (
        *("DeepseekV4ForCausalLM", "FlintForCausalLM"),  # fail in Transformers itself once router logits are asked for
        *("Ernie4_5_VLMoeForConditionalGeneration", "Glm4vMoeForConditionalGeneration"),
        *("Glm5NextForConditionalGeneration", "MiniMaxM3SparseForConditionalGeneration", "MiniMaxM3VLForCausalLM"),
        *("Qwen3OmniMoeThinkerForConditionalGeneration", "Qwen3VLMoeForConditionalGeneration"),
        *("Qwen3_5MoeForConditionalGeneration", "Qwen4ExpForCausalLM", "Qwen4ExpForConditionalGeneration"),
    ),
    "added as the mixtures' above, under the same flag",
)
_OTHER_LABELS = "refused: it is a loss of other labels"
ELSEWHERE |= dict.fromkeys(
    (
        *("AlbertForPreTraining", "BertForPreTraining", "BigBirdForPreTraining", "ErnieForPreTraining"),
        *("FNetForPreTraining", "GraniteDoclingForConditionalGeneration", "LukeForMaskedLM"),
        *("MegatronBertForPreTraining", "MobileBertForPreTraining", "RoCBertForPreTraining"),
        "VisualBertForPreTraining",
    ),
    _OTHER_LABELS,
)
ELSEWHERE |= {"BambaForCausalLM": "refused: z_loss_coefficient"}
ELSEWHERE |= dict.fromkeys(("MusicgenForCausalLM", "MusicgenMelodyForCausalLM"), "refused: several heads")
ELSEWHERE |= dict.fromkeys(
    (
        "FlavaForPreTraining",
        "LxmertForPreTraining",
        "Wav2Vec2ConformerForPreTraining",
        "Wav2Vec2ForPreTraining",
        "SplinterForPreTraining",
    ),
    "refused: no head",
)


def added_losses(kind: type[nn.Module]) -> list[tuple[str, bool]]:
    """The sums of losses in the forward of `kind`, and whether each is of router logits asked for."""

    def names(tree: ast.AST) -> str:
        return " ".join(getattr(n, "id", getattr(n, "attr", "")) for n in ast.walk(tree))

    def visit(tree: ast.AST, asked: bool) -> list[tuple[str, bool]]:
        found = []
        if isinstance(tree, ast.AugAssign) and "loss" in names(tree.target):
            found.append((ast.unparse(tree), asked))
        if isinstance(tree, ast.BinOp) and isinstance(tree.op, ast.Add):
            both = all("loss" in names(side) for side in (tree.left, tree.right))
            found += [(ast.unparse(tree), asked)] if both else []
        inside = asked or (isinstance(tree, ast.If) and "output_router_logits" in names(tree.test))
        return found + [entry for child in ast.iter_child_nodes(tree) for entry in visit(child, inside)]

    return visit(ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(kind.forward)))), False)


def language_models() -> set[str]:
    """The classes with a language model's head in the installed Transformers."""
    kinds = ("CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "MASKED_LM", "PRETRAINING", "IMAGE_TEXT_TO_TEXT")
    tables = [getattr(modeling_auto, f"MODEL_FOR_{kind}_MAPPING_NAMES").values() for kind in kinds]
    listed = [names if isinstance(names, (list, tuple)) else [names] for table in tables for names in table]
    return {name for names in listed for name in names}


def test_every_class_that_adds_a_loss_is_known() -> None:
    """A class of a newer Transformers that adds one fails here until it is looked at."""
    adding = {}
    for name in language_models():
        try:
            kind = getattr(transformers, name)
        except (AttributeError, ImportError):  # not in this version, or what it needs is not installed
            continue
        if found := added_losses(kind):
            adding[name] = found
    assert set(adding) == {*MIXTURES, *ELSEWHERE}
    of_routers = {name for name, found in adding.items() if any(asked for _, asked in found)}
    assert of_routers == {*MIXTURES, *(name for name, fate in ELSEWHERE.items() if fate.startswith("added"))}


@pytest.mark.parametrize("name", [name for name, fate in ELSEWHERE.items() if fate == _OTHER_LABELS])
def test_those_labels_are_among_the_arguments_that_are_refused(name: str) -> None:
    arguments = set(inspect.signature(getattr(transformers, name).forward).parameters) - {"labels"}
    assert any(router_loss._LABELS.search(argument) for argument in arguments)
