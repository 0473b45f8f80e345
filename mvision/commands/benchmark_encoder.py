"""``mvision benchmark encoder``: time, memory, parameters and FLOPs of the hybrid encoder and of other encoders.

All work on maps with the channels and strides of a ResNet-50. Hybrid encoders with other fusion blocks have nearly as
many FLOPs as the one with the default blocks.
"""

from __future__ import annotations

import copy
import json
import multiprocessing
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mvision.commands.benchmark_baselines import DeformableEncoder, PlainEncoder
from mvision.commands.benchmark_timing import alternate, median_ratio, peak_memory
from mvision.commands.equal_flops import count_flops, expansion_for, neck_flops
from mvision.errors import UserError, did_you_mean
from mvision.evaluation.tables import markdown_table
from mvision.machine import device_name, keep_freed_memory, resolve_device
from mvision.neck import HybridEncoder
from mvision.storage.atomic import whole_file, write_text

CHANNELS, STRIDES = (512, 1024, 2048), (8, 16, 32)
SIZES = (320, 640, 800, 1280, 1536)
REFERENCE = "hybrid"
EQUAL_AT = 640  # side of the image for which blocks of other kinds get the FLOPs of the reference
BLOCKS: dict[str, dict[str, Any]] = {
    "hybrid, elan blocks": {"fusion_block": "elan"},
    "hybrid, elan blocks without 3x3": {"fusion_block": "elan", "elan_conv": False},
    "hybrid, split elan blocks": {"fusion_block": "elan", "elan_split": True},
    "hybrid, sums": {"fusion": "sum"},
    "hybrid, as D-FINE": {"fusion_block": "elan", "downsample": "separable", "lateral_act": False},
    "hybrid, as EdgeCrafter": {
        "fusion_block": "elan", "elan_conv": False, "elan_split": True, "fusion": "sum", "downsample": "separable",
        "lateral_act": False, "attention_act": "silu",
    },
}  # fmt: skip
"""Settings of the encoders with other fusion blocks; their ``expansion`` follows from the FLOPs."""
SLOWEST = 30.0  # seconds of one call: a size that is expected to take longer is left out
LARGEST = 12 * 2**30  # bytes of one matrix of attention weights: a size that needs a larger one is left out

Record = dict[str, Any]


def encoders(embed_dim: int) -> dict[str, Callable[[], nn.Module]]:
    """The encoders that are compared, by name. DETR and Deformable DETR have six layers."""
    hybrid = partial(HybridEncoder, CHANNELS, STRIDES, embed_dim)
    plain = partial(PlainEncoder, CHANNELS, embed_dim)
    deformable = partial(DeformableEncoder, CHANNELS, embed_dim)
    return {
        REFERENCE: hybrid,
        "hybrid, windows": partial(hybrid, attention="window"),
        "hybrid, attention on all scales": partial(hybrid, attention_levels="all"),
        "hybrid, windows on all scales": partial(hybrid, attention_levels="all", attention="window"),
        "hybrid, separable downsampling": partial(hybrid, downsample="separable"),
        **{name: partial(_with_blocks, name, embed_dim) for name in BLOCKS},
        "plain, 1 layer, fused": partial(plain, num_layers=1),
        "plain, 1 layer": partial(plain, num_layers=1, fused=False),
        "plain, 6 layers, fused": plain,
        "plain, 6 layers": partial(plain, fused=False),
        "deformable, 1 layer": partial(deformable, num_layers=1),
        "deformable, 6 layers": deformable,
    }


def _with_blocks(name: str, embed_dim: int) -> HybridEncoder:
    return HybridEncoder(CHANNELS, STRIDES, embed_dim, expansion=_expansion(name, embed_dim), **BLOCKS[name])


@cache
def _expansion(name: str, embed_dim: int) -> float:
    """With which the fused encoder has nearly the FLOPs of the reference, and widths that suit vector units."""
    flops = neck_flops(CHANNELS, STRIDES, EQUAL_AT, {"embed_dim": embed_dim})
    return expansion_for(flops, CHANNELS, STRIDES, EQUAL_AT, {"embed_dim": embed_dim, **BLOCKS[name]}, multiple=8)


def benchmark_encoder(
    *,
    sizes: Sequence[int] = (),
    embed_dim: int = 256,
    repeats: int = 10,
    device: str | None = None,
    output: Path = Path("benchmark"),
    names: Sequence[str] = (),
    log: Callable[[str], None] = print,
) -> str:
    """Measure, write ``encoder.json``, ``encoder.png`` and ``encoder.md`` into ``output``, return the tables.

    Args:
        sizes: sides of square images; empty: ``SIZES``.
        embed_dim: width of all encoders.
        repeats: most rounds; large sizes get fewer.
        device: None: the first GPU, else the CPU.
        names: which of ``encoders``; empty: all. The hybrid encoder is always among them.
        log: is called with a line per size.

    Raises:
        UserError: an unknown name, or a width that the encoders cannot have.
    """
    if embed_dim % 8:
        raise UserError(f"--embed-dim {embed_dim}: the encoders have 8 attention heads; choose a multiple of 8")
    known = list(encoders(embed_dim))
    for name in names:
        if name not in known:
            raise UserError(f"--encoder {name}: {did_you_mean(name, known)}")
    keep_freed_memory()
    chosen = resolve_device(device)
    wanted = [name for name in known if not names or name in (*names, REFERENCE)]
    records: list[Record] = []
    for size in sorted(sizes or SIZES):
        possible = [name for name in wanted if not _is_too_much(name, size, records)]
        records += _measure(possible, size, embed_dim, repeats, chosen)
        records += [{"encoder": name, "size": size, "seconds": None} for name in wanted if name not in possible]
        log(f"{size} x {size}: {len(possible)} encoders")
    threads = f", {torch.get_num_threads()} threads" if chosen.type != "cuda" else ""
    machine = f"{device_name(chosen)}{threads}, torch {torch.__version__}"
    text = _page(records, wanted, embed_dim, machine)
    document = {"machine": machine, "embed_dim": embed_dim, "channels": CHANNELS, "records": records}
    output.mkdir(parents=True, exist_ok=True)
    write_text(output / "encoder.json", json.dumps(document, indent=1) + "\n")
    write_text(output / "encoder.md", text)
    _plot(records, wanted, output / "encoder.png")
    return text


def _measure(names: Sequence[str], size: int, embed_dim: int, repeats: int, device: torch.device) -> list[Record]:
    """The records of these encoders at one size."""
    known = encoders(embed_dim)
    modules = {name: _build(known[name], device) for name in names}
    maps = _maps(size, device)
    calls = [partial(_call, module, maps) for module in modules.values()]
    times = dict(zip(names, alternate(calls, device, repeats, warmups=1, seconds=90)))
    return [
        {
            "encoder": name,
            "size": size,
            "seconds": statistics.median(times[name]),
            "ratio": median_ratio(times[name], times[REFERENCE]),
            "memory": _memory(name, embed_dim, size, device),
            "parameters": sum(p.numel() for p in module.parameters()),
            "flops": _flops(module, maps),
        }
        for name, module in modules.items()
    ]


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


def _is_too_much(name: str, size: int, records: Sequence[Record]) -> bool:
    """Whether a matrix of attention weights does not fit, or a call takes too long to judge by the last smaller size.

    The time of attention over all tokens grows with the fourth power of the side.
    """
    tokens = sum((size // stride) ** 2 for stride in STRIDES)
    heads, bytes_per_weight = 8, 4
    if name.startswith("plain") and "fused" not in name and heads * tokens**2 * bytes_per_weight > LARGEST:
        return True
    measured = [record for record in records if record["encoder"] == name and record["seconds"] is not None]
    return bool(measured) and measured[-1]["seconds"] * (size / measured[-1]["size"]) ** 4 > SLOWEST


def _flops(module: nn.Module, maps: list[Tensor]) -> int:
    """Counted on the meta device where that works: nothing is computed, however large the matrices are."""
    if not isinstance(module, DeformableEncoder):  # its sampling does not run on the meta device
        module, maps = copy.deepcopy(module).to("meta"), [x.to("meta") for x in maps]
    return count_flops(module, maps)


def _memory(name: str, embed_dim: int, size: int, device: torch.device) -> int | None:
    """Peak memory of one call; on a CPU in a new process, see ``peak_memory``."""
    if device.type != "cpu":
        return peak_memory(partial(_call, _build(encoders(embed_dim)[name], device), _maps(size, device)), device)
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_memory_in_this_process, (name, embed_dim, size, torch.get_num_threads()))


def _memory_in_this_process(name: str, embed_dim: int, size: int, threads: int) -> int | None:
    torch.set_num_threads(threads)
    device = torch.device("cpu")
    module = _build(encoders(embed_dim)[name], device)
    _call(module, _maps(64, device))  # libraries allocate workspaces at the first call
    return peak_memory(partial(_call, module, _maps(size, device)), device)


def _page(records: Sequence[Record], names: Sequence[str], embed_dim: int, machine: str) -> str:
    sizes = sorted({record["size"] for record in records})
    by_key = {(record["encoder"], record["size"]): record for record in records}

    def table(cell: Callable[[Record, Record], str]) -> list[str]:
        rows = [[name, *(cell(by_key[name, size], by_key[REFERENCE, size]) for size in sizes)] for name in names]
        return markdown_table(["encoder", *map(str, sizes)], rows)

    costs = []
    for name in names:
        measured = [by_key[name, size] for size in sizes if by_key[name, size]["seconds"] is not None]
        parameters = f"{measured[0]['parameters'] / 1e6:.2f} M" if measured else "-"
        costs.append([name, parameters, *(_flops_cell(by_key[name, size]) for size in sizes)])
    lines = [
        "# Encoders",
        "",
        f"Maps of a ResNet-50 (strides 8, 16, 32), {embed_dim} channels, fp32, one image. Everything takes turns in "
        f"one run; medians. {machine}.",
        *_about_blocks(names, embed_dim),
        "",
        "Time, and its ratio to the hybrid encoder's:",
        "",
        *table(_time_cell),
        "",
        "Peak memory beyond weights and inputs, and its ratio to the hybrid encoder's:",
        "",
        *table(_memory_cell),
        "",
        *markdown_table(["encoder", "parameters", *(f"GFLOPs at {size}" for size in sizes)], costs),
        "",
        *_growth(by_key, sizes),
        "",
        "![time and memory by size](encoder.png)",
        "",
    ]
    return "\n".join(lines)


def _about_blocks(names: Sequence[str], embed_dim: int) -> list[str]:
    chosen = [f"{name.partition(', ')[2]} {_expansion(name, embed_dim):.3f}" for name in names if name in BLOCKS]
    if not chosen:
        return []
    return [f"For nearly equal FLOPs at {EQUAL_AT}, blocks of other kinds have this expansion: {', '.join(chosen)}."]


def _time_cell(record: Record, base: Record) -> str:
    return "left out" if record["seconds"] is None else f"{1000 * record['seconds']:.0f} ms ({record['ratio']:.2f})"


def _memory_cell(record: Record, base: Record) -> str:
    if not record.get("memory") or not base.get("memory"):
        return "-"
    return f"{record['memory'] / 2**20:.0f} MiB ({record['memory'] / base['memory']:.2f})"


def _flops_cell(record: Record) -> str:
    return "-" if record["seconds"] is None else f"{record['flops'] / 1e9:.1f}"


def _growth(by_key: Mapping[tuple[str, int], Record], sizes: Sequence[int]) -> list[str]:
    """How time grows with the number of tokens, if 640 and 1536 were measured."""
    if not {640, 1536} <= set(sizes):
        return []
    tokens = (1536 / 640) ** 2
    lines = [f"From 640 to 1536 there are {tokens:.2f} times as many tokens. Time grows by:", ""]
    for (name, size), record in by_key.items():
        base = by_key[name, 640]
        if size == 1536 and record["seconds"] and base["seconds"]:
            growth = record["seconds"] / base["seconds"]
            lines.append(f"- {name}: {growth:.2f}, {growth / tokens:.2f} of linear")
    return lines


def _plot(records: Sequence[Record], names: Sequence[str], path: Path) -> None:
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
                style = "^:" if name in BLOCKS else "o-" if name.startswith("hybrid") else "s--"
                axes.plot(*zip(*points), style, color=f"C{index}", label=name, ms=3)
        axes.set(xlabel="side of the image", ylabel=label, yscale="log", xscale="log")
        sizes = sorted({r["size"] for r in records})
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    lines, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside right upper", fontsize=8, frameon=False)
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
