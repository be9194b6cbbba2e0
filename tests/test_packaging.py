"""The wheel that is built from the source distribution holds the whole tree."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Final

import pytest

from tests.cluster import run_understudy, running_cluster

ROOT: Final = Path(__file__).parents[1]
PACKAGES: Final = ("actors", "protocol", "runtime", "tools")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """A wheel made as a user's installer makes it: from the source distribution alone."""
    directory = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(directory)]
    done = subprocess.run([*build, str(ROOT)], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = directory.glob("*.whl")
    return zipfile.ZipFile(path)


def in_the_tree() -> set[str]:
    """Every module of the tree, by its place in the installed package."""
    return {
        f"understudy/{path.relative_to(ROOT)}"
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
    }


def test_the_wheel_has_every_module_of_the_tree_and_no_other(wheel: zipfile.ZipFile) -> None:
    assert {name for name in wheel.namelist() if name.endswith(".py")} == in_the_tree()


def test_the_wheel_has_the_demo_model_and_the_licences(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    model = {f"understudy/tools/demo/model/{path.name}" for path in demo_model_files()}
    assert model <= names
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
        name.rpartition("/")[2] for name in model
    }
    licences = {name for name in names if ".dist-info/licenses/" in name}
    assert {name.rpartition("/")[2] for name in licences} >= {"LICENSE", "LICENSE-PSF"}


def test_the_wheel_tells_that_it_is_typed_and_how_to_start_it(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    assert {f"understudy/{package}/py.typed" for package in PACKAGES} <= names
    (entry_points,) = (name for name in names if name.endswith("entry_points.txt"))
    assert b"understudy = understudy.tools.cli:main" in wheel.read(entry_points)


def test_the_wheel_puts_nothing_beside_the_one_package(wheel: zipfile.ZipFile) -> None:
    scripts = {"quickstart", "test", "environment.sh"}
    assert not scripts & {name.rpartition("/")[2] for name in wheel.namelist()}
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"understudy"}


def test_the_wheel_serves_where_it_is_unpacked(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    wheel.extractall(tmp_path)
    elsewhere = {"PYTHONPATH": str(tmp_path)}
    shown = run_understudy("config", "show", environment=elsewhere)
    assert f'model = "{tmp_path}/understudy/tools/demo/model"' in shown.stdout
    with running_cluster(engines=1, environment=elsewhere) as cluster:
        assert cluster.reply().model == "understudy-demo"


def test_an_editable_install_sees_the_folders_through_links() -> None:
    package = ROOT / "deploy" / "editable" / "understudy"
    assert {path.name for path in package.iterdir()} == set(PACKAGES)
    for name in PACKAGES:
        link = package / name
        assert link.is_symlink()
        assert not link.readlink().is_absolute()
        assert link.resolve() == ROOT / name


def test_the_source_distribution_has_what_a_build_needs(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "build", "--no-isolation", "--sdist", "--outdir", str(tmp_path)]
    subprocess.run([*build, str(ROOT)], check=True, capture_output=True)
    (path,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "README.md", "pyproject.toml", "tools/demo/LICENSE-PSF"} <= names
    assert {f"{package}/__init__.py" for package in PACKAGES} <= names


def demo_model_files() -> list[Path]:
    return [path for path in (ROOT / "tools" / "demo" / "model").iterdir() if path.is_file()]
