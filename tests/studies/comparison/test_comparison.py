# SPDX-License-Identifier: Apache-2.0
"""The comparison of variants, whole on the toy model, and the law of each rival."""

import math
import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import build_model, made_once
from datasets import Dataset
from PIL import Image
from sft_runs import TOKENIZER, config, trainer
from study_records import answered
from toy_study import run_script, runs_of
from trl import SFTTrainer

from trl_selfdistill.files import read_json, write_json
from trl_selfdistill.studies.comparison.arguments import ComparisonArguments
from trl_selfdistill.studies.comparison.rivals import known_patch_rows, mask_unlikely_tokens, replay_rows
from trl_selfdistill.studies.comparison.study import best_epoch
from trl_selfdistill.studies.fact_accuracy import AccuracyRecord, read_records
from trl_selfdistill.studies.results import read_result
from trl_selfdistill.studies.runs import RunFacts, StepTimes, StudySetup, Variant, _make_trainer
from trl_selfdistill.studies.training_mix import load_mix


VARIANTS = ("sft", "sft-slower2-steps2", "lora", "corda", "frozen", "l2", "replay", "known_patch", "stm")
VARIANTS += tuple({"mica", "intruders", "osf"} & {*ComparisonArguments().variants})  # of newer versions of PEFT
VARIANTS += ("eaft", "asft", "selfdistill-lambda1-tau0.5", "own_answers", "own_answers-selfdistill-lambda1-tau0.5")
VARIANTS += ("kl_anchors-weight1-lambda0.3-4", "self_anchors-weight1-lambda0.3")
FLAGS = "--settings 1/0.5 --own_answers_settings 1/0.5 --mixing_weights 0 0.5 1 --num_own_answers 4 --slower 2".split()
FLAGS += "--num_anchors 4 --anchor_settings 1/0.3 --self_anchor_tokens 4".split()
FLAGS += ["--num_heldout", "30", "--lora_rank", "4"]


def compare(toy_study, output: Path, *flags) -> None:
    """Runs the comparison on the toy study's facts, whose first stages are those of the study."""
    run_script("compare_methods.py", *toy_study.flags(output), *FLAGS, *flags)


@pytest.fixture(scope="module")
def finished(toy_study, tmp_path_factory, worker_id):
    def make(folder: Path) -> Path:
        compare(toy_study, folder / "study", "--save_strategy", "no")
        return folder / "study"

    return made_once(tmp_path_factory, worker_id, "comparison", make)


def results_of(output: Path, variant: str) -> list:
    return [read_result(output / "runs" / f"{variant}-seed{seed}") for seed in range(3)]


def test_the_report_holds_what_the_runs_recorded(finished):
    report = (finished / "methods.md").read_text()
    assert "\nPrecision: float32.\n" in report
    points = {point["label"]: point for point in read_json(finished / "methods.json")}
    assert len(points) == 1 + len(VARIANTS) + 1 + 3  # before, early stopping and three interpolations
    for variant in VARIANTS:
        results = results_of(finished, variant)
        point = points[results[0].training["label"]]
        for name, key in (("heldout", "stability"), ("new", "plasticity")):
            accuracy = sum(result.records[-1].accuracy(name) for result in results) / 3
            assert point[key]["value"] == pytest.approx(accuracy) and f"{accuracy:.3f} [" in report
    assert Image.open(finished / "methods.png").width > 1000 and " reach the aim by the means" in report


def test_all_variants_start_alike_and_make_as_many_steps(finished):
    results = [result for variant in VARIANTS for result in results_of(finished, variant)]
    assert all(result.training["num_steps"] == (16 if "slower" in result.name else 8) for result in results)
    rates = {name: results_of(finished, name)[0].training["settings"]["learning_rate"] for name in VARIANTS}
    assert rates["sft-slower2-steps2"] == rates["sft"] / 2
    assert all(result.records[0].answers == results[0].records[0].answers for result in results)
    logs = [result.training["log_history"] for result in results_of(finished, "sft")]
    assert logs[0] != logs[1] != logs[2]  # seeds matter
    for variant in VARIANTS:  # only SFT is asked after each epoch, and kept
        for result in results_of(finished, variant):
            steps = [record.step for record in result.records]
            assert steps == ([0, 4, 8] if variant == "sft" else [0, result.training["num_steps"]])
    kept = {path.parent.name for path in (finished / "runs").glob("*/*.safetensors")}
    assert kept == {f"sft-seed{seed}" for seed in range(3)}
    cards = [(finished / "runs" / name / "README.md").read_text() for name in kept]
    assert all("difference from the base" in card for card in cards)


def test_the_facts_that_choose_when_to_stop_are_not_those_that_judge(finished):
    heldout = set(load_mix(finished / "mix")["heldout"]["fact_id"])
    answers = results_of(finished, "sft")[0].records[-1].answers
    judging, choosing = answers["heldout"].keys(), answers["validation"].keys()
    assert not judging & choosing and judging | choosing == heldout

    # Before training is no choice; the judging facts would choose the last; of equals the first
    points = [(9, 0), (5, 1), (8, 2), (8, 3), (1, 9)]
    sets = [{"validation": right, "heldout": other} for right, other in points]
    records = [AccuracyRecord(0, 0, {k: answered(k, np.arange(9) < n) for k, n in asked.items()}) for asked in sets]
    assert best_epoch(records) is records[2]


def test_wise_ft_goes_from_the_start_to_sft(finished):
    for result in results_of(finished, "sft"):
        folder = finished / "runs" / f"wise_ft-{result.name}"
        start, middle, end = read_records(folder / "accuracy.jsonl")
        assert [start.epoch, middle.epoch, end.epoch] == [0.0, 0.5, 1.0]
        assert start.answers == result.records[0].answers and end.answers == result.records[-1].answers


def test_other_mixing_weights_l2_weights_and_ranks_train_nothing_else_again(toy_study, finished, tmp_path):
    output = Path(shutil.copytree(finished, tmp_path / "study"))
    before, flags = runs_of(output / "runs"), "--variants sft l2 lora own_answers --lora_rank 2".split()
    flags += ["--mixing_weights", "0.25", "--l2_weights", "1e6", "--save_strategy", "no"]
    compare(toy_study, output, *flags)
    changed = {name for name, content in runs_of(output / "runs").items() if before.get(name) != content}
    assert changed == {f"{name}-seed{seed}" for seed in range(3) for name in ("wise_ft-sft", "l2-weight1e+06", "lora")}
    labels = {point["label"] for point in read_json(output / "methods.json")}
    assert {"WiSE-FT, 0.25 of SFT", "L2 to the start, matched", "L2 to the start, weight 1e+06"} <= labels
    assert results_of(output, "l2-weight1e+06")[0].training["about"] == {"l2_weight": 1e6}
    before = runs_of(output / "runs")
    compare(toy_study, output, *flags, "--mixed", "l2")  # its weights are missing, those of SFT are no longer needed
    changed = {name for name, content in runs_of(output / "runs").items() if before.get(name) != content}
    assert changed == {f"{name}-seed{seed}" for seed in range(3) for name in ("l2", "wise_ft-l2")}


def test_in_the_same_time_what_costs_more_makes_fewer_steps(toy_study, finished, tmp_path):
    output = Path(shutil.copytree(finished, tmp_path / "study"))
    for number, variant in enumerate(("sft", "asft", "sft-slower2-steps2"), start=1):
        for seed in range(3):
            path = output / "runs" / f"{variant}-seed{seed}" / "training.json"
            write_json(path, read_json(path) | {"training_seconds": float(number)})
    flags = ["--variants", "sft", "asft", "slow", "--equal_time", "0.75", "--save_strategy", "no"]
    compare(toy_study, output, *flags)
    points = [point for point in read_json(output / "methods.json") if "equal_time" in point]
    steps = {"": 0.8, "ASFT: DFT and KL, λ = 0.05": 0.4, "SFT, 1/2 of the rate": 0.5}  # 0.75, 0.75 / 2, 2 * 0.75 / 3
    labels = [f"{label or 'SFT'}, {share:g} times the steps" for label, share in steps.items()]
    assert {point["label"] for point in points} >= {*labels} and len(points) == 3 + 3
    assert results_of(output, "asft-steps0.4")[0].training["num_steps"] == 3
    assert "# The same in 0.75 times the processor time of SFT" in (output / "methods.md").read_text()
    for seed in range(3):  # killed after the last step
        path = output / "runs" / f"asft-seed{seed}" / "training.json"
        write_json(path, read_json(path) | {"training_seconds": None})
    with pytest.raises(ValueError, match="`equal_time`: no step of SFT or ASFT: DFT and KL"):
        compare(toy_study, output, *flags)
    compare(toy_study, output, *flags[:3], "--save_strategy", "no")
    assert {point["label"]: point["cost"] for point in read_json(output / "methods.json")}[list(steps)[1]] is None


def test_an_adapter_is_made_from_the_known_facts_and_the_seed_draws_the_rows(finished, tmp_path):
    seen, drawn, mix = [], [], load_mix(finished / "mix")
    arguments = {"peft_config": lambda *given: seen.append(given)}
    draw = lambda known, new, num_rows, generator: drawn.append(generator.random()) or known  # noqa: E731
    variant = Variant("x", "X", rows=draw, trainer_arguments=arguments)
    setup = StudySetup(str(finished / "stage1"), finished / "mix", config(tmp_path))
    for seed in (0, 0, 1):
        _make_trainer(variant, setup, config(tmp_path, seed=seed), RunFacts(mix["known"], mix["new"], {}))
    assert all(known["prompt"][:] == mix["known"]["prompt"][:] for _, _, known in seen)
    assert drawn[0] == drawn[1] != drawn[2]


def test_evaluating_and_saving_are_no_cost(monkeypatch):
    now, times, args = [0.0], StepTimes(), SimpleNamespace(device=torch.device("cpu"))
    monkeypatch.setattr("time.process_time", lambda: now[0])
    times.on_train_begin(args, None, None)
    for event in "step_end save step_end evaluate step_end epoch_end step_end".split():
        now[0] += 2 if event == "step_end" else 100
        times.on_step_begin(args, None, None)
        getattr(times, f"on_{event}")(args, None, None)
    assert times.summary(3)["training_seconds"] == 3 * 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num_own_answers", "4000"], "`num_own_answers=4000`, but only [0-9]+ facts are in no split"),
        (["--settings", "1/0"], "`temperature` must be .*, got 0.0"),
        (["--mixed", "lora"], "`mixed` may hold .*, got .'lora'"),
        (["--max_steps", "3"], "`max_steps=3`"),
        (["--use_peft"], "`use_peft`: the variants train the full model"),
    ],
)
def test_mistakes_come_before_the_first_run(toy_study, finished, tmp_path, flags, message):
    shutil.copytree(finished, tmp_path / "study", ignore=shutil.ignore_patterns("runs"))
    report = (tmp_path / "study" / "methods.md").read_bytes()
    with pytest.raises(ValueError, match=message):
        compare(toy_study, tmp_path / "study", "--save_strategy", "no", *flags)
    assert not (tmp_path / "study" / "runs").exists()
    assert (tmp_path / "study" / "methods.md").read_bytes() == report


def rows_of(make, num_rows: int, num_known: int, num_new: int, seed: int = 0) -> list[str]:
    """The rows that `make` makes: `k` and a number for a Known fact, `n` and a number for a new one."""
    known, new = (
        Dataset.from_dict({"prompt": [f"{kind}{i}" for i in range(number)]})
        for kind, number in (("k", num_known), ("n", num_new))
    )
    return make(known, new, num_rows, random.Random(seed))["prompt"][:]


@pytest.mark.parametrize(("num_known", "num_new"), [(4, 8), (500, 500)])
def test_known_patch_mixes_its_share_of_known_facts_into_its_last_part_and_replay_shows_all(num_known, num_new):
    assert sorted(rows_of(replay_rows, 12, 2, 2)) == ["k0"] * 3 + ["k1"] * 3 + ["n0", "n1"]
    rows = rows_of(known_patch_rows, 1000, num_known, num_new)
    assert len(rows) == 1000 and rows == rows_of(known_patch_rows, 1000, num_known, num_new)
    assert all(row.startswith("n") for row in rows[:700])
    assert sum(row.startswith("k") for row in rows[700:]) == 200
    for kind, number in (("k", num_known), ("n", num_new)):
        shown = [rows.count(f"{kind}{i}") for i in range(number)]
        assert max(shown) - min(shown) <= 1


def test_tokens_above_the_perplexity_are_masked_and_no_others(tmp_path):
    plain = trainer(tmp_path, build_model(TOKENIZER, initializer_range=0.5), trainer_class=SFTTrainer)

    def masked(limit: float) -> list[list[int]]:
        return mask_unlikely_tokens(plain.train_dataset, plain.model, limit)["labels"][:]

    labels, perplexities = plain.train_dataset["labels"][:], []
    for ids in plain.train_dataset["input_ids"]:
        log_probs = plain.model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)
        perplexities.append([math.nan, *(math.exp(-log_probs[t, token]) for t, token in enumerate(ids[1:]))])
    rows = [[*zip(*row, strict=True)] for row in zip(labels, perplexities, strict=True)]
    limit = sorted(perplexity for row in rows for label, perplexity in row if label != -100)[3] + 1e-3
    expected = [[label if perplexity <= limit else -100 for label, perplexity in row] for row in rows]
    assert masked(limit) == expected != labels and masked(math.inf) == labels
    with pytest.raises(ValueError, match="`max_perplexity=1.0` leaves no token to train on"):
        masked(1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(variants=["sft", "ewc"]), r"`variants` may hold .*, got \['sft', 'ewc'\]"),
        (dict(seeds=[0, 1]), "`seeds` needs at least 3"),
        (dict(slower=[1.0, 1.0000001]), r"`slower` .* none twice to six digits, got \[1.0, 1.0000001\]"),
        *((dict(settings=[x]), "`settings` are two or three numbers") for x in ("0.3", "1/1/0", "1/2/3/4", "1/-1")),
        (dict(settings=["0.3/1", "0.3/1.0/1"]), "`settings` .* none twice"),
        *((dict([case]), f"`{case[0]}` must be above 0") for case in (("lora_rank", 0), ("l2_weights", [-1.0]))),
        (dict(mixing_weights=[0.5, 2.0]), r"`mixing_weights` must be shares in \[0, 1\], got \[0.5, 2.0\]"),
    ],
)
def test_mistakes_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        ComparisonArguments(**options)
