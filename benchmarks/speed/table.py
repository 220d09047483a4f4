"""The speed benchmark as tables that a person can read."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lowpass.benchmarks.speed.suite import EngineResult, ModelResult, Suite


def as_markdown(done: "Suite") -> str:
    """One table a model and runtime, with the machine on top."""
    machine = done.machine
    lines = [
        f"# {done.suite} suite",
        "",
        f"`{done.command}`, {done.seconds / 60:.1f} minutes on {machine.cpu}, {machine.cores} cores "
        f"({', '.join(machine.matrix_units) or 'no matrix units'}), {machine.gpu or 'no GPU'}; "
        + ", ".join(f"{name} {version}" for name, version in (machine.packages | machine.tensorrt).items()),
        "",
        "Medians of interleaved rounds. *Efficiency*: the speed-up over dense in the same runtime and precision, "
        "divided by dense MACs over the model's. Random weights. Peak memory is what loading and running batch 8 adds "
        "to a process.",
    ]
    for model, result in done.models.items():
        lines += ["", f"## {model}", "", *_macs(result)]
        for engine in result.engines:
            lines += ["", f"### {model}: {engine.runtime} {engine.precision}", ""]
            if engine.not_measured:
                lines += [f"Not measured: {engine.not_measured}", ""]
            if engine.batches:
                lines += _engine(engine)
    return "\n".join(lines) + "\n"


def _macs(result: "ModelResult") -> list[str]:
    dense = result.macs["dense"]
    return [
        "| | " + " | ".join(result.macs) + " |",
        "|---|" + "--:|" * len(result.macs),
        "| MACs | " + " | ".join(f"{macs / 1e9:.2f} G" for macs in result.macs.values()) + " |",
        "| share of dense | " + " | ".join(f"{macs / dense:.3f}" for macs in result.macs.values()) + " |",
    ]


def _engine(engine: "EngineResult") -> list[str]:
    rows = [
        "| batch | model | p50 ms | p90 ms | p99 ms | img/s | speed-up (quartiles) | efficiency | file MB | peak MiB |",
        "|--:|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for batch, figures in engine.batches.items():
        for name, one in figures.items():
            low, high = one.speedup_quartiles
            size, memory = engine.file_bytes.get(name), engine.peak_memory_mib.get(name)
            cells = [
                str(batch),
                name,
                *(f"{ms:.2f}" for ms in (one.latency.p50_ms, one.latency.p90_ms, one.latency.p99_ms)),
                f"{one.latency.images_per_s:.1f}",
                f"{one.speedup:.2f}x ({low:.2f} to {high:.2f})",
                f"**{one.efficiency:.2f}**",
                "-" if size is None else f"{size / 1e6:.1f}",
                "-" if memory is None else f"{memory:.0f}",
            ]
            rows.append("| " + " | ".join(cells) + " |")
    return rows
