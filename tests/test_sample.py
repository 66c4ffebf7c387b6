"""`megactx sample`: prompts by name or derived, knobs per context, verbatim output, one-line refusals."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megactx import checkpoint, cli
from megactx.config import ContextConfig, GPTConfig
from megactx.data.bundle import Bundle, ContextInfo, contexts_from_manifest
from megactx.data.derive import DerivedSpec, derive_tokens
from megactx.data.tokenizers import ByteTokenizer, CharTokenizer, IntegerTokenizer, NumericTokenizer, Tokenizer
from megactx.data.write import NewContext, write_bundle
from megactx.display import aligned_lanes, text_spans, to_html, to_terminal
from megactx.errors import MegactxError
from megactx.model import GPT
from megactx.prompts import context_order, default_prompt, encode_prompts, read_prompts
from megactx.sample import read_knob

CORPUS = "def f(x):\n\treturn [x, (x, 1)]  # é\n\nclass A:\n    pass\n" * 4


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Bytes, two derived classes and a derived number."""
    tokenizer = ByteTokenizer()
    text = tokenizer.encode(CORPUS)
    specs = [DerivedSpec.parse(name) for name in ("case", "depth", "column")]
    cut = len(text) // 2
    contexts = [NewContext("text", "categorical", 256, tokenizer.to_json(), (text[:cut], text[cut:]))]
    for spec, values in zip(specs, derive_tokens(tokenizer, text, specs), strict=True):
        numeric = spec.name == "column"
        contexts.append(
            NewContext(
                spec.name,
                "numeric" if numeric else "categorical",
                spec.tokenizer.vocab_size,
                spec.tokenizer.to_json(),
                (values[:cut], values[cut:]),
                (0.0, 1.0) if numeric else None,
                spec.to_json("text"),
            )
        )
    path = tmp_path_factory.mktemp("data") / "bundle"
    write_bundle(path, contexts, {})
    return Bundle.open(path)


@pytest.fixture(scope="session")
def run(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny untrained run."""
    return make_run(bundle, tmp_path_factory.mktemp("run"))


def make_run(bundle: Bundle, out_dir: Path) -> Path:
    torch.manual_seed(0)
    contexts = tuple(
        ContextConfig(c.name, c.kind, c.vocab_size, *((c.numeric.mean, c.numeric.std) if c.numeric else ()))
        for c in bundle.contexts
    )
    config = GPTConfig(contexts, block_size=32, n_layer=1, n_head=2, n_embd=16)
    state = {"model_config": config.to_json(), "manifest": bundle.manifest_json()}
    checkpoint.save(out_dir, 7, model=GPT(config).state_dict(), optimizer={}, state=state)
    return out_dir


def make_bundle(path: Path, **tokenizers: Tokenizer) -> Bundle:
    """Contexts of random ids, none derived from another."""
    contexts = []
    for name, tokenizer in tokenizers.items():
        values = np.random.default_rng(0).integers(tokenizer.vocab_size, size=64)
        numeric = isinstance(tokenizer, NumericTokenizer)
        contexts.append(
            NewContext(
                name,
                "numeric" if numeric else "categorical",
                tokenizer.vocab_size,
                tokenizer.to_json(),
                (values[:32], values[32:]),
                (tokenizer.minimum, tokenizer.step) if numeric else None,
            )
        )
    write_bundle(path, contexts, {})
    return Bundle.open(path)


def sample(run: Path, *flags: str, capsysbinary: pytest.CaptureFixture[bytes]) -> tuple[int, str, str]:
    code = cli.main(["sample", "--out_dir", str(run), "--device", "cpu", "--max_new_tokens", "12", *flags])
    captured = capsysbinary.readouterr()
    # a byte model writes bytes, and few samples of one that has learned nothing are UTF-8
    return code, captured.out.decode("utf-8", "replace"), captured.err.decode()


def as_json(run: Path, *flags: str, capsysbinary: pytest.CaptureFixture[bytes]) -> dict[str, Any]:
    code, out, err = sample(run, "--json", *flags, capsysbinary=capsysbinary)
    assert (code, err) == (0, "")
    return json.loads(out)


def test_one_prompt_fills_the_derived_contexts(run: Path, capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    report = as_json(run, "--start", "If (x", capsysbinary=capsysbinary)
    assert (report["step"], report["prompt_tokens"], report["seed"]) == (7, 5, 1337)
    first = report["samples"][0]
    assert list(first) == ["text", "case", "depth", "column"]
    assert bytes(first["text"]["ids"][:5]) == b"If (x"
    assert first["case"]["text"].startswith("UL__L")
    assert first["depth"]["text"].startswith("00011")
    assert first["column"]["ids"][:5] == [0, 1, 2, 3, 4]
    assert {len(column["ids"]) for column in first.values()} == {5 + 12}


def test_prompts_by_name_in_any_order_by_position_and_from_a_file(
    run: Path, tmp_path: Path, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text("A b")
    column = "0,1,2"
    order = ("depth", "column", "text", "case")
    many = [
        ("--multicontext_start", "text=A b", "case=U_L", "depth=000", f"column={column}"),
        ("--multicontext_start", f"column={column}", "depth=000", "case=U_L", f"text=FILE:{file}"),
        ("--multicontext_start", "A b", "U_L", "000", column),
        ("--multicontext_start", "000", column, "A b", "U_L", "--multicontext_datasets", *order),
        ("--multicontext", "--multicontext_start", "A b"),
        ("--start", f"FILE:{file}"),
    ]
    reports = [as_json(run, *flags, capsysbinary=capsysbinary) for flags in many]
    assert all(report["samples"] == reports[0]["samples"] for report in reports)


def test_a_row_of_a_batch_is_the_sample_drawn_alone(run: Path, capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    three = as_json(run, "--num_samples", "3", "--seed", "5", capsysbinary=capsysbinary)["samples"]
    one = as_json(run, "--num_samples", "1", "--seed", "5", capsysbinary=capsysbinary)["samples"]
    assert three[0] == one[0]
    assert three[0] != three[1]


def test_text_is_written_verbatim_where_there_is_no_terminal(
    run: Path, tmp_path: Path, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    file = tmp_path / "samples.txt"
    start = "[/b] [i]<b> \\[red]" + " x" * 6
    flags = ("--start", start, "--num_samples", "2", "--top_k", "1")
    code, out, _ = sample(run, *flags, "--sample_file", str(file), capsysbinary=capsysbinary)
    assert code == 0
    assert out.count(start) == 2
    assert "\x1b" not in out
    assert file.read_bytes().decode("utf-8", "replace") == out  # every sample, not the last
    text = as_json(run, *flags, capsysbinary=capsysbinary)["samples"][1]["text"]["text"]
    assert f"--- sample 2 of 2 ---\ntext:\n{text}\n\ncase:\n" in out


def test_bytes_come_out_as_they_went_in(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt, file = tmp_path / "prompt", tmp_path / "samples"
    prompt.write_bytes(b"caf\xc3 \xff \xc3\xa9")
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    flags = ["--out_dir", str(run), "--start", f"FILE:{prompt}", "--sample_file", str(file), "--max_new_tokens", "0"]
    assert cli.main(["sample", *flags]) == 0
    out = sys.stdout.buffer.getvalue()  # type: ignore[attr-defined]
    assert out.startswith(b"text:\ncaf\xc3 \xff \xc3\xa9\n\ncase:\n")
    assert file.read_bytes() == out


def test_a_file_that_cannot_be_written_is_said_before_the_drawing(
    run: Path, tmp_path: Path, capsysbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megactx.sample._generate", lambda *_: pytest.fail("drew"))
    for path in (tmp_path, tmp_path / "none" / "file"):
        code, out, err = sample(run, "--sample_file", str(path), capsysbinary=capsysbinary)
        assert (code, out) == (2, "")
        assert err.startswith(f"error: sample_file {path}: ")


def test_samples_are_printed_even_where_the_file_fails_after_all(
    run: Path, tmp_path: Path, capsysbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megactx.sample._check_writable", lambda _: None)
    code, out, _ = sample(run, "--start", "If (x", "--sample_file", str(tmp_path), capsysbinary=capsysbinary)
    assert code == 2
    assert "text:\nIf (x" in out


def test_the_users_order_holds_for_prompts_and_knobs(
    run: Path, bundle: Bundle, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    names = ("depth", "column", "text", "case")
    order = context_order(names, bundle.contexts)
    assert read_knob("temperature", ["1", "2", "3", "4"], bundle.contexts, order) == [3.0, 4.0, 1.0, 2.0]
    for flag in ("--start", "--multicontext_start"):
        report = as_json(run, flag, "If (x", "--multicontext_datasets", *names, capsysbinary=capsysbinary)
        assert list(report["samples"][0]) == ["text", "case", "depth", "column"]
        assert report["samples"][0]["text"]["text"].startswith("If (x")


def test_a_model_without_a_newline_starts_from_its_first_symbols(
    tmp_path: Path, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    bundle = make_bundle(tmp_path / "bundle", text=CharTokenizer("abc"), size=NumericTokenizer(-1.0, 0.5, 400))
    run = make_run(bundle, tmp_path / "run")
    code, out, err = sample(run, capsysbinary=capsysbinary)
    assert (code, err) == (0, "no prompt given: starting from the first symbol of text, size\n")
    assert out.startswith("text:\na")
    assert "size:\n-1," in out


def test_the_default_prompt_is_a_newline_and_what_it_derives(
    bundle: Bundle, tmp_path: Path, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    newline = encode_prompts({"text": "\n"}, bundle.contexts)
    assert default_prompt(bundle.contexts) == newline
    assert capsysbinary.readouterr().err == b""
    other = make_bundle(tmp_path / "other", text=CharTokenizer("a\n"), mark=CharTokenizer("xy"))
    assert default_prompt(other.contexts) == [[1], [0]]
    assert capsysbinary.readouterr().err.endswith(b"symbol of mark\n")


def test_a_terminal_gets_colour_and_aligned_lanes(
    run: Path, capsysbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "")  # empty is not set
    _, out, _ = sample(run, "--start", "If (x", capsysbinary=capsysbinary)
    assert "\x1b[" in out
    shown = re.sub(r"\x1b\[[0-9;]*m", "", out)
    assert "text    If (x" in shown
    assert "case    UL__L" in shown
    attack = "\x1b[2J\x9b\a \u202eabc\u2066"
    for flags, variable, value in ((["--no_color"], "TERM", "xterm"), ([], "TERM", "dumb"), ([], "NO_COLOR", "1")):
        monkeypatch.setenv("NO_COLOR", "")
        monkeypatch.setenv(variable, value)
        _, out, _ = sample(run, *flags, "--start", attack, capsysbinary=capsysbinary)
        assert out.startswith("text:\n·[2J··")
        assert " ·abc·" in out
        assert not set(out) & set("\x1b\x9b\a\u202e\u2066")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--multicontext_start", "text=abc", "case=LL"), "'text' has 3 tokens, context 'case' has 2"),
        (("--multicontext_start", "text=ab", "case=L?"), "prompt of context 'case': unknown symbol '?' at position 1"),
        (("--multicontext_start", "case=L"), "context 'text' has no prompt and cannot be derived"),
        (("--multicontext_start", "a", "b"), "2 prompts for 4 contexts (text, case, depth, column)"),
        (("--multicontext_start", "text=a", "b"), "name all prompts or none"),
        (("--multicontext_start", "text=a", "text=b"), "context 'text' has two prompts"),
        (("--start", "a", "--multicontext_start", "a"), "either start or multicontext_start"),
        (("--start", ""), "prompt of context 'text' is empty"),
        (("--start", "x" * 33), "the prompt holds 33 tokens, more than the model's window of 32"),
        (("--start", "FILE:/nonexistent"), "prompt file /nonexistent: No such file"),
        (("--multicontext_datasets", "text", "case", "depth"), "multicontext_datasets: context 'column' is missing"),
        (("--multicontext_datasets", "text", "kind"), "unknown context 'kind'"),
        (("--temperature", "-0.1"), "temperature must be a number from 0 to 3.4e38, got -0.1"),
        (("--temperature", "nan"), "temperature must be a number from 0 to 3.4e38"),
        (("--temperature", "1e39"), "temperature must be a number from 0 to 3.4e38, got 1e39"),
        (("--temperature", "text=0.5", "text=0.7"), "temperature: context 'text' has two values"),
        (("--temperature", "=0.5"), "temperature: unknown context ''"),
        (("--temperature", "text=0.5", "0.7"), "temperature: name all values or none"),
        (("--top_p", "1e-46"), "top_p must be a number from 1.4e-45 to 1, got 1e-46"),
        (("--top_k", "9999999999"), "top_k of context 'text' must be at most its vocabulary"),
        (("--temperature", "0.5", "0.6"), "temperature needs 1 value or 4, one per context, got 2"),
        (("--top_k", "300"), "top_k of context 'text' must be at most its vocabulary of 256, got 300"),
        (("--top_k", "case=4"), "top_k of context 'case' must be at most its vocabulary of 3, got 4"),
        (("--top_k", "2.5"), "top_k must be a whole number >= 0, got 2.5"),
        (("--top_p", "0"), "top_p must be a number from 1.4e-45 to 1, got 0"),
        (("--min_p", "kind=0.1"), "min_p: unknown context 'kind'"),
        (("--num_samples", "0"), "num_samples must be at least 1"),
        (("--max_new_tokens", "-1"), "max_new_tokens must be at least 0"),
        (("--out_dir", "/nonexistent"), "/nonexistent"),
    ],
)
def test_refusals_are_one_line(
    run: Path, flags: tuple[str, ...], message: str, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    code, out, err = sample(run, *flags, capsysbinary=capsysbinary)
    assert (code, out) == (2, "")
    assert re.fullmatch(r"error: [^\n]+\n", err)
    assert message in err


def test_damaged_weights_are_said_so(run: Path, tmp_path: Path, capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    found = checkpoint.load(checkpoint.find(run))
    weights = {name: torch.full_like(value, torch.nan) for name, value in found.model.items()}
    checkpoint.save(tmp_path, 1, model=weights, optimizer={}, state=found.state)
    code, _, err = sample(tmp_path, capsysbinary=capsysbinary)
    assert code == 2
    assert "not finite" in err


def test_knobs_take_one_value_one_each_or_names(bundle: Bundle) -> None:
    def read(name: str, *words: str, contexts: tuple[ContextInfo, ...] = bundle.contexts) -> list[float]:
        return read_knob(name, words, contexts, [info.name for info in contexts])

    assert read("temperature") == [0.8] * 4
    assert read("temperature", "0") == [0.0] * 4
    assert read("temperature", "1", "2", "3", "4") == [1.0, 2.0, 3.0, 4.0]
    assert read("temperature", "case=0", "text=1.5") == [1.5, 0.0, 0.8, 0.8]
    assert read("top_k", "20") == [20] * 4  # more than case has: all of it
    with pytest.raises(MegactxError, match="top_p needs 1 value, got 2"):
        read("top_p", "0.5", "0.6", contexts=bundle.contexts[:1])


def test_an_equals_sign_in_a_prompt_is_text(bundle: Bundle) -> None:
    names = [info.name for info in bundle.contexts]
    assert read_prompts(None, ["x=1"], names, "text") == {"text": "x=1"}
    assert read_prompts("case=1", None, names, "text") == {"text": "case=1"}
    assert encode_prompts({"text": "x=1"}, bundle.contexts)[0] == list(b"x=1")


def _shown(contexts: tuple[ContextInfo, ...], ids: np.ndarray, **options: int) -> list[str]:
    return ["".join(span.text for span in line) for line in aligned_lanes(contexts, ids, **options)]


def test_lanes_are_aligned_token_by_token_and_lose_nothing(bundle: Bundle) -> None:
    contexts = bundle.contexts
    ids = np.stack(bundle.split("train"), axis=-1).astype(np.int64)
    lines = _shown(contexts, ids, width=20)
    label = len("column") + 2
    assert max(map(len, lines)) <= 20
    for c, info in enumerate(contexts):
        lanes = lines[c::5]
        assert all(lane.startswith(info.name) for lane in lanes)
        assert "".join(lane[label:] for lane in lanes) == info.load_tokenizer().glyphs(ids[:, c])
    for group in zip(lines[::5], lines[1::5], lines[2::5], lines[3::5], strict=True):
        assert len({len(lane) for lane in group}) == 1


def test_markup_and_controls_are_text_in_every_view(bundle: Bundle) -> None:
    tokenizer = ByteTokenizer()
    main = tokenizer.encode("[b]<b>&\x1b[31m\a\n")
    ids = np.zeros((len(main), 4), np.int64)
    ids[:, 0] = main
    page = to_html(bundle.manifest_json(), ids, prompt_tokens=3)
    assert "&lt;b&gt;&amp;" in re.sub(r"</?span[^>]*>", "", page)
    assert "<b>" not in page
    spans = text_spans(bundle.contexts, ids, prompt_tokens=3)
    assert to_terminal(spans) == "\x1b[1m[b]\x1b[0m<b>&·[31m·\n"


def test_wide_and_unknown_ids_do_not_break_the_view(bundle: Bundle) -> None:
    contexts = contexts_from_manifest(bundle.manifest_json())
    ids = np.array([[0xC3, 1, 0, 7], [0xA9, 1, 0, 8], [0xFF, 2, 15, 255]])
    lines = _shown(contexts, ids)
    assert len({len(line) for line in lines if line}) == 1
    assert text_spans(contexts, ids)[1].text == "é\N{REPLACEMENT CHARACTER}"
    assert _shown(contexts, ids[:0]) == []


def test_a_prompt_that_ends_inside_a_character_is_bold_up_to_it(bundle: Bundle) -> None:
    ids = np.zeros((5, 4), np.int64)
    ids[:, 0] = list("café".encode())
    spans = text_spans(bundle.contexts, ids, prompt_tokens=4)
    assert [(span.text, span.prompt) for span in spans] == [("caf", True), ("é", False)]


def test_characters_of_two_columns_keep_the_lanes_aligned(tmp_path: Path) -> None:
    contexts = make_bundle(tmp_path / "b", text=CharTokenizer("a日"), mark=CharTokenizer("xy")).contexts
    text, mark, _ = _shown(contexts, np.array([[1, 0], [0, 1], [1, 1]]))
    assert (text, mark) == ("text  日a日", "mark  x yy ")


def test_numbers_are_written_out_where_there_is_no_text(tmp_path: Path) -> None:
    contexts = make_bundle(
        tmp_path / "b", hour=IntegerTokenizer(0, 23), load=NumericTokenizer(0.0, 0.5, 500), mark=CharTokenizer("xy")
    ).contexts
    lines = _shown(contexts, np.array([[9, 3, 0], [10, 333, 1]]))
    assert lines[:3] == ["hour  9   10    ", "load  1.5 166.5 ", "mark  x   y     "]
