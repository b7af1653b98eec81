"""Published tables: what they say, and how their rows are found."""

import pytest

from nnce.experiments import published
from nnce.experiments.published import TABLES
from nnce.training import Settings


def test_names_are_there_once_and_every_row_can_be_trained():
    for name, table in TABLES.items():
        names = [row.name for row in table.rows]
        assert len(set(names)) == len(names) > 0 and table.seeds >= 1
        for row in table.rows:
            assert published.find(name, [row.name])[1] == (row,)


def test_the_textbooks_rows_are_what_the_textbook_says():
    """As the issue lists them."""
    expected = {
        "N1": ((30,), "quadratic", 3.0, 0.0, "large", 30, 95.42),
        "N2": ((100,), "quadratic", 3.0, 0.0, "large", 30, 96.59),
        "N3": ((30,), "cross-entropy", 0.5, 0.0, "large", 30, 95.49),
        "N4": ((100,), "cross-entropy", 0.5, 0.0, "large", 30, 96.82),
        "N5": ((30,), "cross-entropy", 0.5, 5.0, "large", 30, 96.49),
        "N6": ((100,), "cross-entropy", 0.5, 5.0, "large", 30, 97.92),
        "N7": ((100,), "cross-entropy", 0.1, 5.0, "large", 60, 98.04),
        "N8a": ((30,), "cross-entropy", 0.1, 5.0, "scaled", 30, 96.48),
        "N8b": ((30,) * 2, "cross-entropy", 0.1, 5.0, "scaled", 30, 96.90),
        "N8c": ((30,) * 3, "cross-entropy", 0.1, 5.0, "scaled", 30, 96.57),
        "N8d": ((30,) * 4, "cross-entropy", 0.1, 5.0, "scaled", 30, 96.53),
    }
    rows = {row.name: row for row in TABLES["nielsen"].rows}
    assert rows.keys() == expected.keys()
    for name, (hidden, loss, lr, l2, init, epochs, figure) in expected.items():
        settings = Settings(
            hidden=hidden, loss=loss, lr=lr, l2=l2, init=init, epochs=epochs, batch_size=10
        )
        assert (rows[name].settings, rows[name].published) == (settings, figure)


def test_a_group_of_rows_goes_by_its_name():
    assert [row.name for row in published.find("nielsen", ["n8", "N1"])[1]] == [
        *("N1", "N8a", "N8b", "N8c", "N8d")
    ]


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (("neilsen",), "did you mean nielsen"),
        (("x",), "expected a table out of nielsen, .*, got 'x'$"),
        (("nielsen", ["N9"]), "expected a row of nielsen out of N1, N2"),
        (("nielsen", ["N1", "N8x"]), "did you mean N8"),
    ],
)
def test_the_near_names_are_listed(names, sentence):
    with pytest.raises(ValueError, match=sentence):
        published.find(*names)
