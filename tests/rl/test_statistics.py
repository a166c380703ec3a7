"""finetune.rl.statistics: standard errors of biases, variances and their ratios; the critical z of several."""

import math

import numpy as np
import pytest
import torch

from finetune.rl.statistics import (
    Moments,
    chi_square_z,
    critical_z,
    gradient_bias,
    gradient_bias_interval,
    mean_and_error,
    standard_error,
    variance_ratio,
)

ACTIONS = 3


@pytest.mark.parametrize(("size", "cover"), [(0.0, (0.9, 1.0)), (1.0, (0.6, 0.76))])
def test_the_interval_of_a_bias_holds_it_as_often_as_it_says(size, cover):
    """One standard error holds 68 % of normal numbers; the interval of no bias begins at 0, so it holds more."""
    rng = np.random.default_rng(0)
    policy, counted = rng.dirichlet(np.ones(ACTIONS), 6), np.ones((6, ACTIONS), bool)
    counted[0] = False
    variance, bias = rng.uniform(0.01, 0.05, 6 * ACTIONS), size * rng.standard_normal(6 * ACTIONS)
    measured = bias + rng.standard_normal((2000, len(bias))) * np.sqrt(variance)
    variances = np.broadcast_to(variance, measured.shape)
    middle, low, high = gradient_bias_interval(measured, policy, counted, variances)
    true = gradient_bias(bias, policy, counted)
    assert np.allclose(middle, gradient_bias(measured, policy, counted, variances))
    assert cover[0] <= ((low <= true) & (true <= high)).mean() <= cover[1]
    assert (high > middle).all()


def test_the_error_of_a_variance_is_how_far_it_scatters():
    """Of a distribution with heavy tails too, where that of normal numbers would be far too small."""
    rng = torch.Generator().manual_seed(0)
    found, errors = [], []
    for _ in range(200):
        moments = Moments(1, 2)
        x = torch.randn(400, generator=rng, dtype=torch.float64).mul(0.8).exp()
        moments.add(torch.arange(400) % 2, x[None])
        variance, error = moments.average_variance(np.array([True, True]))
        found.append(variance[0])
        errors.append(error[0])
    assert np.median(errors) == pytest.approx(np.std(found), rel=0.5)
    normal = math.sqrt(2 / 200) * np.mean(found) / math.sqrt(2)
    assert np.median(errors) > 1.5 * normal


def test_a_variance_survives_a_large_mean():
    moments, x = Moments(1, 1), torch.tensor([[1e9, 1e9 + 1, 1e9 + 2, 1e9 + 5]], dtype=torch.float64)
    for part in x.split(2, 1):
        moments.add(torch.zeros(2, dtype=torch.long), part)
    assert moments.mean()[0, 0] == 1e9 + 2
    assert moments.variance()[0, 0] == pytest.approx(14 / 3)


def test_the_error_of_a_share_of_variance_knows_that_the_samples_are_the_same():
    rng = np.random.default_rng(0)
    found, errors, apart = [], [], []
    for _ in range(300):
        whole = rng.standard_normal((50, 3))
        share, error = variance_ratio(0.5 * whole + 0.1 * rng.standard_normal((50, 3)), whole)
        found.append(share)
        errors.append(error)
        apart.append(variance_ratio(0.5 * rng.standard_normal((50, 3)), whole)[0])
    assert np.mean(found) == pytest.approx(0.26, abs=0.01)
    assert np.mean(errors) == pytest.approx(np.std(found), rel=0.15)
    assert np.std(apart) > 3 * np.std(found)  # independent samples scatter far more
    assert variance_ratio(whole, whole) == (1.0, 0.0)


def test_right_results_pass_the_bar_of_the_worst_of_several():
    """… but for one run in ten thousand."""
    assert critical_z() == pytest.approx(3.719, abs=1e-3)
    for n in (1, 8, 100):
        missed = 1 - (0.5 * (1 + math.erf(critical_z(n) / math.sqrt(2)))) ** n
        assert missed == pytest.approx(1e-4, rel=1e-3)


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e9])
def test_rounding_is_no_bias_at_any_scale(size):
    off = size * 1e-15 * np.ones(20)
    assert chi_square_z(off, np.zeros(20), size) < 0
    assert chi_square_z(1e6 * off, np.zeros(20), size) > 100


def test_trainings_are_the_samples_where_there_are_several():
    assert mean_and_error([[1.0, 3.0], [5.0, 7.0]]) == pytest.approx((4.0, standard_error([2.0, 6.0])))
    assert mean_and_error([[1.0, 3.0]]) == pytest.approx((2.0, 1.0))
    assert math.isnan(standard_error([1.0]))
