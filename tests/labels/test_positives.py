"""The targets of many labels, in every form."""

import pickle

import numpy as np
import pytest
import scipy.sparse
import torch
from torch.utils.data import DataLoader, StackDataset, Subset

import nnce
from nnce import Positives

T = torch.tensor

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
    [
        *(slice(1, 3), slice(None, None, 2)),
        *([3, 0, 3], [-1, -2], (2, 1), range(3)),
        *(torch.tensor([2]), torch.tensor([2], dtype=torch.uint8), np.array([3, -4])),
        np.array([1], dtype=np.uint32),
        *(slice(None, None, -1), slice(-1, 0, -2), slice(np.int64(3), None, np.int64(-1))),
        *([True, False, True, True], np.array([False, True, True, False])),
    ],
)
def test_some_examples(examples):
    positives = Positives.from_coo(*SOFT.nonzero().T, 4, SOFT[SOFT != 0])
    chosen = np.arange(4)[examples if isinstance(examples, slice) else np.asarray(examples)]
    assert torch.equal(positives[examples].to_dense(5), SOFT[chosen.tolist()])


def test_no_example_of_some():
    for none in ([], (), slice(9, 9), slice(0, 3, -1), T([], dtype=torch.int64), T([False] * 4)):
        assert torch.equal(Positives.from_lists(LISTS)[none].to_dense(5), DENSE[:0])


def test_one_example():
    positives = Positives.from_lists(LISTS)
    assert [each.col.tolist() for each in positives] == LISTS
    assert positives[-1].col.tolist() == LISTS[-1]
    for one in (np.int64(3), np.uint8(3), T(3), T(-1), np.array(3)):
        assert positives[one].col.tolist() == LISTS[3] and len(positives[one]) == 1
    for wrong in (4, -5, [4], np.int64(4), T(-5), T([0, 4])):
        with pytest.raises(IndexError, match=r"expected numbers of 4 examples, got \[(4|-5)\]"):
            positives[wrong]


def test_a_mask_of_examples():
    mask = torch.tensor([True, False, False, True])
    assert torch.equal(Positives.from_lists(LISTS)[mask].to_dense(5), DENSE[mask])


@pytest.mark.parametrize(
    "lists",
    [
        [np.array(row, dtype=np.int32) for row in LISTS],
        [T(row, dtype=torch.int64) for row in LISTS],
        [[T(label) for label in row] for row in LISTS],
        [[np.uint8(label) for label in row] for row in LISTS],
        ((label for label in row) for row in LISTS),
        [set(row) for row in LISTS],
    ],
    ids=["arrays", "tensors", "scalar tensors", "scalars", "generators", "sets"],
)
def test_label_numbers_of_any_integer_type(lists):
    assert torch.equal(Positives.from_lists(lists).to_dense(5), DENSE)


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int64, np.float32, np.float64])
def test_scipys_ones_of_any_real_type(dtype):
    assert Positives.from_scipy(scipy.sparse.csr_array(DENSE.numpy().astype(dtype))).values is None


def test_scipys_float64_values_are_not_rounded():
    third = scipy.sparse.csr_array(DENSE.double().numpy() / 3)
    positives = Positives.from_scipy(third)
    assert positives.values.dtype == torch.float64
    assert torch.equal(positives.to_dense(5, torch.float64), DENSE.double() / 3)


def test_no_examples():
    assert len(Positives.from_lists([])) == 0
    assert torch.equal(Positives.from_lists([[], []]).to_dense(3), torch.zeros(2, 3))


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
        *(
            (lambda lists=lists: Positives.from_lists(lists), TypeError, sentence)
            for lists, sentence in [
                ([[True, False], [False, True]], "whole numbers, got True in example 0"),
                ([[0], [1.7]], "whole numbers, got 1.7 in example 1"),
                ([[0], [1.0]], "whole numbers, got 1.0 in example 1"),
                ([[0, None]], "whole numbers, got None in example 0"),
                ([["3"]], "whole numbers, got '3' in example 0"),
                ([[[3]]], r"whole numbers, got \[3\] in example 0"),
                (np.eye(2, dtype=bool), "whole numbers, got True in example 0"),
                (torch.eye(2), "whole numbers, got 1.0 in example 0"),
                ([T([1.5])], "whole numbers, got 1.5 in example 0"),
                ([[T(True)]], "whole numbers, got True in example 0"),
                ([1, 2], "list of label numbers for each example, got int"),
                (T(1), "list of label numbers for each example, got int"),
                (["12", "3"], "list of label numbers for each example, got str"),
                ("12", "list of label numbers for each example, got str"),
                ([b"12"], "list of label numbers for each example, got bytes"),
                ([None], "list of label numbers for each example, got NoneType"),
                (None, "list of label numbers for each example, got NoneType"),
                ({0: [1]}, "list of label numbers for each example, got dict"),
            ]
        ),
        (lambda: Positives.from_lists([[-1]]), ValueError, "label numbers of at least 0, got -1"),
        (
            lambda: Positives.from_lists([[2**63]]),
            ValueError,
            r"below 2\*\*63, got 92",
        ),
        (lambda: Positives.from_lists([[2, 2]]), ValueError, "label 2 twice in example 0"),
        (lambda: Positives(None, T([0])), TypeError, "crow to be a tensor .*, got NoneType"),
        (lambda: Positives(T([0, 1]), "0"), TypeError, "col to be a tensor .*, got str"),
        (lambda: Positives(T([0, 1]), T([0]), "1"), TypeError, "values to be .*, got str"),
        (lambda: Positives(T([0, 1]), T([0]), T([1j])), TypeError, "got torch.complex64"),
        (
            lambda: Positives(T([0, 1]), T([0]), T([0.5]).to("meta")),
            ValueError,
            "values on device cpu like col, got meta",
        ),
        (
            lambda: Positives(T([0, 1]).to_sparse(), T([0])),
            TypeError,
            "crow to be dense, got torch.sparse_coo",
        ),
        *(
            (lambda given=given: Positives.from_coo(*given), error, sentence)
            for given, error, sentence in [
                (
                    (T([0]), T([0.5]), 4),
                    TypeError,
                    "labels to be .*, got torch.float",
                ),
                (
                    (T([0]), T([True]), 4),
                    TypeError,
                    "labels to be .*, got torch.bool",
                ),
                ((T([0]), [0], 4), TypeError, "labels to be .* whole numbers, got list"),
                ((None, T([0]), 4), TypeError, "rows to be .* whole numbers, got NoneType"),
                ((T([[0]]), T([[0]]), 4), ValueError, r"rows of one dimension, got \(1, 1\)"),
                (
                    (T([0]), T([0]), 4, T([1.0, 0.5])),
                    ValueError,
                    r"of shape \(1,\) like rows",
                ),
                ((T([0]), T([0]), 4, [1.0]), TypeError, "values to be a floating.*, got list"),
                (
                    (T([0]), T([0]), 4, T([1])),
                    TypeError,
                    "values to be .*, got torch.int",
                ),
                ((T([0]), T([0]), 4, T([1.5])), ValueError, r"values in \[0, 1\], got \[1.5\]"),
                ((T([0, 0]), T([1, 1]), 4), ValueError, "label 1 twice in example 0"),
                ((T([0]), T([0]), 4.0), TypeError, "n to be a whole number, got float"),
                ((T([0]), T([0]), True), TypeError, "n to be a whole number, got bool"),
                ((T([0])[:0], T([0])[:0], -1), ValueError, "n of at least 0, got -1"),
            ]
        ),
        *(
            (lambda matrix=matrix: Positives.from_scipy(matrix), error, sentence)
            for matrix, error, sentence in [
                (scipy.sparse.csr_array(DENSE.numpy() * 1j), TypeError, "real .* got complex64"),
                (
                    scipy.sparse.csr_array(DENSE.numpy().astype(np.longdouble)),
                    TypeError,
                    "at most 64 bits, got",
                ),
                (scipy.sparse.csr_array(DENSE.numpy() * 2), ValueError, r"in \[0, 1\], got \[2"),
                (scipy.sparse.csr_array(DENSE.numpy() * np.nan), ValueError, "got .nan"),
                (scipy.sparse.coo_array(np.ones(3)), ValueError, r"\(n, labels\), got \(3,\)"),
                (DENSE.numpy(), TypeError, "a SciPy sparse matrix, got ndarray"),
                (None, TypeError, "a SciPy sparse matrix, got NoneType"),
                ("csr", TypeError, "a SciPy sparse matrix, got str"),
            ]
        ),
        *(
            (lambda index=index: Positives.from_lists(LISTS)[index], error, sentence)
            for index, error, sentence in [
                (T([1.7]), TypeError, "numbers of examples or a mask .*, got torch.float32"),
                (T([]), TypeError, "got torch.float32"),
                (1.0, TypeError, "got torch.float"),
                (np.array([0.5]), TypeError, "got torch.float64"),
                (True, TypeError, "got torch.bool"),
                (T(True), TypeError, "got torch.bool"),
                (None, TypeError, "got NoneType"),
                ("1", TypeError, "got str"),
                (["1"], TypeError, "got list"),
                (..., TypeError, "got ellipsis"),
                ([[0, 1]], IndexError, r"one dimension of them, got shape \(1, 2\)"),
                ([True, False], IndexError, "mask of 4 examples, got 2"),
                ([0, 4, -5], IndexError, r"numbers of 4 examples, got \[4, -5\]"),
            ]
        ),
    ],
)
def test_bad_input_is_one_sentence(make, error, sentence):
    with pytest.raises(error, match=sentence):
        make()


def test_a_data_loader_makes_mini_batches():
    """Alone, with its inputs, of a subset, of pairs made by hand, and in other processes."""
    soft = Positives.from_coo(*SOFT.nonzero().T, 4, SOFT[SOFT != 0])
    x = torch.arange(8.0).view(4, 2)
    for positives, y in ((Positives.from_lists(LISTS), DENSE), (soft, SOFT)):
        batches = list(DataLoader(positives, batch_size=3))
        assert [type(batch) for batch in batches] == [Positives, Positives]
        for batch, rows in zip(batches, y.split(3), strict=True):
            assert torch.equal(batch.to_dense(5), rows)
            assert (batch.values is None) == (positives.values is None)
        (whole,) = DataLoader(Subset(positives, [3, 1]), batch_size=2)
        assert torch.equal(whole.to_dense(5), y[[3, 1]])
        for data in (StackDataset(x, positives), [(x[i], positives[i]) for i in range(4)]):
            for workers in (0, 1):
                (batch,) = DataLoader(data, batch_size=4, num_workers=workers)
                assert torch.equal(batch[0], x) and torch.equal(batch[1].to_dense(5), y)
    loss = nnce.LinearSigmoidCrossEntropyLoss(2, 5)
    (x, positives) = next(iter(DataLoader(StackDataset(x, soft), batch_size=4)))
    torch.testing.assert_close(loss(x, positives), loss(x, SOFT))


def test_hard_and_soft_examples_in_one_batch():
    hard, soft = Positives.from_lists([[1], [0, 2]]), Positives(T([0, 1]), T([1]), T([0.25]))
    (batch,) = DataLoader([hard, soft, hard[1]], batch_size=3)
    expected = T([[0, 1, 0], [1, 0, 1], [0, 0.25, 0], [1, 0, 1]])
    assert torch.equal(batch.to_dense(3), expected)
    assert torch.equal(pickle.loads(pickle.dumps(batch)).to_dense(3), expected)
