"""Every format that can be read, by the name it has on the command line."""

from megatron_mm.data.ingest import Format

FORMATS: dict[str, Format] = {}
