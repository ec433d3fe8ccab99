"""Text out of installed Python packages: what one file gives, which class it is of, and which passages it holds.

Everything here depends on the file's bytes, its url and a seed alone, so the work can be spread over processes in any
way. Source files are parsed, never imported.
"""

from __future__ import annotations

import ast
import email
import hashlib
import inspect
import itertools
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

PROSE, API, CODE, BOILERPLATE = CLASSES = ("prose", "api", "code", "boilerplate")

MIN_DOCUMENT_CHARACTERS = 200
TARGET_DOCUMENT_CHARACTERS = 3_000
MAX_DOCUMENT_CHARACTERS = 20_000
MAX_CODE_CHARACTERS = 6_000  # of one document, of which a source file gives at most two
CODE_ONE_IN = 6  # source files whose code is taken
BLOCK_BREAK = "\n\n\n"  # between the blocks of a document; inside a block there is at most one empty line
MIN_STRING_CHARACTERS = 200  # of a string at module level that is not a docstring, to be read as documentation
MAX_FILE_BYTES = 4_000_000  # larger ones are tables

STOP_WORDS = frozenset(
    re.findall(
        r"\w+",
        """
        a about above after again against all also am an and any are as at be because been before being below
        between both but by can cannot could did do does doing down during each either else etc few for from
        further had has have having he her here hers him his how however i if in into is it its itself just
        let may me might more most must my neither no nor not now of off often on once one only or other our
        ours out over own same shall she should since so some such than that the their theirs them then there
        therefore these they this those though through thus to too two under unless until up upon us use used
        using very via was we were what when where whether which while who whom whose why will with within
        without would yet you your yours
        """,
    )
)


@dataclass(frozen=True, slots=True)
class Source:
    """One file to read: its kind (a key of ``READERS``), its ``url`` without fragment, and where it lies here."""

    url: str
    kind: str
    path: str


@dataclass(frozen=True, slots=True)
class Piece:
    """Blocks of text from one place of a file. A block is what stays together: a docstring, a section, a statement.

    ``fragment`` completes the source's url. ``label`` is one of CLASSES, or None where each document is to be judged.
    """

    fragment: str
    label: str | None
    blocks: list[str]


@dataclass(frozen=True, slots=True)
class Extract:
    """What one source gave: its pieces, or why it gave none (``dropped``)."""

    pieces: list[Piece]
    dropped: str | None = None


def keyed_hash(seed: int, purpose: str, text: str) -> int:
    """64 bits of a keyed hash: the only source of randomness here, and the same on every machine."""
    digest = hashlib.blake2b(text.encode(), digest_size=8, key=f"{seed}/{purpose}".encode()[:64])
    return int.from_bytes(digest.digest(), "big")


# --- judging -------------------------------------------------------------------------------------------------------

_WORD = re.compile(r"[A-Za-z]+(?:['’-][A-Za-z]+)*")
_LICENCE = re.compile(r"licen[sc]e|copyright|\(c\) \d{4}|warrant(y|ies)|all rights reserved", re.IGNORECASE)
_STRUCTURE = re.compile(r"^\s*(>>>|\.\. |[|:@+*\-–•]|\d+[.)] |[-=~^*#]{3,}|\$ |```)", re.MULTILINE)
_SYMBOL = re.compile(r"[^A-Za-z\s.,;:'\"()!?’“”–—-]")
_ENDS = (".", "!", "?", ":", ".)", '."', ".'")


def stop_word_share(words: Sequence[str]) -> float:
    """How many of the words are function words: about 0.4–0.6 in English sentences, below 0.2 in tables and code."""
    return sum(word.lower() in STOP_WORDS for word in words) / len(words) if words else 0.0


def is_running(paragraph: str) -> bool:
    """Whether all lines are indented alike and none starts as a list, a table, a field or a prompt does."""
    indents = {len(line) - len(line.lstrip()) for line in paragraph.strip("\n").split("\n")}
    return len(indents) == 1 and not _STRUCTURE.search(paragraph)


def is_prose(paragraph: str) -> bool:
    """Whether a paragraph reads as English sentences.

    It is running text with at least 10 words, starts with a capital, ends a sentence, at least three words in ten are
    function words, and at most 6 % of the characters are digits or symbols.
    """
    text = paragraph.strip()
    words = _WORD.findall(text)
    if len(words) < 10 or not text.lstrip("\"'(“").lstrip()[:1].isupper() or not text.endswith(_ENDS):
        return False
    if stop_word_share(words) < 0.3 or not is_running(paragraph):
        return False
    return len(_SYMBOL.findall(text)) <= 0.06 * len(text)


def prose_share(text: str) -> float:
    """The share of a text's characters that lie in paragraphs of prose."""
    parts = paragraphs(text)
    total = sum(map(len, parts))
    return sum(len(part) for part in parts if is_prose(part)) / total if total else 0.0


def label_of(text: str) -> str:
    """``prose`` when more than half of the text lies in paragraphs of prose, ``api`` otherwise."""
    return PROSE if prose_share(text) > 0.5 else API


def split_prose(text: str) -> tuple[str, str]:
    """Divide a docstring into narrative and the rest: field lists, tables, examples and one-line summaries.

    A run of prose counts as narrative from 30 words on; a text that is nearly all prose stays whole.
    """
    if prose_share(text) > 0.8:
        return text, ""
    sides: tuple[list[str], list[str]] = ([], [])
    for prose, run in itertools.groupby(paragraphs(text), key=is_prose):
        parts = list(run)
        sides[not (prose and sum(len(_WORD.findall(part)) for part in parts) >= 30)].extend(parts)
    narrative, rest = sides
    return "\n\n".join(inspect.cleandoc(part) for part in narrative), "\n\n".join(rest)


def is_text(block: str) -> bool:
    """Whether a block holds words at all: it refuses tables of numbers, data and text in other scripts."""
    letters = sum(map(len, _WORD.findall(block)))
    return letters >= 0.4 * len("".join(block.split()))


# --- cutting -------------------------------------------------------------------------------------------------------

_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufeff]")
_BLANK = re.compile(r"\n[ \t]*\n\s*?(?=[ \t]*\S)")


def clean(text: str) -> str:
    """Unix line ends, no control characters or lone surrogates, no trailing blanks, no two empty lines together."""
    text = _UNPRINTABLE.sub("", text.replace("\r\n", "\n").replace("\r", "\n").expandtabs(4))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(line.rstrip() for line in text.split("\n"))).strip("\n")


def paragraphs(text: str) -> list[str]:
    """The parts of a text between blank lines, with their indentation."""
    return [part for part in _BLANK.split(text) if part.strip()]


def cut(block: str, limit: int) -> list[str]:
    """Cut a block into parts of at most ``limit`` characters: between paragraphs, else between lines, else anywhere."""
    if len(block) <= limit:
        return [block]
    for separator in ("\n\n", "\n"):
        parts = block.split(separator)
        if len(parts) > 1:
            return _join_up_to([small for part in parts for small in cut(part, limit)], separator, limit)
    return [block[start : start + limit] for start in range(0, len(block), limit)]


def _join_up_to(parts: Sequence[str], separator: str, limit: int) -> list[str]:
    joined: list[str] = []
    for part in parts:
        if joined and len(joined[-1]) + len(separator) + len(part) <= limit:
            joined[-1] += separator + part
        else:
            joined.append(part)
    return joined


def pack(blocks: Sequence[str]) -> list[str]:
    """Join blocks in order to documents of about TARGET_DOCUMENT_CHARACTERS; longer blocks are cut at paragraphs."""
    parts = [part for block in blocks for part in cut(block, MAX_DOCUMENT_CHARACTERS)]
    documents = [document.strip("\n") for document in _join_up_to(parts, BLOCK_BREAK, TARGET_DOCUMENT_CHARACTERS)]
    if len(documents) > 1 and len(documents[-1]) < MIN_DOCUMENT_CHARACTERS:
        last = documents.pop()
        if len(documents[-1]) + len(BLOCK_BREAK) + len(last) <= MAX_DOCUMENT_CHARACTERS:
            last = documents.pop() + BLOCK_BREAK + last
        documents.append(last)
    return documents


# --- reading files -------------------------------------------------------------------------------------------------

_HEADING = re.compile(r"^(?=#{1,4} \S)|^(?=[^\s].{2,80}\n[=\-~*^]{3,}[ ]*$)", re.MULTILINE)
_BADGE = re.compile(r"^.*(\[!\[|<img |</?(p|div|a|h1|br|picture|source|table|tr|td)\b|\.\. image::|shields\.io).*$", re.MULTILINE)
_LINK = re.compile(r"!?\[([^\]\[]*)\]\([^()\s]*(?: \"[^\"]*\")?\)")


def sections(text: str) -> list[str]:
    """A Markdown or reStructuredText document cut before its headings, without badges, with links reduced to words."""
    plain = clean(_LINK.sub(r"\1", _BADGE.sub("", text)))
    return [section.strip("\n") for section in _HEADING.split(plain) if section.strip()]


def read_document(text: str, with_code: bool) -> list[Piece]:
    """A README or another text file."""
    blocks = [section for section in sections(text) if is_text(section)]
    return [Piece("", None, blocks)]


def read_metadata(text: str, with_code: bool) -> list[Piece]:
    """The long description in a distribution's METADATA."""
    message = email.message_from_string(text)
    body = message.get_payload()
    description = body if isinstance(body, str) and body.strip() else message.get("Description", "")
    return [Piece("description", piece.label, piece.blocks) for piece in read_document(description, with_code)]


def read_licence(text: str, with_code: bool) -> list[Piece]:
    """A licence or a notice."""
    return [Piece("", BOILERPLATE, [clean(text)])]


def read_topics(text: str, with_code: bool) -> list[Piece]:
    """The language reference that ``help()`` prints: a module with one dictionary from topic to text."""
    for node in ast.parse(text).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            topics: dict[str, str] = ast.literal_eval(node.value)
            return [Piece(topic, None, sections(topics[topic])) for topic in sorted(topics)]
    return []


def read_python(text: str, with_code: bool) -> list[Piece]:
    """A module: its docstrings and long strings, by class, and its comments or (when ``with_code``) its code."""
    source = clean(text)
    if '"""' not in source and "'''" not in source and "# " not in source and not with_code:
        return []  # nothing to find, and parsing is what takes the time
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tree = ast.parse(source)
    lines = source.split("\n")
    hidden: set[int] = set()
    found = [block for block in _documentation(tree, "", lines, hidden) if is_text(block[0] + block[1])]
    pieces = [
        Piece(f"docstrings/{label}", label, [block[place] for block in found if block[place]]) for place, label in enumerate((PROSE, API))
    ]
    if with_code:
        pieces.append(Piece("code", CODE, _code_blocks(lines, hidden)))
    else:
        pieces.append(Piece("comments", PROSE, _comment_blocks(lines, hidden)))
    return pieces


_Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def _documentation(node: ast.AST, name: str, lines: Sequence[str], hidden: set[int]) -> Iterator[tuple[str, str]]:
    """Docstrings below ``node`` in order; adds their lines to ``hidden``. Bodies of functions are not entered."""
    body: list[ast.stmt] = getattr(node, "body", [])
    if isinstance(node, ast.Module | _Definition) and body and (text := _string(body[0])) is not None:
        hidden.update(range(body[0].lineno - 1, body[0].end_lineno or body[0].lineno))
        document = clean(inspect.cleandoc(text))
        narrative, rest = split_prose(document)
        yield narrative, _signature(node, name, lines) + rest if rest else ""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return
    for child in body:
        if isinstance(child, _Definition):
            yield from _documentation(child, f"{name}{child.name}.", lines, hidden)
        elif isinstance(child, ast.If | ast.Try | ast.With):
            yield from _documentation(child, name, lines, hidden)
        elif isinstance(node, ast.Module) and isinstance(child, ast.Expr | ast.Assign):
            yield from _long_strings(child, hidden)


def _string(statement: ast.stmt) -> str | None:
    if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
        value = statement.value.value
        return value if isinstance(value, str) else None
    return None


def _signature(node: ast.AST, name: str, lines: Sequence[str]) -> str:
    """The definition as a heading line, such as ``Point.distance(self, other):``; empty for a module."""
    if not isinstance(node, _Definition):
        return ""
    line = lines[node.lineno - 1].strip()
    line = line if line.endswith(":") else f"def {node.name}"
    return name.removesuffix(f"{node.name}.") + re.sub(r"^(async )?(def|class) ", "", line).removesuffix(":") + "\n"


def _long_strings(statement: ast.stmt, hidden: set[int]) -> Iterator[tuple[str, str]]:
    """Strings in a statement at module level that read as documentation, as in ``add_docstring(function, "...")``."""
    for node in ast.walk(statement):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) >= MIN_STRING_CHARACTERS:
            text = clean(inspect.cleandoc(node.value))
            if stop_word_share(_WORD.findall(text)) >= 0.2:
                hidden.update(range(node.lineno - 1, node.end_lineno or node.lineno))
                yield split_prose(text)


def _comment_blocks(lines: Sequence[str], hidden: set[int]) -> list[str]:
    """Runs of comment lines that hold sentences. Licence headers and code that was commented out are left."""
    runs: list[list[str]] = [[]]
    for number, line in enumerate(lines):
        text = line.lstrip()
        if text.startswith("#") and number not in hidden:
            runs[-1].append(text.lstrip("#").removeprefix(":").removeprefix(" ").rstrip("#"))
        elif runs[-1]:
            runs.append([])
    blocks = (clean("\n".join(run)) for run in runs if len(run) > 1)
    return [block for block in blocks if label_of(block) == PROSE and not _LICENCE.search(block)]


def _code_blocks(lines: Sequence[str], hidden: set[int]) -> list[str]:
    """The code without docstrings and outer comments, in at most two parts of MAX_CODE_CHARACTERS."""
    kept = [line for number, line in enumerate(lines) if number not in hidden and not line.startswith("#")]
    return [part.strip("\n") for part in cut(clean("\n".join(kept)), MAX_CODE_CHARACTERS)[:2]]


READERS: dict[str, Callable[[str, bool], list[Piece]]] = {
    "python": read_python,
    "topics": read_topics,
    "metadata": read_metadata,
    "document": read_document,
    "licence": read_licence,
}


def extract(source: Source, seed: int) -> Extract:
    """Read one source. A file that cannot be read, decoded as UTF-8 or parsed gives no pieces and the reason."""
    path = Path(source.path)
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            return Extract([], "file too large")
        text = path.read_bytes().decode("utf-8-sig")
        with_code = path.suffix == ".py" and keyed_hash(seed, "code", source.url) % CODE_ONE_IN == 0
        pieces = READERS[source.kind](text, with_code)
    except OSError:
        return Extract([], "file unreadable")
    except UnicodeDecodeError:
        return Extract([], "file not UTF-8")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return Extract([], "file not parsable")
    return Extract([piece for piece in pieces if piece.blocks])


def extract_all(sources: Sequence[Source], seed: int) -> list[Extract]:
    """:func:`extract` for a batch, which is what a worker process is sent."""
    return [extract(source, seed) for source in sources]


# --- passages ------------------------------------------------------------------------------------------------------

MIN_PASSAGE_WORDS, MAX_PASSAGE_WORDS = 30, 70

_BOUNDARY = re.compile(r"(?<=[.!?])(['\")’”]*)\s+(?=[\"'(“‘]?[A-Z])")
_ABBREVIATION = re.compile(r"(\b(e\.g|i\.e|etc|vs|cf|al|Dr|Mr|Mrs|St|No|[Ff]ig|[Ee]q|Ref|Sec|[Vv]ol|pp|[A-Z])|\.\.)\.$")
_ROLE = re.compile(r"(?::[a-z:]+:)?``?[~.]?([A-Za-z]+(?:-[a-z]+)*)``?(?!_)")
_EMPHASIS = re.compile(r"(?<![\w*])(\*{1,2}|_)([A-Za-z][A-Za-z' -]*[A-Za-z]|[A-Za-z])\1(?![\w*])")
_SPOKEN = re.compile(r"""^["'(“‘]?[A-Z][A-Za-z0-9 /,;:'"()’“”‘—–%-]*[.!?]["')’”]*$""")
_ODD = re.compile(
    r"(?<![A-Za-z])[a-z]+[A-Z]|[A-Z][a-z]+[A-Z][a-z]+[A-Z]|\b[A-Z]{2,}[a-z]{2}"  # identifiers
    r"|\(\)|\w\(|[A-Za-z]\d|\d(?!D\b)[A-Za-z]|--| [;:,]|:[A-Za-z]|[\"'][-,]|(?<![\w])/|/(?!\w)"  # left-overs of markup
    r"|^(See|Raises|Args|Arguments|Examples?|Parameters|Param)\b|\b(TODO|FIXME|XXX)\b|[a-z]- "
    r"|[a-z)] (A|An|And|But|For|If|In|It|No|Note|Return|Returns|The|There|These|This|To|We|When|You) "  # no full stop
)
_TARGET = re.compile(r"[A-Za-z][a-z]{2,}")


@dataclass(frozen=True, slots=True)
class Passage:
    """Whole sentences whose last word (the text ends with it) is to be predicted. ``recurs``: it also occurs before."""

    text: str
    recurs: bool


def sentences(paragraph: str) -> list[str]:
    """The sentences of a paragraph on one line each, with the markup around single words taken away."""
    text = " ".join(_EMPHASIS.sub(r"\2", _ROLE.sub(r"\1", paragraph)).split())
    found: list[str] = []
    start = 0
    for boundary in _BOUNDARY.finditer(text):
        sentence = text[start : boundary.end(1)]
        if not _ABBREVIATION.search(sentence):
            found.append(sentence)
            start = boundary.end()
    return [*found, text[start:]]


def is_plain(sentence: str) -> bool:
    """Whether a sentence could stand in a book: words and punctuation, no identifiers, formulas or licence terms."""
    words = _WORD.findall(sentence)
    if not _SPOKEN.match(sentence) or _ODD.search(sentence) or _LICENCE.search(sentence):
        return False
    if len(words) < 4 or len(words) < 0.9 * len(sentence.split()) or stop_word_share(words) < 0.3:
        return False
    capitals = sum(word[0].isupper() for word in words[1:])
    balanced = sentence.count("(") == sentence.count(")") and sentence.count('"') % 2 == 0
    return balanced and capitals <= 1 + 0.2 * len(words)


def _runs(text: str) -> Iterator[list[str]]:
    """Longest runs of plain sentences that follow each other in a block, over paragraphs too."""
    flat = (sentence for part in paragraphs(text) for sentence in (sentences(part) if is_running(part) else [""]))
    for plain, run in itertools.groupby(flat, key=is_plain):
        if plain:
            yield list(run)


def _passage(text: str) -> Passage | None:
    """The passage that a run of sentences makes, or None when its length or its last word will not do."""
    words = text.removesuffix(".").split()
    target = words[-1]
    if not text.endswith(".") or not MIN_PASSAGE_WORDS <= len(words) <= MAX_PASSAGE_WORDS:
        return None
    if not _TARGET.fullmatch(target) or target.lower() in STOP_WORDS:
        return None
    earlier = {word.lower() for word in _WORD.findall(" ".join(words[:-1]))}
    return Passage(" ".join(words), target.lower() in earlier)


def passages(text: str) -> list[Passage]:
    """Passages of two sentences or more that share none; those whose last word recurs come first, then long ones."""
    chosen: list[Passage] = []
    for run in itertools.chain.from_iterable(map(_runs, text.split(BLOCK_BREAK))):
        spans = [(start, end) for start in range(len(run)) for end in range(start + 2, min(start + 9, len(run) + 1))]
        found = [(passage, start, end) for start, end in spans if (passage := _passage(" ".join(run[start:end])))]
        taken: set[int] = set()
        for passage, start, end in sorted(found, key=lambda item: (not item[0].recurs, item[2], item[1])):
            if taken.isdisjoint(range(start, end)):
                taken.update(range(start, end))
                chosen.append(passage)
    return chosen
