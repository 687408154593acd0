"""Clean/corrupted prompts: from JSONL and task generators to padded batches of token ids."""

from edgeprune.prompts.batch import Batch, Pair, collate, iterate_batches, training_pairs
from edgeprune.prompts.encode import (
    PairDataset,
    encode_pair,
    encode_records,
    load_dataset,
    marked_tokens,
)
from edgeprune.prompts.schema import SPLITS, read_records

__all__ = [
    "SPLITS", "Batch", "Pair", "PairDataset", "collate", "encode_pair", "encode_records",
    "iterate_batches", "load_dataset", "marked_tokens", "read_records", "training_pairs",
]  # fmt: skip
