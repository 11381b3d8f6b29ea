"""The commands as a user runs them: one sentence on stderr for bad input, exit code 2, nothing half-written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from processes import run_python

from maskpro_serve import cli, plugin
from maskpro_serve.arguments import flag_value, names_flag, with_config
from maskpro_serve.cli import main
from maskpro_serve.cpu_defaults import (
    available_memory,
    choose,
    container_quota,
    control_groups,
    has_native_bf16,
    kv_cache_gib,
)

EXECUTOR = ["--distributed-executor-backend", "maskpro_serve.executor.OneProcessExecutor"]
WORKER = ["--worker-cls", "maskpro_serve.worker.SeededCPUWorker"]


@pytest.fixture(autouse=True)
def no_server(monkeypatch):
    """Becoming one is an exec: what should have been refused would replace the tests."""
    monkeypatch.setattr(cli.os, "execve", lambda *arguments: pytest.fail(f"would have become {arguments[1]}"))


def one_sentence(captured, command: str) -> str:
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith(f"{command}: ")
    return lines[0]


def test_pack_command(tiny, tmp_path):
    flags = ["--model", tiny["dense"], "--mask", tiny["mask"], "--output", tmp_path / "out"]
    run = run_python("-m", "maskpro_serve.pack_cli", *flags)
    assert run.returncode == 0, run.stderr
    assert "21 linears packed 2:4" in run.stdout
    assert "(0.5625)" in run.stdout


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "nowhere", "--pattern", "2:4"], "nowhere: no such folder"),
        (["--model", "{dense}"], "--pattern must say"),
        (["--model", "{dense}", "--pattern", "2:5"], "m must be one of"),
        (["--model", "{dense}", "--mask", "nowhere"], "nowhere: no such mask file"),
        (
            ["--model", "{packed}", "--mask", "{mask}"],
            "quantization_config: expected none, or a sparsity_config of format 'dense' (a dense model), found",
        ),
    ],
)
def test_pack_refuses_in_one_sentence(tiny, tmp_path, capsys, flags, message):
    from maskpro_serve.pack_cli import main as pack

    flags = [flag.format(**tiny) for flag in flags]
    assert pack([*flags, "--output", str(tmp_path / "out")]) == 2
    assert message in one_sentence(capsys.readouterr(), "maskpro-pack")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["{tmp}/nowhere", "models/mine/v1", "./nowhere", "nowhere", "tests/nowhere"])
def test_serve_refuses_a_missing_folder(capsys, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tests").mkdir()  # a folder that is there: then the name means one, and no model of the hub
    assert main(["--model", name.format(tmp=tmp_path)]) == 2
    assert "no such folder" in one_sentence(capsys.readouterr(), "maskpro-serve")


def test_what_is_vllms_to_judge_is_left_to_it(tiny, tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(cli, "_become_server", lambda arguments, environment: started.append(arguments[0]) or 0)
    mistrals, config_only = tmp_path / "mistrals", tmp_path / "config"
    for folder in (mistrals, config_only):
        folder.mkdir()
    (mistrals / "params.json").write_text("{}")
    shutil.copy(tiny["packed"] / "config.json", config_only)
    assert main(["--model", str(mistrals)]) == 0
    assert main(["--model", str(config_only), "--load-format", "dummy"]) == 0
    assert started == [str(mistrals), str(config_only)]
    assert main(["--model", str(config_only)]) == 2


@pytest.mark.parametrize("name", ["s3://bucket/models/mine", "{tmp}/model.gguf", "organisation/model"])
def test_what_vllm_reads_by_itself_is_left_to_it(tmp_path, monkeypatch, name):
    started = []
    monkeypatch.setattr(cli, "_become_server", lambda arguments, environment: started.append(arguments[0]) or 0)
    (tmp_path / "model.gguf").touch()
    assert main(["--model", name.format(tmp=tmp_path)]) == 0
    assert started == [name.format(tmp=tmp_path)]


def test_a_folder_goes_before_the_alias_of_its_name(tiny, tmp_path, monkeypatch, capsys):
    started = []
    monkeypatch.setattr(cli, "_become_server", lambda arguments, environment: started.append(arguments) or 0)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny["packed"], "sparse-llama")
    assert main(["--model", "sparse-llama"]) == 0
    assert started[0][0] == "sparse-llama"
    assert "sparse-llama: the folder of that name here, not the model built in" in capsys.readouterr().err
    Path("sparse-llama", "model.safetensors").unlink()
    assert main(["--model", "sparse-llama"]) == 2  # broken as it is, it was meant


def test_serve_suggests_the_alias_that_was_meant(capsys):
    assert main(["--model", "sparse-lama"]) == 2
    assert "did you mean sparse-llama?" in one_sentence(capsys.readouterr(), "maskpro-serve")


def test_serve_refuses_an_unknown_kernel(tiny, capsys, monkeypatch):
    monkeypatch.setenv("MASKPRO_KERNEL", "fastest")
    assert main(["--model", str(tiny["packed"])]) == 2
    assert "MASKPRO_KERNEL='fastest' is unknown" in one_sentence(capsys.readouterr(), "maskpro-serve")


def test_serve_refuses_a_damaged_checkpoint(tiny, tmp_path, capsys):
    folder = shutil.copytree(tiny["packed"], tmp_path / "packed")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["format_version"] = 7
    (folder / "config.json").write_text(json.dumps(config))
    assert main(["--model", str(folder)]) == 2
    assert "format_version: expected 1, found 7" in one_sentence(capsys.readouterr(), "maskpro-serve")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("MASKPRO_KERNEL_SAMPLING", "often", "expected a whole number"),
        ("MASKPRO_REQUEST_LOG", "/nowhere/log", "No such file or directory"),
    ],
)
def test_serve_refuses_a_wrong_variable(monkeypatch, name, value, message):
    monkeypatch.setenv(name, value)
    run = run_python("-m", "maskpro_serve.server", "nowhere")
    assert run.returncode == 2
    assert run.stderr.replace("'", "").startswith(f"maskpro-serve: {name}={value}: {message}")


def test_serve_needs_a_model(capsys):
    assert main(["--port", "8001"]) == 2
    assert "--model is required" in one_sentence(capsys.readouterr(), "maskpro-serve")


@pytest.mark.parametrize("stages", [["-pp", "2"], ["--pipeline_parallel_size=2"]])
def test_serve_refuses_a_pipeline_that_is_not_compiled(tiny, capsys, stages):
    assert main(["--model", str(tiny["packed"]), "--enforce-eager", *stages]) == 2
    message = "--enforce-eager with --pipeline-parallel-size 2: on CPUs vLLM runs a pipeline only if it compiles"
    assert message in one_sentence(capsys.readouterr(), "maskpro-serve")


@pytest.mark.parametrize("found", ["0.26.9", "0.27.0", "0.33.1+cpu", "0.34.0"])
def test_vllm_versions(monkeypatch, capsys, found):
    supported = found.startswith(("0.27", "0.33"))
    monkeypatch.setattr(plugin, "version", lambda name: found)
    if supported:
        assert plugin.check_vllm_version() == found
    else:
        assert main(["--model", "sparse-llama"]) == 2
        assert f"vllm {found} is not supported" in one_sentence(capsys.readouterr(), "maskpro-serve")


def test_cpu_defaults_yield_to_the_user():
    iomp = Path("/lib/libiomp5.so")
    machine = {
        "flags": frozenset({"avx2"}),
        "cores": [0, 1],
        "quota": None,
        "available_bytes": 20 << 30,
        "libraries": [iomp],
    }
    chosen = choose([], {}, **machine)
    assert chosen.environment == {
        "VLLM_CPU_OMP_THREADS_BIND": "0,1",
        "KMP_BLOCKTIME": "5",
        "KMP_TPAUSE": "0",
        "VLLM_CPU_KVCACHE_SPACE": "5",
        "VLLM_USE_AOT_COMPILE": "0",
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
        "LD_PRELOAD": str(iomp),
    }
    assert chosen.flags == [*EXECUTOR, *WORKER, "--dtype", "float32"]
    assert len(chosen.reasons) == 10
    user = ["--dtype=bfloat16", "--kv_cache_memory_bytes", "1G", "--distributed_executor_backend=mp"]
    user += ["--worker_cls", "vllm.v1.worker.cpu_worker.CPUWorker"]
    theirs = {"VLLM_USE_AOT_COMPILE": "1", "GLIBC_TUNABLES": "glibc.malloc.check=1", "LD_PRELOAD": str(iomp)}
    chosen = choose(user, theirs, **machine)
    assert (chosen.environment, chosen.flags) == ({"VLLM_CPU_OMP_THREADS_BIND": "0,1"}, [])
    assert choose([], {}, **machine | {"flags": frozenset({"amx_bf16"})}).flags == [*EXECUTOR, *WORKER]


@pytest.mark.parametrize(
    "theirs", [{"VLLM_CPU_OMP_THREADS_BIND": "0"}, {"LD_PRELOAD": "/lib/libgomp.so.1"}, {"LD_PRELOAD": ""}]
)
def test_one_process_only_where_we_bind_its_threads(theirs):
    libraries = [Path("/lib/libiomp5.so")] if theirs.get("LD_PRELOAD") != "" else []
    machine = {
        "flags": frozenset({"amx_bf16"}),
        "cores": [0, 1],
        "quota": None,
        "available_bytes": 20 << 30,
        "libraries": libraries,
    }
    chosen = choose([], theirs, **machine)
    assert chosen.flags == WORKER
    assert "KMP_BLOCKTIME" not in chosen.environment
    assert ("VLLM_CPU_OMP_THREADS_BIND" in chosen.environment) != ("VLLM_CPU_OMP_THREADS_BIND" in theirs)


@pytest.mark.parametrize("flag", ["-pp", "--data-parallel-size", "--tensor_parallel_size"])
def test_threads_are_left_to_vllm_where_they_are_shared(flag):
    machine = {
        "flags": frozenset(),
        "quota": None,
        "available_bytes": 20 << 30,
        "libraries": [Path("/lib/libiomp5.so")],
    }
    for chosen in choose([flag, "2"], {}, cores=[0, 1], **machine), choose([], {}, cores=range(5), **machine):
        assert "VLLM_CPU_OMP_THREADS_BIND" not in chosen.environment
        assert "--distributed-executor-backend" not in chosen.flags
    assert choose([flag, "1"], {}, cores=[0, 1], **machine) == choose([], {}, cores=[0, 1], **machine)
    assert choose([], {}, cores=range(4), **machine).environment["VLLM_CPU_OMP_THREADS_BIND"] == "0,1,2,3"


@pytest.mark.parametrize(("flag", "native"), [("avx512_bf16", True), ("amx_bf16", True), ("avx512f", False)])
def test_bfloat16_where_the_processor_multiplies_it(flag, native):
    assert has_native_bf16(frozenset({"avx2", flag})) == native


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "5"),
        (["-tp", "2", "--data-parallel-size=2"], "1"),
        (["-pp", "two"], "5"),
        (["-tp", "8"], "1"),
        (["--data-parallel-size", "4", "--data-parallel-size-local", "1"], "5"),
        (["--gpu-memory-utilization", "0.5"], None),
        (["--kv-cache-memory-bytes=1G"], None),
    ],
)
def test_kv_caches_of_all_workers_are_a_quarter(arguments, expected):
    machine = {"flags": frozenset(), "cores": [0, 1], "quota": None, "available_bytes": 20 << 30, "libraries": []}
    assert choose(arguments, {}, **machine).environment.get("VLLM_CPU_KVCACHE_SPACE") == expected


@pytest.mark.parametrize(("free", "expected"), [(1 << 30, 1), (20 << 30, 5), (1 << 40, 32)])
def test_kv_cache_is_a_quarter_within_bounds(free, expected):
    assert kv_cache_gib(free) == expected


@pytest.mark.parametrize("cores", [[0, 1, 2, 3], range(64)])
def test_a_quota_says_how_many_threads_and_not_where(cores):
    machine = {"flags": frozenset({"amx_bf16"}), "available_bytes": 20 << 30, "libraries": [Path("/lib/libiomp5.so")]}
    chosen = choose([], {}, cores=cores, quota=2, **machine)
    wanted = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "2", "KMP_BLOCKTIME": "5", "KMP_TPAUSE": "0"}
    assert chosen.environment.items() >= wanted.items()
    assert chosen.flags == WORKER
    theirs = choose([], {"VLLM_CPU_OMP_THREADS_BIND": "2,3"}, cores=cores, quota=2, **machine)
    assert not theirs.environment.keys() & wanted.keys()
    theirs = choose([], {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}, cores=cores, quota=2, **machine)
    assert theirs.environment["OMP_NUM_THREADS"] == "2"
    whole = [choose([], {}, cores=cores, quota=quota, **machine) for quota in (len(cores), None)]
    assert whole[0] == whole[1]
    assert "OMP_NUM_THREADS" not in whole[0].environment
    assert "OMP_NUM_THREADS" not in choose(["-tp", "2"], {}, cores=cores, quota=2, **machine).environment


def test_defaults_respect_a_container(tmp_path):
    here = [tmp_path]
    assert container_quota(here) is None  # no cgroup
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert container_quota(here) == 2
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert container_quota(here) is None
    (tmp_path / "memory.max").write_text("3000000\n")
    (tmp_path / "memory.current").write_text("1000000\n")
    assert available_memory(here) == 2000000
    (tmp_path / "memory.stat").write_text("anon 500000\ninactive_file 400000\n")
    assert available_memory(here) == 2400000  # files that were read once may be dropped


def test_defaults_respect_every_group_that_the_process_is_in(tmp_path):
    membership, root = tmp_path / "membership", tmp_path / "groups"
    slice, unit = root / "system.slice", root / "system.slice" / "maskpro.service"
    unit.mkdir(parents=True)
    membership.write_text("12:cpuset:/other\n0::/system.slice/maskpro.service\n")
    groups = control_groups(membership, root)
    assert groups == [unit, slice, root]
    (unit / "cpu.max").write_text("400000 100000\n")
    (slice / "cpu.max").write_text("200000 100000\n")
    assert container_quota(groups) == 2
    for group, limit in (unit, "9000000"), (slice, "max"):
        (group / "memory.max").write_text(f"{limit}\n")
        (group / "memory.current").write_text("4000000\n")
    assert available_memory(groups) == 5000000
    membership.write_text("0::/\n")
    assert control_groups(membership, root) == [root]
    assert control_groups(tmp_path / "nowhere", root) == [root]


def test_flags_are_known_in_every_spelling():
    assert names_flag(["--served_model_name=x"], "--served-model-name")
    assert names_flag(["--dtype", "auto"], "--dtype")
    assert not names_flag(["--dtype-x"], "--dtype")
    for arguments in (["-pp", "2"], ["--pipeline-parallel-size=2"], ["x", "--pipeline_parallel_size", "2", "-tp", "4"]):
        assert flag_value(arguments, "--pipeline-parallel-size", "-pp") == "2"
    assert flag_value(["-tp", "2"], "--pipeline-parallel-size", "-pp") is None


def test_a_config_file_is_asked_as_well(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("tensor-parallel-size: 2\ndtype: bfloat16\nenforce-eager: true\nenable-prefix-caching: false\n")
    assert not names_flag(with_config(["--config", str(config), "--no-enforce-eager"]), "--enforce-eager")
    given = with_config(["--config", str(config), "--dtype", "float32"])
    assert flag_value(given, "--tensor-parallel-size", "-tp") == "2"
    assert flag_value(given, "--dtype") == "float32"
    assert names_flag(given, "--enforce-eager")
    assert not names_flag(given, "--enable-prefix-caching")
    assert with_config(["--dtype", "auto"]) == ["--dtype", "auto"]


def test_a_model_that_only_a_config_file_names(tiny, tmp_path, monkeypatch, capsys):
    started = []
    monkeypatch.setattr(cli, "_become_server", lambda arguments, environment: started.append(arguments) or 0)
    monkeypatch.setattr(cli, "_runs_on_cpu", lambda: True)
    config = tmp_path / "config.yaml"
    config.write_text(f"model: {tiny['packed']}\nport: 8001\n")
    assert main(["--config", str(config)]) == 0
    assert started[0][0] == str(tiny["packed"])
    assert started[0][-2:] == ["--config", str(config)]
    assert WORKER[0] in started[0]  # with all the defaults
    config.write_text("port: 8001\n")
    capsys.readouterr()
    assert main(["--config", str(config)]) == 2
    assert "--model is required" in one_sentence(capsys.readouterr(), "maskpro-serve")


@pytest.mark.parametrize("ask", ["-h", "--help=all"])
def test_help_builds_no_model(monkeypatch, ask):
    started = []
    monkeypatch.setattr(cli, "_become_server", lambda arguments, environment: started.append(arguments) or 0)
    assert main(["--model", "sparse-llama", ask]) == 0
    assert started == [["sparse-llama", ask]]


@pytest.mark.parametrize("text", ["- 1", "a: [", "", None])
def test_a_config_file_that_is_none(tmp_path, tiny, capsys, text):
    config = tmp_path / "config.yaml"
    if text is not None:
        config.write_text(text)
    assert main(["--model", str(tiny["packed"]), "--config", str(config)]) == 2
    assert str(config) in one_sentence(capsys.readouterr(), "maskpro-serve")
