"""Everything that needs a GPU, in one go: the GPU tests, the kernel benchmark with the table of the bars, training
steps, and scoring throughput.

Run it in the root of the repository with the development dependencies installed (`make gpu-check` does). Arguments go
to the kernel benchmark; `--main` measures only the shape that the bars are about, which takes minutes, not an hour.
Exits with 1 if a test or a benchmark fails, 3 if a bar is missed, and 2 without a CUDA device.
"""

import subprocess
import sys
from pathlib import Path

# About the shape of a model of 1.2B parameters
_SCORING = ["--layers", "16", "--width", "2048", "--vocab", "128256", "--budget", "16384", "--tokens", "1000000"]


def main(argv: list[str]) -> int:
    import torch

    from selsft.bench import kernels, records
    from selsft.bench.accuracy import measure_errors
    from selsft.bench.bars import bars, table
    from selsft.bench.cases import MAIN_SHAPE

    if not torch.cuda.is_available():
        print("gpu_check: there is no CUDA device here, so nothing was tested or measured", file=sys.stderr)
        return 2
    tests = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "tests/triton",
        "tests/kernels",
        "tests/training/test_device_step.py",
    ]
    if subprocess.run(tests, check=False).returncode != 0:
        print("gpu_check: the tests failed, so nothing was measured", file=sys.stderr)
        return 1
    if kernels.main(argv) != 0:
        return 1
    device = torch.device("cuda")
    output: Path = kernels.parser().parse_args(argv).output_dir
    path = (output / records.file_stem(device)).with_suffix(".csv")
    result = bars(records.read(path), measure_errors(device, *MAIN_SHAPE, torch.bfloat16))
    text = f"# Bars, {torch.cuda.get_device_name()}\n\n{table(result)}\n"
    path.with_name(path.stem + "-bars.md").write_text(text)
    print("\n" + text)
    stem = path.stem.replace("kernels", "scoring")
    others = {
        "gpu_step.py": ["--output_dir", str(output)],
        "scoring.py": ["--device", "cuda", "--dtype", "bfloat16", *_SCORING, "--output", str(output / f"{stem}.csv")],
    }
    for script, arguments in others.items():
        command = [sys.executable, str(Path(__file__).with_name(script)), *arguments]
        if subprocess.run(command, check=False).returncode != 0:
            print(f"gpu_check: {script} failed", file=sys.stderr)
            return 1
    return 3 if any(bar.verdict == "MISS" for bar in result) else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
