# SPDX-License-Identifier: Apache-2.0
"""The small Llama learns its facts, alike for the same seed, or is refused."""

import pytest
import torch

from trl_selfdistill.slick.slick import annotate_facts
from trl_selfdistill.studies.fact_accuracy import ask_facts
from trl_selfdistill.studies.facts.geonames import geonames_facts, known_place_names
from trl_selfdistill.studies.models import load_model_and_tokenizer
from trl_selfdistill.studies.small_llama import SmallLlamaSettings, pretrain_small_llama


LEARNING = dict(pretraining_learning_rate=3e-3, pretraining_batch_size=4, max_pretraining_epochs=80)
SETTINGS = SmallLlamaSettings(64, 2, 800, **LEARNING, target_accuracy=0.9)


@pytest.fixture(scope="module")
def facts():
    return geonames_facts(["P17"]).select(range(15))


@pytest.fixture(scope="module")
def learnt(facts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("small") / "model"
    pretrain_small_llama(facts, folder, SETTINGS, known_place_names())
    return load_model_and_tokenizer(folder)


def test_the_saved_model_knows_its_facts_zero_shot_and_few_shot(facts, learnt):
    outcomes = [answer.outcome for answer in ask_facts(*learnt, facts).values()]
    assert outcomes.count("correct") / len(outcomes) >= SETTINGS.target_accuracy
    annotated = annotate_facts(facts, *learnt)
    assert annotated["slick_category"][:].count("HighlyKnown") / len(annotated) >= 0.8


def test_the_same_seed_gives_the_same_weights_and_another_does_not(facts, tmp_path):
    weights, state = [], torch.get_rng_state()
    for i, seed in enumerate((1, 1, 2)):
        settings = SmallLlamaSettings(32, 1, 600, max_pretraining_epochs=2, target_accuracy=0.0, pretraining_seed=seed)
        pretrain_small_llama(facts, tmp_path / str(i), settings)
        assert torch.equal(torch.get_rng_state(), state)  # that of the study goes on as if nothing had been trained
        weights.append(load_model_and_tokenizer(tmp_path / str(i))[0].state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not all(torch.equal(weights[0][name], weights[2][name]) for name in weights[0])


def test_a_model_that_knows_too_little_is_refused_and_not_written(facts, tmp_path):
    settings = SmallLlamaSettings(32, 1, 600, max_pretraining_epochs=1, target_accuracy=0.9)
    message = r"`max_pretraining_epochs=1`: the small Llama answers [\d.]+% of 15 facts, `target_accuracy` is 90.0%"
    with pytest.raises(ValueError, match=message):
        pretrain_small_llama(facts, tmp_path / "model", settings)
    assert not (tmp_path / "model").exists()
