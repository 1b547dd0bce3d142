"""Token ids that one of the models does not know, named with their place."""

from __future__ import annotations

import pytest
import torch

import kd_plugin as kd
from kd_plugin.plugin.token_ids import UnknownTokenError, check_inputs
from tests.loss_cases import config_of
from tests.tiny_models import VOCAB, make_batch, make_model


def test_an_id_that_the_teacher_cannot_embed_is_named_with_its_place() -> None:
    student, teacher = make_model("llama", vocab_size=VOCAB + 2), make_model("llama")
    kd.attach(student, teacher, config_of())
    batch = make_batch()
    batch["input_ids"][1, 5] = VOCAB
    batch["labels"][:] = -100  # also where no label counts
    with pytest.raises(ValueError, match=rf"input_ids\[1, 5\] is {VOCAB}, but the teacher embeds ids 0 to {VOCAB - 1}"):
        student(**batch)


def test_an_id_that_neither_can_embed_is_the_students_fault_first() -> None:
    student, teacher = make_model("llama"), make_model("llama")
    kd.attach(student, teacher, config_of())
    batch = make_batch()
    batch["input_ids"][0, 2] = VOCAB + 5
    with pytest.raises(ValueError, match=r"input_ids\[0, 2\] is 66, but the student embeds"):
        student(**batch)


def test_a_masked_label_given_as_an_input_is_named() -> None:
    student = make_model("llama")
    kd.attach(student, make_model("llama"), config_of())
    batch = make_batch()
    with pytest.raises(ValueError, match=r"input_ids\[0, 3\] is -100, but the student embeds"):
        student(input_ids=batch["labels"], labels=batch["labels"])


def test_without_a_teacher_only_the_student_counts() -> None:
    student = make_model("llama", vocab_size=VOCAB + 2)
    kd.attach(student, None, config_of(soft_weight=0.0, hard_weight=1.0))
    batch = make_batch()
    batch["input_ids"][1, 5] = batch["labels"][1, 5] = VOCAB
    assert torch.isfinite(student(**batch).loss)


def test_a_label_outside_the_students_vocabulary_is_named_with_its_place() -> None:
    student = make_model("llama")
    kd.attach(student, make_model("llama"), config_of())
    for wrong in (VOCAB, -5):
        batch = make_batch()
        batch["labels"][1, 4] = wrong
        with pytest.raises(ValueError, match=rf"labels\[1, 4\] is {wrong}, but the student's vocabulary is 0 to 60"):
            student(**batch)


def test_decoder_inputs_are_looked_at_too() -> None:
    student, teacher = make_model("bart", vocab_size=VOCAB + 2), make_model("bart")
    kd.attach(student, teacher, config_of())
    batch = make_batch()
    batch["labels"][0, 0] = VOCAB + 1
    with pytest.raises(ValueError, match=r"decoder_input_ids\[0, 1\] is 62, but the teacher embeds ids 0 to 60"):
        student(**batch)


def test_ids_that_stand_for_images_are_left_to_the_model() -> None:
    student, teacher = make_model("llama", vocab_size=VOCAB + 2), make_model("llama")
    teacher.config.image_token_id = VOCAB
    forward = teacher.model.forward

    def replacing(input_ids: torch.Tensor, **kwargs: object) -> object:
        return forward(input_ids=input_ids.masked_fill(input_ids == VOCAB, 0), **kwargs)

    teacher.model.forward = replacing
    kd.attach(student, teacher, config_of())
    batch = make_batch()
    batch["input_ids"][0, 0] = VOCAB
    assert torch.isfinite(student(**batch).loss)


class Embedding8(torch.nn.Module):
    """A model that embeds eight ids."""

    def get_input_embeddings(self) -> torch.nn.Module:
        return torch.nn.Embedding(8, 2)


def test_an_impossible_id_is_named_though_one_model_does_not_say_how_many_it_embeds() -> None:
    with pytest.raises(UnknownTokenError, match=r"input_ids\[0, 1\] is -1, but the teacher embeds ids 0 to 7 only"):
        check_inputs({"input_ids": torch.tensor([[3, -1]])}, torch.nn.Identity(), Embedding8())
