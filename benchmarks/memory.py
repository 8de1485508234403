"""Measure peak memory without weights or a GPU: `python -m benchmarks.memory --recipe FILE [--run FILE]`.

Training runs the code of this project, but on tensors without content, so a 7B model takes only seconds and no memory.
The bytes of all live tensors are counted after each operation. The batch is the one that `python -m train.memory` uses.
With `--run`, the command measures the roles of a run instead, with adapters like the one that the recipe trains.

The count covers what PyTorch allocates on a GPU. It leaves out the CUDA context, fragmentation and the workspaces
inside kernels. The frozen vision tower is not run, because it ends before the language model needs its memory. TRL's
fused LM head is not run either, because its kernels need a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import weakref
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftConfig, get_peft_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.models.qwen2_vl import modeling_qwen2_vl
from trl import ModelConfig, SFTConfig

from benchmarks.training.workload import MODEL
from echo_ft import config as configs
from echo_ft.experts.roles import PROMPT_VERSION
from echo_ft.inference.engine import Engine
from echo_ft.inference.memory import RunShape, estimate_run, image_tokens
from echo_ft.model.activations import BatchShape
from echo_ft.model.architectures import count_parameters, meta_model
from echo_ft.model.loading import load_processor
from echo_ft.model.preparation import keep_adapter_input_dtype, packed_inputs, prepare_model
from echo_ft.model.rows import Row, RowBuilder
from echo_ft.model.vision import RECENT_IMAGES
from echo_ft.records import ROLES, Branch, Exchange
from echo_ft.training.checks import check_options
from echo_ft.training.config import EchoConfig, lora_config
from echo_ft.training.costs.memory import estimate_training, loaded_width, trainable_meta_model
from train.memory import MemoryConfig, largest_batch, read_run, run_shapes

PIXEL_VALUES = 3 * 2 * 14 * 14
"""Values per patch of Qwen2-VL."""


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all live tensors that were tracked or that an operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._storages: dict[int, weakref.ref[Any]] = {}

    def track(self, tensors: Any) -> None:
        """Count all tensors in a nested structure that have not been counted yet."""
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, torch.Tensor) and tensor.device.type in ("cpu", "meta"):
                storage = tensor.untyped_storage()
                key, size = id(storage), storage.nbytes()
                if key not in self._storages:
                    self._storages[key] = weakref.ref(storage, partial(self._free, key, size))
                    self.now += size
        self.peak = max(self.peak, self.now)

    def _free(self, key: int, size: int, reference: Any) -> None:
        del self._storages[key]
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = _answer(func, args, kwargs or {})
        if found is None:
            found = func(*args, **(kwargs or {}))
        self.track(found)
        return found


def _answer(func: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
    """Return the result of an operation that reads the content of a tensor without content, else None.

    Numbers are 0 and conditions are true. The engine then decodes every branch up to the limit.
    """
    aten, first = torch.ops.aten, args[0] if args else None
    if not isinstance(first, torch.Tensor) or first.device.type != "meta":
        return None
    if func is aten._local_scalar_dense.default:
        return first.dtype == torch.bool or 0
    if func is aten._to_copy.default and str(kwargs.get("device")) == "cpu":
        return torch.zeros(first.shape, dtype=first.dtype)
    if func is aten.index.Tensor and args[1][0].dtype == torch.bool:
        return torch.empty_like(first)
    return None


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Use PyTorch's kernels for a GPU: flash attention, or memory-efficient attention if there is a mask."""
    if torch.is_autocast_enabled("cpu"):
        query, key, value = (tensor.to(torch.bfloat16) for tensor in (query, key, value))
    if attn_mask is None:
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, is_causal, scale=scale)[0]
    bias = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(attn_mask.logical_not(), float("-inf"))
    bias = bias.expand(*query.shape[:2], *bias.shape[2:])
    graph = torch.is_grad_enabled()
    return torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, bias, graph, scale=scale)[0]


def _dropout(values: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    """Apply dropout as on a GPU, which keeps one byte per value for the mask."""
    return torch.native_dropout(values, p, True)[0] if training and p else values


@contextlib.contextmanager
def gpu_operations() -> Iterator[None]:
    """Use the operations of a GPU, and skip a check of the model that needs the content of a tensor."""
    functional, check = torch.nn.functional, "torch_compilable_check"
    saved = functional.scaled_dot_product_attention, functional.dropout, getattr(modeling_qwen2_vl, check)
    functional.scaled_dot_product_attention, functional.dropout = _attention, _dropout  # type: ignore[assignment]
    setattr(modeling_qwen2_vl, check, lambda *arguments, **options: None)
    try:
        yield
    finally:
        functional.scaled_dot_product_attention, functional.dropout = saved[:2]  # type: ignore[assignment]
        setattr(modeling_qwen2_vl, check, saved[2])


def training_peak(model: Any, batch: BatchShape, sft: SFTConfig, dtype: torch.dtype) -> int:
    """Return the peak bytes of a micro-batch of `batch`, forward and backward, in the middle of a step.

    `model` is a `trainable_meta_model`, which this changes. Its frozen weights get the type `dtype`. In full
    fine-tuning, all weights get it. Gradients, AdamW's two states and the pixels of the whole step exist already.
    """
    adapted = hasattr(model, "peft_config")
    core = model.get_base_model() if adapted else model
    vision = core.config.vision_config
    image = batch.max_pixels // (vision.patch_size * vision.spatial_merge_size) ** 2
    patches = batch.distinct_images * image * vision.spatial_merge_size**2
    length, hidden = batch.images * image + batch.text_tokens, core.config.text_config.hidden_size
    with gpu_operations(), FakeTensorMode(allow_non_fake_inputs=True), LiveBytes() as live:
        _fill(model, dtype, torch.float32 if adapted else dtype)
        prepare_model(core)
        keep_adapter_input_dtype(model)
        if sft.gradient_checkpointing:
            core.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()
        model.train()
        trained = [weight for weight in model.parameters() if weight.requires_grad]
        for weight in trained:
            weight.grad = torch.empty_like(weight)
        states = [torch.empty_like(weight) for weight in trained for _ in range(2)]
        pixels = [torch.empty(patches, PIXEL_VALUES, dtype=dtype) for _ in range(sft.gradient_accumulation_steps + 1)]
        inputs = {
            "input_ids": torch.empty(1, batch.rows * length, dtype=torch.long),
            "position_ids": torch.empty(3, 1, batch.rows * length, dtype=torch.long),
            "segments": torch.empty(1, batch.rows * length, dtype=torch.long),
            "lengths": [(length - batch.text_tokens, length)] * batch.rows,
            "pixel_values": pixels[0],
            "image_grid_thw": torch.empty(0, 3, dtype=torch.long),
            "image_order": [index % batch.distinct_images for index in range(batch.rows * batch.images)],
            "image_views": [],
            "image_features": [torch.empty(image, hidden, dtype=dtype) for _ in range(batch.distinct_images)],
        }
        keep = torch.empty(batch.rows * batch.label_tokens, dtype=torch.long)
        with torch.autocast("cpu", torch.bfloat16, enabled=bool(sft.bf16)):
            states_of_labels = core.model(**packed_inputs(inputs), keep=keep, use_cache=False).last_hidden_state
        states_of_labels.backward(torch.empty_like(states_of_labels))
        del states
    return live.peak


def _fill(model: Any, frozen: torch.dtype, trained: torch.dtype) -> None:
    """Replace the meta tensors of a model by fake tensors of the dtypes that training loads."""
    replaced: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                if id(weight) not in replaced:  # tied weights stay tied
                    dtype = trained if weight.requires_grad else frozen
                    new = torch.empty(weight.shape, dtype=dtype)
                    replaced[id(weight)] = torch.nn.Parameter(new, requires_grad=weight.requires_grad)
                module._parameters[name] = replaced[id(weight)]
        for name, buffer in module._buffers.items():
            module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def run_peak(model: Any, lora: PeftConfig | None, shape: RunShape, dtype: torch.dtype) -> int:
    """Return the peak bytes of the first batch of `shape` in a run of `model` on the meta device, which is changed.

    With `lora`, the model has four adapters of that config. The engine's cache of recent images is full.
    """
    model = model.to(dtype)
    # Generated tokens are 0 (`_answer`), so with another end token, decoding runs up to the limit.
    model.generation_config.eos_token_id = 1
    if lora is not None:
        model = get_peft_model(model, lora, adapter_name=ROLES[0], autocast_adapter_dtype=False)
        for role in ROLES[1:]:
            model.add_adapter(role, lora, autocast_adapter_dtype=False)
        model = model.to(dtype)
    # The engine takes only the padding token and the letters from the processor.
    processor = load_processor(MODEL, None, shape.max_pixels, shape.max_pixels)
    engine = Engine(model, RowBuilder(processor), Path(), shape.max_new_tokens)
    image, hidden = image_tokens(engine.base, shape.max_pixels), engine.base.config.text_config.hidden_size
    together = shape.together(image)
    with gpu_operations(), torch.no_grad(), LiveBytes() as live:
        live.track(list(model.parameters()))
        recent = [torch.empty(image, hidden, dtype=dtype, device="meta") for _ in range(RECENT_IMAGES)]
        features = iter(itertools.cycle(recent))
        shown = [[next(features) for _ in range(shape.images)] for _ in range(together)]
        engine._generate_batch([_run_row(shape, image)] * together, shown, shape.max_new_tokens)
    return live.peak


def _run_row(shape: RunShape, image: int) -> Row:
    """Return an exchange of `shape` as a row, with images of `image` tokens. The values do not matter."""
    branches = tuple(Branch(str(number), "") for number in range(shape.branches))
    exchange = Exchange("decision_maker", "case", ("image",) * shape.images, "", branches, PROMPT_VERSION)
    own = np.repeat(np.arange(1, shape.branches + 1), shape.branch_tokens)
    segments = np.concatenate([np.zeros(shape.prefix(image), dtype=np.int64), own])
    none = np.zeros_like(segments)
    return Row(exchange, none, none, segments, np.stack([none] * 3), np.zeros((shape.images, 3), dtype=np.int64))


def main() -> None:
    """Measure a recipe or a run and print the peaks next to the estimates."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--recipe", required=True, help="Training recipe, for example the one for the 7B decision maker."
    )
    parser.add_argument("--run", help="Config of a run with the same model.")
    options = parser.parse_args()
    config, sft, base = configs.parse(
        [EchoConfig, SFTConfig, ModelConfig], ["--config", options.recipe, "--use_cpu", "true"]
    )
    check_options(sft, base)
    model = trainable_meta_model(config, base)
    if options.run is None:
        batch = largest_batch(MemoryConfig(), config, sft)
        estimate = estimate_training(model, batch, sft, base, gpus=1)
        one_gpu = estimate.topologies[0]
        expected = estimate.total(one_gpu, sft.gradient_checkpointing) - one_gpu.context
        peak = training_peak(model, batch, sft, getattr(torch, str(base.dtype)))
        print(f"{options.recipe}: {peak / 2**30:.2f} GiB at the peak, {expected / 2**30:.2f} estimated")
        return
    run_options = read_run(options.run)
    adapter = sum(count.trainable for count in count_parameters(model))
    width = loaded_width(model, run_options.dtype)
    dtype = torch.float32 if width == 4 else torch.bfloat16
    for role, shape in run_shapes(run_options).items():
        plain = meta_model(str(base.model_name_or_path), base.model_revision)
        run = estimate_run(plain, adapter, shape, width)
        expected, lora = run.total - run.context, lora_config(config, base, plain)
        peak = run_peak(plain, lora, shape, dtype)
        print(
            f"{options.run}, {role}: {peak / 2**30:.2f} GiB at the peak, {expected / 2**30:.2f} estimated", flush=True
        )


if __name__ == "__main__":
    main()
