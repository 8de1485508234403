"""What a training imports late, for the fork server of the kill loop. It saves each process 13 s of CPU time."""

from __future__ import annotations

import gc

import deepspeed  # noqa: F401  # accelerate (1.15) imports it for the first model that it unwraps
import peft  # noqa: F401
import trl  # noqa: F401
from PIL import Image
from transformers import Qwen2Tokenizer, Qwen2VLProcessor  # noqa: F401
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from echo_ft.training import all_roles, cases, checks, collator, trainer  # noqa: F401
from train import sft  # noqa: F401

Image.init()  # imports the plugins
get_checkpoint_conversion_mapping("qwen2_vl")  # transformers (5.23) compiles 1,000 patterns for this
gc.freeze()  # a garbage collection would copy the memory that the processes share
