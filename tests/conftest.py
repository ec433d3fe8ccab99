"""What several test files share: real data where it is there, a small text source, and a trained tokenizer."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

from mates.preprocess.tokenizer import make_tokenizer

if TYPE_CHECKING:
    from mates.engine.distributed import World

# The time an example takes says nothing on a shared machine; everything else is Hypothesis' default.
settings.register_profile("mates", deadline=None)
settings.load_profile("mates")

SHARED_DATA = Path(__file__).parents[1].parent / "shared" / "data"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first: where two run side by side, one that begins last would be waited for."""
    items.sort(key=lambda item: not {"launchers", "benchmarks"} & set(item.path.parts))


def shared(name: str) -> Path:
    """A file or folder of the shared data; skips the test where it is not there."""
    path = SHARED_DATA / name
    if not path.exists():
        pytest.skip(f"the shared data folder beside the checkout has no {name}")
    return path


@pytest.fixture(scope="session")
def one_rank() -> Iterator[tuple[World, dict[str, str]]]:
    """This process as the only rank, joined once: DeepSpeed cannot meet twice in a process. And the variables of that rank."""
    from mates.engine import distributed
    from mates.engine.ranks import free_port

    variables = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        world = distributed.join(timeout_minutes=2, threads=1)
    yield world, variables
    distributed.leave()


@pytest.fixture(scope="module")
def world(one_rank: tuple[World, dict[str, str]]) -> Iterator[World]:
    """The only rank, with its variables while the module's tests run; processes of other tests must not take themselves for it."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in one_rank[1].items():
            patch.setenv(name, value)
        yield one_rank[0]


@pytest.fixture(scope="session")
def neox_tokenizer() -> Path:
    """Folder of the GPT-NeoX (Pythia) tokenizer."""
    return shared("tokenizers/gpt-neox")


@pytest.fixture(scope="session")
def c4_file() -> Path:
    """3,686 documents of C4."""
    return shared("web/c4.jsonl.zst")


@pytest.fixture(scope="session")
def lambada_file() -> Path:
    """The 5,153 passages of LAMBADA's test set in OpenAI's form."""
    return shared("lambada/lambada_test.jsonl")


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """600 documents of made-up words with a skewed distribution, line ends, digits and a few letters beyond ASCII."""
    source = random.Random(20_240_607)
    syllables = ["ba", "de", "ki", "lo", "mu", "ra", "se", "ti", "vo", "ny", "é", "ß", "日", "q", "th", "er"]
    words = ["".join(source.choices(syllables, k=source.randint(1, 4))) for _ in range(400)]
    weights = [1 / (rank + 1) for rank in range(len(words))]
    documents = []
    for number in range(600):
        drawn = source.choices(words, weights, k=source.randint(5, 120))
        lines = [" ".join(drawn[start : start + 15]) for start in range(0, len(drawn), 15)]
        documents.append(f"{number}. " + ".\n".join(lines) + "!")
    return documents


@pytest.fixture(scope="session")
def bpe_dir(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    """A byte-level BPE tokenizer artifact of 500 entries trained on ``texts``."""
    directory = tmp_path_factory.mktemp("tokenizer") / "bpe"
    make_tokenizer(
        directory,
        path=None,
        kind="bpe",
        vocab_size=500,
        train_bytes=1_000_000,
        end_of_document=None,
        texts=texts,
        inputs={"documents": "made up"},
    )
    return directory
