#!/usr/bin/env python
"""Measure what attribution costs, as a multiple of the model's own passes.

    OMP_NUM_THREADS=1 python run_scripts/benchmark_attribution.py
    OMP_NUM_THREADS=1 python run_scripts/benchmark_attribution.py --methods eap gates --rounds 3

The model is the embedded one, the prompts are 200 of ioi, the metric is the logit difference. One
round runs the library's model alone (two forward passes, of the clean and the corrupted prompts,
and a backward pass of the clean ones) and then each method; the fastest round counts. Times are of
the processor, which other processes disturb less than those of a clock.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch

from edgeprune import load_model
from edgeprune.api.attribute import score_edges
from edgeprune.engine.circuit_model import CircuitModel
from edgeprune.metrics import negative_logit_difference
from edgeprune.prompts import PairDataset, encode_records, iterate_batches
from edgeprune.prompts.tasks import generate_records


def run_stock(model: CircuitModel, pairs: PairDataset, batch_size: int) -> None:
    """The library's model alone."""
    body, embed = model.architecture.body, model.architecture.body.get_input_embeddings()
    for batch in iterate_batches(pairs, batch_size):
        with torch.no_grad():
            body(inputs_embeds=embed(batch.corrupted_ids), use_cache=False)
        embeddings = embed(batch.clean_ids).requires_grad_()
        states = body(inputs_embeds=embeddings, use_cache=False).last_hidden_state
        logits = model.architecture.logits(states[batch.rows, batch.cols])
        negative_logit_difference(batch, logits, logits).backward()


def seconds(function: Callable[[], object]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", default=["eap", "eap_ig"])
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    model = load_model("embedded", device="cpu")
    sizes = {"train": args.pairs, "validation": 0, "test": 0}
    pairs = encode_records(generate_records("ioi", model.tokenizer, sizes, 0), model.tokenizer)
    functions = {"stock": partial(run_stock, model, pairs, args.batch_size)}
    for method in args.methods:
        settings = {"metric": "logit_difference", "batch_size": args.batch_size}
        functions[method] = partial(score_edges, model, pairs, method, **settings)
    for function in functions.values():
        function()  # libraries load what they need
    rounds = [{n: seconds(f) for n, f in functions.items()} for _ in range(args.rounds)]
    fastest = {name: min(times[name] for times in rounds) for name in functions}
    print(f"{args.pairs} pairs, {args.batch_size} at a time, {torch.get_num_threads()} thread(s)")
    for name, time_taken in fastest.items():
        print(f"{name:20} {time_taken:7.3f} s {time_taken / fastest['stock']:6.2f} x stock")


if __name__ == "__main__":
    main()
