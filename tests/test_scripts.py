"""What runs on top of a trained pipeline: generation, and the pictures that scripts make."""

import generate
import numpy as np
import pytest
import torch
import yaml
from conftest import tiny_pipeline
from PIL import Image

from djepa_hf import DJEPAPipeline
from djepa_hf.seeds import seed_of
from djepa_hf.visualization import labelled_grid, plot_losses

SAMPLING = ["--num_inference_steps", "2", "--num_denoising_steps", "2"]


@pytest.fixture
def folder(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "pipe")
    return tmp_path / "pipe"


def pictures(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*_*.png")}


def test_generate_writes_images_and_a_grid(folder, tmp_path):
    argv = ["--pipeline", folder, "--labels", "goldfish", "3", "--num_images_per_label", "2", *SAMPLING]
    argv = [str(part) for part in argv]
    generate.main([*argv, "--output_dir", str(tmp_path / "a")])
    names = ["000_goldfish_000.png", "000_goldfish_001.png", "001_hen_000.png", "001_hen_001.png"]
    assert sorted(pictures(tmp_path / "a")) == names
    with Image.open(tmp_path / "a" / "grid.png") as grid:
        assert grid.width > 2 * 48
        assert grid.height > 2 * 48
    # the same images whatever the batch size, others from another seed
    generate.main([*argv, "--output_dir", str(tmp_path / "b"), "--batch_size", "3"])
    levels = [np.asarray(Image.open(tmp_path / part / names[3])).astype(int) for part in ("a", "b")]
    assert abs(levels[0] - levels[1]).max() <= 1
    generate.main([*argv, "--output_dir", str(tmp_path / "c"), "--seed", "1"])
    assert pictures(tmp_path / "a") != pictures(tmp_path / "c")


def test_generate_takes_names_before_ids_and_options_from_a_file(tmp_path):
    tiny_pipeline(id2label={0: "10", 1: "2", 2: "3", 3: "a", 4: "b"}).save_pretrained(tmp_path / "pipe")
    options = {"pipeline": str(tmp_path / "pipe"), "labels": ["2", "10", "1"], "output_dir": str(tmp_path / "out")}
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(options))
    generate.main(["--config", str(tmp_path / "a.yaml"), *SAMPLING])
    assert sorted(pictures(tmp_path / "out")) == ["000_2_000.png", "001_10_000.png", "002_2_000.png"]
    with pytest.raises(ValueError, match="`batch_size` must be at least 1, got 0"):
        generate.main(["--config", str(tmp_path / "a.yaml"), "--batch_size", "0"])


def test_generate_refuses_an_unknown_class(folder, tmp_path):
    argv = ["--pipeline", str(folder), "--output_dir", str(tmp_path / "out"), "--labels"]
    with pytest.raises(ValueError, match="The closest names are: goldfish"):
        generate.main([*argv, "goldfisch"])
    with pytest.raises(ValueError, match="Class id 12 is out of range"):
        generate.main([*argv, "12"])
    assert not (tmp_path / "out").exists()


def test_grid_keeps_every_pixel():
    images = [Image.new("L", (8, 8), value) for value in (0, 90, 180)]
    grid = labelled_grid([("one", images[:2]), ("two", images[2:])])
    colours = {colour: count for count, colour in grid.getcolors(100000)}
    assert colours[(90, 90, 90)] == 48 * 48
    assert colours[(180, 180, 180)] == 48 * 48
    assert colours[(0, 0, 0)] >= 48 * 48  # and the letters


def test_loss_plot_is_written(tmp_path):
    plot_losses([1, 2, 3], {"a": [3.0, 2.0, 1.0], "b": [0.0, 0.0, 0.0]}, tmp_path / "loss.png", "title")
    with Image.open(tmp_path / "loss.png") as plot:
        assert plot.width > 600


def test_sampling_options_go_from_training_to_generation(folder, tmp_path):
    options = {"num_inference_steps": 3, "num_denoising_steps": 1, "guidance_schedule": "constant"}
    (tmp_path / "sampling.yaml").write_text(yaml.safe_dump(options))
    argv = [
        "--pipeline",
        folder,
        "--config",
        tmp_path / "sampling.yaml",
        "--labels",
        "0",
        "--output_dir",
        tmp_path / "o",
    ]
    generate.main([str(part) for part in argv])
    pipe = DJEPAPipeline.from_pretrained(folder)
    generator = torch.Generator().manual_seed(seed_of(0, 0, 0))
    image = pipe(0, generator=generator, temperature=0.98, guidance_scale=3.0, **options).images[0]
    assert np.array_equal(np.asarray(image), np.asarray(Image.open(tmp_path / "o" / "000_tench_000.png")))
