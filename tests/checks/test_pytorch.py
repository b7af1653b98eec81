"""PyTorch's own functions, as right ones: none is called wrong, and hardly any undecided."""

import pytest
import torch

import nnce

F, L = torch.nn.functional, torch.linalg
SEEDS = 20


def normal(*shape):
    """Normal numbers, at least 0.02 apart and as far from 0, so that no kink is near."""

    def made(g):
        n = torch.Size(shape).numel()
        x = torch.randn(n, generator=g, dtype=torch.float64)
        apart = (x.sort().values.diff() >= 0.02).all() and (x.abs() >= 0.02).all()
        return (x.view(shape),) if apart else made(g)

    return made


def both(*makers):
    return lambda g: tuple(value for maker in makers for value in maker(g))


def uniform(*shape, low=0.05, high=0.95):
    return lambda g: (low + (high - low) * torch.rand(shape, generator=g, dtype=torch.float64),)


def positive(*shape):
    return lambda g: (normal(*shape)(g)[0].abs() + 0.1,)


def fixed(*values):
    return lambda g: values


def away(*kinks):
    """At least 0.3 from every kink."""

    def made(g):
        x = 8 * torch.rand(400, generator=g, dtype=torch.float64) - 4
        far = torch.stack([(x - kink).abs() >= 0.3 for kink in kinks]).all(0)
        return (x[far][:12].view(4, 3),)

    return made


def spaced(*shape):
    """Numbers of which any two are at least 0.3 apart."""

    def made(g):
        n = torch.Size(shape).numel()
        return (
            (0.32 * torch.randperm(n, generator=g) - 1.7).double().view(shape)
            + 0.02 * torch.rand(shape, generator=g, dtype=torch.float64),
        )

    return made


def spd(a):
    """A symmetric positive definite matrix of any matrix."""
    return a @ a.mT + a.shape[-1] * torch.eye(a.shape[-1], dtype=a.dtype)


def symmetric(a):
    return a + a.mT


def regular(a):
    """Far from singular."""
    return a + 4 * torch.eye(a.shape[-1], dtype=a.dtype)


LABELS = torch.tensor([0, 2, 1, 2])
SIGNS = torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=torch.float64)
X = normal(4, 3)
SQUARE = normal(3, 3)
FUNCTIONS = {
    # Activations.
    "elu": (F.elu, X),
    "selu": (F.selu, X),
    "celu": (F.celu, X),
    "gelu": (F.gelu, X),
    "gelu, tanh": (lambda x: F.gelu(x, approximate="tanh"), X),
    "silu": (F.silu, X),
    "mish": (F.mish, X),
    "softplus": (F.softplus, X),
    "softsign": (F.softsign, X),
    "tanhshrink": (F.tanhshrink, X),
    "logsigmoid": (F.logsigmoid, X),
    "sigmoid": (torch.sigmoid, X),
    "tanh": (torch.tanh, X),
    "relu": (F.relu, away(0)),
    "relu6": (F.relu6, away(0, 6)),
    "leaky_relu": (F.leaky_relu, away(0)),
    "prelu": (F.prelu, both(away(0), uniform(1))),
    "rrelu, evaluating": (lambda x: F.rrelu(x, training=False), away(0)),
    "hardtanh": (F.hardtanh, away(-1, 1)),
    "hardsigmoid": (F.hardsigmoid, away(-3, 3)),
    "hardswish": (F.hardswish, away(-3, 3)),
    "hardshrink": (F.hardshrink, away(-0.5, 0.5)),
    "softshrink": (F.softshrink, away(-0.5, 0.5)),
    "threshold": (lambda x: F.threshold(x, 0.2, -7.0), away(0.2)),
    "glu": (F.glu, normal(3, 4)),
    "softmax": (lambda x: F.softmax(x, -1), X),
    "log_softmax": (lambda x: F.log_softmax(x, -1), X),
    "softmin": (lambda x: F.softmin(x, -1), X),
    # Losses.
    "mse_loss": (F.mse_loss, both(X, X)),
    "l1_loss": (F.l1_loss, both(away(0), lambda g: (10 * torch.ones(4, 3).double(),))),
    "smooth_l1_loss": (lambda x: F.smooth_l1_loss(x, torch.zeros_like(x)), away(-1, 1)),
    "huber_loss": (lambda x: F.huber_loss(x, torch.zeros_like(x)), away(-1, 1)),
    "binary_cross_entropy": (F.binary_cross_entropy, both(uniform(4, 3), uniform(4, 3))),
    "binary_cross_entropy_with_logits": (
        F.binary_cross_entropy_with_logits,
        both(X, uniform(4, 3)),
    ),
    "cross_entropy": (lambda x: F.cross_entropy(x, LABELS), X),
    "cross_entropy, smoothed": (lambda x: F.cross_entropy(x, LABELS, label_smoothing=0.1), X),
    "cross_entropy of probabilities": (F.cross_entropy, both(X, uniform(4, 3))),
    "nll_loss": (lambda x: F.nll_loss(x, LABELS), X),
    "kl_div": (lambda x, y: F.kl_div(x, y, reduction="batchmean"), both(X, uniform(4, 3))),
    "poisson_nll_loss": (F.poisson_nll_loss, both(X, uniform(4, 3))),
    "gaussian_nll_loss": (F.gaussian_nll_loss, both(X, X, positive(4, 3))),
    "soft_margin_loss": (lambda x: F.soft_margin_loss(x, SIGNS), normal(4)),
    "hinge_embedding_loss": (lambda x: F.hinge_embedding_loss(x, SIGNS), spaced(4)),
    "margin_ranking_loss": (
        lambda a, b: F.margin_ranking_loss(a, b, SIGNS),
        both(spaced(4), lambda g: (3 * torch.ones(4).double(),)),
    ),
    "multi_margin_loss": (lambda x: F.multi_margin_loss(x, LABELS), spaced(4, 3)),
    "multilabel_soft_margin_loss": (
        lambda x: F.multilabel_soft_margin_loss(x, F.one_hot(LABELS, 3).double()),
        X,
    ),
    "cosine_embedding_loss": (
        lambda a, b: F.cosine_embedding_loss(a, b, SIGNS, margin=-1.0),
        both(X, X),
    ),
    "triplet_margin_loss": (
        lambda a, b, c: F.triplet_margin_loss(a, b, c, margin=20.0),
        both(X, X, X),
    ),
    "ctc_loss": (
        lambda x: F.ctc_loss(
            x.log_softmax(-1), torch.tensor([[1, 2]]), torch.tensor([5]), torch.tensor([2])
        ),
        normal(5, 1, 4),
    ),
    # Normalizations and distances.
    "layer_norm": (lambda x, w, b: F.layer_norm(x, (3,), w, b), both(X, normal(3), normal(3))),
    "batch_norm": (lambda x: F.batch_norm(x, None, None, training=True), X),
    "instance_norm": (F.instance_norm, normal(2, 2, 4)),
    "group_norm": (lambda x: F.group_norm(x, 2), normal(2, 4, 3)),
    "rms_norm": (lambda x: F.rms_norm(x, (3,)), X),
    "local_response_norm": (lambda x: F.local_response_norm(x, 2), normal(1, 3, 4)),
    "normalize": (F.normalize, X),
    "cosine_similarity": (F.cosine_similarity, both(X, X)),
    "pairwise_distance": (F.pairwise_distance, both(X, X)),
    "pdist": (F.pdist, X),
    # Poolings, and what moves elements.
    "avg_pool1d": (lambda x: F.avg_pool1d(x, 2), normal(1, 2, 6)),
    "avg_pool2d": (lambda x: F.avg_pool2d(x, 2), normal(1, 1, 4, 4)),
    "adaptive_avg_pool1d": (lambda x: F.adaptive_avg_pool1d(x, 3), normal(1, 2, 5)),
    "max_pool1d": (lambda x: F.max_pool1d(x, 2), spaced(1, 2, 6)),
    "max_pool2d": (lambda x: F.max_pool2d(x, 2), spaced(1, 1, 4, 4)),
    "max_pool3d": (lambda x: F.max_pool3d(x, 2), spaced(1, 1, 2, 2, 4)),
    "adaptive_max_pool1d": (lambda x: F.adaptive_max_pool1d(x, 2), spaced(1, 2, 6)),
    "adaptive_max_pool2d": (lambda x: F.adaptive_max_pool2d(x, 2), spaced(1, 1, 4, 4)),
    "lp_pool1d": (lambda x: F.lp_pool1d(x, 2.0, 2), positive(1, 2, 6)),
    "pad": (lambda x: F.pad(x, (1, 2)), X),
    "unfold": (lambda x: F.unfold(x, 2), normal(1, 1, 3, 4)),
    "interpolate": (lambda x: F.interpolate(x, scale_factor=2.0, mode="linear"), normal(1, 2, 3)),
    "pixel_shuffle": (lambda x: F.pixel_shuffle(x, 2), normal(1, 4, 2, 2)),
    "linear": (F.linear, both(X, normal(2, 3), normal(2))),
    "bilinear": (F.bilinear, both(normal(2, 3), normal(2, 2), normal(2, 3, 2))),
    "conv1d": (F.conv1d, both(normal(1, 2, 5), normal(2, 2, 3))),
    "conv2d": (F.conv2d, both(normal(1, 1, 4, 4), normal(2, 1, 2, 2))),
    "embedding": (lambda W: F.embedding(LABELS, W), X),
    "scaled_dot_product_attention": (
        F.scaled_dot_product_attention,
        both(normal(1, 3, 2), normal(1, 3, 2), normal(1, 3, 2)),
    ),
    # Linear algebra.
    "inv": (lambda a: L.inv(regular(a)), SQUARE),
    "pinv": (L.pinv, X),
    "det": (L.det, SQUARE),
    "slogdet": (lambda a: L.slogdet(a).logabsdet, SQUARE),
    "solve": (lambda a, b: L.solve(regular(a), b), both(SQUARE, normal(3, 2))),
    "solve_triangular": (
        lambda a, b: L.solve_triangular(regular(a).triu(), b, upper=True),
        both(SQUARE, normal(3, 2)),
    ),
    "lstsq": (lambda a, b: L.lstsq(a, b).solution, both(X, normal(4, 2))),
    "cholesky": (lambda a: L.cholesky(spd(a)), SQUARE),
    "qr, Q": (lambda a: L.qr(a).Q, X),
    "qr, Q of a square matrix": (lambda a: L.qr(a).Q, normal(2, 2)),
    "qr, R": (lambda a: L.qr(a).R, X),
    "lu, L": (lambda a: L.lu(regular(a)).L, SQUARE),
    "lu, U": (lambda a: L.lu(regular(a)).U, SQUARE),
    "eigvalsh": (lambda a: L.eigvalsh(symmetric(a)), SQUARE),
    "eigh, projected": (lambda a: L.eigh(symmetric(a)).eigenvectors.square(), SQUARE),
    "svdvals": (L.svdvals, X),
    "svd, projected": (lambda a: L.svd(a, full_matrices=False).U.square(), X),
    "matrix_exp": (L.matrix_exp, SQUARE),
    "matrix_power": (lambda a: L.matrix_power(a, 3), SQUARE),
    "multi_dot": (lambda a, b, c: L.multi_dot([a, b, c]), both(X, SQUARE, normal(3, 2))),
    "matrix_norm": (L.matrix_norm, X),
    "matrix_norm, nuclear": (lambda a: L.matrix_norm(a, "nuc"), X),
    "matrix_norm, 2": (lambda a: L.matrix_norm(a, 2), X),
    "vector_norm": (L.vector_norm, X),
    "vector_norm, 1": (lambda a: L.vector_norm(a, 1), away(0)),
    "vector_norm, ∞": (lambda a: L.vector_norm(a, float("inf")), positive(4, 3)),
    "vector_norm, 3": (lambda a: L.vector_norm(a, 3), X),
    "cond": (L.cond, SQUARE),
    "cross": (L.cross, both(X, X)),
    "vander": (lambda a: L.vander(a), normal(4)),
    "householder_product": (L.householder_product, both(X, uniform(3))),
    "vecdot": (L.vecdot, both(X, X)),
    "tensorsolve": (lambda a, b: L.tensorsolve(regular(a), b), both(SQUARE, normal(3))),
    "tensorinv": (lambda a: L.tensorinv(regular(a), ind=1), SQUARE),
    "diagonal": (L.diagonal, X),
    # The rest of what piecewise functions there are.
    "abs": (torch.abs, away(0)),
    "max": (torch.max, spaced(4, 3)),
    "amax": (lambda x: x.amax(1), spaced(4, 3)),
    "sort": (lambda x: x.sort().values, spaced(4, 3)),
    "topk": (lambda x: x.topk(2).values, spaced(4, 3)),
    "median": (torch.median, spaced(3, 3)),
    "cummax": (lambda x: x.cummax(0).values, spaced(4, 3)),
    "floor": (torch.floor, away(*range(-4, 5))),
    "quantile": (lambda x: x.quantile(0.3), spaced(4, 3)),
}


def visit(name, seed):
    function, make = FUNCTIONS[name]
    return nnce.check_gradients(function, *make(torch.Generator().manual_seed(seed)), seed=seed)


def verdict(report):
    return str(report).partition(":")[0]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_none_is_wrong_and_hardly_any_undecided(name):
    report = visit(name, 0)
    assert report.right, report


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", FUNCTIONS)
def test_over_20_seeds(name):
    reports = [visit(name, seed) for seed in range(SEEDS)]
    undecided = [report for report in reports if verdict(report) == "cannot tell"]
    assert "wrong" not in map(verdict, reports), reports
    assert len(undecided) <= SEEDS // 20, undecided[0]


def test_at_least_80_functions():
    of_modules = [name for name in FUNCTIONS if hasattr(F, name.split(",")[0]) or hasattr(L, name)]
    assert len(FUNCTIONS) >= len(of_modules) >= 80
