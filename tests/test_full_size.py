"""The full 3B size, random weights in float32: it loads and answers within 1.15 times its weights of memory.

    pytest -m slow tests/test_full_size.py -s

needs 12 GB of disk and 14 GB of memory, and prints what it measured.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import sigma_book
from sigma_book.paligemma import PaliGemma, PaliGemmaConfig
from sigma_book.weights import hub_name

POCKET = Path(sigma_book.__file__).parent / "pocket_model"
TEXT = {
    "model_type": "gemma",
    "hidden_size": 2048,
    "intermediate_size": 16384,
    "num_hidden_layers": 18,
    "num_attention_heads": 8,
    "num_key_value_heads": 1,
    "vocab_size": 257_216,
}
VISION = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
}
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


def write_random(folder: Path, config: PaliGemmaConfig, dtype: torch.dtype) -> None:
    """Random weights in shards, one shard in memory at a time, under the hub's names."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in PaliGemma(config).state_dict().items()}
    names, table, number = list(shapes), {}, 0
    generator = torch.Generator().manual_seed(0)
    while names:
        shard, size = {}, 0
        while names and size < 2_500_000_000:
            name = names.pop(0)
            spread = 0.3 / shapes[name][-1] ** 0.5
            shard[hub_name(name)] = torch.empty(shapes[name], dtype=dtype).normal_(0, spread, generator=generator)
            size += shard[hub_name(name)].nbytes
        number += 1
        save_file(shard, folder / f"model-{number:05d}.safetensors")
        table |= dict.fromkeys(shard, f"model-{number:05d}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    (folder / "config.json").write_text(json.dumps(config.to_dict() | {"dtype": "float32"}))
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json"):
        shutil.copy(POCKET / name, folder / name)


@pytest.mark.slow
def test_the_full_size_answers_within_its_memory(tmp_path):
    config = PaliGemmaConfig.from_dict(
        {"model_type": "paligemma", "image_token_index": 1850, "text_config": TEXT, "vision_config": VISION}
    )
    write_random(tmp_path, config, torch.float32)
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
