# SPDX-License-Identifier: Apache-2.0
"""The small Llama learns its facts, alike for the same seed, or is refused."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import PartialState
from two_processes import leave_processes, run_in_two_processes

from trl_selfdistill.slick.slick import annotate_facts
from trl_selfdistill.studies.arguments import ModelAndFactsArguments
from trl_selfdistill.studies.fact_accuracy import answered_correctly
from trl_selfdistill.studies.facts.geonames import geonames_facts, known_place_names
from trl_selfdistill.studies.facts.table import save_facts
from trl_selfdistill.studies.models import load_model_and_tokenizer
from trl_selfdistill.studies.small_llama import ModelKindArguments, SmallLlamaSettings, pretrain_small_llama
from trl_selfdistill.studies.stages import start_model_stage


SETTINGS = SmallLlamaSettings(
    hidden_size=64,
    num_layers=2,
    vocab_size=2500,
    pretraining_learning_rate=3e-3,
    pretraining_batch_size=4,
    max_pretraining_epochs=80,
    target_accuracy=0.95,
)


@pytest.fixture(scope="module")
def facts():
    return geonames_facts(["P17"], max_facts_per_relation=40)


@pytest.fixture(scope="module")
def learnt(facts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("small") / "model"
    return folder, pretrain_small_llama(facts, folder, SETTINGS, known_place_names())


def test_the_saved_model_answers_as_many_facts_as_it_says(facts, learnt):
    folder, accuracy = learnt
    outcomes = answered_correctly(*load_model_and_tokenizer(folder), facts).values()
    assert accuracy == sum(outcomes) / len(outcomes) >= SETTINGS.target_accuracy
    assert (folder / "model.safetensors").is_file()


def test_few_shot_prompts_find_the_facts_known(facts, learnt):
    annotated = annotate_facts(facts, *load_model_and_tokenizer(learnt[0]), "quick", progress=False)
    assert annotated["slick_category"][:].count("HighlyKnown") / len(annotated) >= 0.8


def test_the_tokenizer_splits_names_and_round_trips(facts, learnt):
    _, tokenizer = load_model_and_tokenizer(learnt[0])
    pieces = [tokenizer.tokenize(f" {name}") for name in facts["subject"]]
    assert 1.5 < np.mean([len(piece) for piece in pieces]) < 4
    assert all(piece[0].startswith("Ġ") for piece in pieces)
    for text in ("Q: Which country is São Paulo located in?\nA: Brazil", "東京 🙂"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.eos_token_id != tokenizer.pad_token_id


def test_the_same_seed_gives_the_same_weights_and_another_does_not(facts, tmp_path):
    weights = []
    for i, seed in enumerate((1, 1, 2)):
        settings = SmallLlamaSettings(32, 1, 600, max_pretraining_epochs=2, target_accuracy=0.0, pretraining_seed=seed)
        pretrain_small_llama(facts, tmp_path / str(i), settings)
        weights.append(load_model_and_tokenizer(tmp_path / str(i))[0].state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not all(torch.equal(weights[0][name], weights[2][name]) for name in weights[0])


def test_a_model_that_knows_too_little_is_refused_and_not_written(facts, tmp_path):
    settings = SmallLlamaSettings(32, 1, 600, max_pretraining_epochs=1, target_accuracy=0.9)
    message = r"`max_pretraining_epochs=1`: the small Llama answers [\d.]+% of 40 facts, `target_accuracy` is 90.0%"
    with pytest.raises(ValueError, match=message):
        pretrain_small_llama(facts, tmp_path / "model", settings)
    assert not (tmp_path / "model").exists()


TINY = SmallLlamaSettings(32, 1, 600, max_pretraining_epochs=1, target_accuracy=0.0)


def test_one_of_two_processes_trains_alone_and_both_stay_connected(facts, tmp_path):
    save_facts(facts, tmp_path / "facts.jsonl")
    run_in_two_processes(__file__, tmp_path)
    pretrain_small_llama(facts, tmp_path / "alone", TINY, known_place_names())
    one, two = (load_model_and_tokenizer(tmp_path / name)[0].state_dict() for name in ("alone", "model"))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(
    "options",
    [
        dict(num_layers=0),
        dict(max_pretraining_epochs=0),
        dict(hidden_size=65),
        dict(vocab_size=257),
        dict(target_accuracy=2.0),
        dict(pretraining_learning_rate=float("nan")),
        dict(pretraining_seed=-1),
    ],
)
def test_settings_that_cannot_be_are_refused(options):
    [(name, value)] = options.items()
    with pytest.raises(ValueError, match=f"`{name}` .*{value}"):
        SmallLlamaSettings(**options)


def start_in_two_processes(folder: Path) -> None:
    PartialState(cpu=True)  # as the scripts do
    kind = ModelKindArguments("small_llama")
    start_model_stage(ModelAndFactsArguments(), kind, TINY, folder / "facts.jsonl", folder / "model")
    assert PartialState().num_processes == 2
    leave_processes()


if __name__ == "__main__":
    start_in_two_processes(Path(sys.argv[1]))
