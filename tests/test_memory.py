import pytest
import torch

from nnce import _memory


def test_more_than_memory_holds_is_refused_before_anything_is_made():
    with pytest.raises(
        MemoryError, match=r"1,000,000,000 networks of sizes 784-30-10 would need 2"
    ):
        _memory.check_memory((784, 30, 10), 1_000_000_000)
    _memory.check_memory((784, 30, 10), 1_000)


def test_memory_for_the_numbers_a_layer_is_drawn_from(monkeypatch):
    """They are float64, whatever the layer's dtype: in bfloat16 more than all copies together."""
    sizes = (1_000, 1_000)
    pages = {"SC_PHYS_PAGES": 9, "SC_PAGE_SIZE": 1_000_000}
    monkeypatch.setattr(_memory.os, "sysconf", lambda name: pages[name])
    with pytest.raises(MemoryError, match="1 network of sizes 1000-1000 would need"):
        _memory.check_memory(sizes, dtype=torch.bfloat16)
    pages["SC_PHYS_PAGES"] = 11
    _memory.check_memory(sizes, dtype=torch.bfloat16)


def test_shortage_knows_a_failed_allocation_by_its_words():
    with pytest.raises(RuntimeError) as failed:
        torch.empty(2**60)
    assert "not enough memory" in _memory.shortage(failed.value)
    assert _memory.shortage(MemoryError("8 GB would be needed")) == "8 GB would be needed"
    assert _memory.shortage(RuntimeError("mat1 and mat2 do not fit")) is None
    assert _memory.shortage(ValueError("out of memory")) is None
