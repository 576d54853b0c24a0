"""Between images and what the model sees: an autoencoder's latents, or the pixels themselves."""

import torch
from diffusers import AutoencoderKL
from diffusers.utils.torch_utils import randn_tensor


def encode_images(
    images: torch.Tensor, vae: AutoencoderKL | None, generator: torch.Generator | None = None
) -> torch.Tensor:
    """
    Images to samples of the model's space.

    Args:
        images (`torch.Tensor` of shape `(B, channels, height, width)`): in [-1, 1].
        vae ([`~diffusers.AutoencoderKL`], *optional*): without it, samples are the images.
        generator (`torch.Generator`, *optional*): draws from the posterior.

    Returns:
        `torch.Tensor`: latents `(B, latent_channels, h, w)`, shifted and scaled by the VAE's configuration.
    """
    if vae is None:
        return images
    moments = posterior_moments(images, vae)
    shape = (moments.shape[0], moments.shape[1] // 2, *moments.shape[2:])
    noise = randn_tensor(shape, generator=generator, device=moments.device, dtype=moments.dtype)
    return latents_of_moments(moments, noise, vae.config.scaling_factor, vae.config.shift_factor)


def vae_stride(vae: AutoencoderKL) -> int:
    """Pixels per latent along each axis."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


def latent_size(resolution: int | tuple[int, int], vae: AutoencoderKL) -> int | tuple[int, int]:
    """
    The size of the latents of images: a side for a side, `(height, width)` for `(height, width)`.

    Raises:
        ValueError: if the images cannot be divided so.
    """
    stride = vae_stride(vae)
    if any(side % stride for side in height_and_width(resolution)):
        raise ValueError(f"`resolution` {resolution} must be divisible by the VAE's stride {stride}.")
    return resolution // stride if isinstance(resolution, int) else tuple(side // stride for side in resolution)


def height_and_width(size: int | tuple[int, int]) -> tuple[int, int]:
    """Of an image whose size is given as the side of a square, or as `(height, width)`."""
    return (size, size) if isinstance(size, int) else tuple(size)


def posterior_moments(images: torch.Tensor, vae: AutoencoderKL) -> torch.Tensor:
    """
    Mean and log-variance of the latents of images, `(B, 2 * latent_channels, h, w)`, neither shifted nor scaled.

    Args:
        images (`torch.Tensor` of shape `(B, channels, height, width)`): in [-1, 1].
        vae ([`~diffusers.AutoencoderKL`]): encodes them.
    """
    return vae.encode(images.to(vae.dtype)).latent_dist.parameters


def latents_of_moments(
    moments: torch.Tensor, noise: torch.Tensor, scaling_factor: float, shift_factor: float | None = None
) -> torch.Tensor:
    """
    A draw from the posterior, shifted and scaled as the model wants it.

    Args:
        moments (`torch.Tensor` of shape `(B, 2 * latent_channels, h, w)`): see [`posterior_moments`].
        noise (`torch.Tensor` of shape `(B, latent_channels, h, w)`): standard normal.
        scaling_factor, shift_factor (`float`): of the VAE's configuration.
    """
    mean, log_variance = moments.chunk(2, dim=1)
    latents = mean + torch.exp(0.5 * log_variance.clamp(-30.0, 20.0)) * noise
    return (latents - (shift_factor or 0.0)) * scaling_factor


def decode_samples(samples: torch.Tensor, vae: AutoencoderKL | None) -> torch.Tensor:
    """
    The way back: samples of the model's space to images in [-1, 1] (not clipped).

    Args:
        samples (`torch.Tensor` of shape `(B, channels, ...)`).
        vae ([`~diffusers.AutoencoderKL`], *optional*): without it, samples are the images.
    """
    if vae is None:
        return samples
    latents = samples / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
    return vae.decode(latents.to(vae.dtype)).sample
