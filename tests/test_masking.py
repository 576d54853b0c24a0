"""Mask draws, token orders and the reveal schedule."""

import itertools
import math

import pytest
import torch
from conftest import generators

from djepa_hf.masking import (
    draw_num_masked,
    gather_tokens,
    num_denoising_steps_per_step,
    num_masked_per_step,
    random_token_order,
    scatter_tokens,
    visible_places,
)


def test_mask_ratio_follows_the_truncated_normal():
    generator = torch.Generator().manual_seed(0)
    draws = torch.tensor([draw_num_masked(1000, generator=generator) for _ in range(4000)]) / 1000
    assert draws.min() >= 0.7
    assert draws.max() <= 1.0
    # mean of a normal(1, 0.25) cut to [0.7, 1]: 1 - 0.25 * (pdf(0) - pdf(1.2)) / (cdf(0) - cdf(-1.2))
    pdf = [math.exp(-x * x / 2) / math.sqrt(2 * math.pi) for x in (0, 1.2)]
    cdf = 0.5 * (1 + math.erf(-1.2 / math.sqrt(2)))
    assert draws.mean().item() == pytest.approx(1 - 0.25 * (pdf[0] - pdf[1]) / (0.5 - cdf), abs=0.005)


def test_masked_count_is_rounded_up():
    assert {draw_num_masked(4, ratio_min=0.76, generator=g) for g in generators(*range(20))} == {4}


def test_orders_are_permutations_and_uniform():
    order = random_token_order(4000, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(order.sort(-1).values, torch.arange(5).expand(4000, 5))
    share = torch.stack([(order == i).float().mean(0) for i in range(5)])  # of each token in each place
    assert (share - 0.2).abs().max() < 0.03


def test_each_order_comes_from_its_own_generator():
    together = random_token_order(2, 9, generator=generators(1, 2))
    assert torch.equal(together[1:], random_token_order(1, 9, generator=generators(2)[0]))


@pytest.mark.parametrize("num_tokens", [1, 2, 7, 16, 64, 256])
def test_every_step_reveals_a_token(num_tokens):
    for num_steps in range(1, num_tokens + 1):
        masked = num_masked_per_step(num_tokens, num_steps)
        assert len(masked) == num_steps + 1
        assert masked[0] == num_tokens
        assert masked[-1] == 0
        assert all(before > after for before, after in itertools.pairwise(masked))


def test_schedule_is_the_cosine():
    assert num_masked_per_step(256, 8)[:4] == [256, 251, 236, 212]


@pytest.mark.parametrize("num_steps", [0, -1, 17])
def test_impossible_step_counts_are_refused(num_steps):
    with pytest.raises(ValueError, match=rf"must lie in 1..16 .* got {num_steps}"):
        num_masked_per_step(16, num_steps)


def test_places_of_a_mask_are_in_order():
    mask = torch.tensor([[True, False, True, False], [False, False, True, True]])
    assert visible_places(mask).tolist() == [[1, 3], [0, 1]]
    assert visible_places(~mask).tolist() == [[0, 2], [2, 3]]


def test_gather_and_scatter_are_inverse():
    tokens, places = torch.randn(2, 6, 3), torch.tensor([[4, 0], [5, 2]])
    taken = gather_tokens(tokens, places)
    assert torch.equal(taken[1], tokens[1, [5, 2]])
    assert torch.equal(scatter_tokens(tokens, places, taken), tokens)
    assert torch.equal(gather_tokens(scatter_tokens(tokens, places, -taken), places), -taken)


def test_denoising_steps_go_on_a_line():
    assert num_denoising_steps_per_step(50, 5, 4) == [50, 35, 20, 5]
    assert num_denoising_steps_per_step(50, None, 3) == [50, 50, 50]
    assert num_denoising_steps_per_step(50, 5, 1) == [50]
