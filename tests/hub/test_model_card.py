# SPDX-License-Identifier: Apache-2.0
"""The card says what was trained and measured, survives hostile values, and never stands in the way of training."""

import pytest
from datasets import Dataset
from huggingface_hub import ModelCard
from peft import LoraConfig
from study_records import fading_outcomes, make_records, write_result

from trl_selfdistill import FrozenGroupsSFTTrainer, SelfDistillSFTConfig, SelfDistillSFTTrainer
from trl_selfdistill.files import read_json, write_json
from trl_selfdistill.hub.environment import portable_command
from trl_selfdistill.hub.model_card import (
    add_check,
    base_model_of,
    read_record,
    render_model_card,
    update_model_card,
    weights_sha256,
)
from trl_selfdistill.studies.card import write_model_card
from trl_selfdistill.studies.results import read_result


DATA = {
    "prompt": ["Q: a\nA:", "Q: b\nA:", "Q: c\nA:"],
    "completion": [" x", " y", " z"],
    "slick_category": ["HighlyKnown", "Unknown", "Unknown"],
}
GROUPS = {"groups": {"mlp": {"parameters": 1000, "trainable_parameters": 0, "frozen_sha256": "ab" * 32}}}
HOSTILE = "a: [b]\n---\n| <script>alert('x')</script> | {{ 7 * 7 }} ```\n# Heading"


def make_trainer(folder, model, kind="self-distill", **options):
    settings = dict(max_steps=2, save_steps=1, use_cpu=True, bf16=False, report_to="none", disable_tqdm=True)
    settings |= dict(per_device_train_batch_size=1, gradient_accumulation_steps=2)
    trainer_class, peft_config = SelfDistillSFTTrainer, None
    if kind == "frozen groups":
        trainer_class, settings["trainable_groups"] = FrozenGroupsSFTTrainer, ["attention"]
    if kind == "adapter":
        peft_config = LoraConfig(r=2, task_type="CAUSAL_LM")
    config = SelfDistillSFTConfig(output_dir=str(folder), **{**settings, **options})
    return trainer_class(str(model), config, train_dataset=Dataset.from_dict(DATA), peft_config=peft_config)


# What the trainers save


@pytest.mark.parametrize("kind", ["self-distill", "frozen groups", "adapter"])
def test_whatever_a_trainer_saves_has_its_card(tmp_path, model_dir, kind):
    trainer = make_trainer(tmp_path / "run", model_dir, kind)
    trainer.train()
    trainer.save_model()
    for folder in (tmp_path / "run", tmp_path / "run" / "checkpoint-1"):
        card = ModelCard.load(folder / "README.md")
        data = card.data.to_dict()
        is_frozen, text = kind == "frozen groups", card.text
        assert {"trl-selfdistill", "frozen-groups-sft" if is_frozen else "self-distill-sft"} <= {*data["tags"]}
        assert data["library_name"] == ("peft" if kind == "adapter" else "transformers") and "base_model" not in data
        assert "A local model fine-tuned" in text and "Not measured for this checkpoint" in text
        assert str(model_dir) not in card.content and str(tmp_path) not in card.content and "None" not in text
        assert "2604.15574" in text
        assert ("loss = CE + λ τ² KL(teacher ‖ student)" in text) != is_frozen and "\n- Unknown means" in text
        assert ("SHA-256 of its parameters: " in text) != is_frozen and ("they did not" in text) == is_frozen
        rows = ["".join(line.split()) for line in text.splitlines()]
        assert "|train|1|0|0|2|" in rows and {"|lr_scheduler_type|linear|", "|batch_size|2|"} <= {*rows}
        for name in ("kl_weight(λ)", "temperature(τ)"):
            assert any(row.startswith(f"|{name}|") for row in rows) != is_frozen
        if is_frozen:
            saved = read_json(folder / "parameter_groups.json")["groups"]["mlp"]
            assert f"|mlp|{saved['parameters']:,}|0|{saved['frozen_sha256']}|" in rows


def test_results_stay_while_the_weights_do(tmp_path, model_dir):
    folder = tmp_path / "run"
    trainer = make_trainer(folder, model_dir)
    trainer.train()
    trainer.save_model()
    results = {"variant": "v", "metrics": [], "metrics_table": "", "table": "| measured |", "num_facts": {}}
    update_model_card(folder, results={**results, "weights_sha256": weights_sha256(folder)})
    add_check(folder, "## Facts that it forgot")
    trainer.create_model_card(dataset_name="org/facts", tags="extra")  # as `push_to_hub` calls it
    trainer.save_model()
    card = ModelCard.load(folder / "README.md")
    assert "| measured |" in card.text and "\n\n## Facts that it forgot\n\n## Method" in card.text
    assert card.data.datasets == ["org/facts"] and "extra" in card.data.tags
    next(trainer.model.parameters()).data.add_(1.0)
    trainer.save_model()
    text = (folder / "README.md").read_text()
    assert "| measured |" not in text and "## Facts that" not in text and {*read_record(folder)} == {"training"}
    assert "Not measured for this checkpoint" in text
    add_check(folder, "## Facts that it forgot")  # of the weights as they are now, without a study
    assert "Not measured for this checkpoint" not in (folder / "README.md").read_text()


def test_a_chain_of_local_stages_keeps_the_hub_id_and_the_license(tmp_path, tokenizer, model):
    model.save_pretrained(tmp_path / "start")
    tokenizer.save_pretrained(tmp_path / "start")
    (tmp_path / "start" / "README.md").write_text("---\nbase_model: [org/base]\nlicense: mit\n---\n")
    for start, end in (("start", "stage1"), ("stage1", "stage2")):
        trainer = make_trainer(tmp_path / end, tmp_path / start, save_strategy="no")
        trainer.save_model()
        card = ModelCard.load(tmp_path / end / "README.md")
        assert card.data.base_model == "org/base" and card.data.license == "mit"
        assert "a local stage of org/base, frozen when training started" in card.text


@pytest.mark.parametrize(
    "readme, license",
    [
        (b"---\nbase_model: foo: bar\n---\n", None),
        (b"---\nlicense: \xff\n---\n", None),
        (b"---\nlicense: [&a [b, b], *a]\n---\n", None),
        (b"---\r\nbase_model: [{a: 1}]\r\nlicense: mit\r\n---\r\nK\xc3\xb6ln", "mit"),
        (b"no metadata", None),
        (None, None),
    ],
)
def test_of_a_base_models_card_is_taken_what_can_be_read(tmp_path, readme, license):
    (tmp_path / "README.md").mkdir() if readme is None else (tmp_path / "README.md").write_bytes(readme)
    assert base_model_of(str(tmp_path)) == {"base_model": None, "license": license}
    update_model_card(tmp_path / "run", training=base_model_of(str(tmp_path)))


@pytest.mark.parametrize("record", [b"\xff", b"[]", b'{"results": {}}'])
def test_an_earlier_record_that_cannot_be_read_is_replaced(tmp_path, record, caplog):
    (tmp_path / "model_card.json").write_bytes(record)
    update_model_card(tmp_path, training={"license": "mit"})
    assert read_record(tmp_path) == {"training": {"license": "mit"}}
    assert ModelCard.load(tmp_path / "README.md").data.license == "mit"
    assert record == b'{"results": {}}' or f"Going on without {tmp_path / 'model_card.json'}: " in caplog.text


@pytest.mark.parametrize("kind", ["self-distill", "frozen groups", "adapter"])
def test_nothing_that_only_describes_a_run_ends_it(tmp_path, model_dir, kind, caplog):
    """Whatever stands in its way. The weights come first."""
    files = ["README.md", "model_card.json", *(["parameter_groups.json"] if kind == "frozen groups" else [])]
    for name in files:
        (tmp_path / "run" / name).mkdir(parents=True)
    trainer = make_trainer(tmp_path / "run", model_dir, kind)
    plain = trainer.train_dataset.remove_columns("slick_category")
    trainer.train_dataset = plain.add_column("slick_category", [[1]] * 3)
    trainer.train()
    trainer.save_model()
    for folder in (tmp_path / "run", tmp_path / "run" / "checkpoint-2"):
        assert (folder / f"{'adapter_' if kind == 'adapter' else ''}model.safetensors").is_file()
    assert all(f"Going on without {tmp_path / 'run' / name}: IsADirectoryError" in caplog.text for name in files)
    text = (folder / "README.md").read_text()
    assert "categories (which facts the base model knew) were not" in text and "Unknown means" not in text


def test_the_weights_of_an_adapter_with_a_name_count(tmp_path):
    hashes = {weights_sha256(tmp_path)}
    for content in ("a", "b"):
        write_json(tmp_path / "mine" / "adapter_model.safetensors", content)
        hashes.add(weights_sha256(tmp_path))
    assert len(hashes) == 3


# What a study adds


def test_card_of_a_variant_of_a_study(tmp_path):
    better = make_records(fading_outcomes(40, [0.95, 0.9]), fading_outcomes(40, [0.0, 0.8]))
    folders = [
        write_result(tmp_path / "sft", make_records(fading_outcomes(40, [1.0, 0.5]))),
        write_result(tmp_path / "frozen", better, trainer="FrozenGroupsSFTTrainer", groups=GROUPS),
    ]
    (folders[1] / "curves.png").write_bytes(b"")
    results = [read_result(folder) for folder in folders]
    card = ModelCard.load(write_model_card(results[1], results, folders[1]))
    data, text = card.data.to_dict(), card.text
    assert data["base_model"] == "org/model" and data["base_model_relation"] == "finetune" and "license" not in data
    assert {"frozen-groups-sft", "arxiv:2604.15574", "arxiv:2405.05904"} <= {*data["tags"]}
    assert "\n# model: Frozen groups\n\n[org/model](https://huggingface.co/org/model) fine-tuned" in text
    assert "| SFT " in text and "| Frozen groups " in text and "forgets clearly less" in text
    assert "](curves.png)" in text and f"{'ab' * 32} |" in text
    assert "- 40 invented new facts." in text and "falsehoods" in text and "Seed: 0." in text
    assert "\naccelerate launch scripts/run_study.py --output_dir outputs/study\n" in text

    (stability,) = (line for line in text.splitlines() if line.startswith("| Stability"))
    ours, before, sft, minus_before, minus_sft = (cell.strip() for cell in stability.split("|")[2:-1])
    assert ours.startswith("0.900 [") and before.startswith("0.950 [") and sft.startswith("0.500 [")
    assert minus_before.startswith("-0.050 [-") and minus_sft.startswith("+0.400 [+")
    assert {(result.dataset_split, result.metric_type, result.metric_value) for result in card.data.eval_results} == {
        ("heldout", "factual_stability", 0.9),
        ("new", "factual_plasticity", 0.8),
        ("heldout", "hallucination_rate", 0.075),
        ("heldout", "abstention_rate", 0.025),
    }


def test_card_before_there_is_a_comparison_and_without_new_facts(tmp_path):
    folder = write_result(tmp_path / "stage1", make_records(fading_outcomes(40, [1.0, 0.5])), splits=["known"])
    results = [read_result(folder)]
    text = write_model_card(results[0], results, folder).read_text()
    assert "**stage1**" in text and "curves.png" not in text and "clearly" not in text
    assert "new facts." not in text and "falsehoods" not in text and "- 1 facts that" in text


# What must not get into a card


def test_hostile_values_break_neither_the_yaml_nor_the_tables():
    training = {
        "settings": {HOSTILE: [HOSTILE, 1], "seed": HOSTILE},
        "composition": {HOSTILE: {HOSTILE: 1}},
        "teacher": {"identity": HOSTILE, "sha256": HOSTILE},
        "groups": {"groups": {HOSTILE: GROUPS["groups"]["mlp"]}},
        "environment": {"command": "run.py", "date": "2026-01-02", "machine": HOSTILE, "versions": {}},
        "license": HOSTILE,
        "tags": [HOSTILE],
    }
    results = {"variant": HOSTILE, "metrics": [], "metrics_table": "", "table": "", "num_facts": {}}
    card = ModelCard(str(render_model_card({"training": training, "results": results})))
    assert card.data.license == HOSTILE and card.data.to_dict()["pipeline_tag"] == "text-generation"
    assert "<script>" not in card.text and "49" not in card.text and "\n# Heading" not in card.text
    fences = [line[:7] for line in card.text.splitlines() if line.startswith("```")]
    assert fences == ["```bash", "```", "```bibt", "```"]
    rows = [line for line in card.text.splitlines() if line.startswith("|")]
    assert len(rows) == 4 + 3 + 3 and all(line.endswith(" |") for line in rows)


@pytest.mark.parametrize(
    "words, shown",
    [
        (["/home/alice/my facts.csv"], "'my facts.csv'"),
        (["--facts=/home/alice/a=b.csv"], "--facts=a=b.csv"),
        (["~/facts.csv", "../../alice/facts.csv"], "facts.csv facts.csv"),
        (["/home/alice/out/", "..", "~"], "out .. '~'"),
        (["outputs/study", "Qwen/Qwen2.5-0.5B", "5e-5"], "outputs/study Qwen/Qwen2.5-0.5B 5e-5"),
        (["two\n```\nlines", "--password=two words"], "'two ``` lines' --password=HIDDEN"),
        (["--hub_token", "alice", "--wandb_api_key=alice"], "--hub_token HIDDEN --wandb_api_key=HIDDEN"),
        (["--push_token", "--seed", "0"], "--push_token --seed 0"),
        (["HF_TOKEN=alice", "--eos_token", "<end>"], "HF_TOKEN=HIDDEN --eos_token '<end>'"),
        (["https://alice:pass@host/a.csv"], "https://HIDDEN@host/a.csv"),
        (["--init", '{"token": "alice", "a": 1}'], """--init '{"token": HIDDEN, "a": 1}'"""),
        (["caf\udce9.csv"], "'caf?.csv'"),
        (["--note", "hf_" + "a" * 34], "--note HIDDEN"),
    ],
)
def test_a_command_shows_neither_secrets_nor_paths_of_the_machine(words, shown):
    assert portable_command(["scripts/a.py", *words]) == f"scripts/a.py {shown}"
