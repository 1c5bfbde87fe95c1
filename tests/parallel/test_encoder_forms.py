"""The encoder's images end to end in one row, as FP8 takes them, against the plain batch: through the local layers,
with a mask for the borders. (Through Transformer Engine's own: tests/gpu.)"""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.parallel.encoder_forms import IMAGES
from tests.parallel.recipes import write_config
from tests.ranks import ROOT, run_ranks

# 25 positions an image, 26 with a class token: rows without padding, with little, with more than an image.
TILES = (1, 16, 32, 128)


@pytest.mark.parametrize(
    ("family", "recompute"), [("clip", False), ("siglip", False), ("dinov2", False), ("dinov2", True)]
)
def test_one_row_is_the_batch(tmp_path: Path, family: str, recompute: bool) -> None:
    config = write_config(tmp_path / "c.yaml", tmp_path, {}, vision={"family": family}, recompute=recompute)
    script = str(ROOT / "tests/parallel/encoder_forms.py")
    run_ranks(1, [script, str(config), str(tmp_path), "plain", *map(str, TILES)], tmp_path / "logs")
    for images in IMAGES:
        plain = load_file(tmp_path / f"{images}-plain.safetensors")
        assert plain["features"].shape == (images, 25, 48)
        assert len(plain) > 20
        for tile in TILES:
            row = load_file(tmp_path / f"{images}-{tile}.safetensors")
            assert row.keys() == plain.keys()
            for name, expected in plain.items():
                assert (row[name] - expected).norm() <= 1e-6 * expected.norm(), (images, tile, name)
