"""Teach a model two small skills, make it forget one, and measure what is left of both.

    python skill_forgetting.py --model HuggingFaceTB/SmolLM2-135M

Writes the questions of two tasks and hands them to `selsft skills`, whose page is `runs/skill-forgetting/report.html`.
"""

import argparse
import json
import random
import subprocess
from pathlib import Path

parser = argparse.ArgumentParser()
parser.add_argument("--model", required=True)
parser.add_argument("--output", default="runs/skill-forgetting")
parser.add_argument("--numbers", type=int, default=200, help="questions of each task")
parser.add_argument("--cpu", action="store_true")
options = parser.parse_args()

# Questions whose answer is right or wrong, and one file for each task
tasks = {
    "parity": ("Is {} an odd number?", lambda number: number % 2),
    "size": ("Is {} larger than five hundred?", lambda number: number > 500),
}
folder = Path(options.output + "-tasks")
folder.mkdir(parents=True, exist_ok=True)
draw = random.Random(0)
for name, (question, answer) in tasks.items():
    numbers = draw.sample(range(1000), options.numbers)
    lines = [
        {
            "id": f"{name}-{number}",
            "prompt": f"Question: {question.format(number)}\nAnswer:",
            "options": ["no", "yes"],
            "gold": int(answer(number)),
            "split": "test" if place % 2 else "train",
        }
        for place, number in enumerate(numbers)
    ]
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

subprocess.run(
    ["selsft", "skills", "--tasks", ",".join(tasks), "--tasks_dir", str(folder), "--label_tasks", "parity",
     "--methods", "uniform,unlikelihood", "--model_name_or_path", options.model, "--output_dir", options.output,
     *(["--use_cpu", "true"] if options.cpu else [])],
    check=True,
)  # fmt: skip
