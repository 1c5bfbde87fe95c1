"""Plans of MM1's recipes: formulas against the real modules, times that make sense, the command and its reports."""

import dataclasses
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from megatron_mm.config import RunConfig, check_layout, load_config
from megatron_mm.errors import UserError
from megatron_mm.model.sizes import document_pairs, flops
from megatron_mm.planning.hardware import ASSUMPTIONS, GPUS
from megatron_mm.planning.live import LiveBytes
from megatron_mm.planning.plan import Plan, Target, estimated_plan, make_plans
from megatron_mm.planning.report import check_output, write_report
from megatron_mm.planning.search import search
from tests.ranks import ROOT, rank_environment

RECIPES = ROOT / "examples/mm1"


def recipe(name: str, *overrides: str) -> RunConfig:
    return load_config(RECIPES / f"{name}.yaml", list(overrides))


def target(gpus: int, gpu: str = "h100", images: float = 11) -> Target:
    return Target(GPUS[gpu], gpus, images, "given")


def estimate(name: str, gpus: int, *overrides: str, gpu: str = "h100", images: float = 11) -> Plan:
    config = recipe(name, *overrides)
    check_layout(config, gpus)
    return estimated_plan(config, target(gpus, gpu, images))


BUILT = {
    "30b-256": ("mm1-30b", 256, []),
    "30b-512": ("mm1-30b", 512, []),
    "3b-moe-64": ("mm1-3b-moe", 64, []),
    "3b-recompute": ("mm1-3b", 64, ["training.recompute=true", "training.micro_batch_size=4"]),
    "3b-local": ("mm1-3b", 64, ["training.layers=local", "parallel.vision_tensor_parallel=true"]),
}


@pytest.fixture(scope="module")
def built() -> dict[str, Plan]:
    def build(key: str) -> Plan:
        name, gpus, more = BUILT[key]
        return make_plans([recipe(name, *more)], target(gpus))[0]

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(BUILT, pool.map(build, BUILT), strict=True))


@pytest.mark.parametrize("key", BUILT)
def test_formulas_agree_with_the_modules(key: str, built: dict[str, Plan]) -> None:
    plan = built[key]
    rough = estimated_plan(plan.config, plan.target)
    for real, guess in zip(plan.memory, rough.memory, strict=True):
        assert guess.parameters == pytest.approx(real.parameters, rel=0.005)
        assert guess.gradients == pytest.approx(real.gradients, rel=0.005)
        assert guess.optimizer == pytest.approx(real.optimizer, rel=0.005)
        assert guess.total == pytest.approx(real.total, rel=0.06)


def test_the_large_recipes_fit(built: dict[str, Plan]) -> None:
    for key in ("30b-256", "30b-512", "3b-moe-64"):
        plan = built[key]
        assert plan.measured
        assert plan.fits
        assert plan.worst.total < 0.9 * plan.target.usable
    # The optimizer is shared out over twice the ranks.
    assert built["30b-512"].memory[0].optimizer == pytest.approx(built["30b-256"].memory[0].optimizer / 2, rel=0.01)


def test_fused_attention_stands_for_flash_attention() -> None:
    """What the stand-in keeps is what torch's own flash attention keeps."""
    from megatron_mm.planning.standins import FusedAttention

    def kept(meta: bool) -> int:
        shape, device = (64, 2, 4, 16), "meta" if meta else "cpu"  # [s, b, heads, width]
        query, key, value = (torch.zeros(shape, device=device, requires_grad=True) for _ in range(3))
        with LiveBytes([t.data for t in (query, key, value)]) as held:
            if meta:
                out = FusedAttention()(query, key, value)
            else:
                q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))
                out = scaled_dot_product_attention(q, k, v, is_causal=True)
            return held.now + 0 * out.numel()

    assert kept(meta=True) == kept(meta=False)


def test_attention_without_fusion_keeps_the_scores(built: dict[str, Plan]) -> None:
    local = built["3b-local"]
    fused = estimated_plan(
        dataclasses.replace(local.config, training=dataclasses.replace(local.config.training, layers="auto")),
        local.target,
    )
    d, p, s = local.config.model.decoder, local.config.parallel, local.config.data.seq_length
    scores = d.num_layers * d.num_attention_heads / p.tensor_model_parallel_size * s * s
    assert local.memory[0].activations - fused.memory[0].activations > 6 * scores


def test_time_is_a_sum_and_more_gpus_are_faster() -> None:
    small, large = estimate("mm1-30b", 256), estimate("mm1-30b", 512)
    parts = dataclasses.asdict(small.time)
    assert small.time.total == pytest.approx(sum(parts.values()))
    assert min(parts.values()) >= 0
    assert small.time.total / 2 < large.time.total < small.time.total
    assert 0.25 < small.mfu < 0.6
    assert small.tokens_per_second * small.time.total == pytest.approx(512 * 4096)
    assert small.days * 86400 == pytest.approx(200_000 * small.time.total)


@pytest.mark.parametrize(
    ("slower", "faster"),
    [
        ("training.recompute=true", "training.recompute=false"),
        ("parallel.tensor_model_parallel_size=8", "parallel.tensor_model_parallel_size=4"),
        ("parallel.virtual_pipeline_model_parallel_size=1", "parallel.virtual_pipeline_model_parallel_size=2"),
        ("parallel.overlap_grad_reduce=false", "parallel.overlap_grad_reduce=true"),
        ("training.layers=local", "training.layers=auto"),
        ("training.fp8=null", "training.fp8=delayed"),
    ],
)
def test_what_should_be_slower_is(slower: str, faster: str) -> None:
    assert estimate("mm1-30b", 256, slower).time.total > estimate("mm1-30b", 256, faster).time.total


def test_fp8_in_the_encoder_is_the_encoders_gain() -> None:
    """At most that of its products alone: its attention and the connector stay in bf16."""
    bf16 = estimate("mm1-3b", 64, "training.fp8=tensorwise").time
    fp8 = estimate("mm1-3b", 64, "training.fp8=tensorwise", "training.fp8_vision=true").time
    gpu = GPUS["h100"]
    most = gpu.fp8 * ASSUMPTIONS.fp8_matmul / (gpu.bf16 * ASSUMPTIONS.matmul)
    assert 1.3 < bf16.encoder / fp8.encoder < most
    assert fp8.decoder == bf16.decoder


def test_precision_and_frozen_parts_show() -> None:
    bf16, fp32 = (estimate("mm1-3b", 64, f"training.precision={p}").time for p in ("bf16", "fp32"))
    gpu = GPUS["h100"]
    assert fp32.encoder / bf16.encoder == pytest.approx(gpu.bf16 / gpu.fp32)
    frozen = estimate("mm1-3b", 64, "training.frozen=[decoder]").time
    assert 1 / 2 < frozen.decoder / bf16.decoder < 1  # no gradients of weights


def test_backward_passes_of_frozen_parts_take_no_time() -> None:
    def encoder(*frozen: str) -> float:
        return estimate("mm1-3b", 64, f"training.frozen=[{', '.join(frozen)}]").time.encoder

    forward = encoder("vision", "connector")
    assert encoder() == encoder("decoder") == pytest.approx(3 * forward)
    vision = encoder("vision")  # connector: forward, gradients of activations, gradients of weights
    assert encoder() - encoder("connector") == pytest.approx((vision - forward) / 2)  # the last of these three


def test_a_frozen_encoder_that_is_cut_sends_no_gradients() -> None:
    def messages(images: int, frozen: str) -> float:
        cut = "parallel.vision_tensor_parallel=true"
        return estimate("mm1-3b", 64, cut, f"training.frozen={frozen}", images=images).time.tensor_parallel

    none = messages(0, "[]")
    assert messages(0, "[vision]") == none
    assert messages(8, "[vision]") - none == pytest.approx((messages(8, "[]") - none) / 2)


def test_mfu_counts_no_gradients_that_frozen_parts_do_not_need() -> None:
    config = recipe("mm1-3b", "training.frozen=[vision, decoder]")
    plan, rows, s = estimated_plan(config, target(64)), config.training.global_batch_size, config.data.seq_length
    work = flops(config.model, rows * s, rows * document_pairs([s]), rows * 11)
    useful = work.vision + 3 * work.connector + 2 * work.decoder + 3 * work.attention
    assert plan.mfu == pytest.approx(useful / (plan.time.total * 64 * GPUS["h100"].bf16))
    assert estimate("mm1-3b", 64).flops == pytest.approx(3 * work.total)


def test_context_parallelism_cuts_the_work_and_costs_messages() -> None:
    whole = estimate("mm1-3b", 64, "training.micro_batch_size=2")
    cut = estimate("mm1-3b", 64, "training.micro_batch_size=2", "parallel.context_parallel_size=2")
    assert cut.microbatches == 2 * whole.microbatches
    assert cut.time.decoder == pytest.approx(whole.time.decoder, rel=0.01)  # half of each of twice as many
    assert cut.time.tensor_parallel > whole.time.tensor_parallel
    assert cut.worst.activations < 0.75 * whole.worst.activations


def test_images_cost_time_and_their_spread_too() -> None:
    none, some, most = (estimate("mm1-3b", 64, images=n).time for n in (0, 8, 16))
    assert none.encoder == 0
    assert none.total < some.total < most.total
    assert most.imbalance == none.imbalance == 0
    # Half of the sequences hold 16 images, the others none: with one sequence a microbatch nothing evens that out.
    uneven = estimate("mm1-30b", 256, "parallel.first_pipeline_stage_layers=null", images=8).time
    assert uneven.imbalance > 0


@pytest.mark.parametrize("name", ["mm1-3b", "mm1-3b-moe"])
def test_a_step_of_one_microbatch_waits_for_the_rank_with_most_images(name: str) -> None:
    """Half of the sequences hold 16 images: some rank has one of them, and nothing else to do."""
    alone = "training.micro_batch_size=1", "parallel.overlap_grad_reduce=false"  # the reduction hidden behind nothing
    some, most = (estimate(name, 1024, *alone, images=n) for n in (8, 16))
    assert some.microbatches == 1
    assert some.time.encoder == pytest.approx(most.time.encoder / 2)
    assert some.time.total == pytest.approx(most.time.total)
    assert most.time.imbalance == 0


def test_search_is_sorted_fits_and_beats_the_recipe() -> None:
    config = recipe("tiny/mm1-3b-moe")
    found = search(config, target(8), count=3)
    assert len(found) == 3
    assert all(plan.fits and plan.measured for plan in found)
    times = [plan.time.total for plan in found]
    assert times == sorted(times)
    assert times[0] <= estimated_plan(config, target(8)).time.total


def test_search_gives_the_encoders_stage_fewer_layers() -> None:
    """The encoder is work too: of two stages, the first one's best share of 26 layers is less than half."""
    config = recipe("mm1-3b", "parallel.pipeline_model_parallel_size=2")
    shares = {
        first: estimated_plan(
            dataclasses.replace(
                config, parallel=dataclasses.replace(config.parallel, first_pipeline_stage_layers=first)
            ),
            target(64),
        ).time.total
        for first in range(1, 26)
    }
    assert min(shares, key=shares.__getitem__) < 13
    assert min(shares.values()) < 0.9 * shares[13]


def plan_command(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools/plan.py"), *map(str, arguments)]
    return subprocess.run(command, env=rank_environment(), capture_output=True, text=True, timeout=280, cwd=ROOT)


def test_command_prints_json_and_writes_a_report(tmp_path: Path) -> None:
    done = plan_command(
        "--config", RECIPES / "tiny/mm1-3b.yaml", "--gpus", "8", "--gpu", "h200", "--images-per-sequence", "11",
        "--json", "--output", tmp_path / "report.md",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)["plan"]
    assert plan["fits"] is True
    assert plan["measured"] is True
    assert plan["layout"]["data_parallel_size"] == 4
    assert sum(v for k, v in plan["step_seconds"].items() if k != "total") == pytest.approx(
        plan["step_seconds"]["total"]
    )
    stage = plan["memory_bytes"][0]
    parts = ("parameters", "gradients", "optimizer", "activations", "working", "inputs")
    assert sum(stage[name] for name in parts) == stage["total"] < plan["usable_bytes"]
    page = (tmp_path / "report.md").read_text()
    assert "report.svg" in page
    assert "fits" in page
    ElementTree.parse(tmp_path / "report.svg")


def test_command_refuses_what_does_not_fit() -> None:
    done = plan_command(
        "--config", RECIPES / "mm1-3b.yaml", "--gpus", "64", "--gpu", "a100", "training.micro_batch_size=8",
        "parallel.tensor_model_parallel_size=1", "parallel.sequence_parallel=false",
    )  # fmt: skip
    assert done.returncode == 2
    assert "DOES NOT FIT" in done.stdout
    assert "nearest layouts that fit" in done.stderr
    assert "parallel" in done.stderr.split("nearest layouts that fit")[1]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--gpus", "48", "--gpu", "h100"], "works on 48 ranks"),
        (["--gpus", "64", "--gpu", "a100", "training.fp8=delayed"], "training.fp8"),
        (["--gpus", "64", "--gpu", "h100", "--images-per-sequence", "17"], "up to data.max_images"),
        (["--gpus", "64", "--gpu", "h100", "--images-per-sequence", "inf"], "up to data.max_images"),
        (["--gpus", "64", "--gpu", "h100", "--images-per-sequence", "nan"], "0 or more"),
        (["--gpus", "64", "--gpu", "h100", "--output", f"{__file__}/report.md"], "cannot write the report"),
    ],
)
def test_command_refuses_early(arguments: list[str], told: str) -> None:
    done = plan_command("--config", RECIPES / "mm1-3b-moe.yaml", *arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert told in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "output",
    ["file/report.md", "file/new/report.html", "folder.md", "folder.html", "drawn.md", "x" * 300 + ".md"],
)
def test_a_report_that_cannot_be_written_is_told(output: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    for folder in ("folder.md", "folder.html", "drawn.svg"):
        (tmp_path / folder).mkdir()
    plan = estimate("mm1-3b", 64)
    with pytest.raises(UserError, match="cannot write the report"):
        check_output(tmp_path / output)
    with pytest.raises(UserError, match="cannot write the report"):
        write_report(tmp_path / output, "title", plan, [], "command")
    assert not list(tmp_path.glob("*.tmp-*"))
    assert (tmp_path / "file").read_text() == "kept"


def test_looking_whether_a_report_can_be_written_leaves_what_is_there(tmp_path: Path) -> None:
    output = tmp_path / "new/report.md"
    check_output(output)
    assert list(output.parent.iterdir()) == []
    output.write_text("earlier")
    check_output(output)
    assert output.read_text() == "earlier"
    assert write_report(output, "title", estimate("mm1-3b", 64), [], "command") == [output.with_suffix(".svg"), output]
    assert sorted(output.parent.iterdir()) == [output, output.with_suffix(".svg")]


def test_reserve_leaves_most_of_the_memory() -> None:
    for gpu in GPUS.values():
        assert 0.8 < ASSUMPTIONS.usable(gpu) / gpu.memory < 0.95
