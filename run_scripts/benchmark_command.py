"""`edgeprune benchmark`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from edgeprune.commands.shared import OUT, check_output, show
from edgeprune.config import BenchmarkConfig, check_benchmark, to_dict
from edgeprune.errors import ConfigError
from edgeprune.files import write_json

if TYPE_CHECKING:
    from benchmark import Ceilings


def benchmark(config: BenchmarkConfig) -> None:
    """Measure, print a table and write everything as JSON."""
    check_benchmark(config)
    output = Path(config.output)
    check_output(output)
    import torch
    from benchmark import ceilings

    from edgeprune.models import pick_device

    device = pick_device(config.device)
    if "ours_graph" in config.engines and not device.startswith("cuda"):
        raise ConfigError(f"engine ours_graph is for a GPU, but the device is {device}")
    with OUT.status("measuring the machine"):
        found = ceilings(torch.device(device), getattr(torch, config.dtype))
    report = {
        "settings": to_dict(config),
        "machine": _machine(device),
        "operations_a_second": found.operations,
        "bytes_a_second": found.bytes,
    }
    with OUT.status("measuring"):
        report |= _growth(config, device) if config.growth else _engines(config, device, found)
    write_json(output, report)
    show(
        f"{report['machine']}: a large product {found.operations / 1e9:,.0f} billion operations "
        f"a second, a large copy {found.bytes / 1e9:.1f} GB (read and written) a second"
    )
    show(f"-> {output}")


def _machine(device: str) -> str:
    import torch

    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} CPU threads"


def _engines(config: BenchmarkConfig, device: str, found: Ceilings) -> dict[str, Any]:
    from benchmark import gradient_cosine, measure, weight_numbers
    from shapes import random_model, shape_settings

    from edgeprune.models import fuse

    settings = shape_settings(config.shape)
    model = random_model(settings, device=device, dtype=config.dtype)
    if config.length > model.max_length:
        raise ConfigError(f"length={config.length}, but {config.shape} takes {model.max_length}")
    if config.fused:
        fuse(model)
    measured = measure(
        model,
        config.engines,
        batch_size=config.batch_size,
        length=config.length,
        micro_batch_size=config.micro_batch_size,
        recompute=config.recompute,
        repetitions=config.repetitions,
        ceilings=found,
    )
    report: dict[str, Any] = {
        "num_edges": model.graph.num_edges,
        "block_weights": weight_numbers(model),
        "engines": {name: m.to_dict() for name, m in measured.items()},
    }
    if config.compare_float32:
        del model
        report["gradient_cosine"] = gradient_cosine(
            settings, device=device, dtype=config.dtype,
            batch_size=config.micro_batch_size or config.batch_size, length=config.length,
            fused=config.fused,
        )  # fmt: skip
    title = (
        f"{config.shape}, {report['num_edges']:,} edges, {config.dtype}, "
        f"{config.batch_size} x {config.length} tokens a step"
    )
    table = Table(title=Text(title), title_justify="left")
    for name in ("", "seconds", "x stock", "MB", "G operations", "GB moved", "x floor"):
        table.add_column(name, justify="right" if name else "left")
    stock = measured.get("stock")
    for name, m in measured.items():
        table.add_row(
            name,
            f"{m.seconds:.3g}",
            "" if stock is None else f"{m.seconds / stock.seconds:.2f}",
            "?" if m.memory is None else f"{m.memory / 1e6:,.0f}",
            f"{m.count.operations / 1e9:,.0f}",
            f"{m.count.bytes / 1e9:,.1f}",
            f"{m.seconds / m.floor_seconds:.2f}",
        )
    OUT.print(table)
    if "gradient_cosine" in report:
        show(f"gate gradients against float32: cosine {report['gradient_cosine']:.6f}")
    return report


def _growth(config: BenchmarkConfig, device: str) -> dict[str, Any]:
    from benchmark import growth

    rows = growth(device, config.dtype, config.repetitions)
    table = Table(title=Text("growth of a step: exponents"), title_justify="left")
    for column in ("", "values", "time", "predicted", "memory", "predicted"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for row in rows:
        exponents = ("time_exponent", "predicted_time_exponent", "memory_exponent",
                     "predicted_memory_exponent")  # fmt: skip
        values = ", ".join(str(value) for value in row["values"])
        table.add_row(row["quantity"], values, *(f"{row[name]:.2f}" for name in exponents))
    OUT.print(table)
    return {"growth": rows}
