"""Package files give up their data without dpkg or pip, and damaged ones say so."""

import io
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mambaverse.config import DataConfig
from mambaverse.datasets import DATASETS, Dataset, MissingDataError, get_dataset, register_dataset
from mambaverse.errors import UserError
from mambaverse.packages import unpacked


def member(name: str, content: bytes) -> bytes:
    header = f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}`\n"
    return header.encode() + content + b"\n" * (len(content) % 2)


def make_deb(path: Path, compression: str = "xz") -> Path:
    tar = io.BytesIO()
    mode: Any = f"w:{compression}"
    with tarfile.open(fileobj=tar, mode=mode) as archive:
        info = tarfile.TarInfo("./usr/share/letters/raw.txt")
        info.size = 3
        archive.addfile(info, io.BytesIO(b"abc"))
    members = (
        member("debian-binary", b"2.0\n") + member("control.tar.xz", b"odd") + member("data.tar.xz", tar.getvalue())
    )
    path.write_bytes(b"!<arch>\n" + members)
    return path


class Letters(Dataset):
    summary, needs, package = "three letters", "letters.txt", "letters (Debian)"
    builds = 0

    def find(self, place: Path) -> Path | None:
        return path if (path := place / "letters.txt").is_file() else None

    def find_package(self, place: Path) -> Path | None:
        return path if (path := place / "usr/share/letters/raw.txt").is_file() else None

    def build(self, raw: Path, folder: Path) -> None:
        Letters.builds += 1
        (folder / "letters.txt").write_text(raw.read_text().upper())

    def open(self, config: DataConfig) -> str:
        return self.locate(config.root).read_text()


@pytest.fixture
def letters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Dataset]:
    monkeypatch.setenv("MAMBAVERSE_DATA", str(tmp_path / "home"))
    register_dataset("toy/letters")(Letters)
    yield get_dataset("toy/letters")
    del DATASETS._entries["toy/letters"]


@pytest.mark.parametrize("compression", ["gz", "xz"])
def test_a_deb_is_unpacked(tmp_path: Path, compression: str) -> None:
    with unpacked(make_deb(tmp_path / "x.deb", compression)) as folder:
        assert (folder / "usr/share/letters/raw.txt").read_text() == "abc"
    assert not folder.exists()


def test_a_wheel_is_unpacked(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.whl", "w") as archive:
        archive.writestr("pack/raw.txt", "abc")
    with unpacked(tmp_path / "x.whl") as folder:
        assert (folder / "pack/raw.txt").read_text() == "abc"


@pytest.mark.parametrize("keep", [5, 100, 350, -20])
def test_a_damaged_deb_is_named(tmp_path: Path, keep: int) -> None:
    path = make_deb(tmp_path / "x.deb")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"x\.deb: a damaged package") as caught, unpacked(path):
        pass
    assert "\n" not in str(caught.value)


def test_a_deb_with_a_size_that_is_no_number_is_named(tmp_path: Path) -> None:
    path = make_deb(tmp_path / "x.deb")
    content = path.read_bytes()
    at = content.index(b"data.tar") + 48
    path.write_bytes(content[:at] + b"\xff1" + content[at + 2 :])
    with pytest.raises(UserError, match=r"x\.deb: a damaged package \(a member's size is"), unpacked(path):
        pass


def test_an_encrypted_wheel_is_named(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.whl", "w") as archive:
        archive.writestr("raw.txt", "abc")
    content = bytearray((tmp_path / "x.whl").read_bytes())
    content[6] = content[content.index(b"PK\x01\x02") + 8] = 1  # the flag of an encrypted member
    (tmp_path / "x.whl").write_bytes(content)
    with pytest.raises(UserError, match=r"x\.whl: a damaged package .*encrypted"), unpacked(tmp_path / "x.whl"):
        pass


def test_a_damaged_wheel_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.whl").write_bytes(b"no")
    with pytest.raises(UserError, match=r"x\.whl: a damaged package"), unpacked(tmp_path / "x.whl"):
        pass


def test_a_data_set_is_built_once_from_its_package(letters: Dataset, tmp_path: Path) -> None:
    package, before = make_deb(tmp_path / "letters.deb"), Letters.builds
    config = DataConfig(name="letters", root=str(package))
    assert [letters.open(config) for _ in range(2)] == ["ABC", "ABC"]
    assert Letters.builds == before + 1
    assert letters.status() == f"found: {tmp_path / 'home/letters/letters.txt'}"


def test_an_unpacked_package_will_do(letters: Dataset, tmp_path: Path) -> None:
    with unpacked(make_deb(tmp_path / "letters.deb")) as folder:
        assert letters.prepare(str(folder)) == tmp_path / "home/letters/letters.txt"


def test_another_package_is_refused(letters: Dataset, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "other.whl", "w") as archive:
        archive.writestr("raw.txt", "abc")
    with pytest.raises(UserError, match=r"other\.whl: not a package with the files of toy/letters; expected letters"):
        letters.prepare(str(tmp_path / "other.whl"))
    assert not (tmp_path / "home/letters").exists()


def test_without_it_the_package_is_named(letters: Dataset, tmp_path: Path) -> None:
    assert letters.prepare(None) is None
    with pytest.raises(MissingDataError, match=r"or build it from the package letters \(Debian\)"):
        letters.locate(None)
