"""Shards: what is written is read, by us and by the family's own few lines; what is damaged is named or left out."""

from __future__ import annotations

import json
import os
import resource
import struct
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiktoken
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megactx.data import Bundle, tokenizers
from megactx.data import write as write_module
from megactx.data.bundle import contexts_from_manifest
from megactx.data.shard_file import (
    HEADER_BYTES,
    MAGIC,
    Shard,
    ShardedTokens,
    find_shards,
    read_shard,
    read_shards,
    write_shard,
)
from megactx.data.shards import ShardSet, document_separators, write_shard_set
from megactx.data.write import NewContext, write_bundle
from megactx.errors import MegactxError
from megactx.files import sha256_of

IDS = np.arange(1000) * 7 % 65_536


def context(train: np.ndarray, val: np.ndarray, vocab_size: int = 256, **changes: Any) -> NewContext:
    fields = {"name": "text", "kind": "categorical", "tokenizer": {"kind": "byte"}} | changes
    return NewContext(vocab_size=vocab_size, arrays=(train, val), **fields)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "set"
    ids = np.arange(1250) % 251
    write_shard_set(path, [context(ids[:1000], ids[1000:])], {"kind": "test"}, tokens_per_shard=300)
    return path


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """Shards of somebody else: three for training, one for validation, GPT-2 ids."""
    for name, size in {"t_0": 100, "t_1": 50, "t_2": 75, "v_0": 60}.items():
        write_shard(tmp_path / f"{name}.bin", (np.arange(size) * 331) % 50_257)
    return tmp_path


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise ConnectionError

    tokenizers._tiktoken_encoding.cache_clear()
    monkeypatch.setattr(tiktoken, "get_encoding", fail)


def raw_shard(path: Path, words: list[int], body: bytes) -> Path:
    path.write_bytes(struct.pack("<256i", *words, *[0] * (256 - len(words))) + body)
    return path


# -- one file ------------------------------------------------------------------------------------------------------


def test_the_family_reads_what_we_write_and_we_read_what_it_writes(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    assert write_shard(path, IDS) == sha256_of(path)
    with path.open("rb") as file:
        header = np.frombuffer(file.read(256 * 4), dtype=np.int32)
        tokens = np.frombuffer(file.read(), dtype=np.uint16)
    assert header[:3].tolist() == [20240520, 1, 1000]
    assert not header[3:].any()
    assert (tokens == IDS).all()
    other = raw_shard(tmp_path / "b.bin", [20240520, 1, 1000], IDS.astype("<u2").tobytes())
    shard = read_shard(other)
    assert shard == Shard(other, 1000, "uint16")
    assert (shard.map() == IDS).all()
    assert not shard.map().flags.writeable
    assert shard.largest() == IDS.max()


def test_the_llama_3_form_is_read(tmp_path: Path) -> None:
    ids = np.arange(5) * 25_000
    shard = read_shard(raw_shard(tmp_path / "a.bin", [20240801, 7, 5], ids.astype("<u4").tobytes()))
    assert shard.dtype == "uint32"
    assert shard.map().tolist() == ids.tolist()


@pytest.mark.parametrize(
    ("words", "body", "message"),
    [
        ([7, 1, 2], 4, r"a\.bin begins with 7, expected the magic number 20240520.*--from_folders"),
        ([MAGIC, 2, 2], 4, r"a\.bin has version 2, expected 1"),
        ([20240801, 1, 2], 8, r"a\.bin has version 1, expected 7"),
        ([MAGIC, 1, 0], 0, r"a\.bin holds 0 tokens by its header"),
        ([MAGIC, 1, -5], 0, r"a\.bin holds -5 tokens by its header"),
        ([MAGIC, 1, 3], 4, r"a\.bin holds 2 tokens behind its header, which says 3: its end is missing"),
        ([MAGIC, 1, 3], 5, r"a\.bin holds 2 tokens and 1 byte of another .* its end is missing"),
        ([MAGIC, 1, 3], 7, r"a\.bin holds 3 tokens and 1 byte of another .* more than it should hold"),
        ([MAGIC, 1, 3], 8, r"a\.bin holds 4 tokens behind its header, which says 3: there is more"),
        ([20240801, 7, 2], 11, r"a\.bin holds 2 tokens and 3 bytes of another"),
    ],
)
def test_a_damaged_shard_is_refused_by_name(tmp_path: Path, words: list[int], body: int, message: str) -> None:
    path = raw_shard(tmp_path / "a.bin", words, b"\1" * body)
    with pytest.raises(MegactxError, match=message) as caught:
        read_shard(path)
    assert "\n" not in str(caught.value)


def test_files_that_are_no_shards(tmp_path: Path) -> None:
    path = tmp_path / "train.bin"
    np.arange(1, 3000, dtype=np.uint16).tofile(path)  # nanoGPT's: ids from the first byte on
    with pytest.raises(MegactxError, match=r"bare uint16 ids .*megactx prepare --from_folders"):
        read_shard(path)
    path.write_bytes(b"")
    with pytest.raises(MegactxError, match=r"train\.bin is empty"):
        read_shard(path)
    path.write_bytes(b"ab")
    with pytest.raises(MegactxError, match=r"train\.bin has 2 bytes"):
        read_shard(path)
    path.write_bytes(struct.pack("<3i", MAGIC, 1, 5))
    with pytest.raises(MegactxError, match="has 12 bytes: its header of 1024 bytes is cut short"):
        read_shard(path)
    with pytest.raises(MegactxError, match=r"nowhere\.bin does not exist"):
        read_shard(tmp_path / "nowhere.bin")
    with pytest.raises(MegactxError, match="is no regular file"):
        read_shard(tmp_path)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), cut=st.integers(0, HEADER_BYTES + 20))
def test_no_mutation_of_a_shard_ends_in_another_error(tmp_path: Path, data: st.DataObject, cut: int) -> None:
    path = tmp_path / "a.bin"
    write_shard(path, IDS[:10])
    content = bytearray(path.read_bytes()[:cut])
    for at in data.draw(st.lists(st.integers(0, 15), max_size=3)):
        content[at : at + 1] = data.draw(st.binary(min_size=1, max_size=1))
    path.write_bytes(content)
    try:
        shard = read_shard(path)
    except MegactxError:
        return
    assert shard.map().size == shard.tokens > 0


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (np.array([1, 65_536]), "id 65536 does not fit uint16"),
        (np.array([1, -1]), "id -1 does not fit uint16"),
        (np.array([1.0]), "expected whole numbers"),
        (np.zeros((2, 2), int), "expected whole numbers"),
        (np.zeros(0, int), "expected 1 to 2147483647 tokens, got 0"),
    ],
)
def test_what_no_shard_can_hold_is_not_written(tmp_path: Path, ids: np.ndarray, message: str) -> None:
    with pytest.raises(MegactxError, match=message):
        write_shard(tmp_path / "a.bin", ids)


# -- several files ---------------------------------------------------------------------------------------------------


def test_files_come_sorted_and_once(bare: Path) -> None:
    assert [path.name for path in find_shards(str(bare / "t_*.bin"))] == ["t_0.bin", "t_1.bin", "t_2.bin"]
    assert find_shards([bare / "t_2.bin", str(bare / "t_[01].bin")]) == find_shards(str(bare / "t_?.bin"))
    with pytest.raises(MegactxError, match=r"t_1\.bin is listed twice"):
        find_shards([bare / "t_1.bin", str(bare / "t_*.bin")])
    (bare / "link.bin").symlink_to(bare / "t_0.bin")
    with pytest.raises(MegactxError, match="is listed twice"):
        find_shards([bare / "t_0.bin", bare / "link.bin"])
    with pytest.raises(MegactxError, match=r"no shard matches '.*x_\*\.bin'"):
        find_shards(str(bare / "x_*.bin"))
    with pytest.raises(MegactxError, match=r"is a folder: name its files, as '.*\*\.bin'"):
        find_shards(bare)
    with pytest.raises(MegactxError, match="no shards were given"):
        find_shards([])


def test_a_damaged_shard_is_left_out_only_when_asked_and_reported(bare: Path) -> None:
    paths = find_shards(str(bare / "t_*.bin"))
    paths[1].write_bytes(paths[1].read_bytes()[:-1])
    with pytest.raises(MegactxError, match=r"t_1\.bin holds 49 tokens and 1 byte"):
        read_shards(paths)
    with pytest.warns(UserWarning, match=r"left out: shard .*t_1\.bin"):
        shards, skipped = read_shards(paths, skip_bad=True)
    assert [shard.path.name for shard in shards] == ["t_0.bin", "t_2.bin"]
    assert len(skipped) == 1
    for path in (paths[0], paths[2]):
        path.write_bytes(b"")
    with pytest.raises(MegactxError, match=r"all 3 shards are damaged: shard .*t_0\.bin is empty"):
        read_shards(paths, skip_bad=True)
    with pytest.raises(MegactxError, match=r"t_0\.bin is empty.*; .*t_1\.bin.*; .*t_2\.bin"):  # all at once
        read_shards(paths)


def test_pipes_and_links_in_a_circle_are_named_and_can_be_left_out(bare: Path) -> None:
    """To open a pipe would wait for a writer without end."""
    os.mkfifo(bare / "t_3.bin")
    (bare / "t_4.bin").symlink_to(bare / "t_4.bin")
    paths = find_shards(str(bare / "t_*.bin"))
    assert len(paths) == 5
    with pytest.raises(MegactxError, match=r"t_3\.bin is no regular file; shard .*t_4\.bin cannot be read: .*symbolic"):
        read_shards(paths)
    with pytest.warns(UserWarning, match="left out: shard"):
        assert len(read_shards(paths, skip_bad=True)[0]) == 3


def test_shards_are_one_sequence(bare: Path) -> None:
    shards = [read_shard(path) for path in find_shards(str(bare / "t_*.bin"))]
    tokens = ShardedTokens(shards)
    whole = np.concatenate([shard.map() for shard in shards])
    assert (np.asarray(tokens) == whole).all()
    assert (len(tokens), tokens.size, tokens.dtype) == (225, 225, np.uint16)
    for cut in (slice(0, 5), slice(90, 160), slice(99, 100), slice(100, 101), slice(-3, None), slice(7, 3),
                slice(225, 300), slice(3, 220, 7), slice(None)):  # fmt: skip
        assert tokens[cut].tolist() == whole[cut].tolist()
    assert [tokens.shard_at(at).path.name for at in (0, 99, 100, 149, 150, 224)] == [
        "t_0.bin", "t_0.bin", "t_1.bin", "t_1.bin", "t_2.bin", "t_2.bin",
    ]  # fmt: skip


def test_more_shards_than_a_process_may_open(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    shards = []
    for number in range(150):
        write_shard(tmp_path / f"{number:03d}.bin", np.array([number, number]))
        shards.append(read_shard(tmp_path / f"{number:03d}.bin"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(list(Path("/proc/self/fd").iterdir())) + 60, hard))
    try:
        assert np.asarray(ShardedTokens(shards)).tolist() == np.arange(150).repeat(2).tolist()
        tokens = ShardedTokens(shards)
        assert [int(tokens[at : at + 1][0]) for at in range(300)] == np.arange(150).repeat(2).tolist()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# -- folders of shards -----------------------------------------------------------------------------------------------


def test_a_folder_of_shards_is_a_bundle(folder: Path) -> None:
    names = ["shards.json", *(f"train_{i:06d}.bin" for i in range(4)), "val_000000.bin"]
    assert sorted(path.name for path in folder.iterdir()) == names
    bundle = Bundle.open(folder, verify=True)
    assert isinstance(bundle, ShardSet)
    assert (bundle.length("train"), bundle.length("val")) == (1000, 250)
    assert [shard.tokens for shard in bundle.shards("train")] == [300, 300, 300, 100]
    assert (np.asarray(bundle.split("train")[0]) == np.arange(1000) % 251).all()
    assert (np.asarray(bundle.split("val")[0]) == np.arange(1000, 1250) % 251).all()
    info = bundle.context("text")
    assert contexts_from_manifest(json.loads(json.dumps(bundle.manifest_json()))) == (info,)
    assert info.load_tokenizer().decode([104, 105]) == "hi"
    assert info.entropy["unigram"] == pytest.approx(np.log(251), abs=1e-2)
    assert bundle.delimiter == 0
    assert [c.name for c in Bundle.open(folder, names=["text"]).contexts] == ["text"]
    with pytest.raises(MegactxError, match="one context 'text', asked for 'kind'"):
        Bundle.open(folder, names=["kind"])


def test_its_hashes_tell_contents_apart_and_not_places(folder: Path, tmp_path: Path) -> None:
    before = Bundle.open(folder).contexts[0].sha256
    moved = folder.rename(tmp_path / "elsewhere")
    assert Bundle.open(moved).contexts[0].sha256 == before
    ids = np.arange(1250) % 250
    write_shard_set(moved, [context(ids[:1000], ids[1000:])], {"kind": "test"}, tokens_per_shard=300, overwrite=True)
    after = Bundle.open(moved).contexts[0].sha256
    assert after["train"] != before["train"]
    assert after["val"] != before["val"]


def test_all_damage_in_a_folder_is_named_at_once(folder: Path) -> None:
    for name in ("train_000001.bin", "val_000000.bin"):
        data = bytearray((folder / name).read_bytes())
        data[HEADER_BYTES + 5] ^= 1
        (folder / name).write_bytes(data)
    Bundle.open(folder)  # sizes are right
    with pytest.raises(MegactxError, match=r"train_000001\.bin does not match.*val_000000\.bin does not match"):
        Bundle.open(folder, verify=True)
    (folder / "train_000002.bin").unlink()
    with pytest.raises(MegactxError, match=r"train_000002\.bin does not exist"):
        Bundle.open(folder)
    with pytest.warns(UserWarning, match="train_000002"):
        rest = ShardSet.open(folder, skip_bad=True)
    assert rest.length("train") == 700
    assert len(rest.skipped) == 1


def test_a_shard_of_another_length_than_listed_is_refused(folder: Path) -> None:
    write_shard(folder / "train_000001.bin", np.arange(299))
    with pytest.raises(MegactxError, match=r"train_000001\.bin holds 299 uint16 tokens, shards\.json lists 300"):
        Bundle.open(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(format="x"), "not a megactx-shards description"),
        (lambda d: d.update(version=9), "version 9 is not 1"),
        (lambda d: d.pop("source"), "source: expected an object"),
        (lambda d: d.update(delimiter="x"), "delimiter: expected a token or null, got 'x'"),
        (lambda d: d.update(delimiter=256), "delimiter 256 is outside the vocabulary of 256"),
        (lambda d: d.pop("context"), "has no name"),
        (lambda d: d["context"].pop("dtype"), "'text'.*dtype"),
        (lambda d: d.pop("shards"), "shards.train: expected a list of files"),
        (lambda d: d["shards"].update(val=[]), "shards.val: expected a list of files"),
        (lambda d: d["shards"]["val"].append(3), "shards.val: file of an entry is None"),
        (lambda d: d["shards"]["val"][0].update(tokens="many"), "shards.val: tokens of an entry is 'many'"),
        (lambda d: d["shards"]["val"][0].update(file="../val.bin"), r"'\.\./val\.bin' is not the name of a file"),
        (lambda d: d["shards"]["train"].reverse(), "not in order"),
    ],
)
def test_a_damaged_description_is_refused(folder: Path, change: Any, message: str) -> None:
    data = json.loads((folder / "shards.json").read_text())
    change(data)
    (folder / "shards.json").write_text(json.dumps(data))
    with pytest.raises(MegactxError, match=message):
        Bundle.open(folder)


@pytest.mark.parametrize(
    ("contexts", "message"),
    [
        ([context(IDS % 256, IDS % 256), context(IDS % 256, IDS % 256, name="b")], r"got 2 \(text, b\)"),
        ([context(IDS, IDS, 65_537)], "65,537 symbols"),
        ([context(IDS, IDS, 65_536, kind="numeric")], "is numeric"),
        ([context(IDS, IDS, 10)], "id 6993 in the train split is outside the vocabulary of 10"),
    ],
)
def test_what_does_not_fit_shards_is_refused(tmp_path: Path, contexts: list[NewContext], message: str) -> None:
    with pytest.raises(MegactxError, match=message):
        write_shard_set(tmp_path / "set", contexts, {})
    assert list(tmp_path.iterdir()) == []


def test_shards_replace_a_dataset_only_when_asked_and_only_whole(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = [context(np.arange(10), np.arange(10))]
    with pytest.raises(MegactxError, match="--overwrite"):
        write_shard_set(folder, small, {})

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(write_module, "_move_into_place", full)
        with pytest.raises(MegactxError, match="No space left"):
            write_shard_set(folder, small, {}, overwrite=True)
    assert Bundle.open(folder, verify=True).length("train") == 1000
    write_bundle(folder, small, {}, overwrite=True)
    assert not isinstance(Bundle.open(folder, verify=True), ShardSet)
    write_shard_set(folder, small, {}, overwrite=True)
    assert isinstance(Bundle.open(folder, verify=True), ShardSet)
    assert [path.name for path in folder.parent.iterdir()] == ["set"]


# -- shards of others ------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("offline")
def test_bare_shards_are_taken_for_gpt_2s(bare: Path) -> None:
    shards = ShardSet.from_files(str(bare / "t_*.bin"), bare / "v_0.bin")
    info = shards.contexts[0]
    assert (info.name, info.vocab_size, info.dtype, shards.delimiter) == ("text", 50_304, "uint16", 50_256)
    assert (shards.length("train"), shards.length("val")) == (225, 60)
    assert info.load_tokenizer().decode([5, 50_300]) == "5,50300"  # no way to have GPT-2's: ids as numbers
    assert contexts_from_manifest(json.loads(json.dumps(shards.manifest_json()))) == (info,)
    other = ShardSet.from_files(str(bare / "t_*.bin"), str(bare / "v_*.bin"), vocab_size=51_000, delimiter=3)
    assert (other.contexts[0].vocab_size, other.delimiter) == (51_000, 3)
    assert ShardSet.from_files(bare / "t_0.bin", bare / "v_0.bin", vocab_size=60_000).delimiter is None
    with pytest.raises(MegactxError, match="delimiter 60000 is outside the vocabulary of 50304"):
        ShardSet.from_files(bare / "t_0.bin", bare / "v_0.bin", delimiter=60_000)
    with pytest.raises(MegactxError, match=r"v_0\.bin is among the training and the validation shards"):
        ShardSet.from_files(str(bare / "*.bin"), str(bare / "v_*.bin"))
    with pytest.raises(MegactxError, match="cannot hold 70000"):
        ShardSet.from_files(bare / "t_0.bin", bare / "v_0.bin", vocab_size=70_000)


@pytest.mark.usefixtures("offline")
def test_shards_with_a_description_are_not_silently_taken_for_gpt_2s(folder: Path) -> None:
    with pytest.warns(UserWarning, match=r"shards\.json tells what its shards hold"):
        ShardSet.from_files(str(folder / "train_*.bin"), str(folder / "val_*.bin"))


def test_the_hash_of_bare_shards_notices_another_file(bare: Path) -> None:
    def train_hash() -> str:
        tokenizer = {"kind": "integer", "minimum": 0, "maximum": 50_303}
        shards = ShardSet.from_files(str(bare / "t_*.bin"), bare / "v_0.bin", tokenizer=tokenizer)
        return shards.contexts[0].sha256["train"]

    before = train_hash()
    assert train_hash() == before
    write_shard(bare / "t_1.bin", np.arange(50))
    assert train_hash() != before


def test_a_padded_gpt_2_vocabulary_can_be_shown(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model may draw an id that no token has; its text must print all the same."""
    ranks = {bytes([i]): i for i in range(256)}
    encoding = tiktoken.Encoding("gpt2", pat_str=r".", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 50_256})
    tokenizers._tiktoken_encoding.cache_clear()
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: encoding)
    info = ShardSet.from_files(str(bare / "t_*.bin"), bare / "v_0.bin").contexts[0]
    assert info.tokenizer == {"kind": "tiktoken", "name": "gpt2", "vocab_size": 50_304}
    tokenizer = info.load_tokenizer()
    assert tokenizer.vocab_size == info.vocab_size
    assert tokenizer.decode([104, 50_300, 105]) == "h\ufffdi"
    assert tokenizer.glyphs([104, 50_300, 105]) == "h\ufffdi"
    assert tokenizer.decode([104, 105, 50_256]) == "hi<|endoftext|>"
    with pytest.raises(MegactxError, match="vocabulary of 50304"):
        tokenizer.decode([50_304])
    with pytest.raises(MegactxError, match="vocab_size 100 is less than the 50257"):
        tokenizers.TiktokenTokenizer("gpt2", 100)
    assert document_separators(info.tokenizer) == (50_256, 0)
    tokenizers._tiktoken_encoding.cache_clear()


@pytest.mark.parametrize(
    ("tokenizer", "expected"),
    [
        ({"kind": "byte"}, (0,)),
        ({"kind": "char", "chars": "ab\0"}, (2,)),
        ({"kind": "char", "chars": "ab"}, ()),
        ({"kind": "integer", "minimum": 0, "maximum": 9}, ()),
    ],
)
def test_document_separators(tokenizer: dict[str, Any], expected: tuple[int, ...]) -> None:
    assert document_separators(tokenizer) == expected


def test_nothing_is_warned_about_whole_shards(bare: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_shards(find_shards(str(bare / "*.bin")), skip_bad=True)
