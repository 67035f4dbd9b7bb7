"""The full 3B size, random weights in float32: it loads and answers within 1.15 times its weights of memory.

    pytest -n 0 -m slow tests/test_full_size.py -s

needs 12 GB of disk and 14 GB of memory, and prints what it measured.
"""

import json
import subprocess
import sys

import pytest
import torch

from sigma_book.bench import size_config, write_random_model

ANSWER = """
import json, re, sys, time
from pathlib import Path
started = time.perf_counter()
import torch
from sigma_book import generate, load
from sigma_book.world import draw_scene, make_scene
model = load(sys.argv[1], device="cpu", dtype="float32")
loaded = time.perf_counter() - started
_, tokens, _ = generate(draw_scene(make_scene(5)), "caption en", model=model, max_new_tokens=5, return_logprobs=True)
status = Path("/proc/self/status").read_text()  # the child's own; getrusage would begin with its parent's
peak = int(re.search(r"VmHWM:\\s+(\\d+)", status)[1]) * 1024
weights = sum(p.numel() * p.element_size() for p in model.parameters())
seconds = time.perf_counter() - started
print(json.dumps(dict(peak=peak, weights=weights, tokens=len(tokens), load=loaded, all=seconds)))
"""


@pytest.mark.slow
def test_the_full_size_answers_within_its_memory(tmp_path):
    write_random_model(tmp_path, size_config("3b"), torch.float32)
    try:
        done = subprocess.run([sys.executable, "-c", ANSWER, str(tmp_path)], capture_output=True, text=True, check=True)
    finally:
        for shard in tmp_path.glob("*.safetensors"):
            shard.unlink()
    measured = json.loads(done.stdout)
    print(measured, f"peak / weights = {measured['peak'] / measured['weights']:.3f}")
    assert measured["weights"] == 4 * 2_923_466_480
    assert measured["tokens"] >= 1
    assert measured["peak"] <= 1.15 * measured["weights"]
