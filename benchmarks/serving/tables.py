"""The tables of the serving benchmarks."""

from pathlib import Path
from statistics import median

from lowpass.benchmarks.lookups import different, number, one, study
from lowpass.benchmarks.rows import markdown


def serving(results: Path) -> str:
    """Throughput and overhead behind one server."""
    rows = study(results, "serving")
    lines = []
    for (model,) in different(rows, "model"):
        for images in ("1", "8"):
            best = {
                kind: max(
                    float(row["value"])
                    for row in rows
                    if row["figure"] == "images_per_s"
                    and (row["model"], row["candidate"], row["load"]) == (model, kind, "closed")
                    and row["request_images"] == images
                )
                for kind in ("dense", "slim", "slim int8")
            }
            cost = [
                number(one(rows, "overhead_percent", model=model, candidate=kind, request_images=images), "{:+.1f}%")
                for kind in best
            ]
            gains = [f"{best[kind] / best['dense']:.2f}x" for kind in ("slim", "slim int8")]
            lines.append([model, images, *(f"{rate:.1f}" for rate in best.values()), *gains, *cost])
    header = ["model", "images a request", *(f"{kind} images/s" for kind in best), "gain", "in INT8"]
    header += [f"server's cost, {kind}" for kind in best]
    return markdown(header, lines)


def serving_floods(results: Path) -> str:
    """Twice the requests that can be answered."""
    rows = [row for row in study(results, "serving") if row["load"] == "flood"]
    lines = []
    for model, kind in different(rows, "model", "candidate"):
        of = {"model": model, "candidate": kind}
        figures = (("capacity", "{:.1f}"), ("offered", "{:.1f}"), ("goodput", "{:.1f}"), ("p99_ms", "{:.0f}"))
        cells = [number(one(rows, figure, **of), form) for figure, form in (*figures, ("recovery_s", "{:.2f}"))]
        peak, before = (float(number(one(rows, figure, **of), "{}")) for figure in ("bytes_peak", "bytes_before"))
        kept = one(rows, "kept", **of)
        spread = (
            "-"
            if kept is None
            else f"{float(kept['value']):.2f} ({float(kept['low']):.2f} to {float(kept['high']):.2f})"
        )
        cells += [f"{peak / before:.2f}", spread, number(one(rows, "kept_a_core", **of), "{:.2f}")]
        lines.append([model, kind, *cells])
    header = ["model", "candidate", "capacity, requests/s", "offered", "answered", "p99 ms", "well again after s"]
    return markdown([*header, "memory, of before", "of capacity (turns)", "the same, a core left by clients"], lines, 2)


SOAKED = (
    ("server_bytes", 2**20, "MiB of the server"),
    ("server_files", 1, "files open in the server"),
    ("own_bytes", 2**20, "MiB of who supervises and asks"),
    ("own_files", 1, "files open there"),
    ("shared_regions", 1, "files in /dev/shm"),
)


def serving_soak(results: Path) -> str:
    """What each soak came to; of what was sampled, the medians of its first and of its last third."""
    rows = study(results, "serving_soak")
    seeds = [seed for (seed,) in different(rows, "seed")]
    counted = [what for (what,) in different([row for row in rows if row["figure"] == "times"], "what")]
    lines = [
        [what, *(number(one(rows, "times", seed=seed, what=what), "{:.0f}") for seed in seeds)] for what in counted
    ]
    for figure, unit, name in SOAKED:
        thirds = []
        for seed in seeds:
            values = [float(row["value"]) / unit for row in rows if (row["figure"], row["seed"]) == (figure, seed)]
            part = len(values) // 3
            thirds.append(f"{median(values[:part]):.0f}, {median(values[-part:]):.0f}" if part else "-")
        lines.append([name, *thirds])
    return markdown(["what", *(f"seed {seed}" for seed in seeds)], lines, 1)


def serving_pictures(results: Path) -> str:
    """Pictures a second by who prepares them."""
    rows = study(results, "serving_pictures")
    lines = []
    for model, together in different(rows, "model", "request_images"):
        of = {"model": model, "request_images": together}
        ways = [number(one(rows, "images_per_s", prepared_by=way, **of), "{:.1f}") for way in ("client", "server")]
        cost = one(rows, "cost_percent", prepared_by="server", **of)
        spread = "-" if cost is None else f"({float(cost['low']):+.1f} to {float(cost['high']):+.1f})"
        lines.append([model, together, *ways, f"{number(cost, '{:+.1f}%')} {spread}"])
    header = ["model", "pictures a request", "by the client, pictures/s", "by the server", "server's cost (quartiles)"]
    return markdown(header, lines)
