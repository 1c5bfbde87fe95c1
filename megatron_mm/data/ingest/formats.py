"""Every format that can be read, by the name it has on the command line."""

from megatron_mm.data.ingest import Format
from megatron_mm.data.ingest.coco import COCO
from megatron_mm.data.ingest.html import HTML
from megatron_mm.data.ingest.jsonl import JSONLines
from megatron_mm.data.ingest.llava import LLaVA
from megatron_mm.data.ingest.mmc4 import MMC4
from megatron_mm.data.ingest.obelics import Obelics
from megatron_mm.data.ingest.parquet import Parquet
from megatron_mm.data.ingest.webdataset import WebDataset

_ALL: tuple[Format, ...] = (
    JSONLines(),
    WebDataset(),
    Parquet(),
    Obelics(),
    MMC4(),
    COCO(),
    LLaVA(),
    HTML(),
)

FORMATS: dict[str, Format] = {format.name: format for format in _ALL}
