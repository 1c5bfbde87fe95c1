"""The GPU benchmarks' own tools, without a GPU: packing, slimming, the runner; every script on toy sizes."""

import hashlib
import json
import os
import random
import shutil
import struct
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
GPU = ROOT / "benchmarks/gpu"
sys.path.insert(0, str(GPU))

import bundle  # noqa: E402
import fp8_loss  # noqa: E402
import gather  # noqa: E402
import kit  # noqa: E402
import pictures  # noqa: E402
import run  # noqa: E402
import slim  # noqa: E402
import workload  # noqa: E402

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
import os, pathlib, subprocess, sys, time
import cases
cases.has_gpu = lambda: True
cases.clocks = lambda: None
cases.machine = lambda: {"gpu": "none, a test"}
cases._left_on_gpu = lambda: 2 << 30 if (here / "full").exists() else 0
here = pathlib.Path(__file__).parent

def good(smoke):
    os.environ["LEFT_BEHIND"] = "yes"
    return {"value": 3, "process": os.getpid()}
def also(smoke): return {"value": 5, "process": os.getpid(), "left": os.environ.get("LEFT_BEHIND")}
def bad(smoke):
    if not (here / "mended").exists():
        raise ValueError("what went wrong")
    return {"value": 4}
def slow(smoke):
    print("started", subprocess.Popen(["sleep", "50"]).pid, flush=True)
    time.sleep(50)
def other(smoke): return {"value": 6, "process": os.getpid(), "set": os.environ["FOR_ME"]}
def fills(smoke):
    (here / "full").write_text("")
    return {"value": 7, "process": os.getpid()}
def last(smoke):
    return {"value": 8, "process": os.getpid()}
def ratios(found, results):
    return [cases.at_least("toy", f["value"], "of ours", 2, "of theirs", 1.7) for f in found.values()][:1]
Case = cases.Case
cases.run("toy", "", [
    Case("good", good), Case("also", also), Case("bad", bad), Case("slow", slow, 2),
    Case("other", other, environment=(("FOR_ME", "1"),)), Case("fills", fills), Case("last", last),
], ratios)
"""


def test_cases_are_kept_one_by_one(tmp_path: Path) -> None:
    script = tmp_path / "toy.py"
    script.write_text(CASES)
    environment = os.environ | {"PYTHONPATH": str(GPU)}

    def call(*arguments: str) -> tuple[int, str, dict[str, dict]]:
        command = [sys.executable, str(script), "--results", str(tmp_path), *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        return done.returncode, done.stdout, json.loads((tmp_path / "gpu-toy.json").read_text())

    code, said, record = call("--only", "good", "also", "bad", "slow", "other", "fills")
    assert code == 1
    found = record["cases"]
    assert found["good"]["value"] == 3
    assert found["also"]["process"] == found["good"]["process"], "they share a process"
    assert found["also"]["left"] is None, "but not its environment"
    assert "ValueError: what went wrong" in found["bad"]["failed"]
    assert "exit code 1" in found["bad"]["failed"]
    assert found["other"]["set"] == "1"
    assert len({found[name]["process"] for name in ("good", "other", "fills")}) == 3
    assert record["machine"] == {"gpu": "none, a test"}
    assert record["ratios"] == ["toy: 3 of ours / 2 of theirs = 1.5 (target at least 1.7: missed)"]
    assert "exit code -9" in found["slow"]["failed"]
    started = next(line.split()[-1] for line in said.splitlines() if "started" in line)
    assert not Path(f"/proc/{started}").exists() or "Z" in Path(f"/proc/{started}/stat").read_text().split()[2]

    code, said, record = call("--stop-after", "-1")
    assert code == 1
    assert "bad: no time left" in said

    (tmp_path / "mended").write_text("")
    (tmp_path / "full").unlink()
    code, said, record = call("--only", "good", "bad", "fills", "last")
    assert code == 0
    assert "good: measured before" in said
    assert record["cases"]["bad"]["value"] == 4
    assert "failed" in record["cases"]["slow"], "what another call said stays"

    (tmp_path / "full").write_text("")
    code, _, record = call("--only", "last", "--again")
    assert code == 1, "a GPU that is never empty"
    assert "failed" in record["cases"]["last"]


def test_a_full_gpu_is_left_to_the_next_process(tmp_path: Path) -> None:
    script = tmp_path / "toy.py"
    full_once = (
        'cases._left_on_gpu = lambda: 2 << 30 if (here / "full").exists() and not (here / "full").unlink() else 0'
    )
    line = next(line for line in CASES.splitlines() if line.startswith("cases._left_on_gpu"))
    script.write_text(CASES.replace(line, full_once))
    command = [sys.executable, str(script), "--results", str(tmp_path), "--only", "fills", "last"]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": str(GPU)}, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout
    found = json.loads((tmp_path / "gpu-toy.json").read_text())["cases"]
    assert found["fills"]["process"] != found["last"]["process"]


def run_all(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    command = ["bash", str(GPU / "run.sh"), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one here")
    done = run_all("--results", tmp_path, "--archive", tmp_path / "a.tgz", "decode", "step_3b:mix-bf16")
    assert done.returncode == 1
    assert "error: PyTorch sees no GPU here" in done.stdout
    assert "something failed or left in: decode step_3b:mix-bf16" in done.stdout
    assert (tmp_path / "a.tgz").exists()
    done = run_all("--results", tmp_path, "--minutes", "0", "decode")
    assert "0 minutes are over; left: decode" in done.stdout
    assert "no such stage: decoder" in run_all("decoder").stderr
    assert "--earlier nothing.tgz" in run_all("--earlier", "nothing.tgz").stderr


def test_rehearsal(tmp_path: Path) -> None:
    """Also without a GPU; a stage that does not run is named, with what it said."""
    done = run_all("--results", tmp_path, "rehearsal:ceilings,nonsense")
    assert done.returncode == 1
    found = json.loads((tmp_path / "gpu-rehearsal.json").read_text())["cases"]
    assert "failed" not in found["ceilings"]
    assert "nonsense.py" in found["nonsense"]["failed"]


def test_files_of_tests_run_side_by_side(tmp_path: Path) -> None:
    command = [sys.executable, str(GPU / "run_tests.py"), "--smoke", "--results", str(tmp_path)]
    done = subprocess.run(
        [*command, "--only", "packed_attention", "one_gpu"], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stdout
    found = json.loads((tmp_path / "gpu-tests.json").read_text())["cases"]
    assert {name.split("::")[0] for name in found} == {
        f"tests/gpu/test_{n}.py" for n in ("packed_attention", "one_gpu")
    }
    if not torch.cuda.is_available():
        assert {case["outcome"] for case in found.values()} == {"skipped"}
        assert f"tests: 0 passed, 0 failed, {len(found)} skipped" in done.stdout
    assert not list(tmp_path.glob(".tests-*")), "parts are gathered"


def test_every_case_of_the_plan_is_there() -> None:
    """And the plan ends with all of each script, in their own order."""
    for stage in run.PLAN:
        name, _, chosen = stage.partition(":")
        if chosen:
            text = (GPU / f"{name}.py").read_text()
            for case in chosen.split(","):
                assert f'"{case}"' in text or name in ("memory", "attention"), stage
    whole = {stage for stage in run.PLAN if ":" not in stage}
    assert whole == {*run.SCRIPTS, "rehearsal", "tests", "long-tests"}
    shared = {"bundle", "slim", "kit", "cases", "workload", "run", "run_tests", "gather", "report", "pictures"}
    assert {path.stem for path in GPU.glob("*.py")} == {*run.SCRIPTS, *shared}


# --- what comes back ---


def record(**cases: dict) -> dict:
    return {"benchmark": "gpu-x", "cases": cases, "machine": {"date": "2000-01-01"}, "ratios": []}


def test_results_of_several_calls_become_one(tmp_path: Path) -> None:
    here, first, second = (tmp_path / name for name in ("here", "first", "second"))
    kit.write(first / "gpu-x.json", record(a={"value": 1}, b={"failed": "no memory"}, c={"value": 3}))
    with gather.Archive(first, tmp_path / "first.tgz"):
        pass
    kit.write(second / "gpu-x.json", record(b={"value": 2}, c={"failed": "late"}, d={"failed": "late"}))
    kit.write(second / "gpu-tests.json", record(t={"outcome": "passed"}))
    kit.write(here / "gpu-x.json", record(a={"value": 10}))
    gather.merge(here, [tmp_path / "first.tgz", second])
    found = json.loads((here / "gpu-x.json").read_text())["cases"]
    assert found == {"a": {"value": 10}, "b": {"value": 2}, "c": {"value": 3}, "d": {"failed": "late"}}
    assert (here / "gpu-tests.json").exists()
    kit.write(here / "gpu-tests.json", record(t={"outcome": "failed"}))
    gather.merge(here, [second])
    assert json.loads((here / "gpu-tests.json").read_text())["cases"] == {"t": {"outcome": "passed"}}


def test_the_archive_is_never_old(tmp_path: Path) -> None:
    """What was written when a kill comes is in it: it is not only made at the end."""
    results, file, again = tmp_path / "results", tmp_path / "out/all.tar.gz", tmp_path / "again"
    results.mkdir()
    with gather.Archive(results, file, seconds=0.05):
        for value in range(3):
            kit.write(results / "gpu-x.json", record(a={"value": value}))
            for _ in range(100):
                time.sleep(0.05)
                if file.exists():
                    shutil.rmtree(again, ignore_errors=True)
                    gather.merge(again, [file])
                    if json.loads((again / "gpu-x.json").read_text())["cases"]["a"]["value"] == value:
                        break
            else:
                pytest.fail(f"value {value} never came")


STEP = {"median": 2.0, "spread": 0.01, "n": 5}
KERNELS = [
    {"busy_s": 0.9, "wall_s": 1.0}, {"kernel": "nvjet_tst_128x256", "share": 0.6, "calls": 9},
    {"kernel": "cudnn_generated_fort_native_sdpa_sm90_flash_bprop", "share": 0.3, "calls": 4},
    {"kernel": "who_knows", "share": 0.1, "calls": 1},
]  # fmt: skip


def step(tokens_per_s: float, **more: object) -> dict:
    flops = {"vision": 1e14, "connector": 1e12, "decoder": 1e15, "attention": 1e13}
    return {
        "seconds_per_step": STEP, "tokens_per_s": tokens_per_s, "images_per_s": 99.0, "tflops": 400.0, "mfu": 0.404,
        "flops": flops, "peak_gib": 98.0, **more,
    }  # fmt: skip


def test_results_become_a_page(tmp_path: Path) -> None:
    """Of made-up figures: what is there is shown, what was missed says so, and a second time nothing is doubled."""
    raw, results, docs = (tmp_path / name for name in ("raw", "results", "docs"))
    machine = {
        "date": "2000-01-01", "gpu": "Made-up GPU", "gpu_gib": 1.0, "driver": "1", "cuda": "13", "cores": 2,
        "versions": {"torch": "0"},
    }  # fmt: skip

    def give(name: str, **cases: dict) -> None:
        kit.write(raw / f"gpu-{name}.json", {"benchmark": f"gpu-{name}", "machine": machine, "cases": cases})

    give("ceilings", bf16={"best_tflops": 780.0}, fp8={"best_tflops": 1400.0}, copy={"bytes_per_s": 4.3e12})
    give(
        "step_3b",
        **{
            "mix-bf16": step(2e4, profile=KERNELS), "mix-fp8-tensorwise": step(3e4, profile="failed: no tool"),
            "text-bf16": step(3e4),
            "text-transformers": {"failed": "Traceback\n  RuntimeError: no room in /some/where/else.py\nexit code 1"},
        },
    )  # fmt: skip
    give("fp8_loss", bf16={"losses": [9.0, 2.0], "last": 2.0}, tensorwise={"losses": [9.0, 2.1], "last": 2.1})
    give("levers", none=step(2e4), gradients=step(2.2e4), flash={"skipped": "needs flash-attn"})
    give("tests", **{"tests/gpu/test_a.py::test_b": {"outcome": "failed", "seconds": 1.0, "why": "because"}})
    docs.mkdir()
    (docs / "performance.md").write_text("# Performance\n\nBefore.\n")
    command = [sys.executable, str(GPU / "report.py"), "--results", str(results), "--docs", str(docs)]

    def call(*more: str) -> str:
        done = subprocess.run([*command, *more], capture_output=True, text=True, timeout=100)
        assert done.returncode == 0, done.stderr
        return (docs / "performance.md").read_text()

    page = call(str(raw))
    assert page.startswith("# Performance\n\nBefore.\n")
    assert "One Made-up GPU (1.0 GiB, driver 1, CUDA 13)" in page
    assert "780 TFLOP/s in bf16 and 1400 TFLOP/s in FP8; a copy moves 4.30 TB/s" in page
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| ")]
    by_name = {row[0]: row for row in rows}
    assert by_name["mix-bf16 MFU"][3:] == ["0.404", "at least 0.55", "**missed**"]
    assert by_name["mix FP8"][3:] == ["1.5", "at least 1.35", "reached"]
    assert by_name["loss, tensorwise"][3:] == ["1.05", "within 1%", "**missed**"]
    assert by_name["mix-bf16"] == ["mix-bf16", "20,000", "99", "2.000 (1%)", "400", "40.4%", "98", "90%"]
    assert by_name["`nvjet_tst_128x256`"] == ["`nvjet_tst_128x256`", "60.0%", "9"]
    assert "lever gradients: 2.2e+04 tokens/s / 2e+04 tokens/s of none = 1.1" in page
    assert "- failed: `tests/gpu/test_a.py::test_b`" in page
    assert "text-transformers" not in page
    kept = json.loads((results / "gpu-step_3b.json").read_text())["cases"]
    assert kept["text-transformers"] == {"failed": "RuntimeError: no room in else.py"}
    assert kept["text-bf16"] == step(3e4)
    shown = {line.split("(images/")[1].rstrip(")") for line in page.splitlines() if "(images/" in line}
    assert shown == {path.name for path in (docs / "images").iterdir()} == {
        "gpu-step.png", "gpu-where.png", "gpu-loss.png", "gpu-levers.png"
    }  # fmt: skip
    (docs / "performance.md").write_text(page + "\nAfter.\n")
    assert call() == page + "\nAfter.\n"


def test_kernels_have_a_family() -> None:
    """Names as cuBLAS, cuDNN, Transformer Engine, Triton and torch give them."""
    names = {
        "nvjet_tst_256x128_64x4_2x1_v_bz_coopA_NNT": "matrix products",
        "cutlass::device_kernel<at::cuda::detail::enable_3x_kernel_for_sm9x<cutlass::gemm": "matrix products",
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_6_64x128": "attention",
        "void transformer_engine::normalization::rmsnorm_fwd_tuned_kernel<": "norms",
        "void transformer_engine::quantize_helpers::cast_transpose_kernel": "FP8 casts",
        "void transformer_engine::multi_tensor_adam::MultiTensorApply": "optimizer",
        "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add": "elementwise",
        "void at::native::(anonymous namespace)::conv_depthwise2d_backward_kernel<3": "convolutions",
        "Memcpy DtoD (Device -> Device)": "copies",
        "_cross_entropy_kernel": "loss",
        "who_knows": "other",
    }
    assert {name: pictures.family(name) for name in names} == names
    found = pictures.shares(KERNELS)
    assert sum(found.values()) == pytest.approx(1)
    assert found["idle"] == pytest.approx(0.1)
    assert found["other"] == pytest.approx(0.09)


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


def test_words_can_be_predicted() -> None:
    """Images stay where they were, labels are the next words, and a word is followed by four others at most."""
    config = workload.recipe("mm1-3b", True, "data.seq_length=1024")
    batch, _ = workload.microbatch(config, ["interleaved", "caption"], seed=0)
    changed = fp8_loss.predictable(batch, workload.layout_of(config).image_token_id, seed=0)
    image = batch.tokens == workload.layout_of(config).image_token_id
    assert torch.equal(image, changed.tokens == workload.layout_of(config).image_token_id)
    words = ~image[:, 1:] & ~image[:, :-1]
    assert torch.equal(changed.labels[:, :-1][words], changed.tokens[:, 1:][words])
    followers: dict[int, set[int]] = {}
    for word, label in zip(changed.tokens[:, :-1][words].tolist(), changed.labels[:, :-1][words].tolist(), strict=True):
        followers.setdefault(word, set()).add(label)
    assert max(map(len, followers.values())) <= len(fp8_loss.CHANCES)
    assert changed.tokens.max() < config.model.decoder.vocab_size


# Cases that run the same code as one of these are left out.
TOY = {
    "step_3b": ["mix-bf16", "mix-bf16-two", "text-bare", "text-transformers", "images-transformers"],
    "moe": ["experts-bf16"],
    "memory": ["3b"],
    "data_wait": ["cpu-8-workers"],
    "levers": ["two+mlp", "fp8"],
    "vit": ["te-16", "te-16-fp8", "transformers-16", "connector-16-channels-last", "connector-16-compiled"],
    "fp8_loss": ["experts-bf16", "tensorwise"],
}


def test_every_script_runs_on_toy_sizes() -> None:
    """In one process, which imports torch and Megatron-Core once. Nothing is written."""
    before = {path: hashlib.sha256(path.read_bytes()).digest() for path in kit.RESULTS.glob("*")}
    code = (
        "import json, runpy, sys\n"
        "folder, chosen = sys.argv[1:]\n"
        "sys.path.insert(0, folder)\n"
        "for name, only in json.loads(chosen).items():\n"
        "    sys.argv = [f'{folder}/{name}.py', '--smoke', *(['--only', *only] if only else [])]\n"
        "    runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    chosen = json.dumps({name: TOY.get(name) for name in run.SCRIPTS})
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", code, str(GPU), chosen], env=environment, capture_output=True, text=True, timeout=280,
        cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for name in run.SCRIPTS:
        assert f"{name}: runs, " in done.stdout, name
    assert {path: hashlib.sha256(path.read_bytes()).digest() for path in kit.RESULTS.glob("*")} == before
