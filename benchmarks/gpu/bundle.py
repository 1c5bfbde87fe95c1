"""Folders of packages as compressed parts with checksums, and back.

    bundle.py stage WHEELS STAGE    wheels → STAGE/base, /megatron-core-VERSION, /te, /dali: one folder a group
    bundle.py seal STAGE DEST       each group → NAME.tar.xz in parts, dealt to DEST/bundle-1, bundle-2, …
    bundle.py open BUNDLE SITE      add a bundle's parts; each group whose parts are all there → SITE/NAME

Wants nothing but Python's own library. Every bundle has the SHA-256 sums of all parts, so that any of them tells what
is missing.
"""

import hashlib
import io
import lzma
import os
import re
import shutil
import sys
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

MIB = 1 << 20
PART = int(os.environ.get("PART_KIB", 6 << 10)) << 10  # bytes; small ones fill bundles evenly
BUNDLE = int(os.environ.get("BUNDLE_MIB", 58)) * MIB  # at most
SUMS = "SHA256SUMS"
_DALI = re.compile(r"nvidia_|(astunparse|gast|libcst|makefun|nvtx|optree|six)-")


def group(wheel: str) -> str:
    """Which folder a wheel goes to. Groups come and go alone; the two releases of Megatron-Core exclude each other."""
    if wheel.startswith("megatron_core-"):
        return "megatron-core-" + wheel.split("-")[1]
    if wheel.startswith("transformer_engine"):
        return "te"
    return "dali" if _DALI.match(wheel) else "base"


def stage(wheels: Path, folder: Path) -> None:
    """Install wheels without pip: any platform's, on any platform. Sources (*.tar.gz) go to te/source as they are."""
    for wheel in sorted(wheels.glob("*.whl")):
        target = folder / group(wheel.name)
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(target)
        for data in target.glob("*.data"):
            for part in data.iterdir():
                scripts = part.name == "scripts"
                if scripts:
                    for script in part.iterdir():
                        script.chmod(0o755)
                if scripts or part.name in ("purelib", "platlib"):
                    shutil.copytree(part, target / "bin" if scripts else target, dirs_exist_ok=True)
            shutil.rmtree(data)
    for source in wheels.glob("*.tar.gz"):
        (folder / "te/source").mkdir(parents=True, exist_ok=True)
        shutil.copy(source, folder / "te/source")


def _pack(folder: Path, into: Path) -> list[Path]:
    """Parts of the folder's archive; the same bytes for the same contents."""
    whole = into / f"{folder.name}.tar.xz"
    with lzma.LZMAFile(whole, "wb", preset=6) as stream, tarfile.open(fileobj=stream, mode="w|") as tar:
        for path in sorted(folder.rglob("*")):
            entry = tar.gettarinfo(path, str(path.relative_to(folder)))
            entry.uid = entry.gid = entry.mtime = 0
            entry.uname = entry.gname = ""
            with path.open("rb") if entry.isreg() else open(os.devnull, "rb") as content:
                tar.addfile(entry, content)
    parts: list[Path] = []
    with whole.open("rb") as file:
        while piece := file.read(PART):
            parts.append(into / f"{whole.name}.{len(parts):03d}")
            parts[-1].write_bytes(piece)
    whole.unlink()
    return parts


def seal(staged: Path, dest: Path) -> None:
    if dest.exists() and any(dest.iterdir()):
        sys.exit(f"error: {dest} is not empty")
    work = dest / "parts"
    work.mkdir(parents=True)
    folders = sorted((p for p in staged.iterdir() if p.is_dir()), key=lambda p: (p.name == "dali", p.name))
    with ThreadPoolExecutor(2) as pool:  # compression leaves Python's lock
        packed = list(pool.map(lambda folder: _pack(folder, work), folders))
    number, room = 0, 0
    sums = []
    for parts in packed:
        print(f"{parts[0].name.split('.tar')[0]}: {sum(p.stat().st_size for p in parts) / MIB:.1f} MiB", flush=True)
        for part in parts:
            if part.stat().st_size > room:
                number, room = number + 1, BUNDLE
                (dest / f"bundle-{number}").mkdir()
            room -= part.stat().st_size
            sums.append(f"{_sha256(part)}  {part.name}\n")
            part.rename(dest / f"bundle-{number}" / part.name)
    work.rmdir()
    for bundle in dest.iterdir():
        (bundle / SUMS).write_text("".join(sums))
        print(f"{bundle.name}: {sum(p.stat().st_size for p in bundle.iterdir()) / MIB:.1f} MiB", flush=True)


def open_bundle(bundle: Path, site: Path) -> bool:
    """Whether every group is open now."""
    parts = site / "parts"
    parts.mkdir(parents=True, exist_ok=True)
    if not (bundle / SUMS).is_file():
        sys.exit(f"error: {bundle} is no bundle: it has no {SUMS}")
    if (parts / SUMS).exists() and (parts / SUMS).read_bytes() != (bundle / SUMS).read_bytes():
        sys.exit(f"error: {bundle} was packed apart from what {site} holds\n  do: open the bundles of one packing")
    shutil.copy(bundle / SUMS, parts)
    groups: dict[str, dict[str, str]] = {}
    for line in (parts / SUMS).read_text().splitlines():
        digest, name = line.split("  ")
        groups.setdefault(name.split(".tar.xz")[0], {})[name] = digest
    for part in bundle.glob("*.tar.xz.*"):
        wanted = groups.get(part.name.split(".tar.xz")[0], {}).get(part.name)
        if _sha256(part) != wanted:
            sys.exit(f"error: {part} is damaged: its SHA-256 is not the packed one\n  do: bring that bundle again")
        if not _opened(site, part.name.split(".tar.xz")[0]):
            shutil.copy(part, parts)
    complete = True
    for name, wanted_parts in groups.items():
        if _opened(site, name):
            continue
        missing = [part for part in wanted_parts if not (parts / part).exists()]
        if missing:
            complete = False
            print(f"{name}: {len(wanted_parts) - len(missing)} of {len(wanted_parts)} parts here", flush=True)
            continue
        _join([parts / part for part in wanted_parts], site / name)
        print(f"{name}: opened", flush=True)
    return complete


def _opened(site: Path, name: str) -> bool:
    return (site / name).is_dir()


class _Joined(io.RawIOBase):
    """Parts read as one file."""

    def __init__(self, parts: list[Path]) -> None:
        self._parts = iter(parts)
        self._file: IO[bytes] = io.BytesIO()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            content = self._file.read(len(buffer))
            if content:
                buffer[: len(content)] = content
                return len(content)
            self._file.close()
            part = next(self._parts, None)
            if part is None:
                self._file = io.BytesIO()
                return 0
            self._file = part.open("rb")


def _join(parts: list[Path], target: Path) -> None:
    """In its place at once, when whole."""
    half = target.with_name(target.name + ".opening")
    shutil.rmtree(half, ignore_errors=True)
    joined = io.BufferedReader(_Joined(parts), MIB)
    with lzma.LZMAFile(joined) as whole, tarfile.open(fileobj=whole, mode="r|", bufsize=MIB) as tar:
        tar.extractall(half, filter="tar")
    half.rename(target)
    for part in parts:
        part.unlink()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main() -> None:
    match sys.argv[1:]:
        case ["stage", wheels, folder]:
            stage(Path(wheels), Path(folder))
        case ["seal", staged, dest]:
            seal(Path(staged), Path(dest))
        case ["open", bundle, site]:
            sys.exit(0 if open_bundle(Path(bundle), Path(site)) else 3)
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main()
