"""Pictures of results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from mates.preprocess import artifact

STYLE: dict[str, Any] = {"font.size": 9}


def save_figure(figure: Figure, folder: Path, name: str) -> None:
    """Write NAME.png and NAME.svg, the same bytes for the same figure."""
    options: dict[str, dict[str, Any]] = {"png": {"dpi": 150}, "svg": {"metadata": {"Date": None}}}
    with mpl.rc_context(STYLE | {"svg.hashsalt": name}):
        for suffix, more in options.items():
            with artifact.atomic_file(folder / f"{name}.{suffix}") as handle:
                figure.savefig(handle, format=suffix, **more)
