"""Sources: a release's config and tensors, known from headers alone, and their bytes on demand."""

from converter.source.folder import folder_of, open_folder
from converter.source.header import (
    Header,
    TensorInfo,
    fetch_header,
    header_digest,
    parse_header,
    read_header,
)
from converter.source.index import Selection, WeightIndex, parse_index, select_weights
from converter.source.model import Source, SourceFile, Stored, build_source
from converter.source.reader import Reader

__all__ = [
    "Header",
    "Reader",
    "Selection",
    "Source",
    "SourceFile",
    "Stored",
    "TensorInfo",
    "WeightIndex",
    "build_source",
    "fetch_header",
    "folder_of",
    "header_digest",
    "open_folder",
    "parse_header",
    "parse_index",
    "read_header",
    "select_weights",
]
