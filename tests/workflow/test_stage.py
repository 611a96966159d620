"""A stage: what makes it unchanged."""

import os

from selsft.workflow.stage import Stage


def test_a_file_that_changed_at_its_size_is_noticed(tmp_path):
    """A flipped bit in an adapter or a shard of scores, or two files swapped, are not what the stage has made."""

    def work(folder):
        (folder / "a.bin").write_bytes(b"\x00" * 64)
        (folder / "b.bin").write_bytes(b"\x01" * 64)

    stage = Stage("train", {}, {}, work, tmp_path)
    stage.run()
    assert stage.state() == "finished"
    content = (stage.folder / "a.bin").read_bytes()
    (stage.folder / "a.bin").write_bytes(b"\x01" + content[1:])
    assert stage.state() == "changed"
    (stage.folder / "a.bin").write_bytes(content)
    assert stage.state() == "finished"
    os.rename(stage.folder / "a.bin", stage.folder / "c.bin")
    os.rename(stage.folder / "b.bin", stage.folder / "a.bin")
    os.rename(stage.folder / "c.bin", stage.folder / "b.bin")
    assert stage.state() == "changed"
