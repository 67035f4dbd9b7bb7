"""`sigma-book serve` as a process of its own: signals, files, logs; and a server under more load than it can take."""

import asyncio
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import httpx
import pytest
import torch
from PIL import Image

from sigma_book import generate, load
from sigma_book.cli import main
from sigma_book.server import ServerConfig
from sigma_book.serving import app_for, read_api_keys, remembering

# A request waits and is answered for (rows + queue) / capacity seconds under load: few of both keep that short.
ROWS, QUEUE = (int(number) for number in os.environ.get("SIGMA_BOOK_LOAD_ROWS", "2,0").split(","))
ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # the clients of a load test want a core of two


@pytest.fixture
def serve(tmp_path):
    """The real command; `serve(*arguments)` gives the process, with `url`, and `log()`: its lines so far, as objects."""
    processes = []

    def start(*arguments, environment=None):
        log = tmp_path / f"log{len(processes)}"
        command = [sys.executable, "-m", "sigma_book.cli", "serve", "--port", "0", *map(str, arguments)]
        with log.open("w") as file:
            process = subprocess.Popen(command, stderr=file, stdout=file, env=os.environ | (environment or {}))
        processes.append(process)
        process.log = lambda: [json.loads(line) for line in log.read_text().splitlines()]
        end = time.monotonic() + 120
        while not (listening := [line for line in process.log() if line["event"] == "listening"]):
            assert process.poll() is None and time.monotonic() < end, log.read_text()
            time.sleep(0.05)
        process.url = listening[0]["url"]
        return process

    yield start
    for process in processes:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def long_folder(make_tiny, tmp_path_factory):
    """A model that says as many tokens as it is asked for."""
    return make_tiny(tmp_path_factory.mktemp("long") / "model", max_position_embeddings=16384)


def ask(url: str, picture: Path, tokens: int, **options) -> httpx.Response:
    sent = {"files": {"file": picture.read_bytes()}, "data": {"prompt": "secret words", "max_tokens": str(tokens)}}
    return httpx.post(f"{url}/generate", **sent, timeout=120, **options)


@pytest.mark.slow
def test_each_limit_of_the_command_reaches_the_server(serve, long_folder, picture_file):
    options = {"max-tokens": 5, "max-body": 90_000, "max-pixels": 20_000, "max-length": 90, "cors": "https://a.example"}
    options |= {"image-root": picture_file.parent, "name": "m", "deadline": 40}
    process = serve("--model", long_folder, *(part for name, value in options.items() for part in (f"--{name}", value)))
    large = io.BytesIO()
    Image.new("RGB", (160, 160)).save(large, "PNG")

    def refused(content: bytes = picture_file.read_bytes(), prompt: str = "x", tokens: int = 5) -> tuple[int, str]:
        data = {"prompt": prompt, "max_tokens": str(tokens)}
        answer = httpx.post(f"{process.url}/generate", files={"file": content}, data=data, timeout=60)
        return answer.status_code, answer.json().get("error", {}).get("message", "")

    assert refused() == (200, "")
    assert refused(tokens=6)[0] == 400 and "5" in refused(tokens=6)[1]
    assert refused(bytes(90_001)) == (413, "the body is larger than 90,000 bytes: send a smaller picture")
    assert refused(large.getvalue())[0] == 400 and "20,000" in refused(large.getvalue())[1]
    assert refused(prompt="star " * 90)[0] == 400 and "90" in refused(prompt="star " * 90)[1]
    told = httpx.get(f"{process.url}/health/live", headers={"origin": "https://a.example"})
    assert told.headers["access-control-allow-origin"] == "https://a.example"
    parts = [{"type": "text", "text": "x"}, {"type": "image_url", "image_url": {"url": picture_file.name}}]
    asked = {"model": "m", "messages": [{"role": "user", "content": parts}], "max_tokens": 5}
    assert httpx.post(f"{process.url}/v1/chat/completions", json=asked, timeout=60).status_code == 200


def test_sigterm_finishes_what_runs_and_takes_nothing_new(serve, long_folder, picture_file):
    process = serve("--model", long_folder, "--name", "long")
    assert ask(process.url, picture_file, 3).status_code == 200
    answers = []
    asking = threading.Thread(target=lambda: answers.append(ask(process.url, picture_file, 2500)))
    asking.start()
    while "sigma_book_running_rows 1.0" not in httpx.get(f"{process.url}/metrics").text:
        time.sleep(0.02)
    assert httpx.get(f"{process.url}/health/ready").status_code == 200
    process.send_signal(signal.SIGTERM)
    while (ready := httpx.get(f"{process.url}/health/ready")).status_code == 200:
        time.sleep(0.02)
    assert ready.status_code == 503 and httpx.get(f"{process.url}/health/live").status_code == 200
    refused = ask(process.url, picture_file, 3)
    assert refused.status_code == 503 and refused.json()["error"]["code"] == "stopping"
    asking.join()
    assert answers[0].status_code == 200 and answers[0].json()["usage"]["completion_tokens"] == 2500
    assert process.wait(20) == 0
    lines = process.log()
    assert [line["event"] for line in lines][-1] == "stopped"
    done = [line for line in lines if line["event"] == "request" and line.get("completion_tokens") == 2500]
    assert len(done) == 1 and "secret" not in json.dumps(lines)


@pytest.mark.slow
def test_a_second_signal_and_the_end_of_grace_do_not_wait(serve, long_folder, picture_file):
    """In both cases the request that was under way hears why it has no answer."""
    started = [(serve("--model", long_folder), 2), (serve("--model", long_folder, "--grace", 0.3), 1)]
    for process, signals in started:
        answers = []
        asking = threading.Thread(target=lambda: answers.append(ask(process.url, picture_file, 16000)))  # noqa: B023
        asking.start()
        while "sigma_book_running_rows 1.0" not in httpx.get(f"{process.url}/metrics").text:
            time.sleep(0.02)
        for _ in range(signals):
            process.send_signal(signal.SIGINT)
            time.sleep(0.3)
        assert process.wait(15) == 0
        asking.join()
        assert answers[0].status_code == 503 and answers[0].json()["error"]["code"] == "stopping"
        assert process.log()[-1]["event"] == "stopped"


def test_what_is_wrong_is_said_before_a_port_is_open(capsys, tmp_path, tiny_folder):
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        empty = tmp_path / "keys"
        empty.write_text("\n")
        cases = [
            (["--port", port], f"port {port}"),
            (["--port", "99999"], "99999"),
            (["--api-keys", str(tmp_path / "none")], "no such file"),
            (["--api-keys", str(empty)], "holds no API key"),
            (["--image-root", str(tmp_path / "none")], "no such folder"),
            (["--cors", "example.org"], "origin"),
            (["--deadline", "0"], "deadline"),
            (["--replicas", "2", "--grace", "5"], "leave it out with --replicas"),
            (["--max-rows", "0", "--port", "0"], "max_rows"),
            (["--model", str(tmp_path / "none")], "none"),
        ]
        for arguments, words in cases:
            assert main(["serve", "--model", str(tiny_folder), *arguments]) == 2
            out, err = capsys.readouterr()
            assert out == "" and words in err and err.count("\n") == 1, (arguments, err)


def test_keys_come_from_a_file_or_the_environment(tmp_path, monkeypatch):
    assert read_api_keys() == ()
    monkeypatch.setenv("SIGMA_BOOK_API_KEYS", "one, two,")
    assert read_api_keys() == ("one", "two")
    monkeypatch.setenv("SIGMA_BOOK_API_KEYS", "")  # what compose gives where nothing is set
    assert read_api_keys() == ()
    for nothing in (",", " , ", "\n"):
        monkeypatch.setenv("SIGMA_BOOK_API_KEYS", nothing)
        with pytest.raises(ValueError, match="SIGMA_BOOK_API_KEYS holds no API key"):
            read_api_keys()
    (tmp_path / "keys").write_text("three\n\n  four \n")
    assert read_api_keys(tmp_path / "keys") == ("three", "four")
    (tmp_path / "keys").write_text("fi ve\n")
    with pytest.raises(ValueError, match="visible ASCII"):
        read_api_keys(tmp_path / "keys")


def test_a_model_is_called_as_its_folder(monkeypatch, tiny_folder):
    names = []
    monkeypatch.setattr("sigma_book.serving.serve", lambda make_model, config, **given: names.append(config.model_name))
    monkeypatch.chdir(tiny_folder)
    for given in (".", f"../{tiny_folder.name}/", "some/hub-id"):
        assert main(["serve", "--model", given]) == 0
    assert main(["serve"]) == 0
    assert names == [tiny_folder.name, tiny_folder.name, "hub-id", "pocket"]


def test_keys_of_the_environment_are_asked_for(serve, tiny_folder, picture_file):
    process = serve("--model", tiny_folder, "--log-prompts", environment={"SIGMA_BOOK_API_KEYS": "k1"})
    assert ask(process.url, picture_file, 3).status_code == 401
    assert ask(process.url, picture_file, 3, headers={"Authorization": "Bearer k1"}).status_code == 200
    time.sleep(0.1)
    assert [line["prompt"] for line in process.log() if "prompt" in line] == ["secret words"]
    assert "k1" not in json.dumps(process.log())


def test_a_model_made_for_speed_is_served_without_explanations(tiny_folder):
    app = app_for(load(tiny_folder, compile=True), ServerConfig("tiny"), {})
    with closing(app.state.service.engine):
        assert "/generate" in (paths := app.openapi()["paths"]) and "/explain" not in paths


def test_a_second_question_on_a_picture_skips_the_tower(tiny_folder, pictures, monkeypatch):
    model, encoded = load(tiny_folder), []
    encode = model.encode_images
    monkeypatch.setattr(model, "encode_images", lambda given: encoded.extend(given) or encode(given))
    pixels = model.processor.prepare([pictures[0], pictures[1], pictures[0]], ["x"] * 3).pixel_values
    remember = remembering(model)
    for rows in ([0], [1, 2], [2, 0, 1]):
        torch.testing.assert_close(remember(pixels[rows]), encode(pixels[rows]), rtol=1e-5, atol=1e-5)
    assert len(encoded) == 2
    ready = load(tiny_folder, compile=True)  # has a memory of its own
    assert remembering(ready) == ready.encode_images


# Load


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


async def send(client: httpx.AsyncClient, url: str, question: dict) -> dict:
    start = time.perf_counter()
    sent = {"files": {"file": question["picture"]}, "data": {"prompt": question["prompt"]}}
    answer = await client.post(f"{url}/generate", **sent)
    seconds = time.perf_counter() - start
    right = answer.status_code == 200 and answer.json()["answer"] == question["answer"]
    return {"status": answer.status_code, "seconds": seconds, "right": right, "headers": answer.headers}


async def in_turn(url: str, questions: list[dict], clients: int, seconds: float) -> list[dict]:
    """So many clients, each of which asks again when it has its answer."""
    results, end = [], time.monotonic() + seconds
    limits = httpx.Limits(max_connections=None)

    async def client(number: int, http: httpx.AsyncClient) -> None:
        while time.monotonic() < end:
            results.append(await send(http, url, questions[(number + len(results)) % len(questions)]))

    async with httpx.AsyncClient(timeout=60, limits=limits) as http:
        await asyncio.gather(*(client(number, http) for number in range(clients)))
    return results


async def at_a_rate(url: str, questions: list[dict], rate: float, seconds: float) -> list[dict]:
    """Requests at a steady rate, whether or not earlier ones have been answered."""
    async with httpx.AsyncClient(timeout=60, limits=httpx.Limits(max_connections=None)) as http:
        tasks, start = [], time.monotonic()
        while (elapsed := time.monotonic() - start) < seconds:
            due = int(elapsed * rate) + 1
            tasks += [
                asyncio.create_task(send(http, url, questions[n % len(questions)])) for n in range(len(tasks), due)
            ]
            await asyncio.sleep(0.5 / rate)
        return await asyncio.gather(*tasks)


def resident(process: subprocess.Popen) -> float:
    status = Path(f"/proc/{process.pid}/status").read_text()
    return float(status.split("VmRSS:")[1].split()[0]) * 1000


def run_load(serve, questions: list[dict], seconds: float, rows: int, queue: int) -> dict:
    """What a server does alone, with full rows, and with twice the requests that it can answer."""
    process = serve("--max-rows", rows, "--queue", queue, environment=ONE_THREAD)
    short = 5.0  # seconds for each of the rest
    warm = asyncio.run(in_turn(process.url, questions, rows + queue, short))
    alone = asyncio.run(in_turn(process.url, questions, 1, short))
    full = asyncio.run(in_turn(process.url, questions, rows + queue, short))
    capacity = max(len([one for one in run if one["status"] == 200]) for run in (warm, full)) / short
    asyncio.run(at_a_rate(process.url, questions, 2 * capacity, short))  # memory has grown to what load takes
    before = resident(process)
    results = asyncio.run(at_a_rate(process.url, questions, 2 * capacity, seconds))
    admitted = [result for result in results if result["status"] == 200]
    return {
        "rows": rows,
        "queue": queue,
        "alone_p50": percentile([result["seconds"] for result in alone], 0.5),
        "alone_p99": percentile([result["seconds"] for result in alone], 0.99),
        "alone_rate": len(alone) / short,
        "full_p99": percentile([result["seconds"] for result in full], 0.99),
        "capacity": capacity,
        "asked": len(results),
        "admitted": len(admitted),
        "admitted_rate": len(admitted) / seconds,
        "admitted_p50": percentile([result["seconds"] for result in admitted], 0.5),
        "admitted_p99": percentile([result["seconds"] for result in admitted], 0.99),
        "wrong": len(
            [result for result in warm + alone + full + admitted if result["status"] == 200 and not result["right"]]
        ),
        "refused": len([result for result in results if result["status"] == 429]),
        "refused_p99": percentile([result["seconds"] for result in results if result["status"] == 429] or [0.0], 0.99),
        "other": [result["status"] for result in results if result["status"] not in (200, 429)],
        "with_retry_after": all(result["headers"].get("retry-after") for result in results if result["status"] == 429),
        "memory_before": before,
        "memory_after": resident(process),
    }


def check_load(report: dict) -> None:
    print(json.dumps(report, indent=1))
    assert report["wrong"] == 0 and report["other"] == []
    assert report["refused"] > 0 and report["with_retry_after"]  # it was more than it can answer, and it said so
    assert report["admitted_rate"] > 0.4 * report["capacity"]  # and it went on answering
    assert report["memory_after"] < report["memory_before"] + 20e6
    # 1.4 to 2 on an idle machine; a neighbour that comes between the two measurements may double it
    assert report["admitted_p99"] < 4 * report["alone_p99"]


@pytest.fixture
def questions(pictures, pocket, tmp_path):
    asked = []
    for number, picture in enumerate(pictures):
        path = tmp_path / f"{number}.png"
        picture.save(path)
        for prompt in ("caption en", "detect star", "how many things ?", "what colour is the star ?"):
            answer = generate(path, prompt, model=pocket)
            asked.append({"picture": path.read_bytes(), "prompt": prompt, "answer": answer})
    return asked


def test_twice_the_load_for_a_minute(serve, questions):
    report = run_load(serve, questions, 60.0, rows=ROWS, queue=QUEUE)
    if report["refused_p99"] > 1.0:  # a no takes 10 ms: the machine itself stood still, so it is measured anew
        print(json.dumps(report, indent=1))
        report = run_load(serve, questions, 60.0, rows=ROWS, queue=QUEUE)
    check_load(report)


@pytest.mark.slow
@pytest.mark.alone
def test_twice_the_load_for_ten_minutes(serve, questions):
    check_load(run_load(serve, questions, 600.0, rows=ROWS, queue=QUEUE))
