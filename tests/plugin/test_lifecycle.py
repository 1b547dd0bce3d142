"""What else happens to a model with a teacher attached: it is copied, pickled, wrapped, called from threads."""

import copy
import logging
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import kd_plugin as kd
from tests.tiny_models import make_batch, make_model

CONFIG = kd.DistillConfig(row_kernel="eager", chunk_size=7)


def attached() -> tuple[torch.nn.Module, torch.nn.Module, kd.Plugin]:
    student, teacher = make_model("llama", seed=1), make_model("llama", seed=2)
    return student, teacher, kd.attach(student, teacher, CONFIG)


def test_a_deep_copy_is_a_plain_model_with_weights_of_its_own():
    student, _, _ = attached()
    batch = make_batch()
    before = student(input_ids=batch["input_ids"]).logits
    averaged = copy.deepcopy(student)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.zero_()
    assert torch.equal(averaged(input_ids=batch["input_ids"]).logits, before)
    assert not student(input_ids=batch["input_ids"]).logits.any()
    assert averaged.state_dict().keys() == student.state_dict().keys()


def test_pickling_is_refused_with_the_cure():
    student, _, plugin = attached()
    with pytest.raises(ValueError, match="detach"):
        pickle.dumps(student)
    plugin.detach()
    assert pickle.dumps(student)


def test_a_teacher_serves_one_student():
    _, teacher, plugin = attached()
    with pytest.raises(ValueError, match="another student"):
        kd.attach(make_model("llama", seed=3), teacher, CONFIG)
    plugin.detach()
    kd.attach(make_model("llama", seed=3), teacher, CONFIG).detach()


@pytest.mark.parametrize("inside", ["the student", "a module that holds both"])
def test_a_teacher_may_be_a_submodule_and_stays_in_eval_mode(inside):
    def models():
        return make_model("llama", seed=1), make_model("llama", seed=2, attention_dropout=0.9)

    batch = make_batch()
    student, teacher = models()
    kd.attach(student, teacher, CONFIG)
    loss = student(**batch).loss
    loss.backward()
    wanted = loss.item(), student.lm_head.weight.grad

    student, teacher = models()
    whole = torch.nn.ModuleList([student, teacher])
    if inside == "the student":
        student.teacher, whole = teacher, student
    kd.attach(student, teacher, CONFIG)
    whole.train()  # as trainers do before each step
    assert teacher.training
    loss = student(**batch).loss
    loss.backward()
    assert loss.item() == wanted[0]
    assert torch.equal(student.lm_head.weight.grad, wanted[1])
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert not teacher.model.layers[0].self_attn.training


def test_a_submodule_that_shares_what_trains_is_refused():
    student, teacher = make_model("llama", seed=1), make_model("llama", seed=2)
    student.model.layers[0] = teacher.model.layers[0]
    student.teacher = teacher
    with pytest.raises(ValueError, match=r"share 9 parameter\(s\), such as model\.layers\.0"):
        kd.attach(student, teacher, CONFIG)


def test_detach_leaves_a_forward_that_was_put_on_top(caplog):
    student, _, plugin = attached()
    below = student.forward

    def on_top(*args, **kwargs):
        return below(*args, **kwargs)

    student.forward = on_top
    with caplog.at_level(logging.WARNING):
        plugin.detach()
    assert student.forward is on_top and "replaced after attach" in caplog.text
    batch = make_batch()
    assert student(input_ids=batch["input_ids"], labels=batch["labels"]).logits is not None  # the model's own loss


def test_threads_do_not_share_buffers():
    generator = torch.Generator().manual_seed(0)
    problems = [torch.randn(3, 40, 16, generator=generator) for _ in range(8)]
    weight = torch.randn(50, 16, generator=generator)

    def loss(problem: torch.Tensor) -> float:
        config = kd.DistillConfig(hard_weight=0.0, chunk_size=8, row_kernel="eager")
        return kd.distill_loss(problem[0], weight, problem[1], weight, None, config=config).loss.item()

    expected = [loss(problem) for problem in problems]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(loss, problems * 10)) == expected * 10


def test_a_router_loss_is_added_as_the_model_adds_it():
    experts = {"num_local_experts": 4, "output_router_logits": True, "router_aux_loss_coef": 0.5}
    student = make_model("MixtralForCausalLM", dtype=torch.float32, **experts)
    ids = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(0))
    own = student(input_ids=ids, labels=ids).loss
    kd.attach(student, None, kd.DistillConfig(soft_weight=0.0, hard_weight=1.0, row_kernel="eager"))
    torch.testing.assert_close(student(input_ids=ids, labels=ids).loss, own)


@pytest.mark.parametrize("items", [0.5, 3, torch.tensor([3]), torch.tensor(3.0)])
def test_num_items_divides_alike_here_and_in_the_reference(items):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(5, 16, generator=generator), torch.randn(50, 16, generator=generator)
    config = kd.DistillConfig(hard_weight=0.0, row_kernel="eager")
    arguments = (hidden, weight, hidden.flip(0), weight, None)
    fused = kd.distill_loss(*arguments, config=config, num_items=items).loss
    dense = kd.reference.distill_loss(*arguments, config=config, num_items=items).loss
    assert fused.shape == dense.shape == ()
    torch.testing.assert_close(fused, dense)


@pytest.mark.parametrize(("items", "word"), [(-3, "-3"), (torch.ones(2), "shape"), (float("nan"), "nan")])
def test_num_items_that_cannot_divide_are_refused(items, word):
    hidden, weight = torch.randn(5, 16), torch.randn(50, 16)
    config = kd.DistillConfig(hard_weight=0.0, row_kernel="eager")
    with pytest.raises(ValueError, match=word):
        kd.distill_loss(hidden, weight, hidden, weight, None, config=config, num_items=items)


@pytest.mark.parametrize("shape", [(9, 2), (2, 10), (3,)])
def test_token_weights_of_another_shape_than_the_labels_are_refused(shape):
    student, _, _ = attached()
    ids = torch.randint(0, 61, (2, 9))
    with pytest.raises(ValueError, match="token_weights"):
        student(input_ids=ids, labels=ids, token_weights=torch.ones(shape))


def test_arguments_in_the_wrong_place_are_named():
    student, teacher = make_model("llama", seed=1), make_model("llama", seed=2)
    with pytest.raises(ValueError, match="the teacher is missing"):
        kd.attach(student, CONFIG)
    with pytest.raises(ValueError, match="DistillConfig"):
        kd.attach(student, teacher, {"temperature": 2.0})
    head = kd.DistillHead(torch.nn.Linear(4, 8), CONFIG)
    targets = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match="wanted \\(teacher_hidden, teacher_weight"):
        head(torch.randn(3, 4), targets, teacher=(torch.randn(3, 4),))
    with pytest.raises(ValueError, match="Tensor"):
        head(torch.randn(3, 4), targets, teacher=torch.randn(3, 4))


def test_loss_rows_that_cover_ignored_labels_are_named():
    student, _, _ = attached()
    ids = torch.randint(0, 61, (1, 9))
    labels = torch.full_like(ids, -100)
    with pytest.raises(ValueError, match="loss_rows"):
        student(input_ids=ids, labels=labels, loss_rows=torch.arange(3))


def test_another_model_in_the_teachers_place_is_named():
    student, teacher, plugin = attached()
    plugin.teacher = make_model("llama", seed=5)
    with pytest.raises(ValueError, match="is not the teacher that was attached"):
        student(**make_batch())
    plugin.teacher = teacher
    assert torch.isfinite(student(**make_batch()).loss)
    teacher.model.train()  # a part of it
    student(**make_batch())
    assert not any(module.training for module in teacher.modules())
