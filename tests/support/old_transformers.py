"""Load a merged model with transformers 4, in its own environment.

`PYTHON -m tests.support.old_transformers MODEL` prints one line of JSON: the version, the weights that do not fit, and
the token ids, the sum of the pixels and the last logits of a prompt with an image. PYTHON is the interpreter of an
environment with transformers 4.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoProcessor, Qwen2VLForConditionalGeneration, __version__


def answer(model: str) -> dict[str, Any]:
    """Load the model and its processor, and run them on a drawn image and a question."""
    loaded, info = Qwen2VLForConditionalGeneration.from_pretrained(model, output_loading_info=True)
    processor = AutoProcessor.from_pretrained(model)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (96, 128, 3), dtype=np.uint8))
    content = [{"type": "image"}, {"type": "text", "text": "Is there any defect in the object?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(text=[text], images=[image], return_tensors="pt")
    with torch.inference_mode():
        logits = loaded.eval()(**inputs).logits[0, -1]
    return {
        "version": __version__,
        "unfit": sorted({name for key in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in info[key]}),
        "input_ids": inputs["input_ids"][0].tolist(),
        "pixels": inputs["pixel_values"].double().sum().item(),
        "logits": logits.tolist(),
    }


if __name__ == "__main__":
    print(json.dumps(answer(sys.argv[1])))
