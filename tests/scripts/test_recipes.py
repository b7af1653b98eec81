"""The recipes of scripts/recipes/, against the libraries themselves."""

import re
import sys
from importlib.util import module_from_spec, spec_from_file_location

import pytest
import torch
from conftest import ROOT, missing
from torch import nn
from torch.testing import assert_close

import nnce

FOLDER = ROOT / "scripts" / "recipes"
RECIPES = sorted(path.stem for path in FOLDER.glob("*.py"))
PAGE = (ROOT / "scripts" / "README.md").read_text(encoding="utf-8")
# The sentences that each recipe prints.
SENTENCES = {
    "lightning_digits": r"accuracy 9\d\.\d% after 6 epochs; .* are bit-identical\.",
    "open_clip_pairs": r"agree to \de-0[6-9] .*\n.*: \d\d? MB with nnce, 1,\d{3} MB with",
    "skorch_search": r"Best of 4 by cross-validation: .* test accuracy 9\d\.\d%\.",
    "timm_classifier": r"accuracy [89]\d\.\d% .* BinaryCrossEntropy \([89]\d\.\d%\); .* \de-\d\d\."
    r"\n.*accuracy [89]\d\.\d% .* AsymmetricLossMultiLabel \([89]\d\.\d%\); .* \de-\d\d\.",
    "transformers_trainer": r"at most \de-0[5-9]\.\n(.*\n)*[6-9]\d% of the \d+ top-ranked labels "
    r"out of 10,000 are right\.",
}

pytestmark = [
    # Lightning: advice, and what it still uses of PyTorch that is deprecated.
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated"),
]


def recipes(test):
    return pytest.mark.recipes(pytest.mark.slow(test))


def bce(z, y):
    """The built-in loss, summed over components and averaged over examples."""
    return nn.functional.binary_cross_entropy_with_logits(z, y, reduction="sum") / len(z)


@pytest.fixture
def recipe():
    """A function that imports a recipe by name, if its library is installed."""

    def load(name):
        spec = spec_from_file_location(name, FOLDER / f"{name}.py")
        module = sys.modules[name] = module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except ImportError as error:
            missing("recipes", f"{error}; pip install -e '.[recipes]'")
        return module

    return load


def assert_same_parameters(one, other, **tolerance):
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        assert_close(a, b, msg=lambda message, name=name: f"{name}: {message}", **tolerance)


def gradients(loss, *inputs):
    """Value and gradients of a loss of some inputs, times 3."""
    leaves = [t.detach().clone().requires_grad_(t.is_floating_point()) for t in inputs]
    C = 3 * loss(*leaves)
    return [C.detach(), *torch.autograd.grad(C, [t for t in leaves if t.requires_grad])]


def test_every_recipe_is_on_the_page():
    named = re.findall(r"^\.venv/bin/python scripts/recipes/(\w+)\.py$", PAGE, re.MULTILINE)
    assert sorted(named) == RECIPES == sorted(SENTENCES)


@recipes
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_prints_its_result(name, recipe, capsys):
    recipe(name).main()
    assert re.search(SENTENCES[name], capsys.readouterr().out)


@recipes
def test_transformers_trains_to_the_same_parameters(recipe):
    name = recipe("transformers_trainer")
    tokens = torch.rand(150, name.VOCABULARY).argsort(1)[:, : name.LENGTH]
    y = torch.zeros(150, name.VOCABULARY, dtype=torch.float64).scatter_(1, tokens, 1.0)
    dataset = [{"input_ids": t, "labels": row} for t, row in zip(tokens, y, strict=True)]

    def trained(loss, size, accumulated=1, dropout=0.0):
        config = name.config(name.VOCABULARY)
        config.hidden_dropout_prob = config.attention_probs_dropout_prob = dropout
        model = name.make(name.BertForSequenceClassification, config).double()
        options = {"num_train_epochs": 2, "gradient_accumulation_steps": accumulated}
        return name.train(model, dataset, loss, per_device_train_batch_size=size, **options)

    tolerance = {"rtol": 1e-6, "atol": 1e-6}
    ours, theirs = (trained(loss, 32, dropout=0.1) for loss in (name.cross_entropy, None))
    assert_same_parameters(ours, theirs, **tolerance)

    # Accumulated gradients are those of the whole batch, which a mean of each batch's is not. (Nor
    # are those of the built-in loss: the Trainer expects it to divide by num_items_in_batch.)
    def mean(outputs, labels, num_items_in_batch=None):
        return nnce.sigmoid_cross_entropy(outputs.logits, labels, reduction="mean")

    whole = trained(name.cross_entropy, 64)
    assert_same_parameters(trained(name.cross_entropy, 32, 2), whole, **tolerance)
    for loss in (mean, None):
        with pytest.raises(AssertionError, match="not close"):
            assert_same_parameters(trained(loss, 32, 2), whole, **tolerance)


@recipes
def test_transformers_head_is_that_of_all_logits(recipe):
    name = recipe("transformers_trainer")
    model = name.make(name.ManyLabels, 10_000).eval()
    tokens, labels = torch.randint(100, (4, 6)), torch.randint(10_000, (4, 5))
    labels[0, 3:] = -1

    def all_logits(x, W, b):
        y = torch.zeros(4, 10_001).scatter_(1, labels % 10_001, 1.0)[:, :-1]
        return bce(nn.functional.linear(x, W, b), y)

    x = model.features(tokens).detach()
    expected = gradients(all_logits, x, model.last.weight, model.last.bias)
    model.encoder.requires_grad_(False)
    C = 3 * model(tokens, labels)["loss"]
    found = torch.autograd.grad(C, (model.last.weight, model.last.bias))
    assert_close([C.detach(), *found], [expected[0], *expected[2:]])


@recipes
def test_lightning_trains_and_resumes(recipe, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    name = recipe("lightning_digits")
    ours, theirs, resumed = (name.Digits(loss).double() for loss in (None, bce, None))
    for module in (ours, theirs, resumed):
        module.digits = nnce.data.load("digits", train_size=500, dtype=torch.float64)
    name.train(tmp_path / "ours", 2, ours)
    name.train(tmp_path / "theirs", 2, theirs)
    assert_same_parameters(ours, theirs, rtol=1e-6, atol=1e-6)

    name.train(tmp_path / "two", 1, resumed)
    for parameter in resumed.parameters():
        parameter.data.zero_()
    name.train(tmp_path / "two", 2, resumed, str(tmp_path / "two" / "last.ckpt"))
    assert_same_parameters(ours, resumed, rtol=0, atol=0)
    for folder in ("ours", "two"):
        curves = EventAccumulator(str(tmp_path / folder)).Reload()
        assert [point.step for point in curves.Scalars("slowdown/layer2")] == [0, 50]
        assert all(
            f"{curve}/layer1" in curves.Tags()["scalars"] for curve in ("dz_norm", "saturated")
        )


@recipes
def test_skorch_predicts_activations(recipe):
    name = recipe("skorch_search")
    from sklearn.base import clone

    net = clone(name.classifier(criterion__loss="quadratic", lr=1.0))
    x, labels = torch.rand(200, 64).numpy(), torch.randint(10, (200,)).numpy()
    net.fit(x, labels)
    assert isinstance(net.criterion_.loss, nnce.SigmoidQuadraticLoss)
    a = nnce.sigmoid(net.module_(torch.from_numpy(x))).detach()
    assert_close(torch.from_numpy(net.predict_proba(x)), a)
    assert (net.predict(x) == a.argmax(1).numpy()).all()
    criterion, z = name.OneHot(), torch.randn(200, 10)
    expected = bce(z, nn.functional.one_hot(torch.from_numpy(labels), 10).float())
    assert_close(criterion(z, torch.from_numpy(labels)), expected)


@recipes
@pytest.mark.parametrize("n", [1, 7, 100])
def test_open_clip_has_the_same_loss(recipe, n):
    name = recipe("open_clip_pairs")
    x, y = torch.randn(2, n, 16, dtype=torch.float64)
    scale, bias = torch.tensor([2.0, -3.0], dtype=torch.float64)
    found, expected = (
        gradients(loss, x, y, scale, bias) for loss in (name.PairLoss(), name.SigLipLoss())
    )
    assert_close(found, expected)


@recipes
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("target_threshold", [None, 0.2])
def test_timm_has_the_same_loss(recipe, smoothing, target_threshold):
    name = recipe("timm_classifier")
    ours, theirs = (
        loss(smoothing=smoothing, target_threshold=target_threshold)
        for loss in (name.FromIndices, name.BinaryCrossEntropy)
    )
    z = 3 * torch.randn(50, 10, dtype=torch.float64)
    for target in (torch.randint(10, (50,)), torch.rand(50, 10, dtype=torch.float64)):
        found, expected = (
            gradients(lambda z, loss=loss, target=target: loss(z, target), z)
            for loss in (ours, theirs)
        )
        assert_close(found, expected)


@recipes
def test_timm_has_the_same_asymmetric_loss(recipe):
    """For targets of 0 and 1 and moderate z; where timm's gradient vanishes, ours does not."""
    theirs, ours = recipe("timm_classifier").LOSSES["AsymmetricLossMultiLabel"]
    z, y = 3 * torch.randn(50, 10), (torch.rand(50, 10) < 0.3).float()
    assert_close(gradients(lambda z: ours(z, y), z), gradients(lambda z: theirs(z, y), z))
    for z in (torch.full((1, 1), -30.0), torch.full((1, 1), -200.0)):
        (_, dz), (_, blind) = (
            gradients(lambda z, f=f: f(z, torch.ones(1, 1)), z) for f in (ours, theirs)
        )
        assert_close(dz, torch.full((1, 1), -3.0))  # −1, times the upstream gradient
        assert blind.abs() < 1e-10


@recipes
def test_timm_smooths_dense_targets_as_label_smoothing_does(recipe):
    """And class indices differently, which is why the recipe smooths them itself."""
    timm = recipe("timm_classifier").BinaryCrossEntropy
    z, labels = torch.randn(50, 10), torch.randint(10, (50,))
    y = nn.functional.one_hot(labels, 10).float()
    ours = nnce.BCEWithLogitsLoss(reduction="none", label_smoothing=0.1)(z, y)
    assert_close(timm(smoothing=0.1, smooth_dense=True, reduction="none")(z, y), ours)
    assert (timm(smoothing=0.1, reduction="none")(z, labels) - ours).abs().max() > 0.01
