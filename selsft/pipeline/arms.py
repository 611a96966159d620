"""The arms of a run: what is trained beside the method, on the same rows, so that the run can say what it is worth.

    arms: plain,ignore,forget             # the default; also random and oracle
    arms: {plain: , strict: {negative_threshold: 2.0}, npo: {like: forget, forget_objective: npo}}

`plain` learns every token, `ignore` leaves the negative ones out, `forget` forgets them, `random` forgets as many
tokens that a draw has chosen, `oracle` forgets what the rows themselves call wrong. A variation is one of these with
other settings. Rejected: arms as recipes of their own, whose rows, order or steps would differ one day.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..records import RUN, read_json
from ..workflow.alike import NAME, SET_HERE, SHARED

PLAIN, IGNORE, FORGET, RANDOM, ORACLE = KINDS = ("plain", "ignore", "forget", "random", "oracle")
DEFAULT = (PLAIN, IGNORE, FORGET)


@dataclass(frozen=True)
class Arm:
    """`kind` is one of `KINDS`, `changes` the settings in which the arm differs from the recipe."""

    name: str
    kind: str
    changes: Mapping[str, Any] = field(default_factory=dict)


def parse_arms(given: Any, own: Mapping[str, Mapping[str, Any]], forgets: bool) -> list[Arm]:
    """The arms of a recipe.

    Args:
        given: value of `arms`: names with commas, a list of names, or a mapping of names to settings; the default when
            `None`.
        own: settings of arms from the command line (`--ARM.flag value`).
        forgets: whether the recipe forgets at all, and does not only ignore.

    Raises:
        `InputError` for a name that cannot be one, occurs twice or is no kind, and for settings that arms share.
    """
    if given is None:
        given = [name for name in DEFAULT if forgets or name != FORGET]
    if isinstance(given, str):
        given = [name.strip() for name in given.split(",") if name.strip()]
    if not isinstance(given, Mapping):
        if not isinstance(given, list) or not all(isinstance(name, str) for name in given):
            raise InputError(f"arms={given!r}: write names with commas, or a mapping of names to settings")
        if twice := [name for name in given if given.count(name) > 1]:
            raise InputError(f"arms: {twice[0]!r} is named twice")
        given = dict.fromkeys(given)
    if not given:
        raise InputError(f"arms is empty: name at least one of {', '.join(KINDS)}")
    arms = []
    for name, settings in given.items():
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise InputError(f"arms: {name!r} must be a name of letters, digits, '_' and '.'")
        if not isinstance(settings, Mapping | None):
            raise InputError(f"arms: {name}={settings!r} must map settings to values")
        changes = {**(settings or {}), **own.get(name, {})}
        kind = changes.pop("like", name if name in KINDS else FORGET)
        if kind not in KINDS:
            raise InputError(f"arms: {name}.like={kind!r} is none of {', '.join(KINDS)}")
        if name not in KINDS and not changes:
            raise InputError(f"arms: {name!r} is none of {', '.join(KINDS)}, and says in no setting what it does")
        if wrong := sorted((SHARED | SET_HERE) & set(changes)):
            raise InputError(f"arms: {name}.{wrong[0]} would change rows, order or steps: set it for all arms")
        arms.append(Arm(name, kind, changes))
    return arms


def method_of(arms: list[Arm]) -> Arm:
    """The arm that the verdict is about: forgetting, else ignoring, else the last one."""
    for kind in (FORGET, IGNORE):
        for arm in arms:
            if arm.kind == kind:
                return arm
    return arms[-1]


def write_random(selected: Path, model: str, folder: Path, seed: int, trust_remote_code: bool = False) -> int:
    """Write `selected.parquet` with the token weights of another one dealt out by chance among the same tokens.

    Special tokens keep their weight. Shares are kept in every chunk of a million tokens, so also as a whole; words are
    not kept together, as a pooled score would.

    Returns:
        number of negative tokens.
    """
    import numpy as np  # and what takes seconds: a plan names arms and draws nothing
    from datasets import Dataset
    from transformers import AutoTokenizer

    from ..data.chunks import ColumnWriter, supervised_mask, token_chunks, with_column
    from ..data.columns import WEIGHTS
    from ..data.tokenizers import special_ids
    from ..selection.select import SELECTED

    rows = Dataset.from_parquet(str(selected))
    special = special_ids(AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code))
    rng, negatives = np.random.default_rng(seed), 0
    writer = ColumnWriter(WEIGHTS, "int8")
    for chunk in token_chunks(rows, ["input_ids", "labels", WEIGHTS]):
        weights = chunk.columns[WEIGHTS].astype(np.int8)
        drawn = supervised_mask(chunk, padding_free=False) & ~np.isin(chunk.columns["input_ids"], special)
        weights[drawn] = rng.permutation(weights[drawn])
        negatives += int((weights < 0).sum())
        writer.write(weights, chunk.lengths)
    with_column(rows.remove_columns(WEIGHTS), WEIGHTS, writer.dataset()).to_parquet(str(folder / SELECTED))
    return negatives


def same_training(folders: Mapping[str, Path]) -> None:
    """Raise `InputError` when arms of one seed took different steps or saw different tokens.

    Args:
        folders: arm -> folder of its trained model, with the records that `selsft train` writes.
    """
    seen = {}
    for name, folder in folders.items():
        record = read_json(folder / RUN)
        data, finished = record.get("data", {}), record.get("finished") or {}
        seen[name] = (data.get("rows"), data.get("tokens"), finished.get("steps"))
    if len(set(seen.values())) > 1:
        shown = "; ".join(
            f"{name}: {rows} rows, {tokens} tokens, {steps} steps" for name, (rows, tokens, steps) in seen.items()
        )
        raise InputError(f"the arms were not trained alike, so they cannot be compared ({shown})")
