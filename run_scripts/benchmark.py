#!/usr/bin/env python
"""Measure the time and memory of a training step, and compare them with the machine's limits.

    python run_scripts/benchmark.py --shape gpt2
    python run_scripts/benchmark.py --shape smollm2 --batch-size 8 --length 32
    python run_scripts/benchmark.py --shape llama-8b --dtype bfloat16 --engines ours stock
    python run_scripts/benchmark.py --growth

Models have random weights and prompts random tokens, of which the last one is predicted, so nothing
is downloaded. Prints a table and writes all measurements as JSON. The engines:

    ours        pass of the full model on clean and corrupted prompts, pass of the circuit, gradient
                of the gates, AdamW on log alpha
    ours_kept   the same with the passes of the full model kept from before, as in training on a
                small training set
    ours_graph  ours_kept, replayed from CUDA graphs; only on a GPU
    naive       the published way (see published.py), with the same optimiser
    stock       the library's model alone: two forward passes, then one forward and backward pass
                with the gradient of the embeddings; logits at the predicted tokens only
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # edgeprune need not be installed

import published

from edgeprune.engine.circuit_model import CircuitModel, lookaheads
from edgeprune.engine.cuda_graphs import CudaGraphs
from edgeprune.engine.gradient import StepInputs, differentiate
from edgeprune.errors import UserError
from edgeprune.files import write_json
from edgeprune.methods import hard_concrete
from edgeprune.metrics import kl_per_token
from edgeprune.models.load import fuse, pick_device, wrap_model
from edgeprune.models.parity import random_batch
from edgeprune.prompts import Batch, collate

ENGINES = ("ours", "ours_kept", "ours_graph", "naive", "stock")
"""What can be measured."""

SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": {"model_type": "gpt2"},
    "smollm2": {
        "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
        "vocab_size": 49152, "tie_word_embeddings": True,
    },
    "llama-8b": {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "codellama-13b": {
        "model_type": "llama", "hidden_size": 5120, "intermediate_size": 13824,
        "num_hidden_layers": 40, "num_attention_heads": 40, "num_key_value_heads": 40,
        "vocab_size": 32016,
    },
}  # fmt: skip
"""Maps a shape's name to the arguments of the library's config class; others have its defaults."""

GROWTH_BASE = {
    "cpu": {"d_model": 512, "layers": 8, "heads": 8, "tokens": 32, "batch": 8},
    "cuda": {"d_model": 2048, "layers": 8, "heads": 16, "tokens": 128, "batch": 32},
}
"""Sizes of which `measure_growth` halves and doubles one at a time; large enough that computing
takes longer than starting operations."""


class Cost(NamedTuple):
    """Operations (a multiply-add counts as two) and bytes moved: of a step, or per second."""

    operations: float
    bytes: float


def measure(model: CircuitModel, args: argparse.Namespace, limits: Cost) -> dict[str, Any]:
    """Measure one step of each engine; their repetitions alternate.

    Returns:
        Per engine: minimum and median seconds, peak memory in bytes on top of the weights (None if
        unknown; of `ours_graph` before it replays), the counted cost, the seconds which that takes
        at the limits (the floor), and the measured multiple of the floor.
    """
    batch = random_batch(model, args.batch_size, args.length, predicted=1)
    size = args.micro_batch_size or args.batch_size
    starts = range(0, args.batch_size, size)
    parts = [collate(batch.pairs[start : start + size]).to(model.device) for start in starts]
    steps = {name: make_step(name, model, parts, args.recompute) for name in args.engines}
    memory = {}
    for name, step in steps.items():
        make_step(name, model, parts, args.recompute)()  # libraries load what they need
        model.release()
        memory[name] = peak_memory(step, model.device)
    model.release()
    rounds = [
        {name: timed(step, model.device) for name, step in steps.items()}
        for _ in range(args.repetitions + 1)
    ][1:]  # the first one allocates buffers again
    measured = {}
    for name in args.engines:
        seconds = [times[name] for times in rounds]
        cost = count(name, model, args)
        floor = max(cost.operations / limits.operations, cost.bytes / limits.bytes)
        measured[name] = {
            "seconds": min(seconds),
            "median_seconds": statistics.median(seconds),
            "memory": memory[name],
            "count": cost._asdict(),
            "floor_seconds": floor,
            "times_the_floor": min(seconds) / floor,
        }
    return measured


def measure_growth(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure how a step of ours grows with each size of a Llama with heads of 32 dimensions.

    Returns:
        Per size: its values, the measurements, and their exponents. The operations predict the
        exponent of time; outboxes, gradients and inputs that of memory.
    """
    base = GROWTH_BASE["cuda" if args.device.startswith("cuda") else "cpu"]
    factors, rows = (0.5, 1, 2), []
    for name in ("layers", "heads", "tokens", "batch"):
        values = [int(base[name] * factor) for factor in factors]
        points = []
        for value in values:
            size = base | {name: value}
            settings = {
                "model_type": "llama", "hidden_size": size["d_model"], "head_dim": 32,
                "intermediate_size": 2 * size["d_model"], "vocab_size": 1000,
                "num_attention_heads": size["heads"], "num_key_value_heads": size["heads"],
                "num_hidden_layers": size["layers"],
            }  # fmt: skip
            model = random_model(settings, args.device, args.dtype)
            step = {"batch_size": size["batch"], "length": size["tokens"], "engines": ["ours"]}
            step |= {"micro_batch_size": None, "recompute": False}
            found = measure(model, argparse.Namespace(**vars(args) | step), Cost(1, 1))["ours"]
            # Outboxes, their gradients and the readers' inputs outgrow the rest.
            arrays = 2 * model.graph.num_writers + len(model.graph.readers)
            numbers = arrays * size["batch"] * size["tokens"] * size["d_model"]
            points.append({
                "seconds": found["seconds"],
                "operations": found["count"]["operations"],
                "memory": max(found["memory"] or 0, 1),
                "predicted_memory": numbers * getattr(torch, args.dtype).itemsize,
            })  # fmt: skip
        columns = {key: [point[key] for point in points] for key in points[0]}
        logs = [math.log(factor) for factor in factors]
        exponents = {
            key: statistics.linear_regression(logs, [math.log(v) for v in column]).slope
            for key, column in columns.items()
        }
        rows.append({"quantity": name, "values": values, **columns, "exponents": exponents})
    return rows


def gradient_cosine(args: argparse.Namespace) -> float:
    """Cosine between the gate gradients as measured and those in float32 without fused kernels."""
    model = random_model(args.settings, args.device, "float32")
    batch_size = args.micro_batch_size or args.batch_size
    batch = random_batch(model, batch_size, args.length, predicted=1)
    noise = torch.Generator().manual_seed(0)
    gates = sample_gates(torch.ones(model.graph.num_edges, device=args.device), noise)
    gradients = []
    for dtype in ("float32", args.dtype):
        model.release()
        for module in (model.architecture.body, model.architecture.unembed):
            for weight in module.parameters():
                weight.data = weight.data.to(getattr(torch, dtype))
        if args.fused and gradients:
            fuse(model)
        inputs = StepInputs(batch, *model.run_pair(batch), gates.clone().requires_grad_())
        gradients.append(differentiate(model, inputs)[1])
    return torch.cosine_similarity(*gradients, dim=0).item()


def random_model(settings: dict[str, Any], device: str, dtype: str) -> CircuitModel:
    """Make a model with random weights; settings are `model_type` and its config's arguments."""
    settings = dict(settings)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, dtype), attn_implementation="sdpa"
        )
    return wrap_model(model, name=config.model_type)


def sample_gates(log_alpha: Tensor, noise: torch.Generator) -> Tensor:
    """Sample training gates, [edge]; the noise is drawn on the CPU as in training."""
    epsilon = hard_concrete.EPSILON
    uniform = torch.rand(log_alpha.shape, generator=noise) * (1 - 2 * epsilon) + epsilon
    return hard_concrete.sample(log_alpha, uniform.to(log_alpha.device, non_blocking=True))


def make_step(
    engine: str, model: CircuitModel, parts: Sequence[Batch], recompute: bool
) -> Callable[[], None]:
    """Make a function that runs one optimisation step, or for `stock` only its passes."""
    if engine == "stock":
        return partial(run_stock, model, parts)
    log_alpha = torch.ones(model.graph.num_edges, device=model.device, requires_grad=True)
    noise = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW([log_alpha], lr=0.1, weight_decay=0.0)
    run = partial(differentiate, model, recompute=recompute)
    if engine == "ours_graph":
        run = CudaGraphs(model, recompute=recompute).differentiate
    kept: list = []

    def full_model(index: int) -> tuple:
        if engine == "ours":
            return model.run_pair(parts[index])
        if len(kept) == index:
            reference, corrupted = model.run_pair(parts[index])
            kept.append((reference, corrupted.stacked()))  # as the trainer keeps them
        return kept[index]

    def gradient(index: int, gates: Tensor) -> Tensor:
        part, share = parts[index], 1 / len(parts)
        if engine != "naive":
            return run(StepInputs(part, *full_model(index), gates), share=share)[1]
        reference, corrupted = published.run_pair(model, part)
        logits, _ = published.run(model, part.clean_ids, gates, corrupted)
        at = (part.rows, part.cols)
        distance = share * kl_per_token(reference[at], logits[at]).mean()
        return torch.autograd.grad(distance, gates)[0]

    def step() -> None:
        gates = sample_gates(log_alpha, noise)
        leaf = gates.detach().requires_grad_()
        grad_gates = sum(gradient(index, leaf) for index in range(len(parts)))
        optimizer.zero_grad()
        gates.backward(grad_gates)
        optimizer.step()

    return step


def run_stock(model: CircuitModel, parts: Sequence[Batch]) -> None:
    """Run the library's model alone: two forward passes, then one forward and backward pass."""
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


def timed(run: Callable[[], Any], device: torch.device) -> float:
    """Run a function; return its seconds, including those of a GPU."""
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def measure_limits(device: torch.device, dtype: torch.dtype) -> Cost:
    """Measure operations and bytes per second by a large matrix product and a large copy."""
    size, numbers = (8192, 2**29) if device.type == "cuda" else (2048, 2**26)
    left = torch.randn(size, size, device=device, dtype=dtype)
    source = torch.zeros(numbers, device=device, dtype=dtype)
    target = torch.empty_like(source)
    product = min(timed(lambda: left @ left, device) for _ in range(6))
    copy = min(timed(lambda: target.copy_(source), device) for _ in range(6))
    return Cost(2 * size**3 / product, 2 * numbers * source.element_size() / copy)


def peak_memory(step: Callable[[], None], device: torch.device) -> int | None:
    """Run a step; return its peak memory above what was in use before, in bytes.

    From the allocator on a GPU, else from Linux's account of the process; None elsewhere.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        timed(step, device)
        return torch.cuda.max_memory_allocated(device) - before
    if sys.platform != "linux":
        step()
        return None
    ctypes.CDLL(None).malloc_trim(0)  # or the step would reuse freed memory unnoticed
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = psutil.Process().memory_info().rss
    step()
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0]) - before


def num_block_weights(model: CircuitModel) -> int:
    """Number of weights in the matrices of all blocks, each a multiply-add per token."""
    blocks = [part for block in model.architecture.blocks for part in (block.attention, block.mlp)]
    return sum(w.numel() for block in blocks for w in block.parameters() if w.dim() > 1)


def count(engine: str, model: CircuitModel, args: argparse.Namespace) -> Cost:
    """Count the operations and bytes of a step from the shapes.

    The bytes are those of weights and outboxes; smaller arrays are assumed to stay in caches. For
    ours, each look-ahead goes through the outboxes once forward and once backward, and reads and
    writes their gradients; the readers' inputs and their gradients are written and read.
    """
    graph, config = model.graph, model.architecture.body.config
    d_model, vocabulary = config.hidden_size, config.vocab_size
    tokens, numbers = args.batch_size * args.length, num_block_weights(model)
    d_heads = graph.num_heads * model.architecture.blocks[0].d_head
    attention = (
        2 * graph.num_layers * args.length * d_heads
    )  # a token attends to half of the others
    blocks = tokens * (2 * numbers + attention)
    predicted, everywhere = (2 * n * vocabulary * d_model for n in (args.batch_size, tokens))
    width = next(model.architecture.body.parameters()).element_size()
    num_parts = args.batch_size // (args.micro_batch_size or args.batch_size)
    weights = numbers * width * num_parts
    outbox = tokens * d_model * width
    writers, readers = graph.num_writers, len(graph.readers)
    if engine == "stock":
        return Cost(4 * (blocks + predicted), 4 * weights)
    if engine == "naive":
        reading = 2 * readers * writers * d_model * tokens
        writing = 2 * writers * writers * d_model * tokens
        num_reads = sum(len(site.groups) for site in graph.sites)
        # A read takes one array in each pass without gates. With gates it takes two, which their
        # gradients need again, and four to make and add the gradient of the clean array. A write
        # makes an array and adds it to another, in three passes; its gradient is read.
        arrays = (2 + 2 + 2 + 4) * num_reads + (3 * 4 + 1) * len(graph.sites)
        operations = 4 * (blocks + everywhere) + (2 + 5) * reading + (3 + 1) * writing
        return Cost(operations, arrays * writers * outbox + 4 * weights)
    reading = 2 * graph.num_edges * d_model * tokens
    again = int(args.recompute)
    circuit = (2 + again) * (blocks + predicted) + (3 + again) * reading
    seen = sum(graph.sites[2 * layers.start].num_writers for layers in lookaheads(graph))
    moved = ((4 + again) * seen + (4 + 2 * again) * readers + 4 * writers) * outbox
    moved += (2 + again) * weights
    if engine == "ours":  # which also runs the full model
        return Cost(circuit + 2 * (blocks + predicted), moved + weights)
    return Cost(circuit, moved)


class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of the description and shows defaults."""


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse and check the options; add the `settings` of the shape for `random_model`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Formatter)
    add = parser.add_argument
    add("--shape", default="gpt2", help=f"{', '.join(SHAPES)}, or a folder with a config.json")
    add("--batch-size", type=int, default=8, help="pairs per step")
    add("--micro-batch-size", type=int, help="pairs run at a time, all if None")
    add("--length", type=int, default=32, help="tokens per prompt")
    dtypes = ("float32", "bfloat16", "float16")
    add("--dtype", choices=dtypes, default="float32", help="of the model")
    add("--device", default="auto", help="cpu, cuda, cuda:1, ...; auto takes a GPU if there is one")
    add("--recompute", action="store_true", help="ours recomputes blocks in the backward pass")
    add("--fused", action="store_true", help="ours uses Triton kernels (on a GPU, in bfloat16)")
    default = ["ours", "ours_kept", "naive", "stock"]
    add("--engines", nargs="+", choices=ENGINES, metavar="ENGINE", default=default, help="as above")
    add("--repetitions", type=int, default=5, help="timed steps per engine")
    add("--compare-float32", action="store_true", help="also compare gate gradients with float32")
    growth = "measure instead how a step grows with layers, heads, tokens and batch"
    add("--growth", action="store_true", help=growth)
    add("--output", type=Path, default="benchmark.json", help="file of all measurements")
    args = parser.parse_args(arguments)
    try:
        if args.shape not in SHAPES and not Path(args.shape).is_dir():  # so nothing is downloaded
            raise ValueError(f"unknown shape {args.shape!r}; give {', '.join(SHAPES)} or a folder")
        args.settings = SHAPES.get(args.shape) or AutoConfig.from_pretrained(args.shape).to_dict()
        args.device = pick_device(args.device)
    except (OSError, KeyError, ValueError) as error:
        parser.error(str(error))
    micro = args.batch_size if args.micro_batch_size is None else args.micro_batch_size
    if min(args.batch_size, micro, args.length, args.repetitions) < 1:
        parser.error("sizes, --length and --repetitions must be at least 1")
    if args.batch_size % micro:
        parser.error(f"--micro-batch-size {micro} must divide --batch-size {args.batch_size}")
    if "ours_graph" in args.engines and not args.device.startswith("cuda"):
        parser.error(f"engine ours_graph needs a GPU, but the device is {args.device}")
    return args


def print_table(title: str, rows: Sequence[Sequence[str]]) -> None:
    """Print rows in columns; the first row is the header."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    print(title)
    for first, *others in rows:
        print(first.ljust(widths[0]), *map(str.rjust, others, widths[1:]), sep="  ")


def report_engines(args: argparse.Namespace, limits: Cost) -> dict[str, Any]:
    """Measure the engines and print a table; return the measurements."""
    model = random_model(args.settings, args.device, args.dtype)
    if args.length > model.max_length:
        raise UserError(f"--length {args.length} exceeds the model's {model.max_length} positions")
    if args.fused:
        fuse(model)
    measured = measure(model, args, limits)
    report = {"num_edges": model.graph.num_edges, "block_weights": num_block_weights(model)}
    report |= {"engines": measured}
    rows = [("", "seconds", "x stock", "MB", "G operations", "GB moved", "x floor")]
    for name, m in measured.items():
        rows.append((
            name,
            f"{m['seconds']:.3g}",
            f"{m['seconds'] / measured['stock']['seconds']:.2f}" if "stock" in measured else "",
            "?" if m["memory"] is None else f"{m['memory'] / 1e6:,.0f}",
            f"{m['count']['operations'] / 1e9:,.0f}",
            f"{m['count']['bytes'] / 1e9:,.1f}",
            f"{m['times_the_floor']:.2f}",
        ))  # fmt: skip
    size = f"{args.batch_size} x {args.length} tokens per step"
    print_table(f"{args.shape}, {model.graph.num_edges:,} edges, {args.dtype}, {size}", rows)
    if args.compare_float32:
        del model
        report["gradient_cosine"] = gradient_cosine(args)
        print(f"gate gradients compared with float32: cosine {report['gradient_cosine']:.6f}")
    return report


def report_growth(args: argparse.Namespace) -> dict[str, Any]:
    """Measure the growth and print a table; return the measurements."""
    found = measure_growth(args)
    rows = [("", "values", "time", "predicted", "memory", "predicted")]
    for row in found:
        values = ", ".join(map(str, row["values"]))
        rows.append((row["quantity"], values, *(f"{e:.2f}" for e in row["exponents"].values())))
    print_table("growth of a step of ours: exponents", rows)
    return {"growth": found}


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    device = torch.device(args.device)
    try:
        limits = measure_limits(device, getattr(torch, args.dtype))
        name = f"{torch.get_num_threads()} CPU threads"
        if device.type == "cuda":
            name = torch.cuda.get_device_name(device)
        report = {
            "settings": {k: v for k, v in vars(args).items() if k not in ("settings", "output")},
            "machine": name,
            "operations_per_second": limits.operations,
            "bytes_per_second": limits.bytes,
            **(report_growth(args) if args.growth else report_engines(args, limits)),
        }
        write_json(args.output, report)
    except (UserError, OSError, torch.OutOfMemoryError) as error:
        sys.exit(f"benchmark.py: {error}")
    print(
        f"{name}: {limits.operations / 1e9:,.0f} G operations per second in a large product, "
        f"{limits.bytes / 1e9:.1f} GB per second in a large copy (read and written)"
    )
    print(f"-> {args.output}")


if __name__ == "__main__":
    main()
