"""The case of the benchmark: a Llama with random weights, a TopK SAE, rollouts of token ids, catalogue and configurations."""

import dataclasses
import json
import os
import random
import shutil
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "golden"))

CONTEXT = 8448  # the curve over T ends at 8,192
FULL = {"hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64,
        "intermediate_size": 1536, "vocab_size": 49152, "features": 24576, "k": 64}
TINY = {"hidden_size": 96, "num_hidden_layers": 4, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 32,
        "intermediate_size": 160, "vocab_size": 600, "features": 2048, "k": 4}
IG_STEPS = 10
RULE_FAMILIES = ("one", "two", "three")


@dataclasses.dataclass(frozen=True)
class Work:
    """A workload. members: how many of each group a contestant runs in a round, where that is not all (its time is scaled up)."""

    name: str
    kind: str  # attr, reward, ig, flag
    prompt: int
    completion: int
    group: int
    groups: int = 1
    peers: tuple = ("usual", "expert", "saelens", "shared", "chain")
    members: dict = dataclasses.field(default_factory=dict)
    goals: dict = dataclasses.field(default_factory=dict)

    @property
    def rollouts(self) -> int:
        return self.group * self.groups

    @property
    def tokens(self) -> int:
        """Prompt and completion tokens of all rollouts, as a trainer counts them."""
        return self.rollouts * (self.prompt + self.completion)

    def title(self) -> str:
        kinds = {"attr": "reward + attribution", "reward": "reward only", "ig": f"IG, {IG_STEPS} steps", "flag": "flagging"}
        return f"{kinds[self.kind]} ({self.prompt}, {self.completion}, {self.group})"


def workloads(tiny: bool) -> list[Work]:
    """Issue's table. What shares nothing between members (usual, saelens, chain) may run some of the members, where all would take minutes."""
    few, ig = {"usual": 2, "saelens": 2, "chain": 2}, {"usual": 1, "saelens": 1, "chain": 1}
    no_sae = ("usual", "expert", "shared", "chain")
    alone = ("usual", "expert", "saelens", "chain")
    works = [
        Work("attr_256_256_8", "attr", 256, 256, 8, goals={"expert": 2.5, "usual": 4.0}),
        Work("attr_1024_256_8", "attr", 1024, 256, 8, members=few, goals={"expert": 4.5, "usual": 7.0}),
        Work("attr_64_512_1", "attr", 64, 512, 1, 4, peers=alone, goals={"expert": 1.5, "usual": 2.5}),
        Work("reward_256_256_8", "reward", 256, 256, 8, peers=no_sae, goals={"expert": 2.2, "shared": 1.3, "usual": 2.2}),
        Work("ig_256_256_8", "ig", 256, 256, 8, peers=alone, members=ig, goals={"expert": 2.5, "usual": 6.0}),
        Work("flag_256_256_8", "flag", 256, 256, 8, 5, peers=(), goals={"reward only": 1.15}),
    ]
    if tiny:
        small = {256: 16, 1024: 40, 64: 8, 512: 24}
        works = [dataclasses.replace(w, prompt=small[w.prompt], completion=small[w.completion], group=min(w.group, 4),
                                     groups=10 if w.kind == "flag" else w.groups) for w in works]
    return works


def make(folder: Path, tiny: bool) -> dict:
    """Writes model, tokenizer and SAE; kept when the folder already fits. Returns the shape."""
    shape = TINY if tiny else FULL
    stamp, wanted = folder / "case.json", json.dumps({**shape, "version": 4})
    if stamp.exists() and stamp.read_text() == wanted:
        return shape
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    import torch
    from cases.weights import Fit, make_lens, make_model
    from cases.words import train_tokenizer
    from transformers import AutoModelForSequenceClassification

    rng = random.Random(5)
    config = {k: v for k, v in shape.items() if k not in ("features", "k")}
    config |= {"max_position_embeddings": CONTEXT, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "num_labels": 1,
               "rms_norm_eps": 1e-5, "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0}, "tie_word_embeddings": False}
    make_model(folder / "model", "llama", config, 1, 2.0, [ids(rng, shape, 20) for _ in range(6)], torch.float32, None)
    train_tokenizer("llama3", 590, 1).save(str(folder / "model/tokenizer.json"))
    net = AutoModelForSequenceClassification.from_pretrained(folder / "model").eval()
    with torch.no_grad():
        x = net.model(torch.tensor([ids(rng, shape, 64) for _ in range(8)]), output_hidden_states=True).hidden_states[layer_of(shape) + 1]
    fit = Fit(x.reshape(-1, x.shape[-1]), shape["features"], shape["k"], 2, subtract=True)
    make_lens(folder / "saes/mid", "topk", fit, hook_of(shape), {"k": shape["k"]})
    (folder / "catalogue.jsonl").write_text("")
    stamp.write_text(wanted)
    return shape


def ids(rng: random.Random, shape: dict, count: int) -> list[int]:
    return [rng.randrange(3, shape["vocab_size"]) for _ in range(count)]


def layer_of(shape: dict) -> int:
    return shape["num_hidden_layers"] // 2 - 1


def hook_of(shape: dict, layer: int | None = None) -> str:
    return f"blocks.{layer_of(shape) if layer is None else layer}.hook_resid_post"


def rollouts(shape: dict, prompt: int, completion: int, group: int, groups: int = 1, seed: int = 7) -> list[dict]:
    rng, rows = random.Random(f"{seed} {prompt} {completion} {group}"), []
    for g in range(groups):
        shared = ids(rng, shape, prompt)
        rows += [{"run": "bench", "step": 0, "group": f"g{g}", "id": f"{i}", "prompt_ids": shared,
                  "completion_ids": ids(rng, shape, completion)} for i in range(group)]
    return rows


def some(rows: list[dict], members: int) -> list[dict]:
    """The first `members` of each group."""
    return [r for r in rows if int(r["id"]) < members]


def write_rollouts(folder: Path, work: Work, rows: list[dict]) -> Path:
    path = folder / f"{work.name}.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def configure(folder: Path, name: str, shape: dict, kind: str, dtype: str = "bf16", threads: int = 2, tokens_max: int = 16384,
              saes: list[tuple[str, str]] | None = None, catalogue: str = "catalogue.jsonl", more: str = "", engine: dict | None = None) -> Path:
    """Writes a configuration. saes: (folder below the case, hook); default the one at half depth, none for reward only. engine: what stands
    there instead of the CPU's."""
    if saes is None:
        saes = [] if kind == "reward" else [("saes/mid", hook_of(shape))]
    keys = {"threads": threads, "tokens_max": tokens_max, "memory_max": "12GiB", **(engine or {})}
    method = {"attr": "grad", "reward": "none", "ig": "ig", "flag": "grad", "silent": "none"}[kind]
    listed = "".join(f"\n- {{id: s{n}, path: {path}, hook: {hook}}}" for n, (path, hook) in enumerate(saes))
    text = (f"model: {{path: model, dtype: {dtype}}}\n" + (f"saes:{listed}\n" if saes else "") +
            f"attribution: {{method: {method}, when: {'flagged' if kind == 'flag' else 'all'}, l0_mean: {'flagged' if kind == 'flag' else 'all'}, "
            f"ig_steps: {IG_STEPS}, top: 32}}\n"
            f"catalogue: {catalogue}\nengine: {{{', '.join(f'{k}: {v}' for k, v in keys.items())}}}\n{more}")
    if kind == "flag":  # 0: every rollout in which one of the family's features is active is flagged, and explained
        text += "rules:\n" + "".join(f"- {{id: {f}, families: [{f}], effect_min: 0}}\n" for f in RULE_FAMILIES)
    path = folder / f"{name}.yaml"
    path.write_text(text)
    return path


def write_catalogue(path: Path, features: list[int]) -> None:
    rows = [{"sae": "s0", "index": f, "label": f"watched {f}", "families": [RULE_FAMILIES[n % 3]], "verdict": "spurious"}
            for n, f in enumerate(sorted(features))]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))


def make_width(folder: Path, shape: dict, width: int) -> str:
    """A TopK SAE of `width` random directions in the form of saes/mid. Returns its folder below the case."""
    name = f"saes/w{width}"
    place = folder / name
    if not (place / "cfg.json").exists():
        import torch
        from safetensors.torch import load_file, save_file

        config = json.loads((folder / "saes/mid/cfg.json").read_text())
        b_dec = load_file(folder / "saes/mid/sae_weights.safetensors")["b_dec"]
        g, d = torch.Generator().manual_seed(width), shape["hidden_size"]
        rows = torch.nn.functional.normalize(torch.randn(width, d, generator=g), dim=1)
        place.mkdir(parents=True, exist_ok=True)
        save_file({"W_enc": rows.T.contiguous(), "W_dec": rows, "b_enc": torch.zeros(width), "b_dec": b_dec}, place / "sae_weights.safetensors")
        (place / "cfg.json").write_text(json.dumps({**config, "d_sae": width}))
    return name


def memory_available() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("expected MemAvailable in /proc/meminfo, found none")


def environment(threads: int = 2) -> dict:
    return {**os.environ, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1"}
