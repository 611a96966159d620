"""`selsft tokens` and docs/examples/vllm_scores.py: the ids of a run go to a server that speaks vLLM's protocol, and
what it answers is imported; other ids are refused, and an interrupted run resumes."""

import importlib.util
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, load_dataset

from selsft import SelectiveSFTConfig, load_scores, score_dataset
from selsft.cli import main
from tests.support import tiny
from tests.support.oracle import plain_logps

SCRIPT = Path(__file__).parents[2] / "docs" / "examples" / "vllm_scores.py"
CPU = ["--use_cpu", "true", "--bf16", "false"]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("vllm_scores", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def files(tmp_path):
    tiny.llama().save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    rows = [{"id": f"q-{i}", **row} for i, row in enumerate(tiny.prompt_data(14))]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def tokens(files, *more):
    given = ["--model_name_or_path", files / "model", "--dataset_name", files / "data.jsonl", "--max_length", "20"]
    return main(["tokens", *map(str, given), *CPU, "--tokens_dir", str(files / "tokens"), *more])


def answer(model, body):
    """What vLLM answers to a completion with `prompt_logprobs`: per position the token that is there and, if it is
    another one, the likeliest."""
    choices = []
    for index, ids in enumerate(body["prompt"]):
        with torch.no_grad():
            logps = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
        said = [None]
        for place in range(1, len(ids)):
            found = {str(int(logps[place - 1].argmax())): {"logprob": float(logps[place - 1].max()), "rank": 1}}
            found[str(ids[place])] = {"logprob": float(logps[place - 1, ids[place]]), "decoded_token": "?"}
            said.append(found)
        choices.append({"index": index, "text": "x", "finish_reason": "length", "prompt_logprobs": said})
    return {"object": "text_completion", "choices": choices[::-1]}  # in any order


@contextmanager
def serving(model, change=lambda body, answer: answer):
    """A server on a free port; `change` spoils an answer, or raises the status to answer with."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append({**body, "path": self.path})
            try:
                found, status = change(body, answer(model, body)), 200
            except RuntimeError as error:
                found, status = {"error": {"message": str(error)}}, int(error.args[0])
            data = json.dumps(found).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{http.server_address[1]}", asked
    finally:
        http.shutdown()
        http.server_close()


def ask(script, files, url, *more):
    return script.main([
        str(files / "tokens"), str(files / "served"), "--server", url, "--model", "tiny", "--rows", "3", *more
    ])  # fmt: skip


def test_from_ids_to_scores(files, script, capsys, options):
    assert tokens(files, "--part_tokens", "60") == 0
    assert "14 rows" in capsys.readouterr().out
    parts = sorted((files / "tokens").glob("part-*.parquet"))
    assert len(parts) > 1
    rows = load_dataset(str(files / "tokens"), split="train")
    own = load_dataset(str(files / "tokens"), "source", split="train")
    assert own["id"] == [f"q-{i}" for i in range(14)] and own["source_row"] == list(range(14))
    reference = tiny.llama(seed=1)
    with serving(reference) as (url, asked):
        assert ask(script, files, url) == 0
    assert {body["path"] for body in asked} == {"/v1/completions"}
    assert all(body["prompt_logprobs"] == 0 and body["max_tokens"] == 1 and len(body["prompt"]) <= 3 for body in asked)
    assert sum(len(body["prompt"]) for body in asked) == 14
    common = ["--model_name_or_path", files / "model", "--dataset_name", files / "data.jsonl", "--max_length", "20"]
    given = [*common, "--ref_logps", files / "served", "--scored_dir", files / "scored"]
    assert main(["score", *map(str, given), *CPU, "--dtype", "float32"]) == 0
    scored = load_scores(files / "scored")
    assert scored["input_ids"] == rows["input_ids"] and scored["labels"] == rows["labels"]
    for row in scored:
        expected = np.where(np.array(row["labels"]) == -100, 0, plain_logps(reference, row["input_ids"]))
        np.testing.assert_allclose(row["ref_logps"], expected, atol=2e-5)
    args = SelectiveSFTConfig(**{**options, "max_length": 20})
    data = Dataset.from_json(str(files / "data.jsonl"))
    own = score_dataset(
        tiny.llama(), data, reference_model=tiny.llama(seed=1), tokenizer=tiny.tokenizer(), args=args,
        output_dir=files / "here",
    )  # fmt: skip
    for ours, served in zip(own, scored, strict=True):
        np.testing.assert_allclose(ours["ref_logps"], served["ref_logps"], atol=2e-5)


@pytest.mark.parametrize("kind", ["text", "messages", "assistant", "shuffled"])
def test_ids_are_those_of_scoring(files, kind, options):
    data = {"text": tiny.text_data, "shuffled": tiny.text_data}.get(kind, tiny.chat_data)(10)
    data.to_json(str(files / "data.jsonl"))
    flags = {"assistant": {"assistant_only_loss": True}, "shuffled": {"shuffle_dataset": True}}.get(kind, {})
    assert tokens(files, *(part for name in flags for part in (f"--{name}", "true"))) == 0
    args = SelectiveSFTConfig(**{**options, **flags, "score": "surprisal", "max_length": 20})
    scored = score_dataset(str(files / "model"), data, args=args, output_dir=files / "scored")
    found = load_dataset(str(files / "tokens"), split="train")
    assert found["input_ids"] == scored["input_ids"] and found["labels"] == scored["labels"]
    said = pq.read_schema(files / "tokens" / "part-00000.parquet").metadata[b"tokenizer_sha256"].decode()
    identity = json.loads((files / "scored" / "selsft_scores.json").read_text())["identity"]
    assert said == identity["tokenizer_sha256"]


def test_an_interrupted_run_resumes(files, script):
    tokens(files, "--part_tokens", "60")
    count = len(list((files / "tokens").glob("part-*")))
    seen = []

    def stop(body, found):
        seen.append(body)
        if len(seen) > 4:
            raise RuntimeError(400)
        return found

    model = tiny.llama(seed=1)
    with serving(model, stop) as (url, _), pytest.raises(SystemExit, match="400"):
        ask(script, files, url, "--connections", "1")
    done = sorted(path.name for path in (files / "served").iterdir())
    assert 0 < len(done) < count
    stamps = {name: (files / "served" / name).stat().st_mtime_ns for name in done}
    with serving(model) as (url, asked):
        assert ask(script, files, url) == 0
    assert {name: (files / "served" / name).stat().st_mtime_ns for name in done} == stamps
    assert len(list((files / "served").iterdir())) == count
    kept = sum(pq.read_metadata(files / "tokens" / name).num_rows for name in done)
    assert sum(len(body["prompt"]) for body in asked) == 14 - kept
    with serving(model) as (url, asked):  # nothing is left to do, so nobody is asked
        assert ask(script, files, url) == 0 and not asked


def spoil(place):
    def change(body, found):
        for choice in found["choices"]:
            place(choice)
        return found

    return change


def another_token(choice):
    choice["prompt_logprobs"][2] = {"7777": {"logprob": -1.0}}


def one_less(choice):
    choice["prompt_logprobs"].pop()


def nothing(choice):
    choice["prompt_logprobs"] = None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (another_token, "row 0 of .*part-00000.parquet: the server scored another token than .* at position 2"),
        (one_less, "row 0 of .* has .* tokens, the server scored"),
        (nothing, "the server returned no prompt_logprobs"),
    ],
)
def test_other_ids_are_refused(files, script, change, message):
    tokens(files)
    with serving(tiny.llama(), spoil(change)) as (url, _), pytest.raises(SystemExit, match=message):
        ask(script, files, url)
    assert not list((files / "served").glob("*.parquet"))


def test_a_server_that_stumbles_is_asked_again(files, script, monkeypatch):
    tokens(files)
    monkeypatch.setattr(script.time, "sleep", lambda seconds: None)
    seen = []

    def stumble(body, found):
        seen.append(body)
        if len(seen) % 2:
            raise RuntimeError(503)
        return found

    with serving(tiny.llama(), stumble) as (url, _):
        assert ask(script, files, url, "--connections", "1") == 0
    (files / "served" / "part-00000.parquet").unlink()
    with pytest.raises(SystemExit, match="What is finished is kept"):
        ask(script, files, "http://127.0.0.1:9", "--retries", "0")


def test_tokens_that_changed_are_told(files, script):
    tokens(files)
    with serving(tiny.llama()) as (url, _):
        ask(script, files, url)
        (files / "data.jsonl").write_text(json.dumps({"prompt": "other", "completion": " rows"}) + "\n")
        for path in sorted((files / "tokens").rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        tokens(files)
        with pytest.raises(SystemExit, match="is about other tokens than"):
            ask(script, files, url)


def test_scores_of_other_rows_are_refused(files, script, capsys):
    """The import compares ids once more."""
    tokens(files)
    with serving(tiny.llama()) as (url, _):
        ask(script, files, url)
    common = ["--model_name_or_path", files / "model", "--dataset_name", files / "data.jsonl", "--max_length", "12"]
    given = [*common, "--ref_logps", files / "served", "--scored_dir", files / "scored"]
    assert main(["score", *map(str, given), *CPU]) == 2
    assert "input_ids has" in capsys.readouterr().err


def test_bad_input(files, capsys):
    assert tokens(files) == 0
    assert tokens(files) == 2
    assert "tokens_dir=" in (said := capsys.readouterr().err) and "exists and is not empty" in said
    assert main(["tokens", "--dataset_name", str(files / "data.jsonl"), *CPU, "--tokens_dir", str(files / "t")]) == 2
    assert "model_name_or_path is missing" in capsys.readouterr().err
    assert tokens(files, "--num_processes", "2", "--tokens_dir", str(files / "t")) == 2
    assert "selsft tokens runs in one process" in capsys.readouterr().err
    rows = [{"prompt": "a", "completion": " b c", "spans": [[1, 2]]}]
    (files / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert tokens(files, "--tokens_dir", str(files / "t")) == 2
    assert "the data says itself what is wrong in it" in capsys.readouterr().err


def test_script_without_tokens(tmp_path, script):
    with pytest.raises(SystemExit, match="has no part-"):
        script.main([str(tmp_path), str(tmp_path / "out"), "--model", "m"])
