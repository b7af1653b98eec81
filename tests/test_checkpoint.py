import pytest
import torch

import nnce


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_load_gives_back_what_was_saved(tmp_path, dtype):
    network = nnce.MLP((4, 3, 2), dtype=dtype)
    nnce.save(network, tmp_path / "network.pt")
    before = torch.get_rng_state()
    again = nnce.load(tmp_path / "network.pt")
    assert torch.equal(before, torch.get_rng_state())
    assert again.sizes == (4, 3, 2)
    x = torch.rand(5, 4, dtype=dtype)
    assert torch.equal(again(x), network(x))
    assert [file.name for file in tmp_path.iterdir()] == ["network.pt"]


def test_a_failed_save_leaves_the_one_before(tmp_path, monkeypatch):
    path = tmp_path / "network.pt"
    network = nnce.MLP((4, 3, 2))
    nnce.save(network, path)
    content = path.read_bytes()

    def no_space(content, file):
        file.write(b"half of it")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", no_space)
    with pytest.raises(OSError, match="no space"):
        nnce.save(nnce.MLP((4, 3, 2)), path)
    assert path.read_bytes() == content
    assert [file.name for file in tmp_path.iterdir()] == ["network.pt"]


def test_an_edited_mlp_and_a_folder_are_refused(tmp_path):
    network = nnce.MLP((4, 3, 2))
    with pytest.raises(IsADirectoryError, match="is a folder"):
        nnce.save(network, tmp_path)
    network.append(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="some have been added"):
        nnce.save(network, tmp_path / "network.pt")
    assert list(tmp_path.iterdir()) == []


def test_only_an_mlp_is_saved(tmp_path):
    with pytest.raises(TypeError, match=r"expected an nnce\.MLP, got Linear"):
        nnce.save(torch.nn.Linear(2, 2), tmp_path / "network.pt")
    assert list(tmp_path.iterdir()) == []


def test_damaged_and_foreign_files_are_refused(tmp_path):
    path = tmp_path / "network.pt"
    nnce.save(nnce.MLP((4, 3, 2)), path)
    whole = path.read_bytes()
    (tmp_path / "good.pt").write_bytes(whole)
    foreign = tmp_path / "foreign.pt"
    torch.save({"weight": torch.zeros(3)}, foreign)
    pickled = tmp_path / "module.pt"
    torch.save(torch.nn.Linear(2, 2), pickled)
    for wrong in (foreign, pickled):
        with pytest.raises(ValueError, match=rf"{wrong.name} is .*no network that nnce saved"):
            nnce.load(wrong)
    for damaged in (b"", b"hello", whole[: len(whole) // 2]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"network.pt is damaged or no network"):
            nnce.load(path)
    good = torch.load(foreign.with_name("good.pt"), weights_only=True)
    for change in ({"state_dict": {}}, {"sizes": (4, 5, 2)}, {"sizes": None}):
        torch.save({**good, **change}, path)
        with pytest.raises(ValueError, match=r"network.pt is damaged: its sizes and parameters"):
            nnce.load(path)
    with pytest.raises(FileNotFoundError):
        nnce.load(tmp_path / "missing.pt")
