"""Data: aligned contexts on disk (`Bundle`), tokenizers, derivations, and random windows (`WindowLoader`)."""

from __future__ import annotations

from megactx.data.bundle import Bundle, ContextInfo, contexts_from_manifest
from megactx.data.derive import DERIVATIONS, DerivedSpec, derive_many, derive_tokens
from megactx.data.loader import WindowLoader
from megactx.data.numeric import NumericScale
from megactx.data.tokenizers import Tokenizer, make_tokenizer, tokenizer_from_json

__all__ = [
    "DERIVATIONS",
    "Bundle",
    "ContextInfo",
    "DerivedSpec",
    "NumericScale",
    "Tokenizer",
    "WindowLoader",
    "contexts_from_manifest",
    "derive_many",
    "derive_tokens",
    "make_tokenizer",
    "tokenizer_from_json",
]
