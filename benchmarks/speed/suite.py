"""The speed benchmark: lowpass against its rivals at matched MACs, on every runtime there is.

    python -m lowpass.benchmarks.speed --suite paper                    DeiT-Tiny, -Small, -Base
    python -m lowpass.benchmarks.speed --suite gpu                      the one script for a GPU machine
    python -m lowpass.benchmarks.speed --suite gpu --device cpu         whether that script runs at all

Weights are random: shapes are static, so that a latency does not hang on them. Every model's logits are checked against
its own FP32 PyTorch module at the first batch size that is timed. Results are written after every batch size, so that a
kill leaves what is done. What cannot run or does not fit into the time is written down as not measured, and why.
"""

import shlex
import sys
import time
from pathlib import Path

from lowpass.benchmarks.latency.machine import describe
from lowpass.benchmarks.rows import write_rows
from lowpass.benchmarks.speed.candidates import candidates
from lowpass.benchmarks.speed.measure import measure_engine
from lowpass.benchmarks.speed.measured import EngineResult, ModelResult, Suite
from lowpass.benchmarks.speed.plans import Plan
from lowpass.benchmarks.speed.result_rows import rows
from lowpass.benchmarks.speed.sessions import Files
from lowpass.pipeline.base.errors import RunError
from lowpass.pipeline.base.progress import console


def run_suite(name: str, out: Path, plan: Plan) -> Suite:
    """Measure, and write `speed_NAME.csv` and a plot a model into `out`.

    Raises:
        InputError: the plan names a model or a candidate that there is not.
        RunError: nothing at all could be timed, though there was time.
    """
    began = time.monotonic()
    deadline = None if plan.limit_s is None else began + plan.limit_s
    machine, results = describe(), dict[str, ModelResult]()

    def tell(line: str) -> None:
        console.print(f"{time.monotonic() - began:6.1f} s  {line}", soft_wrap=True)

    def write() -> Suite:
        so_far = Suite(
            suite=name,
            command=shlex.join(["python", "-m", "lowpass.benchmarks.speed", *sys.argv[1:]]),
            seconds=time.monotonic() - began,
            machine=machine,
            models=results,
            note=plan.note,
        )
        write_rows(out / f"speed_{name}.csv", rows(so_far), so_far.machine, so_far.command)
        return so_far

    for model in plan.models:
        rivals = candidates(model, plan.names)
        files: Files = {}
        results[model] = ModelResult(macs={rival.name: rival.macs for rival in rivals}, engines=[])
        engines = results[model].engines
        for engine in plan.engines:
            late = deadline is not None and time.monotonic() > deadline
            reason = plan.reason_against(engine) or ("out of time" if late else None)
            tell(f"{model}: {' '.join(engine)}: {reason or 'measuring'}")
            engines.append(EngineResult(runtime=engine[0], precision=engine[1], not_measured=reason))
            if reason is None:
                for engines[-1] in measure_engine(rivals, engine, plan, files, deadline, tell):
                    write()
        write()
        _plot(results[model], model, out / f"speed_{name}_{model}.png")
    done = write()
    tell(f"done: {out / f'speed_{name}.csv'}")
    tried = [engine for result in results.values() for engine in result.engines if engine.description is not None]
    if tried and not any(engine.batches for engine in tried) and (deadline is None or time.monotonic() < deadline):
        raise RunError(f"nothing could be timed; {out / f'speed_{name}.csv'} says why")
    return done


def _plot(result: ModelResult, model: str, path: Path) -> None:
    try:
        from lowpass.benchmarks.speed.plot import plot_efficiency
    except ImportError:  # a machine that is lent for ten minutes has torch, and little else
        console.print(f"  no {path}: matplotlib is not installed", soft_wrap=True)
        return
    plot_efficiency(result, model, path)
