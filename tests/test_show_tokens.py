"""What is drawn of the tokens that stay is what the model passes on."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import lowpass
from lowpass.benchmarks.real.show import write_pictures
from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.data.digits import DigitScenes
from lowpass.pipeline.model.slim_vit import SlimViT
from lowpass.pipeline.run.compress import compress
from lowpass.pipeline.run.recipe import make_recipe
from lowpass.pipeline.run.show_tokens import GAP, PAINT, SHINES_THROUGH, SIDE, kept_tokens


@pytest.fixture(scope="module")
def slim(digits_slim: SlimViT) -> SlimViT:
    slim = copy.deepcopy(digits_slim)
    slim.set_keep(1, 40)
    slim.set_keep(4, 12)
    return slim


def picture(seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(60, 200, (32, 32, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_a_mask_says_what_is_passed_on(slim: SlimViT) -> None:
    """Tokens that are out of a mask can be anything: later blocks never see them. Those inside cannot."""
    scenes = DigitScenes("test")
    images = torch.stack([scenes[i][0] for i in range(6)])
    stages = kept_tokens(slim, images)
    assert [(index, mask.sum(1).tolist()) for index, mask in stages] == [(1, [40] * 6), (4, [12] * 6)]
    assert not bool((stages[1][1] & ~stages[0][1]).any())  # what is gone does not come back
    with torch.no_grad():
        tokens = slim.embed(images)
        for block in slim.blocks[:2]:
            before, (middle, weights) = tokens, block.mix(tokens)
            scores = block.scores(middle, weights) if block.scores_tokens else None
            tokens = block(tokens)
    assert scores is not None and before.shape[1] == 65
    best = [set(row.topk(40).indices.tolist()) for row in scores]
    assert [set(mask.nonzero().flatten().tolist()) for mask in stages[0][1]] == best


def test_the_sheet_shows_it(slim: SlimViT) -> None:
    pictures = [picture(0), picture(1)]
    sheet = np.asarray(lowpass.show_tokens(slim, pictures)).astype(float)
    side = -(-SIDE // 32) * 32
    assert sheet.shape == (2 * side + GAP, 3 * side + 2 * GAP, 3)
    whole = sheet[:side, :side]
    np.testing.assert_allclose(whole[::7, ::7], np.asarray(pictures[0], float), atol=1)
    for stage, kept in ((1, 40), (2, 12)):
        shown = sheet[:side, stage * (side + GAP) : stage * (side + GAP) + side]
        painted = SHINES_THROUGH * whole + (1 - SHINES_THROUGH) * 255 * PAINT
        patches = lambda image: image.reshape(8, side // 8, 8, side // 8, 3).swapaxes(1, 2).reshape(64, -1)  # noqa: E731
        same = np.abs(patches(shown) - patches(whole)).max(1) < 1
        gone = np.abs(patches(shown) - patches(painted)).max(1) <= 1
        assert same.sum() == kept and (same ^ gone).all()


def test_what_cannot_be_shown_is_refused(digits_slim: SlimViT, slim: SlimViT, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="drops no tokens"):
        lowpass.show_tokens(digits_slim, [picture(0)])
    with pytest.raises(InputError, match="at least one image"):
        lowpass.show_tokens(slim, [])
    with pytest.raises(InputError, match=r"no\.png"):
        lowpass.show_tokens(slim, [tmp_path / "no.png"])
    with pytest.raises(InputError, match=r"architecture\.json"):
        lowpass.show_tokens(tmp_path, [picture(0)])


def test_a_run_directory_will_do(slim: SlimViT, tmp_path: Path) -> None:
    slim.save(tmp_path)
    file = tmp_path / "picture.png"
    picture(0).resize((50, 40)).save(file)
    assert lowpass.show_tokens(tmp_path, [file]).size[1] == SIDE


def test_a_search_is_drawn(slim: SlimViT, tiny_source: dict[str, object], tmp_path: Path) -> None:
    """Of a run that was searched to a target; of anything else the reason is said."""
    few = {"target_macs": 0.5, "score_images": 32, "measure_images": 32}
    run = tmp_path / "run"
    compress(make_recipe(data="digits", **few, **tiny_source), run)
    pictures = tmp_path / "val"
    for kind in ("one", "two"):
        (pictures / kind).mkdir(parents=True)
        picture(0).save(pictures / kind / "picture.png")
    written = write_pictures(run, pictures, tmp_path / "drawn")
    assert written[0].name == "blocks.png"
    assert all(Image.open(path).size[0] > 100 for path in written)
    slim.save(tmp_path)
    with pytest.raises(InputError, match=r"search\.jsonl"):
        write_pictures(tmp_path, pictures, tmp_path / "drawn")
    with pytest.raises(InputError, match="no folders of pictures"):
        write_pictures(run, tmp_path / "none", tmp_path / "drawn")
