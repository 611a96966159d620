"""Public data sets as rows for `arms.py`: MedQuAD with planted damage, judged TruthfulQA answers, GSM8K solutions.

    python benchmarks/study/corpora.py medquad medquad.jsonl.xz --damaged 0.2 > medquad.jsonl
    python benchmarks/study/corpora.py truthful truthful_judged.jsonl > truthful.jsonl
    python benchmarks/study/corpora.py gsm8k gsm8k_solutions.jsonl gsm8k_test.jsonl > gsm8k.jsonl

Every random choice has seed 0. Nothing of the data sets is in this repository. Rejected: `selsft.data.corrupt` for the
damage, since a probe without labels is trained on it and would be measured on its own rules.
"""

from __future__ import annotations

import argparse
import json
import lzma
import random
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

WORDS = 45  # of a MedQuAD answer: two cores train about 290 tokens a second
ROWS, HELD = 1500, 150


def read(path: str) -> list[dict]:
    data = Path(path).read_bytes()
    text = (lzma.decompress(data) if path.endswith(".xz") else data).decode("utf-8")
    return [json.loads(line) for line in text.split("\n") if line]


def medquad(path: str, damaged: float) -> Iterator[dict]:
    """Answers cut to `WORDS` words, a share of them damaged in one of three ways: the answer to another question of
    the same type; every fifth word replaced by a word of another answer; every number replaced, if there is one.

    `HELD` rows of other diseases, all of them damaged, are held out.
    """
    rng = random.Random(0)
    rows = rng.sample([row for row in read(path) if row["split"] == "train"], ROWS + HELD)
    texts = [" ".join(row["answer"].split()[:WORDS]) for row in rows]
    held = {row["focus"] for row in rows[:HELD]}
    for number, (row, text) in enumerate(zip(rows, texts, strict=True)):
        if number >= HELD and row["focus"] in held:
            continue
        made, spans = text, []
        if number < HELD or rng.random() < damaged:
            made, spans = damage(number, rows, texts, rng)
        yield {
            "id": f"medquad-{number}", "group": row["focus"], "held": number < HELD, "prompt": row["question"],
            "completion": made, "corrected": [text], "spans": spans,
        }  # fmt: skip


def damage(number: int, rows: list[dict], texts: list[str], rng: random.Random) -> tuple[str, list[list]]:
    row, text = rows[number], texts[number]
    others = [n for n, other in enumerate(rows) if other["type"] == row["type"] and other["focus"] != row["focus"]]
    kind = ("swapped", "words", "numbers")[number % 3]
    if kind == "swapped" and others:
        other = texts[rng.choice(others)]
        return other, [[0, len(other), kind]]
    if kind == "numbers" and re.search(r"\d", text):
        return replaced(text, r"\d+", 1.0, lambda old: str(int(old) + rng.randint(1, 9)), rng, kind)
    words = [word for word in rng.choice(texts).split() if word.isalpha()] or ["the"]
    return replaced(text, r"[A-Za-z]+", 0.2, lambda old: rng.choice(words), rng, "words")


def replaced(text: str, pattern: str, share: float, new, rng: random.Random, kind: str) -> tuple[str, list[list]]:
    made, spans, done = "", [], 0
    for match in re.finditer(pattern, text):
        if rng.random() < share and (word := new(match.group())) != match.group():
            made += text[done : match.start()]
            spans.append([len(made), len(made) + len(word), kind])
            made += word
            done = match.end()
    return made + text[done:], spans


def truthful(path: str) -> Iterator[dict]:
    """Judged answers, by question; a wrong answer's correction is the true answer nearest to it in length."""
    by_question = defaultdict(list)
    for row in read(path):
        if row["split"] == "train" and len(row["answer"].split()) > 2 and row["answer"] != "I have no comment.":
            by_question[row["question"]].append(row)
    number = 0
    for question, rows in by_question.items():
        true = [row["answer"] for row in rows if row["true"]]
        for row in rows:
            nearest = sorted(true, key=lambda other: abs(len(other) - len(row["answer"])))
            yield {
                "id": f"truthful-{number}", "group": question, "prompt": question, "completion": row["answer"],
                "weight": 1 if row["true"] else -1, "corrected": [] if row["true"] else nearest[:1],
            }  # fmt: skip
            number += 1


def gsm8k(solutions: str, questions: str) -> Iterator[dict]:
    """Solutions of models, judged by their final number; a wrong one's correction is the reference solution."""
    right = {row["question"]: row["answer"] for row in read(questions)}
    for number, row in enumerate(read(solutions)):
        yield {
            "id": f"gsm8k-{number}", "group": row["question"], "prompt": row["question"],
            "completion": row["solution"],
            "weight": 1 if row["correct"] else -1, "corrected": [] if row["correct"] else [right[row["question"]]],
        }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("corpus", choices=["medquad", "truthful", "gsm8k"])
    parser.add_argument("files", nargs="+")
    parser.add_argument("--damaged", type=float, default=0.2, help="share of the rows (MedQuAD)")
    given = parser.parse_args()
    if given.corpus == "medquad":
        rows = medquad(given.files[0], given.damaged)
    elif given.corpus == "truthful":
        rows = truthful(given.files[0])
    else:
        rows = gsm8k(*given.files)
    for row in rows:
        print(json.dumps(row))


if __name__ == "__main__":
    main()
