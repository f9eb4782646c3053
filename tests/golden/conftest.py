"""What several of these tests start from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from recorders import BACKEND, record
from tiny_models import save_tiny_model

from halyard import LLM
from halyard.runtime.batcher import Batcher


@pytest.fixture
def recorded(tmp_path: Path) -> Any:
    """An engine whose steps are recorded, its device and its program."""
    save_tiny_model("llama", tmp_path)
    with LLM(
        tmp_path, backend=BACKEND, kv_blocks=64, max_num_sequences=40, max_model_len=128
    ) as llm:
        device, captured = record(llm, 40, 8)
        llm.engine.executor.batcher = Batcher(16, 8, captured.decode_shape, captured.buffer)
        yield llm, device, captured
