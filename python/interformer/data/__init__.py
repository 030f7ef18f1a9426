"""Data readers: each returns `Splits`, the clicks of one data set in three parts (train, valid, test)."""

from interformer.data.beauty import read_beauty
from interformer.data.clicks import Clicks, Splits
from interformer.data.completejourney import read_completejourney
from interformer.data.delimited import CsvSchema, SchemaError, load_schema, read_csv, shipped_schemas
from interformer.data.errors import MalformedFileError
from interformer.data.movielens import read_movielens
from interformer.data.registry import READERS, read
from interformer.data.synthetic import SyntheticLaw, synthesize

__all__ = [
    "READERS",
    "Clicks",
    "CsvSchema",
    "MalformedFileError",
    "SchemaError",
    "Splits",
    "SyntheticLaw",
    "load_schema",
    "read",
    "read_beauty",
    "read_completejourney",
    "read_csv",
    "read_movielens",
    "shipped_schemas",
    "synthesize",
]
