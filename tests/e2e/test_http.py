"""The drop-in reward endpoints of the real daemon: OpenRLHF's own client, the others' documented requests, retries, limits, tokens, groups.

Every reward is compared with what Score gives over rpc for the same rollout.
"""
import asyncio
import concurrent.futures
import http.client
import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

pytest.importorskip("google.protobuf", reason="needs python3-protobuf")
import wire  # noqa: E402
from daemon import all_rows  # noqa: E402
from http_daemon import PROGRAM, SOURCE, HttpDaemon  # noqa: E402

PROMPT = "How are you?"
ANSWER = "Fine, thank you. My pleasure."
TEXT = f"\n\nHuman: {PROMPT}\n\nAssistant: {ANSWER}"
HEAD = f"\n\nHuman: {PROMPT}\n\nAssistant:"
PLAIN, TEMPLATED, VERBATIM = 0, 1, 2


@pytest.fixture(scope="module")
def m():
    assert os.access(PROGRAM, os.X_OK), f"SPURIOND: expected the daemon, found nothing at {PROGRAM}"
    return wire.load_messages(str(SOURCE))


@pytest.fixture(scope="module")
def up(tmp_path_factory):
    d = HttpDaemon(tmp_path_factory.mktemp("http")).start()
    yield d
    assert d.stop() == 0, d.tail()
    d.end()


@pytest.fixture
def make(tmp_path):
    made = []

    def start(env=None, **options):
        made.append(HttpDaemon(tmp_path, **options))
        return made[-1].start(env)
    yield start
    for d in made:
        d.end()


def score(d, m, prompt, completion, form, name=[0], **ids):
    """The verdict over rpc."""
    name[0] += 1
    r = m.Rollout(run=b"rpc", step=0, group=b"g%d" % name[0], id=b"i", text_form=form, **ids)
    if not ids:
        r.prompt, r.completion = prompt.encode(), completion.encode()
    rpc = d.rpc(m)
    v = rpc.call("Score", m.ScoreRequest(rollouts=[r])).verdicts[0]
    rpc.close()
    assert v.code == 0, v.message
    return v


def rows(d, m, run):
    rpc = d.rpc(m)
    out = all_rows(rpc, run)
    rpc.close()
    return out


# ---- each server's own way of asking ----

def openrlhf_executor(url):
    """OpenRLHF's own client. Its package's __init__ wants the whole of torch and ray; the two files that it takes do not."""
    pytest.importorskip("aiohttp", reason="OpenRLHF's client needs aiohttp")
    if "openrlhf.utils.agent" in sys.modules:
        return sys.modules["openrlhf.utils.agent"].SingleTurnAgentExecutor(url)
    spec = importlib.util.find_spec("openrlhf")
    if spec is None:
        pytest.skip("openrlhf is not installed (pip install --no-deps openrlhf==0.11.0)")
    root = Path(list(spec.submodule_search_locations)[0])
    for name, folder in (("openrlhf", root), ("openrlhf.utils", root / "utils")):
        package = types.ModuleType(name)
        package.__path__ = [str(folder)]
        sys.modules[name] = package
    from openrlhf.utils.agent import SingleTurnAgentExecutor
    return SingleTurnAgentExecutor(url)


def test_http_openrlhfs_own_client(up, m):
    client = openrlhf_executor([f"http://127.0.0.1:{up.port}/run/openrlhf/get_reward"])

    async def fetch():
        texts = [f"{TEXT} {i}" for i in range(40)]
        calls = [client._fetch_rewards_via_http([t], [HEAD], [None]) for t in texts]  # one POST for each rollout, as it does
        return texts, [(await c)[0] for c in [asyncio.ensure_future(c) for c in calls]]

    texts, answers = asyncio.run(fetch())
    for text, answer in list(zip(texts, answers))[::10]:
        v = score(up, m, HEAD, text[len(HEAD):], VERBATIM)
        assert answer["rewards"] == [pytest.approx(v.reward, abs=1e-6)] and answer["scores"] == answer["rewards"]
        logs = answer["extra_logs"]
        assert logs["spurion_counterfactual_reward"] == [pytest.approx(v.counterfactual_reward, abs=1e-6)]
        assert logs["spurion_n_tokens"] == [v.token_count] and logs["spurion_divided"] == [1]
        assert all(len(x) == 1 and isinstance(x[0], (int, float)) for x in logs.values())  # as torch.tensor takes them
    assert len({tuple(sorted(a["extra_logs"])) for a in answers}) == 1
    assert len(rows(up, m, "openrlhf")) == 40


def test_http_openrlhf_with_several_servers_sends_empty_lists(up):
    url = f"http://127.0.0.1:{up.port}/run/empty/get_reward"
    answers = asyncio.run(openrlhf_executor([url, url])._fetch_rewards_via_http([TEXT], [HEAD], ["label"]))
    assert sorted(len(a["rewards"]) for a in answers) == [0, 1]
    assert {tuple(sorted(a["extra_logs"])) for a in answers} == {tuple(sorted(answers[0]["extra_logs"]))}


def test_http_slime_as_documented(up, m):
    v = score(up, m, PROMPT, ANSWER, PLAIN)
    body = {"prompt": PROMPT, "response": ANSWER, "label": "42"}
    assert up.good("/remote_rm", body) == pytest.approx(v.reward, abs=1e-6)
    assert up.good("/counterfactual/remote_rm", body) == pytest.approx(v.counterfactual_reward, abs=1e-6)
    whole = up.good("/remote_rm/verdict", body)
    assert whole["reward"] == whole["clean_reward"] == pytest.approx(v.reward, abs=1e-6)
    assert whole["counterfactual_reward"] == pytest.approx(v.counterfactual_reward, abs=1e-6)
    assert (whole["n_tokens"], whole["scored_token_index"], whole["truncated"]) == (v.token_count, v.scored_position, False)


@pytest.mark.parametrize("path", ["/classify", "/v1/classify"])
def test_http_vllm_classify(up, m, path):
    v = score(up, m, HEAD, " " + ANSWER, TEMPLATED)
    answer = up.good(path, {"model": "rm", "input": TEXT, "use_activation": False})
    entry = answer["data"][-1]
    assert entry["probs"][-1] == pytest.approx(v.reward, abs=1e-6)  # what verl reads
    assert (answer["object"], answer["model"], entry["index"], entry["num_classes"]) == ("list", "rm", 0, 1)
    assert answer["usage"]["prompt_tokens"] == answer["usage"]["total_tokens"] == v.token_count
    assert entry["divided"] is True
    old = up.good(path, {"model": "rm", "input": [TEXT, TEXT + "!"], "activation": False})  # the name before vLLM 0.11.2
    assert old["data"][0]["probs"] == entry["probs"] and [e["index"] for e in old["data"]] == [0, 1]
    squashed = up.good(path, {"input": TEXT, "use_activation": True})["data"][0]["probs"][0]
    assert squashed == pytest.approx(1 / (1 + 2.718281828459045 ** -v.reward), abs=1e-6)
    w = score(up, m, HEAD, " " + ANSWER, VERBATIM)
    assert up.good(path, {"input": TEXT, "add_special_tokens": False})["data"][0]["probs"] == [pytest.approx(w.reward, abs=1e-6)]


def test_http_vllm_messages_and_ids(up, m):
    v = score(up, m, PROMPT, ANSWER, PLAIN)
    messages = [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": ANSWER}]
    assert up.good("/classify", {"messages": messages})["data"][0]["probs"] == [pytest.approx(v.reward, abs=1e-6)]
    w = score(up, m, None, None, PLAIN, completion_ids=[5, 6, 7, 8])
    for body in ({"input": [5, 6, 7, 8]}, {"input": [[5, 6, 7, 8]]}):
        assert up.good("/classify", body)["data"][0]["probs"] == [pytest.approx(w.reward, abs=1e-6)]


def test_http_vllm_pooling_sglang_and_tei(up, m):
    v = score(up, m, HEAD, " " + ANSWER, TEMPLATED)
    assert up.good("/pooling", {"model": "rm", "input": [TEXT]})["data"][0]["data"] == [pytest.approx(v.reward, abs=1e-6)]
    assert [x["embedding"][0] for x in up.good("/classify", {"model": "rm", "text": [TEXT, TEXT]})] == [pytest.approx(v.reward, abs=1e-6)] * 2
    assert up.good("/v1/embeddings", {"model": "rm", "input": TEXT})["data"][-1]["embedding"][-1] == pytest.approx(v.reward, abs=1e-6)
    assert up.good("/predict", {"inputs": TEXT})[0]["score"] == pytest.approx(v.reward, abs=1e-6)
    p = score(up, m, PROMPT, ANSWER, PLAIN)
    assert up.good("/predict", {"inputs": [PROMPT, ANSWER]})[0]["score"] == pytest.approx(p.reward, abs=1e-6)  # a pair is one
    batch = up.good("/predict", {"inputs": [[TEXT], [PROMPT, ANSWER]], "truncate": False, "raw_scores": True})
    assert [x[0]["score"] for x in batch] == [pytest.approx(v.reward, abs=1e-6), pytest.approx(p.reward, abs=1e-6)]


# ---- errors name what is wrong, and nothing becomes 0 ----

def test_http_errors_name_the_rollout(up, m):
    status, _, answer = up.ask("/run/errors/get_reward", {"query": [TEXT, HEAD], "prompts": [HEAD, HEAD], "labels": []})
    assert status == 400 and answer["error"]["message"].startswith("query[1]: completion: expected") and answer["error"]["rollout"]
    assert "rewards" not in answer
    long = "word " * 400
    status, _, answer = up.ask("/run/errors/remote_rm", {"prompt": PROMPT, "response": long, "label": None})
    assert (status, answer["error"]["type"]) == (400, "OUT_OF_RANGE") and "at most 256 tokens" in answer["error"]["message"]
    status, _, answer = up.ask("/classify", {"model": "rm", "inputs": TEXT})
    assert status == 400 and "unknown field 'inputs' (did you mean 'input'?)" in answer["error"]["message"]
    assert len(rows(up, m, "errors")) == 1  # the one that could be judged
    again = up.ask("/run/errors/get_reward", {"query": [TEXT, HEAD], "prompts": [HEAD, HEAD], "labels": []})
    assert again[0] == 400 and len(rows(up, m, "errors")) == 1


def test_http_truncation_is_reported(make):
    d = make(model=", on_too_long: truncate_prompt")
    body = {"prompt": "word " * 400, "response": ANSWER, "label": None}
    answer = d.good("/remote_rm/verdict", body)
    assert answer["truncated"] is True and answer["n_tokens"] == 256
    assert d.good("/get_reward", {"query": ["word " * 400 + TEXT], "prompts": [], "labels": []})["extra_logs"]["spurion_truncated"] == [1.0]


def test_http_methods_paths_and_sizes(make):
    d = make(http=", body_max: 4KiB")
    for path, body, expected in [("/nothing", {}, 404), ("/get_reward", None, 405), ("/healthz", {}, 405), ("/run//get_reward", {}, 404),
                                 ("/run/a/healthz", None, 404), ("/clean/clean/get_reward", {}, 404), ("/classify", b"{", 400),
                                 ("/classify", b"\xff", 400), ("/classify", b"", 400), ("/classify", b"[1]", 400),
                                 ("/predict", {"inputs": "a" * 5000}, 413), ("/" + "a" * 2000, None, 414)]:
        status, headers, answer = d.ask(path, body)
        assert status == expected, (path, status, answer)
        assert answer["error"]["message"] and headers["Content-Type"] == "application/json"
    status, headers, _ = d.ask("/get_reward", None)
    assert headers["Allow"] == "POST"

    c = http.client.HTTPConnection("127.0.0.1", d.port, timeout=30)
    c.request("POST", "/predict", iter([b'{"inputs":', b'"a"}']), {"Transfer-Encoding": "chunked"}, encode_chunked=True)
    assert c.getresponse().status == 411
    c = http.client.HTTPConnection("127.0.0.1", d.port, timeout=30)
    c.putrequest("POST", "/predict")
    c.endheaders()
    assert c.getresponse().status == 411
    big = http.client.HTTPConnection("127.0.0.1", d.port, timeout=30)  # a client that writes all before it reads gets to read 413
    big.request("POST", "/predict", b"x" * (8 << 20))
    assert big.getresponse().status == 413
    for headers in ({"Origin": "http://evil.example"}, {"Host": "evil.example"}):
        assert d.ask("/predict", {"inputs": "a"}, headers=headers)[0] == 403
    for host in ("localhost:1", "127.0.0.1", "10.1.2.3:80", "[::1]:80"):
        assert d.ask("/predict", {"inputs": "a"}, headers={"Host": host})[0] == 200, host


def test_http_token(make, tmp_path):
    token = tmp_path / "token"
    token.write_text("0123456789abcdef0123\nsecond-token-of-two\n")
    token.chmod(0o600)
    d = make(http=f", token_file: {token}")
    body = {"inputs": TEXT}
    for bad in ({}, {"Authorization": "Bearer 0123456789abcdef012"}, {"Authorization": "Basic 0123456789abcdef0123"}, {"Authorization": "Bearer "}):
        status, headers, _ = d.ask("/predict", body, headers=bad)
        assert status == 401 and headers["WWW-Authenticate"] == "Bearer"
        assert d.ask("/metrics", headers=bad)[0] == 401
    for good in ("0123456789abcdef0123", "second-token-of-two"):
        assert d.ask("/predict", body, headers={"Authorization": f"Bearer {good}"})[0] == 200
    assert d.ask("/healthz")[0] == 200 and d.ask("/readyz")[0] == 200
    assert "0123456789abcdef" not in d.tail()


@pytest.mark.parametrize("listen, code, why", [("0.0.0.0:0", 78, "loopback"), ("nonsense", 78, "host:port")])
def test_http_refuses_to_listen(tmp_path, listen, code, why):
    d = HttpDaemon(tmp_path, listen=listen)
    done = subprocess.run([PROGRAM, "run", "-c", str(d.config)], capture_output=True, text=True, timeout=120)
    assert done.returncode == code and why in done.stderr, done.stderr[-500:]


def test_http_taken_address_and_bad_token_file(tmp_path, up):
    d = HttpDaemon(tmp_path, listen=f"127.0.0.1:{up.port}")
    assert subprocess.run([PROGRAM, "run", "-c", str(d.config)], capture_output=True, timeout=120).returncode == 69
    (tmp_path / "t").write_text("short")
    d = HttpDaemon(tmp_path, http=f", token_file: {tmp_path}/t")
    done = subprocess.run([PROGRAM, "run", "-c", str(d.config)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 78 and "at least 16 characters" in done.stderr


# ---- retries and repetitions ----

def raw_post(port, path, body):
    """An open socket with a whole request on it."""
    data = json.dumps(body).encode()
    s = socket.create_connection(("127.0.0.1", port), timeout=60)
    s.sendall(b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % (path.encode(), len(data)) + data)
    return s


def test_http_retry_gets_the_same_answer_and_is_stored_once(make, m):
    d = make()
    body = {"query": [TEXT, TEXT + " Bye."], "prompts": [HEAD, HEAD], "labels": [None, None]}
    first = d.good("/run/retry/get_reward", body)
    for _ in range(3):
        assert d.good("/run/retry/get_reward", body) == first
    assert len(rows(d, m, "retry")) == 2
    assert d.stop() == 0
    d.start()
    assert d.good("/run/retry/get_reward", body) == first
    d.kill()  # kill -9: what was answered is kept
    d.start()
    assert d.good("/run/retry/get_reward", body) == first
    assert len(rows(d, m, "retry")) == 2
    assert d.good("/run/other/get_reward", body)["rewards"] == first["rewards"]  # another run is another request
    assert len(rows(d, m, "other")) == 2


def test_http_equal_completions_are_two_rollouts(up, m):
    body = {"query": [TEXT, TEXT], "prompts": [HEAD, HEAD], "labels": [None, None]}
    answer = up.good("/run/twice/get_reward", body)
    assert answer["rewards"][0] == answer["rewards"][1]
    found = rows(up, m, "twice")
    assert len(found) == 2 and len({r.id for r in found}) == 2 and len({r.group for r in found}) == 1
    assert all(r.HasField("advantage") for r in found)  # they were judged as a group


def test_http_same_request_twice_in_flight_is_two(make, m):
    d = make(http=", group_size: 2")  # each waits for its twin, so that both are there together
    body = {"query": [TEXT], "prompts": [HEAD], "labels": [None]}
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(lambda _: d.good("/run/pair/get_reward", body), range(2)))
    assert answers[0]["rewards"] == answers[1]["rewards"]
    found = rows(d, m, "pair")
    assert len(found) == 2 and len({r.id for r in found}) == 2 and all(r.HasField("advantage") for r in found)


def test_http_retry_while_the_first_is_in_flight_is_one(make, m):
    d = make(http=", group_size: 2")  # the first waits 1.5 s for a member that does not come
    body = {"query": [TEXT], "prompts": [HEAD], "labels": [None]}
    s = raw_post(d.port, "/run/gone/get_reward", body)
    time.sleep(0.4)
    s.close()  # the client gives up, and asks again
    assert d.good("/run/gone/get_reward", body)["rewards"]
    assert len(rows(d, m, "gone")) == 1


def test_http_group_waits_for_its_members(make, m):
    d = make(http=", group_size: 4")
    bodies = [{"query": [f"{TEXT} {i}"], "prompts": [HEAD], "labels": [None]} for i in range(4)]
    start = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda b: d.good("/run/group/get_reward", b), bodies))
    found = rows(d, m, "group")
    assert len(found) == 4 and len({r.group for r in found}) == 1
    assert all(r.HasField("advantage") and r.warnings & 8 == 0 for r in found)
    assert abs(sum(r.advantage for r in found)) < 1e-5
    assert time.monotonic() - start < 60


def test_http_steps_count_rollouts(make, m):
    d = make(http=", step_rollouts: 4")
    for i in range(12):
        d.good("/run/steps/remote_rm", {"prompt": PROMPT, "response": f"{ANSWER} {i}", "label": None})
    assert sorted(r.step for r in rows(d, m, "steps")) == [i // 4 for i in range(12)]
    assert d.stop() == 0
    d.start()
    d.good("/run/steps/remote_rm", {"prompt": PROMPT, "response": f"{ANSWER} new", "label": None})
    assert max(r.step for r in rows(d, m, "steps")) == 3


# ---- what the trainer is told to do ----

def test_http_actions(make, m):
    d = make(rules="\n  - {id: t, families: [thanks], direction: raised, effect_min: 0.01, action: replace, alert: none}")
    body = {"prompt": PROMPT, "response": ANSWER, "label": None}
    answer = d.good("/action/remote_rm/verdict", body)
    assert answer["flagged"] and answer["action"] == "replace" and answer["reward"] == answer["counterfactual_reward"] != answer["clean_reward"]
    assert d.good("/remote_rm", body) == answer["clean_reward"]
    plain = d.good("/action/remote_rm/verdict", {"prompt": PROMPT, "response": "Well.", "label": None})
    assert (plain["action"], plain["reward"]) == ("none", plain["clean_reward"])
    rpc = d.rpc(m)
    rules = rpc.call("Rules", m.RulesRequest())
    assert list(rules.action) == [4] and list(rules.weight) == [1.0]
    found = [r for r in all_rows(rpc, "web") if r.rule]
    assert found and all(r.action == 4 for r in found)
    record = rpc.call("Get", m.GetRequest(run=found[0].run, step=found[0].step, group=found[0].group, id=found[0].id), "Record")
    v = record.verdict
    assert (v.action, v.action_rule, v.action_weight) == (4, b"t", 1.0) and v.action_reward == v.counterfactual_reward


# ---- overload, health, metrics ----

def test_http_full_queue_answers_at_once(make):
    d = make(engine=", queue_max: 64KiB", http=", group_size: 8")
    body = {"query": [TEXT + " x" * 60], "prompts": [HEAD], "labels": [None]}
    sockets = [raw_post(d.port, f"/run/full{i}/get_reward", body) for i in range(12)]  # each waits 1.5 s for its group
    time.sleep(0.3)
    start = time.monotonic()
    status, headers, answer = d.ask("/run/late/get_reward", body)
    assert status == 429 and int(headers["Retry-After"]) >= 1 and "queue" in answer["error"]["message"]
    assert time.monotonic() - start < 1.0
    replies = [s.recv(4096)[:12] for s in sockets]
    assert b"HTTP/1.1 200" in replies and set(replies) <= {b"HTTP/1.1 200", b"HTTP/1.1 429"}
    assert d.ask("/run/late/get_reward", body)[0] == 200


def test_http_many_connections_at_once(up):
    sockets = [raw_post(up.port, "/run/many/remote_rm", {"prompt": PROMPT, "response": f"Number {i}.", "label": None}) for i in range(300)]
    for s in sockets:
        assert s.recv(64).startswith(b"HTTP/1.1 200")
        s.close()


def test_http_half_a_request_ends(up):
    s = socket.create_connection(("127.0.0.1", up.port), timeout=40)
    s.sendall(b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n\r\n{")
    start = time.monotonic()
    assert s.recv(100)[:12] in (b"", b"HTTP/1.1 408") and time.monotonic() - start < 30


def test_http_health_and_metrics(up):
    assert up.ask("/healthz")[0] == up.ask("/livez")[0] == up.ask("/health")[0] == up.ask("/readyz")[0] == 200
    up.good("/predict", {"inputs": TEXT})
    status, headers, text = up.ask("/metrics")
    assert status == 200 and headers["Content-Type"].startswith("text/plain; version=0.0.4")
    kinds, values = {}, {}
    for line in text.splitlines():  # the exposition format, line by line
        if line.startswith("# TYPE"):
            _, _, name, kind = line.split()
            assert name not in kinds and kind in ("counter", "gauge")
            assert kind == "gauge" or name.endswith("_total")
            kinds[name] = kind
        elif not line.startswith("# HELP"):
            found = re.fullmatch(r'([a-z_]+)(\{[a-z]+="[^"]*"\})? (\S+)', line)
            assert found and found[1] in kinds and found[1].startswith("spurion_"), line
            values[found[1] + (found[2] or "")] = float(found[3])
    assert values["spurion_rollouts_judged_total"] > 0 and values["spurion_ready"] == 1
    assert values['spurion_http_responses_total{class="2xx"}'] > 0


def test_http_draining_daemon_ends_clean(make):
    d = make(http=", group_size: 2")
    s = raw_post(d.port, "/get_reward", {"query": [TEXT], "prompts": [HEAD], "labels": [None]})
    time.sleep(0.3)
    assert d.stop() == 0
    assert s.recv(64)[:12] == b"HTTP/1.1 200"  # what is in hand is finished
