"""Evaluation: the same images whatever interrupts or divides the work, and a result that says what it depends on."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from urllib.error import URLError

import evaluate_pipeline
import grid_search
import numpy as np
import pytest
import torch
from conftest import tiny_pipeline, tiny_vae
from huggingface_hub import ModelCard
from PIL import Image

from djepa_hf import DJEPAPipeline
from djepa_hf.data import load_digits
from djepa_hf.engines import start_processes
from djepa_hf.evaluation import generation
from djepa_hf.evaluation.arguments import EvaluationArguments
from djepa_hf.evaluation.extractors import ClassifierExtractor, CustomExtractor, InceptionExtractor
from djepa_hf.evaluation.generation import generate, label_of
from djepa_hf.evaluation.protocol import image_size
from djepa_hf.evaluation.real_images import RealImages, load_reference, save_npz
from djepa_hf.evaluation.scores import class_agreement
from djepa_hf.model_card import create_model_card

SAMPLING = {"num_inference_steps": 2, "num_denoising_steps": 2, "temperature": 1.0}
DIGITS = {"reference": "digits", "extractor": "classifier", "classifier_data": "digits"}


@pytest.fixture(scope="module")
def digits():
    """Images `(n, 1, 8, 8)` in [0, 1] and labels of both parts of the real digits."""
    parts = []
    for split in ("train", "test"):
        data = load_digits(split)
        images = np.stack([np.asarray(image, dtype=np.float32) for image in data["image"]]) / 255
        parts.append((torch.from_numpy(images).unsqueeze(1), torch.tensor(data["label"])))
    return parts


@pytest.fixture(scope="module")
def judge(digits):
    return ClassifierExtractor(*digits[0])


@pytest.fixture
def folder(tmp_path):
    pipe = tiny_pipeline(id2label={i: str(i) for i in range(10)})
    pipe.save_pretrained(tmp_path / "pipe")
    create_model_card(pipe, str(tmp_path / "pipe")).save(tmp_path / "pipe" / "README.md")
    return tmp_path / "pipe"


def command_line(folder, **options):
    options = {"pipeline": folder, **DIGITS, "num_images": 60, "batch_size": 16, **SAMPLING, **options}
    argv = []
    for name, value in options.items():
        argv += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return argv


def run(folder, **options):
    evaluate_pipeline.main(command_line(folder, **options))
    place = Path(options.get("output_dir", folder / "evaluation"))
    return json.loads((place / "result.json").read_text())


def parts_of(folder):
    return {path.name: path.read_bytes() for path in (folder / "batches").iterdir()}


def features_of(folder):
    from safetensors.torch import load_file

    return torch.cat([load_file(path)["features"] for path in sorted((folder / "batches").glob("*.safetensors"))])


def test_the_judge_reads_real_digits_it_never_saw(judge, digits):
    images, labels = digits[1]
    _, logits = judge(images)
    assert class_agreement(logits, labels, judge) > 0.95
    assert class_agreement(logits, (labels + 1) % 10, judge) < 0.05


def test_a_result_says_everything(folder, capsys):
    result = run(folder, update_card=True)
    metrics, protocol = result["metrics"], result["protocol"]
    assert set(metrics) == {
        "frechet_distance", "frechet_distance_of_fewer_images", "kernel_distance", "kernel_distance_std",
        "kernel_subset_size", "precision", "recall", "inception_score", "inception_score_std", "class_agreement",
        "constant_images",
    }  # fmt: skip
    assert list(metrics["frechet_distance_of_fewer_images"]) == ["7", "15", "30"]
    assert metrics["class_agreement"] < 0.5, "random weights"
    assert protocol["sampling"]["num_inference_steps"] == 2
    assert (protocol["solver"], protocol["labels"], protocol["seed"], protocol["dtype"]) == (
        "euler",
        "balanced",
        0,
        "float32",
    )
    assert protocol["reference"]["images"] == 450
    assert len(protocol["reference"]["sha256"]) == len(protocol["weights_sha256"]) == 16
    assert protocol["extractor"].startswith("classifier (")
    assert result["environment"]["images_per_second"] > 0
    assert result["environment"]["versions"]["torch"] == torch.__version__
    assert result["real_images"]["classifier_accuracy_on_real_images"] > 0.95
    assert 0 < result["real_images"]["frechet_distance_of_real_training_images"] < 1 < metrics["frechet_distance"]
    assert "Class agreement: " in capsys.readouterr().out
    card = ModelCard.load(folder / "README.md")
    found = {entry.metric_type: entry for entry in card.data.eval_results}
    assert found["frechet_distance"].metric_value == round(metrics["frechet_distance"], 3)
    assert found["accuracy"].metric_args["num_images"] == 60
    table = (folder / "evaluation" / "result.md").read_text().splitlines()
    assert len(table) == 3
    assert f"{metrics['recall']:.4f}".rstrip("0") in table[2]
    with Image.open(folder / "evaluation" / "samples.png") as grid:
        assert grid.width > 6 * 48
        assert grid.height > 10 * 48


def test_a_killed_run_goes_on_and_ends_the_same(folder, tmp_path, monkeypatch):
    expected = run(folder, output_dir=tmp_path / "whole")
    calls, original = [], DJEPAPipeline.__call__

    def call_and_die(self, *args, **kwargs):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(1)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(DJEPAPipeline, "__call__", call_and_die)
    with pytest.raises(KeyboardInterrupt):
        run(folder, output_dir=tmp_path / "killed")
    assert len(parts_of(tmp_path / "killed")) == 2
    with pytest.raises(ValueError, match=r"otherwise \(temperature was 1.0, is 0.9\): choose another `output_dir`"):
        run(folder, output_dir=tmp_path / "killed", temperature=0.9)
    with pytest.raises(ValueError, match="seed was 0, is 1"):
        run(folder, output_dir=tmp_path / "killed", seed=1)
    assert len(parts_of(tmp_path / "killed")) == 2
    monkeypatch.setattr(DJEPAPipeline, "__call__", original)
    found = run(folder, output_dir=tmp_path / "killed")
    assert found["metrics"] == expected["metrics"]
    assert torch.equal(features_of(tmp_path / "killed"), features_of(tmp_path / "whole"))
    monkeypatch.undo()
    monkeypatch.setattr(DJEPAPipeline, "__call__", lambda *_, **__: pytest.fail("nothing is generated twice"))
    assert run(folder, output_dir=tmp_path / "whole")["metrics"] == expected["metrics"]


def test_changed_weights_are_not_mixed_with_earlier_samples(folder, tmp_path):
    run(folder, output_dir=tmp_path / "out")
    pipe = DJEPAPipeline.from_pretrained(folder)
    with torch.no_grad():
        pipe.transformer.predictor.mask_token.add_(1)
    pipe.save_pretrained(folder)
    with pytest.raises(ValueError, match="weights_sha256 was "):
        run(folder, output_dir=tmp_path / "out")


def test_nor_are_those_of_another_autoencoder(tmp_path, judge):
    folder, images = tmp_path / "pipe", tmp_path / "images"
    images.mkdir()
    for i in range(5):
        pixels = np.random.default_rng(i).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(images / f"{i}.png")
    vae = tiny_vae(1)
    tiny_pipeline(vae).save_pretrained(folder)
    options = {"reference": images, "extractor": "test_evaluation:Channels", "output_dir": tmp_path / "out"}
    result = run_without_classifier(folder, **options)
    assert result["metrics"]["frechet_distance"] > 0
    with torch.no_grad():
        vae.decoder.conv_out.bias.add_(1)
    tiny_pipeline(vae).save_pretrained(folder)
    with pytest.raises(ValueError, match="vae_sha256 was "):
        run_without_classifier(folder, **options)


def test_processes_share_the_work_and_make_the_same_images(folder, tmp_path):
    run(folder, output_dir=tmp_path / "one", labels="random")
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", evaluate_pipeline.__file__]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    argv = [sys.executable, *command, *command_line(folder, output_dir=tmp_path / "two", labels="random")]
    result = subprocess.run(argv, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    assert torch.equal(features_of(tmp_path / "two"), features_of(tmp_path / "one"))
    one, two = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("one", "two"))
    assert one["metrics"] == two["metrics"]
    assert (one["environment"]["processes"], two["environment"]["processes"]) == (1, 2)
    argv += ["--save_images", "npz"]
    again = subprocess.run(argv, env=environment, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr[-3000:]
    assert again.stdout.count("Class agreement: ") == 1, "the main process alone tells"
    with np.load(tmp_path / "two" / "samples.npz") as file:
        assert len(file["arr_0"]) == 60


def test_labels_are_in_turn_or_drawn():
    assert [label_of(i, 4, "balanced", 0) for i in range(6)] == [0, 1, 2, 3, 0, 1]
    drawn = [label_of(i, 4, "random", 0) for i in range(400)]
    assert drawn != [label_of(i, 4, "random", 1) for i in range(400)]
    assert all(70 < drawn.count(label) < 130 for label in range(4))


def test_pictures_are_kept_and_become_a_reference(folder, tmp_path, judge):
    out = tmp_path / "out"
    result = run(folder, output_dir=out, save_images="npz", num_images=110)
    assert len(list((out / "images").glob("*.png"))) == 110
    with np.load(out / "samples.npz") as file:
        samples = file["arr_0"]
    assert (samples.shape, samples.dtype) == ((110, 8, 8, 3), np.uint8)
    assert np.array_equal(samples[7, :, :, 0], np.asarray(Image.open(out / "images" / "000007.png")))
    same = run(folder, reference=out / "images", output_dir=tmp_path / "same", num_images=110)
    assert same["metrics"]["frechet_distance"] == pytest.approx(0, abs=1e-4)
    assert (same["metrics"]["precision"], same["metrics"]["recall"]) == (1.0, 1.0)
    features = features_of(out).double().numpy()
    np.savez(tmp_path / "statistics.npz", mu=features.mean(0), sigma=np.cov(features.T))
    again = run(folder, reference=tmp_path / "statistics.npz", output_dir=tmp_path / "again", num_images=110)
    assert again["metrics"]["frechet_distance"] == pytest.approx(0, abs=1e-4)
    assert "recall" not in again["metrics"], "statistics have no neighbours"
    assert len(again["protocol"]["reference"]["sha256"]) == 16
    assert result["metrics"]["frechet_distance"] > 1
    np.savez(tmp_path / "both.npz", arr_0=samples, mu=np.zeros(2048), sigma=np.eye(2048))
    both = run(folder, reference=tmp_path / "both.npz", output_dir=tmp_path / "both", num_images=110)
    assert both["metrics"]["frechet_distance"] == pytest.approx(0, abs=1e-4), "the statistics are Inception's"


def test_pictures_can_be_asked_for_later_and_figures_changed_without_new_samples(folder, tmp_path, monkeypatch):
    first = run(folder, output_dir=tmp_path / "out", num_images=110)
    assert len(list((tmp_path / "out" / "images").glob("*.png"))) == 100
    later = run(folder, output_dir=tmp_path / "out", num_images=110, save_images="png")
    assert len(list((tmp_path / "out" / "images").glob("*.png"))) == 110
    assert later["metrics"] == first["metrics"]
    monkeypatch.setattr(DJEPAPipeline, "__call__", lambda *_, **__: pytest.fail("the samples are there"))
    changed = run(folder, output_dir=tmp_path / "out", num_images=110, kernel_subset_size=50)
    assert changed["metrics"]["kernel_subset_size"] == 50
    assert changed["metrics"]["frechet_distance"] == first["metrics"]["frechet_distance"]
    assert changed["metrics"]["kernel_distance"] != first["metrics"]["kernel_distance"]


def test_classes_go_by_name(tmp_path, digits):
    """Folders are read in alphabetical order, a model's classes may have any."""
    images, labels = digits[0]
    for image, label in zip(images[:300], labels[:300].tolist(), strict=True):
        place = tmp_path / "classes" / f"{'zero' if label == 0 else label}"
        place.mkdir(parents=True, exist_ok=True)
        pixels = (image[0].numpy() * 255).round().astype(np.uint8)
        Image.fromarray(pixels).save(place / f"{len(list(place.iterdir()))}.png")
    names = {i: str(i) for i in range(1, 10)} | {0: "zero"}
    pipe = tiny_pipeline(id2label=names)
    pipe.save_pretrained(tmp_path / "pipe")
    classes = str(tmp_path / "classes")
    options = {"reference": classes, "extractor": "classifier", "classifier_data": classes}
    args = EvaluationArguments(str(tmp_path / "pipe"), **options)
    judge = args.load_extractor(pipe)
    _, logits = judge(images[:300])
    assert class_agreement(logits, labels[:300], judge) > 0.95
    reference = args.load_reference(pipe, judge, start_processes())
    assert class_agreement(reference.logits, reference.labels, judge) > 0.95
    with pytest.raises(ValueError, match="zero"):
        args.load_extractor(tiny_pipeline(id2label={i: str(i) for i in range(10)}))


def test_results_have_a_place(folder):
    options = {"reference": "digits"}
    assert EvaluationArguments(str(folder), **options).folder("evaluation") == folder / "evaluation"
    assert EvaluationArguments("org/model", **options).folder("grid") == Path("outputs/model/grid")
    assert EvaluationArguments("org/model", output_dir="there", **options).folder("grid") == Path("there")


def test_references_that_do_not_fit(folder, tmp_path, judge):
    def refuse(message, **content):
        np.savez(tmp_path / "a.npz", **content)
        with pytest.raises(ValueError, match=message):
            run(folder, reference=tmp_path / "a.npz", output_dir=tmp_path / "out")

    levels = np.zeros((5, 8, 8, 1), np.uint8)
    refuse(r"must have shape \(n, 8, 8, 1 or 3\), like the generated images, got \(5, 7, 8, 1\)", arr_0=levels[:, 1:])
    colours = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    refuse("holds colour images, the generated ones are grey", arr_0=colours)
    refuse("must hold levels from 0 to 255 .uint8., got float64", arr_0=levels / 255)
    refuse("holds statistics of 7 features, this extractor has 100", mu=np.zeros(7), sigma=np.eye(7))
    refuse(r"`mu` must be \(d,\) and `sigma` \(d, d\), got \(7,\) and \(6, 6\)", mu=np.zeros(7), sigma=np.eye(6))
    refuse("`mu` and `sigma` must be finite", mu=np.full(3, np.nan), sigma=np.eye(3))
    refuse("must hold samples .`arr_0`. or statistics", other=np.zeros(3))
    refuse("has 3 images; 4 are needed", arr_0=levels[:3] + np.arange(3, dtype=np.uint8)[:, None, None, None])
    refuse("All images have the same features", arr_0=levels)
    refuse("There are no images", arr_0=levels[:0])
    (tmp_path / "b.npz").write_bytes(b"no archive")
    (tmp_path / "c.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:-60])
    for name in ("b.npz", "c.npz", "nowhere.npz"):
        with pytest.raises(ValueError, match=r"cannot be read as an \.npz file"):
            run(folder, reference=tmp_path / name, output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists(), "all of it before anything is generated"


def test_bad_options_are_refused_before_anything_is_generated(folder, tmp_path):
    out = tmp_path / "out"
    for options, message in (
        ({"num_images": 19}, "`num_images` must be at least 20 for all metrics, got 19"),
        ({"kernel_subset_size": 1}, "`kernel_subset_size` must be at least 2, got 1"),
        ({"kernel_subset_size": 100}, "is 100, but there are 60 generated and 450 real images: generate more, or make"),
        ({"solver": "ddim"}, "The solvers for the objective 'flow_matching' are euler, heun, midpoint, got 'ddim'"),
        ({"num_inference_steps": 17}, r"`num_inference_steps` must lie in 1\.\.16"),
        ({"extractor": "inception"}, "`classifier_data` goes with `extractor` 'classifier'"),
        ({"extractor": "nowhere:network", "classifier_data": ""}, "`classifier_data` goes with"),
        ({"extractor": "classifer"}, "`extractor` must be 'inception', 'classifier' or 'module:function'"),
        ({"reference": "digts"}, "There is no data set 'digts'; did you mean 'digits'"),
        ({"batch_size": 0}, "`batch_size` must be at least 1"),
        ({"dtype": "float8"}, "`dtype` must be float32, bfloat16 or float16"),
    ):
        with pytest.raises(ValueError, match=message):
            run(folder, output_dir=out, **options)
    with pytest.raises(FileNotFoundError, match=r"There is no folder .*nowhere"):
        run(folder.parent / "nowhere", output_dir=out)
    (folder / "README.md").unlink()
    with pytest.raises(ValueError, match=r"`update_card`: there is no README\.md"):
        run(folder, output_dir=out, update_card=True)
    with pytest.raises(ValueError, match="`reference` is missing"):
        evaluate_pipeline.main(["--pipeline", str(folder)])
    assert not out.exists()


@pytest.mark.parametrize(
    ("value", "message"), [(float("nan"), "Image 0 is not finite"), (0.0, "All 8 images have the same")]
)
def test_images_that_say_nothing(judge, tmp_path, monkeypatch, value, message):
    pipe = tiny_pipeline(id2label={i: str(i) for i in range(10)})
    monkeypatch.setattr(pipe.transformer, "unpatchify", lambda tokens: torch.full((len(tokens), 1, 8, 8), value))
    with pytest.raises(ValueError, match=message):
        generate(pipe, judge, start_processes(), tmp_path, 8, 4, SAMPLING)


class Channels(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, images):
        return self.scale * torch.stack([images.mean((1, 2, 3)), images.std((1, 2, 3)), images.amax((1, 2, 3))], dim=1)


def run_without_classifier(folder, **options):
    argv = command_line(folder, **options)
    at = argv.index("--classifier_data")
    evaluate_pipeline.main(argv[:at] + argv[at + 2 :])
    return json.loads((options["output_dir"] / "result.json").read_text())


def test_any_network_extracts(folder, tmp_path):
    options = {"extractor": "test_evaluation:Channels", "reference": "digits", "output_dir": tmp_path / "out"}
    result = run_without_classifier(folder, **options)
    assert result["protocol"]["extractor"].startswith("test_evaluation:Channels (")
    assert {"frechet_distance", "recall"} < set(result["metrics"])
    assert not {"inception_score", "class_agreement", "real_images"} & {*result["metrics"], *result}
    for name, message in (
        ("nowhere:network", "No module named 'nowhere'"),
        ("json:nothing", "has no attribute 'nothing'"),
        ("time:time", "must make an nn.Module, got a float"),
    ):
        with pytest.raises(ValueError, match=message):
            CustomExtractor(name)


def test_inception_is_torch_fidelitys(monkeypatch, tmp_path):
    """A stand-in for a network that comes with 90 MB of weights."""

    class Network(torch.nn.Module):
        def __init__(self, name, features_list, feature_extractor_weights_path=None):
            super().__init__()
            if feature_extractor_weights_path is None:
                raise URLError("no network")
            assert features_list == ["2048", "logits_unbiased"]
            self.norm = torch.nn.BatchNorm2d(3)

        def forward(self, images):
            assert (images.dtype, images.shape[1]) == (torch.uint8, 3)
            features = self.norm(images.float()).flatten(1)
            return features[:, :20], features[:, :5]

    module = ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3 = Network
    monkeypatch.setitem(sys.modules, "torch_fidelity", ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    torch.save({}, tmp_path / "weights.pth")
    extractor, images = InceptionExtractor(str(tmp_path / "weights.pth")), torch.rand(4, 1, 8, 8)
    features, logits = extractor(images)
    assert (features.shape, logits.shape) == ((4, 20), (4, 5))
    torch.testing.assert_close(extractor(images[:1])[0], features[:1], msg="an image knows nothing of its neighbours")
    for path, message in ((None, "cannot be had .*no network"), ("nowhere.pth", "cannot be had .*No such file")):
        with pytest.raises(ValueError, match=message):
            InceptionExtractor(path)
    (tmp_path / "code.pth").write_bytes(pickle.dumps(os.getcwd))
    with pytest.raises(ValueError, match="holds more than weights, and could run code"):
        InceptionExtractor(str(tmp_path / "code.pth"))


def test_inception_says_what_it_needs(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(ValueError, match=r"needs torch-fidelity: pip install 'djepa_hf\[eval\]'"):
        InceptionExtractor()


def test_images_of_latents_and_of_rectangles_have_their_size():
    assert image_size(tiny_pipeline(tiny_vae(1))) == (16, 3)
    assert image_size(tiny_pipeline(sample_size=(4, 8))) == ((4, 8), 1)
    with pytest.raises(ValueError, match="with 2 channels on a grid of rank 2 are no pictures"):
        image_size(tiny_pipeline(num_channels=2))


def test_references_are_cropped_like_training_images(tmp_path, judge):
    for name in ("0", "1"):
        (tmp_path / "classes" / name).mkdir(parents=True)
        for i in range(3):
            pixels = np.random.default_rng(i).integers(0, 256, (20, 30), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "classes" / name / f"{i}.png")
    shutil.copytree(tmp_path / "classes" / "1", tmp_path / "flat")
    with_classes = load_reference(RealImages(str(tmp_path / "classes")), judge, 8, 1, batch_size=4)
    flat = load_reference(RealImages(str(tmp_path / "flat")), judge, 8, 1)
    assert with_classes.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert flat.labels is None
    torch.testing.assert_close(with_classes.features[3:], flat.features)


def test_results_of_solvers_and_profiles_say_so(folder, tmp_path):
    fast = run(folder, output_dir=tmp_path / "fast", profile="fast")["protocol"]
    assert (fast["solver"], fast["scheduler"]["solver"]) == ("midpoint", "midpoint")
    assert fast["profile"] == "fast"
    assert fast["sampling"]["null_refresh_interval"] == 2  # what the profile stands for
    with pytest.raises(ValueError, match=r"drawn otherwise .*profile was fast, is exact"):
        run(folder, output_dir=tmp_path / "fast")
    pipe = tiny_pipeline(objective="diffusion", id2label={i: str(i) for i in range(10)})
    pipe.save_pretrained(tmp_path / "diffusion")
    other = run(tmp_path / "diffusion", solver="dpmsolver++", num_denoising_steps=4)["protocol"]
    assert other["solver"] == "dpmsolver++"
    assert other["sampling"]["temperature"] is None  # it knows none
    assert other["scheduler"]["lambda_min_clipped"] == "-inf"


def test_a_grid_search_finds_the_best_and_goes_on(folder, tmp_path, monkeypatch, capsys):
    def search(**options):
        given = {"guidance_scales": [1, 2], "temperatures": [1.0], "denoising_steps": [1, 2], "inference_steps": [2, 4]}
        grid_search.main(command_line(folder, output_dir=tmp_path / "grid", **{**given, **options}))
        return json.loads((tmp_path / "grid" / "grid.json").read_text())

    found = search()
    distances = [cell["metrics"]["frechet_distance"] for cell in found["cells"]]
    assert len(distances) == 2
    assert found["best"]["metrics"]["frechet_distance"] == min(distances)
    curve = found["curves"]["euler"]["num_inference_steps"]
    assert [cell["protocol"]["sampling"]["num_inference_steps"] for cell in curve] == [2, 4]
    for name in ("grid.png", "steps.png"):
        with Image.open(tmp_path / "grid" / name) as picture:
            assert picture.width > 300
    cells = {path.name for path in (tmp_path / "grid" / "cells").iterdir()}
    assert len(cells) == 4, "cells that curves share with the grid are not made twice"
    made, original = [], generation.generate

    def count(*args, **kwargs):
        made.append(args[3].name)
        return original(*args, **kwargs)

    monkeypatch.setattr("djepa_hf.evaluation.protocol.generate", count)
    refined = search(refinements=1)
    assert len(refined["cells"]) == 3
    assert made == ["guidance1.5_temperature1_steps2_denoising2"], "only the new cell is sampled"
    for bad, message in (
        ({"refinements": -1}, "`refinements` must not be negative"),
        ({"temperatures": [1, -1]}, "`temperature` must be finite and not negative, got -1"),
        ({"denoising_steps": [0]}, "`num_denoising_steps` must be at least 1, got 0"),
        ({"inference_steps": [17]}, "`num_inference_steps` must lie in"),
        ({"solvers": ["ddim"]}, "The solvers for the objective 'flow_matching' are"),
    ):
        with pytest.raises(ValueError, match=message):
            search(**bad)
    assert len(made) == 1, "wrong values are refused before anything is sampled"
    assert "Best: guidance " in capsys.readouterr().out


def test_refinement_halves_the_distance():
    assert grid_search.neighbours(2.0, {1.0, 1.5, 2.0, 3.0}) == [1.5, 3.0]
    assert grid_search.neighbours(1.0, {1.0, 1.5}) == [1.5]
    assert grid_search.neighbours(1.0, {1.0}) == []


def test_sample_files_are_written_one_picture_at_a_time(tmp_path):
    pixels = [np.full((4, 6, 3), i, np.uint8) for i in range(3)]
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / f"{i:06d}.png")
    save_npz(tmp_path, 3, tmp_path / "out.npz")
    with np.load(tmp_path / "out.npz") as file:
        assert np.array_equal(file["arr_0"], np.stack(pixels))
