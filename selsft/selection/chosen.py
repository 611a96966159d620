"""The score and the threshold of a scored folder, as its judged rows support them.

`selsft score` writes both into the manifest. Training uses them where the user sets nothing else, and stops where the
judged rows speak against them: a score no better than chance, or a precision that no threshold reaches. Without judged
rows the default rule selects, and the run says so. Rejected: a default threshold where none was found.
"""

from __future__ import annotations

import logging
from dataclasses import MISSING, fields
from pathlib import Path
from typing import cast

from ..config import SelectiveSFTConfig
from ..data.scored_folder import is_scored, read_manifest
from ..errors import InputError, check_type

logger = logging.getLogger(__name__)

_SETTINGS = ("score", "score_base_weight", "score_pooling", "score_row_worst", "score_lookahead")


def use_folder(args: SelectiveSFTConfig, folder: str | Path) -> None:
    """Give `args` the score and the threshold of a scored folder, in place, where they are at their defaults.

    An older folder, or one that was scored without judged rows, leaves the threshold as it is.

    Raises:
        `InputError` for a folder without scores, and when the judged rows speak against selecting by this folder,
            unless `args.go_on`.
    """
    check_type("args", args, SelectiveSFTConfig, "a SelectiveSFTConfig")
    check_type("folder", folder, (str, Path), "the folder of `selsft score`")
    if not is_scored(folder):
        raise InputError(f"{str(folder)!r} holds no scores: give a folder that `selsft score` has written")
    selection = read_manifest(folder).get("selection")
    if not selection:
        return
    defaults = {item.name: item.default for item in fields(args) if item.default is not MISSING}
    if args.score not in (defaults["score"], selection["score"]):
        return  # the judged rows measured another score
    unset = {name for name in _SETTINGS if getattr(args, name) == defaults[name]}
    for name in unset:
        setattr(args, name, selection[name])
    same = all(getattr(args, name) == selection[name] for name in _SETTINGS)
    if not same:
        return
    if selection["refusal"] and not args.go_on:
        raise InputError(
            f"dataset_name={str(folder)!r}: {selection['refusal']}. Judge more rows, use another score, or select by "
            "it all the same with --go_on true"
        )
    if not args.rule_is_default:
        return
    if selection["negative_threshold"] is not None:
        args.negative_threshold = selection["negative_threshold"]
        logger.warning(f"{folder}: {selection['threshold']}")
    elif selection["target_precision"] is not None:
        raise InputError(
            f"dataset_name={str(folder)!r}: {selection['threshold']}. Set negative_threshold or positive_fraction "
            "yourself, or score with a lower target_precision"
        )


def warn_unverified(args: SelectiveSFTConfig) -> None:
    """Say that the default rule is about to select: nobody has asked whether it finds what is wrong in these rows."""
    if not args.rule_is_default or args.score in ("random", "oracle", "given"):
        return
    if (share := args.effective_fraction) is not None:
        rule = f"the worst {1 - share:.0%} of the tokens are negative"
    else:
        rule = f"tokens with a score below {-cast(float, args.effective_threshold):g} are negative"
    logger.warning(
        f"score={args.score!r} is unverified: no judged rows have chosen a threshold, so {rule}, wrong or not. Mark "
        "the errors of 100 rows and run `selsft score --judged FILE --target_precision 0.6` (docs/scores.md)"
    )
