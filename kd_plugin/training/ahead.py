"""How many micro-batches of a step the teacher reads at once, where `teacher.micro_batch_size` leaves that to memory.

Notable decisions:
- nothing is tried that may not fit. The first step runs as the student does, and shows what a step needs; the second
  keeps the hidden states of all micro-batches, if there is room for them, but reads one at a time, and shows what one
  forward takes. n at once take no more than n times that, which has to fit into what is free;
- the ranks agree on the least of their numbers, once, by two reductions on the host;
- of the numbers that need as few forwards the smallest is taken;
- packed sequences have equal lengths, of which the hidden states are the same at any number wherever a product's rows
  do not depend on how many there are. A checkpoint has the number, for the devices where they do.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from kd_plugin.distributed.layout import values_here
from kd_plugin.distributed.torch_internals import inner_tensors
from kd_plugin.engines.process_group import reduce_numbers
from kd_plugin.plugin.attach import Plugin
from kd_plugin.training import memory
from kd_plugin.training.schedule import in_even_forwards

logger = logging.getLogger(__name__)

MicroBatches = Sequence[Mapping[str, Any]]


class TeacherPace:
    """Runs the teacher of a run ahead of its student.

    Args:
        plugin: the student, attached to its teacher.
        together: micro-batches that the teacher reads at once; None: as memory allows.
    """

    def __init__(self, plugin: Plugin, together: int | None) -> None:
        self._plugin = plugin
        self.together = together
        """Micro-batches at once, 1 for as the student; None until that is settled."""
        self._begun = False

    def run_ahead(self, micro_batches: MicroBatches) -> None:
        """Run the teacher for a step with these micro-batches, as far as it is to run ahead. All ranks call this."""
        if len(micro_batches) == 1 or self.together == 1 or not self._plugin.config.soft_weight:
            return
        begun, self._begun = self._begun, True
        if self.together is not None:
            self._plugin.teacher_ahead(micro_batches, self.together)
        elif begun:
            self._settle(micro_batches)
        else:
            self._plugin.exchange.served = len(micro_batches)  # for `distill.exchange: auto`, settled in this step

    def _settle(self, micro_batches: MicroBatches) -> None:
        """Run the teacher ahead with one micro-batch at a time, and settle how many it is to read from now on."""
        every, free = len(micro_batches), memory.free_bytes()
        kept = self._kept_bytes(micro_batches)
        needed = memory.peak_above_now() + kept
        if reduce_numbers({"steps without room for hidden states": needed > free}, op="max").popitem()[1]:
            self.together = 1
            logger.info(
                "teacher.micro_batch_size: auto -> as the student: its hidden states of a step (%.1f MiB) do not fit "
                "on every rank",
                kept / 2**20,
            )
            return
        with memory.measured(self._parameter_bytes()) as one:
            self._plugin.teacher_ahead(micro_batches, 1)
        fitting = min(every, max(1, int(free // max(1, one.num_bytes))))
        forwards = reduce_numbers({"teacher forwards": -(-every // fitting)}, op="max").popitem()[1]
        self.together = in_even_forwards(every, -(-every // int(forwards)))
        logger.info(
            "teacher.micro_batch_size: auto -> %d, %d of %d micro-batches at once (a forward takes up to %.1f MiB for "
            "each, of %.1f free; %.1f MiB are kept of a step)",
            self.together * len(micro_batches[0]["input_ids"]),
            *(self.together, every, one.num_bytes / 2**20, free / 2**20, kept / 2**20),
        )

    def _kept_bytes(self, micro_batches: MicroBatches) -> int:
        """Bytes of what stays through a step that runs ahead, a copy of the student's frozen head included."""
        student: Any = self._plugin.student
        exchange, tokens = self._plugin.exchange, sum(batch["input_ids"].numel() for batch in micro_batches)
        assert exchange.teacher is not None  # there is a soft loss
        weight = student.get_output_embeddings().weight
        copied = 0 if weight.requires_grad else weight.numel() * weight.element_size()
        return copied + exchange.teacher.bytes_ahead(tokens, whole=exchange.mode == "weight")

    def _parameter_bytes(self) -> int:
        models = [model for model in (self._plugin.student, self._plugin.teacher) if isinstance(model, nn.Module)]
        here = {parameter: values_here(parameter) for model in models for parameter in model.parameters()}
        return sum(part.nbytes for values in here.values() for part in inner_tensors(values))
