"""The registry of data sets: names from files, descriptions, places, and a data set of one's own."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from mambaverse.cli import main
from mambaverse.config import DataConfig, compose
from mambaverse.datasets import (
    DATASETS,
    Dataset,
    data_home,
    describe_dataset,
    files_below,
    get_dataset,
    list_datasets,
    register_dataset,
)
from mambaverse.errors import UserError
from mambaverse.registry import RegistryError


class Mine(Dataset):
    summary, needs, fetches = "three bytes", "a file mine.bin", "3 bytes"

    def find(self, place: Path) -> Path | None:
        return path if (path := place / "mine.bin").is_file() else None

    def download(self, folder: Path) -> None:
        (folder / "mine.bin").write_bytes(b"abc")

    def open(self, config: DataConfig) -> bytes:
        return self.locate(config.root, config.download).read_bytes()


@pytest.fixture
def mine() -> Iterator[str]:
    register_dataset("toy/mine")(Mine)
    yield "toy/mine"
    del DATASETS._entries["toy/mine"]


def test_names_are_those_of_the_files() -> None:
    assert set(list_datasets("vision/*")) >= {
        f"vision/{name}" for name in ("cifar10", "cifar100", "digits", "fashion_mnist", "folder")
    }


@pytest.mark.parametrize("name", list_datasets())
def test_each_says_what_it_is_and_whether_it_is_there(name: str, tmp_path: Path) -> None:
    about = describe_dataset(name, str(tmp_path / "nowhere"))
    assert about["name"] == name and about["summary"] and about["needs"]
    assert about["status"] == "missing" or about["status"].startswith("found: ")


def test_an_unknown_name_brings_the_nearest() -> None:
    with pytest.raises(RegistryError, match="unknown dataset 'vision/digit', did you mean 'vision/digits'"):
        get_dataset("digit", "vision")


def test_one_of_another_domain_is_refused() -> None:
    with pytest.raises(UserError, match=r"data.name=dna/fasta: expected a data set of audio; known: audio/drums, "):
        get_dataset("dna/fasta", "audio")


def test_what_is_no_dataset_or_has_no_domain_is_refused() -> None:
    with pytest.raises(RegistryError, match=r"expected a subclass of mambaverse\.datasets\.Dataset, got 3"):
        register_dataset("vision/zz")(3)  # type: ignore[type-var]
    with pytest.raises(RegistryError, match="expected 'domain/name' to register under, got 'mine'"):
        register_dataset("mine")


def test_ones_own_is_registered_and_found(mine: str, tmp_path: Path) -> None:
    assert mine in list_datasets("toy/*")
    (tmp_path / "mine.bin").write_bytes(b"xyz")
    assert get_dataset("mine", "toy").open(DataConfig(name="mine", root=str(tmp_path))) == b"xyz"
    assert describe_dataset(mine, str(tmp_path))["status"] == f"found: {tmp_path / 'mine.bin'}"


def test_a_data_set_given_as_a_config_says_how_it_is_trained(mine: str) -> None:
    with pytest.raises(UserError, match=r"no config 'toy/mine', but a data set; data\.name=mine trains on it"):
        compose(mine)


def test_a_path_needs_no_registration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_module.py").write_text("from mambaverse.datasets import Dataset\nclass Own(Dataset): pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert get_dataset("own_module:Own", "vision").name == "own_module:Own"


def test_without_a_root_the_data_home_is_looked_in_and_downloaded_to(
    mine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MAMBAVERSE_DATA", str(tmp_path))
    dataset = get_dataset(mine)
    with pytest.raises(UserError, match=rf"toy/mine is not here: .* looked in {tmp_path}/mine; .*data.download=true"):
        dataset.open(DataConfig(name="mine"))
    assert dataset.open(DataConfig(name="mine", download=True)) == b"abc"
    assert dataset.locate(None) == tmp_path / "mine/mine.bin"


def test_the_data_home_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MAMBAVERSE_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert data_home() == tmp_path / "mambaverse/data"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert data_home() == Path.home() / ".cache/mambaverse/data"


def test_what_cannot_be_fetched_says_so(mine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Mine, "fetches", "")
    with pytest.raises(UserError, match=r"data\.download=true has nothing to fetch it from"):
        get_dataset(mine).open(DataConfig(name="mine", root=str(tmp_path), download=True))


def test_folders_behind_links_are_listed_and_circles_end(tmp_path: Path) -> None:
    for name in ("real/a.png", "elsewhere/deep/b.png", "real/.hidden/c.png", "real/.d.png", "real/.e.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "real/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "real/link2").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "real/self").symlink_to(tmp_path / "real")
    (tmp_path / "elsewhere/deep/up").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/back").symlink_to(tmp_path / "real")
    (tmp_path / "real/gone.png").symlink_to(tmp_path / "nothing.png")
    names = [path.relative_to(tmp_path / "real").as_posix() for path in files_below(tmp_path / "real")]
    assert names == ["a.png", "link/deep/b.png"]


def test_a_data_set_whose_name_has_a_dot_is_no_missing_genome(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(DATASETS, "_entries", dict(DATASETS._entries))
    register_dataset("toy/mine.v2")(Mine)
    (tmp_path / "mine.bin").write_bytes(b"abc")
    assert main(["data", "toy/mine.v2", "--root", str(tmp_path)]) == 0
    assert "name: toy/mine.v2" in capsys.readouterr().out
