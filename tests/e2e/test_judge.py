"""`spuriond judge`, `check` and the configuration commands as real processes: bad input one by one, groups, streaming, exit statuses.

The model is the stored case golden/stored/refused (Llama, one SAE, max_tokens 60); every test works on a copy of it. Only the standard
library and pytest are needed. SPURIOND names the program.
"""

import json
import math
import os
import select
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

CASE = Path(__file__).resolve().parent.parent / "golden" / "stored" / "refused"
TIMEOUT = 120
GOOD = {"run": "r", "step": 1, "group": "g", "prompt": "Most of the people there", "completion": " would help them."}


@pytest.fixture(scope="module")
def spuriond() -> str:
    path = os.environ.get("SPURIOND")
    if not path:
        (pytest.fail if os.environ.get("SPURION_REQUIRE_ALL") else pytest.skip)("needs SPURIOND to name the program")
    assert os.access(path, os.X_OK), f"SPURIOND: expected a program, found {path}"
    return path


@pytest.fixture
def case(tmp_path) -> Path:
    return Path(shutil.copytree(CASE, tmp_path / "case"))


def environment() -> dict:
    return {k: v for k, v in os.environ.items() if not k.startswith("SPURION_ENGINE")} | {"OMP_WAIT_POLICY": "passive",
                                                                                          "SPURION_ENGINE_THREADS": "1"}


def run(spuriond, *args, stdin=b"", stdout=subprocess.PIPE):
    return subprocess.run([spuriond, *map(str, args)], input=stdin, stdout=stdout, stderr=subprocess.PIPE, timeout=TIMEOUT,
                          env=environment())


def line_of(**fields) -> bytes:
    return json.dumps({**GOOD, **fields}).encode()


def judge(spuriond, case, lines, *args, status=0) -> list:
    """Output objects; the process must end with this status."""
    done = run(spuriond, "judge", "--config", case / "config.yaml", *args, stdin=b"".join(line + b"\n" for line in lines))
    assert done.returncode == status, done.stderr.decode()
    return [json.loads(text) for text in done.stdout.decode().splitlines()]


def bare(verdict: dict) -> dict:
    """What does not speak of the group."""
    names = {"id", "group", "step", "advantage", "counterfactual_advantage", "advantage_flip", "flags", "warnings"}
    return {k: v for k, v in verdict.items() if k not in names}


# --- one bad rollout among good ones ---

BAD_LINES = {
    "empty completion": (line_of(id="x", completion=""), "INVALID_ARGUMENT", ["completion: expected a text, found an empty one"]),
    "no completion": (line_of(id="x", completion=None), "INVALID_ARGUMENT", ["expected prompt and completion", "found prompt"]),
    "over the context": (line_of(id="x", completion=" word" * 100), "OUT_OF_RANGE", ["expected at most 60 tokens, found"]),
    "ids outside the vocabulary": (line_of(id="x", prompt=None, completion=None, prompt_ids=[1], completion_ids=[2, 1003]),
                                   "INVALID_ARGUMENT", ["completion_ids: expected ids from 0 to 1002, found 1003 at place 1"]),
    "negative id": (line_of(id="x", prompt=None, completion=None, prompt_ids=[-1], completion_ids=[2]), "INVALID_ARGUMENT",
                    ["prompt_ids: expected", "found -1"]),
    "no completion ids": (line_of(id="x", prompt=None, completion=None, prompt_ids=[1], completion_ids=[]), "INVALID_ARGUMENT",
                          ["expected at least one token, found none"]),
    "texts and ids": (line_of(id="x", prompt_ids=[1]), "INVALID_ARGUMENT", ["found prompt completion prompt_ids"]),
    "lone surrogate": (b'{"run":"r","step":1,"group":"g","id":"x","prompt":"a","completion":"\\ud800"}', "INVALID_ARGUMENT",
                       ["completion: expected Unicode text, found a lone surrogate"]),
    "number as text": (line_of(id="x", prompt=7), "INVALID_ARGUMENT", ["prompt: expected a text, found 7"]),
    "no id": (line_of(), "INVALID_ARGUMENT", ["id: expected a text, found none"]),
    "long id": (line_of(id="x" * 129), "INVALID_ARGUMENT", ["id: expected a name of 1 to 128 bytes, found 129"]),
    "tags of another type": (line_of(id="x", tags=[1]), "INVALID_ARGUMENT", ["tags: expected an object, found an array"]),
    "reward that is none": (line_of(id="x", trainer_reward="1"), "INVALID_ARGUMENT", ["trainer_reward: expected a finite number"]),
    "unknown field": (line_of(id="x", completions="a"), "INVALID_ARGUMENT", ["unknown field 'completions'", "did you mean 'completion'"]),
    "same identity again": (line_of(id="a", completion=" other"), "ALREADY_EXISTS", ["expected a new rollout, found r/1/g/a"]),
    "same identity and too long": (line_of(id="a", completion=" word" * 100), "ALREADY_EXISTS", ["found r/1/g/a"]),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_judge_refuses_one_rollout_and_judges_the_others(spuriond, case, name):
    line, code, parts = BAD_LINES[name]
    plain = judge(spuriond, case, [line_of(id="a"), line_of(id="b", completion=" never.")])
    out = judge(spuriond, case, [line_of(id="a"), line, line_of(id="b", completion=" never.")], status=3)
    assert out[1]["error"]["code"] == code
    for part in parts:
        assert part in out[1]["error"]["message"]
    assert [out[0], out[2]] == plain  # the refused one is not in the means and does not end the group
    sent = json.loads(line)
    assert {k: out[1][k] for k in ("run", "step", "group", "id")} == {k: sent.get(k) for k in ("run", "step", "group", "id")}


@pytest.mark.parametrize("line, part", [(b"not json", "byte 0x6e at offset 0"), (b"[1,2]", "found an array"), (b"", "found the end"),
                                        (b'{"run":"\xff"}', "expected UTF-8, found byte 0xff at offset 8"),
                                        (b'{"run":"r"} {}', "expected the end"), (b"[" * 5000, "less nesting")])
def test_judge_counts_lines_that_are_no_object(spuriond, case, line, part):
    out = judge(spuriond, case, [line_of(id="a"), line, line_of(id="b", completion=" never.")], status=3)
    assert out[1]["line"] == 2 and out[1]["error"]["code"] == "INVALID_ARGUMENT" and set(out[1]) == {"line", "error"}
    assert part in out[1]["error"]["message"]
    assert out[0]["advantage"] is not None and out[2]["warnings"] == []  # the group went on


def test_judge_refuses_a_line_over_its_limit(spuriond, case):
    out = judge(spuriond, case, [line_of(id="a"), b'{"run":"' + b"x" * (16 << 20) + b'"}', line_of(id="b")], status=3)
    assert out[1]["line"] == 2 and out[1]["error"]["code"] == "RESOURCE_EXHAUSTED"
    assert "expected a line of at most 16777216 bytes" in out[1]["error"]["message"]
    assert "reward" in out[0] and "reward" in out[2]


def test_judge_names_that_cannot_be_read_end_the_group(spuriond, case):
    out = judge(spuriond, case, [line_of(id="a"), line_of(id="b", completion=" no"), line_of(id="x", step="1"),
                                 line_of(id="c", completion=" yes")], status=3)
    assert out[2]["step"] == "1" and out[2]["error"]["code"] == "INVALID_ARGUMENT"
    assert out[0]["advantage"] is not None and out[3]["advantage"] is None
    assert out[3]["warnings"] == ["group_split"]


def test_judge_refused_rollout_leaves_its_identity_free(spuriond, case):
    out = judge(spuriond, case, [line_of(id="a", completion=""), line_of(id="a"), line_of(id="a", attempt=1)], status=3)
    assert "error" in out[0] and "reward" in out[1] and out[2]["attempt"] == 1
    assert bare(out[1]) == {k: v for k, v in bare(out[2]).items() if k != "attempt"}


def test_judge_bounds_the_members_of_a_group(spuriond, case):
    lines = [line_of(id=str(n), prompt=None, completion=None, prompt_ids=[5], completion_ids=[n % 900 + 3]) for n in range(1026)]
    out = judge(spuriond, case, lines, "--set", "attribution.method=none", status=3)
    assert [v for v in out[:1024] if "error" in v] == []
    assert {v["error"]["code"] for v in out[1024:]} == {"OUT_OF_RANGE"}
    mean = math.fsum(v["reward"] for v in out[:1024]) / 1024
    for v in out[:1024]:
        assert v["advantage"] == pytest.approx(v["reward"] - mean, abs=1e-5)


# --- models, SAEs and catalogues that do not fit ---


def read_tensors(path: Path) -> tuple:
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def write_tensors(path: Path, header: dict, body: bytes) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def drop_tensor(path: Path, name: str) -> None:
    """Without one tensor and its bytes, so that the rest is still a whole file."""
    header, body = read_tensors(path)
    out, kept = {}, b""
    for key, row in header.items():
        if key == "__metadata__":
            out[key] = row
        elif key != name:
            first, last = row["data_offsets"]
            out[key] = {**row, "data_offsets": [len(kept), len(kept) + last - first]}
            kept += body[first:last]
    write_tensors(path, out, kept)


def poison(path: Path, name: str, value: float) -> None:
    header, body = read_tensors(path)
    first = header[name]["data_offsets"][0]
    write_tensors(path, header, body[: first + 8] + struct.pack("<f", value) + body[first + 12 :])


def narrow_sae(case: Path) -> None:
    folder = case / "saes" / "std"
    shapes = {"W_dec": [10, 32], "W_enc": [32, 10], "b_dec": [32], "b_enc": [10]}
    header, body = {}, b""
    for name, shape in shapes.items():
        size = 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [len(body), len(body) + size]}
        body += bytes(size)
    write_tensors(folder / "sae_weights.safetensors", header, body)
    edit_json(folder / "cfg.json", d_in=32, d_sae=10)


def edit_json(path: Path, **fields) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def edit_config(case: Path, old: str, new: str) -> None:
    path = case / "config.yaml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def truncate(path: Path, by: int) -> None:
    path.write_bytes(path.read_bytes()[:-by])


def append(path: Path, text: str) -> None:
    path.write_text(path.read_text().rstrip("\n") + "\n" + text + "\n")


def pickle_sae(case: Path) -> None:
    folder = case / "saes" / "std"
    for path in folder.iterdir():
        path.unlink()
    (folder / "ae.pt").write_bytes(b"PK\x03\x04")
    (folder / "config.json").write_text('{"trainer": {"dict_class": "GatedAutoEncoder", "submodule_name": "resid_post_layer_2"}}')


MODEL, SAE = "model/model.safetensors", "saes/std/sae_weights.safetensors"
BAD_FILES = {
    "missing score head": (lambda c: drop_tensor(c / MODEL, "score.weight"), ["score"]),
    "missing layer": (lambda c: drop_tensor(c / MODEL, "model.layers.3.mlp.up_proj.weight"), ["model.layers.3.mlp.up_proj.weight"]),
    "SAE of another width": (narrow_sae, ["std", "expected", "64", "found 32"]),
    "hook past the last layer": (lambda c: edit_config(c, "path: saes/std", "path: saes/std\n  hook: blocks.9.hook_resid_post"),
                                 ["blocks.9.hook_resid_post", "expected", "found"]),
    "hook that is none": (lambda c: edit_config(c, "path: saes/std", "path: saes/std\n  hook: blocks.1.hook_z"), ["hook_z", "expected"]),
    "NaN in the model": (lambda c: poison(c / MODEL, "model.layers.1.mlp.up_proj.weight", math.nan),
                         ["model.layers.1.mlp.up_proj.weight", "expected", "found"]),
    "infinity in the model": (lambda c: poison(c / MODEL, "score.weight", math.inf), ["score.weight"]),
    "NaN in the SAE": (lambda c: poison(c / SAE, "W_enc", math.nan), ["W_enc", "expected", "found"]),
    "truncated model": (lambda c: truncate(c / MODEL, 100), ["model.safetensors", "expected", "found"]),
    "truncated SAE": (lambda c: truncate(c / SAE, 4), ["sae_weights.safetensors", "expected", "found"]),
    "header over its limit": (lambda c: (c / MODEL).write_bytes(struct.pack("<Q", 200 << 20) + b"{}" + bytes(64)),
                              ["model.safetensors", "header", "expected"]),
    "header that is no JSON": (lambda c: (c / MODEL).write_bytes(struct.pack("<Q", 8) + b"{\"a\":1,}" + bytes(64)), ["model.safetensors"]),
    "unknown architecture": (lambda c: edit_json(c / "model/config.json", architectures=["MambaForSequenceClassification"]),
                             ["MambaForSequenceClassification", "LlamaForSequenceClassification"]),
    "several outputs": (lambda c: edit_json(c / "model/config.json", id2label={"0": "a", "1": "b"}, num_labels=2), ["score", "expected"]),
    "unknown key": (lambda c: append(c / "config.yaml", "engin: {threads: 1}"), ["config.yaml:", "unknown key 'engin'", "did you mean 'engine'"]),
    "wrong type": (lambda c: append(c / "config.yaml", "engine: {threads: two}"), ["engine.threads: expected a whole number", "found 'two'"]),
    "rule without condition": (lambda c: edit_config(c, "  advantage_flip: true\n", ""),
                               ["rules[2]", "at least one of effect_min, effect_sd_min and advantage_flip"]),
    "feature that does not exist": (lambda c: append(c / "catalogue.jsonl", '{"sae":"std","index":300,"verdict":"spurious"}'),
                                    ["catalogue.jsonl:12: index: expected 0 to 299", "found 300"]),
    "SAE that does not exist": (lambda c: append(c / "catalogue.jsonl", '{"sae":"sdt","index":3,"verdict":"spurious"}'),
                                ["catalogue.jsonl:12: sae: expected", "found 'sdt'", "did you mean 'std'"]),
    "feature twice": (lambda c: append(c / "catalogue.jsonl", '{"sae":"std","index":276,"verdict":"unknown"}'),
                      ["catalogue.jsonl:12: expected each pair (sae, index) once", "first on line 1"]),
    "family that does not exist": (lambda c: edit_config(c, "  - url\n", "  - ulr\n"), ["rule 'url-lowers'", "found 'ulr'", "did you mean 'url'"]),
    "no catalogue": (lambda c: (c / "catalogue.jsonl").unlink(), ["catalogue.jsonl: expected the catalogue"]),
    "no model": (lambda c: shutil.rmtree(c / "model"), ["config.json"]),
    "no tokenizer": (lambda c: (c / "model/tokenizer.json").unlink(), ["tokenizer.json"]),
    "broken tokenizer": (lambda c: truncate(c / "model/tokenizer.json", 100), ["tokenizer.json"]),
    "pickled SAE": (pickle_sae, ["ae.pt", "spurion.convert"]),
}


@pytest.mark.parametrize("command", ["judge", "check"])
@pytest.mark.parametrize("name", BAD_FILES)
def test_judge_refuses_files_that_do_not_fit(spuriond, case, name, command):
    spoil, parts = BAD_FILES[name]
    spoil(case)
    done = run(spuriond, command, "--config", case / "config.yaml", stdin=line_of(id="a") + b"\n")
    message = done.stderr.decode()
    assert done.returncode in (65, 78), message
    assert done.stdout == b""
    for part in parts:
        assert part in message, message


# --- order, groups, batches ---


def stored_lines() -> list:
    return (CASE / "rollouts.jsonl").read_bytes().splitlines()


def test_judge_answers_every_line_in_order(spuriond, case):
    lines = stored_lines()
    out = judge(spuriond, case, lines, status=3)
    assert len(out) == len(lines)
    for n, (line, verdict) in enumerate(zip(lines, out)):
        if "line" in verdict:
            assert verdict["line"] == n + 1
        else:
            assert verdict["id"] == json.loads(line).get("id")


def test_judge_small_batches_change_no_byte(spuriond, case):
    config = ["judge", "--config", case / "config.yaml", "--tokens"]
    stdin = b"\n".join(stored_lines()) + b"\n"
    large = run(spuriond, *config, stdin=stdin)
    small = run(spuriond, *config, "--set", "engine.tokens_max=60", stdin=stdin)
    assert large.returncode == small.returncode == 3

    def without_provenance(data):  # the configuration is part of it
        return [{k: v for k, v in json.loads(text).items() if k != "provenance"} for text in data.splitlines()]

    assert without_provenance(large.stdout) == without_provenance(small.stdout)
    assert large.stdout == run(spuriond, *config, stdin=stdin).stdout


def test_judge_order_within_a_group_changes_no_number(spuriond, case):
    lines = [line_of(id=str(n), completion=text) for n, text in enumerate([" a", " Thank you.", " they would", " no, never", " help"])]
    forward = judge(spuriond, case, lines)
    backward = judge(spuriond, case, lines[::-1])
    assert forward == backward[::-1]


def test_judge_writes_verdicts_before_the_input_ends(spuriond, case):
    """A group is complete when a line of another one comes; its verdicts must not wait for the end of the input."""
    process = subprocess.Popen([spuriond, "judge", "--config", case / "config.yaml"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, env=environment())
    try:
        process.stdin.write(b"".join(line_of(id=i, completion=" " + i) + b"\n" for i in "ab") + line_of(group="h", id="c") + b"\n")
        process.stdin.flush()
        got = b""
        while got.count(b"\n") < 2:
            assert select.select([process.stdout], [], [], TIMEOUT)[0], "no verdict while the input was open"
            got += os.read(process.stdout.fileno(), 65536)
        assert [json.loads(text)["id"] for text in got.splitlines()] == ["a", "b"]
        rest, _ = process.communicate(timeout=TIMEOUT)
        assert json.loads(rest)["id"] == "c"
        assert process.returncode == 0
    finally:
        process.kill()
        process.wait()


def test_judge_last_line_needs_no_line_end(spuriond, case):
    done = run(spuriond, "judge", "--config", case / "config.yaml", stdin=line_of(id="a"))
    assert done.returncode == 0 and json.loads(done.stdout)["id"] == "a"
    empty = run(spuriond, "judge", "--config", case / "config.yaml")
    assert empty.returncode == 0 and empty.stdout == b""


def test_judge_tokens_cover_the_completion(spuriond, case):
    out = judge(spuriond, case, [line_of(id="a", completion=" café help"), line_of(id="b", completion=" Thank you. My pleasure.")], "--tokens")
    for verdict in out:
        tokens = verdict["tokens"]
        count = len(tokens["position"])
        assert tokens["position"] == list(range(verdict["token_count"] - count, verdict["token_count"]))
        assert len(tokens["id"]) == len(tokens["text"]) == count
        assert set(tokens["attribution"]) == {"std"} and len(tokens["attribution"]["std"]) == count
        assert math.fsum(tokens["attribution"]["std"]) == pytest.approx(verdict["saes"][0]["attribution_sum"], abs=1e-4)
        assert set(tokens["flagged"]) == {flag["rule"] for flag in verdict["flags"]}
    assert "".join(out[1]["tokens"]["text"]) == " Thank you. My pleasure."


def test_judge_without_attribution_lists_the_active_spurious_features(spuriond, case):
    full = judge(spuriond, case, [line_of(id="a")])[0]
    none = judge(spuriond, case, [line_of(id="a")], "--set", "attribution.method=none", "--tokens")[0]
    assert [none[k] for k in ("reward", "counterfactual_reward", "families", "flags")] == [
        full[k] for k in ("reward", "counterfactual_reward", "families", "flags")]
    assert none["saes"][0]["attribution_sum"] is None and none["tokens"]["attribution"] == {"std": None}
    assert none["features"] and all(f["verdict"] == "spurious" and f["attribution"] is None for f in none["features"])


def test_judge_profile_counts_the_work(spuriond, case):
    done = run(spuriond, "judge", "--config", case / "config.yaml", "--profile=each", stdin=line_of(id="a") + b"\n" + line_of(id="b", completion="") + b"\n")
    first, profile = (json.loads(line) for line in done.stderr.decode().splitlines() if line.startswith("{"))
    assert first["ops"] == profile["ops"] and first["load_s"] == 0
    verdict = json.loads(done.stdout.splitlines()[0])
    assert profile["rollouts"] == 1 and profile["refused"] == 1 and profile["tokens"] == verdict["token_count"]
    assert profile["load_s"] > 0 and profile["engine_s"] > 0
    assert profile["ops"]["gemm"]["flops"] > 0 and set(profile["ops"]["gemm"]) == {"calls", "seconds", "flops", "bytes"}


# --- commands and exit statuses ---


def test_judge_exit_statuses(spuriond, case, tmp_path):
    config = case / "config.yaml"
    assert run(spuriond).returncode == 64
    assert run(spuriond, "jugde", "--config", config).returncode == 64
    assert run(spuriond, "judge").returncode == 64
    assert run(spuriond, "judge", "--config", config, "extra").returncode == 64
    assert run(spuriond, "judge", "--config", config, "--no-such-option").returncode == 64
    assert run(spuriond, "judge", "--config", config, "--profile=all").returncode == 64
    assert run(spuriond, "judge", "--config", tmp_path / "none.yaml").returncode == 78
    assert run(spuriond, "check", "--config", config, "--set", "engine.thread=1").returncode == 78
    assert run(spuriond, "--help").returncode == 0 and b"exit status" in run(spuriond, "--help").stdout
    assert run(spuriond, "--version").stdout.startswith(b"spuriond ")
    with open("/dev/full", "wb") as full:
        done = run(spuriond, "judge", "--config", config, stdin=line_of(id="a") + b"\n", stdout=full)
        assert done.returncode == 74 and b"expected to write" in done.stderr
        assert run(spuriond, "print-config", "--config", config, stdout=full).returncode == 74


def test_judge_check_tells_what_it_found(spuriond, case):
    done = run(spuriond, "check", "--config", case / "config.yaml")
    text = done.stdout.decode()
    assert done.returncode == 0, done.stderr.decode()
    for part in ("LlamaForSequenceClassification", "std", "blocks.2.hook_resid_post", "peak"):
        assert part in text


def test_judge_configuration_commands(spuriond, case, tmp_path):
    config = case / "config.yaml"
    printed = run(spuriond, "--print-config", "--config", config, "--set", "engine.tokens_max=99")
    text = printed.stdout.decode()
    assert printed.returncode == 0
    assert "  tokens_max: 99  # flag\n" in text and "  threads: 1  # environment\n" in text
    assert "  max_tokens: 60  # file\n" in text and "  device: cpu  # default\n" in text
    again = tmp_path / "again.yaml"
    again.write_text(text)
    assert run(spuriond, "--check-config", "--config", again).returncode == 0
    lines = [line_of(id="a")]
    assert bare(judge(spuriond, case, lines)[0]) | {"provenance": 0} == bare(
        json.loads(run(spuriond, "judge", "--config", again, stdin=lines[0]).stdout)) | {"provenance": 0}
    example = tmp_path / "example.yaml"
    example.write_bytes(run(spuriond, "example-config").stdout)
    assert run(spuriond, "check-config", "--config", example).returncode == 0
