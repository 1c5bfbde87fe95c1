"""The typed config: every rule refuses with field, find and remedy; YAML round trip; overrides; golden defaults."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_mm.config import RunConfig, check_layout, config_from_dict, config_to_dict, dump_yaml, load_config
from megatron_mm.errors import UserError

GOLDEN = Path(__file__).parents[1] / "golden" / "config_defaults.yaml"

MINIMAL: dict[str, Any] = yaml.safe_load("""
run_dir: runs/minimal
model:
  vision: {num_layers: 2, hidden_size: 32, num_attention_heads: 2, ffn_hidden_size: 64, patch_size: 8, image_size: 32}
  connector: {}
  decoder:
    {num_layers: 4, hidden_size: 64, num_attention_heads: 4, num_query_groups: 2, ffn_hidden_size: 128, vocab_size: 512}
data:
  tokenizer: data/tokenizer.model
  sources:
    - {path: data/captions, weight: 45}
    - {path: data/interleaved, weight: 45}
    - {path: data/text, weight: 10}
training: {steps: 10}
""")

MOE = "model.decoder.moe={num_experts: 4}"
TP = "parallel.tensor_model_parallel_size"
CP = "parallel.context_parallel_size"
PP = "parallel.pipeline_model_parallel_size"


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    return path


def refused(path: Path, *overrides: str) -> UserError:
    with pytest.raises(UserError) as caught:
        load_config(path, list(overrides))
    return caught.value


def test_defaults_are_golden() -> None:
    """A changed default must show up as a diff. Renew with: python -m tests.unit.test_config"""
    assert dump_yaml(config_from_dict(MINIMAL)) == GOLDEN.read_text()


@pytest.mark.parametrize(
    ("family", "activation", "epsilon", "mean", "positions"),
    [
        ("clip", "quick_gelu", 1e-5, 0.48145466, 17),
        ("siglip", "gelu_tanh", 1e-6, 0.5, 16),
        ("dinov2", "gelu", 1e-6, 0.485, 17),
    ],
)
def test_an_encoder_family_brings_its_values(minimal, family, activation, epsilon, mean, positions) -> None:
    """And a field that is set stays: a resolved config does not depend on the family's table again."""
    vision = load_config(minimal, [f"model.vision.family={family}"]).model.vision
    assert (vision.activation, vision.layernorm_epsilon, vision.image_mean[0]) == (activation, epsilon, mean)
    assert vision.num_positions == positions
    vision = load_config(minimal, [f"model.vision.family={family}", "model.vision.layernorm_epsilon=0.1"]).model.vision
    assert (vision.activation, vision.layernorm_epsilon) == (activation, 0.1)


def test_round_trip_through_yaml(minimal: Path, tmp_path: Path) -> None:
    config = load_config(
        minimal,
        [MOE, "parallel.sequence_parallel=true", f"{TP}=2", "optimizer.lr=3e-4", "data.sources.0.name=pairs",
         "model.vision.image_mean=[0.5, 0.5, 0.25]"],
    )  # fmt: skip
    again = tmp_path / "again.yaml"
    again.write_text(dump_yaml(config))
    assert load_config(again) == config
    assert config_from_dict(config_to_dict(config)) == config


def test_overrides(minimal: Path) -> None:
    config = load_config(
        minimal,
        ["training.steps=7", "optimizer.lr=1e-4", "data.sources.2.weight=20", "data.cache_dir=null",
         "checkpoint={interval: 5, asynchronous: false}", "model.decoder.moe.num_experts=8"],
    )  # fmt: skip
    assert config.training.steps == 7
    assert config.optimizer.lr == 1e-4  # YAML 1.1 reads 1e-4 as a string
    assert [s.weight for s in config.data.sources] == [45, 45, 20]
    assert (config.checkpoint.interval, config.checkpoint.asynchronous) == (5, False)
    assert config.model.decoder.moe is not None
    assert config.model.decoder.moe.num_experts == 8


def test_config_is_immutable(minimal: Path) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        load_config(minimal).run_dir = "elsewhere"  # type: ignore[misc]


# Overrides that break one rule each: (overrides, field named, what the message must say).
BAD = [
    # names and types
    (["training.stepz=5"], "training.stepz", "unknown field"),
    (["model.vision.depth=5"], "model.vision.depth", "num_layers"),  # answers with the fields that there are
    (["extra={a: 1}"], "extra", "run_dir"),
    (["training.steps=many"], "training.steps", "many"),
    (["training.steps=1.5"], "training.steps", "1.5"),
    (["training.steps='5'"], "training.steps", "'5'"),
    (["parallel.sequence_parallel=1"], "parallel.sequence_parallel", "1"),
    (["training.precision=fp64"], "training.precision", "bf16"),
    (["training.fp8_vision=true"], "training.fp8_vision", "set training.fp8"),
    (["training.fp8_vision=true", "training.fp8=delayed"], "training.fp8_vision", "ranks without images"),
    (["model.decoder.family=gpt"], "model.decoder.family", "qwen3"),
    (["model.vision.image_mean=[0.5, 0.5]"], "model.vision.image_mean.2", "required"),
    (["run_dir=2024-01-01"], "", "a type that a config cannot hold"),  # YAML reads a date
    # overrides themselves
    (["training.steps"], "command line", "a.b=value"),
    (["data.sources.9.weight=1"], "data.sources.9.weight", "does not lead to a field"),
    (["run_dir.deeper=1"], "run_dir.deeper", "does not lead to a field"),
    # ranges
    (["training.steps=0"], "training.steps", "more than 0"),
    (["training.seed=-1"], "training.seed", "0 or more"),
    (["optimizer.lr=-1e-4"], "optimizer.lr", "more than 0"),
    (["optimizer.lr=.nan"], "optimizer.lr", ""),
    (["data.sources.0.weight=-1"], "data.sources.0.weight", "more than 0"),
    (["data.validation_fraction=1.0"], "data.validation_fraction", "below 1"),
    (["data.max_bad_image_rate=2.0"], "data.max_bad_image_rate", "below 1"),
    (["optimizer.beta1=1.0"], "optimizer.beta1", "below 1"),
    (["optimizer.beta2=1.5"], "optimizer.beta2", "below 1"),
    (["optimizer.min_lr_ratio=2.0"], "optimizer.min_lr_ratio", "0 to 1"),
    # shapes
    (["model.vision.image_size=36"], "model.vision.image_size", "32 or 40"),
    (["model.vision.hidden_size=33"], "model.vision.hidden_size", "32 or 34"),
    (["model.connector.num_tokens=15"], "model.connector.num_tokens", "9 or 16"),
    (
        ["model.connector.kind=pixel_shuffle_mlp", "model.connector.num_tokens=9"],
        "model.connector.num_tokens",
        "1, 4, 16",
    ),
    (["model.connector.kind=attention_pool", "model.connector.hidden_size=100"], "model.connector.hidden_size", "64"),
    (["model.vision.feature_layer=-3"], "model.vision.feature_layer", "-2 to -1"),
    (["model.vision.feature_layer=0"], "model.vision.feature_layer", "-2 to -1"),
    (["model.decoder.num_attention_heads=6"], "model.decoder.hidden_size", "60 or 66"),
    (["model.decoder.num_query_groups=3"], "model.decoder.num_attention_heads", "3 or 6"),
    (["model.decoder.kv_channels=15"], "model.decoder.kv_channels", "even"),
    (["data.seq_length=100"], "data.seq_length", "at least 146"),
    # layout
    ([f"{TP}=4"], "model.decoder.num_query_groups", TP),
    ([f"{TP}=2", "model.decoder.ffn_hidden_size=127"], "model.decoder.ffn_hidden_size", TP),
    ([f"{TP}=2", "model.decoder.vocab_size=511"], "model.decoder.vocab_size", TP),
    ([f"{TP}=2", "parallel.sequence_parallel=true", "data.seq_length=4095"], "data.seq_length", TP),
    (["parallel.sequence_parallel=true"], "parallel.sequence_parallel", "2 or more"),
    ([f"{CP}=4"], "model.decoder.num_query_groups", CP),
    ([f"{CP}=2", f"{TP}=2"], "model.decoder.num_query_groups", "parallel.context_parallel_size (4)"),
    ([f"{CP}=2", "data.seq_length=4094"], "data.seq_length", "4092 or 4096"),
    ([f"{PP}=3"], "model.decoder.num_layers", "3 or 6"),
    (["parallel.first_pipeline_stage_layers=1"], "parallel.first_pipeline_stage_layers", "pipeline stage"),
    ([f"{PP}=3", "parallel.first_pipeline_stage_layers=1"], "parallel.first_pipeline_stage_layers", "2"),
    ([f"{PP}=2", "parallel.first_pipeline_stage_layers=4"], "parallel.first_pipeline_stage_layers", "1, 2, 3"),
    (["parallel.expert_model_parallel_size=2"], "parallel.expert_model_parallel_size", "no experts"),
    ([MOE, "parallel.expert_model_parallel_size=3"], "model.decoder.moe.num_experts", "3 or 6"),
    ([MOE, "model.decoder.moe.topk=5"], "model.decoder.moe.topk", "2 to 4"),
    ([MOE, "model.decoder.moe.topk=1"], "model.decoder.moe.topk", "2 to 4"),
    ([MOE, "model.decoder.moe.layer_freq=5"], "model.decoder.moe.layer_freq", "1 to 4"),
    (["parallel.expert_tensor_parallel_size=2"], "parallel.expert_tensor_parallel_size", "no experts"),
    (
        [MOE, f"{TP}=2", "parallel.sequence_parallel=true", "parallel.expert_tensor_parallel_size=1"],
        "parallel.expert_tensor_parallel_size",
        "parallel.expert_model_parallel_size to 2 or more",
    ),
    ([MOE, "parallel.expert_tensor_parallel_size=2"], "parallel.expert_tensor_parallel_size", "leave it out"),
    ([MOE, f"{TP}=2"], "parallel.sequence_parallel", "true"),
    (
        [MOE, f"{TP}=2", "parallel.sequence_parallel=true", "model.decoder.moe.ffn_hidden_size=33"],
        "model.decoder.moe.ffn_hidden_size",
        "parallel.expert_tensor_parallel_size",
    ),
    # data and batch
    (["data.sources=[]"], "data.sources", "nothing to train on"),
    (["data.sources.1.path=other/captions"], "data.sources", "captions"),
    (["training.frozen=[vision, connector, decoder]"], "training.frozen", "nothing would be trained"),
    (["training.frozen=[vision, vision]"], "training.frozen", "twice"),
    (["training.micro_batch_size=3"], "training.global_batch_size", "510 or 513"),
]


@pytest.mark.parametrize(("overrides", "where", "says"), BAD, ids=[" ".join(o) for o, _, _ in BAD])
def test_bad_input_is_refused_with_the_field(minimal: Path, overrides: list[str], where: str, says: str) -> None:
    error = refused(minimal, *overrides)
    assert error.where == where
    assert says in str(error)


def test_all_faults_are_told_at_once(minimal: Path) -> None:
    message = str(refused(minimal, "training.stepz=5", "optimizer.lr=fast"))
    assert "training.stepz" in message
    assert "optimizer.lr" in message


def test_missing_field(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in MINIMAL.items() if k != "training"}))
    error = refused(path)
    assert (error.where, error.do) == ("training", "add it to the config")


@pytest.mark.parametrize(
    ("text", "says"),
    [("a: [1", "not valid YAML"), ("- a", "mapping"), ("", "mapping"), ("run_dir: a\nrun_dir: b", "written twice")],
)
def test_file_that_is_no_config(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    assert says in str(refused(path))


def test_absent_file(tmp_path: Path) -> None:
    error = refused(tmp_path / "none.yaml")
    assert (error.where, error.found) == (str(tmp_path / "none.yaml"), "No such file or directory")


def test_no_object_is_built_from_yaml(tmp_path: Path) -> None:
    """A config is data: a tag that names a Python object is refused, not obeyed."""
    path = tmp_path / "config.yaml"
    path.write_text(f"run_dir: !!python/object/apply:os.mkdir ['{tmp_path / 'made'}']\n")
    assert "not valid YAML" in str(refused(path))
    assert not (tmp_path / "made").exists()


def layout(*overrides: str, world: int, path: Path) -> int:
    return check_layout(load_config(path, list(overrides)), world)


def test_layout_answers_with_the_data_parallel_size(minimal: Path) -> None:
    assert layout(world=8, path=minimal) == 8
    assert layout(f"{TP}=2", f"{PP}=2", world=8, path=minimal) == 2
    assert layout(f"{CP}=2", f"{PP}=2", world=8, path=minimal) == 2
    assert layout(MOE, "parallel.expert_model_parallel_size=4", world=8, path=minimal) == 8
    assert layout(MOE, f"{CP}=2", "parallel.expert_model_parallel_size=4", world=4, path=minimal) == 2


@pytest.mark.parametrize(
    ("overrides", "world", "where", "says"),
    [
        ([f"{TP}=2", f"{PP}=2"], 6, "parallel", "multiples of 4, for example 12"),
        ([f"{TP}=2", f"{PP}=2"], 1, "parallel", "multiples of 4"),
        ([f"{CP}=2", f"{PP}=2"], 6, "parallel", "context 2"),
        ([MOE, "parallel.expert_model_parallel_size=4"], 6, "parallel.expert_model_parallel_size", "1, 2"),
        ([], 0, "parallel", "1 or more"),
        ([], 3, "training.global_batch_size", "a multiple of 3, for example 510"),
    ],
)
def test_layout_that_does_not_divide(minimal: Path, overrides: list[str], world: int, where: str, says: str) -> None:
    with pytest.raises(UserError) as caught:
        layout(*overrides, world=world, path=minimal)
    assert caught.value.where == where
    assert says in str(caught.value)


def test_quickstart_config_is_valid() -> None:
    config = load_config(Path(__file__).parents[2] / "examples" / "quickstart" / "config.yaml")
    assert isinstance(config, RunConfig)
    assert [s.weight for s in config.data.sources] == [45, 45, 10]
    assert check_layout(config, 2) == 2


if __name__ == "__main__":
    GOLDEN.write_text(dump_yaml(config_from_dict(MINIMAL)))
