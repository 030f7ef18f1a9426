"""InterFormer (arXiv 2411.09852) in PyTorch: the model, data readers, training and metrics; `python -m interformer`.

The model needs PyTorch alone; `interformer.data`, `metrics` and `train` need the `train` extra.
"""

from interformer.batch import Batch
from interformer.config import InterFormerConfig
from interformer.model import InterFormer
from interformer.schema import Field, Schema

__all__ = ["Batch", "Field", "InterFormer", "InterFormerConfig", "Schema"]
