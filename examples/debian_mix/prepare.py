"""Real pictures and real text out of Debian packages: captions, pages with pictures, and plain text.

    python examples/debian_mix/prepare.py --output runs/debian_mix/data

    packages/NAME/    the packages, unpacked; nothing is installed, and no right of root is needed
    captions.jsonl    clip art with its title, description and keywords; emoji with their Unicode names
    manuals/          HTML pages of the GIMP and scikit-learn manuals with their pictures, for `--format html`
    text.jsonl        Python's documentation, a file a line, and WordNet, an entry a line

Packages that are already there are not fetched again. Licences stand in packages/*/usr/share/doc/*/copyright: public
domain (openclipart; drawings under other licences are left out), OFL (Noto emoji), GFDL (GIMP's manual), BSD
(scikit-learn), PSF (Python), WordNet.
"""

import argparse
import html
import json
import os
import re
import shutil
import subprocess
import time
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from megatron_mm.errors import UserError, run_cli

CAPTIONS = ("openclipart-png", "openclipart-svg", "fonts-noto-color-emoji")
PAGES = {  # package → the folder of its manual, and which of its files are pages
    "gimp-help-en": ("usr/share/gimp/2.0/help/en", ("*.html",)),
    "python-sklearn-doc": (
        "usr/share/doc/python-sklearn-doc/html",
        ("*.html", "modules/*.html", "tutorial/**/*.html", "auto_examples/**/*.html"),  # all but one page a function
    ),
}
TEXT = ("python3.11-doc", "wordnet-base")
SMOKE_PACKAGES = ("fonts-noto-color-emoji", "python-sklearn-doc", "wordnet-base")  # 67 MB instead of 285
SMOKE_PAGES = ("auto_examples/cluster/*.html",)
SMOKE_LINES = 4000  # of WordNet

# Open Clip Art: folders where hundreds of drawings share a title (icon themes, stars by formula, playing cards).
SERIES = ("computer/icons", "shapes/stars", "recreation/games/cards", "special/gradients")
MAX_SAME_TITLE = 3
NO_WORDS = frozenset(("", "hash", "unsorted", "clip_art", "clip art", "clipart", "image", "media", "png", "svg"))
EMOJI = ((0x2300, 0x27C0), (0x2B00, 0x2C00), (0x1F000, 0x1FB00))  # blocks of Unicode that hold pictures
EMOJI_SIZE = 109  # pixels; the one size that the font has


def fetch(packages: Iterable[str], folder: Path) -> None:
    """Download and unpack Debian packages into folder/NAME.

    Raises:
        UserError: this is no Debian, a package is unknown or cannot be downloaded.
    """
    for tool in ("apt-get", "dpkg-deb"):
        if not shutil.which(tool):
            raise UserError(
                "this example takes its data from Debian packages", where=tool, found="no such command",
                do="run it on Debian or Ubuntu, or in a container of them",
            )  # fmt: skip
    missing = [name for name in packages if not (folder / name).is_dir()]
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(missing, 1):
        print(f"[{number}/{len(missing)}] {name}", flush=True)
        started, partial = time.monotonic(), folder / f"{name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        download = ["apt-get", "-o", "Acquire::Retries=5", "download", "-q", name]
        _call(download, partial, f"cannot download the package {name}")
        [archive] = partial.glob("*.deb")
        size = archive.stat().st_size
        _call(["dpkg-deb", "-x", archive.name, "files"], partial, f"cannot unpack the package {name}")
        (partial / "files").rename(folder / name)
        shutil.rmtree(partial)
        print(f"  {size / 1e6:.0f} MB in {time.monotonic() - started:.0f} s", flush=True)


def _call(command: list[str], cwd: Path, fault: str) -> None:
    """Run a command whose own progress is shown; its errors become ours."""
    done = subprocess.run(command, cwd=cwd, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise UserError(
            fault, where=" ".join(command), found=done.stderr.strip()[-1000:] or f"exit code {done.returncode}",
            do="check the network; where apt does not know the package: sudo apt-get update",
        )  # fmt: skip


def clip_art(packages: Path) -> Iterator[tuple[Path, str]]:
    """Pictures and captions of Open Clip Art, from the metadata of the drawings that the pictures were made of."""
    drawings = packages / "openclipart-svg/usr/share/openclipart/svg"
    pictures = packages / "openclipart-png/usr/share/openclipart/png"
    found: list[tuple[Path, str, str]] = []
    for drawing in sorted(drawings.rglob("*.svg")):
        name = drawing.relative_to(drawings)
        picture = pictures / name.with_suffix(".png")
        if name.as_posix().startswith(SERIES) or not picture.is_file():
            continue
        block = re.search(r"<metadata.*?</metadata>", drawing.read_text(errors="replace"), re.DOTALL)
        if block and re.search(r'<cc:license rdf:resource="[^"]*/public ?domain/?"', block[0], re.IGNORECASE):
            found.append((picture, _field(block[0], "title"), block[0]))
    used = Counter(title.lower() for _, title, _ in found)
    for picture, title, metadata in found:
        if title and used[title.lower()] <= MAX_SAME_TITLE:
            yield picture, _caption(title, metadata)


def _field(metadata: str, name: str) -> str:
    match = re.search(rf"<dc:{name}>([^<]*)</dc:{name}>", metadata)
    return _clean(match[1]) if match else ""


def _clean(text: str) -> str:
    text = re.sub(r"HASH\(0x\w+\)|https?://\S+|\S+@\S+", "", html.unescape(text))
    text = re.sub(r"^clipart by [^-]+ - ", "", text.strip(), flags=re.IGNORECASE)
    return re.sub(r"(?<=[a-z])\d+$", "", " ".join(text.replace("_", " ").split()))  # numbers of copies


def _caption(title: str, metadata: str) -> str:
    description = _field(metadata, "description")
    agents = re.findall(r"<cc:Agent[^>]*>\s*<dc:title>([^<]*)</dc:title>", metadata)  # who drew and who published it
    no_words = NO_WORDS | {_clean(agent).lower() for agent in agents}
    found = dict.fromkeys(_clean(word) for word in re.findall(r"<rdf:li>([^<]*)</rdf:li>", metadata))
    words = [w for w in found if w.lower() not in no_words and not re.fullmatch(r"[0-9a-fx]*\d\w*", w)]
    caption = title[0].upper() + title[1:]
    if description and description.lower() != title.lower():
        caption += f". {description}".rstrip(".")
    return f" {caption}. Keywords: {', '.join(words)}." if words else f" {caption}."


def emoji(packages: Path, folder: Path) -> Iterator[tuple[Path, str]]:
    """Draw each emoji of Noto into `folder`; its caption is its name in Unicode."""
    path = packages / "fonts-noto-color-emoji/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
    font = ImageFont.truetype(str(path), EMOJI_SIZE)
    folder.mkdir(exist_ok=True)
    for number in (n for first, last in EMOJI for n in range(first, last)):
        name = unicodedata.name(chr(number), "")
        if not name or name.startswith(("REGIONAL INDICATOR", "EMOJI MODIFIER")):
            continue
        width, height = (int(side) for side in font.getbbox(chr(number))[2:])
        if not width or not height:
            continue
        image = Image.new("RGB", (width, height), "white")
        ImageDraw.Draw(image).text((0, 0), chr(number), font=font, embedded_color=True)
        if image.getcolors(1):  # white all over: the font has no picture of it
            continue
        image.save(folder / f"{number:x}.png")
        yield folder / f"{number:x}.png", f" {name.lower()}"


def copy_pages(source: Path, patterns: Iterable[str], target: Path) -> int:
    """The pages, and every picture below the folder, under the same names; as hard links where the disk has them."""
    pages = {page for pattern in patterns for page in source.glob(pattern)}
    pictures = {file for file in source.rglob("*") if file.suffix.lower() in (".png", ".jpg", ".jpeg", ".gif")}
    shutil.rmtree(target, ignore_errors=True)
    for file in sorted(file for file in pages | pictures if file.is_file()):
        copy = target / file.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(file.resolve(), copy)
        except OSError:
            shutil.copyfile(file, copy)
    return len(pages)


def python_documentation(packages: Path) -> Iterator[str]:
    """Its sources as their authors wrote them (reStructuredText), each once."""
    seen = set()
    for file in sorted((packages / "python3.11-doc/usr/share/doc/python3.11").rglob("_sources/**/*.rst.txt")):
        text = file.read_text(errors="replace").strip() + "\n"
        if text not in seen:
            seen.add(text)
            yield text


def wordnet(packages: Path) -> Iterator[str]:
    """`dog, domestic dog (noun): a member of the genus Canis …; "the dog barked all night"`"""
    for part in ("noun", "verb", "adj", "adv"):
        for line in (packages / f"wordnet-base/usr/share/wordnet/data.{part}").read_text().splitlines():
            if line.startswith(" "):  # the licence
                continue
            fields, _, gloss = line.partition(" | ")
            columns = fields.split()
            words = columns[4 : 4 + 2 * int(columns[3], 16) : 2]
            named = ", ".join(re.sub(r"\(\w+\)$", "", word).replace("_", " ") for word in words)
            kind = {"adj": "adjective", "adv": "adverb"}.get(part, part)
            yield f"{named} ({kind}): {gloss.strip()}\n"


def write_jsonl(path: Path, records: Iterable[dict[str, Any]]) -> None:
    temporary, lines = path.with_name(path.name + ".partial"), 0
    with temporary.open("w") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
            lines += 1
    temporary.replace(path)
    print(f"  {path}: {lines} lines", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder, made if absent")
    parser.add_argument("--smoke", action="store_true", help="a small part, of 67 MB instead of 285 MB of packages")
    args = parser.parse_args()
    out, packages = args.output, args.output / "packages"
    fetch(SMOKE_PACKAGES if args.smoke else (*CAPTIONS, *PAGES, *TEXT), packages)

    print("captions", flush=True)
    pairs = chain(() if args.smoke else clip_art(packages), emoji(packages, out / "emoji"))
    write_jsonl(out / "captions.jsonl", ({"image": str(path.relative_to(out)), "text": text} for path, text in pairs))
    print("pages", flush=True)
    for name, (folder, patterns) in PAGES.items():
        if (packages / name).is_dir() and not (args.smoke and name not in SMOKE_PACKAGES):
            patterns = SMOKE_PAGES if args.smoke else patterns
            count = copy_pages(packages / name / folder, patterns, out / "manuals" / name)
            print(f"  {out / 'manuals' / name}: {count} pages", flush=True)
    print("text", flush=True)
    entries = wordnet(packages)
    texts = islice(entries, SMOKE_LINES) if args.smoke else chain(python_documentation(packages), entries)
    write_jsonl(out / "text.jsonl", ({"text": text} for text in texts))


if __name__ == "__main__":
    run_cli(main)
