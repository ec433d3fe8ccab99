"""Runs on each of two ranks: a model in shards, probed by every method. Rank 0 writes what it found."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import torch
from cases import METHODS, calibration, make_model, make_prober, make_reference, make_state, part, samples, scores

from mates.engine import distributed
from mates.engine.pretrain.checkpoint import OptimizerState
from mates.engine.probe.methods import make_setting
from mates.engine.probe.shards import Rows, Shards


def own_rows(state: OptimizerState, rows: Rows) -> OptimizerState:
    def own(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: rows.of(value).clone() for name, value in values.items()}

    return dataclasses.replace(state, weights=own(state.weights), exp_avg=own(state.exp_avg), exp_avg_sq=own(state.exp_avg_sq))


def main(out: Path) -> None:
    world = distributed.join(timeout_minutes=5, threads=1)
    rows = Rows(world.rank, world.size)
    found: dict[str, list[Any]] = {}
    for family, tied in (("gpt_neox", False), ("llama", True)):
        model = make_model(family, tied, torch.float64)
        state = own_rows(make_state(model, 1.0), rows)
        shards = Shards(model, rows)
        references = [make_reference(2), make_reference(5)]
        # three batches on two ranks
        batches = [[part(reference, 4), part(reference, 8, 4), part(reference, 12, 8)] for reference in references]
        setting = make_setting(model, state, batches, calibration(), shards=shards)
        prober = make_prober(setting)
        for method in METHODS:
            found[f"{family} {method}"] = scores(setting, prober.estimate(method), samples()[:16]).tolist()
        held = sum(value.numel() for value in state.weights.values())
        gathered = sum(parameter.untyped_storage().size() for parameter in model.parameters())
        found[f"{family} held"] = [held, gathered]
    if world.first:
        out.write_text(json.dumps(found))
    distributed.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
