"""Bundles: what is written comes back, whatever does not fit together is refused by name, damage is found."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megactx.data import Bundle, contexts_from_manifest
from megactx.data import write as write_module
from megactx.data.bundle import dtype_for
from megactx.data.write import NewContext, split_at, write_bundle
from megactx.errors import MegactxError
from megactx.files import lock

SOURCE = {"kind": "test"}
CATEGORIES = {"kind": "integer", "minimum": 0, "maximum": 9}


def new_context(name: str = "a", size: int = 10, tokens: tuple[int, int] = (90, 10), **more: Any) -> NewContext:
    rng = np.random.default_rng(0)
    arrays = tuple(rng.integers(0, size, n) for n in tokens)
    tokenizer = {"kind": "integer", "minimum": 0, "maximum": size - 1}
    return NewContext(name, "categorical", size, tokenizer, arrays, **more)


def numeric_context(name: str = "speed") -> NewContext:
    codes = np.arange(100) % 50
    tokenizer = {"kind": "numeric", "minimum": 2.0, "step": 0.5, "codes": 50}
    return NewContext(name, "numeric", 50, tokenizer, (codes[:90], codes[90:]), grid=(2.0, 0.5))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_bundle(tmp_path / "set", [new_context("a"), numeric_context(), new_context("b", 300)], SOURCE)
    return tmp_path / "set"


def edit_manifest(folder: Path, change: Any) -> None:
    path = folder / "manifest.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def test_round_trip(folder: Path) -> None:
    bundle = Bundle.open(folder, verify=True)
    assert [info.name for info in bundle.contexts] == ["a", "speed", "b"]
    assert (bundle.length("train"), bundle.length("val")) == (90, 10)
    for context, train, val in zip(
        [new_context("a"), numeric_context(), new_context("b", 300)],
        bundle.split("train"),
        bundle.split("val"),
        strict=True,
    ):
        assert (train == context.arrays[0]).all()
        assert (val == context.arrays[1]).all()
    scale = bundle.context("speed").numeric
    assert scale is not None
    codes = numeric_context().arrays[0]
    assert (scale.minimum, scale.step) == (2.0, 0.5)
    assert scale.mean == pytest.approx(codes.mean())
    assert scale.std == pytest.approx(codes.std())
    assert bundle.context("speed").entropy["variance"] == pytest.approx((codes * 0.5).var())


def test_files_are_bare_little_endian_ids(folder: Path) -> None:
    raw = np.frombuffer((folder / "b" / "train.bin").read_bytes(), "<u2")
    assert (raw == new_context("b", 300).arrays[0]).all()


def test_manifest_alone_restores_the_contexts(folder: Path) -> None:
    bundle = Bundle.open(folder)
    embedded = json.loads(json.dumps(bundle.manifest_json()))
    assert contexts_from_manifest(embedded) == bundle.contexts
    assert bundle.contexts[1].load_tokenizer().decode([0, 3]) == "2,3.5"


def test_names_pick_and_order(folder: Path) -> None:
    bundle = Bundle.open(folder, names=["b", "a"])
    assert [info.name for info in contexts_from_manifest(bundle.manifest_json())] == ["b", "a"]
    assert (bundle.split("val")[1] == new_context("a").arrays[1]).all()
    with pytest.raises(MegactxError, match=r"no context 'c'.*a, speed, b"):
        Bundle.open(folder, names=["c"])
    with pytest.raises(MegactxError, match="'a' is listed twice"):
        Bundle.open(folder, names=["a", "a"])


def test_the_same_input_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    write_bundle(again, [new_context("a"), numeric_context(), new_context("b", 300)], SOURCE)
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    assert len(files) == 10
    assert all((folder / file).read_bytes() == (again / file).read_bytes() for file in files)


@pytest.mark.parametrize(("size", "dtype", "width"), [(65_536, "uint16", 2), (65_537, "uint32", 4)])
def test_the_id_type_changes_after_65536_symbols(tmp_path: Path, size: int, dtype: str, width: int) -> None:
    ids = np.array([0, size - 1, 5])
    context = NewContext("big", "categorical", size, {"kind": "integer", "minimum": 0, "maximum": size - 1}, (ids, ids))
    write_bundle(tmp_path / "set", [context], SOURCE)
    bundle = Bundle.open(tmp_path / "set", verify=True)
    assert dtype_for(size) == bundle.contexts[0].dtype == dtype
    assert (tmp_path / "set" / "big" / "train.bin").stat().st_size == 3 * width
    assert bundle.split("train")[0].tolist() == ids.tolist()


def test_an_id_outside_the_vocabulary_is_refused_when_writing(tmp_path: Path) -> None:
    ids = np.array([0, 1, 10])
    with pytest.raises(MegactxError, match=r"context 'a': id 10 in the val split.*vocabulary of 10"):
        write_bundle(tmp_path / "set", [NewContext("a", "categorical", 10, CATEGORIES, (ids[:2], ids))], SOURCE)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("contexts", "message"),
    [
        (
            [new_context("a"), new_context("b", tokens=(89, 10))],
            "'b' has 89 tokens in the train split, context 'a' has 90",
        ),
        ([new_context("a"), new_context("b", tokens=(90, 9))], "'b' has 9 tokens in the val split"),
        ([new_context("a"), new_context("a")], "'a' is listed twice"),
        ([new_context("a", tokens=(90, 1))], "'a': the val split has 1 tokens"),
        ([new_context("../a")], r"context name '\.\./a'"),
        ([], "at least one context"),
    ],
)
def test_contexts_that_do_not_fit_are_refused(tmp_path: Path, contexts: list[NewContext], message: str) -> None:
    with pytest.raises(MegactxError, match=message):
        write_bundle(tmp_path / "set", contexts, SOURCE)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("cut", [1, 2])
def test_a_truncated_file_is_refused_by_name(folder: Path, cut: int) -> None:
    path = folder / "speed" / "val.bin"
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(MegactxError, match=rf"context 'speed': val.bin has {20 - cut} bytes, expected 20"):
        Bundle.open(folder)


def test_a_missing_file_is_refused_by_name(folder: Path) -> None:
    (folder / "b" / "train.bin").unlink()
    with pytest.raises(MegactxError, match=r"context 'b': train.bin is missing"):
        Bundle.open(folder)


@pytest.mark.parametrize("bit", [0, 333, 1439])
def test_any_flipped_bit_is_found_by_verify(folder: Path, bit: int) -> None:
    path = folder / "a" / "train.bin"
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)
    Bundle.open(folder)  # sizes are right
    with pytest.raises(MegactxError, match=r"context 'a': train.bin does not match its recorded SHA-256"):
        Bundle.open(folder, verify=True)


def test_verify_checks_ids_and_meta(folder: Path) -> None:
    edit_manifest(folder, lambda data: data["contexts"][0].update(vocab_size=5))
    with pytest.raises(MegactxError, match=r"'a': meta.json differs.*'a': train.bin holds id 9, outside .* 5"):
        Bundle.open(folder, verify=True)


def swap_sizes(data: dict[str, Any]) -> None:
    data["contexts"][0]["dtype"] = "uint32"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(version=2), "version 2 is not 1"),
        (lambda d: d.update(format="x"), "not a megactx-bundle manifest"),
        (lambda d: d.update(contexts=[]), "lists no contexts"),
        (lambda d: d["contexts"].append(d["contexts"][0]), "'a' is listed twice"),
        (lambda d: d["contexts"][0].pop("dtype"), "'a'.*dtype"),
        (lambda d: d["contexts"][0].update(colour=1), "'a'.*colour"),
        (lambda d: d["contexts"][0].update(dtype="float32"), "'a': dtype 'float32'"),
        (lambda d: d["contexts"][0].update(vocab_size=65_537), "'a': dtype 'uint16' cannot hold 65537"),
        (lambda d: d["contexts"][0].update(vocab_size=0), "'a': vocab_size"),
        (lambda d: d["contexts"][0].update(name="../../etc"), "context name"),
        (lambda d: d["contexts"][0].update(kind="numeric"), "'a': kind 'numeric'"),
        (lambda d: d["contexts"][1].update(numeric={"minimum": 1}), "'speed': numeric.step of"),
        (lambda d: d["contexts"][0].update(tokens={"train": 90}), "'a': tokens"),
        (lambda d: d["contexts"][0].update(sha256=None), "'a': sha256"),
        (lambda d: d["contexts"][0].update(entropy=None), "'a': entropy of"),
        (lambda d: d["contexts"][0].update(entropy={"unigram": "low"}), "'a': entropy.unigram of .* is 'low'"),
        (swap_sizes, r"'a': train.bin has 180 bytes, expected 360 \(90 tokens of uint32\)"),
    ],
)
def test_a_damaged_manifest_is_refused_by_name(folder: Path, change: Any, message: str) -> None:
    edit_manifest(folder, change)
    with pytest.raises(MegactxError, match=message):
        Bundle.open(folder)


def test_lengths_that_differ_are_refused_at_loading(folder: Path) -> None:
    path = folder / "b" / "train.bin"
    path.write_bytes(path.read_bytes()[:-2])
    edit_manifest(folder, lambda data: data["contexts"][2]["tokens"].update(train=89))
    with pytest.raises(MegactxError, match="'b' has 89 tokens in the train split, context 'a' has 90"):
        Bundle.open(folder)


@pytest.mark.parametrize("content", [None, "", "{", "[]", "\x00"])
def test_no_bundle(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(MegactxError, match=r"manifest\.json"):
        Bundle.open(tmp_path)
    with pytest.raises(MegactxError, match="no dataset bundle at"):
        Bundle.open(tmp_path / "nowhere")


def test_an_existing_bundle_is_replaced_only_when_asked(folder: Path) -> None:
    with pytest.raises(MegactxError, match="--overwrite"):
        write_bundle(folder, [new_context("c")], SOURCE)
    assert len(Bundle.open(folder, verify=True).contexts) == 3
    write_bundle(folder, [new_context("c")], SOURCE, overwrite=True)
    assert [info.name for info in Bundle.open(folder, verify=True).contexts] == ["c"]
    assert [path.name for path in folder.parent.iterdir()] == ["set"]
    assert sorted(path.name for path in folder.iterdir()) == ["c", "manifest.json"]


def test_a_folder_that_is_no_bundle_is_never_touched(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(MegactxError, match="not a dataset bundle"):
        write_bundle(tmp_path, [new_context()], SOURCE, overwrite=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(MegactxError, match="not a folder"):
        write_bundle(tmp_path / "file", [new_context()], SOURCE, overwrite=True)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("place", ["_write_ids", "write_json", "_move_into_place"])
def test_a_full_disk_leaves_the_old_bundle(folder: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(write_module, place, full)
    with pytest.raises(MegactxError, match=r"cannot write the bundle .*No space left on device"):
        write_bundle(folder, [new_context("c")], SOURCE, overwrite=True)
    assert len(Bundle.open(folder, verify=True).contexts) == 3
    assert [path.name for path in folder.parent.iterdir()] == ["set"]


def test_the_old_bundle_comes_back_when_the_last_rename_fails(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name == "new":
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(MegactxError, match="Input/output error"):
        write_bundle(folder, [new_context("c")], SOURCE, overwrite=True)
    assert len(Bundle.open(folder, verify=True).contexts) == 3


@pytest.mark.parametrize("when", ["while writing", "between the two renames"])
def test_what_a_killed_prepare_leaves_is_cleared_and_the_old_bundle_comes_back(folder: Path, when: str) -> None:
    """A child process is killed on the spot; the next write of the same target finds what it left."""
    place = "_write_ids" if when == "while writing" else "sync"
    script = f"""
import os, signal
from pathlib import Path
import numpy as np
from megactx.data import write
from megactx.data.tokenizers import ByteTokenizer

def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

rename = Path.rename
if {place!r} == "sync":
    Path.rename = lambda self, target: die() if self.name == "new" else rename(self, target)
else:
    write._write_ids = die
ids = np.arange(20) % 7
context = write.NewContext("c", "categorical", 256, ByteTokenizer().to_json(), (ids, ids))
write.write_bundle(Path({str(folder)!r}), [context], {{}}, overwrite=True)
"""
    result = subprocess.run([sys.executable, "-c", script], check=False)
    assert result.returncode == -signal.SIGKILL
    assert (folder.parent / ".set.preparing").exists()
    with pytest.raises(MegactxError, match="use --overwrite"):
        write_bundle(folder, [new_context("c")], SOURCE)
    assert len(Bundle.open(folder, verify=True).contexts) == 3
    assert [path.name for path in folder.parent.iterdir()] == ["set"]


def test_two_processes_do_not_write_one_bundle(folder: Path) -> None:
    workshop = folder.parent / ".set.preparing"
    with lock(workshop, "test"), pytest.raises(MegactxError, match="another process is writing"):
        write_bundle(folder, [new_context("c")], SOURCE, overwrite=True)
    assert workshop.exists()


@pytest.mark.parametrize(("length", "fraction", "cut"), [(100, 0.1, 90), (101, 0.1, 91), (20, 0.1, 18), (4, 0.5, 2)])
def test_the_split_keeps_the_last_part_for_validation(length: int, fraction: float, cut: int) -> None:
    assert split_at(length, fraction) == cut


@pytest.mark.parametrize(("length", "fraction"), [(1, 0.1), (0, 0.1), (19, 0.1), (100, 0.99), (100, 0.0), (100, 1.0)])
def test_splits_without_two_tokens_each_are_refused(length: int, fraction: float) -> None:
    with pytest.raises(MegactxError, match="val_fraction"):
        split_at(length, fraction)


def test_an_unknown_split_is_named(folder: Path) -> None:
    with pytest.raises(ValueError, match="'test'"):
        Bundle.open(folder).split("test")  # type: ignore[arg-type]
