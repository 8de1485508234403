"""AllRolesTrainer: one adapter per role, trained in one run over shared prefixes.

Each role's loss, gradients, optimizer state and learning rate are those of a separate run. Only the optimizer, the
images and what the base model computes are shared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import load_peft_weights, set_peft_model_state_dict
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler
from transformers.trainer_utils import EvalLoopOutput
from trl import SFTConfig

from echo_ft.model.adapters import ADAPTER_CARD, AdapterCard, write_card
from echo_ft.records import ROLES
from echo_ft.training.config import role_arguments
from echo_ft.training.option_changes import optimizer_options
from echo_ft.training.trainer import PrefixSharingTrainer


class AllRolesTrainer(PrefixSharingTrainer):
    """PrefixSharingTrainer for a model with one adapter per role (adapter_layers.add_adapters).

    The loss is the sum of the roles' losses, each a mean over the labels of its role in the step. A role without labels
    in a step keeps its weights. Logs have the loss of each role.
    """

    def __init__(self, *args: Any, cards: Mapping[str, AdapterCard], **kwargs: Any) -> None:
        """`cards` has the card of each role's adapter."""
        self.cards = cards
        super().__init__(*args, card=next(iter(cards.values())), **kwargs)
        self._without_labels: list[str] = []

    def _weights(self, role: str) -> list[torch.nn.Parameter]:
        """The trained weights of a role's adapter."""
        named = self.accelerator.unwrap_model(self.model).named_parameters()
        return [weight for name, weight in named if f".{role}." in name]

    def _arguments(self, role: str) -> SFTConfig:
        """The options of a role."""
        args: Any = self.args  # transformers declares its own class
        return role_arguments(args, self.config, role)

    def _get_num_items_in_batch(self, batch_samples: Sequence[Mapping[str, Any]], device: Any) -> torch.Tensor | None:
        """The number of labels of each role (roles,) in the micro-batches of a step."""
        if not batch_samples:
            return None
        labels = torch.cat([batch["label_roles"].to(device) for batch in batch_samples])
        own = torch.bincount(labels, minlength=len(ROLES))
        together = self.accelerator.gather(own[None]).sum(dim=0)
        self._without_labels = [role for role, count in zip(ROLES, together.tolist(), strict=True) if not count]
        return together if self.args.average_tokens_across_devices else own

    def _label_loss(
        self, model: Any, inputs: Mapping[str, Any], packed: dict[str, Any], return_outputs: bool, labels: Any
    ) -> Any:
        outputs = model(**packed, use_cache=False, fused_lm_head=True)
        losses = -outputs.log_probs.flatten()
        if self._arguments(ROLES[0]).loss_type == "dft":  # as in TRL
            losses = losses * (-losses).exp().detach()
        roles = inputs["label_roles"]
        sums = losses.new_zeros(len(ROLES)).index_add(0, roles, losses)
        counts = torch.bincount(roles, minlength=len(ROLES))
        self._measure(outputs, sums.detach(), counts, model.training)
        if not model.training:
            loss = sums.sum() / counts.sum().clamp(min=1)
            return (loss, outputs) if return_outputs else loss
        loss = (sums / (counts if labels is None else labels).clamp(min=1)).sum()
        if labels is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # DDP averages the gradients
        if self.accelerator.num_processes > 1:  # DDP waits for a gradient of every weight
            missing = [role for role, count in zip(ROLES, counts.tolist(), strict=True) if not count]
            loss = loss + sum(0.0 * weight.sum() for role in missing for weight in self._weights(role))
        return (loss, outputs) if return_outputs else loss

    def _measure(self, outputs: Any, sums: torch.Tensor, counts: torch.Tensor, training: bool) -> None:
        """Record the metrics that TRL records, and the loss of each role."""
        measured = torch.stack([outputs.entropy.detach().sum().double(), outputs.is_top1.sum().double()])
        totals = self.accelerator.gather(torch.cat([measured, sums.double(), counts.double()])[None]).sum(dim=0).cpu()
        (entropy, right), losses, labels = totals.split([2, len(ROLES), len(ROLES)])
        metrics = self._metrics["train" if training else "eval"]
        metrics["entropy"].append((entropy / labels.sum().clamp(min=1)).item())
        metrics["mean_token_accuracy"].append((right / labels.sum().clamp(min=1)).item())
        metrics["num_tokens"] = [self._total_train_tokens]
        for role, loss, count in zip(ROLES, losses, labels, strict=True):
            if not training:
                self._evaluated[role].append(torch.stack([loss, count]))
            elif count:
                metrics[f"{role}_loss"].append((loss / count).item())

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Evaluate all roles together, and each separately as the mean over its trained tokens."""
        output = super().evaluation_loop(*args, **kwargs)
        for role in ROLES:
            total, labels = torch.stack(self._evaluated[role]).sum(dim=0)
            self._metrics["eval"][f"{role}_loss"] = [(total / labels.clamp(min=1)).item()]
        return output

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Train as TRL does, but leave a role without labels in the step as it is."""
        loss: torch.Tensor = super().training_step(*args, **kwargs)
        for role in self._without_labels:
            for weight in self._weights(role):
                weight.grad = None
        return loss

    def _clip_grad_norm(self, model: Any) -> torch.Tensor:
        self.accelerator.unscale_gradients()
        norms = [torch.nn.utils.clip_grad_norm_(self._weights(role), self.args.max_grad_norm) for role in ROLES]
        # The norm of a role without gradients is on the CPU (torch 2.15).
        return torch.stack([norm.to(self.args.device) for norm in norms]).norm()

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """The Trainer's optimizer, with separate groups for each role."""
        if self.optimizer is not None:
            return self.optimizer
        optimizer = super().create_optimizer(*args, **kwargs)
        groups = list(optimizer.param_groups)
        optimizer.param_groups.clear()
        for role in ROLES:
            own, rate = set(self._weights(role)), self._arguments(role).learning_rate
            for group in groups:
                if members := [weight for weight in group["params"] if weight in own]:
                    optimizer.add_param_group({**group, "params": members, "lr": rate, "role": role})
        self._optimizer_options = optimizer_options(optimizer)
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LambdaLR:
        """One schedule for all groups, in which each role's rate changes as in a separate run."""
        if self.lr_scheduler is None:
            changed: Any = optimizer or self.optimizer
            factors = {role: rate_factor(self._arguments(role), num_training_steps) for role in ROLES}
            self.lr_scheduler = LambdaLR(changed, [factors[group["role"]] for group in changed.param_groups])
            self._created_lr_scheduler = True
        schedule: LambdaLR = self.lr_scheduler
        return schedule

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write nothing: `_save` writes a README.md for each role."""

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or str(self.args.output_dir))
        for role in self.cards:  # a card marks a finished adapter
            (folder / role / ADAPTER_CARD).unlink(missing_ok=True)
        self.accelerator.unwrap_model(self.model).save_pretrained(str(folder))
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's template
        processor: Any = self.processing_class
        for role, card in self.cards.items():
            processor.save_pretrained(str(folder / role))
            write_card(folder / role, card)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        for role in self.cards:
            weights = load_peft_weights(str(Path(resume_from_checkpoint) / role), device="cpu")
            set_peft_model_state_dict(self.accelerator.unwrap_model(self.model), weights, adapter_name=role)


def rate_factor(args: SFTConfig, steps: int) -> Callable[[int], float]:
    """By what the schedule of `args`, a function of the step, multiplies its learning rate."""
    dummy = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=args.learning_rate)
    warmup, options = args.get_warmup_steps(steps), args.lr_scheduler_kwargs
    schedule: Any = get_scheduler(args.lr_scheduler_type, dummy, warmup, steps, options)  # type: ignore[arg-type]
    factor: Callable[[int], float] = schedule.lr_lambdas[0]
    return factor
