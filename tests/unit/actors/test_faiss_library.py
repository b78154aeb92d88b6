from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from actors import faiss_library
from actors.faiss_library import check_faiss_installation, one_faiss
from cluster.errors import Invalid


@dataclass(frozen=True)
class FakeDistribution:
    metadata: dict[str, str | None] = field(default_factory=dict)


def install(monkeypatch: pytest.MonkeyPatch, *names: str | None) -> None:
    def distributions() -> Iterator[FakeDistribution]:
        return (FakeDistribution({"Name": name}) for name in names)

    monkeypatch.setattr(faiss_library, "distributions", distributions)


def test_one_faiss_returns_the_only_one() -> None:
    assert one_faiss(["faiss-cpu"]) == "faiss-cpu"


def test_no_faiss_says_what_to_install() -> None:
    with pytest.raises(Invalid, match=r"not installed: pip install 'eagleray\[cpu\]', or 'eagleray\[gpu\]'"):
        one_faiss([])


def test_two_faiss_names_both_and_the_way_out() -> None:
    with pytest.raises(Invalid, match="pip uninstall faiss-cpu faiss-gpu-cuvs") as caught:
        one_faiss(["faiss-cpu", "faiss-gpu-cuvs"])
    assert str(caught.value).startswith("faiss-cpu and faiss-gpu-cuvs are both installed")


def test_check_knows_names_in_any_spelling_and_ignores_others(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "numpy", "Faiss_CPU", "faiss-cpu", None, "my-faiss-cpu-tools")
    assert check_faiss_installation() == "faiss-cpu"


def test_check_refuses_two_distributions(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "faiss_gpu_cuvs", "faiss-cpu")
    with pytest.raises(Invalid, match="faiss-cpu and faiss-gpu-cuvs are both installed"):
        check_faiss_installation()


def test_check_refuses_an_environment_without_faiss(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "numpy")
    with pytest.raises(Invalid, match="FAISS is not installed"):
        check_faiss_installation()


def test_this_environment_has_exactly_one() -> None:
    assert check_faiss_installation().startswith("faiss")
