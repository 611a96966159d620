"""Hidden states of a real model on text, with its head and the targets, for the measurements of `gpu_check.py`.

    python benchmarks/hidden_states.py --model HuggingFaceTB/SmolLM2-135M-Instruct --output build/hidden.safetensors
    python benchmarks/gpu_check.py --hidden_states build/hidden.safetensors

How fast cut-cross-entropy is depends on how peaked the distributions are, because it skips small gradients; random
hidden states are no measure of that. The text is this repository's documentation unless `--text` names another file.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from selsft.bench.cases import save_states

ROOT = Path(__file__).resolve().parents[1]
LENGTH = 512


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a model of the Hub or a folder")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--text", type=Path, nargs="+", default=sorted(ROOT.glob("**/*.md")))
    options = parser.parse_args(argv)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    ids = tokenizer("\n\n".join(path.read_text() for path in options.text), return_tensors="pt").input_ids[0]
    if ids.numel() <= options.rows:
        parser.error(f"--text has {ids.numel()} tokens; --rows {options.rows} needs one more than rows")
    hidden = []
    with torch.no_grad():
        for start in range(0, options.rows, LENGTH):
            hidden.append(model.model(ids[None, start : min(start + LENGTH, options.rows)]).last_hidden_state[0])
    save_states(
        options.output,
        Path(options.model).name,
        torch.cat(hidden),
        model.get_output_embeddings().weight.detach(),
        ids[1 : options.rows + 1].contiguous(),
    )


if __name__ == "__main__":
    main()
