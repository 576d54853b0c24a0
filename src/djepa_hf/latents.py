"""Between images and what the model sees: an autoencoder's latents, or the pixels themselves."""

import torch
from diffusers import AutoencoderKL


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
    latents = vae.encode(images.to(vae.dtype)).latent_dist.sample(generator)
    return (latents - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor


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
