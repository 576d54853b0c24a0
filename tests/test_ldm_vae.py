"""The authors' autoencoder file: every tensor in its place, checked against a forward written for that layout."""

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from djepa_hf.conversion import load_ldm_vae

CHANNELS, LATENTS = (32, 32, 64), 4  # small, and like KL-16 with attention on the encoder's last level alone


def ldm_tensors(channels=CHANNELS, latents=LATENTS, blocks=2, seed=0) -> dict[str, torch.Tensor]:
    """A state dict in the LDM layout, written down from that layout and not from diffusers'."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}

    def random(*shape):
        scale = shape[1:].numel() ** -0.5 if len(shape := torch.Size(shape)) > 1 else 0.1
        return scale * torch.randn(shape, generator=generator)

    def conv(name, inputs, outputs, size=3):
        tensors[f"{name}.weight"], tensors[f"{name}.bias"] = random(outputs, inputs, size, size), random(outputs)

    def norm(name, width):
        tensors[f"{name}.weight"], tensors[f"{name}.bias"] = 1 + random(width), random(width)

    def block(name, inputs, outputs):
        norm(f"{name}.norm1", inputs), conv(f"{name}.conv1", inputs, outputs)
        norm(f"{name}.norm2", outputs), conv(f"{name}.conv2", outputs, outputs)
        if inputs != outputs:
            conv(f"{name}.nin_shortcut", inputs, outputs, 1)

    def attention(name, width):
        norm(f"{name}.norm", width)
        for part in ("q", "k", "v", "proj_out"):
            conv(f"{name}.{part}", width, width, 1)

    def middle(name, width):
        (
            block(f"{name}.block_1", width, width),
            attention(f"{name}.attn_1", width),
            block(f"{name}.block_2", width, width),
        )

    last = len(channels) - 1
    conv("encoder.conv_in", 3, channels[0])
    width = channels[0]
    for i, outputs in enumerate(channels):
        for j in range(blocks):
            block(f"encoder.down.{i}.block.{j}", width, outputs)
            width = outputs
            if i == last:
                attention(f"encoder.down.{i}.attn.{j}", width)
        if i < last:
            conv(f"encoder.down.{i}.downsample.conv", width, width)
    middle("encoder.mid", width)
    norm("encoder.norm_out", width), conv("encoder.conv_out", width, 2 * latents)
    conv("decoder.conv_in", latents, width)
    middle("decoder.mid", width)
    for i in reversed(range(len(channels))):
        for j in range(blocks + 1):
            block(f"decoder.up.{i}.block.{j}", width, channels[i])
            width = channels[i]
        if i > 0:
            conv(f"decoder.up.{i}.upsample.conv", width, width)
    norm("decoder.norm_out", width), conv("decoder.conv_out", width, 3)
    conv("quant_conv", 2 * latents, 2 * latents, 1), conv("post_quant_conv", latents, latents, 1)
    return tensors


class LDMForward:
    """The autoencoder's arithmetic on plain tensors of the LDM layout."""

    def __init__(self, tensors):
        self.tensors = tensors
        self.levels = len({name.split(".")[2] for name in tensors if name.startswith("encoder.down.")})

    def conv(self, name, x, stride=1, padding=None):
        weight = self.tensors[f"{name}.weight"]
        padding = weight.shape[-1] // 2 if padding is None else padding
        return F.conv2d(x, weight, self.tensors[f"{name}.bias"], stride, padding)

    def norm(self, name, x):
        return F.group_norm(x, 32, self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"], eps=1e-6)

    def block(self, name, x):
        h = self.conv(f"{name}.conv1", F.silu(self.norm(f"{name}.norm1", x)))
        h = self.conv(f"{name}.conv2", F.silu(self.norm(f"{name}.norm2", h)))
        return h + (self.conv(f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.weight" in self.tensors else x)

    def attention(self, name, x):
        h = self.norm(f"{name}.norm", x)
        q, k, v = (self.conv(f"{name}.{part}", h).flatten(2) for part in "qkv")
        weights = torch.softmax(q.transpose(1, 2) @ k / x.shape[1] ** 0.5, dim=-1)
        return x + self.conv(f"{name}.proj_out", (v @ weights.transpose(1, 2)).reshape(x.shape))

    def middle(self, name, x):
        x = self.attention(f"{name}.attn_1", self.block(f"{name}.block_1", x))
        return self.block(f"{name}.block_2", x)

    def level(self, name, x):
        j = 0
        while f"{name}.block.{j}.conv1.weight" in self.tensors:
            x = self.block(f"{name}.block.{j}", x)
            if f"{name}.attn.{j}.q.weight" in self.tensors:
                x = self.attention(f"{name}.attn.{j}", x)
            j += 1
        return x

    def moments(self, images):
        x = self.conv("encoder.conv_in", images)
        for i in range(self.levels):
            x = self.level(f"encoder.down.{i}", x)
            if i < self.levels - 1:  # padded to the right and below alone
                x = self.conv(f"encoder.down.{i}.downsample.conv", F.pad(x, (0, 1, 0, 1)), stride=2, padding=0)
        x = self.middle("encoder.mid", x)
        x = self.conv("encoder.conv_out", F.silu(self.norm("encoder.norm_out", x)))
        return self.conv("quant_conv", x)

    def images(self, latents):
        x = self.conv("decoder.conv_in", self.conv("post_quant_conv", latents))
        x = self.middle("decoder.mid", x)
        for i in reversed(range(self.levels)):
            x = self.level(f"decoder.up.{i}", x)
            if i > 0:
                x = self.conv(f"decoder.up.{i}.upsample.conv", F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return self.conv("decoder.conv_out", F.silu(self.norm("decoder.norm_out", x)))


def save(tensors, path):
    torch.save({"model": tensors}, path)
    return path


@torch.no_grad()
def test_the_converted_autoencoder_computes_the_same(tmp_path):
    tensors = ldm_tensors()
    tensors |= {"loss.logvar": torch.zeros(1), "loss.discriminator.main.0.weight": torch.zeros(4, 3, 4, 4)}
    vae = load_ldm_vae(save(tensors, tmp_path / "kl.ckpt"))
    plain = LDMForward(tensors)
    images = torch.randn(2, 3, 16, 16)
    posterior = vae.encode(images).latent_dist
    torch.testing.assert_close(posterior.parameters, plain.moments(images), rtol=1e-4, atol=1e-5)
    latents = torch.randn(2, LATENTS, 4, 4)
    torch.testing.assert_close(vae.decode(latents).sample, plain.images(latents), rtol=1e-4, atol=1e-5)
    assert vae.config.scaling_factor == 0.2325
    vae.save_pretrained(tmp_path / "vae")
    reloaded = AutoencoderKL.from_pretrained(tmp_path / "vae")
    assert torch.equal(reloaded.decode(latents).sample, vae.decode(latents).sample)


def test_the_authors_sizes_make_kl16(tmp_path):
    with torch.device("meta"):
        shapes = {
            name: tensor.shape for name, tensor in AutoencoderKL(
                down_block_types=["DownEncoderBlock2D"] * 4 + ["AttnDownEncoderBlock2D"],
                up_block_types=["UpDecoderBlock2D"] * 5,
                block_out_channels=[128, 128, 256, 256, 512],
                layers_per_block=2,
                latent_channels=16,
                norm_num_groups=32,
            ).state_dict().items()
        }  # fmt: skip
    tensors = ldm_tensors((128, 128, 256, 256, 512), 16)
    assert len(tensors) == 312
    assert sum(tensor.numel() for tensor in tensors.values()) == 66_456_019
    assert sum(".down.4.attn." in name for name in tensors) == 20
    vae = load_ldm_vae(save({name: tensor.half() for name, tensor in tensors.items()}, tmp_path / "kl16.ckpt"))
    assert {name: tensor.shape for name, tensor in vae.state_dict().items()} == shapes
    assert vae.config.sample_size == 256


@pytest.mark.parametrize("key", ["encoder.down.2.attn.1.proj_out.weight", "decoder.up.0.block.2.norm1.bias"])
def test_what_is_missing_or_too_much_is_listed(tmp_path, key):
    tensors = ldm_tensors()
    del tensors[key]
    tensors["decoder.surplus"] = torch.zeros(1)
    tensors["quant_conv.bias"] = torch.zeros(3)
    with pytest.raises(ValueError, match="does not fit") as error:
        load_ldm_vae(save(tensors, tmp_path / "kl.ckpt"))
    for problem in (f"missing: {key}.", "unexpected: decoder.surplus.", "quant_conv.bias is (3,), not (8,)"):
        assert problem in str(error.value)


def test_files_that_do_not_even_tell_their_sizes_are_listed(tmp_path):
    tensors = {"encoder.conv_in.weight": torch.zeros(128, 3, 3, 3)}
    with pytest.raises(ValueError, match=r"missing: encoder.conv_in.bias, encoder.down.0.block.0.norm1.weight"):
        load_ldm_vae(save(tensors, tmp_path / "kl.ckpt"))


def test_other_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match="is not an LDM autoencoder"):
        load_ldm_vae(save({"weight": torch.zeros(1)}, tmp_path / "other.ckpt"))
    with pytest.raises(FileNotFoundError, match="There is no file"):
        load_ldm_vae(tmp_path / "nowhere.ckpt")
