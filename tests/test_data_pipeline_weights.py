"""The identity of a checkpoint."""

import pytest

from data_pipeline.checkpoints import hash_weights
from infra.errors import UserError


def test_a_hash_sees_contents_and_not_the_card(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"a")
    first = hash_weights(tmp_path)
    (tmp_path / "README.md").write_text("a card")
    assert hash_weights(tmp_path) == first
    (tmp_path / "model.safetensors").write_bytes(b"bb")
    assert hash_weights(tmp_path) != first
    with pytest.raises(UserError, match="no weights there"):
        hash_weights(tmp_path / "missing")
