"""One model, one optimizer, one DeepSpeed engine: steps in, losses out."""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from mates.engine.config import PretrainConfig, Recipe, check_batches, is_installed, require, require_packages
from mates.engine.distributed import World
from mates.engine.pretrain.model import (
    FusedHead,
    build_from_weights,
    build_model,
    build_uninitialised,
    model_config,
    next_token_loss,
    padded_vocabulary,
    reset_at_documents,
)
from mates.engine.pretrain.shapes import resolve_shape

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class StepResult:
    """Mean loss of the global batch in nats a token, the worst rank's, and the global gradient norm before clipping.

    ``refused`` says why the optimizer step was not taken, where it was not: weights and moments are then those before. ``is_to_stop``:
    some rank is asked to stop. ``is_written``: all ranks have written their part of the checkpoint.
    """

    loss_nats: float
    worst_nats: float
    grad_norm: float
    refused: str | None
    is_to_stop: bool
    is_written: bool


def weight_decay_of(parameter: torch.Tensor, config: PretrainConfig) -> float:
    """Matrices decay; biases and norms do not."""
    return config.weight_decay if parameter.ndim >= 2 else 0.0


def deepspeed_config(recipe: Recipe, world_size: int) -> dict[str, Any]:
    """The DeepSpeed JSON of a recipe. Keys of ``launch.deepspeed`` are merged over it."""
    config = recipe.pretrain
    per_rank = config.batch_size // world_size
    micro = min(config.micro_batch_size, per_rank)
    zero: dict[str, Any] = {"stage": config.zero_stage}
    result: dict[str, Any] = {
        "train_batch_size": config.batch_size,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": per_rank // micro,
        "gradient_clipping": config.clip_norm,
        "steps_per_print": 2**31,
        "zero_optimization": zero,
    }
    if config.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
        result["zero_force_ds_cpu_optimizer"] = False  # PyTorch's fused AdamW runs on the host too, and needs no compiler
    if "tensorboard" in recipe.launch.trackers:
        result["tensorboard"] = {"enabled": True, "output_path": str(recipe.path()), "job_name": "tensorboard"}
    if "wandb" in recipe.launch.trackers:
        result["wandb"] = {"enabled": True, "project": "mates", "group": recipe.path().name}
    if config.precision == "bf16" and config.zero_stage == 0:
        # without ZeRO DeepSpeed accumulates bf16 gradients; autocast keeps fp32 weights and gradients instead
        result["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    elif config.precision == "bf16":
        result["bf16"] = {"enabled": True, "check_grad_overflow": True}
        result["data_types"] = {"grad_accum_dtype": "fp32"}
    return _merged(result, recipe.launch.deepspeed)


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in over.items():
        result[key] = _merged(result[key], value) if isinstance(value, dict) and isinstance(result.get(key), dict) else value
    return result


class Trainer:
    """A DeepSpeed engine around the recipe's model with AdamW (Loshchilov & Hutter, arXiv 1711.05101).

    All ranks call every method together.
    """

    def __init__(self, recipe: Recipe, world: World, *, vocab_size: int, end_of_document: int, weights: Path | None = None) -> None:
        """Start from random weights, or from those of a Hugging Face folder.

        Raises:
            ArtifactError: the folder's weights are not those of the recipe's model.
        """
        import deepspeed

        require_packages(recipe)
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        config = recipe.pretrain
        check_batches(config, world.size, "the ranks that run")
        # this op serves inference only; building it costs a minute on a fresh machine and needs a compiler
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_backend="nccl" if world.device.type == "cuda" else "gloo", verbose=False)
        self.world, self.config = world, config
        self.model_config = model_config(
            resolve_shape(recipe.model), padded_vocabulary(vocab_size, recipe.model.vocab_multiple), end_of_document
        )
        model = self._initial(recipe.seed, weights)
        if config.activation_checkpointing:
            model.gradient_checkpointing_enable()  # type: ignore[operator]
        if config.reset_at_documents:
            reset_at_documents(model, end_of_document)
        runs_kernels = world.device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
        require(config.fused_loss != "always" or runs_kernels, "pretrain.fused_loss", "always", "auto or never on a machine without a GPU")
        can_fuse = world.device.type == "cuda" and is_installed("liger_kernel")
        self._head = FusedHead.of(model) if config.fused_loss == "always" or (config.fused_loss == "auto" and can_fuse) else None
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        groups: dict[float, list[nn.Parameter]] = {}
        shapes: dict[float, dict[str, torch.Size]] = {}
        for name, parameter in model.named_parameters():
            decay = weight_decay_of(parameter, config)
            groups.setdefault(decay, []).append(parameter)
            shapes.setdefault(decay, {})[name] = parameter.shape
        self.group_shapes = list(shapes.values())
        """Whole shapes of the parameters of each optimizer group, by name."""
        optimizer = torch.optim.AdamW(
            [{"params": parameters, "weight_decay": decay} for decay, parameters in groups.items()],
            lr=config.lr,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            fused=config.offload_optimizer or world.device.type == "cpu",
        )
        with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):  # it prints its memory at every step of the way
            self.engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=deepspeed_config(recipe, world.size))
        # the cast to bf16 took the rotary frequencies along; their angles need fp32
        for name, buffer in self.engine.module.named_buffers():
            buffer.data = buffers[name].to(buffer.device)
        if config.compile:
            self.engine.compile()
        self._tracks, self.engine.monitor.enabled = self.engine.monitor.enabled, False  # DeepSpeed's own figures count samples
        self.micro_batch = int(self.engine.train_micro_batch_size_per_gpu())
        self.updates = 0
        """Optimizer steps taken so far, by all attempts."""

    def _initial(self, seed: int, weights: Path | None) -> nn.Module:
        """The model with its initial weights on rank 0, from where DeepSpeed hands them to the others, which need no memory for them."""
        if not self.world.first:
            self.world.same(lambda: None)
            return build_uninitialised(self.model_config)
        made: list[nn.Module] = []

        def make() -> None:
            made.append(build_from_weights(self.model_config, weights) if weights else build_model(self.model_config, seed))

        self.world.same(make)
        return made[0]

    def _loss(self, batch: torch.Tensor) -> torch.Tensor:
        """Mean next-token loss of a micro-batch in nats."""
        return self._head.next_token_loss(self.engine, batch) if self._head else next_token_loss(self.engine, batch)

    def step(
        self,
        windows: npt.NDArray[np.integer[Any]],
        lr: float,
        *,
        limit: float = math.inf,
        is_to_stop: bool = False,
        is_written: bool = False,
    ) -> StepResult:
        """One optimizer step; none where the loss of a rank is not finite or above ``limit``, or the gradient is not finite.

        Args:
            windows: [B / ranks, L + 1], this rank's share of the global batch; of any dtype, so that no more bytes than there are go to
                the device.
            lr: learning rate of this step.
            limit: the largest loss in nats that is believed, the same on all ranks.
            is_to_stop: whether this rank is asked to stop. is_written: whether its part of a checkpoint is written.
        """
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        losses = []
        micro_batches = list(self._micro_batches(windows))
        self.engine.module.train()
        for batch in micro_batches[:-1]:
            losses.append(self._backward(self._loss(batch)))
            self.engine.step()
        last = self._loss(micro_batches[-1])
        mean = torch.stack([*losses, last.detach()]).double().mean()
        own = torch.cat([mean[None], mean.new_tensor([is_to_stop, is_written])])
        losses_W, stops_W, written_W = self.world.every(own).cpu().unbind(1)
        refused = self._refusal(losses_W, limit)
        # DeepSpeed passes over steps whose gradients are not finite, and then clears all of its buffers
        self._backward(last * math.nan if refused else last)
        norm = self._take_step()
        if not refused and not math.isfinite(norm):
            refused = f"the gradient norm is {norm}"
        self.updates += refused is None
        return StepResult(float(losses_W.mean()), float(losses_W.max()), norm, refused, bool(stops_W.any()), bool(written_W.all()))

    @staticmethod
    def _refusal(losses_W: torch.Tensor, limit: float) -> str | None:
        """Why a step with these losses by rank is not to be taken."""
        bad = [f"{loss:.4g} on rank {rank}" for rank, loss in enumerate(losses_W.tolist()) if not loss <= limit or math.isinf(loss)]
        if not bad:
            return None
        allowed = "" if math.isinf(limit) else f", where {limit:.4g} nats would be believed"
        more = f" and {len(bad) - 4} more" if len(bad) > 4 else ""
        return f"the loss is {', '.join(bad[:4])}{more}{allowed}"

    def _backward(self, loss: torch.Tensor) -> torch.Tensor:
        self.engine.backward(loss)
        return loss.detach()

    def _take_step(self) -> float:
        """The optimizer step, where the gradient norm is finite. Returns the norm before clipping."""
        if self.config.zero_stage:
            self.engine.step()
            return math.nan if self.engine.optimizer.overflow else float(self.engine.get_global_grad_norm())
        norm = float(torch.nn.utils.get_total_norm([p.grad for p in self.engine.module.parameters() if p.grad is not None]))
        optimizer = self.engine.optimizer
        if not math.isfinite(norm):
            optimizer.step = lambda: None  # without ZeRO DeepSpeed leaves it to the optimizer, which would take it
        self.engine.step()
        optimizer.__dict__.pop("step", None)
        return norm

    def _micro_batches(self, windows: npt.NDArray[np.integer[Any]]) -> Iterator[torch.Tensor]:
        for start in range(0, len(windows), self.micro_batch):
            yield torch.from_numpy(windows[start : start + self.micro_batch]).to(self.world.device).long()

    def track(self, figures: Mapping[str, float], step: int) -> None:
        """Hand figures to the recipe's trackers."""
        if self._tracks:
            self.engine.monitor.write_events([(name, value, step) for name, value in figures.items()])

    def full_state(self) -> Iterator[tuple[str, torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Name, fp32 weights and both moments of each parameter, gathered from all ranks, on the CPU."""
        self._link_moments()
        for name, parameter in self.engine.module.named_parameters():
            values = self._full_values(parameter)
            yield name, *(value.detach().float().cpu().reshape(self._shape(parameter)) for value in values)

    def _full_values(self, parameter: nn.Parameter) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if self.config.zero_stage == 0:
            state = self.engine.optimizer.state[parameter]
            return parameter, state[MOMENTS[0]], state[MOMENTS[1]]
        return (
            safe_get_full_fp32_param(parameter),
            safe_get_full_optimizer_state(parameter, MOMENTS[0]),
            safe_get_full_optimizer_state(parameter, MOMENTS[1]),
        )

    @staticmethod
    def _shape(parameter: nn.Parameter) -> torch.Size:
        return getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 leaves an empty tensor behind

    def _link_moments(self) -> None:
        """DeepSpeed links moments to parameters after the first of several parameter groups has stepped; link all of them."""
        optimizer = self.engine.optimizer
        if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
            optimizer._hp_optimizer_states_linked = False
            optimizer._lazy_init_hp_params_optimizer_state()
