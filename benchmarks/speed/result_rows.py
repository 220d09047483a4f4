"""What the speed benchmark found, a row a figure."""

from collections.abc import Iterator

from lowpass.benchmarks.rows import Row, latency_rows
from lowpass.benchmarks.speed.measured import Suite


def rows(done: Suite) -> Iterator[Row]:
    """Every figure of every candidate; speed-ups with quartiles over the rounds, and why something was not measured."""
    if done.note is not None:
        yield Row({}, "note", done.note)
    for model, result in done.models.items():
        for name, macs in result.macs.items():
            yield Row({"model": model, "candidate": name}, "macs", macs)
        for engine in result.engines:
            at = {"model": model, "runtime": engine.runtime, "precision": engine.precision}
            if engine.not_measured:
                yield Row(at, "not_measured", engine.not_measured)
            for name, size in engine.file_bytes.items():
                yield Row({**at, "candidate": name}, "file_bytes", size)
            for name, memory in engine.peak_memory_mib.items():
                if memory is not None:
                    yield Row({**at, "candidate": name}, "peak_memory_mib", memory)
            for batch, figures in engine.batches.items():
                if (clock := engine.sm_clock_mhz.get(batch)) is not None:
                    yield Row({**at, "batch": batch}, "sm_clock_mhz", clock)
                for name, one in figures.items():
                    of = {**at, "batch": batch, "candidate": name}
                    yield from latency_rows(of, one.latency)
                    if one.speedup is not None and one.speedup_quartiles is not None and one.efficiency is not None:
                        yield Row(of, "speedup", one.speedup, *one.speedup_quartiles)
                        yield Row(of, "efficiency", one.efficiency)
