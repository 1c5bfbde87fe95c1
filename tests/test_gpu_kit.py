"""The GPU benchmarks' own tools, without a GPU: packing, slimming, the runner; every script on toy sizes."""

import hashlib
import json
import os
import random
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
GPU = ROOT / "benchmarks/gpu"
sys.path.insert(0, str(GPU))

import bundle  # noqa: E402
import kit  # noqa: E402
import slim  # noqa: E402
import workload  # noqa: E402

SCRIPTS = ["check", "ceilings", "step_3b", "encoder", "moe", "decode", "data_wait", "memory"]


# --- packing ---


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
    return subprocess.run([GPU / "pack.sh", dest], env=environment, capture_output=True, text=True, timeout=60)


def unpack(bundle_: Path, site: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHON": sys.executable, "BUILD": "no"}
    return subprocess.run(
        [GPU / "unpack.sh", bundle_, site], env=environment, capture_output=True, text=True, timeout=60
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
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, timeout=60)
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


# --- slimming ---


def elf_with(section: bytes) -> bytes:
    """A 64-bit ELF file with one section .nv_fatbin."""
    names = b"\0.nv_fatbin\0.shstrtab\0"
    data_at = 64
    names_at = data_at + len(section)
    table = names_at + len(names)
    header = b"\x7fELF\x02\x01\x01" + bytes(33) + struct.pack("<Q", table) + bytes(10) + struct.pack("<HHH", 64, 3, 2)
    entry = struct.Struct("<IIQQQQ24x")
    rows = [(0,) * 6, (1, 1, 0, 0, data_at, len(section)), (12, 3, 0, 0, names_at, len(names))]
    return header + section + names + b"".join(entry.pack(*row) for row in rows)


def container(*entries: tuple[int, int, bytes]) -> bytes:
    """(kind, architecture, code)."""
    body = b"".join(
        struct.pack("<HHIQ", kind, 0, 64, len(code)) + bytes(12) + struct.pack("<I", arch) + bytes(32) + code
        for kind, arch, code in entries
    )
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(body)) + body


def test_only_the_wanted_architecture_stays(tmp_path: Path) -> None:
    ptx, old, new, newest = (1, 90, b"p" * 24), (2, 80, b"o" * 16), (2, 90, b"n" * 40), (2, 100, b"x" * 8)
    first, second = container(ptx, old, new, newest), container(old)
    section = first + second
    library = tmp_path / "library.so"
    library.write_bytes(elf_with(section))
    kept, dropped = slim.slim(library, 90)
    content = library.read_bytes()[64 : 64 + len(section)]
    alone = container(new)
    assert content[: len(alone)] == alone
    assert not content[len(alone) : len(first)].strip(b"\0")
    assert content[len(first) :] == second, "nothing to keep: left alone"
    assert kept == len(alone) - 16
    assert kept + dropped == len(first) - 16
    assert slim.slim(library, 90) == (kept, 0), "once is enough"


def test_other_files_are_left_alone(tmp_path: Path) -> None:
    for content in (b"#!/bin/sh\n" * 20, elf_with(b"no fat binary in here".ljust(64))):
        (tmp_path / "file").write_bytes(content)
        assert slim.slim(tmp_path / "file", 90) == (0, 0)
        assert (tmp_path / "file").read_bytes() == content


# --- the runner ---

CASES = """
import pathlib, subprocess, sys, time
import kit
kit.has_gpu = lambda: True
kit.machine = lambda: {"gpu": "none, a test"}
here = pathlib.Path(__file__).parent

def good(smoke): return {"value": 3}
def bad(smoke):
    if not (here / "mended").exists():
        raise ValueError("what went wrong")
    return {"value": 4}
def slow(smoke):
    print("started", subprocess.Popen(["sleep", "50"]).pid, flush=True)
    time.sleep(50)
def ratios(found, results):
    return [kit.at_least("toy", f["value"], "of ours", 2, "of theirs", 1.7) for f in found.values()]
kit.run("toy", "", [kit.Case("good", good), kit.Case("bad", bad), kit.Case("slow", slow, 2)], ratios)
"""


def test_cases_are_kept_one_by_one(tmp_path: Path) -> None:
    script = tmp_path / "toy.py"
    script.write_text(CASES)
    environment = os.environ | {"PYTHONPATH": str(GPU)}

    def call(*arguments: str) -> tuple[int, str, dict[str, dict]]:
        command = [sys.executable, str(script), "--results", str(tmp_path), *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        return done.returncode, done.stdout, json.loads((tmp_path / "gpu-toy.json").read_text())

    code, said, record = call()
    assert code == 1
    assert record["cases"]["good"]["value"] == 3
    assert "ValueError: what went wrong" in record["cases"]["bad"]["failed"]
    assert record["machine"] == {"gpu": "none, a test"}
    assert record["ratios"] == ["toy: 3 of ours / 2 of theirs = 1.5 (target at least 1.7: missed)"]
    assert "exit code -9" in record["cases"]["slow"]["failed"]
    started = next(line.split()[-1] for line in said.splitlines() if "started" in line)
    assert not Path(f"/proc/{started}").exists() or "Z" in Path(f"/proc/{started}/stat").read_text().split()[2]

    code, said, record = call("--stop-after", "-1")
    assert code == 1
    assert "bad: no time left" in said

    (tmp_path / "mended").write_text("")
    code, said, record = call("--only", "good", "bad")
    assert code == 0
    assert "good: measured before" in said
    assert record["cases"]["bad"]["value"] == 4
    assert "failed" in record["cases"]["slow"], "what another call said stays"
    assert "toy: 4 of ours / 2 of theirs = 2 (target at least 1.7: reached)" in said


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one here")
    command = ["bash", str(GPU / "run.sh"), "--results", str(tmp_path), "--archive", str(tmp_path / "a.tgz"), "decode"]
    environment = os.environ | {"PYTHON": sys.executable}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1
    assert "error: PyTorch sees no GPU here" in done.stdout
    assert "1 stages with something failed or left: decode" in done.stdout
    assert (tmp_path / "a.tgz").exists()


# --- what is measured ---


@pytest.mark.parametrize("kind", ["one document", "text", "caption", "interleaved", "images"])
def test_sequences_are_what_a_loader_gives(kind: workload.Kind) -> None:
    config = workload.recipe("mm1-3b", True, "data.seq_length=1024")
    layout = workload.layout_of(config)
    batch, lengths = workload.microbatch(config, [kind, kind], seed=0)
    image = batch.tokens == layout.image_token_id
    assert int(image.sum()) == batch.num_images * layout.tokens_per_image == len(batch.images) * layout.tokens_per_image
    assert sum(lengths) == int((batch.documents >= 0).sum())
    full = [layout.max_images * 2 == batch.num_images, sum(lengths) >= 0.95 * batch.tokens.numel()]
    assert any(full)
    assert all(image_.any() for image_ in batch.images)
    assert batch.num_images / 2 <= layout.max_images
    inside = batch.documents[:, 1:] == batch.documents[:, :-1]
    inside &= batch.documents[:, 1:] >= 0
    assert torch.equal(batch.labels[:, :-1][inside], batch.tokens[:, 1:][inside])
    assert not (batch.loss_mask.bool() & ((batch.labels == layout.image_token_id) | (batch.documents < 0))).any()
    expected = {"one document": 0, "text": 0, "images": 2 * layout.max_images}
    if kind in expected:
        assert batch.num_images == expected[kind]
    else:
        assert batch.num_images > 2


def test_the_mix_is_mm1s() -> None:
    shares = {kind: workload.MIX.count(kind) / len(workload.MIX) for kind in workload.MIX}
    assert shares == {"caption": 0.45, "interleaved": 0.45, "text": 0.1}


def test_every_script_runs_on_toy_sizes() -> None:
    """In one process, which imports torch and Megatron-Core once. Nothing is written."""
    before = {path: hashlib.sha256(path.read_bytes()).digest() for path in kit.RESULTS.glob("*")}
    code = (
        "import runpy, sys\n"
        "folder, *names = sys.argv[1:]\n"
        "sys.path.insert(0, folder)\n"
        "for name in names:\n"
        "    sys.argv = [f'{folder}/{name}.py', '--smoke']\n"
        "    sys.argv += {'memory': ['--only', '3b'], 'data_wait': ['--only', 'cpu-2-workers']}.get(name, [])\n"
        "    runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    command = [sys.executable, "-c", code, str(GPU), *SCRIPTS]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for name in SCRIPTS:
        assert f"{name}: runs, " in done.stdout, name
    assert {path: hashlib.sha256(path.read_bytes()).digest() for path in kit.RESULTS.glob("*")} == before


def test_all_scripts_are_tested_and_run() -> None:
    stages = (GPU / "run.sh").read_text().split("all=(")[1].split(")")[0].split()
    scripts = {p.stem for p in GPU.glob("*.py")} - {"bundle", "slim", "kit", "workload", "tests"}
    assert scripts == set(SCRIPTS) == set(stages) - {"tests", "long-tests"}
