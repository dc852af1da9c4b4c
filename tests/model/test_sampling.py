"""Guidance, filters and draws against their definitions."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from model.sampling import SamplingConfig, choose, guide, keep_likely, place_noise

PLAIN = SamplingConfig(guidance=1, top_k=None)


def test_guidance_is_the_published_formula_whatever_part_is_scored() -> None:
    c, u = torch.randn(2, 3, 50, generator=torch.Generator().manual_seed(0))
    expected = u.log_softmax(-1) + 3.0 * (c.log_softmax(-1) - u.log_softmax(-1))
    torch.testing.assert_close(guide(c, u, 3.0), expected)
    torch.testing.assert_close(guide(c, u, 1.0), c.log_softmax(-1))
    torch.testing.assert_close(guide(c, u, 0.0), u.log_softmax(-1))
    part = guide(c[:, 20:], u[:, 20:], 3.0).softmax(-1)
    torch.testing.assert_close(part, expected[:, 20:].softmax(-1))


def test_filters_keep_the_best() -> None:
    scores = torch.tensor([[0.1, 0.4, 0.2, 0.3], [0.7, 0.1, 0.1, 0.1]]).log()

    def kept(top_k: int | None, top_p: float) -> list[list[bool]]:
        return keep_likely(scores, top_k, top_p).isfinite().tolist()

    assert kept(None, 1.0) == [[True] * 4, [True] * 4]
    assert kept(1, 1.0) == [[False, True, False, False], [True, False, False, False]]
    assert kept(2, 1.0)[0] == [False, True, False, True]
    assert kept(99, 1.0)[0] == [True] * 4
    assert kept(None, 0.65) == [[False, True, False, True], [True, False, False, False]]
    assert kept(None, 0.75)[0] == [False, True, True, True]
    assert kept(None, 0.0001) == kept(1, 1.0)


def noise(num_rows: int, num_ids: int) -> Tensor:
    return torch.stack([place_noise(7, place, num_ids) for place in range(num_rows)])


def test_draws_follow_the_distribution() -> None:
    scores = torch.tensor([0.5, 0.0, 0.25, 0.25]).log().expand(20_000, 4)
    noise_RV = noise(20_000, 4)
    shares = torch.bincount(choose(scores, noise_RV, PLAIN), minlength=4) / 20_000
    torch.testing.assert_close(shares, torch.tensor([0.5, 0.0, 0.25, 0.25]), atol=0.01, rtol=0)
    assert shares[1] == 0
    colder = choose(scores, noise_RV, SamplingConfig(temperature=0.5, guidance=1))
    shares = torch.bincount(colder, minlength=4) / 20_000
    torch.testing.assert_close(shares, torch.tensor([4 / 6, 0.0, 1 / 6, 1 / 6]), atol=0.01, rtol=0)


def test_noise_is_that_of_its_seed_and_place_and_independent_of_any_other() -> None:
    assert torch.equal(place_noise(-3, 5, 50), place_noise(-3, 5, 50))
    samples = torch.stack([place_noise(seed, place, 5_000) for seed in (0, 1, -1) for place in (0, 1, 5_000)])
    assert samples.corrcoef().fill_diagonal_(0).abs().max() < 0.06
    # Gumbel: mean is Euler's constant, variance is pi squared by 6.
    torch.testing.assert_close(samples.mean(), torch.tensor(0.5772), atol=0.02, rtol=0)
    torch.testing.assert_close(samples.var(), torch.tensor(1.6449), atol=0.05, rtol=0)


@given(st.lists(st.floats(-50, 50), min_size=1, max_size=40), st.integers(), st.integers(1, 8))
def test_only_kept_ids_are_drawn(scores: list[float], seed: int, top_k: int) -> None:
    row = torch.tensor([scores])
    chosen = choose(row, place_noise(seed, 0, len(scores))[None], SamplingConfig(top_k=top_k)).item()
    assert keep_likely(row, top_k, 1.0)[0, int(chosen)].isfinite()


def test_rounding_inside_the_network_changes_no_choice() -> None:
    scores = torch.randn(300, 2_000, generator=torch.Generator().manual_seed(0))
    noise_RV = noise(300, 2_000)
    nudged = scores + 1e-5 * torch.randn(300, 2_000, generator=torch.Generator().manual_seed(1))
    assert torch.equal(choose(scores, noise_RV, PLAIN), choose(nudged, noise_RV, PLAIN))


def test_temperature_zero_is_greedy() -> None:
    scores = torch.randn(5, 30, generator=torch.Generator().manual_seed(0))
    assert torch.equal(choose(scores, noise(5, 30), SamplingConfig(temperature=0)), scores.argmax(-1))


@pytest.mark.parametrize("wrong", [{"temperature": -1}, {"top_k": 0}, {"top_p": 0}, {"top_p": 1.1}, {"cfg": 3}])
def test_wrong_options_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SamplingConfig.model_validate(wrong)
