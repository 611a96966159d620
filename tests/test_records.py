"""Files that are written: complete or absent, readable for those whom the umask allows, and known by their content."""

import json
import os

import pytest

from selsft.errors import InputError
from selsft.records import read_sealed, replaced, replaced_folder, write_json, write_sealed


@pytest.mark.parametrize(("umask", "file", "folder"), [(0o077, 0o600, 0o700), (0o022, 0o644, 0o755)])
def test_files_respect_the_umask(umask, file, folder, tmp_path):
    before = os.umask(umask)
    try:
        write_json(tmp_path / "a.json", {})
        with replaced(tmp_path / "b.bin") as handle:
            handle.write(b"b")
        with replaced_folder(tmp_path / "folder"):
            pass
    finally:
        os.umask(before)
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in ("a.json", "b.bin")] == [file, file]
    assert (tmp_path / "folder").stat().st_mode & 0o777 == folder


def test_what_fails_leaves_nothing(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"before")
    with pytest.raises(RuntimeError), replaced(tmp_path / "a.bin") as handle:
        handle.write(b"half")
        raise RuntimeError
    assert (tmp_path / "a.bin").read_bytes() == b"before" and len(list(tmp_path.iterdir())) == 1


def test_a_sealed_record_tells_every_change(tmp_path):
    path = tmp_path / "record.json"
    assert read_sealed(path, "score again") == {}
    record = {"number": 0.1, "list": [1, None], "path": "a"}
    write_sealed(path, record)
    assert read_sealed(path, "score again") == record
    content = json.loads(path.read_text())
    seal = content.pop("content_sha256")
    for damaged in ("{", "[]", "3", "{}", json.dumps(content), *(
        json.dumps({**content, "content_sha256": seal, name: 0.2}) for name in ("number", "list", "more")
    )):  # fmt: skip
        path.write_text(damaged)
        with pytest.raises(InputError, match=r"record.json' is damaged \(.+\): score again"):
            read_sealed(path, "score again")
