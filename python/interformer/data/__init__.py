"""Data readers: each returns `Splits`, the clicks of one data set in three parts."""

from interformer.data.beauty import read_beauty
from interformer.data.clicks import Clicks, Splits
from interformer.data.errors import MalformedFileError
from interformer.data.movielens import read_movielens
from interformer.data.synthetic import SyntheticLaw, synthesize

__all__ = ["Clicks", "MalformedFileError", "Splits", "SyntheticLaw", "read_beauty", "read_movielens", "synthesize"]
