"""Probing a model that fits on no single device: every rank of a group holds some rows of each weight, moment and direction.

All ranks run the same samples. A layer's whole weight exists while the layer runs, gathered from the ranks; each rank then takes the
gradients of its own rows, B_k[:, rows]ᵀA_k, and norms and dots are summed over the ranks. No gradient is ever sent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from mates.engine.probe.taps import Contributions, TappedBatch, layers_of


@dataclass(frozen=True)
class Rows:
    """Which rows (indices of the first dimension) a rank holds: even shares in the order of the ranks."""

    rank: int
    size: int

    def bounds(self, rows: int) -> tuple[int, int]:
        """First row and one past the last, of so many."""
        return rows * self.rank // self.size, rows * (self.rank + 1) // self.size

    def of(self, value: torch.Tensor) -> torch.Tensor:
        """This rank's rows of a whole tensor."""
        start, stop = self.bounds(len(value))
        return value[start:stop]


@dataclass
class Shards:
    """A model's layers, which are given their weights when they run."""

    model: nn.Module
    rows: Rows
    group: Any = None
    """The process group; the default one where None."""
    _held: Mapping[str, torch.Tensor] = field(default_factory=dict)
    _whole: dict[str, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Take away the model's weights, whose storage comes and goes from now on."""
        parameters: dict[str, nn.Parameter] = {}
        for _, module, own in layers_of(self.model):
            for own_name, name in own.items():
                if name not in parameters:
                    parameter = module.get_parameter(own_name)
                    whole = torch.empty(parameter.shape, dtype=parameter.dtype, device=self.device)
                    whole.untyped_storage().resize_(0)
                    self._whole[name], parameters[name] = whole, nn.Parameter(whole, requires_grad=False)
                setattr(module, own_name, parameters[name])
            module.register_forward_pre_hook(self._before(list(own.values())))
            module.register_forward_hook(self._after(list(own.values())), always_call=True)

    @property
    def device(self) -> torch.device:
        """Where the layers run: that of the model's buffers."""
        return next(self.model.buffers()).device

    def hold(self, weights: Mapping[str, torch.Tensor]) -> None:
        """From now on layers run with these weights: this rank's rows by parameter name."""
        self._held = weights

    def reduce(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks."""
        values = values.clone()
        dist.all_reduce(values, group=self.group)
        return values

    def restrict(self, batch: TappedBatch) -> TappedBatch:
        """The same gradients by this rank's rows alone; parameters of which it has none are left out."""
        gradients = {}
        for name, parts in batch.gradients.items():
            start, stop = self.rows.bounds(len(self._whole[name]))
            if start < stop:
                gradients[name] = Contributions(
                    dense=[(inputs, grads[..., start:stop]) for inputs, grads in parts.dense],
                    rows=[_own_rows(ids, grads, start, stop) for ids, grads in parts.rows],
                    whole=[value[:, start:stop] for value in parts.whole],
                )
        return TappedBatch(batch.losses, gradients)

    # --- whole weights, while they are needed

    def _before(self, names: list[str]) -> Any:
        def gather(*_: Any) -> None:
            for name in names:
                self._gather(name)

        return gather

    def _after(self, names: list[str]) -> Any:
        def release(*_: Any) -> None:
            for name in names:
                self._whole[name].untyped_storage().resize_(0)

        def on_forward(_: nn.Module, arguments: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            release()
            inputs = arguments[0]
            if isinstance(output, torch.Tensor) and output.requires_grad and inputs.requires_grad:
                # the gradient by the input needs the weight again
                output.register_hook(self._before(names))  # type: ignore[no-untyped-call]
                inputs.register_hook(release)  # type: ignore[no-untyped-call]

        return on_forward

    def _gather(self, name: str) -> None:
        whole = self._whole[name].data  # autograd keeps this tensor, and need not know that its contents went and came
        if whole.untyped_storage().size():
            return
        whole.untyped_storage().resize_(whole.numel() * whole.element_size())
        own, bounds = self._held[name], [Rows(rank, self.rows.size).bounds(len(whole)) for rank in range(self.rows.size)]
        pieces = [whole[start:stop] for start, stop in bounds]
        if len({len(piece) for piece in pieces}) == 1:
            dist.all_gather(pieces, own.contiguous(), group=self.group)
        else:
            longest = max(len(piece) for piece in pieces)
            padded = own.new_zeros(longest, *own.shape[1:])
            padded[: len(own)] = own
            received = [torch.empty_like(padded) for _ in pieces]
            dist.all_gather(received, padded, group=self.group)
            for piece, values in zip(pieces, received, strict=True):
                piece.copy_(values[: len(piece)])


def _own_rows(ids: torch.Tensor, grads: torch.Tensor, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids counted from the first own row; gradients of other rows are zero, and go to row 0."""
    is_own = (ids >= start) & (ids < stop)
    return torch.where(is_own, ids - start, 0), grads * is_own[..., None]
