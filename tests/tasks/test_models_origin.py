"""The baseline step: from a configuration, from a folder, with and without a head that fits."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from specs.schema.graph import BaselineSpec
from specs.schema.pipeline import DataSpec, ModelSpec
from tasks.context import StepError, StepResult
from tasks.models import check_model, fingerprint, load, load_tokenizer
from tasks.models.load import save
from tasks.models.origin import import_model
from tests.support import context, tiny_config, tiny_data, tiny_tokenizer


def bring(folder: Path, task, data: DataSpec, model: ModelSpec, **overrides) -> tuple[StepResult, Path]:
    ctx = context(folder, task, data, model, **overrides)
    return import_model(spec=BaselineSpec(model=model), ctx=ctx), ctx.out


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_decoder_from_its_configuration(tmp_path, text_data, family):
    result, out = bring(tmp_path, "text-generation", text_data, ModelSpec(config=tiny_config(family)))
    model, tokenizer = load(out), load_tokenizer(out)
    assert result.properties["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert (model.config.pad_token_id, model.config.bos_token_id, model.config.eos_token_id) == (0, 1, 2)
    assert len(tokenizer) == model.config.vocab_size == 320
    text = "naïve 東京 🙂\n"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_an_encoder_from_its_configuration_has_the_labels_of_the_data(tmp_path, review_data):
    config = tiny_config("bert")
    _, out = bring(tmp_path, "text-classification", review_data, ModelSpec(config=config))
    model, tokenizer = load(out), load_tokenizer(out)
    assert model.config.id2label == {0: "negative", 1: "positive"}
    ids = tokenizer("a fine film").input_ids
    assert (ids[0], ids[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id)
    assert model(torch.tensor([ids])).logits.shape == (1, 2)


def test_the_vocabulary_is_that_of_the_tokenizer_unless_it_is_given(tmp_path, text_data):
    config = {name: value for name, value in tiny_config("llama").items() if name != "vocab_size"}
    _, out = bring(tmp_path / "a", "text-generation", text_data, ModelSpec(config=config))
    assert load(out).config.vocab_size == len(load_tokenizer(out))
    result, out = bring(
        tmp_path / "b", "text-generation", text_data, ModelSpec(config={**config, "vocab_size": 50_000})
    )
    assert load(out).config.vocab_size == 50_000
    assert "embeddings without a token" in result.warnings[0]


def test_two_processes_make_the_same_bytes(tmp_path, text_data):
    code = (
        "import sys; from pathlib import Path; from specs.schema.pipeline import DataSpec, ModelSpec; "
        "from tests.support import tiny_config; from tests.tasks.test_models_origin import bring; "
        f"data = DataSpec.model_validate_json({text_data.model_dump_json()!r}); "
        "bring(Path(sys.argv[1]), 'text-generation', data, ModelSpec(config=tiny_config('llama')))"
    )
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "a")], check=True, cwd=root, capture_output=True)
    model = ModelSpec(config=tiny_config("llama"))
    bring(tmp_path / "b", "text-generation", text_data, model)
    bring(tmp_path / "c", "text-generation", text_data, model, seed=1)
    made = [(tmp_path / name / "out" / "model.safetensors").read_bytes() for name in "abc"]
    assert made[0] == made[1] != made[2]
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        assert (tmp_path / "a/out" / name).read_bytes() == (tmp_path / "b/out" / name).read_bytes()


def test_a_folder_comes_in_with_the_same_weights(tmp_path, llama, text_data):
    result, out = bring(tmp_path, "text-generation", text_data, ModelSpec(source=str(llama)))
    assert (out / "model.safetensors").read_bytes() == (llama / "model.safetensors").read_bytes()
    assert result.warnings == ()
    assert "weights as they came in" in result.summary


def test_halves_stay_halves(tmp_path, llama, text_data):
    source = tmp_path / "source"
    save(load(llama).to(torch.bfloat16), source, llama)
    result, out = bring(tmp_path / "run", "text-generation", text_data, ModelSpec(source=str(source)))
    assert set(result.properties["dtypes"]) == {"BF16"}
    assert next(load(out).parameters()).dtype == torch.float32


def test_weights_that_are_no_numbers_do_not_come_in(tmp_path, llama, text_data):
    broken = load(llama)
    with torch.no_grad():
        broken.model.layers[1].mlp.up_proj.weight[2, 3] = float("nan")
    save(broken, tmp_path / "broken", llama)
    with pytest.raises(StepError, match=r"layers\.1\.mlp\.up_proj\.weight holds weights that are not finite; take"):
        bring(tmp_path / "run", "text-generation", text_data, ModelSpec(source=str(tmp_path / "broken")))
    assert not list((tmp_path / "run" / "out").glob("*.safetensors"))


def base_of(folder: Path, to: Path) -> Path:
    """The encoder alone of a classifier, as sentence-transformers saves it."""
    save(load(folder).bert, to, folder)  # type: ignore[arg-type]
    return to


def test_a_base_encoder_gets_a_fresh_head_that_the_seed_decides(tmp_path, bert, review_data):
    source = ModelSpec(source=str(base_of(bert, tmp_path / "base")))
    heads = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        result, out = bring(tmp_path / name, "text-classification", review_data, source, seed=seed)
        model = load(out)
        heads.append(model.classifier.weight)
        assert torch.equal(model.bert.pooler.dense.weight, load(bert).bert.pooler.dense.weight)
        assert "fresh head for 2 labels" in result.summary
        assert result.warnings
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    assert 0.005 < heads[0].std() < 0.05


def test_a_classifier_with_these_labels_keeps_its_head(tmp_path, bert, review_data):
    result, out = bring(tmp_path, "text-classification", review_data, ModelSpec(source=str(bert)))
    assert torch.equal(load(out).classifier.weight, load(bert).classifier.weight)
    assert result.warnings == ()


@pytest.mark.parametrize("labels", [("x", "y"), ("x", "y", "z")])
def test_a_classifier_for_other_labels_gets_a_fresh_head(tmp_path, bert, labels):
    rows = "".join(json.dumps({"text": f"text {label}", "label": label}) + "\n" for label in labels)
    (tmp_path / "rows.jsonl").write_text(rows)
    data = DataSpec(train=str(tmp_path / "rows.jsonl"), eval=str(tmp_path / "rows.jsonl"), max_length=16)
    result, out = bring(tmp_path / "run", "text-classification", data, ModelSpec(source=str(bert)))
    model = load(out)
    assert tuple(model.config.id2label.values()) == labels
    assert model.classifier.weight.shape == (len(labels), 32)
    assert not torch.equal(model.classifier.weight[:2], load(bert).classifier.weight)
    assert "fresh" in result.summary


def test_a_language_model_can_become_a_classifier(tmp_path, llama, review_data):
    result, out = bring(tmp_path, "text-classification", review_data, ModelSpec(source=str(llama)))
    model = load(out)
    assert type(model).__name__ == "LlamaForSequenceClassification"
    assert torch.equal(model.model.embed_tokens.weight, load(llama).model.embed_tokens.weight)
    assert list(result.left) == ["lm_head.weight"]
    ids = load_tokenizer(out)(["a", "a longer text"], padding=True, return_tensors="pt")
    assert model(ids["input_ids"], ids["attention_mask"]).logits.shape == (2, 2)


def test_an_old_sentence_transformers_folder_is_found_inside(tmp_path, bert, review_data):
    base_of(bert, tmp_path / "st" / "0_Transformer")
    modules = [{"path": "0_Transformer", "type": "sentence_transformers.models.Transformer"}]
    (tmp_path / "st" / "modules.json").write_text(json.dumps(modules))
    result, _ = bring(tmp_path / "run", "text-classification", review_data, ModelSpec(source=str(tmp_path / "st")))
    assert "BertForSequenceClassification" in result.summary
    modules[0]["path"] = "../elsewhere"
    (tmp_path / "st" / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(StepError, match="points outside its folder"):
        bring(tmp_path / "again", "text-classification", review_data, ModelSpec(source=str(tmp_path / "st")))


def test_a_tokenizer_without_padding_gets_it(tmp_path, gpt2, text_data):
    source = shutil.copytree(gpt2, tmp_path / "source")
    file = source / "tokenizer_config.json"
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "pad_token"}))
    _, out = bring(tmp_path / "run", "text-generation", text_data, ModelSpec(source=str(source)))
    assert load_tokenizer(out).pad_token == load_tokenizer(out).eos_token == "</s>"


def test_a_named_tokenizer_is_used(tmp_path, text_data):
    other = tiny_tokenizer(tmp_path / "other", "llama", 300)
    config = {name: value for name, value in tiny_config("llama").items() if name != "vocab_size"}
    model = ModelSpec(config=config, tokenizer=str(other))
    _, out = bring(tmp_path / "run", "text-generation", text_data, model)
    assert load(out).config.vocab_size == 300
    assert load_tokenizer(out)("the fox").input_ids == load_tokenizer(other)("the fox").input_ids


CONFIG_MISTAKES = {
    "an unknown type": ({"model_type": "lama"}, "model_type 'lama' is unknown; did you mean llama"),
    "a type for something else": ({"model_type": "vit"}, "vit cannot do text-generation"),
    "an unknown field": ({"hiden_size": 32}, r"hiden_size is no field of llama; did you mean hidden_size\?"),
    "a value of the wrong type": ({"hidden_size": "big"}, "model.config: .*hidden_size.*expected int"),
    "heads that do not divide": ({"num_attention_heads": 5}, "model.config: .*not a multiple"),
    "a field of another type": (
        {"model_type": "bert", "num_key_value_heads": None},
        "num_key_value_heads is no field of bert",
    ),
    "too few positions": (
        {"max_position_embeddings": 16},
        "max_length 32 exceeds the 16 positions.*raise model.config",
    ),
    "a vocabulary without room": ({"vocab_size": 100}, "vocab_size 100 .*(260|no room)"),
}


@pytest.mark.parametrize("name", CONFIG_MISTAKES)
def test_mistakes_in_a_configuration_are_told_by_the_plan_and_the_step(tmp_path, text_data, name):
    fields, message = CONFIG_MISTAKES[name]
    model = ModelSpec(config={**tiny_config("llama"), **fields})
    with pytest.raises(StepError, match=message):
        check_model(model, "text-generation", text_data)
    with pytest.raises(StepError, match=message):
        bring(tmp_path, "text-generation", text_data, model)


def test_an_encoder_generates_only_as_a_decoder(tmp_path, text_data):
    model = ModelSpec(config=tiny_config("bert"))
    for refuse in (
        lambda: check_model(model, "text-generation", text_data),
        lambda: bring(tmp_path, "text-generation", text_data, model),
    ):
        with pytest.raises(StepError, match="bert is an encoder and cannot do text-generation"):
            refuse()
    decoder = ModelSpec(config=tiny_config("bert", is_decoder=True))
    _, out = bring(tmp_path, "text-generation", text_data, decoder)
    ids = torch.tensor([[1, 70, 80, 90]])
    other = torch.tensor([[1, 70, 80, 91]])
    model = load(out)
    assert torch.allclose(model(ids).logits[:, :3], model(other).logits[:, :3], atol=1e-6)


def test_mistakes_with_a_folder_are_told(tmp_path, bert, llama, text_data, review_data):
    def refused(message: str, source: Path, task="text-generation", data=text_data, **fields) -> None:
        model = ModelSpec(source=str(source), **fields)
        with pytest.raises(StepError, match=message):
            check_model(model, task, data)
        with pytest.raises(StepError, match=message):
            bring(tmp_path / "run", task, data, model)

    refused("no such folder; did you mean ", llama.with_name(llama.name + "x"))
    refused("bert is an encoder and cannot do text-generation", bert)
    bare = shutil.copytree(llama, tmp_path / "bare")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (bare / name).unlink()
    refused("has no tokenizer", bare)
    refused("exceeds the 64 positions", llama, data=text_data.model_copy(update={"max_length": 65}))
    cut = shutil.copytree(llama, tmp_path / "cut")
    whole = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(whole[:-10])
    with pytest.raises(StepError, match="cut short or damaged"):
        check_model(ModelSpec(source=str(cut)), "text-generation", text_data)


def test_a_tokenizer_of_another_model_is_refused(tmp_path, llama, text_data):
    other = tiny_tokenizer(tmp_path / "other", "llama", 340)
    with pytest.raises(StepError, match="tokenizer has 340 entries, the model embeds 320"):
        bring(tmp_path / "run", "text-generation", text_data, ModelSpec(source=str(llama), tokenizer=str(other)))


def test_the_hub_is_not_asked_when_offline(tmp_path, text_data):
    model = ModelSpec(source="no-such-org/no-such-model")
    with pytest.raises(StepError, match="HF_HUB_OFFLINE is set"):
        bring(tmp_path, "text-generation", text_data, model)
    with pytest.raises(StepError, match="HF_HUB_OFFLINE is set"):
        check_model(model, "text-generation", text_data)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_the_plan_counts_what_the_step_then_makes(request, tmp_path, family, text_data, review_data):
    task, data = ("text-classification", review_data) if family == "bert" else ("text-generation", text_data)
    model = ModelSpec(config=tiny_config(family))
    planned = check_model(model, task, data)
    result, out = bring(tmp_path, task, data, model)
    assert (planned.architecture, planned.parameters) == (result.touched[0], result.properties["parameters"])
    from_folder = check_model(ModelSpec(source=str(out)), task, data)
    assert (from_folder.parameters, from_folder.bytes) == (planned.parameters, planned.bytes)
    assert from_folder.config["model_type"] == family


def test_the_fingerprint_follows_what_lies_in_the_folder(tmp_path, llama):
    source = shutil.copytree(llama, tmp_path / "source")
    moved = shutil.copytree(llama, tmp_path / "moved")
    before = fingerprint(ModelSpec(source=str(source)))
    assert before == fingerprint(ModelSpec(source=str(moved)))
    with (source / "config.json").open("a") as stream:
        stream.write("\n")
    assert before != fingerprint(ModelSpec(source=str(source)))
    assert fingerprint(ModelSpec(config=tiny_config("llama"))) != fingerprint(ModelSpec(config=tiny_config("gpt2")))


def test_training_data_shapes_the_tokenizer_and_evaluation_data_does_not(tmp_path):
    data = tiny_data(tmp_path / "data", "text-generation")
    model = ModelSpec(config=tiny_config("llama"))
    bring(tmp_path / "a", "text-generation", data, model)
    Path(data.eval).write_text('{"text": "zzzz zzzz zzzz zzzz"}\n' * 50)
    bring(tmp_path / "b", "text-generation", data, model)
    Path(data.train).write_text('{"text": "zzzz zzzz zzzz zzzz"}\n' * 50)
    bring(tmp_path / "c", "text-generation", data, model)
    made = [(tmp_path / name / "out" / "tokenizer.json").read_bytes() for name in "abc"]
    assert made[0] == made[1] != made[2]
