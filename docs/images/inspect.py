# ruff: noqa: E501
"""Makes docs/images/inspect*.png: the page of `selsft inspect` on sentences with planted errors and made-up scores.

Run in the repository's root, with Chromium installed: `python -m docs.images.inspect`. No model is loaded: a token in a
planted error gets a lower log-probability under the reference, plus noise, so the picture shows the page and no result.
"""

from __future__ import annotations

import random
import tempfile
from pathlib import Path

import numpy as np
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from selsft.report.inspect import default_rule, write_inspection
from selsft.report.tokens import read_rows
from tests.support.browser import Tab, chromium

# (question, answer); *stars* are planted errors
TEXTS = {
    "garden": [
        ("How often should I water a cactus?", "Water a cactus *three times a day* while it grows, and let the soil dry out in between. In winter it needs almost no water at all."),
        ("When do I prune an apple tree?", "Prune apple trees in late winter, before the buds open. Remove dead wood first, then branches that cross, and *paint the cuts with milk*."),
        ("What does compost need?", "Compost needs air, moisture, and a mix of green and brown material. Turn the heap every few weeks so that it does not *catched fire*."),
        ("Why are the leaves of my tomato yellow?", "Yellow leaves at the bottom often mean too little nitrogen. Feed the plant, and water the soil rather than the leaves."),
    ],
    "kitchen": [
        ("How long does rice take to cook?", "White rice takes about fifteen minutes in *a litre of vinegar*, covered, over low heat. Let it rest for five minutes before you *serves it*."),
        ("Can I freeze bread?", "Yes. Slice the loaf first, wrap it well, and it keeps for three months. Toast the slices straight from the freezer."),
        ("What is a roux?", "A roux is flour cooked in fat, which thickens sauces. Stir equal weights of butter and *sand* until the mixture smells nutty."),
        ("How do I sharpen a knife?", "Draw the blade along a wet stone at an angle of twenty degrees, *edge last*, and finish on a finer stone."),
    ],
    "travel": [
        ("Which side do they drive on in Japan?", "Traffic in Japan keeps to the left, and the steering wheel is on the right. Rental cars are *automatic and free of charge*."),
        ("Do I need a visa for Norway?", "Citizens of the European Economic Area do not. Others may stay for ninety days in any half year, *and nights do not counts*."),
        ("What is the capital of Australia?", "The capital of Australia is *Sydney*. Parliament House stands on Capital Hill and is open to visitors most days."),
    ],
}  # fmt: skip


def tokenizer() -> PreTrainedTokenizerFast:
    plain = Tokenizer(models.BPE())
    plain.pre_tokenizer, plain.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    plain.train_from_iterator(
        [text for rows in TEXTS.values() for row in rows for text in row] + ["user assistant"] * 99, trainer
    )
    return PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<|im_end|>", additional_special_tokens=special)


def rows(tok: PreTrainedTokenizerFast, copies: int = 12) -> tuple[Dataset, list[dict]]:
    """Scored rows, and what is planted in them as a judged sample."""
    rng, order = np.random.default_rng(3), random.Random(3)
    found: list[dict] = []
    judged = []
    for copy in range(copies):
        for source, pairs in TEXTS.items():
            for question, answer in pairs:
                spans, plain, parts = [], "", answer.split("*")
                for place, part in enumerate(parts):
                    if place % 2:
                        spans.append([len(plain), len(plain) + len(part), -1])
                    plain += part
                prompt = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
                head = tok(prompt)["input_ids"]
                made = tok(plain, return_offsets_mapping=True)
                ids = [*head, *made["input_ids"], tok.eos_token_id]
                wrong = [any(a < end and b > start for start, end, _ in spans) for a, b in made["offset_mapping"]]
                level = np.concatenate([np.zeros(len(head)), np.array([*wrong, False], float)])
                base = -rng.gamma(1.2, 1.6, len(ids)) - 1.2 * level
                reference = np.minimum(
                    base + rng.normal(0.25, 0.55, len(ids)) - level * rng.gamma(2, 0.75, len(ids)), 0
                )
                labels = [-100] * len(head) + ids[len(head) :]
                name = f"{source}-{len(found):03}"
                found.append({"input_ids": ids, "labels": labels, "base_logps": base.astype(np.float32),
                              "ref_logps": reference.astype(np.float32), "id": name, "source": source})  # fmt: skip
                if copy and order.random() < 0.35:
                    judged.append({"id": name, "completion": plain, "spans": spans})
    return Dataset.from_list(found), judged


def picture(tab: Tab, page: Path, name: str, width: int, height: int, dark: bool, action: str) -> None:
    tab.open(page, width, height, dark)
    tab.wait("document.body.dataset.ready === '1'")
    tab.js(action)
    tab.frame()
    tab.screenshot(Path(__file__).parent / name)
    tab.js("localStorage.clear()")


def main() -> None:
    tok = tokenizer()
    data, judged = rows(tok)
    settings = {"score": "influence", "score_base_weight": 0.5, **default_rule("influence"), "neutral_band": 0.0,
                "score_lookahead": 0.0, "score_row_worst": None, "protect_special_tokens": True}  # fmt: skip
    with tempfile.TemporaryDirectory() as folder, chromium() as tab:
        page = Path(folder) / "inspect.html"
        about = {"title": "runs/scored", "lines": ["scores made up for this picture"], "measured": {}}
        found = read_rows(data, tok, 10**6)
        write_inspection(page, found, {**about, "total": len(data), "judged": []}, settings)
        show = "document.querySelector('#list .n3, #list .n2, #list .neg')"
        picture(tab, page, "inspect.png", 1240, 720, False, f"showTip({show}); 0")
        write_inspection(page, found, {**about, "total": len(data), "judged": judged}, settings)
        sort = "$('only').value = 'judged'; $('only').dispatchEvent(new Event('change')); $('target-use').click(); 0"
        picture(tab, page, "inspect-judged.png", 1240, 720, True, sort)


if __name__ == "__main__":
    main()
