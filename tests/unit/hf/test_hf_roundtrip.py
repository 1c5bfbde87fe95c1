"""Tensors keep every bit on the way out and back; exported folders load with the library's own means."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from transformers import AutoModelForImageTextToText, AutoProcessor

import megatron_mm.hf  # noqa: F401 (registers the classes)
from megatron_mm.config import config_from_dict, config_to_dict
from megatron_mm.data.tokenizer import open_tokenizer
from megatron_mm.errors import UserError
from megatron_mm.hf.exporter import export_tensors, hf_config
from megatron_mm.hf.importer import check_same_model, import_hf
from megatron_mm.hf.mapping import rules
from megatron_mm.training.checkpoint_files import read_tensors, write_tensors
from tests.unit.hf.sample import VARIANTS, DictSource, megatron_tensors, run_config

ROOT = Path(__file__).resolve().parents[3]


def assert_bit_equal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_rule_is_its_own_inverse(variant, dtype, tokenizer_file):
    run = run_config(variant)
    tensors = {name: tensor.to(dtype) for name, tensor in megatron_tensors(run).items()}
    table = list(rules(hf_config(run.model, open_tokenizer(tokenizer_file), 256)))
    assert {rule.megatron for rule in table} == tensors.keys()
    names = [name for rule in table for name in rule.hf]
    assert len(names) == len(set(names))
    assert_bit_equal({r.megatron: r.join(list(r.split(tensors[r.megatron]))) for r in table}, tensors)


@pytest.mark.parametrize("variant", VARIANTS)
def test_export_load_save_import(variant, exported, tmp_path):
    """Also through the library: its loading and saving neither drop, add, rename nor change a tensor."""
    folder = exported(variant)
    assert_bit_equal(dict(import_hf(folder)), megatron_tensors(run_config(variant)))
    model, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert type(model).__name__ == "MegatronMMForConditionalGeneration"
    model.save_pretrained(tmp_path / "again")
    AutoProcessor.from_pretrained(folder).save_pretrained(tmp_path / "again")
    with (
        safe_open(folder / "model.safetensors", "pt") as ours,
        safe_open(tmp_path / "again/model.safetensors", "pt") as theirs,
    ):
        assert set(ours.keys()) == set(theirs.keys())
    assert_bit_equal(dict(import_hf(tmp_path / "again")), megatron_tensors(run_config(variant)))


def test_dtype_is_kept(tokenizer_file, tmp_path):
    run = run_config("qwen3")
    tensors = {name: tensor.bfloat16() for name, tensor in megatron_tensors(run).items()}
    export_tensors(DictSource(run, tensors), tokenizer_file, tmp_path / "out")
    assert AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.bfloat16
    assert_bit_equal(dict(import_hf(tmp_path / "out")), tensors)


def test_many_files(tokenizer_file, tmp_path, exported):
    run = run_config("qwen3 moe")
    tensors = megatron_tensors(run)
    export_tensors(DictSource(run, tensors), tokenizer_file, tmp_path / "out", max_file_bytes=100_000)
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert all((tmp_path / "out" / name).stat().st_size < 120_000 for name in files)
    assert_bit_equal(dict(import_hf(tmp_path / "out")), tensors)
    split = AutoModelForImageTextToText.from_pretrained(tmp_path / "out").state_dict()
    assert_bit_equal(split, AutoModelForImageTextToText.from_pretrained(exported("qwen3 moe")).state_dict())


def test_importing_hf_needs_no_megatron():
    """Neither Megatron-Core nor the training side is touched by loading and running an exported model."""
    code = (
        "import sys, megatron_mm.hf, megatron_mm.hf.exporter, megatron_mm.hf.importer, megatron_mm.evaluation.vqa\n"
        "assert not [m for m in sys.modules if m.split('.')[0] == 'megatron']\n"
        "assert 'megatron_mm.training.checkpoint' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def convert(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "tools/convert_checkpoint.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)


@pytest.fixture
def checkpoint(tokenizer_file, tmp_path):
    """A run's folder with one checkpoint on disk."""
    run = run_config("qwen3 moe")
    path = tmp_path / "run/checkpoints/step-00000007"
    extra = {"tokenizer": "tokenizer.model"}
    write_tensors(path, run, megatron_tensors(run), extra, tokenizer=tokenizer_file, max_file_bytes=100_000)
    return path


def test_command_out_and_back(checkpoint, tmp_path):
    done = convert("to-hf", "--checkpoint", checkpoint.parents[1], "--output", tmp_path / "hf")
    assert done.returncode == 0, done.stderr
    assert str(checkpoint) in done.stdout
    config = checkpoint / "config.yaml"
    done = convert("from-hf", "--model", tmp_path / "hf", "--config", config, "--output", tmp_path / "back")
    assert done.returncode == 0, done.stderr
    before, after = (
        {name: reader.tensor(name) for name in list(reader.keys())}
        for reader in (read_tensors(checkpoint), read_tensors(tmp_path / "back"))
    )
    assert_bit_equal(after, before)
    assert (tmp_path / "back/tokenizer.model").read_bytes() == (checkpoint / "tokenizer.model").read_bytes()


def test_command_missing_checkpoint(tmp_path):
    done = convert("to-hf", "--checkpoint", tmp_path / "nothing", "--output", tmp_path / "hf")
    assert done.returncode == 2
    assert "no checkpoint here" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "hf").exists()


def test_command_truncated_checkpoint(checkpoint, tmp_path):
    file = sorted(checkpoint.glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:-10])
    done = convert("to-hf", "--checkpoint", checkpoint, "--output", tmp_path / "hf")
    assert done.returncode == 2
    assert file.name in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("hf*"))


def test_output_already_there(exported, tokenizer_file):
    run = run_config("qwen3")
    with pytest.raises(UserError, match="already there"):
        export_tensors(DictSource(run, megatron_tensors(run)), tokenizer_file, exported("qwen3"))


def test_failure_leaves_nothing(tokenizer_file, tmp_path):
    class Failing(DictSource):
        def tensor(self, name):
            if "final_layernorm" in name:
                raise OSError("disk fell off")
            return super().tensor(name)

    run = run_config("qwen3")
    with pytest.raises(OSError, match="fell off"):
        export_tensors(Failing(run, megatron_tensors(run)), tokenizer_file, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("change", ["missing", "unknown"])
def test_wrong_tensors(change, tokenizer_file, tmp_path):
    run = run_config("qwen3")
    tensors = megatron_tensors(run)
    name = "language_model.decoder.layers.3.mlp.linear_fc2.weight"
    if change == "missing":
        del tensors[name]
    else:
        tensors[name.replace("3", "4")] = tensors[name]
    with pytest.raises(UserError, match=r"linear_fc2") as caught:
        export_tensors(DictSource(run, tensors), tokenizer_file, tmp_path / "out")
    assert ("without" if change == "missing" else "unknown") in str(caught.value)


def test_llama_with_some_expert_layers_has_no_family(tokenizer_file, tmp_path):
    run = run_config("llama", moe={"num_experts": 4, "layer_freq": 2})
    with pytest.raises(UserError, match=r"no Hugging Face family.*") as caught:
        export_tensors(DictSource(run, megatron_tensors(run)), tokenizer_file, tmp_path / "out")
    assert "layer_freq" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_vocabulary_smaller_than_tokenizer(tokenizer_file, tmp_path):
    run = run_config("qwen3", vocab_size=200)
    with pytest.raises(UserError, match=r"model.decoder.vocab_size: the vocabulary is smaller"):
        export_tensors(DictSource(run, megatron_tensors(run)), tokenizer_file, tmp_path / "out")


def test_tokenizer_missing(tmp_path):
    run = run_config("qwen3")
    with pytest.raises(UserError, match="cannot read the tokenizer"):
        export_tensors(DictSource(run, megatron_tensors(run)), tmp_path / "none.model", tmp_path / "out")


def test_import_of_a_damaged_folder(tokenizer_file, tmp_path):
    run = run_config("qwen3")
    folder = tmp_path / "out"
    export_tensors(DictSource(run, megatron_tensors(run)), tokenizer_file, folder)
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"model\.safetensors: cannot read"):
        dict(import_hf(folder))
    file.unlink()
    with pytest.raises(UserError, match=r"model\.safetensors: cannot read"):
        dict(import_hf(folder))
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "llava"}))
    with pytest.raises(UserError, match="not a model of this stack"):
        dict(import_hf(folder))
    config.unlink()
    with pytest.raises(UserError, match="not an exported model"):
        dict(import_hf(folder))


def test_import_checks_the_run(exported):
    check_same_model(exported("qwen3 gqa"), run_config("qwen3 gqa"))
    with pytest.raises(UserError, match=r"text_config.num_key_value_heads: 2 in the folder, 1 in the config"):
        check_same_model(exported("qwen3 gqa"), run_config("qwen3 gqa", num_query_groups=1))
    with pytest.raises(UserError, match=r"text_config.model_type"):
        check_same_model(exported("qwen3"), run_config("llama"))


@torch.no_grad()
@pytest.mark.parametrize("size", [20, 36])
@pytest.mark.parametrize("variant", ["qwen3", "siglip second last", "dinov2", "attention pool", "average pool"])
def test_an_export_at_another_resolution(variant, size, exported, tokenizer_file, tmp_path):
    """from-hf and to-hf: the logits are those of the library's own interpolation of positions."""
    fields = config_to_dict(run_config(variant))
    fields["model"]["vision"]["image_size"] = size
    run, grid = config_from_dict(fields), size // 4
    folder = exported(variant)
    check_same_model(folder, run)
    given = dict(import_hf(folder, run.model.vision))
    before = megatron_tensors(run_config(variant))
    changed = {name for name, tensor in before.items() if not torch.equal(given[name], tensor)}
    export_tensors(DictSource(run, given), tokenizer_file, tmp_path / "out")
    low, high = (
        AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()
        for path in (folder, tmp_path / "out")
    )
    assert high.config.vision_config.image_size == size
    interpolate = {} if variant == "dinov2" else {"interpolate_pos_encoding": True}
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(2, 3, size, size, generator=generator)
    tokens = torch.randint(5, 300, (2, 20), generator=generator)
    tokens[:, 3:12] = low.config.image_token_id
    features = low.model.vision_tower(pixels, **interpolate).last_hidden_state[:, -(grid**2) :]
    module = low.model.connector
    module.grid = grid
    if hasattr(module, "position_embedding"):
        square = module.position_embedding.view(1, 7, 7, -1).permute(0, 3, 1, 2)
        scaled = F.interpolate(square, size=(grid, grid), mode="bicubic", align_corners=False)
        module.position_embedding = torch.nn.Parameter(scaled.permute(0, 2, 3, 1).reshape(1, grid**2, -1))
    embeddings = low.get_input_embeddings()(tokens)
    embeddings[:, 3:12] = module(features)
    wanted = low(inputs_embeds=embeddings).logits
    torch.testing.assert_close(high(input_ids=tokens, pixel_values=pixels).logits, wanted, atol=1e-5, rtol=1e-5)
    positions = {"vision.position_embeddings.weight", "connector.position_embedding"}
    assert changed == positions & before.keys()


def test_pixel_shuffle_keeps_its_squares(tokenizer_file, tmp_path):
    """Its weights are made for squares of so many patches."""
    fields = config_to_dict(run_config())
    fields["model"]["connector"] |= {"kind": "pixel_shuffle_mlp", "num_tokens": 49}
    run = config_from_dict(fields)
    export_tensors(DictSource(run, megatron_tensors(run)), tokenizer_file, tmp_path / "out")
    check_same_model(tmp_path / "out", run)
    fields["model"]["vision"]["image_size"] = 56
    with pytest.raises(UserError, match=r"connector\.grid: 7 in the folder, 14 in the config"):
        check_same_model(tmp_path / "out", config_from_dict(fields))


def test_command_says_that_it_interpolates(checkpoint, tmp_path):
    assert convert("to-hf", "--checkpoint", checkpoint, "--output", tmp_path / "hf").returncode == 0
    text = (checkpoint / "config.yaml").read_text()
    assert "image_size: 28" in text
    (tmp_path / "high.yaml").write_text(text.replace("image_size: 28", "image_size: 36"))
    for config, told in ((checkpoint / "config.yaml", False), (tmp_path / "high.yaml", True)):
        output = tmp_path / f"back-{told}"
        done = convert("from-hf", "--model", tmp_path / "hf", "--config", config, "--output", output)
        assert done.returncode == 0, done.stderr
        assert ("positions interpolated from a grid of 7 × 7 to 9 × 9" in done.stdout) == told
    assert read_tensors(tmp_path / "back-True").shape("vision.position_embeddings.weight") == (82, 24)
