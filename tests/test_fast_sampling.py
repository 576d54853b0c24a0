"""Faster ways to the same images, and to other images for less: parts of batches, compilation, solvers, profiles."""

import copy
import math

import pytest
import torch
from conftest import generators, relative_error, tiny_pipeline, tiny_vae
from peft import LoraConfig

from djepa_hf import DDPMTokenScheduler, DJEPAPipeline
from djepa_hf.accounting import sampling_flops
from djepa_hf.compilation import CUDAGraphs
from djepa_hf.denoising import TokenDenoiser, _adapter_state
from djepa_hf.lora import DEFAULT_TARGETS, add_adapter
from djepa_hf.masking import checkerboard_token_order
from djepa_hf.profiles import PROFILES
from djepa_hf.schedulers import SOLVERS, solver_for

FAST = {"num_inference_steps": 4, "num_denoising_steps": 3, "output_type": "latent"}
ALL_SOLVERS = [(objective, solver) for objective in SOLVERS for solver in SOLVERS[objective]]
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def twins(**overrides) -> tuple[DJEPAPipeline, DJEPAPipeline]:
    """Two pipelines with the same weights."""
    pipe = tiny_pipeline(**overrides)
    other = DJEPAPipeline(copy.deepcopy(pipe.transformer), pipe.scheduler)
    other.set_progress_bar_config(disable=True)
    return pipe, other


# --- the same images


@pytest.mark.parametrize(("objective", "solver"), ALL_SOLVERS)
def test_nothing_in_the_loops_waits_for_the_device(objective, solver):
    """The meta device has no values: whatever reads one back, or needs one to know a shape, raises there."""
    pipe = tiny_pipeline(objective=objective).to("meta")
    options = {"num_inference_steps": 16, "num_denoising_steps": 7, "final_denoising_steps": 3, "solver": solver}
    images = pipe([0, 0, 3], output_type="latent", **options).images
    assert images.device.type == "meta"
    assert images.shape == (3, 1, 8, 8)


@pytest.mark.parametrize("objective", SOLVERS)
@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_parts_of_a_batch_make_the_same_images(objective, guidance_scale):
    pipe = tiny_pipeline(tiny_vae(1), objective=objective, sample_size=4, patch_size=1)
    rows = []
    pipe.transformer.predictor.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    pipe.transformer.denoiser.register_forward_pre_hook(lambda module, args: rows.append(len(args[0]) / 16))
    pipe.vae.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    options = {**FAST, "num_inference_steps": 1, "guidance_scale": guidance_scale, "output_type": "pt"}
    labels, twins = [0, 0, 4, 3, 3], 1 if guidance_scale == 1.0 else 2
    whole, parts = (
        pipe(labels, generator=torch.Generator().manual_seed(0), max_batch_size=most, **options).images
        for most in (64, 2)
    )
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)
    rows.clear()
    pipe(labels, max_batch_size=2, **{**options, "num_inference_steps": 16})
    assert max(rows) == 2 * twins


def test_at_first_one_row_of_each_class_is_enough():
    pipe, rows = tiny_pipeline(), []
    pipe.transformer.encoder.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    images = pipe([3, 0, 3, 3], generator=generators(0, 1, 2, 3), guidance_scale=2.0, **FAST).images
    assert rows == [3, 8, 8, 8]
    alone = pipe(3, generator=generators(2), guidance_scale=2.0, **FAST).images
    torch.testing.assert_close(images[2:3], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("rows", "worked_on"), [(12, [1] * 5), (30, [2, 2, 1]), (10_000, [5])])
@pytest.mark.parametrize("objective", SOLVERS)
def test_conditions_may_be_worked_on_together(monkeypatch, objective, rows, worked_on):
    pipe, token = tiny_pipeline(objective=objective), torch.randn(2, 3, 4)
    conditioning, seen = torch.randn(4, 3, 32), []
    monkeypatch.setattr("djepa_hf.denoising.MODULATED_ROWS", rows)
    pipe.transformer.denoiser.modulation.register_forward_hook(lambda module, args, output: seen.append(args[0].shape))
    denoise = TokenDenoiser(pipe.transformer.denoiser, pipe.scheduler, 0.9, generators(0, 1))
    tokens = denoise(token, conditioning, 5, guidance=1.5)
    assert [math.prod(shape[:-1]) / 12 for shape in seen] == worked_on  # timesteps at a time

    sample, model, scheduler = 0.9 * token if objective == "flow_matching" else token, pipe.transformer, pipe.scheduler
    scheduler.set_timesteps(5)
    seeds = generators(0, 1)
    for timestep in scheduler.timesteps:
        both = torch.cat([sample, sample]).flatten(0, 1)
        output = model.denoise(both, timestep.expand(12), conditioning.flatten(0, 1)).unflatten(0, (4, 3))
        output, null = output.chunk(2)
        guided = torch.cat([null[..., :4] + 1.5 * (output[..., :4] - null[..., :4]), output[..., 4:]], dim=-1)
        sample = scheduler.step(guided, timestep, sample, temperature=0.9, generator=seeds).prev_sample
    torch.testing.assert_close(tokens, sample, rtol=1e-4, atol=1e-4)


def test_features_that_are_wanted_are_those_of_all():
    model, visible = tiny_pipeline().transformer, torch.rand(3, 16).argsort(-1)[:, :5]
    context = model.encode(torch.randn(3, 16, 4), torch.tensor([0, 1, 2]), visible=visible)
    wanted = torch.rand(3, 16).argsort(-1)[:, :4]
    features = model.predict(context, visible=visible)
    expected = torch.stack([features[i, wanted[i]] for i in range(3)])
    torch.testing.assert_close(model.predict(context, visible=visible, wanted=wanted), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("objective", SOLVERS)
def test_half_precision_stays_finite_and_close(objective, dtype):
    pipe = tiny_pipeline(objective=objective)
    if objective == "diffusion":  # from the noisiest timesteps, random weights make tokens of 100,000
        pipe.scheduler = DDPMTokenScheduler(timestep_spacing="leading")
    options = {**FAST, "num_denoising_steps": 20, "guidance_scale": 2.0, "latents": torch.randn(4, 16, 4)}
    options |= {"token_order": torch.arange(16).expand(4, 16)}
    expected = pipe([0, 1, 2, 3], generator=generators(0)[0], **options).images
    pipe.to(dtype)
    images = pipe([0, 1, 2, 3], generator=generators(0)[0], **options).images
    assert pipe.transformer.dtype == dtype
    assert images.dtype == torch.float32
    assert relative_error(images, expected) < (0.05 if dtype == torch.bfloat16 else 0.01)


def test_the_vae_decodes_in_slices_and_tiles():
    pipe = tiny_pipeline(tiny_vae(4), sample_size=4, patch_size=1, num_channels=4)
    options = {**FAST, "output_type": "pt"}
    whole = pipe([0, 1], generator=generators(0, 1), **options).images
    pipe.vae.enable_slicing()
    torch.testing.assert_close(pipe([0, 1], generator=generators(0, 1), **options).images, whole)
    pipe.vae.enable_tiling()
    pipe.vae.tile_latent_min_size, pipe.vae.tile_sample_min_size = 2, 4
    pipe.vae.tile_overlap_factor = 0.5
    tiled = pipe([0, 1], generator=generators(0, 1), **options).images
    assert tiled.shape == whole.shape
    assert not torch.equal(tiled, whole)  # tiles do not see their neighbours


# --- compiled


def test_few_compiled_programs_serve_all_calls():
    programs = []

    def backend(module, inputs):
        programs.append(module)
        return module.forward

    torch._dynamo.reset()
    pipe, plain = twins(objective="diffusion")
    pipe.compile(backend=backend)

    def compare(labels, **options):
        options = {**FAST, "guidance_scale": 2.0, **options}
        seeds = range(len(labels))
        images = pipe(labels, generator=generators(*seeds), **options).images
        expected = plain(labels, generator=generators(*seeds), **options).images
        torch.testing.assert_close(images, expected, rtol=1e-3, atol=1e-3)

    compare([0, 1, 2], num_inference_steps=9)
    assert 3 <= len(programs) <= 5  # not one for each step
    first = len(programs)
    compare([4, 1, 2, 3, 3], num_inference_steps=7, num_denoising_steps=5)
    compare([1], num_inference_steps=16)
    assert len(programs) == first


def test_what_cannot_be_compiled_for_is_refused(monkeypatch):
    pipe = tiny_pipeline()
    with pytest.raises(ValueError, match=r"Compiling is supported on cpu and cuda, not on meta. Without `compile` the"):
        tiny_pipeline().to("meta").compile()
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-such-compiler",))
    with pytest.raises(ValueError, match=r"Compiling for the CPU needs a C\+\+ compiler such as g\+\+"):
        pipe.compile()
    assert pipe(0, **FAST).images.isfinite().all()


@needs_cuda
@pytest.mark.parametrize("objective", SOLVERS)
def test_cuda_graphs_play_the_same_loops(objective):
    pipe, plain = (pipe.to("cuda") for pipe in twins(objective=objective))
    pipe._graphs = CUDAGraphs(most=3)
    options = {**FAST, "num_inference_steps": 7, "guidance_scale": 2.0}
    for labels in ([0, 1], [2, 3], [4]):
        seeds = generators(*labels)
        images = pipe(labels, generator=seeds, **options).images
        expected = plain(labels, generator=generators(*labels), **options).images
        torch.testing.assert_close(images, expected, rtol=1e-3, atol=1e-3)
        assert 0 < len(pipe._graphs) <= 3
    pipe.transformer.to(torch.bfloat16)  # other weights: nothing old may be played
    assert pipe([0, 1], generator=generators(0, 1), **options).images.isfinite().all()


def test_graphs_know_adapters_by_their_state():
    pipe = tiny_pipeline()
    states = {_adapter_state(pipe.transformer.denoiser)}
    add_adapter(pipe.transformer, LoraConfig(r=2, target_modules=DEFAULT_TARGETS), "a")
    states.add(_adapter_state(pipe.transformer.denoiser))
    pipe.set_adapters("a", 0.5)
    states.add(_adapter_state(pipe.transformer.denoiser))
    pipe.disable_lora()
    states.add(_adapter_state(pipe.transformer.denoiser))
    pipe.enable_lora()
    assert _adapter_state(pipe.transformer.denoiser) in states
    pipe.fuse_lora()
    states.add(_adapter_state(pipe.transformer.denoiser))
    assert len(states) == 5


@needs_cuda
@pytest.mark.parametrize("where", ["cpu", "cuda"])
@pytest.mark.parametrize("objective", SOLVERS)
def test_a_cuda_device_is_never_waited_for(objective, where):
    pipe = tiny_pipeline(objective=objective).to("cuda")
    generator = torch.Generator(where).manual_seed(0)
    pipe([0, 1], generator=generator, **FAST)
    torch.cuda.set_sync_debug_mode("error")
    try:
        denoise = TokenDenoiser(pipe.transformer.denoiser, pipe.scheduler, 1.0, generator)
        noise, features = torch.randn(2, 3, 4, device="cuda"), torch.randn(4, 3, 32, device="cuda")
        denoise(noise, features, 5, guidance=2.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# --- other images for less


def test_a_checkerboard_takes_one_colour_first():
    order = checkerboard_token_order(5, (4, 6), generator=generators(0)[0])
    assert torch.equal(order.sort(-1).values, torch.arange(24).expand(5, 24))
    colour = (order // 6 + order % 6) % 2
    assert torch.equal(colour, torch.tensor([0] * 12 + [1] * 12).expand(5, 24))
    assert not torch.equal(order[0], order[1])
    line = checkerboard_token_order(2, (7,), generator=generators(0, 1))
    assert (line[:, :4] % 2 == 0).all()
    volume = checkerboard_token_order(1, (2, 2, 2))[0]
    assert sorted(volume[:4].tolist()) == [0, 3, 5, 6]


def test_the_order_has_a_name():
    pipe, options = tiny_pipeline(), {**FAST, "latents": torch.randn(2, 16, 4)}

    def sample(order):
        return pipe([0, 1], generator=generators(0, 1), token_order=order, **options).images

    assert torch.equal(sample("random"), sample(None))
    checkerboard = checkerboard_token_order(2, (4, 4), generator=generators(0, 1))
    assert torch.equal(sample("checkerboard"), sample(checkerboard))
    assert not torch.equal(sample("checkerboard"), sample(None))


@pytest.mark.parametrize(("objective", "solver"), ALL_SOLVERS)
def test_a_call_may_choose_its_solver(objective, solver):
    pipe, options = tiny_pipeline(objective=objective), {**FAST, "num_denoising_steps": 6}
    before = pipe.scheduler
    images = pipe([0, 1], generator=generators(0, 1), solver=solver, **options).images
    assert pipe.scheduler is before
    pipe.scheduler = solver_for(objective, solver, before)
    assert torch.equal(images, pipe([0, 1], generator=generators(0, 1), **options).images)


def test_the_null_class_is_looked_at_now_and_then():
    pipe, rows = tiny_pipeline(), []
    pipe.transformer.encoder.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    options = {**FAST, "num_inference_steps": 8, "guidance_scale": 2.0}

    def sample(label, **more):
        rows.clear()
        return pipe([label, label], generator=generators(0, 1), **options, **more).images

    exact = sample(0)
    assert rows == [2, 4, 4, 4, 4, 4, 4, 4]
    lazy = sample(0, null_refresh_interval=3)
    assert rows == [2, 4, 2, 2, 4, 2, 2, 4]
    assert 0 < relative_error(lazy, exact) < 0.5
    sample(0, null_refresh_interval=3, max_batch_size=1)
    assert rows == [2, *[2, 2], 2, 2, *[2, 2], 2, 2, *[2, 2]]
    flops = [sampling_flops(pipe.transformer.config, 8, 3, 2.0, null_refresh_interval=n) for n in (1, 3)]
    assert flops[1]["denoiser"] == flops[0]["denoiser"]
    assert flops[1]["predictor"] < 0.8 * flops[0]["predictor"]

    # where the class is no other than the null class, nothing is lost
    table = pipe.transformer.get_input_embeddings().weight.data
    table[1] = table[-1]
    torch.testing.assert_close(sample(1, null_refresh_interval=3), sample(1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("objective", SOLVERS)
@pytest.mark.parametrize("profile", PROFILES)
def test_a_profile_is_a_plain_set_of_options(objective, profile):
    pipe, asked = tiny_pipeline(objective=objective), {"num_inference_steps": 12, "num_denoising_steps": 40}
    options = {"guidance_scale": 2.0, "output_type": "latent"}
    images = pipe([0, 1], generator=generators(0, 1), profile=profile, **asked, **options).images
    expanded = pipe.expand_profile(profile, **asked)
    assert torch.equal(images, pipe([0, 1], generator=generators(0, 1), **expanded, **options).images)
    assert pipe.num_timesteps == expanded["num_inference_steps"]
    if profile == "exact":
        assert torch.equal(images, pipe([0, 1], generator=generators(0, 1), **asked, **options).images)


@pytest.mark.parametrize("objective", SOLVERS)
def test_a_faster_profile_does_less(objective):
    pipe, work = tiny_pipeline(objective=objective), []
    for profile in PROFILES:
        options = pipe.expand_profile(profile, 16, 50)
        del options["solver"]
        work.append(sum(sampling_flops(pipe.transformer.config, guidance_scale=2.0, **options).values()))
    assert work[0] > 1.5 * work[1] > 1.5 * work[2]


def test_a_profile_leaves_few_steps_and_the_solver_alone():
    pipe = tiny_pipeline()
    assert pipe.expand_profile("fast", 8, 4, 3, "heun", 5) == {
        "num_inference_steps": 8,
        "num_denoising_steps": 4,
        "final_denoising_steps": 3,
        "solver": "heun",
        "null_refresh_interval": 5,
    }
    with pytest.raises(ValueError, match="`profile` must be one of exact, balanced, fast, got 'best'"):
        pipe.expand_profile("best")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": "ddim"}, "for the objective 'flow_matching' are euler, heun, midpoint, got 'ddim'"),
        ({"profile": "faster"}, "`profile` must be one of exact, balanced, fast, got 'faster'"),
        ({"token_order": "spiral"}, r"must be a tensor or one of \('random', 'checkerboard'\), got 'spiral'"),
        ({"max_batch_size": 0}, "`max_batch_size` must be at least 1, got 0"),
        ({"null_refresh_interval": 0}, "`null_refresh_interval` must be at least 1, got 0"),
    ],
)
def test_what_does_not_exist_is_refused_before_any_work(options, message):
    pipe = tiny_pipeline()
    pipe.transformer.encoder.register_forward_pre_hook(lambda *_: pytest.fail("work has begun"))
    with pytest.raises(ValueError, match=message):
        pipe(0, **{**FAST, **options})
