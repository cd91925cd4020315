"""Models that write: translation, Whisper and CTC, from a configuration and from a folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from specs.schema.base import Task
from specs.schema.graph import BaselineSpec
from specs.schema.pipeline import DataSpec, ModelSpec
from specs.schema.steps.quantize import QuantizeSpec
from tasks.compress.quantize import quantize
from tasks.context import StepError, StepResult
from tasks.models import check_model, family_of, load, load_tokenizer, save
from tasks.models.applications import CTC_TYPES, HEADS, SEQ2SEQ_STARTS, auto_name, head_for, pairs, task_of
from tasks.models.generation import settle
from tasks.models.origin import import_model
from tasks.models.tokenizer import train_tokenizer
from tests.support import TASKS_OF, as_artifact, context, tiny_config

WRITERS = ("marian", "t5", "bart", "whisper")
LIMIT = 6


def bring(folder: Path, task, data: DataSpec, model: ModelSpec, **overrides) -> tuple[StepResult, Path]:
    ctx = context(folder, task, data, model, **overrides)
    return import_model(spec=BaselineSpec(model=model), ctx=ctx), ctx.out


def data_of(request, family: str) -> DataSpec:
    return request.getfixturevalue("pair_data" if TASKS_OF[family] == "translation" else "speech_data")


def inputs(family: str, count: int = 3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    if family == "whisper":
        return {"input_features": torch.randn(count, 16, 100, generator=generator)}
    if family == "wav2vec2":
        return {"input_values": torch.randn(count, 4000, generator=generator)}
    ids = torch.randint(4, 300, (count, 9), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def written(model: Any, given: dict[str, torch.Tensor], limit: int = LIMIT) -> list[list[int]]:
    """Greedy decoding without a cache, the whole target anew for every token; without start and end mark."""
    config = model.config
    lines = torch.full((len(next(iter(given.values()))), 1), config.decoder_start_token_id)
    with torch.no_grad():
        for _ in range(limit):
            best = model(**given, decoder_input_ids=lines).logits[:, -1].argmax(-1)
            lines = torch.cat([lines, best[:, None]], 1)
    return [text_of(row, config) for row in lines.tolist()]


def text_of(row: list[int], config: Any) -> list[int]:
    """What stands before the end mark, without start and padding. BART starts with its end mark; Whisper's generate
    leaves the start out."""
    row = row[1:] if row[:1] == [config.decoder_start_token_id] else row
    end = row.index(config.eos_token_id) if config.eos_token_id in row else len(row)
    return [token for token in row[:end] if token not in (config.pad_token_id, config.decoder_start_token_id)]


def generated(model: Any, given: dict[str, torch.Tensor]) -> list[list[int]]:
    rows = model.generate(**given, num_beams=1, do_sample=False, max_new_tokens=LIMIT).tolist()
    return [text_of(row, model.config) for row in rows]


@pytest.mark.parametrize("family", [*WRITERS, "wav2vec2"])
def test_what_is_saved_comes_back(request, tmp_path, family):
    folder = request.getfixturevalue(family)
    model = load(folder)
    save(model, tmp_path, folder)
    again = load(tmp_path)
    given = inputs(family)
    extra = {} if family == "wav2vec2" else {"labels": torch.tensor([[5, 6, 2]] * 3)}
    with torch.no_grad():
        assert torch.equal(model(**given, **extra).logits, again(**given, **extra).logits)
    names = {file.name for file in folder.iterdir()}
    assert names == {file.name for file in tmp_path.iterdir()}
    assert ("preprocessor_config.json" in names) == (TASKS_OF[family] == "speech-recognition")
    for name in names - {"config.json", "generation_config.json"}:
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.parametrize("family", WRITERS)
def test_generate_writes_what_a_naive_loop_writes(request, family):
    model = load(request.getfixturevalue(family))
    given = inputs(family)
    assert generated(model, given) == written(model, given)
    assert len({tuple(row) for row in written(model, given)}) > 1, "the inputs must make a difference"


@pytest.mark.parametrize("family", WRITERS)
def test_a_writer_from_its_configuration_knows_its_tokens(request, tmp_path, family):
    model = ModelSpec(config=tiny_config(family))
    result, out = bring(tmp_path, TASKS_OF[family], data_of(request, family), model)
    built, tokenizer = load(out), load_tokenizer(out)
    assert result.properties["parameters"] > 0
    assert "entries from the training data" in result.summary
    config: Any = built.config
    settings: Any = built.generation_config
    start = {"bart": 2, "whisper": 1}.get(family, 0)
    for where in (config, settings):
        tokens = (where.pad_token_id, where.bos_token_id, where.eos_token_id, where.decoder_start_token_id)
        assert tokens == (0, 1, 2, start)
    assert tokenizer.convert_ids_to_tokens([0, 1, 2]) == ["<pad>", "<s>", "</s>"]
    assert settings.forced_eos_token_id is settings.suppress_tokens is settings.begin_suppress_tokens is None
    text = "the naïve 東京 fox"
    ids = tokenizer(text).input_ids
    assert ids[-1] == 2
    assert ids.count(2) == 1
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert generated(built, inputs(family)) == written(built, inputs(family))


def test_the_tokenizer_is_trained_on_sources_and_targets(tmp_path, pair_data):
    rows = [json.loads(line) for line in Path(pair_data.train).read_text().splitlines()]
    _, out = bring(tmp_path / "both", "translation", pair_data, ModelSpec(config=tiny_config("marian")))
    tokenizer = load_tokenizer(out)
    alone = tmp_path / "alone"
    alone.mkdir()
    train_tokenizer((row["source"] for row in rows), 320, "encoder-decoder", alone, 32)
    sources_only = load_tokenizer(alone)
    targets = [row["target"] for row in rows]
    assert sum(len(tokenizer(text).input_ids) for text in targets) < sum(
        len(sources_only(text).input_ids) for text in targets
    )


def test_a_ctc_model_from_its_configuration_has_the_characters_of_the_transcripts(tmp_path, speech_data):
    model = ModelSpec(config=tiny_config("wav2vec2"))
    _, out = bring(tmp_path, "speech-recognition", speech_data, model)
    texts = [json.loads(line)["text"] for line in Path(speech_data.train).read_text().splitlines()]
    vocabulary = load_tokenizer(out).get_vocab()
    assert vocabulary == {
        token: number for number, token in enumerate(["<pad>", "<unk>", "|", *sorted(set("".join(texts)) - {" "})])
    }
    config: Any = load(out).config
    assert (config.vocab_size, config.pad_token_id, config.ctc_zero_infinity) == (len(vocabulary), 0, True)
    features = json.loads((out / "preprocessor_config.json").read_text())
    assert features["feature_extractor_type"] == "Wav2Vec2FeatureExtractor"
    assert (features["sampling_rate"], features["do_normalize"]) == (16_000, True)


def test_characters_keep_words_apart_and_repeats_together(tmp_path):
    train_tokenizer(["all the", "fox|fox", "a cafe\u0301"], 4096, "ctc", tmp_path, 32)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.convert_ids_to_tokens(tokenizer("  all\tthe  ").input_ids) == list("all|the")
    assert tokenizer.decode(tokenizer("all the cafe\u0301").input_ids) == "all the café"
    assert tokenizer.convert_ids_to_tokens(tokenizer("ALL z").input_ids) == [*"all|", "<unk>"]
    train_tokenizer(["aaaa bbb cc d"], 5, "ctc", tmp_path, 32)
    assert load_tokenizer(tmp_path).get_vocab() == {"<pad>": 0, "<unk>": 1, "|": 2, "a": 3, "b": 4}
    with pytest.raises(StepError, match="no room for two characters and 2 special tokens; write 4 or more"):
        train_tokenizer(["a"], 3, "ctc", tmp_path, 32)


def test_whisper_hears_as_many_frames_as_it_has_positions(tmp_path, speech_data):
    from transformers import AutoFeatureExtractor

    model = ModelSpec(config=tiny_config("whisper", max_source_positions=100))
    _, out = bring(tmp_path, "speech-recognition", speech_data, model)
    extractor = AutoFeatureExtractor.from_pretrained(out)
    made = extractor(torch.zeros(8000).numpy(), sampling_rate=16_000, return_tensors="pt")
    assert made.input_features.shape == (1, 16, 200)
    with torch.no_grad():
        load(out)(**made, decoder_input_ids=torch.tensor([[1]]))  # type: ignore[operator]


@pytest.mark.parametrize("family", [*WRITERS, "wav2vec2"])
def test_the_plan_counts_what_the_step_then_makes(request, tmp_path, family):
    task, data = TASKS_OF[family], data_of(request, family)
    result, out = bring(tmp_path, task, data, ModelSpec(config=tiny_config(family)))
    config = {**tiny_config(family), "vocab_size": load(out).config.vocab_size}  # type: ignore[union-attr]
    planned = check_model(ModelSpec(config=config), task, data)
    assert (planned.architecture, planned.parameters) == (result.touched[0], result.properties["parameters"])
    from_folder = check_model(ModelSpec(source=str(out)), task, data)
    assert (from_folder.parameters, from_folder.bytes) == (planned.parameters, planned.bytes)
    assert family_of(from_folder.config) == family_of(planned.config) == family_of(load(out).config)  # type: ignore


@pytest.mark.parametrize("family", ["marian", "whisper", "wav2vec2"])
def test_a_folder_comes_in_as_it_is(request, tmp_path, family):
    folder = request.getfixturevalue(family)
    model = ModelSpec(source=str(folder))
    result, out = bring(tmp_path, TASKS_OF[family], data_of(request, family), model)
    for name in ("model.safetensors", "tokenizer.json", "preprocessor_config.json"):
        assert not (folder / name).exists() or (out / name).read_bytes() == (folder / name).read_bytes()
    assert (result.warnings, result.left) == ((), {})
    if family != "wav2vec2":
        assert generated(load(out), inputs(family)) == generated(load(folder), inputs(family))


@pytest.mark.parametrize("family", ["marian", "whisper", "wav2vec2"])
def test_the_seed_decides_the_weights(request, tmp_path, family):
    model = ModelSpec(config=tiny_config(family))
    made = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        _, out = bring(tmp_path / name, TASKS_OF[family], data_of(request, family), model, seed=seed)
        made.append({file.name: file.read_bytes() for file in out.iterdir()})
    assert made[0] == made[1]
    assert made[0]["model.safetensors"] != made[2]["model.safetensors"]


def test_the_hub_is_not_asked_when_offline(tmp_path, pair_data, speech_data):
    cases: list[tuple[Task, DataSpec]] = [("translation", pair_data), ("speech-recognition", speech_data)]
    for task, data in cases:
        model = ModelSpec(source="no-such-org/no-such-model")
        with pytest.raises(StepError, match="HF_HUB_OFFLINE is set"):
            check_model(model, task, data)
        with pytest.raises(StepError, match="HF_HUB_OFFLINE is set"):
            bring(tmp_path, task, data, model)


MISTAKES: dict[str, tuple[Task, dict[str, Any], str]] = {
    "a type for something else": ("translation", {"model_type": "llama"}, "llama cannot do translation.*marian"),
    "a near type": ("translation", {"model_type": "umt55"}, r"'umt55' is unknown; did you mean umt5\?"),
    "a text model": ("speech-recognition", {"model_type": "t5"}, "t5 cannot do speech-recognition.*whisper"),
    "audio to text": ("translation", tiny_config("whisper"), "whisper cannot do translation"),
    "too few positions": (
        "translation",
        tiny_config("marian", max_position_embeddings=16),
        r"data\.max_length 32 exceeds the 16 positions.*raise model\.config\.max_position_embeddings",
    ),
    "too few to write": (
        "speech-recognition",
        tiny_config("whisper", max_target_positions=16),
        r"data\.max_length 32 exceeds the 16 positions.*raise model\.config\.max_target_positions",
    ),
    "parts of a second": (
        "speech-recognition",
        tiny_config("whisper", max_source_positions=75),
        r"max_source_positions 75 is 1\.5 s of audio.*multiple of 50",
    ),
    "a vocabulary without room": ("translation", tiny_config("t5", vocab_size=100), "vocab_size 100 .*260"),
    "heads that do not divide": ("translation", tiny_config("bart", d_model=30), "cannot be built.*divisible"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_told_by_the_plan_and_the_step(tmp_path, pair_data, speech_data, name):
    task, config, message = MISTAKES[name]
    model = ModelSpec(config=config)
    data = pair_data if task == "translation" else speech_data
    with pytest.raises(StepError, match=message):
        check_model(model, task, data)
    with pytest.raises(StepError, match=message):
        bring(tmp_path, task, data, model)


def test_targets_and_audio_have_limits_of_their_own(tmp_path, marian, whisper, pair_data, speech_data):
    speech: Task = "speech-recognition"

    def refused(message: str, folder: Path, task: Task, data: DataSpec) -> None:
        for refuse in (check_model, lambda model, task, data: bring(tmp_path, task, data, model)):
            with pytest.raises(StepError, match=message):
                refuse(ModelSpec(source=str(folder)), task, data)

    longer = pair_data.model_copy(update={"max_target_length": 65})
    refused(r"data\.max_target_length 65 exceeds the 64 positions", marian, "translation", longer)
    louder = speech_data.model_copy(update={"max_duration": 1.5})
    refused(r"data\.max_duration 1\.5 s exceeds the 1 s that the model hears", whisper, speech, louder)
    refused("marian cannot do speech-recognition", marian, speech, speech_data)


def test_t5_and_ctc_set_no_limit(tmp_path, pair_data, speech_data):
    long = pair_data.model_copy(update={"max_length": 100_000})
    assert check_model(ModelSpec(config=tiny_config("t5")), "translation", long).parameters
    loud = speech_data.model_copy(update={"max_duration": 3600.0, "max_length": 100_000})
    assert check_model(ModelSpec(config=tiny_config("wav2vec2")), "speech-recognition", loud).parameters


def test_a_tokenizer_without_end_mark_is_refused(tmp_path, llama, pair_data):
    config = {name: value for name, value in tiny_config("marian").items() if name != "vocab_size"}
    model = ModelSpec(config=config, tokenizer=str(llama))
    with pytest.raises(StepError, match="puts no end mark behind a text"):
        bring(tmp_path, "translation", pair_data, model)


def test_generation_settings_of_a_folder_are_kept(tmp_path, marian, pair_data):
    folder = shutil.copytree(marian, tmp_path / "model")
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(settings | {"num_beams": 4, "bad_words_ids": [[0]]}))
    _, out = bring(tmp_path / "run", "translation", pair_data, ModelSpec(source=str(folder)))
    kept: Any = load(out).generation_config
    assert (kept.num_beams, kept.bad_words_ids) == (4, [[0]])
    assert all(0 not in row for row in generated(load(out), inputs("marian")))


def test_settle_fills_what_is_missing_and_nothing_else(marian):
    model: Any = load(marian)
    model.generation_config.eos_token_id = 7
    model.generation_config.decoder_start_token_id = None
    settle(model)
    assert model.generation_config.eos_token_id == 7
    assert model.generation_config.decoder_start_token_id == 0


def test_every_head_is_known_to_transformers_and_goes_both_ways():
    for task, heads in HEADS.items():
        for head in heads:
            classes = head.classes()
            assert classes
            assert head.types is None or set(classes) == set(head.types)
            for kind, name in classes.items():
                if head.types is not None:
                    assert task_of([name]) == task
                    assert head_for(task, kind) is head
                    assert auto_name(task, kind) == head.auto
    assert ("speech-recognition", "ctc") in pairs()
    assert ("translation", "decoder") not in pairs()


@pytest.mark.parametrize(
    ("fields", "family"),
    [
        ({"model_type": "bert", "architectures": ["BertForSequenceClassification"]}, "encoder"),
        ({"model_type": "bert", "architectures": ["BertLMHeadModel"], "is_decoder": True}, "decoder"),
        ({"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]}, "decoder"),
        ({"model_type": "bart", "architectures": ["BartForCausalLM"]}, "decoder"),
        ({"model_type": "bart", "architectures": ["BartForSequenceClassification"]}, "encoder-decoder"),
        ({"model_type": "mbart"}, "encoder-decoder"),
        ({"model_type": "whisper", "architectures": ["WhisperForConditionalGeneration"]}, "encoder-decoder"),
        ({"model_type": "wav2vec2", "architectures": ["Wav2Vec2Model"]}, "ctc"),
        ({"model_type": "hubert", "architectures": ["HubertForCTC"]}, "ctc"),
    ],
)
def test_family_of_a_configuration(fields, family):
    assert family_of(fields) == family


OTHERS = sorted({*SEQ2SEQ_STARTS, *CTC_TYPES} - {*WRITERS, "wav2vec2"})


@pytest.mark.parametrize("kind", OTHERS)
def test_every_type_that_can_be_used_is_built_runs_and_is_packed(tmp_path, pair_data, speech_data, kind):
    speech = kind in CTC_TYPES
    task: Task = "speech-recognition" if speech else "translation"
    config = tiny_config("wav2vec2" if speech else "t5" if "t5" in kind else "bart", model_type=kind)
    if kind == "data2vec-audio":
        del config["feat_extract_norm"]
    data = speech_data if speech else pair_data
    model = ModelSpec(config=config)
    assert check_model(model, task, data).parameters
    _, out = bring(tmp_path / "made", task, data, model)
    ctx = context(tmp_path / "packed", task, data, model, store=tmp_path / "made/store")
    result = quantize(as_artifact(out), spec=QuantizeSpec(uses="quantize", id="q"), ctx=ctx)
    assert result.properties["output_error"] < 0.1
    packed: Any = load(ctx.out)
    if speech:
        assert packed(**inputs("wav2vec2")).logits.shape[-1] == packed.config.vocab_size
    else:
        assert len(generated(packed, inputs("marian"))) == 3
