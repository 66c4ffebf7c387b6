"""`megactx sample`: prompts by name or derived, knobs per context, verbatim output, one-line refusals."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megactx import checkpoint, cli
from megactx.config import ContextConfig, GPTConfig
from megactx.data.bundle import Bundle, ContextInfo, contexts_from_manifest
from megactx.data.derive import DerivedSpec, derive_tokens
from megactx.data.tokenizers import ByteTokenizer
from megactx.data.write import NewContext, write_bundle
from megactx.display import aligned_lanes, text_spans, to_html, to_terminal
from megactx.model import GPT
from megactx.sample import encode_prompts, read_knob, read_prompts

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
    torch.manual_seed(0)
    contexts = tuple(
        ContextConfig(c.name, c.kind, c.vocab_size, *((c.numeric.mean, c.numeric.std) if c.numeric else ()))
        for c in bundle.contexts
    )
    config = GPTConfig(contexts, block_size=32, n_layer=1, n_head=2, n_embd=16)
    out_dir = tmp_path_factory.mktemp("run")
    state = {"model_config": config.to_json(), "manifest": bundle.manifest_json()}
    checkpoint.save(out_dir, 7, model=GPT(config).state_dict(), optimizer={}, state=state)
    return out_dir


def sample(run: Path, *flags: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = cli.main(["sample", "--out_dir", str(run), "--device", "cpu", "--max_new_tokens", "12", *flags])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def as_json(run: Path, *flags: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    code, out, err = sample(run, "--json", *flags, capsys=capsys)
    assert (code, err) == (0, "")
    return json.loads(out)


def test_one_prompt_fills_the_derived_contexts(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = as_json(run, "--start", "If (x", capsys=capsys)
    assert (report["step"], report["prompt_tokens"], report["seed"]) == (7, 5, 1337)
    first = report["samples"][0]
    assert list(first) == ["text", "case", "depth", "column"]
    assert bytes(first["text"]["ids"][:5]) == b"If (x"
    assert first["case"]["text"].startswith("UL__L")
    assert first["depth"]["text"].startswith("00011")
    assert first["column"]["ids"][:5] == [0, 1, 2, 3, 4]
    assert {len(column["ids"]) for column in first.values()} == {5 + 12}


def test_prompts_by_name_in_any_order_by_position_and_from_a_file(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
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
    reports = [as_json(run, *flags, capsys=capsys) for flags in many]
    assert all(report["samples"] == reports[0]["samples"] for report in reports)


def test_a_row_of_a_batch_is_the_sample_drawn_alone(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    three = as_json(run, "--num_samples", "3", "--seed", "5", capsys=capsys)["samples"]
    one = as_json(run, "--num_samples", "1", "--seed", "5", capsys=capsys)["samples"]
    assert three[0] == one[0]
    assert three[0] != three[1]


def test_text_is_written_verbatim_where_there_is_no_terminal(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "samples.txt"
    start = "[/b] [i]<b> \\[red]" + " x" * 6
    flags = ("--start", start, "--num_samples", "2", "--top_k", "1")
    code, out, _ = sample(run, *flags, "--sample_file", str(file), capsys=capsys)
    assert code == 0
    assert out.count(start) == 2
    assert "\x1b" not in out
    assert file.read_bytes().decode() == out  # every sample, not the last
    text = as_json(run, *flags, capsys=capsys)["samples"][1]["text"]["text"]
    assert f"--- sample 2 of 2 ---\ntext:\n{text}\n\ncase:\n" in out


def test_a_terminal_gets_colour_and_aligned_lanes(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    _, out, _ = sample(run, "--start", "If (x", capsys=capsys)
    assert "\x1b[" in out
    shown = re.sub(r"\x1b\[[0-9;]*m", "", out)
    assert "text    If (x" in shown
    assert "case    UL__L" in shown
    for plainly in ("flag", "environment"):
        if plainly == "environment":
            monkeypatch.setenv("NO_COLOR", "1")
        _, out, _ = sample(run, *(["--no_color"] if plainly == "flag" else []), capsys=capsys)
        assert "\x1b[" not in out


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
        (("--multicontext_datasets", "text", "case", "depth"), "context 'column' of the model is missing"),
        (("--multicontext_datasets", "text", "kind"), "unknown context 'kind'"),
        (("--temperature", "-0.1"), "temperature must be a number >= 0, got -0.1"),
        (("--temperature", "nan"), "temperature must be a number >= 0"),
        (("--temperature", "0.5", "0.6"), "temperature needs 1 value or 4, one per context, got 2"),
        (("--top_k", "300"), "top_k of context 'text' must be at most its vocabulary of 256, got 300"),
        (("--top_k", "case=4"), "top_k of context 'case' must be at most its vocabulary of 3, got 4"),
        (("--top_k", "2.5"), "top_k must be a whole number >= 0, got 2.5"),
        (("--top_p", "0"), "top_p must be a number in (0, 1], got 0"),
        (("--min_p", "kind=0.1"), "min_p: unknown context 'kind'"),
        (("--num_samples", "0"), "num_samples must be at least 1"),
        (("--max_new_tokens", "-1"), "max_new_tokens must be at least 0"),
        (("--out_dir", "/nonexistent"), "/nonexistent"),
    ],
)
def test_refusals_are_one_line(
    run: Path, flags: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = sample(run, *flags, capsys=capsys)
    assert (code, out) == (2, "")
    assert re.fullmatch(r"error: [^\n]+\n", err)
    assert message in err


def test_damaged_weights_are_said_so(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = checkpoint.load(checkpoint.find(run))
    weights = {name: torch.full_like(value, torch.nan) for name, value in found.model.items()}
    checkpoint.save(tmp_path, 1, model=weights, optimizer={}, state=found.state)
    code, _, err = sample(tmp_path, capsys=capsys)
    assert code == 2
    assert "not finite" in err


def test_knobs_take_one_value_one_each_or_names(bundle: Bundle) -> None:
    contexts = bundle.contexts
    assert read_knob("temperature", None, contexts) == [0.8] * 4
    assert read_knob("temperature", ["0"], contexts) == [0.0] * 4
    assert read_knob("temperature", ["1", "2", "3", "4"], contexts) == [1.0, 2.0, 3.0, 4.0]
    assert read_knob("temperature", ["case=0", "text=1.5"], contexts) == [1.5, 0.0, 0.8, 0.8]
    assert read_knob("top_k", ["20"], contexts) == [20] * 4  # more than case has: all of it


def test_an_equals_sign_in_a_prompt_is_text(bundle: Bundle) -> None:
    names = [info.name for info in bundle.contexts]
    assert read_prompts(None, ["x=1"], names) == {"text": "x=1"}
    assert read_prompts("case=1", None, names) == {"text": "case=1"}
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
    assert to_terminal(spans, colour=False) == "[b]<b>&\x1b[31m\a\n"
    assert to_terminal(spans, colour=True) == "\x1b[1m[b]\x1b[0m<b>&·[31m·\n"


def test_wide_and_unknown_ids_do_not_break_the_view(bundle: Bundle) -> None:
    contexts = contexts_from_manifest(bundle.manifest_json())
    ids = np.array([[0xC3, 1, 0, 7], [0xA9, 1, 0, 8], [0xFF, 2, 15, 255]])
    lines = _shown(contexts, ids)
    assert len({len(line) for line in lines if line}) == 1
    assert text_spans(contexts, ids)[1].text == "é\N{REPLACEMENT CHARACTER}"
    assert _shown(contexts, ids[:0]) == []
