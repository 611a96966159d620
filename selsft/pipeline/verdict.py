"""The answer of a run in one sentence: what was compared, on what, who was better by how much, and what it cost.

Which measure it is about follows from the form of the held-out rows, and so is fixed before anything is trained.
"No difference was found" and "nothing was selected" are answers. Rejected: the measure with the largest effect, which
some measure always has.
"""

from __future__ import annotations

from typing import Any

# measure -> label, whether more is better, digits, column of values, column of sizes
MEASURES: dict[str, tuple[str, bool | None, int, str, str | None]] = {
    "exact_match": ("exact match of greedy answers", True, 3, "exact_match", None),
    "preference": ("prefers the right text of a minimal pair", True, 3, "preference", None),
    "margin": ("log-probability of the right over the wrong text of a pair, nats", True, 2, "margin", None),
    "gap": ("log-probability of right over wrong tokens, nats a token", True, 3, "gap", None),
    "nll": ("negative log-likelihood of held-out answers, nats a token", False, 3, "nll", "tokens"),
    "nll_right": ("the same, of tokens judged right", False, 3, "nll_right", "right_tokens"),
    "nll_wrong": ("the same, of tokens judged wrong", True, 3, "nll_wrong", "wrong_tokens"),
    "word_f1": ("overlap of words (F1) of greedy answers", True, 3, "word_f1", None),
    "chrf": ("overlap of characters (chrF) of greedy answers", True, 3, "chrf", None),
    "eos_rate": ("answers that end by themselves", True, 3, "ended", None),
    "answer_tokens": ("tokens of an answer", None, 1, "answer_tokens", None),
    "kl_to_base": ("KL to the base on the prompts, nats", False, 4, "kl_to_base", None),
}
# measure without a value for each row -> label, whether more is better, digits
TOTALS: dict[str, tuple[str, bool, int]] = {
    "text_nats_per_token": ("neutral text, nats a token", False, 4),
    "options_acc": ("accuracy on options", True, 3),
    "options_acc_norm": ("accuracy on options, by length", True, 3),
}
# In this order: what rows with accepted answers, minimal pairs (as a share, or by how much where no share moves),
# marks, and any rows at all allow
HEADLINES = ("exact_match", "preference", "margin", "gap", "nll")
BETTER, WORSE, NONE, NOTHING, STOPPED, SCORED, UNKNOWN = (
    "better", "worse", "no difference", "nothing selected", "stopped", "scored", "not evaluated",
)  # fmt: skip


def verdict(found: dict[str, Any], run: dict[str, Any], finished: bool) -> dict[str, Any]:
    """`kind`, `sentence`, and what it says as numbers: `measure`, `arm`, `baseline`, `value`, `low`, `high`, `rows`,
    `seeds`, `costs`, `controls`.

    Args:
        found: of `results`, without the verdict.
        run: content of `run.json`.
        finished: whether anything was trained and evaluated.
    """
    arm, baseline = found["method"], found["baseline"]
    outlook = found["outlook"]
    own = next((each for each in found["arms"] if each["name"] == arm), None)
    share = None if own is None else own["selected"]
    if run.get("only_score"):
        judged = outlook["lines"][1 if outlook["moved"] else 0] if outlook else "nothing was scored"
        return {
            "kind": SCORED,
            "sentence": f"Scored only, nothing was trained: {judged}.",
            "costs": [],
            "controls": [],
        }
    if share == 0:
        after = (
            "Nothing was trained." if not finished else f"So {arm} is plain fine-tuning, and differences are chance."
        )
        return {"kind": NOTHING, "sentence": f"Nothing was selected. {after}", "costs": [], "controls": []}
    if not finished:
        reason = run.get("stopped") or "it was cut off"
        return {"kind": STOPPED, "sentence": f"Stopped before training: {reason}.", "costs": [], "controls": []}
    measure = _headline(found, run)
    if measure is None or arm not in measure["differences"]:
        return {
            "kind": UNKNOWN,
            "sentence": f"{arm} was trained and not compared with {baseline}: no held-out rows could be measured.",
            "costs": [], "controls": [],
        }  # fmt: skip
    effect = measure["differences"][arm]
    kind = _kind(effect, measure["better"])
    digits = measure["digits"]
    base = measure["values"].get("base")
    values = f"{measure['values'][arm]:.{digits}f} against {measure['values'][baseline]:.{digits}f}" + (
        "" if base is None or baseline == "base" else f", base {base:.{digits}f}"
    )
    head = {
        BETTER: f"{arm} is better than {baseline}",
        WORSE: f"{arm} is worse than {baseline}",
        NONE: f"No difference was found between {arm} and {baseline}",
    }[kind]
    seeds = "one seed" if measure["seeds"] == 1 else f"{measure['seeds']} seeds"
    sentence = (
        f"{head} in {measure['label']}: {_signed(effect, digits)} ({values}), on {measure['rows']} held-out rows with "
        f"{seeds}."
    )
    costs, controls = _costs(found, arm, measure["name"]), _controls(found, measure, arm)
    if costs:
        sentence += f" Elsewhere: {'; '.join(each['text'] for each in costs)}."
    if controls:
        sentence += f" For comparison: {'; '.join(each['text'] for each in controls)}."
    return {
        "kind": kind, "sentence": sentence, "measure": measure["name"], "arm": arm, "baseline": baseline, **effect,
        "rows": measure["rows"], "seeds": measure["seeds"], "negative": own and own["negative"], "costs": costs,
        "controls": controls,
    }  # fmt: skip


def _headline(found: dict[str, Any], run: dict[str, Any]) -> dict[str, Any] | None:
    measures = {each["name"]: each for each in found["measures"]}
    if wanted := run.get("headline"):
        return measures.get(wanted)
    for name in HEADLINES:
        if name in measures and (name != "exact_match" or found.get("accepts") == "answers"):
            return measures[name]
    return None


def _kind(effect: dict[str, Any], better: bool | None) -> str:
    low, high = effect["low"], effect["high"]
    if low is None or not (low > 0 or high < 0) or better is None:
        return NONE
    return BETTER if (low > 0) == better else WORSE


def _signed(effect: dict[str, Any], digits: int) -> str:
    text = f"{effect['value']:+.{digits}f}"
    return text if effect["low"] is None else f"{text} [{effect['low']:+.{digits}f}, {effect['high']:+.{digits}f}]"


def _costs(found: dict[str, Any], arm: str, headline: str) -> list[dict[str, Any]]:
    """What the method changed where it should change nothing: against the baseline, and its distance to the base."""
    costs = []
    for measure in found["measures"]:
        name, effect = measure["name"], measure["differences"].get(arm)
        if name in ("nll_right", "text_nats_per_token", "kl_to_base") and effect and name != headline:
            what = {
                "nll_right": "right tokens", "text_nats_per_token": "neutral text", "kl_to_base": "KL to the base",
            }[name]  # fmt: skip
            unit = "nats" if name == "kl_to_base" else "nats a token"
            costs.append({"name": name, **effect, "text": f"{what} {_signed(effect, measure['digits'])} {unit}"})
    return costs


def _controls(found: dict[str, Any], measure: dict[str, Any], arm: str) -> list[dict[str, Any]]:
    """The same effect of the arms that show what selection is worth: by chance, and by the truth."""
    controls = []
    for each in found["arms"]:
        effect = measure["differences"].get(each["name"])
        if each["kind"] in ("random", "oracle") and each["name"] != arm and effect:
            kind = _kind(effect, measure["better"])
            text = f"{each['name']} {_signed(effect, measure['digits'])}"
            controls.append({"arm": each["name"], "kind": kind, **effect, "text": text})
    return controls
