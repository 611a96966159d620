"""From a judged sample to a probe that finds the rest, and to a model trained without it.

    python judged_probe.py --model Qwen/Qwen3-0.6B --messy messy.jsonl --judged judged.jsonl

`judged.jsonl` is what `selsft inspect` saves: rows with `spans`, `[]` where nothing is wrong.
"""

import argparse
import json
from pathlib import Path

from datasets import load_dataset
from peft import LoraConfig

from selsft import SelectiveSFTConfig, SelectiveSFTTrainer, score_dataset, use_folder

parser = argparse.ArgumentParser()
for name in ("model", "messy", "judged"):
    parser.add_argument(f"--{name}", required=True)
parser.add_argument("--precision", type=float, default=0.6)
parser.add_argument("--output", default="runs/judged-probe")
parser.add_argument("--cpu", action="store_true")
options = parser.parse_args()

messy, judged = (load_dataset("json", data_files=path, split="train") for path in (options.messy, options.judged))
device = {"use_cpu": True, "bf16": False} if options.cpu else {"bf16": True}
args = SelectiveSFTConfig(
    f"{options.output}/model",
    score="probe",
    target_precision=options.precision,
    forget_weight=0.0,
    learning_rate=1e-4,
    report_to="none",
    **device,
)

folder = f"{options.output}/scored"
scored = score_dataset(options.model, messy, judged=judged, output_dir=folder, args=args)
found = json.loads(Path(folder, "judged.json").read_text())["judged"]
for score, levels in found.items():
    auc = levels["token"]
    print(
        f"{score:10} AUC {auc['auc']:.3f} [{auc['auc_low']:.3f}, {auc['auc_high']:.3f}] on rows it was not fitted on"
    )

use_folder(args, folder)  # the threshold; refuses a score that is no better than chance
lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
trainer = SelectiveSFTTrainer(options.model, args, train_dataset=scored, peft_config=lora)
trainer.train()
trainer.save_model()
