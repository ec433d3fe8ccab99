"""Small models, optimizer states and references to probe, and what probes must give, by torch's own optimizer."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from mates.engine.config import ModelConfig
from mates.engine.pretrain.checkpoint import OptimizerState
from mates.engine.pretrain.model import model_config
from mates.engine.pretrain.shapes import resolve_shape
from mates.engine.probe.methods import Estimate, Setting, make_setting
from mates.engine.probe.prober import Prober
from mates.engine.reference.batches import LabelBatch

VOCAB, LENGTH, SAMPLES = 128, 32, 64
BETAS, EPS, LR, STEPS = (0.9, 0.95), 1e-8, 1e-3, 7


def make_model(family: str, tied: bool, dtype: torch.dtype) -> nn.Module:
    """With the weights that transformers draws: at this width Pythia's are six times as large, and fp32's rounding with them."""
    config = ModelConfig(
        family=family,  # type: ignore[arg-type]
        hidden_size=32,
        layers=2,
        heads=4,
        kv_heads=2 if family == "llama" else None,
        max_positions=64,
        tie_embeddings=tied,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2_663_230_478_014_173_267)
        model: nn.Module = AutoModelForCausalLM.from_config(model_config(resolve_shape(config), VOCAB, 0), dtype=torch.float32)
    return model.to(dtype)


def make_state(model: nn.Module, clip_norm: float) -> OptimizerState:
    generator = torch.Generator().manual_seed(1)
    weights = {name: value.detach().clone() for name, value in model.named_parameters()}
    first = {name: torch.randn(value.shape, generator=generator).to(value.dtype) * 0.01 for name, value in weights.items()}
    second = {name: torch.rand(value.shape, generator=generator).to(value.dtype) * 1e-4 for name, value in weights.items()}
    decay = {name: 0.1 if value.ndim >= 2 else 0.0 for name, value in weights.items()}
    return OptimizerState(weights, first, second, decay, STEPS, LR, *BETAS, EPS, clip_norm)


def make_reference(seed: int = 2) -> LabelBatch:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, VOCAB, (12, 24), generator=generator)
    positions = torch.arange(0, tokens.numel(), 5)
    return LabelBatch(tokens, positions, torch.randint(0, VOCAB, (len(positions),), generator=generator), positions // 24)


def samples() -> torch.Tensor:
    return torch.randint(0, VOCAB, (SAMPLES, LENGTH + 1), generator=torch.Generator().manual_seed(3))


def loss_on(model: nn.Module, reference: LabelBatch) -> torch.Tensor:
    logits = model(input_ids=reference.tokens).logits.flatten(0, 1)[reference.positions]
    return nn.functional.cross_entropy(logits.double(), reference.targets)


def reference_loss(model: nn.Module, reference: LabelBatch) -> float:
    with torch.no_grad():
        return float(loss_on(model, reference))


def reference_gradient(model: nn.Module, reference: LabelBatch) -> dict[str, torch.Tensor]:
    names = dict(model.named_parameters())
    return dict(zip(names, torch.autograd.grad(loss_on(model, reference), list(names.values())), strict=True))


def part(reference: LabelBatch, stop: int, start: int = 0) -> LabelBatch:
    """Items ``start`` to ``stop``."""
    kept = (reference.items >= start) & (reference.items < stop)
    width = reference.tokens.shape[1]
    positions = reference.positions[kept] - start * width
    return LabelBatch(reference.tokens[start:stop], positions, reference.targets[kept], reference.items[kept])


def literal_steps(model: nn.Module, state: OptimizerState, windows: torch.Tensor) -> Iterator[tuple[nn.Module, dict[str, torch.Tensor]]]:
    """For each sample: a copy of the model after one step of torch's own optimizer, and the clipped gradient that it took."""
    for window in windows:
        stepped = copy.deepcopy(model)
        named = dict(stepped.named_parameters())
        groups = [{"params": [parameter], "weight_decay": state.weight_decay[name]} for name, parameter in named.items()]
        optimizer = torch.optim.AdamW(groups, lr=LR, betas=BETAS, eps=EPS)
        for name, parameter in named.items():
            optimizer.state[parameter] = {
                "step": torch.tensor(float(STEPS)),
                "exp_avg": state.exp_avg[name].clone(),
                "exp_avg_sq": state.exp_avg_sq[name].clone(),
            }
        logits = stepped(input_ids=window[None, :-1]).logits[0]
        nn.functional.cross_entropy(logits, window[1:]).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(stepped.parameters(), state.clip_norm)
        optimizer.step()
        yield stepped, {name: parameter.grad for name, parameter in named.items() if parameter.grad is not None}


Steps = Iterable[tuple[nn.Module, dict[str, torch.Tensor]]]


def influences(model: nn.Module, steps: Steps, reference: LabelBatch) -> np.ndarray:
    """The reference loss after each literal step less that before."""
    before = reference_loss(model, reference)
    return np.array([reference_loss(stepped, reference) - before for stepped, _ in steps])


def first_order(model: nn.Module, steps: Steps, gradient: dict[str, torch.Tensor]) -> np.ndarray:
    """⟨gradient, θ' − θ⟩ of each literal step."""
    before = {name: value.detach() for name, value in model.named_parameters()}
    after = [{name: value.detach() for name, value in stepped.named_parameters()} for stepped, _ in steps]
    return np.array([dot(gradient, {name: value - before[name] for name, value in one.items()}) for one in after])


def dot(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    return sum(float((first[name] * second[name]).sum()) for name in first)


def wide(state: OptimizerState) -> OptimizerState:
    """The same numbers in fp64."""

    def double(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: value.double() for name, value in values.items()}

    return dataclasses.replace(state, weights=double(state.weights), exp_avg=double(state.exp_avg), exp_avg_sq=double(state.exp_avg_sq))


def padded(reference: LabelBatch, width: int) -> LabelBatch:
    """The same items, padded on the right."""
    length = reference.tokens.shape[1]
    tokens = nn.functional.pad(reference.tokens, (0, width - length))
    return LabelBatch(tokens, reference.positions + reference.positions // length * (width - length), reference.targets, reference.items)


METHODS = ("exact", "linear", "centred", "frozen", "sgd", "corrected")


def calibration() -> list[torch.Tensor]:
    """The samples that means are taken over."""
    return [samples()[:8], samples()[8:12]]


def make(
    model: nn.Module,
    state: OptimizerState,
    references: Sequence[LabelBatch],
    *,
    generic: bool = False,
    products: torch.dtype | None = None,
) -> Setting:
    batches = [[reference] for reference in references]
    return make_setting(copy.deepcopy(model), state, batches, calibration(), generic=generic, products=products)


def make_prober(setting: Setting) -> Prober:
    """All methods; ``corrected`` is exact on the first three items of each reference."""
    return Prober(setting, [[part(batches[0], 3)] for batches in setting.oracle.references], 8)


def scores(setting: Setting, estimate: Estimate, windows: torch.Tensor, size: int = 8) -> np.ndarray:
    """[n, R], in batches of ``size``."""
    rows = []
    for some in torch.split(windows, size):
        batch, _, factors = setting.run(some)
        rows.append(estimate(batch, factors))
    return torch.cat(rows).numpy()
