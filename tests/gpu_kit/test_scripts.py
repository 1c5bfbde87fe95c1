"""What the scripts measure, and that each of them runs on toy sizes."""

import hashlib
import json
import os
import subprocess
import sys

import fp8_loss
import kit
import pytest
import run
import torch
import workload

from tests.gpu_kit import GPU, ROOT


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
        [sys.executable, "-c", code, str(GPU), chosen], env=environment, capture_output=True, text=True, timeout=800,
        cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for name in run.SCRIPTS:
        assert f"{name}: runs, " in done.stdout, name
    assert {path: hashlib.sha256(path.read_bytes()).digest() for path in kit.RESULTS.glob("*")} == before
