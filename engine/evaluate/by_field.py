"""Values of a metadata field of documents, token by token."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from mates.engine.data.corpus import Corpus
from mates.engine.select.domains import metadata_values

NONE = "(none)"  # documents without a value


class DocumentValues:
    """The value of a field for every document of a corpus."""

    def __init__(self, corpus: Corpus, field: str) -> None:
        """Read the field. RecipeError where the corpus does not keep it."""
        self._corpus, self.field = corpus, field
        numbers: dict[str, int] = {}
        self._codes = []
        for folder, _ in corpus.parts:
            values = [value for part in metadata_values(folder, field, "evaluate.by") for value in part.to_pylist()]
            codes = [numbers.setdefault(NONE if value is None else value, len(numbers)) for value in values]
            self._codes.append(np.array(codes, np.int64))
        self.names = list(numbers)
        """The different values, in the order of the documents."""

    def of_targets(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Numbers in ``names`` of the values of the tokens that samples [n] predict: [n, L]."""
        parts, documents = self._corpus.documents_of_targets(ids)
        found = np.empty_like(documents)
        for part in np.unique(parts):
            found[parts == part] = self._codes[part][documents[parts == part]]
        return found
