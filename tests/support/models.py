"""A small Qwen2-VL architecture, for tests without weights on disk."""

from transformers import Qwen2VLConfig


def small_config() -> Qwen2VLConfig:
    """Return the config of a Qwen2-VL with three text and three vision layers."""
    return Qwen2VLConfig(
        text_config={
            "hidden_size": 192,
            "intermediate_size": 512,
            "num_hidden_layers": 3,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "vocab_size": 64,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]},
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        vision_config={"depth": 3, "embed_dim": 128, "hidden_size": 192, "num_heads": 4},
        image_token_id=5,
        video_token_id=6,
        vision_start_token_id=7,
        vision_end_token_id=8,
    )
