"""A checkpoint opened for probing: influences of samples by any method, a fixed chunk of samples at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch

from mates.engine.config import ProbeMethod
from mates.engine.probe.methods import Corrected, Estimate, Exact, Frozen, Linear, Setting, Sgd, mean_step
from mates.engine.probe.oracle import Batches

ESTIMATES: tuple[ProbeMethod, ...] = ("frozen", "linear", "centred", "corrected")
"""From the cheapest on; ``exact`` costs more than any."""

Windows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Probed:
    """Of n samples: influences in nats by method [n, R]; exact ones on either half of each reference [n, R, 2], where asked for; each
    sample's mean loss and gradient norm [n]. float64."""

    influences: Mapping[str, npt.NDArray[np.float64]]
    halves: npt.NDArray[np.float64] | None
    losses: npt.NDArray[np.float64]
    norms: npt.NDArray[np.float64]


class Prober:
    """Methods at one checkpoint; what a method needs beforehand is computed when it is first asked for."""

    def __init__(self, setting: Setting, subset: Sequence[Batches], micro_batch_size: int) -> None:
        """Take the checkpoint, the batches of each reference's subset (for ``corrected``), and samples in one pass."""
        self._setting, self._subset, self._size = setting, subset, micro_batch_size
        self._made: dict[str, Estimate] = {}

    @cached_property
    def exact(self) -> Exact:
        """The exact method."""
        return Exact(self._setting)

    @cached_property
    def _gradients(self) -> dict[str, torch.Tensor]:
        return self._setting.oracle.gradients(self._setting.state.weights)

    def estimate(self, method: str) -> Estimate:
        """A method by name: one of ``exact``, ``linear``, ``centred``, ``frozen``, ``corrected``; and ``sgd`` to compare with."""
        if method not in self._made:
            self._made[method] = self._make(method)
        return self._made[method]

    def _make(self, method: str) -> Estimate:
        setting = self._setting
        if method == "exact":
            return self.exact
        if method == "linear":
            return Linear(setting, self._gradients)
        if method == "centred":
            return Linear(setting, setting.oracle.gradients(mean_step(setting)))
        if method == "frozen":
            return Frozen(setting, self._gradients)
        if method == "corrected":
            return Corrected(setting, self._gradients, self._subset)
        assert method == "sgd", method
        return Sgd(setting, self._gradients)

    def probe(self, windows: Windows, methods: Sequence[str], *, halves: bool = False) -> Probed:
        """Influences of samples [n, L + 1] by several methods.

        Args:
            windows: a chunk; the same samples in the same order give the same bits.
            methods: names as in :meth:`estimate`.
            halves: whether exact influences on either half of the references are wanted.
        """
        device = next(iter(self._setting.state.weights.values())).device
        influences: dict[str, list[torch.Tensor]] = {method: [] for method in methods}
        halved, losses, norms = [], [], []
        for start in range(0, len(windows), self._size):
            batch, norm, factors = self._setting.run(torch.from_numpy(windows[start : start + self._size]).to(device))
            for method in methods:
                if method == "exact" and halves:
                    whole, parts = self.exact.halves(batch, factors)
                    halved.append(parts)
                else:
                    whole = self.estimate(method)(batch, factors)
                influences[method].append(whole)
            losses.append(batch.losses.double())
            norms.append(norm)
        return Probed(
            {method: _numpy(values) for method, values in influences.items()},
            _numpy(halved) if halved else None,
            _numpy(losses),
            _numpy(norms),
        )


def _numpy(values: Sequence[torch.Tensor]) -> npt.NDArray[np.float64]:
    joined: npt.NDArray[np.float64] = torch.cat(list(values)).cpu().numpy()
    return joined
