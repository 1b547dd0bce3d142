"""What single model classes need besides `shrink` and `parts`: fields of their configuration, and inputs.

`CLASSES` has dotted names for what lies inside a configuration; `INPUTS` has what a forward needs besides text, or
instead of it (None leaves something out). `VARIANTS` are further rows of the sweep: a class with other settings.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.sweep.parts import LINEAR_AND_FULL

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "BambaForCausalLM, z-loss": ("BambaForCausalLM", {"z_loss_coefficient": 0.2}),
    "Gemma2ForCausalLM, no soft-cap": ("Gemma2ForCausalLM", {"final_logit_softcapping": None}),
    "GPT2LMHeadModel, untied": ("GPT2LMHeadModel", {"tie_word_embeddings": False}),
    "MixtralForCausalLM, no router loss": ("MixtralForCausalLM", {"output_router_logits": False}),
    "T5ForConditionalGeneration, untied": ("T5ForConditionalGeneration", {"tie_word_embeddings": False}),
}

CLASSES: dict[str, dict[str, Any]] = {
    "Blip2ForConditionalGeneration": {"vision_config.image_size": 28, "image_token_index": 100},
    "BlipForConditionalGeneration": {"vision_config.image_size": 32},
    "BltForCausalLM": {"use_cache": False},
    "BridgeTowerForMaskedLM": {
        "vision_config.image_size": 32,
        "vision_config.hidden_size": 64,
        "text_config.hidden_size": 64,
        "hidden_size": 64,
        "num_hidden_layers": 2,
    },
    "CohereAsrForConditionalGeneration": {"decoder_start_token_id": 100},
    "CsmDepthDecoderForCausalLM": {"num_codebooks": 16},
    "Dots3NoteForConditionalGeneration": {
        "vision_config.num_hidden_layers": 42,
        "audio_config.adapter_input_size": 32,
        "vision_config.adapter_in_dim": 32,
        "vision_config.adapter_out_dim": 32,
    },
    "EncoderDecoderModel": {"decoder_start_token_id": 100, "pad_token_id": 1},
    "EvollaForProteinText2Text": {
        "protein_encoder_config": {
            "vocab_size": 120,
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "intermediate_size": 48,
        },
        "resampler_depth": 1,
        "resampler_dim_head": 8,
        "resampler_heads": 2,
        "resampler_num_latents": 4,
        "aligner_num_add_layers": 1,
    },
    "FastVlmForConditionalGeneration": {"vision_config.model_type": "siglip_vision_model"},
    "FunAsrNanoForConditionalGeneration": {"adaptor_config.intermediate_size": 8},
    "Gemma4AssistantForCausalLM": {
        "text_config.hidden_size_per_layer_input": 0,
        "text_config.vocab_size_per_layer_input": 0,
        "text_config.num_kv_shared_layers": 2,
        "backbone_hidden_size": 32,
    },
    "Gemma4UnifiedAssistantForCausalLM": {"backbone_hidden_size": 32},
    "GitForCausalLM": {"vision_config.image_size": 32},
    "Glm5NextForConditionalGeneration": {
        "text_config.index_kpool": 2,
        "text_config.layer_types": LINEAR_AND_FULL,
        "text_config.mlp_layer_types": ["dense", "sparse"],
    },
    "GradiumPhononTTSForConditionalGeneration": {"flow_head_config.condition_dim": 32},
    "Granite4VisionForConditionalGeneration": {
        "vision_config.hidden_size": 64,
        "downsample_rate": "4/8",
        "deepstack_layer_map": [[0, 0]],
        "spatial_target_layers": [0, 1],
    },
    "IdeficsForVisionText2Text": {"vision_config.image_size": 28},
    "InstructBlipForConditionalGeneration": {"vision_config.image_size": 28, "image_token_index": 100},
    "InstructBlipVideoForConditionalGeneration": {"vision_config.image_size": 28, "video_token_index": 100},
    "Kosmos2ForConditionalGeneration": {"vision_config.image_size": 28, "latent_query_num": 4},
    "Molmo2ForConditionalGeneration": {"adapter_config.vision_feature_layer": [1, 0]},
    "MoonshineForConditionalGeneration": {"pad_token_id": 1},
    "MoonshineStreamingForConditionalGeneration": {"num_key_value_heads": 4, "decoder_start_token_id": 100},
    "MuseSparkForConditionalGeneration": {
        "audio_config.num_hidden_layers": 4,
        "audio_config.hidden_sizes": [8, 16, 24, 32],
        "audio_config.depths": [1, 1, 1, 1],
    },
    "MusicgenForConditionalGeneration": {"decoder.decoder_start_token_id": 100},
    "MusicgenMelodyForConditionalGeneration": {"decoder.decoder_start_token_id": 100},
    "NemotronH_Omni_Reasoning_V3": {"vision_config.video_temporal_patch_size": 2, "audio_config": None},
    "PerceptionLMForConditionalGeneration": {
        "vision_config.model_type": "siglip_vision_model",
        "vision_config.model_args": {"embed_dim": 32},
    },
    "Pix2StructForConditionalGeneration": {"vision_config.patch_embed_hidden_size": 32},
    "PocketTTSForConditionalGeneration": {"flow_head_config.condition_dim": 32},
    "PPFormulaNetForConditionalGeneration": {"vision_config.output_channels": 256},
    "Qwen2_5OmniForConditionalGeneration": {"enable_audio_output": False},
    "Qwen2_5OmniThinkerForConditionalGeneration": {"vision_start_token_id": 110, "vision_end_token_id": 111},
    "Qwen3OmniMoeForConditionalGeneration": {"enable_audio_output": False},
    "Qwen3OmniMoeTalkerForConditionalGeneration": {"text_config.shared_expert_intermediate_size": 16},
    "Qwen3OmniMoeThinkerForConditionalGeneration": {"vision_start_token_id": 110, "vision_end_token_id": 111},
    "ReformerForMaskedLM": {"axial_pos_shape": [4, 3], "axial_pos_embds_dim": [16, 16], "is_decoder": False},
    "ReformerModelWithLMHead": {"axial_pos_shape": [4, 3], "axial_pos_embds_dim": [16, 16], "is_decoder": True},
    "SpeechEncoderDecoderModel": {"decoder_start_token_id": 100, "pad_token_id": 1},
    "ViltForMaskedLM": {"image_size": 64},
    "VisionEncoderDecoderModel": {"decoder_start_token_id": 100, "pad_token_id": 1},
    "WhisperForConditionalGeneration": {"max_source_positions": 8},
    "XmodForCausalLM": {"default_language": "en_XX"},
    "XmodForMaskedLM": {"default_language": "en_XX"},
}


def noise(*shape: int) -> Tensor:
    """Pixels, sound or features."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7))


def codes(*shape: int) -> Tensor:
    """Ids of audio codes, or of text."""
    return torch.randint(5, 90, shape, generator=torch.Generator().manual_seed(7))


def labels(length: int) -> Tensor:
    """Labels `[2, length]`, some of them masked."""
    ids = codes(2, length)
    ids[0, 3] = ids[-1, -1] = -100
    return ids


def after_image(tokens: int) -> Tensor:
    """Text `[2, 12]` whose first tokens stand for the image."""
    ids = codes(2, 12)
    ids[:, :tokens] = 100  # the image_token_index in CLASSES
    return ids


def placed(rows: int, patches: int, width: int) -> Tensor:
    """Patches with their row and column in front."""
    places = torch.arange(1, patches + 1).float().expand(rows, -1)[..., None]
    return torch.cat([places, places, noise(rows, patches, width)], dim=-1)


def frames(channels: int) -> Callable[[], dict[str, Any]]:
    """What reads codebooks: ids `[2, 12, channels]`."""
    return lambda: {"input_ids": codes(2, 12, channels), "attention_mask": torch.ones(2, 12, dtype=torch.long)}


INPUTS: dict[str, Callable[[], dict[str, Any]]] = {
    "Blip2ForConditionalGeneration": lambda: {"pixel_values": noise(2, 3, 28, 28), "input_ids": after_image(4)},
    "BlipForConditionalGeneration": lambda: {"pixel_values": noise(2, 3, 32, 32)},
    "BridgeTowerForMaskedLM": lambda: {"pixel_values": noise(2, 3, 32, 32)},
    "CanaryForConditionalGeneration": lambda: {"input_features": noise(2, 64, 128)},
    "CohereAsrForConditionalGeneration": lambda: {"input_features": noise(2, 64, 128)},
    "CsmForConditionalGeneration": lambda: {**frames(2)(), "labels": codes(2, 12, 2)},
    "FSMTForConditionalGeneration": lambda: {"labels": labels(12)},
    "GitForCausalLM": lambda: {"pixel_values": noise(2, 3, 32, 32)},
    "IdeficsForVisionText2Text": lambda: {
        "pixel_values": noise(2, 1, 3, 28, 28),
        "image_attention_mask": torch.ones(2, 12, 1, dtype=torch.long),
    },
    "InstructBlipForConditionalGeneration": lambda: {
        "pixel_values": noise(2, 3, 28, 28),
        "input_ids": after_image(4),
        "qformer_input_ids": codes(2, 12),
    },
    "InstructBlipVideoForConditionalGeneration": lambda: {
        "pixel_values": noise(2, 1, 3, 28, 28),
        "input_ids": after_image(4),
        "qformer_input_ids": codes(2, 12),
    },
    "Kosmos2ForConditionalGeneration": lambda: {
        "pixel_values": noise(2, 3, 28, 28),
        "image_embeds_position_mask": (torch.arange(12) < 4).long().expand(2, -1),
    },
    "KyutaiSpeechToTextForConditionalGeneration": lambda: {**frames(3)(), "labels": labels(12)},
    "Molmo2ForConditionalGeneration": lambda: {"mm_token_type_ids": torch.zeros(2, 12, dtype=torch.long)},
    "MoonshineForConditionalGeneration": lambda: {"input_values": noise(2, 4000)},
    "MoonshineStreamingForConditionalGeneration": lambda: {"input_values": noise(2, 4000)},
    "MoshiForConditionalGeneration": lambda: {
        "moshi_audio_codes": codes(2, 2, 12),
        "user_audio_codes": codes(2, 2, 12),
        "text_labels": labels(12),
    },
    "MusicgenForCausalLM": lambda: {"input_ids": codes(4, 12), "labels": codes(2, 12, 2)},
    "MusicgenForConditionalGeneration": lambda: {"labels": codes(2, 12, 2)},
    "MusicgenMelodyForCausalLM": lambda: {"input_ids": codes(4, 12), "labels": codes(2, 12, 2)},
    "MusicgenMelodyForConditionalGeneration": lambda: {"labels": codes(2, 12, 2)},
    "Pix2StructForConditionalGeneration": lambda: {"flattened_patches": placed(2, 6, 32)},
    "PPFormulaNetForConditionalGeneration": lambda: {"pixel_values": noise(2, 3, 512, 512), "labels": labels(12)},
    "SeamlessM4TForSpeechToText": lambda: {"input_features": noise(2, 32, 32)},
    "SeamlessM4TTextToUnitForConditionalGeneration": lambda: {"inputs_embeds": noise(2, 12, 32), "input_ids": None},
    "SeamlessM4Tv2ForSpeechToText": lambda: {"input_features": noise(2, 32, 32)},
    "Speech2TextForConditionalGeneration": lambda: {"input_features": noise(2, 32, 32)},
    "SpeechEncoderDecoderModel": lambda: {"input_values": noise(2, 4000)},
    "SpeechT5ForSpeechToText": lambda: {"input_values": noise(2, 4000)},
    "UdopForConditionalGeneration": lambda: {
        "bbox": noise(2, 12, 4).sigmoid(),
        "pixel_values": noise(2, 3, 224, 224),
    },
    "ViltForMaskedLM": lambda: {"pixel_values": noise(2, 3, 64, 64)},
    "VisionEncoderDecoderModel": lambda: {"pixel_values": noise(2, 3, 224, 224)},
    "VoxtralRealtimeForConditionalGeneration": lambda: {"input_features": noise(2, 128, 96)},
    "WhisperForConditionalGeneration": lambda: {"input_features": noise(2, 80, 16)},
}
