"""Audio: every format and rate gives the same sound, and what is wrong with a file is told with file and row."""

from __future__ import annotations

import io
import struct
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile

from specs.schema.pipeline import DataSpec
from tasks.context import StepError
from tasks.data.audio import Recording, audio_of, decoded, resampled, seconds_of
from tasks.data.bad_rows import BadRow, BadRows
from tasks.data.fingerprint import fingerprint
from tasks.data.preflight import overview, preflight
from tasks.data.readers import records
from tests.support import write_jsonl

LIMIT = 30.0


def tone(rate: int = 16_000, seconds: float = 0.5, hertz: float = 440.0) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(int(rate * seconds)) / rate)).astype(np.float32)


def wav(file: Path, samples: np.ndarray | None = None, rate: int = 16_000, **how: str) -> Path:
    soundfile.write(file, tone(rate) if samples is None else samples, rate, **how)
    return file


def whole(file: Path | bytes, rate: int = 16_000, limit: float = LIMIT) -> np.ndarray:
    return resampled(decoded(file, limit, "m.jsonl:7"), rate)


@pytest.mark.parametrize(("suffix", "subtype", "error"), [("wav", "PCM_16", 1e-4), ("flac", "PCM_16", 1e-4)])
def test_lossless_formats_give_the_samples(tmp_path, suffix, subtype, error):
    file = wav(tmp_path / f"a.{suffix}", subtype=subtype)
    assert np.abs(whole(file) - tone()).max() < error
    assert np.array_equal(whole(file), whole(file.read_bytes()))
    assert seconds_of(file, LIMIT, "m.jsonl:7") == 0.5


def test_ogg_gives_the_same_sound(tmp_path):
    heard = whole(wav(tmp_path / "a.ogg", format="OGG", subtype="VORBIS"))
    assert np.corrcoef(heard, tone())[0, 1] > 0.99


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 44_100, 48_000])
def test_any_rate_becomes_that_of_the_model(tmp_path, rate):
    """Against the tone itself at 16 kHz, away from the edges where the resampling filter sees silence."""
    heard = whole(wav(tmp_path / "a.wav", rate=rate))
    assert heard.dtype == np.float32
    assert len(heard) == pytest.approx(8000, abs=2)
    middle = slice(1000, 7000)
    assert np.abs(heard[middle] - tone()[middle]).max() < 2e-3


def test_stereo_is_averaged(tmp_path):
    left, right = tone(hertz=300), tone(hertz=700)
    heard = whole(wav(tmp_path / "a.wav", np.stack([left, right], axis=1), subtype="FLOAT"))
    assert np.allclose(heard, (left + right) / 2, atol=1e-7)


def longer(folder: Path) -> Path:
    """A wav file of 100 minutes, all of it there; a hole takes no place on the disk."""
    count = 6000 * 8000
    form = struct.pack("<IHHIIHH", 16, 1, 1, 8000, 16_000, 2, 16)
    header = b"RIFF" + struct.pack("<I", 36 + 2 * count) + b"WAVEfmt " + form
    file = folder / "long.wav"
    with file.open("wb") as stream:
        stream.write(header + b"data" + struct.pack("<I", 2 * count))
        stream.truncate(44 + 2 * count)
    return file


def cut(folder: Path, suffix: str, share: float) -> Path:
    samples = (np.random.default_rng(0).normal(size=16_000 * 8) * 0.1).astype(np.float32)
    file = wav(folder / f"cut.{suffix}", samples)
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * share)])
    return file


def write_bytes(folder: Path, content: bytes) -> Path:
    (folder / "x.wav").write_bytes(content)
    return folder / "x.wav"


def with_nan(folder: Path) -> Path:
    samples = tone()
    samples[1600] = np.nan
    return wav(folder / "nan.wav", samples, subtype="FLOAT")


BROKEN = {
    "an empty file": (lambda folder: write_bytes(folder, b""), r"x\.wav is an empty file"),
    "no sample": (lambda folder: wav(folder / "x.wav", tone()[:0]), r"x\.wav holds no sample"),
    "no audio": (lambda folder: write_bytes(folder, b"{}" * 500), r"x\.wav is damaged or no audio"),
    "silence": (lambda folder: wav(folder / "x.wav", tone() * 0), r"x\.wav is silent"),
    "no number": (with_nan, r"nan\.wav has a sample that is no finite number, the first at 0\.100 s"),
    "a wav cut short": (lambda folder: cut(folder, "wav", 0.5), r"cut\.wav is cut short"),
    "a flac cut short": (lambda folder: cut(folder, "flac", 0.5), r"cut\.flac is damaged or no audio"),
    "an ogg cut short": (lambda folder: cut(folder, "ogg", 0.5), r"cut\.ogg is cut short"),
    "100 minutes": (longer, r"long\.wav is 6000\.0 s long; at most 30 s are taken"),
    "a low rate": (lambda folder: wav(folder / "x.wav", rate=4000), r"x\.wav has 4000 samples a second; 8000 to 48000"),
    "a high rate": (lambda folder: wav(folder / "x.wav", rate=96_000), r"x\.wav has 96000 samples a second"),
    "many channels": (lambda folder: wav(folder / "x.wav", np.tile(tone()[:, None], 4)), r"x\.wav has 4 channels"),
    "another format": (lambda folder: wav(folder / "x.aiff"), r"x\.aiff is AIFF; write it as wav, flac or ogg"),
    "a missing file": (lambda folder: folder / "none.wav", r"none\.wav does not exist"),
    "a folder": (lambda folder: folder, r"is not a file"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_wrong_with_a_file_is_told_with_its_row(tmp_path, case):
    make, message = BROKEN[case]
    started = time.monotonic()
    with pytest.raises(BadRow, match=rf"^m\.jsonl:7: .*{message}"):
        whole(make(tmp_path))
    assert time.monotonic() - started < 2


def test_a_corrupt_flac_is_told(tmp_path):
    content = bytearray(wav(tmp_path / "a.flac", tone(seconds=4)).read_bytes())
    for at in range(len(content) // 2, len(content), 7):
        content[at] ^= 0xFF
    with pytest.raises(BadRow, match="damaged or no audio"):
        whole(bytes(content))


def test_a_wav_whose_writer_did_not_know_its_length_is_whole(tmp_path):
    """Programs that write into a pipe leave the largest number in the header."""
    content = bytearray(wav(tmp_path / "a.wav").read_bytes())
    at = content.index(b"data") + 4
    content[4:8] = content[at : at + 4] = b"\xff\xff\xff\xff"
    assert len(whole(bytes(content))) == 8000


def test_a_flac_without_its_length_is_told(tmp_path):
    content = bytearray(wav(tmp_path / "a.flac").read_bytes())
    content[21] &= 0xF0
    content[22:26] = bytes(4)
    with pytest.raises(BadRow, match="does not say how long it is"):
        whole(bytes(content))


def test_a_long_recording_is_refused_by_its_header_alone(tmp_path, monkeypatch):
    file = longer(tmp_path)
    monkeypatch.setattr(soundfile.SoundFile, "read", lambda *_, **__: pytest.fail("it was decoded"))
    with pytest.raises(BadRow, match="6000"):
        decoded(file, LIMIT, "m.jsonl:7")


@pytest.mark.parametrize(
    "named", ["../out.wav", "a/../../out.wav", "/etc/passwd", "./x/../../train/../../out.wav", "{tmp}/out.wav"]
)
def test_a_manifest_names_no_file_outside_its_folder(tmp_path, named):
    folder = tmp_path / "train"
    folder.mkdir()
    wav(tmp_path / "out.wav")
    with pytest.raises(BadRow, match=r"m:1: .* lies outside the folder of the data file"):
        audio_of(named.replace("{tmp}", str(tmp_path)), folder, "audio", "m:1")


@pytest.mark.parametrize("named", ["a.wav", "./a.wav", "x/../a.wav", "{folder}/a.wav"])
def test_paths_inside_the_folder_are_found(tmp_path, named):
    named = named.replace("{folder}", str(tmp_path))
    assert audio_of(named, tmp_path, "audio", "m:1") == tmp_path / "a.wav"


@pytest.mark.parametrize("value", [None, "", " ", 5, "a\0b", {"path": None}])
def test_a_column_that_names_no_audio_is_told(tmp_path, value):
    with pytest.raises(BadRow, match="m:1: column 'audio' names no audio file"):
        audio_of(value, tmp_path, "audio", "m:1")


def manifest(folder: Path, rows: list[dict[str, str]], **fields: object) -> DataSpec:
    file = str(write_jsonl(folder / "m.jsonl", rows))
    return DataSpec.model_validate({"train": file, "eval": file, **fields})


def test_a_manifest_gives_paths_beside_it(tmp_path):
    wav(tmp_path / "a.wav")
    spec = manifest(tmp_path, [{"file": "a.wav", "said": "one"}], fields={"audio": "file", "text": "said"})
    (record,) = records(spec, "train", "speech-recognition")
    assert (record.text, record.audio, record.place) == ("one", tmp_path / "a.wav", f"{tmp_path / 'm.jsonl'}:1")


def test_a_tsv_and_a_parquet_of_files_with_their_bytes_are_manifests_too(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    content = wav(tmp_path / "a.wav").read_bytes()
    (tmp_path / "m.tsv").write_text("audio\ttext\na.wav\tone\n")
    pq.write_table(pa.table({"audio": [{"bytes": content, "path": "a.wav"}], "text": ["one"]}), tmp_path / "m.parquet")
    for name, audio in (("m.tsv", tmp_path / "a.wav"), ("m.parquet", content)):
        spec = DataSpec(train=str(tmp_path / name), eval=str(tmp_path / name))
        (record,) = records(spec, "train", "speech-recognition")
        assert (record.text, record.audio) == ("one", audio)


def test_bad_audio_is_skipped_and_counted_where_the_spec_says_so(tmp_path):
    wav(tmp_path / "a.wav")
    wav(tmp_path / "b.wav", tone(hertz=600))
    with_nan(tmp_path)
    names = ["a.wav", "gone.wav", "../a.wav", "nan.wav", "a.wav", "b.wav", "n" * 5000]
    rows = [{"audio": name, "text": "one"} for name in names] + [{"audio": "a.wav", "text": " "}]
    spec = manifest(tmp_path, rows, on_bad_row="skip")
    with Path(spec.train).open("a") as file:
        file.write('{"audio": "\\ud800.wav", "text": "one"}\n')
    seen = overview(spec, "speech-recognition")["eval"]
    assert seen.records == 3
    assert seen.skipped == {
        "no such audio": 1,
        "audio outside the folder": 1,
        "samples that are no numbers": 1,
        "empty text": 1,
        "half a surrogate pair": 1,
        "audio cannot be read": 1,
    }
    assert "6 bad rows were skipped" in seen.warnings[0]
    assert "m.jsonl:2" in seen.first_skipped
    assert (seen.repeated, seen.in_train) == (1, 3)
    assert preflight(spec, "speech-recognition")["eval"].records == 4  # headers alone: the NaN is not seen
    assert seen.seconds == pytest.approx(1.5)
    with pytest.raises(StepError, match=r"m\.jsonl:2: .*gone\.wav does not exist"):
        preflight(manifest(tmp_path, rows), "speech-recognition")


def test_nothing_left_is_an_error(tmp_path):
    rows = [{"audio": f"{number}.wav", "text": "one"} for number in range(3)]
    spec = manifest(tmp_path, rows, on_bad_row="skip")
    with pytest.raises(StepError, match=r"every record is bad, no such audio: 3; the first: .*m\.jsonl:1"):
        preflight(spec, "speech-recognition")


def test_the_fingerprint_follows_the_audio(tmp_path):
    wav(tmp_path / "a.wav")
    spec = manifest(tmp_path, [{"audio": "a.wav", "text": "one"}])
    before = fingerprint(spec, "train", "speech-recognition")
    assert before == fingerprint(spec, "train", "speech-recognition")
    wav(tmp_path / "a.wav", tone(hertz=500))
    assert before != fingerprint(spec, "train", "speech-recognition")


def test_samples_in_memory_are_checked_like_files():
    with pytest.raises(BadRow, match="is silent"):
        decoded(Recording(np.zeros(10, np.float32), 8000), LIMIT, "builtin:x record 1")
    with pytest.raises(BadRow, match=r"is 11\.2 s long"):
        seconds_of(Recording(np.ones(90, np.float32), 8), 10, "builtin:x record 1")


def test_bad_rows_stop_or_are_counted():
    bad = BadRow("x:1: broken; mend it", "broken")
    with pytest.raises(BadRow):
        BadRows("stop").add(bad)
    rows = BadRows("skip")
    rows.add(bad)
    rows.add(BadRow("x:2: broken; mend it", "broken"))
    rows.add(BadRow("x:3: empty; fill it", "empty"))
    assert rows.warning == "3 bad rows were skipped, broken: 2, empty: 1; x:1: broken; mend it"
    rows.check_some_left(1, "data.train")
    with pytest.raises(StepError, match=r"data\.train: every record is bad"):
        rows.check_some_left(0, "data.train")


def test_bytes_of_nothing_are_an_empty_file():
    with pytest.raises(BadRow, match="is an empty file"):
        decoded(io.BytesIO().getvalue(), LIMIT, "x row 1")
