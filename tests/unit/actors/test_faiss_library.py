from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from actors.faiss_library import check_faiss_installation, gpus_are_supported, let_threads_sleep, one_faiss
from cluster.errors import Invalid


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes an environment of these distributions alone, as an installer writes them."""

    def installed(*names: str) -> None:
        for name in names:
            folder = tmp_path / f"{name.replace('-', '_')}-1.2.3.dist-info"
            folder.mkdir()
            (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2.3\n")
        monkeypatch.setattr(sys, "path", [str(tmp_path)])

    return installed


def test_one_faiss_returns_the_only_one() -> None:
    assert one_faiss(["faiss-cpu"]) == "faiss-cpu"


def test_no_faiss_says_what_to_install() -> None:
    with pytest.raises(Invalid, match=r"not installed: pip install 'eagleray\[cpu\]', or 'eagleray\[gpu\]'"):
        one_faiss([])


def test_two_faiss_names_both_and_the_way_out() -> None:
    with pytest.raises(Invalid, match="pip uninstall faiss-cpu faiss-gpu-cuvs") as caught:
        one_faiss(["faiss-cpu", "faiss-gpu-cuvs"])
    assert str(caught.value).startswith("faiss-cpu and faiss-gpu-cuvs are both installed")


@pytest.mark.parametrize("name", ["faiss-cpu", "Faiss_CPU", "faiss_cpu"])
def test_check_knows_a_name_in_any_spelling_and_ignores_others(install: Callable[..., None], name: str) -> None:
    install("numpy", name, "my-faiss-cpu-tools")
    assert check_faiss_installation() == "faiss-cpu"


def test_check_refuses_two_distributions(install: Callable[..., None]) -> None:
    install("faiss_gpu_cuvs", "faiss-cpu")
    with pytest.raises(Invalid, match="faiss-cpu and faiss-gpu-cuvs are both installed"):
        check_faiss_installation()


def test_check_refuses_an_environment_without_faiss(install: Callable[..., None]) -> None:
    install("numpy")
    with pytest.raises(Invalid, match="FAISS is not installed"):
        check_faiss_installation()


def test_this_environment_has_exactly_one() -> None:
    assert check_faiss_installation().startswith("faiss")


@pytest.mark.parametrize(("given", "expected"), [(None, "PASSIVE"), ("active", "active")])
def test_threads_sleep_between_calls_unless_the_environment_says_otherwise(
    given: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", given or "")
    if given is None:
        monkeypatch.delenv("OMP_WAIT_POLICY")
    let_threads_sleep()
    assert os.environ["OMP_WAIT_POLICY"] == expected


MODULES = ["actors.exact_search", "actors.replica", "actors.segment_builder", "jobs.segment_task", "serve.plan"]


@pytest.mark.parametrize("module", MODULES)
def test_threads_are_told_to_sleep_before_faiss_is_loaded_whatever_is_imported_first(module: str) -> None:
    """OpenMP reads how to wait when FAISS loads it; it then tells how often it looks before it sleeps."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    started = subprocess.run(
        [sys.executable, "-c", f"import {module}"],
        env=environment | {"OMP_DISPLAY_ENV": "verbose"},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert "GOMP_SPINCOUNT = '0'" in started.stderr


@pytest.mark.parametrize(
    ("name", "supported"), [("faiss-cpu", False), ("faiss-gpu-cu12", False), ("faiss-gpu-cuvs", True)]
)
def test_only_the_faiss_with_cuvs_supports_gpus(install: Callable[..., None], name: str, supported: bool) -> None:
    install(name)
    assert gpus_are_supported() is supported
