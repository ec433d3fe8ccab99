"""The language model's tokenizer: Hugging Face ``tokenizer.json`` or a sentencepiece ``.model``, taken or trained.

Text that looks like a special token (a literal ``<|endoftext|>`` in a web page) is encoded as ordinary text, never as the special
id: only the driver puts end-of-document tokens.
"""

from __future__ import annotations

import io
import json
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from mates.preprocess import artifact
from mates.preprocess.artifact import ArtifactError, Cost, Manifest

if TYPE_CHECKING:
    import sentencepiece
    import tokenizers

HF_FILE = "tokenizer.json"
SENTENCEPIECE_FILE = "tokenizer.model"
END_OF_DOCUMENT_NAMES = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "[SEP]")

Ids = npt.NDArray[np.int64]


class TokenizerError(ValueError):
    """A tokenizer cannot be loaded, or lacks what is needed."""


class Tokenizer(Protocol):
    """What the rest of the program needs of a tokenizer."""

    vocab_size: int
    """One more than the largest id."""
    end_of_document: int
    """Id of the token that ends each document."""

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """Token ids of each text: no special tokens are added, none are recognised in the text."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out."""


class HuggingFaceTokenizer:
    """A tokenizer of the Hugging Face ``tokenizers`` library."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, end_of_document: str | None = None) -> None:
        self.library = tokenizer
        tokenizer.encode_special_tokens = True  # i.e. encode them as the text they are
        tokenizer.no_truncation()
        tokenizer.no_padding()
        ids = tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(ids.values()) + 1
        self.end_of_document = _pick_end_of_document(ids, end_of_document)
        name = str(tokenizer.id_to_token(self.end_of_document))
        if self.end_of_document in self.encode_batch([name])[0]:  # a token that the file does not call special is found in text
            tokenizer.add_special_tokens([name])
        _refuse_end_of_document_in_text(self, name)

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """See :class:`Tokenizer`."""
        return [np.asarray(item.ids, np.int64) for item in self.library.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """See :class:`Tokenizer`."""
        return str(self.library.decode([int(item) for item in ids], skip_special_tokens=True))


class SentencePieceTokenizer:
    """A sentencepiece model."""

    def __init__(self, processor: sentencepiece.SentencePieceProcessor, end_of_document: str | None = None) -> None:
        self.library = processor
        self.vocab_size = int(processor.get_piece_size())
        self._control = np.array([processor.is_control(item) or processor.is_unknown(item) for item in range(self.vocab_size)])
        pieces = {processor.id_to_piece(item): item for item in range(self.vocab_size)}
        self.end_of_document = _pick_end_of_document(pieces, end_of_document)
        _refuse_end_of_document_in_text(self, str(processor.id_to_piece(self.end_of_document)))

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """See :class:`Tokenizer`. Sentencepiece never makes control ids of text."""
        return [np.asarray(ids, np.int64) for ids in self.library.encode(list(texts), out_type=int)]

    def decode(self, ids: Sequence[int]) -> str:
        """See :class:`Tokenizer`."""
        return str(self.library.decode([int(item) for item in ids if not self._control[item]]))


def _pick_end_of_document(ids: dict[str, int], asked: str | None) -> int:
    for name in [asked] if asked else END_OF_DOCUMENT_NAMES:
        if name in ids:
            return ids[name]
    if asked:
        raise TokenizerError(f"tokenizer.end_of_document: found {asked!r}, which is not in the vocabulary of {len(ids)} tokens")
    raise TokenizerError(
        f"the tokenizer has none of {', '.join(END_OF_DOCUMENT_NAMES)}; name the token that ends a document in tokenizer.end_of_document"
    )


def _refuse_end_of_document_in_text(tokenizer: Tokenizer, name: str) -> None:
    if tokenizer.end_of_document in tokenizer.encode_batch([name])[0]:
        raise TokenizerError(
            f"tokenizer.end_of_document: the text {name!r} is encoded as this token, so it cannot mark the end of documents; "
            "name a special (control) token"
        )


def load_tokenizer(path: Path, end_of_document: str | None = None) -> Tokenizer:
    """Load a ``tokenizer.json``, a sentencepiece ``.model``, or a folder that holds one of the two.

    Raises:
        TokenizerError: nothing there, an unreadable file, or no end-of-document token.
    """
    file = _tokenizer_file(path)
    if file.suffix == ".json":
        import tokenizers

        try:
            library = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise TokenizerError(f"{file}: not a tokenizer.json of the tokenizers library ({error})") from error
        return HuggingFaceTokenizer(library, end_of_document)
    import sentencepiece

    try:
        processor = sentencepiece.SentencePieceProcessor(model_file=str(file))
    except (RuntimeError, OSError) as error:
        raise TokenizerError(f"{file}: not a sentencepiece model ({error})") from error
    return SentencePieceTokenizer(processor, end_of_document)


def _tokenizer_file(path: Path) -> Path:
    if path.is_dir():
        candidates = [path / HF_FILE, path / SENTENCEPIECE_FILE, *sorted(path.glob("*.model"))]
        for candidate in candidates:
            if candidate.is_file():
                return candidate
        raise TokenizerError(f"{path}: holds neither {HF_FILE} nor a sentencepiece .model")
    if not path.is_file():
        raise TokenizerError(f"{path}: no such tokenizer file")
    if path.suffix not in (".json", ".model"):
        raise TokenizerError(f"{path}: unknown form; expected tokenizer.json or a sentencepiece .model")
    return path


# --- the tokenizer artifact ----------------------------------------------------------------------------------------


def make_tokenizer(
    directory: Path,
    *,
    path: str | None,
    kind: str,
    vocab_size: int,
    train_bytes: int,
    end_of_document: str | None,
    texts: Iterable[str],
    inputs: dict[str, str],
) -> Manifest:
    """Make the tokenizer artifact: copied from ``path`` (or fetched by name), or trained on the first ``train_bytes`` of ``texts``."""
    settings: dict[str, Any] = {"path": path, "end_of_document": end_of_document}
    if path is None:
        settings |= {"kind": kind, "vocab_size": vocab_size, "train_bytes": train_bytes}
    else:
        inputs = {"file": artifact.sha256_file(_tokenizer_file(Path(path)))} if Path(path).exists() else {}
    done = artifact.find_complete(directory, kind="tokenizer", settings=settings, inputs=inputs)
    if done:
        return done
    start = time.perf_counter()
    directory.mkdir(parents=True, exist_ok=True)
    if path is not None:
        name = _take(path, end_of_document, directory)
    elif kind == "bpe":
        name = _train_bpe(_first_bytes(texts, train_bytes), vocab_size, end_of_document, directory)
    else:
        name = _train_sentencepiece(_first_bytes(texts, train_bytes), vocab_size, directory)
    tokenizer = load_tokenizer(directory / name, end_of_document)
    eod_name = _write_hugging_face_config(directory, name, tokenizer)
    return artifact.commit(
        directory,
        kind="tokenizer",
        settings=settings,
        inputs=inputs,
        info={
            "vocab_size": tokenizer.vocab_size,
            "end_of_document": tokenizer.end_of_document,
            "end_of_document_text": eod_name,
            "file": name,
        },
        cost=Cost(seconds=time.perf_counter() - start),
    )


def open_tokenizer(directory: Path) -> tuple[Tokenizer, Manifest]:
    """Load a tokenizer artifact."""
    manifest = artifact.load(directory, "tokenizer")
    return load_tokenizer(directory / manifest.info["file"], manifest.settings["end_of_document"]), manifest


def tokenizer_files(directory: Path) -> list[Path]:
    """The files of a tokenizer artifact that another program needs."""
    return [directory / name for name in artifact.load(directory, "tokenizer").files]


def _take(path: str, end_of_document: str | None, directory: Path) -> str:
    if Path(path).exists():
        file = _tokenizer_file(Path(path))
        load_tokenizer(file, end_of_document)  # so that what is wrong is said of the user's file
        name = HF_FILE if file.suffix == ".json" else SENTENCEPIECE_FILE
        shutil.copyfile(file, directory / name)
        return name
    if path.count("/") > 1 or path.startswith((".", "/")) or path.endswith((".json", ".model")):
        raise TokenizerError(f"tokenizer.path: {path}: no such file or folder")
    import tokenizers

    try:
        tokenizers.Tokenizer.from_pretrained(path).save(str(directory / HF_FILE))
    except Exception as error:  # the library raises bare Exception for network and repository errors
        raise TokenizerError(
            f"tokenizer.path: {path!r} is neither a file here nor could it be fetched from the model hub ({error})"
        ) from error
    return HF_FILE


def _first_bytes(texts: Iterable[str], limit: int) -> Iterator[str]:
    left = limit
    for text in texts:
        data = text.encode()
        yield text if len(data) <= left else data[:left].decode(errors="ignore")
        left -= len(data)
        if left <= 0:
            return
    if left == limit:
        raise TokenizerError("there is no text to train a tokenizer on: the inputs hold no usable document for the train corpus")


def _train_bpe(texts: Iterator[str], vocab_size: int, end_of_document: str | None, directory: Path) -> str:
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[end_of_document or END_OF_DOCUMENT_NAMES[0]],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(directory / HF_FILE))
    return HF_FILE


def _train_sentencepiece(texts: Iterator[str], vocab_size: int, directory: Path) -> str:
    import sentencepiece

    lines = (line for text in texts for line in text.splitlines() if line.strip())
    model = io.BytesIO()  # given a path instead, the trainer would write that path into the model
    try:
        _sentencepiece_trainer(sentencepiece, lines, model, vocab_size)
    except RuntimeError as error:
        raise TokenizerError(
            f"tokenizer.vocab_size: sentencepiece cannot make {vocab_size} entries of this text ({error}). Give more text or ask for fewer"
        ) from error
    with artifact.atomic_file(directory / SENTENCEPIECE_FILE) as handle:
        handle.write(model.getvalue())
    return SENTENCEPIECE_FILE


def _sentencepiece_trainer(sentencepiece: Any, lines: Iterator[str], model: IO[bytes], vocab_size: int) -> None:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines,
        model_writer=model,
        vocab_size=vocab_size,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=0.9995,
        normalization_rule_name="identity",  # a language model must be able to write what it read
        remove_extra_whitespaces=False,
        user_defined_symbols=["\n", "\t"],
        max_sentence_length=2**30,  # the default leaves lines of more than 4,192 bytes out
        num_threads=1,  # the trainer's sums depend on the number of threads
        minloglevel=2,
    )


def _write_hugging_face_config(directory: Path, name: str, tokenizer: Tokenizer) -> str:
    """Lets ``AutoTokenizer.from_pretrained`` read the folder; returns the end-of-document token's text."""
    if isinstance(tokenizer, HuggingFaceTokenizer):
        text = str(tokenizer.library.id_to_token(tokenizer.end_of_document))
        config: dict[str, str | bool] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": text,
            "bos_token": text,
            "unk_token": text,
        }
    else:
        assert isinstance(tokenizer, SentencePieceTokenizer)
        text = str(tokenizer.library.id_to_piece(tokenizer.end_of_document))
        config = {"tokenizer_class": "LlamaTokenizer", "eos_token": text, "add_bos_token": False, "legacy": False}
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    if not (directory / name).is_file():
        raise ArtifactError(f"{directory / name}: was not written")
    return text
