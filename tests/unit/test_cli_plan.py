"""The command line's frame, `plan`, `devices`, and the sizing that the engine shares with `plan`."""

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from halyard.api.cli.main import COMMANDS, main
from halyard.hal.errors import CapacityError, ConfigError
from halyard.hal.types import DeviceInfo
from halyard.models.shapes import shape_config
from halyard.models.spec import ModelSpec
from halyard.runtime.config import EngineConfig
from halyard.runtime.planner import CPU_KV_BYTES, fit_memory, gpu_batched_tokens, make_plan

GIB = 2**30
PKG = Path(__file__).resolve().parents[2] / "pkg"


def command(*words: str, **options):
    return subprocess.run(
        [sys.executable, "-m", "halyard.api.cli.main", *words],
        env={"PYTHONPATH": str(PKG), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False, timeout=120, **options,
    )  # fmt: skip


# ---- the frame


def test_help_is_quick_and_names_every_command():
    started = time.perf_counter()
    done = command("--help")
    assert done.returncode == 0
    assert time.perf_counter() - started < 3, "something heavy is imported before it is needed"
    for name in COMMANDS:
        assert name in done.stdout


def test_alone_it_prints_help(capsys):
    assert main([]) == 0
    assert "serve" in capsys.readouterr().out


def test_version(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith("halyard 0.")


@pytest.mark.parametrize("name", list(COMMANDS))
def test_every_command_has_help(name, capsys):
    with pytest.raises(SystemExit) as caught:
        main([name, "--help"])
    assert caught.value.code == 0
    assert name in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["plan", "/no/such/folder"], "/no/such/folder"),
        (["plan", "--backend", "cupid"], "no backend 'cupid'"),
        (["plan", "--backend", "rocm"], "can't run here"),
        (["plan", "--block-size", "0"], "block_size must be at least 1"),
        (["plan", "--memory-utilization", "2"], "memory_utilization must be"),
        (["plan", "--max-model-len", "100000000"], "max_model_len"),
        (["plan", "--matrix", "gone.yaml"], "gone.yaml"),
        (["devices", "--matrix", "gone.yaml"], "gone.yaml"),
    ],
)
def test_mistakes_are_one_line(words, told, capsys):
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("halyard: ")
    assert told in error
    assert error.count("\n") == 1


def test_ctrl_c_is_quiet(monkeypatch, capsys):
    from halyard.api.cli import devices

    def interrupt(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(devices, "run", interrupt)
    assert main(["devices"]) == 130
    assert capsys.readouterr().err == ""


def test_a_reader_that_goes_away_is_no_crash():
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "halyard.api.cli.main", "devices"],
        env={"PYTHONPATH": str(PKG), "PATH": "/usr/bin:/bin"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    assert process.wait(60) == 0
    assert errors == ""


# ---- devices and plan


def test_devices_for_machines(capsys):
    assert main(["devices", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["devices"]["cpu"]["available"]
    reports = {report["name"]: report for report in facts["backends"]}
    assert reports["reference"]["available"]
    assert not reports["rocm"]["available"]
    assert len(reports["cuda-onnx"]["reasons"]) >= 2


def test_devices_for_people(capsys):
    assert main(["devices"]) == 0
    out = capsys.readouterr().out
    assert "cores" in out
    assert "can run" in out
    assert "cannot" in out


def test_plan_of_a_shape_reads_no_weights(capsys):
    assert main(["plan", "--shape", "160m", "--backend", "reference", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["backend"] == "reference"
    assert facts["model"]["parameters"] > 100e6
    assert facts["memory"]["num_blocks"] > 0
    assert {report["backend"] for report in facts["rejected"]} >= {"cuda", "rocm", "onnx"}
    assert all(report["reasons"] for report in facts["rejected"])
    assert facts["limits"]["decode_tokens_per_second_at_one_sequence"] > 0


def test_plan_of_the_embedded_model(capsys):
    assert main(["plan", "--backend", "reference"]) == 0
    out = capsys.readouterr().out
    for word in ("model", "backend", "dtype", "KV", "budget", "concurrency", "limit", "not chosen"):
        assert word in out


def test_plan_says_what_would_be_sized(tmp_path):
    config = EngineConfig(model="embedded", backend="reference", kv_blocks=7, host_kv_blocks=3)
    memory = make_plan(config).memory
    assert (memory.num_blocks, memory.num_host_blocks) == (7, 3)
    assert memory.limited_by == "kv_blocks"


# ---- sizing

SPEC = replace(ModelSpec.from_hf(shape_config("160m")), max_model_len=4096)
KV = SPEC.kv_spec("float32", 16)


def fit(memory_bytes: int, weight_bytes: int = GIB, kind: str = "cuda", **options):
    device = DeviceInfo(kind, "acme", "one", "a device", memory_bytes, 2)
    options = {"max_num_sequences": 8} | options
    return fit_memory(
        EngineConfig(model="x", **options), SPEC, KV, device,
        weight_bytes=weight_bytes, max_batched_tokens=512, bytes_per_block=KV.bytes_per_block,
    )  # fmt: skip


def test_blocks_and_weights_stay_within_the_budget():
    plan = fit(3 * GIB, max_num_sequences=1000)
    assert plan.limited_by == "the memory budget"
    used = plan.weight_bytes + plan.activation_bytes + plan.num_blocks * KV.bytes_per_block
    assert used <= plan.budget_bytes == int(3 * GIB * 0.9)
    assert used + KV.bytes_per_block > plan.budget_bytes, "a block more would have fitted"


def test_no_more_blocks_than_sequences_can_fill():
    plan = fit(900 * GIB)
    assert plan.limited_by == "max_num_sequences x max_model_len"
    assert plan.num_blocks == 8 * 4096 // 16
    assert plan.concurrency == 8


def test_a_cpu_does_not_take_all_memory():
    plan = fit(900 * GIB, kind="cpu", max_num_sequences=1000)
    assert plan.num_blocks * KV.bytes_per_block <= CPU_KV_BYTES
    assert fit(900 * GIB, kind="cpu", kv_blocks=10**6).num_blocks == 10**6


def test_the_context_is_fitted_to_memory_unless_it_was_asked_for():
    little = int(1.2 * GIB)
    plan = fit(little)
    assert plan.max_model_len == plan.num_blocks * 16 < 4096
    with pytest.raises(CapacityError, match=f"lower --max-model-len to {plan.max_model_len}"):
        fit(little, max_model_len=4096)
    assert fit(little, max_model_len=plan.max_model_len).max_model_len == plan.max_model_len


def test_weights_that_do_not_fit():
    with pytest.raises(CapacityError, match="leave no room for KV") as caught:
        fit(GIB)
    assert "\n" not in str(caught.value)


def test_a_context_beyond_the_model_is_refused():
    with pytest.raises(ConfigError, match="4097"):
        fit(900 * GIB, max_model_len=4097)


def test_the_host_tier_is_what_was_asked_for():
    assert fit(900 * GIB, host_kv_blocks=0).num_host_blocks == 0
    assert fit(900 * GIB, host_kv_blocks=99).num_host_blocks == 99


def test_on_a_cpu_the_host_tier_shares_the_budget():
    plan = fit(3 * GIB, kind="cpu", max_num_sequences=1000)
    blocks = plan.num_blocks + plan.num_host_blocks
    held = plan.weight_bytes + plan.activation_bytes + blocks * KV.bytes_per_block
    assert held <= plan.budget_bytes


def test_a_full_accelerator_still_gets_a_host_tier():
    plan = fit(3 * GIB, max_num_sequences=1000)
    assert plan.limited_by == "the memory budget"
    assert plan.num_host_blocks == plan.num_blocks // 4


@pytest.mark.parametrize(
    ("cores", "tokens"),
    [
        (132, 66 * 128),
        (108, 54 * 128),
        (304, 76 * 128),
        (144, 72 * 128),
        (7, 8192),
        (24, 48 * 128),
        (1, 8192),
    ],
)
def test_a_gpus_steps_fill_whole_turns_of_its_multiprocessors(cores: int, tokens: int) -> None:
    assert gpu_batched_tokens(cores) == tokens
