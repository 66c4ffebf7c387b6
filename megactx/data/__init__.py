"""Data: aligned contexts on disk (`Bundle`), one context in shards (`ShardSet`), tokenizers, derivations, and batches:
random windows (`WindowLoader`), or each token once an epoch (`DistributedDataLoader`)."""

from __future__ import annotations

from megactx.data.bundle import Bundle, ContextInfo, contexts_from_manifest
from megactx.data.derive import DERIVATIONS, DerivedSpec, derive_many, derive_tokens
from megactx.data.loader import WindowLoader
from megactx.data.numeric import NumericScale
from megactx.data.shards import ShardSet
from megactx.data.stream import DistributedDataLoader, TokenBuffer, targets_dict
from megactx.data.tokenizers import Tokenizer, make_tokenizer, tokenizer_from_json

__all__ = [
    "DERIVATIONS",
    "Bundle",
    "ContextInfo",
    "DerivedSpec",
    "DistributedDataLoader",
    "NumericScale",
    "ShardSet",
    "TokenBuffer",
    "Tokenizer",
    "WindowLoader",
    "contexts_from_manifest",
    "derive_many",
    "derive_tokens",
    "make_tokenizer",
    "targets_dict",
    "tokenizer_from_json",
]
