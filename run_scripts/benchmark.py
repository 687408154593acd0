"""Seconds and memory of an optimisation step, beside what the machine could do.

Engines:

- `ours`: reference and corrupted pass, circuit pass, gate gradients, AdamW on log alpha;
- `ours_kept`: the same with the first two passes kept from before, as the trainer does for a small
  training set;
- `ours_graph`: the same as `ours_kept`, replayed from CUDA graphs, on a GPU (its memory: of a step
  that is not replayed);
- `naive`: the published way (see `naive.py`), with the same optimiser;
- `stock`: the library's model alone: two forward passes without gradients, then one forward and
  backward pass with the gradient of the embeddings (none of the weights), one prompt set each.
  Logits at the predicted tokens only, so as not to count what ours leaves out.

All run on the same random prompts of equal length, of which the last token is predicted.
"""

from __future__ import annotations

import ctypes
import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from shapes import random_model
from torch import Tensor

from edgeprune.engine.circuit_model import lookaheads
from edgeprune.engine.gradient import CudaGraphs, StepInputs, differentiate
from edgeprune.evaluation import naive
from edgeprune.methods.masks import CircuitMasks
from edgeprune.metrics import kl_per_token
from edgeprune.models import CircuitModel, fuse, random_batch
from edgeprune.prompts import Batch, collate


@dataclass(frozen=True)
class Ceilings:
    """What the machine reaches: operations a second of a large product, bytes of a large copy."""

    operations: float
    bytes: float


@dataclass(frozen=True)
class Count:
    """Operations (a multiplication and an addition are two) and bytes moved of one step."""

    operations: float
    bytes: float


@dataclass(frozen=True)
class Measurement:
    """One engine's step.

    Attributes:
        seconds: the least of the repetitions.
        median_seconds: their median.
        memory: bytes at the peak of the first step, above what lay there before (the weights);
            None where it cannot be told.
        count: from the shapes.
        floor_seconds: what the count takes at the ceilings, operations and bytes overlapped.
    """

    seconds: float
    median_seconds: float
    memory: int | None
    count: Count
    floor_seconds: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"times_the_floor": self.seconds / self.floor_seconds}


def measure(
    model: CircuitModel,
    engines: Sequence[str],
    *,
    batch_size: int,
    length: int,
    micro_batch_size: int | None,
    recompute: bool,
    repetitions: int,
    ceilings: Ceilings,
) -> dict[str, Measurement]:
    """Measure a step of each engine; their repetitions take turns.

    Args:
        model: runs them all.
        engines: names, see above.
        batch_size, length: prompts a step, tokens a prompt.
        micro_batch_size: prompts run at a time; None: all.
        recompute: whether ours runs blocks again in the backward pass.
        repetitions: timed steps, after one that warms up and tells the memory.
        ceilings: the machine's.
    """
    batch = random_batch(model, batch_size, length, predicted=1)
    size = micro_batch_size or batch_size
    parts = [
        collate(batch.pairs[i : i + size]).to(model.device) for i in range(0, batch_size, size)
    ]
    steps = {name: _step(name, model, parts, recompute) for name in engines}
    memory = {}
    for name, step in steps.items():
        _step(name, model, parts, recompute)()  # libraries load what they need
        model.release()
        memory[name] = peak_memory(step, model.device)
    model.release()
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    for repetition in range(repetitions + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            _finish(model.device)
            if repetition:  # the first fills buffers again
                seconds[name].append(time.perf_counter() - start)
    measured = {}
    for name in engines:
        counted = count(name, model, batch_size, length, size, recompute)
        floor = max(counted.operations / ceilings.operations, counted.bytes / ceilings.bytes)
        times = seconds[name]
        measured[name] = Measurement(
            min(times), statistics.median(times), memory[name], counted, floor
        )
    return measured


GROWTH_BASE = {
    "cpu": {"d_model": 512, "layers": 8, "heads": 8, "tokens": 32, "batch": 8},
    "cuda": {"d_model": 2048, "layers": 8, "heads": 16, "tokens": 128, "batch": 32},
}
"""What is halved and doubled, one at a time, to see how time and memory grow; large enough that the
device has something to do."""


def growth(device: str, dtype: str, repetitions: int) -> list[dict[str, Any]]:
    """Exponents of ours on a Llama with heads of 32, one row a quantity.

    Time's prediction comes from the operations, memory's from outboxes, gradients and inputs.
    """
    rows = []
    middle = GROWTH_BASE["cuda" if device.startswith("cuda") else "cpu"]
    for name, base in middle.items():
        if name == "d_model":
            continue
        points: list[tuple[float, float, float, float]] = []
        for factor in (0.5, 1, 2):
            size = middle | {name: int(base * factor)}
            model = random_model(
                {
                    "model_type": "llama", "hidden_size": size["d_model"],
                    "intermediate_size": 2 * size["d_model"],
                    "head_dim": 32, "vocab_size": 1000, "num_hidden_layers": size["layers"],
                    "num_attention_heads": size["heads"], "num_key_value_heads": size["heads"],
                },
                device=device, dtype=dtype,
            )  # fmt: skip
            measured = measure(
                model, ["ours"], batch_size=size["batch"], length=size["tokens"],
                micro_batch_size=None, recompute=False, repetitions=repetitions,
                ceilings=Ceilings(1.0, 1.0),
            )["ours"]  # fmt: skip
            predicted = predicted_memory(model, size["batch"], size["tokens"])
            points.append(
                (
                    measured.seconds,
                    measured.count.operations,
                    max(measured.memory or 0, 1),
                    predicted,
                )
            )
        values = (0.5, 1, 2)
        seconds, operations, memory, predicted = (
            exponent(values, column) for column in zip(*points, strict=True)
        )
        rows.append(
            {
                "quantity": name,
                "values": [int(base * v) for v in values],
                "seconds": [p[0] for p in points],
                "memory": [p[2] for p in points],
                "time_exponent": seconds,
                "predicted_time_exponent": operations,
                "memory_exponent": memory,
                "predicted_memory_exponent": predicted,
            }
        )
    return rows


def gradient_cosine(
    settings: dict[str, Any], *, device: str, dtype: str, batch_size: int, length: int, fused: bool
) -> float:
    """Cosine of the gate gradients in `dtype` and in float32, same weights, gates and prompts.

    `fused`: those in `dtype` with fused kernels.
    """
    model = random_model(settings, device=device, dtype="float32")
    batch = random_batch(model, batch_size, length, predicted=1)
    gates = CircuitMasks(model.graph).to(model.device).sample(0).edge.detach()
    gradients = []
    for kind in ("float32", dtype):
        model.release()
        model.to(getattr(torch, kind))
        if fused and gradients:
            fuse(model)
        leaf = gates.clone().requires_grad_()
        reference, corrupted = model.run_pair(batch)
        logits = model.run_circuit(batch, leaf, corrupted)
        kl_per_token(reference, logits).mean().backward()
        gradients.append(leaf.grad)
    return torch.cosine_similarity(*gradients, dim=0).item()


# ---------------------------------------------------------------------------------------- engines


def _step(
    engine: str, model: CircuitModel, parts: Sequence[Batch], recompute: bool
) -> Callable[[], None]:
    """One optimisation step (of `stock`: its passes) as a function."""
    if engine == "stock":
        return lambda: _run_stock(model, parts)
    masks = CircuitMasks(model.graph).to(model.device)
    optimizer = torch.optim.AdamW(masks.parameters(), lr=0.1, weight_decay=0.0)
    run = partial(differentiate, model, recompute=recompute)
    if engine == "ours_graph":
        run = CudaGraphs(model, recompute=recompute).differentiate
    kept: list = []

    def passes(index: int) -> tuple:
        if engine == "ours":
            return model.run_pair(parts[index])
        if len(kept) == index:
            reference, corrupted = model.run_pair(parts[index])
            kept.append((reference, corrupted.stacked()))  # as the trainer keeps them
        return kept[index]

    def gradient(index: int, gates: Tensor) -> Tensor:
        part, share = parts[index], 1 / len(parts)
        if engine == "naive":
            at = (part.rows, part.cols)
            reference, corrupted = naive.run_pair(model, part)
            logits, _ = naive.run(model, part.clean_ids, gates, corrupted)
            distance = share * kl_per_token(reference[at], logits[at]).mean()
            return torch.autograd.grad(distance, gates)[0]
        return run(StepInputs(part, *passes(index), gates), share=share)[1]

    def step() -> None:
        gates = masks.sample(0).edge
        leaf = gates.detach().requires_grad_()
        grad_gates = sum(gradient(index, leaf) for index in range(len(parts)))
        optimizer.zero_grad()
        gates.backward(grad_gates)
        optimizer.step()

    return step


def _run_stock(model: CircuitModel, parts: Sequence[Batch]) -> None:
    body, embed = model.architecture.body, model.architecture.body.get_input_embeddings()

    def logits(embeddings: Tensor, part: Batch) -> Tensor:
        states = body(inputs_embeds=embeddings, use_cache=False).last_hidden_state
        return model.architecture.logits(states[part.rows, part.cols])

    for part in parts:
        with torch.no_grad():
            reference = logits(embed(part.clean_ids), part)
            logits(embed(part.corrupted_ids), part)
        embeddings = embed(part.clean_ids).requires_grad_()
        kl_per_token(reference, logits(embeddings, part)).mean().backward()


# ------------------------------------------------------------------------------------ the machine


def ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Measure a product of large square matrices and a copy of a large array."""
    size, numbers = (8192, 2**29) if device.type == "cuda" else (2048, 2**26)
    left = torch.randn(size, size, device=device, dtype=dtype)
    source = torch.zeros(numbers, device=device, dtype=dtype)
    target = torch.empty_like(source)

    def best(run: Callable[[], Any]) -> float:
        times = []
        for _ in range(6):
            start = time.perf_counter()
            run()
            _finish(device)
            times.append(time.perf_counter() - start)
        return min(times)

    operations = 2 * size**3 / best(lambda: left @ left)
    moved = 2 * numbers * source.element_size()
    return Ceilings(operations, moved / best(lambda: target.copy_(source)))


def peak_memory(step: Callable[[], None], device: torch.device) -> int | None:
    """Bytes at the peak of a step, above what is there before it.

    On a GPU, of the allocator. Else of the process: Linux tells the most memory it has held since
    the mark was last reset. None elsewhere.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        _finish(device)
        return torch.cuda.max_memory_allocated(device) - before
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        step()
        return None
    ctypes.CDLL(None).malloc_trim(0)  # else memory freed before would be used unseen
    reset.write_text("5")
    before = _process_memory("VmRSS")
    step()
    return _process_memory("VmHWM") - before


def _process_memory(name: str) -> int:
    """Bytes, from Linux's account of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# --------------------------------------------------------------------------------------- counting


def weight_numbers(model: CircuitModel) -> int:
    """Numbers in the matrices of all blocks: what a token is multiplied by."""
    blocks = [block.attention for block in model.architecture.blocks]
    blocks += [block.mlp for block in model.architecture.blocks]
    return sum(w.numel() for block in blocks for w in block.parameters() if w.dim() > 1)


def count(
    engine: str, model: CircuitModel, batch_size: int, length: int, micro: int, recompute: bool
) -> Count:
    """Operations and bytes of a step, from the shapes.

    Bytes are those of weights and outboxes (whatever is smaller stays in caches): for ours, each
    look-ahead goes through the outboxes once forward and once backward, and through their
    gradients to read and write; readers' inputs and their gradients are written and read.
    """
    graph, config = model.graph, model.architecture.body.config
    d_model, vocabulary = config.hidden_size, config.vocab_size
    tokens, numbers = batch_size * length, weight_numbers(model)
    d_heads = graph.num_heads * model.architecture.blocks[0].d_head
    attention = 2 * graph.num_layers * length * d_heads  # a token sees half of the others
    blocks = tokens * (2 * numbers + attention)
    predicted, everywhere = (2 * n * vocabulary * d_model for n in (batch_size, tokens))
    width = next(model.architecture.body.parameters()).element_size()
    weights = numbers * width * math.ceil(batch_size / micro)
    outbox = tokens * d_model * width
    writers, readers = graph.num_writers, len(graph.readers)
    if engine == "stock":
        return Count(4 * (blocks + predicted), 4 * weights)
    if engine == "naive":
        reading = 2 * readers * writers * d_model * tokens
        writing = 2 * writers * writers * d_model * tokens
        reads = sum(len(site.groups) for site in graph.sites)
        # One array a read in each pass without gates; with them two, which their gradients need
        # again, and four to make and add the gradient of the clean one. A write makes an array and
        # adds it to another, in three passes; its gradient is read.
        moved = ((2 + 2 + 2 + 4) * reads + (3 * 4 + 1) * len(graph.sites)) * writers * outbox
        operations = 4 * (blocks + everywhere) + (2 + 5) * reading + (3 + 1) * writing
        return Count(operations, moved + 4 * weights)
    reading = 2 * graph.num_edges * d_model * tokens
    again = int(recompute)
    circuit = (2 + again) * (blocks + predicted) + (3 + again) * reading
    seen = sum(graph.sites[2 * layers.start].num_writers for layers in lookaheads(graph))
    moved = ((4 + again) * seen + (4 + 2 * again) * readers + 4 * writers) * outbox
    moved += (2 + again) * weights
    if engine in ("ours_kept", "ours_graph"):
        return Count(circuit, moved)
    return Count(circuit + 2 * (blocks + predicted), moved + weights)


def predicted_memory(model: CircuitModel, batch_size: int, length: int) -> int:
    """Bytes of the outboxes, their gradients and the readers' inputs, which outgrow the rest."""
    config = model.architecture.body.config
    width = next(model.architecture.body.parameters()).element_size()
    arrays = 2 * model.graph.num_writers + len(model.graph.readers)
    return arrays * batch_size * length * config.hidden_size * width


def exponent(factors: Sequence[float], values: Sequence[float]) -> float:
    """The slope of log value against log factor, by least squares."""
    xs, ys = [math.log(f) for f in factors], [math.log(v) for v in values]
    return statistics.linear_regression(xs, ys).slope
