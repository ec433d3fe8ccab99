"""Which domain a sample belongs to, for floors and caps of a selection."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mates.engine.config import RecipeError, SelectConfig
from mates.engine.data.corpus import Corpus
from mates.preprocess import artifact
from mates.preprocess.join import METADATA_FOLDER

OTHER = -1
EXAMPLES = 5
_HOST = r"^(?:[A-Za-z][A-Za-z0-9+.-]*://)?(?:[^/?#@]*@)?([^/?#:]*).*$"


class Domains:
    """Numbers of the domains that a recipe limits, by document; all others are ``OTHER``."""

    def __init__(self, corpus: Corpus, config: SelectConfig) -> None:
        """Read the domains of all documents of a corpus.

        Raises:
            RecipeError: the corpus does not keep the field, or no document is of a domain that is limited.
        """
        assert config.domains is not None
        self._corpus, self.names = corpus, sorted(config.floors | config.caps)
        found, others = np.zeros(len(self.names), np.int64), dict[str, None]()
        self._codes = []
        for folder, _ in corpus.parts:
            codes = []
            for values in metadata_values(folder, config.domains, "select.domains"):
                own = pc.fill_null(pc.index_in(values, value_set=pa.array(self.names, pa.string())), OTHER).to_numpy(zero_copy_only=False)
                codes.append(own.astype(np.int16))
                if len(others) < EXAMPLES:
                    others |= dict.fromkeys(str(value) for value in values.slice(0, 100).to_pylist() if value is not None)
                found += np.bincount(own[own >= 0], minlength=len(self.names))
            self._codes.append(np.concatenate(codes))
        if not found.all():
            missing = self.names[int(np.flatnonzero(found == 0)[0])]
            which = "floors" if missing in config.floors else "caps"
            raise RecipeError(
                f"select.{which}.{missing}: found no document of the train corpus with this {config.domains}, expected one of its values, "
                f"such as {', '.join(list(others)[:EXAMPLES]) or 'none: the field is empty'}"
            )

    def of(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int16]:
        """Domains of samples [n], by number: that of the document that a sample's first token belongs to."""
        parts, documents = self._corpus.documents_of(ids)
        domains = np.empty(len(ids), np.int16)
        for part in np.unique(parts):
            domains[parts == part] = self._codes[part][documents[parts == part]]
        return domains


def metadata_values(folder: Path, name: str, setting: str) -> list[pa.Array]:
    """Values of a metadata field of a corpus' documents as strings or nulls, file by file; of ``url`` the host names.

    Raises:
        RecipeError: the corpus does not keep the field that ``setting`` names.
    """
    files = sorted(file for file in artifact.load(folder, "corpus").files if file.startswith(f"{METADATA_FOLDER}/"))
    known = pq.read_schema(folder / files[0]).names
    if name not in known:
        raise RecipeError(f"{setting}: found {name!r}, expected a field that {folder} keeps: {', '.join(known)}")
    values = [pq.read_table(folder / file, columns=[name])[name].combine_chunks().cast(pa.string()) for file in files]
    return [_host(part) for part in values] if name == "url" else values


def _host(urls: pa.Array) -> pa.Array:
    return pc.utf8_lower(pc.replace_substring_regex(urls, _HOST, r"\1"))
