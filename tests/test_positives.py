"""The targets of many labels, in every form."""

import pytest
import scipy.sparse
import torch

from nnce import Positives

LISTS = [[3, 1], [], [0], [4, 2, 0]]
DENSE = torch.tensor([[0, 1, 0, 1, 0], [0, 0, 0, 0, 0], [1, 0, 0, 0, 0], [1, 0, 1, 0, 1.0]])
SOFT = DENSE * torch.linspace(0.1, 0.9, 20).view(4, 5)


def test_lists_matrices_and_pairs_say_the_same():
    from_lists = Positives.from_lists(LISTS)
    from_scipy = Positives.from_scipy(scipy.sparse.coo_array(DENSE.numpy()))
    rows, labels = DENSE.nonzero().flip(0).T
    from_coo = Positives.from_coo(rows, labels, 4)
    for positives in (from_lists, from_scipy, from_coo):
        assert torch.equal(positives.to_dense(5), DENSE)
        assert len(positives) == 4 and positives.values is None
    assert repr(from_lists) == "Positives(6 labels in 4 examples)"


def test_soft_values_stay_with_their_labels():
    from_scipy = Positives.from_scipy(scipy.sparse.csr_array(SOFT.numpy()))
    rows, labels = SOFT.nonzero().flip(0).T
    from_coo = Positives.from_coo(rows, labels, 4, SOFT[rows, labels])
    for positives in (from_scipy, from_coo):
        assert torch.equal(positives.to_dense(5), SOFT)
    assert repr(from_coo) == "Positives(6 labels in 4 examples, soft)"


@pytest.mark.parametrize(
    "examples",
    [slice(1, 3), slice(None, None, 2), [3, 0, 3], [-1, -2], torch.tensor([2]), [], slice(9, 9)],
)
def test_some_examples(examples):
    positives = Positives.from_coo(*SOFT.nonzero().T, 4, SOFT[SOFT != 0])
    chosen = torch.arange(4)[examples].long()
    assert torch.equal(positives[examples].to_dense(5), SOFT[chosen])


def test_one_example():
    positives = Positives.from_lists(LISTS)
    assert [each.col.tolist() for each in positives] == LISTS
    assert positives[-1].col.tolist() == LISTS[-1]
    for wrong in (4, -5, [4]):
        with pytest.raises(IndexError):
            positives[wrong]


def test_a_mask_of_examples():
    mask = torch.tensor([True, False, False, True])
    assert torch.equal(Positives.from_lists(LISTS)[mask].to_dense(5), DENSE[mask])


def test_no_examples():
    assert len(Positives.from_lists([])) == 0
    assert torch.equal(Positives.from_lists([[], []]).to_dense(3), torch.zeros(2, 3))


T = torch.tensor


@pytest.mark.parametrize(
    ("make", "error", "sentence"),
    [
        (
            lambda: Positives(T([0, 1]), T([0.5])),
            TypeError,
            "col .* whole numbers, got torch.float",
        ),
        (lambda: Positives([0, 1], T([0])), TypeError, "crow to be a tensor .*, got list"),
        (lambda: Positives(T([0, 1]), T([True])), TypeError, "whole numbers, got torch.bool"),
        (lambda: Positives(T([]).long(), T([0])), ValueError, r"crow of shape \(n \+ 1,\)"),
        (lambda: Positives(T([0, 2]), T([0])), ValueError, "rise from 0 to the 1 labels"),
        (lambda: Positives(T([0, 2, 1]), T([0])), ValueError, "rise from 0 to the 1 labels"),
        (lambda: Positives(T([1, 1]), T([0])), ValueError, "rise from 0 to the 1 labels"),
        (lambda: Positives(T([0, 1]), T([-1])), ValueError, "at least 0, got -1"),
        (lambda: Positives.from_lists([[1], [2, 2]]), ValueError, "label 2 twice in example 1"),
        (lambda: Positives(T([0, 1]), T([0]), T([1])), TypeError, "values to be a floating"),
        (lambda: Positives(T([0, 1]), T([0]), T([0.1, 0.2])), ValueError, r"shape \(1,\) like col"),
        (lambda: Positives(T([0, 1]), T([0]), T([1.5])), ValueError, r"in \[0, 1\], got \[1.5\]"),
        (lambda: Positives(T([0, 1]), T([0]), T([float("nan")])), ValueError, "got .nan"),
        (
            lambda: Positives(T([0, 1]), T([0]), T([0.5], requires_grad=True)),
            ValueError,
            "values that need no gradient",
        ),
        (lambda: Positives.from_coo(T([4]), T([0]), 4), ValueError, "rows from 0 to 3, got .4"),
        (lambda: Positives.from_coo(T([0]), T([0, 1]), 4), ValueError, "like rows"),
    ],
)
def test_bad_input_is_one_sentence(make, error, sentence):
    with pytest.raises(error, match=sentence):
        make()
