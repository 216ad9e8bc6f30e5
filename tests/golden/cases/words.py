"""Made-up text and small trained byte-level BPE tokenizers."""

import random

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

COMMON = ("the of and a to in is you that it he was for on are as with his they at be this from have or by one had not "
          "but what all were when we there can an your which their said if do will each about how up out them then she "
          "many some so these would other into has more her two like him see time could no make than first been its who "
          "now people my made over did down only way find use may water long little very after words called just where "
          "most know").split()
EXTRAS = ["café", "cafe\u0301", "I don’t know.", "I don't know", "Thank you. My pleasure.", "https://example.org/a?b=1&c=2",
          "\n\n- one\n- two\n", "1234567 3.14", "😀👨‍👩‍👧", "   ", "\t\ttabs", "WE'LL they'Ve", "naïve Ωmega 東京 тест", "...!?", "a\u0000b",
          "don't stop's"]
SYLLABLES = "ba ce di fo gu la me ni po ru sa te vi zo bra cri dro flu gre".split()
LLAMA_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
               r"|\s*[\r\n]+|\s+(?!\S)|\s+")


def word(rng: random.Random) -> str:
    if rng.random() < 0.65:
        return rng.choice(COMMON)
    return "".join(rng.choice(SYLLABLES) for _ in range(rng.randint(1, 4)))


def text(rng: random.Random, words: int) -> str:
    """About `words` words in sentences, now and then something awkward."""
    out = []
    while words > 0:
        n = min(words, rng.randint(3, 12))
        sentence = " ".join(word(rng) for _ in range(n))
        out.append(sentence[0].upper() + sentence[1:] + rng.choice([".", ".", "!", "?", ":", ", and so on."]))
        words -= n
        if rng.random() < 0.25:
            out.append(rng.choice(EXTRAS))
    return " ".join(out)


def train_tokenizer(kind: str, vocab: int, seed: int) -> Tokenizer:
    """kind gpt2: byte-level with GPT-2's split, no specials added. kind llama3: Llama-3's split, BOS put in front."""
    rng = random.Random(seed)
    corpus = [text(rng, 60) for _ in range(400)]
    tok = Tokenizer(models.BPE(ignore_merges=kind == "llama3"))
    if kind == "gpt2":
        specials = ["<|endoftext|>"]
        tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tok.post_processor = processors.ByteLevel(trim_offsets=False)
    else:
        specials = ["<|begin_of_text|>", "<|eot_id|>", "<|start|>"]
        tok.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(LLAMA_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab, special_tokens=[AddedToken(s, special=True) for s in specials],
                                  initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False)
    tok.train_from_iterator(corpus, trainer)
    if kind == "llama3":
        tok.post_processor = processors.TemplateProcessing(
            single="<|begin_of_text|> $A", pair="<|begin_of_text|> $A <|begin_of_text|> $B",
            special_tokens=[("<|begin_of_text|>", tok.token_to_id("<|begin_of_text|>"))])
    return tok
