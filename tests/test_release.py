"""What is released: wheels that install and run in an empty environment, complete metadata, and a dated changelog.

The environment of the wheels sees the packages of this one through a `.pth` file, and no source tree."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PROJECTS = {"selsft": ROOT, "selsft-kernels": ROOT / "kernels"}


def project(name):
    return tomllib.loads((PROJECTS[name] / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Folder with wheels and source distributions of both projects."""
    pytest.importorskip("build")
    pytest.importorskip("hatchling")
    work = tmp_path_factory.mktemp("release")
    names = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    for name in names.stdout.split("\n"):  # a copy, since a build may leave files behind
        if name and (ROOT / name).is_file():
            (work / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, work / "tree" / name)
    for source in (work / "tree", work / "tree" / "kernels"):
        command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(work / "dist"), str(source)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return work / "dist"


def wheel(built, name):
    (found,) = built.glob(f"{name.replace('-', '_')}-*.whl")
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", PROJECTS)
def test_metadata(built, name):
    with zipfile.ZipFile(wheel(built, name)) as archive:
        files = archive.namelist()
        (path,) = [file for file in files if file.endswith("METADATA")]
        found = Parser().parsestr(archive.read(path).decode())
    assert found["Name"] == name and found["Version"] == project("selsft")["version"]
    assert found["License-Expression"] == "Apache-2.0" and "LICENSE" in found.get_all("License-File")
    assert any(file.endswith("licenses/LICENSE") for file in files)
    assert found["Summary"] and found["Requires-Python"] == ">=3.11" and found["Keywords"]
    assert found["Description-Content-Type"] == "text/markdown" and found.get_payload().startswith("# ")
    assert "Typing :: Typed" in found.get_all("Classifier")
    packages = {file.split("/")[0] for file in files if ".dist-info" not in file}
    assert packages == ({"selsft", "selsft_kernels"} if name == "selsft" else {"selsft_kernels"})
    assert all(f"{package}/py.typed" in files for package in packages)
    if name == "selsft":
        there = {file for file in files if file.endswith((".yaml", ".html", ".css", ".js"))}
        wanted = {
            str(path.relative_to(ROOT))
            for ending in ("yaml", "html", "css", "js")
            for path in (ROOT / "selsft").rglob(f"*.{ending}")
        }
        assert there == wanted and len(wanted) > 10  # recipes, templates and style sheets


@pytest.mark.slow
def test_source_distribution(built):
    (found,) = built.glob("selsft-*.tar.gz")
    with tarfile.open(found) as archive:
        files = {name.partition("/")[2] for name in archive.getnames()}
    for path in ("CHANGELOG.md", "SECURITY.md", "CONTRIBUTING.md", "docs/index.md", "tests/conftest.py", "mkdocs.yml"):
        assert path in files
    assert not [name for name in files if name.startswith(("runs/", ".venv", ".git/"))]


@pytest.fixture(scope="module")
def environment(built, tmp_path_factory):
    """Python of an environment that has torch and the libraries of this one, and the two wheels alone of ours."""
    folder = tmp_path_factory.mktemp("environment") / "venv"
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    libraries = tmp_path_factory.mktemp("libraries")  # those of this environment, without an editable selsft
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if "selsft" not in path.name.lower() and path.suffix != ".pth":
            (libraries / path.name).symlink_to(path)
    (site / "libraries.pth").write_text(f"{libraries}\n")
    for name in ("selsft-kernels", "selsft"):  # the second has the kernels too
        command = [
            sys.executable,
            "-m",
            "pip",
            "--python",
            str(python),
            "install",
            "--no-deps",
            "--no-index",
            "--quiet",
        ]
        done = subprocess.run([*command, "--force-reinstall", str(wheel(built, name))], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    return python


def run(python, *command, folder):
    clean = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(
        [str(python), *command], cwd=folder, env=clean | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_installed_wheels_run(environment, tmp_path):
    where = run(environment, "-c", "import selsft, selsft_kernels; print(selsft.__file__)", folder=tmp_path)
    assert str(environment.parents[1]) in where
    command = environment.with_name("selsft")
    said = subprocess.run([str(command), "--version"], capture_output=True, text=True, cwd=tmp_path).stdout
    assert said.startswith(f"selsft {project('selsft')['version']} (Python 3.")
    loss = "from selsft_kernels import selective_cross_entropy as f; import torch; z = torch.randn(4, 9); "
    loss += "print(float(f(z, torch.arange(4), torch.tensor([1.0, -1.0, 0.0, 1.0])).loss))"
    assert float(run(environment, "-c", loss, folder=tmp_path)) > 0


@pytest.mark.nightly
def test_installed_demo_runs(environment, tmp_path):
    said = run(environment, "-m", "selsft.cli", "demo", folder=tmp_path)
    assert "report.html" in said


# ------------------------------------------------------------ what needs no build


@pytest.mark.parametrize("name", PROJECTS)
def test_versions_agree(name):
    changes = (ROOT / "CHANGELOG.md").read_text()
    latest, date = re.search(r"^## (\S+) \((\d{4}-\d{2}-\d{2})\)$", changes, re.MULTILINE).groups()
    assert project(name)["version"] == latest and date
    dates = re.findall(r"^## \S+ \((\S+)\)$", changes, re.MULTILINE)
    assert dates == sorted(dates, reverse=True) and "unreleased" not in changes


@pytest.mark.parametrize("name", PROJECTS)
def test_no_invented_host(name):
    """Where the repository will live is not known here, so no metadata says it."""
    assert not re.search(r"https?://", str(project(name)))


def test_a_report_asks_for_the_version():
    form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / "bug.yml").read_text())
    (version,) = [item for item in form["body"] if item.get("id") == "version"]
    assert "selsft --version" in version["attributes"]["label"] and version["validations"]["required"]
    assert "selsft --version" in (ROOT / "SECURITY.md").read_text()


def test_kernels_have_the_license():
    assert (ROOT / "kernels" / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
