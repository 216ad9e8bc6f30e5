"""`spurion labels import` from the published layouts, and the labels in verdicts of judge and of the running daemon."""
import gzip
import json
import os
import re
import subprocess

import pytest

protobuf = pytest.importorskip("google.protobuf", reason="needs python3-protobuf")
import wire  # noqa: E402
from daemon import CASE, SOURCE, Daemon  # noqa: E402

BIN = os.environ.get("SPURION_BIN", str(SOURCE / "build" / "cpu" / "bin"))
SPURIOND, CLI = os.environ.get("SPURIOND", BIN + "/spuriond"), BIN + "/spurion"
WIDTH, OTHER = 100, "c" * 64


def run(*args, status=0, env=None, stdin=None):
    done = subprocess.run([str(a) for a in args], capture_output=True, text=True, timeout=120, env=env, stdin=stdin)
    assert done.returncode == status, (args, done.returncode, done.stdout[-500:], done.stderr[-1500:])
    return done


def labels_import(*args, status=0):
    return run(CLI, "labels", "import", *args, status=status).stderr


def written(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def checksums():
    out = run(SPURIOND, "check", "--config", CASE / "config.yaml", "--no-calibration").stdout
    found = dict(re.findall(r"^ +(\S+): checksum ([0-9a-f]{64})$", out, re.M))
    assert set(found) == {"std", "top", "gated"} and len(set(found.values())) == 3
    return found


def neuronpedia(index, text, layer="1-res", **more):
    return {"id": f"c{index}", "modelId": "zoo", "layer": layer, "index": str(index), "authorId": "a", "description": text, "embedding": None,
            "typeName": "oai_token-act-pair", "explanationModelName": "gpt-4o-mini", "umap_x": 0.1, **more}


def tree(place, layer="1-res"):
    """The layout of Neuronpedia's exports: explanations in batches ordered by index as text, and much else beside them."""
    for name in ("explanations", "features", "activations"):
        (place / name).mkdir(parents=True)
    for number, indices in enumerate(([0, 1, 10, 11], [2, 20, 3])):
        with gzip.open(place / f"explanations/batch-{number}.jsonl.gz", "wt", encoding="utf-8") as f:
            for i in indices:
                f.write(json.dumps(neuronpedia(i, f"np {i}", layer)) + "\n")
    with gzip.open(place / "features/batch-0.jsonl.gz", "wt") as f:
        f.write(json.dumps({"modelId": "zoo", "layer": layer, "index": "0", "maxActApprox": 1.5}) + "\n")
    (place / "model.jsonl").write_text("{}\n")
    return place


def test_labels_neuronpedia_directory_file_and_gz(tmp_path):
    out = tmp_path / "labels.jsonl"
    text = labels_import(tree(tmp_path / "np"), "--checksum", OTHER, "--out", out)
    assert "7 new, 0 there already" in text
    rows = written(out)
    assert [r["index"] for r in rows] == [0, 1, 10, 11, 2, 20, 3]
    assert rows[2] == {"sae_sha256": OTHER, "index": 10, "description": "np 10", "type": "oai_token-act-pair", "model": "gpt-4o-mini",
                       "source": "zoo/1-res"}
    assert "0 new, 7 there already" in labels_import(tmp_path / "np/explanations/batch-0.jsonl.gz", tmp_path / "np/explanations/batch-1.jsonl.gz",
                                                     tmp_path / "np", "--checksum", OTHER, "-o", out).replace("14 there", "7 there")
    assert written(out) == rows
    (tmp_path / "plain").write_text(json.dumps({"modelId": "zoo", "layer": "1-res", "index": 5, "explanation": "uploaded"}) + "\n")
    assert "1 new" in labels_import(tmp_path / "plain", "--checksum", OTHER, "--out", out)
    assert written(out)[:7] == rows and written(out)[7]["description"] == "uploaded"


def test_labels_delphi_and_plain_lines(tmp_path):
    place = tmp_path / "delphi/explanations"
    place.mkdir(parents=True)
    for i in (3, 40):
        (place / f"layers.1_latent{i}.txt").write_text(json.dumps(f"delphi says {i}"))
    out = tmp_path / "labels.jsonl"
    assert "2 new" in labels_import(tmp_path / "delphi", "--checksum", OTHER, "--out", out)
    assert [(r["index"], r["description"], r["source"]) for r in written(out)] == [(3, "delphi says 3", "layers.1"), (40, "delphi says 40", "layers.1")]
    (tmp_path / "mine.jsonl").write_text('{"feature": 7, "label": "mine\\n\\u0000 ", "score": 0.5}\n{"index": 8, "description": "  "}\n\nnonsense\n')
    text = labels_import(tmp_path / "mine.jsonl", "--checksum", OTHER, "--out", out, status=3)
    assert "mine.jsonl:4: expected" in text and "1 new" in text and "1 unreadable" in text
    assert written(out)[-1] == {"sae_sha256": OTHER, "index": 7, "description": "mine", "score": 0.5}


def test_labels_of_several_layers_are_refused_until_one_is_named(tmp_path):
    tree(tmp_path / "a/x", "1-res")
    tree(tmp_path / "a/y", "2-res")
    out = tmp_path / "labels.jsonl"
    text = labels_import(tmp_path / "a", "--checksum", OTHER, "--out", out, status=64)
    assert "found 2 sources" in text and "--source 'zoo/2-res'" in text and not out.exists()
    assert "7 new" in labels_import(tmp_path / "a", "--checksum", OTHER, "--out", out, "--source", "zoo/2-res")
    assert {r["source"] for r in written(out)} == {"zoo/2-res"}


def test_labels_import_faults(tmp_path):
    out = tmp_path / "labels.jsonl"
    (tmp_path / "a.jsonl").write_text(json.dumps(neuronpedia(1, "x")) + "\n")
    assert "--checksum" in labels_import(tmp_path / "a.jsonl", status=64)
    assert "--checksum" in labels_import(tmp_path / "a.jsonl", "--checksum", "abc", status=64)
    assert "expected a file or directory" in labels_import(tmp_path / "none", "--checksum", OTHER, "--out", out, status=74)
    (tmp_path / "empty").mkdir()
    assert "no label was found" in labels_import(tmp_path / "empty", "--checksum", OTHER, "--out", out, status=1)
    (tmp_path / "bound.jsonl").write_text(json.dumps({"sae_sha256": "d" * 64, "index": 1, "description": "x"}) + "\n")
    assert "no label was found" in labels_import(tmp_path / "bound.jsonl", "--checksum", OTHER, "--out", out, status=1)
    whole = gzip.compress(json.dumps(neuronpedia(1, "x" * 900)).encode() + b"\n")
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[:-12])
    run(CLI, "labels", "import", tmp_path / "cut.jsonl.gz", "--checksum", OTHER, "--out", out, status=74)
    (tmp_path / "long.jsonl").write_text('{"index":1,"label":"' + "x" * (3 << 20) + '"}\n' + json.dumps(neuronpedia(2, "y")) + "\n")
    assert "at most 1 MiB" in labels_import(tmp_path / "long.jsonl", "--checksum", OTHER, "--out", out, status=3)
    assert [r["index"] for r in written(out)] == [2]
    (tmp_path / "nul.jsonl").write_bytes(b"\0\0{}\n" + json.dumps(neuronpedia(3, "z")).encode() + b"\n")
    labels_import(tmp_path / "nul.jsonl", "--checksum", OTHER, "--out", out, status=3)
    assert [r["index"] for r in written(out)] == [2, 3]
    assert not list(tmp_path.glob("*.new")) and "import" in run(CLI, "labels", "list", "x", status=64).stderr


def all_labels(tmp_path, checksums, out):
    """A label for every feature of two SAEs, and some of an SAE that is not there."""
    for sae in ("std", "top"):
        (tmp_path / f"{sae}.jsonl").write_text("".join(json.dumps({"index": i, "label": f"{sae} feature {i}"}) + "\n" for i in range(WIDTH)))
        labels_import(tmp_path / f"{sae}.jsonl", "--checksum", checksums[sae], "--out", out)
    labels_import(tmp_path / "std.jsonl", "--checksum", OTHER, "--out", out)


def judge(config):
    with open(CASE / "rollouts.jsonl") as lines:
        return [json.loads(line) for line in run(SPURIOND, "judge", "--config", config, stdin=lines).stdout.splitlines()]


def test_labels_stand_in_verdicts_beside_the_catalogue(tmp_path, checksums):
    out = tmp_path / "labels.jsonl"
    all_labels(tmp_path, checksums, out)
    config = (CASE / "config.yaml").read_text().replace("path: ", f"path: {CASE}/").replace("catalogue: ", f"catalogue: {CASE}/")
    (tmp_path / "config.yaml").write_text(config)
    plain = judge(tmp_path / "config.yaml")
    (tmp_path / "config.yaml").write_text(config + f"labels: {out}\n")
    labelled = judge(tmp_path / "config.yaml")
    seen = set()
    for a, b in zip(plain, labelled):
        for f, g in zip(a.get("features", []), b.get("features", [])):
            wanted = None if g["sae"] == "gated" else f"{g['sae']} feature {g['index']}"
            assert g.pop("explanation", None) == wanted and "explanation" not in f
            seen.add(g["sae"])
        assert a == b  # nothing else has changed, provenance included
    assert seen == {"std", "top", "gated"}
    text = run(SPURIOND, "check", "--config", tmp_path / "config.yaml", "--no-calibration").stdout
    assert f"labels     std: {WIDTH} of its features\n" in text and f"gated: 0 of its features; {WIDTH} lines of other SAEs" in text
    out.write_text(out.read_text() + json.dumps({"sae_sha256": checksums["top"], "index": WIDTH, "description": "past the end"}) + "\n")
    done = run(SPURIOND, "check", "--config", tmp_path / "config.yaml", status=78)
    assert f"labels.jsonl:{3 * WIDTH + 1}: index: expected 0 to {WIDTH - 1}" in done.stderr


def test_labels_are_shown_by_the_command_line(tmp_path, checksums):
    out = tmp_path / "labels.jsonl"
    all_labels(tmp_path, checksums, out)
    (tmp_path / "d").mkdir()
    daemon = Daemon(SPURIOND, tmp_path / "d", wire.load_messages(str(SOURCE)), f"labels: {out}\n")
    env = dict(os.environ, SPURION_RPC=daemon.rpc_url, SPURION_ROLLOUTS=daemon.tap_url, SPURION_ALERTS=daemon.alert_url, TERM="dumb")
    try:
        daemon.start()
        good = [line for line, expected in daemon.rollouts() if any(f["rule"] for f in expected["flags"])][:4]
        (tmp_path / "in.jsonl").write_text("".join(json.dumps({**line, "run": "shown"}) + "\n" for line in good))
        verdicts = [json.loads(line) for line in run(CLI, "score", tmp_path / "in.jsonl", env=env).stdout.splitlines()]
        verdict = next(v for v in verdicts if v["flags"])
        unknown = next(f for f in verdict["features"] if f["label"] is None and f["sae"] != "gated")
        assert unknown["explanation"] == f"{unknown['sae']} feature {unknown['index']}"
        key = "/".join(str(verdict[k]) for k in ("run", "step", "group", "id"))
        text = run(CLI, "show", key, env=env).stdout
        assert f"{unknown['sae']}/{unknown['index']}  " in text and unknown["explanation"] in text
        flagged = verdict["flags"][0]["features"][0]
        named = next(f for f in verdict["features"] if (f["sae"], f["index"]) == (flagged["sae"], flagged["index"]))
        assert f"{flagged['sae']}/{flagged['index']} ({named['label'] or named['explanation']})" in text
        record = json.loads(run(CLI, "export", "shown", env=env).stdout.splitlines()[0])
        assert any(f.get("explanation") for f in record["features"])
        reference = f"{flagged['sae']}/{flagged['index']}"
        asked = run(CLI, "query", "shown", "--feature", reference, env=env)
        assert f"{reference}: {named['label'] or named['explanation']}" in asked.stderr
    finally:
        daemon.end()
