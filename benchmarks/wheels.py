"""The packages that `gpu_check.py` needs beyond torch, triton, transformers, peft and pytest, for a machine without a
package index: fetched here as wheels, carried there, unpacked and put on the path.

    python benchmarks/wheels.py --python 3.12       # 3.4 MB in build/wheels, on a machine with an index
    python benchmarks/gpu_check.py                  # finds them there

All are plain Python. Rejected: installing them there, which changes an environment that is not ours.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path

# module -> requirement; what datasets and trl need and machines with transformers may lack is named too.
WHEELS = {
    "trl": "trl==1.16.0",
    "datasets": "datasets==5.2.0",
    "dill": "dill==0.4.1",
    "multiprocess": "multiprocess==0.70.19",
    "rich": "rich==15.0.0",
    "liger_kernel": "liger-kernel==0.8.5",
    "cut_cross_entropy": "cut-cross-entropy==25.1.1",
}
FOLDER = Path(__file__).parents[1] / "build" / "wheels"


def unpacked(folder: Path = FOLDER) -> Path:
    """A folder for `PYTHONPATH` with the packages that are not installed here, as far as their wheels are there."""
    site = folder / "site"
    for module in WHEELS:
        if importlib.util.find_spec(module) is None and not (site / module).exists():
            for wheel in folder.glob(f"{module}-*.whl"):
                with zipfile.ZipFile(wheel) as archive:
                    archive.extractall(site)
    return site


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=f"{sys.version_info[0]}.{sys.version_info[1]}", help="version over there")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    options = parser.parse_args(argv)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--python-version"]
    return subprocess.run([*command, options.python, "--dest", str(options.folder), *WHEELS.values()]).returncode


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
