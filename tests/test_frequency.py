"""The two low-pass filters against their formulas, written out plainly with a full complex FFT."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lowpass.pipeline.method.frequency import lowpass_images, token_lowpass_matrix

sizes = st.integers(1, 13)
seeds = st.integers(0, 2**16)
image_cutoffs = st.floats(0.02, 2.0)
token_cutoffs = st.floats(0.05, 0.95)
token_counts = st.integers(1, 40)


def images(seed: int, height: int, width: int) -> Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(seed))


@given(seeds, sizes, sizes, image_cutoffs)
def test_images_equal_the_full_fft(seed: int, height: int, width: int, cutoff: float) -> None:
    plain = images(seed, height, width)
    rows, columns = np.meshgrid(np.fft.fftfreq(height), np.fft.fftfreq(width), indexing="ij")
    gain = np.exp(-(rows**2 + columns**2) / (2 * (cutoff / 2) ** 2))
    expected = np.fft.ifft2(np.fft.fft2(plain.double().numpy()) * gain)
    assert np.abs(expected.imag).max() < 1e-12  # the filter is Hermitian-symmetric: nothing is thrown away
    low = lowpass_images(plain, cutoff)
    assert low.dtype == plain.dtype
    torch.testing.assert_close(low, torch.from_numpy(expected.real).float(), rtol=1e-5, atol=1e-5)


@given(seeds, sizes, sizes, image_cutoffs, st.floats(-3, 3), st.floats(-3, 3))
def test_images_linear(seed: int, height: int, width: int, cutoff: float, a: float, b: float) -> None:
    one, two = images(seed, height, width), images(seed + 1, height, width)
    together = lowpass_images(a * one + b * two, cutoff)
    apart = a * lowpass_images(one, cutoff) + b * lowpass_images(two, cutoff)
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-5)


@given(seeds, sizes, sizes, image_cutoffs)
def test_images_keep_their_mean(seed: int, height: int, width: int, cutoff: float) -> None:
    plain = images(seed, height, width)
    torch.testing.assert_close(lowpass_images(plain, cutoff).mean((-2, -1)), plain.mean((-2, -1)), rtol=1e-5, atol=1e-6)


def test_images_of_one_colour_stay() -> None:
    plain = torch.full((1, 3, 9, 6), 0.7)
    torch.testing.assert_close(lowpass_images(plain, 0.1), plain)


def test_wide_cutoff_is_the_identity() -> None:
    plain = images(0, 12, 7)
    torch.testing.assert_close(lowpass_images(plain, 1e4), plain, rtol=0, atol=1e-5)


def test_narrower_cutoff_leaves_less() -> None:
    plain = images(0, 16, 16)
    left = [float(lowpass_images(plain, cutoff).var()) for cutoff in (1.0, 0.5, 0.2, 0.1, 0.05)]
    assert left == sorted(left, reverse=True)
    assert left[-1] < 0.01 * left[0]


@pytest.mark.parametrize("cutoff", [0, -0.1])
def test_image_cutoff_refused(cutoff: float) -> None:
    with pytest.raises(ValueError, match=f"must be positive, not {cutoff}"):
        lowpass_images(images(0, 8, 8), cutoff)


def token_gain(count: int, cutoff: float) -> list[float]:
    """G(k) for k = 0..N//2, mirrored."""
    width = count * (1 - cutoff) / 2
    half = [1 - math.exp(-((k - (count - 1) / 2) ** 2) / (2 * width**2)) for k in range(count // 2 + 1)]
    return [half[min(k, count - k)] for k in range(count)]


@given(seeds, token_counts, token_cutoffs)
def test_tokens_equal_the_fft(seed: int, count: int, cutoff: float) -> None:
    tokens = torch.randn(count, 4, generator=torch.Generator().manual_seed(seed))
    spectrum = np.fft.fft(tokens.double().numpy(), axis=0) * np.array(token_gain(count, cutoff))[:, None]
    expected = np.fft.ifft(spectrum, axis=0)
    assert np.abs(expected.imag).max() < 1e-12
    low = token_lowpass_matrix(count, cutoff) @ tokens
    torch.testing.assert_close(low, torch.from_numpy(expected.real).float(), rtol=1e-5, atol=1e-5)


@given(token_counts, token_cutoffs)
def test_token_matrix_is_real_and_symmetric(count: int, cutoff: float) -> None:
    matrix = token_lowpass_matrix(count, cutoff)
    assert matrix.shape == (count, count)
    assert matrix.dtype == torch.float32
    torch.testing.assert_close(matrix, matrix.T, rtol=0, atol=1e-7)


@given(token_counts, token_cutoffs)
def test_equal_tokens_meet_the_gain_of_zero_frequency(count: int, cutoff: float) -> None:
    low = token_lowpass_matrix(count, cutoff).sum(1)
    torch.testing.assert_close(low, torch.full((count,), token_gain(count, cutoff)[0]), rtol=1e-4, atol=1e-5)


def test_alternating_tokens_are_damped_most() -> None:
    matrix = token_lowpass_matrix(64, 0.85)
    fastest = torch.tensor([1.0, -1.0]).repeat(32)
    slowest = torch.cos(2 * torch.pi * torch.arange(64) / 64)
    assert (matrix @ fastest).norm() < 0.01 * fastest.norm()
    assert (matrix @ slowest).norm() > 0.99 * slowest.norm()


@pytest.mark.parametrize("cutoff", [0, 1, -0.2, 1.5])
def test_token_cutoff_refused(cutoff: float) -> None:
    with pytest.raises(ValueError, match=f"between 0 and 1, not {cutoff}"):
        token_lowpass_matrix(16, cutoff)


def test_matrix_first_made_in_inference_serves_training() -> None:
    token_lowpass_matrix.cache_clear()  # it is kept for the life of the process
    with torch.inference_mode():
        token_lowpass_matrix(6, 0.5)
    tokens = torch.ones(6, 2, requires_grad=True)
    (token_lowpass_matrix(6, 0.5) @ tokens).sum().backward()
    assert tokens.grad is not None
