"""flow.objective=mean_flow: intervals, the derivative, a field known in closed form, whole runs."""

import networks
import pytest
import torch
from networks import NETWORK, C, K, W, inputs
from tiny_experiment import draw, metrics, weights
from torch import nn

from modeling.flow import FlowConfig, interpolate, target_velocity
from modeling.flowtok import FlowTok
from modeling.mean_flow import average_target, drift, sample_intervals, split_batch, whole_average
from modeling.pipeline import SamplingConfig, transport
from modeling.samplers import euler, make_times
from training.checkpoint import EMA_FILE

B = 6
OPTION = "flow.objective=mean_flow"
FORMS = [("text", "none"), ("text", "cross_attention"), ("noise", "addition")]


def build(source="text", condition="none", **options):
    return networks.build(condition, source=source, objective="mean_flow", **options)


def test_half_of_the_intervals_are_points_and_a_quarter_are_whole():
    t, h = sample_intervals(FlowConfig(time_distribution="uniform"), 2001, torch.device("cpu"))
    points, others, whole = split_batch(2001)
    assert (points, others, whole) == (slice(0, 1000), slice(1000, 1501), slice(1501, 2001))
    assert not h[points].any() and (h[1000:] > 0).all()
    assert not t[whole].any() and (h[whole] == 1).all()
    assert t.min() >= 0 and (t + h).max() <= 1 + 1e-6
    # Times of points are uniform; the smaller and the larger of two are not.
    assert t[points].mean().item() == pytest.approx(1 / 2, abs=0.05)
    assert t[others].mean().item() == pytest.approx(1 / 3, abs=0.05)
    assert (t + h)[others].mean().item() == pytest.approx(2 / 3, abs=0.05)


@pytest.mark.parametrize("condition", ["none", "cross_attention", "concatenation"])
def test_drift_is_the_derivative_of_the_network_with_the_intervals_end_held(condition):
    network = build(condition=condition).flowtok
    z, v, context = (torch.randn(B, K, width) for width in (C, C, W))
    t, h = torch.rand(2, B) / 2
    null = torch.arange(B) < 2
    context = None if condition == "none" else context

    def average(z, t, h):
        return network(z, t, null, context, h)

    e = 1e-2  # of float32, as the sinusoids are
    ahead, behind = (average(z + s * v, t + s, h - s) for s in (e, -e))
    expected = h.view(-1, 1, 1) * (ahead - behind) / (2 * e)
    found = drift(average, z, t, h, v)
    assert (found - expected).abs().max() < 2e-3 * found.abs().max()
    assert found.abs().max() > 0.1 and not found.requires_grad


def test_average_velocity_less_its_drift_is_the_velocity_and_its_steps_are_exact():
    # dz/dt = a z has z(t + h) = z exp(a h).
    a = 1.3

    def average(z, t, h):
        h = torch.as_tensor(h).view(-1, 1, 1)
        return z * (torch.exp(a * h) - 1) / h

    z, (t, h) = torch.randn(B, K, C).double(), torch.rand(2, B).double()
    velocity = average(z, t, h) - drift(average, z, t, h, a * z)
    torch.testing.assert_close(velocity, a * z)
    third = torch.tensor(1 / 3).double()
    end = euler(lambda x, time: average(x, time, third), z, make_times(3))
    torch.testing.assert_close(end, z * torch.tensor(a).double().exp())
    torch.testing.assert_close(z + whole_average(average, z), end)


@pytest.mark.parametrize(("source", "condition"), FORMS)
def test_targets_are_the_paths_velocity_that_and_the_drift_or_shorter_steps(source, condition):
    batch = 8
    flow = build(source, condition, null_probability=0)
    states, image = inputs(batch)
    context, null = flow.context(states), torch.zeros(batch, dtype=torch.bool)
    torch.manual_seed(0)
    found = flow(states, image).target
    torch.manual_seed(0)
    start = flow.projector(states, sample=True).latents
    t, h = sample_intervals(flow.config, batch, start.device)
    path = target_velocity(start, image, flow.config.sigma_min)
    z = interpolate(start, image, t, flow.config.sigma_min)

    def average(z, t, h, samples):
        text = None if context is None else context[samples]
        return flow.flowtok(z, t, null[samples], text, h)

    plain, between, whole = split_batch(batch)
    assert not found.requires_grad
    torch.testing.assert_close(found[plain], path[plain])

    points = z[between], t[between]
    velocity = average(*points, torch.zeros(2), between)
    change = drift(lambda z, t, h: average(z, t, h, between), *points, h[between], velocity)
    torch.testing.assert_close(found[between], path[between] + change)

    x, quarter = start[whole], torch.full((2,), 0.25)
    for step in range(4):
        x = x + average(x, step * quarter, quarter, whole) / 4
    torch.testing.assert_close(found[whole], x - start[whole])


@pytest.mark.parametrize(("source", "condition"), FORMS)
def test_a_learned_guidance_leads_away_from_the_unconditional_velocity(source, condition):
    flow = build(source, condition, guidance=1.5)
    states, image = inputs(B)
    context, t, on = flow.projector.features(states), torch.rand(B), torch.ones(B).bool()
    target, null = torch.randn(B, K, C), torch.arange(B) < 2
    network, h = flow.flowtok, torch.zeros(B)  # half of the batch are points
    guided = average_target(network, target, image, t, h, null, context, guidance=1.5)
    with torch.no_grad():
        unconditional = network(image, t, on, context, h)
    assert torch.equal(guided[:2], target[:2])
    expected = unconditional + 1.5 * (target - unconditional)
    torch.testing.assert_close(guided[2:3], expected[2:3])

    # Training regresses on it
    targets = []
    for guidance in (1.5, 1.0):
        flow.config.guidance = guidance
        torch.manual_seed(0)
        targets.append(flow(states, image).target)
    assert not torch.equal(*targets)


def test_guidance_is_either_learned_or_sampled():
    with pytest.raises(ValueError, match="guidance 2 .*flow.guidance=1.5"):
        SamplingConfig(guidance=2.0).check_flow(build(guidance=1.5).config)
    with pytest.raises(ValueError, match="flow.guidance=1.5.*mean_flow"):
        FlowConfig(guidance=1.5)
    with pytest.raises(ValueError, match="guidance 1.5 .*null_probability"):
        FlowConfig(guidance=1.5, objective="mean_flow", null_probability=0)


def test_weights_of_a_velocity_flow_go_on_as_the_same_velocity():
    plain, network = FlowTok(NETWORK), FlowTok(NETWORK, takes_interval=True)
    for parameter in plain.parameters():
        nn.init.normal_(parameter, std=0.2)
    network.load_state_dict(network.state_dict() | plain.state_dict())
    tokens, t, null = torch.randn(B, K, C), torch.rand(B), torch.arange(B) < 2
    before, after = plain(tokens, t, null), network(tokens, t, null, interval=torch.rand(B))
    assert torch.equal(before, after)


@pytest.mark.parametrize(("source", "condition"), FORMS)
def test_sampling_takes_whole_steps_with_guidance_of_average_velocities(source, condition):
    flow, guidance = build(source, condition), 1.5
    states, start = inputs(B)
    context = flow.context(states)
    x = start
    for t in (0.0, 0.5):
        time, half = torch.full((B,), t), torch.full((B,), 0.5)
        off, on = torch.zeros(B, dtype=torch.bool), torch.ones(B, dtype=torch.bool)
        with torch.no_grad():
            unconditional = flow.flowtok(x, time, on, context, half)
            velocity = torch.lerp(
                unconditional, flow.flowtok(x, time, off, context, half), guidance
            )
        x = x + velocity / 2
    end = transport(flow, start, context, SamplingConfig(steps=2, guidance=guidance))
    torch.testing.assert_close(end, x)


def test_a_solver_that_needs_velocities_is_refused():
    flow = build()
    with pytest.raises(ValueError, match="sampler heun.*flow.objective=mean_flow.*euler"):
        transport(flow, torch.randn(B, K, C), None, SamplingConfig(sampler="heun"))


def test_a_run_goes_on_from_a_velocity_flow_resumes_and_draws(chain, tmp_path):
    start = f"init_from={chain.folder}/flowtok"
    options = [OPTION, "projector_run=", start, "training.precision=bf16"]
    run = chain.run_in(tmp_path / "mean", "flowtok", *options, "training.max_steps=2")
    chain.run_in(tmp_path / "mean", "flowtok", *options)
    assert [line["step"] for line in metrics(run)] == [2, 4]
    assert all(line["squared_error"] > 0 for line in metrics(run))
    assert weights(run, EMA_FILE)["flowtok.embed_interval.mlp.2.weight"].any()
    picture = tmp_path / "x.png"
    draw(tmp_path / "mean", "--prompts", "a red circle", "--steps", 1, "--output", picture)
    assert picture.stat().st_size
    with pytest.raises(ValueError, match="flow.objective"):
        chain.run_in(tmp_path / "back", "flowtok", "projector_run=", f"init_from={run}")
    # What a run is trained for does not change on the way, and its config stays what it was
    saved = (run / "config.yaml").read_text()
    with pytest.raises(ValueError, match="flow.objective: mean_flow -> velocity"):
        chain.run_in(tmp_path / "mean", "flowtok", *options[1:], "training.max_steps=9")
    assert (run / "config.yaml").read_text() == saved
