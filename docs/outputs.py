"""Writes the real output of each command into the pages: the block after `<!-- output: NAME -->`.

Run in the repository's root: `python -m docs.outputs [NAME ...]`, some eight minutes on one core. The rows and models
are the demo's toy world, made by `selsft run demo`, and for `selsft skills` that of the tests. Rejected: outputs typed
into pages, which nobody can make again.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).parents[1]
WORK = ROOT / "runs" / "outputs"
CPU = "--use_cpu true --bf16 false"
SKILLS = "--tasks hot_yes,size --tasks_dir tasks --model_name_or_path base --use_cpu true --seeds 1 --hidden_layer -2"
# In this order; a later one reads what an earlier one writes
COMMANDS = {
    "run": "selsft run demo --output_dir runs/demo",  # too long for a page: makes the world of the others
    "dry-run": "selsft run demo --output_dir runs/demo --negative_threshold 2.0 --dry_run",
    "score": "selsft score --model_name_or_path runs/demo/world/base --reference_model runs/demo/reference/model "
    f"--dataset_name runs/demo/world/train.jsonl {CPU} --show_tokens 5 --scored_dir runs/scored",
    "tokens": "selsft tokens --model_name_or_path runs/demo/world/base --dataset_name runs/demo/world/train.jsonl "
    f"{CPU} --tokens_dir runs/tokens",
    "export": "selsft export runs/scored --form weights --output runs/exported",
    "inspect": "selsft inspect runs/scored --text --rows 4",
    "train": f"selsft train --model_name_or_path runs/demo/world/base --dataset_name runs/scored {CPU} "
    "--learning_rate 5e-4 --max_steps 60 --logging_steps 20 --per_device_train_batch_size 32 --output_dir runs/forget",
    "evaluate": f"selsft evaluate --model_name_or_path runs/forget --dataset_name runs/demo/world/eval.jsonl {CPU} "
    "--base_model_name_or_path runs/demo/world/base --max_new_tokens 32 --evaluation_dir runs/results",
    "skills-dry-run": f"selsft skills {SKILLS} --output_dir runs/skills --dry_run",
    "skills": f"selsft skills {SKILLS} --num_train_epochs 1 --learning_rate 1e-3 --forget_learning_rate 1e-3 "
    "--forget_num_train_epochs 6 --output_dir runs/skills",
    "bench": "selsft bench --cpu --rows 512 --shapes 256x32000 --ignored 50 --implementations gemm selsft torch "
    "--seconds 1 --output_dir runs/bench",
}
NOISE = re.compile(r"^\s*$|it/s\]|examples/s\]|^Generating |\x1b\[K")


def output(command: str) -> str:
    """What a command prints, without progress; paths of this machine and colours do not appear."""
    print(f"$ {command}", flush=True)
    quiet = {"TQDM_DISABLE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "COLUMNS": "96", "NO_COLOR": "1"}
    environment = {**os.environ, **quiet, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    found = subprocess.run(
        [sys.executable, "-m", "selsft.cli", *shlex.split(command)[1:]],
        cwd=WORK, env=environment, check=True, text=True, stdout=subprocess.PIPE,
    )  # fmt: skip
    lines = [line.rstrip() for line in found.stdout.splitlines() if not NOISE.search(line)]
    return "\n".join(lines).replace(f"{WORK}/", "")


def main(names: list[str]) -> None:
    WORK.mkdir(parents=True, exist_ok=True)
    for name, command in COMMANDS.items():
        if names and name not in names:
            continue
        if name.startswith("skills") and not (WORK / "base").exists():
            from tests.support import skill_world

            skill_world.write_model(WORK / "base", skill_world.write_tasks(WORK / "tasks"), epochs=6.0)
        shown = " \\\n".join(textwrap.wrap(command, 94, subsequent_indent="    ", break_on_hyphens=False))
        block = f"<!-- output: {name} -->\n```\n$ {shown}\n{output(command)}\n```\n"
        place = re.compile(rf"<!-- output: {name} -->\n(```\n.*?^```\n)?", re.MULTILINE | re.DOTALL)
        for path in (ROOT / "docs").glob("*.md"):
            text = path.read_text(encoding="utf-8")
            if place.search(text):
                path.write_text(place.sub(lambda _, block=block: block, text), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
