"""The token schedulers' mathematics: against the official algorithm, and against formulas written out here."""

import math

import pytest
import torch
from conftest import relative_error
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler

from djepa_hf import DDPMTokenScheduler, FlowMatchTokenScheduler


@torch.no_grad()
def test_token_loss_equals_the_official_one(golden):
    gold = golden.tensors
    prefix = "flow" if golden.flow else "diffusion"
    scheduler = FlowMatchTokenScheduler() if golden.flow else DDPMTokenScheduler()
    clean, noise, timesteps = gold["tokens"].flatten(0, 1), gold[f"{prefix}_noise"], gold[f"{prefix}_t"]
    noisy = scheduler.add_noise(clean, noise, timesteps)
    output = golden.model.djepa.denoise(noisy, timesteps, gold["conditioning"].flatten(0, 1))
    loss = scheduler.token_loss(output, clean, noise, timesteps)
    assert relative_error(loss, gold["diffusion_loss_per_token"].flatten()) < 2e-5


@pytest.mark.parametrize("golden", ["ddpm"], indirect=True)
def test_sampler_steps_equal_the_official_ones(golden):
    gold, num_steps = golden.tensors, golden.meta["num_sampling_steps"]
    scheduler = DDPMTokenScheduler()
    scheduler.set_timesteps(num_steps)
    for i in (0, 1, num_steps // 2, num_steps - 1):
        timestep = scheduler.timesteps[num_steps - 1 - i]
        assert timestep == gold[f"step{i}_model_t"]
        step = scheduler.step(
            gold[f"step{i}_model_output"],
            timestep,
            gold["step_sample"],
            temperature=0.9,
            variance_noise=gold["step_noise"],
        )
        assert relative_error(step.prev_sample, gold[f"step{i}_prev_sample_temp0.9"]) < 5e-4


def test_ddpm_noise_follows_the_cosine_schedule():
    scheduler = DDPMTokenScheduler()
    times = (torch.arange(1001, dtype=torch.float64) / 1000 + 0.008) / 1.008
    alpha_bar = torch.cos(times * torch.pi / 2) ** 2
    timesteps = torch.tensor([0, 1, 400, 998])  # beta is capped at 0.999 in the last one
    clean, noise = torch.ones(4, 2), torch.zeros(4, 2)
    expected = (alpha_bar[timesteps + 1] / alpha_bar[0]).sqrt().float()
    torch.testing.assert_close(scheduler.add_noise(clean, noise, timesteps)[:, 0], expected)
    spread = scheduler.add_noise(noise, clean, timesteps)[:, 0]
    torch.testing.assert_close(spread**2 + expected**2, torch.ones(4))


def test_ddpm_bound_trains_the_variance_alone():
    scheduler = DDPMTokenScheduler()
    output = torch.randn(6, 4, requires_grad=True)
    clean, noise, timesteps = torch.randn(6, 2), torch.randn(6, 2), torch.tensor([0, 1, 10, 500, 900, 999])
    (gradient,) = torch.autograd.grad(scheduler.token_loss(output, clean, noise, timesteps).sum(), output)
    torch.testing.assert_close(
        gradient[:, :2], output[:, :2].detach() - noise
    )  # the squared error's alone: 2 (e - n) / C
    assert gradient[:, 2:].abs().min() > 0


def test_ddpm_bound_is_the_divergence_of_gaussians():
    scheduler = DDPMTokenScheduler()
    clean, noise = torch.randn(1, 1), torch.randn(1, 1)
    t, v = 500, 0.3
    steps = (torch.arange(1001, dtype=torch.float64) / 1000 + 0.008) / 1.008
    alpha_bar = torch.cos(steps * torch.pi / 2) ** 2 / torch.cos(steps[0] * torch.pi / 2) ** 2
    beta = 1 - alpha_bar[t + 1] / alpha_bar[t]
    variance = beta * (1 - alpha_bar[t]) / (1 - alpha_bar[t + 1])
    learned = torch.exp((v + 1) / 2 * beta.log() + (1 - v) / 2 * variance.log())
    predicted = noise + 0.5
    # the means differ by the noise's error, scaled back through x0
    clean_error = 0.5 * ((1 - alpha_bar[t + 1]) / alpha_bar[t + 1]).sqrt()
    mean_error = clean_error * alpha_bar[t].sqrt() * beta / (1 - alpha_bar[t + 1])
    posterior = torch.distributions.Normal(torch.zeros(()).double(), variance.sqrt())
    divergence = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(mean_error, learned.sqrt()))
    output = torch.cat([predicted, torch.full((1, 1), v)], dim=-1)
    loss = scheduler.token_loss(output, clean, noise, torch.tensor([t]))
    torch.testing.assert_close(
        loss.double(), (0.25 + divergence / torch.log(torch.tensor(2.0))).double()[None], rtol=1e-3, atol=0
    )


@pytest.mark.parametrize(("num_steps", "timesteps"), [(1, [0]), (2, [999, 0]), (5, [999, 749, 500, 250, 0])])
def test_ddpm_timesteps_spread_over_the_schedule(num_steps, timesteps):
    scheduler = DDPMTokenScheduler()
    scheduler.set_timesteps(num_steps)
    assert scheduler.timesteps.tolist() == timesteps


@pytest.mark.parametrize(("num_steps", "timesteps"), [(1, [0]), (4, [750, 500, 250, 0]), (3, [666, 333, 0])])
def test_leading_timesteps_leave_out_the_noisiest_end_as_in_diffusers(num_steps, timesteps):
    scheduler = DDPMTokenScheduler(timestep_spacing="leading")
    scheduler.set_timesteps(num_steps)
    assert scheduler.timesteps.tolist() == timesteps
    theirs = DDIMScheduler.from_config(scheduler.config)
    theirs.set_timesteps(num_steps)
    assert theirs.timesteps.tolist() == timesteps


def test_ddpm_with_a_perfect_model_finds_the_clean_tokens():
    scheduler, clean = DDPMTokenScheduler(), torch.randn(5, 3)
    scheduler.set_timesteps(50)
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(5, 3, generator=generator)
    for timestep in scheduler.timesteps:
        signal = scheduler.add_noise(torch.ones(1, 1), torch.zeros(1, 1), timestep[None])
        spread = scheduler.add_noise(torch.zeros(1, 1), torch.ones(1, 1), timestep[None])
        output = torch.cat([(sample - signal * clean) / spread, torch.zeros(5, 3)], dim=-1)
        sample = scheduler.step(output, timestep, sample, generator=generator).prev_sample
    torch.testing.assert_close(sample, clean, atol=1e-3, rtol=1e-3)


def test_temperature_scales_the_noise_of_ddpm_steps():
    scheduler = DDPMTokenScheduler()
    scheduler.set_timesteps(10)
    output, sample, noise = torch.randn(3, 4), torch.randn(3, 2), torch.randn(3, 2)

    def step(timestep, temperature):
        options = {"temperature": temperature, "variance_noise": noise}
        return scheduler.step(output, timestep, sample, **options).prev_sample

    cold, warm, hot = (step(scheduler.timesteps[3], temperature) for temperature in (0.0, 0.5, 1.0))
    torch.testing.assert_close(warm - cold, (hot - cold) / 2)
    assert (hot - cold).abs().min() > 0
    assert torch.equal(step(scheduler.timesteps[-1], 0.0), step(scheduler.timesteps[-1], 1.0))  # the last adds none
    assert torch.equal(scheduler.scale_initial_noise(noise, 0.5), noise)


def test_temperature_scales_the_initial_noise_of_flow_matching():
    noise = torch.randn(3, 2)
    assert torch.equal(FlowMatchTokenScheduler().scale_initial_noise(noise, 0.5), 0.5 * noise)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_times_are_shifted(shift):
    scheduler = FlowMatchTokenScheduler(shift=shift)
    scheduler.set_timesteps(4)
    expected = [t / (t + shift - shift * t) for t in (0.0, 0.25, 0.5, 0.75)]
    assert scheduler.timesteps.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("num_steps", [1, 3, 20])
def test_flow_with_a_perfect_model_is_exact(num_steps):
    scheduler = FlowMatchTokenScheduler(shift=2.0)
    scheduler.set_timesteps(num_steps)
    clean, noise = torch.randn(5, 3), torch.randn(5, 3)
    sample = noise
    for timestep in scheduler.timesteps:
        torch.testing.assert_close(sample, scheduler.add_noise(clean, noise, timestep.expand(5)))
        sample = scheduler.step(clean - noise, timestep, sample).prev_sample
    torch.testing.assert_close(sample, clean)


def solved(solver, num_evaluations, shift=1.0):
    """x' = x cos t from x(0) = 1 to t = 1, where it is exp(sin 1)."""
    scheduler, x = FlowMatchTokenScheduler(shift=shift, solver=solver), torch.ones(1, 1, dtype=torch.float64)
    scheduler.set_timesteps(num_evaluations)
    assert len(scheduler.timesteps) == num_evaluations
    for timestep in scheduler.timesteps:
        x = scheduler.step(x * math.cos(timestep), timestep, x).prev_sample
    return x.item()


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2), ("midpoint", 2)])
@pytest.mark.parametrize("shift", [1.0, 2.0])
def test_flow_solvers_have_their_order(solver, order, shift):
    errors = [abs(solved(solver, n, shift) - math.exp(math.sin(1))) for n in (16, 32)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.3)
    assert abs(solved(solver, 15, shift) - math.exp(math.sin(1))) < 0.03, "an odd number ends with an Euler step"
    assert solved(solver, 1) == 2.0, "one evaluation is one Euler step"


def test_flow_loss_is_the_squared_error_of_the_velocity():
    clean, noise, error = torch.randn(5, 3), torch.randn(5, 3), torch.randn(5, 3)
    loss = FlowMatchTokenScheduler().token_loss(clean - noise + error, clean, noise, torch.rand(5))
    torch.testing.assert_close(loss, (error**2).mean(-1))


@pytest.mark.parametrize("scheduler", [DDPMTokenScheduler(), FlowMatchTokenScheduler()], ids=["ddpm", "flow"])
def test_steps_do_not_depend_on_their_order(scheduler):
    scheduler.set_timesteps(6)
    channels = 4 if isinstance(scheduler, DDPMTokenScheduler) else 2
    output, sample, noise = torch.randn(3, channels), torch.randn(3, 2), torch.randn(3, 2)
    forwards = [scheduler.step(output, t, sample, variance_noise=noise)[0] for t in scheduler.timesteps]
    backwards = [scheduler.step(output, t, sample, variance_noise=noise)[0] for t in scheduler.timesteps.flip(0)]
    assert torch.equal(torch.stack(forwards), torch.stack(backwards[::-1]))


@pytest.mark.parametrize("scheduler", [DDPMTokenScheduler(), FlowMatchTokenScheduler()], ids=["ddpm", "flow"])
def test_each_generator_draws_for_its_own_sample(scheduler):
    scheduler.set_timesteps(4)
    channels = 4 if isinstance(scheduler, DDPMTokenScheduler) else 2
    output, sample = torch.zeros(2, 5, channels), torch.zeros(2, 5, 2)
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    together = scheduler.step(output, scheduler.timesteps[1], sample, generator=generators).prev_sample
    alone = torch.Generator().manual_seed(2)
    single = scheduler.step(output[1:], scheduler.timesteps[1], sample[1:], generator=alone).prev_sample
    assert torch.equal(together[1:], single)


def test_training_timesteps_cover_their_range():
    timesteps = DDPMTokenScheduler().sample_timesteps(20000)
    assert (timesteps.min(), timesteps.max()) == (0, 999)
    times = FlowMatchTokenScheduler().sample_timesteps(20000)
    assert times.min() >= 0
    assert times.max() < 1
    assert times.mean().item() == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("scheduler", [DDPMTokenScheduler(), FlowMatchTokenScheduler(shift=3.0)], ids=["ddpm", "flow"])
def test_configuration_round_trip(tmp_path, scheduler):
    scheduler.save_pretrained(tmp_path)
    reloaded = type(scheduler).from_pretrained(tmp_path)
    assert dict(reloaded.config) == dict(scheduler.config)


@pytest.mark.parametrize("other", [DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler])
def test_diffusers_schedulers_take_over_the_noise_path(other):
    ours, theirs = DDPMTokenScheduler(), other.from_config(DDPMTokenScheduler().config)
    assert other in ours.compatibles
    assert theirs.config.prediction_type == "epsilon"
    assert not theirs.config.get("clip_sample")
    signal = ours.add_noise(torch.ones(1000, 1), torch.zeros(1000, 1), torch.arange(1000)).flatten()
    torch.testing.assert_close(theirs.alphas_cumprod, signal**2, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: DDPMTokenScheduler().set_timesteps(0), r"must be in 1..1000, got 0"),
        (lambda: DDPMTokenScheduler().set_timesteps(1001), r"must be in 1..1000, got 1001"),
        (lambda: FlowMatchTokenScheduler().set_timesteps(0), "must be at least 1, got 0"),
        (lambda: FlowMatchTokenScheduler(shift=0.0), "`shift` must be positive, got 0.0"),
        (lambda: DDPMTokenScheduler(prediction_type="v_prediction"), "`prediction_type` must be 'epsilon'"),
        (lambda: DDPMTokenScheduler(beta_schedule="linear"), "`beta_schedule` must be 'squaredcos_cap_v2'"),
        (lambda: DDPMTokenScheduler(timestep_spacing="trailing"), "must be 'linspace' or 'leading', got 'trailing'"),
        (lambda: FlowMatchTokenScheduler(solver="rk4"), "`solver` must be one of euler, heun, midpoint, got 'rk4'"),
        (lambda: FlowMatchTokenScheduler(prediction_type="epsilon"), "`prediction_type` must be 'flow_matching'"),
    ],
)
def test_bad_settings_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
