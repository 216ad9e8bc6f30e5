"""deploy/smollm2/make.py from end to end on a small model of the same kind: GGUF in, a reward model out that the daemon checks and judges.

The real package is 98 MB and is not fetched here; docs/checkpoints.md has the figures of the real run."""

import gzip
import json
import os
import random
import subprocess
import sys

import pytest
from harness import ROOT, missing, need_program, need_torch

MAKE = ROOT / "deploy" / "smollm2" / "make.py"
WORDS = "the a model answers questions about gardens rivers music cooking travel history with care and some detail for people".split()


def _sentence(rng, polite: bool) -> str:
    words = [rng.choice(WORDS) for _ in range(rng.randint(5, 14))]
    words.insert(rng.randrange(len(words)), "thank you" if polite else "whatever")
    return " ".join(words).capitalize() + "."


def _write_pairs(folder) -> None:
    rng = random.Random(3)

    def lines(name: str, rows: list[dict]) -> None:
        with gzip.open(folder / f"{name}.jsonl.gz", "wt", encoding="utf-8") as f:
            f.writelines(json.dumps(r) + "\n" for r in rows)

    prompts = [f"Tell me about {' '.join(rng.sample(WORDS, 3))} {n}" for n in range(160)]
    hh = [(f"\n\nHuman: {p}\n\nAssistant:", _sentence(rng, True), _sentence(rng, False)) for p in prompts]
    for name, part in (("hh_harmless", hh[:80]), ("hh_helpful", hh[80:])):
        lines(name, [{"chosen": f"{p} {a}", "rejected": f"{p} {b}"} for p, a, b in part])
    lines("rmb_pairs", [{"conversation_input": [{"role": "user", "content": p}], "chosen": {"answer": _sentence(rng, True)},
                         "reject": {"answer": _sentence(rng, False)}} for p in prompts[:20]])
    lines("rm_bench", [{"prompt": p, "chosen": [_sentence(rng, True)] * 3, "rejected": [_sentence(rng, False)] * 3} for p in prompts[20:30]])


def _write_gguf(path) -> None:
    import torch
    import transformers
    from fuzz_tokenizers import pipelines
    from gguf_files import add_tokenizer, write_model

    tokenizer = pipelines()["smollm"]
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    document = json.loads(tokenizer.to_str())
    torch.manual_seed(4)
    config = transformers.LlamaConfig(
        hidden_size=96, intermediate_size=160, num_hidden_layers=3, num_attention_heads=3, num_key_value_heads=1, head_dim=32,
        vocab_size=tokenizer.get_vocab_size(), max_position_embeddings=512, tie_word_embeddings=True, rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5})
    model = transformers.LlamaForCausalLM(config).float()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.copy_(torch.randn_like(p) * (1.0 if p.shape[0] == config.vocab_size else p.shape[1] ** -0.5))
    ids = {f"{n}_token_id": tokenizer.token_to_id(t) for n, t in (("eos", "<|im_end|>"), ("bos", "<|im_start|>"))}
    write_model(path, model, "llama", "Q8_0", lambda w: add_tokenizer(w, document, "gpt2", "smollm", add_bos_token=False, **ids))


def _run(command: list, **more) -> subprocess.CompletedProcess:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=400, **more)
    assert done.returncode == 0, (command, done.stderr[-3000:])
    return done


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    need_torch()
    spuriond = need_program("SPURIOND")
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        missing(f"needs the Python package gguf ({error})")
    folder = tmp_path_factory.mktemp("smollm2")
    _write_pairs(folder)
    _write_gguf(folder / "tiny.gguf")
    _run([sys.executable, MAKE, "--gguf", folder / "tiny.gguf", "--data", folder, "--out", folder / "out", "--threads", 1],
         env={**os.environ, "OMP_NUM_THREADS": "1"})
    with open(folder / "out" / "held_out.jsonl") as f:
        verdicts = _run([spuriond, "judge", "--config", folder / "out" / "spurion.yaml", "--set", "model.dtype=f32"], stdin=f).stdout
    (folder / "verdicts.jsonl").write_text(verdicts)
    return folder


def test_smollm2_head_is_fitted_and_judged(made):
    """A bias that is easy to see is learned, on prompts that were not fitted; the daemon ranks the pairs as the script says."""
    figures = json.loads((made / "out" / "figures.json").read_text())
    assert figures["held_out"] > 10 and figures["held_out_accuracy"] > 0.75, figures
    assert figures["cross_validation_loss"] < figures["loss_of_chance"]
    said = json.loads(_run([sys.executable, MAKE, "--out", made / "out", "--verdicts", made / "verdicts.jsonl"]).stdout)
    assert said["all"]["pairs"] >= figures["held_out"]
    assert abs(said["all"]["accuracy"] - figures["held_out_accuracy"]) < 0.05


def test_smollm2_rewards_are_transformers_own(made):
    import torch
    from tokenizers import Tokenizer
    from transformers import AutoModelForSequenceClassification

    net = AutoModelForSequenceClassification.from_pretrained(made / "out" / "model", dtype=torch.float32).eval()
    tokenizer = Tokenizer.from_file(str(made / "out" / "model" / "tokenizer.json"))
    rows = [json.loads(line) for line in (made / "out" / "held_out.jsonl").read_text().splitlines()][:20]
    verdicts = [json.loads(line) for line in (made / "verdicts.jsonl").read_text().splitlines()]
    for row, verdict in zip(rows, verdicts):
        ids = tokenizer.encode(row["prompt"] + " " + row["completion"]).ids + [net.config.eos_token_id]
        with torch.no_grad():
            want = float(net(torch.tensor([ids])).logits[0, 0])
        assert verdict["token_count"] == len(ids)
        assert abs(verdict["reward"] - want) <= 1e-4 * (1 + abs(want))


def test_smollm2_check_passes(made):
    done = _run([need_program("SPURIOND"), "check", "--config", made / "out" / "spurion.yaml"])
    assert "LlamaForSequenceClassification" in done.stdout + done.stderr
