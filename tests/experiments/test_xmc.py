import gzip

import numpy as np
import pytest

from nnce.experiments import xmc


@pytest.mark.parametrize("name", ["data.txt", "data.gz", "DATA.GZ"])
def test_a_file_as_other_programs_write_it(tmp_path, name):
    """A byte-order mark, blank lines for empty examples and at the end, numbers in any order."""
    content = b"\xef\xbb\xbf4 5 4\r\n2,0 3:0.5 0:1\r\n\r\n1\r\n4:1.5e-3\t1:-.5\r\n\n \n"
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if name.lower().endswith(".gz") else content)
    examples, *sizes = xmc.read(path)
    assert sizes == [5, 4]
    expected = np.zeros((4, 5), dtype=np.float32)
    expected[0, [0, 3]], expected[3, [1, 4]] = (1, 0.5), (-0.5, 1.5e-3)
    assert (examples.features.toarray() == expected).all()
    assert examples.positives.to_dense(4).tolist() == [
        *([1, 0, 1, 0], [0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0])
    ]
    rows = examples.features
    assert all(
        (np.diff(rows.indices[rows.indptr[i] : rows.indptr[i + 1]]) > 0).all() for i in (0, 3)
    )


@pytest.mark.parametrize("array", ["columns", "starts", "crow", "col", "sizes"])
def test_a_binary_copy_that_does_not_fit_is_made_again(tmp_path, array):
    path = tmp_path / "data.txt"
    path.write_bytes(b"2 5 4\n0,2 0:1 3:0.5\n1 1:2\n")
    xmc.write_cache(path, *xmc.read(path))
    with np.load(xmc.cache_of(path)) as arrays:
        found = dict(arrays)
    found[array][-1] = 1 if array == "sizes" else 99
    np.savez(xmc.cache_of(path), **found)
    assert xmc.read_cached(path) is None
