"""`megactx prepare` and `megactx inspect`, as a user calls them: every source, and one line for each mistake."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tiktoken

from megactx import inspect as inspect_command
from megactx import prepare
from megactx.data import Bundle, derive_tokens, tokenizers
from megactx.data.derive import DerivedSpec, derive
from megactx.data.shards import ShardSet
from megactx.errors import MegactxError

CODE = "def f(x):\n    return [x, 'é']  # (\n" * 30


def parse(module: object, arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)  # type: ignore[attr-defined]
    return parser.parse_args(arguments)


def run_prepare(out: Path, *arguments: str | Path) -> Bundle:
    prepare.run(parse(prepare, ["--out_dir", str(out), *map(str, arguments)]))
    return Bundle.open(out, verify=True)


def run_inspect(*arguments: str | Path) -> None:
    inspect_command.run(parse(inspect_command, [*map(str, arguments)]))


@pytest.fixture
def code(tmp_path: Path) -> Path:
    path = tmp_path / "code.py"
    path.write_text(CODE, encoding="utf-8")
    return path


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "set"


def whole(bundle: Bundle, name: str) -> np.ndarray:
    index = [info.name for info in bundle.contexts].index(name)
    return np.concatenate([bundle.split("train")[index], bundle.split("val")[index]])


def text_of(bundle: Bundle, name: str = "text") -> str:
    return bundle.context(name).load_tokenizer().decode(whole(bundle, name))


@pytest.mark.parametrize("tokenizer", ["byte", "char"])
def test_text_and_its_derived_contexts(out: Path, code: Path, tokenizer: str) -> None:
    contexts = ["kind", "depth:cap=7", "column", "m3=index_mod:m=3"]
    bundle = run_prepare(out, "--input_file", code, "--tokenizer", tokenizer, "--contexts", *contexts)
    assert [info.name for info in bundle.contexts] == ["text", "kind", "depth", "column", "m3"]
    assert text_of(bundle) == CODE
    raw: str | bytes = CODE if tokenizer == "char" else CODE.encode()
    assert bundle.length("train") + bundle.length("val") == len(raw)
    assert bundle.length("val") == len(raw) // 10
    assert (whole(bundle, "depth") == derive("depth", raw, cap=7)).all()
    assert (whole(bundle, "m3") == derive("index_mod", raw, m=3)).all()
    column = bundle.context("column")
    assert column.kind == "numeric"
    assert column.derived == {"from": "text", "function": "column", "args": {"cap": 255}}
    run_inspect(out, "--verify")


def test_a_prompt_is_derived_as_the_corpus_was(out: Path, code: Path) -> None:
    bundle = run_prepare(out, "--input_file", code, "--contexts", "depth", "column")
    main = bundle.context("text").load_tokenizer()
    specs = [DerivedSpec.from_json(info.name, info.derived) for info in bundle.contexts if info.derived]
    prompt = main.encode(CODE[:20])
    for spec, values in zip(specs, derive_tokens(main, prompt, specs), strict=True):
        assert values.tolist() == whole(bundle, spec.name)[:20].tolist()


def test_folders_are_joined_in_order_with_nul(tmp_path: Path, out: Path) -> None:
    folder = tmp_path / "texts"
    (folder / "sub").mkdir(parents=True)
    for name, text in {"b.txt": "bbb", "a.txt": "aaa", "sub/c.txt": "ccc", "d.md": "ddd", ".hidden.txt": "x"}.items():
        (folder / name).write_text(text)
    (folder / "binary.txt").write_bytes(b"\x7fELF\0\1")
    (folder / "empty.txt").write_text("")
    bundle = run_prepare(out, "--input_file", folder, folder / "d.md", "--glob", "*.txt", "--val_fraction", "0.3")
    assert text_of(bundle) == "aaa\0bbb\0ccc\0ddd"
    assert bundle.manifest["source"] == {"kind": "files", "files": 4, "left_out": 1, "bytes": 15}


def test_the_standard_library(out: Path) -> None:
    bundle = run_prepare(
        out, "--source", "python-stdlib", "--max_bytes", "200000", "--contexts", "kind", "depth", "column"
    )
    assert bundle.length("train") + bundle.length("val") <= 200_000
    documents = text_of(bundle).split("\0")
    root = Path(sysconfig.get_path("stdlib"))
    names = [file.relative_to(root) for file in root.rglob("*.py") if "site-packages" not in file.parts]
    first = min(names, key=lambda name: hashlib.sha256(name.as_posix().encode()).digest())
    assert len(documents) > 1
    assert documents[0] == (root / first).read_bytes().decode()
    entropy = bundle.context("text").entropy
    assert 2.0 < entropy["bigram"] < entropy["unigram"] < 4.0
    again = run_prepare(out.with_name("again"), "--source", "python-stdlib", "--max_bytes", "200000")
    assert again.context("text").sha256 == bundle.context("text").sha256
    run_inspect(out, "--verify")


@pytest.fixture
def tiny_encoding(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A local encoding in the place of a download."""
    ranks = {bytes([i]): i for i in range(256)} | {b"re": 256, b"ret": 257, b"    ": 258}
    tokenizers._tiktoken_encoding.cache_clear()
    monkeypatch.setattr(
        tiktoken,
        "get_encoding",
        lambda name: tiktoken.Encoding(name, pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens={}),
    )
    yield
    tokenizers._tiktoken_encoding.cache_clear()


@pytest.mark.usefixtures("tiny_encoding")
def test_tiktoken_with_derived_contexts(tmp_path: Path, out: Path, code: Path) -> None:
    second = tmp_path / "second.py"
    second.write_text("return 1\n")
    bundle = run_prepare(out, "--input_file", code, second, "--tokenizer", "gpt2", "--contexts", "column", "depth")
    assert text_of(bundle) == CODE + "\0return 1\n"
    ids = whole(bundle, "text")
    assert ids.size < len(CODE)
    assert whole(bundle, "column")[ids == 257].tolist() == [4] * 30 + [0]
    run_inspect(out, "--verify")


def test_csv_columns(tmp_path: Path, out: Path) -> None:
    path = tmp_path / "log.csv"
    rows = [f"{i % 5 - 2},{20 + i * 0.5},{i * 1000}" for i in range(100)]
    path.write_text("mode,temp (C),distance\n" + "\n".join(rows) + "\n\n")
    bundle = run_prepare(out, "--csv", path)
    kinds = [(info.name, info.kind, info.vocab_size) for info in bundle.contexts]
    assert kinds == [("mode", "categorical", 5), ("temp_C", "numeric", 496), ("distance", "numeric", 65_536)]
    assert text_of(bundle, "mode").split(",")[:6] == ["-2", "-1", "0", "1", "2", "-2"]
    assert text_of(bundle, "temp_C").split(",")[:3] == ["20", "20.5", "21"]
    temperature = bundle.context("temp_C").numeric
    assert temperature is not None
    scaled = temperature.scaled(bundle.split("train")[1])
    assert (scaled.mean(), scaled.std()) == pytest.approx((0, 1))
    run_inspect(out, "--verify")


def test_csv_kinds_can_be_chosen(tmp_path: Path, out: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("\n".join(f"{i % 5},{i * 1000}" for i in range(100)))
    bundle = run_prepare(out, "--csv", path, "--csv_no_header", "--csv_numeric", "column0",
                         "--csv_categorical", "column1", "--csv_columns", "column1", "column0")  # fmt: skip
    kinds = [(info.name, info.kind, info.vocab_size, info.dtype) for info in bundle.contexts]
    assert kinds == [("column1", "categorical", 99_001, "uint32"), ("column0", "numeric", 5, "uint16")]


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        ("a,b\n1,2\n1,\n", [], "column 'b', line 3: expected a number, found nothing"),
        ("a,b\n1,2\n1,x\n", [], "column 'b', line 3: expected a number, found 'x'"),
        ("a\n1.5\nnan\n", [], "column 'a', line 3: expected a number, found 'nan'"),
        ("a\n1\n1e999\n", [], "column 'a', line 3"),
        ("a\n1\n2.5\n", ["--csv_categorical", "a"], "line 3: expected a whole number, found '2.5'"),
        ("a,b\n1,2\n1\n", [], "row at line 3 has 1 cells, expected 2"),
        ("a,b\n1,2\n\n1,2\n", [], "row at line 3 has 0 cells"),
        ("a,a\n1,2\n", [], "'a' is listed twice"),
        ("", [], "is empty"),
        ("a,b\n", [], "no rows of data"),
        ("a\n1\n2\n", [], "each needs at least 2"),
        ("a\n" + "1\n" * 40, ["--csv_columns", "b"], "no column 'b'"),
        ("a\n" + "1\n" * 40, ["--csv_numeric", "a", "--csv_categorical", "a"], "both as numeric and as categorical"),
        ("a\n" + "1\n" * 40 + "9999999\n", ["--csv_categorical", "a"], "9,999,999 categories"),
        ('a\n"1\n', [], "cannot be read"),
    ],
)
def test_bad_csv(tmp_path: Path, out: Path, content: str, arguments: list[str], message: str) -> None:
    path = tmp_path / "log.csv"
    path.write_text(content)
    with pytest.raises(MegactxError, match=message):
        run_prepare(out, "--csv", path, *arguments)
    assert not out.exists()


def test_existing_bundles_and_their_parts_are_folders_too(tmp_path: Path, out: Path, code: Path) -> None:
    run_prepare(out, "--input_file", code, "--contexts", "kind", "column")
    joined = run_prepare(tmp_path / "joined", "--from_folders", out / "column", out / "text")
    assert [info.name for info in joined.contexts] == ["column", "text"]
    assert text_of(joined) == CODE
    assert joined.context("column") == Bundle.open(out).context("column")
    assert Bundle.from_folders([out]).contexts == Bundle.open(out).contexts
    run_inspect(tmp_path / "joined", "--verify")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--contexts", "colour"], "unknown derived context 'colour'"),
        (["--contexts", "kind", "kind"], "'kind' is listed twice"),
        (["--contexts", "text=case"], "'text' is listed twice"),
        (["--contexts", "a/b=case"], "context name 'a/b'"),
        (["--contexts", "depth:cap=9999"], "cap must be"),
        (["--main_name", "../x"], r"context name '\.\./x'"),
        (["--tokenizer", "words"], "unknown tokenizer 'words'"),
        (["--val_fraction", "1.5"], "val_fraction must lie between 0 and 1"),
        (["--val_fraction", "0.0001"], "0 for validation"),
        (["--max_bytes", "0"], "max_bytes must be at least 1"),
    ],
)
def test_bad_arguments(out: Path, code: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(MegactxError, match=message) as caught:
        run_prepare(out, "--input_file", code, *arguments)
    assert "\n" not in str(caught.value)
    assert not out.exists()


@pytest.mark.parametrize(
    ("content", "tokenizer", "message"),
    [
        (b"", "byte", "the input is empty"),
        (b"", "char", "the input is empty"),
        (b"x", "byte", "1 tokens with val_fraction 0.1 leave 1 for training and 0 for validation"),
        (b"0123456789", "byte", "each needs at least 2"),
        (b"caf\xe9", "char", r"code\.txt is not UTF-8: byte 0xe9 at offset 3"),
    ],
)
def test_bad_files(tmp_path: Path, out: Path, content: bytes, tokenizer: str, message: str) -> None:
    path = tmp_path / "code.txt"
    path.write_bytes(content)
    with pytest.raises(MegactxError, match=message):
        run_prepare(out, "--input_file", path, "--tokenizer", tokenizer)
    assert not out.exists()


def test_missing_input(tmp_path: Path, out: Path) -> None:
    with pytest.raises(MegactxError, match="nowhere does not exist"):
        run_prepare(out, "--input_file", tmp_path / "nowhere")
    with pytest.raises(MegactxError, match=r"no file that matches '\*\.py'"):
        run_prepare(out, "--input_file", tmp_path, "--glob", "*.py")
    with pytest.raises(MegactxError, match="does not exist"):
        run_prepare(out, "--csv", tmp_path / "nowhere.csv")
    (tmp_path / "a.csv").write_text("a\n1\n")
    with pytest.raises(MegactxError, match="--contexts derives from text"):
        run_prepare(out, "--csv", tmp_path / "a.csv", "--contexts", "kind")


@pytest.mark.skipif(os.geteuid() == 0, reason="root can read and write anything")
def test_a_folder_that_cannot_be_written(tmp_path: Path, code: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(MegactxError, match="cannot write the bundle"):
        run_prepare(tmp_path / "set", "--input_file", code)


def test_a_parent_that_is_a_file(code: Path) -> None:
    with pytest.raises(MegactxError, match="cannot write the bundle"):
        run_prepare(code / "set", "--input_file", code)


def test_max_bytes_does_not_cut_a_character(tmp_path: Path, out: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("é世" * 20, encoding="utf-8")
    assert (
        text_of(
            run_prepare(out, "--input_file", path, "--tokenizer", "char", "--max_bytes", "49", "--val_fraction", "0.3")
        )
        == "é世" * 9 + "é"
    )


def test_prepare_and_inspect_print_what_they_found(out: Path, code: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = run_prepare(out, "--input_file", code, "--contexts", "kind", "column")
    printed = capsys.readouterr().out
    assert f"{bundle.context('text').entropy['bigram']:.3f}" in printed
    assert "python_kind" in printed
    run_inspect(out, "--sample", "20")
    printed = capsys.readouterr().out
    assert "  text def f(x):↵    return"[:27] in printed
    assert "  kind kkk.n+n++/....kkkkk" in printed
    assert "column 01234567890123456789"[:16] in printed
    assert bundle.context("kind").sha256["val"][:12] in printed
    assert "intact" in printed


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[40] ^= 1
    path.write_bytes(data)


def test_inspect_names_the_damaged_context(out: Path, code: Path) -> None:
    run_prepare(out, "--input_file", code, "--contexts", "kind", "depth")
    damage(out / "depth" / "train.bin")
    with pytest.raises(MegactxError) as caught:
        run_inspect(out, "--verify")
    assert "context 'depth': train.bin does not match its recorded SHA-256" in str(caught.value)
    assert "'kind'" not in str(caught.value)


def test_inspect_names_all_damage_at_once(out: Path, code: Path) -> None:
    run_prepare(out, "--input_file", code, "--contexts", "kind", "depth")
    damage(out / "depth" / "train.bin")
    damage(out / "text" / "val.bin")
    with pytest.raises(MegactxError, match=r"'text': val.bin does not match.*; context 'depth': train.bin") as caught:
        run_inspect(out, "--verify")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("verify", [[], ["--verify"]])
def test_inspect_recomputes_derived_contexts(out: Path, code: Path, verify: list[str]) -> None:
    """A wrong lane whose hashes are right: only computing it again shows it."""
    run_prepare(out, "--input_file", code, "--contexts", "depth:cap=3", "kind")
    for file in (out / "manifest.json", out / "depth" / "meta.json"):
        data = json.loads(file.read_text())
        entry = data["contexts"][1] if "contexts" in data else data
        entry["derived"]["args"]["cap"] = 1
        file.write_text(json.dumps(data))
    with pytest.raises(MegactxError, match=r"'depth' does not follow from 'text': [\d,]+ of [\d,]+ tokens differ"):
        run_inspect(out, *verify)


# -- shards ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer", ["byte", "char"])
def test_text_in_shards(tmp_path: Path, out: Path, code: Path, tokenizer: str) -> None:
    second = tmp_path / "second.py"
    second.write_text("return 1\n")
    bundle = run_prepare(out, "--input_file", code, second, "--tokenizer", tokenizer, "--shards",
                         "--tokens_per_shard", "500", "--main_name", "code")  # fmt: skip
    assert isinstance(bundle, ShardSet)
    assert text_of(bundle, "code") == CODE + "\0return 1\n"
    assert [shard.tokens for shard in bundle.shards("train")[:-1]] == [500] * (bundle.length("train") // 500)
    assert bundle.context("code").load_tokenizer().decode([bundle.delimiter]) == "\0"
    assert (out / "train_000000.bin").read_bytes()[:12] == np.array([20240520, 1, 500], "<i4").tobytes()
    plain = run_prepare(tmp_path / "plain", "--input_file", code, second, "--tokenizer", tokenizer)
    assert bundle.contexts[0].entropy == plain.contexts[0].entropy
    run_inspect(out)


@pytest.mark.usefixtures("tiny_encoding")
def test_documents_without_an_end_of_text_token_are_joined_by_nul(tmp_path: Path, out: Path, code: Path) -> None:
    second = tmp_path / "second.py"
    second.write_text("return 1\n")
    bundle = run_prepare(out, "--input_file", code, second, "--tokenizer", "gpt2", "--shards")
    assert isinstance(bundle, ShardSet)
    assert bundle.delimiter == 0
    assert text_of(bundle) == CODE + "\0return 1\n"


def test_documents_begin_with_the_end_of_text_token(
    tmp_path: Path, out: Path, code: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in the shards of the speed-run family, so that a model trained on those can be trained on ours."""
    ranks = {bytes([i]): i for i in range(256)}
    encoding = tiktoken.Encoding(
        "gpt2", pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 256}
    )
    tokenizers._tiktoken_encoding.cache_clear()
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: encoding)
    second = tmp_path / "second.py"
    second.write_text("return 1\n")
    bundle = run_prepare(out, "--input_file", code, second, "--tokenizer", "gpt2", "--shards")
    tokenizers._tiktoken_encoding.cache_clear()
    assert isinstance(bundle, ShardSet)
    assert bundle.delimiter == 256
    expected = [256, *CODE.encode(), 256, *b"return 1\n"]
    assert whole(bundle, "text").tolist() == expected


def test_one_context_of_a_bundle_becomes_shards(tmp_path: Path, out: Path, code: Path) -> None:
    run_prepare(out, "--input_file", code, "--contexts", "kind", "column")
    shards = run_prepare(tmp_path / "kind", "--from_folders", out / "kind", "--shards")
    assert isinstance(shards, ShardSet)
    assert (whole(shards, "kind") == whole(Bundle.open(out), "kind")).all()
    assert shards.delimiter is None
    run_inspect(tmp_path / "kind")
    with pytest.raises(MegactxError, match=r"shards hold one context, got 3 \(text, kind, column\)"):
        run_prepare(tmp_path / "all", "--from_folders", out, "--shards")
    with pytest.raises(MegactxError, match="context 'column' is numeric"):
        run_prepare(tmp_path / "column", "--from_folders", out / "column", "--shards")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shards", "--contexts", "kind"], "--shards holds one context"),
        (["--tokens_per_shard", "100"], "--tokens_per_shard needs --shards"),
        (["--shards", "--tokens_per_shard", "0"], "tokens_per_shard must lie in 1..2147483647, got 0"),
        (["--shards", "--tokens_per_shard", "-5"], "tokens_per_shard must lie in"),
    ],
)
def test_bad_arguments_of_shards(out: Path, code: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(MegactxError, match=message):
        run_prepare(out, "--input_file", code, *arguments)
    assert not out.exists()


def test_a_wide_vocabulary_is_refused_before_the_text_is_read(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    special = {"<|end|>": 70_000}
    ranks = {bytes([i]): i for i in range(256)}
    encoding = tiktoken.Encoding("wide", pat_str=r".", mergeable_ranks=ranks, special_tokens=special)
    tokenizers._tiktoken_encoding.cache_clear()
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: encoding)
    with pytest.raises(MegactxError, match="'text' has 70,001 symbols, and the uint16 ids of shards hold 65,536"):
        run_prepare(out, "--input_file", out / "nowhere", "--tokenizer", "wide", "--shards")
    tokenizers._tiktoken_encoding.cache_clear()


def test_inspect_of_shards_and_of_one(out: Path, code: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_prepare(out, "--input_file", code, "--shards", "--tokens_per_shard", "700")
    assert "2 training and 1 validation shards" in capsys.readouterr().out
    run_inspect(out, "--sample", "20")
    printed = capsys.readouterr().out
    assert "train_000000.bin: 700 tokens" in printed
    assert "text def f(x):↵    return" in printed
    assert "intact" in printed
    run_inspect(out / "train_000000.bin", "--sample", "4")
    printed = capsys.readouterr().out
    assert "700 tokens of uint16" in printed
    assert f"largest id {max(CODE.encode()[:700])}" in printed
    assert "begins with 100 101 102 32" in printed
    data = bytearray((out / "train_000001.bin").read_bytes())
    data[1030] ^= 1
    (out / "train_000001.bin").write_bytes(data)
    run_inspect(out / "train_000001.bin")  # nothing says what it should hold
    with pytest.raises(MegactxError, match=r"train_000001\.bin does not match its recorded SHA-256"):
        run_inspect(out)
    (out / "train_000001.bin").write_bytes(data[:-3])
    for path in (out, out / "train_000001.bin"):
        with pytest.raises(MegactxError, match=r"train_000001\.bin holds .* its end is missing"):
            run_inspect(path)
