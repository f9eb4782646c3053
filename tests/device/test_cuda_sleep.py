"""An engine on a real GPU gives its memory back, takes it again, and answers as before."""

from __future__ import annotations

import pytest
import torch

from halyard.hal.devices.cuda import CudaDevice
from halyard.hal.devices.rocm import RocmDevice
from halyard.hal.errors import CapacityError
from halyard.models.shapes import shape_config
from halyard.runtime.llm import LLM
from halyard.runtime.request import SamplingParams

PROBE = (RocmDevice if torch.version.hip else CudaDevice).probe()
pytestmark = pytest.mark.skipif(
    not PROBE.available, reason="no GPU here: " + "; ".join(PROBE.reasons)
)


def test_sleep_and_wake_twice() -> None:
    """Twice: what was recorded before the first sleep must not be in the way of the second."""
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    prompts = [[5, 6, 7], [8, 9, 10, 11]]
    with LLM(
        shape_config("160m"), load_format="dummy", dtype="float16", max_model_len=512,
        kv_blocks=4096, host_kv_blocks=64,
    ) as llm:  # fmt: skip
        before = [o.outputs[0].token_ids for o in llm.generate(prompts, params, use_tqdm=False)]
        executor = llm.engine.executor
        pool = executor.pool.data
        size, tier = pool.numel() * pool.element_size(), executor.host_pool
        del pool
        for _ in range(2):
            free = torch.cuda.mem_get_info()[0]
            llm.engine.sleep()
            gained = torch.cuda.mem_get_info()[0] - free
            assert gained > 0.9 * (size + executor.program.weight_bytes)
            assert executor.host_pool is tier
            room = torch.cuda.mem_get_info()[0]
            hog = torch.empty(room - (256 << 20), dtype=torch.uint8, device="cuda")
            with pytest.raises(CapacityError):
                llm.engine.wake()
            del hog
            torch.cuda.empty_cache()
            llm.engine.wake()
            again = [o.outputs[0].token_ids for o in llm.generate(prompts, params, use_tqdm=False)]
            assert again == before
