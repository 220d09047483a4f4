"""Latency tables: what the parts of a model's blocks take on one runtime of this machine, for `--target-latency`.

Each part is exported as it is deployed, with random weights. Where positions are rotary, the tokens of a part that gets
all of them are in order; fewer have been chosen, and what they are turned by is looked up by their places.
"""

import copy
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lowpass.benchmarks.latency.part_graphs import places_of, repeat_part, with_places, with_tokens
from lowpass.benchmarks.latency.setup import (
    QUANTILE,
    TimingSetup,
    machine_of,
    noise,
    open_graph,
    refuse,
    warm,
    whole_session,
)
from lowpass.export.graph.deployable import deployable
from lowpass.export.graph.precision import AtPrecision
from lowpass.export.onnx.quantize import Quantization, quantize
from lowpass.export.onnx.trace import trace
from lowpass.export.options import Precision
from lowpass.export.runtimes.pytorch import TORCH, torch_session
from lowpass.export.runtimes.registry import RuntimeName
from lowpass.export.runtimes.session import Session
from lowpass.pipeline.base.progress import track
from lowpass.pipeline.method.block_shape import BlockShape
from lowpass.pipeline.model.architecture import Architecture, DenseViT
from lowpass.pipeline.model.slim_block import SlimBlock
from lowpass.pipeline.model.slim_vit import SlimViT
from lowpass.pipeline.search.latency_table import LatencyTable
from lowpass.pipeline.search.loss_curves import spread
from lowpass.pipeline.search.shaping import CACHE_WIDTH

TOKEN_COUNTS, HEAD_COUNTS, WIDTHS = 4, 5, 5  # points of the grid, at most
TOKEN_STEP, WIDTH_STEP = 8, 32  # what shapings align to
LINKS = 4  # parts in one graph: a call costs time of its own
ROUNDS = 10


class _Point(NamedTuple):
    """One latency to measure. `alone` is one attention, behind which `selecting` has the selection, and `closing` the
    last block."""

    part: Literal["attention", "mlp", "alone", "selecting", "closing", "ends"]
    tokens: int = 0
    size: int = 0


def measure_table(
    architecture: Architecture, runtime: RuntimeName, precision: Precision, batch: int, seconds: float = 0.3
) -> LatencyTable:
    """What the parts of a model's blocks take on a runtime.

    Args:
        architecture: of the dense model, with its token score; its blocks do not matter.
        runtime: any but `pytorch-compile`.
        precision: of the exported parts.
        batch: images at once.
        seconds: about how long each point of the grid is timed for.

    Raises:
        InputError: the runtime is missing here, or lacks the precision.
        RunError: it cannot run a part.
    """
    refuse(runtime, precision)
    whole = architecture.dense.blocks()[0]
    tokens, heads, hidden = grids(architecture.dense)
    outermost = (heads[0], heads[-1])
    points = len(tokens) * (len(heads) + len(hidden) + 2 + len(set(outermost))) + 1
    with torch.random.fork_rng(devices=[]), tempfile.TemporaryDirectory() as folder:
        setup = TimingSetup(runtime, precision, batch, Path(folder))
        opened = _sessions(architecture, setup, tokens, heads, hidden)
        sessions = dict(track(opened, f"building parts for {runtime}", total=points))
        ms = _timed(sessions, seconds)
    return LatencyTable(
        dense=architecture.dense,
        runtime=runtime,
        precision=precision,
        batch=batch,
        token_score=architecture.token_score,
        token_criterion=architecture.token_criterion,
        machine=machine_of(runtime),
        ends_ms=ms[_Point("ends")],
        tokens=tuple(tokens),
        rows=tuple(count * (whole.qk_dim + whole.v_dim) for count in heads),
        hidden=tuple(hidden),
        attention_ms=tuple(tuple(ms[_Point("attention", n, size)] / LINKS for size in heads) for n in tokens),
        mlp_ms=tuple(tuple(ms[_Point("mlp", n, size)] / LINKS for size in hidden) for n in tokens),
        selection_ms=tuple(max(0.0, ms[_Point("selecting", n)] - ms[_Point("alone", n)]) for n in tokens),
        last_ms=tuple(
            tuple(max(0.0, ms[_Point("closing", n, size)] - ms[_Point("alone", n)]) for size in outermost)
            for n in tokens
        ),
    )


def grids(dense: DenseViT) -> tuple[list[int], list[int], list[int]]:
    """The points of a table: tokens, heads and hidden widths."""
    whole = dense.blocks()[0]
    heads = spread(range(1, whole.heads + 1), HEAD_COUNTS)
    widths = [*(w for w in range(WIDTH_STEP, whole.hidden, WIDTH_STEP) if w % CACHE_WIDTH), whole.hidden]
    return token_grid(dense), heads, spread(widths, WIDTHS)


def token_grid(dense: DenseViT) -> list[int]:
    """Token counts to measure, prefix tokens included: from about a quarter to all, aligned but for the last."""
    whole = dense.num_tokens + dense.num_prefix_tokens
    least = max(whole // 4, dense.num_prefix_tokens + 2) // TOKEN_STEP * TOKEN_STEP
    aligned = [count for count in range(least, whole, TOKEN_STEP) if count >= dense.num_prefix_tokens + 2]
    return spread([*aligned, whole], TOKEN_COUNTS)


def _sessions(
    architecture: Architecture, setup: TimingSetup, tokens: Sequence[int], heads: Sequence[int], hidden: Sequence[int]
) -> Iterator[tuple[_Point, Session]]:
    """A warm session for every point."""
    dense = architecture.dense
    whole, prefix = dense.blocks()[0], dense.num_prefix_tokens

    def deployed(shape: BlockShape, image_tokens: int = whole.keep, keep: int = whole.keep) -> SlimViT:
        slim = _two_blocks(architecture, shape)
        slim.blocks[0].set_tokens(image_tokens, keep)
        return _model(deployable(slim, setup.precision))

    for size in heads:
        model = deployed(whole.model_copy(update={"heads": size}))
        part = _Attention(model.blocks[0])
        for count, session in _part_sessions(part, tokens, LINKS, dense, setup):
            yield _Point("attention", count, size), session
        if size == whole.heads:
            for count, session in _part_sessions(part, tokens, 1, dense, setup):
                yield _Point("alone", count), session
        if size in (heads[0], heads[-1]):
            closing = _Closing(deployed(whole).blocks[0], model.vit.blocks[-1])
            for count, session in _part_sessions(closing, tokens, 1, dense, setup):
                yield _Point("closing", count, size), session
    for size in hidden:
        mlp = _Mlp(deployed(whole.model_copy(update={"hidden": size})).blocks[0])
        for count, session in _part_sessions(mlp, tokens, LINKS, dense, setup):
            yield _Point("mlp", count, size), session
    for count in tokens:
        selecting = _Selecting(deployed(whole, count - prefix, (count - prefix) // 2).blocks[0])
        for _, session in _part_sessions(selecting, [count], 1, dense, setup):
            yield _Point("selecting", count), session
    ends = _Ends(deployed(whole))
    yield _Point("ends"), whole_session(AtPrecision(ends, setup.dtype), dense, setup, quantised=False)


def _two_blocks(architecture: Architecture, shape: BlockShape) -> SlimViT:
    """Any block but the last, and the last."""
    dense = architecture.dense.model_copy(update={"depth": 2})
    return SlimViT(architecture.model_copy(update={"dense": dense, "blocks": (shape, shape)}))


def _model(deployed: nn.Module) -> SlimViT:
    """What `deployable` made, in its precision from end to end."""
    model = deployed.model if isinstance(deployed, AtPrecision) else deployed
    assert isinstance(model, SlimViT)
    return model


class _Part(nn.Module):
    """Of a deployed block: tokens [B, T, C] -> tokens. `places` [B, T] are theirs in the image, where positions are
    rotary and tokens have been dropped."""

    def __init__(self, block: SlimBlock) -> None:
        super().__init__()
        self.block = block

    def forward(self, tokens: Tensor, places: Tensor | None = None) -> Tensor:
        return self.block.stream.tokens(self.run(tokens if places is None else (tokens, places)))

    def run(self, stream: Any) -> Any:
        """See `Stream`."""
        raise NotImplementedError


class _Attention(_Part):
    def run(self, stream: Any) -> Any:
        return self.block.mix(stream)[0]


class _Mlp(_Part):
    def run(self, stream: Any) -> Any:
        return self.block.feed(stream)


class _Selecting(_Part):
    """Without the places of the tokens that stay, which nobody reads here: few numbers beside the tokens."""

    def run(self, stream: Any) -> Any:
        return self.block.select(*self.block.mix(stream))


class _Closing(_Part):
    def __init__(self, block: SlimBlock, last: nn.Module) -> None:
        super().__init__(block)
        self.last = last

    def run(self, stream: Any) -> Any:
        return self.last(self.block.mix(stream)[0])


class _Chain(nn.Module):
    """Copies of a part in a row, each with weights of its own. `choices`: where positions are rotary and tokens have
    been dropped, of how many rows of the table each has one."""

    def __init__(self, part: _Part, links: int, choices: int | None) -> None:
        super().__init__()
        self.parts = nn.ModuleList(copy.deepcopy(part) for _ in range(links))
        self.choices = choices

    def forward(self, tokens: Tensor) -> Tensor:
        places = None if self.choices is None else places_of(tokens, self.choices)
        for part in self.parts:
            tokens = part(tokens, places)
        return tokens


class _Ends(nn.Module):
    def __init__(self, model: SlimViT) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model.classify(self.model.embed(images))


def _part_sessions(
    part: _Part, counts: Sequence[int], links: int, dense: DenseViT, setup: TimingSetup
) -> Iterator[tuple[int, Session]]:
    """Warm sessions on a chain of parts, by token count."""
    whole = dense.num_tokens + dense.num_prefix_tokens
    chosen = [count for count in counts if dense.rotary is not None and not isinstance(part, _Mlp) and count < whole]
    for some, choices in ((chosen, whole), ([count for count in counts if count not in chosen], None)):
        if some:
            yield from _chain_sessions(part, some, links, choices, dense.embed_dim, setup)


def _chain_sessions(
    part: _Part, counts: Sequence[int], links: int, choices: int | None, width: int, setup: TimingSetup
) -> Iterator[tuple[int, Session]]:
    """The same; see `_Chain` for `choices`. The part is exported once, at the last count."""
    if setup.runtime in TORCH:
        chain = AtPrecision(_Chain(part, links, choices), setup.dtype)
        for count in counts:
            yield count, warm(torch_session(setup.runtime, chain), noise(setup.batch, count, width))
        return
    example = torch.zeros(2, counts[-1], width, dtype=setup.dtype)
    if choices is None:
        traced = trace(part, example)
    else:
        traced = with_places(trace(part, example, places=torch.zeros(2, counts[-1], dtype=torch.int64)), choices)
    if setup.precision == "int8":
        traced, _ = quantize(traced, Quantization([noise(2, counts[-1], width)]))
    for count in counts:
        graph = repeat_part(with_tokens(traced, counts[-1], count), links, setup.dtype)
        yield count, warm(open_graph(graph, setup), noise(setup.batch, count, width))


def _timed(sessions: Mapping[_Point, Session], seconds: float) -> dict[_Point, float]:
    """Milliseconds of a run, at about `seconds` a session. All sessions take turns, so that a change of the machine's
    speed meets all of them."""
    order = list(sessions)
    cost = {point: min(_milliseconds(sessions[point]) for _ in range(2)) for point in order}
    runs = {point: max(1, round(1000 * seconds / ROUNDS / cost[point])) for point in order}
    timed: dict[_Point, list[float]] = {point: [] for point in order}
    for _ in track(range(ROUNDS), "timing parts"):
        for point in order:
            timed[point].extend(_milliseconds(sessions[point]) for _ in range(runs[point]))
        order.reverse()
    return {point: float(np.percentile(every, QUANTILE)) for point, every in timed.items()}


def _milliseconds(session: Session) -> float:
    began = time.perf_counter_ns()
    session.run()
    return (time.perf_counter_ns() - began) / 1e6


def as_markdown(table: LatencyTable) -> str:
    """For people: a line of what was measured, and a table with a row for each token count."""
    machine = table.machine
    where = machine["gpu"] if machine["gpu"] != "none" else f"{machine['cores']} cores of {machine['cpu']}"
    columns = [
        "tokens",
        "selection",
        *(f"attention, {size} rows" for size in table.rows),
        *(f"MLP, {size} wide" for size in table.hidden),
        "last block, smallest",
        "largest",
    ]
    lines = [
        f"{table.dense.name}, {machine['runtime']}, {table.precision}, batch {table.batch}, on {where}: milliseconds "
        f"of one block's parts, tokens scored by `{table.token_score}`. "
        f"Embedding and classifier: {table.ends_ms:.3g} ms.",
        "",
        f"| {' | '.join(columns)} |",
        f"|{'--:|' * len(columns)}",
    ]
    for row, count in enumerate(table.tokens):
        figures = [table.selection_ms[row], *table.attention_ms[row], *table.mlp_ms[row], *table.last_ms[row]]
        lines.append(f"| {count} | {' | '.join(f'{ms:.3g}' for ms in figures)} |")
    return "\n".join(lines) + "\n"
