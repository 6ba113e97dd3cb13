"""What pip would install: the wheel and the sdist hold the folders that the links stand for."""

import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ONE_OF_EACH = [
    "mambaverse/__init__.py",
    "mambaverse/py.typed",
    "mambaverse/mixers/s6.py",
    "mambaverse/kernels/backend.py",
    "mambaverse/kernels/selective_scan/cpu.py",
    "mambaverse/tasks/vision/task.py",
    "mambaverse/tasks/vision/models/vim.py",
    "mambaverse/configs/vision/digits.yaml",
]


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build sdist and wheel from a copy of what git tracks, so that nothing of the working folder leaks in."""
    folder = tmp_path_factory.mktemp("dist")
    source = folder / "source"
    files = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    for name in files:
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        origin = ROOT / name
        if origin.is_symlink():
            target.symlink_to(origin.readlink())
        elif origin.exists():
            target.write_bytes(origin.read_bytes())
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder / "out"), str(source)],
        check=True, capture_output=True,
    )  # fmt: skip
    return folder / "out"


def test_wheel_holds_one_file_of_each_kind_and_nothing_else_on_top(built: Path) -> None:
    names = zipfile.ZipFile(next(built.glob("*.whl"))).namelist()
    assert set(ONE_OF_EACH) <= set(names)
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"mambaverse"}
    assert not [name for name in names if name.endswith((".nbi", ".nbc", ".pyc"))]


def test_wheel_carries_licence_and_command(built: Path) -> None:
    wheel = zipfile.ZipFile(next(built.glob("*.whl")))
    info = next(name.split("/")[0] for name in wheel.namelist() if ".dist-info/" in name)
    assert f"{info}/licenses/LICENSE" in wheel.namelist()
    assert "mambaverse = mambaverse.cli:main" in wheel.read(f"{info}/entry_points.txt").decode()
    assert "Requires-Dist: triton>=3.6; sys_platform" in wheel.read(f"{info}/METADATA").decode()


def test_sdist_holds_plain_folders_and_the_tests(built: Path) -> None:
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        members = archive.getmembers()
    names = {member.name.partition("/")[2] for member in members}
    assert set(ONE_OF_EACH) | {"tests/test_packaging.py", "pyproject.toml", "LICENSE"} <= names
    assert not [member for member in members if member.issym()]


def test_links_of_readme_lead_somewhere_in_the_sdist(built: Path) -> None:
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        sizes = {member.name.partition("/")[2]: member.size for member in archive.getmembers()}
    pages = ["README.md", *(name for name in sizes if re.fullmatch(r"docs/\w+\.md", name))]
    assert len(pages) > 5
    for page in pages:
        for link in re.findall(r"\]\(([^)#\s]+)", (ROOT / page).read_text()):
            if "://" in link:
                continue
            target = (Path(page).parent / link).as_posix().rstrip("/")
            if target.partition("/")[0] in ("kernels", "tasks", "configs"):  # there they lie where the links point from
                target = f"mambaverse/{target}"
            assert target in sizes, f"{page} links to {link}"
    assert sum(size for name, size in sizes.items() if name.startswith("docs/")) < 2e6  # pages, not what a run left
