"""Exact probes against a literal torch.optim.AdamW step with clip_grad_norm_ and re-evaluation."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from mates.engine.config import ModelConfig
from mates.engine.pretrain.checkpoint import OptimizerState
from mates.engine.pretrain.model import build_model, model_config
from mates.engine.pretrain.shapes import resolve_shape
from mates.engine.probe.exact import ExactProbe
from mates.engine.reference.batches import LabelBatch

VOCAB, LENGTH, SAMPLES = 128, 32, 64
BETAS, EPS, LR, STEPS = (0.9, 0.95), 1e-8, 1e-3, 7


def make_model(family: str, tied: bool, dtype: torch.dtype) -> nn.Module:
    config = ModelConfig(
        family=family,  # type: ignore[arg-type]
        hidden_size=32,
        layers=2,
        heads=4,
        kv_heads=2 if family == "llama" else None,
        max_positions=64,
        tie_embeddings=tied,
    )
    return build_model(model_config(resolve_shape(config), VOCAB, 0), seed=0).to(dtype)


def make_state(model: nn.Module, clip_norm: float) -> OptimizerState:
    generator = torch.Generator().manual_seed(1)
    weights = {name: value.detach().clone() for name, value in model.named_parameters()}
    first = {name: torch.randn(value.shape, generator=generator).to(value.dtype) * 0.01 for name, value in weights.items()}
    second = {name: torch.rand(value.shape, generator=generator).to(value.dtype) * 1e-4 for name, value in weights.items()}
    decay = {name: 0.1 if value.ndim >= 2 else 0.0 for name, value in weights.items()}
    return OptimizerState(weights, first, second, decay, STEPS, LR, *BETAS, EPS, clip_norm)


def make_reference() -> LabelBatch:
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(0, VOCAB, (12, 24), generator=generator)
    positions = torch.arange(0, tokens.numel(), 5)
    return LabelBatch(tokens, positions, torch.randint(0, VOCAB, (len(positions),), generator=generator), positions // 24)


def samples() -> torch.Tensor:
    return torch.randint(0, VOCAB, (SAMPLES, LENGTH + 1), generator=torch.Generator().manual_seed(3))


def reference_loss(model: nn.Module, reference: LabelBatch) -> float:
    with torch.no_grad():
        logits = model(input_ids=reference.tokens).logits.flatten(0, 1)[reference.positions]
        return float(nn.functional.cross_entropy(logits.double(), reference.targets))


def brute_force(model: nn.Module, state: OptimizerState, reference: LabelBatch, windows: torch.Tensor) -> np.ndarray:
    """Influences by copying the model, one step of torch's own optimizer, and evaluating again."""
    values = []
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
        values.append(reference_loss(stepped, reference) - reference_loss(model, reference))
    return np.array(values)


@pytest.mark.parametrize("family", ["gpt_neox", "llama"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("clip_norm", [0.5, 1e3])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-9), (torch.float32, 1e-3)])
def test_equals_a_literal_step(family: str, tied: bool, clip_norm: float, dtype: torch.dtype, bound: float) -> None:
    model = make_model(family, tied, dtype)
    state, reference, windows = make_state(model, clip_norm), make_reference(), samples()
    probe = ExactProbe(model, state, [reference])
    found = np.array([probe.probe(window).influence_nats for window in windows])
    # fp32 is measured against fp64: both start from the same fp32 numbers
    exact_model = copy.deepcopy(model).double()
    exact = (
        brute_force(exact_model, make_state(model, clip_norm), reference, windows)
        if dtype == torch.float64
        else brute_force(exact_model, _double(state), reference, windows)
    )
    assert np.abs(found - exact).max() <= bound * exact.std()


def _double(state: OptimizerState) -> OptimizerState:
    def wide(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: value.double() for name, value in values.items()}

    return OptimizerState(
        wide(state.weights),
        wide(state.exp_avg),
        wide(state.exp_avg_sq),
        state.weight_decay,
        state.t,
        state.next_lr,
        *BETAS,
        EPS,
        state.clip_norm,
    )


def test_nothing_is_touched() -> None:
    model = make_model("gpt_neox", False, torch.float32)
    state = make_state(model, 1.0)
    before = copy.deepcopy((state, dict(model.named_parameters())))
    generator = torch.get_rng_state()
    probe = ExactProbe(model, state, [make_reference()])
    probe.probe_all(samples()[:4].numpy(), torch.device("cpu"))
    for now, old in (
        (state.weights, before[0].weights),
        (state.exp_avg, before[0].exp_avg),
        (state.exp_avg_sq, before[0].exp_avg_sq),
    ):
        assert all(torch.equal(now[name], old[name]) for name in old)
    assert all(torch.equal(parameter, before[1][name]) for name, parameter in model.named_parameters())
    assert torch.equal(torch.get_rng_state(), generator)


def test_order_and_company_change_no_bit() -> None:
    model = make_model("llama", False, torch.float32)
    probe = ExactProbe(model, make_state(model, 1.0), [make_reference()])
    windows = samples()[:6].numpy()
    forward = [result.influence_nats for result in probe.probe_all(windows, torch.device("cpu"))]
    backward = [result.influence_nats for result in probe.probe_all(windows[::-1], torch.device("cpu"))]
    assert forward == backward[::-1]


def test_sample_loss_and_norm_are_the_models_own() -> None:
    model = make_model("gpt_neox", False, torch.float64)
    probe = ExactProbe(model, make_state(model, 1.0), [make_reference()])
    window = samples()[0]
    result = probe.probe(window)
    loss = nn.functional.cross_entropy(model(input_ids=window[None, :-1]).logits[0], window[1:])
    loss.backward()  # type: ignore[no-untyped-call]
    norm = nn.utils.get_total_norm([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    assert result.sample_loss_nats == pytest.approx(loss.item(), rel=1e-12)
    assert result.grad_norm == pytest.approx(float(norm), rel=1e-12)
