"""Blocks without attention, without an MLP, or without either: nothing is left of what is gone, but its mean."""

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import onnx
import pytest
import timm
import torch
from command_line import answer, refusal
from conftest import MakeViT
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor

import lowpass
from lowpass.export.forecast.forecast import forecast_of
from lowpass.export.forecast.target import ForecastCosts, engine_kernels, parse_target
from lowpass.export.forecast.work import ENGINES, total_kernels, work_of
from lowpass.export.graph.deployable import deployable
from lowpass.export.graph.keep_fp32 import gone_layers
from lowpass.export.graph.last_block import LastBlock
from lowpass.export.onnx.export import export as export_verified
from lowpass.export.onnx.file import onnx_path
from lowpass.export.onnx.quantize import Quantization
from lowpass.export.options import ExportOptions, Precision
from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.data.datasets import Batches
from lowpass.pipeline.method.block_shape import BlockShape
from lowpass.pipeline.method.channels import ChannelChoice
from lowpass.pipeline.model.architecture import Architecture, check_blocks, read_blocks
from lowpass.pipeline.model.removal import remove_channels
from lowpass.pipeline.model.slim_vit import SlimViT
from lowpass.pipeline.model.whole_parts import Part, mean_added, remove_part
from lowpass.pipeline.run.images import quantization_batches, verification_batches
from lowpass.pipeline.run.metrics import Metrics
from lowpass.pipeline.search.channel_criteria import CHANNEL_CRITERIA, CriterionContext, low_frequency_sensitivity
from lowpass.pipeline.search.costs import Macs, total
from lowpass.pipeline.search.latency_table import LatencyTable
from lowpass.pipeline.search.log import SearchLog
from lowpass.pipeline.search.search import search
from lowpass.pipeline.search.settings import SearchSettings
from lowpass.pipeline.search.state import SearchState
from lowpass.pipeline.search.table import apply_table
from lowpass.pipeline.train.drop_path import dropped_paths

NO_ATTENTION = {"heads": 0, "qk_dim": 0, "v_dim": 0}
NO_MLP = {"hidden": 0}
NOTHING = NO_ATTENTION | NO_MLP


def cut_from(architecture: Architecture, gone: dict[int, dict[str, int]]) -> Architecture:
    """With parts of some blocks gone."""
    blocks = [
        BlockShape.model_validate(shape.model_dump() | gone.get(i, {})) for i, shape in enumerate(architecture.blocks)
    ]
    return Architecture.model_validate(architecture.model_dump() | {"blocks": [b.model_dump() for b in blocks]})


def images_for(slim: SlimViT, count: int = 4) -> Tensor:
    dense = slim.architecture.dense
    made = torch.randn(count, dense.in_chans, *dense.img_size, generator=torch.Generator().manual_seed(1))
    return made.to(next(slim.parameters()).dtype)


def entering(slim: SlimViT, images: Tensor, index: int) -> Tensor:
    tokens = slim.embed(images)
    for block in slim.blocks[:index]:
        tokens = block(tokens)
    return tokens


def adding_the_mean(slim: SlimViT, index: int, part: Part, added: Tensor) -> None:
    """The block's part adds a constant, in its own place."""
    block = slim.blocks[index]

    def mix(x: Tensor) -> tuple[Tensor, None]:
        return block.stream.add(x, added), None

    def feed(x: Tensor) -> Tensor:
        return block.stream.add(x, added)

    setattr(block, *(("mix", mix) if part == "attention" else ("feed", feed)))


MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "layer scale": {"init_values": 0.5},
    "CLIP": {"pre_norm": True},
    "mean of tokens": {"global_pool": "avg", "class_token": False},
    "registers without positions": {"reg_tokens": 2, "no_embed_class": True},
    "norms inside": {"scale_attn_norm": True, "scale_mlp_norm": True},
    "differential": {"attn_layer": "diff"},
    "distilled": {"kind": VisionTransformerDistilled},
}


def some_vit(make_vit: MakeViT, name: str) -> SlimViT:
    if name == "rotary":
        torch.manual_seed(0)
        model = timm.create_model("tiny_dinov3")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return SlimViT.from_timm(model).eval().double()
    return SlimViT.from_timm(make_vit(depth=3, **MODELS[name])).double()


@pytest.mark.parametrize("part", ["attention", "mlp"])
@pytest.mark.parametrize("name", [*MODELS, "rotary"])
@torch.no_grad()
def test_the_mean_stands_for_the_part(make_vit: MakeViT, name: str, part: Part) -> None:
    """Of the first, a middle and the last block: the logits are those of the dense model with its part replaced."""
    for index in (0, 1, 2):
        slim = some_vit(make_vit, name)
        images = images_for(slim)
        added = mean_added(slim, index, part, [entering(slim, images, index)])
        assert bool(added.abs().max() > 1e-3)
        expected = copy.deepcopy(slim)
        adding_the_mean(expected, index, part, added)
        taken = remove_part(slim, index, part, added)
        assert taken == (index if part == "mlp" else index - 1 if index else None)
        torch.testing.assert_close(slim(images), expected(images), rtol=0, atol=1e-10)
        gone = NO_ATTENTION if part == "attention" else NO_MLP
        assert slim.architecture == cut_from(expected.architecture, {index: gone})
        words = ("attn", "norm1", "ls1") if part == "attention" else ("mlp", "norm2", "ls2")
        assert not [k for k in slim.state_dict() for word in words if k.startswith(f"vit.blocks.{index}.{word}")]


@pytest.mark.parametrize("name", ["plain", "layer scale", "mean of tokens"])
@torch.no_grad()
def test_many_parts_one_after_the_other(make_vit: MakeViT, name: str) -> None:
    """All of the first block, attention of the second, the MLP of the third: constants pass what is gone already."""
    slim = some_vit(make_vit, name)
    images, expected = images_for(slim), copy.deepcopy(slim)
    parts: Sequence[tuple[int, Part, int | None]] = (
        (0, "attention", None),
        (0, "mlp", None),
        (1, "attention", None),
        (2, "mlp", 2),
    )
    for index, part, into in parts:
        added = mean_added(slim, index, part, [entering(slim, images, index)])
        adding_the_mean(expected, index, part, added)
        assert remove_part(slim, index, part, added) == into
        torch.testing.assert_close(slim(images), expected(images), rtol=0, atol=1e-10)
    assert not list(slim.blocks[0].parameters())


@torch.no_grad()
def test_a_channel_that_layer_scale_switches_off_takes_its_constant(make_vit: MakeViT) -> None:
    slim = some_vit(make_vit, "layer scale")
    slim.blocks[1].ls1.gamma[:5] = torch.tensor([0.0, 1e-9, -1e-8, 1e-7, 0.0])
    images, expected = images_for(slim), copy.deepcopy(slim)
    added = mean_added(slim, 1, "mlp", [entering(slim, images, 1)])
    adding_the_mean(expected, 1, "mlp", added)
    remove_part(slim, 1, "mlp", added)
    torch.testing.assert_close(slim(images), expected(images), rtol=0, atol=1e-10)


@torch.no_grad()
def test_a_block_without_an_mlp_drops_tokens(make_vit: MakeViT) -> None:
    """Chosen by attention alone, the constant is as good before the choice."""
    architecture = some_vit(make_vit, "plain").architecture
    torch.manual_seed(0)
    slim = SlimViT(architecture.model_copy(update={"token_criterion": "attention"})).eval().double()
    slim.set_keep(1, 9)
    images, expected = images_for(slim), copy.deepcopy(slim)
    added = mean_added(slim, 1, "mlp", [entering(slim, images, 1)])
    adding_the_mean(expected, 1, "mlp", added)
    assert remove_part(slim, 1, "mlp", added) == 1
    torch.testing.assert_close(slim(images), expected(images), rtol=0, atol=1e-10)
    with pytest.raises(ValueError, match="block 1 drops tokens, for which it needs its attention"):
        remove_part(slim, 1, "attention", added)
    with pytest.raises(ValueError, match="block 1 has no mlp"):
        remove_part(slim, 1, "mlp", added)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"heads": 0}, "heads is 0, qk_dim is 8, v_dim is 8: without attention all three are 0"),
        ({"heads": 0, "v_dim": 0, "qk_dim": 5}, "heads is 0, qk_dim is 5, v_dim is 0"),
        ({"qk_dim": 0}, "heads is 3, qk_dim is 0"),
        (NO_ATTENTION | {"keep": 15}, "block 1: keep is 15, but 16 image tokens enter it, and without attention"),
        ({"hidden": -1}, "hidden"),
        ({"keep": 0}, "keep"),
    ],
)
def test_tables_that_cannot_be(make_vit: MakeViT, tmp_path: Path, changes: dict[str, int], said: str) -> None:
    architecture = SlimViT.from_timm(make_vit()).architecture
    table = [shape.model_dump() for shape in architecture.blocks]
    table[1] |= changes
    path = tmp_path / "table.json"
    path.write_text(json.dumps({"blocks": table}))
    with pytest.raises(InputError, match=said):
        check_blocks(read_blocks(path), architecture.dense)


def test_tokens_cannot_be_dropped_without_attention(make_vit: MakeViT) -> None:
    architecture = cut_from(SlimViT.from_timm(make_vit(depth=3)).architecture, {1: NO_ATTENTION})
    slim = SlimViT(architecture)
    with pytest.raises(ValueError, match="without attention passes on all 16 image tokens, not 9"):
        slim.set_keep(1, 9)
    for keep in (9, 12, 16):  # fewer and more again: it passes on what reaches it
        slim.set_keep(0, keep)
        assert slim.architecture.blocks == architecture.with_keep(0, keep).blocks[:2] + slim.architecture.blocks[2:]
        assert slim.blocks[1].tokens_in == slim.blocks[1].keep == keep


@st.composite
def tables(draw: st.DrawFn, dense: Architecture) -> Architecture:
    """Any slim model, each part of each block there or not."""
    whole, tokens, blocks = dense.blocks[0], dense.dense.num_tokens, []
    for _ in dense.blocks:
        sizes = {name: draw(st.integers(1, getattr(whole, name))) for name in ("heads", "qk_dim", "v_dim", "hidden")}
        sizes |= NO_ATTENTION if draw(st.booleans()) else {}
        sizes |= NO_MLP if draw(st.booleans()) else {}
        tokens = draw(st.integers(1, tokens)) if sizes["heads"] else tokens
        blocks.append(BlockShape(**sizes, keep=tokens))
    check_blocks(tuple(blocks), dense.dense)
    return dense.model_copy(update={"blocks": tuple(blocks)})


@given(st.data())
@torch.no_grad()
def test_any_table_runs_and_its_macs_add_up(make_vit: MakeViT, data: st.DataObject) -> None:
    architecture = data.draw(tables(SlimViT.from_timm(make_vit(depth=3)).architecture))
    torch.manual_seed(0)
    slim = SlimViT(architecture).eval()
    assert slim.architecture == architecture
    assert slim(images_for(slim)).isfinite().all()
    dense, macs = architecture.dense, architecture.dense.end_macs()
    for index, (block, shape) in enumerate(zip(slim.blocks, architecture.blocks, strict=True)):
        tokens = architecture.tokens_in(index) + dense.num_prefix_tokens
        if block.has_attention:
            attention = block.attn
            rows = sum(layer.out_features for layer in (attention.query, attention.key, attention.value))
            macs += tokens * dense.embed_dim * (rows + attention.proj.in_features)
            macs += tokens * tokens * shape.heads * (shape.qk_dim + shape.v_dim)
        if block.has_mlp:
            macs += 2 * (shape.keep + dense.num_prefix_tokens) * dense.embed_dim * shape.hidden
        if block.scores_tokens:
            macs += architecture.selection_macs(architecture.tokens_in(index))
    assert architecture.macs() == macs


@given(st.data())
@settings(max_examples=15)
def test_saved_and_loaded(make_vit: MakeViT, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    slim = SlimViT(data.draw(tables(SlimViT.from_timm(make_vit(depth=3)).architecture))).eval()
    folder = tmp_path_factory.mktemp("slim")
    slim.save(folder)
    again = SlimViT.load(folder)
    assert again.architecture == slim.architecture
    assert torch.equal(again(images_for(slim)), slim(images_for(slim)))


@torch.no_grad()
def test_channels_of_the_other_part_go_as_before(make_vit: MakeViT) -> None:
    every = tuple(range(8))
    slim = some_vit(make_vit, "layer scale")
    for index, part in ((0, "attention"), (1, "mlp"), (2, "attention"), (2, "mlp")):
        remove_part(slim, index, part, torch.zeros(24))  # type: ignore[arg-type]
    images, expected = images_for(slim), copy.deepcopy(slim)
    hidden = tuple(range(40, 96))
    expected.blocks[0].mlp.fc1.weight[:40] = 0
    expected.blocks[0].mlp.fc1.bias[:40] = 0
    expected.blocks[1].attn.value.weight[:8] = 0
    expected.blocks[1].attn.value.bias[:8] = 0
    remove_channels(slim.blocks[0], ChannelChoice((), (), (), hidden))
    remove_channels(slim.blocks[1], ChannelChoice((1, 2), (every, every), (every, every), ()))
    remove_channels(slim.blocks[2], ChannelChoice((), (), (), ()))
    assert [b.shape.heads for b in slim.blocks] == [0, 2, 0] and [b.shape.hidden for b in slim.blocks] == [56, 0, 0]
    torch.testing.assert_close(slim(images), expected(images), rtol=0, atol=1e-10)
    with pytest.raises(ValueError, match="has no attention, of which 1"):
        remove_channels(slim.blocks[0], ChannelChoice((1,), (every,), (every,), hidden))
    with pytest.raises(ValueError, match="has an attention, of which 0"):
        remove_channels(slim.blocks[1], ChannelChoice((), (), (), ()))


SHAPE = {"heads": 3, "qk_dim": 32, "v_dim": 32, "hidden": 384, "keep": 64}
# The first block, one in the middle and the last, each without attention, and the same without an MLP; tokens go where
# there is an MLP and where there is none. The digits keep most of their top-1, which the verification of a file reads.
TABLES = {
    "attention": (
        NO_ATTENTION,
        {},
        {"keep": 47},
        NO_ATTENTION | {"keep": 47},
        {"keep": 47},
        NO_ATTENTION | {"keep": 47},
    ),
    "mlp": (NO_MLP, {}, NO_MLP | {"keep": 47}, NOTHING | {"keep": 47}, {"keep": 47}, NO_MLP | {"keep": 47}),
}


@pytest.fixture(scope="module", params=sorted(TABLES))
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compressed to a table with recovery, and fine-tuned for an epoch."""
    folder = tmp_path_factory.mktemp(request.param)
    table, directory = folder / "table.json", folder / "run"
    table.write_text(json.dumps({"blocks": [SHAPE | changes for changes in TABLES[request.param]]}))
    lowpass.compress("digits_deit", "digits", directory, architecture=table, score_images=128, seed=1)
    assert SlimViT.load(directory).architecture.blocks == read_blocks(table)
    before = Metrics.load(directory).slim
    assert before.top1 is not None and before.top1 > 60 and before.macs == SlimViT.load(directory).architecture.macs()
    lowpass.Run(directory).finetune(epochs=1)
    return directory


@pytest.fixture(scope="module")
def images(run: Path) -> Batches:
    return verification_batches(run, None)[0][:4]


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8", "int8-fp16", "fp8"])
def test_nothing_of_a_part_is_exported(run: Path, images: Batches, precision: Precision) -> None:
    calibration = None
    if precision not in ("fp32", "fp16", "bf16"):
        fitted, judging = quantization_batches(run, None)
        calibration = Quantization(fitted[:2], judging[:2])
    done = export_verified(run, ExportOptions(precision=precision), images, calibration=calibration)
    assert done.same_top1 == 100 if precision == "fp32" else done.same_top1 >= 97
    nodes = [node.name for node in onnx.load(onnx_path(run, precision)).graph.node]
    for index, shape in enumerate(SlimViT.load(run).architecture.blocks):
        own = [name.removeprefix(f"blocks.{index}.") for name in nodes if name.startswith(f"blocks.{index}.")]
        attention = [
            name for name in own if name.startswith(("attn", "norm1", "qkv", "query", "key", "proj", "weights"))
        ]
        assert bool(attention) == bool(shape.heads), attention
        assert any(name.startswith(("mlp", "norm2")) for name in own) == bool(shape.hidden)
        assert shape.heads or shape.hidden or not own


def test_an_older_opset(run: Path, images: Batches) -> None:
    for precision in ("fp32", "fp16"):
        done = export_verified(run, ExportOptions(precision=precision, opset=20), images)
        assert done.same_top1 == 100 if precision == "fp32" else done.same_top1 >= 99


def test_a_run_is_reported_and_its_layers_are_named(
    run: Path, images: Batches, capsys: pytest.CaptureFixture[str]
) -> None:
    told = answer(capsys, "evaluate", str(run))
    assert told["slim"]["top1"] > 60
    scoring = 64 * 64 * 96  # which the forecast leaves out
    assert answer(capsys, "forecast", str(run), "--gpu", "a100")["slim"]["macs"] == told["slim"]["macs"] - scoring
    answer(capsys, "report", str(run))
    gone = gone_layers(SlimViT.load(run).architecture.blocks)
    assert gone and "there is no such layer" in refusal(
        capsys, "export", str(run), "--precision", "fp16", "--keep-fp32", gone[0]
    )


@given(st.data())
@settings(max_examples=25)
@torch.inference_mode()
def test_any_table_is_deployed(make_vit: MakeViT, data: st.DataObject) -> None:
    """Where parts are gone at the end, or everywhere, no more tokens are computed than the classifier reads."""
    name = data.draw(st.sampled_from([name for name in MODELS if name not in ("distilled", "norms inside")]))
    architecture = some_vit(make_vit, name).architecture
    if architecture.dense.differential:  # whose heads cannot be thinned
        gone = data.draw(st.lists(st.sampled_from([{}, NO_ATTENTION, NO_MLP, NOTHING]), min_size=3, max_size=3))
        architecture = cut_from(architecture, dict(enumerate(gone)))
    else:
        architecture = data.draw(tables(architecture))
    torch.manual_seed(0)
    slim = SlimViT(architecture).eval()
    deployed = cast(SlimViT, deployable(slim))
    torch.testing.assert_close(deployed(images_for(slim)), slim(images_for(slim)), rtol=1e-5, atol=1e-5)
    if not (architecture.dense.reads_image_tokens or architecture.dense.differential):
        assert isinstance(deployed.vit.blocks[architecture.last_attention], LastBlock)
        assert deployed.vit.blocks(deployed.embed(images_for(slim))).shape[1] == 1


@pytest.mark.parametrize("gone", [{0: NO_ATTENTION, 2: NO_ATTENTION}, {1: NOTHING}, {2: NO_MLP}])
@torch.inference_mode()
def test_rotary_positions_are_deployed(make_vit: MakeViT, gone: dict[int, dict[str, int]]) -> None:
    architecture = cut_from(some_vit(make_vit, "rotary").architecture, gone)
    architecture = architecture.with_keep(0 if architecture.blocks[0].heads else 1, 40)
    torch.manual_seed(0)
    slim = SlimViT(architecture).eval()
    torch.testing.assert_close(deployable(slim)(images_for(slim)), slim(images_for(slim)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("gone", "fewer"),
    [
        ({1: NO_ATTENTION, 4: NO_MLP}, 7),
        ({0: NO_ATTENTION, 2: NO_MLP, 3: NO_ATTENTION, 5: NO_MLP}, 14),
        (
            {3: NO_ATTENTION, 4: NO_ATTENTION, 5: NO_ATTENTION},
            12,
        ),  # the last attention is then block 2's, for CLS alone
        ({5: NOTHING}, 7),
    ],
)
def test_an_engine_has_as_many_kernels_less_as_the_forecast_says(
    digits_slim: SlimViT, gone: dict[int, dict[str, int]], fewer: int
) -> None:
    """Four kernels an attention, three an MLP."""
    whole = digits_slim.architecture.model_copy(update={"token_score": "cls"})
    slim = cut_from(whole, gone)
    target = parse_target("forecast:a100", None, 1)
    said = {one: forecast_of("", work_of(one), target).batches[1].kernels for one in (whole, slim)}
    built = {one: total_kernels(engine_kernels(one, "fp16", 1)) for one in (whole, slim)}
    assert said[whole] - said[slim] == fewer == built[whole] - built[slim]
    assert built[slim] == pytest.approx(said[slim], rel=0.15)


@given(data=st.data(), engine=st.sampled_from(ENGINES), batch=st.sampled_from([1, 64]))
@settings(max_examples=25)
def test_parts_add_up_to_the_forecast(digits_slim: SlimViT, data: st.DataObject, engine: str, batch: int) -> None:
    slim = data.draw(tables(digits_slim.architecture))
    target = parse_target(f"forecast:l4:fp16:{engine}", None, batch)
    whole = forecast_of("slim", work_of(slim), target).batches[batch].ms
    assert total(ForecastCosts(slim, target), slim) == pytest.approx(whole, rel=1e-9)
    assert total(Macs(slim), slim) == slim.macs()


def test_what_searches_refuses_a_model_that_was_cut(digits_slim: SlimViT, tmp_path: Path) -> None:
    """Costs, criteria and recovery are those of whole blocks."""
    images, asked = [(images_for(digits_slim), torch.arange(4))], SearchSettings(target_macs=0.5)
    for gone, said in ((NO_ATTENTION, "block 3 has no attention"), (NO_MLP, "block 3 has no MLP")):
        slim = SlimViT(cut_from(digits_slim.architecture, {3: gone})).eval()
        with pytest.raises(InputError, match=said):
            search(slim, images, images, asked, tmp_path, cast(SearchLog, None))
        with pytest.raises(InputError, match=said):
            low_frequency_sensitivity(slim, images, 3)
        assert low_frequency_sensitivity(slim, images, 2).hidden.shape == (384,)  # others are scored as ever
        for criterion in CHANNEL_CRITERIA.values():
            with pytest.raises(InputError, match=said):
                criterion(
                    slim, [(torch.zeros(1, 65, 96), torch.zeros(1, 65, 96), images[0][1][:1])], 3, CriterionContext()
                )


@pytest.mark.parametrize("order", ["bottom-up", "top-down", "one-shot"])
@pytest.mark.parametrize("recovery", [True, False])
def test_a_table_is_applied_in_any_order(make_vit: MakeViT, tmp_path: Path, order: Any, recovery: bool) -> None:
    slim = SlimViT.from_timm(make_vit(depth=4, init_values=0.5))
    shape = slim.architecture.blocks[0].model_dump()
    table = [BlockShape(**shape | some) for some in (NO_ATTENTION, NO_MLP | {"heads": 2}, NOTHING, {"hidden": 40})]
    batches = [(torch.randn(8, 3, 16, 16), torch.arange(8) % 5)]
    asked = SearchSettings(order=order, recovery=recovery, score_images=8)
    state = SearchState(slim, batches, batches, asked, tmp_path)
    apply_table(state, table)
    assert slim.architecture.blocks == tuple(table)
    with torch.no_grad():  # what the search keeps of the images is what the model makes of them
        for kept, (images, _) in zip(state.clean, batches, strict=True):
            torch.testing.assert_close(kept, slim.vit.blocks(slim.embed(images)), rtol=0, atol=1e-4)


def test_skipped_paths_are_of_the_parts_that_are_there(make_vit: MakeViT) -> None:
    slim = SlimViT(cut_from(SlimViT.from_timm(make_vit()).architecture, {0: NO_ATTENTION, 1: NO_MLP})).train()
    with dropped_paths(slim, 0.5):
        assert [len(b.ls2._forward_hooks) for b in slim.blocks if b.has_mlp] == [1]
        assert [len(b.ls1._forward_hooks) for b in slim.blocks if b.has_attention] == [1]
        slim(images_for(slim)).sum().backward()
    assert all(parameter.grad is not None for parameter in slim.parameters())


def test_a_latency_table_of_whole_blocks_says_so(digits_slim: SlimViT) -> None:
    dense = digits_slim.architecture.dense
    table = LatencyTable.model_validate(
        {"dense": dense, "runtime": "r", "precision": "fp32", "batch": 1, "token_score": "cls", "machine": {}}
        | {"token_criterion": "attention", "ends_ms": 1.0, "tokens": (10, 65), "rows": (64, 192), "hidden": (32, 384)}
        | {"attention_ms": ((1.0, 2.0), (2.0, 3.0)), "mlp_ms": ((1.0, 2.0), (2.0, 3.0)), "selection_ms": (1.0, 2.0)}
        | {"last_ms": ((1.0, 1.0), (2.0, 2.0))}
    )
    whole = dense.blocks()[0]
    nothing = BlockShape(**whole.model_dump() | NOTHING)
    assert table.attention(65, nothing, last=False) == table.mlp(65, 0, last=False) == 0
    assert table.attention(65, whole, last=True) == 2.0
    with pytest.raises(InputError, match="knows the last block whole"):
        table.attention(65, nothing, last=True)
