import copy
import errno
import io
import os
import pickle
import stat
import zipfile

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import nnce
from nnce import MLP, saving
from nnce.training import checkpoints


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
    with pytest.raises(IsADirectoryError, match=f"got a folder: {str(tmp_path)!r}"):
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
        with pytest.raises(ValueError, match=rf"{wrong.name} is .*not a network that nnce saved"):
            nnce.load(wrong)
    for damaged in (b"", b"hello", whole[: len(whole) // 2]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"network.pt is damaged or not a network"):
            nnce.load(path)
    good = torch.load(foreign.with_name("good.pt"), weights_only=True)
    for change in ({"state_dict": {}}, {"sizes": (4, 5, 2)}, {"sizes": None}):
        torch.save({**good, **change}, path)
        with pytest.raises(ValueError, match=r"network.pt is damaged: its sizes and parameters"):
            nnce.load(path)
    with pytest.raises(FileNotFoundError):
        nnce.load(tmp_path / "missing.pt")


def test_every_layer_keeps_its_dtype(tmp_path):
    network = nnce.MLP((4, 3, 2))
    network[0].double()
    network[2].half()
    nnce.save(network, tmp_path / "network.pt")
    again = nnce.load(tmp_path / "network.pt")
    for (name, p), (name_again, p_again) in zip(
        network.named_parameters(), again.named_parameters(), strict=True
    ):
        assert name == name_again and p.dtype == p_again.dtype and torch.equal(p, p_again)
        assert isinstance(p_again, nn.Parameter) and p_again.requires_grad


def pruned(network):
    prune.l1_unstructured(network[0], "weight", amount=0.5)


def without_bias(network):
    network[0] = nnce.Linear(4, 3, bias=False)


def with_buffer(network):
    network.register_buffer("mean", torch.zeros(4))


def another_shape(network):
    network[0].weight = nn.Parameter(torch.zeros(5, 4))


def sparse(network):
    network[0].weight = nn.Parameter(network[0].weight.detach().to_sparse())


def of_whole_numbers(network):
    network[0].weight = nn.Parameter(torch.zeros(3, 4, dtype=torch.int64), requires_grad=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (pruned, "pruned: it has bias and weight_orig and weight_mask"),
        (lambda network: parametrizations.weight_norm(network[0]), "reparametrised or pruned"),
        (
            without_bias,
            r"expected the parameters of an MLP of sizes \(4, 3, 2\), .*got 0\.weight, 2",
        ),
        (with_buffer, r"got mean, 0\.weight"),
        (another_shape, r"expected 0\.weight .* of shape \(3, 4\), got .* of shape \(5, 4\)"),
        (sparse, r"expected 0\.weight to be a plain .*, got .*torch\.sparse_coo"),
        (of_whole_numbers, r"floating-point tensor .*, got Tensor, torch\.int64"),
        (lambda network: network.to("meta"), r"plain .*, got .* on meta"),
    ],
)
def test_what_load_would_not_know_is_not_saved(tmp_path, change, message):
    network = nnce.MLP((4, 3, 2))
    change(network)
    with pytest.raises(ValueError, match=message):
        nnce.save(network, tmp_path / "network.pt")
    assert list(tmp_path.iterdir()) == []


def test_what_a_parametrisation_leaves_behind_is_saved(tmp_path):
    network = nnce.MLP((4, 3, 2))
    pruned(network)
    prune.remove(network[0], "weight")
    nnce.save(network, tmp_path / "network.pt")
    assert torch.equal(nnce.load(tmp_path / "network.pt")[0].weight, network[0].weight)


def claim(path, sizes, state):
    torch.save({"format": "nnce.MLP 1", "sizes": sizes, "state_dict": state}, path)


def test_a_small_file_cannot_claim_a_large_network(tmp_path, monkeypatch):
    """Refused before anything is made: MLP is not even called."""
    path = tmp_path / "network.pt"
    sizes = (20_000, 20_000)
    small = {"0.weight": torch.zeros(3, 4), "0.bias": torch.zeros(3)}
    strided = {  # one number, shown everywhere
        "0.weight": torch.zeros(1, 1).expand(20_000, 20_000),
        "0.bias": torch.zeros(1).expand(20_000),
    }
    monkeypatch.setattr(saving, "MLP", lambda *sizes, **more: pytest.fail("was made"))
    for state in (small, strided):
        claim(path, sizes, state)
        assert path.stat().st_size < 10_000
        with pytest.raises(ValueError, match=r"is damaged: its sizes and parameters do not match"):
            nnce.load(path)


def test_a_file_that_would_unfold_is_refused_unread(tmp_path, monkeypatch):
    path, bomb = tmp_path / "network.pt", tmp_path / "bomb.pt"
    nnce.save(nnce.MLP((4, 3, 2)), path)
    with (
        zipfile.ZipFile(path) as archive,
        zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as out,
    ):
        for name in archive.namelist():
            out.writestr(name, bytes(10**8) if name.endswith("data/0") else archive.read(name))
    assert bomb.stat().st_size < 10**6
    monkeypatch.setattr(torch, "load", lambda *file, **more: pytest.fail("was read"))
    with pytest.raises(ValueError, match="damaged or not a network"):
        nnce.load(bomb)


def test_any_layout_is_loaded(tmp_path):
    """A weight that is stored column by column is as good."""
    network = nnce.MLP((4, 3, 2))
    network[0].weight = nn.Parameter(torch.rand(4, 3).T)
    nnce.save(network, tmp_path / "network.pt")
    assert torch.equal(nnce.load(tmp_path / "network.pt")[0].weight, network[0].weight)


def test_saving_follows_no_link(tmp_path, monkeypatch):
    """Neither one of the old name, nor one laid at the very name that is drawn."""
    monkeypatch.setattr("secrets.token_hex", lambda *size: "drawn")
    precious = tmp_path / "thesis.tex"
    precious.write_text("precious")
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "network.pt.unfinished").symlink_to(precious)
    nnce.save(nnce.MLP((4, 3, 2)), folder / "network.pt")
    (folder / ".unfinished-drawn").symlink_to(precious)
    (folder / ".unfinished-dangling").symlink_to(tmp_path / "nothing")
    for name in ("drawn", "dangling"):
        monkeypatch.setattr("secrets.token_hex", lambda *size, name=name: name)
        with pytest.raises(FileExistsError):
            nnce.save(nnce.MLP((4, 3, 2)), folder / "network.pt")
        assert (folder / f".unfinished-{name}").is_symlink()  # another's: left alone
    assert precious.read_text() == "precious" and not (tmp_path / "nothing").exists()
    assert nnce.load(folder / "network.pt").sizes == (4, 3, 2)


def test_two_that_save_at_once_do_not_meet(tmp_path):
    """Each in a file of its own until it is whole; the last one stays."""
    path = tmp_path / "results.json"

    def outer(file):
        file.write(b"outer, ")
        saving.write_whole(path, lambda file: file.write(b"inner"))
        assert path.read_bytes() == b"inner"
        file.write(b"whole")

    saving.write_whole(path, outer)
    assert path.read_bytes() == b"outer, whole"
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.skipif(os.name != "posix", reason="permissions are POSIX's")
@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_permissions_are_those_that_open_gives(tmp_path, umask):
    before = os.umask(umask)
    try:
        nnce.save(nnce.MLP((4, 3, 2)), tmp_path / "network.pt")
        (tmp_path / "opened").write_text("")
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()}
    assert modes == {0o666 & ~umask}


@pytest.mark.skipif(os.name != "posix", reason="links and modes are POSIX's")
def test_links_and_modes_are_kept(tmp_path):
    """Symbolic ones (of links, relative, dangling) and hard ones: both names show the new file."""
    (tmp_path / "elsewhere").mkdir()
    target, hard = tmp_path / "elsewhere" / "network.pt", tmp_path / "hard.pt"
    link, dangling = tmp_path / "link.pt", tmp_path / "dangling.pt"
    (tmp_path / "first").symlink_to("elsewhere/network.pt")
    link.symlink_to(tmp_path / "first")
    dangling.symlink_to("elsewhere/new.pt")
    for sizes in ((40, 30, 2), (4, 3, 2)):
        nnce.save(nnce.MLP(sizes), link)
        target.chmod(0o600)
        nnce.save(nnce.MLP(sizes), link)
        assert link.is_symlink() and nnce.load(target).sizes == sizes
        assert stat.S_IMODE(target.stat().st_mode) == 0o600
    nnce.save(nnce.MLP((4, 3, 2)), dangling)
    assert dangling.is_symlink() and nnce.load(tmp_path / "elsewhere" / "new.pt").sizes == (4, 3, 2)
    hard.hardlink_to(target)
    for sizes in ((40, 30, 2), (5, 3, 2)):
        nnce.save(nnce.MLP(sizes), hard)
        assert hard.samefile(target) and nnce.load(target).sizes == sizes
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    assert sorted(path.name for path in target.parent.iterdir()) == ["network.pt", "new.pt"]
    assert not list(tmp_path.glob(".unfinished*"))


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX's")
def test_a_private_file_is_private_while_it_is_written(tmp_path):
    path = tmp_path / "results.json"
    path.write_text("before")
    path.chmod(0o600)

    def write(file):
        assert stat.S_IMODE(os.fstat(file.fileno()).st_mode) == 0o600
        file.write(b"after")

    saving.write_whole(path, write)
    assert path.read_text() == "after"


@pytest.mark.skipif(os.name != "posix", reason="FIFOs and links are POSIX's")
def test_only_a_regular_file_is_replaced(tmp_path):
    fifo, link, loop = tmp_path / "fifo", tmp_path / "link", tmp_path / "loop"
    os.mkfifo(fifo)
    link.symlink_to(os.devnull)
    loop.symlink_to(loop)
    for path in (fifo, link, os.devnull):
        with pytest.raises(OSError, match=f"expected a regular file, got .*: {str(path)!r}"):
            nnce.save(nnce.MLP((4, 3, 2)), path)
    assert stat.S_ISFIFO(fifo.stat().st_mode) and link.is_symlink()
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)
    (tmp_path / "file").write_text("")
    for path in (loop, tmp_path / "nowhere" / "network.pt", tmp_path / "file" / "network.pt"):
        with pytest.raises(OSError) as refused:
            nnce.save(nnce.MLP((4, 3, 2)), path)
        assert refused.value.filename == str(path) and ".unfinished" not in str(refused.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fifo", "file", "link", "loop"]


@pytest.mark.skipif(os.name != "posix", reason="hard links as POSIX has them")
def test_content_that_cannot_be_copied_over_a_hard_link_stays(tmp_path, monkeypatch):
    path = tmp_path / "network.pt"
    nnce.save(nnce.MLP((4, 3, 2)), path)
    (tmp_path / "hard.pt").hardlink_to(path)

    def full(content, file):
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("shutil.copyfileobj", full)
    with pytest.raises(OSError, match=r"No space left .*complete content: ") as refused:
        nnce.save(nnce.MLP((5, 3, 2)), path)
    (complete,) = tmp_path.glob(".unfinished-*")
    assert str(complete) in str(refused.value) and refused.value.filename == str(path)
    assert nnce.load(complete).sizes == (5, 3, 2)


def test_the_longest_name_can_be_saved(tmp_path):
    path = tmp_path / ("n" * 252 + ".pt")
    nnce.save(nnce.MLP((4, 3, 2)), path)
    assert nnce.load(path).sizes == (4, 3, 2)


def test_a_disk_that_fills_up_is_an_os_error(tmp_path, monkeypatch):
    """Not the RuntimeError that torch.save makes of it half-way; and nothing is left."""

    class Small(io.FileIO):
        """A file on a disk with 20,000 bytes to spare."""

        def write(self, content):
            if self.tell() + len(content) > 20_000:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(content)

    monkeypatch.setattr(checkpoints.Path, "open", lambda path, mode: Small(path, mode))
    with pytest.raises(OSError, match="No space left"):
        nnce.save(nnce.MLP((784, 300, 10)), tmp_path / "network.pt")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("where", [(torch, "load"), (saving, "MLP")])
def test_no_memory_is_not_taken_for_damage(tmp_path, monkeypatch, where):
    def no_memory(*arguments, **more):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    nnce.save(nnce.MLP((4, 3, 2)), tmp_path / "network.pt")
    monkeypatch.setattr(*where, no_memory)
    with pytest.raises(RuntimeError, match="can't allocate"):
        nnce.load(tmp_path / "network.pt")


def test_a_changed_number_is_no_other_network(tmp_path):
    """Any byte of the parameters: the file's own checksums say so, and nobody else would."""
    path = tmp_path / "network.pt"
    network = nnce.MLP((4, 3, 2))
    nnce.save(network, path)
    whole = path.read_bytes()
    start = whole.index(network[0].weight.detach().numpy().tobytes())
    for place in range(start, start + 48):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(ValueError, match="damaged"):
            nnce.load(path)


def test_sizes_that_would_be_a_long_story_are_refused_at_once(tmp_path):
    """Nested ones double with each level, in a file of a kilobyte."""
    nested = (1, 1)
    for _ in range(60):
        nested = (nested, nested)
    path = tmp_path / "network.pt"
    for sizes in (nested, [1] * 100_000):
        torch.save({"format": "nnce.MLP 1", "sizes": sizes, "state_dict": {}}, path)
        with pytest.raises(ValueError, match="damaged"):
            nnce.load(path)


def test_a_loaded_network_has_memory_of_its_own_and_can_be_trained(tmp_path):
    path = tmp_path / "network.pt"
    state = dict.fromkeys(("0.weight", "2.weight"), torch.rand(2, 2))
    state |= dict.fromkeys(("0.bias", "2.bias"), torch.rand(2))
    torch.save({"format": "nnce.MLP 1", "sizes": (2, 2, 2), "state_dict": state}, path)
    with torch.inference_mode():
        network = nnce.load(path)
    assert network[0].weight.data_ptr() != network[2].weight.data_ptr()
    network(torch.rand(3, 2)).sum().backward()
    assert network[0].weight.grad is not None


def test_a_network_that_names_more_than_tensors_is_refused(tmp_path, monkeypatch):
    """weights_only knows bytearray, of any size: a file of 1 kB would take a terabyte."""

    class Huge:
        def __reduce__(self):
            return bytearray, (10**12,)

    network = nnce.MLP((4, 3, 2))
    content = {"format": "nnce.MLP 1", "sizes": (4, 3, 2), "state_dict": network.state_dict()}
    torch.save({**content, "more": Huge()}, tmp_path / "network.pt")
    monkeypatch.setattr(torch, "load", None)  # is not asked
    with pytest.raises(ValueError, match="damaged or not a network that nnce saved") as refused:
        nnce.load(tmp_path / "network.pt")
    assert "it contains the name " in str(refused.value.__cause__)


def test_what_a_network_is_about_is_saved_with_it(tmp_path):
    network = MLP((4, 3, 2))
    nnce.save(network, tmp_path / "network.pt")
    assert dict(nnce.load(tmp_path / "network.pt").about) == {}
    network.about = {"classes": ["a", "é"], "image": [2, 2], "more": None}
    nnce.save(network, tmp_path / "network.pt")
    loaded = nnce.load(tmp_path / "network.pt")
    assert loaded.about == network.about
    assert copy.deepcopy(loaded).about == pickle.loads(pickle.dumps(loaded)).about == network.about
    network.about = {"tensor": torch.ones(1)}
    with pytest.raises(TypeError, match="not JSON serializable"):
        nnce.save(network, tmp_path / "network.pt")
    assert nnce.load(tmp_path / "network.pt").about == loaded.about


@pytest.mark.parametrize("about", ["[" * 100_000, "5", "{", {"a": 1}, None, "[1]"])
def test_a_file_that_is_about_no_plain_values_is_refused(tmp_path, about):
    network = MLP((4, 3, 2))
    content = {"format": "nnce.MLP 1", "sizes": (4, 3, 2), "state_dict": network.state_dict()}
    torch.save({**content, "about": about}, tmp_path / "network.pt")
    with pytest.raises(ValueError, match="damaged"):
        nnce.load(tmp_path / "network.pt")
