import hashlib
import io
import itertools
import json
import os
import pickle
import random
import re
import stat

import pytest
import torch

from nnce.experiments import timing
from nnce.training import checkpoints


def content_of(seed):
    """What a run leaves, in small."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "config": {"epochs": 3, "hidden": [5, 4], "lr": 0.1, "resume": None, "dry_run": False},
        "state": {
            "network": {"0.weight": torch.randn(50, 40, generator=generator)},
            "generator": generator.get_state(),
            "numbers": [float("inf"), -0.0, 5e-324, 2**53 + 1, "tensor in this file"],
        },
        "half": torch.randn(3, generator=generator).bfloat16(),
        "empty": torch.zeros(0, 3, dtype=torch.float64),
        "scalar": torch.tensor(7.0),
        "view": torch.arange(12).view(3, 4).T[1],
    }


def same(a, b):
    if isinstance(a, torch.Tensor):
        return type(b) is torch.Tensor and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and repr(a) == repr(b)


def test_a_checkpoint_gives_back_what_was_written(tmp_path):
    path = checkpoints.write_checkpoint(tmp_path, content_of(0))
    assert same(checkpoints.read_checkpoint(path), content_of(0))
    found = checkpoints.latest_checkpoint(tmp_path)
    assert found.path == path and same(found.content, content_of(0)) and found.damaged == []
    first_line = path.read_bytes().splitlines()[0].decode()
    assert re.fullmatch(r"nnce checkpoint 2 [0-9a-f]{64} \d{20}", first_line)


def test_the_newest_two_are_kept(tmp_path):
    assert checkpoints.latest_checkpoint(tmp_path) is None
    (tmp_path / "checkpoint-of-mine").write_text("precious")
    for seed in range(4):
        checkpoints.write_checkpoint(tmp_path, content_of(seed))
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["checkpoint-000003", "checkpoint-000004", "checkpoint-of-mine"]
    assert same(checkpoints.latest_checkpoint(tmp_path).content, content_of(3))


def test_a_checkpoint_that_does_not_read_back_takes_nothing_away(tmp_path, monkeypatch):
    """As on a disk that says yes and loses it."""
    for seed in range(2):
        checkpoints.write_checkpoint(tmp_path, content_of(seed))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    whole = checkpoints.write_whole

    def loses_a_bit(path, write):
        whole(path, write)
        content = bytearray(path.read_bytes())
        content[1000] ^= 1
        path.write_bytes(content)

    monkeypatch.setattr(checkpoints, "write_whole", loses_a_bit)
    with pytest.raises(OSError, match="its checksum is wrong: it was just written"):
        checkpoints.write_checkpoint(tmp_path, content_of(2))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_files_and_folders_are_on_the_disk_before_they_count(tmp_path, monkeypatch):
    """fsync of the file, then the rename, then fsync of the folder, and only then an older goes."""
    calls = []

    def noted(name, whole):
        def call(*arguments, **more):
            what = arguments[0]
            if name == "fsync":
                what = "folder" if stat.S_ISDIR(os.fstat(what).st_mode) else "file"
            calls.append((name, what))
            return whole(*arguments, **more)

        return call

    for seed in range(2):
        checkpoints.write_checkpoint(tmp_path, content_of(seed))
    for name in ("fsync", "replace", "unlink"):
        monkeypatch.setattr(os, name, noted(name, getattr(os, name)))
    checkpoints.write_checkpoint(tmp_path, content_of(2))
    written, renamed, in_folder, gone = calls
    assert written == ("fsync", "file") and renamed[0] == "replace"
    assert in_folder == ("fsync", "folder") and gone[0] == "unlink"


class RunsCode:
    """Unpickled, it leaves a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def with_checksum(data, version=b"2"):
    """Any data as a checkpoint whose checksum is right."""
    length = b" %020d\n" % len(data)
    digest = hashlib.sha256(b"nnce checkpoint " + version + length + data).hexdigest()
    return b"nnce checkpoint " + version + b" " + digest.encode() + length + data


def safetensors_header(header, data=b""):
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def claims():
    """Files of safetensors' format, in form, that are larger than they are, or lie otherwise."""
    tera = 10**12
    for shape, dtype, size in (([tera], "U8", tera), ([tera, tera], "F32", 8), ([2**62], "F64", 8)):
        offsets = {"json": {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}}
        yield safetensors_header(offsets, b"{}      ")
    for length in (2**63, 2**40, 10**9):
        yield length.to_bytes(8, "little") + b"{}"
    whole = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
    yield safetensors_header({"json": whole})
    yield safetensors_header({"a": whole})
    yield safetensors_header({})
    for text in (
        b"[]",
        b"{",
        b"\xff\xfe",
        b"9" * 5000,
        b"[" * 100_000,
        b'{"tensor in this file": 1}',
    ):
        entry = {"dtype": "U8", "shape": [len(text)], "data_offsets": [0, len(text)]}
        yield safetensors_header({"json": entry}, text)


def damages(good, folder, chance, count):
    """`count` damaged checkpoints of all kinds: a name, and the bytes."""
    size = len(good)
    _, of_content = good.split(b"\n", 1)
    yield "empty", b""
    code = pickle.dumps(RunsCode(folder / "code was run"))
    zipped = io.BytesIO()
    torch.save({"a": RunsCode(folder / "code was run")}, zipped)
    for name, foreign in (("pickle", code), ("torch.save", zipped.getvalue())):
        yield name, foreign
        yield f"{name} with a checksum", with_checksum(foreign)
    for version in (b"0", b"1", b"10"):
        yield "another version's", with_checksum(of_content, version)
    for number, claim in enumerate(claims()):
        yield f"claim {number}", with_checksum(claim)
    yield "swapped halves", good[size // 2 :] + good[: size // 2]
    yield "twice", good + good
    yield "too long", good + b"\0"
    yield "without its first line", of_content
    for percent in range(100) if count >= 500 else range(0, 100, 10):
        yield f"cut at {percent} %", good[: size * percent // 100]
    for _ in range(20 if count >= 500 else 3):
        yield "random, with a checksum", with_checksum(chance.randbytes(chance.randrange(2000)))
        cut = chance.randrange(1, size)
        yield "swapped", good[cut:] + good[:cut]
        begin = chance.randrange(size)
        yield "a hole", good[:begin] + bytes(min(512, size - begin)) + good[begin + 512 :]
    while True:
        bit = chance.randrange(8 * size)
        flipped = bytearray(good)
        flipped[bit // 8] ^= 1 << bit % 8
        yield f"bit {bit}", bytes(flipped)


@pytest.mark.parametrize(
    "count", [100, pytest.param(600, marks=pytest.mark.exhaustive, id="exhaustive")]
)
def test_damaged_checkpoints_are_refused_and_the_one_before_is_used(
    count, tmp_path, record_property
):
    """With a sentence, no code run, no wrong number, and no memory for what they claim."""
    run = tmp_path / "run"
    run.mkdir()
    good = [checkpoints.write_checkpoint(run, content_of(seed)) for seed in range(2)]
    newest = good[1].read_bytes()
    chance = random.Random(0)

    def read_all():
        for name, data in itertools.islice(damages(newest, tmp_path, chance, count), count):
            if data == newest:  # a hole where there were zeros
                continue
            good[1].write_bytes(data)
            with pytest.raises(checkpoints.CheckpointError) as refused:
                checkpoints.read_checkpoint(good[1])
            sentence = str(refused.value)
            assert sentence.startswith(f"{good[1]} ") and len(sentence) < 400, name
            found = checkpoints.latest_checkpoint(run)
            assert found.path == good[0] and found.damaged == [sentence]
            assert same(found.content, content_of(0)), name
            yield name.split()[0]

    kinds, bytes_more = timing.peak_memory(lambda: set(read_all()), torch.device("cpu"))
    assert not (tmp_path / "code was run").exists() and len(kinds) >= 12
    assert not bytes_more >= len(newest) + 100e6  # NaN where it cannot be measured
    good[0].write_bytes(b"")
    with pytest.raises(checkpoints.CheckpointError, match=r"checkpoint-000001 is empty"):
        checkpoints.latest_checkpoint(run)
    record_property("trials", count)


def test_a_checkpoint_that_cannot_be_read_is_not_the_end(tmp_path):
    checkpoints.write_checkpoint(tmp_path, content_of(0))
    (tmp_path / "checkpoint-000002").mkdir()
    found = checkpoints.latest_checkpoint(tmp_path)
    assert same(found.content, content_of(0)) and "cannot be read" in found.damaged[0]


def test_what_was_left_half_written_is_cleared(tmp_path):
    (tmp_path / ".unfinished-0123").write_bytes(b"half")
    (tmp_path / "mine").write_bytes(b"precious")
    checkpoints.clear_unfinished(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
