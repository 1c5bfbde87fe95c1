"""A layout's plan: what each stage's rank holds, whether it fits, how long a step takes."""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_mm.config import RunConfig, check_layout
from megatron_mm.errors import UserError
from megatron_mm.model.sizes import Parameters, parameters
from megatron_mm.planning.estimate import estimate
from megatron_mm.planning.hardware import ASSUMPTIONS, Gpu
from megatron_mm.planning.images import expected_images
from megatron_mm.planning.measure import measure
from megatron_mm.planning.memory import StageMemory, stage_memory
from megatron_mm.planning.timing import StepTime, model_flops, step_time


@dataclass(frozen=True)
class Target:
    """What is planned for."""

    gpu: Gpu
    gpus: int
    images_per_sequence: float  # mean over the data
    images_from: str  # where that figure comes from

    @property
    def usable(self) -> float:
        """Bytes of a GPU that training may fill."""
        return ASSUMPTIONS.usable(self.gpu)


@dataclass(frozen=True)
class Plan:
    config: RunConfig
    target: Target
    memory: tuple[StageMemory, ...]  # of a rank of each pipeline stage
    time: StepTime
    flops: float  # useful ones of a step
    measured: bool  # on the real modules; False: by formula

    @property
    def worst(self) -> StageMemory:
        return max(self.memory, key=lambda m: m.total)

    @property
    def fits(self) -> bool:
        return self.worst.total <= self.target.usable

    @property
    def data_parallel_size(self) -> int:
        return self.target.gpus // self.config.parallel.model_parallel_size

    @property
    def microbatches(self) -> int:
        """Of a rank in a step."""
        t = self.config.training
        return t.global_batch_size // (t.micro_batch_size * self.data_parallel_size)

    @property
    def mfu(self) -> float:
        """Useful operations over what all GPUs could do in bf16 in a step's time."""
        return self.flops / (self.time.total * self.target.gpus * self.target.gpu.bf16)

    @property
    def tokens_per_second(self) -> float:
        """Positions, image positions among them, of all ranks together."""
        return self.config.training.global_batch_size * self.config.data.seq_length / self.time.total

    @property
    def images_per_second(self) -> float:
        return self.config.training.global_batch_size * self.target.images_per_sequence / self.time.total

    @property
    def days(self) -> float:
        """Of the whole run, without validation, checkpoints and interruptions."""
        return self.config.training.steps * self.time.total / 86400

    @property
    def parameters(self) -> Parameters:
        return parameters(self.config.model)


def check_gpu(config: RunConfig, gpu: Gpu) -> None:
    """Raises UserError where the GPU lacks the run's precision."""
    recipe = config.training.fp8
    if recipe and recipe not in gpu.fp8_recipes:
        raise UserError(
            "this GPU cannot run the recipe", where="training.fp8", found=f"{recipe} on {gpu.name}",
            allowed=", ".join(gpu.fp8_recipes) or "none: leave it out",
        )  # fmt: skip


def target_for(config: RunConfig, gpu: Gpu, gpus: int, images_per_sequence: float | None = None) -> Target:
    """`images_per_sequence` None: as `images.expected_images` finds it."""
    if images_per_sequence is not None:
        return Target(gpu, gpus, images_per_sequence, "given")
    return Target(gpu, gpus, *expected_images(config))


def make_plans(configs: Sequence[RunConfig], target: Target) -> list[Plan]:
    """Plans on the real modules, in the order given. Raises UserError where a layout does not divide."""
    for config in configs:
        check_layout(config, target.gpus)
    plans = []
    for config, found in zip(configs, measure(configs, target.gpus, ASSUMPTIONS.expert_imbalance), strict=True):
        pp = config.parallel.pipeline_model_parallel_size
        rough = estimated_plan(config, target)
        memory = tuple(stage_memory(stage, i, pp, rough.microbatches) for i, stage in enumerate(found))
        plans.append(Plan(config, target, memory, rough.time, rough.flops, measured=True))
    return plans


def estimated_plan(config: RunConfig, target: Target) -> Plan:
    """A plan by formulas, in a millisecond."""
    return Plan(
        config,
        target,
        tuple(estimate(config, target.gpus, ASSUMPTIONS.expert_imbalance)),
        step_time(config, target.gpus, target.gpu, target.images_per_sequence),
        model_flops(config, target.images_per_sequence),
        measured=False,
    )
