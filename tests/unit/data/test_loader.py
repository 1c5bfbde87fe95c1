"""Invariants I1 (order) and I3 (bad pictures), workers, and every check before training."""

import contextlib
import itertools
import os
import re
import shutil
import signal
import sys
import time
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from megatron_mm.data.decode import decode_image, resize
from megatron_mm.data.decode.device import DeviceDecoder
from megatron_mm.data.loader import TrainingData
from megatron_mm.data.source import Source
from megatron_mm.data.tokenizer import train_tokenizer
from megatron_mm.errors import UserError
from tests.unit.data.conftest import run_config
from tests.unit.data.test_source import write

ALL = (0, 1)
DECODERS = ("cpu", "dali", "device")


def opened(decoder, sources, tokenizer, **config):
    """Pictures decoded by the workers, with either backend, or by a device that workers leave JPEGs to.

    A CPU plays the device's part, with DALI: all but the device itself is as with a GPU.
    """
    backend = "cpu" if decoder == "cpu" else "dali"
    data = TrainingData.open(run_config(sources, tokenizer, decode_backend=backend, **config))
    if decoder == "device":
        data.device_decoder = DeviceDecoder(data.decoder("dali"))
    return data


def take(data, steps, dp_size, start=0, share=ALL):
    """Sample id → its row and pictures, over all ranks; microbatches in order as [step][micro][rank]."""
    per_step = 8 // (2 * dp_size)
    ranks = [
        list(itertools.islice(data.train_loader(start, r, dp_size, share), steps * per_step)) for r in range(dp_size)
    ]
    return [[[ranks[r][s * per_step + m] for r in range(dp_size)] for m in range(per_step)] for s in range(steps)]


def samples(step):
    """Sample id → everything about it, of one step's microbatches."""
    found = {}
    for batch in itertools.chain.from_iterable(step):
        pictures = iter(batch.images)
        for row, sample in enumerate(batch.sample_ids.tolist()):
            mine = int((batch.tokens[row] == 4).sum()) // 4
            found[sample] = [
                *(getattr(batch, name)[row].tolist() for name in ("tokens", "labels", "loss_mask", "documents")),
                batch.position_ids[row].tolist(), int(batch.source_ids[row]),
                [next(pictures).tolist() for _ in range(mine)],
            ]  # fmt: skip
        assert next(pictures, None) is None
    return found


def same(a, b):
    return all(
        torch.equal(getattr(a, f.name), getattr(b, f.name)) if f.name != "num_images" else a.num_images == b.num_images
        for f in fields(a)
    )


@pytest.mark.parametrize("decoder", DECODERS)
def test_order_is_independent_of_layout_and_restart(sources, tokenizer, decoder):
    """I1: the same samples with the same contents in each step, for data-parallel sizes 1, 2, 4 and from any step."""
    data = opened(decoder, sources, tokenizer)
    expected = [samples(step) for step in take(data, 6, 1)]
    for s, step in enumerate(expected):
        assert sorted(step) == list(range(8 * s, 8 * s + 8))
    for dp_size in (1, 2, 4):
        assert [samples(step) for step in take(data, 6, dp_size)] == expected
        for start in range(1, 6) if decoder == "cpu" else (4,):
            resumed = take(opened(decoder, sources, tokenizer), 6 - start, dp_size, start)
            assert [samples(step) for step in resumed] == expected[start:]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("decoder", ["dali", "device"])
@pytest.mark.parametrize("share", [ALL, (1, 3), None])
def test_decoders_agree(sources, tokenizer, decoder, workers, share):
    """All but the pictures is the same, bit by bit, and they are nearly."""
    exact = opened("cpu", sources, tokenizer)
    near = opened(decoder, sources, tokenizer, num_workers=workers)
    pictures = 0
    for rank in (0, 1):
        batches = zip(exact.train_loader(2, rank, 2, share), near.train_loader(2, rank, 2, share), strict=True)
        for a, b in itertools.islice(batches, 12):
            assert same(a, replace(b, images=a.images))
            assert (a.images.shape, b.images.dtype) == (b.images.shape, torch.uint8)
            assert ((a.images.int() - b.images.int()).abs().float().flatten(1).mean(1) <= 2).all()
            pictures += len(b.images)
    assert pictures > 30 if share else pictures == 0


def test_samples_are_the_mixtures(sources, tokenizer):
    data = TrainingData.open(run_config(sources, tokenizer))
    got = {k: v for step in take(data, 20, 2) for k, v in samples(step).items()}
    kinds = [got[i][5] for i in range(160)]
    assert [abs(kinds.count(k) - 160 * w) <= 3 for k, w in enumerate((0.45, 0.45, 0.1))] == [True] * 3
    assert [(kinds[i], data.mixture.locate(i)[0]) for i in range(160)] == [(k, k) for k in kinds]
    # An epoch shows each training sequence once: as many different ones as there are.
    size = len(data.train[1])
    order = [data.mixture.locate(i)[1] for i in range(1000) if data.mixture.locate(i)[0] == 1]
    assert sorted(order[:size]) == list(range(size))


def test_ranks_of_a_microbatch_hold_similar_numbers_of_pictures(sources, tokenizer):
    data = TrainingData.open(run_config(sources, tokenizer))
    for step in take(data, 10, 4):
        counts = [batch.num_images for batch in step[0]]
        assert max(counts) - min(counts) <= 5


def test_who_has_the_most_pictures_of_one_microbatch_has_the_fewest_of_the_next(sources, tokenizer):
    data = TrainingData.open(run_config(sources, tokenizer))
    for step in take(data, 10, 2):
        first, second = ([batch.num_images for batch in microbatch] for microbatch in step)
        assert first == sorted(first, reverse=True)
        assert second == sorted(second)
        assert min(first) >= max(second)


def test_pictures_are_those_of_the_source(sources, tokenizer):
    """Placeholder by placeholder against the source's own bytes."""
    data = TrainingData.open(run_config(sources, tokenizer))
    for batch in itertools.islice(data.train_loader(0, 0, 1, ALL), 12):
        expected = []
        for sample in batch.sample_ids.tolist():
            source, sequence = data.mixture.locate(sample)
            for document, start, end in data.train[source].pieces(sequence):
                offsets = data.sources[source].meta(document)["offset"]
                for data_, offset in zip(data.sources[source].image_bytes(document), offsets, strict=True):
                    if start <= offset < end:
                        expected.append(resize(decode_image(bytes(data_)), 16))
        assert batch.num_images == len(expected) == int((batch.tokens == 4).sum()) // 4
        assert [i.tolist() for i in batch.images] == [i.tolist() for i in expected]


@pytest.mark.parametrize("size", [2, 3])
def test_image_shares_join_to_all_pictures(sources, tokenizer, size):
    data = TrainingData.open(run_config(sources, tokenizer))
    whole = list(itertools.islice(data.train_loader(0, 1, 2, ALL), 10))
    shares = [list(itertools.islice(data.train_loader(0, 1, 2, (r, size)), 10)) for r in range(size)]
    for batch, *parts in zip(whole, *shares, strict=True):
        assert torch.equal(torch.cat([part.images for part in parts]), batch.images)
        assert all(same(replace(part, images=batch.images), batch) for part in parts)
    blind = list(itertools.islice(data.train_loader(0, 1, 2, None), 10))
    assert all(same(replace(b, images=batch.images), batch) for b, batch in zip(blind, whole, strict=True))
    assert all(b.images.shape == (0, 3, 16, 16) for b in blind)


@pytest.fixture
def damaged(tmp_path, sources, tokenizer):
    """A copy of the sources whose pictures of pages are all overwritten after ingest."""
    for path in sources.glob("*.*"):
        if path.is_file():
            shutil.copy(path, tmp_path / path.name)
    path = tmp_path / "pages.image.bin"
    path.write_bytes(b"\x55" * path.stat().st_size)
    return tmp_path


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("decoder", DECODERS)
def test_bad_pictures_change_neither_order_nor_shapes(sources, tokenizer, damaged, workers, decoder):
    """I3: everything is as with good pictures, but for the pixels, which are the mean colour."""
    good = opened(decoder, sources, tokenizer)
    bad = opened(decoder, damaged, tokenizer, num_workers=workers, max_bad_image_rate=0.99)
    replaced = 0
    for a, b in zip(
        good.train_loader(0, 0, 1, ALL), itertools.islice(bad.train_loader(0, 0, 1, ALL), 24), strict=False
    ):
        assert a.images.shape == b.images.shape
        changed = (a.images != b.images).flatten(1).any(1)
        assert all(len(image.flatten(1).unique(dim=1)[0]) == 1 for image in b.images[changed])
        replaced += int(changed.sum())
        assert same(replace(a, images=b.images), b)
    assert replaced > 20


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("decoder", DECODERS)
def test_too_many_bad_pictures_end_the_run(tokenizer, damaged, workers, decoder):
    data = opened(decoder, damaged, tokenizer, num_workers=workers, max_bad_image_rate=0.01)
    with pytest.raises(UserError, match=r"data.max_bad_image_rate: too many images do not decode") as caught:
        for _ in itertools.islice(data.train_loader(0, 0, 1, ALL), 400):
            pass
    assert "Traceback" not in str(caught.value)


def test_workers_give_what_the_process_itself_gives(sources, tokenizer):
    alone = TrainingData.open(run_config(sources, tokenizer))
    helped = TrainingData.open(run_config(sources, tokenizer, num_workers=2))
    for start, rank in ((0, 0), (3, 1)):
        batches = zip(alone.train_loader(start, rank, 2, ALL), helped.train_loader(start, rank, 2, ALL), strict=True)
        assert all(same(a, b) for a, b in itertools.islice(batches, 12))
    for source in range(3):
        a, b = (list(data.validation_loader(source, 0, 2, (1, 2))) for data in (alone, helped))
        assert len(a) == len(b) > 0
        assert all(map(same, a, b))


def children() -> set[psutil.Process]:
    """Living ones: earlier tests of the same process may have left some that ended and nobody has waited for."""
    found = set()
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.status() != psutil.STATUS_ZOMBIE:
                found.add(process)
    return found


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_killed_worker_is_an_error_and_no_hang(sources, tokenizer, decoder):
    data = opened(decoder, sources, tokenizer, num_workers=2)
    next(data.train_loader(0, 0, 1, ALL))  # the server of workers is there from now on
    before = children()
    batches = data.train_loader(0, 0, 1, ALL)
    next(batches)
    workers = children() - before
    assert len(workers) == 2
    workers.pop().kill()
    started = time.monotonic()
    with pytest.raises(RuntimeError, match=r"exited unexpectedly|is killed"):
        for _ in itertools.islice(batches, 100):
            pass
    assert time.monotonic() - started < 60
    assert [w for w in workers if w.is_running() and w.status() != psutil.STATUS_ZOMBIE] == []


def anonymous_memory(pid: int) -> int:
    """KiB that a process has of its own, mapped files not counted."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"RssAnon:\s+(\d+) kB", status)[1])


@pytest.mark.parametrize("decoder", DECODERS)
def test_memory_is_flat(sources, tokenizer, decoder):
    """Of the training process and of its worker, over 400 microbatches that are kept for a step each."""
    data = opened(decoder, sources, tokenizer, num_workers=1)
    before = children()
    batches = data.train_loader(0, 0, 1, ALL)

    def go_on(steps):
        for _ in range(steps):
            held = list(itertools.islice(batches, 4))
            assert len(held) == 4

    go_on(50)
    processes = [os.getpid(), *(p.pid for p in children() - before if "forkserver" in " ".join(p.cmdline()))]
    assert len(processes) > 1
    start, files = [anonymous_memory(pid) for pid in processes], len(os.listdir("/proc/self/fd"))
    go_on(100)
    grown = [anonymous_memory(pid) - was for pid, was in zip(processes, start, strict=True)]
    assert max(grown) < 1024, grown  # a fourth of what went through
    assert len(os.listdir("/proc/self/fd")) <= files + 4


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT])
def test_stop_signals_sent_to_all_processes_do_not_stop_the_workers(sources, tokenizer, number):
    """The training process decides: it still needs its data to finish the step."""
    data = TrainingData.open(run_config(sources, tokenizer, num_workers=1))
    alone = TrainingData.open(run_config(sources, tokenizer))
    batches = data.train_loader(0, 0, 1, ALL)
    first = next(batches)
    for process in children():  # also of other tests: servers, ranks
        if "forkserver" in " ".join(process.cmdline()):
            os.kill(process.pid, number)
    got = [first, *itertools.islice(batches, 15)]
    assert all(same(a, b) for a, b in zip(alone.train_loader(0, 0, 1, ALL), got, strict=False))


@pytest.mark.parametrize("dp_size", [1, 2, 4])
def test_validation(sources, tokenizer, dp_size):
    """Each held-out sequence once, in whole global batches; as many microbatches on each rank."""
    data = TrainingData.open(run_config(sources, tokenizer, validation_fraction=0.2))
    for source in range(3):
        ranks = [list(data.validation_loader(source, r, dp_size, ALL)) for r in range(dp_size)]
        assert len({len(batches) for batches in ranks}) == 1
        size = len(data.validation[source])
        ids = [i for batches in ranks for batch in batches for i in batch.sample_ids.tolist()]
        wanted = min(size, 16)
        assert sorted(i for i in ids if i >= 0) == list(range(wanted))
        assert len(ids) == -(-wanted // 8) * 8
        held_out = sum(int(b.loss_mask.sum()) for batches in ranks for b in batches)
        for batches in ranks:
            for batch in batches:
                filler = batch.sample_ids < 0
                assert not batch.loss_mask[filler].any()
                assert (batch.documents[filler] == -1).all()
                assert (batch.source_ids == source).all()
        if size <= 16:
            expected = [p for i in range(size) for p in data.validation[source].pieces(i)]
            texts = [data.sources[source].text(d)[start + 1 : end + 1] for d, start, end in expected]
            assert held_out == int((np.concatenate(texts) != 4).sum())


def test_no_held_out_documents(sources, tokenizer):
    data = TrainingData.open(run_config(sources, tokenizer, validation_fraction=0.0))
    assert list(data.validation_loader(0, 0, 1, ALL)) == []


def test_block_attention_off(sources, tokenizer):
    data = TrainingData.open(run_config(sources, tokenizer, block_attention=False))
    batch = next(data.train_loader(0, 0, 1, ALL))
    used = batch.documents >= 0
    assert set(batch.documents.unique().tolist()) <= {0, -1}
    assert torch.equal(batch.position_ids[used], torch.arange(64).expand(2, -1)[used])


def test_report_and_attributes(sources, tokenizer):
    config = run_config(sources, tokenizer)
    TrainingData.prepare(config)
    data = TrainingData.open(config)
    assert data.source_names == ["captions", "pages", "words"]
    assert data.tokenizer.hash == tokenizer.hash
    layout = data.layout
    assert (layout.seq_length, layout.max_images, layout.tokens_per_image, layout.image_token_id) == (64, 5, 4, 4)
    head, *lines = data.report().splitlines()
    assert head == "80 sequences of 64 positions in 10 steps:"
    assert [line.split()[0] for line in lines] == data.source_names


def test_report_tells_when_sources_repeat(sources, tokenizer):
    """Against the sequences of every step, one by one."""
    # Captions are few sequences and repeat; text has so little weight that it does not.
    data = TrainingData.open(run_config(sources, tokenizer, training={"steps": 30}))
    shown: dict[int, list[int]] = {k: [] for k in range(3)}
    first: dict[int, int] = {}
    for sample in range(30 * 8):
        source, sequence = data.mixture.locate(sample)
        if sequence in shown[source]:
            first.setdefault(source, sample // 8 + 1)
        shown[source].append(sequence)
    assert 0 < len(first) < 3
    for k, line in enumerate(data.report().splitlines()[1:]):
        times = len(shown[k]) / len(data.train[k])
        repeats = f"repeats from step {first[k]} on" if k in first else "no sequence twice"
        assert f"{len(shown[k]) / 240:.1%} of the run, seen {times:.2f} times over, {repeats};" in line


def test_caches_go_where_the_config_says(sources, tokenizer, tmp_path):
    data = TrainingData.open(run_config(sources, tokenizer, cache_dir=str(tmp_path / "cache"), seq_length=72))
    assert len(list((tmp_path / "cache").iterdir())) == 6
    assert data.layout.seq_length == 72


class TestChecksBeforeTraining:
    def test_another_tokenizer(self, sources, tokenizer, tmp_path):
        train_tokenizer([" something else"] * 50, tmp_path / "other.model", 275)
        config = run_config(sources, tokenizer, tokenizer=str(tmp_path / "other.model"))
        for check in (TrainingData.prepare, TrainingData.open):
            with pytest.raises(UserError, match="captions: the tokenizer is not the one"):
                check(config)

    @pytest.mark.parametrize("check", [TrainingData.prepare, TrainingData.open])
    def test_dali_is_not_installed(self, sources, tokenizer, monkeypatch, check):
        monkeypatch.setitem(sys.modules, "nvidia.dali", None)
        with pytest.raises(UserError, match=r"data.decode_backend: .*\n.*\n.*megatron-mm\[dali-cu13\]"):
            check(run_config(sources, tokenizer, decode_backend="dali"))

    def test_vocabulary_too_small(self, sources, tokenizer):
        config = run_config(sources, tokenizer)
        model = replace(config.model, decoder=replace(config.model.decoder, vocab_size=300))
        with pytest.raises(UserError, match=r"model.decoder.vocab_size: .*\n.*300\n.*at least 320"):
            TrainingData.open(replace(config, model=model))

    def test_missing_source(self, sources, tokenizer):
        where = {"path": str(sources / "nowhere"), "weight": 1.0}
        with pytest.raises(UserError, match=r"nowhere.manifest.json: there is no such source"):
            TrainingData.open(run_config(sources, tokenizer, sources=[where]))

    def test_truncated_source(self, damaged, tokenizer):
        path = damaged / "words.text.bin"
        path.write_bytes(path.read_bytes()[:-2])
        with pytest.raises(UserError, match=r"words.text.bin: .*truncated"):
            TrainingData.open(run_config(damaged, tokenizer))

    def test_nothing_left_to_train_on(self, tokenizer, tmp_path):
        write(tmp_path / "one", tokenizer, ["red"])
        where = {"path": str(tmp_path / "one"), "weight": 1.0}
        assert len(Source(tmp_path / "one")) == 1
        with pytest.raises(UserError, match=r"data.sources.0: .*no sequence to train on"):
            TrainingData.open(run_config(tmp_path, tokenizer, sources=[where], validation_fraction=0.99))


def test_no_file_of_the_data_path_is_a_pickle(sources, tokenizer):
    TrainingData.prepare(run_config(sources, tokenizer))
    written = [path for path in Path(sources).rglob("*") if path.is_file()]
    assert {path.suffix for path in written} == {".bin", ".idx", ".npy", ".json"}
    for path in written:
        if path.suffix == ".npy":
            np.load(path, allow_pickle=False)
