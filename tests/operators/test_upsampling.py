"""Enlarging layers against interpolation, hand-made filters and counted overlaps; and the guide."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from deconvnet.operators.arithmetic import is_uneven, overlap
from deconvnet.operators.upsampling import BilinearUpsampling, ResizeConvolution, bilinear_filter

FACTORS = (1, 2, 3, 4, 5, 8)


def rand(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def bilinear(channels, factor, **options):
    return BilinearUpsampling(channels, factor, dtype=torch.float64, **options)


def interpolated(x, factor, mode="bilinear"):
    options = {"align_corners": False} if mode == "bilinear" else {}
    return F.interpolate(x, scale_factor=factor, mode=mode, **options)


def resizing(in_channels, out_channels, size, factor, *, seed=0, **options):
    """A layer in float64 whose weights do not hang on torch's global generator."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return ResizeConvolution(in_channels, out_channels, size, factor, **options).double()


# Bilinear interpolation.


def test_bilinear_filters_by_hand():
    assert bilinear_filter(1).tolist() == [[1.0]]
    ramp = torch.tensor([1.0, 3, 3, 1]) / 4
    assert torch.equal(bilinear_filter(2), torch.outer(ramp, ramp))
    ramp = torch.tensor([1, 2, 3, 2, 1], dtype=torch.float64) / 3
    assert_close(bilinear_filter(3, dtype=torch.float64), torch.outer(ramp, ramp))


@pytest.mark.parametrize("factor", FACTORS)
def test_bilinear_filters_are_a_box_of_the_factor_convolved_with_itself(factor):
    # Even factors: boxes whose middle lies between two pixels, half a pixel apart in the end.
    boxes = np.convolve(np.ones(factor), np.ones(factor)) / factor
    ramp = boxes if factor % 2 else np.convolve(boxes, [0.5, 0.5])
    assert len(ramp) == 2 * factor - factor % 2
    found = bilinear_filter(factor, dtype=torch.float64)
    assert_close(found, torch.from_numpy(np.outer(ramp, ramp)), rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("size", [(6, 5), (1, 4), (1, 1)])
def test_bilinear_upsampling_is_interpolation_everywhere(factor, size):
    x = rand(2, 3, *size)
    found = bilinear(3, factor)(x)
    assert_close(found, interpolated(x, factor), rtol=0, atol=1e-14)
    single = BilinearUpsampling(3, factor)(x.float())
    assert single.dtype == torch.float32
    assert_close(single, interpolated(x.float(), factor), rtol=0, atol=5e-6)


@pytest.mark.parametrize("factor", FACTORS)
def test_gradients_of_the_maps_are_those_of_interpolation_everywhere(factor):
    x, signal = rand(1, 2, 4, 5).requires_grad_(), rand(1, 2, 4 * factor, 5 * factor, seed=1)
    (found,) = torch.autograd.grad(bilinear(2, factor)(x), x, signal)
    (expected,) = torch.autograd.grad(interpolated(x, factor), x, signal)
    assert_close(found, expected, rtol=1e-13, atol=1e-13)


def test_gradients_of_maps_and_weights_agree_with_finite_differences():
    for factor in (2, 3):
        layer = bilinear(2, factor)

        def enlarge(x, weight, layer=layer):
            return torch.func.functional_call(layer, {"weight": weight}, (x,))

        at = rand(1, 2, 2, 3).requires_grad_(), rand(*layer.weight.shape, seed=1).requires_grad_()
        assert torch.autograd.gradcheck(enlarge, at)


@pytest.mark.parametrize("factor", [2, 3, 4])
def test_the_filter_alone_interpolates_inside_and_fades_at_the_border(factor):
    x = torch.ones(1, 1, 5, 5, dtype=torch.float64)
    f = bilinear_filter(factor, dtype=torch.float64)
    plain = F.conv_transpose2d(x, f[None, None], stride=factor, padding=factor // 2)
    assert plain.shape[2] == 5 * factor
    inside = plain[..., factor // 2 : -(factor // 2), factor // 2 : -(factor // 2)]
    assert_close(inside, torch.ones_like(inside))
    # The first output lies (s - 1) / (2s) of an input away from its only neighbour.
    left = 1 - (factor - 1) / 2 / factor
    assert_close(plain[0, 0, 0, 0].item(), left**2)
    assert_close(plain[0, 0, 0, 2 * factor].item(), left)
    assert_close(bilinear(1, factor)(x), torch.ones_like(plain))


def test_channels_do_not_meet_also_when_their_filters_differ():
    layer = bilinear(3, 2)
    with torch.no_grad():
        layer.weight.copy_(rand(*layer.weight.shape))
    x = rand(2, 3, 4, 4, seed=1)
    for channel in range(3):
        alone = torch.zeros_like(x)
        alone[:, channel] = x[:, channel]
        found = layer(alone)
        assert_close(found[:, channel], layer(x)[:, channel], rtol=0, atol=0)
        assert torch.count_nonzero(found) == torch.count_nonzero(found[:, channel])


def test_learnable_weights_learn_to_repeat_pixels_from_examples():
    # Repeating pixels is a transposed convolution with the same filter size and another filter.
    layer, x = bilinear(2, 2), rand(4, 2, 6, 6)
    wanted = interpolated(x, 2, "nearest")
    exact = {"tolerance_grad": 1e-12, "tolerance_change": 1e-14}
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=100, **exact)

    def loss():
        optimizer.zero_grad()
        value = (layer(x) - wanted).square().mean()
        value.backward()
        return value

    assert optimizer.step(loss) > 0.05
    assert loss() < 1e-12
    box = F.pad(torch.ones(2, 2, dtype=torch.float64), (1, 1, 1, 1)).expand(2, 1, 4, 4)
    assert_close(layer.weight.detach(), box, rtol=0, atol=1e-4)


def test_fixed_weights_are_no_parameters_and_still_in_the_state():
    fixed, learned = bilinear(2, 3, learnable=False), bilinear(2, 3)
    assert not list(fixed.parameters())
    assert [name for name, _ in learned.named_parameters()] == ["weight"]
    assert list(fixed.state_dict()) == list(learned.state_dict()) == ["weight"]
    assert not fixed(rand(1, 2, 3, 3)).requires_grad
    with torch.no_grad():
        learned.weight.copy_(rand(*learned.weight.shape))
    fixed.load_state_dict(learned.state_dict())
    x = rand(1, 2, 4, 4, seed=1)
    assert torch.equal(fixed(x), learned(x))
    assert not torch.equal(fixed(x), bilinear(2, 3)(x))


def test_filters_are_of_the_dtype_that_is_asked_for_and_not_rounded_on_the_way():
    assert bilinear_filter(3).dtype == torch.get_default_dtype()
    assert BilinearUpsampling(1, 3).double().weight.sum().item() != pytest.approx(9, abs=1e-9)
    assert bilinear(1, 3).weight.sum().item() == pytest.approx(9, abs=1e-13)


# Resizing, then convolution.


@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
@pytest.mark.parametrize(("size", "factor"), [(1, 2), (3, 2), (3, 3), (5, 4), (3, 1)])
def test_with_one_weight_in_the_middle_a_resize_convolution_is_interpolation(mode, size, factor):
    layer = resizing(2, 3, size, factor, mode=mode)
    mix, bias = rand(3, 2), rand(3, seed=1)
    with torch.no_grad():
        layer.convolution.weight.zero_()
        layer.convolution.weight[..., size // 2, size // 2] = mix
        layer.convolution.bias.copy_(bias)
    x = rand(2, 2, 4, 5, seed=2)
    mixed = torch.einsum("kc,nchw->nkhw", mix, interpolated(x, factor, mode))
    assert_close(layer(x), mixed + bias[:, None, None], rtol=1e-13, atol=1e-13)


def test_one_off_centre_weight_shifts_the_image_and_continues_the_border():
    layer = resizing(1, 1, 3, 2, bias=False)
    with torch.no_grad():
        layer.convolution.weight.zero_()
        layer.convolution.weight[0, 0, 1, 2] = 1.0
    x = torch.tensor([[1.0, 2, 3]], dtype=torch.float64)[None, None]
    assert layer(x)[0, 0, 0].tolist() == [1, 2, 2, 3, 3, 3]


@pytest.mark.parametrize(("size", "factor"), [(3, 2), (5, 2), (3, 3)])
def test_repeating_pixels_before_a_convolution_is_a_transposed_one_of_tied_weights(size, factor):
    layer = resizing(2, 3, size, factor)
    x = rand(1, 2, 8, 8)
    # Every input is a box of s x s ones that the convolution, a correlation, then sees.
    box = torch.ones(1, 1, factor, factor, dtype=torch.float64)
    weight = layer.convolution.weight.detach().flip(2, 3)
    tied = F.conv_transpose2d(weight.flatten(0, 1)[:, None], box).unflatten(0, (3, 2))[:, :, 0]
    found = F.conv_transpose2d(x, tied.transpose(0, 1), stride=factor, padding=size // 2)
    found = found + layer.convolution.bias.detach()[:, None, None]
    inside = (..., slice(size, -size), slice(size, -size))
    assert found.shape == layer(x).shape
    assert_close(found[inside], layer(x).detach()[inside], rtol=1e-13, atol=1e-13)


KERNELS = [(3, 2), (5, 2), (7, 2), (4, 3), (5, 3), (7, 4)]


@pytest.mark.parametrize(("kernel", "stride"), KERNELS)
def test_a_kernel_that_its_stride_does_not_divide_makes_a_checkerboard_of_a_constant(
    kernel, stride
):
    assert is_uneven(kernel, stride=stride)
    x = torch.ones(1, 1, 9, 9, dtype=torch.float64)
    even = torch.ones(1, 1, kernel, kernel, dtype=torch.float64)
    painted = F.conv_transpose2d(x, even, stride=stride)[0, 0]
    counts = overlap(9, kernel, stride=stride).double()
    assert_close(painted, torch.outer(counts, counts))
    inside = painted[kernel:-kernel, kernel:-kernel]
    assert inside.max() / inside.min() > 1.2
    assert_close(inside[stride:, stride:], inside[:-stride, :-stride])


@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
@pytest.mark.parametrize("factor", [2, 3])
def test_a_resize_convolution_leaves_a_constant_even_whatever_its_weights(mode, factor):
    for seed in range(3):
        layer = resizing(4, 3, 3, factor, mode=mode, seed=seed)
        x = rand(1, 4, 1, 1, seed=seed).expand(1, 4, 5, 6)
        found = layer(x).detach()
        assert found.shape == (1, 3, 5 * factor, 6 * factor)
        assert found.abs().max() > 0.01
        assert_close(found, found[..., :1, :1].expand_as(found), rtol=0, atol=1e-14)


def test_random_weights_make_a_checkerboard_even_if_the_stride_divides_the_kernel():
    assert not is_uneven(4, stride=2)
    x = torch.ones(1, 1, 6, 6, dtype=torch.float64)
    painted = F.conv_transpose2d(x, rand(1, 1, 4, 4), stride=2, padding=1)[0, 0]
    phases = painted[2:4, 2:4]
    assert phases.std() > 0.1
    assert_close(painted[4:6, 4:6], phases)


def test_gradients_of_a_resize_convolution_reach_maps_and_all_parameters():
    for mode in ("nearest", "bilinear"):
        layer = resizing(2, 2, 3, 2, mode=mode)

        def enlarge(x, weight, bias, layer=layer):
            parameters = {"convolution.weight": weight, "convolution.bias": bias}
            return torch.func.functional_call(layer, parameters, (x,))

        shapes = (1, 2, 2, 3), (2, 2, 3, 3), (2,)
        assert torch.autograd.gradcheck(enlarge, [rand(*s).requires_grad_() for s in shapes])


def test_a_resize_convolution_comes_back_from_its_state():
    layer, other = resizing(2, 3, 3, 2), resizing(2, 3, 3, 2, seed=1)
    x = rand(1, 2, 4, 4)
    assert not torch.equal(layer(x), other(x))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x), other(x))
    assert [*resizing(2, 3, 3, 2, bias=False).state_dict()] == ["convolution.weight"]


def test_both_layers_work_in_float32_and_say_what_they_are():
    for layer in (BilinearUpsampling(2, 3), resizing(2, 2, 3, 3).float()):
        found = layer(rand(2, 2, 4, 4, dtype=torch.float32))
        assert (found.dtype, found.shape) == (torch.float32, (2, 2, 12, 12))
        assert "factor=3" in repr(layer)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bilinear_filter(0), "factor=0: must be a whole number, at least 1"),
        (lambda: bilinear_filter(2.0), "factor=2.0: must be a whole number"),
        (lambda: bilinear_filter(True), "factor=True: must be a whole number"),
        (lambda: bilinear_filter(2, dtype=torch.int64), "dtype=torch.int64: must be a floating"),
        (lambda: BilinearUpsampling(0, 2), "channels=0: must be a whole number, at least 1"),
        (lambda: BilinearUpsampling(3, -1), "factor=-1: must be"),
        (lambda: ResizeConvolution(0, 2, 3, 2), "in_channels=0: must be"),
        (lambda: ResizeConvolution(2, 0, 3, 2), "out_channels=0: must be"),
        (lambda: ResizeConvolution(2, 2, 4, 2), "size=4: must be odd, so that maps keep their"),
        (lambda: ResizeConvolution(2, 2, 0, 2), "size=0: must be a whole number"),
        (lambda: ResizeConvolution(2, 2, 3, 0.5), "factor=0.5: must be a whole number"),
        (
            lambda: ResizeConvolution(2, 2, 3, 2, mode="bicubic"),
            "mode='bicubic': choose 'nearest' or 'bilinear'",
        ),
        (
            lambda: BilinearUpsampling(3, 2)(torch.zeros(1, 2, 4, 4)),
            r"maps must have the shape \(N, 3, H, W\), got \(1, 2, 4, 4\)",
        ),
        (lambda: BilinearUpsampling(3, 2)(torch.zeros(3, 4, 4)), r"got \(3, 4, 4\)"),
        (
            lambda: resizing(3, 1, 3, 2)(torch.zeros(1, 2, 4, 4)),
            r"maps must have the shape \(N, 3, H, W\), got \(1, 2, 4, 4\)",
        ),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)
