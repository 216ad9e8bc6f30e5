#!/usr/bin/env python3
"""Compares spurion-tokenize with the `tokenizers` library on fuzzed strings; zero differences are wanted.

    fuzz_tokenizers.py [--count 200000] [--seed 1] [--tool PATH] [--shared DIR] [--only NAME,..] [--texts] [--large] [--file NAME=PATH]
    fuzz_tokenizers.py --unicode-data FILE      writes daemon/model/unicode_data.c from the library
    fuzz_tokenizers.py --time                   bytes per second of spurion-tokenize on ordinary text

Files: the real ones of SHARED/tokenizers and SHARED/example_cases, those named by --file, and files of the other pipelines (Llama-3,
Qwen, Gemma, Mistral, Llama-2, GPT-4o's regex, SmolLM, and odd ones) trained here: on a small text of its own, or with --large on the
preference pairs of SHARED, with vocabularies of about 20,000 tokens (then without the odd
ones). The library must be importable; the tool is SPURION_TOKENIZE or --tool; SHARED is SPURION_SHARED or ../shared beside the source tree. Exit status 1 when anything differs.
"""
import argparse, glob, gzip, json, os, random, subprocess, sys, tempfile, time

os.environ.setdefault("RAYON_NUM_THREADS", "2")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
os.environ["RUST_BACKTRACE"] = "0"
import tokenizers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

SOURCE = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN = LLAMA3.replace("{1,3}", "")
GPT4O = "|".join([
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"\p{N}{1,3}", r" ?[^\s\p{L}\p{N}]+[\r\n/]*", r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+"])
NEMO = "|".join([r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
                 r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
                 r"\p{N}", r" ?[^\s\p{L}\p{N}]+[\r\n/]*", r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+"])
META = "\u2581"


# What trained files are made from; --large sets both.
TRAINING = {"texts": None, "scale": 1}


# ---- files -------------------------------------------------------------------------------------------------------------

def corpus():
    """Small fixed text with the things real text has, or TRAINING's texts; only for training."""
    if TRAINING["texts"]:
        return TRAINING["texts"]
    rng = random.Random(7)
    words = ("the of and to in a is that it was for on are as with his they at be this from I have or by one had not but what all were "
             "when we there can an your which their said if do will each about how up out them then she many some so these would other into "
             "has more her two like him see time could no make than first been its who now people my made over did down only way find use "
             "may water long little very after words called just where most know don't I'm you're we'll it's they've Thank pleasure "
             "assistant Human Assistant sorry certainly however therefore reward model feature \u00fcber caf\u00e9 na\u00efve \u4f60\u597d \u4e16\u754c "
             "\u041f\u0440\u0438\u0432\u0435\u0442 \u043c\u0438\u0440 \u0645\u0631\u062d\u0628\u0627 \u65e5\u672c\u8a9e \ud55c\uad6d\uc5b4 \U0001f600 2024 3.14 1,000 https://example.org/a_b?c=d").split()
    lines = []
    for _ in range(4000):
        line = " ".join(rng.choice(words) for _ in range(rng.randint(3, 24)))
        lines.append(line[0].upper() + line[1:] + rng.choice([".", "!", "?", ":\n\n", "\n", "...", '"', "  "]))
    return lines


def byte_level(vocab, normalizer, pre, **model):
    t = Tokenizer(models.BPE(**model))
    if normalizer is not None:
        t.normalizer = normalizer
    t.pre_tokenizer = pre
    t.decoder = decoders.ByteLevel()
    t.train_from_iterator(corpus(), trainers.BpeTrainer(vocab_size=vocab * TRAINING["scale"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    return t


def split(regex, behavior="isolated", invert=False):
    return pre_tokenizers.Split(Regex(regex), behavior, invert)


def with_regex(regex):
    return pre_tokenizers.Sequence([split(regex), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def all_merges(t):
    """Llama-3's merges: every split of every token with both halves in the vocabulary, in the order of ranks."""
    d = json.loads(t.to_str())
    vocab = d["model"]["vocab"]
    merges = []
    for token, rank in vocab.items():
        own = [(vocab[token[:i]], vocab[token[i:]], token[:i], token[i:]) for i in range(1, len(token)) if token[:i] in vocab and token[i:] in vocab]
        merges += [(rank, *m) for m in sorted(own)]
    d["model"]["merges"] = [[a, b] for *_, a, b in sorted(merges)]
    d["model"]["ignore_merges"] = True
    return Tokenizer.from_str(json.dumps(d))


def pairs(t):
    """The same pipeline with every pair of byte-level characters a token, in no order: ids then show where pieces end."""
    rng, d = random.Random(3), json.loads(t.to_str())
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [[a, b] for a in alphabet for b in alphabet]
    rng.shuffle(merges)
    d["added_tokens"], d["post_processor"] = [], None
    d["model"]["vocab"] = {x: i for i, x in enumerate(alphabet + ["".join(m) for m in merges])}
    d["model"]["merges"], d["model"]["ignore_merges"] = merges, False
    return Tokenizer.from_str(json.dumps(d))


def dense():
    """Every string of a and b up to six letters, every split of it a merge, in no order: many merges make one token."""
    rng = random.Random(5)
    words = [""]
    for _ in range(6):
        words += [w + c for w in words if len(w) == max(map(len, words)) for c in "ab"]
    words = words[1:]
    merges = [(w[:i], w[i:]) for w in words for i in range(1, len(w))]
    rng.shuffle(merges)
    return Tokenizer(models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=merges))


def spm(vocab, normalizer, pre, unk="<unk>", byte_fallback=True, fuse_unk=True, special=("<s>", "</s>")):
    t = Tokenizer(models.BPE(unk_token=unk, byte_fallback=byte_fallback, fuse_unk=fuse_unk))
    if normalizer is not None:
        t.normalizer = normalizer
    if pre is not None:
        t.pre_tokenizer = pre
    tokens = [unk, *special] + (["<0x%02X>" % b for b in range(256)] if byte_fallback else [])
    # trained with words apart, as SentencePiece does; the file then has its own pre-tokenizer
    trainee = Tokenizer(models.BPE(unk_token=unk))
    trainee.normalizer = normalizers.Sequence([*([normalizer] if normalizer else []), normalizers.Prepend(META), normalizers.Replace(" ", META)])
    trainee.pre_tokenizer = pre_tokenizers.Split(META, "merged_with_next")
    trainee.train_from_iterator(corpus(), trainers.BpeTrainer(vocab_size=vocab * TRAINING["scale"], special_tokens=tokens, limit_alphabet=120, show_progress=False))
    d, e = json.loads(t.to_str()), json.loads(trainee.to_str())
    d["model"]["vocab"], d["model"]["merges"] = e["model"]["vocab"], e["model"]["merges"]
    size = len(d["model"]["vocab"])
    for n in range(2, 9):  # runs of U+2581 as Llama has them
        run = META * n
        if run not in d["model"]["vocab"]:
            d["model"]["vocab"][run] = size
            size += 1
            d["model"]["merges"] += [[META * i, META * (n - i)] for i in range(1, n)]
    t = Tokenizer.from_str(json.dumps(d))
    t.add_special_tokens([AddedToken(x, special=True, normalized=False) for x in (unk, *special)])
    t.decoder = decoders.Sequence([decoders.Replace(META, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return t


def odd_added(t):
    """Added tokens with every flag, some inside one another."""
    t.add_tokens([AddedToken("[ONE]", single_word=True), AddedToken("[LEFT]", lstrip=True), AddedToken("[RIGHT]", rstrip=True, normalized=False),
                  AddedToken("[BOTH]", lstrip=True, rstrip=True), AddedToken("word", single_word=True, normalized=False),
                  AddedToken("[RIGHT][LEFT]", normalized=False), AddedToken("caf\u00e9"), AddedToken("Ab", normalized=True),
                  AddedToken("  ", normalized=False), AddedToken("\n\n\n", normalized=False), AddedToken("\U0001f468\u200d\U0001f469")])
    t.add_special_tokens([AddedToken("<|start_header_id|>", special=True), AddedToken("<|im_end|>", normalized=False, special=True)])
    return t


def template(t, before=(), after=()):
    t.post_processor = processors.TemplateProcessing(single=[*before, "$A", *after], pair=[*before, "$A", *before, "$B"],
                                                     special_tokens=[(x, t.token_to_id(x)) for x in dict.fromkeys((*before, *after))])
    return t


def pipelines():
    """name -> Tokenizer of the published pipelines that have no real file here."""
    out = {}
    bl, seq = pre_tokenizers.ByteLevel, pre_tokenizers.Sequence
    llama3 = all_merges(byte_level(1500, None, with_regex(LLAMA3)))
    llama3.add_special_tokens(["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"])
    llama3.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template(llama3, ["<|begin_of_text|>"]).post_processor])
    out["llama3"] = llama3
    qwen = byte_level(1500, normalizers.NFC(), with_regex(QWEN))
    qwen.add_special_tokens(["<|im_start|>", "<|im_end|>", "<|endoftext|>"])
    qwen.add_tokens([AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False), AddedToken("<tool_call>", normalized=False)])
    out["qwen"] = qwen
    out["mistral-nemo"] = byte_level(1500, None, with_regex(NEMO))
    out["mistral-nemo"].add_special_tokens(["<unk>", "<s>", "</s>", "[INST]", "[/INST]"])
    template(out["mistral-nemo"], ["<s>"])
    out["gpt4o"] = byte_level(1500, None, with_regex(GPT4O))
    out["smollm"] = byte_level(1500, None, seq([pre_tokenizers.Digits(individual_digits=True), bl(add_prefix_space=False)]))
    prepend = normalizers.Sequence([normalizers.Prepend(META), normalizers.Replace(" ", META)])
    out["llama2"] = template(spm(1200, prepend, None), ["<s>"])
    out["mistral"] = template(spm(1200, None, pre_tokenizers.Metaspace(META, prepend_scheme="first", split=False)), ["<s>"])
    gemma = spm(1200, normalizers.Replace(" ", META), pre_tokenizers.Split(" ", "merged_with_previous"), special=("<bos>", "<eos>"))
    gemma.add_special_tokens(["<start_of_turn>", "<end_of_turn>"])
    # as in the published file: runs of newlines and spaces and some tags are added tokens that are not special
    gemma.add_tokens([AddedToken(x, normalized=False) for x in ["\n" * n for n in range(2, 32)] + [META * n for n in range(2, 32)] + ["<b>", "</table>", "<unused0>"]])
    out["gemma"] = template(gemma, ["<bos>"])
    return out


def odd(known):
    """name -> Tokenizer for the rules that no known family uses, and of known ones (name -> Tokenizer) with every pair a token."""
    out, bl, seq = {}, pre_tokenizers.ByteLevel, pre_tokenizers.Sequence
    out["odd-bytes"] = odd_added(byte_level(800, normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()]),
                                            seq([pre_tokenizers.Digits(individual_digits=False), bl(add_prefix_space=True)])))
    out["odd-bytes"] = template(out["odd-bytes"], ["<|im_end|>", "[ONE]"], ["<|start_header_id|>"])
    out["odd-spm"] = odd_added(spm(800, normalizers.Sequence([normalizers.NFD(), normalizers.Strip(), normalizers.Replace(Regex("l+|[\\d]"), "L"),
                                                              normalizers.Prepend(META)]), pre_tokenizers.Metaspace(META, prepend_scheme="always")))
    out["odd-first"] = odd_added(spm(800, normalizers.Strip(left=True, right=False), pre_tokenizers.Metaspace(META, prepend_scheme="first")))
    out["odd-unk"] = odd_added(spm(600, normalizers.NFKD(), pre_tokenizers.Metaspace(), byte_fallback=False, fuse_unk=False))
    out["odd-fuse"] = odd_added(spm(600, None, pre_tokenizers.WhitespaceSplit(), byte_fallback=False))
    words = Tokenizer(models.BPE(unk_token="<unk>", continuing_subword_prefix="##", end_of_word_suffix="</w>"))
    words.normalizer, words.pre_tokenizer = normalizers.NFC(), pre_tokenizers.Whitespace()
    words.train_from_iterator(corpus(), trainers.BpeTrainer(vocab_size=900, special_tokens=["<unk>"], continuing_subword_prefix="##",
                                                            end_of_word_suffix="</w>", show_progress=False))
    out["odd-affix"] = odd_added(words)
    for i, (regex, behavior, invert) in enumerate([("\\p{L}+|\\d", "removed", True), ("[aeiou]*", "merged_with_previous", False), ("\\s", "merged_with_next", False),
                                                   ("(?i)[k\\p{N}]|\\p{Lu}|(?<=a)b|(.)\\1", "contiguous", False), ("\\w+(?=\\W)|\\bx|[\\b]|[]x]\\B", "isolated", False),
                                                   ("[^\\P{M}a]|\\p{^N}{2}", "contiguous", True)]):
        out["odd-split%d" % i] = byte_level(400, None, seq([split(regex, behavior, invert), bl(add_prefix_space=False, use_regex=i % 2 == 0)]))
    out["odd-normbytes"] = byte_level(700, normalizers.Sequence([normalizers.Replace("e", ""), normalizers.ByteLevel()]), split("\u0120", "merged_with_next"))
    for name in ("llama3", "qwen", "gpt4o", "smollm", "odd-bytes", *["odd-split%d" % i for i in range(6)]):
        out["pairs-" + name] = pairs((known | out)[name])
    out["pairs-gpt2"] = pairs(byte_level(300, None, bl(add_prefix_space=False)))
    out["odd-dense"] = dense()
    return out


def files(shared, into, only, named):
    """(name, path) of every tokenizer.json under test."""
    found = [tuple(x.split("=", 1)) for x in named]
    for path in sorted(glob.glob(os.path.join(shared, "data", "tokenizers", "*.json.gz"))):
        name = os.path.basename(path).split(".")[0]
        target = os.path.join(into, name + ".json")
        with gzip.open(path) as f, open(target, "wb") as g:
            g.write(f.read())
        found.append((name, target))
    for path in sorted(glob.glob(os.path.join(shared, "data", "example_cases", "*", "model", "tokenizer.json"))):
        found.append(("case-" + path.split(os.sep)[-3], path))
    if len(found) == len(named):
        print("SKIP real tokenizers: none under %s" % shared)
    if only and only <= {x[0] for x in found}:
        return [x for x in found if x[0] in only]
    made = pipelines()
    if not TRAINING["texts"]:
        made |= odd(made)
    for name, t in made.items():
        target = os.path.join(into, name + ".json")
        t.save(target)
        found.append((name, target))
    return [x for x in found if not only or x[0] in only]


def load(path):
    t = Tokenizer.from_file(path)
    t.no_truncation()
    t.no_padding()
    return t


# ---- strings -----------------------------------------------------------------------------------------------------------

SPACES = [" ", "  ", "   ", "\t", "\n", "\r\n", "\r", "\n\n", " \n", "\u00a0", "\u2003", "\u3000", "\u0085", "\u2028", "\x0b", "\x0c", "\u200b", "\u1680", "\ufeff"]
QUOTES = ["'s", "'S", "'\u017f", "'t", "'LL", "'ll", "'re", "'vE", "'m", "'d", "'D", "\u2019s", "\u2019ll", "\u2018", "\u201c", "\u201d", "`", "''", "'"]
EMOJI = ["\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466", "\U0001f44d\U0001f3fd", "\U0001f1e9\U0001f1ea", "\u2764\ufe0f", "\U0001f600", "1\ufe0f\u20e3", "\U0001f3f4\U000e0067\U000e0062\U000e007f"]
MARKS = ["e\u0301", "\u0041\u030a", "\u0323\u0301", "\u1100\u1161\u11a8", "\uac00\u11a8", "\u0308\u0301", "\u212b", "\ufb01", "\u0130", "\u1e9b\u0323", "\u0344", "\u0f71\u0f72", "\U00011935\U00011930",
         "\u0345\u0301", "\U0001e130\u0301", "\u2126", "\u09c7\u09be", "\u0958", "\u32ff", "\uf900", "\u0152", "\u01c5", "\u1fbc"]
WORDS = ["the", "Hello", "don't", "I'm", "tokenization", "internationalisation", "Thank you. My pleasure.", "https://a.b/c?d=e", "HeLLo", "ABC", "iPhone", "\u4f60\u597d", "\u041f\u0440\u0438\u0432\u0435\u0442",
         "\u0645\u0631\u062d\u0628\u0627", "\ud55c\uad6d\uc5b4", "caf\u00e9", "123", "1234567", "3.14", "\u0664\u0665", "\u00bd", "\u2167", "\u00b2", "...", "!!", "?!", "--", "==", "{}", "();", "\\n", META, META * 3, "_", "<0x0A>", "\u0120the", "\u010a"]
# assigned between Unicode 14 and 17: the parts of the library disagree about them
NEW = ["\ua7da", "\ua7dc", "\u1c89", "\u1c8a", "\U00010d50", "\U00010d70", "\U00011f04", "\U0001e4d0", "\U0002ebf0", "\U0001fae8", "\U00011de0", "\U00016ff4",
       "\U00016ea0", "\U00011bf0", "\U00010d40", "\u0897", "\U0001e5ee", "\u1ac1\u0301", "\U000113b8", "\u0c5c"]
PLANES = [(0x20, 0x7f), (0x80, 0x250), (0x250, 0x800), (0x800, 0x3000), (0x3000, 0xd800), (0xe000, 0x10000), (0x10000, 0x20000), (0x20000, 0x32000), (0xe0000, 0xe0200), (0x100000, 0x110000)]


def piece(rng, specials):
    k = rng.randrange(13)
    if k < 3:
        return rng.choice(WORDS)
    if k < 5:
        return rng.choice(SPACES)
    if k == 5:
        return rng.choice(QUOTES)
    if k == 6:
        return rng.choice(EMOJI + MARKS + NEW)
    if k == 7:
        low, high = rng.choice(PLANES)
        return "".join(chr(rng.randrange(low, high)) for _ in range(rng.randint(1, 4)))
    if k == 8:
        return chr(rng.randrange(32)) if rng.random() < 0.5 else chr(rng.choice([0, 0x7f, 0x80, 0x9f, 0xad, 0xfffd, 0xffff, 0x10ffff]))
    if k == 9:
        return rng.choice(specials) if specials else " "
    if k == 10:
        return rng.choice(" \n\taa\u00e9") * rng.randint(1, 40)
    if k == 11:
        letters = rng.choice(["abcdefghijklmnopqrstuvwxyzABC'0123. ", "ab", "a '\u017fsS\u212aK\n"])
        return "".join(rng.choice(letters) for _ in range(rng.randint(1, 30)))
    cut = rng.choice(specials) if specials else "word"  # part of a token, or one glued to letters
    return cut[:rng.randint(0, len(cut))] + rng.choice(["", "x", " ", META])


def strings(rng, count, specials):
    out = []
    for i in range(count):
        s = "".join(piece(rng, specials) for _ in range(rng.randint(1, 2 + i % 12)))
        if i % 997 == 0:
            s = s * 50 + "a" * rng.randint(0, 3000)
        out.append(s)
    return out


def real_texts(shared):
    out = []

    def walk(v):
        if isinstance(v, str):
            out.append(v)
        elif isinstance(v, (list, dict)):
            for x in v.values() if isinstance(v, dict) else v:
                walk(x)
    for path in sorted(glob.glob(os.path.join(shared, "data", "*.jsonl.gz"))):
        with gzip.open(path, "rt", encoding="utf-8") as f:
            for line in f:
                walk(json.loads(line))
    for path in sorted(glob.glob(os.path.join(shared, "data", "example_cases", "*", "*.jsonl"))):
        with open(path, encoding="utf-8", errors="replace") as f:
            for line in f:
                try:
                    walk(json.loads(line))
                except ValueError:  # the refused case has broken lines
                    continue
    return [s for s in dict.fromkeys(out) if not any("\ud800" <= c < "\ue000" for c in s)]


# ---- comparison --------------------------------------------------------------------------------------------------------

def ours(tool, path, texts):
    # through files: both sides of a pipe would have to be drained at once
    with tempfile.TemporaryFile("w+") as given, tempfile.TemporaryFile("w+") as got:
        given.writelines(json.dumps(s) + "\n" for s in texts)
        given.flush()
        given.seek(0)
        done = subprocess.run([tool, path], stdin=given, stdout=got, stderr=subprocess.PIPE, text=True)
        got.seek(0)
        lines = got.read().splitlines()
    if len(lines) != len(texts):
        lines.append("failed: " + done.stderr.strip())
    return lines


def judged(judge, texts):
    """The library's ids of every text; None where it panics (added tokens that swallow one another's spaces)."""
    try:
        return [e.ids for e in judge.encode_batch_fast(texts, add_special_tokens=True)]
    except BaseException as e:  # PanicException is no Exception
        if isinstance(e, KeyboardInterrupt):
            raise
        if len(texts) == 1:
            return [None]
        half = len(texts) // 2
        return judged(judge, texts[:half]) + judged(judge, texts[half:])


def compare(tool, name, judge, path, texts):
    """(differences, texts where the library itself panics: we refuse them, or give ids where that makes sense)"""
    lines = ours(tool, path, texts)
    bad = panics = 0
    if len(lines) != len(texts):
        print("%s: %d answers for %d texts: %s" % (name, len(lines), len(texts), lines[-1:]))
        bad += 1
    for s, ids, line in zip(texts, judged(judge, texts), lines):
        if ids is None:
            panics += 1
            continue
        want = "[" + ",".join(map(str, ids)) + "]"
        if line != want:
            bad += 1
            if bad <= 5:
                print("%s: %s\n  library %s\n  spurion %s" % (name, ascii(s)[:400], want[:300], line[:300]))
    return bad, panics


def batches(rng, texts, count, specials):
    for i in range(0, len(texts), 5000):
        yield texts[i:i + 5000]
    for i in range(0, count, 20000):
        yield strings(rng, min(20000, count - i), specials)


def time_tool(tool, path, texts):
    """Seconds for the texts, less the seconds for none: opening, and the JSON around them, stay in."""
    with tempfile.TemporaryFile("w+") as given:
        given.writelines(json.dumps(s) + "\n" for s in texts)
        given.flush()
        given.seek(0)
        start = time.monotonic()
        subprocess.run([tool, path], stdin=given, stdout=subprocess.DEVNULL, check=True)
        full = time.monotonic() - start
    start = time.monotonic()
    subprocess.run([tool, path], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=True)
    return full - (time.monotonic() - start)


# ---- unicode_data.c ----------------------------------------------------------------------------------------------------

CATEGORIES = "Cn Lu Ll Lt Lm Lo Mn Mc Me Nd Nl No Pc Pd Ps Pe Pi Pf Po Sm Sc Sk So Zs Zl Zp Cc Cf Cs Co".split()


def characters():
    return [c for c in range(0x110000) if not 0xd800 <= c < 0xe000]


def removed_by(pre):
    """Code points that a removing pre-tokenizer takes away."""
    out, cps = set(), characters()
    for i in range(0, len(cps), 4096):
        part = cps[i:i + 4096]
        kept = [False] * len(part)
        for _, (a, b) in pre.pre_tokenize_str("".join(map(chr, part))):
            kept[a:b] = [True] * (b - a)
        out.update(c for c, k in zip(part, kept) if not k)
    return out


def in_normalisation():
    """Code points that the library decomposes, composes or reorders."""
    nfd, nfkd, out = normalizers.NFD(), normalizers.NFKD(), {0x345}
    for c in characters():
        for form in (nfd, nfkd):
            d = form.normalize_str(chr(c))
            if d != chr(c):
                out.add(c)
                out.update(map(ord, d))
        x = "x\u0345" + chr(c)  # U+0345 has the highest combining class
        if nfd.normalize_str(x) != x:
            out.add(c)
    return out


def class_runs():
    value = bytearray(0x110000)
    for i, category in enumerate(CATEGORIES[1:], 1):
        for c in removed_by(split(r"\p{%s}" % category, "removed")):
            value[c] = i
    for c in range(0xd800, 0xe000):
        value[c] = CATEGORIES.index("Cs")
    words, digits = pre_tokenizers.Whitespace(), pre_tokenizers.Digits(individual_digits=False)
    for c in characters():
        s = "a" + chr(c)
        pieces = words.pre_tokenize_str(s)
        value[c] |= 0x20 if len(pieces) == 1 and pieces[0][0] == s else 0
        value[c] |= 0x40 if len(digits.pre_tokenize_str(s)) == 2 else 0
    for c in in_normalisation():
        value[c] |= 0x80
    return [(c, value[c]) for c in range(0x110000) if c == 0 or value[c] != value[c - 1]]


def lower_runs():
    lower = normalizers.Lowercase()
    pairs = [(c, lower.normalize_str(chr(c))) for c in characters()]
    assert [c for c, s in pairs if len(s) != 1] == [0x130]
    items = [(c, ord(s) - c) for c, s in pairs if len(s) == 1 and ord(s) != c]
    runs, i = [], 0
    while i < len(items):
        best = (i, 1)
        for step in (1, 2):
            j = i
            while j + 1 < len(items) and items[j + 1] == (items[j][0] + step, items[i][1]):
                j += 1
            best = max(best, (j, step), key=lambda x: x[0])
        runs.append((items[i][0], items[best[0]][0], best[1], items[i][1]))
        i = best[0] + 1
    return runs


def write_unicode_data(path):
    def table(rows, width):
        return "".join("    " + " ".join(rows[i:i + width]) + "\n" for i in range(0, len(rows), width))
    with open(path, "w") as f:
        f.write("/* Character classes and lower case as the `tokenizers` library sees them. Thread: constant. Memory: static.\n"
                " * Written by tests/golden/fuzz_tokenizers.py --unicode-data from tokenizers %s; do not edit. */\n/* clang-format off */\n" % tokenizers.__version__)
        f.write('#include "daemon/model/unicode.h"\n#include "daemon/model/unicode_data.h"\n\nconst uint32_t spurion_unicode_runs[] = {\n')
        f.write(table(["0x%x," % (c << 8 | v) for c, v in class_runs()], 12))
        f.write("};\nconst size_t spurion_unicode_run_count = sizeof spurion_unicode_runs / sizeof spurion_unicode_runs[0];\n\n"
                "const spurion_unicode_lower_run spurion_unicode_lower_runs[] = {\n")
        f.write(table(["{0x%x, 0x%x, %d, %d}," % r for r in lower_runs()], 4))
        f.write("};\nconst size_t spurion_unicode_lower_count = sizeof spurion_unicode_lower_runs / sizeof spurion_unicode_lower_runs[0];\n")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--count", type=int, default=200000, help="strings per file")
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--tool", default=os.environ.get("SPURION_TOKENIZE", "spurion-tokenize"))
    p.add_argument("--shared", default=os.environ.get("SPURION_SHARED", os.path.join(os.path.dirname(SOURCE), "shared")))
    p.add_argument("--only", default="")
    p.add_argument("--large", action="store_true", help="train on the preference pairs of SHARED, vocabularies of about 20,000")
    p.add_argument("--file", action="append", default=[], metavar="NAME=PATH", help="one more tokenizer.json")
    p.add_argument("--texts", action="store_true", help="also every text of the shared data")
    p.add_argument("--time", action="store_true")
    p.add_argument("--save", help="keep the trained files in this directory")
    p.add_argument("--unicode-data", metavar="FILE")
    a = p.parse_args()
    if a.unicode_data:
        write_unicode_data(a.unicode_data)
        return 0
    if a.large:
        TRAINING.update(texts=real_texts(a.shared)[::12], scale=14)  # 3 MB of the 33
        if not TRAINING["texts"]:
            sys.exit("fuzz_tokenizers: expected texts under %s, found none" % a.shared)
    total = 0
    with tempfile.TemporaryDirectory() as temporary:
        into = a.save or temporary
        os.makedirs(into, exist_ok=True)
        texts = real_texts(a.shared) if a.texts or a.time else []
        for name, path in files(a.shared, into, set(filter(None, a.only.split(","))), a.file):
            if a.time:
                size = sum(len(s.encode()) for s in texts)
                seconds = time_tool(a.tool, path, texts)
                print("%-24s %8.2f MB/s" % (name, size / seconds / 1e6), flush=True)
                continue
            judge = load(path)
            specials = [x.content for x in judge.get_added_tokens_decoder().values()]
            start, given, bad, panics = time.monotonic(), 0, 0, 0
            for batch in batches(random.Random("%s/%d" % (name, a.seed)), texts, a.count, specials):
                found = compare(a.tool, name, judge, path, batch)
                given, bad, panics = given + len(batch), bad + found[0], panics + found[1]
            total += bad
            print("%-24s %8d strings %6d differences %6d library panics  %.0f s" %
                  (name, given, bad, panics, time.monotonic() - start), flush=True)
    print("seed %d, tokenizers %s: %d differences" % (a.seed, tokenizers.__version__, total))
    return 1 if total else 0


if __name__ == "__main__":
    sys.exit(main())
