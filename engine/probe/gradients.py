"""What probes ask of per-sample gradients: norms, dots with directions, and dots of the AdamW updates that they cause.

Legend: K samples, T tokens, D width, V vocabulary, U different tokens of a sample, R directions.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from mates.engine.pretrain.checkpoint import OptimizerState
from mates.engine.pretrain.model import at_least_fp32
from mates.engine.probe.taps import Contributions, TappedBatch
from mates.kernels.adamw import AdamWStep
from mates.kernels.adamw.reference import adam_update
from mates.kernels.grad_norm import squared_norms
from mates.kernels.update_dots import direction_dots, update_dots

Directions = Mapping[str, torch.Tensor]
"""By parameter name: [R, …], R directions in the parameter's shape."""


def step_of(state: OptimizerState) -> AdamWStep:
    """The optimizer step that a probe takes."""
    return AdamWStep(t=state.t + 1, lr=state.next_lr, beta1=state.beta1, beta2=state.beta2, eps=state.eps)


def gradient(batch: TappedBatch, weight: torch.Tensor, name: str, k: int) -> torch.Tensor:
    """The gradient of sample ``k`` by one parameter, before clipping; in the shape and dtype of its ``weight``."""
    parts = batch.gradients[name]
    if len(parts.whole) == 1 and not (parts.dense or parts.rows):
        return parts.whole[0][k]
    total = torch.zeros_like(weight)
    for inputs, grads in parts.dense:
        total += grads[k].flatten(0, -2).T @ inputs[k].flatten(0, -2)
    for ids, grads in parts.rows:
        tokens, sums = _row_sums(ids[k], grads[k])
        total[tokens] += sums
    for whole in parts.whole:
        total += whole[k]
    return total


def squared_gradient_norms(batch: TappedBatch) -> torch.Tensor:
    """‖h_k‖² over all parameters: [K] float64."""
    return torch.stack([_squared_norms(parts) for parts in batch.gradients.values()]).sum(0)


def clip_factors(norms: torch.Tensor, clip_norm: float) -> torch.Tensor:
    """min(1, c / (‖h‖ + 1e-6)), as ``torch.nn.utils.clip_grad_norm_`` and DeepSpeed scale."""
    return torch.clamp(clip_norm / (norms + 1e-6), max=1.0)


def _squared_norms(parts: Contributions) -> torch.Tensor:
    """[K] float64. Dense and row parts of one matrix (tied embeddings) have a cross term: ‖D + R‖² = ‖D‖² + 2⟨D, R⟩ + ‖R‖²."""
    assert max(len(parts.dense), len(parts.rows)) <= 1
    assert not (parts.whole and (parts.dense or parts.rows))
    if parts.whole:
        return sum(parts.whole[1:], parts.whole[0]).flatten(1).double().square().sum(1)
    total = sum(squared_norms(inputs, grads).double() for inputs, grads in parts.dense)
    for ids_KT, grads_KTD in parts.rows:
        rows = [_row_sums(ids, grads) for ids, grads in zip(ids_KT, grads_KTD, strict=True)]
        total = total + torch.stack([sums.double().square().sum() for _, sums in rows])
        for inputs_KTD, grads_KTV in parts.dense:
            cross = [
                ((inputs_TD @ sums_UD.T.to(inputs_TD.dtype)).double() * grads_TV[:, tokens]).sum()
                for (tokens, sums_UD), inputs_TD, grads_TV in zip(rows, inputs_KTD, grads_KTV, strict=True)
            ]
            total = total + 2 * torch.stack(cross)
    assert isinstance(total, torch.Tensor)
    return total


def _row_sums(ids_T: torch.Tensor, grads_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The different ids [U] and the summed gradient of each [U, D]."""
    ids_U, place_T = torch.unique(ids_T, return_inverse=True)
    if grads_TD.is_cuda:  # index_add_ adds in any order there
        is_at_UT = place_T == torch.arange(len(ids_U), device=place_T.device)[:, None]
        return ids_U, is_at_UT.to(grads_TD.dtype) @ grads_TD
    return ids_U, grads_TD.new_zeros(len(ids_U), grads_TD.shape[1]).index_add_(0, place_T, grads_TD)


def gradient_dots(batch: TappedBatch, directions: Directions) -> torch.Tensor:
    """⟨d_r, h_k⟩ over all parameters, one GEMM a layer and direction: [K, R] float64."""
    total: list[torch.Tensor] = []
    for name, parts in batch.gradients.items():
        for whole in parts.whole:
            total.append(whole.flatten(1).double() @ directions[name].flatten(1).double().T)
        for inputs_KTI, grads_KTO in parts.dense:
            wide_KTO, dots = at_least_fp32(grads_KTO), []
            for one_OI in directions[name]:
                moved_KTO = at_least_fp32(torch.einsum("kti,oi->kto", inputs_KTI, one_OI.to(inputs_KTI.dtype)))
                dots.append(torch.linalg.vecdot(moved_KTO, wide_KTO).double().sum(-1))
            total.append(torch.stack(dots, 1))
        for ids_KT, grads_KTD in parts.rows:
            dots = [(one_VD[ids_KT] * grads_KTD).sum(-1).double().sum(-1) for one_VD in directions[name]]
            total.append(torch.stack(dots, 1))
    return torch.stack(total).sum(0)


class UpdateDots:
    """⟨d_r, u_k⟩, u_k the AdamW update of sample k's clipped gradient without weight decay, for directions that stay the same."""

    def __init__(self, state: OptimizerState, directions: Directions) -> None:
        """Take the checkpoint's state and the directions. The update of rows that a sample's tokens do not touch is computed once."""
        self._state, self._directions, self._step = state, directions, step_of(state)
        self._idle: dict[str, torch.Tensor] = {}

    def __call__(self, batch: TappedBatch, factors_K: torch.Tensor) -> torch.Tensor:
        """[K, R] float64, summed over all parameters. ``factors_K`` float64: what clipping multiplies the gradients with."""
        return torch.stack([self._of(name, parts, batch, factors_K) for name, parts in batch.gradients.items()]).sum(0)

    def _of(self, name: str, parts: Contributions, batch: TappedBatch, factors_K: torch.Tensor) -> torch.Tensor:
        moments = self._state.exp_avg[name], self._state.exp_avg_sq[name]
        directions = self._directions[name]
        if len(parts.dense) == 1 and not (parts.rows or parts.whole):
            inputs, grads = parts.dense[0]
            return update_dots(inputs, grads, factors_K.to(moments[0].dtype), *moments, directions, self._step).double()
        if len(parts.rows) == 1 and not (parts.dense or parts.whole):
            return self._of_rows(name, *parts.rows[0], factors_K)
        rows = []
        for k, factor in enumerate(factors_K):
            update = adam_update(*moments, gradient(batch, moments[0], name, k), factor, self._step)
            rows.append(direction_dots(directions, update))
        return torch.stack(rows)

    def _of_rows(self, name: str, ids_KT: torch.Tensor, grads_KTD: torch.Tensor, factors_K: torch.Tensor) -> torch.Tensor:
        first, second, directions = self._state.exp_avg[name], self._state.exp_avg_sq[name], self._directions[name]
        if name not in self._idle:
            idle = adam_update(first, second, torch.zeros_like(first), factors_K.new_ones(()), self._step)
            self._idle[name] = torch.linalg.vecdot(directions, idle).double()  # [R, V]
        idle_RV, rows = self._idle[name], []
        whole_R = idle_RV.sum(1)
        for ids_T, grads_TD, factor in zip(ids_KT, grads_KTD, factors_K, strict=True):
            ids_U, sums_UD = _row_sums(ids_T, grads_TD)
            update = adam_update(first[ids_U], second[ids_U], sums_UD, factor, self._step)
            rows.append(whole_R - idle_RV[:, ids_U].sum(1) + direction_dots(directions[:, ids_U], update))
        return torch.stack(rows)
