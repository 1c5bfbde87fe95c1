"""The training loop: from a configuration to a finished run, over any number of interruptions."""

import time
from itertools import islice
from pathlib import Path

import torch

from megatron_mm.config import RunConfig, dump_yaml
from megatron_mm.data.loader import TrainingData
from megatron_mm.model.kernels import check_kernels
from megatron_mm.parallel.launch import Launch
from megatron_mm.parallel.topology import Topology, all_max, initialize, meet, once_a_node, shut_down
from megatron_mm.training.checkpoint import Checkpointer, together
from megatron_mm.training.initial_weights import load_weights
from megatron_mm.training.optimizer import peak_learning_rates
from megatron_mm.training.resilience import StopSignal, write_outcome
from megatron_mm.training.step import Trainer
from megatron_mm.training.telemetry import Telemetry


def train(config: RunConfig, launch: Launch, stop: StopSignal) -> None:
    """Train to `training.steps`, or to a stop signal: then checkpoint and return. Run it again to go on."""
    check_kernels(config)
    store = meet(launch)
    # Sources are checked and packed before any device is taken, however long it takes.
    once_a_node(lambda: TrainingData.prepare(config), launch, store)
    topology = initialize(config, launch, store)
    _train(config, topology, stop)
    shut_down()  # not after an error: a rank that fails alone must end at once, so that the others notice


def _open_data(config: RunConfig) -> TrainingData:
    opened: list[TrainingData] = []
    together(lambda: opened.append(TrainingData.open(config)))
    return opened[0]


def _train(config: RunConfig, topology: Topology, stop: StopSignal) -> None:
    t = config.training
    main = topology.rank == 0
    data = _open_data(config)
    # Weights are drawn below, and only those that no checkpoint holds: it takes minutes for a large model.
    trainer = Trainer(config, topology, data.layout, len(data.source_names), draw_weights=False)
    checkpointer = Checkpointer(config, trainer, Path(data.tokenizer.path))
    done = checkpointer.load_latest()
    telemetry = Telemetry(config, data.source_names, done, active=main)
    if done:
        telemetry.say(f"resumed after step {done}")
    elif config.checkpoint.init_from:
        telemetry.say(load_weights(trainer, config.checkpoint.init_from).report())
    if not trainer.has_weights:
        trainer.draw_weights()
    if main:
        _write_config(config)
    telemetry.say(_summary(config, topology, trainer))
    telemetry.say(data.report())

    batches = data.train_loader(done, topology.dp_rank, topology.dp_size, topology.image_share)
    saved = done
    while done < t.steps:
        started = time.perf_counter()
        microbatches = list(islice(batches, trainer.microbatches_per_step))
        waited = time.perf_counter() - started
        result = trainer.train_step(microbatches, done)
        done += 1
        telemetry.step(done, result, waited)
        checkpointer.poll()
        if t.validation_interval and (done % t.validation_interval == 0 or done == t.steps):
            telemetry.validation(done, validate(trainer, data, topology))
        stopping = all_max(int(stop.requested())) > 0
        if done % config.checkpoint.interval == 0 or done == t.steps or stopping:
            checkpointer.save(done)
            saved = done
        if stopping and done < t.steps:
            checkpointer.wait()
            if main:
                write_outcome(config.run_dir, "preempted", done)
            telemetry.say(f"stopped on request after step {done}; start again to go on")
            telemetry.close()
            return
    checkpointer.wait()
    if main:
        write_outcome(config.run_dir, "finished", done)
    telemetry.say(f"finished after step {saved}: {config.run_dir}")
    telemetry.close()


def validate(trainer: Trainer, data: TrainingData, topology: Topology) -> dict[str, float]:
    """Held-out loss of each source that has held-out documents, over `validation_batches` global batches."""
    losses = {}
    for number, name in enumerate(data.source_names):
        batches = data.validation_loader(number, topology.dp_rank, topology.dp_size, topology.image_share)
        total = tokens = 0.0
        while group := list(islice(batches, trainer.microbatches_per_step)):
            result = trainer.evaluate(group)
            total += result.loss * result.text_tokens
            tokens += result.text_tokens
        if tokens:
            losses[name] = total / tokens
    return losses


def _write_config(config: RunConfig) -> None:
    path = Path(config.run_dir) / "config.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(dump_yaml(config))


def _summary(config: RunConfig, topology: Topology, trainer: Trainer) -> str:
    p = config.parallel
    lr, connector_lr = peak_learning_rates(config)
    local = sum(q.numel() for chunk in trainer.chunks for q in chunk.parameters())
    where = (
        torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads a rank"
    )
    sizes = f"tensor {topology.tp_size} × pipeline {p.pipeline_model_parallel_size} × data {topology.dp_size}"
    if topology.cp_size > 1:
        sizes += f" × context {topology.cp_size}"
    if config.model.decoder.moe:
        sizes += f", experts {p.expert_model_parallel_size}"
    return (
        f"{topology.world_size} ranks ({where}): {sizes}; {local / 1e6:.1f}M parameters on rank 0; "
        f"{config.training.precision}; peak learning rate {lr:.2e} (connector {connector_lr:.2e})"
    )
