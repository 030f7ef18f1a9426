"""Data readers: each returns `Splits`, the clicks of one data set in three parts."""

from interformer.data.atomic import MalformedFileError
from interformer.data.clicks import Clicks, Splits
from interformer.data.movielens import read_movielens
from interformer.data.synthetic import SyntheticLaw, synthesize

__all__ = ["Clicks", "MalformedFileError", "Splits", "SyntheticLaw", "read_movielens", "synthesize"]
