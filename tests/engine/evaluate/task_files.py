"""Made-up items of every zero-shot task, in the plain form of files and in that of the model hub, and a model to ask."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from shutil import copyfile
from typing import Any

import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from mates.preprocess.tokenizer import tokenizer_files

Rows = Mapping[str, Sequence[Mapping[str, Any]]]
NAMES = {"boolq": "validation", "hellaswag": "validation", "piqa": "validation", "winogrande": "validation", "lambada": "lambada_test"}
ITEMS = 7


def plain_rows() -> dict[str, list[dict[str, Any]]]:
    source = random.Random(5)

    def text(words: int) -> str:
        return " ".join("".join(source.choices("abdeiklmoé", k=source.randint(1, 6))) for _ in range(words))

    def chosen(count: int) -> dict[str, Any]:
        return {"choices": [text(source.randint(1, 4)) for _ in range(count)], "label": source.randrange(count)}

    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in ("sciq", "arc_easy", "arc_challenge", "logiqa", "openbookqa")}
    rows |= {name: [] for name in NAMES}
    for number in range(ITEMS):
        sciq = {name: text(2) for name in ("question", "distractor1", "distractor2", "distractor3", "correct_answer")}
        rows["sciq"].append(sciq | {"support": "" if number == 0 else " " + text(20)})
        rows["arc_easy"].append({"question": text(9) + "?"} | chosen(4))
        rows["arc_challenge"].append({"question": text(9) + "?"} | chosen(3 if number == 0 else 4))
        rows["openbookqa"].append({"question": text(8)} | chosen(4))
        options = chosen(4)
        rows["logiqa"].append({"context": text(15), "question": text(5), "options": options["choices"], "label": options["label"]})
        rows["boolq"].append({"passage": text(30), "question": text(4), "answer": bool(source.randrange(2))})
        rows["hellaswag"].append({"query": f"{text(2)}: {text(10)}."} | chosen(4))
        rows["piqa"].append({"goal": text(5), "sol1": text(6), "sol2": text(6), "label": source.randrange(2)})
        gap = f"{text(4)} _ {text(4)}."
        rows["winogrande"].append({"sentence": gap, "option1": text(1), "option2": text(1), "answer": source.choice("12")})
        rows["lambada"].append({"text": text(20)})
    return rows


def hub_rows(plain: Rows) -> dict[str, list[dict[str, Any]]]:
    """The same items as the model hub has them. Labels of choices are digits there as often as letters."""

    def choices(row: Mapping[str, Any], question: str) -> dict[str, Any]:
        labels = [str(number + 1) for number in range(len(row["choices"]))]
        texts = {"text": row["choices"], "label": labels}
        return {question: row["question"], "choices": texts, "answerKey": labels[row["label"]]}

    def hellaswag(row: Mapping[str, Any]) -> dict[str, Any]:
        activity, _, context = row["query"].partition(": ")
        return {"activity_label": activity, "ctx_a": context, "ctx_b": "", "endings": row["choices"], "label": str(row["label"])}

    forms = {
        "arc_easy": lambda row: choices(row, "question"),
        "arc_challenge": lambda row: choices(row, "question"),
        "openbookqa": lambda row: choices(row, "question_stem"),
        "logiqa": lambda row: {**row, "label": "abcd"[row["label"]]},
        "boolq": lambda row: {"passage": row["passage"], "question": row["question"], "label": int(row["answer"])},
        "hellaswag": hellaswag,
    }
    return {name: [dict(forms.get(name, dict)(row)) for row in rows] for name, rows in plain.items()}


def write_rows(folder: Path, rows: Rows) -> Path:
    for name, items in rows.items():
        (folder / name).mkdir(parents=True)
        lines = "".join(json.dumps(item) + "\n" for item in items)
        (folder / name / f"{NAMES.get(name, 'test')}.jsonl").write_text(lines)
    return folder


def write_model(folder: Path, tokenizer: Path, positions: int = 512) -> Path:
    """A random GPT-NeoX of 500 entries whose predictions are far from uniform."""
    torch.manual_seed(3)
    config = GPTNeoXConfig(
        vocab_size=512,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=positions,
        initializer_range=0.3,
    )
    GPTNeoXForCausalLM(config).save_pretrained(folder)
    for file in tokenizer_files(tokenizer):
        copyfile(file, folder / file.name)
    return folder
