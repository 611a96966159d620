"""Every artefact is what was written and was made from what is there now: a flipped bit in it, or another one in its
place, is refused in one line that names the file and what to do, or computed again where nothing is lost by that.

The list of artefacts is in docs/decisions.md.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.support import commands

pytestmark = pytest.mark.slow

_PLAIN = {**commands._MODEL, "save_strategy": "no"}
_LORA = {"use_peft": True, "lora_target_modules": ["q_proj", "v_proj"]}
# The artefacts, made twice: from `model` and `reference`, and from the other way round
MADE = {
    "scored": ["score", *commands.flags({**commands._SCORE, "reference_model": "reference", "scored_dir": "scored"})],
    "probed": ["score", *commands.flags({**commands._SCORE, "score": "probe", "judged": "judged.jsonl",
                                         "scored_dir": "probed"})],
    "trained": ["train", *commands.flags({**_PLAIN, "output_dir": "trained"})],
    "tuned": ["train", *commands.flags({**_PLAIN, **_LORA, "output_dir": "tuned"})],
}  # fmt: skip


def train(**flags) -> list[str]:
    return ["train", *commands.flags({**_PLAIN, "negative_threshold": 0.01, "output_dir": "out", **flags})]


def evaluate(model: str) -> list[str]:
    return ["evaluate", *commands.flags({**_PLAIN, "model_name_or_path": model, "evaluation_dir": "out",
                                         "max_new_tokens": 0})]  # fmt: skip


@dataclass
class Artefact:
    """A file, the command that reads it, and what that says of a changed file and of another in its place."""

    file: str
    reads: list[str]
    says: list[str]
    swapped: list[str] = field(default_factory=list)


TRAINED = "not the file that selsft_run.json says was trained: train it again"
ARTEFACTS = [
    Artefact("scored/shard-00001.parquet", train(dataset_name="scored"),
             ["shard-00001.parquet' is damaged", "remove it and run the same `selsft score` command again"]),
    Artefact("scored/selsft_scores.json", train(dataset_name="scored"),
             ["selsft_scores.json' is damaged", "--rescore true"], ["shard-00000.parquet' is damaged"]),
    Artefact("probed/probe/probe.safetensors", train(score="probe", probe="probed/probe"),
             ["probe='probed/probe'", "probe.safetensors is not the file that probe.json names: fit it again"]),
    Artefact("probed/probe/probe.json", train(score="probe", probe="probed/probe"),
             ["probe='probed/probe'", "its content is not what was written", "fit it again"],
             ["probe.safetensors is not the file that probe.json names: fit it again"]),
    Artefact("probed/probe/out_of_fold.safetensors", MADE["probed"],
             ["out_of_fold.safetensors' is damaged", "remove the folder and run the same command again"]),
    Artefact("probed/judged.json", ["inspect", "probed", "--output", "out/page.html"],
             ["judged.json' is damaged", "run the same `selsft score` command again"]),
    Artefact("trained/model.safetensors", evaluate("trained"),
             ["model_name_or_path='trained'", f"model.safetensors is {TRAINED}"]),
    Artefact("tuned/adapter_model.safetensors", train(reference_model="tuned"),
             ["reference_model='tuned'", f"adapter_model.safetensors is {TRAINED}"]),
]  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder with the artefacts, and the one with those that were made from other weights."""
    root = tmp_path_factory.mktemp("provenance")
    (root / "here").mkdir()
    commands.workspace(root / "here")
    shutil.copytree(root / "here", root / "there")
    for name, other in (("model", "reference"), ("reference", "model")):
        shutil.rmtree(root / "there" / name)
        shutil.copytree(root / "here" / other, root / "there" / name)
    for folder in (root / "here", root / "there"):
        for argv in MADE.values():
            done = commands.run(argv, folder)
            assert done.status == 0, done.text
    return root / "here", root / "there"


def flip(path: Path) -> None:
    """One bit: of a number in JSON, else far behind the header of the file, where only the values are."""
    content = bytearray(path.read_bytes())
    place = 60 if path.suffix == ".parquet" else len(content) - 9
    if path.suffix == ".json":  # a digit that is followed by another stays one
        place = next(k for k in range(len(content) // 2, len(content)) if content[k : k + 2].isdigit())
    content[place] ^= 1
    path.write_bytes(bytes(content))


def refused(argv: list[str], folder: Path, says: list[str]) -> None:
    done = commands.run(argv, folder)
    assert done.status == 2, done.text
    assert done.last.startswith(f"selsft {argv[0]}: error: ") and "Traceback" not in done.text, done.text
    for part in says:
        assert part in done.last
    assert not (folder / "out").exists()


@pytest.mark.parametrize("artefact", ARTEFACTS, ids=lambda artefact: artefact.file)
@pytest.mark.parametrize("how", ["flipped", "swapped"])
def test_refused(artefact, how, made, tmp_path):
    folder = commands.copy(made[0], tmp_path / "work")
    if how == "flipped":
        flip(folder / artefact.file)
        refused(artefact.reads, folder, artefact.says)
    elif artefact.file.endswith("judged.json"):
        pytest.skip("is whole; the command that made it writes it again")
    else:
        shutil.copy(made[1] / artefact.file, folder / artefact.file)
        refused(artefact.reads, folder, artefact.swapped or artefact.says)


def test_a_folder_of_scores_belongs_to_its_weights_and_its_vocabulary(made, tmp_path):
    folder = commands.copy(made[0], tmp_path / "work")
    shutil.rmtree(folder / "scored")
    shutil.copytree(made[1] / "scored", folder / "scored")
    other = ["dataset_name='scored' was scored with another model (sha256 ", "score the data again", "--go_on true"]
    refused(train(dataset_name="scored"), folder, other)
    assert commands.run(train(dataset_name="scored", go_on=True), folder).status == 0
    shutil.rmtree(folder / "out")
    assert commands.run(train(dataset_name="scored", model_name_or_path="reference"), folder).status == 0
    shutil.rmtree(folder / "out")
    tokenizer = folder / "reference" / "tokenizer.json"
    text = tokenizer.read_text()
    names = [f'"{letter}":' for letter in "bc"]
    assert all(name in text for name in names)
    tokenizer.write_text(text.replace(names[0], "\0").replace(names[1], names[0]).replace("\0", names[1]))
    refused(train(dataset_name="scored", model_name_or_path="reference"), folder, ["another vocabulary (sha256 "])


@pytest.mark.parametrize("how", ["flipped", "swapped"])
def test_a_cache_that_does_not_match_is_computed_again(how, made, tmp_path):
    folder = commands.copy(made[0], tmp_path / "work")
    argv = train(reference_model="reference", scoring_cache_dir="cache")
    assert commands.run(argv, folder).status == 0
    first = commands.results(folder)
    shutil.rmtree(folder / "out")
    shards = sorted((folder / "cache").glob("*/shard-*.parquet"))
    assert len(shards) == 2  # of the model and of the reference
    right = [pq.read_table(shard).to_pydict() for shard in shards]
    if how == "flipped":
        flip(shards[0])
    else:
        shutil.copy(shards[0], shards[1])
    assert commands.run(argv, folder).status == 0
    assert [pq.read_table(shard).to_pydict() for shard in shards] == right
    assert commands.results(folder) == first
