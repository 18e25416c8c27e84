# SPDX-License-Identifier: Apache-2.0
"""The comparison of methods, whole on a small Llama, and the law of each rival."""

import hashlib
import json
import math
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import build_model, build_tokenizer, made_once
from datasets import Dataset
from PIL import Image
from toy_study import SCRIPTS, run_script
from trl import SFTConfig, SFTTrainer

from trl_selfdistill.studies.comparison.rival_methods import ComparisonArguments, methods_of
from trl_selfdistill.studies.comparison.study import best_epoch
from trl_selfdistill.studies.comparison.token_masking import mask_unlikely_tokens
from trl_selfdistill.studies.comparison.weight_interpolation import copy_weights, interpolated
from trl_selfdistill.studies.experiment import read_experiment
from trl_selfdistill.studies.fact_accuracy import AccuracyRecord, read_records
from trl_selfdistill.studies.training_mix import load_mix


TOKENIZER = build_tokenizer()
METHODS = ("sft", "lora", "frozen", "l2", "replay", "known_patch", "stm", "selfdistill-lambda1-tau0.5")
METHODS += ("rehearsal", "rehearsal-selfdistill-lambda1-tau0.5")


def start_comparison(folder: Path) -> tuple[Path, str]:
    """Runs it as a user would; returns its folder and what it printed."""
    command = [sys.executable, SCRIPTS / "compare_methods.py", "--preset", "tiny", "--output_dir", folder / "study"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, env=environment, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "study", done.stdout


@pytest.fixture(scope="module")
def finished(tmp_path_factory, worker_id):
    return made_once(tmp_path_factory, worker_id, "comparison", start_comparison)


def runs_of(output: Path, method: str) -> list:
    return [read_experiment(output / "runs" / f"{method}-seed{seed}") for seed in range(3)]


def test_the_report_holds_what_the_runs_recorded(finished):
    output, stdout = finished
    report = (output / "methods.md").read_text()
    points = {point["label"]: point for point in json.loads((output / "methods.json").read_text())}
    assert len(points) == 1 + len(METHODS) + 1 + 3  # before, early stopping and three interpolations
    for method in METHODS:
        runs = runs_of(output, method)
        point = points[runs[0].training["about"]["label"]]
        for name, key in (("heldout", "stability"), ("new", "plasticity")):
            accuracy = sum(run.records[-1].accuracy(name) for run in runs) / 3
            assert point[key]["value"] == pytest.approx(accuracy) and f"{accuracy:.3f} [" in report
    assert report.split("![")[0].strip() in stdout and Image.open(output / "pareto.png").width > 1000
    assert "small Llama (width 64, 2 layers)" in report and " is better (clear: " in report


def test_all_methods_start_alike_and_make_as_many_steps(finished):
    output, _ = finished
    runs = [run for method in METHODS for run in runs_of(output, method)]
    assert len({run.training["steps"] for run in runs}) == 1 and runs[0].training["steps"] == 10
    assert len({json.dumps(run.records[0].correct) for run in runs}) == 1
    assert len({json.dumps(run.training["log_history"]) for run in runs_of(output, "sft")}) == 3  # seeds matter


def test_only_sft_is_asked_after_each_epoch(finished):
    output, _ = finished
    for method in METHODS:
        for run in runs_of(output, method):
            steps = [record.step for record in run.records]
            assert steps == ([0, 5, 10] if method == "sft" else [0, 10])


def test_the_facts_that_choose_when_to_stop_are_not_those_that_judge(finished):
    output, _ = finished
    heldout = set(load_mix(output / "mix")["heldout"]["fact_id"])
    correct = runs_of(output, "sft")[0].records[-1].correct
    judging, choosing = correct["heldout"].keys(), correct["validation"].keys()
    assert not judging & choosing and judging | choosing == heldout and len(choosing) > 20

    def record(epoch: int, validation: int, other: int) -> AccuracyRecord:
        sets = {
            "validation": {str(i): i < validation for i in range(9)},
            "heldout": {str(i): i < other for i in range(9)},
        }
        return AccuracyRecord(epoch, epoch, sets)

    # Before training is no choice; the judging facts would choose the last; of equals the first
    records = [record(0, 9, 0), record(1, 5, 1), record(2, 8, 2), record(3, 8, 3), record(4, 1, 9)]
    assert best_epoch(records) is records[2]


def test_wise_ft_goes_from_the_start_to_sft(finished):
    output, _ = finished
    for run in runs_of(output, "sft"):
        folder = output / "runs" / run.name.replace("sft", "wise_ft")
        start, middle, end = read_records(folder / "accuracy.jsonl")
        assert [start.epoch, middle.epoch, end.epoch] == [0.0, 0.5, 1.0]
        assert start.correct == run.records[0].correct and end.correct == run.records[-1].correct


def test_nothing_is_done_twice(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "study")
    before = {path: path.read_bytes() for path in (tmp_path / "study").glob("*/*/run.json")}
    run_script("compare_methods.py", "--preset", "tiny", "--output_dir", tmp_path / "study")
    assert {path: path.read_bytes() for path in (tmp_path / "study").glob("*/*/run.json")} == before
    assert len(before) == 3 * (len(METHODS) + 1)  # WiSE-FT has a stage of its own


def test_other_mixing_weights_train_nothing_again(finished, tmp_path):
    runs = shutil.copytree(finished[0], tmp_path / "study") / "runs"
    before = {path: path.read_bytes() for path in runs.glob("*/run.json")}
    flags = ["--mixing_weights", "0.25", "1.0"]
    run_script("compare_methods.py", "--preset", "tiny", "--output_dir", tmp_path / "study", *flags)
    changed = {path.parent.name for path, content in before.items() if path.read_bytes() != content}
    assert changed == {f"wise_ft-seed{seed}" for seed in range(3)}
    labels = {point["label"] for point in json.loads((tmp_path / "study" / "methods.json").read_text())}
    assert {label for label in labels if "WiSE" in label} == {"WiSE-FT, 0.25 of SFT", "WiSE-FT, 1 of SFT"}
    kept = {path.parents[1].name for path in runs.glob("*/*/*.safetensors")}
    assert kept == {f"sft-seed{seed}" for seed in range(3)}  # the weights of no other run


def test_mistakes_that_only_the_facts_show_come_before_the_first_run(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "study", ignore=shutil.ignore_patterns("runs"))
    with pytest.raises(ValueError, match="`num_rehearsal=4000`, but only [0-9]+ facts are in no split"):
        run_script(
            "compare_methods.py", "--preset", "tiny", "--output_dir", tmp_path / "study", "--num_rehearsal", "4000"
        )
    assert not (tmp_path / "study" / "runs").exists()


@pytest.mark.parametrize("flag", [("--regularizer", "l2"), ("--max_steps", "3"), ("--num_train_epochs", "nan")])
def test_what_the_methods_set_themselves_is_refused(finished, tmp_path, flag):
    shutil.copytree(finished[0], tmp_path / "study")
    made = {path: path.read_bytes() for path in (tmp_path / "study").rglob("*") if path.suffix in (".json", ".md")}
    with pytest.raises(ValueError, match=f"`{flag[0][2:]}"):
        run_script("compare_methods.py", "--preset", "tiny", "--output_dir", tmp_path / "study", *flag)
    assert all(kept.read_bytes() == before for kept, before in made.items())  # such as the report


def test_a_name_of_a_model_beside_one_that_is_trained_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`model_name_or_path='gpt2'` with `model_kind='small_llama'`"):
        run_script("compare_methods.py", "--preset", "tiny", "--output_dir", tmp_path, "--model_name_or_path", "gpt2")


def test_each_weight_of_the_l2_sweep_is_a_method_of_its_own(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "study")
    flags = ["--methods", "sft", "l2", "--l2_weights", "1e-6", "1e6"]
    run_script("compare_methods.py", "--preset", "tiny", "--output_dir", tmp_path / "study", *flags)
    points = {point["label"] for point in json.loads((tmp_path / "study" / "methods.json").read_text())}
    assert {f"L2 to the start, {which}" for which in ("matched", "weight 1e-06", "weight 1e+06")} <= points
    weak, strong = (runs_of(tmp_path / "study", f"l2-weight{weight}")[0] for weight in ("1e-06", "1e+06"))
    assert weak.training["settings"]["l2_weight"] == 1e-6
    assert strong.records[-1].accuracy("new") == strong.records[0].accuracy("new")  # nothing is learnt


def rows_of(method: str, num_rows: int, counts: tuple[int, int] = (4, 8), seed: int = 0, **options) -> list[str]:
    """The rows of a method, `k` and a number for a Known fact, `n` and a number for a new one."""
    facts = [
        Dataset.from_dict({"prompt": [f"{kind}{i}" for i in range(n)]}) for kind, n in zip("kn", counts, strict=True)
    ]
    [found] = [each for each in methods_of(ComparisonArguments(**options)) if each.name == method]
    return found.rows(*facts, num_rows, random.Random(seed))["prompt"][:]


def test_replay_shows_known_facts_more_often():
    rows = rows_of("replay", 12, replay_ratio=3)
    assert sorted(rows) == sorted([f"k{i}" for i in range(4)] * 3 + [f"n{i}" for i in range(8)])


@pytest.mark.parametrize("counts", [(4, 8), (20, 80), (80, 140), (500, 500)])
@pytest.mark.parametrize(("ratio", "share"), [(0.2, 0.3), (0.05, 0.5), (0.9, 1.0)])
def test_known_patch_mixes_its_share_of_known_facts_into_its_last_part(counts, ratio, share):
    options = dict(counts=counts, known_patch_ratio=ratio, known_patch_share=share)
    rows = rows_of("known_patch", 1001, **options)
    assert len(rows) == 1001 and rows == rows_of("known_patch", 1001, **options)
    late = 1001 - round(share * 1001)
    assert all(row.startswith("n") for row in rows[:late])
    assert sum(row.startswith("k") for row in rows[late:]) == round(ratio * 1001)  # 2 of 3 there by default
    assert any(row.startswith("n") for row in rows[late:])
    for kind, count in zip("kn", counts, strict=True):
        shown = [rows.count(f"{kind}{i}") for i in range(count)]
        assert max(shown) - min(shown) <= 1


@pytest.mark.parametrize(
    ("seed", "expected"), list(enumerate(["43adebcbf353cc26", "4426c7064394dc82", "ae11ca91b083db1b"]))
)
def test_known_patch_orders_the_rows_as_in_the_runs_of_the_documentation(seed, expected):
    rows = rows_of("known_patch", 1000, counts=(20, 80), seed=seed)
    assert hashlib.sha256(" ".join(rows).encode()).hexdigest()[:16] == expected


def test_known_patch_is_identified_by_both_its_numbers():
    [method] = [m for m in methods_of(ComparisonArguments(known_patch_ratio=0.125)) if m.name == "known_patch"]
    assert method.about == {"known_patch_ratio": 0.125, "known_patch_share": 0.3}
    assert method.label == "KnownPatch, 12.5 % of all rows, in the last 30 %"


def sft_run(folder: Path, max_perplexity: float | None = None) -> SFTTrainer:
    rows = Dataset.from_dict({"prompt": ["Q: a\nA:", "Q: Oslo\nA:"] * 2, "completion": [" b", " Norway"] * 2})
    args = SFTConfig(
        str(folder),
        max_steps=3,
        learning_rate=1e-2,
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
    )
    trainer = SFTTrainer(
        build_model(TOKENIZER, initializer_range=0.5), args, train_dataset=rows, processing_class=TOKENIZER
    )
    if max_perplexity is not None:
        trainer.train_dataset = mask_unlikely_tokens(
            trainer.train_dataset, trainer.model, max_perplexity, batch_size=3
        )
    return trainer


def test_masking_nothing_is_sft(tmp_path):
    plain, masked = sft_run(tmp_path / "plain"), sft_run(tmp_path / "masked", math.inf)
    assert plain.train_dataset["labels"][:] == masked.train_dataset["labels"][:]
    plain.train(), masked.train()
    for one, other in zip(plain.model.parameters(), masked.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_tokens_above_the_perplexity_are_masked_and_no_others(tmp_path):
    plain = sft_run(tmp_path / "plain")
    perplexities, kept = [], []
    for row in plain.train_dataset:
        log_probs = plain.model(input_ids=torch.tensor([row["input_ids"]])).logits[0].float().log_softmax(-1)
        perplexities.append(
            [math.nan, *(math.exp(-log_probs[t, token]) for t, token in enumerate(row["input_ids"][1:]))]
        )
        kept.append([label != -100 for label in row["labels"]])
    limit = (
        sorted(p for ps, ks in zip(perplexities, kept, strict=True) for p, k in zip(ps, ks, strict=True) if k)[3]
        + 1e-3
    )
    masked = sft_run(tmp_path / "masked", limit)
    for row, ps, ks in zip(masked.train_dataset, perplexities, kept, strict=True):
        expected = [token if k and p <= limit else -100 for token, p, k in zip(row["input_ids"], ps, ks, strict=True)]
        assert row["labels"] == expected
    with pytest.raises(ValueError, match="`max_perplexity=1.0` leaves no token to train on"):
        sft_run(tmp_path / "none", 1.0)
    with pytest.raises(ValueError, match="`max_perplexity` must be at least 1 .*, got 0.5"):
        sft_run(tmp_path / "wrong", 0.5)


def test_interpolation_is_between_the_weights_and_leaves_them():
    start, end = build_model(TOKENIZER), build_model(TOKENIZER, seed=1)
    before, own = copy_weights(start), copy_weights(end)
    for weight in (0.0, 0.25, 1.0):
        with interpolated(end, before, weight):
            for name, parameter in end.named_parameters():
                torch.testing.assert_close(parameter, (1 - weight) * before[name] + weight * own[name])
        assert all(torch.equal(parameter, own[name]) for name, parameter in end.named_parameters())
    with (
        pytest.raises(ValueError, match=r"`mixing_weight` must be in \[0, 1\], got 1.5"),
        interpolated(end, before, 1.5),
    ):
        pass
    with pytest.raises(KeyError), interpolated(end, before, 0.5):
        raise KeyError
    assert all(torch.equal(parameter, own[name]) for name, parameter in end.named_parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(methods=["sft", "ewc"]), r"`methods` may hold .*, got \['sft', 'ewc'\]"),
        (dict(methods=["lora"]), "`sft` must be one"),
        (dict(seeds=[0, 1]), "`seeds` needs at least 3"),
        (dict(seeds=[0, 1, 1]), "none twice"),
        (dict(mixing_weights=[0.5, 2.0]), r"`mixing_weights` must be shares in \[0, 1\], got 2.0"),
        (dict(kl_weights=[1.0, -1.0]), "`kl_weights` must be finite and at least 0, got -1.0"),
        (dict(kl_weights=[math.nan]), "`kl_weights` .* got nan"),
        (dict(temperatures=[0.0]), "`temperatures` must be finite and above 0, got 0.0"),
        (dict(l2_weights=[0.0]), "`l2_weights` must be finite and above 0, got 0.0"),
        (dict(l2_weights=[math.inf]), "`l2_weights` .* got inf"),
        (dict(num_rehearsal=0), "`num_rehearsal` must be at least 1, got 0"),
        (dict(lora_rank=0), "`lora_rank` must be at least 1, got 0"),
        (dict(lora_learning_rate=0.0), "`lora_learning_rate` must be finite and above 0, got 0.0"),
        (dict(stm_max_perplexity=1.0), "`stm_max_perplexity` must be above 1, .* got 1.0"),
        (dict(known_patch_ratio=0.0), "got 0.0 and 0.3"),
        (dict(known_patch_ratio=0.3), "`known_patch_ratio` < `known_patch_share` <= 1, got 0.3 and 0.3"),
        (dict(known_patch_share=1.5), "got 0.2 and 1.5"),
        (dict(kl_weights=[1.0, 1.0000001]), r"`kl_weights` must hold different values, .* got \[1.0, 1.0000001\]"),
        (dict(methods=["sft", "lora", "lora"]), "`methods` must hold different values"),
        (dict(temperatures=[]), r"needs `kl_weights` and `temperatures`, got .* and \[\]"),
        (dict(seeds=[0, 1, -1]), "`seeds` must be from 0 to 2"),
        (dict(replay_ratio=0), "`replay_ratio` must be at least 1, got 0"),
    ],
)
def test_mistakes_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        ComparisonArguments(**options)
