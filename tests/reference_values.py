"""One table of 8 rows over 4 classes, and the values that every implementation of the losses must give on it.

`S` are the student's logits, `T` the teacher's, `Y` the labels. "ran" = also obtained by running liger-kernel
0.8.5 or trl 1.16.0 on these logits (identity weights); "formula" = the published formula in fp64.
"""

from __future__ import annotations

import torch
from torch import Tensor

S = torch.tensor(
    [
        [1.1250, -0.4102, -0.0879, -2.5000],
        [0.2676, 0.3535, 0.8711, -1.4688],
        [-0.1084, 1.6641, 0.0084, 0.1196],
        [0.5000, -0.6406, -0.2236, -1.5938],
        [-1.5312, -1.9219, 0.0000, -0.5039],
        [-1.5391, 1.5312, 0.5820, 0.2695],
        [-0.3887, 1.2188, 0.0000, 0.6055],
        [0.5000, 1.3828, 0.1309, -1.0312],
    ],
    dtype=torch.float64,
)
T = torch.tensor(
    [
        [-0.0381, -1.2578, -1.2031, 0.0947],
        [-0.7852, 0.4492, 1.5547, 0.0972],
        [0.8203, 0.0012, 0.7656, 0.3477],
        [-1.5781, 0.4297, 0.5977, 0.3926],
        [1.5156, 0.1641, 2.0781, -0.7734],
        [-0.5898, 0.4453, -0.7969, 0.6328],
        [0.6289, -0.8359, 0.9258, 0.2109],
        [0.0006, 0.5195, 3.2344, -1.5781],
    ],
    dtype=torch.float64,
)
Y = torch.tensor([0, 3, 3, 1, 1, 1, 1, 1])
# Two micro-batches of four rows: three valid, one valid.
RAGGED_Y = torch.where(torch.tensor([True, True, True, False, False, True, False, False]), Y, -100)
# A teacher whose vocabulary is padded with two classes that no label means.
PADDED_T = torch.cat([T, torch.full((8, 2), -30.0, dtype=torch.float64)], dim=1)

# settings of DistillConfig -> (soft_weight * soft_loss + hard_weight * hard_loss, where it comes from)
_SOFT = {"soft_weight": 1.0, "hard_weight": 0.0}
LOSSES: dict[str, tuple[dict[str, object], float, str]] = {
    "forward_kl": ({"divergence": "forward_kl", **_SOFT}, 0.629286, "ran"),
    "reverse_kl": ({"divergence": "reverse_kl", **_SOFT}, 0.677491, "ran"),
    "soft_ce": ({"divergence": "soft_ce", **_SOFT}, 1.720881, "formula"),
    "jsd_0.1": ({"divergence": "jsd", "beta": 0.1, **_SOFT}, 0.053423, "ran"),
    "jsd_0.5": ({"divergence": "jsd", "beta": 0.5, **_SOFT}, 0.141548, "ran"),
    "jsd_0.9": ({"divergence": "jsd", "beta": 0.9, **_SOFT}, 0.056712, "ran"),
    "hard_ce": ({"soft_weight": 0.0, "hard_weight": 1.0}, 1.475598, "ran"),
    "forward_kl_T2_without_T_squared": ({"temperature": 2.0, "temperature_power": 0.0, **_SOFT}, 0.194800, "ran"),
    "forward_kl_T2": ({"temperature": 2.0, **_SOFT}, 0.779202, "formula"),
    "jsd_0.5_T2_without_T_squared": (
        {"divergence": "jsd", "temperature": 2.0, "temperature_power": 0.0, **_SOFT},
        0.046762,
        "ran",
    ),
    "half_ce_plus_half_jsd": ({"divergence": "jsd"}, 0.808573, "ran"),
    "half_ce_plus_half_forward_kl_T2": ({"temperature": 2.0}, 1.127400, "formula"),
    "distil_whisper_train": ({"temperature": 2.0, "soft_weight": 1.0, "hard_weight": 0.8}, 1.959680, "formula"),
    "distil_whisper_eval": ({"soft_weight": 1.0, "hard_weight": 0.8}, 1.809765, "formula"),
    "forward_kl_T1000": ({"temperature": 1000.0, **_SOFT}, 0.838210, "formula"),
    "skew_kl_0.1": ({"divergence": "skew_kl", "alpha": 0.1, **_SOFT}, 0.462070, "formula"),
    "skew_reverse_kl_0.1": ({"divergence": "skew_reverse_kl", "alpha": 0.1, **_SOFT}, 0.481781, "formula"),
    "tvd": ({"divergence": "tvd", **_SOFT}, 0.433473, "formula"),
    "acceptance": ({"divergence": "acceptance", **_SOFT}, 0.609682, "formula"),
    "uld": ({"divergence": "uld", **_SOFT}, 0.406179, "formula"),
    "logit_mse": ({"divergence": "logit_mse", **_SOFT}, 4.234805, "formula"),
    # The temperature divides the logits, its power makes up for it; without the power the value is a quarter.
    "logit_mse_T2": ({"divergence": "logit_mse", "temperature": 2.0, **_SOFT}, 4.234805, "formula"),
    "logit_mse_T2_without_T_squared": (
        {"divergence": "logit_mse", "temperature": 2.0, "temperature_power": 0.0, **_SOFT},
        4.234805 / 4,
        "formula",
    ),
    # The mean over rows and classes is 2 / V of half the sum; V = 4.
    "logit_mse_mean": ({"divergence": "logit_mse", "soft_weight": 0.5, "hard_weight": 0.0}, 2.117402, "formula"),
    "hinton_limit": (
        {"divergence": "logit_mse_centered", "soft_weight": 0.25, "hard_weight": 0.0},
        0.838204,
        "formula",
    ),
    "tvd_plus_half_forward_kl_T2": (
        {"terms": [{"name": "tvd"}, {"name": "forward_kl", "weight": 0.5, "temperature": 2.0}], **_SOFT},
        0.433473 + 0.5 * 0.779202,
        "formula",
    ),
}
# Norm of the gradient with respect to the student's logits.
GRADIENT_NORMS = {"forward_kl": 0.192215, "forward_kl_T2": 0.219308, "reverse_kl": 0.207323}
METRICS = {"teacher_entropy": 1.091595, "acceptance_rate": 0.566527, "top1_agreement": 0.25, "kl_t1": 0.629286}
SKEW_CE = 1.553665  # -sum p log(0.1 p + 0.9 q): skew_kl plus the teacher's entropy
# A listwise ranker and its teacher trained together: KL as the mean over rows and places, plus the teacher's own
# cross-entropy, the first place being the relevant one.
ROCKETQA_KL, ROCKETQA_TOTAL = 0.157322, 2.143663
RAGGED_ACCUMULATION = 0.525288
MEAN_OF_MICRO_BATCH_MEANS = 0.460276  # what comes out when each micro-batch divides by its own rows: wrong
HINTON_LIMIT = 0.838204  # T^2 KL as T -> infinity: centred squared distance of the logits / (2 V)
TOLERANCE = 1e-6  # the values above are rounded to six digits


def logits_problem() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The table as hidden states times identity weights: arguments of `distill_loss`, student leaves first."""
    identity = torch.eye(4, dtype=torch.float64)
    return S.clone().requires_grad_(), identity.clone().requires_grad_(), T, identity, Y
