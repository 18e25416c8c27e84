# SPDX-License-Identifier: Apache-2.0
import errno
import json
import os
import shlex
import shutil
from importlib.metadata import version

import pytest
import torch
from full_disk import file_size_limit
from safetensors.torch import save_file

from trl_selfdistill.studies.facts.files import write_rows
from trl_selfdistill.studies.stage import fingerprint, model_identity, run_arguments, run_stage


class Work:
    """Writes its number of calls; fails while `error` is set, after it has written `started`."""

    def __init__(self):
        self.calls = 0
        self.found = []
        self.error = None

    def __call__(self, partial):
        self.calls += 1
        self.found.append(sorted(path.name for path in partial.iterdir()))
        (partial / "started").write_text("")
        if self.error is not None:
            raise self.error
        (partial / "result").write_text(str(self.calls))


@pytest.fixture
def work():
    return Work()


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "table.jsonl"
    path.write_text("{}\n")
    return path


def run_bytes(folder):
    return (folder / "run.json").read_bytes()


def test_a_finished_stage_is_not_run_again(tmp_path, table, work):
    first = run_stage(tmp_path / "out", {"seed": 0}, [table], work)
    before = run_bytes(first)
    assert run_stage(tmp_path / "out", {"seed": 0}, [table], work) == first
    assert (work.calls, run_bytes(first)) == (1, before)
    assert not (tmp_path / "out.partial").exists()


def test_a_changed_argument_runs_it_again(tmp_path, table, work):
    for seed in (0, 1, 0):
        folder = run_stage(tmp_path / "out", {"seed": seed}, [table], work)
        assert run_arguments(folder) == {"seed": seed}
    assert work.calls == 3 and (folder / "result").read_text() == "3"


def test_a_changed_input_file_runs_it_again(tmp_path, table, work):
    run_stage(tmp_path / "out", {}, [table], work)
    table.write_text('{"answer": 1}\n')
    run_stage(tmp_path / "out", {}, [table], work)
    table.touch()  # the same content
    run_stage(tmp_path / "out", {}, [table], work)
    assert work.calls == 2


def test_a_changed_model_folder_runs_it_again(tmp_path, work):
    model = tmp_path / "model"
    model.mkdir()
    (model / "weights").write_text("1")
    run_stage(tmp_path / "out", {}, [model], work)
    os.utime(model / "weights", ns=(0, 0))  # rewritten with the same size
    run_stage(tmp_path / "out", {}, [model], work)
    assert work.calls == 2


def test_the_stage_before_counts_by_its_run_and_by_its_tables(tmp_path, table, work):
    earlier = run_stage(tmp_path / "earlier", {"seed": 0}, [table], lambda partial: None)
    run_stage(tmp_path / "out", {}, [earlier], work)
    (earlier / "README.md").write_text("a card that was added later")
    run_stage(tmp_path / "out", {}, [earlier], work)
    assert work.calls == 1
    (earlier / "known.jsonl").write_text("edited by hand")
    run_stage(tmp_path / "out", {}, [earlier], work)
    assert work.calls == 2
    run_stage(tmp_path / "earlier", {"seed": 1}, [table], lambda partial: None)
    run_stage(tmp_path / "out", {}, [earlier], work)
    assert work.calls == 3


def test_a_moved_study_is_kept(tmp_path, work):
    for name in ("here", "there"):
        if name == "there":
            shutil.move(tmp_path / "here", tmp_path / "there")
        table, model = tmp_path / name / "table.jsonl", tmp_path / name / "model"
        if name == "here":
            model.mkdir(parents=True)
            (model / "config.json").write_text("{}")
            table.write_text("{}\n")
        arguments, inputs = model_identity(str(model))
        run_stage(tmp_path / name / "out", arguments, [table, *inputs], work)
    assert work.calls == 1


def test_a_model_of_the_hub_is_an_argument():
    assert model_identity("org/model") == ({"model": "org/model"}, [])


def test_a_missing_input_is_named(tmp_path, work):
    with pytest.raises(FileNotFoundError, match="missing.jsonl does not exist"):
        run_stage(tmp_path / "out", {}, [tmp_path / "missing.jsonl"], work)
    assert work.calls == 0


@pytest.mark.parametrize("error", [ValueError("bad row"), KeyboardInterrupt()], ids=lambda error: type(error).__name__)
def test_what_is_done_stays_and_the_next_run_goes_on(tmp_path, table, work, error):
    old = run_stage(tmp_path / "out", {"seed": 0}, [table], work)
    before = run_bytes(old)
    work.error = error
    with pytest.raises(type(error)):
        run_stage(tmp_path / "out", {"seed": 1}, [table], work)
    assert run_bytes(old) == before and (old / "result").read_text() == "1"
    work.error = None
    run_stage(tmp_path / "out", {"seed": 1}, [table], work)
    assert "started" in work.found[-1]  # its own unfinished work
    assert (old / "result").read_text() == "3" and not (tmp_path / "out.partial").exists()


def test_unfinished_work_by_other_arguments_is_not_gone_on_with(tmp_path, table, work):
    work.error = ValueError()
    with pytest.raises(ValueError):
        run_stage(tmp_path / "out", {"seed": 0}, [table], work)
    work.error = None
    run_stage(tmp_path / "out", {"seed": 1}, [table], work)
    assert work.found[-1] == ["run.json"]


def test_a_run_that_was_killed_right_before_the_end_is_only_moved(tmp_path, table, work):
    folder = run_stage(tmp_path / "out", {}, [table], work)
    folder.rename(tmp_path / "out.partial")
    run_stage(tmp_path / "out", {}, [table], work)
    assert work.calls == 1 and (folder / "result").read_text() == "1"


def test_a_folder_of_the_user_is_never_replaced(tmp_path, table, work):
    folder = tmp_path / "documents"
    folder.mkdir()
    (folder / "thesis.txt").write_text("ten years")
    with pytest.raises(ValueError, match="documents, which no stage wrote"):
        run_stage(folder, {}, [table], work)
    assert (folder / "thesis.txt").read_text() == "ten years" and work.calls == 0


def test_an_empty_folder_may_be_there(tmp_path, table, work):
    (tmp_path / "out").mkdir()
    assert run_stage(tmp_path / "out", {}, [table], work).is_dir() and work.calls == 1


@pytest.mark.parametrize("as_folder", [True, False])
def test_a_stage_does_not_replace_its_own_input(tmp_path, table, work, as_folder):
    earlier = run_stage(tmp_path / "annotated", {}, [table], lambda partial: (partial / "facts.jsonl").write_text("x"))
    with pytest.raises(ValueError, match="holds its input"):
        run_stage(earlier, {"seed": 1}, [earlier if as_folder else earlier / "facts.jsonl"], work)
    assert (earlier / "facts.jsonl").read_text() == "x"


WRITERS = {
    "text": lambda folder: (folder / "text").write_text("x" * 10_000),
    "facts": lambda folder: write_rows([{"answer": "x" * 10_000}], folder / "facts.jsonl"),
    "safetensors": lambda folder: save_file({"weight": torch.zeros(5_000)}, folder / "model.safetensors"),
    "torch.save": lambda folder: torch.save({"state": torch.zeros(5_000)}, folder / "optimizer.pt"),
    "copy": lambda folder: shutil.copyfile(__file__, folder / "copy"),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_is_told_and_leaves_the_old_result(tmp_path, table, writer):
    old = run_stage(tmp_path / "out", {"seed": 0}, [table], WRITERS[writer])
    before = {path.name: path.read_bytes() for path in old.iterdir()}
    with file_size_limit(5_000), pytest.raises(OSError, match="could not write into .*out.partial.*same command"):
        run_stage(tmp_path / "out", {"seed": 1}, [table], WRITERS[writer])
    assert {path.name: path.read_bytes() for path in old.iterdir()} == before
    run_stage(tmp_path / "out", {"seed": 1}, [table], WRITERS[writer])
    assert run_arguments(old) == {"seed": 1}


@pytest.mark.parametrize("size", [0, 100])
def test_a_disk_too_full_for_the_run_file(tmp_path, table, work, size):
    with file_size_limit(size), pytest.raises(OSError, match="out.partial"):
        run_stage(tmp_path / "out", {}, [table], work)
    run_stage(tmp_path / "out", {}, [table], work)
    assert work.calls == 1


def test_other_errors_are_not_taken_for_a_full_disk(tmp_path, table, work):
    (tmp_path / "broken.pt").write_bytes(b"PK\x03\x04 not a whole archive")
    for error, text in [
        (PermissionError(errno.EACCES, "no permission"), "no permission"),
        (RuntimeError("expected scalar type Float"), "scalar type"),
        (_error_of(lambda: torch.load(tmp_path / "broken.pt")), "archive"),
        (RuntimeError("[enforce fail at inline_container.cc:197] . PytorchStreamReader failed"), "StreamReader"),
    ]:
        work.error = error
        with pytest.raises(type(error), match=text) as caught:
            run_stage(tmp_path / "out", {}, [table], work)
        assert caught.value is error


def _error_of(function):
    try:
        function()
    except Exception as error:
        return error


def test_run_file_tells_how_the_result_was_made(tmp_path, table, work, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [str(tmp_path / "scripts" / "a.py"), "--facts", "my facts.csv"])
    run = json.loads(run_bytes(run_stage("out", {"seed": 0}, ["table.jsonl"], work)))
    assert shlex.split(run["command"]) == ["scripts/a.py", "--facts", "my facts.csv"]
    assert run["arguments"] == {"seed": 0} and run["inputs"] == {"table.jsonl": fingerprint(table)}
    assert run["seconds"] >= 0 and run["versions"]["torch"] == version("torch")


def test_a_whole_number_is_the_same_from_a_flag_and_from_yaml(tmp_path, table, work):
    for settings in ({"epochs": 20, "sizes": [1, 2]}, {"epochs": 20.0, "sizes": [1.0, 2]}, {"epochs": 20.5}):
        run_stage(tmp_path / "out", {"config": settings}, [table], work)
    assert work.calls == 2
