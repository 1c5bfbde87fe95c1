"""Packing packages for a machine without network, bringing them over, and opening them."""

import os
import random
import subprocess
import sys
import zipfile
from pathlib import Path

import bundle
import pytest

from tests.gpu_kit import GPU, ROOT


def make_wheel(folder: Path, name: str, files: dict[str, bytes]) -> None:
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
        for path, content in files.items():
            wheel.writestr(path, content)
        wheel.writestr(f"{name}-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of three groups, one with a script, 2 MB that do not compress."""
    folder = tmp_path_factory.mktemp("wheels")
    noise = random.Random(0).randbytes(2 << 20)
    make_wheel(folder, "plain", {"plain.py": b"x = 1\n", "plain-1.0.data/scripts/hello": b"#!/bin/sh\necho hello\n"})
    make_wheel(folder, "megatron_core", {"megatron/core/__init__.py": b"v = '1.0'\n", "megatron/noise": noise})
    make_wheel(folder, "six", {"six.py": b"y = 2\n"})
    return folder


def pack(wheels: Path, dest: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHON": sys.executable, "WHEELS": str(wheels), "PART_KIB": "256", "BUNDLE_MIB": "1"}
    return subprocess.run([GPU / "pack.sh", dest], env=environment, capture_output=True, text=True, timeout=180)


def unpack(bundle_: Path, site: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHON": sys.executable, "BUILD": "no"}
    return subprocess.run(
        [GPU / "unpack.sh", bundle_, site], env=environment, capture_output=True, text=True, timeout=180
    )


@pytest.fixture(scope="module")
def packed(wheels: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    dest = tmp_path_factory.mktemp("packed")
    done = pack(wheels, dest)
    assert done.returncode == 0, done.stderr
    assert "done: " in done.stdout
    return dest


def test_bundles_come_back_whole_in_any_order(packed: Path, wheels: Path, tmp_path: Path) -> None:
    bundles = sorted(packed.iterdir())
    assert len(bundles) == 3
    for folder in bundles:
        assert sum(p.stat().st_size for p in folder.glob("*.tar.xz.*")) <= 1 << 20
    said = [unpack(folder, tmp_path / "site").stdout for folder in (bundles[2], bundles[0], bundles[1])]
    assert "other bundles are still to come" in said[0]
    assert "of 9 parts here" in said[0]
    assert "all is there" in said[2]
    site = tmp_path / "site"
    assert not list((site / "parts").glob("*.xz.*"))
    with zipfile.ZipFile(wheels / "megatron_core-1.0-py3-none-any.whl") as wheel:
        assert (site / "megatron-core-1.0/megatron/noise").read_bytes() == wheel.read("megatron/noise")
    assert (site / "dali/six.py").exists()
    shell = f". {site}/env.sh 1.0 && $python -c 'import plain, megatron.core; print(megatron.core.v, plain.x)' && hello"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, timeout=180)
    assert done.stdout.split() == ["1.0", "1", "hello"], done.stderr


def test_packing_again_gives_the_same_bytes(packed: Path, wheels: Path, tmp_path: Path) -> None:
    assert pack(wheels, tmp_path / "again").returncode == 0
    names = {p.relative_to(packed) for p in packed.rglob("*") if p.is_file()}
    for name in names:
        assert (tmp_path / "again" / name).read_bytes() == (packed / name).read_bytes()


def test_a_damaged_part_is_refused_and_can_be_brought_again(packed: Path, tmp_path: Path) -> None:
    bundles = sorted(packed.iterdir())
    bad = tmp_path / "bad"
    bad.mkdir()
    for file in bundles[1].iterdir():
        (bad / file.name).write_bytes(file.read_bytes())
    part = next(bad.glob("*.tar.xz.*"))
    content = bytearray(part.read_bytes())
    content[-7] ^= 1
    part.write_bytes(content)
    site = tmp_path / "site"
    done = unpack(bad, site)
    assert done.returncode == 1
    assert f"{part} is damaged" in done.stderr
    said = [unpack(folder, site).stdout for folder in bundles]
    assert "all is there" in said[-1]


def test_a_killed_opening_starts_over(packed: Path, tmp_path: Path) -> None:
    bundles = sorted(packed.iterdir())
    half = tmp_path / "site/base.opening"
    half.mkdir(parents=True)
    (half / "left.py").write_text("")
    for folder in bundles:
        unpack(folder, tmp_path / "site")
    assert not half.exists()
    assert not (tmp_path / "site/base/left.py").exists()


def test_bundles_of_two_packings_do_not_mix(packed: Path, wheels: Path, tmp_path: Path) -> None:
    more = tmp_path / "wheels"
    more.mkdir()
    make_wheel(more, "other", {"other.py": b"z = 3\n"})
    assert pack(more, tmp_path / "other").returncode == 0
    unpack(sorted(packed.iterdir())[0], tmp_path / "site")
    done = unpack(tmp_path / "other/bundle-1", tmp_path / "site")
    assert done.returncode == 1
    assert "packed apart" in done.stderr


def test_not_a_bundle_and_not_an_empty_folder(packed: Path, wheels: Path, tmp_path: Path) -> None:
    assert "is no bundle" in unpack(tmp_path, tmp_path / "site").stderr
    assert "is not empty" in pack(wheels, packed).stderr


def test_groups() -> None:
    assert bundle.group("megatron_core-0.16.1-py3-none-any.whl") == "megatron-core-0.16.1"
    assert bundle.group("transformer_engine_cu13-2.11.0-py3-none-manylinux_2_28_x86_64.whl") == "te"
    assert bundle.group("nvidia_dali_cuda130-2.4.0-py3-none-manylinux_2_28_x86_64.whl") == "dali"
    assert bundle.group("sixteen-1.0-py3-none-any.whl") == "base"


def test_pins_are_whole() -> None:
    """Each package once, and at least what setup.py asks for at run time."""
    lines = [x for x in (ROOT / "constraints/gpu-cu13.txt").read_text().splitlines() if x and not x.startswith("#")]
    names = [line.split("==")[0].lower() for line in lines]
    assert len(set(names)) == len(names)
    setup = (ROOT / "setup.py").read_text()
    needed = setup[setup.index("install_requires=[") : setup.index("extras_require")]
    for line in needed.splitlines()[1:-1]:
        name = line.strip(' ",').split(">")[0]
        assert name in {*names, "numpy", "]"}, name
