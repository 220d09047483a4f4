"""The numbers of the authors' released implementation, computed once and kept in `data/`."""

from pathlib import Path

import numpy as np
import pytest
import torch
from timm.models import VisionTransformer

from lowpass.pipeline.checkpoints.state_dict import read_weights
from lowpass.pipeline.method.channels import ChannelChoice, choose_channels
from lowpass.pipeline.method.frequency import lowpass_images
from lowpass.pipeline.method.sensitivity import ChannelScores
from lowpass.pipeline.method.token_scores import kept_indices, token_scores
from lowpass.pipeline.search.channel_criteria import low_frequency_sensitivity

DATA = Path(__file__).parent / "data"
HEADS, WIDTH = 3, 48


@pytest.fixture(scope="module")
def lfs() -> dict[str, np.ndarray]:
    with np.load(DATA / "lfs.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def scores(lfs: dict[str, np.ndarray]) -> ChannelScores:
    """Our LFS of the authors' model, images and settings."""
    model = VisionTransformer(
        img_size=32, patch_size=4, embed_dim=WIDTH, depth=3, num_heads=HEADS, num_classes=10, init_values=1.0
    )
    model.load_state_dict(read_weights(DATA / "lfs_model.pth").state)
    size = int(lfs["batch_size"])
    batches = zip(torch.from_numpy(lfs["images"]).split(size), torch.from_numpy(lfs["labels"]).split(size), strict=True)
    return low_frequency_sensitivity(
        model.eval(), batches, int(lfs["block"]), float(lfs["cutoff"]), float(lfs["lfs_lambda"])
    )


@pytest.mark.parametrize("case", [0, 1])
def test_token_selection(case: int) -> None:
    with np.load(DATA / "selection.npz") as file:
        tokens, attention, expected, index = (
            torch.from_numpy(file[f"{name}_{case}"]) for name in ("x", "attn", "score", "index")
        )
        keep, cutoff = int(file[f"keep_{case}"]), 1 - float(file[f"cutoff_{case}"])
    score = token_scores(tokens[:, 1:], attention, cutoff, norm="l1")
    # The released code takes the modulus of a slightly complex result, so single scores differ a little.
    torch.testing.assert_close(score, expected, rtol=0.02, atol=0)
    torch.testing.assert_close(score.mean(), expected.mean(), rtol=0.005, atol=0)
    assert torch.equal(kept_indices(score, keep), index)


def test_lowpass_images(lfs: dict[str, np.ndarray]) -> None:
    filtered = lowpass_images(torch.from_numpy(lfs["images"]), float(lfs["cutoff"]))
    torch.testing.assert_close(filtered, torch.from_numpy(lfs["filtered"]), rtol=0, atol=1e-6)


def test_channel_sensitivity(lfs: dict[str, np.ndarray], scores: ChannelScores) -> None:
    query, key, value = np.split(lfs["qkv_score"], 3)  # head by head in each; query and key hold the shared sum
    for ours, theirs in (
        (scores.query_key, query),
        (scores.query_key, key),
        (scores.value, value),
        (scores.hidden, lfs["fc1_score"]),
    ):
        flat = ours.flatten().numpy()
        np.testing.assert_allclose(flat, theirs, rtol=1e-3)
        assert _rank_correlation(flat, theirs) > 0.9999


@pytest.mark.parametrize("case", range(4))
def test_channel_choice(case: int, lfs: dict[str, np.ndarray], scores: ChannelScores) -> None:
    choice = choose_channels(scores, int(lfs[f"n_prune_{case}"]))
    query, key, value = np.split(lfs[f"qkv_keep_{case}"].reshape(-1, HEADS, WIDTH // HEADS), 3)
    assert len(choice.heads) == int(lfs[f"heads_{case}"])
    assert choice.heads == tuple(np.flatnonzero(query[0].any(1)))
    pairs, values, hidden = _masks(choice, len(scores.hidden))
    np.testing.assert_array_equal(pairs, query[0])
    np.testing.assert_array_equal(pairs, key[0])
    np.testing.assert_array_equal(values, value[0])
    np.testing.assert_array_equal(hidden, lfs[f"fc1_keep_{case}"])


def _masks(choice: ChannelChoice, num_hidden: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What stays, as the authors' code marks it: [H, D], [H, D], [M]."""
    pairs, values = np.zeros((2, HEADS, WIDTH // HEADS), bool)
    for head, kept_pairs, kept_values in zip(choice.heads, choice.query_key, choice.value, strict=True):
        pairs[head, list(kept_pairs)] = True
        values[head, list(kept_values)] = True
    hidden = np.zeros(num_hidden, bool)
    hidden[list(choice.hidden)] = True
    return pairs, values, hidden


def _rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's."""
    return float(np.corrcoef(a.argsort().argsort(), b.argsort().argsort())[0, 1])
