"""Clean/corrupted prompts: from JSONL and task generators to padded batches of token ids."""

from edgeprune.prompts.batch import (
    Batch,
    Pair,
    collate,
    draw_pairs,
    iterate_batches,
    training_pairs,
)
from edgeprune.prompts.encode import (
    PairDataset,
    encode_pair,
    encode_records,
    load_dataset,
    marked_tokens,
    token_text,
)
from edgeprune.prompts.schema import SPLITS, read_records
