"""Folders of the nanoGPT family: every kind reads right, and no pickle runs anything."""

from __future__ import annotations

import collections
import contextlib
import os
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megactx.data import Bundle
from megactx.data.legacy_pickle import parse_plain_pickle
from megactx.errors import MegactxError

CHARS = "\n abc"
CHAR_META = {
    "vocab_size": 5,
    "itos": dict(enumerate(CHARS)),
    "stoi": {c: i for i, c in enumerate(CHARS)},
    "chars": list(CHARS),
}
IDS = np.array([2, 3, 4, 1, 2, 0])


def make(folder: Path, meta: Any, ids: Any = IDS, dtype: str = "<u2", protocol: int = 4) -> Path:
    folder.mkdir(parents=True)
    for split in ("train", "val"):
        np.asarray(ids).astype(dtype).tofile(folder / f"{split}.bin")
    (folder / "meta.pkl").write_bytes(meta if isinstance(meta, bytes) else pickle.dumps(meta, protocol))
    return folder


scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()


def nested(leaves: st.SearchStrategy[Any], *more: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.lists(inner),
            st.dictionaries(st.text() | st.integers(), inner),
            st.tuples(inner),
            st.tuples(inner, inner, inner, inner),
            *more,
        ),
        max_leaves=10,
    )


@given(value=nested(scalars), protocol=st.integers(0, 5))
def test_plain_values_come_back(value: Any, protocol: int) -> None:
    found = parse_plain_pickle(pickle.dumps(value, protocol))
    assert found == value
    assert type(found) is type(value)


@given(
    value=nested(scalars | st.binary(), st.sets(st.integers()), st.frozensets(st.text())), protocol=st.integers(4, 5)
)
def test_bytes_and_sets_come_back(value: Any, protocol: int) -> None:
    """Older protocols build these by a call, and are refused."""
    assert parse_plain_pickle(pickle.dumps(value, protocol)) == value


def test_shared_and_long_values_come_back() -> None:
    row = list(range(3000))
    value = {"a": row, "b": row, "big": 1 << 9000, "c": {i: str(i) for i in range(3000)}}
    found = parse_plain_pickle(pickle.dumps(value))
    assert found == value
    assert found["a"] is found["b"]


class Bomb:
    def __init__(self, command: tuple[Any, ...]) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return self.command


@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_that_runs_a_command_does_not(tmp_path: Path, protocol: int) -> None:
    sentinel = tmp_path / "sentinel"
    data = pickle.dumps({"vocab_size": 5, "x": Bomb((os.system, (f"touch {sentinel}",)))}, protocol)
    Bundle.from_folders([make(tmp_path / "good", CHAR_META)])  # whatever has to be imported is imported
    events: list[str] = []
    watching = True
    sys.addaudithook(lambda event, args: events.append(event) if watching else None)
    folder = make(tmp_path / "bad", data)
    with pytest.raises(MegactxError, match=r"meta\.pkl: refused: opcode (GLOBAL|STACK_GLOBAL) at byte \d+"):
        Bundle.from_folders([folder])
    watching = False
    assert not sentinel.exists()
    assert not {event for event in events if event.startswith(("os.system", "subprocess", "pickle", "exec", "os.exec"))}


@pytest.mark.parametrize(
    ("data", "opcode"),
    [
        (b"cos\nsystem\n(S'true'\ntR.", "GLOBAL"),
        (b"(S'true'\nios\nsystem\n.", "INST"),
        (b"(cos\nsystem\nS'true'\no.", "GLOBAL"),
        (b"(dS'x'\nb.", "BUILD"),
        (b"(d)\x81.", "NEWOBJ"),
        (b"(d)R.", "REDUCE"),
        (b"Pname\n.", "PERSID"),
        (b"N\x51.", "BINPERSID"),
        (b"\x80\x02\x82\x01.", "EXT1"),
        (b"\x80\x05\x97.", "NEXT_BUFFER"),
        (pickle.dumps(collections.OrderedDict(a=1)), "STACK_GLOBAL"),
        (pickle.dumps({"n": np.int64(3)}), "STACK_GLOBAL"),
    ],
)
def test_every_other_opcode_is_refused_by_name(data: bytes, opcode: str) -> None:
    with pytest.raises(MegactxError, match=rf"opcode {opcode} at byte"):
        parse_plain_pickle(data)


@given(st.binary(max_size=40))
def test_garbage_raises_nothing_else(data: bytes) -> None:
    with contextlib.suppress(MegactxError):
        parse_plain_pickle(data)


@pytest.mark.parametrize("keep", range(0, 40, 3))
def test_a_truncated_pickle_is_damaged(keep: int) -> None:
    with pytest.raises(MegactxError, match="damaged pickle"):
        parse_plain_pickle(pickle.dumps(CHAR_META)[:keep])


def test_plain_char_folder(tmp_path: Path) -> None:
    bundle = Bundle.from_folders([make(tmp_path / "poem", CHAR_META)])
    info = bundle.contexts[0]
    assert (info.name, info.kind, info.vocab_size, info.dtype) == ("poem", "categorical", 5, "uint16")
    assert info.load_tokenizer().decode(bundle.split("train")[0]) == "abc a\n"
    assert info.entropy["unigram"] > 0
    assert len(info.sha256["val"]) == 64


@pytest.mark.parametrize(
    ("meta", "tokenizer"),
    [
        ({"tokenizer": "byte", "vocab_size": 256}, {"kind": "byte"}),
        (
            {"tokenizer": "tiktoken", "tiktoken_encoding": "gpt2", "vocab_size": 50257},
            {"kind": "tiktoken", "name": "gpt2"},
        ),
        (
            {"tokenizer": "csv_integer_range", "vocab_size": 11, "int_min": -5, "int_max": 5},
            {"kind": "integer", "minimum": -5, "maximum": 5},
        ),
        ({"tokenizer": "sinewave", "vocab_size": 256}, {"kind": "integer", "minimum": 0, "maximum": 255}),
    ],
)
def test_categorical_kinds(tmp_path: Path, meta: dict[str, Any], tokenizer: dict[str, Any]) -> None:
    info = Bundle.from_folders([make(tmp_path / "x", meta)]).contexts[0]
    assert (info.kind, info.tokenizer) == ("categorical", tokenizer)


@pytest.mark.parametrize(
    ("quantization", "raw"),
    [
        ({"type": "shift_scale_round_clip_uint16", "shift": 10.0, "scale": 4.0}, IDS / 4 - 10),
        (
            {"type": "auto_minmax_to_range_round_clip_uint16", "raw_min": -1.0, "raw_max": 1.0, "target_min": 0.0,
             "target_max": 8.0},
            IDS / 4 - 1,
        ),
        (None, IDS),
    ],
)  # fmt: skip
def test_quantised_columns_keep_their_raw_scale(tmp_path: Path, quantization: Any, raw: np.ndarray) -> None:
    meta = {"tokenizer": "csv_quantized_int", "vocab_size": 65536, "quantization": quantization}
    info = Bundle.from_folders([make(tmp_path / "x", meta)]).contexts[0]
    assert info.kind == "numeric"
    assert info.dtype == "uint16"
    assert info.numeric is not None
    assert info.numeric.raw(IDS) == pytest.approx(raw)
    assert info.numeric.mean == pytest.approx(IDS.mean())


@pytest.mark.parametrize("kind", ["sinewave_fp16_bits", "csv_fp16_bits"])
def test_half_bit_patterns_become_values(tmp_path: Path, kind: str) -> None:
    values = np.array([28.5, -3.25, 0.0, 100.0, 28.5, 7.75], np.float16)
    meta = {"tokenizer": kind, "vocab_size": 65536, "numerical_multicontext_input_format": "fp16_bits"}
    bundle = Bundle.from_folders([make(tmp_path / "x", meta, values.view("<u2"))])
    info = bundle.contexts[0]
    assert info.kind == "numeric"
    assert info.numeric is not None
    assert info.numeric.raw(bundle.split("train")[0]) == pytest.approx(values)
    assert bundle.split("val")[0].max() < info.vocab_size


def test_numerical_reads_whole_numbers_as_numbers(tmp_path: Path) -> None:
    meta = {"tokenizer": "csv_integer_range", "vocab_size": 11, "int_min": -5, "int_max": 5}
    info = Bundle.from_folders([make(tmp_path / "x", meta)], numerical=True).contexts[0]
    assert info.numeric is not None
    assert info.numeric.raw(IDS) == pytest.approx(IDS - 5)
    assert info.load_tokenizer().decode(IDS) == "-3,-2,-1,-4,-3,-5"
    with pytest.raises(MegactxError, match="context 'poem' cannot be read as numbers"):
        Bundle.from_folders([make(tmp_path / "poem", CHAR_META)], numerical=True)


def test_65536_symbols_are_read_as_uint16(tmp_path: Path) -> None:
    """The family's loader reads this file as uint32: half as many ids, all wrong."""
    meta = {"tokenizer": "csv_integer_range", "vocab_size": 65536, "int_min": 0, "int_max": 65535}
    ids = [1, 65535, 7, 9, 2, 40000]
    assert Bundle.from_folders([make(tmp_path / "x", meta, ids)]).split("train")[0].tolist() == ids


@pytest.mark.parametrize(
    ("size", "ids", "dtype", "message"),
    [
        (65_537, [65_536, 1, 2], "<u4", None),
        (65_536, [0, 0, 65_535], "<u2", None),
        (1, [0, 0, 0, 0], "<u2", None),
        (5, [1, 2, 3], "<u4", "may hold uint16 or uint32"),
        (5, [1, 0, 2, 0], "<u2", "may hold uint16 or uint32"),
        (65_536, [1, 40_000], "<u4", "may hold uint16 or uint32"),
        (256, [300, 301, 1], "<u2", "holds id 301, outside the vocabulary of 256"),
        (100_000, [1, 40_000], "<u2", "read as uint32, holds id 2621440001"),
        (100_000, [1, 40_000, 3], "<u2", "6 bytes, which is no whole number of uint32"),
        (5, [], "<u2", "missing or empty"),
    ],
)
def test_the_id_type_is_decided_from_the_bytes(
    tmp_path: Path, size: int, ids: list[int], dtype: str, message: str | None
) -> None:
    meta = {"tokenizer": "csv_integer_range", "vocab_size": size, "int_min": 0, "int_max": size - 1}
    folder = make(tmp_path / "x", meta, ids, dtype)
    if message is None:
        assert Bundle.from_folders([folder]).split("val")[0].tolist() == ids
    else:
        with pytest.raises(MegactxError, match=f"context 'x': .*({message})"):
            Bundle.from_folders([folder])


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ({"itos": {}}, "no usable vocab_size"),
        ([1, 2], "no usable vocab_size"),
        ({"vocab_size": True}, "no usable vocab_size"),
        ({"vocab_size": 6, "itos": {0: "a"}}, r"does not hold ids 0\.\.5"),
        ({"vocab_size": 5, "itos": ["ab"] * 5}, "id 0 stands for 'ab'"),
        ({"vocab_size": 5, "tokenizer": "sentencepiece"}, "'sentencepiece' that cannot be read"),
        ({"vocab_size": 9, "tokenizer": "csv_integer_range", "int_min": 0, "int_max": 9}, "do not make 9"),
        ({"vocab_size": 9, "tokenizer": "csv_quantized_int", "quantization": {"type": "log"}}, "'log'"),
        (
            {"vocab_size": 9, "tokenizer": "csv_quantized_int",
             "quantization": {"type": "shift_scale_round_clip_uint16", "shift": 0, "scale": 0}},
            "damaged quantization",
        ),
    ],
)  # fmt: skip
def test_unusable_metadata_is_refused_by_name(tmp_path: Path, meta: Any, message: str) -> None:
    with pytest.raises(MegactxError, match=f"context 'x': .*{message}"):
        Bundle.from_folders([make(tmp_path / "x", meta)])


def test_folders_are_aligned_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "data" / "mc" / "one", CHAR_META)
    make(tmp_path / "data" / "mc" / "two", CHAR_META, IDS[::-1])
    make(tmp_path / "data" / "other" / "two", CHAR_META)
    make(tmp_path / "data" / "mc" / "short", CHAR_META, IDS[:3])
    bundle = Bundle.from_folders(["mc/two", "data/mc/one"])  # with and without the leading data/
    assert [info.name for info in bundle.contexts] == ["two", "one"]
    assert bundle.split("train")[0].tolist() == IDS[::-1].tolist()
    assert [i.name for i in Bundle.from_folders(["mc/two", "other/two"]).contexts] == ["mc_two", "other_two"]
    with pytest.raises(MegactxError, match="'short' has 3 tokens in the train split, context 'one' has 6"):
        Bundle.from_folders(["mc/one", "mc/short"])
    with pytest.raises(MegactxError, match="no context folder at mc/three or data/mc/three"):
        Bundle.from_folders(["mc/three"])
    with pytest.raises(MegactxError, match="listed twice"):
        Bundle.from_folders(["mc/one", "mc/one"])
    (tmp_path / "bare").mkdir()
    with pytest.raises(MegactxError, match=r"neither meta\.json nor meta\.pkl"):
        Bundle.from_folders(["bare"])
