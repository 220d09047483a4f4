"""Results as flat CSV, a row a figure: what it is of, its name and value, and how it came about."""

import csv
import io
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lowpass.benchmarks.latency.machine import Machine
from lowpass.benchmarks.latency.timing import Latency
from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.base.files import write_text

FIGURE = ("figure", "value", "low", "high")
ORIGIN = ("machine", "versions", "commit", "command")
RESULTS = Path("benchmarks/results")


@dataclass(frozen=True)
class Origin:
    """How a figure came about, a text each; `commit` of the code, empty where it runs from no checkout of its own."""

    machine: str
    versions: str
    commit: str
    command: str


@dataclass(frozen=True)
class Row:
    """One figure. `of` says what it is of, such as a model, a runtime and a batch size; `low` and `high` are its
    spread, as the study's README says. A figure that is a text is a reason, such as why something was not measured.
    `origin`, where it is another than the file's."""

    of: Mapping[str, object]
    figure: str
    value: float | int | str
    low: float | None = None
    high: float | None = None
    origin: Origin | None = None


def origin_of(machine: Machine, command: str, commit: str | None = None) -> Origin:
    """Of what `machine` measures by `command`; `commit` None: the one checked out here, if any."""
    return Origin(_machine(machine), _versions(machine), checked_out() if commit is None else commit, command)


def write_rows(path: Path, rows: Iterable[Row], machine: Machine, command: str, commit: str | None = None) -> None:
    """Write a study's CSV, whole.

    Args:
        path: the file.
        rows: they share the keys of `of`, in their order; a key that one lacks stays empty.
        machine: that measured them.
        command: that measured them.
        commit: of the code; None: the one checked out here, if any.
    """
    found = list(rows)
    keys = list(dict.fromkeys(key for row in found for key in row.of))
    own = origin_of(machine, command, commit)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*keys, *FIGURE, *ORIGIN])
    for row in found:
        spread = ("" if bound is None else _number(bound) for bound in (row.low, row.high))
        origin = (getattr(row.origin or own, name) for name in ORIGIN)
        writer.writerow([*(row.of.get(key, "") for key in keys), row.figure, _number(row.value), *spread, *origin])
    write_text(path, text.getvalue())


def read_rows(path: Path) -> list[dict[str, str]]:
    """A study's rows, as written.

    Raises:
        InputError: there is no such file, or it is none of ours.
    """
    try:
        rows = list(csv.DictReader(io.StringIO(path.read_text())))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    if not rows or not {*FIGURE, *ORIGIN} <= set(rows[0]):
        raise InputError(f"{path} is not a table of results; it should have the columns {', '.join(FIGURE + ORIGIN)}")
    return rows


def kept_rows(path: Path, but: Mapping[str, str]) -> list[Row]:
    """A study's rows with their origins, without those that are of `but` and are about to be measured anew; none where
    there is no study yet.

    Raises:
        InputError: the file is none of ours.
    """
    if not path.exists():
        return []
    return [_read(row) for row in read_rows(path) if any(row.get(key) != value for key, value in but.items())]


def _read(row: Mapping[str, str]) -> Row:
    """A row as it was written, to be written again: its value stays the text it is."""
    low, high = (float(row[bound]) if row[bound] else None for bound in ("low", "high"))
    of = {key: value for key, value in row.items() if key not in FIGURE + ORIGIN and value}
    return Row(of, row["figure"], row["value"], low, high, Origin(*(row[name] for name in ORIGIN)))


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]], left: int = 1) -> str:
    """A table for people; the first `left` columns are words, the others numbers."""
    rules = ["---"] * left + ["--:"] * (len(header) - left)
    rows = [f"| {' | '.join(cells)} |" for cells in (header, *lines)]
    return "\n".join([rows[0], f"|{'|'.join(rules)}|", *rows[1:]])


def _number(value: float | int | str) -> str:
    return value if isinstance(value, str) else repr(value)


def _machine(machine: Machine) -> str:
    units = ", ".join(machine.matrix_units) or "no matrix units"
    where = f"{machine.cpu}, {machine.cores} cores ({units}), {machine.threads['torch']} threads of torch"
    if machine.gpu is None:
        return f"{where}, no GPU"
    state = machine.gpu_state
    facts = {
        "driver": state.driver,
        "SM clock at most, MHz": state.max_sm_clock_mhz,
        "power limit, W": state.power_limit_w,
    }
    return ", ".join([where, machine.gpu, *(f"{name} {fact}" for name, fact in facts.items() if fact is not None)])


def _versions(machine: Machine) -> str:
    packages = {"python": machine.python, **machine.packages, **machine.tensorrt}
    if machine.gpu is not None and machine.cuda is not None:
        packages["CUDA of torch"] = machine.cuda
    return "; ".join(f"{name} {version}" for name, version in packages.items())


def checked_out() -> str:
    """The commit of the code that runs, shortened; nothing where it runs from no checkout of its own."""
    git = shutil.which("git")
    if git is None:
        return ""
    here = Path(__file__).resolve()

    def answer(*question: str) -> str | None:
        command = [git, "-C", str(here.parent), *question]
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - a list, no shell
        return done.stdout.strip() if done.returncode == 0 else None

    # Installed inside somebody else's repository, its commit is not ours.
    tracked = answer("ls-files", "--error-unmatch", here.name)
    return (answer("rev-parse", "--short", "HEAD") or "") if tracked else ""


def latency_rows(of: Mapping[str, object], latency: Latency) -> Iterator[Row]:
    """The percentiles of one model at one batch size."""
    for figure in ("p50_ms", "p90_ms", "p99_ms", "images_per_s", "runs"):
        yield Row(of, figure, getattr(latency, figure))
