"""TorchRec's tensors and tables as inputs of the ops and of InterFormer."""

from __future__ import annotations

import pytest
import torch
from interformer import InterFormer, InterFormerConfig
from interformer.batch import Batch
from interformer.testing import random_batch, small_schema
from torch import Tensor, nn

from interformer_kernels import jagged, pma_pooling

try:
    import torchrec
except (ImportError, OSError) as error:  # OSError: fbgemm's library was built for another torch
    pytest.skip(f"needs torchrec (tests/requirements-torchrec.txt): {error}", allow_module_level=True)

SCHEMA = small_schema()
WIDTH = 8
CONFIG = InterFormerConfig(embed_dim=WIDTH, num_heads=2, num_layers=1, pffn_hidden=(6,), max_history=20)


def keyed_ids() -> torchrec.KeyedJaggedTensor:
    """Clicks and carts of three users; one has no clicks and one no carts."""
    lengths = torch.tensor([2, 0, 3, 1, 2, 0])
    return torchrec.KeyedJaggedTensor.from_lengths_sync(
        ["click", "cart"], torch.tensor([3, 1, 4, 1, 5, 2, 6, 0]), lengths
    )


def config_of(kind: type, name: str, size: int, features: list[str], **options: object) -> object:
    return kind(name=name, embedding_dim=WIDTH, num_embeddings=size, feature_names=features, **options)


def test_one_key_of_a_keyed_tensor() -> None:
    for key, values, offsets in (("click", [3, 1, 4, 1, 5], [0, 2, 2, 5]), ("cart", [2, 6, 0], [0, 1, 3, 3])):
        result = jagged.from_torchrec(keyed_ids()[key])
        assert result.values.tolist() == values
        assert result.offsets.tolist() == offsets
    with pytest.raises(TypeError, match="the tensor of one key"):
        jagged.from_torchrec(keyed_ids())


def test_round_trip() -> None:
    values = torch.randn(7, 3)
    torchrec_tensor = jagged.to_torchrec(values, torch.tensor([0, 2, 2, 5]), torchrec.JaggedTensor)
    assert isinstance(torchrec_tensor, torchrec.JaggedTensor)
    assert torchrec_tensor.lengths().tolist() == [2, 0, 3]
    back = jagged.from_torchrec(torchrec_tensor)
    assert torch.equal(back.values, values[:5])
    assert back.offsets.tolist() == [0, 2, 2, 5]


def test_pooling_of_a_collection_is_torchrecs() -> None:
    """Equal scores give a mean: rows and table gradients equal those of an `EmbeddingBagCollection`."""
    features = ["click", "cart"]
    mean = torchrec.PoolingType.MEAN
    bags = torchrec.EmbeddingBagCollection(
        tables=[config_of(torchrec.EmbeddingBagConfig, "item", 7, features, pooling=mean)]
    )
    rows = torchrec.EmbeddingCollection(tables=[config_of(torchrec.EmbeddingConfig, "item", 7, features)])
    table = bags.embedding_bags["item"].weight
    rows.embeddings["item"].weight.data.copy_(table.data)
    pooled, tokens = bags(keyed_ids()), rows(keyed_ids())
    weights, expected, actual = torch.randn(2, 3, WIDTH), [], []
    for key in features:
        values, offsets = jagged.from_torchrec(tokens[key])
        actual.append(pma_pooling(values.new_zeros(1, 1, WIDTH), values[:, None], None, offsets).flatten(1))
        expected.append(pooled[key])
    torch.testing.assert_close(actual, expected)
    (torch.stack(actual) * weights).sum().backward()
    (torch.stack(expected) * weights).sum().backward()
    torch.testing.assert_close(rows.embeddings["item"].weight.grad, table.grad)


class TorchRecEmbedding(nn.Module):
    """The interface of InterFormer's embedding on TorchRec's tables: `tokens(batch)` and `events(batch)`.

    Static fields are bags of one id each, so that the collection's `KeyedTensor` holds their tokens by name; dense
    scalars are unchanged.
    """

    def __init__(self, like: nn.Module) -> None:
        super().__init__()
        self.dense = like.dense
        fields = {field.name: field.table for field in SCHEMA.categorical}
        events = {field.name: field.table for field in SCHEMA.sequences}
        self.bags = torchrec.EmbeddingBagCollection(tables=self._tables(torchrec.EmbeddingBagConfig, fields))
        self.rows = torchrec.EmbeddingCollection(tables=self._tables(torchrec.EmbeddingConfig, events))
        for name, weight in like.tables.named_parameters():
            for parameter in self.parameters_of(name.removesuffix(".weight")):
                parameter.data.copy_(weight.data)

    @staticmethod
    def _tables(kind: type, fields: dict[str, str]) -> list[object]:
        tables = dict.fromkeys(fields.values())
        return [config_of(kind, t, SCHEMA.tables[t], [f for f in fields if fields[f] == t]) for t in tables]

    def parameters_of(self, table: str) -> list[Tensor]:
        """The two copies of a table, which TorchRec does not share between bags and rows, if there are both."""
        collections = self.bags.embedding_bags, self.rows.embeddings
        return [tables[table].weight for tables in collections if table in tables]

    def tokens(self, batch: Batch) -> Tensor:
        names = [field.name for field in SCHEMA.categorical]
        ids = batch.categorical.T.flatten()
        keyed = self.bags(torchrec.KeyedJaggedTensor.from_lengths_sync(names, ids, torch.ones_like(ids)))
        return torch.stack([self.dense(batch.dense), *(keyed[name] for name in names)], 1)

    def events(self, batch: Batch) -> Tensor:
        names = [field.name for field in SCHEMA.sequences]
        ids, lengths = batch.sequences.T.flatten(), batch.offsets.diff().repeat(len(names))
        keyed = self.rows(torchrec.KeyedJaggedTensor.from_lengths_sync(names, ids, lengths))
        return torch.cat([jagged.from_torchrec(keyed[name]).values for name in names], 1)


def test_interformer_over_torchrecs_tables() -> None:
    """Logits equal those with its own tables; gradients too, after those of a table's copies are added."""
    batch = random_batch(SCHEMA, (3, 0, 9, 1))
    model = InterFormer(CONFIG, SCHEMA).eval()
    expected = model(batch)
    expected.square().sum().backward()
    expected_grads = {name: table.weight.grad for name, table in model.embedding.tables.items()}
    model.embedding = torchrec_tables = TorchRecEmbedding(model.embedding)
    actual = model(batch)
    torch.testing.assert_close(actual, expected)
    actual.square().sum().backward()
    for name, gradient in expected_grads.items():
        torch.testing.assert_close(sum(weight.grad for weight in torchrec_tables.parameters_of(name)), gradient)
