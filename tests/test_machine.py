"""machine: what it says of itself, on machines that are not here too. (Stand-ins take the place of
torch.cuda and NVML: the tests run without a card.)
"""

import os
import re
import subprocess
import sys
import types

import pynvml
import pytest
import torch

from helpers import machine, results

# what PyTorch's wheel for CUDA 13.0 is built for
BUILD = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]
A100 = ("NVIDIA A100-SXM4-40GB", (8, 0))
T4 = ("Tesla T4", (7, 5))
PASCAL = ("NVIDIA GeForce GTX 1080 Ti", (6, 1))
MIG = ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", (8, 0))


@pytest.fixture
def gpu_machine(monkeypatch):
    """gpu_machine(cards, ...): from here on torch.cuda and NVML speak of these cards."""

    def stand_in(
        cards, sees=True, cuda="13.0", driver="580.65.06", driver_cuda=13000, power_mw=400_000
    ):
        visible = cards if sees else []

        def of(device):
            return visible[torch.device(device).index or 0]

        def properties(index):
            name, (major, minor) = visible[index]
            uuid = f"{len(visible) - 1 - index}"  # NVML counts the cards in an order of its own
            return types.SimpleNamespace(
                name=name, major=major, minor=minor, total_memory=42_000_000_000, uuid=uuid
            )

        def power_limit(handle):
            if power_mw is None:
                raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
            return power_mw * (1 + handle)

        cuda_functions = {
            "is_available": lambda: bool(visible),
            "device_count": lambda: len(visible),
            "get_device_capability": lambda device: of(device)[1],
            "get_device_name": lambda device: of(device)[0],
            "get_device_properties": properties,
            "get_arch_list": lambda: BUILD if cuda else [],
        }
        nvml_functions = {
            "nvmlInit": lambda: None,
            "nvmlDeviceGetCount": lambda: len(cards),
            "nvmlDeviceGetHandleByIndex": lambda index: index,
            "nvmlDeviceGetHandleByUUID": lambda uuid: int(uuid.removeprefix("GPU-")),
            "nvmlDeviceGetName": lambda handle: cards[handle][0],
            "nvmlDeviceGetEnforcedPowerLimit": power_limit,
            "nvmlSystemGetDriverVersion": lambda: driver,
            "nvmlSystemGetCudaDriverVersion_v2": lambda: driver_cuda,
        }
        for name, function in cuda_functions.items():
            monkeypatch.setattr(torch.cuda, name, function)
        for name, function in nvml_functions.items():
            monkeypatch.setattr(pynvml, name, function)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    return stand_in


@pytest.fixture
def no_nvml(monkeypatch):
    """NVML's library is not on this machine."""

    def missing(*_):
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    for name in dir(pynvml):
        if name.startswith(("nvmlInit", "nvmlDeviceGet", "nvmlSystemGet")):
            monkeypatch.setattr(pynvml, name, missing)


# the processor, cores and memory


def test_slug_names_kind_and_size():
    assert re.fullmatch(r"[a-z0-9_]+(-[a-z0-9]+)+", machine.slug())
    assert f"{machine.cores()}core" in machine.slug("cpu") and machine.slug("cpu").endswith("gb")
    if not machine.gpus():
        assert machine.slug() == machine.slug("cpu")


def test_the_processor_is_told_without_other_programs_and_in_any_language(monkeypatch, tmp_path):
    here = machine.cpu()
    monkeypatch.setenv("PATH", str(tmp_path))  # no lscpu
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    code = "from helpers import machine; print(machine.cpu(), machine.slug('cpu'))"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    told = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert told.stdout.strip() == f"{here} {machine.slug('cpu')}"
    assert here["flags"] and here["model"] != "unknown"


@pytest.mark.parametrize(
    "flags, expected",
    [
        ({"avx2"}, (False, False)),
        ({"avx512_bf16"}, (False, True)),
        ({"avx512_fp16", "amx_bf16"}, (True, True)),
        ({"neon", "fp16_arith"}, (True, False)),
        ({"neon", "fp16_arith", "bf16"}, (True, True)),
    ],
)
def test_native_dtypes_follow_the_instruction_sets(monkeypatch, flags, expected):
    capabilities = {"architecture": "x", "cpu_name": "y", "amx_fp16": False}
    capabilities |= dict.fromkeys(flags, True)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    native = machine.native_dtypes("cpu")
    assert (native["float16"], native["bfloat16"]) == expected


def test_names_of_instruction_sets_are_pytorch_s():
    documented = torch.cpu.get_capabilities.__doc__
    sixteen_bit = {"avx512_fp16", "amx_fp16", "fp16_arith", "avx512_bf16", "amx_bf16", "bf16"}
    for name in {*machine.VECTOR_SETS, *sixteen_bit}:
        assert re.search(rf"\b{name}\b", documented), name


@pytest.fixture
def cgroups(monkeypatch, tmp_path):
    """cgroups(rows, files): /proc/self/cgroup and /sys/fs/cgroup say this."""

    def write(rows, files):
        process = tmp_path / "process"
        process.write_text("".join(f"{row}\n" for row in rows))
        for name, text in files.items():
            file = tmp_path / "groups" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"{text}\n")
        monkeypatch.setattr(machine, "CGROUPS", tmp_path / "groups")
        monkeypatch.setattr(machine, "CGROUP_OF_PROCESS", process)
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))

    return write


@pytest.mark.parametrize(
    "rows, files",
    [
        pytest.param(
            ["0::/"], {"memory.max": "2147483648", "cpu.max": "250000 100000"}, id="container-v2"
        ),
        pytest.param(
            ["0::/a/b"],
            {
                "a/memory.max": "2147483648",
                "a/cpu.max": "250000 100000",
                "a/b/memory.max": "max",
                "a/b/cpu.max": "max 100000",
            },
            id="a-group-above-v2",
        ),
        pytest.param(
            ["4:memory:/docker/1f", "2:cpu,cpuacct:/docker/1f", "0::/docker/1f"],
            {
                "memory/memory.limit_in_bytes": "2147483648",
                "cpu/cpu.cfs_quota_us": "250000",
                "cpu/cpu.cfs_period_us": "100000",
            },
            id="container-v1",
        ),
        pytest.param(
            ["4:memory:/job", "2:cpu,cpuacct:/job"],
            {
                "memory/memory.limit_in_bytes": "9223372036854771712",
                "memory/job/memory.limit_in_bytes": "2147483648",
                "cpu/cpu.cfs_quota_us": "-1",
                "cpu/cpu.cfs_period_us": "100000",
                "cpu/job/cpu.cfs_quota_us": "250000",
                "cpu/job/cpu.cfs_period_us": "100000",
            },
            id="group-v1",
        ),
    ],
)
def test_a_container_s_limits_are_the_machine_s(cgroups, rows, files):
    cgroups(rows, files)
    assert machine.memory_bytes() == 2**31
    assert machine.cores() == 2
    assert machine.slug("cpu").endswith("-2gb") and "2core" in machine.slug("cpu")


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"memory.max": "max", "cpu.max": "max 100000"},
        {"memory.max": "99999999999999", "cpu.max": "9900000 100000"},
    ],
)
def test_without_a_limit_the_whole_machine_is_there(cgroups, files):
    cgroups(["0::/"], files)
    assert machine.memory_bytes() == machine.psutil.virtual_memory().total
    assert machine.cores() == 16


def test_half_a_core_is_one(cgroups):
    cgroups(["0::/"], {"cpu.max": "50000 100000"})
    assert machine.cores() == 1


def test_affinity_is_seen():
    core = min(os.sched_getaffinity(0))
    code = "from helpers import machine; print(machine.cores())"
    told = subprocess.run(
        ["taskset", "-c", str(core), sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert told.stdout.strip() == "1"


# GPUs


def test_the_slug_follows_the_device_of_the_run(gpu_machine):
    gpu_machine([A100, A100])
    assert machine.slug() == machine.slug("cuda") == "2x-nvidia-a100-sxm4-40gb"
    assert machine.slug("cpu") == machine.describe("cpu")["slug"]
    assert "nvidia" not in machine.slug("cpu") and "core" in machine.slug("cpu")
    assert machine.line("cuda").startswith("NVIDIA A100-SXM4-40GB (42 GB), NVIDIA A100")
    assert machine.line("cpu").startswith(machine.cpu()["model"])


def test_the_slug_of_unlike_gpus_and_of_a_slice(gpu_machine):
    gpu_machine([T4, A100, T4])
    assert machine.slug() == "1x-nvidia-a100-sxm4-40gb-2x-tesla-t4"
    gpu_machine([MIG])
    assert machine.slug() == "1x-nvidia-a100-sxm4-40gb-mig-1g-5gb"


@pytest.mark.parametrize(
    "card, expected", [(T4, (True, False)), (A100, (True, True)), (PASCAL, (False, False))]
)
def test_native_dtypes_follow_the_card(gpu_machine, card, expected):
    gpu_machine([A100, card])
    native = machine.native_dtypes("cuda:1")
    assert (native["float16"], native["bfloat16"]) == expected


def test_a_gpu_machine_s_description_is_whole_and_fits_the_schema(gpu_machine):
    gpu_machine([A100, T4])
    described = machine.describe()
    assert results.Machine.model_validate(described)
    assert [card["compute_capability"] for card in described["gpus"]] == ["8.0", "7.5"]
    assert (described["cuda"], described["driver"]) == ("13.0", "580.65.06")
    assert described["power_limit_w"] == [800.0, 400.0]


def test_a_slice_has_no_power_limit_of_its_own(gpu_machine):
    gpu_machine([MIG], power_mw=None)
    assert machine.power_limits_w() == [None]


def test_no_driver_answers_where_nvml_is_missing(no_nvml):
    assert machine.driver() == {"version": None, "cuda": None, "cards": []}


def test_nvml_missing_beside_a_card_costs_its_fields_only(gpu_machine, request):
    gpu_machine([A100])
    request.getfixturevalue("no_nvml")
    assert machine.pick_device("auto") == machine.pick_device("cuda") == "cuda"
    described = machine.describe()
    assert results.Machine.model_validate(described)
    assert described["driver"] is None and described["power_limit_w"] == [None]
    assert described["cuda"] == "13.0" and described["gpus"][0]["name"] == A100[0]


# which device is taken


def test_devices():
    assert machine.pick_device("cpu") == "cpu"
    with pytest.raises(ValueError, match="'toaster' is no device"):
        machine.pick_device("toaster")
    with pytest.raises(ValueError, match="'meta' is not supported"):
        machine.pick_device("meta")


def test_a_machine_without_a_card_takes_the_cpu_without_a_word(gpu_machine, capsys):
    gpu_machine([])
    assert machine.pick_device("auto") == "cpu"
    assert capsys.readouterr().out == ""
    for device in ("cuda", "cuda:1"):
        with pytest.raises(
            ValueError, match=f"DEVICE='{device}' was asked for, but PyTorch sees no"
        ):
            machine.pick_device(device)


def test_a_card_that_works_is_taken_without_a_word(gpu_machine, capsys):
    for card in (A100, T4, MIG, ("NVIDIA L4", (8, 9))):
        gpu_machine([card])
        assert machine.pick_device("auto") == "cuda"
        assert machine.pick_device("cuda:0") == "cuda:0"
    assert capsys.readouterr().out == ""


def test_a_second_card_that_is_not_there_is_named(gpu_machine):
    gpu_machine([A100])
    with pytest.raises(ValueError, match="DEVICE='cuda:1' was asked for, but PyTorch sees 1 here"):
        machine.pick_device("cuda:1")


UNUSABLE = {
    "old-driver": (
        dict(cards=[A100], sees=False, driver="550.54.15", driver_cuda=12040),
        ["A100", "550.54.15", r"\(CUDA 12.4\)", r"built for CUDA 13.0: a newer driver is needed"],
    ),
    "driver-that-fails": (
        dict(cards=[A100], sees=False),
        ["A100", r"580.65.06 \(CUDA 13.0\)", "built for CUDA 13.0 and cannot start on it"],
    ),
    "cpu-build": (
        dict(cards=[A100, T4], sees=False, cuda=None),
        ["A100", r"580.65.06 \(CUDA 13.0\)", "without CUDA", "make run EXTRA=gpu"],
    ),
    "pascal": (
        dict(cards=[PASCAL]),
        ["GTX 1080 Ti has compute capability 6.1", "built for sm_75, sm_80", "CUDA 13.0"],
    ),
    "younger-than-the-build": (
        dict(cards=[("NVIDIA R100", (13, 0))]),
        ["compute capability 13.0", "built for sm_75, sm_80, .*sm_120 only"],
    ),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_a_card_that_this_pytorch_cannot_use(gpu_machine, capsys, case):
    stand_in, parts = UNUSABLE[case]
    gpu_machine(**stand_in)
    assert machine.pick_device("auto") == "cpu"
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and lines[0].startswith("Warning: ")
    with pytest.raises(ValueError, match="DEVICE='cuda' was asked for, but ") as refused:
        machine.pick_device("cuda")
    for sentence in (lines[0], str(refused.value)):
        assert "\n" not in sentence
        for part in [torch.__version__.replace("+", r"\+"), *parts]:
            assert re.search(part, sentence), (part, sentence)


def test_the_second_card_is_the_one_that_is_refused(gpu_machine):
    gpu_machine([A100, PASCAL])
    assert machine.pick_device("cuda") == "cuda"
    with pytest.raises(ValueError, match=r"GTX 1080 Ti has compute capability 6\.1"):
        machine.pick_device("cuda:1")


def test_a_card_hidden_on_purpose_is_not_warned_of(gpu_machine, monkeypatch, capsys):
    gpu_machine([A100], sees=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert machine.pick_device("auto") == "cpu" and capsys.readouterr().out == ""


def test_ptx_is_translated_for_a_younger_card(gpu_machine, monkeypatch):
    gpu_machine([("NVIDIA R100", (13, 0))])
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: [*BUILD, "compute_120"])
    assert machine.pick_device("cuda") == "cuda"


# what a results file says


def test_description_holds_versions_and_no_path():
    described = machine.describe()
    assert described["versions"]["torch"] == torch.__version__
    assert described["memory_bytes"] > 1e9
    assert results.Machine.model_validate(described)
    assert "/" not in machine.line()


def test_the_commit_is_ours_or_none(tmp_path):
    """An installed copy inside another project's checkout does not take that project's commit."""
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(tmp_path)]
    (tmp_path / "helpers").mkdir()
    (tmp_path / "helpers/__init__.py").write_text("")
    (tmp_path / "helpers/machine.py").write_text(open(machine.__file__).read())

    def commit():
        code = "from helpers import machine; print(machine.commit())"
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    assert commit() == "None"
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "theirs"], check=True)
    assert commit() == "None"
    subprocess.run([*git, "add", "helpers"], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "ours"], check=True)
    assert re.fullmatch("[0-9a-f]{12}", commit())
    with open(tmp_path / "helpers/machine.py", "a") as file:
        file.write("# changed\n")
    assert re.fullmatch("[0-9a-f]{12}[+]", commit())
