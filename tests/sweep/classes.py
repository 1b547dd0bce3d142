"""Which classes the sweep is over: every class with language model logits that the installed transformers has."""

from __future__ import annotations

import re
from typing import Any

MAPPINGS = {
    "causal": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "seq2seq": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "masked": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "speech": "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    "image-text": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "multimodal": "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES",
}
# Exported, though in none of those mappings.
_BY_NAME = re.compile(r"(ForCausalLM|LMHeadModel|ForConditionalGeneration|ForMaskedLM)$")


def class_kinds() -> dict[str, str]:
    """Class name -> where it is registered, such as `causal` or `seq2seq+masked`; `exported` if nowhere."""
    import transformers
    from transformers.models.auto import modeling_auto

    kinds: dict[str, list[str]] = {}
    for kind, mapping in MAPPINGS.items():
        for value in getattr(modeling_auto, mapping).values():
            for name in (value,) if isinstance(value, str) else value:
                if kind not in kinds.setdefault(name, []):
                    kinds[name].append(kind)
    for name in dir(transformers):
        if _BY_NAME.search(name) and not name.startswith("Auto") and name not in kinds:
            kinds[name] = ["exported"]
    return {name: "+".join(kinds[name]) for name in sorted(kinds, key=str.lower)}


def model_class(name: str) -> Any:
    """The class of that name."""
    import transformers

    return getattr(transformers, name)
