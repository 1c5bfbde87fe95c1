"""An exported folder → Megatron's global tensors, bit for bit those that were exported."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_mm.config import RunConfig, VisionConfig
from megatron_mm.data.tokenizer import find_tokenizer, open_tokenizer
from megatron_mm.errors import UserError
from megatron_mm.hf.configuration import MegatronMMConfig
from megatron_mm.hf.exporter import hf_config
from megatron_mm.hf.mapping import rules
from megatron_mm.model.positions import fit_grid

# What the forward pass depends on. The other fields say how weights were drawn, how long sequences were, and the
# resolution, which may change.
_SHAPE_FIELDS = (
    "model_type hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "vocab_size hidden_act rms_norm_eps layer_norm_eps rope_parameters patch_size num_experts "
    "mlp_ratio num_experts_per_tok moe_intermediate_size decoder_sparse_step tie_word_embeddings".split()
)


def read_config(folder: str | Path) -> MegatronMMConfig:
    """The configuration of an exported folder."""
    path = Path(folder) / "config.json"
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError("not an exported model", where=str(path), found=error) from None
    if data.get("model_type") != MegatronMMConfig.model_type:
        raise UserError(
            "not a model of this stack", where=f"{path}: model_type", found=data.get("model_type"),
            allowed=MegatronMMConfig.model_type,
        )  # fmt: skip
    return MegatronMMConfig.from_dict(data)


def is_export(folder: str | Path) -> bool:
    """Whether the folder holds a whole model of this stack, as the exporter writes it."""
    try:
        return json.loads((Path(folder) / "config.json").read_text()).get("model_type") == MegatronMMConfig.model_type
    except (OSError, ValueError, AttributeError):
        return False


def import_hf(folder: str | Path, vision: VisionConfig | None = None) -> Iterator[tuple[str, Tensor]]:
    """Name and value of each Megatron tensor, one at a time. Raises UserError for what is missing or unreadable.

    Args:
        vision: positions are interpolated where its resolution is not the folder's.
    """
    table = rules(read_config(folder))
    tensors = FolderReader(Path(folder))
    for rule in table:
        value = rule.join([tensors[name] for name in rule.hf])
        yield rule.megatron, value if vision is None else fit_grid(rule.megatron, value, vision)


def check_same_model(folder: str | Path, run: RunConfig) -> None:
    """Raise UserError where the run's model is not the folder's, its resolution aside."""
    found = read_config(folder)
    wanted = hf_config(run.model, open_tokenizer(find_tokenizer(folder)), run.data.seq_length)
    faults = [
        f"{part or 'connector'}.{field}: {a!r} in the folder, {b!r} in the config"
        for part, fields in (
            ("vision_config", _SHAPE_FIELDS),
            ("text_config", _SHAPE_FIELDS),
            (
                "",
                (
                    "tokens_per_image",
                    "connector_kind",
                    "connector_hidden_size",
                    "connector_depth",
                    "vision_final_norm",
                    "image_token_id",
                ),
            ),
            # A token of this kind stands for grid² / tokens patches side by side, which its weights are made for.
            ("", ("grid",) if wanted.connector_kind == "pixel_shuffle_mlp" else ()),
        )
        for field in fields
        if (a := _field(found, part, field)) != (b := _field(wanted, part, field))
    ]
    if faults:
        raise UserError(
            "the run's model is not the folder's", where=str(folder), found="; ".join(faults),
            do="change the section model of the config",
        )  # fmt: skip


def _field(config: MegatronMMConfig, part: str, field: str) -> Any:
    return getattr(getattr(config, part) if part else config, field, None)


class FolderReader:
    """Tensors of an exported folder by name, from one file or from several with an index."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: dict[str, Any] = {}
        index = folder / "model.safetensors.index.json"
        try:
            if index.is_file():
                self.files: dict[str, str] = json.loads(index.read_text())["weight_map"]
            else:
                self.files = dict.fromkeys(self._file("model.safetensors").keys(), "model.safetensors")
        except (ValueError, KeyError) as error:
            raise UserError("not an index of tensors", where=str(index), found=error) from None

    def _file(self, name: str) -> Any:
        if name not in self._open:
            try:
                self._open[name] = safe_open(self.folder / name, framework="pt")
            except (OSError, SafetensorError) as error:
                raise UserError("cannot read the tensors", where=str(self.folder / name), found=error) from None
        return self._open[name]

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.files:
            raise UserError("the folder is without a tensor of its model", where=str(self.folder), found=name)
        try:
            return self._file(self.files[name]).get_tensor(name)
        except SafetensorError as error:
            raise UserError(
                "cannot read a tensor", where=str(self.folder / self.files[name]), found=f"{name}: {error}"
            ) from None
