"""Which tokens are hidden and when they are revealed: shared by training and sampling. Knows no model."""

import math

import torch
from diffusers.utils.torch_utils import randn_tensor


def draw_num_masked(
    num_tokens: int,
    ratio_min: float = 0.7,
    ratio_mean: float = 1.0,
    ratio_std: float = 0.25,
    generator: torch.Generator | None = None,
) -> int:
    """
    Draws how many tokens of every sample of a training batch are hidden: `ceil(ratio * num_tokens)`, where `ratio`
    comes from a normal distribution truncated to `[ratio_min, 1]` (paper, section 3.1).

    The draw is made on the CPU, so that the number is known to Python without waiting for an accelerator.

    Args:
        num_tokens (`int`): tokens per sample.
        ratio_min, ratio_mean, ratio_std (`float`): lower end, mean and standard deviation of the ratio.
        generator (`torch.Generator`, *optional*): a CPU generator; the global one is used without it.

    Returns:
        `int` in `[1, num_tokens]`.
    """
    ratio = torch.empty(1, device="cpu", dtype=torch.float32)
    torch.nn.init.trunc_normal_(ratio, mean=ratio_mean, std=ratio_std, a=ratio_min, b=1.0, generator=generator)
    return min(num_tokens, math.ceil(ratio.item() * num_tokens))


def random_token_order(
    batch_size: int,
    num_tokens: int,
    device: torch.device | str | None = None,
    generator: torch.Generator | list[torch.Generator] | None = None,
) -> torch.LongTensor:
    """
    Draws an independent uniform random permutation of `0 .. num_tokens - 1` per sample.

    Args:
        batch_size (`int`): number of permutations.
        num_tokens (`int`): length of each.
        device (`torch.device`, *optional*): where the result lies.
        generator (`torch.Generator` or list of them, *optional*): one for all, or one per sample.

    Returns:
        `torch.LongTensor` of shape `(batch_size, num_tokens)`.
    """
    device = torch.device(device or "cpu")
    return randn_tensor((batch_size, num_tokens), generator=generator, device=device, dtype=torch.float32).argsort(-1)


def checkerboard_token_order(
    batch_size: int,
    grid_size: tuple[int, ...],
    device: torch.device | str | None = None,
    generator: torch.Generator | list[torch.Generator] | None = None,
) -> torch.LongTensor:
    """
    Draws an independent permutation per sample that takes the fields of one colour of a checkerboard first: no two of
    them are neighbours, and all others have their neighbours around them when their turn comes (Generation then
    Reconstruction, arXiv 2510.17171). Within a colour the order is uniformly random.

    Args:
        batch_size (`int`): number of permutations.
        grid_size (`tuple[int, ...]`): tokens along each axis; any rank.
        device, generator: as in [`random_token_order`], with the same draws.

    Returns:
        `torch.LongTensor` of shape `(batch_size, N)`.
    """
    num_tokens = math.prod(grid_size)
    order = random_token_order(batch_size, num_tokens, device, generator)
    axes = torch.meshgrid(*(torch.arange(side, device=order.device) for side in grid_size), indexing="ij")
    colour = sum(axes).flatten() % 2  # (N,)
    # a stable sort by colour keeps the random order within each
    return order.gather(1, colour[order].argsort(dim=-1, stable=True))


def visible_places(mask: torch.BoolTensor) -> torch.LongTensor:
    """
    The places of the visible tokens, in ascending order.

    Reads the number of visible tokens back from the mask's device. Callers inside a loop know it and pass places
    instead of masks.

    Args:
        mask (`torch.BoolTensor` of shape `(B, N)`): True where a token is hidden; equally many per row.

    Returns:
        `torch.LongTensor` of shape `(B, visible)`.

    Raises:
        ValueError: if the rows hide different numbers of tokens.
    """
    hidden = mask.sum(-1).tolist()
    if len(set(hidden)) > 1:
        raise ValueError(f"`mask` must hide equally many tokens in every row, got {hidden}.")
    num_visible = mask.shape[-1] - hidden[0]
    # a stable sort of "is hidden" puts the visible places first and keeps their order
    return mask.to(torch.uint8).argsort(dim=-1, stable=True)[:, :num_visible]


def gather_tokens(tokens: torch.Tensor, places: torch.LongTensor) -> torch.Tensor:
    """`(B, N, C)` and places `(B, n)` to the `(B, n, C)` tokens in those places."""
    return tokens.gather(1, places.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def scatter_tokens(tokens: torch.Tensor, places: torch.LongTensor, values: torch.Tensor) -> torch.Tensor:
    """A copy of `tokens` `(B, N, C)` with `values` `(B, n, C)` in `places` `(B, n)`."""
    return tokens.scatter(1, places.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]), values.to(tokens.dtype))


def num_masked_per_step(num_tokens: int, num_steps: int) -> list[int]:
    """
    The cosine schedule of generalized next-token prediction (paper, Algorithm 1): how many tokens are still hidden
    before each of the `num_steps` autoregressive steps, and 0 after the last.

    Every step reveals at least one token.

    Args:
        num_tokens (`int`): tokens per sample (N).
        num_steps (`int`): autoregressive steps (K), `1 <= K <= N`.

    Returns:
        `list[int]` of length `num_steps + 1`, from `num_tokens` down to 0.

    Raises:
        ValueError: if `num_steps` is not in `1 .. num_tokens`.
    """
    if not 1 <= num_steps <= num_tokens:
        raise ValueError(f"`num_steps` must lie in 1..{num_tokens} (the number of tokens), got {num_steps}.")
    masked = [num_tokens]
    for step in range(1, num_steps):
        cosine = math.floor(num_tokens * math.cos(math.pi / 2 * step / num_steps))
        masked.append(max(1, min(masked[-1] - 1, cosine)))
    return [*masked, 0]


def num_denoising_steps_per_step(first: int, last: int | None, num_steps: int) -> list[int]:
    """
    Denoising steps in each of `num_steps` autoregressive steps, from `first` to `last` on a line (DiSA, arXiv
    2505.20297); `first` in all of them without `last`.

    Args:
        first (`int`): in the first autoregressive step, at least 1.
        last (`int`, *optional*): in the last one, at least 1.
        num_steps (`int`): autoregressive steps.
    """
    if last is None or num_steps == 1:
        return [first] * num_steps
    return [round(first + (last - first) * step / (num_steps - 1)) for step in range(num_steps)]
