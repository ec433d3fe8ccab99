"""A checkpoint of other ranks or another ZeRO stage, restored: DeepSpeed's universal format holds whole tensors by parameter name.

DeepSpeed's own converter writes the format out of ZeRO-1, -2 and -3 shards, and reads it back into ZeRO-1 and -2. What is written here is
the same format out of replicas (ZeRO-0), and the part of it that says nothing about a tensor, which differs between stages: DeepSpeed's
would also give all parameter groups the first one's weight decay when it is read into ZeRO-3.
"""

from __future__ import annotations

import argparse
import contextlib
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mates.engine.pretrain.trainer import MOMENTS

TENSORS, GLOBAL = "zero", "optimizer_state.pt"
Shapes = dict[str, torch.Size]


def write_universal(source: Path, target: Path, *, zero_stage: int, groups: list[Shapes], clip_norm: float) -> None:
    """Convert DeepSpeed's folder of a checkpoint. By one process.

    Args:
        source: the folder with the files of all ranks. They are unpickled: a checkpoint folder is trusted input.
        target: a folder to be made.
        zero_stage: that it was saved with.
        groups: shapes of the parameters of each optimizer group by name. clip_norm: as in the recipe.
    """
    import deepspeed

    target.mkdir(parents=True)
    if zero_stage == 0:
        _write_replicas(source, target, groups)
    else:
        from deepspeed.checkpoint import ds_to_universal

        options = argparse.Namespace(
            input_folder=str(source),
            output_folder=str(target),
            num_extract_workers=1,
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=True,
        )
        with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            ds_to_universal.main(options)
        (target.parent / "latest_universal").unlink(missing_ok=True)
    if zero_stage == 3:
        _complete_shards(target, groups)
    step = torch.load(target / TENSORS / next(iter(groups[0])) / "step.pt", weights_only=True)
    state = {
        "ds_version": deepspeed.__version__,
        "clip_grad": clip_norm,
        "param_groups": [{} for _ in groups],  # the recipe's own stay
        "optimizer_state_dict": {"state": {0: {"step": step}}, "param_groups": [{}]},
    }
    torch.save(state, target / TENSORS / GLOBAL)


def _complete_shards(target: Path, groups: list[Shapes]) -> None:
    """Of ZeRO-3 the converter writes flat tensors, and the step only once."""
    state = torch.load(target / TENSORS / GLOBAL, map_location="cpu", weights_only=False)
    step = torch.as_tensor(state["optimizer_state_dict"]["state"][0]["step"])
    for name, shape in [item for group in groups for item in group.items()]:
        folder = target / TENSORS / name
        for kind in ("fp32", *MOMENTS):
            flat = torch.load(folder / f"{kind}.pt", map_location="cpu", weights_only=True)
            torch.save({"param": flat[: shape.numel()].reshape(shape)}, folder / f"{kind}.pt")
        torch.save(step, folder / "step.pt")


def _write_replicas(source: Path, target: Path, groups: list[Shapes]) -> None:
    (file,) = source.glob("mp_rank_*_model_states.pt")
    saved = torch.load(file, map_location="cpu", weights_only=False)
    numbers = [number for group in saved["optimizer"]["param_groups"] for number in group["params"]]
    for number, name in zip(numbers, [name for group in groups for name in group], strict=True):
        own, folder = saved["optimizer"]["state"][number], target / TENSORS / name
        folder.mkdir(parents=True)
        torch.save({"param": saved["module"][name]}, folder / "fp32.pt")
        for moment in MOMENTS:
            torch.save({"param": own[moment]}, folder / f"{moment}.pt")
        torch.save(torch.as_tensor(own["step"]), folder / "step.pt")


def read_universal(folder: Path, engine: Any, *, zero_stage: int) -> None:
    """Restore weights and moments of an engine, whatever its ranks and stage. All ranks take part."""
    if zero_stage == 0:
        for name, parameter in engine.module.named_parameters():
            _restore(folder / TENSORS / name, parameter, engine.optimizer)
    elif zero_stage == 3:
        engine.optimizer.load_hp_checkpoint_state_from_checkpoint_dir_stage3(str(folder))
        for state in engine.optimizer.optimizer.state.values():  # one tensor for all would be counted up by each of them
            state["step"] = state["step"].clone()
    else:
        engine.optimizer._load_universal_checkpoint(str(folder), True, False)
        engine.optimizer.update_lp_params()


def _restore(folder: Path, parameter: nn.Parameter, optimizer: torch.optim.Optimizer) -> None:
    def read(kind: str) -> torch.Tensor:
        tensor: torch.Tensor = torch.load(folder / f"{kind}.pt", weights_only=True)["param"]
        return tensor.to(parameter.device, torch.float32).reshape(parameter.shape)

    parameter.data.copy_(read("fp32"))
    step = torch.load(folder / "step.pt", weights_only=True)
    optimizer.state[parameter] = {"step": torch.as_tensor(step).clone()} | {moment: read(moment) for moment in MOMENTS}
