"""Latents that are encoded once: what is stored, what is drawn from it, and what it refuses."""

import json
import shutil

import cache_latents
import datasets
import numpy as np
import pytest
import torch
from conftest import tiny_vae
from test_training import TINY, run

from djepa_hf import DJEPAPipeline
from djepa_hf.batches import batch_loader
from djepa_hf.data import ImageToSample, load_digits
from djepa_hf.latent_cache import CachedLatents
from djepa_hf.latents import latents_of_moments, posterior_moments


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae")
    tiny_vae(4).save_pretrained(folder)
    return folder


def options(vae_folder, output_dir, **more):
    given = {"dataset_name": "digits", "resolution": 8, "pretrained_vae_model_name_or_path": vae_folder}
    given |= {"output_dir": output_dir, "shard_size": 500, "batch_size": 50, **more}
    return [str(part) for name, value in given.items() for part in (f"--{name}", value)]


@pytest.fixture(scope="module")
def cache(vae_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    cache_latents.main(options(vae_folder, folder))
    return folder


@torch.no_grad()
def test_moments_of_images_and_mirror_images_are_stored(cache):
    vae, digits, to_sample = tiny_vae(4), load_digits("train"), ImageToSample(8, 3)
    cached = CachedLatents(cache)
    assert len(cached) == len(digits)
    assert cached.names == digits.features["label"].names
    images = torch.stack([to_sample(digits[i]["image"]) for i in (0, 501, 1346)])
    for view, flipped in enumerate((images, images.flip(-1))):
        expected = posterior_moments(flipped, vae)
        rows = [np.asarray(cached.data[i]["moments"]).reshape(2, 8, 4, 4)[view] for i in (0, 501, 1346)]
        torch.testing.assert_close(torch.tensor(np.stack(rows)).float(), expected, rtol=1e-3, atol=1e-3)
    assert [int(cached.data[i]["label"]) for i in (0, 501, 1346)] == [digits[i]["label"] for i in (0, 501, 1346)]
    assert len(list(cache.glob("*.arrow"))) == 3
    assert datasets.load_from_disk(str(cache)).num_rows == 1347


def test_every_draw_is_fresh(cache):
    batches = batch_loader(CachedLatents(cache, seed=1), 1347)
    first, second = next(batches), next(batches)
    order = torch.argsort(first["id"]), torch.argsort(second["id"])
    same = (first["sample"][order[0]] == second["sample"][order[1]]).flatten(1).all(1).float().mean()
    assert 0.4 < same < 0.6, "half of the images are turned round in the next epoch"
    assert first["sample"].shape == (1347, 8, 4, 4)
    unflipped = CachedLatents(cache, flip=False)
    assert all(torch.equal(unflipped[0, i]["sample"], unflipped[1, i]["sample"]) for i in range(20))
    moments = torch.tensor([[0.5], [2 * np.log(0.1)]]).reshape(1, 2, 1, 1).repeat(20000, 1, 1, 1)
    latents = latents_of_moments(moments, torch.randn(20000, 1, 1, 1), scaling_factor=2.0, shift_factor=0.25)
    assert latents.mean().item() == pytest.approx(0.5, abs=0.01)
    assert latents.std().item() == pytest.approx(0.2, abs=0.01)


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_killed_run_goes_on_and_ends_the_same(cache, vae_folder, tmp_path, monkeypatch):
    written, original = [], cache_latents.write_shard

    def write_and_die(path, *args):
        if written:
            path.with_suffix(".unfinished").write_bytes(b"half a shard")
            raise KeyboardInterrupt
        written.append(path)
        original(path, *args)

    monkeypatch.setattr(cache_latents, "write_shard", write_and_die)
    with pytest.raises(KeyboardInterrupt):
        cache_latents.main(options(vae_folder, tmp_path / "out"))
    with pytest.raises(ValueError, match="is not a complete cache of latents"):
        CachedLatents(tmp_path / "out")
    with pytest.raises(ValueError, match="holds a cache with resolution 8, this one has 16"):
        cache_latents.main(options(vae_folder, tmp_path / "out", resolution=16))
    monkeypatch.undo()
    stamp = written[0].stat().st_mtime_ns
    cache_latents.main(options(vae_folder, tmp_path / "out"))
    assert written[0].stat().st_mtime_ns == stamp, "finished shards are not made again"
    assert content(tmp_path / "out") == content(cache)


def test_training_on_a_cache(cache, vae_folder, tmp_path):
    given = {**TINY, "latent_cache_dir": cache, "resolution": 8, "patch_size": 1, "max_train_steps": 3}
    pipe = DJEPAPipeline.from_pretrained(run(tmp_path, **given, pretrained_vae_model_name_or_path=vae_folder))
    assert (pipe.transformer.config.sample_size, pipe.transformer.config.num_channels) == (4, 4)
    assert pipe.transformer.config.latent_scaling_factor == 0.5
    assert pipe.get_label_ids("7") == [7]


def test_a_cache_of_something_else_is_refused_by_name(cache, vae_folder, tmp_path):
    given = {**TINY, "latent_cache_dir": cache, "resolution": 8, "patch_size": 1, "max_train_steps": 3}
    with_vae = {**given, "pretrained_vae_model_name_or_path": vae_folder}
    other = tiny_vae(4)
    with torch.no_grad():
        other.quant_conv.bias.add_(1)
    other.save_pretrained(tmp_path / "weights")
    shutil.copytree(vae_folder, tmp_path / "factor")
    config = json.loads((tmp_path / "factor" / "config.json").read_text())
    (tmp_path / "factor" / "config.json").write_text(json.dumps({**config, "scaling_factor": 0.3}))
    for arguments, message in (
        (given, "holds latents: pass `pretrained_vae_model_name_or_path`"),
        ({**with_vae, "resolution": 16}, "made with resolution 8, this run has 16"),
        ({**with_vae, "pretrained_vae_model_name_or_path": tmp_path / "factor"}, "made with scaling_factor 0.5"),
        ({**with_vae, "pretrained_vae_model_name_or_path": tmp_path / "weights"}, "made with vae_weights"),
        ({**with_vae, "dataset_name": "digits"}, "`latent_cache_dir` takes the place of `dataset_name`"),
    ):
        with pytest.raises(ValueError, match=message):
            run(tmp_path / "out", **arguments)


def test_what_cannot_be_cached(vae_folder, tmp_path):
    with pytest.raises(ValueError, match="`pretrained_vae_model_name_or_path` is missing"):
        cache_latents.main(["--dataset_name", "digits", "--output_dir", str(tmp_path / "out")])
    with pytest.raises(ValueError, match="`streaming` data have no fixed order"):
        cache_latents.main([*options(vae_folder, tmp_path / "out"), "--streaming", "true"])
    with pytest.raises(ValueError, match="`resolution` 9 must be divisible by the VAE's stride 2"):
        cache_latents.main(options(vae_folder, tmp_path / "out", resolution=9))
    assert not (tmp_path / "out").exists()
