"""Answer the prompts of a run with a bundle's adapters by transformers and PEFT alone, one prompt at a time."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor

from echo_ft.records import LETTERS, ROLES, Trace


@torch.inference_mode()
def answer_traces(
    base: str, bundle: Path, traces: Iterable[Trace], images: Path, max_new_tokens: int
) -> list[tuple[str, dict[str, float]]]:
    """Return the text for each prompt, and the log-probability of each letter as its first token."""
    processor = AutoProcessor.from_pretrained(bundle / "processor", trust_remote_code=False)
    loaded = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32, trust_remote_code=False)
    model = PeftModel.from_pretrained(loaded, bundle / "adapters" / ROLES[0], adapter_name=ROLES[0])
    for role in ROLES[1:]:
        model.load_adapter(bundle / "adapters" / role, adapter_name=role)
    model.eval()
    letters = {letter: processor.tokenizer.convert_tokens_to_ids(letter) for letter in LETTERS}
    found = []
    for trace in traces:
        model.set_adapter(trace.role)
        content = [{"type": "image", "path": str(images / name)} for name in trace.images]
        content.append({"type": "text", "text": trace.context + trace.prompt})
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        output = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        tokens = output.sequences[0, inputs["input_ids"].shape[1] :]
        scores = torch.log_softmax(output.logits[0][0].float(), dim=-1)
        text = processor.decode(tokens, skip_special_tokens=True).strip()
        found.append((text, {letter: float(scores[token]) for letter, token in letters.items()}))
    return found
