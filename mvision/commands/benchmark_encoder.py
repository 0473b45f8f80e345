"""The hybrid encoder beside the encoders it replaces, on the maps of a ResNet-50: time, memory, parameters, FLOPs."""

from __future__ import annotations

import copy
import json
import multiprocessing
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mvision.commands.benchmark_baselines import DeformableEncoder, PlainEncoder
from mvision.commands.benchmark_timing import alternate, median_ratio, peak_memory
from mvision.machine import cpu_name, keep_freed_memory, resolve_device
from mvision.neck import HybridEncoder

CHANNELS, STRIDES = (512, 1024, 2048), (8, 16, 32)
SIZES = (320, 640, 800, 1280, 1536)
REFERENCE = "hybrid"
SLOWEST = 30.0  # seconds of one call, by what the size before took, above which a size is left out
LARGEST = 12 * 2**30  # bytes of one matrix of attention weights, above which it is


def encoders(embed_dim: int) -> dict[str, Callable[[], nn.Module]]:
    """What is compared, by name; six layers are those of DETR and Deformable DETR."""
    hybrid = partial(HybridEncoder, CHANNELS, STRIDES, embed_dim)
    plain = partial(PlainEncoder, CHANNELS, embed_dim)
    deformable = partial(DeformableEncoder, CHANNELS, embed_dim)
    return {
        REFERENCE: hybrid,
        "hybrid, windows": partial(hybrid, attention="window"),
        "hybrid, attention on all scales": partial(hybrid, attention_levels="all"),
        "hybrid, windows on all scales": partial(hybrid, attention_levels="all", attention="window"),
        "plain, 1 layer, fused": partial(plain, num_layers=1),
        "plain, 1 layer": partial(plain, num_layers=1, fused=False),
        "plain, 6 layers, fused": plain,
        "plain, 6 layers": partial(plain, fused=False),
        "deformable, 1 layer": partial(deformable, num_layers=1),
        "deformable, 6 layers": deformable,
    }


def benchmark_encoder(
    *,
    sizes: Sequence[int] = SIZES,
    embed_dim: int = 256,
    repeats: int = 10,
    device: str | None = None,
    output: Path = Path("benchmark"),
    names: Sequence[str] | None = None,
    log: Callable[[str], None] = print,
) -> str:
    """Measure, write ``encoder.json``, ``encoder.png`` and ``encoder.md`` into ``output``, return the tables.

    Args:
        sizes: sides of square images.
        embed_dim: width of all encoders.
        repeats: rounds at most; large sizes get fewer.
        device: None is the first GPU, else the CPU.
        names: which of ``encoders``; None: all. The hybrid one is always among them.
        log: gets a line per size.
    """
    keep_freed_memory()
    chosen = resolve_device(device)
    known = encoders(embed_dim)
    wanted = [name for name in known if names is None or name in (*names, REFERENCE)]
    records: list[dict[str, Any]] = []
    last: dict[str, tuple[int, float]] = {}
    for size in sorted(sizes):
        possible = [name for name in wanted if not _too_much(name, size, last.get(name))]
        modules = {name: _build(known[name], chosen) for name in possible}
        maps = _maps(size, chosen)
        calls = [partial(_call, module, maps) for module in modules.values()]
        taken = dict(zip(possible, alternate(calls, chosen, repeats, warmups=1, seconds=90)))
        for name in possible:
            seconds = statistics.median(taken[name])
            last[name] = size, seconds
            records.append(
                {
                    "encoder": name,
                    "size": size,
                    "seconds": seconds,
                    "ratio": median_ratio(taken[name], taken[REFERENCE]),
                    "memory": _memory(name, embed_dim, size, chosen),
                    "parameters": sum(p.numel() for p in modules[name].parameters()),
                    "flops": _flops(modules[name], maps),
                }
            )
        records += [{"encoder": name, "size": size, "seconds": None} for name in wanted if name not in possible]
        log(f"{size} x {size}: {len(possible)} encoders")
    output.mkdir(parents=True, exist_ok=True)
    where = (
        torch.cuda.get_device_name(chosen)
        if chosen.type == "cuda"
        else f"{cpu_name()}, {torch.get_num_threads()} threads"
    )
    machine = f"{where}, torch {torch.__version__}"
    text = _tables(records, wanted, embed_dim, machine)
    document = {"machine": machine, "embed_dim": embed_dim, "channels": CHANNELS, "records": records}
    (output / "encoder.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    (output / "encoder.md").write_text(text, encoding="utf-8")
    _plot(records, wanted, output / "encoder.png")
    return text


def _build(make: Callable[[], nn.Module], device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    module = make().eval()
    if isinstance(module, HybridEncoder):
        module.fuse()
    return module.to(device)


def _maps(size: int, device: torch.device) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(1, channels, size // stride, size // stride, generator=generator).to(device)
        for channels, stride in zip(CHANNELS, STRIDES)
    ]


def _call(module: nn.Module, maps: list[Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return module(maps)


def _too_much(name: str, size: int, last: tuple[int, float] | None) -> bool:
    """Whether a matrix of attention weights would not fit, or a call would take too long."""
    tokens = sum((size // stride) ** 2 for stride in STRIDES)
    if name.startswith("plain") and "fused" not in name and 8 * tokens**2 * 4 > LARGEST:
        return True
    # Attention over everything grows with the fourth power of the side.
    return last is not None and last[1] * (size / last[0]) ** 4 > SLOWEST


def _flops(module: nn.Module, maps: list[Tensor]) -> int:
    """Counted on tensors without data where that works: nothing is computed, however large a matrix is."""
    counter = FlopCounterMode(display=False)
    if not isinstance(module, DeformableEncoder):  # its sampling needs a device
        module, maps = copy.deepcopy(module).to("meta"), [x.to("meta") for x in maps]
    with sdpa_kernel(SDPBackend.MATH), counter, torch.no_grad():
        module(maps)
    return counter.get_total_flops()


def _memory(name: str, embed_dim: int, size: int, device: torch.device) -> int | None:
    """Peak of one call; on a CPU in a process of its own, where nothing was allocated before."""
    if device.type != "cpu":
        return peak_memory(partial(_call, _build(encoders(embed_dim)[name], device), _maps(size, device)), device)
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_memory_here, (name, embed_dim, size, torch.get_num_threads()))


def _memory_here(name: str, embed_dim: int, size: int, threads: int) -> int | None:
    torch.set_num_threads(threads)
    device = torch.device("cpu")
    module = _build(encoders(embed_dim)[name], device)
    _call(module, _maps(64, device))  # libraries allocate workspaces at the first call
    return peak_memory(partial(_call, module, _maps(size, device)), device)


def _tables(records: list[dict[str, Any]], names: Sequence[str], embed_dim: int, machine: str) -> str:
    sizes = sorted({record["size"] for record in records})
    found = {(record["encoder"], record["size"]): record for record in records}
    lines = [
        "# Encoders",
        "",
        f"Maps of a ResNet-50 (strides 8, 16, 32), {embed_dim} channels, fp32, one image; one run, in turn, medians. "
        f"{machine}.",
        "",
        "Time, and how many times the hybrid encoder's:",
        "",
        "| encoder | " + " | ".join(f"{size}" for size in sizes) + " |",
        "|---" * (1 + len(sizes)) + "|",
    ]
    for name in names:
        cells = [_cell(found[name, size], "seconds", 1000, "ms") for size in sizes]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["", "Peak memory beyond weights and inputs, and how many times the hybrid encoder's:", ""]
    lines += ["| encoder | " + " | ".join(f"{size}" for size in sizes) + " |", "|---" * (1 + len(sizes)) + "|"]
    for name in names:
        cells = []
        for size in sizes:
            record, base = found[name, size], found[REFERENCE, size]
            if not record.get("memory") or not base.get("memory"):
                cells.append("-")
            else:
                cells.append(f"{record['memory'] / 2**20:.0f} MiB ({record['memory'] / base['memory']:.2f})")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["", "| encoder | parameters | " + " | ".join(f"GFLOPs at {size}" for size in sizes) + " |"]
    lines.append("|---" * (2 + len(sizes)) + "|")
    for name in names:
        parameters = next((r["parameters"] for r in records if r["encoder"] == name and r["seconds"]), None)
        cells = [f"{found[name, size]['flops'] / 1e9:.1f}" if found[name, size]["seconds"] else "-" for size in sizes]
        lines.append(
            f"| {name} | {'-' if parameters is None else f'{parameters / 1e6:.2f} M'} | " + " | ".join(cells) + " |"
        )
    lines += ["", *_growth(found, sizes), "", "![time and memory by size](encoder.png)", ""]
    return "\n".join(lines)


def _cell(record: dict[str, Any], key: str, factor: float, unit: str) -> str:
    if record["seconds"] is None:
        return "left out"
    return f"{factor * record[key]:.0f} {unit} ({record['ratio']:.2f})"


def _growth(found: dict[tuple[str, int], dict[str, Any]], sizes: Sequence[int]) -> list[str]:
    """How time grows with the number of tokens, where 640 and 1536 were measured."""
    if not {640, 1536} <= set(sizes):
        return []
    tokens = (1536 / 640) ** 2
    lines = [f"From 640 to 1536 there are {tokens:.2f} times as many tokens. Time grows by:", ""]
    for (name, size), record in found.items():
        base = found[name, 640]
        if size == 1536 and record["seconds"] and base["seconds"]:
            growth = record["seconds"] / base["seconds"]
            lines.append(f"- {name}: {growth:.2f}, {growth / tokens:.2f} of linear")
    return lines


def _plot(records: list[dict[str, Any]], names: Sequence[str], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, key, factor, label in zip(
        figure.subplots(1, 2), ("seconds", "memory"), (1000.0, 2.0**-20), ("milliseconds", "peak memory, MiB")
    ):
        for index, name in enumerate(names):
            points = [(r["size"], factor * r[key]) for r in records if r["encoder"] == name and r.get(key)]
            if points:
                axes.plot(
                    *zip(*points), "o-" if name.startswith("hybrid") else "s--", color=f"C{index}", label=name, ms=3
                )
        axes.set(xlabel="side of the image", ylabel=label, yscale="log", xscale="log")
        sizes = sorted({r["size"] for r in records})
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    lines, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside right upper", fontsize=8, frameon=False)
    figure.savefig(path, format="png", dpi=110)
