# SPDX-License-Identifier: Apache-2.0
"""What is written takes the place of what was there when it is whole, and of nothing else."""

import pytest

from trl_selfdistill.files import write_json, write_jsonl, written_whole


def test_an_error_leaves_what_was_there(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "old").write_text("1")
    (tmp_path / "file").write_text("1")
    for name in ("file", "folder"):
        with pytest.raises(RuntimeError, match="stop"), written_whole(tmp_path / name) as partial:
            partial.mkdir() if name == "folder" else partial.write_text("2")
            raise RuntimeError("stop")
    assert (tmp_path / "file").read_text() == (tmp_path / "folder" / "old").read_text() == "1"
    assert {path.name for path in tmp_path.iterdir()} == {"file", "folder"}


@pytest.mark.parametrize("write", [write_json, write_jsonl])
def test_a_value_that_cannot_be_written_leaves_what_was_there(tmp_path, write):
    write(tmp_path / "file", ["old"])
    with pytest.raises(UnicodeEncodeError):
        write(tmp_path / "file", ["half of a surrogate pair: \ud83d"])
    assert "old" in (tmp_path / "file").read_text()


def test_a_folder_takes_the_place_of_a_folder(tmp_path):
    for name in ("old", "new"):
        with written_whole(tmp_path / "folder") as partial:
            partial.mkdir()
            (partial / name).write_text("")
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["new"]


def test_a_file_does_not_take_the_place_of_a_folder(tmp_path):
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs" / "weights").write_text("hours of work")
    with pytest.raises(IsADirectoryError):
        write_json(tmp_path / "outputs", {})
    assert (tmp_path / "outputs" / "weights").read_text() == "hours of work"
