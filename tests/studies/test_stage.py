# SPDX-License-Identifier: Apache-2.0
import errno
import os
import shlex
import shutil
from importlib.metadata import version

import pytest
from trl import ModelConfig

from trl_selfdistill.files import read_json, write_json
from trl_selfdistill.studies.models import model_identity
from trl_selfdistill.studies.stage import fingerprint, run_arguments, run_stage


class Work:
    """Writes its number of calls; fails while `error` is set, after it has written `started`."""

    def __init__(self):
        self.calls, self.found, self.error = 0, [], None

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


def test_a_stage_runs_again_only_if_an_argument_or_the_content_of_an_input_has_changed(tmp_path, table, work):
    model, earlier = tmp_path / "model", tmp_path / "earlier"
    model.mkdir()
    (model / "weights").write_text("1")
    (tmp_path / "out").mkdir()  # an empty folder may be there
    run_stage(earlier, {"seed": 0}, [model], lambda partial: None)
    changes = [  # and how often it ran after them
        (lambda: None, 1),
        (table.touch, 1),
        (lambda: table.write_text('{"answer": 1}\n'), 2),
        (lambda: os.utime(model / "weights", ns=(0, 0)), 3),  # of the same size
        (lambda: (earlier / "README.md").write_text("a card that was added later"), 3),
        (lambda: (earlier / "known.jsonl").write_text("edited by hand"), 4),
        (lambda: run_stage(earlier, {"seed": 1}, [model], lambda partial: None), 5),
    ]
    for change, calls in changes:
        change()
        folder = run_stage(tmp_path / "out", {"epochs": 20, "sizes": [1, 2]}, [table, model, earlier], work)
        assert work.calls == calls and run_arguments(folder) == {"epochs": 20, "sizes": [1, 2]}
    # A whole number is the same from a flag and from YAML
    for arguments, calls in (({"epochs": 20.0, "sizes": [1.0, 2]}, 5), ({"epochs": 20.5, "sizes": [1, 2]}, 6)):
        run_stage(folder, arguments, [table, model, earlier], work)
        assert work.calls == calls and (folder / "result").read_text() == str(calls)
    assert not (tmp_path / "out.partial").exists()


def test_a_model_that_takes_the_place_of_a_stages_runs_the_next_one_again(tmp_path, work):
    model = run_stage(tmp_path / "model", {}, [], work)
    for calls, name in enumerate(("model.safetensors", "tokenizer.json", "generation_config.json"), start=2):
        run_stage(tmp_path / "out", {}, [model], work)
        (model / name).write_text(name)
        run_stage(tmp_path / "out", {}, [model], work)
        assert work.calls == calls + 1
    (model / "README.md").write_text("A card")
    run_stage(tmp_path / "out", {}, [model], work)
    assert work.calls == calls + 1


def test_the_folder_of_the_process_is_not_replaced(tmp_path, work, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="The folder of the result is '.', which cannot be replaced: name another"):
        run_stage(".", {}, [], work)
    assert os.path.isdir(os.getcwd())


def test_a_moved_study_is_kept(tmp_path, work):
    for name in ("here", "there"):
        if name == "there":
            shutil.move(tmp_path / "here", tmp_path / "there")
        table, model = tmp_path / name / "table.jsonl", tmp_path / name / "model"
        if name == "here":
            model.mkdir(parents=True)
            (model / "config.json").write_text("{}")
            table.write_text("{}\n")
        arguments, inputs = model_identity(str(model), ModelConfig())
        run_stage(tmp_path / name / "out", arguments, [table, *inputs], work)
    assert work.calls == 1


def test_a_model_of_the_hub_counts_by_its_name_and_revision_and_a_folder_by_its_content(tmp_path):
    """What says which adapter to train is no part of it: the annotation does not depend on that."""
    arguments, inputs = model_identity("org/model", ModelConfig(model_revision="v1", use_peft=True, lora_r=4))
    assert (arguments["model_name_or_path"], arguments["model_revision"], inputs) == ("org/model", "v1", [])
    assert arguments["load_in_4bit"] is False and not {"use_peft", "lora_r"} & arguments.keys()
    arguments, inputs = model_identity(str(tmp_path), ModelConfig())
    assert arguments["model_name_or_path"] is None and inputs == [str(tmp_path)]
    write_json(tmp_path / "lora" / "adapter_config.json", {"base_model_name_or_path": str(tmp_path)})
    assert model_identity(str(tmp_path / "lora"), ModelConfig())[1] == [str(tmp_path / "lora"), str(tmp_path)]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=repr)
def test_what_is_done_stays_and_the_next_run_goes_on_with_its_own_unfinished_work(tmp_path, table, work, error):
    old = run_stage(tmp_path / "out", {"seed": 0}, [table], work)
    before = (old / "run.json").read_bytes()
    work.error = error
    with pytest.raises(type(error)):
        run_stage(tmp_path / "out", {"seed": 1}, [table], work)
    assert (old / "run.json").read_bytes() == before and (old / "result").read_text() == "1"
    with pytest.raises(type(error)):
        run_stage(tmp_path / "out", {"seed": 2}, [table], work)
    work.error = None
    run_stage(tmp_path / "out", {"seed": 2}, [table], work)
    assert work.found[1:] == [["run.json"], ["run.json"], ["run.json", "started"]]
    assert (old / "result").read_text() == "4" and not (tmp_path / "out.partial").exists()


def test_a_run_that_was_killed_right_before_the_end_is_only_moved(tmp_path, table, work):
    folder = run_stage(tmp_path / "out", {}, [table], work)
    folder.rename(tmp_path / "out.partial")
    run_stage(tmp_path / "out", {}, [table], work)
    assert work.calls == 1 and (folder / "result").read_text() == "1"


def test_a_stage_needs_its_inputs_and_replaces_neither_them_nor_a_folder_of_the_user(tmp_path, table, work):
    earlier = run_stage(tmp_path / "annotated", {}, [table], lambda partial: (partial / "facts.jsonl").write_text("x"))
    documents = shutil.copytree(earlier, tmp_path / "documents", ignore=shutil.ignore_patterns("run.json"))
    for folder, path, message in (
        (documents, table, "documents, which no stage wrote"),
        (earlier, earlier, "holds its input"),
        (earlier, earlier / "facts.jsonl", "holds its input"),
    ):
        with pytest.raises(ValueError, match=message):
            run_stage(folder, {"seed": 1}, [path], work)
        assert (folder / "facts.jsonl").read_text() == "x" and work.calls == 0
    with pytest.raises(FileNotFoundError, match="missing.jsonl does not exist"):
        run_stage(tmp_path / "out", {}, [tmp_path / "missing.jsonl"], work)


def test_run_file_tells_how_the_result_was_made(tmp_path, table, work, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["scripts/a.py", "--facts", str(tmp_path / "my facts.csv")])
    run = read_json(run_stage("out", {"seed": 0}, ["table.jsonl"], work) / "run.json")
    assert shlex.split(run["command"]) == ["scripts/a.py", "--facts", "my facts.csv"]
    assert run["arguments"] == {"seed": 0} and run["inputs"] == {"table.jsonl": fingerprint(table)}
    assert run["seconds"] >= 0 and run["versions"]["torch"] == version("torch")
