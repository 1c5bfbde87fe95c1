"""Look into sources.

python tools/inspect_data.py stats PREFIX … [--plot FILE.png]      counts, lengths, picture sizes
python tools/inspect_data.py verify PREFIX …                       read everything: digests, ids, each picture's crc32
python tools/inspect_data.py show PREFIX --tokenizer FILE.model --output FILE.html     documents as a page
python tools/inspect_data.py show --config RUN.yaml --sequences 0:8 --output FILE.html  what a run trains on
python tools/inspect_data.py merge PREFIX … --output PREFIX        several sources as one
"""

import argparse
import re
from pathlib import Path

from megatron_mm.data.inspect.progress import ByteProgress
from megatron_mm.data.source import Source, verify_source
from megatron_mm.errors import UserError, run_cli


def stats(args: argparse.Namespace) -> None:
    from megatron_mm.data.inspect.stats import stats as told

    sources = [Source(prefix) for prefix in args.prefix]
    for source in sources:
        print(told(source))
    if args.plot:
        from megatron_mm.data.inspect.plots import plot

        plot(sources, args.plot)
        print(f"plots: {args.plot}")


def verify(args: argparse.Namespace) -> None:
    for prefix in args.prefix:
        progress = ByteProgress(prefix)
        source = verify_source(prefix, progress=progress)
        progress.end()
        print(f"{prefix}: whole; {len(source)} documents, {source.manifest['images']} images")


def show(args: argparse.Namespace) -> None:
    if (args.prefix is None) == (args.config is None):
        raise UserError("show takes either a source's PREFIX or --config", where="show")
    # torch takes seconds to import: not before the arguments are known to be good.
    if args.config:
        _refuse(args, "--config", "documents", "start", "random", "tokenizer")
        samples = _range(args.sequences or "0:8")
        from megatron_mm.data.inspect.show import show_sequences

        size = show_sequences(args.config, samples, args.output)
    else:
        _refuse(args, "a PREFIX", "sequences")
        if not args.tokenizer:
            raise UserError("is needed to read a source's text", where="--tokenizer")
        if args.start is not None and args.random is not None:
            raise UserError("choose one", where="--start, --random")
        from megatron_mm.data.inspect.show import choose, show_documents
        from megatron_mm.data.tokenizer import open_tokenizer

        source = Source(args.prefix)
        documents = choose(len(source), 20 if args.documents is None else args.documents, args.start, args.random)
        size = show_documents(source, documents, open_tokenizer(args.tokenizer), args.output)
    print(f"{args.output}: {size / 1e6:.1f} MB; open it in a browser")


def merge(args: argparse.Namespace) -> None:
    from megatron_mm.data.source_merge import merge_sources

    progress = ByteProgress(str(args.output))
    manifest = merge_sources(args.prefix, args.output, progress=progress)
    progress.end()
    print(
        f"{args.output}: {manifest['documents']} documents, {manifest['images']} images, {manifest['tokens']} tokens "
        f"of {len(args.prefix)} sources"
    )


def _refuse(args: argparse.Namespace, beside: str, *names: str) -> None:
    for name in names:
        if getattr(args, name) is not None:
            raise UserError(f"has no meaning with {beside}", where=f"--{name}")


def _range(text: str) -> range:
    found = re.fullmatch(r"(\d+):(\d+)|(\d+)", text)
    if not found:
        raise UserError("not a range", where="--sequences", found=text, allowed="START:END, or one number")
    if found[3]:
        return range(int(found[3]), int(found[3]) + 1)
    return range(int(found[1]), int(found[2]))


def _count(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 0 or more")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    commands = parser.add_subparsers(required=True, metavar="stats | verify | show | merge")

    command = commands.add_parser("stats", help="counts, lengths, picture sizes; histograms as a PNG")
    command.add_argument("prefix", nargs="+", metavar="PREFIX", help="of a source's files")
    command.add_argument("--plot", type=Path, metavar="FILE.png", help="histograms, the sources side by side")
    command.set_defaults(action=stats)

    command = commands.add_parser("verify", help="read everything: digests, ids, each picture's crc32")
    command.add_argument("prefix", nargs="+", metavar="PREFIX", help="of a source's files")
    command.set_defaults(action=verify)

    command = commands.add_parser("show", help="documents, or a run's sequences, as one HTML page")
    command.add_argument("prefix", nargs="?", metavar="PREFIX", help="of a source's files")
    command.add_argument("--output", type=Path, required=True, metavar="FILE.html", help="the page, one file")
    command.add_argument("--tokenizer", metavar="PATH", help="that the source was made with")
    command.add_argument("--documents", type=_count, metavar="N", help="how many (default 20)")
    command.add_argument("--start", type=_count, metavar="N", help="the first one (default 0)")
    command.add_argument("--random", type=_count, metavar="SEED", help="instead, N at random")
    command.add_argument("--config", type=Path, metavar="RUN.yaml", help="show sequences of this run")
    command.add_argument("--sequences", metavar="START:END", help="which, in the run's order (default 0:8)")
    command.set_defaults(action=show)

    command = commands.add_parser("merge", help="several sources of one kind and tokenizer as one")
    command.add_argument("prefix", nargs="+", metavar="PREFIX", help="of a source's files; their order is kept")
    command.add_argument("--output", type=Path, required=True, metavar="PREFIX", help="of the files written")
    command.set_defaults(action=merge)
    return parser


def main() -> None:
    args = _parser().parse_args()
    args.action(args)


if __name__ == "__main__":
    run_cli(main)
