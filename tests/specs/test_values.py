"""Values that no run can do anything with are refused before one starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.specs.writing import GOOD, good, mistakes

TASKS = {
    "text-classification": GOOD[: GOOD.index("gates:")],
    "translation": "name: x\ntask: translation\nmodel: {source: a/b}\ndata: {train: ./a, eval: ./b}\n"
    "steps:\n  - {id: slim, uses: finetune}\n  - {id: npu, uses: export_tflite, precision: int8, npu: ethos-u85-256}\n",
}
TASKS["text-generation"] = TASKS["translation"].replace("translation", "text-generation")
TASKS["speech-recognition"] = TASKS["translation"].replace("translation", "speech-recognition")

LIMITS = [
    # task, gate, what is wrong with the limit, what to write
    ("text-classification", "accuracy, at_least: 80", "at_least of accuracy is outside 0% to 100%", "80%"),
    ("text-classification", "accuracy, at_least: 101%", "is outside 0% to 100%", "99%"),
    ("text-classification", "accuracy, at_most: -3", "is outside 0% to 100%", "99%"),
    ("text-classification", "calibration_error, at_most: -3%", "is outside 0% to 100%", "5%"),
    ("speech-recognition", "wer, at_most: 1.5", "is outside 0% to 100%", "1.5%"),
    ("speech-recognition", "wer, drop: {at_most: 100 points}", "drop of wer always holds", "1.5 points"),
    ("text-classification", "mcc, at_least: 80", "is outside -1 to 1", "0.5"),
    ("text-classification", "mcc, drop: {at_most: 2}", "drop of mcc always holds", "0.02"),
    ("text-classification", "accuracy, drop: {at_most: 100%}", "drop of accuracy always holds", "1.5 points"),
    ("text-classification", "accuracy, drop: {at_most: -1 points}", "is negative", "1.5 points"),
    ("text-classification", "latency_p50, at_most: -1 ms", "is negative", "10 ms"),
    ("text-classification", "latency_p50, at_most: 0 s", "is 0, which no model reaches", "10 ms"),
    ("text-classification", "size, at_most: 0", "is 0, which no model reaches", "14 MB"),
    ("text-classification", "size, at_most: -5 MB", "is negative", "14 MB"),
    ("text-classification", "size, gain: {at_least: 0}", "gain of size is not more than 0", "4x"),
    ("text-classification", "size, gain: {at_least: -2x}", "gain of size is not more than 0", "4x"),
    ("translation", "bleu, at_least: 300", "is outside 0 to 100", "50"),
    ("translation", "bleu, drop: {at_most: 100 points}", "drop of bleu always holds", "1 point"),
    ("text-generation", "perplexity, at_most: 0.5", "is less than 1", "12.5"),
]


@pytest.mark.parametrize(("task", "gate", "message", "example"), LIMITS)
def test_limits_that_nothing_meets_or_misses(task: str, gate: str, message: str, example: str, tmp_path: Path) -> None:
    (found,) = mistakes(tmp_path, f"{TASKS[task]}gates:\n  - {{step: slim, metric: {gate}}}\n")
    form = gate.partition(", ")[2].partition(":")[0]
    assert found.field == "gates[0]." + {"drop": "drop.at_most", "gain": "gain.at_least"}.get(form, form)
    assert message in found.message
    assert found.remedy.startswith(f"write for example {example}")


@pytest.mark.parametrize(
    ("task", "gate"),
    [
        ("text-classification", "accuracy, at_least: 80%"),
        ("text-classification", "accuracy, at_least: 1"),
        ("text-classification", "accuracy, at_most: 0"),
        ("text-classification", "mcc, at_least: -0.5"),
        ("text-classification", "size, at_least: 0"),
        ("text-classification", "size, gain: {at_least: 0.9x}"),
        ("text-classification", "size, drop: {at_most: 150%}"),
        ("translation", "bleu, at_least: 30"),
        ("translation", "bleu, drop: {at_most: 0}"),
        ("text-generation", "perplexity, drop: {at_most: 200}"),
        ("speech-recognition", "wer, drop: {at_most: 150%}"),
    ],
)
def test_limits_at_the_edge(task: str, gate: str, tmp_path: Path) -> None:
    assert good(tmp_path, f"{TASKS[task]}gates:\n  - {{step: slim, metric: {gate}}}\n").spec.gates


def test_an_npu_build_may_need_no_flash(tmp_path: Path) -> None:
    text = f"{TASKS['translation']}gates:\n  - {{step: npu, metric: npu_flash, at_most: 0}}\n"
    assert good(tmp_path, text).spec.gates[0].limit.number == 0


def test_a_limit_compares_with_no_step(tmp_path: Path) -> None:
    text = GOOD.replace("drop: {at_most: 1.5 points}", "at_least: 80%, relative_to: student")
    (found,) = mistakes(tmp_path, text)
    assert (found.field, found.message) == ("gates[0].relative_to", "at_least compares with no step")


VALUES = [
    # key, value, what is wrong
    ("steps.slim.sparsity", "0", "must be more than 0%"),
    ("steps.slim.sparsity", "100%", "must be less than 100%"),
    ("steps.slim.timeout", "0", "must be more than 0 s"),
    ("steps.slim.timeout", "-5 s", "negative"),
    ("steps.slim.retry_delay", "-1 s", "negative"),
    ("steps.student.label_smoothing", "100%", "must be less than 100%"),
    ("steps.student.validation", "1", "must be less than 100%"),
    ("steps.student.save_every", "-1 min", "negative"),
    ("steps.cpu.length", "1000001", "must be at most 1000000"),
    ("steps.npu.npu_memory_mode", "''", "empty"),
    ("steps.best", "{id: best, uses: select, from: [cpu, npu], maximise: latency_p50}", "would choose the worst"),
    ("steps.best", "{id: best, uses: select, from: [cpu, npu], minimise: accuracy}", "would choose the worst"),
    ("model.source", "''", "empty"),
    ("model.tokenizer", "''", "empty"),
    ("data.train", "''", "empty"),
    ("data.fields.text", "''", "empty"),
    ("data.windows", "64", "windows of 64 tokens cannot share 64"),
    ("data.filter", "{min_tokens: 5, max_tokens: 4}", "leave out every record"),
    ("evaluate.latency.threads", "100000", "must be at most 1024"),
    ("evaluate.latency.repeats", "0", "must be at least 3"),
    ("evaluate.confidence", "1", "must be less than 1"),
    ("schedule.interval", "0", "must be at least 1 s"),
    ("schedule.cron", "0 0 31 2 *", "never comes"),
    ("resources.disk", "0", "must be more than 0 B"),
    ("resources.threads", "0", "must be more than 0"),
]


@pytest.mark.parametrize(("key", "value", "message"), VALUES, ids=lambda part: part)
def test_values_that_no_run_can_use(key: str, value: str, message: str, tmp_path: Path) -> None:
    (found,) = mistakes(tmp_path, GOOD, [f"{key}={value}"])
    assert found.field.startswith(key)
    assert message in found.message
    assert found.remedy


MISPLACED = [
    ("text-generation", "steps.slim.class_weights", "balanced", "text-classification"),
    ("translation", "steps.slim.sampling", "balanced", "text-classification"),
    ("translation", "data.windows", "8", "text-classification"),
    ("text-generation", "data.max_target_length", "8", "translation"),
    ("text-classification", "data.filter.max_ratio", "2", "translation"),
    ("text-classification", "data.filter.max_duration", "2 s", "speech-recognition"),
    ("translation", "data.max_duration", "2 s", "speech-recognition"),
    ("translation", "evaluate.normalise", "none", "speech-recognition"),
    ("translation", "evaluate.generation.prompt", "8", "text-generation"),
    ("text-classification", "evaluate.generation.new_tokens", "8", "text-generation, translation, speech-recognition"),
]


@pytest.mark.parametrize(("task", "key", "value", "tasks"), MISPLACED)
def test_a_field_that_the_task_passes_over_is_refused(
    task: str, key: str, value: str, tasks: str, tmp_path: Path
) -> None:
    (found,) = mistakes(tmp_path, TASKS[task], [f"{key}={value}"])
    assert (found.field, found.message) == (key, f"{key.rpartition('.')[2]} does nothing for {task}")
    assert found.remedy == f"leave it out; it is for {tasks}"


@pytest.mark.parametrize(("task", "key", "value", "tasks"), MISPLACED)
def test_it_is_taken_for_the_task_that_it_is_for(task: str, key: str, value: str, tasks: str, tmp_path: Path) -> None:
    key = key.replace("slim", "student") if tasks == "text-classification" else key
    assert good(tmp_path, TASKS[tasks.partition(",")[0]], [f"{key}={value}"]).spec.task != task


def test_a_choice_that_is_the_default_does_no_harm(tmp_path: Path) -> None:
    assert good(tmp_path, TASKS["translation"], ["steps.slim.sampling=natural"]).spec.task == "translation"
