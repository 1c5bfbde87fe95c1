"""The example on real data as its README says it, on a small part: packages → sources → a look at them → training."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from megatron_mm.data.source import Source
from tests.unit.data.pages import Page

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "debian_mix"
FEW_STEPS = (
    "training.steps=2 training.log_interval=1 training.validation_interval=0 training.global_batch_size=4 "
    "training.micro_batch_size=2 data.num_workers=0"
)


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def run(command: str, folder: Path) -> str:
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=folder, env=environment(), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout + done.stderr


@pytest.mark.timeout(2400)
def test_the_readmes_commands(tmp_path: Path) -> None:
    for folder in ("examples", "tools"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    blocks = re.findall(r"^```bash\n(.*?)^```", (EXAMPLE / "README.md").read_text(), re.M | re.S)
    assert len(blocks) == 3
    assert "prepare.py --output" in blocks[0]
    blocks[0] = blocks[0].replace("prepare.py --output", "prepare.py --smoke --output")
    blocks[2] = blocks[2].replace("config.yaml", f"config.yaml {FEW_STEPS}")
    told = [run(block, tmp_path) for block in blocks]

    data = tmp_path / "runs" / "debian_mix" / "data"
    captions, pages, text = (Source(data / name) for name in ("captions", "pages", "text"))
    lines = [json.loads(line) for line in (data / "captions.jsonl").read_text().splitlines()]
    assert len(captions) == len(lines) > 1000
    assert {"image": "emoji/1f345.png", "text": " tomato"} in lines
    with Image.open(data / "emoji" / "1f345.png") as tomato:
        red, green, blue = tomato.getpixel((tomato.width // 2, tomato.height // 2))  # type: ignore[misc]
    assert red > 2 * max(green, blue)
    assert len(pages) > 20
    assert pages.image_counts.min() >= 1  # MM1's filter
    assert text.kind == "text"
    assert len(text) == 4000
    assert (data / "text.jsonl").read_text().startswith('{"text": "entity (noun): that which is perceived or known')

    page = Page(tmp_path / "runs" / "debian_mix" / "pages.html")
    shown = "".join(article.text for section in page.sections for article in section.articles)
    assert len(page.sections) == 20
    assert "DBSCAN" in shown
    assert "Toggle Menu" not in shown  # the site's own furniture
    assert "Previous" not in shown
    assert len(Page(tmp_path / "runs" / "debian_mix" / "sequences.html").sections) == 12
    assert (tmp_path / "runs" / "debian_mix" / "plots.png").stat().st_size > 20_000
    assert told[1].count(": whole; ") == 3
    assert "finished after step 2" in told[2]

    again = run(f"python examples/debian_mix/prepare.py --smoke --output {data}", tmp_path)
    assert "MB in" not in again, "packages are fetched once"


def test_without_apt_it_says_so(tmp_path: Path) -> None:
    command = [sys.executable, EXAMPLE / "prepare.py", "--output", tmp_path / "data"]
    env = environment() | {"PATH": "/nowhere"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=180)
    assert done.returncode == 2
    assert "apt-get: this example takes its data from Debian packages" in done.stderr


def test_an_unknown_package_says_what_to_do(tmp_path: Path) -> None:
    """A real apt that knows no package."""
    (tmp_path / "apt.conf").write_text(f'Dir::State "{tmp_path}"; Dir::Etc "{tmp_path}"; Dir::Cache "{tmp_path}";')
    (tmp_path / "lists").mkdir()
    command = [sys.executable, EXAMPLE / "prepare.py", "--smoke", "--output", tmp_path / "data"]
    env = environment() | {"APT_CONFIG": str(tmp_path / "apt.conf")}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=180)
    assert done.returncode == 2, done.stdout
    assert "cannot download the package fonts-noto-color-emoji" in done.stderr
    assert "apt-get update" in done.stderr
    assert not (tmp_path / "data" / "packages" / "fonts-noto-color-emoji").exists()
