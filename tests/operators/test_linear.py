"""Operators against dense matrices: adjoints, compositions, solves and norms."""

import dataclasses
from functools import cache

import pytest
import torch
from torch.testing import assert_close

from deconvnet import DeconvNet, LayerSettings, PreprocessingSettings, SolverSettings
from deconvnet.operators.arithmetic import convolution_matrix
from deconvnet.operators.convolution import correlate
from deconvnet.operators.linear import (
    Composition,
    Deconvolution,
    Identity,
    Scaling,
    Unpooling,
    VerticalStack,
    WeightedUnpooling,
    conjugate_gradients,
    norm,
)
from deconvnet.operators.pooling import max_pool, unpooling_weights

N = 2


def rand(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def unit_filters(*shape, seed=0):
    f = rand(*shape, seed=seed)
    return f / torch.linalg.vector_norm(f, dim=(1, 2, 3), keepdim=True)


def deconvolution(K, C, h, w, boundary="valid", connectivity=None):
    f = unit_filters(K, C, h, w, seed=K + 10 * h + 100 * w)
    if connectivity is not None:
        f = f * torch.tensor(connectivity, dtype=f.dtype).view(K, C, 1, 1)
    return Deconvolution(f, boundary)


def stack(num_layers, image, windows, *, channels=1, factor=0.7, boundary="valid"):
    """R_l = F_1 U_1 S_1 F_2 ... with the switches of maps that the image itself gives rise to."""
    y = rand(N, channels, *image, seed=num_layers)
    below, A = channels, None
    for level in range(num_layers):
        maps = 4 + level
        F = deconvolution(maps, below, 3, 3 + level % 2, boundary)
        A = F if A is None else A @ F
        if level == num_layers - 1:
            return A, A.adjoint(y).shape[1:], y.shape[1:]
        z = A.adjoint(y)
        p, switches = max_pool(z, windows[level])
        A = A @ Unpooling(switches, z.shape[1:]) @ Scaling(factor)
        below = p.shape[1]


def unpooling(shape, window):
    z = rand(N, *shape, seed=3)
    p, switches = max_pool(z, window)
    return Unpooling(switches, shape), p.shape[1:], shape


def spreading(kind, shape, window):
    p, switches = max_pool(rand(N, *shape, seed=3), window)
    weights = unpooling_weights(kind, switches, shape, window).double()
    return WeightedUnpooling(weights, window), p.shape[1:], shape


def pile(num_layers, image, windows):
    """The top layer's own deconvolution on R_l, as where maps and image are explained at once."""
    R, maps, image = stack(num_layers, image, windows)
    F = R.inner
    assert isinstance(F, Deconvolution)
    shapes = F(torch.zeros(N, *maps, dtype=F.f.dtype)).shape, torch.Size((N, *image))
    numbers = sum(shape[1:].numel() for shape in shapes)
    return VerticalStack([F, R], [1.0, 1.7], list(shapes)), maps, (numbers, 1, 1)


def with_shapes(A, image):
    y = rand(N, A.f.shape[1], *image)
    return A, A.adjoint(y).shape[1:], y.shape[1:]


OPERATORS = {
    "valid": lambda: with_shapes(deconvolution(4, 1, 5, 5), (9, 11)),
    "valid, 3 channels": lambda: with_shapes(deconvolution(4, 3, 5, 5), (9, 11)),
    "valid, even filters": lambda: with_shapes(deconvolution(4, 1, 4, 4), (9, 11)),
    "valid, rectangular filters": lambda: with_shapes(deconvolution(4, 3, 2, 5), (9, 11)),
    "valid, one channel, rectangular": lambda: with_shapes(deconvolution(4, 1, 5, 2), (9, 11)),
    "valid, image below filter": lambda: with_shapes(deconvolution(4, 1, 5, 5), (3, 2)),
    "circular": lambda: with_shapes(deconvolution(4, 1, 5, 5, "circular"), (9, 10)),
    "circular, 3 channels": lambda: with_shapes(deconvolution(4, 3, 5, 5, "circular"), (9, 10)),
    "circular, even rectangular": lambda: with_shapes(
        deconvolution(4, 3, 4, 3, "circular"), (9, 10)
    ),
    "connectivity": lambda: with_shapes(
        deconvolution(3, 3, 4, 5, "valid", [[1, 0, 0], [1, 1, 0], [0, 1, 1]]), (9, 11)
    ),
    "circular connectivity": lambda: with_shapes(
        deconvolution(3, 3, 4, 5, "circular", [[1, 0, 0], [1, 1, 0], [0, 1, 1]]), (9, 11)
    ),
    "unpooling 2-D": lambda: unpooling((4, 6, 9), (1, 2, 3)),
    "unpooling 3-D": lambda: unpooling((4, 6, 9), (2, 3, 3)),
    "unpooling, partial windows": lambda: unpooling((5, 7, 8), (2, 3, 3)),
    "spreading over maps": lambda: spreading("no_map", (5, 7, 8), (2, 3, 3)),
    "spreading over places": lambda: spreading("no_place", (4, 6, 9), (2, 3, 3)),
    "spreading over windows": lambda: spreading("average", (5, 7, 8), (2, 3, 3)),
    "identity": lambda: (Identity(), (4, 5, 6), (4, 5, 6)),
    "scaling": lambda: (Scaling(-0.3), (4, 5, 6), (4, 5, 6)),
    "R_2": lambda: stack(2, (11, 12), [(1, 2, 2)]),
    "R_2, 3 channels, 3-D pools": lambda: stack(2, (11, 12), [(3, 3, 3)], channels=3),
    "R_2, circular": lambda: stack(2, (12, 12), [(2, 2, 2)], boundary="circular"),
    "R_3": lambda: stack(3, (14, 13), [(2, 2, 2), (2, 3, 2)]),
    "R_4": lambda: stack(4, (16, 17), [(3, 2, 2), (2, 2, 2), (2, 2, 2)], channels=3),
    "stack of F_2 and R_2": lambda: pile(2, (10, 11), [(3, 2, 2)]),
}


def dense(A, shape, image=slice(0, 1)):
    """A of one image, column by column."""
    A = alone(A, image)
    impulses = torch.eye(torch.Size(shape).numel(), dtype=torch.float64)
    return torch.stack([A(impulse.view(1, *shape)).flatten() for impulse in impulses], 1)


def alone(A, image):
    """The operator of one image of the batch: only unpoolings differ between images."""
    if isinstance(A, Composition):
        return alone(A.outer, image) @ alone(A.inner, image)
    if isinstance(A, VerticalStack):
        shapes = [torch.Size((1, *shape)) for shape in A.shapes]
        return VerticalStack([alone(part, image) for part in A.operators], A.weights, shapes)
    if isinstance(A, WeightedUnpooling):
        return WeightedUnpooling(A.weights.expand(N, -1, -1, -1)[image], A.window)
    return Unpooling(A.switches[image], A.shape) if isinstance(A, Unpooling) else A


@pytest.mark.parametrize("name", OPERATORS)
def test_adjoint_is_the_transpose(name):
    A, maps, image = OPERATORS[name]()
    for seed in range(3):
        z, y = rand(N, *maps, seed=10 + seed), rand(N, *image, seed=20 + seed)
        painted, maps_of_y = A(z), A.adjoint(y)
        assert painted.shape == y.shape and maps_of_y.shape == z.shape
        left = (painted * y).sum((1, 2, 3))
        right = (z * maps_of_y).sum((1, 2, 3))
        # Rounding of a sum is relative to the sizes of its terms, not to what they cancel to.
        scale = norm(painted).flatten() * norm(y).flatten()
        assert ((left - right).abs() <= 1e-12 * scale).all()
        assert (left.abs() > 1e-6 * scale).any()


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_are_linear_and_images_do_not_mix(name):
    A, maps, _ = OPERATORS[name]()
    a, b = rand(N, *maps, seed=1), rand(N, *maps, seed=2)
    assert_close(A(2 * a - 3 * b), 2 * A(a) - 3 * A(b), rtol=1e-11, atol=1e-12)
    a[0] = 0
    assert A(a)[0].abs().max() == 0 and A(a)[1].abs().max() > 0


@pytest.mark.parametrize("windows", [(1, 2, 2), (2, 3, 3)])
@pytest.mark.parametrize("image", [0, 1])
def test_a_composition_is_the_product_of_the_matrices(windows, image):
    y = rand(N, 1, 7, 8)
    F1 = deconvolution(3, 1, 3, 3)
    z1 = F1.adjoint(y)
    p, switches = max_pool(z1, windows)
    U, S = Unpooling(switches, z1.shape[1:]), Scaling(0.7)
    F2 = deconvolution(4, p.shape[1], 3, 2)
    z2 = F2.adjoint(p).shape[1:]
    this = slice(image, image + 1)
    product = (
        dense(F1, z1.shape[1:])
        @ dense(U, p.shape[1:], this)
        @ (0.7 * torch.eye(p[0].numel(), dtype=torch.float64))
        @ dense(F2, z2)
    )
    assert_close(dense(F1 @ U @ S @ F2, z2, this), product, rtol=1e-12, atol=1e-13)
    assert_close(dense((F1 @ U) @ (S @ F2), z2, this), product, rtol=1e-12, atol=1e-13)


def test_nothing_before_or_after_an_operator_is_the_operator_itself():
    F = deconvolution(3, 1, 3, 3)
    assert Identity() @ F is F and F @ Identity() is F
    R = F @ Scaling(2.0)
    assert Identity() @ R is R and R @ Identity() is R and Identity() @ R @ Identity() is R
    assert isinstance(Identity() @ Identity(), Identity)
    z = rand(N, 3, 5, 6)
    assert Identity()(z) is z and Identity().adjoint(z) is z


@pytest.mark.parametrize("image", [0, 1])
def test_a_stack_is_the_weighted_matrices_one_below_the_other(image):
    A, maps, _ = pile(2, (10, 11), [(3, 2, 2)])
    this = slice(image, image + 1)
    F, R = A.operators
    expected = torch.cat([dense(F, maps, this), 1.7 * dense(R, maps, this)])
    assert_close(dense(A, maps, this), expected, rtol=1e-13, atol=1e-14)


def test_what_a_stack_should_make_is_joined_so_that_squared_errors_add_with_the_weights():
    A, maps, _ = pile(2, (10, 11), [(3, 2, 2)])
    z = rand(N, *maps, seed=1)
    targets = [rand(N, *shape, seed=2 + i) for i, shape in enumerate(A.shapes)]
    found = (A.join(targets) - A(z)).square().sum((1, 2, 3))
    errors = [
        (b - part(z)).square().sum((1, 2, 3)) for b, part in zip(targets, A.operators, strict=True)
    ]
    assert_close(found, errors[0] + 1.7**2 * errors[1], rtol=1e-12, atol=0)


# Two poolings over maps that leave a partial group, all of them partial windows of positions.
TOWER = [
    LayerSettings(5, 5, pool=[2, 3, 2]),
    LayerSettings(4, 3, pool=[3, 2, 2]),
    LayerSettings(5, 3, pool=[2, 2, 3]),
    LayerSettings(3, 2),
]


@pytest.fixture(scope="module", params=["after", "in_loop"])
def inferred(request, textures):
    """(network of four layers in double precision, codes of two images)."""
    solver = SolverSettings(method="fista", iterations=15)
    layers = [
        dataclasses.replace(
            layer, lam=20.0, solver=solver, pooling=request.param if layer.pool else "after"
        )
        for layer in TOWER
    ]
    images = textures(N, 3, 16, 15).double()
    net = DeconvNet(layers, PreprocessingSettings(), seed=1).double()
    net.preprocessing.fit(images)
    codes = net.infer(images, depth=1)
    for number in (2, 3, 4):
        net.layer(number).fit_scale(codes.layers[-1].pooled)
        codes = net.infer_next_layer(codes)
    return net, codes


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_the_way_down_from_every_layer_has_its_adjoint_with_the_switches_of_inference(
    inferred, number
):
    net, codes = inferred
    A = net.operator(codes, number)
    for seed in range(3):
        z, y = rand(*codes.layer(number).z.shape, seed=seed), rand(*codes.y.shape, seed=9 + seed)
        painted = A(z)
        left, right = (painted * y).sum((1, 2, 3)), (z * A.adjoint(y)).sum((1, 2, 3))
        scale = norm(painted).flatten() * norm(y).flatten()
        assert ((left - right).abs() <= 1e-12 * scale).all()
        assert (left.abs() > 1e-6 * scale).any()


def unpooling_matrix(switches, size):
    matrix = torch.zeros(size, switches.numel(), dtype=torch.float64)
    matrix[switches.flatten(), torch.arange(switches.numel())] = 1
    return matrix


@pytest.mark.parametrize("number", [2, 3, 4])
def test_the_way_down_is_the_product_of_filters_switches_and_scales(inferred, number):
    net, codes = inferred
    z, y = rand(*codes.layer(number).z.shape, seed=5), rand(*codes.y.shape, seed=6)
    painted, maps = net.operator(codes, number)(z), net.operator(codes, number).adjoint(y)
    for n in range(N):
        matrices, shape = [], codes.y.shape[2:]
        for level in range(1, number + 1):
            below = net.layer(level).scale * convolution_matrix(net.layer(level).filters, shape)
            found = codes.layer(level)
            matrices.append(below)
            if level < number:
                size = torch.Size(found.shape).numel()
                matrices.append(unpooling_matrix(found.switches[n], size))
                shape = found.switches.shape[2:]
        down, up = z[n].flatten(), y[n].flatten()
        for matrix in reversed(matrices):
            down = matrix @ down
        for matrix in matrices:
            up = matrix.T @ up
        assert_close(painted[n].flatten(), down, rtol=1e-11, atol=1e-12)
        assert_close(maps[n].flatten(), up, rtol=1e-11, atol=1e-12)


SOLVABLE = [name for name in OPERATORS if "image below filter" not in name]


@cache
def matrices(name):
    """An operator for each image as a matrix."""
    A, maps, _ = OPERATORS[name]()
    return [dense(A, maps, slice(n, n + 1)) for n in range(N)]


@cache
def grams(name):
    return [M @ M.T for M in matrices(name)]


@cache
def dense_solve(name, lam, beta, n):
    """The image of which (beta + lam M M') is image n of those with seed 5."""
    gram, (_, _, image) = grams(name)[n], OPERATORS[name]()
    system = beta * torch.eye(len(gram), dtype=gram.dtype) + lam * gram
    return torch.linalg.solve(system, rand(N, *image, seed=5)[n].flatten()).view(image)


@pytest.mark.parametrize("name", SOLVABLE)
@pytest.mark.parametrize("lam", [0.5, 40.0])
@pytest.mark.parametrize("betas", [[0.7, 30.0], [0.7]])
def test_solve_agrees_with_a_dense_solve_for_one_beta_and_for_one_of_each_image(name, lam, betas):
    A, _, image = OPERATORS[name]()
    d = rand(N, *image, seed=5)
    beta = torch.tensor(betas, dtype=torch.float64).expand(N).view(N, 1, 1, 1)
    given = beta if len(betas) == N else betas[0]
    found = A.solve(d, lam, given, tolerance=1e-13, max_iterations=1000)
    for n in range(N):
        expected = dense_solve(name, lam, beta[n].item(), n)
        # The residual is below 1e-13 of d; the error is that times the condition number, < 1e4.
        assert_close(found[n], expected, rtol=1e-8, atol=1e-9 * expected.abs().max().item())


@pytest.mark.parametrize("boundary", ["circular", "valid"])
@pytest.mark.parametrize("beta", [0.3, 1e-12])
def test_one_beta_for_all_images_is_solved_as_one_for_each(boundary, beta):
    # Of two filters F F' has no more than two directions of three: with the smaller beta the
    # factors of the inverse do not exist in float32, and eigenvectors take their place.
    generator = torch.Generator().manual_seed(0)
    f = torch.randn(2, 3, 3, 3, generator=generator)
    d = torch.randn(2, 3, 8, 9, generator=generator)
    A = Deconvolution(f, boundary)
    options = dict(tolerance=0, max_iterations=3)
    one = A.solve(d, 20.0, beta, **options)
    each = A.solve(d, 20.0, torch.full((2, 1, 1, 1), beta), **options)
    assert torch.isfinite(one).all()
    assert_close(one, each, rtol=1e-3, atol=1e-3 * float(each.abs().max()))


@pytest.mark.parametrize("name", ["valid", "valid, 3 channels", "R_2"])
def test_solve_continues_from_a_warm_start(name):
    A, _, image = OPERATORS[name]()
    d = rand(N, *image, seed=5)
    beta = torch.full((N, 1, 1, 1), 0.7, dtype=torch.float64)
    exact = A.solve(d, 20.0, beta, tolerance=1e-13, max_iterations=1000)
    one = A.solve(d, 20.0, beta, tolerance=0, max_iterations=1)
    better = A.solve(d, 20.0, beta, one, tolerance=0, max_iterations=1)
    there = A.solve(d, 20.0, beta, exact, tolerance=1e-10, max_iterations=1)
    assert torch.equal(there, exact)
    # In the norm of the system no step of conjugate gradients moves away from the solution.
    for a, b in ((torch.zeros_like(d), one), (one, better)):
        assert (system_norm(A, 20.0, beta, b - exact) < system_norm(A, 20.0, beta, a - exact)).all()


def system_norm(A, lam, beta, v):
    return (v * (beta * v + lam * A(A.adjoint(v)))).sum((1, 2, 3))


@pytest.mark.parametrize("name", [n for n in SOLVABLE if n.startswith(("valid", "connectivity"))])
def test_squared_norm_of_a_valid_deconvolution_bounds_the_true_one_closely(name):
    A, maps, image = OPERATORS[name]()
    true = torch.linalg.matrix_norm(dense(A, maps), 2).item() ** 2
    bound = A.squared_norm(torch.zeros(N, *image, dtype=torch.float64))
    assert bound.shape == (N, 1, 1, 1)
    # The slack is a border effect: on 9x11 pixels the eigenvectors of the image feel their ends.
    assert true <= bound[0].item() <= 1.35 * true


def test_squared_norm_of_a_valid_deconvolution_is_within_a_tenth_on_larger_images():
    A = deconvolution(4, 1, 5, 5)
    M = dense(A, (4, 28, 30))
    true = torch.linalg.eigvalsh(M @ M.mT)[-1].item()
    bound = A.squared_norm(torch.zeros(1, 1, 24, 26, dtype=torch.float64)).item()
    assert true <= bound <= 1.1 * true


@pytest.mark.parametrize("name", [n for n in SOLVABLE if n.startswith("circular")])
def test_squared_norm_of_a_circular_deconvolution_is_exact(name):
    A, maps, image = OPERATORS[name]()
    true = torch.linalg.matrix_norm(dense(A, maps), 2).item() ** 2
    found = A.squared_norm(torch.zeros(N, *image, dtype=torch.float64))
    assert found[0].item() == pytest.approx(true, rel=1e-12)


@pytest.mark.parametrize(
    "name", [n for n in OPERATORS if n.startswith(("R_", "unpool", "spread", "stack"))]
)
def test_squared_norm_of_a_composition_bounds_that_of_every_image(name):
    A, _, image = OPERATORS[name]()
    found = A.squared_norm(torch.zeros(N, *image, dtype=torch.float64)).flatten()
    for n, matrix in enumerate(matrices(name)):
        true = torch.linalg.matrix_norm(matrix, 2).item() ** 2
        # Rounded up by 2%; the power iteration stops at most a little below the true value.
        assert true <= found[n].item() <= 1.0201 * true


def test_squared_norm_of_an_image_does_not_depend_on_its_companions():
    A, _, image = OPERATORS["R_3"]()
    zeros = torch.zeros(N, *image, dtype=torch.float64)
    together = A.squared_norm(zeros)
    for n in range(N):
        single = alone(A, slice(n, n + 1)).squared_norm(zeros[n : n + 1])
        assert single.item() == pytest.approx(together[n].item(), rel=1e-10)


def spd_system(n, seed):
    root = rand(n, n, seed=seed)
    return root @ root.T + torch.eye(n, dtype=torch.float64)


def test_conjugate_gradients_reach_the_solution_in_as_many_steps_as_unknowns():
    n = 6
    matrices = [spd_system(n, seed) for seed in range(3)]
    d = rand(3, 1, 1, n, seed=9)

    def system(v):
        return torch.stack([v[i] @ M for i, M in enumerate(matrices)])

    found = conjugate_gradients(system, d, tolerance=0, max_iterations=n)
    for i, M in enumerate(matrices):
        expected = torch.linalg.solve(M, d[i].flatten())
        assert_close(found[i].flatten(), expected, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("preconditioned", [False, True])
def test_conjugate_gradients_give_an_image_the_same_bits_alone_and_in_a_batch(preconditioned):
    # Diagonal systems of very different difficulty: the images stop after 1, few and many steps.
    gains = torch.ones(4, 1, 5, 6, dtype=torch.float64)
    gains[1] = rand(1, 5, 6, seed=1).abs() + 1
    gains[2] = torch.logspace(0, 4, 30, dtype=torch.float64).view(1, 5, 6)
    gains[3] = gains[2] * 1e3
    d = rand(4, 1, 5, 6, seed=2)

    def run(images):
        system = gains[images]
        roots = system.sqrt()
        return conjugate_gradients(
            lambda v: system * v,
            d[images],
            tolerance=1e-8,
            max_iterations=25,
            preconditioner=(lambda r: r / roots) if preconditioned else None,
        )

    batch = run(torch.arange(4))
    for n in range(4):
        assert torch.equal(run(torch.tensor([n]))[0], batch[n])
    assert torch.equal(run(torch.tensor([3, 1, 0]))[1], batch[1])


def test_conjugate_gradients_solve_zero_by_zero_and_do_not_change_other_images():
    A, _, image = OPERATORS["R_2"]()
    d = rand(N, *image, seed=5)
    beta = torch.ones(N, 1, 1, 1, dtype=torch.float64)
    expected = A.solve(d, 3.0, beta, tolerance=1e-8)
    d[0] = 0
    for tolerance in (0.0, 1e-8):
        found = A.solve(d, 3.0, beta, tolerance=tolerance, max_iterations=50)
        assert found[0].abs().max() == 0
        assert_close(found[1], expected[1], rtol=1e-6, atol=1e-7)


def test_a_deconvolution_is_the_correlation_of_its_filters():
    A = deconvolution(4, 3, 4, 5)
    y = rand(N, 3, 9, 8)
    assert torch.equal(A.adjoint(y), correlate(y, A.f))
