"""What FP8 asks of a run: the recipes' tiles, and sides of matrices that are whole tiles on every rank."""

from megatron_mm.config.schema import RunConfig
from megatron_mm.errors import UserError

TILE = {"delayed": 16, "tensorwise": 16, "blockwise": 128, "mxfp8": 32}  # of both sides of a matrix, by recipe


def check_fp8(c: RunConfig) -> None:
    """Raises UserError. Whether a GPU can run the recipe is another question (`model/kernels.py`)."""
    t = c.training
    if t.fp8_vision and t.fp8 is None:
        raise UserError(
            "the encoder's FP8 takes training.fp8's recipe", where="training.fp8_vision", found="training.fp8 = null",
            do="set training.fp8 to tensorwise, blockwise or mxfp8",
        )  # fmt: skip
    if t.fp8 is None:
        return
    if t.fp8_vision and t.fp8 == "delayed":
        # Delayed scaling reduces its maxima over all data-parallel ranks after every pass through the encoder, and a
        # rank whose microbatch has no image makes no such pass: the others would wait for it.
        raise UserError(
            "delayed scaling needs all ranks at each pass, and ranks without images do not pass the encoder",
            where="training.fp8_vision", found="training.fp8 = delayed",
            do="set training.fp8 to tensorwise, blockwise or mxfp8",
        )  # fmt: skip
    if t.precision != "bf16":
        raise UserError("FP8 goes with bf16", where="training.fp8", found=f"training.precision = {t.precision}")
    for where, side in _sides(c).items():
        if side % TILE[t.fp8]:
            field = "fp8_vision" if where.startswith("model.vision") else "fp8"
            raise UserError(
                f"{t.fp8} FP8 works on tiles of {TILE[t.fp8]}", where=where, found=f"{side} on each rank",
                allowed=f"a multiple of {TILE[t.fp8]}",
                do=f"change it, the parallel sizes or the recipe, or leave training.{field} out",
            )  # fmt: skip


def _sides(c: RunConfig) -> dict[str, int]:
    """Of one rank's matrices, by the field that sets them."""
    d, p = c.model.decoder, c.parallel
    tp = p.tensor_model_parallel_size
    rows = c.data.seq_length * c.training.micro_batch_size // p.context_parallel_size
    sides = {
        "model.decoder.hidden_size": d.hidden_size,
        "model.decoder.ffn_hidden_size": d.ffn_hidden_size // tp,
        "model.decoder.num_attention_heads": d.num_attention_heads * d.head_dim // tp,
        "data.seq_length": rows // (tp if p.sequence_parallel else 1),
    }
    if d.moe is not None:
        sides["model.decoder.moe.ffn_hidden_size"] = (d.moe.ffn_hidden_size or d.ffn_hidden_size) // p.expert_tp
    if c.training.fp8_vision:  # its positions are padded to whole tiles, its heads are as wide as its stream
        v, ranks = c.model.vision, tp if p.vision_tensor_parallel else 1
        sides["model.vision.hidden_size"] = v.hidden_size // ranks
        sides["model.vision.ffn_hidden_size"] = v.ffn_hidden_size // ranks
    return sides
