"""Sampling: exactness, independence of neighbours, inputs, outputs, callbacks, saving and loading."""

import json
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import ModelHook, add_hook_to_module
from conftest import generators, relative_error, tiny_model, tiny_pipeline, tiny_vae
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

import djepa_hf
from djepa_hf import DDPMTokenScheduler, DJEPAPipeline, FlowMatchTokenScheduler
from djepa_hf.accounting import sampling_flops
from djepa_hf.masking import num_masked_per_step

FAST = {"num_inference_steps": 4, "num_denoising_steps": 3, "output_type": "latent"}
OBJECTIVES = ["diffusion", "flow_matching"]


# --- exact against the official algorithm


def test_samples_equal_the_official_ones(golden):
    meta, gold, flow = golden.meta, golden.tensors, golden.flow
    for shift in meta["shifts"]:
        scheduler = FlowMatchTokenScheduler(shift=shift) if flow else DDPMTokenScheduler()
        pipe = DJEPAPipeline(golden.model.djepa, scheduler)
        pipe.set_progress_bar_config(disable=True)
        for guidance in meta["cfgs"]:
            images = pipe(
                gold["class_labels"],
                num_inference_steps=meta["num_iter"],
                # the official flow sampler makes one evaluation fewer than it is told
                num_denoising_steps=meta["num_sampling_steps"] - flow,
                guidance_scale=guidance,
                temperature=1.0 if flow else 0.0,
                latents=gold["latents"],
                token_order=gold["token_order"].flip(-1),
                output_type="latent",
            ).images
            assert relative_error(images, gold[f"generated_cfg{guidance}_shift{shift}"]) < 5e-3


# --- randomness


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_an_image_does_not_depend_on_its_neighbours(objective):
    pipe = tiny_pipeline(objective=objective)
    alone = pipe([2], generator=generators(7), **FAST).images
    single = pipe([2], generator=generators(7)[0], **FAST).images
    among = pipe([1, 2, 4], generator=generators(3, 7, 9), **FAST).images
    other = pipe([2, 2], generator=generators(8, 7), **FAST).images
    assert torch.equal(alone, single)
    torch.testing.assert_close(among[1:2], alone, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(other[1:2], alone, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(other[:1], alone, atol=0.1)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_same_seed_same_images(objective):
    pipe = tiny_pipeline(objective=objective)
    first, second = (pipe([0, 1], generator=generators(0)[0], **FAST).images for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, pipe([0, 1], generator=generators(1)[0], **FAST).images)


def test_order_and_noise_decide_a_flow_sample():
    pipe = tiny_pipeline()
    latents = torch.randn(2, 16, 4)
    order = torch.stack([torch.randperm(16) for _ in range(2)])
    first = pipe([0, 1], latents=latents, token_order=order, **FAST).images
    assert torch.equal(first, pipe([0, 1], latents=latents, token_order=order, **FAST).images)
    assert not torch.equal(first, pipe([0, 1], latents=latents, token_order=order.flip(-1), **FAST).images)


# --- guidance, temperature, steps


def test_guidance_changes_nothing_at_scale_one_and_less_in_a_linear_schedule():
    pipe = tiny_pipeline()
    inputs = {"latents": torch.randn(1, 16, 4), "token_order": torch.arange(16)[None], **FAST}

    def sample(scale, schedule):
        return pipe(3, guidance_scale=scale, guidance_schedule=schedule, **inputs).images

    plain = sample(1.0, "constant")
    assert torch.equal(plain, sample(1.0, "linear"))
    torch.testing.assert_close(plain, sample(1.0 + 1e-6, "constant"), atol=1e-4, rtol=1e-4)
    change = {schedule: (sample(3.0, schedule) - plain).abs() for schedule in ("linear", "constant")}
    first = num_masked_per_step(16, 4)[1]  # the first row of tokens belongs to the first step
    assert first == 14
    early = {schedule: difference[0, 0, :2, :4].mean() for schedule, difference in change.items()}
    assert 0 < early["linear"] < 0.5 * early["constant"]


def test_guidance_is_a_line_through_null_and_class():
    pipe = tiny_pipeline()
    inputs = {"latents": torch.randn(1, 16, 4), "token_order": torch.arange(16)[None], "guidance_schedule": "constant"}
    one_evaluation = {"num_inference_steps": 1, "num_denoising_steps": 1, "output_type": "latent"}
    at = {scale: pipe(3, guidance_scale=scale, **inputs, **one_evaluation).images for scale in (0.0, 1.0, 2.5)}
    torch.testing.assert_close(at[2.5], at[0.0] + 2.5 * (at[1.0] - at[0.0]), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(at[0.0], at[1.0], atol=0.01)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_temperature_narrows_samples(objective):
    pipe = tiny_pipeline(objective=objective)
    inputs = {"latents": torch.randn(1, 16, 4), "token_order": torch.arange(16)[None], **FAST}
    inputs["guidance_scale"] = 1.0
    first, second = (pipe(0, temperature=0.0, generator=generators(i)[0], **inputs).images for i in (0, 1))
    assert torch.equal(first, second)
    warm = pipe(0, temperature=1.0, generator=generators(0)[0], **inputs).images
    assert not torch.equal(first, warm)


@pytest.mark.parametrize("num_steps", [1, 2, 16])
def test_any_number_of_steps_generates_every_token(num_steps):
    pipe = tiny_pipeline()
    latents = torch.randn(1, 16, 4)
    image = pipe(0, num_inference_steps=num_steps, num_denoising_steps=1, latents=latents, output_type="latent").images
    assert (pipe.transformer.patchify(image) != 0.98 * latents).all()


@pytest.mark.parametrize("objective", ["diffusion", "flow_matching"])
def test_denoising_steps_can_shrink_along_the_way(objective):
    pipe, evaluations = tiny_pipeline(objective=objective), []
    pipe.transformer.denoiser.register_forward_hook(lambda *_: evaluations.append(1))
    options = {"num_inference_steps": 4, "num_denoising_steps": 9, "output_type": "latent"}

    def sample(**more):
        evaluations.clear()
        return pipe([0, 1], generator=generators(0, 1), **options, **more).images

    same = sample()
    assert len(evaluations) == 36
    assert torch.equal(sample(final_denoising_steps=9), same)
    shrinking = sample(final_denoising_steps=3)
    assert len(evaluations) == 9 + 7 + 5 + 3
    assert not torch.equal(shrinking, same)
    flops = [sampling_flops(pipe.transformer.config, 4, 9, 3.0, final)["denoiser"] for final in (None, 9, 3)]
    assert flops[0] == flops[1] > flops[2]
    with pytest.raises(ValueError, match="`final_denoising_steps` must be at least 1, got 0"):
        sample(final_denoising_steps=0)


@pytest.mark.parametrize(
    "scheduler", [DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler, EulerDiscreteScheduler]
)
def test_diffusers_schedulers_take_the_ddpm_schedulers_place(scheduler):
    pipe = tiny_pipeline(objective="diffusion")
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    options = {**FAST, "num_denoising_steps": 10}
    before = dict(vars(pipe.scheduler))
    first = pipe([0, 3], generator=generators(1, 2), **options).images
    second = pipe([3], generator=generators(2), **options).images
    assert torch.isfinite(first).all()
    torch.testing.assert_close(first[1:], second, atol=1e-3, rtol=1e-3)
    assert all(before[name] is value for name, value in vars(pipe.scheduler).items())  # a call leaves it as it was


def test_ddim_follows_the_perfect_noise_to_the_clean_tokens(monkeypatch):
    pipe = tiny_pipeline(objective="diffusion")
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    clean, ours = torch.randn(1, 16, 4), DDPMTokenScheduler()
    state = {}

    def perfect(tokens, *condition):
        timestep = state["timesteps"][state["call"] % 10]
        state["call"] += 1
        signal = ours.add_noise(torch.ones(1, 1), torch.zeros(1, 1), timestep[None])
        spread = ours.add_noise(torch.zeros(1, 1), torch.ones(1, 1), timestep[None])
        return torch.cat([(tokens - signal * clean[0]) / spread, torch.full_like(tokens, torch.nan)], dim=-1)

    scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(10)
    state.update(timesteps=scheduler.timesteps, call=0)
    monkeypatch.setattr(pipe.transformer.denoiser, "forward", perfect)
    options = {"num_inference_steps": 1, "num_denoising_steps": 10, "guidance_scale": 1.0, "output_type": "latent"}
    image = pipe(0, token_order=torch.arange(16)[None], **options).images
    torch.testing.assert_close(pipe.transformer.patchify(image), clean, atol=1e-3, rtol=1e-3)


# --- labels


@pytest.mark.parametrize(
    ("labels", "ids"),
    [
        (3, [3]),
        ("goldfish", [1]),
        ("Tinca_tinca", [0]),
        ("TENCH", [0]),
        ("tench, Tinca tinca", [0]),
        ("great white shark", [2]),
        ([4, "hen", np.int64(1)], [4, 3, 1]),
        (torch.tensor([2, 0]), [2, 0]),
        ([[0, 1], [2, 3]], [0, 1, 2, 3]),
    ],
)
def test_labels_are_ids_or_names(labels, ids):
    assert tiny_pipeline().get_label_ids(labels) == ids


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (5, r"Class id 5 is out of range: this model knows 0..4"),
        (-1, r"Class id -1 is out of range"),
        ("goldfsh", r"Unknown class 'goldfsh'. The closest names are: goldfish"),
        ([0, "shark"], r"Unknown class 'shark'. The closest names are: great_white shark"),
        (1.0, r"must be class ids or names, got 1.0"),
        (True, r"must be class ids or names, got True"),
    ],
)
def test_unknown_labels_are_refused(labels, message):
    with pytest.raises(ValueError, match=message):
        tiny_pipeline()(labels)


def test_an_exact_name_goes_before_a_similar_one():
    pipe = tiny_pipeline(id2label={0: "A", 1: "a", 2: "10", 3: "b, a", 4: "c"})
    assert pipe.get_label_ids(["a", "A", "10", "B"]) == [1, 0, 2, 3]


def test_images_of_a_label_are_neighbours():
    pipe = tiny_pipeline()
    seeds = generators(1, 2, 3, 4)
    images = pipe(["hen", 1], num_images_per_label=2, generator=seeds, **FAST).images
    hens = pipe(3, num_images_per_label=2, generator=generators(1, 2), **FAST).images
    torch.testing.assert_close(images[:2], hens, atol=1e-4, rtol=1e-4)


# --- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"class_labels": []}, "`class_labels` is empty"),
        ({"num_inference_steps": 17}, r"`num_inference_steps` must lie in 1..16, .* 16 tokens .* got 17"),
        ({"num_inference_steps": 0}, r"`num_inference_steps` must lie in 1..16"),
        ({"num_denoising_steps": 0}, "`num_denoising_steps` must be at least 1, got 0"),
        ({"num_images_per_label": 0}, "`num_images_per_label` must be at least 1, got 0"),
        ({"guidance_schedule": "cosine"}, r"must be one of \('linear', 'constant'\), got 'cosine'"),
        ({"guidance_scale": float("nan")}, "`guidance_scale` must be finite and not negative, got nan"),
        ({"temperature": -0.5}, "`temperature` must be finite and not negative, got -0.5"),
        ({"generator": generators(0, 1, 2)}, r"one per image \(2\), got a list of 3"),
        ({"generator": 7}, "`generator` must be a torch.Generator or a list of them, got 7"),
        ({"latents": torch.zeros(2, 16, 3)}, r"`latents` must have shape \(2, 16, 4\), got \(2, 16, 3\)"),
        ({"token_order": torch.zeros(1, 16)}, r"`token_order` must have shape \(2, 16\), got \(1, 16\)"),
        ({"token_order": torch.arange(16).expand(2, 16) + 0.4}, r"must be a permutation of 0..15"),
        ({"token_order": torch.zeros(2, 16).long()}, r"must be a permutation of 0..15"),
        ({"output_type": "jpeg"}, "`output_type` must be one of .* got 'jpeg'"),
        ({"callback_on_step_end_tensor_inputs": ["prompt"]}, r"must be in \['latents', 'mask'\], got \['prompt'\]"),
    ],
)
def test_bad_calls_are_refused_before_any_work(options, message):
    pipe = tiny_pipeline()
    pipe.transformer.encoder.register_forward_pre_hook(lambda *_: pytest.fail("work has begun"))
    with pytest.raises(ValueError, match=message):
        pipe(**{"class_labels": [0, 1], "num_inference_steps": 4, **options})


@pytest.mark.parametrize(
    ("objective", "scheduler", "message"),
    [
        ("diffusion", FlowMatchTokenScheduler(), "'diffusion', which needs .* 'epsilon', such as DDPMTokenScheduler"),
        ("flow_matching", DDPMTokenScheduler(), "such as FlowMatchTokenScheduler; DDPMTokenScheduler has 'epsilon'"),
        ("flow_matching", FlowMatchEulerDiscreteScheduler(), "FlowMatchEulerDiscreteScheduler has None"),
        ("diffusion", DDIMScheduler(prediction_type="v_prediction"), "DDIMScheduler has 'v_prediction'"),
    ],
)
def test_a_scheduler_must_fit_the_objective(objective, scheduler, message):
    with pytest.raises(ValueError, match=message):
        DJEPAPipeline(tiny_model(objective=objective), scheduler)
    pipe = tiny_pipeline(objective=objective)
    pipe.scheduler = scheduler
    with pytest.raises(ValueError, match=message):
        pipe(0, **FAST)


def test_the_noise_path_must_be_the_models():
    pipe = tiny_pipeline(objective="diffusion")
    pipe.scheduler = DDIMScheduler()
    with pytest.raises(ValueError, match=r"'squaredcos_cap_v2', got 'linear': build it with DDIMScheduler.from_config"):
        pipe(0, **FAST)


def test_a_vae_must_fit_the_model():
    with pytest.raises(ValueError, match="A VAE decodes grids of rank 2; this model's has rank 3"):
        tiny_pipeline(vae=tiny_vae(4), sample_size=(2, 4, 4), num_channels=4)
    with pytest.raises(ValueError, match="The VAE has 4 latent channels, the model 1"):
        tiny_pipeline(vae=tiny_vae(4))


def test_what_is_no_picture_is_not_called_one():
    pipe = tiny_pipeline(sample_size=(2, 4, 4), patch_size=2)
    options = {"num_inference_steps": 2, "num_denoising_steps": 1}
    with pytest.raises(ValueError, match="1 channels on a grid of rank 3 are no pictures"):
        pipe(0, **options)
    assert pipe(0, output_type="pt", **options).images.shape == (1, 1, 2, 4, 4)
    assert pipe(0, output_type="np", **options).images.shape == (1, 2, 4, 4, 1)


# --- outputs, VAE, callbacks


def test_output_types_show_the_same_image():
    pipe = tiny_pipeline()
    inputs = {"latents": torch.randn(2, 16, 4), "token_order": torch.arange(16).expand(2, 16), **FAST}
    images = {kind: pipe([0, 1], **{**inputs, "output_type": kind}).images for kind in ("latent", "pt", "np", "pil")}
    expected = (images["latent"] / 2 + 0.5).clamp(0, 1)
    assert torch.equal(images["pt"], expected)
    assert np.array_equal(images["np"], expected.permute(0, 2, 3, 1).numpy())
    assert [image.size for image in images["pil"]] == [(8, 8)] * 2
    assert images["pil"][0].mode == "L"
    assert np.array_equal(np.asarray(images["pil"][1]), (expected[1, 0].numpy() * 255).round().astype("uint8"))
    assert torch.equal(pipe([0, 1], return_dict=False, **inputs)[0], images["latent"])


def test_latents_are_decoded_by_the_vae():
    vae = tiny_vae(4)
    pipe = tiny_pipeline(vae=vae, sample_size=4, patch_size=1, num_channels=4)
    inputs = {"latents": torch.randn(1, 16, 4), "token_order": torch.arange(16)[None], **FAST}
    latents = pipe(0, **inputs).images
    image = pipe(0, **{**inputs, "output_type": "pt"}).images
    with torch.no_grad():
        expected = vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor).sample
    assert image.shape == (1, 3, 8, 8)
    torch.testing.assert_close(image, (expected / 2 + 0.5).clamp(0, 1))
    assert pipe(0, **{**inputs, "output_type": "pil"}).images[0].size == (8, 8)


def test_callbacks_see_the_partial_tokens_and_may_change_them():
    pipe = tiny_pipeline()
    noise, order = torch.randn(1, 16, 4), torch.randperm(16)[None]
    seen = []

    def watch(pipeline, step, num_hidden, tensors):
        assert pipeline is pipe
        hidden = tensors["mask"]
        assert hidden.sum() == num_hidden
        assert torch.equal(tensors["latents"][hidden], noise[hidden])  # still to come
        assert (tensors["latents"][~hidden] != noise[~hidden]).all()
        assert pipe.decode_tokens(tensors["latents"], "pil", tensors["mask"])[0].size == (8, 8)
        seen.append((step, num_hidden))
        return tensors

    inputs = {"latents": noise, "token_order": order, "temperature": 1.0, **FAST}
    names = {"callback_on_step_end_tensor_inputs": ["latents", "mask"]}
    watched = pipe(0, callback_on_step_end=watch, **names, **inputs).images
    assert seen == list(enumerate(num_masked_per_step(16, 4)[1:]))
    assert pipe.num_timesteps == 4
    assert torch.equal(watched, pipe(0, **inputs).images)

    def blacken(pipeline, step, num_hidden, tensors):
        return {"latents": torch.zeros_like(tensors["latents"])} if num_hidden == 0 else tensors

    assert pipe(0, callback_on_step_end=blacken, **inputs).images.abs().max() == 0


def test_a_callback_can_stop_the_run():
    pipe = tiny_pipeline()
    steps = []

    def stop(pipeline, step, num_hidden, tensors):
        steps.append(step)
        pipeline._interrupt = step == 1
        return tensors

    pipe(0, callback_on_step_end=stop, **FAST)
    assert steps == [0, 1]
    pipe(0, **FAST)
    assert not pipe.interrupt


def test_progress_bar_counts_autoregressive_steps(capsys):
    pipe = tiny_pipeline()
    pipe.set_progress_bar_config(disable=False)
    pipe(0, **FAST)
    assert "4/4" in capsys.readouterr().err


# --- precision, offload


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_bfloat16_stays_close(objective):
    pipe = tiny_pipeline(objective=objective)
    options = {**FAST, "num_denoising_steps": 20, "guidance_scale": 2.0}
    inputs = {"latents": torch.randn(4, 16, 4), "token_order": torch.arange(16).expand(4, 16), **options}
    expected = pipe([0, 1, 2, 3], generator=generators(0)[0], **inputs).images
    pipe.to(torch.bfloat16)
    images = pipe([0, 1, 2, 3], generator=generators(0)[0], **inputs).images
    assert pipe.transformer.dtype == torch.bfloat16
    assert images.dtype == torch.float32
    assert relative_error(images, expected) < 0.05


def test_every_entry_to_the_model_fires_its_offload_hook():
    class Counter(ModelHook):
        calls = 0

        def pre_forward(self, module, *args, **kwargs):
            self.calls += 1
            return args, kwargs

    model, hook = tiny_model(), Counter()
    add_hook_to_module(model, hook)
    tokens, visible = torch.randn(1, 16, 4), torch.arange(4)[None]
    features = model.predict(model.encode(tokens, visible=visible), visible=visible)
    model.denoise(tokens[0], torch.rand(16), features[0])
    assert hook.calls == 3


def test_sequential_offload_brings_every_weight_in_time():
    pipe = tiny_pipeline()
    inputs = {"latents": torch.randn(1, 16, 4), "token_order": torch.arange(16)[None], **FAST}
    expected = pipe(0, **inputs).images
    # the CPU stands in for the accelerator: weights lie on no device but during the forward that needs them
    cpu_offload(pipe.transformer, execution_device=torch.device("cpu"))
    assert {parameter.device.type for parameter in pipe.transformer.parameters()} == {"meta"}
    assert torch.equal(pipe(0, **inputs).images, expected)


# --- saving and loading


def assert_same_images(first: DJEPAPipeline, second: DJEPAPipeline):
    inputs = {"latents": torch.randn(1, 16, 4), "token_order": torch.arange(16)[None], **FAST}
    second.set_progress_bar_config(disable=True)
    assert torch.equal(first(0, **inputs).images, second(0, **inputs).images)


@pytest.mark.parametrize("with_vae", [True, False])
def test_save_and_load(tmp_path, with_vae):
    sizes = {"vae": tiny_vae(4), "sample_size": 4, "patch_size": 1, "num_channels": 4} if with_vae else {}
    pipe = tiny_pipeline(**sizes)
    pipe.scheduler = FlowMatchTokenScheduler(shift=2.0)
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "DJEPAPipeline"
    assert index["transformer"] == ["djepa_hf", "DJEPAModel"]
    assert index["scheduler"] == ["djepa_hf", "FlowMatchTokenScheduler"]
    reloaded = DJEPAPipeline.from_pretrained(tmp_path)
    assert reloaded.scheduler.config.shift == 2.0
    assert (reloaded.vae is not None) == with_vae
    assert_same_images(pipe, reloaded)


def test_half_precision_variant(tmp_path):
    pipe = tiny_pipeline()
    pipe.to(torch.bfloat16)
    pipe.save_pretrained(tmp_path, variant="bf16")
    assert (tmp_path / "transformer" / "model.bf16.safetensors").exists()
    reloaded = DJEPAPipeline.from_pretrained(tmp_path, variant="bf16", dtype=torch.bfloat16)
    assert reloaded.transformer.dtype == torch.bfloat16
    assert_same_images(pipe, reloaded)


def test_loading_by_id_finds_the_components(tmp_path, monkeypatch):
    """diffusers takes other roads for Hub ids than for folders; third-party components are lost on them by default."""
    pipe = tiny_pipeline()
    pipe.save_pretrained(tmp_path)
    siblings = [SimpleNamespace(rfilename=str(p.relative_to(tmp_path))) for p in tmp_path.rglob("*") if p.is_file()]
    hub = diffusers.pipelines.pipeline_utils
    monkeypatch.setattr(hub, "model_info", lambda *args, **kwargs: SimpleNamespace(siblings=siblings, sha="0"))
    monkeypatch.setattr(hub, "hf_hub_download", lambda repo_id, name, **kwargs: str(tmp_path / name))
    assert_same_images(pipe, DJEPAPipeline.from_pretrained("org/djepa-tiny"))
    monkeypatch.delitem(diffusers.pipelines.pipeline_loading_utils.LOADABLE_CLASSES, "djepa_hf")
    with pytest.raises(ValueError, match="djepa_hf"):  # what the entry is there for
        DJEPAPipeline.from_pretrained("org/djepa-tiny")


def test_components_build_another_pipeline():
    pipe = tiny_pipeline()
    assert set(pipe.components) == {"transformer", "scheduler", "vae"}
    assert_same_images(pipe, DJEPAPipeline(**pipe.components))


def test_package_shows_what_diffusers_looks_for():
    for name in ("DJEPAModel", "DDPMTokenScheduler", "FlowMatchTokenScheduler", "PreTrainedModel", "SchedulerMixin"):
        assert hasattr(djepa_hf, name)
