"""modeling/discriminator.py: closed forms, two processes against one, learning."""

import pytest
import torch
import torch.distributed as dist
from forks import in_two_processes
from networks import check_init
from torch import nn
from torch.nn import functional as F

from modeling.discriminator import (
    BlurPool,
    Discriminator,
    LeCam,
    discriminator_loss,
    generator_loss,
)

NARROW = {"width": 32}
B = 3


def test_the_default_size_has_the_weights_of_the_recipe():
    with torch.device("meta"):
        assert sum(p.numel() for p in Discriminator().parameters()) == 1_909_889


def logits_by_hand(net, x):
    """The recipe's order of operations with the net's weights, for three stages."""
    p = dict(net.named_parameters())

    def conv(x, name):
        weight = p[f"{name}.weight"]
        return F.conv2d(x, weight, p[f"{name}.bias"], padding=weight.shape[-1] // 2)

    kernel = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=x.dtype)
    kernel = kernel.outer(kernel) / 64
    x = F.leaky_relu(conv(x, "stem.0"), 0.1)
    for stage in range(3):
        x = conv(x, f"stages.{stage}.0")
        x = F.conv2d(x, kernel.repeat(x.shape[1], 1, 1, 1), stride=2, padding=1, groups=x.shape[1])
        x = F.group_norm(x, 32, p[f"stages.{stage}.2.weight"], p[f"stages.{stage}.2.bias"])
        x = F.leaky_relu(x, 0.1)
    x = F.adaptive_max_pool2d(x, 16)
    return conv(F.leaky_relu(conv(x, "head.0"), 0.1), "head.2")


def test_the_order_of_operations_is_the_recipes():
    net = Discriminator(**NARROW).double()
    for parameter in net.parameters():  # norms start at 1 and 0, which would hide a missing one
        nn.init.normal_(parameter, std=0.3)
    images = torch.rand(2, 3, 64, 64, dtype=torch.float64)
    odd, blur = images[..., :7, :5], BlurPool().double()
    torch.testing.assert_close(blur(odd), blur(F.pad(odd, (0, 1, 0, 1))))
    torch.testing.assert_close(net(images), logits_by_hand(net, images))


def test_a_finite_gradient_reaches_every_parameter_and_the_images():
    net, images = Discriminator(**NARROW), torch.rand(2, 3, 32, 32, requires_grad=True)
    generator_loss(net(images)).backward()
    for gradient in (images.grad, *(p.grad for p in net.parameters())):
        assert gradient.isfinite().all() and gradient.any()


def test_init_misses_no_parameter_and_keeps_its_bounds():
    net = Discriminator(**NARROW)
    check_init(net)
    for conv in (m for m in net.modules() if isinstance(m, nn.Conv2d)):
        bound = (conv.in_channels * conv.kernel_size[0] ** 2) ** -0.5
        assert 0.9 * bound < conv.weight.abs().max() <= bound
        assert conv.bias.abs().max() <= bound


def test_logits_are_float32_under_autocast_and_near_those_in_float32():
    net, images = Discriminator(**NARROW), torch.rand(B, 3, 64, 64)
    with torch.no_grad():
        expected = net(images)
        with torch.autocast("cpu", torch.bfloat16):
            found = net(images)
    assert found.dtype == torch.float32
    difference = (found - expected).abs().max()
    assert 0 < difference < 0.1 * expected.std()  # the stages did run in bfloat16


def test_hinge_losses_equal_their_closed_forms_in_float32():
    real, fake = torch.randn(2, B, 1, 16, 16).bfloat16()
    expected = sum(max(0.0, 1 - x) for x in real.flatten().tolist()) / real.numel()
    expected += sum(max(0.0, 1 + x) for x in fake.flatten().tolist()) / fake.numel()
    losses = discriminator_loss(real, fake), generator_loss(fake), LeCam().penalty(real, fake)
    assert losses[0].item() == pytest.approx(expected / 2, rel=1e-5)
    assert losses[1].item() == pytest.approx(-fake.double().mean().item(), rel=1e-5)
    assert {loss.dtype for loss in losses} == {torch.float32}


def lecam(ema_real, ema_fake, decay=0.9):
    net = LeCam(decay)
    net.ema_real.fill_(ema_real)
    net.ema_fake.fill_(ema_fake)
    return net


def test_the_lecam_penalty_and_its_gradient_equal_their_closed_forms():
    net = lecam(0.5, -0.7)
    real, fake = torch.rand(B, 4).requires_grad_(), torch.rand(B, 4).neg().requires_grad_()
    penalty = net.penalty(real, fake)
    expected = (real.mean().item() + 0.7) ** 2 + (0.5 - fake.mean().item()) ** 2
    assert penalty.item() == pytest.approx(expected, rel=1e-5)
    assert lecam(-1.0, 2.0).penalty(real, fake) == 0  # neither distance is on its side
    net.update(real.mean(), fake.mean())  # before the backward pass: it must not disturb the graph
    penalty.backward()
    expected = 2 * (real.mean().item() + 0.7) / real.numel()
    torch.testing.assert_close(real.grad, torch.full_like(real, expected))
    expected = -2 * (0.5 - fake.mean().item()) / fake.numel()
    torch.testing.assert_close(fake.grad, torch.full_like(fake, expected))


def test_lecam_averages_decay_towards_the_means():
    net, real, fake = LeCam(0.9), [1.0, 2.0, -1.0], [-3.0, 0.5, 4.0]
    for r, f in zip(real, fake):
        net.update(torch.tensor(r, requires_grad=True), torch.tensor(f))
    for name, values in (("ema_real", real), ("ema_fake", fake)):
        expected = sum(0.1 * 0.9 ** (2 - i) * value for i, value in enumerate(values))
        assert getattr(net, name).item() == pytest.approx(expected, rel=1e-5)
        assert not getattr(net, name).requires_grad


def two_process_setup():
    torch.manual_seed(5)
    return nn.Linear(4, 1), torch.randn(2, 2 * B, 4), lecam(2.0, -3.0)


def lecam_step(model, real, fake, averages):
    real_logits, fake_logits = model(real), model(fake)
    penalty = averages.penalty(real_logits, fake_logits)
    penalty.backward()
    averages.update(real_logits.mean(), fake_logits.mean())
    values = [penalty.detach(), averages.ema_real, averages.ema_fake]
    return [p.grad for p in model.parameters()], values


def shared_lecam_step(rank):
    model, x, averages = two_process_setup()
    gradients, values = lecam_step(model, *x[:, rank * B : (rank + 1) * B], averages)
    for gradient in gradients:  # as DDP averages gradients
        dist.all_reduce(gradient)
    return [*(gradient / 2 for gradient in gradients), *values]


def test_lecam_on_two_processes_is_that_of_one_process_with_the_joined_batch(tmp_path):
    found = in_two_processes(shared_lecam_step, tmp_path)
    model, x, averages = two_process_setup()
    gradients, values = lecam_step(model, *x, averages)
    torch.testing.assert_close(found[0], [*gradients, *values])
    assert all(map(torch.equal, found[0][-2:], found[1][-2:]))  # averages, to the last bit
    model, x, averages = two_process_setup()
    _, alone = lecam_step(model, *x[:, :B], averages)
    assert (alone[0] - values[0]).abs() > 0.01  # half of the batch alone would be another penalty
