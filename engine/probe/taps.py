"""Gradients of each sample of a batch from one forward and one backward pass, without forming them.

A layer's weight gradient for sample k is B_kᵀA_k: A_KTI what went into it, B_KTO the gradient of the sample's loss by what came out.
Taps keep A and B; what is asked of the gradient (its norm, dots of the update it causes) is then computed from them a tile at a time.
No weight gradient is computed by autograd, so the passes cost 4·N·T operations a sample instead of 6·N·T.

Legend: K samples, T tokens, I in, O out, D width, V vocabulary, R directions.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from mates.engine.pretrain.model import at_least_fp32, next_token_loss, token_losses

Tensors = Mapping[str, torch.Tensor]


class UnsupportedLayerError(ValueError):
    """A layer whose per-sample gradients the taps cannot give; the generic method can."""


@dataclass(slots=True)
class Contributions:
    """What makes up the per-sample gradients of one parameter: the sum of these, where several are given.

    ``dense`` A_KTI and B_KTO: B_kᵀA_k. ``rows`` ids_KT and B_KTD: row ids[k, t] gets B[k, t]. ``whole`` [K, …]: the gradients themselves.
    """

    dense: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    rows: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    whole: list[torch.Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class TappedBatch:
    """``losses`` [K], each sample's mean loss in nats, and its gradients by parameter name."""

    losses: torch.Tensor
    gradients: Mapping[str, Contributions]


def autocast(model: nn.Module, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    """Matrix products in ``dtype`` where it is given; weights and sums stay as they are."""
    return torch.autocast(next(model.parameters()).device.type, dtype) if dtype else nullcontext()


class Autograd:
    """The gradients of any model, sample by sample: slower than :class:`Taps`, and each sample's whole gradient is held."""

    def __init__(self, model: nn.Module, products: torch.dtype | None = None) -> None:
        """Take a model whose parameters are the weights that are probed; ``products``: see :func:`autocast`."""
        self._model, self._products = model, products

    def run(self, windows: torch.Tensor) -> TappedBatch:
        """See :meth:`Taps.run`."""
        named = {name: parameter for name, parameter in self._model.named_parameters() if parameter.requires_grad}
        losses, rows = [], []
        for window in windows:
            with torch.enable_grad(), autocast(self._model, self._products):
                loss = next_token_loss(self._model, window[None])
            rows.append(torch.autograd.grad(loss, list(named.values())))
            losses.append(loss.detach())
        gradients = {name: Contributions(whole=[torch.stack(grads)]) for name, grads in zip(named, zip(*rows, strict=True), strict=True)}
        return TappedBatch(torch.stack(losses), gradients)


class Taps:
    """Listens at the layers of a model: linear layers, embeddings and norms, of GPT-NeoX, Llama and whatever is made of the same."""

    def __init__(self, model: nn.Module, products: torch.dtype | None = None) -> None:
        """Take a model whose parameters are the weights that are probed; ``products``: see :func:`autocast`.

        Raises:
            UnsupportedLayerError: a layer of another kind has parameters of its own.
        """
        self._model, self._products = model, products
        self._layers: list[tuple[nn.Module, nn.Module, dict[str, str]]] = []
        for name, module, own in layers_of(model):
            if not _is_known(module, own):
                raise UnsupportedLayerError(
                    f"layer {name or 'model'} ({type(module).__name__}) with parameters {', '.join(own)}: its gradients cannot be tapped; "
                    "found no linear layer, embedding or norm. Set probe.generic to probe this model sample by sample"
                )
            plain = module if isinstance(module, nn.Linear | nn.Embedding) else _plain_norm(module)
            self._layers.append((module, plain, own))

    def run(self, windows: torch.Tensor) -> TappedBatch:
        """Forward and backward over samples [K, T + 1] int64. Parameters get no gradients."""

        def losses() -> torch.Tensor:
            return token_losses(self._model, windows).mean(1)

        return self.listen(losses)

    def listen(self, forward: Callable[[], torch.Tensor]) -> TappedBatch:
        """Forward by a function that gives losses [K], and backward from their sum."""
        gradients: dict[str, Contributions] = {}
        wanted = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        with ExitStack() as stack:
            for parameter in wanted:
                parameter.requires_grad_(False)
                stack.callback(parameter.requires_grad_)
            for module, plain, names in self._layers:
                stack.callback(module.register_forward_hook(_listener(plain, names, gradients)).remove)
            with torch.enable_grad():
                with autocast(self._model, self._products):
                    losses = forward()
                losses.sum().backward()  # type: ignore[no-untyped-call]
        return TappedBatch(losses.detach(), gradients)


def layers_of(model: nn.Module) -> list[tuple[str, nn.Module, dict[str, str]]]:
    """Layers that have parameters of their own: name, layer, and by own names those of the whole model; of tied parameters the first."""
    stored = {id(parameter): name for name, parameter in model.named_parameters()}
    layers = [
        (name, module, {own_name: stored[id(parameter)] for own_name, parameter in module.named_parameters(recurse=False)})
        for name, module in model.named_modules()
    ]
    return [layer for layer in layers if layer[2]]


def one_sample(batch: TappedBatch) -> TappedBatch:
    """The gradients of a batch as those of one sample with all its tokens, which gives their sum."""
    gradients = {
        name: Contributions(
            dense=[(inputs.flatten(0, -2)[None], grads.flatten(0, -2)[None]) for inputs, grads in parts.dense],
            rows=[(ids.flatten()[None], grads.flatten(0, -2)[None]) for ids, grads in parts.rows],
            whole=[value.sum(0, keepdim=True) for value in parts.whole],
        )
        for name, parts in batch.gradients.items()
    }
    return TappedBatch(batch.losses, gradients)


def _summed(values: torch.Tensor) -> torch.Tensor:
    """[K, …, D] summed to [K, D], in fp32 at least."""
    values = at_least_fp32(values)
    return values if values.ndim == 2 else values.flatten(1, -2).sum(1)


def _is_known(module: nn.Module, own: Mapping[str, str]) -> bool:
    if isinstance(module, nn.Linear):
        return True
    if isinstance(module, nn.Embedding):
        return module.max_norm is None and not module.scale_grad_by_freq
    is_vector = all(parameter.ndim == 1 for parameter in module.parameters(recurse=False))
    return type(module).__name__.endswith("Norm") and set(own) <= {"weight", "bias"} and is_vector


def _plain_norm(module: nn.Module) -> nn.Module:
    """A norm that normalises only: weight one, bias zero. Without the hooks of the one it is made from."""
    plain = copy.copy(module)
    fills = {"weight": torch.ones_like, "bias": torch.zeros_like}
    parameters = {name: nn.Parameter(fills[name](value), requires_grad=False) for name, value in module.named_parameters()}
    plain.__dict__ = module.__dict__ | {"_parameters": parameters, "_forward_hooks": OrderedDict(), "_forward_pre_hooks": OrderedDict()}
    return plain


def _listener(module: nn.Module, names: Mapping[str, str], gradients: dict[str, Contributions]) -> Any:
    """A forward hook; ``module`` is the layer, or of a norm its plain copy."""

    def of(own_name: str) -> Contributions:
        return gradients.setdefault(names[own_name], Contributions())

    def on_forward(_: nn.Module, arguments: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        inputs = arguments[0].detach()
        if isinstance(module, nn.Linear):
            inputs = inputs.to(output.dtype)  # what the product was made of, under autocast
        if not output.requires_grad:  # the first layer: nothing before it wants a gradient
            output.requires_grad_()
        output.register_hook(lambda grads: on_backward(inputs, grads))  # type: ignore[no-untyped-call]

    def on_backward(inputs: torch.Tensor, grads: torch.Tensor) -> None:
        if isinstance(module, nn.Linear):
            of("weight").dense.append((inputs, grads))
        elif isinstance(module, nn.Embedding):
            if module.padding_idx is not None:  # its row gets no gradient
                grads = grads.masked_fill((inputs == module.padding_idx)[..., None], 0.0)
            of("weight").rows.append((inputs, grads))
        else:
            of("weight").whole.append(_summed(at_least_fp32(grads) * module(at_least_fp32(inputs))))
        if "bias" in names:
            of("bias").whole.append(_summed(grads))

    return on_forward
