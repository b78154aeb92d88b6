"""ray-cluster.yaml and serve-config.yaml against Ray's own schemas, and against each other."""

from __future__ import annotations

import copy
import json
import re
import tomllib
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml
from packaging.requirements import Requirement
from ray._common.utils import import_attr
from ray._private.label_utils import validate_label_key, validate_label_value, validate_node_labels
from ray.autoscaler._private.util import prepare_config, validate_config

from cluster.config import Settings
from serve.ingress import middlewares

with warnings.catch_warnings():  # Ray's models use a form of pydantic.Field that newer pydantic deprecates
    warnings.simplefilter("ignore", DeprecationWarning)
    from ray.serve.schema import ServeDeploySchema

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def cluster() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "ray-cluster.yaml").read_text())


@pytest.fixture
def serve_config() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "serve-config.yaml").read_text())


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def exports(commands: list[str]) -> dict[str, str]:
    """Variables that start commands export."""
    statements = [part.strip() for command in commands for part in command.split(";")]
    assignments = [word for part in statements if part.startswith("export ") for word in part.split()[1:]]
    return dict(word.split("=", 1) for word in assignments)


def images(cluster: dict[str, Any]) -> list[str]:
    sections = [cluster["docker"], *(group.get("docker", {}) for group in cluster["available_node_types"].values())]
    return [value for section in sections for name, value in section.items() if name.endswith("image")]


# --- ray-cluster.yaml -------------------------------------------------------------------------------------------


def test_cluster_file_matches_rays_schema(cluster: dict[str, Any]) -> None:
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    jsonschema.validate(cluster, schema)


def test_cluster_file_passes_rays_validation(cluster: dict[str, Any]) -> None:
    prepared = prepare_config(copy.deepcopy(cluster))
    validate_config(prepared)
    # The launcher's defaults install a development build of Ray; none of them may be left.
    assert prepared["head_setup_commands"] == cluster["head_setup_commands"]
    assert prepared["worker_setup_commands"] == cluster["worker_setup_commands"]


def test_cluster_file_becomes_fixed_machines_as_its_comment_says(cluster: dict[str, Any]) -> None:
    for name in ("available_node_types", "head_node_type", "max_workers"):
        del cluster[name]
    cluster["provider"] = {"type": "local", "head_ip": "192.0.2.1", "worker_ips": ["192.0.2.2", "192.0.2.3"]}
    prepared = prepare_config(cluster)
    validate_config(prepared)
    assert prepared["max_workers"] == 2


def test_max_workers_is_the_sum_of_the_groups(cluster: dict[str, Any]) -> None:
    groups = cluster["available_node_types"].values()
    assert cluster["max_workers"] == sum(group.get("max_workers", 0) for group in groups)


def test_head_offers_no_cpu(cluster: dict[str, Any]) -> None:
    assert cluster["available_node_types"][cluster["head_node_type"]]["resources"]["CPU"] == 0


def test_gpu_workers_are_declared_and_fixed_in_number(cluster: dict[str, Any]) -> None:
    groups = [group for group in cluster["available_node_types"].values() if group["resources"].get("GPU", 0) > 0]
    assert groups
    for group in groups:
        assert group["min_workers"] == group["max_workers"] > 0
        assert group["docker"]["worker_image"].endswith("-gpu")
        assert "./eagleray[gpu]" in " ".join(group["worker_setup_commands"])


def test_labels_are_valid(cluster: dict[str, Any]) -> None:
    for group in cluster["available_node_types"].values():
        validate_node_labels(group["labels"])
        for key, value in group["labels"].items():
            assert validate_label_key(key) is None
            assert validate_label_value(value) is None


def test_setup_commands_install_extras_of_pyproject(cluster: dict[str, Any], project: dict[str, Any]) -> None:
    groups = cluster["available_node_types"].values()
    commands = [cluster["head_setup_commands"], cluster["worker_setup_commands"]]
    commands += [group["worker_setup_commands"] for group in groups if "worker_setup_commands" in group]
    for listed in commands:
        extras = re.findall(r"pip install '\./eagleray\[(\w+)\]'", " ".join(listed))
        assert len(extras) == 1
        assert extras[0] in project["optional-dependencies"]
    assert cluster["file_mounts"]["~/eagleray"] == "."


def test_head_and_workers_export_the_same_environment(cluster: dict[str, Any]) -> None:
    head = exports(cluster["head_start_ray_commands"])
    assert head == exports(cluster["worker_start_ray_commands"])
    assert {name: value for name, value in head.items() if name.startswith("RAY_SERVE_")} == {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serve.ingress.middlewares",
    }
    assert import_attr("serve.ingress.middlewares") is middlewares
    assert head["RAY_AUTH_MODE"] == "token"
    assert "~/.ray/auth_token" in cluster["file_mounts"]


def test_dashboard_is_not_on_all_interfaces(cluster: dict[str, Any]) -> None:
    start = " ".join(cluster["head_start_ray_commands"])
    assert "--dashboard-host=" in start
    assert "0.0.0.0" not in start


def test_docker_images_carry_the_ray_and_python_of_pyproject(cluster: dict[str, Any], project: dict[str, Any]) -> None:
    required = next(r for r in map(Requirement, project["dependencies"]) if r.name == "ray")
    assert len(images(cluster)) == 2
    for image in images(cluster):
        match = re.fullmatch(r"rayproject/ray:(\d+\.\d+\.\d+)-py3(\d+)-(cpu|gpu)", image)
        assert match, image
        assert required.specifier.contains(match[1])
        assert match[1].rsplit(".", 1)[0] == ray.__version__.rsplit(".", 1)[0]
        assert f">=3.{match[2]}" == project["requires-python"]


# --- serve-config.yaml ------------------------------------------------------------------------------------------


def test_serve_config_matches_rays_schema_with_nothing_ignored(serve_config: dict[str, Any]) -> None:
    parsed = ServeDeploySchema.model_validate(serve_config)
    assert_named(serve_config, json.loads(parsed.model_dump_json(exclude_unset=True)))
    assert parsed.applications[0].import_path == "serve.app:build"
    assert parsed.http_options.request_timeout_s is None
    assert not parsed.logging_config.enable_access_log


def assert_named(given: Any, parsed: Any, path: str = "") -> None:
    """Every name of the file is a field of the schema: it allows unknown ones, and ignores them."""
    if isinstance(given, dict):
        assert given.keys() <= parsed.keys(), path
        for name, value in given.items():
            assert_named(value, parsed[name], f"{path}.{name}")
    elif isinstance(given, list):
        for number, value in enumerate(given):
            assert_named(value, parsed[number], f"{path}[{number}]")


def test_settings_accept_the_args(serve_config: dict[str, Any]) -> None:
    settings = Settings.from_dict(serve_config["applications"][0]["args"])
    assert settings.data.startswith("s3://")


def test_args_name_every_setting_with_its_default(serve_config: dict[str, Any]) -> None:
    args = serve_config["applications"][0]["args"]
    defaults = {
        field.name: field.default for field in fields(Settings) if field.name not in ("data", "limits", "upkeep")
    }
    assert {name: value for name, value in args.items() if name not in ("data", "limits")} == defaults


def test_coordinators_fit_the_cpu_workers(cluster: dict[str, Any], serve_config: dict[str, Any]) -> None:
    endpoint = serve_config["applications"][0]["deployments"][0]
    assert endpoint["name"] == "Endpoint"
    assert endpoint["max_replicas_per_node"] == 1
    assert endpoint["num_replicas"] <= cluster["available_node_types"]["cpu"]["min_workers"]


def test_shards_fit_the_gpu_workers(cluster: dict[str, Any], serve_config: dict[str, Any]) -> None:
    resources = cluster["available_node_types"]["gpu"]["resources"]
    assert resources["CPU"] >= resources["GPU"] * serve_config["applications"][0]["args"]["shard_cpus"]
