"""What other tools and people have marked as wrong, read into rows with `spans` or `weight`.

One reader, `read_marked`, and one function for each format, from the text of a file to rows. Where several people
judged one text, their marks are merged as corrections are (`corrections`): characters that at least three quarters of
them mark are wrong, characters that somebody marks or doubts are unknown (weight 0), the rest is right. Offsets count
characters, end exclusive; what a format writes otherwise is turned into that here. `row` in messages counts from 0,
`line` from 1. Definitions: ERRANT's `Edit.to_m2` and NUCLE's scorer (m2); the data format of MQM Viewer and the
headers of wmt-mqm-human-evaluation (mqm); Label Studio's task format; LettuceDetect's `HallucinationSample` and the
answers of its detectors; `loss_weight` of LLaMA-Factory's v1 messages; `loss` and `loss_scale` of ms-swift's messages.

Rejected: a class for each format, which would hold no state; guessing a format from a file's content, since a table
with the wrong columns must be told as such; spaCy's tokens aligned again for m2, where the `S` line is the text.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from ..errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

Row = dict[str, Any]
Range = tuple[int, int, bool]  # start, end, and whether it is surely wrong
SUFFIXES = {".m2": "m2", ".tsv": "mqm"}
_MQM = ("system", "doc", "doc_id", "seg_id", "rater", "source", "target", "category", "severity", "metadata")
_QUOTED = re.compile(r'"((?:[^"]|"")*"")+[^"]*"')  # as csv writes a cell that holds quotation marks
_RIGHT = {"right", "correct", "ok", "good", "supported"}  # labels of Label Studio that do not mark an error
_UNKNOWN = {"unknown", "unsure", "unclear", "doubt", "neutral"}
_PEEK = 256
_LOSS_KEYS = {"loss_weight": "llamafactory", "loss_scale": "ms_swift", "loss": "ms_swift"}


def split_format(name: str) -> tuple[str | None, str]:
    """`mqm:ratings.tsv` as format and path. The ending of a file says it too (`.m2`, `.tsv`); `None` for all else."""
    prefix, colon, path = name.partition(":")
    if colon and prefix in FORMATS:
        return prefix, path
    return SUFFIXES.get(Path(name).suffix.lower()), name


def with_format(name: str | None, form: str | None) -> str | None:
    """`name` with the format in front of it, as every flag and key takes it."""
    if form is None:
        return name
    if form not in FORMATS:
        raise InputError(
            f"format={form!r} is unknown: use one of {', '.join(FORMATS)}, or leave it out for plain rows"
        )
    if name is None or split_format(name)[0] == form:
        return name
    return f"{form}:{name}"


def load_marked(path: str | Path, format: str | None = None) -> Dataset:
    """Rows from a file in which another tool says what is wrong (docs/formats.md).

    Args:
        path: the file, UTF-8.
        format: `"m2"`, `"mqm"`, `"label_studio"`, `"lettucedetect"`, `"llamafactory"` or `"ms_swift"`; by default what
            the ending of the file says (`.m2`, `.tsv`).

    Returns:
        rows with `text`, or `prompt` and `completion`, and `spans`; or `messages` with a `weight` each. `line` or
        `row` says where in the file a row stands; other fields are kept as they are.

    Raises:
        `InputError` naming the file, the row or line, and the remedy.
    """
    form, file = split_format(str(with_format(str(path), format)))
    if form is None:
        raise InputError(f"{str(path)!r}: give format, one of {', '.join(FORMATS)}")
    if not Path(file).is_file():
        raise InputError(f"{file!r}: no such file")
    try:
        content = Path(file).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{file!r} is not UTF-8 (byte {error.start}): convert it") from error
    return read_marked(content, form, file)


def read_marked(content: str, form: str, name: str) -> Dataset:
    """Rows of a file with this content; `name` is what messages call it."""
    where = f"{name!r} as {form}"
    rows = list(FORMATS[form](content.removeprefix("\ufeff"), where))
    if not rows:
        raise InputError(f"{where} has no rows: check that this is its format")
    names = dict.fromkeys(key for row in rows for key in row)
    from datasets import Dataset  # seconds, for plans that ask for the name of a format alone

    return Dataset.from_list([{key: row.get(key) for key in names} for row in rows])


def check_unread(data: Dataset | IterableDataset, name: str) -> None:
    """Raise `InputError` where messages have loss weights that only one of the formats reads: they would be lost. Of
    messages stored as JSON the first 256 rows are looked at."""
    for column in {"messages", "prompt", "completion"} & set(data.features or {}):
        struct = getattr(data.features[column], "feature", None)
        keys = set(struct) if isinstance(struct, Mapping) else set()
        if "Json(" in repr(data.features[column]):
            rows = [row[column] for row in itertools.islice(data, _PEEK)]
            keys |= {key for row in rows if isinstance(row, list) for message in row for key in message}
        for key in sorted(keys & _LOSS_KEYS.keys()):
            raise InputError(
                f"messages of {name!r} have {key!r}: read it with --format {_LOSS_KEYS[key]}, or drop the key to "
                "train without these weights"
            )


def merged(text: str, judges: Sequence[Sequence[Range]]) -> list[list[float]]:
    """What several judges say about one text: `[start, end, weight]`, in order; weight -1 is wrong and 0 unknown."""
    marked, doubted = np.zeros(len(text), int), np.zeros(len(text), bool)
    for ranges in judges:
        own = np.zeros(len(text), bool)
        for start, end, sure in ranges:
            (own if sure else doubted)[start:end] = True
        marked += own
    weights = np.where(4 * marked >= 3 * max(len(judges), 1), -1, np.where((marked > 0) | doubted, 0, 1))
    borders = [0, *(np.flatnonzero(np.diff(weights)) + 1).tolist(), len(text)]
    spans = itertools.pairwise(borders)
    return [
        [float(start), float(end), float(weights[start])] for start, end in spans if start < end and weights[start] < 1
    ]


def _lines(content: str) -> list[str]:
    """Lines by their line breaks alone: `splitlines` would cut texts at U+2028, U+0085 or a form feed."""
    return [line.removesuffix("\r") for line in content.split("\n")]


# m2: grammatical errors


def _m2(content: str, where: str) -> Iterator[Row]:
    text: str | None = None
    first = 0
    judges: dict[str, list[Range]] = {}
    words: list[tuple[int, int]] = []
    for number, line in enumerate([*_lines(content), ""], start=1):
        here = f"{where}, line {number}"
        if line.startswith("S ") or line == "S":
            if text is not None:
                raise InputError(f"{here} begins a sentence, line {first} too: put an empty line between sentences")
            text, first, judges = line[2:], number, {}
            words = [match.span() for match in re.finditer(r"\S+", text)]
        elif line.startswith("A ") and text is not None:
            fields = line[2:].split("|||")
            edit = re.fullmatch(r"(-?\d+) (-?\d+)", fields[0])
            if len(fields) != 6 or edit is None:
                raise InputError(
                    f"{here}: {_short(line)} is no edit: it needs A START END|||TYPE|||CORRECTION|||...|||ID"
                )
            start, end = int(edit[1]), int(edit[2])
            own = judges.setdefault(fields[5], [])
            if fields[1] == "noop" or start < 0:
                continue
            if not start <= end <= len(words):
                raise InputError(f"{here}: words {start} to {end} are outside of the sentence, which has {len(words)}")
            if start < end:
                own.append((words[start][0], words[end - 1][1], True))
            elif start < len(words):  # a missing word puts the next one in doubt
                own.append((*words[start], False))
        elif line.strip():
            raise InputError(f"{here}: {_short(line)} is neither a sentence (S ...) nor an edit of one (A ...)")
        elif text is not None:
            yield {"text": text, "spans": merged(text, list(judges.values())), "line": first}
            text = None


# MQM: errors in translations


def _mqm(content: str, where: str) -> Iterator[Row]:
    names: Sequence[str] = _MQM
    segments: dict[tuple[str, ...], dict[str, list[Range]]] = {}
    kept: list[Row] = []
    for number, line in enumerate(_lines(content), start=1):
        here = f"{where}, line {number}"
        cells = [_unquoted(cell) for cell in line.split("\t")]
        if number == 1 and cells[:2] == ["system", "doc"]:
            names = ["doc_id" if name == "docSegId" else "seg_id" if name == "globalSegId" else name for name in cells]
            if missing := {"rater", "source", "target", "category", "severity"} - set(names):
                raise InputError(
                    f"{here}: the header has no {min(missing)!r}: give the file the columns of MQM Viewer"
                )
            continue
        if not line.strip():
            continue
        if not len(names) - (names is _MQM) <= len(cells) <= len(names):
            raise InputError(
                f"{here} has {len(cells)} columns: it needs {', '.join(names[:9])}, separated by tabs, or a first "
                "line with the names of its columns"
            )
        row = dict(zip(names, cells, strict=False))
        severity, category = row["severity"].lower(), row["category"].lower()
        if not row["rater"] or severity.startswith("hotw"):  # metrics alone; errors planted to test the raters
            continue
        target, spans = _tagged(row["target"], here)
        source, in_source = _tagged(row["source"], here)
        own = {name: row[name] for name in names[:4] if name in row}
        key = (*own.values(), source, target)
        if key not in segments:
            segments[key] = {}
            prompt = source if source[-1:].isspace() else source + "\n"
            kept.append({"prompt": prompt, "completion": target, **own, "line": number})
        ranges = segments[key].setdefault(row["rater"], [])
        if "no-error" in (category.replace(" ", "-"), severity.replace(" ", "-")):
            continue
        sure = severity in ("major", "minor", "critical") and not category.startswith("source")
        if category.startswith("non-translation"):
            spans = [(0, len(target))]
        elif not spans and not in_source:  # an error that nobody has located
            spans, sure = [(0, len(target))], False
        ranges += [(start, end, sure) for start, end in spans]
    for row, judges in zip(kept, segments.values(), strict=True):
        yield {**row, "raters": len(judges), "spans": merged(row["completion"], list(judges.values()))}


def _unquoted(cell: str) -> str:
    return cell[1:-1].replace('""', '"') if _QUOTED.fullmatch(cell) else cell


def _tagged(text: str, where: str) -> tuple[str, list[tuple[int, int]]]:
    """The text without `<v>` and `</v>`, and what stood between them."""
    plain, spans, start = "", [], None
    for piece in re.split(r"(</?v>)", text):
        if piece == "<v>" and start is None:
            start = len(plain)
        elif piece == "</v>" and start is not None:
            spans.append((start, len(plain)))
            start = None
        elif piece in ("<v>", "</v>"):
            raise InputError(f"{where}: {_short(text)} has a {piece} too many: close every <v> by </v>")
        else:
            plain += piece
    if start is not None:
        raise InputError(f"{where}: {_short(text)} has a <v> that is not closed: add </v>")
    return plain, spans


# Label Studio: what people have marked in an interface


def _label_studio(content: str, where: str) -> Iterator[Row]:
    for number, task in enumerate(_json_rows(content, where)):
        here = f"{where}, row {number}"
        if "annotations" in task:
            data, found = task.get("data"), task["annotations"]
            if not isinstance(data, dict) or not isinstance(found, list):
                raise InputError(f"{here} is no task: it needs 'data' and a list of 'annotations'")
            results = [each.get("result") or [] for each in found if not each.get("was_cancelled")]
        elif "annotation_id" in task or "annotator" in task:  # exported as JSON-MIN
            data = {key: value for key, value in task.items() if not _is_regions(value)}
            results = [
                [
                    {"type": "labels", "value": region}
                    for value in task.values()
                    if _is_regions(value)
                    for region in value
                ]
            ]
        else:
            raise InputError(f"{here} has no 'annotations': export the project as JSON or JSON-MIN")
        column, row = _text_column(data, here)
        text = row[column]
        judges = [[_region(item, text, here) for item in result if _is_marked(item, here)] for result in results]
        extra = {"id": task["id"]} if "id" in task and "id" not in row else {}
        # Without an annotation nobody has judged the row
        yield {**row, **extra, "row": number, "spans": merged(text, judges) if judges else None}


def _is_regions(value: Any) -> bool:
    return (
        isinstance(value, list) and bool(value) and all(isinstance(each, dict) and "start" in each for each in value)
    )


def _is_marked(item: Row, where: str) -> bool:
    """Whether a result is a marked region of text: choices, ratings, texts and relations are not."""
    kind = item.get("type")
    if kind in ("hypertextlabels", "paragraphlabels", "paragraphs"):
        raise InputError(f"{where} has {kind!r}, whose offsets count in HTML or in turns: label plain <Text> instead")
    return kind == "labels"


def _region(item: Row, text: str, where: str) -> Range:
    value: dict[str, Any] = item.get("value") or {}
    start, end = (cast(int, value.get(key)) for key in ("start", "end"))
    if not _is_whole(start) or not _is_whole(end) or not 0 <= start < end <= len(text):
        raise InputError(
            f"{where}: region {_short(value)} does not fit the text, which has {len(text)} characters: check which "
            "field was labelled"
        )
    _check_text(value, text, where)
    labels = {str(label).lower() for label in value.get("labels") or []}
    if labels and labels <= _RIGHT:
        return start, start, True
    return start, end, not (labels and labels <= _UNKNOWN | _RIGHT)


def _check_text(value: Row, text: str, where: str) -> None:
    start, end, said = value["start"], value["end"], value.get("text")
    if isinstance(said, str) and said != text[start:end]:
        raise InputError(
            f"{where}: characters {start} to {end} are {_short(text[start:end])}, the mark says {_short(said)}: it "
            "was made on another text"
        )


# LettuceDetect: answers that their context does not support


def _lettucedetect(content: str, where: str) -> Iterator[Row]:
    for number, row in enumerate(_json_rows(content, where)):
        here = f"{where}, row {number}"
        key = next((key for key in ("labels", "predictions", "spans") if isinstance(row.get(key), list)), None)
        answer = row.get("answer")
        if key is None or not isinstance(answer, str):
            raise InputError(
                f"{here} needs 'answer', a text, and 'labels', 'predictions' or 'spans', a list: save each answer "
                "beside what the detector returned for it"
            )
        ranges = []
        for span in row[key]:
            if not isinstance(span, dict) or not _is_whole(span.get("start")) or not _is_whole(span.get("end")):
                raise InputError(f"{here}: {_short(span)} is no span: ask the detector for output_format='spans'")
            if not 0 <= span["start"] < span["end"] <= len(answer):
                raise InputError(
                    f"{here}: {_short(span)} is outside of the answer, which has {len(answer)} characters"
                )
            _check_text(span, answer, here)
            ranges.append((span["start"], span["end"], True))
        context = row.get("context")
        parts = [*(context if isinstance(context, list) else [context]), row.get("question")]
        prompt = row.get("prompt") or "\n".join(part for part in parts if isinstance(part, str))
        prompt += "" if not prompt or prompt[-1].isspace() else "\n"
        kept = {name: value for name, value in row.items() if name not in (key, "answer")}
        made = {"prompt": prompt, "completion": answer, "spans": merged(answer, [ranges])}
        yield {**kept, **made, "row": number}


# Loss weights of messages


def _llamafactory(content: str, where: str) -> Iterator[Row]:
    for number, row in enumerate(_json_rows(content, where)):
        messages = []
        for place, message in enumerate(_messages(row, f"{where}, row {number}")):
            here = f"{where}, row {number}: message {place}"
            parts = message.get("content")
            parts = [{"type": "text", "value": parts}] if isinstance(parts, str) else parts
            if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
                raise InputError(f"{here} has content={_short(parts)}: it needs a text or a list of parts")
            said = {"text": "", "reasoning": ""}
            for part in parts:
                if part.get("type") not in said or not isinstance(part.get("value"), str):
                    raise InputError(f"{here}: part {_short(part)} is neither text nor reasoning: remove the row")
                said[part["type"]] += part["value"]
            made = {"role": message["role"], "content": said["text"]}
            if said["reasoning"]:
                made["reasoning_content"] = said["reasoning"]
            default = float(message["role"] == "assistant")
            messages.append({**made, "weight": _number(message.get("loss_weight"), default, "loss_weight", here)})
        yield {**row, "messages": messages, "row": number}


def _ms_swift(content: str, where: str) -> Iterator[Row]:
    for number, row in enumerate(_json_rows(content, where)):
        messages: list[Row] = []
        for place, message in enumerate(_messages(row, f"{where}, row {number}")):
            here = f"{where}, row {number}: message {place}"
            role, text, loss = message["role"], message.get("content"), message.get("loss")
            if not isinstance(text, str):
                raise InputError(f"{here} has content={_short(text)}: it needs a text")
            if loss is not None and loss not in (0, 1):
                raise InputError(f"{here}: loss={_short(loss)} must be true or false")
            weight = _number(message.get("loss_scale"), 1.0, "loss_scale", here)
            weight = weight if role == "assistant" and loss in (None, 1) else 0.0
            if messages and messages[-1]["role"] == role == "assistant":  # one turn, as ms-swift joins them
                before = messages[-1]
                border, text = float(len(before["content"])), before["content"] + text
                spans = [*(before["spans"] or [[0.0, border, before["weight"]]]), [border, float(len(text)), weight]]
                messages[-1] = {"role": role, "content": text, "weight": weight, "spans": spans}
            else:
                messages.append({"role": role, "content": text, "weight": weight, "spans": None})
        yield {**row, "messages": messages, "row": number}


def _messages(row: Row, where: str) -> list[Row]:
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        raise InputError(f"{where} has no 'messages': this format is for conversations")
    for place, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise InputError(f"{where}: message {place} has no 'role': give it a text such as 'user' or 'assistant'")
    return messages


def _number(value: Any, default: float, key: str, where: str) -> float:
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not np.isfinite(value):
        raise InputError(f"{where}: {key}={_short(value)} must be a finite number")
    return float(value)


# JSON


def _json_rows(content: str, where: str) -> list[Row]:
    """The objects of a JSON list, or of a file with one on each line."""
    if content.lstrip().startswith("["):
        try:
            rows = json.loads(content)
        except ValueError as error:
            raise InputError(f"{where} is not JSON ({error})") from error
    else:
        rows = []
        for number, line in enumerate(content.split("\n"), start=1):
            try:
                rows += [json.loads(line)] if line.strip() else []
            except ValueError as error:
                raise InputError(f"{where}, line {number} is not JSON ({error})") from error
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise InputError(f"{where}, row {number} is {_short(row)}: it needs an object with a key per field")
    return rows


def _text_column(data: Row, where: str) -> tuple[str, Row]:
    """Which column of a row holds what was judged, and the row with the names that training reads."""
    row = dict(data)
    for old, new in (("answer", "completion"), ("response", "completion"), ("question", "prompt")):
        if new not in row and isinstance(row.get(old), str):
            row[new] = row.pop(old)
    column = "completion" if isinstance(row.get("completion"), str) else "text"
    if not isinstance(row.get(column), str):
        raise InputError(
            f"{where} has the fields {', '.join(map(repr, data))}: it needs 'text', or 'prompt' and 'completion'"
        )
    if column == "completion":
        row.setdefault("prompt", "")
    return column, row


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


FORMATS: dict[str, Callable[[str, str], Iterator[Row]]] = {
    "m2": _m2,
    "mqm": _mqm,
    "label_studio": _label_studio,
    "lettucedetect": _lettucedetect,
    "llamafactory": _llamafactory,
    "ms_swift": _ms_swift,
}
