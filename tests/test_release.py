"""What a release gives: a wheel that an environment without the repository installs and runs."""

from __future__ import annotations

import email
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from netdeconv import __version__

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.slow

# From conversion to plain layers.
TRIED = """
import torch, netdeconv, netdeconv.zoo
model = netdeconv.convert(netdeconv.zoo.create("vgg11", width=0.125))
images = torch.randn(4, 3, 32, 32)
model(images).sum().backward()
fused = netdeconv.fuse(model.eval())
netdeconv.check_fused(model, fused, images)
assert not [module for module in fused.modules() if type(module).__module__.startswith("netdeconv.nn")]
print(netdeconv.__version__, netdeconv.__file__)
"""


def ran(*command: str | Path, where: Path) -> subprocess.CompletedProcess[str]:
    """A command outside of the repository, which sees nothing of it."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return subprocess.run(list(map(str, command)), cwd=where, env=clean, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the working tree, in an environment of its own, for which pip gets the build backend."""
    folder = tmp_path_factory.mktemp("dist")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    if ran(*pip, "download", "--quiet", "--no-deps", "--dest", folder / "probe", "hatchling", where=folder).returncode:
        pytest.skip("needs a network: pip finds no hatchling to build with")
    done = ran(*pip, "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, ROOT, where=folder)
    assert done.returncode == 0, done.stderr
    (found,) = folder.glob("*.whl")
    return found


def test_the_metadata_are_those_of_this_version(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (path,) = [name for name in names if name.endswith(".dist-info/METADATA")]
        metadata = email.message_from_bytes(archive.read(path))
    assert wheel.name == f"netdeconv-{__version__}-py3-none-any.whl"
    assert metadata["Version"] == __version__
    assert metadata["License-Expression"] == "Apache-2.0"
    base = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert [line.partition(">")[0] for line in base] == ["torch"]
    assert metadata.get_payload().startswith("# netdeconv")
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"netdeconv", "netdeconv_launcher.py"}
    assert "netdeconv/py.typed" in names and "netdeconv/lab/recipes/digits.yaml" in names


def test_a_fresh_environment_installs_and_runs_it(wheel: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "env")
    scripts = tmp_path / "env" / ("Scripts" if os.name == "nt" else "bin")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", scripts / "python"]
    done = ran(*pip, "install", "--quiet", "--no-deps", wheel, where=tmp_path)
    assert done.returncode == 0, done.stderr
    # torch and the libraries of the lab are those of this environment; its own netdeconv comes after the wheel's.
    (own,) = (tmp_path / "env").rglob("site-packages")
    (own / "libraries.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")
    done = ran(scripts / "python", "-c", TRIED, where=tmp_path)
    assert done.returncode == 0, done.stderr
    version, place = done.stdout.split(maxsplit=1)
    assert version == __version__ and Path(place.strip()).is_relative_to(own)
    assert ran(scripts / "netdeconv", "--version", where=tmp_path).stdout.strip() == f"netdeconv {__version__}"
    assert "cifar10-20-epochs" in ran(scripts / "netdeconv", "recipes", where=tmp_path).stdout
