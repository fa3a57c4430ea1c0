"""Schedules, clipping, AdamW and EMA, compared with openpi's formulas."""

import dataclasses
import math

import pytest
import torch

from torchpi.training.config import OptimConfig
from torchpi.training.optim import clip_gradients, learning_rate, make_optimizer, update_ema

SCHEDULE = OptimConfig(lr=1e-3, warmup_steps=5, decay_steps=20, min_lr=1e-4)
# openpi's schedule at steps 0, 5 and 20, from golden/training.
OPENPI = {0: 1e-3 / 6, 5: 1e-3, 20: 1e-4}


def test_cosine_schedule_equals_openpi():
    for step, expected in OPENPI.items():
        assert learning_rate(step, SCHEDULE, 1000) == pytest.approx(expected, rel=1e-12)
    assert learning_rate(3, SCHEDULE, 1000) == pytest.approx(1e-3 / 6 + 3 / 5 * (1e-3 - 1e-3 / 6))
    middle = 1e-4 + 9e-4 * (1 + math.cos(math.pi * 7 / 15)) / 2
    assert learning_rate(12, SCHEDULE, 1000) == pytest.approx(middle)
    assert learning_rate(500, SCHEDULE, 1000) == pytest.approx(1e-4)


def test_constant_and_rsqrt_schedules():
    assert learning_rate(900, dataclasses.replace(SCHEDULE, lr_schedule="constant"), 1000) == 1e-3
    falling = dataclasses.replace(SCHEDULE, lr_schedule="rsqrt", timescale=100.0)
    assert learning_rate(5, falling, 1000) == pytest.approx(1e-3)
    assert learning_rate(305, falling, 1000) == pytest.approx(1e-3 / 2)  # √(1 + 300 / 100)


def test_schedule_without_warmup_starts_at_the_peak():
    assert learning_rate(0, OptimConfig(lr=1.0, warmup_steps=0, decay_steps=10, min_lr=0.0), 1000) == 1.0


def parameters(*gradients: list[float]) -> list[torch.Tensor]:
    made = []
    for values in gradients:
        parameter = torch.zeros(len(values), requires_grad=True)
        parameter.grad = torch.tensor(values)
        made.append(parameter)
    return made


def test_clipping_scales_to_exactly_max_norm_and_keeps_small_gradients():
    big = parameters([3.0, 0.0], [4.0])
    assert clip_gradients(big, 1.0) == pytest.approx(5.0)
    torch.testing.assert_close(torch.cat([p.grad for p in big]), torch.tensor([0.6, 0.0, 0.8]), atol=0, rtol=1e-7)
    small = parameters([0.3, 0.4])
    assert clip_gradients(small, 1.0) == pytest.approx(0.5)
    assert small[0].grad.tolist() == pytest.approx([0.3, 0.4])


def test_parameters_without_gradient_do_not_count_in_the_norm():
    with_gradient = parameters([2.0])
    assert clip_gradients([*with_gradient, torch.zeros(3, requires_grad=True)], 10.0) == pytest.approx(2.0)


def test_optimizer_equals_adamw_formulas():
    generator = torch.Generator().manual_seed(0)
    parameter = torch.randn(5, generator=generator).requires_grad_()
    expected, mu, nu = parameter.detach().double().clone(), torch.zeros(5).double(), torch.zeros(5).double()
    optimizer = make_optimizer([parameter], weight_decay=0.01)
    for step in range(1, 4):
        gradient = torch.randn(5, generator=generator)
        parameter.grad = gradient.clone()
        optimizer.param_groups[0]["lr"] = 0.1
        optimizer.step()
        mu, nu = 0.9 * mu + 0.1 * gradient.double(), 0.95 * nu + 0.05 * gradient.double() ** 2
        direction = mu / (1 - 0.9**step) / ((nu / (1 - 0.95**step)).sqrt() + 1e-8)
        expected = expected - 0.1 * (direction + 0.01 * expected)
    torch.testing.assert_close(parameter.detach().double(), expected, atol=1e-6, rtol=0)


def test_ema_moves_by_one_minus_decay():
    ema, parameter = [torch.tensor([1.0, 2.0])], [torch.tensor([3.0, 2.0])]
    update_ema(ema, parameter, 0.9)
    assert ema[0].tolist() == pytest.approx([1.2, 2.0])
