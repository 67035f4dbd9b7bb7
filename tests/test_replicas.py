"""The service on several replicas: real Ray Serve, a real port, the real openai client, and `generate` as the reference."""

import base64
import io
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter

import httpx
import openai
import pytest
import torch
from fastapi.testclient import TestClient

from sigma_book import generate
from sigma_book.replicas import ReplicaConfig, _make_app
from sigma_book.server import ServerConfig
from sigma_book.world import draw_scene, make_scene

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"replicas": 0}, "replicas is 0"),
        ({"replicas": 3, "most": 2}, "most is 2"),
        ({"busy": 0}, "busy is 0"),
        ({"cpus": -1}, "cpus is -1"),
        ({"gpus": float("inf")}, "gpus is inf"),
    ],
)
def test_settings_out_of_range(settings, words):
    with pytest.raises(ValueError, match=words):
        ReplicaConfig(**settings)


def test_settings_are_those_that_ray_serve_knows():
    """Its own schema reads them: a fixed number, and one that follows the load."""
    serve = pytest.importorskip("ray.serve")

    class Nothing:
        pass

    fixed = serve.deployment(Nothing).options(**ReplicaConfig(3, cpus=0.5, gpus=1).options(72, 90.0))
    assert (fixed.num_replicas, fixed.max_ongoing_requests, fixed.max_queued_requests) == (3, 88, 88)
    assert fixed._deployment_config.graceful_shutdown_timeout_s == 95
    assert fixed.ray_actor_options == {"num_cpus": 0.5, "num_gpus": 1}
    scaled = serve.deployment(Nothing).options(**ReplicaConfig(2, most=9, busy=6).options(72, 60.0))
    config = scaled._deployment_config.autoscaling_config
    assert (config.min_replicas, config.max_replicas, config.target_ongoing_requests) == (2, 9, 6)


def test_a_replica_logs_as_one_process_does(tiny_model, monkeypatch, capsys):
    root, package = logging.getLogger(), logging.getLogger("sigma_book")
    monkeypatch.setattr(root, "handlers", [])
    level, package_level = root.level, package.level
    app = _make_app(torch.get_num_threads(), lambda: tiny_model, ServerConfig("tiny"), {})
    try:
        assert TestClient(app).get("/health/live").status_code == 200
    finally:
        app.state.service.engine.close()
        root.setLevel(level)
        package.setLevel(package_level)
        logging.captureWarnings(False)
    assert json.loads(capsys.readouterr().err)["path"] == "/health/live"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.mark.slow
def test_two_replicas_answer_as_one_process_does(pictures, tiny_folder, tiny_model):
    """Both work, greedy answers are those of `generate`, a stream and logprobs come through, SIGTERM ends it all."""
    port = free_port()
    command = [sys.executable, "-m", "sigma_book.cli", "serve", "--model", str(tiny_folder), "--replicas", "2"]
    command += ["--port", str(port), "--device", "cpu", "--name", "tiny"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    try:
        lines: list[str] = []
        reader = threading.Thread(target=lambda: lines.extend(iter(process.stderr.readline, "")), daemon=True)
        reader.start()
        end = time.monotonic() + 200
        while not any("listening on" in line for line in lines):
            assert process.poll() is None and time.monotonic() < end, "".join(lines)
            time.sleep(0.2)
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=60)
        assert [model.id for model in client.models.list()] == ["tiny"]
        expected = [generate(picture, "caption en", model=tiny_model, max_new_tokens=12) for picture in pictures]
        found: dict[int, list[str]] = {}

        def ask(place: int) -> None:
            for _ in range(4):
                answer = client.chat.completions.create(**question(pictures[place]))
                found.setdefault(place, []).append(answer.choices[0].message.content)

        threads = [threading.Thread(target=ask, args=(place,)) for place in range(len(pictures))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == {place: [text] * 4 for place, text in enumerate(expected)}
        stream = client.chat.completions.create(**question(pictures[0]), stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices) == expected[0]
        logprobs = client.chat.completions.create(**question(pictures[0]), logprobs=True).choices[0].logprobs.content
        _, _, ours = generate(pictures[0], "caption en", model=tiny_model, max_new_tokens=12, return_logprobs=True)
        assert max(abs(entry.logprob - one) for entry, one in zip(logprobs, ours)) < 1e-4
        assert both_have_worked(port)
        with pytest.raises(openai.BadRequestError, match="system"):
            client.chat.completions.create(
                model="tiny", messages=[{"role": "system", "content": "x"}, *question(pictures[0])["messages"]]
            )
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0, "".join(lines)
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"http://127.0.0.1:{port}/health/live")
    finally:
        if process.poll() is None:
            process.kill()
            process.wait(30)


@pytest.mark.slow
def test_an_answer_under_way_is_finished_after_sigterm(make_tiny, tmp_path):
    folder, port = make_tiny(tmp_path / "long", max_position_embeddings=16384), free_port()
    command = [sys.executable, "-m", "sigma_book.cli", "serve", "--model", str(folder), "--replicas", "2"]
    command += ["--port", str(port), "--device", "cpu", "--name", "tiny"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    try:
        for line in process.stderr:
            if "listening on" in line:
                break
        threading.Thread(target=process.stderr.read, daemon=True).start()
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=60)
        asked = question(draw_scene(make_scene(3))) | {"max_tokens": 3000}
        stream = client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
        chunks = [next(stream), next(stream)]
        process.send_signal(signal.SIGTERM)
        chunks += list(stream)
        assert chunks[-2].choices[0].finish_reason == "length" and chunks[-1].usage.completion_tokens == 3000
        assert process.wait(60) == 0
    finally:
        if process.poll() is None:
            process.kill()
            process.wait(30)


@pytest.mark.slow
def test_a_model_that_no_replica_can_load_is_told(tiny_folder, copy_folder):
    folder = copy_folder(tiny_folder)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    command = [sys.executable, "-m", "sigma_book.cli", "serve", "--model", str(folder), "--replicas", "2"]
    done = subprocess.run(
        [*command, "--port", str(free_port()), "--device", "cpu"],
        capture_output=True,
        text=True,
        timeout=300,
        env=ENVIRONMENT,
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "the replicas do not start" in done.stderr and "model.safetensors" in done.stderr


def question(picture) -> dict:
    encoded = io.BytesIO()
    picture.save(encoded, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(encoded.getvalue()).decode()}"
    content = [{"type": "text", "text": "caption en"}, {"type": "image_url", "image_url": {"url": url}}]
    return {"model": "tiny", "messages": [{"role": "user", "content": content}], "max_tokens": 12, "temperature": 0}


def both_have_worked(port: int) -> bool:
    """Metrics are those of whichever replica is asked: two different counts show that two have counted."""
    seen: Counter = Counter()
    for _ in range(60):
        text = httpx.get(f"http://127.0.0.1:{port}/metrics").text
        starts = [line for line in text.splitlines() if "start_time_seconds" in line and not line.startswith("#")]
        tokens = [line for line in text.splitlines() if not line.startswith("#") and "tokens_total" in line]
        assert tokens and any(float(line.rpartition(" ")[2]) > 0 for line in tokens)
        seen[tuple(starts) or tuple(tokens)] += 1
    return len(seen) == 2
