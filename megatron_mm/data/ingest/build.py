"""Records to a source, by any number of workers, continued after a kill.

    inputs ──chunks──▶ shares ──workers──▶ OUTPUT.shards/N.* ──merge, in order──▶ OUTPUT.*

How the input is cut depends on the input alone, and a shard on its share alone: so the source is the same, byte for
byte, whatever the number of workers and however often the build was killed and started again.
"""

import os
import shutil
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from megatron_mm.config import Kind
from megatron_mm.data.ingest import Format
from megatron_mm.data.ingest.document import Document, make_document
from megatron_mm.data.ingest.filters import Filters
from megatron_mm.data.ingest.formats import FORMATS
from megatron_mm.data.ingest.merge import merge_shards
from megatron_mm.data.ingest.progress import Progress
from megatron_mm.data.ingest.shards import AGAIN, CONTINUE, SHARD_FILE, Job, Report, Share, Tally, make_shares
from megatron_mm.data.ingest.workers import Processes, Team
from megatron_mm.data.source_files import file_of
from megatron_mm.data.source_writer import SourceWriter
from megatron_mm.data.tokenizer import Tokenizer
from megatron_mm.errors import UserError

__all__ = ["Document", "Summary", "build_source", "make_document"]

RATE_AFTER = 100  # records, before the rate of bad ones can stop the build


@dataclass(frozen=True)
class Summary:
    """What became of the input."""

    documents: int
    images: int
    tokens: int
    bad: int
    reasons: dict[str, int]  # a reason's text up to its colon → records
    filtered_documents: dict[str, int]  # a filter's reason → documents
    filtered_images: dict[str, int]
    damaged: list[str]  # inputs whose rest could not be read, and why
    shards: int
    reused: int  # shards that an earlier run had made
    seconds: float


def build_source(
    inputs: Sequence[Path],
    prefix: Path,
    kind: Kind,
    tokenizer: Tokenizer,
    *,
    format: Format = FORMATS["jsonl"],
    filters: Filters | None = None,
    max_bad_rate: float = 0.05,
    max_image_pixels: int = 40_000_000,
    team: Team | None = None,
    made: dict[str, Any] | None = None,
    stream: TextIO | None = None,
) -> Summary:
    """Read the inputs and write a source; an older one of the same prefix is replaced only when this completes.

    Args:
        filters: None: nothing is filtered.
        max_bad_rate: of the records read; above it (after the first 100, and at the end) the build stops.
        max_image_pixels: pictures whose header claims more are refused before decoding.
        team: who makes the shards; None: a process a core.
        made: kept in the manifest, for people.
        stream: of the progress lines; None: stderr.
    Raises:
        UserError: an input cannot be read, too many records are bad, none is good, a worker died, or the disk is full.
            Finished shards are kept: the same call continues with them.
    """
    filters = filters or Filters()
    if kind == "text" and filters != Filters():
        raise UserError("filters are for documents with images", where="--filter", found="kind text")
    shares = make_shares(format.chunks(inputs))
    job = Job(
        file_of(prefix, "shards"), format, kind, tokenizer.path, tokenizer.hash, max_image_pixels, filters
    )  # fmt: skip
    progress = Progress(prefix.name, stream, sum(share.bytes for share in shares), len(shares))
    quarantine = _Quarantine(prefix, job)
    # First, as it keeps other builds of this source out.
    with SourceWriter(prefix, kind, tokenizer, AGAIN) as writer:
        try:
            reused = _make_shards(job, shares, team or Processes(), progress, max_bad_rate, quarantine)
            tally = progress.tally
            filled = [job.prefix(share.number) for share in shares if job.holds_documents(share.number)]
            tally.add(merge_shards(filled, writer, filters, progress))
            quarantine.write()
            bad, pages, pictures = map(_counts, (tally.bad, tally.filtered_documents, tally.filtered_images))
            became = {"bad": bad, "filtered_documents": pages, "filtered_images": pictures, "damaged": tally.damaged}
            manifest = writer.finish((made or {}) | became)
        except BaseException:
            progress.clear()
            with suppress(UserError):  # the first error is the one to tell
                quarantine.write(keep_older=True)
            # By what lies there: a shard may be finished that nobody has heard of yet.
            _tidy(job.folder, keep_finished=any(job.holds_documents(share.number) for share in shares))
            raise
        _tidy(job.folder, keep_finished=False)  # while the writer still keeps other builds of this source out
    progress.clear()
    return Summary(
        documents=manifest["documents"],
        images=manifest["images"],
        tokens=manifest["tokens"],
        bad=tally.bad.total(),
        reasons=bad,
        filtered_documents=pages,
        filtered_images=pictures,
        damaged=tally.damaged,
        shards=len(shares),
        reused=reused,
        seconds=progress.seconds,
    )


def _counts(counter: Counter[str]) -> dict[str, int]:
    """Most frequent first."""
    return dict(sorted(counter.items(), key=lambda item: (-item[1], item[0])))


def _make_shards(
    job: Job, shares: Sequence[Share], team: Team, progress: Progress, max_bad_rate: float, quarantine: "_Quarantine"
) -> int:
    """Make the shards that an earlier run has not made. Returns the number of those that it has."""
    try:
        job.folder.mkdir(exist_ok=True)
    except OSError as error:
        raise UserError("cannot make a folder", where=str(job.folder), found=error.strerror) from None
    waiting = []
    for share in shares:
        if (tally := job.finished(share)) is not None:
            progress.reuse(tally)
            quarantine.numbers.add(share.number)
        else:
            waiting.append(share)
    if len(waiting) < len(shares):
        progress.say(f"{len(shares) - len(waiting)} of {len(shares)} shards were finished before")
    # What goes into shards and the source is mostly no less than the input, images in base64 aside.
    if (free := shutil.disk_usage(job.folder).free) < sum(share.bytes for share in waiting):
        progress.say(f"only {free / 1e9:.1f} GB are free for {progress.size / 1e9:.1f} GB of input: it may not fit")

    def hear(report: Report) -> None:
        quarantine.numbers.add(report.number)
        progress.hear(report)
        _check_rate(progress.tally, max_bad_rate, RATE_AFTER, quarantine.path)

    if waiting:
        team.make(job, waiting, hear)
    _check_rate(progress.tally, max_bad_rate, 0, quarantine.path)
    return len(shares) - len(waiting)


def _check_rate(tally: Tally, allowed: float, after: int, path: Path) -> None:
    seen, bad = tally.records, tally.bad.total()
    if seen > after and bad > allowed * seen:
        reasons = ", ".join(f"{n} × {reason}" for reason, n in _counts(tally.bad).items())
        raise UserError(
            "too many bad records", where=str(path), found=f"{bad} of {seen}: {reasons}",
            allowed=f"at most {allowed:.2%}",
            do=f"see the reasons there; mend the input or raise --max-bad-rate, then {CONTINUE}",
        )  # fmt: skip


class _Quarantine:
    """`X.quarantine.jsonl`: one line a bad record, in the input's order. It replaces an older build's.

    Attributes:
        numbers: shards of this run, whose lines it takes together.
    """

    def __init__(self, prefix: Path, job: Job) -> None:
        self.path, self.partial = file_of(prefix, "quarantine.jsonl"), file_of(prefix, "quarantine.jsonl.partial")
        self.job, self.numbers = job, set[int]()

    def write(self, keep_older: bool = False) -> None:
        """Put it in place; it is absent when all were good. `keep_older`: then an older one stays.

        It is written also when the build fails: the reasons are what the user needs then.
        """
        try:
            with self.partial.open("wb") as file:
                for number in sorted(self.numbers):
                    with suppress(FileNotFoundError), self.job.quarantine(number).open("rb") as lines:
                        shutil.copyfileobj(lines, file)
                empty = not file.tell()
            if not empty:
                os.replace(self.partial, self.path)
            elif not keep_older:
                self.path.unlink(missing_ok=True)
        except OSError as error:
            raise UserError("cannot write the quarantine", where=str(self.path), found=error.strerror) from None
        finally:
            self.partial.unlink(missing_ok=True)


def _tidy(folder: Path, keep_finished: bool) -> None:
    """Remove shards, or only pieces of unfinished ones; the folder too if it is empty then."""
    try:
        names = [name for name in os.listdir(folder) if SHARD_FILE.fullmatch(name)]
    except OSError:
        return
    finished = {name.partition(".")[0] for name in names if name.endswith(".done.json")} if keep_finished else set()
    # Marks that shards are done go first: no half-removed shard may look finished.
    for name in sorted(names, key=lambda name: not name.endswith(".done.json")):
        if name.partition(".")[0] not in finished:
            (folder / name).unlink(missing_ok=True)
    with suppress(OSError):  # something of somebody else's lies there
        folder.rmdir()
