"""The language model's tokenizer: Hugging Face ``tokenizer.json``, a sentencepiece ``.model`` or vocabulary files, taken or trained.

Text that looks like a special token (a literal ``<|endoftext|>`` in a web page) is encoded as ordinary text, never as the special
id: only the driver puts end-of-document tokens. This is the policy "text"; "special" recognises such text, as Megatron's tool does.
"""

from __future__ import annotations

import io
import json
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, Protocol

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
FORMS = "tokenizer.json, a sentencepiece .model, vocab.json with merges.txt, encoder.json with vocab.bpe, or vocab.txt"
# Vocabulary files have no list of special tokens; these are the ones of GPT-2 and RoBERTa, and of BERT.
BPE_SPECIAL = ("<|endoftext|>", "<s>", "</s>", "<pad>", "<unk>", "<mask>")
WORDPIECE_SPECIAL = ("[UNK]", "[SEP]", "[CLS]", "[PAD]", "[MASK]")

Ids = npt.NDArray[np.int64]
SpecialTokenText = Literal["text", "special"]
"""What a special token's own text in a document is: ordinary text, or that special token."""


class TokenizerError(ValueError):
    """A tokenizer cannot be loaded, or lacks what is needed."""


class Tokenizer(Protocol):
    """What the rest of the program needs of a tokenizer."""

    vocab_size: int
    """One more than the largest id."""
    end_of_document: int
    """Id of the token that ends each document."""

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """Token ids of each text: no special tokens are added, and none are recognised in the text unless the policy is "special"."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out."""


class HuggingFaceTokenizer:
    """A tokenizer of the Hugging Face ``tokenizers`` library."""

    def __init__(
        self, tokenizer: tokenizers.Tokenizer, end_of_document: str | None = None, special_token_text: SpecialTokenText = "text"
    ) -> None:
        self.library = tokenizer
        self.special_token_text = special_token_text
        tokenizer.encode_special_tokens = special_token_text == "text"  # True: encode them as the text they are
        tokenizer.no_truncation()
        tokenizer.no_padding()
        ids = tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(ids.values()) + 1
        self.end_of_document = _pick_end_of_document(ids, end_of_document)
        if special_token_text == "special":
            return
        name = str(tokenizer.id_to_token(self.end_of_document))
        if self.end_of_document in self.encode_batch([name])[0]:  # a token that the file does not call special is found in text
            tokenizer.add_special_tokens([name])
        _refuse_end_of_document_in_text(self, name)

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """See :class:`Tokenizer`."""
        return [np.asarray(item.ids, np.int64) for item in self.library.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """See :class:`Tokenizer`."""
        kept = [int(item) for item in ids if item != self.end_of_document]  # which the file may not call special
        return str(self.library.decode(kept, skip_special_tokens=True))


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


def looks_like_path(name: str) -> bool:
    """Whether a tokenizer or encoder is named by a path rather than on the model hub (``owner/name`` or ``name``)."""
    endings = (".json", ".model", ".txt", ".bpe")
    return Path(name).exists() or name.startswith(("/", ".", "~")) or name.count("/") > 1 or name.endswith(endings)


def load_tokenizer(path: Path, end_of_document: str | None = None, special_token_text: SpecialTokenText = "text") -> Tokenizer:
    """Load a ``tokenizer.json``, a sentencepiece ``.model``, vocabulary files, or a folder that holds one of these.

    Raises:
        TokenizerError: nothing there, an unreadable file, no end-of-document token, or (policy "text") one that text can make.
    """
    source = _find_source(path)
    if source.form == "sentencepiece":
        if special_token_text == "special":
            raise TokenizerError(
                f'corpus.special_token_text: found "special", but {source.file} is a sentencepiece model, which never makes '
                'control ids of text; set "text"'
            )
        return SentencePieceTokenizer(_load_sentencepiece(source.file), end_of_document)
    return HuggingFaceTokenizer(_load_hugging_face(source), end_of_document, special_token_text)


# --- the forms of tokenizer files ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Source:
    form: Literal["hugging face", "sentencepiece", "bpe", "wordpiece"]
    file: Path
    beside: Path | None = None
    """Merges of a BPE vocabulary, or the tokenizer_config.json of a WordPiece vocabulary where there is one."""


def _find_source(path: Path) -> _Source:
    if not path.is_dir():
        if not path.is_file():
            raise TokenizerError(f"{path}: no such tokenizer file")
        return _source_of_file(path)
    names = (HF_FILE, SENTENCEPIECE_FILE, "*.model", "*vocab.json", "*encoder.json", "*vocab.txt")  # gpt2-vocab.json is Megatron's
    for candidate in (file for name in names for file in sorted(path.glob(name))):
        if candidate.is_file():
            return _source_of_file(candidate)
    raise TokenizerError(f"{path}: holds none of {FORMS}")


def _source_of_file(file: Path) -> _Source:
    for vocabulary, merges in (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")):
        for ending in (vocabulary, merges):
            if file.name.endswith(ending):
                prefix = file.name.removesuffix(ending)
                pair = [file.with_name(prefix + item) for item in (vocabulary, merges)]
                for item in pair:
                    if not item.is_file():
                        raise TokenizerError(f"{file}: a BPE vocabulary is two files, and there is no {item}")
                return _Source(form="bpe", file=pair[0], beside=pair[1])
    if file.name.endswith("vocab.txt"):
        config = file.with_name("tokenizer_config.json")
        return _Source(form="wordpiece", file=file, beside=config if config.is_file() else None)
    if file.suffix not in (".json", ".model"):
        raise TokenizerError(f"{file}: unknown form; expected {FORMS}")
    return _Source(form="hugging face" if file.suffix == ".json" else "sentencepiece", file=file)


def _load_sentencepiece(file: Path) -> sentencepiece.SentencePieceProcessor:
    import sentencepiece

    try:
        return sentencepiece.SentencePieceProcessor(model_file=str(file), num_threads=1)  # the driver runs many processes instead
    except (RuntimeError, OSError) as error:
        raise TokenizerError(f"{file}: not a sentencepiece model ({error})") from error


def _load_hugging_face(source: _Source) -> tokenizers.Tokenizer:
    import tokenizers

    if source.form == "bpe":
        return _byte_level_bpe(source)
    if source.form == "wordpiece":
        return _wordpiece(source)
    try:
        return tokenizers.Tokenizer.from_file(str(source.file))
    except Exception as error:  # the library raises bare Exception
        raise TokenizerError(f"{source.file}: not a tokenizer.json of the tokenizers library ({error})") from error


def _byte_level_bpe(source: _Source) -> tokenizers.Tokenizer:
    """GPT-2's vocabulary and merges, as ``tokenizers.implementations.ByteLevelBPETokenizer`` reads them."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, processors

    try:
        vocabulary, merges = models.BPE.read_file(str(source.file), str(source.beside))
        tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, merges))
    except Exception as error:  # the library raises bare Exception
        raise TokenizerError(f"{source.file}: not a BPE vocabulary that fits {source.beside} ({error})") from error
    missing = [letter for letter in pre_tokenizers.ByteLevel.alphabet() if letter not in vocabulary]
    if missing or any(piece.endswith("</w>") for piece in vocabulary):
        raise TokenizerError(
            f"{source.file}: not GPT-2's kind of BPE: found {256 - len(missing)} of the 256 letters that stand for bytes, "
            f"{'with' if any(piece.endswith('</w>') for piece in vocabulary) else 'without'} </w> pieces; expected 256 and none. "
            "Give a tokenizer.json"
        )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.add_special_tokens([name for name in BPE_SPECIAL if name in vocabulary])
    return tokenizer


def _wordpiece(source: _Source) -> tokenizers.Tokenizer:
    """BERT's vocabulary, as ``tokenizers.implementations.BertWordPieceTokenizer`` reads it."""
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers

    try:
        with source.file.open(encoding="utf-8") as lines:
            vocabulary = {line.removesuffix("\n"): number for number, line in enumerate(lines)}
        config = json.loads(source.beside.read_text(encoding="utf-8")) if source.beside else {}
    except ValueError as error:
        raise TokenizerError(f"{source.file}: this file or its tokenizer_config.json cannot be read ({error})") from error
    missing = [name for name in ("[UNK]", "[CLS]", "[SEP]") if name not in vocabulary]
    if missing:
        raise TokenizerError(f"{source.file}: not a WordPiece vocabulary of BERT's kind: it lacks {', '.join(missing)}")
    tokenizer = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=config.get("tokenize_chinese_chars", True),
        strip_accents=config.get("strip_accents"),
        lowercase=config.get("do_lower_case", _is_lower_case(vocabulary)),
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    tokenizer.add_special_tokens([name for name in WORDPIECE_SPECIAL if name in vocabulary])
    return tokenizer


def _is_lower_case(vocabulary: Iterable[str]) -> bool:
    """No piece has an upper-case letter, [UNK], [unused1] and their like apart."""
    return all(piece == piece.lower() for piece in vocabulary if not (piece.startswith("[") and piece.endswith("]")))


# --- an encoder's tokenizer ----------------------------------------------------------------------------------------


def load_encoder_tokenizer(path: Path) -> tokenizers.Tokenizer:
    """An encoder's tokenizer, of the same files as the language model's but no sentencepiece model, as :func:`without_additions` gives it;
    special tokens in text are ordinary text.

    Raises:
        TokenizerError: nothing there, or a file of another form.
    """
    try:
        source = _find_source(path)
        if source.form == "sentencepiece":
            raise TokenizerError(f"{source.file}: a sentencepiece model; an encoder's tokenizer is a Hugging Face one (tokenizer.json)")
        library = without_additions(_load_hugging_face(source))
    except TokenizerError as error:
        raise TokenizerError(f"corpus.scorer_tokenizer: {error}") from error
    library.encode_special_tokens = True
    return library


def without_additions(library: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """A copy that adds, cuts and fills up nothing, and whose offsets are not trimmed of the spaces that a token holds."""
    import tokenizers

    state = json.loads(library.to_str()) | {"truncation": None, "padding": None, "post_processor": None}
    copy = tokenizers.Tokenizer.from_str(json.dumps(state))
    copy.encode_special_tokens = library.encode_special_tokens
    return copy


def encoding_hash(library: tokenizers.Tokenizer) -> str:
    """BLAKE3 (hex) of what decides the ids of ordinary text, so that the forms in which one tokenizer is distributed have one hash."""
    state = json.loads(library.to_str())
    return artifact.fingerprint_of({name: state[name] for name in ("model", "normalizer", "pre_tokenizer", "added_tokens")})


def encoder_files_hash(path: Path) -> str:
    """BLAKE3 (hex) of the files that :func:`load_encoder_tokenizer` reads."""
    return artifact.fingerprint_of(_checksums(_find_source(path)))


@dataclass(frozen=True, slots=True, kw_only=True)
class VocabularyDifference:
    """Ids, ascending, that do not name the same token for a language model and an encoder."""

    text: list[int]
    """Those that text can become; an encoder that has none of these reads the language model's ids of any text as they are."""
    special: list[int]
    """The end-of-document id and those of other special tokens, for which the encoder may have names of its own."""


def vocabulary_difference(tokenizer: Tokenizer, encoder: tokenizers.Tokenizer) -> VocabularyDifference:
    """Compare every id of a language model's vocabulary with what the encoder calls by it; further ids of the encoder do not matter."""
    own: dict[int, str]
    if isinstance(tokenizer, HuggingFaceTokenizer):
        own = {number: name for name, number in tokenizer.library.get_vocab(with_added_tokens=True).items()}
        special = {number for number, token in tokenizer.library.get_added_tokens_decoder().items() if token.special}
    else:
        assert isinstance(tokenizer, SentencePieceTokenizer)
        own = {number: str(tokenizer.library.id_to_piece(number)) for number in range(tokenizer.vocab_size)}
        special = {number for number in own if tokenizer.library.is_control(number)}
    differing = [number for number in sorted(own) if encoder.id_to_token(number) != own[number]]
    special |= {tokenizer.end_of_document}
    return VocabularyDifference(
        text=[number for number in differing if number not in special], special=[number for number in differing if number in special]
    )


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
    special_token_text: SpecialTokenText = "text",
) -> Manifest:
    """Make the tokenizer artifact: copied from ``path`` (or fetched by name), or trained on the first ``train_bytes`` of ``texts``.

    The artifact does not depend on ``special_token_text``, but what is refused does.
    """
    settings: dict[str, Any] = {"path": path, "end_of_document": end_of_document}
    if path is None:
        settings |= {"kind": kind, "vocab_size": vocab_size, "train_bytes": train_bytes}
    else:
        inputs = _checksums(_find_source(Path(path))) if Path(path).exists() else {}
    done = artifact.find_complete(directory, kind="tokenizer", settings=settings, inputs=inputs)
    if done:
        return done
    start = time.perf_counter()
    directory.mkdir(parents=True, exist_ok=True)
    if path is not None:
        name = _take(path, end_of_document, special_token_text, directory)
    elif kind == "bpe":
        name = _train_bpe(_first_bytes(texts, train_bytes), vocab_size, end_of_document, directory)
    else:
        name = _train_sentencepiece(_first_bytes(texts, train_bytes), vocab_size, directory)
    tokenizer = load_tokenizer(directory / name, end_of_document, special_token_text)
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


def open_tokenizer(directory: Path, *, special_token_text: SpecialTokenText = "text") -> tuple[Tokenizer, Manifest]:
    """Load a tokenizer artifact."""
    manifest = artifact.load(directory, "tokenizer")
    return load_tokenizer(directory / manifest.info["file"], manifest.settings["end_of_document"], special_token_text), manifest


def tokenizer_files(directory: Path) -> list[Path]:
    """The files of a tokenizer artifact that another program needs."""
    return [directory / name for name in artifact.load(directory, "tokenizer").files]


def _checksums(source: _Source) -> dict[str, str]:
    found = {"file": artifact.digest_of(source.file)}
    return found | {source.beside.name: artifact.digest_of(source.beside)} if source.beside else found


def _take(path: str, end_of_document: str | None, special_token_text: SpecialTokenText, directory: Path) -> str:
    if Path(path).exists():
        load_tokenizer(Path(path), end_of_document, special_token_text)  # so that what is wrong is said of the user's file
        source = _find_source(Path(path))
        name = SENTENCEPIECE_FILE if source.form == "sentencepiece" else HF_FILE
        if source.form in ("bpe", "wordpiece"):
            _load_hugging_face(source).save(str(directory / name))
        else:
            shutil.copyfile(source.file, directory / name)
        return name
    if looks_like_path(path):
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
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": text,
            "bos_token": text,
            "unk_token": getattr(tokenizer.library.model, "unk_token", None) or text,
        }
    else:
        assert isinstance(tokenizer, SentencePieceTokenizer)
        text = str(tokenizer.library.id_to_piece(tokenizer.end_of_document))
        config = _sentencepiece_config(tokenizer.library, text)
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    if not (directory / name).is_file():
        raise ArtifactError(f"{directory / name}: was not written")
    return text


def _sentencepiece_config(processor: sentencepiece.SentencePieceProcessor, end: str) -> dict[str, str]:
    """Names the class of transformers that hands text to the sentencepiece library as it is.

    LlamaTokenizer, the usual one, needs protobuf to read the model, and gives other ids for every model but Llama's kind (T5's, say).
    Each role must name a piece of the model: a default that is none (``<pad>``, ``<::::>``) would be added to the vocabulary.
    """

    def piece(number: int) -> str:
        return str(processor.id_to_piece(number)) if number >= 0 else end

    return {
        "tokenizer_class": "BertGenerationTokenizer",
        "eos_token": end,
        "bos_token": piece(processor.bos_id()),
        "unk_token": piece(processor.unk_id()),
        "pad_token": piece(processor.pad_id()),
        "sep_token": end,
    }
